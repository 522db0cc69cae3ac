"""The numbers of a network that its floating-point work and its memory follow from, and what follows. No torch: from config.json alone.

    MFU = useful model FLOPs per second / peak FLOPs per second of the device

Useful: what forward and backward need without recomputation, for tokens that are not padding. A multiply-add is 2 FLOPs.

    language   forward 2 P T, backward to activations 2 P T, to weights 2 P_trained T     P: weights of the decoder layers
               attention forward 4 d_attn sum(L^2) / 2 (causal) a layer, backward twice that
    head       the same as the language on the N labelled tokens: 2 P_head N, 2 P_head N back, 2 P_head N to weights where it is trained
    vision     forward 2 P_v patches + 4 d_v sum(patches^2) a layer with full attention; backward only where something in it is trained.
               Windowed layers count 64 patches to a window (Qwen2.5-VL: 112 px).
    merger     as the language, on the visual tokens; backward only where it or the tower before it is trained

P are the weights that a token passes: of two experts, its own (CogVLM). With LoRA, P_trained are the adapters, and so T tokens cost about
4 P T (PaLM, arXiv 2204.02311, appendix B, less the base's weight gradients); the adapters' own forward pass, 2 P_trained T, is left out.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from boxcar.pipelines.families.catalog import FAMILIES
from boxcar.pipelines.families.family import Architecture, Network
from boxcar.schemas.errors import ConfigError
from boxcar.schemas.training import LoraConfig, NetworkPart

if TYPE_CHECKING:
    from boxcar.train.data.collate import MicroBatch

PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "4090": 165.0, "B200": 2250.0}
"""Dense bf16, published by NVIDIA; the SXM variant where there are several."""
_WINDOW_PATCHES = 64


@dataclass(frozen=True)
class Experts:
    """Weights of the decoder layers that only some tokens pass."""

    text_weights: int
    text_trained: int
    image_weights: int
    image_trained: int
    edges_per_image: int
    """Tokens of an image beyond its visual ones that pass the image's weights (CogVLM: its first, boi; its last, eoi, is text there)."""


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a network that its FLOPs follow from."""

    language_weights: int
    """Of the decoder layers; where there are experts, without them."""
    language_trained: int
    attention_width: int
    """Heads times head size, times layers."""
    head_weights: int
    head_trained: int
    vocabulary: int
    vision_weights: int
    """Weights of the tower, which each patch passes."""
    vision_trained: int
    vision_full_width: int
    """Hidden size times the layers with attention over the whole image."""
    vision_window_width: int
    merger_weights: int
    """Weights that each visual token passes."""
    merger_trained: int
    patches_per_token: int
    experts: Experts | None = None

    def flops(self, tokens: int, length_squares: int, labelled: int, patches: int, patch_squares: int, images: int = 0) -> float:
        """FLOPs of forward and backward. length_squares: sum of document lengths squared; patch_squares: of images' patches; images: only
        counts where there are experts, for the edges of images."""
        visual_tokens = patches // self.patches_per_token
        linear = (4 * self.language_weights + 2 * self.language_trained) * tokens
        if self.experts is not None:
            by_image_expert = visual_tokens + self.experts.edges_per_image * images
            linear += (4 * self.experts.image_weights + 2 * self.experts.image_trained) * by_image_expert
            linear += (4 * self.experts.text_weights + 2 * self.experts.text_trained) * (tokens - by_image_expert)
        attention = 3 * 2 * self.attention_width * length_squares
        head = (4 * self.head_weights + 2 * self.head_trained) * labelled
        vision = 2 * self.vision_weights * patches + 4 * self.vision_full_width * patch_squares
        vision += 4 * self.vision_window_width * patches * _WINDOW_PATCHES
        if self.vision_trained:
            # To activations as much as forward, in attention twice that; to weights only those that are trained.
            vision = 3 * vision + 2 * (self.vision_trained - self.vision_weights) * patches
        back = 4 if self.vision_trained or self.merger_trained else 2
        merger = (back * self.merger_weights + 2 * self.merger_trained) * visual_tokens
        return float(linear + attention + head + vision + merger)

    def of_batch(self, batch: "MicroBatch") -> float:
        if batch.attention_mask is None:
            lengths = np.diff(np.array(batch.borders, np.int64))[: len(batch.sample_ids)]
        else:
            lengths = batch.attention_mask.cpu().numpy().sum(axis=1, dtype=np.int64)
        patches = batch.image_grid_thw.cpu().prod(dim=1)
        labelled = int((batch.label_weights > 0).sum())
        squares = int(np.dot(lengths, lengths)), int((patches**2).sum())
        return self.flops(batch.num_useful_tokens, squares[0], labelled, int(patches.sum()), squares[1], len(patches))


@dataclass(frozen=True)
class NetworkSize:
    """A network from its config.json, adapters included."""

    shape: ModelShape
    all_weights: int
    """Embeddings and head included, adapters apart."""
    trained: int
    hidden: int
    layers: int
    token_bytes: int
    """What a decoder layer keeps for backward of each token, in bf16 (`train.network.memory`)."""
    token_bytes_compiled: int
    vision_hidden: int
    vision_layers: int
    patch_bytes: int
    """What a vision block keeps of each patch."""


@dataclass(frozen=True)
class _Linear:
    name: str
    """As in the network, behind the path of its layer."""
    num_in: int
    num_out: int
    bias: bool = False

    @property
    def weights(self) -> int:
        return self.num_in * self.num_out + (self.num_out if self.bias else 0)


def size_of_config(config: Mapping[str, Any], network: Network, lora: LoraConfig | None, where: str) -> NetworkSize:
    """Count the weights of a base and its adapters from its config.json. lora: None: every part but the vision tower is trained.

    Raises ConfigError where the config is of another model than `network`, of one whose layers are not known here, or lacks a key.
    """
    kind = config.get("model_type")
    is_counted = network.architecture in _LAYERS
    if not is_counted or kind != network.model_type:
        counted = dict.fromkeys(one.network.model_type for one in FAMILIES.values() if one.network.architecture in _LAYERS)
        expected = network.model_type if is_counted else f"one of {', '.join(counted)}: others are not counted yet"
        raise ConfigError(where, found=f"model_type {kind!r}", expected=expected)
    try:
        return _size(config, network, lora)
    except (KeyError, TypeError) as error:
        raise ConfigError(where, found=f"a config without {error}", expected=f"config.json of a {kind} checkpoint") from error


def _size(config: Mapping[str, Any], network: Network, lora: LoraConfig | None) -> NetworkSize:
    text = config.get("text_config") or config  # published configs of Qwen2-VL and Qwen2.5-VL are flat
    vision = config["vision_config"]
    hidden, layers = text["hidden_size"], text["num_hidden_layers"]
    decoder, tower, merger = _LAYERS[network.architecture](text, vision)
    vision_weights = tower.depth * tower.block.weights + tower.kernel
    language = layers * decoder.weights
    head = hidden * text["vocab_size"]
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    trained: dict[NetworkPart, int] = {
        "language": _adapters(decoder.linears, "model.language_model.layers.0.", network, "language", lora) * layers,
        "vision": _adapters(tower.block.linears, "model.visual.blocks.0.", network, "vision", lora) * tower.depth,
        "merger": _adapters(merger.linears, "model.visual.", network, "merger", lora),
    }
    if lora is None:
        trained = {"language": language + head * (1 if tied else 2) + hidden, "vision": 0, "merger": merger.weights}
    shape = ModelShape(
        language_weights=language,
        language_trained=language if lora is None else trained["language"],
        attention_width=_attention_width(text) * layers,
        head_weights=head,
        head_trained=head if lora is None else 0,
        vocabulary=text["vocab_size"],
        vision_weights=vision_weights,
        vision_trained=trained["vision"],
        vision_full_width=tower.hidden * tower.num_full,
        vision_window_width=tower.hidden * (tower.depth - tower.num_full),
        merger_weights=merger.weights,
        merger_trained=trained["merger"],
        patches_per_token=vision.get("spatial_merge_size", 2) ** 2,
    )
    every = language + hidden + head * (1 if tied else 2) + vision_weights + tower.positions + merger.weights
    keys = text.get("num_key_value_heads", text["num_attention_heads"]) * _head_size(text)
    width, inner = _attention_width(text), text["intermediate_size"]
    return NetworkSize(
        shape=shape,
        all_weights=every,
        trained=sum(trained.values()),
        hidden=hidden,
        layers=layers,
        token_bytes=18 * hidden + 6 * width + 4 * keys + 8 * inner,
        token_bytes_compiled=8 * hidden + 6 * width + 4 * keys + 6 * inner,
        vision_hidden=tower.hidden,
        vision_layers=tower.depth,
        patch_bytes=18 * tower.hidden + 10 * tower.hidden + 8 * tower.inner,
    )


# ---- layers, by the family's architecture


@dataclass(frozen=True)
class _Layer:
    linears: list[_Linear]
    norms: int

    @property
    def weights(self) -> int:
        return sum(one.weights for one in self.linears) + self.norms


@dataclass(frozen=True)
class _Tower:
    hidden: int
    inner: int
    """Width of a block's MLP."""
    depth: int
    block: _Layer
    kernel: int
    """Weights that make a patch a vector."""
    num_full: int
    """Layers with attention over the whole image."""
    positions: int = 0
    """Looked up, not multiplied."""


_Section = Mapping[str, Any]
_Layers = tuple[_Layer, _Tower, _Layer]
"""A decoder layer, the tower, the merger."""


def _head_size(text: _Section) -> int:
    return int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])


def _attention_width(text: _Section) -> int:
    return int(text["num_attention_heads"] * _head_size(text))


def _decoder(text: _Section, *, head_norms: bool) -> _Layer:
    """head_norms: queries and keys are normalised head by head, and need no bias."""
    hidden, width, inner = text["hidden_size"], _attention_width(text), text["intermediate_size"]
    keys = text.get("num_key_value_heads", text["num_attention_heads"]) * _head_size(text)
    layers = [
        _Linear("self_attn.q_proj", hidden, width, not head_norms),
        _Linear("self_attn.k_proj", hidden, keys, not head_norms),
        _Linear("self_attn.v_proj", hidden, keys, not head_norms),
        _Linear("self_attn.o_proj", width, hidden),
        _Linear("mlp.gate_proj", hidden, inner),
        _Linear("mlp.up_proj", hidden, inner),
        _Linear("mlp.down_proj", inner, hidden),
    ]
    return _Layer(layers, 2 * hidden + (2 * _head_size(text) if head_norms else 0))


def _vision_attention(hidden: int) -> list[_Linear]:
    return [_Linear("attn.qkv", hidden, 3 * hidden, True), _Linear("attn.proj", hidden, hidden, True)]


def _kernel(vision: _Section, hidden: int) -> int:
    return int(vision["patch_size"] ** 2 * 3 * vision.get("temporal_patch_size", 2) * hidden)


def _merged(vision: _Section, vision_hidden: int) -> int:
    return int(vision_hidden * vision.get("spatial_merge_size", 2) ** 2)


def _merger(text: _Section, vision: _Section, vision_hidden: int, norms: int) -> _Layer:
    merged = _merged(vision, vision_hidden)
    return _Layer([_Linear("merger.mlp.0", merged, merged, True), _Linear("merger.mlp.2", merged, text["hidden_size"], True)], norms)


def _full_tower(text: _Section, vision: _Section) -> _Layers:
    hidden = vision["embed_dim"]
    inner = int(hidden * vision["mlp_ratio"])
    mlp = [_Linear("mlp.fc1", hidden, inner, True), _Linear("mlp.fc2", inner, hidden, True)]
    block = _Layer([*_vision_attention(hidden), *mlp], 4 * hidden)
    tower = _Tower(hidden, inner, vision["depth"], block, _kernel(vision, hidden), num_full=vision["depth"])
    return _decoder(text, head_norms=False), tower, _merger(text, vision, hidden, norms=2 * hidden)


def _windowed_tower(text: _Section, vision: _Section) -> _Layers:
    hidden, inner = vision["hidden_size"], vision["intermediate_size"]
    gated = [_Linear(f"mlp.{name}_proj", hidden, inner, True) for name in ("gate", "up")]
    block = _Layer([*_vision_attention(hidden), *gated, _Linear("mlp.down_proj", inner, hidden, True)], 2 * hidden)
    full = vision.get("fullatt_block_indexes")
    num_full = vision["depth"] if full is None else len(full)
    tower = _Tower(hidden, inner, vision["depth"], block, _kernel(vision, hidden), num_full)
    return _decoder(text, head_norms=False), tower, _merger(text, vision, hidden, norms=hidden)


def _deepstack(text: _Section, vision: _Section) -> _Layers:
    hidden, inner, out = vision["hidden_size"], vision["intermediate_size"], vision["out_hidden_size"]
    mlp = [_Linear("mlp.linear_fc1", hidden, inner, True), _Linear("mlp.linear_fc2", inner, hidden, True)]
    block = _Layer([*_vision_attention(hidden), *mlp], 4 * hidden)
    positions = vision["num_position_embeddings"] * hidden
    tower = _Tower(hidden, inner, vision["depth"], block, _kernel(vision, hidden) + hidden, num_full=vision["depth"], positions=positions)
    merged = _merged(vision, hidden)
    names = ["merger", *(f"deepstack_merger_list.{number}" for number in range(len(vision["deepstack_visual_indexes"])))]
    mergers = [
        linear
        for name in names
        for linear in (_Linear(f"{name}.linear_fc1", merged, merged, True), _Linear(f"{name}.linear_fc2", merged, out, True))
    ]
    return _decoder(text, head_norms=True), tower, _Layer(mergers, 2 * hidden + (len(names) - 1) * 2 * merged)


_LAYERS: dict[Architecture, Callable[[_Section, _Section], _Layers]] = {
    "full_tower": _full_tower,
    "windowed_tower": _windowed_tower,
    "deepstack": _deepstack,
}
"""Architectures that are counted from config.json alone."""


def _adapters(layers: Iterable[_Linear], path: str, network: Network, part: NetworkPart, lora: LoraConfig | None) -> int:
    """Weights of the adapters of these layers: A (rank, in) and B (out, rank); DoRA has a magnitude for each output as well."""
    if lora is None or part not in lora.parts:
        return 0
    targets = [one for one in layers if re.fullmatch(network.lora_targets[part], path + one.name)]
    return sum(lora.rank * (one.num_in + one.num_out) + (one.num_out if lora.use_dora else 0) for one in targets)
