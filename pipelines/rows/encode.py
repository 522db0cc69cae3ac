"""Turns + columns -> rows of the training schema. Pure: no file, no clock, no random number.

turns ──> pieces ──> ids, bytes (one gather)  ──> lengths ──> budget ──> Arrow table
              ^
boxes ──> model units (one rounding)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from boxcar.pipelines.boxes import difficulty
from boxcar.pipelines.boxes.rules import References, UnitBoxes
from boxcar.pipelines.families.patches import ResizedSizes
from boxcar.pipelines.ragged import IntColumn, Ragged, offsets_of
from boxcar.pipelines.rows.budget import Decision, DraftRow, SequenceRule, total_length
from boxcar.pipelines.tokens.compose import ComposedTexts, compose
from boxcar.pipelines.tokens.frame import Frame
from boxcar.pipelines.tokens.tokenizer import PieceTable
from boxcar.pipelines.turns.tasks import Turn
from boxcar.schemas.record import Record
from boxcar.schemas.row import IMAGE, ROW_SCHEMA, TURN
from boxcar.schemas.workflow import ConvertConfig


class Draft(msgspec.Struct, gc=False):
    """A row to be: the turns of one record that may share a sequence."""

    record: int
    """Row of the record within the unit."""
    suffix: str
    """Behind the record's id, where a record gives several drafts."""
    turns: list[Turn]
    ordered: bool


@dataclass(frozen=True)
class Sized:
    """The images of a unit as the family sees them; columns over `References`."""

    sizes: ResizedSizes
    size_wh: IntColumn
    """(M, 2) pixels of the upright originals."""
    resized_wh: IntColumn
    """(M, 2) pixels; 1 where refused."""


def resize_all(references: References, frame: Frame, max_pixels: IntColumn) -> Sized:
    """`max_pixels`: (M,) upper limit of each image, which a shrunk image has lower than the others."""
    sizes = frame.family.resize(references.width, references.height, *frame.limits.lowered(max_pixels))
    return Sized(
        sizes=sizes,
        size_wh=np.stack([references.width, references.height], axis=1),
        resized_wh=np.maximum(np.stack([sizes.width, sizes.height], axis=1), 1),
    )


@dataclass(frozen=True)
class UnitData:
    """Everything that is known of a unit when its turns are encoded."""

    config: ConvertConfig
    source: str
    """Name of the source, the first part of every sample id."""
    frame: Frame
    records: Sequence[Record]
    references: References
    boxes: UnitBoxes
    sized: Sized

    def num_images(self, record: int) -> int:
        return int(self.references.offsets[record + 1] - self.references.offsets[record])

    @cached_property
    def tokens_per_pixel(self) -> npt.NDArray[np.float64]:
        """(M, 2) visual tokens for one pixel of each original, across and down."""
        return np.asarray(self.sized.resized_wh / self.sized.size_wh / np.array(self.frame.family.resize.pixels_per_token))

    @cached_property
    def placeholder_offsets(self) -> IntColumn:
        """(M + 1,) running sum of the placeholders of all images."""
        sizes, extra = self.sized.sizes, self.frame.family.chat.extra_placeholders
        return offsets_of(np.where(sizes.refused, 0, sizes.visual_tokens + extra))

    def placeholders(self, record: int) -> int:
        """Placeholders of all images of a record."""
        first, last = self.references.offsets[record], self.references.offsets[record + 1]
        return int(self.placeholder_offsets[last] - self.placeholder_offsets[first])

    def images_in_header(self, draft: Draft) -> int:
        """An ordered dialogue has its images where its questions name them, unless the family puts every image first."""
        return 0 if draft.ordered and not self.frame.family.chat.one_question_per_image else self.num_images(draft.record)

    def header_ids(self, draft: Draft) -> list[int]:
        return self.frame.header_ids(self.records[draft.record].system, self.images_in_header(draft))


def side_in_tokens(unit: UnitData) -> npt.NDArray[np.float64]:
    """(N, 2) width and height of each box in visual tokens after the resize."""
    sides = unit.boxes.boxes[:, 2:] - unit.boxes.boxes[:, :2]
    return np.asarray(sides * unit.tokens_per_pixel[unit.boxes.reference])


@dataclass(frozen=True)
class Encoded:
    """All turns of all drafts of a unit, as columns over turns, in the order of the drafts."""

    texts: ComposedTexts
    """Question and answer of turn i are texts 2 i and 2 i + 1."""
    turn_offsets: IntColumn
    """(num_drafts + 1,)."""
    rows: list[DraftRow]
    difficulty: npt.NDArray[np.float32]


def encode_drafts(drafts: Sequence[Draft], unit: UnitData, pieces: PieceTable) -> Encoded:
    """Ids, bytes, lengths and difficulty of every turn."""
    boxes, sized, family = unit.boxes, unit.sized, unit.frame.family
    values = family.grid.quantise(boxes.boxes, sized.size_wh[boxes.reference], sized.resized_wh[boxes.reference])
    number_codes = pieces.intern_numbers(values, family.box_text.number_format)[:, family.box_text.order]
    separators = pieces.intern_separators(family.box_text.separators)
    pieces.encode_pending()
    turns = [turn for draft in drafts for turn in draft.turns]
    texts = compose([text for turn in turns for text in (turn.question, turn.answer)], number_codes, separators, pieces)
    turn_offsets = offsets_of(np.fromiter((len(draft.turns) for draft in drafts), np.int64, len(drafts)))
    # Image tokens that stand in questions are counted with the images.
    per_text = texts.num_tokens - texts.count(unit.frame.image_token_id)
    turn_tokens = per_text.reshape(-1, 2).sum(axis=1)
    rows = [
        DraftRow(
            header_and_images=len(unit.header_ids(draft)) - unit.images_in_header(draft) + unit.placeholders(draft.record),
            turn_tokens=turn_tokens[turn_offsets[number] : turn_offsets[number + 1]],
            ordered=draft.ordered,
        )
        for number, draft in enumerate(drafts)
    ]
    features = difficulty.box_features(boxes.boxes, boxes.reference, unit.tokens_per_pixel[boxes.reference])
    return Encoded(texts, turn_offsets, rows, _difficulty(turns, features))


def _difficulty(turns: Sequence[Turn], features: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    box_rows = [turn.answer.boxes or turn.question.boxes for turn in turns]
    num_words = np.fromiter((len(turn.text.split()) for turn in turns), np.float64, len(turns))
    num_rivals = np.fromiter((turn.num_rivals for turn in turns), np.float64, len(turns))
    return difficulty.turn_difficulty(features, box_rows, num_words, num_rivals)


def sequence_rule(frame: Frame, cutoff_len: int) -> SequenceRule:
    return SequenceRule(
        turn_open=len(frame.turn_open_ids),
        around_answer=len(frame.answer_open_ids) + len(frame.turn_close_ids),
        one_question_per_image=frame.family.chat.one_question_per_image,
        cutoff_len=cutoff_len,
    )


@dataclass(frozen=True)
class EmbeddedImages:
    """Where the images of a unit lie, if they are embedded: columns over `References`."""

    shard: int
    rows: IntColumn
    """(M,) row within the image shard; -1 where not embedded."""


def build_table(
    drafts: Sequence[Draft], decisions: Sequence[Decision], encoded: Encoded, unit: UnitData, embedded: EmbeddedImages | None
) -> pa.Table:
    """The rows that the decisions leave, in the order of the drafts."""
    chosen = [(number, part) for number, decision in enumerate(decisions) for part in decision.parts]
    record_rows = np.fromiter((drafts[number].record for number, _ in chosen), np.int64, len(chosen))
    records = [unit.records[row] for row in record_rows.tolist()]
    turn_rows = np.fromiter((encoded.turn_offsets[number] + turn for number, part in chosen for turn in part), np.int64)
    turn_offsets = offsets_of(np.fromiter((len(part) for _, part in chosen), np.int64, len(chosen)))
    headers = [unit.header_ids(drafts[number]) for number, _ in chosen]
    columns: dict[str, pa.Array] = {
        "sample_id": pa.array(_sample_ids(drafts, decisions, unit), pa.string()),
        "source": pa.array([unit.source] * len(chosen), pa.string()),
        "split": pa.array([record.split or unit.config.split for record in records], pa.string()),
        "position": pa.array([record.position for record in records], pa.string()),
        "images": _images_column(record_rows, unit, embedded),
        "turns": _lists(turn_offsets, _turns_column(turn_rows, drafts, encoded, unit), ROW_SCHEMA.field("turns").type),
        "ordered": pa.array([drafts[number].ordered for number, _ in chosen], pa.bool_()),
        "header_ids": _lists(
            offsets_of(np.fromiter(map(len, headers), np.int64, len(headers))),
            pa.array(np.fromiter(chain.from_iterable(headers), np.int32)),
            ROW_SCHEMA.field("header_ids").type,
        ),
        **_length_columns(chosen, drafts, encoded, unit),
    }
    return pa.table([columns[field.name] for field in ROW_SCHEMA], schema=ROW_SCHEMA)


def _sample_ids(drafts: Sequence[Draft], decisions: Sequence[Decision], unit: UnitData) -> list[str]:
    ids = []
    for draft, decision in zip(drafts, decisions, strict=True):
        stem = f"{unit.source}/{unit.records[draft.record].record_id}{draft.suffix}"
        several = len(decision.parts) > 1
        ids += [f"{stem}#{part}" if several else stem for part in range(len(decision.parts))]
    return ids


def _length_columns(
    chosen: Sequence[tuple[int, list[int]]], drafts: Sequence[Draft], encoded: Encoded, unit: UnitData
) -> dict[str, pa.Array]:
    rule = sequence_rule(unit.frame, unit.config.cutoff_len)
    lengths = np.zeros((len(chosen), 5), np.int32)
    for place, (number, part) in enumerate(chosen):
        row = encoded.rows[number]
        visual = unit.placeholders(drafts[number].record)
        total = total_length(row, part, rule)
        paid_visual = visual * len(part) if rule.one_question_per_image else visual
        longest = row.header_and_images + int(row.turn_tokens[part].max()) + rule.around_answer
        alone = total if row.ordered and not rule.one_question_per_image else longest
        lengths[place] = row.header_and_images - visual, visual, total - paid_visual, total, alone
    names = ("header_tokens", "visual_tokens", "text_tokens", "total_tokens", "max_turn_tokens")
    return {name: pa.array(np.ascontiguousarray(lengths[:, place])) for place, name in enumerate(names)}


def _lists(offsets: IntColumn, values: pa.Array, kind: pa.DataType) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values, type=kind)


def _structs(kind: pa.StructType, columns: dict[str, pa.Array]) -> pa.Array:
    return pa.StructArray.from_arrays([columns[field.name] for field in kind], fields=list(kind))


def _strings(rows: Ragged[np.uint8]) -> pa.Array:
    offsets = pa.py_buffer(rows.offsets.astype(np.int32))
    return pa.StringArray.from_buffers(len(rows), offsets, pa.py_buffer(np.ascontiguousarray(rows.values)))


def _images_column(record_rows: IntColumn, unit: UnitData, embedded: EmbeddedImages | None) -> pa.Array:
    references, sized = unit.references, unit.sized
    counts = references.offsets[record_rows + 1] - references.offsets[record_rows]
    offsets = offsets_of(counts)
    rows = np.repeat(references.offsets[record_rows] - offsets[:-1], counts) + np.arange(offsets[-1])
    referenced = embedded is None
    orientation = np.array([getattr(references.headers[row], "orientation", 1) for row in rows.tolist()], np.int8)
    ints = {
        "width": references.width[rows],
        "height": references.height[rows],
        "resized_width": sized.sizes.width[rows],
        "resized_height": sized.sizes.height[rows],
        "grid_t": np.ones(len(rows)),
        "grid_h": sized.sizes.grid_h[rows],
        "grid_w": sized.sizes.grid_w[rows],
        "visual_tokens": sized.sizes.visual_tokens[rows],
    }
    columns = {name: pa.array(values.astype(np.int32)) for name, values in ints.items()}
    columns["orientation"] = pa.array(orientation)
    columns["path"] = pa.array([references.paths[row] if referenced else None for row in rows.tolist()], pa.string())
    columns["shard"] = pa.array([None if embedded is None else embedded.shard] * len(rows), pa.int32())
    columns["shard_row"] = pa.nulls(len(rows), pa.int32()) if embedded is None else pa.array(embedded.rows[rows].astype(np.int32))
    return _lists(offsets, _structs(IMAGE, columns), ROW_SCHEMA.field("images").type)


def _turns_column(turn_rows: IntColumn, drafts: Sequence[Draft], encoded: Encoded, unit: UnitData) -> pa.Array:
    every = [turn for draft in drafts for turn in draft.turns]
    turns = [every[row] for row in turn_rows.tolist()]
    texts = encoded.texts
    questions, answers = 2 * turn_rows, 2 * turn_rows + 1
    prompt_ids, answer_ids = texts.ids(questions), texts.ids(answers)
    flags = Ragged(texts.is_coordinate(answers), answer_ids.offsets)
    box_rows = [turn.question.boxes + turn.answer.boxes for turn in turns]
    flat_rows = np.fromiter(chain.from_iterable(box_rows), np.int64)
    weights = {task: getattr(unit.config.tasks, task).weight for task in type(unit.config.tasks).model_fields}

    def ids_lists(ids: Ragged[Any], name: str) -> pa.Array:
        return _lists(ids.offsets, pa.array(ids.values), TURN.field(name).type)

    columns = {
        "task": pa.array([turn.task for turn in turns], pa.string()),
        "language": pa.array([turn.language for turn in turns], pa.string()),
        "question": _strings(texts.utf8(questions)),
        "answer": _strings(texts.utf8(answers)),
        "prompt_ids": ids_lists(prompt_ids, "prompt_ids"),
        "answer_ids": ids_lists(answer_ids, "answer_ids"),
        "answer_is_coordinate": ids_lists(flags, "answer_is_coordinate"),
        "boxes": _boxes_column(box_rows, flat_rows, unit.boxes),
        "labels": _lists(
            offsets_of(np.fromiter((len(turn.labels) for turn in turns), np.int64, len(turns))),
            pa.array([label for turn in turns for label in turn.labels], pa.string()),
            TURN.field("labels").type,
        ),
        "image_index": pa.array(_image_index(box_rows, unit), pa.int32()),
        "difficulty": pa.array(encoded.difficulty[turn_rows]),
        "weight": pa.array(np.array([weights[turn.task] for turn in turns], np.float32)),
    }
    return _structs(TURN, columns)


def _boxes_column(box_rows: Sequence[Sequence[int]], flat_rows: IntColumn, boxes: UnitBoxes) -> pa.Array:
    kind = TURN.field("boxes").type
    items = pa.FixedSizeListArray.from_arrays(pa.array(boxes.boxes[flat_rows].ravel()), type=kind.value_type)
    return _lists(offsets_of(np.fromiter(map(len, box_rows), np.int64, len(box_rows))), items, kind)


def _image_index(box_rows: Sequence[Sequence[int]], unit: UnitData) -> list[int]:
    within = unit.boxes.reference - unit.references.offsets[unit.boxes.record]
    result = []
    for rows in box_rows:
        first = int(within[rows[0]]) if rows else -1
        # Only a dialogue may have boxes of several images in one turn.
        result.append(first if all(within[row] == first for row in rows[1:]) else -1)
    return result
