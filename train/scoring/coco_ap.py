"""COCO's average precision of scored turns, by faster-coco-eval (extra `eval`).

Average precision ranks boxes by their scores, and a language model's boxes have none. What stands in for them is part of the result:

| rule    | score of a box                                                    | what the number is                                       |
|---------|-------------------------------------------------------------------|----------------------------------------------------------|
| const   | 1                                                                 | about precision x recall, and it hangs on the order      |
| rank    | 1 - i / n for the i-th of the n boxes of a reply                  | the model's reading order taken for confidence           |
| logprob | mean log-probability of the tokens of its numbers                 | an average precision                                     |

The same 300 images with informative scores and with score 1: AP .389 and .260, AP50 .663 and .446 (precision x recall .424); under twelve
orders of the images, AP50 with score 1 went from .423 to .447. So numbers of different rules are not comparable, whoever published them.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from boxcar.pipelines.ragged import IntColumn
from boxcar.schemas.errors import ConfigError
from boxcar.train.scoring.questions import STRAY, FloatColumn, Questions, read_questions

ScoreRule = Literal["const", "rank", "logprob"]
MAX_DETS = (1, 10, 100)
"""Boxes of a label in an image that count, the best first. 100 must be among them: COCO's summary looks for it."""
STATS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large")
WARNINGS: dict[ScoreRule, str] = {
    "const": "Every box has the score 1: this is not an average precision. It is about precision x recall, a third below the AP of the "
    "same boxes with informative scores, and it changes with the order of the images.",
    "rank": "Boxes are ranked by their place in the reply, which the model was taught as a reading order: this is no confidence. Compare "
    "it only with numbers of the same rule.",
    "logprob": "",
}


@dataclass(frozen=True)
class CocoAP:
    """COCO's twelve numbers."""

    stats: dict[str, float | None]
    """By STATS, in [0, 1]; None where nothing true is there to be found (COCO's -1)."""
    rule: ScoreRule
    warning: str
    """What must be said beside the numbers; "" where nothing."""
    num_labels: int
    num_images: int
    """Images; one that is asked for the same label n times counts n times."""


def coco_ap(table: pa.Table, rule: ScoreRule) -> CocoAP:
    """AP and AR over every label of a table of `train.scoring.questions.SCORED_SCHEMA`, tasks detect, detect_joint and absent.

    Where a label is asked for twice in an image, the second question is about a copy of the image: its true boxes are not doubled. An
    absent object that gets boxes is a false positive where its label occurs elsewhere; a label that never occurs in the truth has no AP.
    Sizes are areas in pixels of the original, as COCO's, but of the box and not of the mask. Boxes of names that were not asked for are
    left out: they are of no category.

    Raises ConfigError where the extra is missing, where no question is about categories, or where the rule needs scores that were not
    kept; ShardError where the table does not fit together.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster  # noqa: PLC0415  an extra: the other metrics do without
    except ImportError as error:
        raise ConfigError("COCO AP", found="no faster-coco-eval", expected="the extra", fix="pip install 'boxcar-vl[eval]'") from error
    questions = _of_categories(table)
    truth, predictions = _as_coco(questions, rule)
    silent: dict[str, Any] = {"print_function": _say_nothing}
    coco_truth = COCO(truth, **silent)
    evaluation = COCOeval_faster(coco_truth, coco_truth.loadRes(predictions), "bbox", **silent)
    evaluation.params.maxDets = list(MAX_DETS)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    stats = {name: None if value < 0 else float(value) for name, value in zip(STATS, evaluation.stats[: len(STATS)], strict=True)}
    return CocoAP(stats, rule, WARNINGS[rule], len(truth["categories"]), len(truth["images"]))


def _say_nothing(*_: object) -> None:
    """The library prints its table unless it is given something else to print with."""


def _of_categories(table: pa.Table) -> Questions:
    tasks = pa.array(["detect", "detect_joint", "absent"])
    chosen = table.filter(pc.is_in(table["task"], value_set=tasks)) if "task" in table.schema.names else table
    if not chosen.num_rows:
        raise ConfigError(
            "COCO AP",
            found="no question about categories",
            expected="turns of detect, detect_joint or absent",
            fix="For phrases, see rec and grec.",
        )
    return read_questions(chosen)


def _as_coco(questions: Questions, rule: ScoreRule) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Truth and predictions in COCO's own form, ids from 1."""
    units = questions.units
    image_of_unit, size_of_image = _images(questions)
    truth_columns = (image_of_unit[units.truth_unit], units.label[units.truth_unit], _xywh(units.truth))
    truth = {
        "images": [{"id": number + 1, "width": width, "height": height} for number, (width, height) in enumerate(size_of_image.tolist())],
        "categories": [{"id": number + 1, "name": label} for number, label in enumerate(units.labels)],
        "annotations": [
            {"id": number + 1, "image_id": image + 1, "category_id": label + 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for number, (image, label, box) in enumerate(zip(*(column.tolist() for column in truth_columns), strict=True))
        ],
    }
    rows = np.flatnonzero(units.label[units.predicted_unit] != STRAY)
    unit = units.predicted_unit[rows]
    columns = (image_of_unit[unit], units.label[unit], _xywh(units.predicted[rows]), _scores(questions, rule)[units.predicted_row[rows]])
    predictions = [
        {"image_id": image + 1, "category_id": label + 1, "bbox": box, "score": value}
        for image, label, box, value in zip(*(column.tolist() for column in columns), strict=True)
    ]
    return truth, predictions


def _images(questions: Questions) -> tuple[IntColumn, IntColumn]:
    """(U,) image of each unit, the n-th question about a label in its n-th copy; (images, 2) width and height."""
    units = questions.units
    image = questions.codes("image")[0][units.question]
    order = np.lexsort((np.arange(len(image)), units.label, image))
    begins = np.flatnonzero(np.diff(image[order], prepend=-1).astype(bool) | np.diff(units.label[order], prepend=-2).astype(bool))
    copy = np.empty(len(image), np.int64)
    copy[order] = np.arange(len(image)) - np.repeat(begins, np.diff(begins, append=len(image)))
    _, first, place = np.unique(np.stack([image, copy], axis=1), axis=0, return_index=True, return_inverse=True)
    question = units.question[first]
    return place.reshape(-1), np.stack([questions.column("width")[question], questions.column("height")[question]], axis=1)


def _xywh(boxes: FloatColumn) -> FloatColumn:
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def _scores(questions: Questions, rule: ScoreRule) -> FloatColumn:
    """(M,) score of every box of the column predicted_boxes, in its order."""
    lengths = questions.lengths("predicted_boxes")
    total = int(lengths.sum())
    if rule == "const":
        return np.ones(total)
    if rule == "rank":
        starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
        return np.asarray(1 - (np.arange(total) - starts) / np.repeat(lengths, lengths))
    lists = questions.table["predicted_scores"]
    without = int(pc.sum(pc.and_(pc.is_null(lists), pa.array(lengths > 0))).as_py() or 0)
    if without:
        raise ConfigError(
            "COCO AP, rule logprob",
            found=f"{without} of {len(questions)} replies with boxes but without scores",
            expected="the mean log-probability of every box",
            fix="Evaluate again with log-probabilities kept, or choose the rule rank or const and say so.",
        )
    return np.asarray(pc.list_flatten(lists).to_numpy(zero_copy_only=False), np.float64)
