"""Cross-entropy of the labelled tokens, weighted, without the logits of all others.

A grounding answer is 5 to 15 % of a sequence, and a vocabulary has 151,000 entries: the logits of a pack of 4,096 tokens would be 2.5 GB in
float32. So only hidden states that predict a labelled token reach the head, and of those a chunk at a time; each chunk's gradient is taken
at once, while its logits are there, and nothing but (tokens, hidden) is kept for backward.

The loss of a global batch is sum(w * CE) / sum(w) over all its labelled tokens, on all ranks and micro-batches. This file gives the
numerator; the loop divides. So the result depends neither on accumulation nor on ranks nor on packing.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from boxcar.train.network.ranks import largest_of_ranks


def weighted_cross_entropy(
    hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor, weights: torch.Tensor, *, chunk_tokens: int, through_module: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (sum of weight * CE: () float32 with gradient, CE of each token: (N,) float32 without).

    hidden: (N, H), the states that predict the targets. targets: (N,) int64. weights: (N,) float32.
    through_module: ZeRO-3, which gathers the head's weight around each of its forwards, on all ranks together: every rank calls it as often
    as the one with the most labels does. Chunks are then computed a second time in backward.
    """
    num_chunks = -(-len(targets) // chunk_tokens)
    if through_module:
        return _through_module(hidden, head, targets, weights, largest_of_ranks(max(1, num_chunks), hidden.device))
    if len(targets) == 0:
        return hidden.sum(dtype=torch.float32) * 0, hidden.new_zeros(0, dtype=torch.float32)
    if type(head) is not nn.Linear or head.bias is not None:  # adapters and quantised heads have no plain weight
        return _through_module(hidden, head, targets, weights, num_chunks)
    total, losses = _ChunkedCrossEntropy.apply(hidden, head.weight, targets, weights, chunk_tokens)
    return total, losses


def labelled(
    hidden: torch.Tensor, input_ids: torch.Tensor, label_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden (N, H), targets (N,), weights (N,), places (B, T - 1) bool) of the tokens with a weight, each beside the state before it.

    hidden: (B, T, H). input_ids: (B, T). label_weights: (B, T), of the token itself; 0 for the first token of every document.
    """
    places = label_weights[:, 1:] > 0
    return hidden[:, :-1][places], input_ids[:, 1:][places], label_weights[:, 1:][places], places


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Linear head and cross-entropy in one, a chunk of tokens at a time; gradients are taken in forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, chunk_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(targets), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            states = hidden[part].to(weight.dtype)
            logits = (states @ weight.t()).float()
            log_sum = torch.logsumexp(logits, dim=-1)
            rows, chosen = torch.arange(len(logits), device=logits.device), targets[part]
            losses[part] = log_sum - logits[rows, chosen]
            if d_hidden is None and d_weight is None:
                continue
            d_logits = logits.sub_(log_sum[:, None]).exp_()
            d_logits[rows, chosen] -= 1
            d_logits = d_logits.mul_(weights[part, None]).to(weight.dtype)
            if d_hidden is not None:
                d_hidden[part] = (d_logits @ weight).to(hidden.dtype)
            if d_weight is not None:
                d_weight += d_logits.t() @ states
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(weight.dtype))
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_total = grads[0]
        d_hidden, d_weight = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * d_total.to(d_hidden.dtype),
            None if d_weight is None else d_weight * d_total.to(d_weight.dtype),
            None,
            None,
            None,
        )


def _through_module(
    hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor, weights: torch.Tensor, num_chunks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Some chunks may be empty."""

    def of_chunk(states: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(head(states).float(), chosen, reduction="none")

    chunks = zip(hidden.tensor_split(num_chunks), targets.tensor_split(num_chunks), strict=True)
    # Reentrant: the other kind compares what is computed again with the first time, and a gathered weight has another shape by then.
    losses = torch.cat([checkpoint(of_chunk, states, chosen, use_reentrant=True) for states, chosen in chunks])
    return (losses * weights).sum(), losses.detach()
