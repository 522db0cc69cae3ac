"""Every test reads real files, with a BLOCK_BYTES small enough that each block border falls somewhere unlucky."""

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boxcar.pipelines.readers.shared import json_blocks
from boxcar.pipelines.readers.shared.json_blocks import BadElement, count_offsets, decode_element, element_spans, read_arrays, read_range
from boxcar.schemas.errors import AnnotationError

# Text full of what could be mistaken for structure.
texts = st.text(alphabet=st.one_of(st.sampled_from('{}[],:"\\/ \n\té猫😀ab0'), st.characters(codec="utf-8")), max_size=12)
scalars = st.one_of(st.none(), st.booleans(), st.integers(-(2**53), 2**53), st.floats(allow_nan=False, allow_infinity=False), texts)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8)
objects = st.dictionaries(texts, values, max_size=4)
records = st.lists(objects, max_size=8)
block_sizes = st.integers(16, 200)
layouts = st.sampled_from(
    [
        {"separators": (",", ":")},
        {"indent": 2},
        {"indent": "\t", "ensure_ascii": False},
        {"separators": (" , ", " : "), "ensure_ascii": False},
    ]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("json")


def write(folder: Path, content: str | bytes) -> str:
    path = folder / "file.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def arrays(path: str, *keys: str, block_bytes: int = 4 << 20, kind: Any = dict[str, Any]) -> tuple[dict[str, list[Any]], list[BadElement]]:
    """All elements by key, and the bad ones."""
    found: dict[str, list[Any]] = {}
    bad: list[BadElement] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_blocks, "BLOCK_BYTES", block_bytes)
        for block in read_arrays(path, dict.fromkeys(keys, kind)):
            found.setdefault(block.key, []).extend(block.items)
            bad.extend(block.bad)
    return found, bad


def elements(path: str, per_range: int, block_bytes: int = 4 << 20) -> tuple[list[tuple[int, bytes]], int, int]:
    """(offset, bytes) of all elements by way of ranges, the counted number, and the number of ranges."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_blocks, "BLOCK_BYTES", block_bytes)
        ranges, count = count_offsets(path, per_range)
    return [element for start, stop in ranges for element in read_range(path, start, stop)], count, len(ranges)


# read_arrays


@given(
    wanted=st.dictionaries(st.sampled_from(["images", "annotations", "categories"]), records),
    others=st.dictionaries(st.sampled_from(["info", "licenses", "{", "]", 'a"b', "é" * 30]), values),
    order=st.randoms(use_true_random=False),
    layout=layouts,
    block_bytes=block_sizes,
)
def test_arrays_yield_every_element_in_order_and_skip_other_keys(
    folder: Path, wanted: dict[str, Any], others: dict[str, Any], order: Any, layout: dict[str, Any], block_bytes: int
) -> None:
    pairs = list((wanted | others).items())
    order.shuffle(pairs)
    path = write(folder, json.dumps(dict(pairs), **layout))
    assert arrays(path, "images", "annotations", "categories", block_bytes=block_bytes) == (wanted, [])


@given(records=st.lists(objects, min_size=1, max_size=6), where=st.integers(0, 6), layout=layouts, block_bytes=block_sizes)
def test_a_bad_element_is_reported_with_its_offset_and_the_rest_is_read(
    folder: Path, records: list[Any], where: int, layout: dict[str, Any], block_bytes: int
) -> None:
    mark = '{"id": "no number"}'
    before, after = records[:where], records[where:]
    good = [{"id": number, "more": record} for number, record in enumerate(before + after)]
    texts_of = [json.dumps(record, **layout) for record in good]
    texts_of.insert(len(before), mark)
    content = '{"annotations": [' + ", ".join(texts_of) + "]}"

    class Thing(msgspec.Struct):
        id: int
        more: dict[str, Any]

    found, bad = arrays(write(folder, content), "annotations", block_bytes=block_bytes, kind=Thing)
    assert [(thing.id, thing.more) for thing in found["annotations"]] == [(record["id"], record["more"]) for record in good]
    assert [(element.offset, element.text) for element in bad] == [(content.encode().index(mark.encode()), mark)]


@pytest.mark.parametrize("block_bytes", [16, 64, 4 << 20])
@pytest.mark.parametrize(
    "element",
    [
        pytest.param(b'{"id": 3]', id="wrong-bracket"),
        pytest.param(b"17", id="number"),
        pytest.param(b'"text"', id="string"),
        pytest.param(b"[1, 2]", id="list"),
        pytest.param(b'{"id": "\xff"}', id="no-utf8"),
        pytest.param(b'{"id": "\\ud83d"}', id="half-a-surrogate-pair"),
        pytest.param(b'{"id": ' + b"[" * 3000 + b"]" * 3000 + b"}", id="nested-too-deeply"),
        pytest.param(b'{"id": "\\x"}', id="bad-escape"),
        pytest.param(b'{"id" 3}', id="no-colon"),
    ],
)
def test_an_element_that_does_not_decode_spoils_no_other(tmp_path: Path, element: bytes, block_bytes: int) -> None:
    good = [b'{"id": "%d"}' % number for number in range(4)]
    content = b'{"a": [' + b",".join([*good[:2], element, *good[2:]]) + b"]}"
    found, bad = arrays(write(tmp_path, content), "a", block_bytes=block_bytes)
    assert found == {"a": [{"id": str(number)} for number in range(4)]}
    assert [(item.offset, content[item.offset : item.offset + len(element)]) for item in bad] == [(content.index(element), element)]


def test_what_python_writes_and_json_forbids_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, '{"a": [{"x": NaN}, {"x": Infinity}, {"x": -Infinity}, {"x": 1}]}')
    found, bad = arrays(path, "a", block_bytes=16)
    numbers = [element["x"] for element in found["a"]]
    assert math.isnan(numbers[0])
    assert (numbers[1:], bad) == ([math.inf, -math.inf, 1], [])


def test_an_empty_array_is_told_from_a_missing_one(tmp_path: Path) -> None:
    assert arrays(write(tmp_path, '{"images": []}'), "images", "annotations") == ({"images": []}, [])


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    assert arrays(write(tmp_path, b'\xef\xbb\xbf{"a": [{"x": 1}]}'), "a") == ({"a": [{"x": 1}]}, [])


def test_a_top_level_string_may_be_longer_than_a_block(tmp_path: Path) -> None:
    content = {"thumbnail": "]}" * 100, "number": 12345678901234567890, "a": [{"x": 1}]}
    assert arrays(write(tmp_path, json.dumps(content)), "a", block_bytes=16) == ({"a": [{"x": 1}]}, [])


def test_a_block_border_right_after_a_backslash_does_not_open_the_string(tmp_path: Path) -> None:
    record = {"caption": '}]"' * 20}
    path = write(tmp_path, json.dumps({"a": [record] * 3}))
    for block_bytes in range(16, 120):
        assert arrays(path, "a", block_bytes=block_bytes) == ({"a": [record] * 3}, [])


@given(records=st.lists(objects, min_size=1, max_size=4), block_bytes=block_sizes, data=st.data())
def test_a_truncated_file_raises_with_its_place(folder: Path, records: list[Any], block_bytes: int, data: st.DataObject) -> None:
    content = json.dumps({"info": {}, "a": records}).encode()
    path = write(folder, content[: data.draw(st.integers(1, len(content) - 1))])
    with pytest.raises(AnnotationError, match=r"file\.json"):
        arrays(path, "a", block_bytes=block_bytes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("", "an empty file", id="empty"),
        pytest.param(" \n ", "an empty file", id="blank"),
        pytest.param("[]", "a list at the top", id="list"),
        pytest.param("hello", "hello", id="text"),
        pytest.param('{"a": null}', "the key 'a' without a list", id="null-for-a-list"),
        pytest.param('{"a": [{"x": 1}}, {"x": 2}]}', "byte 15", id="a-brace-too-many"),
        pytest.param('{"a": [{"x": 1}}}', "byte 15", id="a-brace-for-the-bracket"),
        pytest.param('{"a": [{"x": "1}]}', "the end of the file", id="a-quote-missing"),
    ],
)
def test_a_file_that_is_no_object_of_arrays_raises(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        arrays(write(tmp_path, content), "a")


# count_offsets and read_range


@given(
    records=st.lists(objects, max_size=8),
    layout=layouts,
    per_range=st.integers(1, 4),
    block_bytes=block_sizes,
    bom=st.booleans(),
    tail=st.sampled_from(["", "\n", " \r\n\r\n"]),
)
def test_a_list_is_read_whole_by_ranges(
    folder: Path, records: list[Any], layout: dict[str, Any], per_range: int, block_bytes: int, bom: bool, tail: str
) -> None:
    content = b"\xef\xbb\xbf" * bom + (json.dumps(records, **layout) + tail).encode()
    found, count, num_ranges = elements(write(folder, content), per_range, block_bytes)
    assert [json.loads(raw) for _, raw in found] == records
    assert all(content[offset : offset + len(raw)] == raw for offset, raw in found)
    assert (count, num_ranges) == (len(records), -(-len(records) // per_range))


@given(
    records=st.lists(objects, min_size=1, max_size=8),
    ascii_only=st.booleans(),
    newline=st.sampled_from(["\n", "\r\n", "\n\n", "\r\n \r\n"]),
    last_newline=st.booleans(),
    per_range=st.integers(1, 4),
    block_bytes=block_sizes,
    bom=st.booleans(),
)
def test_lines_are_read_whole_by_ranges(
    folder: Path, records: list[Any], ascii_only: bool, newline: str, last_newline: bool, per_range: int, block_bytes: int, bom: bool
) -> None:
    lines = [json.dumps(record, ensure_ascii=ascii_only) for record in records]
    content = b"\xef\xbb\xbf" * bom + (newline.join(lines) + newline * last_newline).encode()
    found, count, num_ranges = elements(write(folder, content), per_range, block_bytes)
    assert [json.loads(raw) for _, raw in found] == records
    assert all(raw.strip() in content[offset:].split(b"\n", 1)[0] for offset, raw in found)
    assert (count, num_ranges) == (len(records), -(-len(records) // per_range))


def test_the_last_line_is_kept_when_it_fills_a_range_and_has_no_newline(tmp_path: Path) -> None:
    found, count, num_ranges = elements(write(tmp_path, '{"a":1}\n{"a":2}'), per_range=2)
    assert ([raw for _, raw in found], count, num_ranges) == ([b'{"a":1}', b'{"a":2}'], 2, 1)


@pytest.mark.parametrize("per_range", [1, 2, 3])
def test_elements_that_are_no_objects_are_yielded_for_their_reader_to_report(tmp_path: Path, per_range: int) -> None:
    found, count, _ = elements(write(tmp_path, '[{"a": 1}, 5, "b]", [2], null]'), per_range)
    assert ([raw for _, raw in found], count) == ([b'{"a": 1}', b"5", b'"b]"', b"[2]", b"null"], 5)


def test_elements_much_longer_than_a_block_and_short_ones_may_follow_each_other(tmp_path: Path) -> None:
    records = [{"a": "x" * length} for length in (500, 3, 90, 2000, 40, 300)]
    for block_bytes in (16, 50, 100):
        found, _, _ = elements(write(tmp_path, json.dumps(records)), 2, block_bytes)
        assert [json.loads(raw) for _, raw in found] == records


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("", "an empty file", id="empty"),
        pytest.param("\ufeff\n", "an empty file", id="only-a-byte-order-mark"),
        pytest.param("a,b\n1,2", "a,b", id="csv"),
        pytest.param('[{"a": 1}, {"a": 2}', "the end of the file", id="truncated-after-an-element"),
        pytest.param('[{"a": 1}, {"a": ', "the end of the file", id="truncated-inside"),
        pytest.param('[{"a": 1}}, {"a": 2}]', "byte 9", id="a-brace-too-many"),
        pytest.param('[{"a": 1}]\n[{"a": 2}]', "after the list's closing", id="two-lists"),
    ],
)
def test_a_file_that_is_no_list_or_lines_raises(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        count_offsets(write(tmp_path, content), 2)


# Pieces


def test_spans_end_at_the_closing_bracket() -> None:
    assert element_spans(b'{"a": [1]} , "]" , 7 ] , {') == ([(0, 10), (13, 16), (19, 20)], 21)


def test_two_values_in_the_place_of_one_are_both_returned() -> None:
    assert decode_element(b'{"a": 1}, {"a": 2}', msgspec.json.Decoder(list[dict[str, int]])) == [{"a": 1}, {"a": 2}]
