"""A base small enough for a laptop: a family's architecture in a config.json, for `init: random`. Trials, tests and benchmarks."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from boxcar.pipelines.families.catalog import find_family
from boxcar.pipelines.families.family import Architecture, Family
from boxcar.pipelines.tokens.tokenizer import load_tokenizer

_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}


def _full_tower(text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    vision |= {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": text["hidden_size"]}
    return {"text_config": text | {"rope_parameters": _ROPE}, "vision_config": vision, "architectures": ["Qwen2VLForConditionalGeneration"]}


def _windowed_tower(text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    vision |= {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "fullatt_block_indexes": [1], "window_size": 112}
    vision |= {"out_hidden_size": text["hidden_size"]}
    architecture = ["Qwen2_5_VLForConditionalGeneration"]
    return {"text_config": text | {"rope_parameters": _ROPE}, "vision_config": vision, "architectures": architecture}


def _deepstack(text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    vision |= {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "num_position_embeddings": 256}
    vision |= {"out_hidden_size": text["hidden_size"], "deepstack_visual_indexes": [0, 1]}
    rope = _ROPE | {"mrope_interleaved": True}
    # What deepstack adds after the last layer reaches no text token: one layer more than it has levels.
    text |= {"head_dim": 16, "rope_parameters": rope, "num_hidden_layers": 3}
    return {"text_config": text, "vision_config": vision, "architectures": ["Qwen3VLForConditionalGeneration"]}


def _visual_expert(side: int, vocabulary: int) -> dict[str, Any]:
    vision: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_heads": 2}
    vision |= {"patch_size": 14, "image_size": side, "num_positions": (side // 14) ** 2 + 1, "in_channels": 3}
    vision |= {"layer_norm_eps": 1e-6, "dropout_prob": 0.0, "hidden_act": "gelu"}
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return text | {"vocab_size": vocabulary, "vision_config": vision}


def _grouped_visual_expert(side: int, vocabulary: int) -> dict[str, Any]:
    return _visual_expert(side, vocabulary) | {"num_multi_query_heads": 2}


def _resampler(side: int, vocabulary: int) -> dict[str, Any]:
    # The resampler's heads are 128 wide, as published: narrower it cannot be.
    visual = {"image_size": side, "patch_size": 14, "width": 32, "layers": 2, "heads": 2, "mlp_ratio": 2.0, "output_dim": 128}
    text = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "kv_channels": 32, "intermediate_size": 256}
    return text | {"vocab_size": vocabulary, "visual": visual}


_OF_TRANSFORMERS: dict[Architecture, Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]] = {
    "full_tower": _full_tower,
    "windowed_tower": _windowed_tower,
    "deepstack": _deepstack,
}
"""Sections of the text and the vision model, with what all have in them -> the config."""
_OF_OURS: dict[Architecture, Callable[[int, int], dict[str, Any]]] = {
    "resampler": _resampler,
    "visual_expert": _visual_expert,
    "grouped_visual_expert": _grouped_visual_expert,
}
"""Side of the images in pixels, and size of the vocabulary -> the config."""


def write_tiny_base(folder: Path, family_name: str, tokenizer: str) -> None:
    """Write config.json of a tiny network that fits the family and the tokenizer. Raises ConfigError for an unknown family."""
    family = find_family(family_name)
    loaded = load_tokenizer(tokenizer)
    vocabulary = -(-max(loaded.backend.get_vocab_size(), *(number + 1 for number in loaded.special_ids.values())) // 64) * 64
    network = family.network
    if network.architecture in _OF_OURS:
        config = _OF_OURS[network.architecture](family.resize.vision_config["image_size"], vocabulary)
        config |= {"model_type": network.model_type}
    else:
        config = _of_transformers(family, loaded.special_ids, vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def _of_transformers(family: Family, special: Mapping[str, int], vocabulary: int) -> dict[str, Any]:
    network = family.network
    ids = {"bos_token_id": None, "eos_token_id": special[family.chat.reply_ends[0]], "pad_token_id": None}
    text = _TEXT | ids | {"vocab_size": vocabulary, "model_type": f"{network.model_type}_text"}
    vision = {**family.resize.vision_config, "temporal_patch_size": 2, "in_channels": 3}
    return _OF_TRANSFORMERS[network.architecture](text, vision) | {
        "model_type": network.model_type,
        "image_token_id": special[family.chat.image_token],
        "video_token_id": special.get("<|video_pad|>", vocabulary - 1),
        "vision_start_token_id": special["<|vision_start|>"],
        "vision_end_token_id": special["<|vision_end|>"],
        "tie_word_embeddings": False,
    }
