"""The budget over columns is the budget of conversion, row by row."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from boxcar.pipelines.audit.what_if import add_histogram, decide_columns, fill
from boxcar.pipelines.ragged import offsets_of
from boxcar.pipelines.rows.budget import DraftRow, SequenceRule, decide, total_length

rows = st.lists(
    st.tuples(st.integers(0, 60), st.lists(st.integers(1, 40), min_size=1, max_size=9), st.booleans()),
    max_size=12,
)
rules = st.builds(SequenceRule, st.integers(0, 5), st.integers(0, 6), st.booleans(), st.integers(1, 120))


@given(rows, rules, st.booleans())
def test_every_row_is_decided_as_by_conversion(drawn: list[tuple[int, list[int], bool]], rule: SequenceRule, split: bool) -> None:
    base = np.array([one[0] for one in drawn], np.int64)
    tokens = np.array([token for one in drawn for token in one[1]], np.int64)
    offsets = offsets_of(np.array([len(one[1]) for one in drawn], np.int64))
    # With one question per image no draft is ordered.
    ordered = np.array([one[2] and not rule.one_question_per_image for one in drawn], np.bool_)
    decided = decide_columns(base, tokens, offsets, ordered, rule)
    filled = fill(decided, base, tokens, offsets, rule, split=split)
    for number in range(len(drawn)):
        turns = slice(offsets[number], offsets[number + 1])
        row = DraftRow(int(base[number]), tokens[turns], bool(ordered[number]))
        expected = decide(row, rule, split=split)
        kept = [turn for part in expected.parts for turn in part]
        assert np.flatnonzero(decided.kept[turns]).tolist() == sorted(kept)
        assert bool(decided.alive[number]) == bool(expected.parts)
        if not kept:
            assert decided.totals[number] == 0
            continue
        assert decided.totals[number] == total_length(row, kept, rule)
        lengths = filled.lengths[filled.drafts == number].tolist()
        if split and len(expected.parts) > 1:
            parts = filled.part[turns]
            assert [np.flatnonzero(parts == part).tolist() for part in range(len(expected.parts))] == expected.parts
            assert sorted(lengths) == sorted(total_length(row, part, rule) for part in expected.parts)
        elif decided.is_long[number] and not split:
            taken = np.flatnonzero(filled.part[turns] == 0).tolist()
            assert taken
            assert lengths == [total_length(row, taken, rule)]
            assert lengths[0] <= rule.cutoff_len
            # Nothing that is left out would still fit.
            left = [turn for turn in kept if turn not in taken]
            assert all(total_length(row, [*taken, turn], rule) > rule.cutoff_len for turn in left)
        else:
            assert not lengths


def test_histograms_of_different_lengths_add_up() -> None:
    assert add_histogram(np.array([1, 2]), np.array([0, 1, 5])).tolist() == [1, 3, 5]
    assert add_histogram(np.zeros(0, np.int64), np.array([4])).tolist() == [4]
