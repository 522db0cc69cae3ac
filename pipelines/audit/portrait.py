"""Where the tokens of a data set are, at one setting: by kind, task, category and split, and the samples that stand out.

Exact: the kinds add up to every token of the rows that conversion writes (`tests/pipelines/test_portrait.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt

from boxcar.pipelines.audit.columns import Texts, Things
from boxcar.pipelines.audit.what_if import Decided, Filled, Grammar, Measured, add_histogram, decide_columns, fill
from boxcar.pipelines.boxes import geometry
from boxcar.pipelines.ragged import IntColumn, offsets_of
from boxcar.pipelines.rows.budget import SequenceRule
from boxcar.schemas.task import TASK_NAMES

NUM_EXAMPLES = 12
MAX_BOXES_SHOWN = 100


class Share(msgspec.Struct):
    """Turns of one task, category or split."""

    turns: int = 0
    boxes: int = 0
    question_tokens: int = 0
    answer_tokens: int = 0
    """Without what closes the turn."""

    def add(self, other: "Share") -> None:
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Example(msgspec.Struct, kw_only=True):
    """A sample that stands out."""

    sample_id: str
    position: str
    value: int
    """What it is listed for: tokens, or boxes under one visual token."""
    tokens: int
    """Of all its turns in one sequence (each its own: of the longest)."""
    visual_tokens: int
    turns: int
    path: str
    """Of its first image, as the source names it."""
    size_wh: tuple[int, int]
    resized_wh: tuple[int, int]
    boxes: list[tuple[float, float, float, float]]
    """Of the first image, pixels of the upright original; at most MAX_BOXES_SHOWN."""
    labels: list[str]


@dataclass
class Portrait:
    """What a chunk, or all of a source, is made of under the workflow's own setting."""

    kinds: dict[str, int] = field(default_factory=dict)
    """visual, boundary, template, question words, question numbers, answer words, answer numbers: tokens of the rows written."""
    tasks: dict[str, Share] = field(default_factory=dict)
    categories: dict[str, Share] = field(default_factory=dict)
    """Of detect and absent turns, by what is asked for."""
    splits: dict[str, Share] = field(default_factory=dict)
    totals: IntColumn = field(default_factory=lambda: np.zeros(0, np.int64))
    """Histogram: tokens of a sample with all its turns (each its own: of the longest sequence) -> samples, whatever the cutoff."""
    longest: list[Example] = field(default_factory=list)
    smallest: list[Example] = field(default_factory=list)
    """Samples with the most boxes under one visual token."""

    def add(self, other: "Portrait") -> None:
        for kind, tokens in other.kinds.items():
            self.kinds[kind] = self.kinds.get(kind, 0) + tokens
        for mine, theirs in ((self.tasks, other.tasks), (self.categories, other.categories), (self.splits, other.splits)):
            for name, share in theirs.items():
                mine.setdefault(name, Share()).add(share)
        self.totals = add_histogram(self.totals, other.totals)
        self.longest = _first(self.longest + other.longest)
        self.smallest = _first(self.smallest + other.smallest)


def _first(examples: list[Example]) -> list[Example]:
    return sorted(examples, key=lambda one: (-one.value, one.sample_id))[:NUM_EXAMPLES]


def portrait_of(things: Things, texts: Texts, grammar: Grammar, measured: Measured, rule: SequenceRule, *, split: bool) -> Portrait:
    """The portrait of a chunk."""
    portrait = Portrait()
    if not len(texts.draft_records):
        return portrait
    decided = decide_columns(measured.base, measured.turn_tokens, texts.turn_offsets, texts.draft_ordered, rule)
    filled = fill(decided, measured.base, measured.turn_tokens, texts.turn_offsets, rule, split=split)
    numbers = _numbers(texts, measured)
    portrait.kinds = _kinds(things, texts, grammar, measured, decided, filled, numbers, rule, split=split)
    asked, answered = texts.turn_question + numbers[:, 0], texts.turn_answer + numbers[:, 1]
    num_boxes = np.diff(texts.box_offsets)
    kept = decided.kept

    def shares(codes: npt.NDArray[np.integer], names: Sequence[str]) -> dict[str, Share]:
        where = kept & (codes >= 0)
        columns = [np.bincount(codes[where], weights, len(names)) for weights in (None, num_boxes[where], asked[where], answered[where])]
        return {name: Share(*(int(column[code]) for column in columns)) for code, name in enumerate(names) if columns[0][code]}

    portrait.tasks = shares(texts.turn_tasks.astype(np.int64), TASK_NAMES)
    portrait.categories = shares(texts.turn_labels, texts.labels)
    split_names = list(dict.fromkeys(things.splits))
    split_codes = {name: code for code, name in enumerate(split_names)}
    of_record = np.array([split_codes[name] for name in things.splits], np.int64)
    turns_of = np.repeat(texts.draft_records, np.diff(texts.turn_offsets))
    portrait.splits = shares(of_record[turns_of], split_names)

    every = _whole(texts, measured, rule)
    portrait.totals = np.bincount(every)
    order = np.lexsort((texts.draft_records, -every))[:NUM_EXAMPLES]
    portrait.longest = [_example(draft, int(every[draft]), things, texts, measured, every) for draft in order.tolist()]
    small = _small_boxes(things, grammar, measured)
    first_draft = np.unique(texts.draft_records, return_index=True)[1]
    counts = small[texts.draft_records[first_draft]]
    order = first_draft[np.argsort(-counts, kind="stable")[:NUM_EXAMPLES]]
    worst = [draft for draft in order.tolist() if small[texts.draft_records[draft]]]
    portrait.smallest = [_example(draft, int(small[texts.draft_records[draft]]), things, texts, measured, every) for draft in worst]
    return portrait


def _numbers(texts: Texts, measured: Measured) -> IntColumn:
    """(T, 2) tokens of the numbers of boxes in question and answer."""
    running = offsets_of(measured.box_numbers[texts.box_rows])
    border = texts.box_offsets[:-1] + texts.turn_question_boxes
    asked = running[border] - running[texts.box_offsets[:-1]]
    return np.stack([asked, running[texts.box_offsets[1:]] - running[border]], axis=1)


def _kinds(
    things: Things,
    texts: Texts,
    grammar: Grammar,
    measured: Measured,
    decided: Decided,
    filled: Filled,
    numbers: IntColumn,
    rule: SequenceRule,
    *,
    split: bool,
) -> dict[str, int]:
    chat, single = grammar.family.chat, rule.one_question_per_image
    sequences = decided.num_kept.copy() if single else decided.alive.astype(np.int64)
    if split and not single:
        sequences += np.bincount(filled.drafts, minlength=len(sequences)) - decided.is_long
    images = np.diff(things.image_offsets)[texts.draft_records]
    visual = np.diff(offsets_of(measured.visual)[things.image_offsets])[texts.draft_records]
    boundary = chat.boundary_tokens * images * sequences
    in_question = boundary * (texts.draft_ordered & (not single))
    in_header = np.zeros_like(boundary) if chat.extra_placeholders else boundary - in_question
    header = texts.draft_header * sequences - in_header
    opened = (decided.num_kept - sequences) * (0 if single else rule.turn_open)
    kept = decided.kept
    return {
        "visual": int((visual * sequences).sum()),
        "boundary": int(boundary.sum()),
        "template": int((header + opened + decided.num_kept * rule.around_answer).sum()),
        "question words": int(texts.turn_question[kept].sum(dtype=np.int64) - in_question.sum()),
        "question numbers": int(numbers[kept, 0].sum()),
        "answer words": int(texts.turn_answer[kept].sum(dtype=np.int64)),
        "answer numbers": int(numbers[kept, 1].sum()),
    }


def _whole(texts: Texts, measured: Measured, rule: SequenceRule) -> IntColumn:
    """(D,) tokens of a draft with all its turns; with one question per image, of its longest sequence."""
    own = measured.turn_tokens + rule.around_answer
    firsts = texts.turn_offsets[:-1]
    if rule.one_question_per_image:
        return np.asarray(measured.base + np.maximum.reduceat(own, firsts))
    return np.asarray(measured.base + np.add.reduceat(own, firsts) + (np.diff(texts.turn_offsets) - 1) * rule.turn_open)


def _small_boxes(things: Things, grammar: Grammar, measured: Measured) -> IntColumn:
    """(R,) boxes whose shorter side is under one visual token."""
    sizes = measured.sizes
    per_pixel = np.stack([sizes.width, sizes.height], axis=1) / things.sizes_wh / np.array(grammar.family.resize.pixels_per_token)
    under = (geometry.sides(things.boxes) * per_pixel[things.box_references]).min(axis=1, initial=np.inf) < 1
    record_of_image = np.repeat(np.arange(things.num_records), np.diff(things.image_offsets))
    return np.bincount(record_of_image[things.box_references], under, things.num_records).astype(np.int64)


def _example(draft: int, value: int, things: Things, texts: Texts, measured: Measured, every: IntColumn) -> Example:
    record = int(texts.draft_records[draft])
    image = int(things.image_offsets[record])
    has_image = image < things.image_offsets[record + 1]
    boxes = np.flatnonzero(things.box_references == image)[:MAX_BOXES_SHOWN] if has_image else np.zeros(0, np.int64)
    width, height = things.sizes_wh[image].tolist() if has_image else (0, 0)
    resized = (int(measured.sizes.width[image]), int(measured.sizes.height[image])) if has_image else (0, 0)
    return Example(
        sample_id=things.sample_ids[record] + ("#dialogue" if texts.draft_suffixed[draft] else ""),
        position=things.positions[record],
        value=value,
        tokens=int(every[draft]),
        visual_tokens=int(measured.placeholders[record]),
        turns=int(texts.turn_offsets[draft + 1] - texts.turn_offsets[draft]),
        path=things.paths[image] if has_image else "",
        size_wh=(width, height),
        resized_wh=resized,
        boxes=[tuple(box) for box in things.boxes[boxes].tolist()],
        labels=[things.labels[code] for code in things.box_labels[boxes].tolist()],
    )
