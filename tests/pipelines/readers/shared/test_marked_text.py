import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boxcar.pipelines.readers.reader import Refused
from boxcar.pipelines.readers.shared import marked_text as marks_of
from boxcar.pipelines.readers.shared.marked_text import (
    Marks,
    Message,
    Place,
    compile_forms,
    declared_space,
    image_refs,
    pair_turns,
    plan_rows,
    read_rows,
    split_text,
)
from boxcar.schemas.errors import AnnotationError
from boxcar.schemas.record import (
    PER_MILLE,
    PIXELS,
    RELATIVE,
    BoxMark,
    BoxSpace,
    DialogueTurn,
    ImageMark,
    ImageRef,
    Record,
    Rejected,
    TextPart,
)
from boxcar.schemas.workflow import SourceConfig

EVERY_FORM = compile_forms(*marks_of.FORMS)
FAMILY_FORMS = compile_forms("image", "json", "stray_json", "tags", "tag_ref", "stray_tag", "ref", "brackets", "list")
IMAGE = ImageMark(0)


def box(*numbers: float, label: str = "", image_index: int = 0) -> BoxMark:
    return BoxMark(tuple(zip(numbers[::4], numbers[1::4], numbers[2::4], numbers[3::4], strict=True)), label, image_index)


def split(text: str, num_images: int = 1, space: BoxSpace | None = PIXELS, forms: str = "every") -> tuple[TextPart, ...]:
    return split_text(text, EVERY_FORM if forms == "every" else FAMILY_FORMS, Marks(num_images, space).parse)


def refusal(text: str, num_images: int = 1, space: BoxSpace | None = PIXELS) -> tuple[str, str]:
    with pytest.raises(Refused) as raised:
        split(text, num_images, space)
    return raised.value.reason, raised.value.detail


# Box forms


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        pytest.param("<image>\nWhat is it?", (IMAGE, "\nWhat is it?"), id="image"),
        pytest.param(
            "<|object_ref_start|>a dog<|object_ref_end|><|box_start|>(221,423),(569,886)<|box_end|> plays",
            (box(221, 423, 569, 886, label="a dog"), " plays"),
            id="qwen2-ref-and-box",
        ),
        pytest.param(
            "<|object_ref_start|>x<|object_ref_end|><|box_start|>(1769, 1013), (1778, 1027)<|box_end|>\n"
            "<|object_ref_start|>y<|object_ref_end|> <|box_start|>(3,4),(5,6)<|box_end|>",
            (box(1769, 1013, 1778, 1027, label="x"), "\n", box(3, 4, 5, 6, label="y")),
            id="qwen2-blanks-and-lines",
        ),
        pytest.param(
            "<|box_start|>(101,201),(150,266)<|box_end|><|box_start|>(401,601),(550,666)<|box_end|>",
            (box(101, 201, 150, 266, 401, 601, 550, 666),),
            id="qwen2-boxes-without-ref",
        ),
        pytest.param("Find the <|object_ref_start|>sheep<|object_ref_end|>.", ("Find the sheep.",), id="qwen2-ref-without-box"),
        pytest.param("<|quad_start|>(1,2),(5,1),(6,9),(0,8)<|quad_end|>", (box(0, 1, 6, 9),), id="qwen2-quad"),
        pytest.param(
            "A photo of<ref> two dogs</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>.",
            ("A photo of ", box(1, 2, 3, 4, 5, 6, 7, 8, label="two dogs"), "."),
            id="qwen1-blank-moves-out-of-the-label",
        ),
        pytest.param("<ref>a </ref><box>(1,2),(3,4)</box>b", (box(1, 2, 3, 4, label="a"), " b"), id="qwen1-blank-behind-the-label"),
        pytest.param("<ref>i <3 u</ref><box>(1,2),(3,4)</box>", (box(1, 2, 3, 4, label="i <3 u"),), id="qwen1-label-with-a-less-than"),
        pytest.param("<ref>a</ref> and <ref>b</ref><box>(1,2),(3,4)</box>", ("a and ", box(1, 2, 3, 4, label="b")), id="qwen1-two-refs"),
        pytest.param("<quad>(1,2),(5,1),(6,9),(0,8)</quad>", (box(0, 1, 6, 9),), id="qwen1-quad-is-its-bounding-box"),
        pytest.param("<ref>cats</ref><box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box>", (box(1, 2, 3, 4, 5, 6, 7, 8, label="cats"),), id="internvl"),
        pytest.param("<ref>cat</ref><box>1 2 3 4</box>", (box(1, 2, 3, 4, label="cat"),), id="minicpm"),
        pytest.param("at [[086,540,400,760;001,002,003,004]].", ("at ", box(86, 540, 400, 760, 1, 2, 3, 4), "."), id="cogvlm"),
        pytest.param("[[x0,y0,x1,y1]]", ("[[x0,y0,x1,y1]]",), id="cogvlm-template-is-text"),
        pytest.param("in [0.1, 0.2, .35, 1e0]?", ("in ", box(0.1, 0.2, 0.35, 1), "?"), id="list-of-fractions"),
        pytest.param("[[1, 2, 3, 4], [5, 6, 7, 8]]", (box(1, 2, 3, 4, 5, 6, 7, 8),), id="list-of-lists"),
        pytest.param("see [1]: [1, 2, 3, 4]", ("see [1]: ", box(1, 2, 3, 4)), id="list-behind-a-citation"),
    ],
)
def test_each_form_becomes_a_mark_and_text_stays(text: str, parts: tuple[TextPart, ...]) -> None:
    assert split(text) == parts


FENCED = '```json\n[\n\t{"bbox_2d": [10, 20, 30, 40], "label": "dog"},\n\t{"bbox_2d": [1, 2, 3, 4], "label": "dog"},\n\t' + (
    '{"label": "a \\"}{[\\u00e9", "bbox_2d": [5.5, 6, 7, 8]}\n]\n```'
)
FENCED_MARKS = (box(10, 20, 30, 40, 1, 2, 3, 4, label="dog"), box(5.5, 6, 7, 8, label='a "}{[é'))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        pytest.param(FENCED, FENCED_MARKS, id="fenced-list"),
        pytest.param(f" \n{FENCED}\n ", FENCED_MARKS, id="blanks-around-a-whole-answer"),
        pytest.param(FENCED.removeprefix("```json\n").removesuffix("\n```"), FENCED_MARKS, id="bare-list"),
        pytest.param(FENCED.replace("json", ""), FENCED_MARKS, id="fence-without-language"),
        pytest.param(FENCED.replace("\n]", ",\n]"), FENCED_MARKS, id="comma-too-many"),
        pytest.param(f"Here:\n{FENCED}\nDone.", ("Here:\n", *FENCED_MARKS, "\nDone."), id="inside-prose"),
        pytest.param(
            'A {"bbox_2d": [1,2,3,4], "label": "cat"} sits by {"bbox_2d": [5,6,7,8]}.',
            ("A ", box(1, 2, 3, 4, label="cat"), " sits by ", box(5, 6, 7, 8), "."),
            id="objects-inside-prose",
        ),
        pytest.param(
            '{"bbox_2d": [1,2,3,4], "label": "a"}\n{"bbox_2d": [5,6,7,8], "label": "a"}',
            (box(1, 2, 3, 4, 5, 6, 7, 8, label="a"),),
            id="an-object-a-line",
        ),
        pytest.param(
            '[{"bbox_2d":[1,2,3,4],"label":"a"},{"bbox_2d":[1,2,3,4],"label":"b"},{"bbox_2d":[5,6,7,8],"label":"a"}]',
            (box(1, 2, 3, 4, label="a"), box(1, 2, 3, 4, label="b"), box(5, 6, 7, 8, label="a")),
            id="a-mark-for-each-run-in-order",
        ),
        pytest.param("```json\n[]\n```", ("```json\n[]\n```",), id="empty-list-is-text"),
        pytest.param(
            'Answer as {"bbox_2d": [x1, y1, x2, y2], "label": "..."}',
            ('Answer as {"bbox_2d": [x1, y1, x2, y2], "label": "..."}',),
            id="template",
        ),
        pytest.param('{"name": "cat", "age": [1, 2, 3]}', ('{"name": "cat", "age": [1, 2, 3]}',), id="other-json-is-text"),
    ],
)
def test_json_boxes_leave_no_brackets_behind(text: str, parts: tuple[TextPart, ...]) -> None:
    assert split(text) == parts


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("From 12 to 34, and (56, 78).", id="numbers"),
        pytest.param("f[1, 2, 3]", id="three"),
        pytest.param("[1, 2, 3, 4, 5]", id="five"),
        pytest.param("[[1, 2, 3], [4, 5, 6, 7]]", id="matrix-with-a-row-of-four"),
        pytest.param("[[[1, 2, 3, 4]]]", id="three-deep"),
        pytest.param("[0, [1, 2, 3, 4], 5]", id="list-inside-a-list"),
        pytest.param("[4, 3, 2, 1]", id="corners-out-of-order"),
        pytest.param("[1, 2, 1, 4]", id="no-width"),
        pytest.param("[-1, 2, 3, 4]", id="negative"),
        pytest.param("[1; 2; 3; 4]", id="semicolons"),
        pytest.param("[1, 2, 3, 4", id="unclosed"),
        pytest.param("[1, 2, 3, n]", id="letter"),
        pytest.param("(1, 2, 3, 4)", id="round-brackets"),
        pytest.param("[١, ٢, ٣, ٤]", id="other-digits"),
    ],
)
def test_prose_digits_are_no_boxes(text: str) -> None:
    assert split(text) == (text,)


@pytest.mark.parametrize(
    ("text", "space"),
    [
        pytest.param("[10, 20, 30, 40]", RELATIVE, id="no-fractions"),
        pytest.param("[10, 20, 3000, 40]", PER_MILLE, id="no-thousandths"),
        pytest.param("[0.1, 0.2, 0.3, 0.4]", None, id="undeclared"),
    ],
)
def test_a_list_that_cannot_be_of_the_space_is_text(text: str, space: BoxSpace | None) -> None:
    assert split(text, space=space) == (text,)


def test_a_list_in_a_record_without_images_is_text() -> None:
    assert split("Sort [1, 2, 3, 4].", num_images=0) == ("Sort [1, 2, 3, 4].",)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param("click(start_box='<|box_start|>(246,113)<|box_end|>')", "point_not_box", id="qwen2-point"),
        pytest.param("<box>(246,113)</box>", "point_not_box", id="qwen1-point"),
        pytest.param('[{"point_2d": [1, 2], "label": "a"}]', "point_not_box", id="json-point"),
        pytest.param("<box>(1,2),(3,4),(5,6)</box>", "malformed_box", id="three-corners"),
        pytest.param("<quad>(1,2),(3,4)</quad>", "malformed_box", id="quad-of-two"),
        pytest.param("<|box_start|>(1,2),(3,4)", "malformed_box", id="tag-not-closed"),
        pytest.param("<|box_start|>x<|box_end|>", "malformed_box", id="tag-without-numbers"),
        pytest.param("<|object_ref_end|>", "malformed_box", id="stray-tag"),
        pytest.param("<ref>dog</ref><box>", "malformed_box", id="qwen1-evaluation-prompt"),
        pytest.param('{"bbox_2d": [1, 2, 3], "label": "a"}', "malformed_box", id="json-three-numbers"),
        pytest.param('{"bbox_2d": [1, 2, 3, 4], "label": "a", "color": "red"}', "malformed_box", id="json-other-key"),
        pytest.param('{"bbox_2d": [1, 2, 3, 4], "more": {"a": 1}}', "malformed_box", id="json-nested"),
        pytest.param("{'bbox_2d': [1, 2, 3, 4]}", "malformed_box", id="python-quotes"),
        pytest.param('{\\"bbox_2d\\": [1, 2, 3, 4]}', "malformed_box", id="json-inside-json"),
        pytest.param('{"bbox_2d": [1, 2, 3, 4', "malformed_box", id="json-truncated"),
    ],
)
def test_broken_forms_are_refused(text: str, reason: str) -> None:
    assert refusal(text)[0] == reason


@pytest.mark.parametrize(
    "text",
    [
        "<|box_start|>(1,2),(3,4)<|box_end|>",
        "<box>(1,2),(3,4)</box>",
        '{"bbox_2d": [1,2,3,4], "label": "a"}',
        "[[086,540,400,760]]",
    ],
)
def test_an_unmistakable_box_needs_a_space_and_an_image_and_fits_the_space(text: str) -> None:
    reason, detail = refusal(text, space=None)
    assert reason == "box_space_undeclared"
    assert "set `box_space`" in detail
    assert refusal(text, num_images=0)[0] == "box_without_image"
    assert refusal(text, space=RELATIVE)[0] == "box_out_of_range"
    assert len(split(text, space=PER_MILLE)) == 1


def test_pixels_are_no_thousandths() -> None:
    assert refusal("<box>(1,2),(1001,4)</box>", space=PER_MILLE)[0] == "box_out_of_range"
    assert split("<box>(1,2),(1000,4)</box>", space=PER_MILLE) == (box(1, 2, 1000, 4),)


def test_a_box_between_two_images_is_in_the_first_and_after_both_it_is_refused() -> None:
    text = "<image> <box>(1,2),(3,4)</box> <image>"
    assert split(text, num_images=2) == (IMAGE, " ", box(1, 2, 3, 4), " ", ImageMark(1))
    reason, detail = refusal(text + text[8:30], num_images=2)
    assert reason == "ambiguous_box_image"
    assert "after 2 of 2 images" in detail
    assert refusal("<box>(1,2),(3,4)</box>" + text, num_images=2)[0] == "ambiguous_box_image"


def test_tags_of_web_pages_are_text_where_their_forms_are_not_asked_for() -> None:
    text = "The page says <ref>Smith 2004</ref> and <box>."
    assert split(text, forms="family") == (text,)


@given(st.lists(st.sampled_from(["<image>", "dog", " ", "[1] ", "[[001,002,003,004]]", "\n", "é"]), max_size=12))
def test_the_text_can_be_put_together_again(pieces: list[str]) -> None:
    text = "".join(pieces)
    parts = split(text)
    written = {ImageMark: "<image>", BoxMark: "[[001,002,003,004]]"}
    assert "".join(part if isinstance(part, str) else written[type(part)] for part in parts) == text
    assert "" not in parts
    assert not any(isinstance(a, str) and isinstance(b, str) for a, b in itertools.pairwise(parts))
    assert [part.image_index for part in parts if isinstance(part, ImageMark)] == list(range(text.count("<image>")))


@given(st.text(alphabet='{}[]<>|"\\/:,.0123456789 \nbox_2drefquadimgstart', max_size=200))
def test_any_text_is_split_or_refused(text: str) -> None:
    try:
        parts = split(text)
    except Refused:
        return
    assert all(isinstance(part, str | ImageMark | BoxMark) for part in parts)


@pytest.mark.parametrize(
    "piece", ["{", '{"', "[", "[1,", "<ref>", "<box>", "<|object_ref_start|>", '"bbox_2d":', "```json ", "[[1", '{"bbox_2d": [1']
)
def test_hostile_text_is_split_the_same_however_long_it_is(piece: str) -> None:
    """50,000 repetitions would run for minutes if the expressions went back."""
    short, long = outcome(piece * 50), outcome(piece * 50_000)
    assert long == (short * 1000 if short.startswith(piece) else short)


def outcome(text: str) -> str:
    """The text as it stays, or the reason why it is refused."""
    try:
        parts = split(text)
    except Refused as refused:
        return refused.reason
    assert all(isinstance(part, str) for part in parts), "no piece is a whole form"
    return "".join(part for part in parts if isinstance(part, str))


# Turns


def messages(*spoken: tuple[str, str | None]) -> list[Message]:
    return [Message(role=role, content=text) for role, text in spoken]


def plain(text: str) -> tuple[TextPart, ...]:
    return (text,) if text else ()


def test_turns_are_paired_after_an_optional_system_prompt() -> None:
    asked = [("user", "a"), ("assistant", "b"), ("human", "c"), ("gpt", "d")]
    turns = (DialogueTurn(("a",), ("b",)), DialogueTurn(("c",), ("d",)))
    assert pair_turns(messages(*asked), plain) == (None, turns)
    assert pair_turns(messages(("system", "s"), *asked), plain) == ("s", turns)


def test_both_spellings_of_a_message_are_read() -> None:
    old = [Message(sender="human", value="a"), Message(sender="gpt", value="b")]
    assert pair_turns(old, plain) == (None, (DialogueTurn(("a",), ("b",)),))


@pytest.mark.parametrize(
    ("spoken", "reason"),
    [
        pytest.param([], "turn_order", id="nothing"),
        pytest.param([("system", "s")], "turn_order", id="only-system"),
        pytest.param([("user", "a")], "turn_order", id="no-answer"),
        pytest.param([("user", "a"), ("assistant", "b"), ("user", "c")], "turn_order", id="trailing-question"),
        pytest.param([("user", "a"), ("user", "b"), ("assistant", "c")], "turn_order", id="two-questions"),
        pytest.param([("assistant", "a"), ("user", "b")], "turn_order", id="answer-first"),
        pytest.param([("user", "a"), ("system", "s"), ("assistant", "b")], "turn_order", id="system-inside"),
        pytest.param([("user", "a"), ("assistant", " \n")], "empty_answer", id="blank-answer"),
        pytest.param([("user", "a"), ("observation", "b")], "unsupported_role", id="observation"),
        pytest.param([("", "a"), ("assistant", "b")], "unsupported_role", id="no-role"),
        pytest.param([("user", None), ("assistant", "b")], "unreadable_row", id="no-text"),
        pytest.param([("system", "<image>"), ("user", "a"), ("assistant", "b")], "image_outside_question", id="image-in-system"),
        pytest.param([("user", "a"), ("assistant", "<image>")], "image_outside_question", id="image-in-answer"),
    ],
)
def test_other_orders_are_refused(spoken: list[tuple[str, str | None]], reason: str) -> None:
    with pytest.raises(Refused) as raised:
        pair_turns(messages(*spoken), split)
    assert raised.value.reason == reason


def test_an_answer_that_shall_not_be_trained_is_refused() -> None:
    asked = Message(role="user", content="a")
    with pytest.raises(Refused, match="untrained_answer"):
        pair_turns([asked, Message(role="assistant", content="b", loss=False)], plain)
    assert pair_turns([asked, Message(role="assistant", content="b", loss=True)], plain)[1]


def test_images_are_a_list_one_path_or_none() -> None:
    one = (ImageRef("a.jpg"),)
    assert image_refs(["a.jpg"], None) == image_refs("a.jpg", []) == image_refs(None, "a.jpg") == one
    assert image_refs(None, "") == ()


@pytest.mark.parametrize("columns", [(["a.jpg"], ["b.jpg"]), ([""],), (["a.jpg", " "],), (["data:image/png;base64,AAAA"],)])
def test_image_columns_that_name_no_file_are_refused(columns: Sequence[list[str]]) -> None:
    with pytest.raises(Refused, match="bad_image_path"):
        image_refs(*columns)


@pytest.mark.parametrize(("num_seen", "num_images"), [(0, 1), (1, 0), (2, 1), (1, 2)])
def test_markers_must_be_as_many_as_images(num_seen: int, num_images: int) -> None:
    marks = Marks(num_images, None)
    for _ in range(num_seen):
        marks.image()
    with pytest.raises(Refused, match=f"found {num_seen} image markers for {num_images} images") as raised:
        marks.check_images()
    assert ("Write the image's marker" in raised.value.detail) == (num_seen == 0)


# Files


class _Row(msgspec.Struct):
    id: str | int | None = None
    text: str = ""


def config(path: Path, **settings: object) -> SourceConfig:
    return SourceConfig.model_validate({"reader": "any", "annotations": str(path), **settings})


def parse(row: _Row, place: Place) -> Record | None:
    if row.text == "bad":
        raise Refused("my_reason", "found bad, expected good")
    return None if row.text == "skip" else Record(place.record_id, place.position, (), captions=(row.text,))


def read(path: Path, per_unit: int = 2) -> list[Record | Rejected]:
    plan = plan_rows(config(path), per_unit)
    return [item for unit in plan.units for item in read_rows(unit, _Row, parse)]


def test_rows_are_read_in_units_and_one_bad_row_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [
        '{"id": 7, "text": "a"}',
        '{"id": "b", "text": "bad"}',
        '{"text": 3}',
        '{"text": ',
        '{"text": "skip"}',
        '{"id":1},{"id":2}',
        '{"id": ""}',
    ]
    path.write_text("\r\n".join(lines))
    read_items = read(path)
    assert [(type(item).__name__, item.position) for item in read_items] == [
        ("Record", "rows.jsonl, byte 0"),
        ("Rejected", "rows.jsonl, byte 24"),
        ("Rejected", "rows.jsonl, byte 52"),
        ("Rejected", "rows.jsonl, byte 65"),
        ("Rejected", "rows.jsonl, byte 94"),
        ("Record", "rows.jsonl, byte 113"),
    ]
    assert isinstance(read_items[0], Record)
    assert (read_items[0].record_id, read_items[0].captions) == ("7", ("a",))
    assert [item.reason for item in read_items if isinstance(item, Rejected)] == [
        "my_reason",
        "unreadable_row",
        "unreadable_row",
        "unreadable_row",
    ]
    assert read_items[1] == Rejected("my_reason", "rows.jsonl, byte 24", "found bad, expected good", "b", lines[1])
    assert isinstance(read_items[2], Rejected)
    assert read_items[2].detail == "found: Expected `str`, got `int` - at `row.text`"


def test_a_row_without_id_is_called_by_its_content_whatever_its_place(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.json"
    first.write_bytes(b'{"text":"a"}\r\n{"text":"b"}\r\n')
    second.write_bytes(b'[{"text":"b"},\n {"text":"a"}]')
    ids = [[item.record_id for item in read(path)] for path in (first, second)]
    assert ids[0] == ids[1][::-1]
    assert len(set(ids[0])) == 2
    assert all(len(record_id) == 16 for record_id in ids[0])


def test_the_source_text_of_a_rejected_row_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "bad", "more": "é" * 5000}], ensure_ascii=False))
    [rejected] = read(path)
    assert isinstance(rejected, Rejected)
    assert len(rejected.source_text) == 2000
    assert rejected.source_text.endswith("éé")


def test_the_plan_counts_and_identifies_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": str(number)} for number in range(5)]))
    plan = plan_rows(config(path), 2, ("a note",))
    assert (plan.num_records, len(plan.units), plan.notes) == (5, 3, ("a note",))
    copy = tmp_path / "copy.json"
    copy.write_bytes(path.read_bytes())
    assert plan_rows(config(copy), 3).fingerprint == plan.fingerprint
    copy.write_bytes(path.read_bytes().replace(b'"4"', b'"5"'))
    assert plan_rows(config(copy), 3).fingerprint != plan.fingerprint


@pytest.mark.parametrize("content", ["", "[]", "hello"])
def test_a_file_without_rows_raises(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(AnnotationError, match=r"rows\.json"):
        plan_rows(config(path), 2)


def test_the_declared_space_carries_its_resize(tmp_path: Path) -> None:
    assert declared_space(config(tmp_path)) is None
    assert declared_space(config(tmp_path, box_space="per_mille")) == PER_MILLE
    resized = config(tmp_path, box_space="resized", box_space_family="qwen3_vl", box_space_max_pixels=1003520)
    assert declared_space(resized) == BoxSpace("resized", "qwen3_vl", 0, 1003520)
