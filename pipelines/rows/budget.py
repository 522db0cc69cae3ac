"""Keep, split, shrink or reject: what becomes of a sample under a cutoff. Lengths are exact, and a turn is never cut.

one turn alone does not fit, others do      -> that turn is left out, counted
no turn fits                                -> a smaller image, if the workflow allows it and one exists; else the record is rejected
all turns together do not fit               -> one row (`plan`: training takes what fits) or several (`split`)
an ordered dialogue does not fit            -> as where no turn fits; a dialogue is never shortened
"""

from dataclasses import dataclass

import numpy as np

from boxcar.pipelines.ragged import IntColumn

TURN_OVER_CUTOFF = "turn_over_cutoff"
RECORD_OVER_CUTOFF = "over_cutoff"


@dataclass(frozen=True)
class SequenceRule:
    """What surrounds turns in a sequence, in tokens."""

    turn_open: int
    """Before every turn but the first."""
    around_answer: int
    """answer_open and turn_close of one turn."""
    one_question_per_image: bool
    cutoff_len: int


@dataclass(frozen=True)
class DraftRow:
    """A row before the budget is applied. Lengths in tokens."""

    header_and_images: int
    turn_tokens: IntColumn
    """(T,) question + answer of each turn."""
    ordered: bool


@dataclass(frozen=True)
class Decision:
    """What the budget makes of a draft row."""

    parts: list[list[int]]
    """Turns of each row to write; [] where the record is over the cutoff."""
    turns_left_out: list[int]


def single_lengths(row: DraftRow, rule: SequenceRule) -> IntColumn:
    """(T,) sequence length with each turn alone."""
    return np.asarray(row.header_and_images + row.turn_tokens + rule.around_answer)


def total_length(row: DraftRow, turns: list[int], rule: SequenceRule) -> int:
    """Length of the sequence, or of all sequences, that hold these turns."""
    own = int(row.turn_tokens[turns].sum()) + len(turns) * rule.around_answer
    if rule.one_question_per_image:
        return own + len(turns) * row.header_and_images
    return own + row.header_and_images + (len(turns) - 1) * rule.turn_open


def decide(row: DraftRow, rule: SequenceRule, *, split: bool) -> Decision:
    """Which turns go into which rows."""
    every = list(range(len(row.turn_tokens)))
    if row.ordered and not rule.one_question_per_image:
        return Decision([every], []) if total_length(row, every, rule) <= rule.cutoff_len else Decision([], [])
    fits = single_lengths(row, rule) <= rule.cutoff_len
    kept, left_out = np.flatnonzero(fits).tolist(), np.flatnonzero(~fits).tolist()
    if not kept:
        return Decision([], left_out)
    if not split or rule.one_question_per_image or total_length(row, kept, rule) <= rule.cutoff_len:
        return Decision([kept], left_out)
    parts: list[list[int]] = [[]]
    for turn in kept:
        if parts[-1] and total_length(row, [*parts[-1], turn], rule) > rule.cutoff_len:
            parts.append([])
        parts[-1].append(turn)
    return Decision(parts, left_out)


def tokens_to_save(row: DraftRow, rule: SequenceRule) -> int:
    """By how many tokens the images must shrink until the row has a turn that fits."""
    if row.ordered and not rule.one_question_per_image:
        shortest = total_length(row, list(range(len(row.turn_tokens))), rule)
    else:
        shortest = int(single_lengths(row, rule).min())
    return shortest - rule.cutoff_len
