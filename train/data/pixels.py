"""Bytes -> what a vision tower takes, on the device. The loader ships resized images as uint8: a byte a value, where float32 patches with
the still image repeated over time cost eight.

    qwen_patches     Qwen2-VL and later    (patches, 3 * 2 * p * p), rows grouped by merge window, columns (channel, time, row, column)
    squares          families of one square    (I, 3, S, S)

Normalising is a look-up: a byte has 256 values. The table is x / 255 - mean, over std, in float32, as torchvision's ToTensor and Normalize
and transformers' PIL processors all come out; in float32 the results are theirs to the bit (golden tests).
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from boxcar.pipelines.families.family import Family, Normalisation
    from boxcar.train.data.collate import MicroBatch

TEMPORAL_PATCH = 2
"""Frames of a patch; a still image is repeated over them."""
MEAN_AND_STD: "dict[Normalisation, tuple[tuple[float, float, float], tuple[float, float, float]]]" = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""By `Family.image_normalisation`, in the order R, G, B. clip: OpenAI's CLIP, as in every preprocessor_config.json of these families."""


@dataclass(frozen=True)
class PatchRule:
    """How a family cuts a resized image."""

    patch: int
    """Side in pixels."""
    merge: int
    """Patches that become one token, each way."""


def patch_rule(family: "Family") -> PatchRule:
    """The family's patch and merge, as its resize rule shows them on one image."""
    limits = family.resize.published_limits
    sizes = family.resize(1024, 1024, limits.min_pixels, limits.max_pixels)
    grid_h, grid_w = int(sizes.grid_h), int(sizes.grid_w)
    return PatchRule(int(sizes.height) // grid_h, math.isqrt(grid_h * grid_w // int(sizes.visual_tokens)))


def qwen_patches(
    pixels: torch.Tensor, sizes_hw: list[tuple[int, int]], rule: PatchRule, normalisation: "Normalisation", dtype: torch.dtype
) -> torch.Tensor:
    """(patches of all images, 3 * 2 * patch^2) of `dtype`, what Qwen2VLImageProcessor calls pixel_values.

    pixels: flat uint8, images one after another, each (H, W, 3); sides are multiples of patch * merge.
    """
    p, m = rule.patch, rule.merge
    parts = []
    for image in _images(pixels, sizes_hw):
        height, width, _ = image.shape
        windows = image.view(height // (m * p), m, p, width // (m * p), m, p, 3)
        parts.append(windows.permute(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, p * p))  # bytes are moved, not floats
    values = _normalised(torch.cat(parts), channel_dim=1, normalisation=normalisation, dtype=dtype)
    return values.unsqueeze(2).expand(-1, -1, TEMPORAL_PATCH, -1).reshape(len(values), -1)


def squares(pixels: torch.Tensor, sizes_hw: list[tuple[int, int]], normalisation: "Normalisation", dtype: torch.dtype) -> torch.Tensor:
    """(I, 3, S, S) of `dtype`. pixels: flat uint8, each image (S, S, 3)."""
    assert len(set(sizes_hw)) == 1, "a family of one size"
    height, width = sizes_hw[0]
    images = pixels.view(len(sizes_hw), height, width, 3).permute(0, 3, 1, 2).contiguous()
    return _normalised(images, channel_dim=1, normalisation=normalisation, dtype=dtype)


def images_of(batch: "MicroBatch", family: "Family", dtype: torch.dtype) -> torch.Tensor:
    """The images of a micro-batch that has some, as the family's vision tower takes them: `qwen_patches` or `squares`."""
    if family.network.image_input == "patches":
        return qwen_patches(batch.pixels, _sizes(batch), patch_rule(family), family.image_normalisation, dtype)
    return squares(batch.pixels, _sizes(batch), family.image_normalisation, dtype)


def _sizes(batch: "MicroBatch") -> list[tuple[int, int]]:
    return [(height, width) for height, width in batch.image_sizes_hw.tolist()]  # on the host: no wait for the device


def _images(pixels: torch.Tensor, sizes_hw: list[tuple[int, int]]) -> list[torch.Tensor]:
    """Views (H, W, 3)."""
    lengths = [3 * height * width for height, width in sizes_hw]
    return [part.view(*size, 3) for part, size in zip(pixels.split(lengths), sizes_hw, strict=True)]


def _normalised(values: torch.Tensor, *, channel_dim: int, normalisation: "Normalisation", dtype: torch.dtype) -> torch.Tensor:
    """Same shape, of `dtype`. values: uint8 with the 3 channels at `channel_dim`."""
    table = _table(normalisation, dtype, values.device)
    shape = [3 if dim == channel_dim else 1 for dim in range(values.dim())]
    rows = values.to(torch.int32) + torch.arange(0, 3 * 256, 256, dtype=torch.int32, device=values.device).view(shape)
    return table.index_select(0, rows.flatten()).view(values.shape)


@lru_cache(maxsize=16)
def _table(normalisation: "Normalisation", dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(3 * 256,): value of each byte in each channel."""
    mean, std = (torch.tensor(values, dtype=torch.float32)[:, None] for values in MEAN_AND_STD[normalisation])
    byte = torch.arange(256, dtype=torch.float32)[None] / 255
    return ((byte - mean) / std).flatten().to(device=device, dtype=dtype)
