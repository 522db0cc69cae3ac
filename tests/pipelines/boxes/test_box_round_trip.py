"""A box goes to text and comes back: pixels -> model units -> text -> model units -> pixels, and what is read is what was written.

How exact is that? In model units (`unit_px` pixels of the original each):

    thousandths, rounded (Qwen2-VL, Qwen3-VL)   half a unit. 1000 is allowed, so the far edge is hit exactly.
    thousandths, floored (Qwen-VL v1, CogVLM)   half a unit. A value is read back as the middle of what it stands for; at the far edge
                                                999 is read as 999.5, half a unit from the 1000 that was clamped.
    resized pixels (Qwen2.5-VL)                 half a unit; but the official clamp to resized_size - 1 leaves a far edge up to one whole
                                                unit off. That is "half a unit and one pixel" only where the pixel is one of the resized
                                                image: of the original it may be many, where the image was shrunk much.
"""

import json
import re
from functools import cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from boxcar.pipelines.boxes import geometry
from boxcar.pipelines.families.box_text import BoxText, BracketBoxText, CoordinateGrid, ResizedPixelGrid, TextBox, render
from boxcar.pipelines.families.catalog import FAMILIES
from boxcar.pipelines.tokens.compose import compose
from boxcar.pipelines.tokens.frame import Frame
from boxcar.pipelines.tokens.tokenizer import PieceTable
from boxcar.pipelines.turns.texts import Scribe
from boxcar.schemas.record import Box, ImageRef
from boxcar.schemas.workflow import TaskConfig
from tests.small_units import convert, files, frame_of, header, only, record, region, rows_of, settings

EVERY_FAMILY = sorted(FAMILIES)
ONE_OF_EACH_TEXT = ["qwen_vl", "qwen2_vl", "qwen2_5_vl", "cogvlm"]
SMART = [family for family in EVERY_FAMILY if FAMILIES[family].resize.limits_matter]


# ---- pixels -> model units -> pixels


@st.composite
def images_with_box(draw: st.DrawFn, smallest: int = 1) -> tuple[tuple[int, int], Box]:
    """A size that every family takes, and a box in it, often with its edges on the image's."""
    width, height = draw(st.integers(smallest, 4000)), draw(st.integers(smallest, 4000))
    assume(max(width, height) <= 200 * min(width, height))
    edges = []
    for side in (width, height):
        edge = st.one_of(st.floats(0, side), st.integers(0, side).map(float), st.sampled_from([0.0, float(side), side - 0.5, side / 3]))
        edges.append(sorted((draw(edge), draw(edge))))
    (x0, x1), (y0, y1) = edges
    return (width, height), (x0, y0, x1, y1)


def unit_px(grid: CoordinateGrid, size: npt.NDArray[np.int64], resized: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """(N, 2): width and height of one model unit in pixels of the original image."""
    return size / resized if isinstance(grid, ResizedPixelGrid) else size / 1000


def bounds_px(
    family: str, boxes: npt.NDArray[np.float64], size: npt.NDArray[np.int64], resized: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """(N, 4) largest error that each coordinate may have, in pixels of the original; see the head of this file."""
    grid = FAMILIES[family].grid
    unit = np.tile(unit_px(grid, size, resized), 2)
    clamped = isinstance(grid, ResizedPixelGrid) & (np.rint(boxes / unit) >= np.tile(resized, 2))
    return np.where(clamped, 1.0, 0.5) * unit + 1e-6


@pytest.mark.parametrize("family", EVERY_FAMILY)
@given(st.lists(images_with_box(), min_size=1, max_size=4), st.integers(1, 2_000_000))
def test_model_units_come_back_within_half_a_unit(family: str, drawn: list[tuple[tuple[int, int], Box]], max_pixels: int) -> None:
    size, boxes = np.array([size for size, _ in drawn]), np.array([box for _, box in drawn], np.float64)
    sizes = FAMILIES[family].resize(size[:, 0], size[:, 1], min(3136, max_pixels), max_pixels)
    resized = np.stack([sizes.width, sizes.height], axis=1)
    grid = FAMILIES[family].grid
    values = grid.quantise(boxes, size, resized)
    last = {"ResizedPixelGrid": np.tile(resized, 2) - 1}.get(type(grid).__name__, 1000 if family in ("qwen2_vl", "qwen3_vl") else 999)
    assert (values >= 0).all()
    assert (values <= last).all()
    back = grid.dequantise(values, size, resized)
    assert (np.abs(back - boxes) <= bounds_px(family, boxes, size, resized)).all()
    assert (geometry.clip(back, size.astype(np.float64)) == back).all()
    # What a model says again is the same number.
    assert np.array_equal(grid.quantise(back, size, resized), values)


def test_the_clamp_of_qwen2_5_costs_a_whole_unit_at_the_far_edge_and_no_more() -> None:
    size, resized = np.array([[4000, 4000]]), np.array([[1000, 500]])
    grid = FAMILIES["qwen2_5_vl"].grid
    back = grid.dequantise(grid.quantise(np.array([[0.0, 0.0, 4000.0, 4000.0]]), size, resized), size, resized)
    assert back.tolist() == [[0, 0, 3996, 3992]]


# ---- pixels -> a written row -> its text -> pixels


@pytest.mark.parametrize("family", EVERY_FAMILY)
@hypothesis_settings(max_examples=40)
@given(st.data())
def test_the_text_of_a_row_says_where_its_boxes_are(family: str, data: st.DataObject) -> None:
    (width, height), first = data.draw(images_with_box(smallest=28))
    boxes = [box for box in [first] if min(box[2] - box[0], box[3] - box[1]) > 2]
    boxes += [(x / 16 * width, y / 16 * height, (x + 4) / 16 * width, (y + 9) / 16 * height) for x, y in ((0, 7), (5, 3), (12, 0))]
    orientation = data.draw(st.sampled_from([1, 5, 6, 7, 8]))
    assume(orientation == 1 or width != height)  # nothing says in which frame the boxes of a turned square are
    budget: dict[str, int] = {}
    if family in SMART:
        budget = {"image_min_pixels": 1024, "image_max_pixels": data.draw(st.integers(2048, 1_500_000))}
    config = settings(family, **budget, tasks=only(detect=TaskConfig(share=1.0)), trust_sizes=False, cutoff_len=family_cutoff(family))
    taken = record(images=(ImageRef("a.jpg", width, height),), regions=tuple(region("dog", box) for box in boxes))
    result = convert(config, [taken], files({"a.jpg": header(width, height, orientation)}))
    assume(result.table.num_rows)  # more than the cutoff, or turned to a strip
    [row] = rows_of(result)
    [turn], [image] = row["turns"], row["images"]

    stored = np.full((len(boxes), 2), (width, height), np.float64)
    upright = geometry.to_upright(np.array(boxes), stored, np.full(len(boxes), orientation))
    assert (image["width"], image["height"]) == ((width, height) if orientation == 1 else (height, width))
    assert np.allclose(sorted(turn["boxes"]), sorted(upright.tolist()))

    read = FAMILIES[family].box_text.parse_answer(turn["answer"])
    assert read is not None
    values = np.array([box.values for box in read])
    size = np.full((len(boxes), 2), (image["width"], image["height"]))
    resized = np.full((len(boxes), 2), (image["resized_width"], image["resized_height"]))
    back, drawn = FAMILIES[family].grid.dequantise(values, size, resized), np.array(turn["boxes"])
    assert (np.abs(back - drawn) <= bounds_px(family, drawn, size, resized)).all()


def family_cutoff(family: str) -> int:
    return min(FAMILIES[family].max_sequence, 4096)


# ---- boxes -> text -> boxes

SPECIAL = re.compile(r"</?(?:ref|box|img|quad)>|<imgpad>|<\|.*?\|>|</?s>|<unk>", re.DOTALL)
"""What no label may hold: `pipelines.turns.texts` refuses the special tokens of any family."""

LABEL_PIECES = [
    *'"\\]}{[)(<>,;:. \n\t0',
    *('"]', '": "', "]]", "[[", "]],", '\\"', "\\u0041", "```", "```json\n[\n\t", "<ref", "/box>", "12", "a-b"),
    *("dog", "the dog", "红色的车", "🙂", "e\u0301", "\u2028"),
    *("[[001,002,003,004]]", "(1,2),(3,4)", '{"bbox_2d": [1, 2, 3, 4], "label": "x"}'),
]
label_pieces = st.sampled_from(LABEL_PIECES)
labels = st.one_of(st.lists(label_pieces, min_size=1, max_size=5).map("".join), st.text(min_size=1, max_size=12)).filter(
    lambda label: bool(label.strip()) and not SPECIAL.search(label)
)


def answers(numbers: st.SearchStrategy[int]) -> st.SearchStrategy[list[TextBox]]:
    """Boxes of a few labels; neighbours often share one."""
    values = st.tuples(numbers, numbers, numbers, numbers)
    return st.lists(labels, min_size=1, max_size=3).flatmap(
        lambda few: st.lists(st.builds(TextBox, values, st.sampled_from(few)), min_size=1, max_size=6)
    )


def gaps_of(boxes: list[TextBox], text: BoxText) -> list[str]:
    several = len({box.label for box in boxes}) > 1
    names = [None, *(box.label for box in boxes), None]
    return [text.answer_gap(previous, following, several_labels=several) for previous, following in pairwise(names)]


def written(boxes: list[TextBox], text: BoxText) -> str:
    return render(gaps_of(boxes, text), [box.values for box in boxes], text)


@pytest.mark.parametrize("family", ONE_OF_EACH_TEXT)
@given(answers(st.integers(0, 999)))
def test_what_is_written_is_read_again(family: str, boxes: list[TextBox]) -> None:
    text = FAMILIES[family].box_text
    several = len({box.label for box in boxes}) > 1
    # CogVLM's form has no quotes: a label with what stands between two boxes cannot be told from two labels.
    names_labels = not isinstance(text, BracketBoxText)  # CogVLM names labels where there are several
    assume(names_labels or not any("]], " in f"{box.label} " for box in boxes))
    expected = boxes if names_labels or several else [TextBox(box.values, None) for box in boxes]
    assert text.parse_answer(written(boxes, text)) == expected


@given(answers(st.integers(0, 30_000)))
def test_absolute_pixels_of_any_size_are_read_again(boxes: list[TextBox]) -> None:
    for family in ("qwen2_5_vl", "qwen2_vl"):
        text = FAMILIES[family].box_text
        assert text.parse_answer(written(boxes, text)) == boxes


@given(answers(st.integers(0, 1000)))
def test_a_written_list_is_json(boxes: list[TextBox]) -> None:
    text = written(boxes, FAMILIES["qwen3_vl"].box_text)
    assert json.loads(text.removeprefix("```json\n").removesuffix("\n```")) == [
        {"bbox_2d": list(box.values), "label": box.label} for box in boxes
    ]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_an_empty_list_is_no_boxes(family: str) -> None:
    text = FAMILIES[family]
    assert text.box_text.parse_answer(text.not_found["en"]) == []
    assert text.box_text.find_boxes(text.not_found["en"]) == []


PROSE = ["dog", " ", "12", ", ", "1, 2, 3, 4", "(1,2),(3,4)", "[1, 2, 3, 4]", "001,002,003,004", ".", "\n", "狗", "label", '"']
prose = st.lists(st.sampled_from(PROSE), max_size=8).map("".join)


@pytest.mark.parametrize("family", ONE_OF_EACH_TEXT)
@given(prose, labels, st.lists(st.tuples(*[st.integers(0, 999)] * 4), min_size=1, max_size=3), prose)
def test_boxes_in_running_text_are_found_and_nothing_else(
    family: str, before: str, label: str, values: list[tuple[int, int, int, int]], after: str
) -> None:
    text = FAMILIES[family].box_text
    assume("[[" not in label)
    assume("bbox_2d" not in label)
    gaps = text.inline_gaps(label, len(values))
    found = text.find_boxes(before + render(gaps, values, text) + after)
    assert [box.values for box in found] == values
    if family == "qwen2_5_vl":
        assert {box.label for box in found} == {label}
    unnamed = render(text.inline_gaps("", len(values)), values, text)
    assert text.find_boxes(before + unnamed + after) == [TextBox(box, None) for box in values]


@pytest.mark.parametrize("family", ONE_OF_EACH_TEXT)
@given(prose)
def test_digits_of_prose_are_no_boxes(family: str, text: str) -> None:
    assert FAMILIES[family].box_text.parse_answer(text) is None
    assert FAMILIES[family].box_text.find_boxes(text) == []


NOISE = [
    *'[]{}()<>,;:"\\ \n\t0٣',
    *("<ref>", "</ref>", "<box>", "</box>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("(1,2),(3,4)", "[[", "]]", "001,002,003,004", '{"bbox_2d": [', "1, 2, 3, 4", '], "label": "', '"}', "},\n\t", '{"bbox_2d": null}'),
    *("```json\n[\n\t", "\n]\n```", "9" * 5000, "-1", "1e9", "1.5", "null", "[" * 2000, "\\ud800", "\\q", "dog"),
]
box_noise = st.lists(st.sampled_from(NOISE), max_size=14).map("".join)


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """An answer with a piece cut out, doubled or replaced, as models write them."""
    text = written(draw(answers(st.integers(0, 999))), FAMILIES[draw(st.sampled_from(ONE_OF_EACH_TEXT))].box_text)
    start = draw(st.integers(0, len(text)))
    stop = draw(st.integers(start, len(text)))
    return text[:start] + draw(st.one_of(st.just(""), box_noise, st.just(text[start:stop] * 2))) + text[stop:]


@pytest.mark.parametrize("family", ONE_OF_EACH_TEXT)
@given(st.one_of(box_noise, damaged(), st.text(max_size=40), box_noise.map(lambda inside: f"```json\n[\n\t{inside}\n]\n```")))
def test_no_text_breaks_a_parser_and_every_number_read_stands_in_it(family: str, text: str) -> None:
    box_text = FAMILIES[family].box_text
    for found in (box_text.parse_answer(text) or [], box_text.find_boxes(text)):
        assert all(re.search(rf"(?<![0-9])0*{value}(?![0-9])", text) or value < 0 for box in found for value in box.values)


# Each of these failed once.
NOT_READ = [
    pytest.param("qwen_vl", "<ref>a</ref><box>(1,2),(3,4)</box>" * 300 + "x", id="a long answer that is cut"),
    pytest.param("qwen2_5_vl", "```json\n[\n\t" + "[" * 100_000 + "\n]\n```", id="brackets without end"),
    pytest.param("qwen2_5_vl", '```json\n[\n\t{"bbox_2d": [' + "1" * 5000 + ', 2, 3, 4], "label": "x"}\n]\n```', id="a number without end"),
    pytest.param("qwen_vl", "<ref>a</ref><box>(1,2),(3," + "4" * 5000 + ")</box>", id="a number without end in tags"),
    pytest.param("qwen_vl", "<ref>a</ref><box>(١,٢),(٣,٤)</box>", id="digits of another script"),
    pytest.param("cogvlm", "[[٠٠١,٠٠٢,٠٠٣,٠٠٤]]", id="digits of another script in brackets"),
    pytest.param("cogvlm", "[[1,2,3,4]]", id="brackets without leading zeros"),
    pytest.param("qwen2_5_vl", '```json\n[\n\t{"bbox_2d": [1.5, 2, 3, 4], "label": "x"}\n]\n```', id="a fraction"),
    pytest.param("qwen2_5_vl", '```json\n[\n\t{"bbox_2d": [true, 2, 3, 4], "label": "x"}\n]\n```', id="a truth value"),
    pytest.param("qwen2_5_vl", '```json\n[\n\t{"bbox_2d": [1, 2, 3], "label": "x"}\n]\n```', id="three numbers"),
    pytest.param("qwen2_5_vl", '```json\n[\n\t{"point_2d": [1, 2], "label": "x"}\n]\n```', id="a point"),
]


@pytest.mark.parametrize(("family", "text"), NOT_READ)
def test_what_is_not_in_the_family_s_form_is_no_answer(family: str, text: str) -> None:
    assert FAMILIES[family].box_text.parse_answer(text) is None


FOUND = [
    pytest.param(
        "qwen_vl",
        "<ref>the dog</ref> beside <ref>the cat</ref><box>(1,2),(3,4)</box> and <box>(5,6),(7,8)</box>",
        [TextBox((1, 2, 3, 4), "the cat"), TextBox((5, 6, 7, 8), None)],
        id="a ref without a box lends its name to none",
    ),
    pytest.param(
        "qwen_vl",
        "<ref>dogs</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>",
        [TextBox((1, 2, 3, 4), "dogs"), TextBox((5, 6, 7, 8), "dogs")],
        id="neighbours share a ref",
    ),
    pytest.param(
        "qwen2_5_vl",
        'bad: {"bbox_2d": [1, 2, 3, 4], "label": "a\\q"} good: {"bbox_2d": [5, 6, 7, 8], "label": "b\\""}',
        [TextBox((5, 6, 7, 8), 'b"')],
        id="a label that is no JSON",
    ),
    pytest.param("cogvlm", "a [[001,002,003,004;005,006,007,008]].", [TextBox((1, 2, 3, 4), None), TextBox((5, 6, 7, 8), None)], id="two"),
]


@pytest.mark.parametrize(("family", "text", "expected"), FOUND)
def test_boxes_are_found_in_running_text(family: str, text: str, expected: list[TextBox]) -> None:
    assert FAMILIES[family].box_text.find_boxes(text) == expected


# ---- what compose puts together is what render writes


@cache
def frame(family: str) -> Frame:
    return frame_of(settings(family))


@pytest.mark.parametrize("family", EVERY_FAMILY)
@hypothesis_settings(max_examples=40)
@given(st.lists(answers(st.integers(0, 999)), min_size=1, max_size=3))
def test_composed_bytes_are_the_rendered_text(family: str, several: list[list[TextBox]]) -> None:
    text = FAMILIES[family].box_text
    pieces = PieceTable(frame(family).tokenizer)
    scribe = Scribe(FAMILIES[family], pieces)
    rows = np.split(np.arange(sum(map(len, several))), np.cumsum([len(boxes) for boxes in several])[:-1])
    specs = [scribe.boxes_answer([box.label or "" for box in boxes], row.tolist()) for boxes, row in zip(several, rows, strict=True)]
    codes = pieces.intern_numbers(np.array([box.values for boxes in several for box in boxes]), text.number_format)
    separators = pieces.intern_separators(text.separators)
    pieces.encode_pending()
    composed = compose(specs, codes, separators, pieces)
    utf8, ids = composed.utf8(np.arange(len(several))), composed.ids(np.arange(len(several)))
    for number, boxes in enumerate(several):
        rendered = written(boxes, text).lstrip()
        assert bytes(utf8.row(number)).decode() == rendered
        assert ids.row(number).tolist() == frame(family).tokenizer.encode([rendered])[0]
