"""Which part of a large tensor the golden files hold, and the weights of the small networks behind them."""

from collections.abc import Mapping

import torch

WHOLE = 4096
"""Elements up to which a tensor is recorded whole."""
STEP = 17
"""Of a larger tensor, every 17th element in row-major order: a prime, so that every row and column is met."""


def recorded(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that a golden file holds: the whole tensor, or (n,) every 17th element of one with more than 4096."""
    return tensor if tensor.numel() <= WHOLE else tensor.flatten()[::STEP]


def drawn_weights(shapes: Mapping[str, tuple[int, ...]], seed: int, wide: Mapping[str, float], std: float) -> dict[str, torch.Tensor]:
    """The random float32 weights that the published code was run with, drawn again instead of stored (8 MB).

    One generator draws the parameters in the order of their names. Vectors called `weight` are scales of norms: 1 + 0.2 x. Parameters whose
    name ends with a key of `wide` have that standard deviation, all others `std`.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name in sorted(shapes):
        x = torch.randn(shapes[name], generator=generator)
        if len(shapes[name]) == 1 and name.endswith(".weight"):
            weights[name] = x * 0.2 + 1.0
        else:
            weights[name] = x * next((value for ending, value in wide.items() if name.endswith(ending)), std)
    return weights


def cogvlm_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Without the rotary buffers, which are no parameters."""
    wide = dict.fromkeys(("embed_tokens.weight", "boi", "eoi", "cls_embedding", "position_embedding.weight"), 0.3)
    return drawn_weights({name: shape for name, shape in shapes.items() if not name.endswith("inv_freq")}, 4321, wide, 0.08)


def qwen_vl_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Without the table of sines, which is computed."""
    wide = dict.fromkeys(("wte.weight", "attn_pool.query", "positional_embedding"), 0.25)
    return drawn_weights({name: shape for name, shape in shapes.items() if not name.endswith("pos_embed")}, 1234, wide, 0.06)
