"""What a reader of replies asks of a family's boxes: their form, and how far its numbers go."""

import numpy as np
import pytest

from boxcar.pipelines.families.catalog import FAMILIES

GRIDS = [
    pytest.param("qwen2_vl", (1000, 1000), id="thousandths, rounded"),
    pytest.param("qwen3_vl", (1000, 1000), id="thousandths, rounded, JSON"),
    pytest.param("qwen_vl", (999, 999), id="thousandths, floored"),
    pytest.param("cogvlm2", (999, 999), id="thousandths, floored, brackets"),
    pytest.param("qwen2_5_vl", (644, 476), id="pixels of the resized image"),
]


@pytest.mark.parametrize(("family", "largest"), GRIDS)
def test_the_largest_values_reach_the_far_edge_and_no_box_is_written_beyond_them(family: str, largest: tuple[int, int]) -> None:
    grid, resized = FAMILIES[family].grid, (644, 476)
    assert grid.largest(resized) == largest
    size, resized_wh = np.array([[640, 480]]), np.array([resized])
    written = grid.quantise(np.array([[0.0, 0.0, 640.0, 480.0]]), size, resized_wh)[0, 2:]
    assert (written <= largest).all()
    back = grid.dequantise(np.array([[0, 0, *largest]]), size, resized_wh)[0, 2:]
    unit = (size / resized_wh if grid.needs_resized_size else size / 1000)[0]
    assert (np.abs(back - [640, 480]) <= unit).all()


def test_every_family_has_one_of_three_forms() -> None:
    forms = {name: family.box_text.form for name, family in FAMILIES.items()}
    assert {form: {name for name in forms if forms[name] == form} for form in forms.values()} == {
        "json": {"qwen2_5_vl", "qwen3_vl"},
        "tags": {"qwen_vl", "qwen2_vl"},
        "list": {"cogvlm", "cogvlm_chat", "cogvlm_224", "cogvlm2"},
    }


def test_a_sentence_about_one_thing_is_no_answer_of_named_brackets() -> None:
    text = FAMILIES["cogvlm"].box_text
    assert text.parse_answer("The dog is at [[001,002,003,004]]") is None
    named = text.parse_answer("dog [[001,002,003,004]], cat [[005,006,007,008]]")
    assert named is not None
    assert [box.label for box in named] == ["dog", "cat"]
