"""Attention that keeps packed samples apart: one function for language models and vision towers.

A packed sequence is documents one after another, and a token may see only its own document. Every mask that transformers would build for
it either costs memory by the square of the pack or lets the samples see each other without a word, depending on version, on use_cache
and on the shape of the position ids. So the boundaries go to an attention function of our own, registered with transformers:

    on CPU     scaled_dot_product_attention, a segment at a time       (any backward, float32 exact)
    on CUDA    torch.nn.attention.varlen, all segments in one kernel   (FlashAttention; no mask in memory)

The boundaries of text stand in SEGMENTS, set once per micro-batch and left standing: activation checkpointing runs the function again
during backward, on threads that see neither the call's arguments nor context variables. Vision towers bring their own boundaries as
cu_seqlens.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakIdKeyDictionary

TEXT_ATTENTION = "boxcar_segments"
VISION_ATTENTION = "boxcar_flash_windows"
"""transformers hands cu_seqlens only to a vision attention whose name contains "flash"; others get a Python loop over windows."""


@dataclass(frozen=True)
class Segments:
    """Documents of a packed sequence."""

    cu_seqlens: torch.Tensor
    """(D + 1,) int32 on the device: where each document begins, and the end of the last."""
    borders: list[int]
    """The same on the host: reading the tensor would wait for the device."""

    @property
    def max_len(self) -> int:
        return max(stop - start for start, stop in zip(self.borders, self.borders[1:], strict=False))


class SegmentHolder:
    """Where the attention function finds the documents of the micro-batch in work. One a process: one model trains at a time."""

    def __init__(self) -> None:
        self.current: Segments | None = None
        self._of_images: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def of_images(self, cu_seqlens: torch.Tensor) -> Segments:
        """Boundaries that a vision tower brings; every layer brings the same tensor, and only the first waits for the device."""
        found: Segments | None = self._of_images.get(cu_seqlens)
        if found is None:
            found = self._of_images[cu_seqlens] = Segments(cu_seqlens.to(torch.int32), cu_seqlens.tolist())
        return found


SEGMENTS = SegmentHolder()


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    *,
    scale: float | None,
    causal: bool,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention within segments. query: (T, H, D); key, value: (T, H_kv, D), H a multiple of H_kv. Returns (T, H, D)."""
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and dropout == 0.0:
        return _attend_varlen(query, key, value, segments, scale, causal)
    return attend_by_segment(query, key, value, segments, scale=scale, causal=causal, dropout=dropout)


def attend_by_segment(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    *,
    scale: float | None,
    causal: bool,
    dropout: float = 0.0,
) -> torch.Tensor:
    """`attend` by scaled_dot_product_attention, a segment at a time; on any device, in any precision."""
    outputs = []
    for start, stop in zip(segments.borders, segments.borders[1:], strict=False):
        q, k, v = (part[start:stop].transpose(0, 1).unsqueeze(0) for part in (query, key, value))
        out = scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        outputs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


def _varlen_options() -> tuple[bool, bool]:
    """(takes window_size rather than is_causal, takes enable_gqa): the keywords changed between torch 2.10 and 2.13."""
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415  (torch < 2.10 has none, and a CPU needs none)

    parameters = inspect.signature(varlen_attn).parameters
    return "is_causal" not in parameters, "enable_gqa" in parameters


def _attend_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scale: float | None, causal: bool
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415

    by_window, has_gqa = _varlen_options()
    options: dict[str, Any] = {"window_size": (-1, 0) if causal else (-1, -1)} if by_window else {"is_causal": causal}
    if query.shape[1] != key.shape[1]:
        if has_gqa:
            options["enable_gqa"] = True
        else:
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    cu, longest = segments.cu_seqlens, segments.max_len
    out = varlen_attn(query.contiguous(), key.contiguous(), value.contiguous(), cu, cu, longest, longest, scale=scale, **options)
    assert isinstance(out, torch.Tensor), "no auxiliary output was asked for"
    return out


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the boundaries differ from batch to batch: compiled code would be compiled again for each
def text_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface. query: (1, H, T, D); returns (1, T, H, D)."""
    segments = SEGMENTS.current
    assert segments is not None, "set SEGMENTS.current before the forward pass of a packed batch"
    assert query.shape[0] == 1, "a packed batch is one sequence"
    assert query.shape[2] == segments.borders[-1] == key.shape[2], "the segments are those of another batch"
    q, k, v = (part.squeeze(0).transpose(0, 1) for part in (query, key, value))
    return attend(q, k, v, segments, scale=scaling, causal=True, dropout=dropout).unsqueeze(0), None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def vision_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The same for vision towers, whose boundaries (images or windows) come as cu_seq_lens_q."""
    assert cu_seq_lens_q is not None, "transformers passes cu_seqlens to a vision attention named flash"
    segments = SEGMENTS.of_images(cu_seq_lens_q)
    q, k, v = (part.squeeze(0).transpose(0, 1) for part in (query, key, value))
    return attend(q, k, v, segments, scale=scaling, causal=False, dropout=dropout).unsqueeze(0), None
