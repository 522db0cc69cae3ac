"""The CUDA branch of attention, as far as a CPU can see it: does this torch's varlen_attn take what we hand it, forward and backward?"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from boxcar.train.network.attention import Segments, _attend_varlen


@pytest.mark.parametrize("causal", [True, False], ids=["text", "vision"])
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(16, 16, 80), (28, 4, 128)], ids=["all heads", "grouped queries"])
def test_varlen_takes_our_arguments(heads: int, key_heads: int, width: int, causal: bool) -> None:
    pytest.importorskip("torch.nn.attention.varlen", reason="since torch 2.10")
    with FakeTensorMode():  # shapes without numbers: the kernel itself needs a GPU
        query, key, value = (torch.empty(100, n, width, dtype=torch.bfloat16, requires_grad=True) for n in (heads, key_heads, key_heads))
        segments = Segments(torch.empty(3, dtype=torch.int32), [0, 40, 100])
        out = _attend_varlen(query, key, value, segments, width**-0.5, causal)
        assert (out.shape, out.dtype) == (query.shape, query.dtype)
        out.sum().backward()
        for tensor in (query, key, value):
            assert tensor.grad is not None
            assert tensor.grad.shape == tensor.shape
