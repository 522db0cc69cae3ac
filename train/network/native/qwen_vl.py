"""Qwen-VL and Qwen-VL-Chat (version 1), which transformers lacks and whose published code no longer runs in it.

    (I, 3, 448, 448) -> ViT, 32 x 32 patches -> resampler, 256 queries -> (I, 256, hidden), in place of the 256 tokens inside <img> </img>
    embeddings -> decoder layers -> ln_f -> lm_head

| what              | convention                                                                                         |
|-------------------|----------------------------------------------------------------------------------------------------|
| names             | parameters are named as in the published checkpoints                                               |
| ViT               | pre-norm; queries, keys and values of a head stand side by side in in_proj; exact GELU; no CLS     |
| positions of it   | 16 x 16 learned, bicubic to the patch grid, in float32                                             |
| resampler         | keys and queries carry the sine-cosine table, values do not                                        |
| RMSNorm           | float32, rounded to the working dtype, then times the weight                                       |
| gate              | c_proj(w1(x) * silu(w2(x))): w2 is the gate                                                        |
| rotary            | halves paired, all of a head, base 10000, tables and rotation in float32                           |
| evaluation alone  | prompts beyond seq_length stretch the rotary base (dynamic NTK); queries beyond it grow (log-n)    |

Both rules of evaluation are off while training, and in packs, whose documents are as in training. Where rows of one batch differ in length
each has its own stretch, from its largest position (the published code takes the padded length for all; without padding that is the same).

Written from the conventions of QwenLM/Qwen-VL modeling_qwen.py and visual.py; tested against numbers that code gave.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu, interpolate, linear, scaled_dot_product_attention, silu
from transformers import Cache, PreTrainedConfig, initialization
from transformers.modeling_layers import GradientCheckpointingLayer

from boxcar.schemas.errors import ConfigError
from boxcar.train.network.native.native_model import NativeModel, Sight, place_features, rotate, text_attention

_VISION_EPS = 1e-6
_QUERY_HEAD = 128
"""The resampler has output_dim / 128 heads."""
_TABLE_SIDE = 16
"""Both tables of positions are 16 x 16, and there are as many queries."""
NUM_QUERIES = _TABLE_SIDE**2


class QwenVLConfig(PreTrainedConfig):
    """config.json of Qwen-VL. intermediate_size counts w1 and w2 together; `visual` is the published section, as a dict."""

    model_type = "qwen"

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 4096,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        kv_channels: int = 128,
        intermediate_size: int = 22016,
        layer_norm_epsilon: float = 1e-6,
        max_position_embeddings: int = 8192,
        seq_length: int = 2048,
        rotary_pct: float = 1.0,
        rotary_emb_base: float = 10000.0,
        use_dynamic_ntk: bool = True,
        use_logn_attn: bool = True,
        initializer_range: float = 0.02,
        visual: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if rotary_pct != 1.0:
            raise ConfigError("config.json of a Qwen-VL base", found=f"rotary_pct {rotary_pct}", expected="1.0, as all published ones have")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.kv_channels = kv_channels
        self.intermediate_size = intermediate_size
        self.layer_norm_epsilon = layer_norm_epsilon
        self.max_position_embeddings = max_position_embeddings
        self.seq_length = seq_length
        self.rotary_pct = rotary_pct
        self.rotary_emb_base = rotary_emb_base
        self.use_dynamic_ntk = use_dynamic_ntk
        self.use_logn_attn = use_logn_attn
        self.initializer_range = initializer_range
        self.visual = visual
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)


@dataclass(frozen=True)
class VisualShape:
    """The `visual` section of config.json."""

    patch_size: int = 14
    width: int = 1664
    layers: int = 48
    heads: int = 16
    mlp_ratio: float = 4.9231
    output_dim: int = 4096

    @classmethod
    def of(cls, section: Mapping[str, Any] | None) -> "VisualShape":
        return cls(**{name: value for name, value in (section or {}).items() if name in cls.__dataclass_fields__})


def sine_cosine_table(side: int, dim: int) -> torch.Tensor:
    """Positions of a square grid, row by row: (side * side, dim) float32. The first half of the channels tells the column, the second the
    row, each as sines, then cosines, of frequencies from 1 to 1/10000."""
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat((angles.sin(), angles.cos()), dim=1)  # (side, dim / 2)
    columns, rows = line.expand(side, side, -1), line[:, None].expand(side, side, -1)
    return torch.cat((columns, rows), dim=-1).reshape(side * side, dim).float()


def _resized(table: torch.Tensor, side: int) -> torch.Tensor:
    """A table of positions on another grid. table: (s * s, dim) -> (side * side, dim), in its dtype."""
    old = math.isqrt(len(table))
    if old == side:
        return table
    grid = table.float().view(1, old, old, -1).permute(0, 3, 1, 2)
    grid = interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).reshape(side * side, -1).to(table.dtype)


# ---- vision


class QwenVLVisionAttention(nn.Module):
    def __init__(self, shape: VisualShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.in_proj = nn.Linear(shape.width, 3 * shape.width)
        self.out_proj = nn.Linear(shape.width, shape.width)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """states: (I, patches, width)."""
        # (I, patches, heads, 3 * head): what belongs to a head stands together, unlike in most networks.
        packed = self.in_proj(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        query, key, value = packed.chunk(3, dim=-1)
        mixed: torch.Tensor = self.out_proj(scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return mixed


class QwenVLVisionMLP(nn.Module):
    def __init__(self, shape: VisualShape) -> None:
        super().__init__()
        inner = int(shape.width * shape.mlp_ratio)
        self.c_fc = nn.Linear(shape.width, inner)
        self.c_proj = nn.Linear(inner, shape.width)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = self.c_proj(gelu(self.c_fc(states)))
        return mixed


class QwenVLVisionBlock(GradientCheckpointingLayer):
    def __init__(self, shape: VisualShape) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(shape.width, eps=_VISION_EPS)
        self.ln_2 = nn.LayerNorm(shape.width, eps=_VISION_EPS)
        self.attn = QwenVLVisionAttention(shape)
        self.mlp = QwenVLVisionMLP(shape)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        states = states + self.attn(self.ln_1(states))
        mixed: torch.Tensor = states + self.mlp(self.ln_2(states))
        return mixed


class QwenVLVisionLayers(nn.Module):
    def __init__(self, shape: VisualShape) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(QwenVLVisionBlock(shape) for _ in range(shape.layers))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        for block in self.resblocks:
            states = block(states)
        return states


class QwenVLCrossAttention(nn.Module):
    """The parameters of torch's MultiheadAttention by their names; its out_proj is called as a layer, so that it may be quantised."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_heads = dim // _QUERY_HEAD
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query: (I, Q, dim); key, value: (I, K, dim). Returns (I, Q, dim)."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        query, key, value = (
            linear(states, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for states, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        mixed: torch.Tensor = self.out_proj(scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return mixed


class QwenVLResampler(nn.Module):
    """256 learned queries look at all patches."""

    pos_embed: torch.Tensor

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        # Stored in the checkpoints, and a frozen parameter there; as a buffer nobody can thaw it.
        self.register_buffer("pos_embed", torch.empty(NUM_QUERIES, dim))
        self.query = nn.Parameter(torch.empty(NUM_QUERIES, dim))
        self.kv_proj = nn.Linear(width, dim, bias=False)
        self.attn = QwenVLCrossAttention(dim)
        self.ln_q = nn.LayerNorm(dim, eps=_VISION_EPS)
        self.ln_kv = nn.LayerNorm(dim, eps=_VISION_EPS)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """patches: (I, N, width), a square grid row by row. Returns (I, 256, dim)."""
        value = self.ln_kv(self.kv_proj(patches))
        key = value + _resized(self.pos_embed, math.isqrt(patches.shape[1]))
        query = (self.ln_q(self.query) + self.pos_embed).expand(len(patches), -1, -1)
        pooled: torch.Tensor = self.attn(query, key, value)
        return pooled


class QwenVLVisual(nn.Module):
    """Images to the features that stand for them."""

    def __init__(self, shape: VisualShape) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, shape.width, kernel_size=shape.patch_size, stride=shape.patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.empty(_TABLE_SIDE**2, shape.width))
        self.ln_pre = nn.LayerNorm(shape.width, eps=_VISION_EPS)
        self.transformer = QwenVLVisionLayers(shape)
        self.attn_pool = QwenVLResampler(shape.width, shape.output_dim)
        self.ln_post = nn.LayerNorm(shape.output_dim, eps=_VISION_EPS)
        self.proj = nn.Parameter(torch.empty(shape.output_dim, shape.output_dim))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """pixel_values: (I, 3, S, S), normalised. Returns (I, 256, hidden)."""
        grid = self.conv1(pixel_values.to(self.conv1.weight.dtype))
        states = grid.flatten(2).transpose(1, 2) + _resized(self.positional_embedding, grid.shape[-1])
        states = self.transformer(self.ln_pre(states))
        features: torch.Tensor = self.ln_post(self.attn_pool(states)) @ self.proj
        return features


# ---- language


class QwenVLRMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        wide = states.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(states.dtype) * self.weight


@dataclass(frozen=True)
class Rotary:
    """Tables of one forward pass."""

    cos: torch.Tensor
    """(B, T, head) float32."""
    sin: torch.Tensor
    query_growth: torch.Tensor | None
    """(B, T, 1, 1) float32: what log-n attention multiplies queries with; None: nothing."""


class QwenVLAttention(nn.Module):
    def __init__(self, config: QwenVLConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_attention_heads
        inner = config.num_attention_heads * config.kv_channels
        self.c_attn = nn.Linear(config.hidden_size, 3 * inner)
        self.c_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, states: torch.Tensor, rotary: Rotary, sight: Sight, past_key_values: Cache | None) -> torch.Tensor:
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)) for part in self.c_attn(states).chunk(3, dim=-1))
        query, key = (rotate(part.float(), rotary.cos, rotary.sin).to(value.dtype) for part in (query, key))
        if rotary.query_growth is not None:
            query = (query * rotary.query_growth).to(value.dtype)
        out: torch.Tensor = self.c_proj(text_attention(query, key, value, sight, self.layer, past_key_values).flatten(2))
        return out


class QwenVLMLP(nn.Module):
    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__()
        inner = config.intermediate_size // 2
        self.w1 = nn.Linear(config.hidden_size, inner, bias=False)
        self.w2 = nn.Linear(config.hidden_size, inner, bias=False)
        self.c_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.c_proj(self.w1(states) * silu(self.w2(states)))
        return out


class QwenVLBlock(GradientCheckpointingLayer):
    def __init__(self, config: QwenVLConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = QwenVLRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = QwenVLAttention(config, layer)
        self.ln_2 = QwenVLRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = QwenVLMLP(config)

    def forward(self, states: torch.Tensor, rotary: Rotary, sight: Sight, past_key_values: Cache | None = None) -> torch.Tensor:
        states = states + self.attn(self.ln_1(states), rotary, sight, past_key_values)
        out: torch.Tensor = states + self.mlp(self.ln_2(states))
        return out


class QwenVLTransformer(nn.Module):
    """Holds the parts under their published names; `QWenLMHeadModel.hidden_states` runs them."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__()
        self.wte: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(QwenVLBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.ln_f = QwenVLRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.visual = QwenVLVisual(VisualShape.of(config.visual))


def stretch_of(num_tokens: int, seq_length: int) -> float:
    """Dynamic NTK: what the rotary base of a prompt of so many tokens is stretched by, before the exponent. 1 up to seq_length."""
    doublings = math.ceil(math.log2(num_tokens / seq_length) + 1)
    return max(2.0**doublings - 1.0, 1.0)


def rotary_tables(position_ids: torch.Tensor, head: int, base: float, stretches: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """position_ids: (B, T); stretches: one a row, or one for all. Returns cosines and sines, (B, T, head) float32.

    Made in each forward pass: from_pretrained leaves tables that are no parameters on the meta device."""
    exponents = torch.arange(0, head, 2, device=position_ids.device).float() / head
    frequencies = torch.stack([1.0 / ((base * stretch ** (head / (head - 2))) ** exponents) for stretch in stretches])
    angles = position_ids[..., None].float() * frequencies[:, None]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


class QWenLMHeadModel(NativeModel):
    """Qwen-VL under its published name. Placeholders are the 256 tokens between <img> and </img>; whatever stands there is overwritten."""

    config_class = QwenVLConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["QwenVLBlock", "QwenVLVisionBlock", "QwenVLResampler"]  # noqa: RUF012  (a list, as transformers has it)

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__(config)
        self.transformer = QwenVLTransformer(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer.wte = value

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, QwenVLVisual):
            initialization.normal_(module.positional_embedding, std=std)
            initialization.normal_(module.proj, std=std)
        elif isinstance(module, QwenVLResampler):
            initialization.normal_(module.query, std=std)
            initialization.copy_(module.pos_embed, sine_cosine_table(_TABLE_SIDE, module.pos_embed.shape[1]))
        elif isinstance(module, QwenVLCrossAttention):
            initialization.normal_(module.in_proj_weight, std=std)
            initialization.zeros_(module.in_proj_bias)

    @property
    def vision_attention_width(self) -> int:
        shape = VisualShape.of(self.config.visual)
        return shape.width * shape.layers

    def positions(self, attention_mask: torch.Tensor, image_mask: torch.Tensor | None) -> torch.Tensor:
        """0, 1, 2, ... of each row, padding aside. Every token of an image has its own position."""
        return (attention_mask.long().cumsum(1) - 1).clamp(min=0)

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        network = self.transformer
        states = network.wte(input_ids)
        if pixel_values is not None:
            assert image_mask is not None, "images have no places without image_mask"
            states = place_features(states, image_mask, network.visual(pixel_values))
        sight = self._look(input_ids, attention_mask, past_key_values)
        rotary = self._rotary(position_ids, past_key_values)
        for block in network.h:
            states = block(states, rotary=rotary, sight=sight, past_key_values=past_key_values)
        out: torch.Tensor = network.ln_f(states)
        return out

    def _rotary(self, position_ids: torch.Tensor, past_key_values: Cache | None) -> Rotary:
        config = self.config
        as_in_training = self.training or self.packed
        stretches, growth = [1.0], None
        if config.use_dynamic_ntk and not as_in_training:
            stretches = self._stretches(position_ids, past_key_values)
        if config.use_logn_attn and not as_in_training:
            growth = ((position_ids + 1).double().log() / math.log(config.seq_length)).clamp(min=1.0).float()[..., None, None]
        cos, sin = rotary_tables(position_ids, config.kv_channels, config.rotary_emb_base, stretches)
        return Rotary(cos, sin, growth)

    def _stretches(self, position_ids: torch.Tensor, past_key_values: Cache | None) -> list[float]:
        """Of each row, by its prompt; decoding keeps what the prompt had. The cache remembers: it is what the prompt leaves behind."""
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            kept: list[float] = past_key_values.__dict__.get("rotary_stretches", [1.0])
            return kept
        lengths = (position_ids.amax(1) + 1).tolist()
        stretches = [stretch_of(length, self.config.seq_length) for length in lengths]
        if past_key_values is not None:
            past_key_values.__dict__["rotary_stretches"] = stretches
        return stretches
