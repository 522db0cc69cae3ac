"""Positions of the tokens of one document, by the family's rule. Pure numpy, computed before packing: every document begins at 0.

    text text [ image 2 x 3 ] text        mrope (Qwen2-VL and later), shared_image (CogVLM), sequential (Qwen-VL v1)

    mrope          text 0 1  2 3 4 5 6 7  8        row 0: what transformers 5 finds the borders of packed documents by
                   t    0 1  2 2 2 2 2 2  5        an image begins where the text stopped and
                   h    0 1  2 2 2 3 3 3  5        takes max(height, width) of its merged grid
                   w    0 1  2 3 4 2 3 4  5
    shared_image        0 1  2 3 3 3 3 4  5        boi, one position for all patches, eoi
    sequential          0 1  2 3 4 5 6 7  8

Checked against get_rope_index of transformers 5.23 and build_position_ids of modeling_cogvlm.py (golden tables in the tests).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from boxcar.pipelines.families.family import PositionRule

Positions = npt.NDArray[np.int64]

NUM_ROWS: "dict[PositionRule, int]" = {"mrope": 4, "shared_image": 1, "sequential": 1}
"""Rows of positions that each rule gives."""


@dataclass(frozen=True)
class Placed:
    """An image within a document."""

    start: int
    """Place of its first placeholder."""
    num_placeholders: int
    """All of them, boi and eoi included where they are features."""
    merged_hw: tuple[int, int]
    """Grid of visual tokens; its product is the number of placeholders without boi and eoi (mrope reads it, the others do not)."""


def positions_of(rule: "PositionRule", length: int, images: Sequence[Placed]) -> Positions:
    """(P, length) int64, P of NUM_ROWS. `images`: in the order of their placeholders, `length` counts these as well."""
    if rule == "mrope":
        return _mrope(length, images)
    if rule == "shared_image":
        return _shared_image(length, images)
    return np.arange(length, dtype=np.int64)[None]


def _mrope(length: int, images: Sequence[Placed]) -> Positions:
    result = np.empty((4, length), np.int64)
    result[0] = np.arange(length)
    place = position = 0
    for image in images:
        height, width = image.merged_hw
        assert height * width == image.num_placeholders, "with M-RoPE every placeholder is a visual token"
        text = image.start - place
        result[1:, place : image.start] = np.arange(position, position + text)
        position += text
        stop = image.start + image.num_placeholders
        result[1, image.start : stop] = position
        result[2, image.start : stop] = np.repeat(np.arange(position, position + height), width)
        result[3, image.start : stop] = np.tile(np.arange(position, position + width), height)
        position += max(height, width)
        place = stop
    result[1:, place:] = np.arange(position, position + length - place)
    return result


def _shared_image(length: int, images: Sequence[Placed]) -> Positions:
    steps = np.ones(length, np.int64)
    for image in images:
        # Patches after the first stand still: boi, patches and eoi take three positions.
        steps[image.start + 2 : image.start + image.num_placeholders - 1] = 0
    return np.asarray(np.cumsum(steps) - 1)[None]
