"""Documents and their pixels -> tensors. The one place where numpy becomes torch.

    pack    [ doc 0 | doc 1 | doc 2 ]          (1, T): side by side, borders in cu_seqlens; attention keeps them apart
    pad     [ doc 0 . . ]                      (B, T): each a row, filled up on the right, attention_mask; the reference
            [ doc 1     ]

Weights belong to the token that is *predicted*: the loss shifts. The first token of every document weighs 0, so that nothing is predicted
across a seam. Pixels stay bytes, one flat buffer: they are patchified and normalised on the device (`train.data.pixels`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from boxcar.train.data.documents import NO_LABEL, Document

Pixels = npt.NDArray[np.uint8]
"""(H, W, 3), RGB, resized."""
NUM_DUMMY_TOKENS = 4


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes. B rows of T tokens, P rows of positions, D documents (packed: segments), I images."""

    input_ids: torch.Tensor
    """(B, T) int64."""
    positions: torch.Tensor
    """(P, B, T) int64; restarts with every document."""
    label_weights: torch.Tensor
    """(B, T) float32: weight of predicting this token from those before it; 0 where it is no label."""
    label_groups: torch.Tensor
    """(B, T) int16: `train.data.documents.group_name`; -1 where the weight is 0."""
    attention_mask: torch.Tensor | None
    """(B, T) bool, true for tokens; None where packed."""
    cu_seqlens: torch.Tensor
    """(D + 1,) int32: where each segment begins in the flattened tokens, and the end. Padded: the rows. A packed batch that is filled up
    has one segment more than documents."""
    borders: list[int]
    """cu_seqlens on the host."""
    pixels: torch.Tensor
    """(N,) uint8: images one after another, each (H, W, 3)."""
    image_sizes_hw: torch.Tensor
    """(I, 2) int64, always on the host: what cuts `pixels`."""
    image_grid_thw: torch.Tensor
    """(I, 3) int64, patches."""
    sample_ids: list[str]
    """Of the documents, in order."""
    num_useful_tokens: int
    """Without padding."""
    weight: float
    """Sum of label_weights, in double precision."""
    dropped: list[str]
    """Samples left out because an image could not be read, with the reason."""

    @property
    def num_dropped(self) -> int:
        return len(self.dropped)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "MicroBatch":
        """A batch on a device."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "MicroBatch":
        """A batch in page-locked memory, so that copies to the device run beside the computation. DataLoader calls this by name."""
        return self._with_tensors(torch.Tensor.pin_memory)

    def _with_tensors(self, change: Any) -> "MicroBatch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: change(value) for name, value in values.items() if isinstance(value, torch.Tensor) and name != "image_sizes_hw"}
        return replace(self, **moved)


def pack(
    documents: Sequence[Document], images: Sequence[Pixels], *, pad_id: int, pad_to: int | None = None, dropped: Sequence[str] = ()
) -> MicroBatch:
    """Documents side by side as one row. `images`: of all documents, in order.

    pad_to: fill up to this many tokens with one more segment of `pad_id` and weight 0, for shapes that do not change. A longer pack stays
    as it is. `pad_id` must not be an image token.
    """
    assert documents, "a batch without documents is a dummy"
    borders = [0, *accumulate(map(len, documents))]
    ids = [document.input_ids for document in documents]
    positions = [document.positions for document in documents]
    weights = [document.label_weights for document in documents]
    groups = [document.label_groups for document in documents]
    num_useful = borders[-1]
    if pad_to is not None and pad_to > num_useful:
        rest = pad_to - num_useful
        ids.append(np.full(rest, pad_id, np.int64))
        positions.append(np.tile(np.arange(rest, dtype=np.int64), (len(positions[0]), 1)))
        weights.append(np.zeros(rest, np.float32))
        groups.append(np.full(rest, NO_LABEL, np.int16))
        borders.append(pad_to)
    return _batch(
        documents,
        images,
        dropped,
        input_ids=np.concatenate(ids)[None],
        positions=np.concatenate(positions, axis=1)[:, None],
        label_weights=np.concatenate(weights)[None],
        label_groups=np.concatenate(groups)[None],
        mask=None,
        borders=borders,
        num_useful=num_useful,
    )


def pad(
    documents: Sequence[Document], images: Sequence[Pixels], *, pad_id: int, pad_to: int | None = None, dropped: Sequence[str] = ()
) -> MicroBatch:
    """Documents as rows, filled up on the right to the longest, or to `pad_to` where that is longer."""
    assert documents, "a batch without documents is a dummy"
    shape = len(documents), max(pad_to or 0, *map(len, documents))
    ids = np.full(shape, pad_id, np.int64)
    positions = np.zeros((len(documents[0].positions), *shape), np.int64)
    weights = np.zeros(shape, np.float32)
    groups = np.full(shape, NO_LABEL, np.int16)
    mask = np.zeros(shape, np.bool_)
    for number, document in enumerate(documents):
        length = len(document)
        ids[number, :length] = document.input_ids
        positions[:, number, :length] = document.positions
        weights[number, :length] = document.label_weights
        groups[number, :length] = document.label_groups
        mask[number, :length] = True
    return _batch(
        documents,
        images,
        dropped,
        input_ids=ids,
        positions=positions,
        label_weights=weights,
        label_groups=groups,
        mask=mask,
        borders=[number * shape[1] for number in range(shape[0] + 1)],
        num_useful=int(mask.sum()),
    )


def dummy(num_position_rows: int, *, packed: bool, pad_id: int, pad_to: int | None = None, dropped: Sequence[str] = ()) -> MicroBatch:
    """A few text tokens of weight 0: for a rank without work, which must take part in the step all the same."""
    document = Document(
        sample_id="",
        row=-1,
        input_ids=np.full(NUM_DUMMY_TOKENS, pad_id, np.int64),
        label_weights=np.zeros(NUM_DUMMY_TOKENS, np.float32),
        label_groups=np.full(NUM_DUMMY_TOKENS, NO_LABEL, np.int16),
        positions=np.tile(np.arange(NUM_DUMMY_TOKENS, dtype=np.int64), (num_position_rows, 1)),
        images=(),
    )
    batch = (pack if packed else pad)([document], [], pad_id=pad_id, pad_to=pad_to, dropped=dropped)
    return replace(batch, sample_ids=[], num_useful_tokens=0)


def _batch(
    documents: Sequence[Document],
    images: Sequence[Pixels],
    dropped: Sequence[str],
    *,
    input_ids: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
    label_weights: npt.NDArray[np.float32],
    label_groups: npt.NDArray[np.int16],
    mask: npt.NDArray[np.bool_] | None,
    borders: list[int],
    num_useful: int,
) -> MicroBatch:
    slots = [slot for document in documents for slot in document.images]
    flat = np.concatenate([image.reshape(-1) for image in images]) if images else np.empty(0, np.uint8)
    assert [image.shape for image in images] == [(*slot.resized_wh[::-1], 3) for slot in slots], "one image for each slot, resized"
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        positions=torch.from_numpy(positions),
        label_weights=torch.from_numpy(label_weights),
        label_groups=torch.from_numpy(label_groups),
        attention_mask=None if mask is None else torch.from_numpy(mask),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        borders=borders,
        pixels=torch.from_numpy(flat),
        image_sizes_hw=torch.tensor([slot.resized_wh[::-1] for slot in slots], dtype=torch.int64).reshape(-1, 2),
        image_grid_thw=torch.tensor([slot.grid_thw for slot in slots], dtype=torch.int64).reshape(-1, 3),
        sample_ids=[document.sample_id for document in documents],
        num_useful_tokens=num_useful,
        weight=float(label_weights.sum(dtype=np.float64)),
        dropped=list(dropped),
    )
