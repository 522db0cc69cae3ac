"""Replies are read as the golden table says; what the converter writes is read strictly; no text breaks the reader or makes up boxes."""

import json
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from boxcar.pipelines.families.box_text import BoxText, render
from boxcar.pipelines.families.catalog import FAMILIES
from boxcar.train.answering.parse import ParsedReply, parse, points_to_original_px, to_original_px
from tests.train.answering.replies_golden import REPLIES, Golden

RESIZED = (1000, 800)
EVERY_FAMILY = sorted(FAMILIES)


def read(family: str, reply: str) -> ParsedReply:
    return parse(reply, FAMILIES[family], RESIZED)


@pytest.mark.parametrize("golden", [pytest.param(row, id=row.id) for row in REPLIES])
def test_a_reply_is_read_as_the_table_says(golden: Golden) -> None:
    parsed = read(golden.family, golden.reply)
    assert parsed.boxes.dtype == np.float64
    assert (parsed.status, parsed.boxes.tolist(), list(parsed.labels), list(parsed.repairs)) == (
        golden.status,
        list(golden.boxes),
        list(golden.labels),
        list(golden.repairs),
    )


def test_the_table_is_worth_its_name() -> None:
    assert len({row.id for row in REPLIES}) == len(REPLIES) >= 50
    assert {row.family for row in REPLIES} == set(FAMILIES)


def test_points_are_kept_apart_and_in_order() -> None:
    parsed = read("qwen2_5_vl", '[{"point_2d": [5, 6], "label": "dog"}, {"point": [[7, 8.5], [9, 10]], "label": "cat"}]')
    assert parsed.points.tolist() == [[5, 6], [7, 8.5], [9, 10]]
    assert parsed.point_labels == ("dog", "cat", "cat")
    assert (parsed.status, parsed.says_none, len(parsed.boxes)) == ("failed", False, 0)
    px = points_to_original_px(parsed.points, FAMILIES["qwen2_5_vl"].grid, (2000, 800), RESIZED)
    assert px.tolist() == [[10, 6], [14, 8.5], [18, 10]]


def test_boxes_without_area_are_kept() -> None:
    parsed = read("cogvlm", "[[001,002,001,009;001,002,003,004]]")
    assert parsed.boxes.tolist() == [[1, 2, 1, 9], [1, 2, 3, 4]]
    assert read("cogvlm", "").boxes.shape == (0, 4)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        pytest.param("qwen3_vl", [64.0, 48.0, 640.0, 480.0], id="thousandths, rounded"),
        pytest.param("qwen2_5_vl", [64.0, 60.0, 640.0, 480.0], id="pixels of the resized image"),
        pytest.param("qwen_vl", [64.32, 48.24, 639.68, 384.24], id="thousandths, floored: the middle of each"),
    ],
)
def test_boxes_go_back_to_pixels_by_the_family_s_grid(family: str, expected: list[float]) -> None:
    far = {"qwen3_vl": (1000, 1000), "qwen2_5_vl": (1000, 800), "qwen_vl": (999, 800)}[family]
    boxes = np.array([[100, 100, *far]], np.float64)
    assert np.allclose(to_original_px(boxes, FAMILIES[family].grid, (640, 480), RESIZED), [expected])
    assert to_original_px(boxes[:0], FAMILIES[family].grid, (640, 480), RESIZED).shape == (0, 4)


# ---- what is written is read strictly

SPECIAL = re.compile(r"</?(?:ref|box|img|quad)>|<imgpad>|<\|.*?\|>|</?s>|<unk>", re.DOTALL)
"""What no label may hold: `pipelines.turns.texts` refuses the special tokens of any family."""
LABEL_PIECES = [
    *"\"'\\]}{[)(<>,;:. \n\t0",
    *('"]', '": "', "]]", "[[", '\\"', "\\u0041", "```", "```json\n[\n\t", "<ref", "/box>", "<think>", "</think>", "<answer>", "12"),
    *("dog", "the dog", "红色的车", "图中没有", "🙂", "e\u0301", "\u2028", "“引号”", "【", "，"),
    *("[1,2,3,4]", "[[001,002,003,004]]", "(1,2),(3,4)", '{"bbox_2d": [1, 2, 3, 4], "label": "x"}', "No x is in the image."),
]
labels = st.one_of(st.lists(st.sampled_from(LABEL_PIECES), min_size=1, max_size=5).map("".join), st.text(min_size=1, max_size=12)).filter(
    lambda label: bool(label.strip()) and not SPECIAL.search(label)
)
Said = list[tuple[list[int], str]]


@st.composite
def ordered(draw: st.DrawFn, largest: tuple[int, int]) -> list[int]:
    across = sorted(draw(st.tuples(st.integers(0, largest[0]), st.integers(0, largest[0]))))
    down = sorted(draw(st.tuples(st.integers(0, largest[1]), st.integers(0, largest[1]))))
    return [across[0], down[0], across[1], down[1]]


def answers(largest: tuple[int, int]) -> st.SearchStrategy[Said]:
    return st.lists(labels, min_size=1, max_size=3).flatmap(
        lambda few: st.lists(st.tuples(ordered(largest), st.sampled_from(few)), min_size=1, max_size=6)
    )


def written(said: Said, text: BoxText) -> str:
    several = len({label for _, label in said}) > 1
    names = [None, *(label for _, label in said), None]
    gaps = [text.answer_gap(previous, following, several_labels=several) for previous, following in pairwise(names)]
    return render(gaps, [box for box, _ in said], text)


@pytest.mark.parametrize("family", EVERY_FAMILY)
@given(st.data())
def test_whatever_is_written_is_read_strictly(family: str, data: st.DataObject) -> None:
    text = FAMILIES[family].box_text
    said = data.draw(answers(FAMILIES[family].grid.largest(RESIZED)))
    several = len({label for _, label in said}) > 1
    # CogVLM's form has no quotes: a label with what stands between two boxes cannot be told from two labels.
    names_labels = text.form != "list"
    assume(names_labels or not any("]], " in f"{label} " or re.search("</?(think|answer)>", label) for _, label in said))
    parsed = read(family, written(said, text))
    assert (parsed.status, parsed.repairs) == ("strict", ())
    assert parsed.boxes.tolist() == [box for box, _ in said]
    assert list(parsed.labels) == [label if names_labels or several else None for _, label in said]


@pytest.mark.parametrize("family", EVERY_FAMILY)
@given(labels)
def test_every_not_found_reply_is_read_strictly(family: str, label: str) -> None:
    # A label that makes the sentence one of boxes, such as "x [[001,002,003,004]], No y [[...]]", is not among these.
    for template in FAMILIES[family].not_found.values():
        parsed = read(family, template.replace("{label}", label))
        assert (parsed.status, parsed.says_none, parsed.repairs, len(parsed.boxes)) == ("none_found", True, (), 0)


@given(st.data(), st.sampled_from(["<think>{}</think>\n\n", "{}\n</think>\n"]))
def test_a_thought_changes_nothing_but_is_counted(data: st.DataObject, thought: str) -> None:
    family = data.draw(st.sampled_from(EVERY_FAMILY))
    answer = written(data.draw(answers((999, 799))), FAMILIES[family].box_text).strip()
    assume("think>" not in answer and "answer>" not in answer)
    assume(read(family, answer).status == "strict")
    parsed, plain = read(family, thought.format("[1, 2, 3, 4] or (5,6),(7,8)?") + answer), read(family, answer)
    assert (parsed.status, parsed.repairs) == ("repaired", ("thinking",))
    assert parsed.boxes.tolist() == plain.boxes.tolist()
    assert parsed.labels == plain.labels


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@given(st.data())
def test_a_cut_list_keeps_the_boxes_that_were_closed(family: str, data: st.DataObject) -> None:
    said = data.draw(answers((999, 799)))
    whole = written(said, FAMILIES[family].box_text)
    ends = [0]
    for box, _ in said:  # the numbers of the answer in order: labels may hold lists as well, so look for them from the last end on
        ends.append(whole.index(json.dumps(box), ends[-1]) + len(json.dumps(box)))
    assume(whole.count('{"bbox_2d": [') == len(said))
    assume(not any("```" in label or "think>" in label or "answer>" in label for _, label in said))
    cut = data.draw(st.integers(len("```json\n[\n\t"), len(whole) - 1))
    kept = sum(end <= cut for end in ends[1:])
    parsed = read(family, whole[:cut])
    assert parsed.boxes.tolist() == [box for box, _ in said[:kept]]
    assert parsed.status in (("repaired",) if kept else ("failed",))


# ---- any text

NOISE = [
    *"[]{}()<>,;:\"'\\ \n\t0٣-.“”【】（），",
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("<think>", "</think>", "<answer>", "</answer>", "<|im_end|>", "```json\n", "```", "\n]\n```", "No ", " is in the image.", "图中没有"),
    *("(1,2),(3,4)", "[[", "]]", "001,002,003,004", '{"bbox_2d": [', "1, 2, 3, 4", '], "label": "', '"}', "},\n\t", '{"bbox_2d": null}'),
    *("9" * 500, "-1", "1e9", "1e999", "1.5", "null", "NaN", "[" * 300, "(" * 300, '{"a":' * 100, "\\ud800", "\\q", "dog", "\ud800"),
    *('"x1": 1, "y1": 2, "x2": 3, "y2": 4', '"bbox": "[1,2,3,4]"', '"point_2d": [1, 2]', "'bbox_2d':", "label:"),
]
noise = st.lists(st.sampled_from(NOISE), max_size=16).map("".join)


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """An answer with a piece cut out, doubled or replaced, as models write them."""
    text = written(draw(answers((999, 799))), FAMILIES[draw(st.sampled_from(EVERY_FAMILY))].box_text)
    start = draw(st.integers(0, len(text)))
    stop = draw(st.integers(start, len(text)))
    return text[:start] + draw(st.one_of(st.just(""), noise, st.just(text[start:stop] * 2))) + text[stop:]


@pytest.mark.parametrize("family", ["qwen_vl", "qwen2_5_vl", "qwen3_vl", "cogvlm"])
@hypothesis_settings(max_examples=300)
@given(st.one_of(noise, damaged(), st.text(max_size=60)))
def test_no_text_breaks_the_parser(family: str, text: str) -> None:
    parsed = read(family, text)
    right, bottom = FAMILIES[family].grid.largest(RESIZED)
    assert parsed.boxes.shape == (len(parsed.labels), 4)
    assert parsed.points.shape == (len(parsed.point_labels), 2)
    assert np.isfinite(parsed.boxes).all()
    assert np.isfinite(parsed.points).all()
    assert (parsed.boxes >= 0).all()
    assert (parsed.boxes <= [right, bottom, right, bottom]).all()
    assert (parsed.boxes[:, :2] <= parsed.boxes[:, 2:]).all()
    assert (parsed.status in ("strict", "repaired")) == (len(parsed.boxes) > 0)
    assert parsed.status != "strict" or not parsed.repairs
    assert parsed.status != "repaired" or parsed.repairs
    # Every number of a box that was not moved stands in the text.
    if not {"clamped", "full_width"} & set(parsed.repairs):
        said = {float(number) for number in re.findall(r"[0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?", text)}
        assert {abs(value) for value in parsed.boxes.ravel().tolist()} <= said


PROSE = [
    "0 dogs",
    "; ",
    "4 regions",
    ", ",
    "2 rows",
    "3 columns",
    " ",
    ".",
    "\n",
    "狗在第3行",
    "1, 2, 3, 4",
    "10:30",
    "50%",
    "(3)",
    "[12]",
    "1/2",
]


@pytest.mark.parametrize("family", EVERY_FAMILY)
@given(st.lists(st.sampled_from(PROSE), max_size=12).map("".join))
def test_digits_of_prose_are_never_boxes(family: str, text: str) -> None:
    assert len(read(family, text).boxes) == 0


HOSTILE = [
    *("[", "(", "{", '"', "'", "<box>", "<ref>", "<quad>", "<think>", "<answer>", "```", "“", "\\", '{"a":', '{"bbox_2d": [', "(1,2),"),
    *(
        '"bbox_2d": "',
        "{'bbox': \"",
        '{"bbox": "{',
        "[1,2,3,4],",
        '","',
        '" ,',
        "[1,",
        "1;",
        "a:",
        "No ",
        "] [",
        '{"x": {"bbox_2d": [1,2,3,4]},',
    ),
    *("[[001,002,003,004;", "<ref>a</ref><box>(1,2),(3,4)", '{"bbox_2d": [1, 2, 3, 4], "label": "', "there is no ", "９，", "1e1", '" '),
]


@pytest.mark.parametrize("family", ["qwen_vl", "qwen3_vl", "cogvlm"])
@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_text_is_read_the_same_however_long_it_is(piece: str, family: str) -> None:
    """A hundred kB, which a quadratic step would turn into minutes: as many boxes a piece as in a short text, and the same outcome."""
    many = 100_000 // len(piece) // 100 * 100
    short, twice, long = (read(family, piece * times) for times in (100, 200, many))
    assert long.status == short.status
    in_100 = len(twice.boxes) - len(short.boxes)
    assert len(long.boxes) == len(short.boxes) + in_100 * (many // 100 - 1)


@pytest.mark.parametrize("family", ["qwen_vl", "qwen3_vl", "cogvlm"])
@given(st.one_of(noise, damaged()))
def test_what_was_read_from_a_broken_reply_can_be_written_and_read_again(family: str, text: str) -> None:
    boxes = [[int(value) for value in box] for box in read(family, text).boxes.tolist()]
    assume(boxes)
    again = read(family, written([(box, "x") for box in boxes], FAMILIES[family].box_text))
    assert (again.status, again.boxes.tolist()) == ("strict", boxes)
