"""Sizes, tokens and rounding against the numbers of the families' own code."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boxcar.pipelines.families.catalog import FAMILIES
from boxcar.pipelines.families.patches import SmartResize
from tests.places import GOLDEN

# transformers 5.23.0, PIL back end: (width, height, min_pixels, max_pixels) -> (resized width, height, visual tokens).
SMART_RESIZE_CASES = [
    pytest.param("qwen2_5_vl", 640, 480, 3136, 12845056, (644, 476, 391), id="photo"),
    pytest.param("qwen2_5_vl", 500, 375, 3136, 12845056, (504, 364, 234), id="sides-round-apart"),
    pytest.param("qwen2_5_vl", 1920, 1080, 3136, 1003520, (1316, 728, 1222), id="shrunk"),
    pytest.param("qwen2_5_vl", 10, 10, 3136, 12845056, (56, 56, 4), id="grown"),
    pytest.param("qwen2_5_vl", 2000, 10, 3136, 12845056, (812, 28, 29), id="grown-strip"),
    pytest.param("qwen2_vl", 4000, 3000, 3136, 12845056, (4004, 2996, 15301), id="large"),
    pytest.param("qwen3_vl", 640, 480, 65536, 16777216, (640, 480, 300), id="qwen3-photo"),
    pytest.param("qwen3_vl", 10, 10, 65536, 16777216, (256, 256, 64), id="qwen3-grown"),
    pytest.param("qwen3_vl", 4000, 3000, 65536, 16777216, (4000, 3008, 11750), id="qwen3-large"),
]


@pytest.mark.parametrize(("family", "width", "height", "min_pixels", "max_pixels", "expected"), SMART_RESIZE_CASES)
def test_smart_resize_equals_upstream(
    family: str, width: int, height: int, min_pixels: int, max_pixels: int, expected: tuple[int, int, int]
) -> None:
    sizes = FAMILIES[family].resize(width, height, min_pixels, max_pixels)
    assert (int(sizes.width), int(sizes.height), int(sizes.visual_tokens)) == expected


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_every_golden_size(family: str) -> None:
    cases = json.loads((GOLDEN / f"sizes_{family}.json").read_text())["cases"]
    assert len(cases) > 50
    inputs = np.array([case[:4] for case in cases])
    sizes = FAMILIES[family].resize(*inputs.T)
    for row, (*case, expected) in enumerate(cases):
        assert bool(sizes.refused[row]) is (expected is None), case
        if expected is not None:
            columns = (sizes.width, sizes.height, sizes.grid_w, sizes.grid_h, sizes.visual_tokens)
            assert [int(column[row]) for column in columns] == expected, case


@pytest.mark.parametrize(
    ("golden_name", "family"),
    [
        ("qwen_vl", "qwen_vl"),
        ("cogvlm_490", "cogvlm"),
        ("cogvlm_490", "cogvlm_chat"),
        ("cogvlm_224", "cogvlm_224"),
        ("cogvlm2_1344", "cogvlm2"),
    ],
)
def test_fixed_sizes(golden_name: str, family: str) -> None:
    expected = json.loads((GOLDEN / "fixed_size.json").read_text())["families"][golden_name]
    sizes = FAMILIES[family].resize([640, 1, 5000], [480, 5000, 1], 1, 1)
    assert set(sizes.width.tolist()) == set(sizes.height.tolist()) == {expected["image_size"]}
    assert set(sizes.visual_tokens.tolist()) == {expected["visual_tokens"]}
    assert expected["visual_tokens"] + FAMILIES[family].chat.boundary_tokens == expected["tokens_with_boundaries"]


@pytest.mark.parametrize(
    ("width", "height", "refused"), [(5600, 28, False), (5601, 28, True), (28, 5601, True), (1, 200, False), (0, 5, True)]
)
def test_aspect_ratio_over_200_is_refused(width: int, height: int, refused: bool) -> None:
    sizes = FAMILIES["qwen2_5_vl"].resize(width, height, 3136, 1003520)
    assert bool(sizes.refused) is refused
    assert (int(sizes.visual_tokens) == 0) is refused


@given(
    st.integers(1, 6000),
    st.integers(1, 6000),
    st.integers(1, 200_000),
    st.integers(200_000, 20_000_000),
    st.sampled_from(["qwen2_5_vl", "qwen3_vl"]),
)
def test_columns_equal_the_upstream_function(width: int, height: int, low: int, high: int, name: str) -> None:
    module = pytest.importorskip(
        "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl", reason="the oracle needs transformers 5 (extra `train`)"
    )
    rule = FAMILIES[name].resize
    assert isinstance(rule, SmartResize)
    sizes = rule(width, height, low, high)
    try:
        expected = module.smart_resize(height, width, rule.factor, low, high)
    except ValueError:
        assert sizes.refused
        return
    assert (int(sizes.height), int(sizes.width)) == expected


def _mrope_cases() -> list[Any]:
    return [
        case for case in json.loads((GOLDEN / "mrope.json").read_text())["cases"] if "position_ids" in case and "image_grid_thw" in case
    ]


def test_position_span_equals_mrope() -> None:
    checked = 0
    for case in _mrope_cases():
        if len(case["input_ids"]) != 1 or len(case["image_grid_thw"]) != 1 or case["family"] not in FAMILIES:
            continue
        rule = FAMILIES[case["family"]].resize
        assert isinstance(rule, SmartResize)
        _, grid_h, grid_w = case["image_grid_thw"][0]
        ids, positions = case["input_ids"][0], case["position_ids"][0][0]
        if 151652 not in ids or 151653 not in ids or ids.index(151653) + 1 >= len(ids):
            continue
        span = int(rule(grid_w * rule.patch, grid_h * rule.patch, 1, 10**9).position_span)
        assert positions[ids.index(151653) + 1] - positions[ids.index(151652)] == span, case["case"]
        checked += 1
    assert checked


QUANTISED = [
    # (width, height), box in px -> round 0..1000, floor 0..999; from golden/box_quantization.json.
    pytest.param((640, 480), (0, 0, 640, 480), (0, 0, 1000, 1000), (0, 0, 999, 999), id="whole"),
    pytest.param((640, 480), (639, 479, 640, 480), (998, 998, 1000, 1000), (998, 997, 999, 999), id="corner"),
]


@pytest.mark.parametrize(("size", "box", "rounded", "floored"), QUANTISED)
def test_thousandths(size: tuple[int, int], box: tuple[float, ...], rounded: tuple[int, ...], floored: tuple[int, ...]) -> None:
    boxes, sizes = np.array([box], dtype=float), np.array([size])
    assert FAMILIES["qwen2_vl"].grid.quantise(boxes, sizes, sizes).tolist() == [list(rounded)]
    assert FAMILIES["cogvlm"].grid.quantise(boxes, sizes, sizes).tolist() == [list(floored)]


def test_every_golden_box() -> None:
    cases = json.loads((GOLDEN / "box_quantization.json").read_text())["cases"]
    boxes, sizes = np.array([case["box_xyxy_px"] for case in cases], dtype=float), np.array([case["size_wh"] for case in cases])
    rounded = [case["round1000_clamp1000 (Qwen process_bbox.ipynb, Qwen2-VL/3-VL)"] for case in cases]
    floored = [case["floor1000_clamp999"] for case in cases]
    brackets = [case["cogvlm_str(int(v*1000) clamped 0..999, %03d)"] for case in cases]
    for name in ("qwen2_vl", "qwen3_vl"):
        assert FAMILIES[name].grid.quantise(boxes, sizes, sizes).tolist() == rounded
    for name in ("qwen_vl", "cogvlm", "cogvlm_chat", "cogvlm_224", "cogvlm2"):
        assert FAMILIES[name].grid.quantise(boxes, sizes, sizes).tolist() == floored
    text = FAMILIES["cogvlm"].box_text
    for values, expected in zip(floored, brackets, strict=True):
        assert [list(box.values) for box in text.parse_answer(expected) or []] == [values]
