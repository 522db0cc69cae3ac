"""What is minimised: a network and its loss as one module, so that DDP and DeepSpeed wrap the whole of it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from boxcar.train.network.loss import labelled, weighted_cross_entropy
from boxcar.train.network.model import Base

if TYPE_CHECKING:
    from boxcar.train.data.collate import MicroBatch


@dataclass
class BatchLoss:
    """Of one micro-batch on one rank."""

    total: torch.Tensor
    """() float32 with gradient: sum of weight * cross-entropy over its labelled tokens."""
    losses: torch.Tensor
    """(N,) float32: cross-entropy of each labelled token."""
    groups: torch.Tensor
    """(N,) int64: label group of each (`train.data.documents`)."""
    places: torch.Tensor
    """(N,) int64: where each stands in the flattened batch."""


class Objective(nn.Module):
    """MicroBatch -> BatchLoss."""

    def __init__(self, base: Base, *, chunk_tokens: int, autocast: torch.dtype | None, through_module: bool) -> None:
        """autocast: bf16, or None for the weights' own precision."""
        super().__init__()
        self.network = base.model
        self._base = base
        self._chunk_tokens = chunk_tokens
        self._autocast = autocast
        self._through_module = through_module

    def forward(self, batch: "MicroBatch") -> BatchLoss:
        device = batch.input_ids.device
        with torch.autocast(device.type, dtype=self._autocast or torch.bfloat16, enabled=self._autocast is not None):
            states = self._base.hidden_states(batch)
            hidden, targets, weights, places = labelled(states, batch.input_ids, batch.label_weights)
            total, losses = weighted_cross_entropy(
                hidden, self._base.head, targets, weights, chunk_tokens=self._chunk_tokens, through_module=self._through_module
            )
        groups = batch.label_groups[:, 1:][places].long()
        numbers = torch.arange(batch.input_ids.numel(), device=device).view_as(batch.input_ids)[:, 1:][places]
        return BatchLoss(total, losses, groups, numbers)
