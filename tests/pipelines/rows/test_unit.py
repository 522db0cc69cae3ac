"""One unit from records to rows: nothing is lost, nothing is too long, and no row knows which others were beside it."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from boxcar.pipelines.families.catalog import FAMILIES
from boxcar.pipelines.images.image_file import ImageHeader
from boxcar.pipelines.images.lookup import ImageLookup
from boxcar.pipelines.rows.unit import MAX_SHRINK_ROUNDS, UnitResult
from boxcar.schemas.errors import ConfigError, ImageError
from boxcar.schemas.record import PIXELS, RELATIVE, Box, BoxMark, DialogueTurn, ImageMark, ImageRef, Record, Region, Rejected
from boxcar.schemas.row import ROW_SCHEMA
from boxcar.schemas.workflow import RulesConfig, TaskConfig, TasksConfig
from tests.small_units import EVERY_TASK, convert, converter, files, frame_of, header, image, only, record, region, rows_of, settings

EVERY_FAMILY = sorted(FAMILIES)
DECLARED_SIZES = ImageLookup("", trust_sizes=True)
ALWAYS = TaskConfig(share=1.0)


def reasons(result: UnitResult) -> dict[str, int]:
    return {reason: entry.count for reason, entry in result.counts.records_rejected.items()}


def turn_reasons(result: UnitResult) -> dict[str, int]:
    return {reason: entry.count for reason, entry in result.counts.turns_rejected.items()}


# ---- records with all sorts of faults

HEADERS: dict[str, ImageHeader | ImageError] = {
    "fine.jpg": header(640, 480),
    "small.jpg": header(40, 30),
    "turned.jpg": header(640, 480, 6),
    "mirrored.jpg": header(640, 480, 2),
    "cmyk.jpg": header(640, 480, mode_note="cmyk"),
    "strip.jpg": header(8000, 20),
    "missing.jpg": ImageError("missing.jpg", reason="missing_image", found="no such file", expected="an image"),
    "cut.jpg": ImageError("cut.jpg", reason="truncated_image", found="half an image", expected="all of it"),
}
images = st.builds(
    lambda path, size: ImageRef(path, *size),
    st.sampled_from(["fine.jpg"] * 6 + sorted(HEADERS)),
    st.sampled_from([*[(None, None)] * 4, (640, 480), (480, 640), (1280, 960), (640, None)]),
)
texts = st.sampled_from(
    [*["dog", "the dog", "cat", "狗"] * 3, "", "  ", "<|im_end|>", "<|image_pad|>", "\ud800", "word " * 60, 'a "quoted" dog']
)
BOXES: list[Box] = [
    *[(10, 10, 200, 200)] * 3,
    *((0, 0, 640, 480), (300, 200, 100, 50), (600, 400, 500, 300), (600, 10, 650, 50), (600, 10, 760, 50), (700, 10, 750, 50)),
    *((0.1, 0.1, 0.5, 0.5), (math.nan, 0, 1, 1), (5, 5, 5, 50), (100, 100, 104, 104), (1e308, 0, -1e308, 5)),
]
boxes = st.sampled_from(BOXES)
regions = st.builds(
    Region,
    boxes,
    texts,
    st.lists(texts, max_size=2).map(tuple),
    st.just(0),
    is_crowd=st.integers(0, 9).map(lambda die: die == 9),
    is_difficult=st.integers(0, 9).map(lambda die: die == 9),
)


@st.composite
def dialogues(draw: st.DrawFn, num_images: int) -> tuple[DialogueTurn, ...]:
    marks = st.builds(BoxMark, st.lists(boxes, min_size=1, max_size=2).map(tuple), texts, st.integers(0, max(0, num_images - 1)))
    part = st.one_of(texts, texts, marks) if num_images else texts
    turns = [
        (list(draw(st.lists(part, min_size=1, max_size=2))), tuple(draw(st.lists(part, min_size=1, max_size=2))))
        for _ in range(draw(st.integers(1, 3)))
    ]
    question = [*(ImageMark(index) for index in range(num_images)), *turns[0][0]]
    return tuple(DialogueTurn(tuple(question if number == 0 else asked), answered) for number, (asked, answered) in enumerate(turns))


@st.composite
def records(draw: st.DrawFn) -> Record | Rejected:
    """Of every kind, from a small choice of ids."""
    record_id = str(draw(st.integers(0, 30)))
    if draw(st.integers(0, 9)) == 9:
        return Rejected("broken_row", f"row {record_id}", "found nothing that can be read", record_id)
    pictures = tuple(draw(st.lists(images, max_size=3))) if draw(st.booleans()) else (draw(images),)
    return Record(
        record_id,
        f"row {record_id}",
        pictures,
        tuple(draw(st.lists(regions, max_size=4))) if pictures else (),
        captions=tuple(draw(st.lists(texts, max_size=2))),
        dialogue=draw(dialogues(len(pictures))) if draw(st.booleans()) else (),
        box_space=draw(st.sampled_from([PIXELS, PIXELS, PIXELS, RELATIVE])),
        absent=tuple(draw(st.lists(texts, max_size=2))),
        vocabulary=draw(st.sampled_from([(), ("dog", "cat", "bird")])),
        not_exhaustive=draw(st.sampled_from([(), ("dog",)])),
        language=draw(st.sampled_from(["en", "zh"])),
        system=draw(st.sampled_from([*[None] * 6, "", "Be brief.", "<|im_start|>"])),
    )


def workflow(family: str, data: st.DataObject) -> Any:
    smart = FAMILIES[family].resize.limits_matter
    tightest = {"cogvlm2": 2330, "cogvlm_224": 280, "qwen_vl": 300}.get(family, 1240) if not smart else 60
    return settings(
        family,
        tasks=data.draw(st.sampled_from([EVERY_TASK, TasksConfig()])),
        cutoff_len=data.draw(st.one_of(st.just(FAMILIES[family].max_sequence), st.integers(tightest, tightest + 500))),
        over_length=data.draw(st.sampled_from(["plan", "split"])),
        shrink_images=data.draw(st.booleans()),
        rules=data.draw(st.sampled_from([RulesConfig(), RulesConfig(size_mismatch="fix", under_one_token="drop", mostly_outside="fix")])),
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # coordinates beyond any image overflow
@pytest.mark.parametrize("family", EVERY_FAMILY)
@hypothesis_settings(max_examples=25)
@given(st.data())
def test_every_record_that_is_read_is_written_or_rejected(family: str, data: st.DataObject) -> None:
    items, config = data.draw(st.lists(records(), max_size=8)), workflow(family, data)
    result = convert(config, items, files(HEADERS))
    counts, rows = result.counts, rows_of(result)

    assert counts.records_read == len(items) == counts.records_written + counts.num_rejected
    assert len(result.rejected) == counts.num_rejected
    assert Counter(rejected.reason for rejected in result.rejected) == reasons(result)
    assert all(rejected.position and rejected.detail for rejected in result.rejected)
    assert result.table.schema.equals(ROW_SCHEMA, check_metadata=True)
    result.table.validate(full=True)

    assert counts.rows_written == len(rows) == len({row["sample_id"] for row in rows})
    written = {row["sample_id"].removeprefix("source/").partition("#")[0] for row in rows}
    assert len(written) == counts.records_written
    assert written <= {item.record_id for item in items if isinstance(item, Record)}
    assert counts.turns == Counter(turn["task"] for row in rows for turn in row["turns"])
    assert counts.images == sum(len(row["images"]) for row in rows)
    assert sum(counts.total_tokens_histogram.values()) == sum(counts.visual_tokens_histogram.values()) == len(rows)
    assert counts.visual_tokens + counts.text_tokens == sum(row["total_tokens"] for row in rows)
    assert {task: sum(bins.values()) for task, bins in counts.difficulty_histograms.items()} == counts.turns
    drawn = [item for item in items if isinstance(item, Record)]
    first = {item.record_id: item for item in reversed(drawn)}.values()
    assert counts.boxes_read == sum(len(one.regions) + sum(len(mark.boxes) for mark in marks_of(one)) for one in first)

    for row in rows:
        assert row["turns"]
        assert row["max_turn_tokens"] <= config.cutoff_len
        if row["ordered"] or (config.over_length == "split" and not family.startswith("cogvlm")):
            assert row["total_tokens"] <= config.cutoff_len
        for turn in row["turns"]:
            assert len(turn["answer_ids"]) == len(turn["answer_is_coordinate"]) > 0
            assert turn["prompt_ids"]


def marks_of(found: Record) -> list[BoxMark]:
    return [part for turn in found.dialogue for text in (turn.question, turn.answer) for part in text if isinstance(part, BoxMark)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("family", ["qwen2_5_vl", "cogvlm_chat"])
@hypothesis_settings(max_examples=25)
@given(st.data())
def test_a_record_gives_the_same_rows_whatever_stands_beside_it(family: str, data: st.DataObject) -> None:
    drawn = data.draw(st.lists(records().filter(lambda item: isinstance(item, Record)), max_size=7, unique_by=lambda item: item.record_id))
    config = workflow(family, data)
    whole = convert(config, drawn, files(HEADERS))
    unit = converter(config)  # one for all, as a worker has
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, len(drawn)), max_size=3))), len(drawn)]
    order = data.draw(st.permutations(drawn))
    parts = [unit.convert(order[start:stop], files(HEADERS)) for start, stop in pairwise(cuts)]

    def by_id(results: Sequence[UnitResult]) -> tuple[dict[str, Any], dict[str, Rejected]]:
        rows = {row["sample_id"]: repr(row) for one in results for row in rows_of(one)}
        return rows, {rejected.record_id: rejected for one in results for rejected in one.rejected}

    assert by_id([whole]) == by_id(parts)
    for one in parts[1:]:
        parts[0].counts.add(one.counts)
    for name in ("records_read", "records_written", "rows_written", "boxes_read", "boxes_kept", "turns", "visual_tokens", "text_tokens"):
        assert getattr(parts[0].counts, name) == getattr(whole.counts, name)
    found = {rule: (finding.kept, finding.fixed, finding.dropped) for rule, finding in whole.counts.rules.items()}
    assert {rule: (one.kept, one.fixed, one.dropped) for rule, one in parts[0].counts.rules.items()} == found


def test_the_same_unit_twice_is_the_same_to_the_byte() -> None:
    drawn = [record(str(number), regions=(region("dog"), region(f"cat {number}")), captions=("A dog.",)) for number in range(20)]
    unit, config = converter(settings("qwen2_5_vl", tasks=EVERY_TASK)), settings("qwen2_5_vl", tasks=EVERY_TASK)
    first, again, fresh = unit.convert(drawn, DECLARED_SIZES), unit.convert(drawn, DECLARED_SIZES), convert(config, drawn)
    assert first.table.equals(again.table, check_metadata=True)
    assert first.table.equals(fresh.table, check_metadata=True)
    assert first.counts == again.counts == fresh.counts


def test_an_empty_unit_is_an_empty_table() -> None:
    result = convert(settings("qwen2_5_vl"), [])
    assert result.table.num_rows == 0
    assert result.table.schema.equals(ROW_SCHEMA, check_metadata=True)
    assert result.counts.records_read == 0


# ---- single faults


def test_of_records_with_one_id_the_first_is_written() -> None:
    twins = [record("7", captions=("The first.",)), record("8", captions=("Another.",)), record("7", captions=("The second.",))]
    result = convert(settings("qwen2_vl"), twins)
    assert reasons(result) == {"duplicate_id": 1}
    assert [row["turns"][0]["answer"] for row in rows_of(result)] == ["The first.", "Another."]
    [rejected] = result.rejected
    assert (rejected.record_id, rejected.position) == ("7", "rows.jsonl, row 7")


TROUBLE = [
    pytest.param(record(regions=(region("<|im_end|>"),)), "special_token_in_text", id="a special token as label"),
    pytest.param(record(regions=(region("a<|image_pad|>b"),)), "special_token_in_text", id="an image in a label"),
    pytest.param(record(regions=(region("", (10, 10, 50, 50), "the <|box_start|>"),)), "special_token_in_text", id="in a phrase"),
    pytest.param(record(captions=("A dog.<|im_end|>",)), "special_token_in_text", id="in a caption"),
    pytest.param(record(absent=("<|im_start|>",)), "special_token_in_text", id="in an absent label"),
    pytest.param(record(captions=("A dog.",), system="Be <|im_start|>"), "special_token_in_text", id="in a system prompt"),
    pytest.param(record(captions=("A dog.",), system=" "), "empty_text", id="a blank system prompt"),
    pytest.param(record(captions=("A dog.",), system="\ud800"), "invalid_unicode", id="half a letter in a system prompt"),
    pytest.param(record(captions=(" \n",)), "empty_text", id="a blank caption"),
    pytest.param(record(captions=("\udfff",)), "invalid_unicode", id="half a letter"),
    pytest.param(record(), "no_turns", id="nothing but an image"),
    pytest.param(record("1", ()), "no_turns", id="nothing at all"),
    pytest.param(record(regions=(region("dog", (700, 0, 800, 9)),)), "no_turns", id="no box left"),
    pytest.param(record(images=(image(None, None),), captions=("A dog.",)), "no_declared_size", id="no size to trust"),
    pytest.param(record(images=(image(8001, 40),), captions=("A dog.",)), "image_refused_by_family", id="a strip"),
    pytest.param(record(captions=("word " * 5000,)), "over_cutoff", id="too long"),
]


@pytest.mark.parametrize(("found", "reason"), TROUBLE)
def test_a_record_of_which_nothing_is_left_is_rejected_with_its_reason_and_content(found: Record, reason: str) -> None:
    result = convert(settings("qwen2_vl", tasks=only(detect=ALWAYS, refer=ALWAYS, absent=ALWAYS, caption=ALWAYS)), [found])
    assert reasons(result) == {reason: 1}
    assert not result.counts.turns_rejected  # they are counted with their record
    [rejected] = result.rejected
    assert (rejected.reason, rejected.record_id, rejected.position) == (reason, "1", "rows.jsonl, row 1")
    assert rejected.source_text
    assert len(rejected.source_text) <= 2000
    assert "found" in rejected.detail


def test_a_turn_that_cannot_be_made_is_left_out_and_counted() -> None:
    mixed = record(regions=(region("dog"), region("<|im_end|>")), captions=("A dog.", "<|im_end|>"))
    result = convert(settings("qwen2_vl", tasks=EVERY_TASK), [mixed])
    assert not result.counts.records_rejected
    # The label, the joint question that names it, its description, and the caption.
    assert turn_reasons(result) == {"special_token_in_text": 4}
    assert result.counts.turns == {"caption": 1, "describe": 1, "detect": 1}
    assert result.counts.turns_rejected["special_token_in_text"].examples[0].startswith("rows.jsonl, row 1: found '<|im_end|>'")


@pytest.mark.parametrize(("family", "limit"), [("cogvlm", 1), ("cogvlm2", 1), ("qwen2_vl", None), ("qwen_vl", None)])
def test_more_images_than_a_family_takes_are_refused(family: str, limit: int | None) -> None:
    talk = (DialogueTurn((ImageMark(0), ImageMark(1), "Alike?"), ("Yes.",)),)
    result = convert(
        settings(family, cutoff_len=min(4096, FAMILIES[family].max_sequence)), [record(images=(image(), image()), dialogue=talk)]
    )
    assert FAMILIES[family].chat.max_images == limit
    assert reasons(result) == ({"too_many_images": 1} if limit else {})


def test_readers_rejections_pass_through() -> None:
    theirs = Rejected("broken_row", "rows.jsonl, byte 7", "found {", "", "{")
    result = convert(settings("qwen2_vl"), [theirs, record(captions=("A dog.",))])
    assert result.rejected == [theirs]
    assert reasons(result) == {"broken_row": 1}
    assert (result.counts.records_read, result.counts.records_written) == (2, 1)


def test_a_longer_cutoff_than_the_familys_is_refused() -> None:
    with pytest.raises(ConfigError, match="at most 2048"):
        frame_of(settings("cogvlm", cutoff_len=2049))


# ---- too long


def wordy(number: int) -> Record:
    return record(str(number), regions=tuple(region(f"thing {index}", (10.0, 10.0 + index, 300, 300)) for index in range(number)))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen_vl"])
@pytest.mark.parametrize("cutoff", [500, 520, 700])
def test_a_sample_that_is_too_long_is_planned_or_split(family: str, cutoff: int) -> None:
    drawn = [wordy(number) for number in range(1, 13)]
    planned = convert(settings(family, tasks=only(detect=ALWAYS), cutoff_len=cutoff), drawn)
    split = convert(settings(family, tasks=only(detect=ALWAYS), cutoff_len=cutoff, over_length="split"), drawn)
    whole = {row["sample_id"]: row for row in rows_of(planned)}
    assert [len(row["turns"]) for row in whole.values()] == list(range(1, 13))
    assert any(row["total_tokens"] > cutoff for row in whole.values())
    assert split.counts.records_written == planned.counts.records_written == 12
    assert split.counts.rows_written > 12

    parts: dict[str, list[dict[str, Any]]] = {}
    for row in rows_of(split):
        assert row["total_tokens"] <= cutoff
        parts.setdefault(row["sample_id"].partition("#")[0], []).append(row)
    for sample_id, row in whole.items():
        found = parts[sample_id]
        several = row["total_tokens"] > cutoff
        assert [part["sample_id"] for part in found] == ([f"{sample_id}#{n}" for n in range(len(found))] if several else [sample_id])
        assert [turn for part in found for turn in part["turns"]] == row["turns"]
        assert all(part["images"] == row["images"] for part in found)


def test_a_turn_too_long_by_itself_is_left_out_and_counted() -> None:
    mixed = record(captions=("A dog.", "word " * 600))
    result = convert(settings("qwen2_vl", tasks=only(caption=ALWAYS), cutoff_len=700), [mixed])
    assert turn_reasons(result) == {"turn_over_cutoff": 1}
    assert result.counts.turns == {"caption": 1}
    [example] = result.counts.turns_rejected["turn_over_cutoff"].examples
    assert example.endswith("tokens with the longest turn alone, expected at most 700")


def test_a_dialogue_is_never_shortened() -> None:
    turns = (DialogueTurn((ImageMark(0), "Hi."), ("Hello.",)), *[DialogueTurn((f"And {n}?",), ("word " * 20,)) for n in range(10)])
    long = record(dialogue=turns, captions=("A dog.",))
    result = convert(settings("qwen2_vl", tasks=only(caption=ALWAYS, dialogue=ALWAYS), cutoff_len=500, over_length="split"), [long])
    assert [row["sample_id"] for row in rows_of(result)] == ["source/1"]
    assert turn_reasons(result) == {"over_cutoff": len(turns)}
    assert "tokens with all its turns (" in result.counts.turns_rejected["over_cutoff"].examples[0]


# ---- images that shrink

SMART = [family for family in EVERY_FAMILY if FAMILIES[family].resize.limits_matter]


@pytest.mark.parametrize("family", SMART)
@given(st.lists(st.tuples(st.integers(100, 3000), st.integers(100, 3000)), min_size=1, max_size=2), st.integers(150, 900), st.booleans())
@hypothesis_settings(max_examples=30)
def test_an_image_too_large_for_one_turn_shrinks_until_it_fits(family: str, sizes: list[tuple[int, int]], cutoff: int, talk: bool) -> None:
    resize = FAMILIES[family].resize
    pictures = tuple(image(*size) for size in sizes)
    mark = BoxMark(((8.0, 8.0, 90.0, 90.0),), "dog", 0)
    marks = [ImageMark(index) for index in range(len(pictures))]
    if talk or len(pictures) > 1:
        large = record(images=pictures, dialogue=(DialogueTurn((*marks, "Where is the dog?"), (mark,)),))
    else:
        large = record(images=pictures, regions=(region("dog", (8, 8, 90, 90)),))
    shrinking, rigid = (
        convert(settings(family, cutoff_len=cutoff, shrink_images=shrink, tasks=only(detect=ALWAYS, dialogue=ALWAYS)), [large])
        for shrink in (True, False)
    )
    if rigid.table.num_rows:
        assert shrinking.table.equals(rigid.table)
        assert shrinking.counts.images_shrunk == 0
        return
    assert reasons(rigid) == {"over_cutoff": 1}
    assert shrinking.counts.records_read == shrinking.counts.records_written + shrinking.counts.num_rejected
    [row] = rows_of(shrinking)
    assert row["max_turn_tokens"] <= cutoff
    assert shrinking.counts.images_shrunk >= 1
    for taken, size in zip(row["images"], sizes, strict=True):
        # Still what the family's rule makes of that image under some limit.
        assert (taken["width"], taken["height"]) == size
        limit = np.arange(1, taken["visual_tokens"] + 200) * math.prod(resize.pixels_per_token)
        possible = resize(size[0], size[1], np.minimum(limit, resize.published_limits.min_pixels), limit)
        assert (taken["resized_width"], taken["resized_height"]) in set(zip(possible.width.tolist(), possible.height.tolist(), strict=True))
        assert taken["visual_tokens"] == math.prod((taken["resized_width"], taken["resized_height"])) // math.prod(resize.pixels_per_token)
    # The boxes in the text are those of the smaller image; the boxes of the row stay pixels of the original.
    [turn] = row["turns"]
    assert turn["boxes"] == [[8, 8, 90, 90]]
    read = FAMILIES[family].box_text.parse_answer(turn["answer"])
    assert read is not None
    first = row["images"][0]
    resized = np.array([[first["resized_width"], first["resized_height"]]])
    expected = FAMILIES[family].grid.quantise(np.array([[8.0, 8, 90, 90]]), np.array([sizes[0]]), resized)
    assert [box.values for box in read] == [tuple(expected[0].tolist())]


CAPTIONED = only(caption=ALWAYS)

# (width, height), tokens that are left for the image: sizes whose sides round against the limit.
TIGHT = [
    pytest.param("qwen3_vl", (2257, 142), 10, id="qwen3_vl, lying"),
    pytest.param("qwen3_vl", (206, 1987), 4, id="qwen3_vl, standing"),
    pytest.param("qwen3_vl", (146, 109), 42, id="qwen3_vl, small"),
    pytest.param("qwen3_vl", (110, 431), 79, id="qwen3_vl, below the published least"),
    pytest.param("qwen3_vl", (70, 94), 58, id="qwen3_vl, tiny"),
    pytest.param("qwen2_vl", (2233, 51), 41, id="qwen2_vl, lying"),
    pytest.param("qwen2_vl", (96, 1946), 5, id="qwen2_vl, standing"),
    pytest.param("qwen2_5_vl", (2280, 217), 5, id="qwen2_5_vl, few tokens"),
    pytest.param("qwen2_5_vl", (1000, 1000), 1, id="qwen2_5_vl, a single token"),
]


@pytest.mark.parametrize(("family", "size", "left"), TIGHT)
def test_an_image_shrinks_no_more_than_it_must(family: str, size: tuple[int, int], left: int) -> None:
    captioned = record(images=(image(*size),), captions=("A dog.",))
    [whole] = rows_of(convert(settings(family, tasks=CAPTIONED), [captioned]))
    config = settings(family, tasks=CAPTIONED, shrink_images=True, cutoff_len=whole["text_tokens"] + left)
    [row] = rows_of(convert(config, [captioned]))
    resize = FAMILIES[family].resize
    limits = np.arange(1, 200) * math.prod(resize.pixels_per_token)
    possible = resize(*size, np.minimum(limits, resize.published_limits.min_pixels), limits).visual_tokens
    assert row["visual_tokens"] == max(possible[possible <= left])


def test_an_image_that_cannot_shrink_enough_is_rejected_and_not_counted_as_shrunk() -> None:
    # At least 14 tokens, for no side falls below one.
    strip = record("strip", images=(image(20, 4000),), captions=("A dog.",))
    [whole] = rows_of(convert(settings("qwen2_vl", tasks=CAPTIONED), [strip]))
    config = settings("qwen2_vl", tasks=CAPTIONED, shrink_images=True, cutoff_len=whole["text_tokens"] + 13)
    fine = record("fine", images=(image(56, 56),), captions=("A dog.",))
    result = convert(config, [strip, fine])
    assert [row["sample_id"] for row in rows_of(result)] == ["source/fine"]
    assert reasons(result) == {"over_cutoff": 1}
    assert result.counts.images_shrunk == 0


def test_a_box_that_is_too_small_is_counted_once_however_often_its_image_shrinks() -> None:
    tiny, large = region("ant", (0, 0, 5, 5)), region("dog", (0, 0, 2000, 2000))
    dropping = RulesConfig(under_one_token="drop")
    config = settings("qwen2_vl", tasks=only(detect=ALWAYS), shrink_images=True, cutoff_len=200, rules=dropping)
    result = convert(config, [record(images=(image(2800, 2800),), regions=(tiny, large))])
    assert result.counts.images_shrunk == 1
    finding = result.counts.rules["under_one_token"]
    assert (finding.kept, finding.fixed, finding.dropped) == (0, 0, 1)
    assert result.counts.boxes_kept == 1
    assert result.counts.turns == {"detect": 1}


def test_only_the_images_of_records_that_do_not_fit_shrink() -> None:
    drawn = [
        record("small", images=(image(280, 280),), captions=("A dog.",)),
        record("large", images=(image(2800, 2800),), captions=("A dog.",)),
    ]
    result = convert(settings("qwen2_vl", cutoff_len=400, shrink_images=True, tasks=only(caption=ALWAYS)), drawn)
    small, large = rows_of(result)
    assert small["visual_tokens"] == 100
    assert 300 < large["visual_tokens"] < 400
    assert result.counts.images_shrunk == 1
    assert MAX_SHRINK_ROUNDS >= 2


def test_an_image_of_one_size_cannot_shrink() -> None:
    result = convert(settings("qwen_vl", cutoff_len=250, shrink_images=True), [record(captions=("A dog.",))])
    assert reasons(result) == {"over_cutoff": 1}


def test_no_image_shrinks_to_nothing() -> None:
    long = record(images=(image(2800, 2800),), captions=("word " * 700,))
    result = convert(settings("qwen2_vl", cutoff_len=600, shrink_images=True, tasks=only(caption=ALWAYS)), [long])
    assert reasons(result) == {"over_cutoff": 1}
    assert "are header and images" in result.rejected[0].detail


# ---- shares and seeds

NUM_RECORDS = 2_000
SHARES = {"detect": 0.3, "detect_joint": 0.6, "refer": 0.15, "describe": 0.7, "absent": 0.45, "caption": 0.85, "dialogue": 0.5}


@pytest.fixture(scope="module")
def many() -> list[list[dict[str, Any]]]:
    """The rows of 2,000 records of two labels and of one item for every other task, for two seeds."""
    box: Box = (10.0, 10.0, 100.0, 100.0)
    drawn = [
        record(
            str(number),
            regions=(region("dog", box, "the dog"), region("cat", box)),
            captions=("A dog.",),
            absent=("bird",),
            dialogue=(DialogueTurn((ImageMark(0), "Hi."), ("Hello.",)),),
        )
        for number in range(NUM_RECORDS)
    ]
    tasks = TasksConfig(**{task: TaskConfig(share=share) for task, share in SHARES.items()})
    return [rows_of(convert(settings("qwen2_vl", tasks=tasks, languages={"en": 0.2, "zh": 0.8}, seed=seed), drawn)) for seed in (0, 1)]


def taken(rows: Sequence[dict[str, Any]]) -> set[tuple[str, str, str]]:
    """(record, task, label or answer) of every turn."""
    return {
        (row["sample_id"].partition("#")[0], turn["task"], turn["labels"][0] if turn["task"] == "detect" else "")
        for row in rows
        for turn in row["turns"]
    }


def assert_within_four_sigma(count: int, trials: int, share: float) -> None:
    sigma = math.sqrt(trials * share * (1 - share))
    assert abs(count - trials * share) <= 4 * sigma, f"{count} of {trials}, expected {trials * share:.0f} +- {sigma:.0f}"


# Where a task has two items, either may be chosen.
ITEMS = {"detect": 2, "describe": 2}


@pytest.mark.parametrize("task", sorted(SHARES))
def test_shares_are_met(task: str, many: list[list[dict[str, Any]]]) -> None:
    for rows in many:
        count = sum(turn["task"] == task for row in rows for turn in row["turns"])
        assert_within_four_sigma(count, NUM_RECORDS * ITEMS.get(task, 1), SHARES[task])


def test_choices_of_different_tasks_labels_and_seeds_are_independent(many: list[list[dict[str, Any]]]) -> None:
    first, second = (taken(rows) for rows in many)
    by_item: dict[tuple[str, str], set[str]] = {}
    for record_id, task, label in first:
        by_item.setdefault((task, label), set()).add(record_id)
    items = [("detect", "dog"), ("detect", "cat"), ("refer", ""), ("absent", ""), ("caption", ""), ("dialogue", ""), ("detect_joint", "")]
    for place, one in enumerate(items):
        for other in items[:place]:
            assert_within_four_sigma(len(by_item[one] & by_item[other]), NUM_RECORDS, SHARES[one[0]] * SHARES[other[0]])
    for task, label in items:
        again = {record_id for record_id, *what in second if what == [task, label]}
        assert_within_four_sigma(len(by_item[task, label] & again), NUM_RECORDS, SHARES[task] ** 2)


def test_shares_of_languages_are_met(many: list[list[dict[str, Any]]]) -> None:
    for rows in many:
        languages = [turn["language"] for row in rows for turn in row["turns"] if turn["task"] not in ("caption", "dialogue")]
        assert_within_four_sigma(languages.count("en"), len(languages), 0.2)


def test_every_prompt_is_used(many: list[list[dict[str, Any]]]) -> None:
    asked = {turn["question"] for row in many[0] for turn in row["turns"] if turn["task"] == "detect"}
    wordings = FAMILIES["qwen2_vl"].prompts["detect"]
    assert asked == {prompt.replace("{label}", label) for prompts in wordings.values() for prompt in prompts for label in ("dog", "cat")}
