"""FLOPs against counts by hand, and against what torch counts when the network runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from boxcar.pipelines.families.catalog import FAMILIES, find_family
from boxcar.schemas.training import LoraConfig, NetworkPart
from boxcar.train.network.flops import shape_of
from boxcar.train.network.model import Base, attach_lora, unfreeze
from boxcar.train.network.model_shape import ModelShape
from tests.train.network.native.checks import Document
from tests.train.network.native.test_cogvlm import SIDE, row, small_network
from tests.train.network.native.test_qwen_vl import small_network as small_qwen_vl
from tests.train.tiny import packed_batch, padded_batch, random_documents, tiny_base

EVERY_PART: tuple[NetworkPart, ...] = ("language", "merger", "vision")
LINEAR = ("mm", "addmm", "convolution", "convolution_backward")
"""What torch calls the products with weights. Attention is left to the hand: it is counted without the causal half there."""


def cogvlm(version: int) -> Base:
    return Base(small_network(version), FAMILIES["cogvlm" if version == 1 else "cogvlm2"], 0, packed=False, native=True)


# ---- by hand


@pytest.mark.parametrize(
    ("version", "text", "image"),
    [
        # 2 layers, hidden 32, MLP 48; v2 has 2 heads of 8 for keys and values of 4, and a bias on the image's queries, keys and values.
        pytest.param(1, 2 * (32 * 96 + 32 * 32 + 3 * 32 * 48), 2 * (32 * 96 + 32 * 32 + 3 * 32 * 48), id="cogvlm"),
        pytest.param(2, 2 * (32 * 64 + 32 * 32 + 3 * 32 * 48), 2 * (32 * 64 + 64 + 32 * 32 + 3 * 32 * 48), id="cogvlm2"),
    ],
)
def test_a_token_passes_one_expert(version: int, text: int, image: int) -> None:
    base = cogvlm(version)
    shape = shape_of(base)
    assert shape.experts is not None
    assert (shape.experts.text_weights, shape.experts.image_weights, shape.language_weights) == (text, image, 2 * 2 * 32)
    assert (shape.attention_width, shape.head_weights) == (32 * 2, 64 * 32)
    assert shape.patches_per_token == (1 if version == 1 else 4)
    frozen = _frozen(shape)
    # Ten tokens of text; then six of them those of an image of 4 visual tokens, boi and eoi: five are the image expert's.
    patches = 4 * shape.patches_per_token
    norms = 2 * 2 * 32
    only_text = frozen.flops(10, 0, 0, 0, 0, 0)
    with_image = frozen.flops(10, 0, 0, patches, 0, 1) - _tower(frozen, patches)
    assert only_text == 4 * (text + norms) * 10
    assert with_image == 4 * norms * 10 + 4 * text * 5 + 4 * image * 5
    everything = sum(parameter.numel() for name, parameter in base.model.named_parameters() if name.startswith("model.layers."))
    assert text + image + norms == everything, "each weight once, and no token passes all of them"


def test_adapters_of_experts_are_trained_on_their_own_tokens() -> None:
    base = cogvlm(1)
    attach_lora(base, LoraConfig(rank=2), seed=0)
    shape = shape_of(base)
    assert shape.experts is not None
    # qkv 32 -> 96, dense 32 -> 32, gate and up 32 -> 48, down 48 -> 32; A and B of rank 2, two layers.
    adapters = 2 * 2 * ((32 + 96) + (32 + 32) + 3 * (32 + 48))
    assert (shape.experts.text_trained, shape.experts.image_trained, shape.language_trained) == (adapters, adapters, 0)
    assert shape.experts.text_weights == shape.experts.image_weights == 2 * (32 * 96 + 32 * 32 + 3 * 32 * 48), "adapters apart"
    plain = shape_of(cogvlm(1))
    trained = shape.flops(10, 0, 0, 16, 0, 1) - _frozen(plain).flops(10, 0, 0, 16, 0, 1)
    assert trained == 2 * adapters * 10


def test_a_published_cogvlm_costs_half_of_what_it_weighs() -> None:
    """cogvlm-grounding-generalist: 1,227 placeholders and 60 tokens of text, LoRA left out."""
    from boxcar.train.network.native.cogvlm import CogVLMConfig, CogVLMForCausalLM  # noqa: PLC0415

    with torch.device("meta"):
        model = CogVLMForCausalLM(CogVLMConfig(vision_config={"num_positions": 1226}))
    shape = _frozen(shape_of(Base(model, FAMILIES["cogvlm"], 0, packed=False, native=True)))
    expert = 32 * (4096 * 3 * 4096 + 4096 * 4096 + 3 * 4096 * 11008)
    per_token = 4 * (expert + 32 * 2 * 4096)
    found = shape.flops(1287, 0, 0, 1225, 0, 1) - _tower(shape, 1225)
    assert found == per_token * 1287
    everything = sum(weight.numel() for name, weight in model.named_parameters() if name.startswith("model.layers."))
    assert found / (4 * everything * 1287) == pytest.approx(0.5, abs=1e-3)
    # Of the tower: 63 layers of 1792 with attention over 1,226 tokens, one for the class; here 1,225.
    assert shape.vision_full_width == 63 * 1792
    assert shape.vision_weights == pytest.approx(63 * (4 * 1792**2 + 2 * 1792 * 15360), rel=0.001)


def test_qwen2_5_vl_by_hand(tmp_path: Path) -> None:
    """2 decoder layers of 64 with 128 in the MLP and 2 of 4 heads for keys; tower of 2 blocks of 32 with 64, one of them windowed."""
    base = tiny_base(tmp_path, "qwen2_5_vl")
    vocabulary = base.model.config.get_text_config().vocab_size
    decoder = 2 * ((64 * 64 + 64) + 2 * (64 * 32 + 32) + 64 * 64 + 3 * 64 * 128 + 2 * 64)
    tower = 2 * ((32 * 96 + 96) + (32 * 32 + 32) + 2 * (32 * 64 + 64) + (64 * 32 + 32) + 2 * 32) + 3 * 2 * 14 * 14 * 32
    merger = (128 * 128 + 128) + (128 * 64 + 64) + 32
    assert base.model.config.vision_config.fullatt_block_indexes == [1]
    unfreeze(base, ("language",))
    shape = shape_of(base)
    assert (shape.language_weights, shape.language_trained) == (decoder, decoder), "embeddings are looked up"
    assert (shape.vision_weights, shape.merger_weights, shape.head_weights) == (tower, merger, vocabulary * 64)
    assert (shape.vision_full_width, shape.vision_window_width, shape.patches_per_token) == (32, 32, 4)
    tokens, squares, labelled, patches, patch_squares = 50, 50**2, 20, 24, 24**2
    by_hand = 6 * decoder * tokens + 3 * 4 * 64 * 2 * squares / 2 + 6 * vocabulary * 64 * labelled
    by_hand += 2 * tower * patches + 4 * 32 * patch_squares + 4 * 32 * patches * 64 + 2 * merger * patches / 4
    assert shape.flops(tokens, squares, labelled, patches, patch_squares) == by_hand


@pytest.mark.parametrize(
    ("tuned", "tower_factor", "merger_factor"),
    [
        pytest.param(("language",), 2, 2, id="language: nothing comes back to the image"),
        pytest.param(("language", "merger"), 2, 6, id="merger: the tower rests"),
        pytest.param(("language", "vision"), 6, 4, id="tower: gradients pass the merger"),
        pytest.param(("language", "merger", "vision"), 6, 6, id="all"),
    ],
)
def test_backward_goes_as_far_as_something_is_trained(
    tmp_path: Path, tuned: tuple[NetworkPart, ...], tower_factor: int, merger_factor: int
) -> None:
    base = tiny_base(tmp_path, "qwen2_5_vl")
    unfreeze(base, tuned)
    shape = shape_of(base)
    attention = (3 if "vision" in tuned else 1) * 4 * 32 * (24**2 + 24 * 64)
    found = shape.flops(0, 0, 0, 24, 24**2)
    assert found == tower_factor * shape.vision_weights * 24 + merger_factor * shape.merger_weights * 6 + attention


def test_heads_may_be_wider_than_the_hidden_size(tmp_path: Path) -> None:
    base = tiny_base(tmp_path, "qwen3_vl")
    text = base.model.config.get_text_config()
    text.head_dim = 40  # as a config of 4 heads of 40 in a hidden size of 64 says
    assert shape_of(base).attention_width == 4 * 40 * text.num_hidden_layers


def test_a_batch_counts_what_is_no_padding(tmp_path: Path) -> None:
    base = tiny_base(tmp_path, "qwen2_5_vl")
    documents, pixels = random_documents(base)
    shape = shape_of(base)
    packed = shape.of_batch(packed_batch(documents, pixels))
    assert shape.of_batch(packed_batch(documents, pixels, pad_to=4096)) == packed
    assert shape.of_batch(padded_batch(documents, pixels)) == packed
    lengths = [len(document) for document in documents]
    labelled = sum(int((document.label_weights > 0).sum()) for document in documents)
    patches = [slot.grid_thw[1] * slot.grid_thw[2] for document in documents for slot in document.images]
    squares = sum(length**2 for length in lengths), sum(number**2 for number in patches)
    assert packed == shape.flops(sum(lengths), squares[0], labelled, sum(patches), squares[1], len(patches))


# ---- by torch's own count


def _native_runs(base: Base, document: Document) -> Callable[[], torch.Tensor]:
    positions = base.model.positions(torch.ones_like(document.input_ids), document.image_mask)
    return lambda: base.model.hidden_states(document.input_ids, positions, document.pixel_values, document.image_mask)


def _transformers_runs(base: Base) -> tuple[Callable[[], torch.Tensor], dict[str, int]]:
    documents, pixels = random_documents(base)
    batch = packed_batch(documents, pixels)
    patches = batch.image_grid_thw.prod(dim=1)
    counts = {"tokens": batch.num_useful_tokens, "patches": int(patches.sum()), "images": len(patches)}
    return lambda: base.hidden_states(batch), counts


def _network(family: str, folder: Path) -> tuple[Base, Callable[[], torch.Tensor], dict[str, int]]:
    if family in ("cogvlm", "cogvlm2"):
        version = 1 if family == "cogvlm" else 2
        base, document = cogvlm(version), row(version, 1, "image", 40, seed=1)
        return base, _native_runs(base, document), {"tokens": document.input_ids.shape[1], "patches": (SIDE // 14) ** 2, "images": 1}
    base = tiny_base(folder, family)
    return base, *_transformers_runs(base)


def _products(run: Callable[[], torch.Tensor]) -> int:
    """FLOPs of the products with weights, forward and backward."""
    counter = FlopCounterMode(display=False)
    with counter:
        run().sum().backward()
    return sum(flops for operation, flops in counter.get_flop_counts()["Global"].items() if str(operation).split(".")[-1] in LINEAR)


def _without_attention(base: Base, counts: dict[str, int]) -> float:
    """Nor what the formula is too generous with: nothing goes back to the pixels. In a real tower that is 1 in 400, in a tiny one half."""
    shape = shape_of(base)
    whole = shape.flops(counts["tokens"], 0, 0, counts["patches"], 0, counts["images"])
    if not shape.vision_trained:
        return whole - 4 * shape.vision_window_width * counts["patches"] * 64
    first = next(module for module in base.vision.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d))
    return whole - 3 * 4 * shape.vision_window_width * counts["patches"] * 64 - 2 * first.weight.numel() * counts["patches"]


FAMILIES_RUN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "cogvlm", "cogvlm2")


@pytest.mark.parametrize("tuned", [("language",), ("language", "merger"), EVERY_PART], ids="+".join)
@pytest.mark.parametrize("family", FAMILIES_RUN)
def test_full_tuning_is_what_torch_counts(tmp_path: Path, family: str, tuned: tuple[NetworkPart, ...]) -> None:
    base, run, counts = _network(family, tmp_path)
    unfreeze(base, tuned)
    assert _without_attention(base, counts) == pytest.approx(_products(run), rel=0.05)


@pytest.mark.parametrize("parts", [("language",), EVERY_PART], ids="+".join)
@pytest.mark.parametrize("family", FAMILIES_RUN)
def test_lora_is_what_torch_counts(tmp_path: Path, family: str, parts: tuple[NetworkPart, ...]) -> None:
    """Rank 1: the adapters' forward pass, which is left out, is then small."""
    base, run, counts = _network(family, tmp_path)
    attach_lora(base, LoraConfig(rank=1, parts=parts), seed=0)
    assert _without_attention(base, counts) == pytest.approx(_products(run), rel=0.1)


def test_the_first_qwen_vl_has_a_shape() -> None:
    base = Base(small_qwen_vl(), find_family("qwen_vl"), 0, packed=False, native=True)
    shape = shape_of(base)
    assert shape.experts is None
    assert shape.patches_per_token == 4
    assert shape.language_weights == sum(
        weight.numel() for name, weight in base.model.named_parameters() if name.startswith("transformer.h.")
    )


# ---- helpers


def _frozen(shape: ModelShape) -> ModelShape:
    """Of a network whose adapters weigh nothing."""
    import dataclasses  # noqa: PLC0415

    nothing: dict[str, Any] = {"language_trained": 0, "head_trained": 0, "vision_trained": 0, "merger_trained": 0}
    experts = None if shape.experts is None else dataclasses.replace(shape.experts, text_trained=0, image_trained=0)
    return dataclasses.replace(shape, **nothing, experts=experts)


def _tower(shape: ModelShape, patches: int) -> float:
    """Forward through the tower and the merger, without attention."""
    return 2 * shape.vision_weights * patches + 2 * shape.merger_weights * (patches // shape.patches_per_token)
