"""Gathers over flat arrays do what loops over Python lists do: ragged columns, and texts put together from pieces."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boxcar.pipelines.ragged import Ragged, concat, offsets_of, ragged_of
from boxcar.pipelines.tokens.compose import PIECES_PER_BOX, TextSpec, compose
from boxcar.pipelines.tokens.tokenizer import PieceTable
from tests.small_units import frame_of, settings

# ---- ragged columns

DTYPES = [np.uint8, np.bool_, np.int32, np.int64, np.float64]
Lists = list[list[int]]
lists = st.lists(st.lists(st.integers(0, 1), max_size=5), max_size=6)


def as_lists(ragged: Ragged[Any]) -> list[list[Any]]:
    return [ragged.row(number).tolist() for number in range(len(ragged))]


@pytest.mark.parametrize("dtype", DTYPES)
@given(lists)
def test_lists_come_back(dtype: type[np.generic], rows: Lists) -> None:
    ragged = ragged_of(rows, dtype)
    assert as_lists(ragged) == rows
    assert ragged.values.dtype == dtype
    assert ragged.offsets.dtype == np.int64
    assert len(ragged) == len(rows)
    assert ragged.lengths.tolist() == [len(row) for row in rows]


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data(), lists)
def test_take_gives_rows_in_any_order_any_number_of_times(dtype: type[np.generic], data: st.DataObject, rows: Lists) -> None:
    wanted = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8)) if rows else []
    taken = ragged_of(rows, dtype).take(np.array(wanted, np.int64))
    assert as_lists(taken) == [rows[row] for row in wanted]
    assert taken.values.dtype == dtype
    assert taken.offsets.tolist() == [0, *np.cumsum([len(rows[row]) for row in wanted], dtype=int).tolist()]
    assert len(taken.values) == taken.offsets[-1]
    # What was taken can be taken from again.
    again = taken.take(np.arange(len(wanted))[::-1])
    assert as_lists(again) == [rows[row] for row in reversed(wanted)]


@given(st.data(), st.lists(lists, min_size=1, max_size=4))
def test_concat_joins_columns_and_regroup_joins_neighbours(data: st.DataObject, parts: list[Lists]) -> None:
    joined = concat([ragged_of(part, np.int32) for part in parts])
    flat = [row for part in parts for row in part]
    assert as_lists(joined) == flat
    cuts = sorted(data.draw(st.lists(st.integers(0, len(flat)), max_size=4)))
    outer = np.array([0, *cuts, len(flat)], np.int64)
    expected = [[value for row in flat[start:stop] for value in row] for start, stop in pairwise(outer)]
    assert as_lists(joined.regroup(outer)) == expected


def test_no_rows_at_all() -> None:
    empty = ragged_of([], np.int32)
    assert len(empty) == 0
    assert offsets_of(np.array([], np.int64)).tolist() == [0]
    assert len(empty.take(np.array([], np.int64))) == 0
    assert len(concat([empty, empty])) == 0
    blank = ragged_of([[], []], np.uint8)
    assert as_lists(blank.take(np.array([1, 0, 1]))) == [[], [], []]


# ---- texts

GAPS = ["", "The dog is at [", "], the cat at [", "].", "Wo ist 「狗」? ", "\n", "🙂 (", "),("]
SEPARATORS = (", ", "),(", ",")


@pytest.fixture(scope="module")
def table() -> PieceTable:
    return PieceTable(frame_of(settings("qwen2_vl")).tokenizer)


@given(st.data())
def test_texts_are_their_pieces_one_after_another(table: PieceTable, data: st.DataObject) -> None:
    num_rows = data.draw(st.integers(0, 5))
    values = np.array(data.draw(st.lists(st.tuples(*[st.integers(0, 1200)] * 4), min_size=num_rows, max_size=num_rows)), np.int64)
    number_codes = table.intern_numbers(values.reshape(-1, 4), "%d")
    separators = table.intern_separators(SEPARATORS)
    codes = [table.intern_gap(gap) for gap in GAPS]
    table.encode_pending()

    boxes = st.lists(st.integers(0, num_rows - 1), max_size=4) if num_rows else st.just([])
    specs = []
    for rows in data.draw(st.lists(boxes, max_size=5)):
        gaps = data.draw(st.lists(st.sampled_from(codes), min_size=len(rows) + 1, max_size=len(rows) + 1))
        specs.append(TextSpec(gaps, rows))
    composed = compose(specs, number_codes, separators, table)

    expected = []
    for spec in specs:
        pieces = [(spec.gaps[0], False)]
        for row, gap in zip(spec.boxes, spec.gaps[1:], strict=True):
            x0, y0, x1, y1 = number_codes[row].tolist()
            first, second, third = separators
            pieces += [(x0, True), (first, False), (y0, True), (second, False), (x1, True), (third, False), (y1, True), (gap, False)]
        assert len(pieces) == 1 + PIECES_PER_BOX * len(spec.boxes)
        ids = [(token, is_number) for code, is_number in pieces for token in table.ids.row(code).tolist()]
        text = b"".join(bytes(table.texts.row(code)) for code, _ in pieces)
        expected.append((ids, text))

    assert composed.num_tokens.tolist() == [len(ids) for ids, _ in expected]
    for token in {token for ids, _ in expected for token, _ in ids} | {0}:
        assert composed.count(token).tolist() == [sum(found == token for found, _ in ids) for ids, _ in expected]
    wanted = np.array(data.draw(st.lists(st.integers(0, len(specs) - 1), max_size=6)) if specs else [], np.int64)
    assert as_lists(composed.ids(wanted)) == [[token for token, _ in expected[text][0]] for text in wanted]
    assert [bytes(row) for row in as_lists(composed.utf8(wanted))] == [expected[text][1] for text in wanted]
    assert composed.is_coordinate(wanted).tolist() == [flag for text in wanted for _, flag in expected[text][0]]


def test_numbers_are_written_in_their_format_wherever_they_stand(table: PieceTable) -> None:
    codes = table.intern_numbers(np.array([[7, 42, 7, 999], [0, 7, 1000, 42]]), "%03d")
    table.encode_pending()
    found = [[bytes(table.texts.row(code)).decode() for code in row] for row in codes.tolist()]
    assert found == [["007", "042", "007", "999"], ["000", "007", "1000", "042"]]
    assert codes[0, 0] == codes[0, 2] == codes[1, 1]
    assert table.intern_numbers(np.zeros((0, 4), np.int64), "%d").shape == (0, 4)
