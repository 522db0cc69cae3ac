"""Which turns go into which rows under a cutoff: against sequences that are really put together, token by token."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boxcar.pipelines.rows.budget import Decision, DraftRow, SequenceRule, decide, single_lengths, tokens_to_save, total_length


def draft(header_and_images: int, *turns: int, ordered: bool = False) -> DraftRow:
    return DraftRow(header_and_images, np.array(turns, np.int64), ordered)


def rule(cutoff_len: int, *, alone: bool = False) -> SequenceRule:
    """Two tokens before every turn but the first, three around an answer."""
    return SequenceRule(turn_open=2, around_answer=3, one_question_per_image=alone, cutoff_len=cutoff_len)


def sequences(row: DraftRow, turns: list[int], rules: SequenceRule) -> list[list[str]]:
    """What a model is fed with, one word for each token."""
    spelled = []
    header = ["header"] * row.header_and_images
    for place, turn in enumerate(turns):
        opening = ["open"] * rules.turn_open if place and not rules.one_question_per_image else []
        spelled.append([*opening, *[f"turn {turn}"] * int(row.turn_tokens[turn]), *["around"] * rules.around_answer])
    if rules.one_question_per_image:
        return [header + one for one in spelled]
    return [header + [word for one in spelled for word in one]]


CASES = [
    # Alone, the turns need 10 + 3 + their own: 23, 33 and 43 tokens; together 10 + 60 + 3 * 3 + 2 * 2 = 83.
    pytest.param(draft(10, 10, 20, 30), rule(83), False, Decision([[0, 1, 2]], []), id="all fit exactly"),
    pytest.param(draft(10, 10, 20, 30), rule(82), False, Decision([[0, 1, 2]], []), id="too many for one sequence, left to the plan"),
    pytest.param(draft(10, 10, 20, 30), rule(82), True, Decision([[0, 1], [2]], []), id="too many for one sequence, split"),
    pytest.param(draft(10, 10, 20, 30), rule(47), True, Decision([[0], [1], [2]], []), id="two need 48"),
    pytest.param(draft(10, 10, 20, 30), rule(48), True, Decision([[0, 1], [2]], []), id="two fit exactly"),
    pytest.param(draft(10, 10, 30, 20), rule(42), False, Decision([[0, 2]], [1]), id="one turn alone is too long"),
    pytest.param(draft(10, 10, 30, 20), rule(42), True, Decision([[0], [2]], [1]), id="one turn alone is too long, split"),
    pytest.param(draft(10, 30, 31), rule(42), True, Decision([], [0, 1]), id="no turn fits"),
    pytest.param(draft(10, 10, 20, 30, ordered=True), rule(83), True, Decision([[0, 1, 2]], []), id="a dialogue fits exactly"),
    pytest.param(draft(10, 10, 20, 30, ordered=True), rule(82), True, Decision([], []), id="a dialogue is never split"),
    pytest.param(draft(10, 10, 20, 30, ordered=True), rule(82), False, Decision([], []), id="a dialogue is never shortened"),
    pytest.param(draft(10, 10, 20, 30), rule(43, alone=True), True, Decision([[0, 1, 2]], []), id="each turn a sequence of its own"),
    pytest.param(draft(10, 10, 20, 30), rule(42, alone=True), True, Decision([[0, 1]], [2]), id="each turn by itself, one too long"),
]


@pytest.mark.parametrize(("row", "rules", "split", "expected"), CASES)
def test_turns_are_kept_split_or_left_out(row: DraftRow, rules: SequenceRule, split: bool, expected: Decision) -> None:
    assert decide(row, rules, split=split) == expected


rows = st.builds(
    DraftRow,
    st.integers(0, 30),
    st.lists(st.integers(1, 25), min_size=1, max_size=8).map(lambda turns: np.array(turns, np.int64)),
    st.booleans(),
)
rule_sets = st.builds(SequenceRule, st.integers(0, 4), st.integers(0, 4), st.booleans(), st.integers(1, 120))


@given(rows, rule_sets)
def test_lengths_are_those_of_the_sequences(row: DraftRow, rules: SequenceRule) -> None:
    every = list(range(len(row.turn_tokens)))
    assert total_length(row, every, rules) == sum(map(len, sequences(row, every, rules)))
    assert single_lengths(row, rules).tolist() == [len(sequences(row, [turn], rules)[0]) for turn in every]


@given(rows, rule_sets, st.booleans())
def test_every_sequence_fits_and_no_turn_is_lost(row: DraftRow, rules: SequenceRule, split: bool) -> None:
    decision = decide(row, rules, split=split)
    every = list(range(len(row.turn_tokens)))
    written = [turn for part in decision.parts for turn in part]
    fits_alone = [len(sequences(row, [turn], rules)[0]) <= rules.cutoff_len for turn in every]
    if row.ordered and not rules.one_question_per_image:
        fits = len(sequences(row, every, rules)[0]) <= rules.cutoff_len
        assert decision == Decision([every] if fits else [], [])
        return
    assert sorted(written + decision.turns_left_out) == every
    assert [turn in decision.turns_left_out for turn in every] == [not fits for fits in fits_alone]
    assert written == sorted(written)
    assert all(decision.parts)
    if not split or rules.one_question_per_image:
        assert len(decision.parts) == bool(written)
        return
    assert all(len(sequences(row, part, rules)[0]) <= rules.cutoff_len for part in decision.parts)
    for part, following in zip(decision.parts, decision.parts[1:], strict=False):
        assert len(sequences(row, [*part, following[0]], rules)[0]) > rules.cutoff_len


@given(rows, rule_sets)
def test_what_an_image_must_save_is_just_enough(row: DraftRow, rules: SequenceRule) -> None:
    missing = tokens_to_save(row, rules)
    assert (missing <= 0) == bool(decide(row, rules, split=False).parts)

    def without(tokens: int) -> DraftRow:
        return DraftRow(row.header_and_images - tokens, row.turn_tokens, row.ordered)

    assert decide(without(missing), rules, split=False).parts
    assert not decide(without(missing - 1), rules, split=False).parts
