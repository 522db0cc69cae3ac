"""Architectures to measure with random weights: config.json of published models, and a tiny one for dry runs."""

import json
from pathlib import Path
from typing import Any

FAMILY = "qwen2_5_vl"

# What Qwen2.5-VL-3B-Instruct and -7B-Instruct publish on the Hugging Face hub, without what a network does not read (dtype, versions).
_SHARED: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "sliding_window": 32768,
    "use_sliding_window": False,
}
_VISION: dict[str, Any] = {
    "depth": 32,
    "hidden_act": "silu",
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_chans": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
    "temporal_patch_size": 2,
}
SIZES: dict[str, dict[str, Any]] = {
    "3b": _SHARED
    | {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "max_window_layers": 70,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
        "vision_config": _VISION | {"out_hidden_size": 2048},
    },
    "7b": _SHARED
    | {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_window_layers": 28,
        "tie_word_embeddings": False,
        "vocab_size": 152064,
        "vision_config": _VISION | {"out_hidden_size": 3584},
    },
    "tiny": _SHARED
    | {
        "bos_token_id": None,
        "eos_token_id": 249,
        "vision_start_token_id": 250,
        "vision_end_token_id": 251,
        "vision_token_id": 252,
        "image_token_id": 253,
        "video_token_id": 254,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_window_layers": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": False,
        "vocab_size": 256,
        "vision_config": _VISION
        | {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "fullatt_block_indexes": [1], "out_hidden_size": 64},
    },
}
"""By name; the tiny one is of no published model."""


def write_config(folder: Path, size: str) -> Path:
    """A folder that `train.network.model.open_base` takes with `random_weights`."""
    path = folder / size
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(SIZES[size], indent=1) + "\n")
    return path


def first_special(size: str) -> int:
    """Ids below it are ordinary text."""
    config = SIZES[size]
    return int(min(config[key] for key in ("eos_token_id", "vision_start_token_id", "image_token_id")))
