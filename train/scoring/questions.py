"""Scored turns: a question, the boxes that are true and the boxes that a reply gave, all in pixels of the original image.

    table (a row for each question)  ->  units (a row for each label that a question asks for)  ->  matched pairs

A question about one label is one unit, and every box of its reply belongs to it, whatever the reply calls it: some families name no labels.
A question about several labels is a unit for each; there a box must be named, and a box of a name that was not asked for is stray.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from boxcar.pipelines.boxes import geometry
from boxcar.pipelines.ragged import IntColumn, offsets_of
from boxcar.schemas.errors import ShardError
from boxcar.schemas.row import BOX
from boxcar.train.answering.parse import Status

FloatBoxes = npt.NDArray[np.float64]
FloatColumn = npt.NDArray[np.float64]
STRAY = -1
"""Code of a label that was not asked for."""


def _field(name: str, kind: pa.DataType, about: str, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"about": about})


def _list(item: pa.DataType, *, nullable: bool = False) -> pa.ListType:
    return pa.list_(pa.field("item", item, nullable=nullable))


SCORED_SCHEMA = pa.schema(
    [
        _field("sample_id", pa.string(), "of the row that the question is from"),
        _field("turn", pa.int32(), "number of the question within its row; with sample_id, its name"),
        _field("image", pa.string(), "key of the image, the same for all its questions: what the bootstrap draws"),
        _field("source", pa.string(), "name of the source"),
        _field("task", pa.string(), "detect, detect_joint, refer, absent, ..."),
        _field("language", pa.string(), "of the question"),
        _field("asked", _list(pa.string()), "labels or phrases asked for; empty where the answer is no boxes (captions): not scored here"),
        _field("width", pa.int32(), "pixels, upright after EXIF"),
        _field("height", pa.int32(), "pixels, upright after EXIF"),
        _field("resized_width", pa.int32(), "pixels that the model saw"),
        _field("resized_height", pa.int32(), "pixels that the model saw"),
        _field("truth_boxes", _list(BOX), "xyxy, pixels of the upright original image"),
        _field("truth_labels", _list(pa.string()), "of each true box; among `asked` where several were asked for"),
        _field("predicted_boxes", _list(BOX), "xyxy, pixels of the upright original image, in the order of the reply"),
        _field("predicted_labels", _list(pa.string(), nullable=True), "of each, as the reply names it; null where it does not"),
        _field(
            "predicted_scores",
            _list(pa.float64()),
            "of each: mean log-probability of the tokens of its numbers; null where they were not kept",
            nullable=True,
        ),
        _field("status", pa.string(), "how the reply was read: strict, repaired, none_found or failed"),
        _field("repairs", _list(pa.string()), "what was done to read it"),
    ],
    metadata={"boxcar.schema": "scored", "boxcar.version": "1"},
)


@dataclass(frozen=True, eq=False)
class Questions:
    """A checked table of questions that ask for boxes, ordered by image, sample and turn."""

    table: pa.Table
    num_left_out: int
    """Questions that ask for no boxes."""

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def column(self, name: str) -> npt.NDArray[Any]:
        """(N,) values of a column that holds no lists."""
        return np.asarray(self.table[name].to_numpy(zero_copy_only=False))

    def codes(self, name: str) -> tuple[IntColumn, list[str]]:
        """(N,) code of each value of a column of strings, and the values in their order."""
        values, codes = np.unique(self.column(name).astype(str), return_inverse=True)
        return codes.astype(np.int64), values.tolist()

    def lengths(self, name: str) -> IntColumn:
        """(N,) length of each list of a column."""
        return np.asarray(pc.list_value_length(self.table[name]).to_numpy(zero_copy_only=False), np.int64)

    def boxes(self, name: str) -> tuple[FloatBoxes, IntColumn]:
        """All boxes of a column, (M, 4), and the question of each, (M,)."""
        flat = pc.list_flatten(self.table[name]).combine_chunks()
        return flat.flatten().to_numpy().reshape(-1, 4).astype(np.float64), np.repeat(np.arange(len(self)), self.lengths(name))

    def strings(self, name: str) -> list[str | None]:
        """All strings of a column of lists, one after another."""
        return list(pc.list_flatten(self.table[name]).to_pylist())

    @cached_property
    def units(self) -> "Units":
        return _units(self)


def read_questions(table: pa.Table) -> Questions:
    """Check and order a table of SCORED_SCHEMA. Raises ShardError where it is another table, or does not fit together."""
    where = "scored turns"
    if not table.schema.equals(SCORED_SCHEMA):
        missing = [f"{field.name}: {field.type}" for field in SCORED_SCHEMA if field not in table.schema]
        raise ShardError(
            where,
            found=f"another schema; it lacks {'; '.join(missing) or 'the order of the columns'}",
            expected="train.scoring.questions.SCORED_SCHEMA",
        )
    asks = pc.greater(pc.list_value_length(table["asked"]), 0)
    boxes_wanted = table.filter(asks)
    if not boxes_wanted.num_rows:
        raise ShardError(
            where,
            found=f"{table.num_rows} questions, none that asks for boxes",
            expected="one at least",
            fix="Box metrics need turns of detect, detect_joint, refer or absent.",
        )
    ordered = boxes_wanted.sort_by([("image", "ascending"), ("sample_id", "ascending"), ("turn", "ascending")]).combine_chunks()
    questions = Questions(ordered, table.num_rows - ordered.num_rows)
    for boxes, labels in (
        ("truth_boxes", "truth_labels"),
        ("predicted_boxes", "predicted_labels"),
        ("predicted_boxes", "predicted_scores"),
    ):
        lengths = pc.list_value_length(ordered[labels]).to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero(~np.isnan(lengths.astype(np.float64)) & (lengths != questions.lengths(boxes)))
        if len(wrong):
            raise ShardError(
                _name(ordered, wrong[0]),
                found=f"{questions.lengths(boxes)[wrong[0]]} {boxes} and {int(lengths[wrong[0]])} {labels}",
                expected="as many",
            )
    for name in ("truth_boxes", "predicted_boxes"):
        boxes_px, question = questions.boxes(name)
        bad = np.flatnonzero(~np.isfinite(boxes_px).all(axis=1) | (geometry.sides(boxes_px) < 0).any(axis=1))
        if len(bad):
            raise ShardError(
                _name(ordered, question[bad[0]]), found=f"{name} with {boxes_px[bad[0]].tolist()}", expected="finite corners in order"
            )
    unknown = set(ordered["status"].to_pylist()) - set(get_args(Status))
    if unknown:
        raise ShardError(where, found=f"status {sorted(unknown)}", expected=f"one of {', '.join(get_args(Status))}")
    names = np.stack([questions.codes("sample_id")[0], questions.column("turn").astype(np.int64)], axis=1)
    if len(np.unique(names, axis=0)) != len(names):
        _, first, count = np.unique(names, axis=0, return_index=True, return_counts=True)
        raise ShardError(_name(ordered, first[count > 1][0]), found="this question more than once", expected="once")
    return questions


def _name(table: pa.Table, row: int) -> str:
    row = int(row)
    return f"{table['sample_id'][row].as_py()}, question {table['turn'][row].as_py()}"


@dataclass(frozen=True, eq=False)
class Units:
    """Questions about one label each, their boxes, and the pairs of boxes within a unit."""

    question: IntColumn
    """(U,) row of the table."""
    label: IntColumn
    """(U,) index into `labels`, or STRAY: a unit of the boxes that a reply gave to names that were not asked for."""
    labels: list[str]
    """In lower case, blanks evened."""
    truth: FloatBoxes
    """(T, 4), ordered by unit."""
    truth_unit: IntColumn
    predicted: FloatBoxes
    """(P, 4), ordered by unit, within it as in the reply."""
    predicted_unit: IntColumn
    predicted_row: IntColumn
    """(P,) place of each among all boxes of the table's column."""

    @property
    def num_truth(self) -> IntColumn:
        """(U,)"""
        return np.bincount(self.truth_unit, minlength=len(self.question))

    @property
    def num_predicted(self) -> IntColumn:
        """(U,)"""
        return np.bincount(self.predicted_unit, minlength=len(self.question))

    @cached_property
    def pairs(self) -> tuple[IntColumn, IntColumn]:
        """(predicted, truth) of every pair within a unit, by unit, then predicted, then truth."""
        per_predicted = self.num_truth[self.predicted_unit]
        predicted = np.repeat(np.arange(len(self.predicted)), per_predicted)
        within = np.arange(len(predicted)) - np.repeat(offsets_of(per_predicted)[:-1], per_predicted)
        return predicted, offsets_of(self.num_truth)[self.predicted_unit[predicted]] + within

    @cached_property
    def pair_iou(self) -> FloatColumn:
        """Of each pair."""
        predicted, truth = self.pairs
        return geometry.iou_pairs(self.predicted[predicted], self.truth[truth])

    def match(self, likeness: FloatColumn, least: float) -> tuple[FloatColumn, FloatColumn]:
        """Greedy one-to-one matching within units: the most alike pair first, then the next of what is left, down to `least`.

        likeness: of each pair; ties go to the box that the reply names first, then to the first true one. Returns the likeness of the
        match of each predicted box (P,) and of each true one (T,), -inf where it has none. Because pairs are taken from the most alike
        down, the matching at a higher threshold is the same one, cut there.
        """
        predicted, truth = self.pairs
        # A pair that comes first for both its boxes is what greedy takes next, wherever it stands: so all of those are taken at once.
        order = np.argsort(-likeness, kind="stable")
        order = order[likeness[order] >= least]
        of_predicted, of_truth = np.full(len(self.predicted), -np.inf), np.full(len(self.truth), -np.inf)
        while len(order):
            first = np.zeros(len(order), np.int8)
            for boxes in (predicted[order], truth[order]):
                first[np.unique(boxes, return_index=True)[1]] += 1
            taken = order[first == 2]
            of_predicted[predicted[taken]] = of_truth[truth[taken]] = likeness[taken]
            order = order[np.isneginf(of_predicted[predicted[order]]) & np.isneginf(of_truth[truth[order]])]
        return of_predicted, of_truth


def _units(questions: Questions) -> Units:
    asked, truth_names, predicted_names = (questions.strings(name) for name in ("asked", "truth_labels", "predicted_labels"))
    distinct = {name: " ".join(name.casefold().split()) for name in {*asked, *truth_names, *predicted_names} if name is not None}
    labels = sorted(set(distinct.values()))
    code_of = {label: code for code, label in enumerate(labels)}
    codes = {name: code_of[label] for name, label in distinct.items()}
    num_labels = len(labels)

    def code(names: list[str | None]) -> IntColumn:
        return np.fromiter((STRAY if name is None else codes[name] for name in names), np.int64, len(names))

    asked_question = np.repeat(np.arange(len(questions)), questions.lengths("asked"))
    keys = np.unique(asked_question * num_labels + code(asked))
    num_asked = np.bincount(keys // num_labels, minlength=len(questions))
    first_unit = offsets_of(num_asked)

    def unit_of(question: IntColumn, label: IntColumn) -> IntColumn:
        """The unit of each box, or STRAY."""
        key = question * num_labels + label
        place = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
        found = np.where((keys[place] == key) & (label != STRAY), place, STRAY)
        return np.where(num_asked[question] == 1, first_unit[question], found)

    truth, truth_question = questions.boxes("truth_boxes")
    truth_unit = unit_of(truth_question, code(truth_names))
    if (truth_unit == STRAY).any():
        row = int(np.flatnonzero(truth_unit == STRAY)[0])
        raise ShardError(
            _name(questions.table, truth_question[row]), found=f"a true box of {truth_names[row]!r}", expected="one of the labels asked for"
        )
    predicted, predicted_question = questions.boxes("predicted_boxes")
    predicted_unit = unit_of(predicted_question, code(predicted_names))
    stray = predicted_unit == STRAY
    stray_questions, stray_units = np.unique(predicted_question[stray], return_inverse=True)
    predicted_unit[stray] = len(keys) + stray_units
    order, truth_order = np.argsort(predicted_unit, kind="stable"), np.argsort(truth_unit, kind="stable")
    return Units(
        question=np.concatenate([keys // num_labels, stray_questions]),
        label=np.concatenate([keys % num_labels, np.full(len(stray_questions), STRAY)]),
        labels=labels,
        truth=truth[truth_order],
        truth_unit=truth_unit[truth_order],
        predicted=predicted[order],
        predicted_unit=predicted_unit[order],
        predicted_row=order,
    )
