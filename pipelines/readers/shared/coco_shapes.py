"""COCO annotations without a bbox: their box is the hull of their segmentation.

    [[x0, y0, x1, y1, ...], ...]   polygons, pixels          minimum and maximum of the corners
    {"size": [h, w], "counts"}     run lengths, by columns   the pixels that are set, half-open; counts as a list or as COCO's string

Only annotations whose bbox is missing, null or empty come here, so that all others cost nothing.
"""

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from boxcar.pipelines.readers.shared.json_blocks import decode_element

XYWH = tuple[float, float, float, float]


class ShapedAnnotation(msgspec.Struct):
    """One of `annotations` with a segmentation and no box."""

    image_id: int | str
    category_id: int | str
    segmentation: Any
    bbox: list[float] | None = None
    id: int | str = ""
    iscrowd: bool | int | float | None = 0
    ignore: bool | int | float | None = 0


_DECODER = msgspec.json.Decoder(list[ShapedAnnotation])


def decode_shaped(text: str) -> ShapedAnnotation | None:
    """The annotation, if it has a segmentation and no box; None where the text is not such an element."""
    try:
        shaped = decode_element(text.encode(), _DECODER)[0]
    except (msgspec.DecodeError, UnicodeEncodeError):
        return None
    return None if shaped.bbox else shaped


def hull_xywh(segmentation: Any) -> XYWH | None:
    """[x, y, width, height] in pixels around a segmentation; None where it cannot be read or covers nothing."""
    if isinstance(segmentation, dict):
        return _run_length_hull(segmentation)
    if not isinstance(segmentation, list) or not segmentation:
        return None
    rings = segmentation if isinstance(segmentation[0], list) else [segmentation]
    try:
        corners = np.concatenate([np.asarray(ring, np.float64).reshape(-1, 2) for ring in rings if ring])
    except (ValueError, TypeError):
        return None
    if not len(corners) or not np.isfinite(corners).all():
        return None
    (x, y), (right, bottom) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
    return (x, y, right - x, bottom - y) if right > x and bottom > y else None


def _run_length_hull(encoded: dict[str, Any]) -> XYWH | None:
    """Runs of 0 and 1 by turns, down one column after another (cocoapi, maskApi.c rleToBbox)."""
    counts, size = encoded.get("counts"), encoded.get("size")
    try:
        height = int(size[0])  # type: ignore[index]
        runs = _counts_of(counts) if isinstance(counts, str) else np.asarray(counts, np.int64)
    except (TypeError, ValueError, IndexError):
        return None
    if height <= 0 or runs.ndim != 1 or (runs < 0).any():
        return None
    stops = np.cumsum(runs)[1::2]
    lengths = runs[1::2]
    starts, stops = (stops - lengths)[lengths > 0], stops[lengths > 0] - 1
    if not len(starts):
        return None
    first_column, last_column = int(starts.min() // height), int(stops.max() // height)
    one_column = starts // height == stops // height
    top, bottom = (int((starts % height).min()), int((stops % height).max())) if one_column.all() else (0, height - 1)
    return float(first_column), float(top), float(last_column - first_column + 1), float(bottom - top + 1)


def _counts_of(text: str) -> npt.NDArray[np.int64]:
    """COCO's string of run lengths: 5 bits a character from "0" on, the sixth says that more follow, from the third run on as differences
    to the run before the last (cocoapi, maskApi.c rleFrString). Raises ValueError where it is not one."""
    counts: list[int] = []
    value = shift = 0
    for code in text.encode("ascii"):
        bits = code - 48
        if not 0 <= bits < 64:
            raise ValueError("a character outside the code")
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            if bits & 0x10:
                value -= 1 << shift
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = shift = 0
    if shift:
        raise ValueError("the string ends within a number")
    return np.array(counts, np.int64)
