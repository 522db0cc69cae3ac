"""`boxcar.tokens`, `boxcar.parse` and `boxcar.score`: what an image costs, what a reply says, how good boxes are. Need no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from boxcar.pipelines.families.catalog import find_family
from boxcar.pipelines.tokens.frame import resolve_limits
from boxcar.schemas.errors import ConfigError
from boxcar.train.answering import parse as replies
from boxcar.train.answering.parse import Status
from boxcar.train.scoring import score as metrics
from boxcar.train.scoring.questions import SCORED_SCHEMA
from boxcar.train.scoring.score import Results

Boxes = Sequence[Sequence[float]] | npt.NDArray[np.floating] | npt.NDArray[np.integer]
"""(N, 4), xyxy."""
UNNAMED = "object"
"""What a question asks for where no labels are given."""


@dataclass(frozen=True)
class ImageTokens:
    """What an image of one size costs."""

    resized_width: int
    """Pixels that the model sees."""
    resized_height: int
    grid_thw: tuple[int, int, int]
    """Patches: time, height, width."""
    num_visual_tokens: int
    """Tokens that carry the image."""
    num_tokens: int
    """With the tokens that open and close the image."""


def tokens(
    family: str, width: int, height: int, *, image_min_pixels: int | None = None, image_max_pixels: int | None = None
) -> ImageTokens:
    """Size in pixels -> resized size, patch grid and number of tokens, by the family's own resize rule (see `boxcar families`).

    width, height: pixels of the image, upright after EXIF, at least 1. image_min_pixels, image_max_pixels: limits of width * height; None:
    those of the published checkpoint. Raises ConfigError for an unknown family, for limits that it cannot meet, and for a size that it
    refuses (an aspect ratio above 200 in the Qwen families).

        boxcar.tokens("qwen2_5_vl", 1920, 1080, image_max_pixels=1003520).num_visual_tokens
    """
    known = find_family(family)
    limits = resolve_limits(known, image_min_pixels, image_max_pixels)
    if min(width, height) < 1:
        raise ConfigError(f"{width}x{height}", found="a side without pixels", expected="at least 1x1")
    sizes = known.resize(np.array([width], np.int64), np.array([height], np.int64), limits.min_pixels, limits.max_pixels)
    if sizes.refused[0]:
        raise ConfigError(f"{width}x{height}", found="a size that the family refuses", expected=known.resize.description)
    count = int(sizes.visual_tokens[0])
    grid = (1, int(sizes.grid_h[0]), int(sizes.grid_w[0]))
    return ImageTokens(int(sizes.width[0]), int(sizes.height[0]), grid, count, count + known.chat.boundary_tokens)


@dataclass(frozen=True, eq=False)
class Reply:
    """What a model's reply says."""

    boxes_xyxy_px: npt.NDArray[np.float64]
    """(N, 4) float64, pixels of the original image, within it, corners in order; in the order of the reply."""
    labels: tuple[str | None, ...]
    """(N,) as the reply names them; None where it does not."""
    points_xy_px: npt.NDArray[np.float64]
    """(M, 2) float64, pixels of the original image: what the reply marks as points."""
    point_labels: tuple[str | None, ...]
    """(M,)"""
    status: Status
    """strict: in the family's own form. repaired: boxes, after `repairs`. none_found: it says that nothing is there. failed: neither."""
    repairs: tuple[str, ...]
    """Names of what was repaired, in order; boxcar.train.answering.parse lists them."""


def parse(
    text: str,
    family: str,
    size: tuple[int, int],
    *,
    image_min_pixels: int | None = None,
    image_max_pixels: int | None = None,
) -> Reply:
    """A model's reply -> boxes in pixels of the original image. Takes any text; linear in its length.

    text: the reply without the prompt; with its special tokens where the family writes boxes by such (Qwen2-VL, Qwen-VL). size: (width,
    height) of the original image in pixels, upright after EXIF. image_min_pixels, image_max_pixels: the limits under which the model saw
    the image; for families that count in pixels of the resized image (Qwen2.5-VL) other limits give other boxes. None: the published ones.
    Raises ConfigError as `tokens` does.

        boxcar.parse('[{"bbox_2d": [10, 20, 300, 200], "label": "cat"}]', "qwen2_5_vl", (640, 480)).boxes_xyxy_px
    """
    known = find_family(family)
    cost = tokens(family, *size, image_min_pixels=image_min_pixels, image_max_pixels=image_max_pixels)
    resized = (cost.resized_width, cost.resized_height)
    found = replies.parse(text, known, resized)
    return Reply(
        boxes_xyxy_px=replies.to_original_px(found.boxes, known.grid, size, resized),
        labels=found.labels,
        points_xy_px=replies.points_to_original_px(found.points, known.grid, size, resized),
        point_labels=found.point_labels,
        status=found.status,
        repairs=found.repairs,
    )


def score(
    truth_boxes: Sequence[Boxes],
    predicted_boxes: Sequence[Boxes],
    *,
    truth_labels: Sequence[Sequence[str]] | None = None,
    predicted_labels: Sequence[Sequence[str | None]] | None = None,
    asked: Sequence[Sequence[str]] | None = None,
    images: Sequence[str] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Results:
    """Box metrics with 95 % intervals, as `boxcar evaluate` prints them: the sections rec, objects and grec of boxcar.train.scoring.score.

    One entry for each of Q questions. truth_boxes, predicted_boxes: Q times (N, 4), xyxy, pixels (any one unit); an empty list: nothing is
    there, or nothing was found. truth_labels, predicted_labels: Q times (N,); without them a question asks for one thing, and all its
    boxes are of that thing. asked: Q times the labels asked for, among them those of absent objects; default: the labels of the truth.
    images: Q keys of images; questions about one image stand and fall together in the bootstrap. Default: each question has an image of its
    own. draws: of the bootstrap; 0 leaves out the intervals. A question without a predicted box counts as the answer "not there".

    Raises ConfigError where the lists do not fit together, ShardError where a box has no finite corners in order.

        results = boxcar.score([[[0, 0, 10, 10]]], [[[0, 0, 10, 9]]])
        results.value("rec", "mean_iou")         # 0.9
        results.value("objects", "f1_50")        # 1.0
    """
    num = len(truth_boxes)
    truth, predicted = list(map(_box_rows, truth_boxes)), list(map(_box_rows, predicted_boxes))
    if asked is None:
        asked = [list(dict.fromkeys(labels)) or [UNNAMED] for labels in truth_labels] if truth_labels is not None else [[UNNAMED]] * num
    if truth_labels is None:
        if several := [labels for labels in asked if len(labels) != 1]:
            raise ConfigError(
                "truth_labels", found=f"nothing, and {len(several[0])} labels asked for", expected="a label for each true box"
            )
        truth_labels = [list(labels) * len(boxes) for labels, boxes in zip(asked, truth, strict=False)]
    if predicted_labels is None:
        predicted_labels = [[None] * len(boxes) for boxes in predicted]
    keys = list(map(str, range(num) if images is None else images))
    lists = {
        "predicted_boxes": predicted,
        "truth_labels": truth_labels,
        "predicted_labels": predicted_labels,
        "asked": asked,
        "images": keys,
    }
    for name, entries in lists.items():
        if len(entries) != num:
            raise ConfigError(name, found=f"{len(entries)} entries", expected=f"{num}, one for each question of truth_boxes")
    columns: dict[str, Sequence[Any]] = {
        "sample_id": list(map(str, range(num))),
        "image": keys,
        "asked": list(map(list, asked)),
        "truth_boxes": truth,
        "truth_labels": list(map(list, truth_labels)),
        "predicted_boxes": predicted,
        "predicted_labels": list(map(list, predicted_labels)),
        "predicted_scores": [None] * num,
        "status": ["strict" if boxes else "none_found" for boxes in predicted],
        "repairs": [[]] * num,
    }
    # The rest decides no metric that is returned: sizes are those of the boxes as they are given.
    columns |= {"turn": [0] * num} | dict.fromkeys(("source", "task", "language"), ["-"] * num)
    columns |= dict.fromkeys(("width", "height", "resized_width", "resized_height"), [1] * num)
    table = pa.table({field.name: columns[field.name] for field in SCORED_SCHEMA}, SCORED_SCHEMA)
    results = metrics.score(table, draws=draws, seed=seed)
    of_boxes = [measure for measure in results.measures if measure.section != "format" and measure.by in ("all", "size")]
    return replace(results, measures=tuple(of_boxes))


def _box_rows(boxes: Boxes) -> list[list[float]]:
    rows = np.asarray(boxes, np.float64)
    if rows.size and (rows.ndim != 2 or rows.shape[1] != 4):
        raise ConfigError("boxes", found=f"an array of shape {rows.shape}", expected="(N, 4), each [x0, y0, x1, y1]")
    found: list[list[float]] = rows.reshape(-1, 4).tolist()
    return found
