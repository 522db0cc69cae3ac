"""Positions against tables made by hand and against what transformers and the published code of CogVLM compute."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from boxcar.train.data.positions import NUM_ROWS, Placed, positions_of
from tests.places import GOLDEN

MERGE = 2


@pytest.mark.parametrize(
    ("length", "images", "t", "h", "w"),
    [
        pytest.param(3, [], "0 1 2", "0 1 2", "0 1 2", id="text alone"),
        pytest.param(
            14,
            [Placed(4, 6, (2, 3))],
            "0 1 2 3 4 4 4 4 4 4 7 8 9 10",
            "0 1 2 3 4 4 4 5 5 5 7 8 9 10",
            "0 1 2 3 4 5 6 4 5 6 7 8 9 10",
            id="2 x 3, text goes on at 4 + 3",
        ),
        pytest.param(5, [Placed(0, 4, (4, 1))], "0 0 0 0 4", "0 1 2 3 4", "0 0 0 0 4", id="a tall image first"),
        pytest.param(
            7, [Placed(1, 2, (1, 2)), Placed(3, 2, (2, 1))], "0 1 1 3 3 5 6", "0 1 1 3 4 5 6", "0 1 2 3 3 5 6", id="two images that touch"
        ),
        pytest.param(2, [Placed(1, 1, (1, 1))], "0 1", "0 1", "0 1", id="an image last"),
    ],
)
def test_mrope_by_hand(length: int, images: list[Placed], t: str, h: str, w: str) -> None:
    found = positions_of("mrope", length, images)
    assert found.dtype == np.int64
    assert found.tolist() == [list(range(length)), *([int(number) for number in row.split()] for row in (t, h, w))]


def test_mrope_is_get_rope_index_of_transformers() -> None:
    golden = json.loads((GOLDEN / "mrope.json").read_text())
    image_pad = golden["token_ids"]["image_pad"]
    num_checked = 0
    for case in golden["cases"]:
        if "position_ids" not in case:  # cases of what truncation breaks
            continue
        grids = iter(case["image_grid_thw"])
        for number, ids in enumerate(case["input_ids"]):
            real = np.array(case["attention_mask"][number], bool)
            tokens = np.array(ids)[real]
            images, place = [], 0
            while place < len(tokens):
                if tokens[place] == image_pad:
                    _, height, width = next(grids)
                    count = height * width // MERGE**2
                    images.append(Placed(place, count, (height // MERGE, width // MERGE)))
                    place += count
                else:
                    place += 1
            expected = np.array(case["position_ids"])[:, number][:, real]
            np.testing.assert_array_equal(positions_of("mrope", len(tokens), images)[1:], expected, err_msg=case["case"])
            num_checked += 1
        assert next(grids, None) is None
    assert num_checked >= 17


def test_shared_image_by_hand() -> None:
    # bos, boi, four patches, eoi, text: build_position_ids of modeling_cogvlm.py
    assert positions_of("shared_image", 10, [Placed(1, 6, (2, 2))]).tolist() == [[0, 1, 2, 2, 2, 2, 3, 4, 5, 6]]
    assert positions_of("shared_image", 3, []).tolist() == [[0, 1, 2]]


def test_shared_image_is_build_position_ids_of_cogvlm() -> None:
    golden = load_file(GOLDEN / "cogvlm.safetensors")
    for types, expected, mask in zip(golden["token_type_ids"], golden["position_ids"], golden["attention_mask"], strict=True):
        real = mask.astype(bool)
        places = np.flatnonzero(types[real] == 1)
        images = [Placed(int(places[0]), len(places), (1, len(places) - 2))] if len(places) else []
        np.testing.assert_array_equal(positions_of("shared_image", int(real.sum()), images)[0], expected[real])


def test_sequential_counts_every_placeholder() -> None:
    assert positions_of("sequential", 6, [Placed(1, 4, (2, 2))]).tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("rule", NUM_ROWS)
def test_number_of_rows(rule: str) -> None:
    assert len(positions_of(rule, 8, [Placed(1, 6, (2, 3))])) == NUM_ROWS[rule]  # type: ignore[arg-type, index]
