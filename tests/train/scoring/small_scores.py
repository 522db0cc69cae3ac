"""Scored turns that can be checked by hand: images of 100 x 100, seen by the model at that size."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from boxcar.train.scoring.questions import SCORED_SCHEMA

Box = Sequence[float]


def turn(
    truth: Sequence[Box] = (),
    predicted: Sequence[Box] = (),
    *,
    asked: str | Sequence[str] = "dog",
    truth_labels: Sequence[str] | None = None,
    predicted_labels: Sequence[str | None] | None = None,
    status: str | None = None,
    repairs: Sequence[str] = (),
    scores: Sequence[float] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A row of the table; where several labels are asked for, those of the boxes must be given."""
    labels = [asked] if isinstance(asked, str) else list(asked)
    if status is None:
        status = ("repaired" if repairs else "strict") if predicted else "none_found"
    row: dict[str, Any] = {
        "sample_id": "a",
        "turn": 0,
        "image": "a.jpg",
        "source": "coco",
        "task": "refer",
        "language": "en",
        "asked": labels,
        "width": 100,
        "height": 100,
        "resized_width": 100,
        "resized_height": 100,
        "truth_boxes": [list(map(float, box)) for box in truth],
        "truth_labels": list(truth_labels or labels[:1] * len(truth)),
        "predicted_boxes": [list(map(float, box)) for box in predicted],
        "predicted_labels": list(predicted_labels or [None] * len(predicted)),
        "predicted_scores": None if scores is None else list(map(float, scores)),
        "status": status,
        "repairs": list(repairs),
    }
    return row | more


def table(*turns: dict[str, Any]) -> pa.Table:
    """Rows that say nothing of their name or image get one of their own."""
    rows = [
        row | {name: f"{number:06d}" for name in ("sample_id", "image") if row[name] in ("a", "a.jpg")} for number, row in enumerate(turns)
    ]
    return pa.Table.from_pylist(rows, schema=SCORED_SCHEMA)
