"""Pixels are those of the reference processors: to the bit where they should be."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from boxcar.pipelines.families.catalog import FAMILIES
from boxcar.train.data.pixels import PatchRule, patch_rule, qwen_patches, squares
from boxcar.train.data.stream import resize_pixels
from tests.golden.drawn import recorded
from tests.places import GOLDEN

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

Bytes = npt.NDArray[np.uint8]


def noise(height: int, width: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int) -> Bytes:
    """Like a photograph: no detail finer than a few pixels."""
    return np.asarray(Image.fromarray(noise(height // 8 + 1, width // 8 + 1)).resize((width, height), Image.Resampling.BICUBIC))


def flat(*images: Bytes) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    return torch.from_numpy(np.concatenate([image.reshape(-1) for image in images])), [image.shape[:2] for image in images]


@pytest.mark.parametrize(
    ("family", "rule"),
    [
        ("qwen2_vl", PatchRule(14, 2)),
        ("qwen2_5_vl", PatchRule(14, 2)),
        ("qwen3_vl", PatchRule(16, 2)),
        ("cogvlm", PatchRule(14, 1)),
        ("cogvlm_224", PatchRule(14, 1)),
        ("cogvlm2", PatchRule(14, 2)),
        ("qwen_vl", PatchRule(14, 2)),
    ],
)
def test_patch_rules(family: str, rule: PatchRule) -> None:
    assert patch_rule(FAMILIES[family]) == rule


def test_qwen_patches_are_the_processors_to_the_bit() -> None:
    golden = np.load(GOLDEN / "pixels.npz")
    images, num_patches = [], []
    for number in range(3):
        _, grid_h, grid_w = golden[f"grid{number}"]
        images.append(resize_pixels(Image.fromarray(golden[f"image{number}"]), (int(grid_w) * 14, int(grid_h) * 14), "exact"))
        num_patches.append(int(grid_h * grid_w))
    found = qwen_patches(*flat(*images), PatchRule(14, 2), "clip", torch.float32)
    for number, patches in enumerate(found.split(num_patches)):
        np.testing.assert_array_equal(recorded(patches), golden[f"pixel_values{number}"])


def test_squares_are_cogvlms_to_the_bit() -> None:
    golden = np.load(GOLDEN / "pixels.npz")
    image = resize_pixels(Image.fromarray(golden["cogvlm_image"]), (490, 490), "exact")
    np.testing.assert_array_equal(recorded(torch.tensor(image)), golden["cogvlm_resized_u8"])
    found = squares(*flat(image), "clip", torch.float32)
    assert found.shape == (1, 3, 490, 490)
    np.testing.assert_array_equal(recorded(found[0, :, :16]), golden["cogvlm_first_rows"])


@pytest.mark.parametrize(("family", "normalisation"), [("qwen2_5_vl", "clip"), ("qwen3_vl", "half")])
def test_patches_are_those_of_the_installed_transformers(family: str, normalisation: str) -> None:
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    rule = patch_rule(FAMILIES[family])
    mean, std = (CLIP_MEAN.tolist(), CLIP_STD.tolist()) if normalisation == "clip" else ([0.5] * 3, [0.5] * 3)
    limits: dict[str, Any] = {"shortest_edge": 3136, "longest_edge": 1_003_520}
    processor = module.Qwen2VLImageProcessorPil(
        size=limits, patch_size=rule.patch, merge_size=rule.merge, image_mean=mean, image_std=std, temporal_patch_size=2
    )
    originals = [Image.fromarray(smooth(*shape)) for shape in ((90, 120), (200, 90), (61, 37), (333, 500))]
    expected = processor(images=originals, return_tensors="np")
    resized = []
    for image, (_, grid_h, grid_w) in zip(originals, expected["image_grid_thw"], strict=True):
        resized.append(resize_pixels(image, (int(grid_w) * rule.patch, int(grid_h) * rule.patch), "exact"))
    found = qwen_patches(*flat(*resized), rule, FAMILIES[family].image_normalisation, torch.float32)
    np.testing.assert_array_equal(found, expected["pixel_values"])


def test_rows_and_columns_by_hand() -> None:
    image = noise(4, 8)  # patch 2, merge 1: 2 x 4 patches
    found = qwen_patches(*flat(image), PatchRule(2, 1), "half", torch.float32)
    assert found.shape == (8, 3 * 2 * 4)
    second = found[1].view(3, 2, 2, 2)
    expected = (image[:2, 2:4].astype(np.float32) / 255 - 0.5) / 0.5
    for frame in range(2):
        np.testing.assert_array_equal(second[:, frame].permute(1, 2, 0), expected)
    merged = qwen_patches(*flat(image), PatchRule(2, 2), "half", torch.float32)
    # A window of 2 x 2 patches together: right, then down, then the next window.
    assert torch.equal(merged, found[[0, 1, 4, 5, 2, 3, 6, 7]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_precisions_are_rounded_once(dtype: torch.dtype) -> None:
    image = noise(28, 56)
    exact = qwen_patches(*flat(image), PatchRule(14, 2), "clip", torch.float32)
    assert torch.equal(qwen_patches(*flat(image), PatchRule(14, 2), "clip", dtype), exact.to(dtype))


def test_squares_of_several_images() -> None:
    images = [noise(28, 28, seed) for seed in range(3)]
    found = squares(*flat(*images), "clip", torch.float32)
    for number, image in enumerate(images):
        expected = ((image.astype(np.float32) / np.float32(255) - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1)
        np.testing.assert_array_equal(found[number], expected)


@pytest.mark.parametrize("how", ["exact", "fast"])
def test_equal_sizes_are_left_alone(how: Any) -> None:
    pixels = noise(28, 56)
    np.testing.assert_array_equal(resize_pixels(Image.fromarray(pixels), (56, 28), how), pixels)


@pytest.mark.parametrize(
    ("size_wh", "new_wh"),
    [((640, 427), (532, 644)), ((640, 480), (672, 504)), ((640, 480), (644, 480)), ((640, 480), (640, 448)), ((1280, 960), (336, 252))],
    ids=["narrower, taller", "larger", "wider", "lower", "much smaller"],
)
def test_fast_is_within_two_grey_levels_where_the_passes_have_one_order(size_wh: tuple[int, int], new_wh: tuple[int, int]) -> None:
    image = Image.fromarray(smooth(*size_wh[::-1]))
    exact, fast = (resize_pixels(image, new_wh, how) for how in ("exact", "fast"))
    assert fast.flags.c_contiguous
    assert fast.shape == exact.shape == (*new_wh[::-1], 3)
    assert int(np.abs(exact.astype(int) - fast).max()) <= 2
