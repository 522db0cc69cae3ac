"""What an audit keeps of a unit: numbers. Whatever a cutoff, a resolution or a batch makes of it is arithmetic on these columns.

    Judged unit ──> Things    records, images, boxes: the same for every family
        └─ drafts ─> Texts     one family's turns: tokens of their words, and which boxes' numbers stand between them

A turn's length is its words plus the numbers of its boxes. Only the numbers hang on the resolution (Qwen2.5-VL writes pixels of the resized
image, and a fourth digit is a fourth token), so a string is tokenized once, whatever is asked later. The pieces are those that conversion
composes its ids from: lengths are exact for the same reason.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from boxcar.pipelines.ragged import IntColumn, offsets_of
from boxcar.pipelines.rows.encode import Draft, UnitData
from boxcar.pipelines.rows.ledger import Attempt
from boxcar.pipelines.rows.unit import Judged
from boxcar.pipelines.storage import atomic_write
from boxcar.pipelines.tokens.compose import TextSpec
from boxcar.pipelines.tokens.tokenizer import PieceTable, TextTokenizer
from boxcar.pipelines.turns.lint import lint_records
from boxcar.schemas.errors import ShardError
from boxcar.schemas.manifest import MAX_EXAMPLES, Finding, Rejections
from boxcar.schemas.record import Rejected
from boxcar.schemas.task import TASK_NAMES

Small = npt.NDArray[np.int32]
NO_CODE = -1


class Things(msgspec.Struct, kw_only=True):
    """Records, images and boxes of a unit, after the rules that no family has a say in. R records, M images, B kept boxes."""

    num_read: int
    """Records read, those that the reader rejected included."""
    sample_ids: list[str]
    """(R,) source/record id."""
    positions: list[str]
    """(R,) where each stands in the source, for people."""
    splits: list[str]
    """(R,)."""
    rejected: npt.NDArray[np.bool_]
    """(R,) by an image rule."""
    reasons: dict[str, Rejections]
    """Rejected by the reader or by an image rule."""
    image_offsets: IntColumn
    """(R + 1,)."""
    paths: list[str]
    """(M,) as the source names them."""
    sizes_wh: Small
    """(M, 2) pixels, upright; 1 where the image cannot be used."""
    own_limits: IntColumn
    """(M,) pixel limit of an image that a shard holds shrunk below its contract's; 0: it follows the limits."""
    box_references: Small
    """(B,) row of each box's image."""
    boxes: npt.NDArray[np.float64]
    """(B, 4) xyxy, pixels of the upright original."""
    box_labels: Small
    """(B,) rows of `labels`."""
    labels: list[str]
    num_boxes_read: int
    rules: dict[str, Finding]
    """What the rules found; the one on boxes under one token is the resolution's, and not here."""
    lint: dict[str, Rejections]
    """What is odd about the wording (`lint.ABOUT`)."""

    @property
    def num_records(self) -> int:
        return len(self.sample_ids)


class Texts(msgspec.Struct, kw_only=True):
    """One family's turns of the same unit. D drafts (rows to be), T turns. Tokens are exact."""

    refused: npt.NDArray[np.bool_]
    """(R,) by the family: too many images, an aspect ratio, a text of its own."""
    refusals: dict[str, Rejections]
    first_reasons: Small
    """(R,) row of `reason_names`: why the record's first turn that could not be made was left out; -1: all could."""
    text_records: Small
    """(X,) record of each kind of turns that cannot be made ..."""
    text_reasons: Small
    """... its reason, a row of `reason_names` ..."""
    text_counts: Small
    """... and how many they are."""
    reason_names: list[str]
    reason_examples: dict[str, list[str]]
    without_turns: dict[str, Rejections]
    """Records that give no draft, by reason."""
    draft_records: Small
    """(D,) ascending."""
    draft_ordered: npt.NDArray[np.bool_]
    draft_header: Small
    """(D,) header tokens without placeholders."""
    draft_suffixed: npt.NDArray[np.bool_]
    """(D,) the second draft of a record: its dialogue."""
    turn_offsets: IntColumn
    """(D + 1,)."""
    turn_tasks: npt.NDArray[np.uint8]
    """(T,) rows of schemas.task.TASK_NAMES."""
    turn_question: Small
    """(T,) tokens of the question's words, without image placeholders and numbers of boxes."""
    turn_answer: Small
    """(T,) likewise."""
    turn_labels: Small
    """(T,) rows of `labels`: what is asked for; -1 where it is no category."""
    labels: list[str]
    turn_question_boxes: Small
    """(T,) how many of a turn's boxes stand in its question: the first ones."""
    box_offsets: IntColumn
    """(T + 1,)."""
    box_rows: Small
    """Rows of `Things.boxes`, of question, then answer."""

    @property
    def num_turns(self) -> int:
        return len(self.turn_tasks)


Columns = TypeVar("Columns", Things, Texts)


class NumberLengths:
    """Tokens of the numbers of boxes, as a table: value -> tokens. Grows as values come."""

    def __init__(self, tokenizer: TextTokenizer, number_format: str) -> None:
        self._pieces, self._format = PieceTable(tokenizer), number_format
        self._table = np.zeros(0, np.int32)

    def of(self, values: IntColumn) -> npt.NDArray[np.int32]:
        """Tokens of each value (0 or more), in its shape."""
        largest = int(values.max(initial=0))
        if largest >= len(self._table):
            codes = self._pieces.intern_numbers(np.arange(max(largest + 1, 1024)), self._format)
            self._pieces.encode_pending()
            self._table = self._pieces.ids.lengths[codes].astype(np.int32)
        return np.asarray(self._table[values])

    def of_boxes(self, values: IntColumn) -> IntColumn:
        """(B,) tokens of the four numbers of each box (B, 4)."""
        lengths = self.of(values)
        return np.asarray((lengths[:, 0] + lengths[:, 1] + lengths[:, 2] + lengths[:, 3]).astype(np.int64))


# ---- from a unit


def things_of(judged: Judged, source: str, default_split: str) -> Things:
    """The columns that all families share."""
    records, references, boxes, ledger = judged.records, judged.references, judged.boxes, judged.ledger
    rejected = np.zeros(len(records), np.bool_)
    rejected[list(ledger.rejected)] = True
    kept = np.flatnonzero(boxes.kept)
    label_codes: dict[str, int] = {}
    codes = [label_codes.setdefault(boxes.labels[row], len(label_codes)) for row in kept.tolist()]
    return Things(
        num_read=ledger.num_read,
        sample_ids=[f"{source}/{record.record_id}" for record in records],
        positions=[record.position for record in records],
        splits=[record.split or default_split for record in records],
        rejected=rejected,
        reasons=ledger.by_reason(),
        image_offsets=references.offsets,
        paths=list(references.paths),
        sizes_wh=np.stack([references.width, references.height], axis=1).astype(np.int32),
        own_limits=np.zeros(len(references.paths), np.int64),
        box_references=boxes.reference[kept].astype(np.int32),
        boxes=boxes.boxes[kept],
        box_labels=np.array(codes, np.int32),
        labels=list(label_codes),
        num_boxes_read=len(boxes.kept),
        rules=judged.findings.by_rule,
        lint=lint_records(records),
    )


def texts_of(judged: Judged, unit: UnitData, drafts: Sequence[Draft], attempt: Attempt, pieces: PieceTable) -> Texts:
    """One family's columns. A draft's boxes are among those that `judged` keeps, which `things_of` took."""
    place = np.cumsum(judged.boxes.kept) - 1
    pieces.encode_pending()
    turns = [turn for draft in drafts for turn in draft.turns]
    words = _word_lengths([text for turn in turns for text in (turn.question, turn.answer)], unit, pieces).reshape(-1, 2)
    boxes = [[*turn.question.boxes, *turn.answer.boxes] for turn in turns]
    flat = np.fromiter(chain.from_iterable(boxes), np.int64)
    label_codes: dict[str, int] = {}
    asked = [turn.text if turn.task in ("detect", "absent") else None for turn in turns]
    refused = np.zeros(len(unit.records), np.bool_)
    refused[list(attempt.rejected)] = True
    reason_codes: dict[str, int] = {}
    first = np.full(len(unit.records), NO_CODE, np.int32)
    rejections: list[tuple[int, int, int]] = []
    examples: dict[str, list[str]] = {}
    for record, left_out in sorted(attempt.turns.items()):
        for turn, count in left_out:
            code = reason_codes.setdefault(turn.reason, len(reason_codes))
            rejections.append((record, code, count))
            if first[record] == NO_CODE:
                first[record] = code
            found = examples.setdefault(turn.reason, [])
            if len(found) < 3:
                found.append(f"{unit.records[record].position}: {turn.detail}")
    table = np.array(rejections, np.int32).reshape(-1, 3)
    return Texts(
        refused=refused,
        refusals=by_reason(attempt.rejected.values()),
        first_reasons=first,
        text_records=table[:, 0].copy(),
        text_reasons=table[:, 1].copy(),
        text_counts=table[:, 2].copy(),
        reason_names=list(reason_codes),
        reason_examples=examples,
        without_turns=_without_turns(judged, drafts, attempt),
        draft_records=np.array([draft.record for draft in drafts], np.int32),
        draft_ordered=np.array([draft.ordered for draft in drafts], np.bool_),
        draft_header=np.array([len(unit.header_ids(draft)) - unit.images_in_header(draft) for draft in drafts], np.int32),
        draft_suffixed=np.array([bool(draft.suffix) for draft in drafts], np.bool_),
        turn_offsets=offsets_of(np.fromiter((len(draft.turns) for draft in drafts), np.int64, len(drafts))),
        turn_tasks=np.array([TASK_NAMES.index(turn.task) for turn in turns], np.uint8),
        turn_question=words[:, 0].astype(np.int32),
        turn_answer=words[:, 1].astype(np.int32),
        turn_labels=np.array([NO_CODE if text is None else label_codes.setdefault(text, len(label_codes)) for text in asked], np.int32),
        labels=list(label_codes),
        turn_question_boxes=np.array([len(turn.question.boxes) for turn in turns], np.int32),
        box_offsets=offsets_of(np.fromiter(map(len, boxes), np.int64, len(boxes))),
        box_rows=place[flat].astype(np.int32),
    )


def _word_lengths(texts: Sequence[TextSpec], unit: UnitData, pieces: PieceTable) -> IntColumn:
    """(len(texts),) tokens of the gaps and separators of each text: all of it but the numbers, and image tokens apart."""
    separators = pieces.intern_separators(unit.frame.family.box_text.separators)
    pieces.encode_pending()
    ids = pieces.ids
    images = offsets_of((ids.values == unit.frame.image_token_id).astype(np.int64))
    own = ids.lengths - (images[ids.offsets[1:]] - images[ids.offsets[:-1]])
    counts = np.fromiter((len(text.gaps) for text in texts), np.int64, len(texts))
    gaps = np.fromiter(chain.from_iterable(text.gaps for text in texts), np.int64, int(counts.sum()))
    sums = offsets_of(own[gaps])
    borders = offsets_of(counts)
    return np.asarray(sums[borders[1:]] - sums[borders[:-1]] + (counts - 1) * int(own[separators].sum()))


def by_reason(rejected: Iterable[Rejected]) -> dict[str, Rejections]:
    """Counts and first examples of rejected records."""
    reasons: dict[str, Rejections] = {}
    for entry in rejected:
        reasons.setdefault(entry.reason, Rejections()).add(Rejections(1, [f"{entry.position}: {entry.detail}"]))
    return reasons


def _without_turns(judged: Judged, drafts: Sequence[Draft], attempt: Attempt) -> dict[str, Rejections]:
    """Records that are lost whatever the cutoff, as `Attempt.nothing_left` words it."""
    drafted = {draft.record for draft in drafts}
    lost = Attempt()
    lost.turns = attempt.turns
    for row, record in enumerate(judged.records):
        if row not in drafted and row not in attempt.rejected and row not in judged.ledger.rejected:
            lost.nothing_left(row, record)
    return by_reason(lost.rejected.values())


# ---- several units as one


def concat_things(parts: Sequence[Things]) -> Things:
    """The columns of neighbouring units, one after another."""
    if len(parts) == 1:
        return parts[0]
    codes: dict[str, int] = {}
    images = np.cumsum([0, *(len(part.paths) for part in parts)])
    return Things(
        num_read=sum(part.num_read for part in parts),
        sample_ids=list(chain.from_iterable(part.sample_ids for part in parts)),
        positions=list(chain.from_iterable(part.positions for part in parts)),
        splits=list(chain.from_iterable(part.splits for part in parts)),
        rejected=np.concatenate([part.rejected for part in parts]),
        reasons=_joined(part.reasons for part in parts),
        image_offsets=_joined_offsets([part.image_offsets for part in parts]),
        paths=list(chain.from_iterable(part.paths for part in parts)),
        sizes_wh=np.concatenate([part.sizes_wh for part in parts]),
        own_limits=np.concatenate([part.own_limits for part in parts]),
        box_references=_shifted([part.box_references for part in parts], images),
        boxes=np.concatenate([part.boxes for part in parts]),
        box_labels=_recoded([part.box_labels for part in parts], [part.labels for part in parts], codes),
        labels=list(codes),
        num_boxes_read=sum(part.num_boxes_read for part in parts),
        rules=_joined_findings(part.rules for part in parts),
        lint=_joined(part.lint for part in parts),
    )


def concat_texts(parts: Sequence[Texts], things: Sequence[Things]) -> Texts:
    """Likewise; things: of the same units, before they were joined."""
    if len(parts) == 1:
        return parts[0]
    labels: dict[str, int] = {}
    reasons: dict[str, int] = {}
    records = np.cumsum([0, *(one.num_records for one in things)])
    boxes = np.cumsum([0, *(len(one.boxes) for one in things)])
    examples: dict[str, list[str]] = {}
    for part in parts:
        for reason, found in part.reason_examples.items():
            examples[reason] = (examples.get(reason, []) + found)[:MAX_EXAMPLES]
    names = [part.reason_names for part in parts]
    return Texts(
        refused=np.concatenate([part.refused for part in parts]),
        refusals=_joined(part.refusals for part in parts),
        first_reasons=_recoded([part.first_reasons for part in parts], names, reasons),
        text_records=_shifted([part.text_records for part in parts], records),
        text_reasons=_recoded([part.text_reasons for part in parts], names, reasons),
        text_counts=np.concatenate([part.text_counts for part in parts]),
        reason_names=list(reasons),
        reason_examples=examples,
        without_turns=_joined(part.without_turns for part in parts),
        draft_records=_shifted([part.draft_records for part in parts], records),
        draft_ordered=np.concatenate([part.draft_ordered for part in parts]),
        draft_header=np.concatenate([part.draft_header for part in parts]),
        draft_suffixed=np.concatenate([part.draft_suffixed for part in parts]),
        turn_offsets=_joined_offsets([part.turn_offsets for part in parts]),
        turn_tasks=np.concatenate([part.turn_tasks for part in parts]),
        turn_question=np.concatenate([part.turn_question for part in parts]),
        turn_answer=np.concatenate([part.turn_answer for part in parts]),
        turn_labels=_recoded([part.turn_labels for part in parts], [part.labels for part in parts], labels),
        labels=list(labels),
        turn_question_boxes=np.concatenate([part.turn_question_boxes for part in parts]),
        box_offsets=_joined_offsets([part.box_offsets for part in parts]),
        box_rows=_shifted([part.box_rows for part in parts], boxes),
    )


def _joined_offsets(parts: Sequence[IntColumn]) -> IntColumn:
    return offsets_of(np.concatenate([np.diff(part) for part in parts]))


def _shifted(parts: Sequence[Small], starts: IntColumn) -> Small:
    return np.concatenate([part + np.int32(start) for part, start in zip(parts, starts.tolist(), strict=False)])


def _recoded(parts: Sequence[Small], names: Sequence[Sequence[str]], codes: dict[str, int]) -> Small:
    """Codes of each part's own names as codes of all names; NO_CODE stays."""
    recoded = []
    for part, own in zip(parts, names, strict=True):
        table = np.array([*(codes.setdefault(name, len(codes)) for name in own), NO_CODE], np.int32)
        recoded.append(table[part])  # NO_CODE is -1: the last
    return np.concatenate(recoded)


def _joined(parts: Iterable[dict[str, Rejections]]) -> dict[str, Rejections]:
    joined: dict[str, Rejections] = {}
    for part in parts:
        for reason, entry in part.items():
            joined.setdefault(reason, Rejections()).add(entry)
    return joined


def _joined_findings(parts: Iterable[dict[str, Finding]]) -> dict[str, Finding]:
    joined: dict[str, Finding] = {}
    for part in parts:
        for rule, entry in part.items():
            joined.setdefault(rule, Finding()).add(entry)
    return joined


# ---- on disk


def save(path: Path, columns: Things | Texts) -> None:
    """Write columns, atomically. Raises BoxcarError where the folder cannot be written."""
    data = msgspec.msgpack.encode(columns, enc_hook=_array_to_plain)
    with atomic_write(path) as stream:
        stream.write(xxhash.xxh3_128_digest(data) + data)


def load(path: Path, kind: type[Columns]) -> Columns:
    """Columns as they were written. Raises ShardError where the file is missing or damaged."""
    try:
        content = path.read_bytes()
        if xxhash.xxh3_128_digest(content[16:]) != content[:16]:
            raise ValueError("its content is not what its hash says")
        return msgspec.msgpack.decode(memoryview(content)[16:], type=kind, dec_hook=_plain_to_array)
    except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
        raise ShardError(
            str(path), found=f"columns that cannot be read ({error})", expected="the file as the audit wrote it", fix="Delete the folder."
        ) from error


def _array_to_plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, np.ascontiguousarray(value).data.cast("B") if value.size else b"")
    raise NotImplementedError(f"{type(value)} in columns")


def _plain_to_array(_kind: type[Any], value: Any) -> Any:
    name, shape, data = value
    return np.frombuffer(data, np.dtype(name)).reshape(shape)
