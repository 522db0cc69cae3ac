"""One unit of the input -> its rows, its rejections and its counts. Everything between reading and writing, without Ray and without files
of its own: the same in a Ray task, in one process, and in a test.

    records ──> images (headers) ──> rules ──> turns ──> encode ──> budget ──> rows
       └────────────┴─────────────────┴─────────┴──────────────────────┴────> rejected, with a reason each
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from boxcar.pipelines.boxes import difficulty
from boxcar.pipelines.boxes.rules import (
    Findings,
    LookUp,
    References,
    UnitBoxes,
    gather_boxes,
    gather_references,
    judge_boxes,
    judge_images,
    judge_labels,
    judge_small_boxes,
)
from boxcar.pipelines.families.patches import PixelLimits, ResizeRule
from boxcar.pipelines.rows.budget import (
    RECORD_OVER_CUTOFF,
    TURN_OVER_CUTOFF,
    Decision,
    DraftRow,
    SequenceRule,
    decide,
    single_lengths,
    tokens_to_save,
)
from boxcar.pipelines.rows.encode import (
    Draft,
    EmbeddedImages,
    Encoded,
    Sized,
    UnitData,
    build_table,
    encode_drafts,
    resize_all,
    sequence_rule,
    side_in_tokens,
)
from boxcar.pipelines.rows.ledger import Attempt, Ledger
from boxcar.pipelines.tokens.frame import Frame
from boxcar.pipelines.tokens.tokenizer import PieceTable
from boxcar.pipelines.turns.tasks import ReadingOrder, Regions, RejectedTurn, Turn, TurnMaker
from boxcar.pipelines.turns.texts import BadText, Scribe
from boxcar.schemas.manifest import Counts
from boxcar.schemas.record import Record, Rejected
from boxcar.schemas.workflow import ConvertConfig, RulesConfig

TOO_MANY_IMAGES = "too_many_images"
IMAGE_REFUSED = "image_refused_by_family"
SEVERAL_IMAGES = "regions_of_several_images"
MAX_SHRINK_ROUNDS = 3

Embed = Callable[[References, Sized, Sequence[int]], EmbeddedImages]
"""(references, sizes, rows of the records that are written) -> where their images lie."""


@dataclass
class UnitResult:
    """What a unit gives."""

    table: pa.Table
    counts: Counts
    rejected: list[Rejected] = field(default_factory=list)


@dataclass
class Judged:
    """A unit after the rules that no family has a say in."""

    ledger: Ledger
    records: list[Record]
    references: References
    boxes: UnitBoxes
    findings: Findings


def judge_unit(items: Iterable[Record | Rejected], lookup: LookUp, rules: RulesConfig) -> Judged:
    """Image headers, then the rules of images and boxes: the same for every family, cutoff and resolution."""
    ledger = Ledger()
    findings = Findings()
    records = judge_labels(ledger.usable(items), rules, findings)
    references = gather_references(records, lookup)
    verdict = judge_images(records, references, rules, findings)
    boxes = gather_boxes(records, references)
    _leave_out(boxes, verdict.rejected)
    judge_boxes(records, boxes, references, rules, findings)
    ledger.rejected.update(verdict.rejected)
    return Judged(ledger, records, references, boxes, findings)


class UnitConverter:
    """Converts units of one workflow. Holds the tokenizer's caches; the result of a unit depends on nothing but the unit."""

    def __init__(self, config: ConvertConfig, frame: Frame, source: str, pieces: PieceTable | None = None) -> None:
        """pieces: of the frame's tokenizer, where families share one; whoever makes them forget tells every scribe."""
        self.config, self.frame, self.source = config, frame, source
        self.pieces = pieces or PieceTable(frame.tokenizer)
        self.scribe = Scribe(frame.family, self.pieces)
        self.turns = TurnMaker(config, frame.family, frame.bank, self.scribe)

    def convert(self, items: Iterable[Record | Rejected], lookup: LookUp, embed: Embed | None = None) -> UnitResult:
        """All rows of a unit. `embed`: stores the images of the rows that are written, where the workflow embeds them."""
        if self.pieces.forget_if_large():
            self.scribe.forget()
        judged = judge_unit(items, lookup, self.config.rules)
        max_pixels = np.full(len(judged.references.paths), self.frame.limits.max_pixels)
        made = self._encode(judged, max_pixels)
        for _ in range(MAX_SHRINK_ROUNDS - 1):
            smaller = self._shrink(made) if self.config.shrink_images else None
            if smaller is None:
                break
            made = self._encode(judged, smaller)
        ledger, records = judged.ledger, judged.records
        ledger.take(made.attempt, records)
        judged.findings.by_rule.update(made.findings.by_rule)

        written = sorted({draft.record for draft, decision in made.decided() if decision.parts})
        embedded = embed(judged.references, made.unit.sized, written) if embed else None
        table = build_table(made.drafts, made.decisions, made.encoded, made.unit, embedded)
        return UnitResult(table, self._count(judged, made, table), ledger.quarantine(records))

    def draft(self, judged: Judged, max_pixels: npt.NDArray[np.int64], findings: Findings) -> tuple[UnitData, list[Draft], Attempt]:
        """The rows to be, before their lengths are known: what the family refuses, and the turns of everything else.

        max_pixels: (M,) upper limit of each image. findings: of the rule on small boxes. `judged` stays as it is: the unit has boxes of its
        own, of which fewer are kept.
        """
        records, references = judged.records, judged.references
        boxes = replace(judged.boxes, kept=judged.boxes.kept.copy())
        rejected_before = judged.ledger.rejected
        attempt = Attempt()
        unit = UnitData(self.config, self.source, self.frame, records, references, boxes, resize_all(references, self.frame, max_pixels))
        for row, record in enumerate(records):
            if row not in rejected_before and (rejected := self._unfit(row, record, unit)):
                attempt.rejected[row] = rejected
        _leave_out(boxes, attempt.rejected)
        judge_small_boxes(records, boxes, side_in_tokens(unit).min(axis=1, initial=np.inf), self.config.rules, findings)
        rows = [row for row in range(len(records)) if row not in rejected_before and row not in attempt.rejected]
        rank = reading_ranks(boxes.boxes).__getitem__
        drafts = [draft for row in rows for draft in self._drafts(row, unit, attempt, lambda rows: sorted(rows, key=rank))]
        return unit, drafts, attempt

    def _encode(self, judged: Judged, max_pixels: npt.NDArray[np.int64]) -> "_Made":
        """From sized images to budget decisions; repeated where images are shrunk."""
        findings = Findings()
        unit, drafts, attempt = self.draft(judged, max_pixels, findings)
        encoded = encode_drafts(drafts, unit, self.pieces)
        rule = sequence_rule(self.frame, self.config.cutoff_len)
        decisions = [decide(row, rule, split=self.config.over_length == "split") for row in encoded.rows]
        for draft, draft_row, decision in zip(drafts, encoded.rows, decisions, strict=True):
            if not decision.parts:
                attempt.turn(draft.record, RejectedTurn(RECORD_OVER_CUTOFF, _too_long(draft_row, rule)), len(draft.turns))
            elif decision.turns_left_out:
                longest = int(single_lengths(draft_row, rule).max())
                detail = f"found {longest} tokens with the longest turn alone, expected at most {rule.cutoff_len}"
                attempt.turn(draft.record, RejectedTurn(TURN_OVER_CUTOFF, detail), len(decision.turns_left_out))
        made = _Made(unit, drafts, encoded, decisions, attempt, findings, max_pixels)
        alive = {draft.record for draft, decision in made.decided() if decision.parts}
        for row, record in enumerate(judged.records):
            if row not in judged.ledger.rejected and row not in attempt.rejected and row not in alive:
                attempt.nothing_left(row, record)
        return made

    def _unfit(self, row: int, record: Record, unit: UnitData) -> Rejected | None:
        """Why the family cannot take a record's images, if so."""
        first, last = int(unit.references.offsets[row]), int(unit.references.offsets[row + 1])
        limit = self.frame.family.chat.max_images
        if limit is not None and last - first > limit:
            detail = f"found {last - first} images, {self.frame.family.name} takes {limit}"
            return Rejected(TOO_MANY_IMAGES, record.position, detail, record.record_id)
        for reference in range(first, last):
            if unit.sized.sizes.refused[reference]:
                size = f"{unit.references.width[reference]}x{unit.references.height[reference]}"
                detail = f"{unit.references.paths[reference]}: found {size}, expected an aspect ratio of at most 200"
                return Rejected(IMAGE_REFUSED, record.position, detail, record.record_id)
        if record.system:  # "" is an empty one
            try:
                self.scribe.checked(record.system)
            except BadText as bad:
                return Rejected(bad.reason, record.position, f"system prompt: {bad.detail}", record.record_id)
        return None

    def _drafts(self, row: int, unit: UnitData, attempt: Attempt, reading_order: ReadingOrder) -> Iterator[Draft]:
        """The draft rows of a record: its unordered turns, and its dialogue."""
        record = unit.records[row]
        made: list[Turn | RejectedTurn] = []
        if record.images and (record.regions or record.absent or record.vocabulary):
            if unit.num_images(row) == 1:
                regions = regions_of(row, unit)
                made += self.turns.region_turns(record, regions, reading_order)
            elif record.regions:
                made.append(RejectedTurn(SEVERAL_IMAGES, f"found regions in a record of {unit.num_images(row)} images, expected one"))
        if record.images:
            made += self.turns.caption_turns(record)
        turns = []
        for turn in made:
            if isinstance(turn, Turn):
                turns.append(turn)
            else:
                attempt.turn(row, turn)
        if turns:
            yield Draft(row, "", turns, ordered=False)
        if self.turns.wants_dialogue(record):
            dialogue = self.turns.dialogue_turns(record, _first_mark(row, unit.boxes), unit.boxes.kept.__getitem__)
            if isinstance(dialogue, RejectedTurn):
                attempt.turn(row, dialogue, len(record.dialogue))
            else:
                yield Draft(row, "#dialogue" if turns else "", dialogue, ordered=not self.frame.family.chat.one_question_per_image)

    def _shrink(self, made: "_Made") -> npt.NDArray[np.int64] | None:
        """Lower pixel limits for the images of drafts that do not fit; None where nothing can shrink."""
        resize = self.frame.family.resize
        if not resize.limits_matter:
            return None
        rule = sequence_rule(self.frame, self.config.cutoff_len)
        dead = [
            (draft.record, tokens_to_save(row, rule))
            for draft, row, decision in zip(made.drafts, made.encoded.rows, made.decisions, strict=True)
            if not decision.parts
        ]
        references, sizes = made.unit.references, made.unit.sized.sizes
        sizes_wh = np.stack([references.width, references.height], axis=1)
        smaller = smaller_limits(dead, references.offsets, sizes_wh, sizes.visual_tokens, made.max_pixels, resize, self.frame.limits)
        return None if (smaller == made.max_pixels).all() else smaller

    def _count(self, judged: Judged, made: "_Made", table: pa.Table) -> Counts:
        """table: the rows that are written."""
        ledger, references, boxes = judged.ledger, judged.references, made.unit.boxes
        alive = {draft.record for draft, decision in made.decided() if decision.parts}
        images = table["images"].combine_chunks()
        turns = table["turns"].combine_chunks().flatten()
        tasks = turns.field("task")
        bins = difficulty.bins(turns.field("difficulty").to_numpy())
        written_images = [image for row in alive for image in range(references.offsets[row], references.offsets[row + 1])]
        return Counts(
            records_read=ledger.num_read,
            records_written=len(alive),
            rows_written=table.num_rows,
            images=len(images.flatten()),
            images_shrunk=int((made.max_pixels[written_images] < self.frame.limits.max_pixels).sum()),
            boxes_read=len(boxes.kept),
            boxes_kept=int(boxes.kept.sum()),
            turns=_histogram(tasks),
            records_rejected=ledger.by_reason(),
            turns_rejected=ledger.turns_rejected,
            rules=judged.findings.by_rule,
            visual_tokens=int(np.sum(table["total_tokens"].to_numpy() - table["text_tokens"].to_numpy())),
            text_tokens=int(np.sum(table["text_tokens"].to_numpy())),
            total_tokens_histogram=_histogram(table["total_tokens"].combine_chunks()),
            visual_tokens_histogram=_histogram(table["visual_tokens"].combine_chunks()),
            difficulty_histograms={
                task: _histogram(pa.array(bins[np.asarray(tasks.to_pylist()) == task])) for task in sorted(set(tasks.to_pylist()))
            },
        )


@dataclass(frozen=True)
class _Made:
    """One round of encoding. Thrown away where images shrink and the round is repeated."""

    unit: UnitData
    drafts: list[Draft]
    encoded: Encoded
    decisions: list[Decision]
    attempt: Attempt
    findings: Findings
    """Of the rule on small boxes."""
    max_pixels: npt.NDArray[np.int64]
    """(M,) upper limit of each image."""

    def decided(self) -> Iterator[tuple[Draft, Decision]]:
        return zip(self.drafts, self.decisions, strict=True)


def smaller_limits(
    dead: Iterable[tuple[int, int]],
    offsets: npt.NDArray[np.int64],
    sizes_wh: npt.NDArray[np.int64],
    visual_tokens: npt.NDArray[np.int64],
    max_pixels: npt.NDArray[np.int64],
    resize: ResizeRule,
    limits: PixelLimits,
) -> npt.NDArray[np.int64]:
    """(M,) pixel limits under which records that do not fit may do. dead: (record, tokens by which its images must shrink).

    offsets: (records + 1,) the images of each record. sizes_wh: (M, 2) pixels of the originals. visual_tokens, max_pixels: (M,) as they
    are now. A record whose images cannot give so many tokens keeps its limits.
    """
    smaller = max_pixels.copy()
    for record, to_save in dead:
        images = np.arange(offsets[record], offsets[record + 1])
        tokens = visual_tokens[images]
        wanted = int(tokens.sum()) - to_save
        if wanted >= len(images) > 0:
            # Each image gives up the same share of its tokens; floor keeps the sum at or under what is wanted.
            for image, quota in zip(images.tolist(), (tokens * wanted // int(tokens.sum())).tolist(), strict=True):
                width, height = sizes_wh[image].tolist()
                smaller[image] = min(smaller[image], _limit_for(width, height, quota, resize, limits))
    return smaller


def _limit_for(width: int, height: int, quota: int, resize: ResizeRule, limits: PixelLimits) -> int:
    """The highest pixel limit under which an image takes at most `quota` tokens. A limit of just as many pixels may not do: the rule
    rounds each side by itself, and upwards where the lower limit is near."""
    steps = resize.pixels_for(np.arange(1, max(quota, 1) + 1))
    sizes = resize(width, height, *limits.lowered(steps))
    fitting = steps[sizes.visual_tokens <= quota]
    return int(fitting[-1] if len(fitting) else steps[0])


def _leave_out(boxes: UnitBoxes, rejected: Iterable[int]) -> None:
    """Boxes of records whose image is refused are not judged: without its size, each would count as outside, or too small."""
    boxes.kept[np.isin(boxes.record, list(rejected))] = False


def _too_long(row: DraftRow, rule: SequenceRule) -> str:
    shortest = tokens_to_save(row, rule) + rule.cutoff_len
    what = "with all its turns" if row.ordered else "with its shortest turn"
    return f"found {shortest} tokens {what} ({row.header_and_images} are header and images), expected at most {rule.cutoff_len}"


def _first_mark(row: int, boxes: UnitBoxes) -> int:
    """Row of the first box of a record's dialogue in the unit's box table."""
    return boxes.num_regions + int(np.searchsorted(boxes.record[boxes.num_regions :], row))


def _histogram(values: pa.Array) -> dict[str, int]:
    """Value -> how often, sorted by value."""
    counted = values.value_counts().to_pylist()
    return {str(entry["values"]): entry["counts"] for entry in sorted(counted, key=lambda entry: entry["values"])}


def regions_of(row: int, unit: UnitData) -> Regions:
    """A record's kept regions by label and phrase, and what is incomplete."""
    record, boxes = unit.records[row], unit.boxes
    regions = Regions({}, {}, {}, {}, set(record.not_exhaustive), set(), set(record.not_exhaustive))
    first = int(boxes.region_offsets[row])
    dropped = []
    for place, region in enumerate(record.regions):
        names = (region.label, *region.phrases) if region.label else region.phrases
        regions.present.update(names)
        box_row = first + place
        if not boxes.kept[box_row]:
            dropped.append(place)
            continue
        if region.label:
            regions.rows_by_label.setdefault(region.label, []).append(box_row)
        for phrase in dict.fromkeys(region.phrases):
            regions.rows_by_phrase.setdefault(phrase, []).append(box_row)
        if names:
            regions.phrases_of_row[box_row] = region.phrases or names
        regions.label_of_row[box_row] = region.label
    if dropped:
        twins = _twins(record, boxes, first, dropped)
        called = {twin: record.regions[twin - first].phrases for twin in twins.values()}
        for place in dropped:
            region = record.regions[place]
            if place not in twins:
                regions.incomplete_labels.add(region.label)
                regions.incomplete_phrases.update(region.phrases)
                continue
            # What the copy was called, its twin is called as well.
            twin = twins[place]
            for phrase in dict.fromkeys(region.phrases):
                rows = regions.rows_by_phrase.setdefault(phrase, [])
                if twin not in rows:
                    rows.append(twin)
            if region.phrases:
                regions.phrases_of_row[twin] = called[twin] = tuple(dict.fromkeys((*called[twin], *region.phrases)))
    return regions


def _twins(record: Record, boxes: UnitBoxes, first: int, dropped: Sequence[int]) -> dict[int, int]:
    """Dropped regions that are copies of a kept one, and its row: taking a copy away leaves its label complete."""
    places: dict[tuple[str, int, tuple[float, ...]], int] = {}
    for place, region in enumerate(record.regions):
        if boxes.kept[first + place]:
            places[region.label, region.image_index, tuple(boxes.boxes[first + place].tolist())] = place
    twins = {}
    for place in dropped:
        region = record.regions[place]
        twin = places.get((region.label, region.image_index, tuple(boxes.boxes[first + place].tolist())))
        if twin is not None and not region.is_crowd:
            twins[place] = first + twin
    return twins


def reading_ranks(boxes_px: npt.NDArray[np.float64]) -> list[int]:
    """Rank of each box of a unit from top to bottom, then from left to right."""
    ranks = np.empty(len(boxes_px), np.int64)
    ranks[np.lexsort((boxes_px[:, 0], boxes_px[:, 1]))] = np.arange(len(boxes_px))
    return ranks.tolist()
