"""Texts with boxes -> ids and bytes, for all texts of a unit at once.

A text is n+1 gaps and n boxes (`families.box_text`). Its pieces, in order:

    gap_0 | x0 , y0 , x1 , y1 | gap_1 | x0 , y0 , x1 , y1 | gap_2        8 pieces a box, and one more

Box k of the whole unit, in text t, therefore begins at piece t + 1 + 8 k: the positions of all pieces are arithmetic, and ids and bytes
are one gather each from the piece table.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from pipelines.ragged import Ragged, offsets_of
from pipelines.tokens import PieceTable

PIECES_PER_BOX = 8


class TextSpec(msgspec.Struct, gc=False):
    """One text, by codes of the piece table and rows of the unit's box table."""

    gaps: list[int]
    boxes: list[int]
    """One shorter than `gaps`."""


@dataclass(frozen=True)
class ComposedTexts:
    """T texts."""

    ids: Ragged[np.int32]
    utf8: Ragged[np.uint8]
    is_coordinate: npt.NDArray[np.bool_]
    """For each of `ids.values`: whether it belongs to a box's number."""


def compose(texts: Sequence[TextSpec], number_codes: npt.NDArray[np.int64], separators: Sequence[int], pieces: PieceTable) -> ComposedTexts:
    """`number_codes`: (num_boxes, 4), the piece codes of every box of the unit. All pieces must be encoded."""
    num_boxes = np.fromiter((len(text.boxes) for text in texts), np.int64, len(texts))
    total_boxes = int(num_boxes.sum())
    gaps = np.fromiter((code for text in texts for code in text.gaps), np.int64, total_boxes + len(texts))
    boxes = np.fromiter((row for text in texts for row in text.boxes), np.int64, total_boxes)

    codes = np.empty(len(texts) + PIECES_PER_BOX * total_boxes, np.int64)
    is_number = np.zeros(len(codes), np.bool_)
    text_of_box = np.repeat(np.arange(len(texts)), num_boxes)
    first_piece = text_of_box + 1 + PIECES_PER_BOX * np.arange(total_boxes)
    is_gap = np.ones(len(codes), np.bool_)
    for place in range(4):
        numbers = first_piece + 2 * place
        codes[numbers] = number_codes[boxes, place]
        is_number[numbers] = True
        is_gap[numbers] = False
    for place, separator in enumerate(separators):
        codes[first_piece + 2 * place + 1] = separator
        is_gap[first_piece + 2 * place + 1] = False
    codes[is_gap] = gaps

    text_offsets = offsets_of(1 + PIECES_PER_BOX * num_boxes)
    ids = pieces.ids.take(codes)
    return ComposedTexts(
        ids=ids.regroup(text_offsets),
        utf8=pieces.texts.take(codes).regroup(text_offsets),
        is_coordinate=np.repeat(is_number, ids.lengths),
    )
