"""Each question by itself: how well its boxes lie, and whether the reply is right. What pages show and raters are held against.

| of a question | definition                                                                                                      |
|---------------|-----------------------------------------------------------------------------------------------------------------|
| box IoU       | of a predicted box with the true box it is matched to (`questions.Units.match`), 0 where it has none               |
| IoU           | sum of the box IoUs / the larger of the two numbers of boxes; not defined where nothing true is there           |
| right         | as many boxes as are true, each matched at IoU >= .5; an absent object: no box, by a reply that could be read    |

With one true and one predicted box, IoU is their IoU, and right is IoU >= .5: RefCOCO's Acc@0.5.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from boxcar.pipelines.ragged import offsets_of
from boxcar.train.scoring.questions import SCORED_SCHEMA, FloatColumn, Units, read_questions

RIGHT_IOU = 0.5
_LEAST_IOU = 1e-9
"""Boxes that do not touch are no match."""


@dataclass(frozen=True, eq=False)
class Verdicts:
    """Columns over the rows of a table, in its order."""

    iou: FloatColumn
    """(N,) in [0, 1]; NaN where it is not defined."""
    right: npt.NDArray[np.int8]
    """(N,) 1 right, 0 wrong, -1 where the question asks for no boxes."""
    box_iou: list[list[float]]
    """For each row, the box IoU of each predicted box, in the order of the reply; [] where the question asks for no boxes."""


def verdicts(table: pa.Table) -> Verdicts:
    """The verdict on each row of a table with (at least) the columns of `train.scoring.questions.SCORED_SCHEMA`.

    Raises ShardError where the table does not fit together.
    """
    iou = np.full(table.num_rows, np.nan)
    right = np.full(table.num_rows, -1, np.int8)
    box_iou: list[list[float]] = [[] for _ in range(table.num_rows)]
    plain = table.select(SCORED_SCHEMA.names).cast(SCORED_SCHEMA)
    if not pc.any(pc.greater(pc.list_value_length(plain["asked"]), 0)).as_py():
        return Verdicts(iou, right, box_iou)
    questions = read_questions(plain)
    row_of = {name: row for row, name in enumerate(_names(plain))}
    rows = np.array([row_of[name] for name in _names(questions.table)])
    units = questions.units
    of_predicted, of_truth = units.match(units.pair_iou, _LEAST_IOU)
    of_predicted = np.maximum(of_predicted, 0.0)
    num_truth, num_predicted = questions.lengths("truth_boxes"), questions.lengths("predicted_boxes")
    most = np.maximum(num_truth, num_predicted)
    summed = np.bincount(_question(units, units.predicted_unit), of_predicted, minlength=len(questions))
    with np.errstate(invalid="ignore"):
        iou[rows] = np.where(num_truth > 0, summed / most, np.nan)
    num_matched = np.bincount(_question(units, units.truth_unit), of_truth >= RIGHT_IOU, minlength=len(questions))
    none_there = (num_truth == 0) & (questions.column("status") != "failed")
    right[rows] = (num_truth == num_predicted) & (num_matched == num_truth) & ((num_truth > 0) | none_there)
    in_order = np.empty(len(of_predicted))
    in_order[units.predicted_row] = of_predicted
    for row, values in zip(rows.tolist(), np.split(in_order, offsets_of(num_predicted)[1:-1]), strict=True):
        box_iou[row] = values.tolist()
    return Verdicts(iou, right, box_iou)


def _names(table: pa.Table) -> list[tuple[str, int]]:
    return list(zip(table["sample_id"].to_pylist(), table["turn"].to_pylist(), strict=True))


def _question(units: Units, unit: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The question of each box."""
    return np.asarray(units.question[unit], np.int64)
