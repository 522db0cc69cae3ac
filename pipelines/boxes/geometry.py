"""Box arithmetic on columns. Boxes are (N, 4) float64, xyxy, half-open, x to the right and y down; sizes are (N, 2), width and height.

Imports nothing of ours.
"""

import numpy as np
import numpy.typing as npt

FloatBoxes = npt.NDArray[np.float64]
Sizes = npt.NDArray[np.float64]
Column = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


def scale(boxes: FloatBoxes, factors_wh: Sizes) -> FloatBoxes:
    """Multiply x by the first factor and y by the second, row by row."""
    factors: FloatBoxes = np.concatenate([factors_wh, factors_wh], axis=1)
    return boxes * factors


def order_corners(boxes: FloatBoxes) -> FloatBoxes:
    """x0 <= x1 and y0 <= y1."""
    return np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1)


def clip(boxes: FloatBoxes, sizes_wh: Sizes) -> FloatBoxes:
    """Into [0, width] x [0, height]."""
    return np.clip(boxes, 0, np.concatenate([sizes_wh, sizes_wh], axis=1))


def sides(boxes: FloatBoxes) -> Sizes:
    """(N, 2) width and height; negative where the corners are swapped."""
    return boxes[:, 2:] - boxes[:, :2]


def area(boxes: FloatBoxes) -> Column:
    """(N,); 0 where a side is not positive."""
    # Column by column: a product over an axis of two is several times slower.
    return np.maximum(boxes[:, 2] - boxes[:, 0], 0) * np.maximum(boxes[:, 3] - boxes[:, 1], 0)


def inside_fraction(boxes: FloatBoxes, sizes_wh: Sizes) -> Column:
    """(N,) in [0, 1]: share of each box's area that lies in its image; 0 for a box without area."""
    whole = area(boxes)
    return np.divide(area(clip(boxes, sizes_wh)), whole, out=np.zeros_like(whole), where=whole > 0)


def _intersection(first: FloatBoxes, second: FloatBoxes) -> Column:
    width = np.minimum(first[:, 2], second[:, 2]) - np.maximum(first[:, 0], second[:, 0])
    height = np.minimum(first[:, 3], second[:, 3]) - np.maximum(first[:, 1], second[:, 1])
    return np.asarray(np.maximum(width, 0) * np.maximum(height, 0))


def iou_pairs(first: FloatBoxes, second: FloatBoxes) -> Column:
    """(N,) intersection over union of row with row; 0 where the union is empty."""
    intersection = _intersection(first, second)
    union = area(first) + area(second) - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)


def giou_pairs(first: FloatBoxes, second: FloatBoxes) -> Column:
    """(N,) generalised IoU of row with row, in [-1, 1]: IoU less the share of the enclosing box that neither covers (Rezatofighi 2019)."""
    union = area(first) + area(second) - _intersection(first, second)
    hull = area(np.concatenate([np.minimum(first[:, :2], second[:, :2]), np.maximum(first[:, 2:], second[:, 2:])], axis=1))
    return np.asarray(iou_pairs(first, second) - np.divide(hull - union, hull, out=np.zeros_like(hull), where=hull > 0))


def to_upright(boxes: FloatBoxes, stored_wh: Sizes, orientation: npt.NDArray[np.integer]) -> FloatBoxes:
    """Boxes in the frame of the stored pixels -> frame of the upright image, as EXIF orientation 1..8 turns it.

    stored_wh: size before turning. Equals what PIL.ImageOps.exif_transpose does to the pixels.
    """
    x, y = boxes[:, 0::2], boxes[:, 1::2]
    across, down = stored_wh[:, :1] - x, stored_wh[:, 1:] - y
    turned = {1: (x, y), 2: (across, y), 3: (across, down), 4: (x, down), 5: (y, x), 6: (down, x), 7: (down, across), 8: (y, across)}
    result = boxes.copy()
    for code, (new_x, new_y) in turned.items():
        rows = orientation == code
        if code == 1 or not rows.any():
            continue
        corners = np.stack([new_x[rows, 0], new_y[rows, 0], new_x[rows, 1], new_y[rows, 1]], axis=1)
        # A turn by itself swaps corners; a box that was swapped before stays recognisable as such.
        was_ordered = (boxes[rows, 0] <= boxes[rows, 2]) & (boxes[rows, 1] <= boxes[rows, 3])
        result[rows] = np.where(was_ordered[:, None], order_corners(corners), corners)
    return result


def pairs_within(groups: npt.NDArray[np.integer]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(i, j) of all ordered pairs i != j of the same group; `groups` (N,) ascending."""
    if not len(groups):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]])
    counts = np.diff(np.r_[starts, len(groups)])
    start_of, count_of = np.repeat(starts, counts), np.repeat(counts, counts)
    first = np.repeat(np.arange(len(groups)), count_of)
    within = np.arange(len(first)) - np.repeat(np.cumsum(count_of) - count_of, count_of)
    second = np.repeat(start_of, count_of) + within
    different = first != second
    return first[different], second[different]
