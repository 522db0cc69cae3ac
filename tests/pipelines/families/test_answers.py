"""What families answer, so that nobody else asks who they are."""

import re
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from boxcar.pipelines.families.box_text import JsonBoxText, as_xyxy, render
from boxcar.pipelines.families.catalog import FAMILIES
from boxcar.pipelines.families.family import Family, Normalisation
from boxcar.schemas.errors import ConfigError
from boxcar.schemas.workflow import TaskConfig
from boxcar.train.answering.parse import parse
from boxcar.train.data.pixels import MEAN_AND_STD
from tests.small_units import convert, only, record, region, rows_of, settings

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
SIZE_WH, RESIZED_WH = np.array([[640, 480]]), np.array([[644, 476]])
BOXES = [[1, 2, 33, 444], [5, 66, 77, 88]]
# As Gemini writes it: y before x, under a key that the reader of loose replies takes for none of a box.
Y_FIRST = JsonBoxText(key="box_2d", order=(1, 0, 3, 2))


def answer(family: Family) -> str:
    gaps = [family.box_text.answer_gap(*pair, several_labels=False) for pair in ((None, "a dog"), ("a dog", "a dog"), ("a dog", None))]
    return render(gaps, BOXES, family.box_text)


@EVERY_FAMILY
def test_the_expression_in_pixels_is_the_grid_read_back(family: Family) -> None:
    names = {"x": 123, "y": 321, "width": 640, "height": 480, "resized_width": 644, "resized_height": 476}
    found = [eval(expression, names) for expression in family.grid.px_expressions]
    assert found == pytest.approx(family.grid.dequantise(np.array([[123, 321, 123, 321]]), SIZE_WH, RESIZED_WH)[0, :2])


@EVERY_FAMILY
def test_a_grid_says_whether_its_numbers_need_the_resized_size(family: Family) -> None:
    box = np.array([[64.0, 48.0, 320.0, 240.0]])
    at_two_sizes = [family.grid.quantise(box, SIZE_WH, resized).tolist() for resized in (RESIZED_WH, RESIZED_WH // 2)]
    assert family.grid.needs_resized_size == (at_two_sizes[0] != at_two_sizes[1])


@EVERY_FAMILY
def test_the_pattern_of_a_box_finds_every_box_and_nothing_else(family: Family) -> None:
    form, text = family.box_text, answer(family)
    marked, num = re.subn(form.box_pattern, "<bbox>", text)
    assert num == len(BOXES)
    assert not re.search(r"[0-9]{2}", marked)
    if form.label_pattern is not None:
        assert re.findall(form.label_pattern, marked, re.DOTALL) == ["a dog"]


@EVERY_FAMILY
def test_a_reply_ends_with_what_closes_a_turn(family: Family) -> None:
    chat = family.chat
    assert chat.turn_close.startswith(chat.reply_ends[0])
    assert set(chat.reply_ends[:1]) | set(chat.reply_opens) <= set(chat.special_tokens)
    parsed = parse(f"{''.join(chat.reply_opens)}{answer(family)}{chat.reply_ends[-1]}and more", family, (1000, 1000))
    assert (parsed.boxes.tolist(), parsed.repairs) == (BOXES, ("control_tokens",))


@EVERY_FAMILY
def test_a_base_fits_whose_config_says_what_the_rule_says(family: Family) -> None:
    resize = family.resize
    assert resize.misfit(resize.vision_config, family.title) is None
    for key in resize.vision_config:
        misfit = resize.misfit({**resize.vision_config, key: 3}, family.title)
        assert misfit is not None
        assert "3" in misfit.found
        assert str(resize.vision_config[key]) in misfit.expected


def test_the_fix_for_a_base_of_another_size_names_the_family() -> None:
    family = FAMILIES["cogvlm_224"]
    misfit = family.resize.misfit({"image_size": 490}, family.title)
    assert misfit is not None
    assert (misfit.found, misfit.expected) == ("for images of 490 px", "224 px, as the shards were counted")
    assert misfit.fix == f"Choose a base of {family.title}, or convert again for this one's family."


def test_limits_are_the_published_ones_where_none_are_set_and_refused_where_they_cannot_be_met() -> None:
    smart, square = FAMILIES["qwen2_vl"].resize, FAMILIES["cogvlm"].resize
    assert smart.limits(None, None, "x") == smart.published_limits
    assert square.limits(None, None, "x") == square.published_limits
    with pytest.raises(ConfigError, match="783, expected at least 784, one visual token of x"):
        smart.limits(1, 783, "x")
    with pytest.raises(ConfigError, match="nothing: x resizes every image to one size"):
        square.limits(None, 490 * 490, "x")


def test_every_normalisation_has_its_numbers() -> None:
    assert set(MEAN_AND_STD) == set(get_args(Normalisation))
    assert {family.image_normalisation for family in FAMILIES.values()} == set(get_args(Normalisation))


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_the_pixels_for_a_number_of_tokens_give_no_more(name: str) -> None:
    resize, tokens = FAMILIES[name].resize, np.arange(1, 40)
    sizes = resize(1000, 1000, *resize.published_limits.lowered(resize.pixels_for(tokens)))
    assert (sizes.visual_tokens <= tokens).all()
    assert (sizes.visual_tokens == tokens)[np.sqrt(tokens) % 1 == 0].all()


def test_a_lowered_upper_limit_takes_the_lower_one_with_it() -> None:
    low, high = FAMILIES["qwen2_vl"].resize.published_limits.lowered(np.array([784, 3136, 10_000]))
    assert (np.asarray(low).tolist(), np.asarray(high).tolist()) == ([784, 3136, 3136], [784, 3136, 10_000])


# ---- a family with a key and an order of its own


def test_numbers_come_back_in_order() -> None:
    assert as_xyxy([20, 10, 40, 30], Y_FIRST.order) == (10, 20, 30, 40)
    assert answer(replace(FAMILIES["qwen3_vl"], box_text=Y_FIRST)).startswith('```json\n[\n\t{"box_2d": [2, 1, 444, 33], "label": "a dog"}')
    boxes = Y_FIRST.parse_answer(answer(replace(FAMILIES["qwen3_vl"], box_text=Y_FIRST)))
    assert boxes is not None
    assert [list(box.values) for box in boxes] == BOXES
    assert Y_FIRST.find_boxes('it is at {"box_2d": [2, 1, 444, 33]}')[0].values == (1, 2, 33, 444)


@pytest.mark.parametrize(
    ("reply", "repairs"),
    [
        pytest.param('[{"box_2d": [2, 1, 444, 33], "label": "dog"}]', ("no_fence",), id="own key"),
        pytest.param('[{"bbox_2d": [2, 1, 444, 33], "label": "dog"}]', ("other_key", "no_fence"), id="another family's key"),
        pytest.param('[{"box_2d": "[2, 1, 444, 33]", "label": "dog"}]', ("quoted_box", "no_fence"), id="quoted"),
        pytest.param('[{"x0": 1, "y0": 2, "x1": 33, "y1": 444, "label": "dog"}]', ("corner_keys", "no_fence"), id="corners by name"),
    ],
)
def test_a_loose_reply_is_read_by_the_family_s_key_and_order(reply: str, repairs: tuple[str, ...]) -> None:
    parsed = parse(reply, replace(FAMILIES["qwen3_vl"], box_text=Y_FIRST), (1000, 1000))
    assert (parsed.boxes.tolist(), parsed.repairs) == ([[1, 2, 33, 444]], repairs)


def test_a_conversion_writes_that_key_and_that_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "qwen3_vl", replace(FAMILIES["qwen3_vl"], box_text=Y_FIRST))
    config = settings("qwen3_vl", tasks=only(detect=TaskConfig(share=1.0)))
    [row] = rows_of(convert(config, [record(regions=(region("dog", (64.0, 96.0, 320.0, 360.0)),))]))
    [turn] = row["turns"]
    assert turn["answer"] == '```json\n[\n\t{"box_2d": [200, 100, 750, 500], "label": "dog"}\n]\n```'
    assert turn["boxes"] == [[64.0, 96.0, 320.0, 360.0]]
