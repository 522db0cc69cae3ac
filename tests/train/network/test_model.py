"""Networks of transformers behind our attention: packed samples do not see each other, and are what they are alone."""

import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from boxcar.pipelines.families.catalog import find_family
from boxcar.schemas.errors import ConfigError
from boxcar.schemas.training import LoraConfig, NetworkPart
from boxcar.train.network.flops import shape_of
from boxcar.train.network.model import (
    Base,
    attach_lora,
    compile_layers,
    open_base,
    pad_frozen_vision,
    parameter_groups,
    part_of,
    recompute_activations,
    unfreeze,
)
from boxcar.train.network.objective import Objective
from tests.train.tiny import FAMILIES, base_folder, blank_of, image_token_id, packed_batch, padded_batch, random_documents, tiny_base

TOLERANCE = 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_padded_and_single_logits_are_equal(tmp_path: Path, family: str) -> None:
    base = tiny_base(tmp_path, family)
    documents, pixels = random_documents(base)
    with torch.no_grad():
        packed = base.head(base.hidden_states(packed_batch(documents, pixels)))[0]
        filled = base.head(base.hidden_states(packed_batch(documents, pixels, pad_to=len(packed) + 13)))[0]
        single = [base.head(base.hidden_states(packed_batch([d], [p])))[0] for d, p in zip(documents, pixels, strict=True)]
        reference = tiny_base(tmp_path, family, packed=False)
        padded = reference.head(reference.hidden_states(padded_batch(documents, pixels)))
    start = 0
    for number, document in enumerate(documents):
        stop = start + len(document)
        torch.testing.assert_close(packed[start:stop], single[number], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(packed[start:stop], padded[number, : len(document)], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(packed[start:stop], filled[start:stop], rtol=0, atol=TOLERANCE)
        start = stop


@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_in_one_sample_leaves_the_others_alone(tmp_path: Path, family: str) -> None:
    """The check that can fail: with 1-D positions, or a mask of transformers' own, the neighbours move by 0.3 and more."""
    base = tiny_base(tmp_path, family)
    documents, pixels = random_documents(base)
    first = packed_batch(documents, pixels)
    pixels[0][0][:] = 255 - pixels[0][0]
    second = packed_batch(documents, pixels)
    with torch.no_grad():
        before, after = (base.hidden_states(batch)[0] for batch in (first, second))
    border = len(documents[0])
    assert (before[:border] - after[:border]).abs().max() > 1e-3
    assert torch.equal(before[border:], after[border:])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_a_pack_are_the_sum_of_its_samples(tmp_path: Path, family: str, checkpointing: bool) -> None:
    base = tiny_base(tmp_path, family)
    documents, pixels = random_documents(base)
    model = attach_lora(base, LoraConfig(rank=4, parts=("language", "merger", "vision")), seed=0)
    _move_off_zero(model)
    model.train()
    if checkpointing:
        recompute_activations(base, gathered_weights=False)
    objective = Objective(base, chunk_tokens=8, autocast=None, through_module=False)
    whole = objective(packed_batch(documents, pixels))
    whole.total.backward()
    together = _gradients(model)
    singles = [objective(packed_batch([d], [p])) for d, p in zip(documents, pixels, strict=True)]
    # One after the other: the boundaries that recomputation reads are those of the last forward pass.
    for single_document, single_pixels in zip(documents, pixels, strict=True):
        objective(packed_batch([single_document], [single_pixels])).total.backward()
    torch.testing.assert_close(whole.total.detach(), torch.stack([single.total.detach() for single in singles]).sum())
    for name, gradient in _gradients(model).items():
        torch.testing.assert_close(gradient, together[name], rtol=1e-3, atol=1e-5)
        assert gradient.abs().max() > 0, f"{name} gets no gradient"


@pytest.mark.parametrize("gathered_weights", [False, True], ids=["kept", "gathered"])
@pytest.mark.parametrize("parts", [("language",), ("language", "merger")], ids="+".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_vision_tower_that_rests_is_not_computed_again(
    tmp_path: Path, family: str, parts: tuple[NetworkPart, ...], gathered_weights: bool
) -> None:
    base = tiny_base(tmp_path, family)
    documents, pixels = random_documents(base)
    attach_lora(base, LoraConfig(rank=4, parts=parts), seed=0).train()
    recompute_activations(base, gathered_weights=gathered_weights)
    calls: list[bool] = []
    base.vision.blocks[0].register_forward_hook(lambda module, inputs, output: calls.append(output.requires_grad))
    base.vision.blocks[0].mlp.register_forward_hook(lambda module, inputs, output: calls.append(output.requires_grad))
    Objective(base, chunk_tokens=8, autocast=None, through_module=False)(packed_batch(documents, pixels)).total.backward()
    assert calls == [False, False], "once each, and nothing of it kept for backward"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_tower_that_is_filled_up_with_zeros_gives_the_same(tmp_path: Path, family: str) -> None:
    base = tiny_base(tmp_path, family)
    attach_lora(base, LoraConfig(rank=4, parts=("language",)), seed=0)
    documents, pixels = random_documents(base)
    batch, objective = packed_batch(documents, pixels), Objective(base, chunk_tokens=8, autocast=None, through_module=False)
    names, before = [name for name, _ in base.model.named_parameters()], objective(batch).total
    before.backward()
    expected = _gradients(base.model)
    width = next(weight.shape[0] for name, weight in base.vision.named_parameters() if re.search(r"(gate_proj|fc1)\.weight", name))
    multiple = width + 7
    assert pad_frozen_vision(base, multiple) > 0
    assert {weight.shape[0] for name, weight in base.vision.named_parameters() if re.search(r"blocks.*(gate_proj|fc1)\.weight", name)} == {
        multiple
    }
    assert [name for name, _ in base.model.named_parameters()] == names
    after = objective(batch).total
    after.backward()
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(_gradients(base.model), expected, rtol=1e-4, atol=1e-6)
    assert pad_frozen_vision(base, multiple) == 0, "it is so already"


def test_a_trained_tower_stays_as_it_is(tmp_path: Path) -> None:
    base = tiny_base(tmp_path, "qwen2_5_vl")
    attach_lora(base, LoraConfig(rank=4, parts=("language", "vision")), seed=0)
    assert pad_frozen_vision(base, 1000) == 0


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_layers_compute_the_same_and_are_compiled_once(
    tmp_path: Path, family: str, recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo import reset  # noqa: PLC0415
    from torch._dynamo.utils import counters  # noqa: PLC0415

    # As the real one but for the machine code, which takes half a minute to build.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    base = tiny_base(tmp_path, family)
    model = attach_lora(base, LoraConfig(rank=4, parts=("language",)), seed=0)
    _move_off_zero(model)
    model.train()
    if recomputed:
        recompute_activations(base, gathered_weights=False)
    objective = Objective(base, chunk_tokens=8, autocast=None, through_module=False)
    documents, pixels = random_documents(base)
    packs = [packed_batch(documents[::step], pixels[::step], pad_to=200) for step in (1, -1, 2)]

    def results() -> list[tuple[torch.Tensor, dict[str, torch.Tensor], int]]:
        found = []
        for batch in packs:
            total = objective(batch).total
            total.backward()
            found.append((total.detach(), _gradients(model), counters["stats"]["unique_graphs"]))
        return found

    plain = results()
    reset()
    counters.clear()
    compile_layers(base)
    compiled = results()
    assert compiled[0][2] > 0, "something is compiled"
    assert len({graphs for _, _, graphs in compiled}) == 1, "and nothing again, whatever the borders of the samples"
    for (total, gradients, _), (expected_total, expected, _) in zip(compiled, plain, strict=True):
        torch.testing.assert_close(total, expected_total)
        torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-5)


def _move_off_zero(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def _gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_blank_image_changes_nothing_and_reaches_the_vision_tower(tmp_path: Path, family: str, packed: bool) -> None:
    base = tiny_base(tmp_path, family, packed=packed)
    model = attach_lora(base, LoraConfig(rank=4, parts=("language", "vision", "merger")), seed=0)
    documents, pixels = random_documents(base)
    blank, black = blank_of(base)
    collate = packed_batch if packed else padded_batch
    objective = Objective(base, chunk_tokens=8, autocast=None, through_module=False)
    totals = []
    for batch, parts in (
        (collate([documents[1]], [pixels[1]]), {"language"}),
        (collate([documents[1], blank], [pixels[1], [black]]), {"language", "vision", "merger"}),
    ):
        output = objective(batch)
        output.total.backward()
        totals.append(output.total.detach())
        used = {part_of(name, base.family.network) for name, weight in model.named_parameters() if weight.grad is not None}
        assert used == parts
        model.zero_grad()
    torch.testing.assert_close(totals[0], totals[1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", ["language", "vision", "merger"])
def test_adapters_land_on_their_part_alone(tmp_path: Path, family: str, part: NetworkPart) -> None:
    base = tiny_base(tmp_path, family)
    model = attach_lora(base, LoraConfig(rank=2, parts=(part,)), seed=0)
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert names
    assert {part_of(name, base.family.network) for name in names} == {part}
    (group,) = parameter_groups(model, base.family.network, 0.1)
    assert (group["part"], len(group["params"]), group["weight_decay"]) == (part, len(names), 0.1)
    layers = {name.partition(".lora_")[0] for name in names}
    linears = {name.removesuffix(".base_layer") for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    inner = {name for name in linears if "lora_" not in name and not name.endswith("lm_head")}
    assert layers == {name for name in inner if part_of(f"{name}.weight", base.family.network) == part}, "all but the head"


@pytest.mark.parametrize("family", FAMILIES)
def test_full_tuning_frees_the_named_parts(tmp_path: Path, family: str) -> None:
    base = tiny_base(tmp_path, family)
    unfreeze(base, ("merger",))
    free = [name for name, weight in base.model.named_parameters() if weight.requires_grad]
    assert free
    assert all("merger" in name for name in free)


def test_adapters_start_as_nothing_and_from_the_seed(tmp_path: Path) -> None:
    first, second = tiny_base(tmp_path, "qwen2_5_vl"), tiny_base(tmp_path, "qwen2_5_vl")
    documents, pixels = random_documents(first)
    batch = packed_batch(documents, pixels)
    with torch.no_grad():
        before = first.hidden_states(batch)
        models = [attach_lora(base, LoraConfig(), seed=5) for base in (first, second)]
        assert torch.equal(first.hidden_states(batch), before)
    weights = [dict(model.named_parameters()) for model in models]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"model_type": "qwen3_vl"}, "a base of model_type 'qwen3_vl'"),
        ({"text_config": {"vocab_size": 100}}, "a vocabulary of 100"),
        ({"vision_config": {"patch_size": 16}}, "patches of 16 px"),
        ({"image_token_id": 7}, "image_token_id 7"),
    ],
    ids=["family", "vocabulary", "patch", "image token"],
)
def test_a_base_that_does_not_fit_the_shards(tmp_path: Path, change: dict[str, object], found: str) -> None:
    import json  # noqa: PLC0415

    folder = base_folder(tmp_path, "qwen2_5_vl")
    token = image_token_id(folder)
    config = json.loads((folder / "config.json").read_text())
    for key, value in change.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=found):
        open_base(str(folder), find_family("qwen2_5_vl"), token, random_weights=True, dtype=torch.float32, packed=True)


def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no usable config\.json"):
        open_base(str(tmp_path), find_family("qwen2_5_vl"), 1, random_weights=True, dtype=torch.float32, packed=True)


def test_a_base_without_weights(tmp_path: Path) -> None:
    folder = base_folder(tmp_path, "qwen2_5_vl")
    with pytest.raises(ConfigError, match="without weights that load"):
        open_base(str(folder), find_family("qwen2_5_vl"), image_token_id(folder), random_weights=False, dtype=torch.float32, packed=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_load_and_a_missing_one_is_noticed(tmp_path: Path, family: str) -> None:
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    base = tiny_base(tmp_path, family)
    saved = tmp_path / "saved"
    base.model.save_pretrained(saved)
    options = {"random_weights": False, "dtype": torch.float32, "packed": True}
    again = open_base(str(saved), base.family, base.image_token_id, **options)  # type: ignore[arg-type]
    documents, pixels = random_documents(base)
    batch = packed_batch(documents, pixels)
    with torch.no_grad():
        assert torch.equal(again.hidden_states(batch), base.hidden_states(batch))
    tensors = load_file(saved / "model.safetensors")
    tensors.pop(next(name for name in tensors if "layers.1.mlp.up_proj" in name))
    save_file(tensors, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="without 1 of the network's weights"):
        open_base(str(saved), base.family, base.image_token_id, **options)  # type: ignore[arg-type]


# ---- 4 bits


def _with_weights(folder: Path) -> tuple[Path, Base]:
    """A small base as it is published: with weights beside its config.json."""
    base = tiny_base(folder, "qwen2_5_vl")
    base.model.save_pretrained(folder / "qwen2_5_vl")
    return folder / "qwen2_5_vl", base


def _open_quantised(path: Path, *, random_weights: bool = False) -> Base:
    options: dict[str, Any] = {"dtype": torch.float32, "packed": True, "quantise": True, "random_weights": random_weights}
    return open_base(str(path), find_family("qwen2_5_vl"), image_token_id(path), **options)


def test_layers_in_four_bits_learn_and_count_as_before(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes (0.50 runs on a CPU, too)")
    path, plain = _with_weights(tmp_path)
    base = _open_quantised(path)
    layers = base.model.get_submodule(base.family.network.decoder_layers)
    assert all(isinstance(layer.mlp.up_proj, bitsandbytes.nn.Linear4bit) for layer in layers)
    assert type(base.head) is torch.nn.Linear
    for one in (base, plain):
        one.model.requires_grad_(False)
    assert shape_of(base) == shape_of(plain)
    model = attach_lora(base, LoraConfig(rank=4), seed=0, quantised=True)
    model.train()
    recompute_activations(base, gathered_weights=False)
    documents, pixels = random_documents(base)
    objective = Objective(base, chunk_tokens=8, autocast=None, through_module=False)
    objective(packed_batch(documents, pixels)).total.backward()
    gradients = _gradients(model)
    assert gradients
    assert all("lora_" in name for name in gradients)
    assert all(gradient.abs().max() > 0 for name, gradient in gradients.items() if "lora_B" in name)


def test_four_bits_of_random_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.init: found random with method: qlora"):
        _open_quantised(base_folder(tmp_path, "qwen2_5_vl"), random_weights=True)


def test_four_bits_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        _open_quantised(_with_weights(tmp_path)[0])
