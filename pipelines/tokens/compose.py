"""Texts with boxes -> ids and bytes, for all texts of a unit at once.

A text is n+1 gaps and n boxes (`families.box_text`). Its pieces, in order:

    gap_0 | x0 , y0 , x1 , y1 | gap_1 | x0 , y0 , x1 , y1 | gap_2        8 pieces a box, and one more

Box k of the whole unit, in text t, therefore begins at piece t + 1 + 8 k: the positions of all pieces are arithmetic, and ids and bytes are
one gather each from the piece table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import msgspec
import numpy as np
import numpy.typing as npt

from boxcar.pipelines.ragged import Ragged, offsets_of
from boxcar.pipelines.tokens.tokenizer import PieceTable

PIECES_PER_BOX = 8


class TextSpec(msgspec.Struct, gc=False):
    """One text, by codes of the piece table and rows of the unit's box table."""

    gaps: list[int]
    boxes: list[int]
    """One shorter than `gaps`."""


@dataclass(frozen=True)
class ComposedTexts:
    """T texts as sequences of pieces. Lengths follow from the pieces; ids and bytes are gathered once, for the texts that are written."""

    codes: Ragged[np.int64]
    """Pieces of each text."""
    is_number: npt.NDArray[np.bool_]
    """For each of `codes.values`: whether it is the number of a box."""
    pieces: PieceTable

    @property
    def num_tokens(self) -> npt.NDArray[np.int64]:
        """(T,) length of each text."""
        return self._sum(self.pieces.ids.lengths)

    def count(self, token_id: int) -> npt.NDArray[np.int64]:
        """(T,) how often an id stands in each text."""
        ids = self.pieces.ids
        running = np.zeros(len(ids.values) + 1, np.int64)
        np.cumsum(ids.values == token_id, out=running[1:])
        return self._sum(running[ids.offsets[1:]] - running[ids.offsets[:-1]])

    def _sum(self, per_piece: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        running = np.zeros(len(self.codes.values) + 1, np.int64)
        np.cumsum(per_piece[self.codes.values], out=running[1:])
        return np.asarray(running[self.codes.offsets[1:]] - running[self.codes.offsets[:-1]])

    def ids(self, texts: npt.NDArray[np.int64]) -> Ragged[np.int32]:
        """Token ids of these texts, in this order."""
        codes = self.codes.take(texts)
        return self.pieces.ids.take(codes.values).regroup(codes.offsets)

    def utf8(self, texts: npt.NDArray[np.int64]) -> Ragged[np.uint8]:
        """UTF-8 bytes of these texts, in this order."""
        codes = self.codes.take(texts)
        return self.pieces.texts.take(codes.values).regroup(codes.offsets)

    def is_coordinate(self, texts: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """For each of `ids(texts).values`: whether it belongs to a box's number."""
        codes = self.codes.take(texts)
        flags = Ragged(self.is_number, self.codes.offsets).take(texts)
        return np.repeat(flags.values, self.pieces.ids.lengths[codes.values])


def compose(texts: Sequence[TextSpec], number_codes: npt.NDArray[np.int64], separators: Sequence[int], pieces: PieceTable) -> ComposedTexts:
    """`number_codes`: (num_boxes, 4), the piece codes of every box of the unit, in the order of the text. All pieces must be encoded."""
    num_boxes = np.fromiter((len(text.boxes) for text in texts), np.int64, len(texts))
    total_boxes = int(num_boxes.sum())
    gaps = np.fromiter(chain.from_iterable([text.gaps for text in texts]), np.int64, total_boxes + len(texts))
    boxes = np.fromiter(chain.from_iterable([text.boxes for text in texts]), np.int64, total_boxes)

    codes = np.empty(len(texts) + PIECES_PER_BOX * total_boxes, np.int64)
    is_number = np.zeros(len(codes), np.bool_)
    is_gap = np.ones(len(codes), np.bool_)
    first_piece = np.repeat(np.arange(len(texts)), num_boxes) + 1 + PIECES_PER_BOX * np.arange(total_boxes)
    for place in range(4):
        numbers = first_piece + 2 * place
        codes[numbers] = number_codes[boxes, place]
        is_number[numbers] = True
        is_gap[numbers] = False
    for place, separator in enumerate(separators):
        codes[first_piece + 2 * place + 1] = separator
        is_gap[first_piece + 2 * place + 1] = False
    codes[is_gap] = gaps
    return ComposedTexts(Ragged(codes, offsets_of(1 + PIECES_PER_BOX * num_boxes)), is_number, pieces)
