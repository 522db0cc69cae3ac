"""Memory of a training step on one device, from config.json alone, and how many layers must be computed again in backward to fit. No torch.

    weights       2 bytes each (bf16; 4 in float32)
    trained       16 bytes each: float32 master, gradient, two moments of Adam
    activations   of a decoder layer with adapters, for each token (h hidden size, a attention width, k keys' width, m MLP width):
                  8 h   inputs of the two norms, in float32             6 h   inputs of q, k, v, cast for the adapters
                  4 h   inputs of gate and up, likewise                 2 a   input of o
                  4 a + 4 k  what attention keeps: q, k, v, output      8 m   gate, its activation, up, and the input of down
                  compiled, the norms keep 4 h, casts are made once (q, k, v: 2 h, gate and up: 2 h), and the activation is made again: 6 m
    recomputed    2 h bytes a token for the input of each such layer, and one layer whole: the one at work
    vision        the same for each patch and block, where something in the tower is trained; computed again with the first decoder layer
    head          8 bytes a logit of at most `loss.chunk_tokens` labelled tokens: the logits and their gradient, in float32

Against a measurement (H200, 2026-11-27, Qwen2.5-VL-7B and 3B, packs of 4,096 tokens): within 7 % in seven settings, which a test holds.
"""

from dataclasses import dataclass

from boxcar.train.network.model_shape import NetworkSize

TRAINED_BYTES = 16
USABLE_SHARE = 0.92
"""Of a device's memory: the rest goes to its context, to fragments, and to what a formula forgets."""
GPU_GB = {"H200": 141.0, "H100": 80.0, "A100": 80.0, "L40S": 48.0, "L4": 24.0, "4090": 24.0, "B200": 180.0}
"""1e9 bytes, as published by NVIDIA; the larger one where there are several."""


@dataclass(frozen=True)
class StepLoad:
    """What one forward and backward pass goes over."""

    tokens: int
    """Of all packs of the pass."""
    patches: int
    logit_tokens: int
    """Labelled tokens whose logits exist at a time: `loss.chunk_tokens`, or all that there are."""
    compiled: bool = False
    value_bytes: int = 2
    """Of a weight and an activation: 2 in bf16, 4 in float32."""


@dataclass(frozen=True)
class MemoryPlan:
    """How many decoder layers are computed again in backward."""

    recomputed_layers: int
    layers: int
    predicted_gb: float
    """Of a step, 1e9 bytes."""
    available_gb: float
    fits: bool
    """False: not even with every layer computed again."""


def step_bytes(size: NetworkSize, load: StepLoad, recomputed_layers: int) -> int:
    """Bytes at the peak of a step in which so many decoder layers are computed again in backward."""
    kept = size.layers - recomputed_layers
    layer = size.token_bytes_compiled if load.compiled else size.token_bytes
    at_work = layer if recomputed_layers else 0
    activations = load.tokens * (kept * layer + at_work + recomputed_layers * 2 * size.hidden)
    if size.shape.vision_trained:
        block = size.patch_bytes
        blocks = block + size.vision_layers * 2 * size.vision_hidden if recomputed_layers else size.vision_layers * block
        activations += load.patches * blocks
    logits = 8 * min(load.logit_tokens, load.tokens) * size.shape.vocabulary
    return load.value_bytes * size.all_weights + TRAINED_BYTES * size.trained + activations * load.value_bytes // 2 + logits


def plan_memory(size: NetworkSize, load: StepLoad, available_bytes: float) -> MemoryPlan:
    """The least layers to compute again so that a step fits into `available_bytes`; all of them where it does not fit at all."""
    for recomputed in range(size.layers + 1):
        needed = step_bytes(size, load, recomputed)
        if needed <= available_bytes:
            break
    return MemoryPlan(recomputed, size.layers, needed / 1e9, available_bytes / 1e9, needed <= available_bytes)
