"""The loss: equal to the plain formula, gradients too, and what its weights promise."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from boxcar.train.network.loss import labelled, weighted_cross_entropy

HIDDEN, VOCABULARY = 8, 23


def _problem(num_tokens: int, seed: int = 0) -> tuple[torch.Tensor, nn.Linear, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator, dtype=torch.float64).requires_grad_()
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64))
    return hidden, head, torch.randint(VOCABULARY, (num_tokens,), generator=generator), torch.rand(num_tokens, generator=generator)


def _reference(hidden: torch.Tensor, head: nn.Linear, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (functional.cross_entropy(head(hidden).float(), targets, reduction="none") * weights).sum()


@pytest.mark.parametrize("through_module", [False, True], ids=["fused", "through the module"])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 7, 100])
@pytest.mark.parametrize("frozen_head", [False, True])
def test_equals_the_plain_formula_with_its_gradients(chunk_tokens: int, through_module: bool, frozen_head: bool) -> None:
    hidden, head, targets, weights = _problem(13)
    expected = _reference(hidden, head, targets, weights)
    want_hidden, want_weight = torch.autograd.grad(expected * 3, (hidden, head.weight))
    head.weight.requires_grad_(not frozen_head)
    total, losses = weighted_cross_entropy(hidden, head, targets, weights, chunk_tokens=chunk_tokens, through_module=through_module)
    (total * 3).backward()
    assert total.dtype == losses.dtype == torch.float32
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close((losses * weights).sum(), total.detach())
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, want_hidden, rtol=1e-5, atol=1e-6)
    if not frozen_head:
        assert head.weight.grad is not None
        torch.testing.assert_close(head.weight.grad, want_weight, rtol=1e-5, atol=1e-6)


def test_a_batch_without_labels_has_a_zero_loss_that_still_has_a_gradient() -> None:
    hidden, head, _, _ = _problem(5)
    total, losses = weighted_cross_entropy(hidden[:0], head, torch.empty(0, dtype=torch.int64), torch.empty(0), chunk_tokens=4)
    total.backward()
    assert total.detach() == 0
    assert len(losses) == 0


def test_a_token_is_predicted_by_the_state_before_it() -> None:
    hidden = torch.arange(5.0).view(1, 5, 1)
    ids = torch.tensor([[10, 11, 12, 13, 14]])
    weights = torch.tensor([[0.0, 0.0, 2.0, 0.0, 1.0]])
    states, targets, chosen, places = labelled(hidden, ids, weights)
    assert states.flatten().tolist() == [1.0, 3.0]
    assert targets.tolist() == [12, 14]
    assert chosen.tolist() == [2.0, 1.0]
    assert places.tolist() == [[False, True, False, True]]


def _mean(hidden: torch.Tensor, head: nn.Linear, targets: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of a whole global batch and its gradient, as the loop forms it."""
    total, _ = weighted_cross_entropy(hidden, head, targets, weights, chunk_tokens=4)
    loss = total / weights.sum()
    return loss, torch.autograd.grad(loss, hidden, retain_graph=True)[0]


@given(num_tokens=st.integers(2, 20), seed=st.integers(0, 99), factor=st.floats(0.01, 100))
def test_scaling_all_weights_changes_nothing(num_tokens: int, seed: int, factor: float) -> None:
    hidden, head, targets, weights = _problem(num_tokens, seed)
    loss, gradient = _mean(hidden, head, targets, weights)
    scaled, scaled_gradient = _mean(hidden, head, targets, weights * factor)
    torch.testing.assert_close(scaled, loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scaled_gradient, gradient, rtol=1e-4, atol=1e-6)


@given(masks=st.lists(st.booleans(), min_size=2, max_size=20).filter(any), seed=st.integers(0, 99))
def test_weights_of_one_and_zero_equal_masking(masks: list[bool], seed: int) -> None:
    hidden, head, targets, _ = _problem(len(masks), seed)
    chosen = torch.tensor(masks)
    loss, gradient = _mean(hidden, head, targets, chosen.float())
    masked, masked_gradient = _mean(hidden[chosen], head, targets[chosen], torch.ones(int(chosen.sum())))
    torch.testing.assert_close(loss, masked)
    torch.testing.assert_close(gradient[chosen], masked_gradient)
    assert not gradient[~chosen].any()


@given(borders=st.lists(st.integers(0, 20), max_size=4), seed=st.integers(0, 99))
def test_cutting_the_batch_into_micro_batches_changes_nothing(borders: list[int], seed: int) -> None:
    hidden, head, targets, weights = _problem(20, seed)
    loss, gradient = _mean(hidden, head, targets, weights)
    edges = [0, *sorted(borders), 20]
    parts = [slice(start, stop) for start, stop in pairwise(edges)]
    totals = [weighted_cross_entropy(hidden[p], head, targets[p], weights[p], chunk_tokens=3)[0] / weights.sum() for p in parts]
    summed = torch.stack(totals).sum()
    torch.testing.assert_close(summed, loss)
    torch.testing.assert_close(torch.autograd.grad(summed, hidden)[0], gradient)
