"""How hard a turn is, offline, in [0, 1]: a weighted sum of features of its boxes and its words.

    size     how small the boxes are in visual tokens     rivals   boxes of the same label that must be left out
    overlap  largest IoU with another box of the image    words    length of the label or phrase
    many     number of boxes in the answer                thin     how far from square the boxes are

The raw score is written with each turn, and a histogram of 4096 bins for each task into the manifest: integer counts add exactly, so the
quantile of a score does not depend on how the data was cut. Weights and shapes are a choice, not a finding; `boxcar ablate` measures.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from boxcar.pipelines.boxes import geometry
from boxcar.pipelines.ragged import offsets_of

NUM_BINS = 4096
_WEIGHTS = {"size": 0.35, "rivals": 0.25, "overlap": 0.10, "words": 0.15, "many": 0.10, "thin": 0.05}

Column = npt.NDArray[np.float64]


def box_features(boxes_px: npt.NDArray[np.float64], images: npt.NDArray[np.int64], scale_to_tokens: npt.NDArray[np.float64]) -> Column:
    """(N, 3) size, overlap and thinness of each box, in [0, 1].

    boxes_px: (N, 4) in pixels of the original. images: (N,) image of each box, in any order. scale_to_tokens: (N, 2), visual tokens per
    pixel of the original, across and down.
    """
    sides = np.maximum(geometry.sides(boxes_px), 1e-9)
    side_tokens = np.sqrt((sides * scale_to_tokens).prod(axis=1))
    size = 1 - np.minimum(1, np.log2(1 + side_tokens) / np.log2(17))
    thin = np.minimum(1, np.abs(np.log(sides[:, 0] / sides[:, 1])) / np.log(8))
    overlap = np.zeros(len(boxes_px))
    order = np.argsort(images, kind="stable")
    first, second = geometry.pairs_within(images[order])
    np.maximum.at(overlap, order[first], geometry.iou_pairs(boxes_px[order[first]], boxes_px[order[second]]))
    return np.stack([size, overlap, thin], axis=1)


def turn_difficulty(features: Column, box_rows: Sequence[Sequence[int]], num_words: Column, num_rivals: Column) -> npt.NDArray[np.float32]:
    """(T,) float32 in [0, 1]. `box_rows`: rows of `features` for each turn; a turn without boxes has only its words."""
    counts = np.fromiter(map(len, box_rows), np.int64, len(box_rows))
    flat = np.fromiter((row for rows in box_rows for row in rows), np.int64, int(counts.sum()))
    has = counts > 0
    means = np.zeros((len(box_rows), 3))
    if len(flat):
        means[has] = np.add.reduceat(features[flat], offsets_of(counts)[:-1][has], axis=0) / counts[has, None]
    score = (
        _WEIGHTS["size"] * means[:, 0]
        + _WEIGHTS["overlap"] * means[:, 1]
        + _WEIGHTS["thin"] * means[:, 2]
        + _WEIGHTS["words"] * np.minimum(1, num_words / 20)
        + _WEIGHTS["rivals"] * np.minimum(1, np.log2(1 + num_rivals) / np.log2(17))
        + _WEIGHTS["many"] * np.minimum(1, np.log2(np.maximum(counts, 1)) / 5)
    )
    return np.asarray(np.clip(score, 0, 1), np.float32)


def bins(difficulty: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """(T,) bin of each score, 0..4095."""
    return np.minimum((difficulty.astype(np.float64) * NUM_BINS).astype(np.int64), NUM_BINS - 1)
