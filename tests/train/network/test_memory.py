"""Memory of a step: the formula against measured figures and against what a layer really keeps; how many layers are computed again."""

from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from transformers.models.qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer

from boxcar.pipelines.families.catalog import FAMILIES
from boxcar.schemas.training import LoraConfig
from boxcar.tools.bench.qwen_sizes import SIZES
from boxcar.train.network.memory import StepLoad, plan_memory, step_bytes
from boxcar.train.network.model_shape import NetworkSize, size_of_config
from tests.places import ROOT

LABELLED = 532
"""13 % of 4,096 tokens, as in the measurement."""


def size_of(name: str, **lora: Any) -> NetworkSize:
    network = FAMILIES["qwen2_5_vl"].network
    return size_of_config(SIZES[name], network, LoraConfig.model_validate({"rank": 16, "parts": ["language"], **lora}), name)


@pytest.mark.parametrize(
    ("name", "recomputes", "compiled", "measured_gb"),
    [
        ("7b", False, False, 47.1),
        ("7b", True, False, 19.7),
        ("7b", False, True, 38.7),
        ("7b", True, True, 19.6),
        ("3b", True, False, 9.6),
        ("3b", False, True, 24.2),
        ("3b", True, True, 9.6),
    ],
)
def test_the_formula_is_within_7_percent_of_what_a_gpu_showed(name: str, recomputes: bool, compiled: bool, measured_gb: float) -> None:
    """One H200, 2026-11-27: torch 2.11, Qwen2.5-VL, LoRA rank 16 on the language model, bf16, packs of 4,096 tokens."""
    size = size_of(name)
    load = StepLoad(4096, 4096 * 4, LABELLED, compiled=compiled)
    assert step_bytes(size, load, size.layers if recomputes else 0) / 1e9 == pytest.approx(measured_gb, rel=0.07)


def test_a_decoder_layer_keeps_what_the_formula_says() -> None:
    """Measured on the CPU: the bytes that autograd saves in a layer with adapters, in bf16."""
    hidden, keys, inner, tokens = 256, 128, 1024, 512
    rope = {"type": "mrope", "mrope_section": [8, 12, 12]}
    config = Qwen2_5_VLTextConfig(
        hidden_size=hidden, num_attention_heads=4, num_key_value_heads=2, intermediate_size=inner, num_hidden_layers=1, rope_scaling=rope
    )
    config._attn_implementation = "sdpa"
    layer = Qwen2_5_VLDecoderLayer(config, 0).to(torch.bfloat16)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=names), layer)
    for name, weight in layer.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.float()
    weights = {weight.untyped_storage().data_ptr() for weight in layer.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    states = torch.randn(1, tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    rotary = torch.randn(1, tokens, hidden // 4, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        layer(states, position_embeddings=(rotary, rotary.clone()), attention_mask=None)
    measured = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights) / tokens
    formula = 18 * hidden + 6 * hidden + 4 * keys + 8 * inner
    assert formula <= measured <= 1.05 * formula, "beside it: rotary angles and the adapters' own small products"
    text = SIZES["7b"] | {"hidden_size": hidden, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": inner}
    size = size_of_config(text, FAMILIES["qwen2_5_vl"].network, LoraConfig(rank=4), "made up")
    assert size.token_bytes == formula


def test_as_few_layers_as_fit_are_recomputed() -> None:
    size, load = size_of("7b"), StepLoad(4096, 16_384, 2048)
    needed = [step_bytes(size, load, number) for number in range(size.layers + 1)]
    assert needed[1:] == sorted(needed[1:], reverse=True)
    assert needed[1] > needed[0], "the one layer that is computed again is there all the same, while it works"
    assert plan_memory(size, load, 141e9).recomputed_layers == 0
    for number in (2, 10, 28):
        plan = plan_memory(size, load, needed[number])
        assert (plan.recomputed_layers, plan.fits, plan.layers) == (number, True, 28)
    nothing = plan_memory(size, load, 10e9)
    assert (nothing.recomputed_layers, nothing.fits) == (28, False)


def test_a_trained_tower_keeps_its_blocks() -> None:
    load = StepLoad(4096, 16_384, LABELLED)
    with_tower = size_of("3b", parts=["language", "vision"])
    assert step_bytes(with_tower, load, 0) - step_bytes(size_of("3b"), load, 0) > 32 * with_tower.patch_bytes * 16_384
    assert step_bytes(with_tower, load, 36) < step_bytes(with_tower, load, 0) / 2


def test_float32_takes_twice_the_bytes_but_for_what_is_float32_anyway() -> None:
    size, load = size_of("3b"), StepLoad(4096, 16_384, LABELLED)
    both = [step_bytes(size, replace(load, value_bytes=value), 0) for value in (2, 4)]
    assert 1.8 < both[1] / both[0] < 2


def test_no_torch_is_needed() -> None:
    assert "import torch" not in (ROOT / "train/network/memory.py").read_text()
