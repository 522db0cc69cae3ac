"""A loaded network's shape, for MFU, and the peak of the device it is on. The formulas stand in `train.network.model_shape`."""

import math
import re
from collections import Counter
from typing import Any

import torch
from torch import nn

from boxcar.pipelines.families.patches import ResizeRule
from boxcar.train.network.model import Base, part_of
from boxcar.train.network.model_shape import PEAK_TFLOPS, Experts, ModelShape


def shape_of(base: Base) -> ModelShape:
    """Count a network's weights by part, adapters apart."""
    network = base.family.network
    kinds = {kind: re.compile(pattern) for kind, pattern in network.experts.items()}
    layer = re.compile(rf"(base_model\.model\.)?{re.escape(network.decoder_layers)}\.")
    head = next(weight for name, weight in base.head.named_parameters() if name in ("weight", "base_layer.weight"))
    looked_up = {f"{name}.weight" for name, module in base.model.named_modules() if isinstance(module, nn.Embedding)}
    counts: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    for name, parameter in base.model.named_parameters():
        part: str = part_of(name, network)
        if name in looked_up:
            continue
        if part == "language":
            if not layer.match(name):
                continue  # the head sees labelled tokens only
            part = next((kind for kind, pattern in kinds.items() if pattern.search(name)), part)
        if parameter.requires_grad:
            trained[part] += num_weights(parameter)
        if not re.search(r"\.lora_", name):
            counts[part] += num_weights(parameter)
    text = base.model.config.get_text_config()
    full, windowed = _vision_widths(base)
    experts = None
    if kinds:
        edges = base.family.chat.extra_placeholders - 1
        experts = Experts(counts["text"], trained["text"], counts["image"], trained["image"], edges)
    return ModelShape(
        language_weights=counts["language"],
        language_trained=trained["language"],
        attention_width=_text_width(text) * text.num_hidden_layers,
        head_weights=num_weights(head),
        head_trained=num_weights(head) if head.requires_grad else 0,
        vocabulary=text.vocab_size,
        vision_weights=counts["vision"],
        vision_trained=trained["vision"],
        vision_full_width=full,
        vision_window_width=windowed,
        merger_weights=counts["merger"],
        merger_trained=trained["merger"],
        patches_per_token=_patches_per_token(base.family.resize),
        experts=experts,
    )


def num_weights(parameter: torch.Tensor) -> int:
    """Weights of a parameter, also of one that ZeRO-3 has cut over the ranks, and of one in 4 bits, which lie two in a byte."""
    four_bits = getattr(parameter, "quant_state", None)
    return int(getattr(parameter, "ds_numel", parameter.numel()) if four_bits is None else math.prod(four_bits.shape))


def _text_width(text: Any) -> int:
    """Heads times their size, which is not always the hidden size (Qwen3-VL-4B: 4096 of 2560)."""
    size: int = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return size * int(text.num_attention_heads)


def _patches_per_token(resize: ResizeRule) -> int:
    limits = resize.published_limits
    sizes = resize([448], [448], limits.min_pixels, limits.max_pixels)
    return int(sizes.grid_h[0] * sizes.grid_w[0] // sizes.visual_tokens[0])


def _vision_widths(base: Base) -> tuple[int, int]:
    """(hidden size x layers with full attention, hidden size x windowed layers)."""
    if base.native:
        return base.model.vision_attention_width, 0
    vision = base.model.config.vision_config
    hidden = int(base.vision.patch_embed.proj.out_channels)  # the configs call it by different names
    full = getattr(vision, "fullatt_block_indexes", None)
    num_full = vision.depth if full is None else len(full)
    return hidden * num_full, hidden * (vision.depth - num_full)


def peak_flops(device: torch.device, configured_tflops: float | None) -> float | None:
    """Of one device per second; None where it is not known (MFU is then not reported)."""
    if configured_tflops is not None:
        return configured_tflops * 1e12
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, tflops in PEAK_TFLOPS.items():
            if key in name:
                return tflops * 1e12
    return None
