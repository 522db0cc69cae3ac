"""The rules of images and boxes, over the columns of one unit: what is wrong, and what the workflow wants done about it.

    records ──> references (record x image) ── image rules ──> records that cannot be used
                      |
    boxes  ── frame ──> pixels of the upright image ── box rules ──> boxes kept, boxes dropped, incomplete labels

Every rule has a counter, a few examples and a policy (`schemas.workflow.RulesConfig`). A dropped box leaves its label incomplete in that
image: no question asks for all boxes of that label there, or takes it for absent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from boxcar.pipelines.boxes import geometry
from boxcar.pipelines.boxes.labels import dirty_names, has_control_characters, renamed, without_phrases
from boxcar.pipelines.families.catalog import find_family
from boxcar.pipelines.images.image_file import ImageHeader
from boxcar.pipelines.images.lookup import FoundImage, Rules
from boxcar.pipelines.ragged import IntColumn
from boxcar.schemas.errors import ImageError
from boxcar.schemas.manifest import MAX_EXAMPLES, Finding
from boxcar.schemas.record import Box, BoxMark, BoxSpace, ImageRef, Record, Rejected
from boxcar.schemas.workflow import Policy, RulesConfig

Mask = npt.NDArray[np.bool_]
LookUp = Callable[[ImageRef], FoundImage]

MOSTLY = 0.5
"""A box with less of its area inside is mostly outside."""
CONFUSED_OVERHANG = 0.75
"""Only a box with less inside is suspected of the other of xywh and xyxy: small overhangs are ordinary."""
ROUNDING_PX = 0.01
"""What relative coordinates of a few digits hang over by rounding alone: clipped without a word."""
RELATIVE_LIMIT = 1.5
"""Coordinates up to here in a format of pixels look like fractions of the size."""
ROTATIONS = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""


class Findings:
    """Counts of what the rules found, by rule."""

    def __init__(self) -> None:
        self.by_rule: dict[str, Finding] = {}

    def note(self, rule: str, action: Policy, examples: Sequence[str], count: int | None = None) -> None:
        """Count `count` items (default: one for each example) as kept, fixed or dropped."""
        num_found = len(examples) if count is None else count
        if not num_found:
            return
        finding = Finding(examples=list(examples[:MAX_EXAMPLES]))
        setattr(finding, {"keep": "kept", "fix": "fixed", "drop": "dropped"}[action], num_found)
        self.by_rule.setdefault(rule, Finding()).add(finding)


@dataclass
class UnitBoxes:
    """All boxes of a unit as columns: first the regions of all records, then the boxes inside dialogues."""

    record: IntColumn
    """(N,) row of the record within the unit, ascending within each of the two parts."""
    reference: IntColumn
    """(N,) row of its image in `References`."""
    boxes: npt.NDArray[np.float64]
    """(N, 4); before `to_pixels` in the source's space, after it pixels of the upright image."""
    labels: list[str]
    names: list[str]
    """The source's own id of each box, for messages; "" where it has none."""
    is_crowd: Mask
    is_difficult: Mask
    num_regions: int
    """How many of the N are regions."""
    kept: Mask
    region_offsets: IntColumn
    """(num_records + 1,): the regions of record r are rows region_offsets[r] .. region_offsets[r + 1]."""


@dataclass
class References:
    """Each image of each record, as columns."""

    record: IntColumn
    paths: list[str]
    headers: list[ImageHeader | ImageError]
    place_rules: dict[int, Rules]
    """Row -> what is unusual about the image's place (`images.lookup`)."""
    width: IntColumn
    height: IntColumn
    """Pixels, upright; 1 where the image cannot be used."""
    frame_wh: npt.NDArray[np.float64]
    """(M, 2): size of the frame in which the boxes were drawn, in pixels."""
    turn: IntColumn
    """(M,) EXIF orientation by which the boxes must still be turned; 1: not at all."""
    offsets: IntColumn
    """(num_records + 1,)."""


@dataclass
class Verdict:
    """What the image rules say of a unit's records."""

    rejected: dict[int, Rejected] = field(default_factory=dict)
    """Row of the record -> why."""

    def reject(self, row: int, record: Record, reason: str, detail: str) -> None:
        self.rejected.setdefault(row, Rejected(reason, record.position, detail, record.record_id))


def gather_references(records: Sequence[Record], lookup: LookUp) -> References:
    """Columns of all images of all records; `lookup` finds one (and reads its header once)."""
    offsets = np.zeros(len(records) + 1, np.int64)
    found: list[FoundImage] = []
    for row, record in enumerate(records):
        found += map(lookup, record.images)
        offsets[row + 1] = len(found)
    headers = [image.header for image in found]
    width = np.fromiter((1 if isinstance(header, ImageError) else header.width for header in headers), np.int64, len(found))
    height = np.fromiter((1 if isinstance(header, ImageError) else header.height for header in headers), np.int64, len(found))
    return References(
        record=np.repeat(np.arange(len(records)), np.diff(offsets)),
        paths=[image.path for image in found],
        headers=headers,
        place_rules={row: image.rules for row, image in enumerate(found) if image.rules},
        width=width,
        height=height,
        frame_wh=np.stack([width, height], axis=1).astype(np.float64),
        turn=np.ones(len(found), np.int64),
        offsets=offsets,
    )


def judge_images(records: Sequence[Record], references: References, rules: RulesConfig, findings: Findings) -> Verdict:
    """Apply the image rules: missing and broken files, EXIF, declared sizes, unusual modes. Sets `frame_wh` and `turn`."""
    judge = _ImageJudge(references, rules, findings, Verdict())
    row = 0
    for record_row, record in enumerate(records):
        for image in record.images:
            header = references.headers[row]
            for rule, action in references.place_rules.get(row, ()):
                findings.note(rule, action, [f"{record.position}, {image.path}"])
            if isinstance(header, ImageError):
                judge.verdict.reject(record_row, record, header.reason, str(header))
            elif header.orientation != 1 or header.mode_note or image.declared_width is not None or image.declared_height is not None:
                judge.judge(record_row, record, image, header, row)
            row += 1
    return judge.verdict


@dataclass(frozen=True)
class _ImageJudge:
    references: References
    rules: RulesConfig
    findings: Findings
    verdict: Verdict

    def judge(self, record_row: int, record: Record, image: ImageRef, header: ImageHeader, row: int) -> None:
        """One readable image of one record; `row` is its row in the references."""
        if header.mode_note:
            rule = f"image_{header.mode_note}"
            detail = f"{record.position}, {image.path}: a {header.mode_note} image"
            self._note(rule, self.rules.unusual_mode, detail, record_row, record)
        upright = (header.width, header.height)
        declared = (image.declared_width or upright[0], image.declared_height or upright[1])
        index = row - int(self.references.offsets[record_row])
        # Which way is up matters to boxes only.
        if header.orientation != 1 and (_has_boxes(record, index) or self.rules.exif_orientation == "drop"):
            undeclared = image.declared_width is None or image.declared_height is None
            if self._judge_orientation(record_row, record, image, header, row, None if undeclared else declared):
                return
        if declared not in (upright, (header.stored_width, header.stored_height)):
            detail = f"{record.position}, {image.path}: declared {_by(declared)}, the file has {_by(upright)}"
            self._note("size_mismatch", self.rules.size_mismatch, detail, record_row, record)
            if self.rules.size_mismatch == "fix":
                self.references.frame_wh[row] = declared

    def _judge_orientation(
        self, record_row: int, record: Record, image: ImageRef, header: ImageHeader, row: int, declared: tuple[int, int] | None
    ) -> bool:
        """True: the case is closed. False: the boxes are taken to be upright, and the declared size is still to be judged."""
        stored, upright = (header.stored_width, header.stored_height), (header.width, header.height)
        detail = (
            f"{record.position}, {image.path}: EXIF orientation {header.orientation}, stored {_by(stored)}, "
            f"declared {_by(declared) if declared else 'nothing'}"
        )
        policy = self.rules.exif_orientation
        if policy == "fix" and stored != upright and declared == stored:
            self.references.frame_wh[row] = stored
            self.references.turn[row] = header.orientation
            self._note("exif_orientation", "fix", detail, record_row, record)
            return True
        if policy == "fix" and not (stored != upright and declared == upright):
            # Mirrored, turned by 180 degrees, square or undeclared: it is unknown in which frame the boxes were drawn.
            policy, detail = "drop", f"{detail}: it is unknown in which frame the boxes were drawn"
        self._note("exif_orientation", "drop" if policy == "drop" else "keep", detail, record_row, record)
        return policy == "drop"

    def _note(self, rule: str, action: Policy, detail: str, record_row: int, record: Record) -> None:
        self.findings.note(rule, action, [detail])
        if action == "drop":
            self.verdict.reject(record_row, record, rule, detail)


def _has_boxes(record: Record, image_index: int) -> bool:
    """Whether any box of a record lies in this image of it."""
    indices = [*(region.image_index for region in record.regions), *(mark.image_index for mark in dialogue_marks(record))]
    return image_index in indices


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def judge_labels(records: Sequence[Record], rules: RulesConfig, findings: Findings) -> list[Record]:
    """Apply the rule on control characters to labels and phrases; `drop` leaves boxes with such a label to `judge_boxes`."""
    policy = rules.control_characters
    if not (dirty := dirty_names(records)):
        return list(records)
    result = []
    for record in records:
        places = [name for region in record.regions for name in (region.label, *region.phrases) if name in dirty]
        if policy == "drop":
            places = [name for region in record.regions for name in region.phrases if name in dirty]
        examples = [f"{record.position}: {name!r}" for name in places[:MAX_EXAMPLES]]
        findings.note("control_characters", policy, examples, len(places))
        if policy == "fix":
            record = renamed(record, dirty)  # noqa: PLW2901
        elif policy == "drop":
            record = without_phrases(record, dirty)  # noqa: PLW2901
        result.append(record)
    return result


def gather_boxes(records: Sequence[Record], references: References) -> UnitBoxes:
    """Columns of all regions, then of all boxes in dialogues."""
    record_rows: list[int] = []
    image_indices: list[int] = []
    flat: list[Box] = []
    labels: list[str] = []
    names: list[str] = []
    crowd: list[bool] = []
    difficult: list[bool] = []
    region_offsets = np.zeros(len(records) + 1, np.int64)
    for row, record in enumerate(records):
        for region in record.regions:
            record_rows.append(row)
            image_indices.append(region.image_index)
            flat.append(region.box)
            labels.append(region.label)
            names.append(region.region_id)
            crowd.append(region.is_crowd)
            difficult.append(region.is_difficult)
        region_offsets[row + 1] = len(flat)
    num_regions = len(flat)
    for row, record in enumerate(records):
        for mark in dialogue_marks(record):
            record_rows += [row] * len(mark.boxes)
            image_indices += [mark.image_index] * len(mark.boxes)
            flat += mark.boxes
            labels += [mark.label] * len(mark.boxes)
            names += [""] * len(mark.boxes)
    num_marks = len(flat) - num_regions
    record_column = np.array(record_rows, np.int64)
    return UnitBoxes(
        record=record_column,
        reference=references.offsets[record_column] + np.array(image_indices, np.int64),
        boxes=np.array(flat, np.float64).reshape(-1, 4),
        labels=labels,
        names=names,
        is_crowd=np.array(crowd + [False] * num_marks, np.bool_),
        is_difficult=np.array(difficult + [False] * num_marks, np.bool_),
        num_regions=num_regions,
        kept=np.ones(len(flat), np.bool_),
        region_offsets=region_offsets,
    )


def dialogue_marks(record: Record) -> list[BoxMark]:
    """The box marks of a record's dialogue, in the order of the text."""
    return [part for turn in record.dialogue for text in (turn.question, turn.answer) for part in text if isinstance(part, BoxMark)]


def _frame_factors(records: Sequence[Record], boxes: UnitBoxes, references: References) -> npt.NDArray[np.float64]:
    """(N, 2): what a box's x and y are multiplied with to become pixels of the frame it was drawn in."""
    frame = references.frame_wh[boxes.reference]
    spaces = {record.box_space for record in records}
    if len(spaces) == 1 and next(iter(spaces)).kind == "pixels":
        return np.ones_like(frame)
    codes = {space: code for code, space in enumerate(sorted(spaces, key=repr))}
    space_of_record = np.array([codes[record.box_space] for record in records])
    factors = np.ones_like(frame)
    for space, code in codes.items():
        rows = space_of_record[boxes.record] == code
        if space.kind == "relative":
            factors[rows] = frame[rows]
        elif space.kind == "per_mille":
            factors[rows] = frame[rows] / 1000
        elif space.kind == "resized":
            factors[rows] = frame[rows] / _resized(frame[rows], space)
    return factors


def _resized(frame_wh: npt.NDArray[np.float64], space: BoxSpace) -> npt.NDArray[np.float64]:
    resize = find_family(space.family, "box_space_family").resize
    low, high = space.min_pixels or resize.published_limits.min_pixels, space.max_pixels or resize.published_limits.max_pixels
    sizes = resize(frame_wh[:, 0], frame_wh[:, 1], low, high)
    # A refused image (aspect ratio over 200) keeps its own pixels here; the target family refuses it too, by its own rule.
    resized = np.stack([sizes.width, sizes.height], axis=1).astype(np.float64)
    return np.where(sizes.refused[:, None], frame_wh, resized)


def judge_boxes(records: Sequence[Record], boxes: UnitBoxes, references: References, rules: RulesConfig, findings: Findings) -> None:
    """Bring all boxes into pixels of the upright images and apply the box rules. Changes `boxes.boxes` and `boxes.kept`."""
    judge = _Judge(records, boxes, findings)
    judge.drop_flagged(rules)
    if rules.control_characters == "drop":
        judge.apply("control_characters", has_control_characters(boxes.labels), "drop")
    judge.apply("not_finite", np.asarray(~np.isfinite(boxes.boxes).all(axis=1)), rules.not_finite)
    boxes.boxes[~np.isfinite(boxes.boxes)] = 0.0
    frame = references.frame_wh[boxes.reference]
    factors = _frame_factors(records, boxes, references)
    in_pixels = (factors == 1).all(axis=1)
    # A box of at most 1.5 px in an image of many pixels: nobody draws that, but fractions look so.
    relative = np.asarray(in_pixels & (np.abs(boxes.boxes) <= RELATIVE_LIMIT).all(axis=1) & (frame.min(axis=1) > 4))
    judge.apply("relative_confusion", relative, rules.relative_confusion, geometry.scale(boxes.boxes, frame))
    boxes.boxes = geometry.scale(boxes.boxes, factors)
    _judge_confusion(judge, boxes, frame, rules)
    swapped: Mask = np.asarray((geometry.sides(boxes.boxes) < 0).any(axis=1))
    judge.apply("swapped_corners", swapped, rules.swapped_corners, geometry.order_corners(boxes.boxes))

    stored = references.frame_wh[boxes.reference]
    boxes.boxes = geometry.to_upright(boxes.boxes, stored, references.turn[boxes.reference])
    upright = np.stack([references.width, references.height], axis=1)[boxes.reference].astype(np.float64)
    turned = np.isin(references.turn[boxes.reference], ROTATIONS)
    drawn = np.where(turned[:, None], stored[:, ::-1], stored)
    boxes.boxes = geometry.scale(boxes.boxes, upright / drawn)

    judge.apply("zero_area", geometry.area(boxes.boxes) <= 0, rules.zero_area)
    inside = geometry.inside_fraction(boxes.boxes, upright)
    clipped = geometry.clip(boxes.boxes, upright)
    judge.apply("outside", inside <= 0, rules.outside)
    judge.apply("mostly_outside", (inside > 0) & (inside < MOSTLY), rules.mostly_outside, clipped)
    excess = np.abs(boxes.boxes - clipped).max(axis=1)
    judge.apply("overhang", (excess > ROUNDING_PX) & (inside >= MOSTLY), rules.overhang, clipped)
    within_rounding = excess <= ROUNDING_PX
    boxes.boxes[within_rounding] = clipped[within_rounding]
    judge.apply("duplicate", _repeats(boxes), rules.duplicate, remove=True)


def judge_small_boxes(
    records: Sequence[Record], boxes: UnitBoxes, side_in_tokens: npt.NDArray[np.float64], rules: RulesConfig, findings: Findings
) -> None:
    """The rule that needs the family: a side shorter than one visual token. `side_in_tokens`: (N,), the shorter side."""
    _Judge(records, boxes, findings).apply("under_one_token", side_in_tokens < 1, rules.under_one_token)


def _judge_confusion(judge: "_Judge", boxes: UnitBoxes, frame: npt.NDArray[np.float64], rules: RulesConfig) -> None:
    """xywh written where xyxy is meant, and the other way round.

    Read as xywh, an xyxy box hangs far over the border; read as xyxy, an xywh box has its corners swapped wherever it is narrower than it
    is far from the origin. Either is only suspected where the other reading fits the image, so that what is merely swapped stays apart.
    """
    x0y0, second, sides = boxes.boxes[:, :2], boxes.boxes[:, 2:], geometry.sides(boxes.boxes)
    as_xyxy, as_xywh = np.concatenate([x0y0, sides], axis=1), np.concatenate([x0y0, x0y0 + second], axis=1)
    overhangs = (
        (geometry.inside_fraction(boxes.boxes, frame) < CONFUSED_OVERHANG) & (geometry.area(boxes.boxes) > 0) & _fits(as_xyxy, frame)
    )
    swapped = np.asarray((sides < 0).any(axis=1)) & _fits(as_xywh, frame)
    judge.apply("xywh_confusion", overhangs | swapped, rules.xywh_confusion, np.where(swapped[:, None], as_xywh, as_xyxy))


def _fits(boxes: npt.NDArray[np.float64], sizes: npt.NDArray[np.float64]) -> Mask:
    positive = (geometry.sides(boxes) > 0).all(axis=1)
    return np.asarray(positive & (boxes[:, :2] >= 0).all(axis=1) & (boxes[:, 2:] <= sizes).all(axis=1))


def _repeats(boxes: UnitBoxes) -> Mask:
    """Regions whose label and box stood before in the same image."""
    repeats = np.zeros(len(boxes.kept), np.bool_)
    regions = np.flatnonzero(boxes.kept[: boxes.num_regions])
    if not len(regions):
        return repeats
    codes = {label: code for code, label in enumerate(dict.fromkeys(boxes.labels))}
    label_codes = np.fromiter((codes[label] for label in boxes.labels), np.float64, len(boxes.labels))
    keys = np.column_stack([boxes.reference[regions], label_codes[regions], boxes.boxes[regions]])
    _, first = np.unique(keys, axis=0, return_index=True)
    repeats[regions] = True
    repeats[regions[first]] = False
    return repeats


@dataclass
class _Judge:
    """Applies one rule after another to the boxes that are still kept."""

    records: Sequence[Record]
    boxes: UnitBoxes
    findings: Findings

    def drop_flagged(self, rules: RulesConfig) -> None:
        self.apply("crowd", self.boxes.is_crowd, rules.crowd)
        self.apply("difficult", self.boxes.is_difficult & ~self.boxes.is_crowd, rules.difficult)

    def apply(self, rule: str, broken: Mask, policy: Policy, fixed: npt.NDArray[np.float64] | None = None, *, remove: bool = False) -> None:
        """Count the kept boxes that break a rule, and keep, fix or drop them. `remove`: to fix is to take the copy away."""
        rows = np.flatnonzero(broken & self.boxes.kept)
        if not len(rows):
            return
        # Without a fix (a box only too small), `fix` can but keep.
        action: Policy = "keep" if policy == "fix" and fixed is None and not remove else policy
        self.findings.note(rule, action, [self._describe(row) for row in rows[:MAX_EXAMPLES].tolist()], len(rows))
        if action == "drop" or (action == "fix" and remove):
            self.boxes.kept[rows] = False
        elif action == "fix" and fixed is not None:
            self.boxes.boxes[rows] = fixed[rows]

    def _describe(self, row: int) -> str:
        box = ", ".join(f"{value:.10g}" for value in self.boxes.boxes[row].tolist())
        name = self.boxes.names[row] or ("a region" if row < self.boxes.num_regions else "a box of the dialogue")
        label = f" {self.boxes.labels[row]!r}" if self.boxes.labels[row] else ""
        return f"{self.records[self.boxes.record[row]].position}, {name}{label}: [{box}]"
