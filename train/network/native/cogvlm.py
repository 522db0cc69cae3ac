"""CogVLM (v1) and CogVLM2, which transformers lacks and whose published code no longer generates in it.

    (I, 3, S, S) -> EVA2-CLIP ViT -> [v2: 2 x 2 convolution] -> projector -> boi, patches, eoi in place of the image's tokens
    embeddings -> decoder layers, each with a language and a vision expert for every matrix -> norm -> lm_head

| what              | convention                                                                                         |
|-------------------|----------------------------------------------------------------------------------------------------|
| names             | parameters are named as in the published checkpoints; their rotary_emb.inv_freq is computed here   |
| version           | num_multi_query_heads in config.json makes it CogVLM2: grouped keys, a bias on the vision expert's |
|                   | queries, keys and values, the convolution, rotary base 500000 (which no config.json says)          |
| ViT               | x + norm(attention(x)), x + norm(mlp(x)): norms stand behind their sub-layer; no norm at the end;  |
|                   | [all queries | all keys | all values]; exact GELU; CLS dropped; positions fixed to one size        |
| experts           | vision where a token and the next one are of an image: boi and patches; eoi goes to language       |
| positions         | bos 0, boi 1, all patches 2, eoi 3, text 4, ...                                                    |
| attention         | causal over everything, images included                                                            |
| RMSNorm           | float32, times the weight, then rounded to the working dtype                                       |
| rotary            | halves paired, all of a head; tables made in the working dtype, see below                          |

Rotary fidelity. The published code makes positions, frequencies and angles in the dtype of the weights, and the checkpoints were trained
so: in bfloat16 a cosine is off by up to 0.18 below position 64 and 0.74 below 256, and positions beyond 256 fall together. We do the same,
in the dtype of the hidden states. Where those are wider than what the checkpoint was trained in (float32 weights on a CPU, or under
autocast), `rotary_dtype: bfloat16` in config.json restores the tables of the training.

How experts run. Each works on its own tokens alone, so the stream between layers is sorted once a forward pass: all tokens of the vision
expert, then all of the language expert. Only attention needs the order of the sequence:

    sorted (N, hidden) -> qkv of each expert -> sequence (B, T) -> rotary, attention -> sorted -> dense of each expert -> MLP of each expert

Written from the conventions of modeling_cogvlm.py and visual.py of cogvlm-chat-hf and cogvlm2-llama3-chat-19B; tested against numbers that
code gave.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu, pad, scaled_dot_product_attention, silu
from transformers import Cache, PreTrainedConfig, initialization
from transformers.modeling_layers import GradientCheckpointingLayer

from boxcar.train.network.native.native_model import NativeModel, Sight, place_features, rotate, text_attention


class CogVLMConfig(PreTrainedConfig):
    """config.json of CogVLM and CogVLM2. `vision_config` is the published section, as a dict."""

    model_type = "cogvlm"

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_multi_query_heads: int | None = None,
        rms_norm_eps: float = 1e-5,
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        pad_token_id: int | None = 0,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        vision_config: dict[str, Any] | None = None,
        rotary_dtype: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_multi_query_heads = num_multi_query_heads
        self.rms_norm_eps = rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.vision_config = vision_config
        self.rotary_dtype = rotary_dtype
        kwargs.setdefault("tie_word_embeddings", False)
        kwargs |= {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        super().__init__(**kwargs)

    @property
    def is_second(self) -> bool:
        """CogVLM2."""
        return self.num_multi_query_heads is not None

    @property
    def num_key_value_heads(self) -> int:
        heads: int = self.num_multi_query_heads or self.num_attention_heads
        return heads

    @property
    def head_size(self) -> int:
        size: int = self.hidden_size // self.num_attention_heads
        return size

    @property
    def rotary_base(self) -> float:
        return 500000.0 if self.is_second else 10000.0


@dataclass(frozen=True)
class VisionShape:
    """The `vision_config` section of config.json. num_positions counts the CLS token."""

    in_channels: int = 3
    patch_size: int = 14
    hidden_size: int = 1792
    num_hidden_layers: int = 63
    num_heads: int = 16
    intermediate_size: int = 15360
    num_positions: int = 1226
    layer_norm_eps: float = 1e-6

    @classmethod
    def of(cls, section: Mapping[str, Any] | None) -> "VisionShape":
        return cls(**{name: value for name, value in (section or {}).items() if name in cls.__dataclass_fields__})


# ---- vision


class CogVLMPatchEmbedding(nn.Module):
    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.cls_embedding = nn.Parameter(torch.empty(1, shape.hidden_size))
        self.proj = nn.Conv2d(shape.in_channels, shape.hidden_size, kernel_size=shape.patch_size, stride=shape.patch_size)
        self.position_embedding = nn.Embedding(shape.num_positions, shape.hidden_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """pixel_values: (I, 3, S, S). Returns (I, 1 + patches, width)."""
        patches = self.proj(pixel_values.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)
        numbers = torch.arange(self.position_embedding.num_embeddings, device=patches.device)
        positions = self.position_embedding(numbers)
        assert patches.shape[1] + 1 == len(positions), f"{patches.shape[1]} patches for {len(positions) - 1} positions: another image size"
        first = self.cls_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        embedded: torch.Tensor = torch.cat((first, patches), dim=1) + positions
        return embedded


class CogVLMVisionAttention(nn.Module):
    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.num_heads = shape.num_heads
        self.query_key_value = nn.Linear(shape.hidden_size, 3 * shape.hidden_size)
        self.dense = nn.Linear(shape.hidden_size, shape.hidden_size)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """states: (I, tokens, width)."""
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.query_key_value(states).chunk(3, dim=-1)
        )
        mixed: torch.Tensor = self.dense(scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return mixed


class CogVLMVisionMLP(nn.Module):
    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.fc1 = nn.Linear(shape.hidden_size, shape.intermediate_size)
        self.fc2 = nn.Linear(shape.intermediate_size, shape.hidden_size)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = self.fc2(gelu(self.fc1(states)))
        return mixed


class CogVLMVisionLayer(GradientCheckpointingLayer):
    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)
        self.attention = CogVLMVisionAttention(shape)
        self.mlp = CogVLMVisionMLP(shape)
        self.post_attention_layernorm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        # The names tell where the norms would stand elsewhere; here they follow their sub-layer.
        states = states + self.input_layernorm(self.attention(states))
        mixed: torch.Tensor = states + self.post_attention_layernorm(self.mlp(states))
        return mixed


class CogVLMVisionLayers(nn.Module):
    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CogVLMVisionLayer(shape) for _ in range(shape.num_hidden_layers))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            states = layer(states)
        return states


class CogVLMProjector(nn.Module):
    """From the ViT's width to the language model's."""

    def __init__(self, config: CogVLMConfig, in_features: int) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.linear_proj = nn.Linear(in_features, hidden, bias=False)
        self.norm1 = nn.LayerNorm(hidden, eps=1e-5)
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.dense_h_to_4h = nn.Linear(hidden, inner, bias=False)
        self.dense_4h_to_h = nn.Linear(inner, hidden, bias=False)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        states = gelu(self.norm1(self.linear_proj(patches)))
        projected: torch.Tensor = self.dense_4h_to_h(silu(self.gate_proj(states)) * self.dense_h_to_4h(states))
        return projected


class CogVLMVision(nn.Module):
    """Images to the features that stand for them."""

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__()
        shape = VisionShape.of(config.vision_config)
        self.patch_embedding = CogVLMPatchEmbedding(shape)
        self.transformer = CogVLMVisionLayers(shape)
        self.conv = nn.Conv2d(shape.hidden_size, shape.hidden_size, kernel_size=2, stride=2) if config.is_second else None
        self.linear_proj = CogVLMProjector(config, shape.hidden_size)
        self.boi = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.eoi = nn.Parameter(torch.empty(1, 1, config.hidden_size))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """pixel_values: (I, 3, S, S), normalised. Returns (I, visual tokens + 2, hidden)."""
        patches = self.transformer(self.patch_embedding(pixel_values))[:, 1:]
        if self.conv is not None:
            side = round(patches.shape[1] ** 0.5)
            patches = self.conv(patches.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)
        features = self.linear_proj(patches)
        opening, closing = (edge.to(features.dtype).expand(len(features), -1, -1) for edge in (self.boi, self.eoi))
        return torch.cat((opening, features, closing), dim=1)


# ---- which token goes where


@dataclass(frozen=True)
class Routing:
    """Where the experts' tokens stand among the N = B * T of a batch."""

    num_vision: int
    order: torch.Tensor | None
    """(N,) int64: sequence to sorted, the vision expert's tokens first; None: there are none, and sorting would change nothing."""
    back: torch.Tensor | None
    """(N,) int64: sorted to sequence."""
    may_rest: bool
    """An expert without tokens is left out. Otherwise it runs on nothing, so that its parameters get gradients (of zero) on each rank."""

    def sort(self, states: torch.Tensor) -> torch.Tensor:
        """(N, ...) in the order of the sequence -> sorted."""
        return states if self.order is None else states.index_select(0, self.order)

    def unsort(self, states: torch.Tensor) -> torch.Tensor:
        """(N, ...) sorted -> in the order of the sequence."""
        return states if self.back is None else states.index_select(0, self.back)

    def apply(self, vision: nn.Module, language: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """Each expert on its tokens. states: (N, in), sorted. Returns (N, out), sorted."""
        if self.num_vision == 0 and self.may_rest:
            out: torch.Tensor = language(states)
            return out
        return torch.cat((vision(states[: self.num_vision]), language(states[self.num_vision :])))


def vision_expert_mask(image_mask: torch.Tensor, sight: Sight | None = None) -> torch.Tensor:
    """True where the vision expert works: at tokens of an image that another one follows in the same document. image_mask: (B, T) bool."""
    followed = pad(image_mask[:, 1:], (0, 1))
    if sight is not None and sight.segments is not None:
        followed[:, sight.segments.cu_seqlens[1:].long() - 1] = False
    return image_mask & followed


def routing_of(expert_mask: torch.Tensor | None, *, may_rest: bool) -> Routing:
    """expert_mask: (B, T) bool, or None for a batch of text alone."""
    if expert_mask is None:
        return Routing(0, None, None, may_rest)
    flat = expert_mask.flatten()
    vision = flat.nonzero().squeeze(1)
    order = torch.cat((vision, (~flat).nonzero().squeeze(1)))
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return Routing(len(vision), order, back, may_rest)


def shared_image_positions(attention_mask: torch.Tensor, image_mask: torch.Tensor | None) -> torch.Tensor:
    """Position of each token of whole rows: an image takes three, boi, patches and eoi. Padding takes none, and has that of the token
    before it. attention_mask, image_mask: (B, T). Returns (B, T) int64."""
    tokens = attention_mask.bool()
    if image_mask is None:
        steps = tokens
    else:
        image = image_mask & tokens
        before, after = pad(image[:, :-1], (1, 0)), pad(image[:, 1:], (0, 1))
        opens, closes = image & ~before, image & ~after
        first_patch = image & pad(opens[:, :-1], (1, 0))
        steps = tokens & (~image | opens | first_patch | closes)
    return (steps.long().cumsum(1) - 1).clamp(min=0)


# ---- language


class CogVLMRMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        wide = states.float()
        return (self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps))).to(states.dtype)


def rotary_tables(position_ids: torch.Tensor, head: int, base: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """position_ids: (B, T). Returns cosines and sines, (B, T, head), with every step rounded to dtype as published.

    Made in each forward pass: from_pretrained leaves tables that are no parameters on the meta device."""
    exponents = torch.arange(0, head, 2, device=position_ids.device).float() / head
    frequencies = (1.0 / (base**exponents)).to(dtype)
    angles = position_ids[..., None].to(dtype) * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


class CogVLMAttention(nn.Module):
    def __init__(self, config: CogVLMConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_size = config.head_size
        self.widths = [config.hidden_size] + 2 * [config.num_key_value_heads * config.head_size]
        self.vision_expert_query_key_value = nn.Linear(config.hidden_size, sum(self.widths), bias=config.is_second)
        self.vision_expert_dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.language_expert_query_key_value = nn.Linear(config.hidden_size, sum(self.widths), bias=False)
        self.language_expert_dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        states: torch.Tensor,
        routing: Routing,
        rotary: tuple[torch.Tensor, torch.Tensor],
        sight: Sight,
        past_key_values: Cache | None,
    ) -> torch.Tensor:
        """states: (N, hidden), sorted by expert."""
        mixed = routing.unsort(routing.apply(self.vision_expert_query_key_value, self.language_expert_query_key_value, states))
        cos, sin = rotary
        in_rows = mixed.unflatten(0, cos.shape[:2])
        query, key, value = (part.unflatten(-1, (-1, self.head_size)) for part in in_rows.split(self.widths, dim=-1))
        query, key = (rotate(part, cos, sin).to(value.dtype) for part in (query, key))
        seen = text_attention(query, key, value, sight, self.layer, past_key_values)
        return routing.apply(self.vision_expert_dense, self.language_expert_dense, routing.sort(seen.flatten(2).flatten(0, 1)))


class CogVLMMLP(nn.Module):
    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(silu(self.gate_proj(states)) * self.up_proj(states))
        return out


class CogVLMExperts(nn.Module):
    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__()
        self.language_mlp = CogVLMMLP(config)
        self.vision_mlp = CogVLMMLP(config)

    def forward(self, states: torch.Tensor, routing: Routing) -> torch.Tensor:
        return routing.apply(self.vision_mlp, self.language_mlp, states)


class CogVLMDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: CogVLMConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = CogVLMAttention(config, layer)
        self.mlp = CogVLMExperts(config)
        self.input_layernorm = CogVLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = CogVLMRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        states: torch.Tensor,
        routing: Routing,
        rotary: tuple[torch.Tensor, torch.Tensor],
        sight: Sight,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        states = states + self.self_attn(self.input_layernorm(states), routing, rotary, sight, past_key_values)
        out: torch.Tensor = states + self.mlp(self.post_attention_layernorm(states), routing)
        return out


class CogVLMModel(nn.Module):
    """Holds the parts under their published names; `CogVLMForCausalLM.hidden_states` runs them."""

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__()
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.layers = nn.ModuleList(CogVLMDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = CogVLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.vision = CogVLMVision(config)


class CogVLMForCausalLM(NativeModel):
    """CogVLM and CogVLM2 under their published name. Placeholders are those of boi, patches and eoi, right behind the first token."""

    model: CogVLMModel
    config_class = CogVLMConfig
    base_model_prefix = "model"
    _no_split_modules = ["CogVLMDecoderLayer", "CogVLMVisionLayer"]  # noqa: RUF012  (a list, as transformers has it)
    # Stored by the published code, and computed here.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]  # noqa: RUF012

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__(config)
        self.model = CogVLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, CogVLMVision):
            initialization.normal_(module.boi, std=std)
            initialization.normal_(module.eoi, std=std)
        elif isinstance(module, CogVLMPatchEmbedding):
            initialization.normal_(module.cls_embedding, std=std)

    @property
    def vision_attention_width(self) -> int:
        shape = VisionShape.of(self.config.vision_config)
        return shape.hidden_size * shape.num_hidden_layers

    def positions(self, attention_mask: torch.Tensor, image_mask: torch.Tensor | None) -> torch.Tensor:
        return shared_image_positions(attention_mask, image_mask)

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        network = self.model
        states = network.embed_tokens(input_ids)
        sight = self._look(input_ids, attention_mask, past_key_values)
        expert_mask = None
        if pixel_values is not None:
            assert image_mask is not None, "images have no places without image_mask"
            if attention_mask is not None:
                image_mask = image_mask & attention_mask.bool()  # v1's placeholder is its padding id
            states = place_features(states, image_mask, network.vision(pixel_values))
            expert_mask = vision_expert_mask(image_mask, sight)
        routing = routing_of(expert_mask, may_rest=past_key_values is not None)
        dtype = states.dtype if self.config.rotary_dtype is None else getattr(torch, self.config.rotary_dtype)
        rotary = rotary_tables(position_ids, self.config.head_size, self.config.rotary_base, dtype)
        sorted_states = routing.sort(states.flatten(0, 1))
        for layer in network.layers:
            sorted_states = layer(sorted_states, routing=routing, rotary=rotary, sight=sight, past_key_values=past_key_values)
        out: torch.Tensor = routing.unsort(network.norm(sorted_states)).view_as(states)
        return out
