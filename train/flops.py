"""Floating-point work of a micro-batch, for MFU.

    MFU = useful model FLOPs per second / peak FLOPs per second of the device

Useful: what forward and backward need without recomputation, for tokens that are not padding. A multiply-add is 2 FLOPs.

    language   forward 2 P T, backward to activations 2 P T, to weights 2 P_trained T     P: weights of the decoder layers
               attention forward 4 d_attn sum(L^2) / 2 (causal) a layer, backward twice that
    head       the same as the language on the N labelled tokens: 2 P_head N, and 2 P_head N back
    vision     forward 2 P_v patches + 4 d_v sum(patches^2) a layer with full attention; backward only where something in it is trained.
               Windowed layers count 64 patches to a window (Qwen2.5-VL: 112 px).

With LoRA, P_trained are the adapters, and so T tokens cost about 4 P T (PaLM, arXiv 2204.02311, appendix B, less the base's weight
gradients).
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from train.model import Base, part_of

if TYPE_CHECKING:
    from train.collate import MicroBatch

PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "4090": 165.0, "B200": 2250.0}
"""Dense bf16, published by NVIDIA; the SXM variant where there are several."""
_WINDOW_PATCHES = 64


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a network that its FLOPs follow from."""

    language_weights: int
    language_trained: int
    attention_width: int
    """Heads times head size, times layers."""
    head_weights: int
    vocabulary: int
    vision_weights: int
    """Weights that each patch passes (the merger's count a fourth: it sees merged patches)."""
    vision_trained: int
    vision_full_width: int
    """Hidden size times the layers with attention over the whole image."""
    vision_window_width: int

    def flops(self, tokens: int, length_squares: int, labelled: int, patches: int, patch_squares: int) -> float:
        """FLOPs of forward and backward. length_squares: sum of document lengths squared; patch_squares: of images' patches."""
        linear = (4 * self.language_weights + 2 * self.language_trained) * tokens
        attention = 3 * 2 * self.attention_width * length_squares
        head = 4 * self.head_weights * labelled
        vision = 2 * self.vision_weights * patches + 4 * self.vision_full_width * patch_squares
        vision += 4 * self.vision_window_width * patches * _WINDOW_PATCHES
        if self.vision_trained:
            vision = 3 * vision
        return float(linear + attention + head + vision)

    def of_batch(self, batch: "MicroBatch") -> float:
        lengths = torch.diff(torch.tensor(batch.borders))[: len(batch.sample_ids)]
        patches = batch.image_grid_thw.cpu().prod(dim=1)
        labelled = int((batch.label_weights > 0).sum())
        return self.flops(batch.num_useful_tokens, int((lengths**2).sum()), labelled, int(patches.sum()), int((patches**2).sum()))


def shape_of(base: Base) -> ModelShape:
    """Count a network's weights by part, adapters apart."""
    network = base.family.network
    counts = {"language": 0, "merger": 0, "vision": 0}
    trained = {"language": 0, "merger": 0, "vision": 0}
    for name, parameter in base.model.named_parameters():
        part = part_of(name, network)
        size = getattr(parameter, "ds_numel", parameter.numel())
        if parameter.requires_grad:
            trained[part] += size
        if part == "language" and not re.match(rf"{re.escape(network.decoder_layers)}\.", name):
            continue  # embeddings are looked up, and the head sees labelled tokens only
        if not re.search(r"\.lora_", name):
            counts[part] += size
    text = base.model.config.get_text_config()
    (head,) = (weight for name, weight in base.head.named_parameters() if name == "weight")
    full, windowed = _vision_widths(base)
    return ModelShape(
        language_weights=counts["language"],
        language_trained=trained["language"],
        attention_width=text.hidden_size * text.num_hidden_layers,
        head_weights=getattr(head, "ds_numel", head.numel()),
        vocabulary=text.vocab_size,
        vision_weights=counts["vision"] + counts["merger"] // 4,
        vision_trained=trained["vision"] + trained["merger"],
        vision_full_width=full,
        vision_window_width=windowed,
    )


def _vision_widths(base: Base) -> tuple[int, int]:
    """(hidden size x layers with full attention, hidden size x windowed layers)."""
    if base.native:
        return 0, 0  # counted by their weights alone: 1.5 % (Qwen-VL) and 1 % (CogVLM) too low
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
