"""What a cutoff and a resolution make of a data set: arithmetic on `audit_columns`, the same as conversion's, for all rows at once.

    Things, Texts ── limits ──> Measured (tokens of images and turns) ── cutoff ──> Decided (which turns are kept) ──> tallies

Chunks are added up, so that memory does not grow with the data set: sums, and histograms over lengths in tokens. `decide_columns` is
`budget.decide` over columns; `tests/pipelines/audit/` holds them against each other, and the counts against those
of real conversions.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from boxcar.pipelines.audit.columns import NumberLengths, Texts, Things
from boxcar.pipelines.boxes import geometry
from boxcar.pipelines.families.family import Family
from boxcar.pipelines.families.patches import PixelLimits, ResizedSizes
from boxcar.pipelines.ragged import IntColumn, offsets_of
from boxcar.pipelines.rows.budget import RECORD_OVER_CUTOFF, TURN_OVER_CUTOFF, SequenceRule
from boxcar.pipelines.rows.unit import MAX_SHRINK_ROUNDS, smaller_limits
from boxcar.schemas.manifest import Counts, Finding, Rejections
from boxcar.schemas.task import TASK_NAMES

Mask = npt.NDArray[np.bool_]
OverLength = Literal["plan", "split"]

SIDE_EDGES_PX = (0, 8, 16, 32, 64, 96, np.inf)
"""Boxes by the square root of their area, in pixels of the original; 32 and 96 are COCO's borders of small and medium."""
IOU_EDGES = (0.5, 0.75, 0.9, 0.95)
TOKEN_EDGES = 2.0 ** np.arange(-3, 7.5, 0.5)
"""Sides of boxes in visual tokens, for the heat map: an eighth of a token to 64, by half powers of two."""


@dataclass(frozen=True)
class Grammar:
    """What of a family and its tokenizer the lengths of sequences hang on."""

    family: Family
    turn_open: int
    """Tokens before every turn but the first."""
    around_answer: int
    """Tokens of answer_open and turn_close."""
    turn_close: int
    """The latter alone: it is labelled."""
    numbers: NumberLengths

    def rule(self, cutoff_len: int) -> SequenceRule:
        return SequenceRule(self.turn_open, self.around_answer, self.family.chat.one_question_per_image, cutoff_len)


@dataclass(frozen=True)
class Measured:
    """A chunk under pixel limits. Tokens, exact."""

    sizes: ResizedSizes
    """(M,)."""
    visual: IntColumn
    """(M,) tokens that carry each image; 0 where the family refuses it."""
    placeholders: IntColumn
    """(R,) of all images of a record."""
    base: IntColumn
    """(D,) header and placeholders: what a sequence has before its first question."""
    box_numbers: IntColumn
    """(B,) tokens of each box's four numbers."""
    turn_tokens: IntColumn
    """(T,) question and answer."""
    labelled: IntColumn
    """(T,) the answer, and what closes the turn."""
    patches: IntColumn
    """(D,) of all images of a draft's record."""
    patch_squares: IntColumn
    """(D,) sum of their squares."""
    num_spoken: int
    """Boxes that some turn speaks of."""
    values: IntColumn
    """(B, 4) model units of each box."""


def measure(things: Things, texts: Texts, grammar: Grammar, limits: PixelLimits, max_pixels: IntColumn | None = None) -> Measured:
    """max_pixels: (M,) of each image, where some are shrunk."""
    sizes = resize(things, grammar.family, limits, max_pixels)
    visual = np.where(sizes.refused, 0, sizes.visual_tokens)
    extra = np.where(sizes.refused, 0, visual + grammar.family.chat.extra_placeholders)
    placeholders = np.diff(offsets_of(extra)[things.image_offsets])
    values, _, _ = quantised(things, grammar, sizes)
    box_numbers = grammar.numbers.of_boxes(values)
    running = offsets_of(box_numbers[texts.box_rows])
    at_end = running[texts.box_offsets[1:]]
    in_answer = at_end - running[texts.box_offsets[:-1] + texts.turn_question_boxes]
    patches = sizes.grid_h * sizes.grid_w
    spoken = np.zeros(len(things.boxes), np.bool_)
    spoken[texts.box_rows] = True
    return Measured(
        num_spoken=int(spoken.sum()),
        values=values,
        sizes=sizes,
        visual=visual,
        placeholders=placeholders,
        base=texts.draft_header.astype(np.int64) + placeholders[texts.draft_records],
        box_numbers=box_numbers,
        turn_tokens=texts.turn_question + texts.turn_answer + (at_end - running[texts.box_offsets[:-1]]),
        labelled=texts.turn_answer + in_answer + grammar.turn_close,
        patches=np.diff(offsets_of(patches)[things.image_offsets])[texts.draft_records],
        patch_squares=np.diff(offsets_of(patches**2)[things.image_offsets])[texts.draft_records],
    )


def resize(things: Things, family: Family, limits: PixelLimits, max_pixels: IntColumn | None = None) -> ResizedSizes:
    """(M,) what the family makes of each image, as conversion asks it."""
    high: Any = limits.max_pixels if max_pixels is None else max_pixels
    high = np.where(things.own_limits > 0, np.minimum(things.own_limits, high), high)
    return family.resize(things.sizes_wh[:, 0], things.sizes_wh[:, 1], *limits.lowered(high))


def quantised(things: Things, grammar: Grammar, sizes: ResizedSizes) -> tuple[IntColumn, IntColumn, IntColumn]:
    """(B, 4) model units of each box, and the (B, 2) original and resized sizes of its image."""
    size_wh = things.sizes_wh.astype(np.int64)[things.box_references]
    resized_wh = np.maximum(np.stack([sizes.width, sizes.height], axis=1), 1)[things.box_references]
    return grammar.family.grid.quantise(things.boxes, size_wh, resized_wh), size_wh, resized_wh


def number_tokens(things: Things, grammar: Grammar, sizes: ResizedSizes) -> IntColumn:
    """(B,) tokens of the four numbers of each box."""
    values, _, _ = quantised(things, grammar, sizes)
    return grammar.numbers.of_boxes(values)


# ---- the budget, over columns


@dataclass(frozen=True)
class Decided:
    """What the budget makes of each draft and turn."""

    kept: Mask
    """(T,) turns that stand in a row."""
    alive: Mask
    """(D,) drafts that give a row."""
    totals: IntColumn
    """(D,) length of a sequence with every kept turn; with one question per image: of all its sequences together. 0 where not alive."""
    num_kept: IntColumn
    """(D,)."""
    is_long: Mask
    """(D,) alive, but the kept turns do not fit one sequence."""


def decide_columns(base: IntColumn, turn_tokens: IntColumn, turn_offsets: IntColumn, ordered: Mask, rule: SequenceRule) -> Decided:
    """`budget.decide` for all drafts at once, without the cutting into parts. Every draft has a turn."""
    if not len(base):
        nothing, none = np.zeros(0, np.int64), np.zeros(0, np.bool_)
        return Decided(none, none, nothing, nothing, none)
    firsts = turn_offsets[:-1]
    counts = np.diff(turn_offsets)
    single = rule.one_question_per_image
    own = turn_tokens + rule.around_answer
    kept = own <= np.repeat(rule.cutoff_len - base, counts)
    if ordered.any() and not single:
        whole = base + np.add.reduceat(own, firsts) + (counts - 1) * rule.turn_open
        kept = np.where(np.repeat(ordered, counts), np.repeat(whole <= rule.cutoff_len, counts), kept)
    num_kept = np.add.reduceat(kept, firsts, dtype=np.int64)
    alive = num_kept > 0
    sums = np.add.reduceat(np.where(kept, own, 0), firsts)
    totals = sums + (num_kept * base if single else base + (num_kept - 1) * rule.turn_open)
    totals = np.where(alive, totals, 0)
    is_long = np.zeros(len(base), np.bool_) if single else totals > rule.cutoff_len
    return Decided(kept, alive, totals, num_kept, is_long)


@dataclass(frozen=True)
class Filled:
    """Long drafts put into sequences, turn after turn in stored order."""

    part: IntColumn
    """(T,) number of the row within its draft; -1: in none."""
    lengths: IntColumn
    """(rows,) tokens of each row of the long drafts."""
    drafts: IntColumn
    """(rows,) draft of each."""


def fill(decided: Decided, base: IntColumn, turn_tokens: IntColumn, turn_offsets: IntColumn, rule: SequenceRule, *, split: bool) -> Filled:
    """Cut the long drafts. split: into as many rows as they need, as `budget.decide` does. Else into one that takes each turn that still
    fits, as an epoch of training does (which ones, the schedule decides anew in every epoch)."""
    part = np.full(len(turn_tokens), -1, np.int64)
    rows = np.flatnonzero(decided.is_long)
    if not len(rows):
        return Filled(part, np.zeros(0, np.int64), rows)
    counts = np.diff(turn_offsets)[rows]
    length = base[rows].copy()
    number = np.zeros(len(rows), np.int64)
    is_empty = np.ones(len(rows), np.bool_)
    finished: list[tuple[IntColumn, IntColumn]] = []
    for position in range(int(counts.max())):
        here = np.flatnonzero(counts > position)
        turns = turn_offsets[rows[here]] + position
        here, turns = here[decided.kept[turns]], turns[decided.kept[turns]]
        cost = turn_tokens[turns] + rule.around_answer
        after = length[here] + cost + np.where(is_empty[here], 0, rule.turn_open)
        fits = is_empty[here] | (after <= rule.cutoff_len)
        if split and not fits.all():
            full = here[~fits]
            finished.append((rows[full], length[full]))
            number[full] += 1
            after = np.where(fits, after, base[rows[here]] + cost)
            fits = np.ones(len(here), np.bool_)
        taken = here[fits]
        length[taken] = after[fits]
        is_empty[taken] = False
        part[turns[fits]] = number[taken]
    finished.append((rows, length))
    return Filled(part, np.concatenate([lengths for _, lengths in finished]), np.concatenate([drafts for drafts, _ in finished]))


# ---- what is added up


def add_histogram(total: IntColumn, other: IntColumn) -> IntColumn:
    """The sum of two histograms over 0, 1, 2, ..."""
    if len(other) > len(total):
        total, other = other, total
    total = total.copy()
    total[: len(other)] += other
    return total


def _none() -> IntColumn:
    return np.zeros(0, np.int64)


def _add(mine: object, other: object) -> None:
    """Every field of one tally onto another of its kind: histograms by length, tables by place, counts by number."""
    for name, value in vars(other).items():
        now = getattr(mine, name)
        if isinstance(value, Counts):
            now.add(value)
        elif isinstance(value, np.ndarray):
            setattr(mine, name, add_histogram(now, value) if value.ndim == 1 else now + value)
        else:
            setattr(mine, name, now + value)


@dataclass
class Landscape:
    """What a resolution alone makes of the images and boxes. Exact counts."""

    images: int = 0
    """Of records that the family takes."""
    visual_tokens: int = 0
    """Of each image once."""
    image_tokens: IntColumn = field(default_factory=_none)
    """Histogram: visual tokens of an image -> images."""
    boxes: int = 0
    under_one: int = 0
    """Boxes whose shorter side is under one visual token."""
    under_two: int = 0
    iou: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((len(SIDE_EDGES_PX) - 1, 2 + len(IOU_EDGES))))
    """By size of the box: how many, sum of their IoU after the round trip through the family's numbers, and how many are under each of
    IOU_EDGES."""
    heat: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((len(TOKEN_EDGES) + 1, len(TOKEN_EDGES) + 1), np.int64))
    """(height, width) of boxes in visual tokens, by TOKEN_EDGES; the outermost are what lies beyond."""

    def add(self, other: "Landscape") -> None:
        _add(self, other)


@dataclass
class Outcome:
    """What one setting of cutoff, resolution and policy makes of the data set. Exact counts, as conversion's."""

    counts: Counts = field(default_factory=Counts)
    """As conversion's manifest will have them, but for difficulty and examples."""
    samples: int = 0
    """Records with turns that the family takes, whatever the cutoff."""
    whole: int = 0
    """Samples of which no turn is lost and which fit one sequence (each turn its own, where a family knows one question per image)."""
    long: int = 0
    """Samples of which no turn is lost but which fit no sequence: `plan` takes what fits an epoch, `split` writes several rows."""
    trimmed: int = 0
    """Samples that lose some of their turns."""
    over: int = 0
    """Samples that lose every turn: rejected."""
    shrunk: int = 0
    """Samples with an image shrunk below the limits."""
    turns: int = 0
    turns_lost: int = 0
    boxes: int = 0
    """Boxes that some turn speaks of."""
    boxes_lost: int = 0
    """Of them, those of which no kept turn speaks."""
    documents: IntColumn = field(default_factory=_none)
    """Histogram: tokens of a sequence -> sequences of an epoch."""
    documents_visual: int = 0
    """Placeholders among the tokens of the documents."""
    answer_tokens: int = 0
    """Labelled tokens of an epoch: answers with what closes the turn."""
    patches: int = 0
    """Of all images of an epoch's documents."""
    patch_squares: float = 0.0

    @property
    def num_documents(self) -> int:
        return int(self.documents.sum())

    @property
    def tokens(self) -> int:
        """Of an epoch."""
        return int(self.documents @ np.arange(len(self.documents)))

    def add(self, other: "Outcome") -> None:
        _add(self, other)


def landscape_of(things: Things, texts: Texts, grammar: Grammar, measured: Measured) -> Landscape:
    """Images and boxes of a chunk, as it was measured under pixel limits."""
    family, sizes = grammar.family, measured.sizes
    open_records = ~(things.rejected | texts.refused)
    record_of_image = np.repeat(np.arange(things.num_records), np.diff(things.image_offsets))
    used = open_records[record_of_image]
    boxes = used[things.box_references]
    found = Landscape(
        images=int(used.sum()),
        visual_tokens=int(sizes.visual_tokens[used].sum()),
        image_tokens=np.bincount(sizes.visual_tokens[used]),
        boxes=int(boxes.sum()),
    )
    if not found.boxes:
        return found
    rows = slice(None) if boxes.all() else boxes
    values, drawn = measured.values[rows], things.boxes[rows]
    references = things.box_references[rows]
    size_wh = things.sizes_wh.astype(np.int64)[references]
    resized_wh = np.maximum(np.stack([sizes.width, sizes.height], axis=1), 1)[references]
    # Column by column from here on: sums and products over an axis of two or four cost several times as much.
    per_pixel = np.stack([sizes.width, sizes.height]) / things.sizes_wh.T / np.array(family.resize.pixels_per_token)[:, None]
    width_px, height_px = drawn[:, 2] - drawn[:, 0], drawn[:, 3] - drawn[:, 1]
    across, down = width_px * per_pixel[0][references], height_px * per_pixel[1][references]
    shorter = np.minimum(across, down)
    found.under_one, found.under_two = int(np.count_nonzero(shorter < 1)), int(np.count_nonzero(shorter < 2))
    overlap = geometry.iou_pairs(drawn, family.grid.dequantise(values, size_wh, resized_wh))
    num_sizes, num_edges = len(SIDE_EDGES_PX) - 1, len(IOU_EDGES) + 1
    of_size = np.searchsorted(np.square(SIDE_EDGES_PX), width_px * height_px, side="right") - 1
    place = of_size * num_edges + np.searchsorted(IOU_EDGES, overlap, side="right")
    table = np.bincount(place, minlength=num_sizes * num_edges).reshape(num_sizes, num_edges)
    found.iou[:, 0], found.iou[:, 1] = table.sum(axis=1), np.bincount(of_size, overlap, num_sizes)
    found.iou[:, 2:] = table.cumsum(axis=1)[:, :-1]
    edges = len(TOKEN_EDGES) + 1
    cells = np.searchsorted(TOKEN_EDGES, down) * edges + np.searchsorted(TOKEN_EDGES, across)
    found.heat = np.bincount(cells, minlength=edges * edges).reshape(edges, edges)
    return found


def measure_shrunk(things: Things, texts: Texts, grammar: Grammar, limits: PixelLimits, cutoff_len: int) -> tuple[Measured, IntColumn]:
    """As `measure`, after images were shrunk until their records fit, as conversion does with shrink_images; and the (M,) limits."""
    max_pixels = np.full(len(things.sizes_wh), limits.max_pixels)
    rule = grammar.rule(cutoff_len)
    firsts = texts.turn_offsets[:-1]
    counts = np.diff(texts.turn_offsets)
    for round_number in range(MAX_SHRINK_ROUNDS):
        measured = measure(things, texts, grammar, limits, max_pixels)
        if round_number == MAX_SHRINK_ROUNDS - 1 or not grammar.family.resize.limits_matter or not len(firsts):
            break
        decided = decide_columns(measured.base, measured.turn_tokens, texts.turn_offsets, texts.draft_ordered, rule)
        dead = np.flatnonzero(~decided.alive)
        own = measured.turn_tokens + rule.around_answer
        all_turns = measured.base + np.add.reduceat(own, firsts) + (counts - 1) * rule.turn_open
        shortest = np.where(
            texts.draft_ordered & (not rule.one_question_per_image), all_turns, measured.base + np.minimum.reduceat(own, firsts)
        )
        to_save = (shortest - cutoff_len)[dead].tolist()
        smaller = smaller_limits(
            zip(texts.draft_records[dead].tolist(), to_save, strict=True),
            things.image_offsets,
            things.sizes_wh.astype(np.int64),
            measured.sizes.visual_tokens,
            max_pixels,
            grammar.family.resize,
            limits,
        )
        if (smaller == max_pixels).all():
            break
        max_pixels = smaller
    return measured, max_pixels


@dataclass(frozen=True)
class Trial:
    """A setting that is tried."""

    limits: PixelLimits
    cutoff_len: int
    over_length: OverLength = "plan"
    max_pixels: IntColumn | None = None
    """(M,) the limit of each image, where images are shrunk to fit."""


def outcome_of(things: Things, texts: Texts, grammar: Grammar, measured: Measured, trial: Trial, *, with_counts: bool = True) -> Outcome:
    """What a setting makes of a chunk that was measured under its limits. with_counts: also what the manifest will say."""
    rule = grammar.rule(trial.cutoff_len)
    single = rule.one_question_per_image
    decided = decide_columns(measured.base, measured.turn_tokens, texts.turn_offsets, texts.draft_ordered, rule)
    filled = fill(decided, measured.base, measured.turn_tokens, texts.turn_offsets, rule, split=trial.over_length == "split")
    outcome = Outcome()
    _count_samples(outcome, things, texts, decided, trial)
    _count_boxes(outcome, things, texts, decided, measured.num_spoken)
    owner = np.repeat(np.arange(len(decided.alive)), np.diff(texts.turn_offsets))
    visual = measured.placeholders[texts.draft_records]
    own = measured.turn_tokens + rule.around_answer
    fitting = decided.alive & ~decided.is_long

    # Documents of an epoch: tokens of each sequence, and its draft.
    if single:
        doc_drafts = owner[decided.kept]
        doc_tokens = measured.base[doc_drafts] + own[decided.kept]
        in_epoch = decided.kept
    else:
        doc_drafts = np.concatenate([np.flatnonzero(fitting), filled.drafts])
        doc_tokens = np.concatenate([decided.totals[fitting], filled.lengths])
        in_epoch = decided.kept & (fitting[owner] | (filled.part >= 0))
    outcome.documents = np.bincount(doc_tokens)
    outcome.documents_visual = int(visual[doc_drafts].sum())
    outcome.answer_tokens = int(measured.labelled @ in_epoch)
    outcome.patches = int(measured.patches[doc_drafts].sum())
    outcome.patch_squares = float(measured.patch_squares[doc_drafts].sum())
    if not with_counts:
        return outcome

    # A family of one question for each image writes no row in parts.
    parts = filled if trial.over_length == "split" and not single else None
    _count_rows(outcome.counts, things, texts, measured, decided, parts, single=single)
    _count_rejections(outcome, things, texts, decided)
    if trial.max_pixels is not None:
        outcome.counts.images_shrunk = _num_shrunk(things, texts, decided, trial.max_pixels < trial.limits.max_pixels)
    return outcome


def _count_samples(outcome: Outcome, things: Things, texts: Texts, decided: Decided, trial: Trial) -> None:
    num_records = things.num_records
    counts = np.diff(texts.turn_offsets)
    lost = counts - decided.num_kept
    drafts = np.bincount(texts.draft_records, minlength=num_records)
    lost_of = np.bincount(texts.draft_records, lost, num_records)
    alive_of = np.bincount(texts.draft_records, decided.alive, num_records) > 0
    long_of = np.bincount(texts.draft_records, decided.is_long, num_records) > 0
    has = drafts > 0
    outcome.samples = int(has.sum())
    outcome.over = int((has & ~alive_of).sum())
    outcome.trimmed = int((alive_of & (lost_of > 0)).sum())
    outcome.long = int((alive_of & (lost_of == 0) & long_of).sum())
    outcome.whole = int((alive_of & (lost_of == 0) & ~long_of).sum())
    outcome.turns = texts.num_turns
    outcome.turns_lost = int(lost.sum())
    if trial.max_pixels is not None:
        record_of_image = np.repeat(np.arange(num_records), np.diff(things.image_offsets))
        smaller = np.bincount(record_of_image, trial.max_pixels < trial.limits.max_pixels, num_records) > 0
        outcome.shrunk = int((smaller & alive_of).sum())


def _count_boxes(outcome: Outcome, things: Things, texts: Texts, decided: Decided, num_spoken: int) -> None:
    """num_spoken: boxes that stand in a turn at all."""
    outcome.boxes = num_spoken
    if outcome.turns_lost == texts.num_turns:
        outcome.boxes_lost = outcome.boxes
    elif outcome.turns_lost:
        spoken = np.zeros(len(things.boxes), np.bool_)
        spoken[texts.box_rows[np.repeat(decided.kept, np.diff(texts.box_offsets))]] = True
        outcome.boxes_lost = outcome.boxes - int(spoken.sum())


def _count_rows(
    counts: Counts, things: Things, texts: Texts, measured: Measured, decided: Decided, parts: Filled | None, *, single: bool
) -> None:
    """The rows that conversion writes: tokens and histograms of the manifest. parts: of the samples that are written as several rows."""
    fitting = decided.alive if parts is None else decided.alive & ~decided.is_long
    drafts, totals = np.flatnonzero(fitting), decided.totals[fitting]
    if parts is not None:
        drafts, totals = np.concatenate([drafts, parts.drafts]), np.concatenate([totals, parts.lengths])
    visual = measured.placeholders[texts.draft_records[drafts]]
    paid = visual * decided.num_kept[drafts] if single else visual
    counts.rows_written = len(drafts)
    counts.images = int(np.diff(things.image_offsets)[texts.draft_records[drafts]].sum())
    counts.visual_tokens = int(paid.sum())
    counts.text_tokens = int((totals - paid).sum())
    counts.total_tokens_histogram = _as_manifest(totals)
    counts.visual_tokens_histogram = _as_manifest(visual)
    tasks = np.bincount(texts.turn_tasks[decided.kept], minlength=len(TASK_NAMES))
    counts.turns = {name: int(tasks[code]) for code, name in enumerate(TASK_NAMES) if tasks[code]}


def _as_manifest(values: IntColumn) -> dict[str, int]:
    distinct, counts = np.unique(values, return_counts=True)
    return {str(value): count for value, count in zip(distinct.tolist(), counts.tolist(), strict=True)}


def _count_rejections(outcome: Outcome, things: Things, texts: Texts, decided: Decided) -> None:
    counts, num_records = outcome.counts, things.num_records
    alive_of = np.bincount(texts.draft_records, decided.alive, num_records) > 0
    has = np.bincount(texts.draft_records, minlength=num_records) > 0
    counts.records_read = things.num_read
    counts.records_written = int(alive_of.sum())
    counts.boxes_read = things.num_boxes_read
    open_boxes = ~texts.refused[np.repeat(np.arange(num_records), np.diff(things.image_offsets))][things.box_references]
    counts.boxes_kept = int(open_boxes.sum())
    for reasons in (things.reasons, texts.refusals, texts.without_turns):
        for reason, entry in reasons.items():
            counts.records_rejected.setdefault(reason, Rejections()).add(entry)
    dead = np.flatnonzero(has & ~alive_of)
    for record in dead.tolist():
        code = int(texts.first_reasons[record])
        reason = texts.reason_names[code] if code >= 0 else RECORD_OVER_CUTOFF
        entry = counts.records_rejected.setdefault(reason, Rejections())
        entry.add(Rejections(1, [things.positions[record]] if len(entry.examples) < 3 else []))
    counts.rules = {rule: _copy(finding) for rule, finding in things.rules.items()}
    written = alive_of[texts.text_records]
    for code, reason in enumerate(texts.reason_names):
        count = int(texts.text_counts[written & (texts.text_reasons == code)].sum())
        if count:
            counts.turns_rejected.setdefault(reason, Rejections()).add(Rejections(count, texts.reason_examples.get(reason, [])))
    lost = np.diff(texts.turn_offsets) - decided.num_kept
    for reason, drafts in (
        (TURN_OVER_CUTOFF, decided.alive & (lost > 0)),
        (RECORD_OVER_CUTOFF, ~decided.alive & alive_of[texts.draft_records]),
    ):
        if drafts.any():
            examples = [things.positions[record] for record in texts.draft_records[np.flatnonzero(drafts)[:3]].tolist()]
            counts.turns_rejected.setdefault(reason, Rejections()).add(Rejections(int(lost[drafts].sum()), examples))


def _copy(finding: Finding) -> Finding:
    return Finding(finding.kept, finding.fixed, finding.dropped, list(finding.examples))


def _num_shrunk(things: Things, texts: Texts, decided: Decided, is_shrunk: npt.NDArray[np.bool_]) -> int:
    """Images of records that are written. is_shrunk: (M,)."""
    alive_of = np.bincount(texts.draft_records, decided.alive, things.num_records) > 0
    record_of_image = np.repeat(np.arange(things.num_records), np.diff(things.image_offsets))
    return int((alive_of[record_of_image] & is_shrunk).sum())
