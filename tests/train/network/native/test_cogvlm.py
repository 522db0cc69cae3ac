"""CogVLM and CogVLM2 against numbers of the published code, and properties of the small network."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from boxcar.pipelines.families.catalog import FAMILIES
from boxcar.schemas.errors import ConfigError
from boxcar.train.network.attention import Segments
from boxcar.train.network.native.catalog import config_of, open_config
from boxcar.train.network.native.cogvlm import CogVLMConfig, CogVLMForCausalLM, rotary_tables, shared_image_positions, vision_expert_mask
from boxcar.train.network.native.native_model import Sight
from tests.golden.drawn import cogvlm_weights
from tests.places import GOLDEN
from tests.train.network.native import checks
from tests.train.network.native.checks import TOLERANCE, Document, largest_difference, largest_recorded_difference

SIDE = 56
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "image_size": SIDE,
    "patch_size": 14,
    "num_positions": 17,
    "num_heads": 2,
    "num_hidden_layers": 3,
}
VISION |= {"in_channels": 3, "intermediate_size": 48, "layer_norm_eps": 1e-6, "dropout_prob": 0.0, "hidden_act": "gelu"}
PLACEHOLDERS = {1: 16 + 2, 2: 4 + 2}
PUBLISHED: dict[str, Any] = {
    "v1": {"vision_config": {"num_positions": 1226}},
    "v2": {
        "vocab_size": 128256,
        "intermediate_size": 14336,
        "num_multi_query_heads": 8,
        "max_position_embeddings": 8192,
        "pad_token_id": 128002,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128009],
        "vision_config": {"num_positions": 9217},
    },
}
BOTH = pytest.mark.parametrize("version", [1, 2])


def small_network(version: int, **options: Any) -> CogVLMForCausalLM:
    torch.manual_seed(version)
    size: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    grouped: dict[str, Any] = {"num_multi_query_heads": 2} if version == 2 else {}
    return CogVLMForCausalLM(CogVLMConfig(**size, **grouped, vision_config=VISION, initializer_range=0.2, **options))


def row(version: int, *parts: int | str, seed: int) -> Document:
    """Placeholders are the padding id, as in v1."""
    return checks.document(*parts, placeholders=PLACEHOLDERS[version], side=SIDE, seed=seed, image_token=0)


def three_rows(version: int) -> list[Document]:
    return [row(version, 1, "image", 5, seed=1), row(version, 6, seed=2), row(version, 1, "image", 3, seed=3)]


# ---- the published code's numbers


class Golden:
    def __init__(self, version: str) -> None:
        self.info = json.loads((GOLDEN / "cogvlm.json").read_text())[version]
        shapes = {name: tuple(shape) for name, shape in self.info["params"].items()}  # of the published code
        self.model = CogVLMForCausalLM(config_of(self.info["config"], "golden")).eval()
        self.model.load_state_dict(cogvlm_weights(shapes))

    def case(self, prefix: str = "") -> dict[str, torch.Tensor]:
        tensors = load_file(GOLDEN / "cogvlm.safetensors")
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    @staticmethod
    def inputs(case: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        mask = case["token_type_ids"].bool()
        return {name: case[name] for name in ("input_ids", "attention_mask", "pixel_values")} | {"image_mask": mask}


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_every_golden_weight_has_its_place(version: str) -> None:
    golden = Golden(version)
    own = {name: list(tensor.shape) for name, tensor in golden.model.state_dict().items()}
    assert own == {name: shape for name, shape in golden.info["params"].items() if not name.endswith("rotary_emb.inv_freq")}


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_rotary_frequencies_are_the_stored_ones(version: str) -> None:
    """The base, 10000 and 500000, stands in no config.json, but the checkpoints hold what came of it."""
    golden = Golden(version)
    stored = torch.tensor(golden.info["inv_freq"])
    cos, sin = rotary_tables(torch.tensor([[1]]), 2 * len(stored), golden.model.config.rotary_base, torch.float32)
    assert largest_difference(torch.atan2(sin, cos)[0, 0], torch.cat((stored, stored))) < 1e-6


def test_logits_loss_and_states_equal_the_published_code() -> None:
    golden = Golden("v1")
    case = golden.case()
    states: dict[str, torch.Tensor] = {}
    model = golden.model.model

    def keep(name: str) -> Any:
        return lambda _module, _inputs, output: states.__setitem__(name, output)

    for name, module in {
        "vision.patch_embed": model.vision.patch_embedding,
        "vision.layer0": model.vision.transformer.layers[0],
        "vision.features": model.vision,
    }.items():
        module.register_forward_hook(keep(name))
    output = golden.model(**golden.inputs(case), labels=case["labels"])
    assert largest_difference(output.loss, case["loss"][0]) <= TOLERANCE
    assert largest_recorded_difference(output.logits, case["logits"]) <= TOLERANCE
    for name, state in states.items():
        assert largest_recorded_difference(state, case[name]) <= TOLERANCE, name
    positions = golden.model.positions(case["attention_mask"], case["token_type_ids"].bool())
    last = golden.model.hidden_states(position_ids=positions, **golden.inputs(case))
    assert largest_recorded_difference(last, case["hidden2"]) <= TOLERANCE


def test_states_between_layers_equal_the_published_code() -> None:
    """Ours are sorted by expert."""
    golden = Golden("v1")
    case = golden.case()
    mask = case["vision_expert_mask"].bool().flatten()
    order = torch.cat((mask.nonzero(), (~mask).nonzero())).squeeze(1)
    seen: dict[str, torch.Tensor] = {}
    layer = golden.model.model.layers[0]
    layer.register_forward_hook(lambda _module, inputs, output: seen.update(hidden0=inputs[0], hidden1=output))
    golden.model(**golden.inputs(case))
    for name, state in seen.items():
        assert largest_difference(state, case[name].flatten(0, 1)[order]) <= TOLERANCE, name


def test_gradients_equal_the_published_code() -> None:
    golden = Golden("v1")
    case = golden.case()
    golden.model.train()
    golden.model(**golden.inputs(case), labels=case["labels"]).loss.backward()
    parameters = dict(golden.model.named_parameters())
    expected = golden.case("grad.")
    assert len(expected) > 10
    for name, gradient in expected.items():
        found = parameters[name].grad
        assert found is not None
        assert largest_recorded_difference(found, gradient) <= TOLERANCE, name


def test_positions_and_experts_equal_the_published_code() -> None:
    case = Golden("v1").case()
    mask = case["token_type_ids"].bool()
    assert torch.equal(shared_image_positions(case["attention_mask"], mask), case["position_ids"])
    assert torch.equal(vision_expert_mask(mask), case["vision_expert_mask"].bool())


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_positions_and_experts_of_the_first_row(version: str) -> None:
    info = json.loads((GOLDEN / "cogvlm.json").read_text())[version]
    length, image = len(info["position_ids_row0"]), info["image_tokens_incl_boi_eoi"]
    mask = torch.tensor([[1 <= place <= image for place in range(length)]])
    assert shared_image_positions(torch.ones_like(mask), mask)[0].tolist() == info["position_ids_row0"]
    assert vision_expert_mask(mask)[0].long().tolist() == info["expert_mask_row0"]


def test_padding_on_the_left_equals_the_published_code() -> None:
    golden = Golden("v1")
    case = golden.case("leftpad.") | {"pixel_values": golden.case()["pixel_values"]}
    real = case["attention_mask"].bool()
    for positions in (case["position_ids"], None):  # theirs begin at 1 behind padding; a shift of all positions changes nothing
        logits = golden.model(position_ids=positions, **golden.inputs(case)).logits
        masked = torch.where(real[..., None], logits, 0.0)  # as recorded: what stands on padding means nothing
        assert largest_recorded_difference(masked, case["logits"]) <= TOLERANCE


def test_text_alone_equals_the_published_code() -> None:
    golden = Golden("v1")
    case = golden.case()
    text = case["input_ids"][:1, ~case["token_type_ids"][0].bool()]  # the first row without its image
    assert largest_recorded_difference(golden.model(text).logits, case["textonly.logits"]) <= TOLERANCE


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens_equal_the_published_code(use_cache: bool) -> None:
    golden = Golden("v1")
    inputs = {name: value[:1] for name, value in golden.inputs(golden.case()).items()}
    expected = golden.info["greedy_with_cache" if use_cache else "greedy_no_cache"]
    found = golden.model.generate(**inputs, max_new_tokens=len(expected), do_sample=False, use_cache=use_cache, eos_token_id=None)
    assert found[0, -len(expected) :].tolist() == expected


@pytest.mark.parametrize(("table", "version"), [("cogvlm1", "v1"), ("cogvlm2", "v2")])
def test_names_and_shapes_are_the_published_ones(table: str, version: str) -> None:
    published = json.loads((GOLDEN / "published_state_dict_shapes.json").read_text())[table]
    with torch.device("meta"):
        model = CogVLMForCausalLM(CogVLMConfig(**PUBLISHED[version]))
    found = checks.shapes_of(model)
    found["model.layers.N.self_attn.rotary_emb.inv_freq", (64,)] = 32  # computed here, ignored on load
    assert found == checks.published_shapes(published["state_dict"])
    assert sum(tensor.numel() for tensor in model.state_dict().values()) + 32 * 64 == published["n"]


# ---- properties of the small network


@BOTH
def test_a_pack_of_three_documents_equals_each_alone(version: int) -> None:
    checks.check_packed_equals_single(small_network(version), three_rows(version))


@BOTH
def test_a_pack_of_text_equals_each_alone(version: int) -> None:
    checks.check_packed_equals_single(small_network(version), [row(version, count, seed=count) for count in (4, 9, 1)])


@BOTH
def test_padding_changes_nothing(version: int) -> None:
    checks.check_padding_changes_nothing(small_network(version), three_rows(version), pad_token=0)


@BOTH
@pytest.mark.parametrize("parts", [(1, "image", 4), (7,)], ids=["image", "text"])
def test_the_cache_gives_what_whole_rows_give(version: int, parts: tuple[int | str, ...]) -> None:
    checks.check_cache_equals_whole_rows(small_network(version), row(version, *parts, seed=4))


@BOTH
def test_rows_generate_together(version: int) -> None:
    checks.check_rows_generate_together(small_network(version), three_rows(version), pad_token=0)


@BOTH
def test_save_and_load(version: int, tmp_path: Path) -> None:
    checks.check_round_trip(small_network(version), row(version, 1, "image", 4, seed=5), tmp_path)


def test_stored_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    """A folder as it is published: no model_type, and a buffer in each layer that we compute."""
    model = small_network(1).eval()
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for layer in range(2)}
    save_file(model.state_dict() | buffers, tmp_path / "model.safetensors", metadata={"format": "pt"})
    published = {key: value for key, value in model.config.to_dict().items() if key != "model_type"}
    (tmp_path / "config.json").write_text(json.dumps(published | {"architectures": ["CogVLMForCausalLM"]}))
    again, report = CogVLMForCausalLM.from_pretrained(tmp_path, config=open_config(str(tmp_path)), output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    example = row(1, 1, "image", 4, seed=5)
    assert torch.equal(again.eval()(**example.inputs()).logits, model(**example.inputs()).logits)


@BOTH
def test_activation_checkpointing_keeps_the_gradients(version: int) -> None:
    checks.check_checkpointing_keeps_gradients(small_network(version), three_rows(version))


@BOTH
def test_a_batch_of_no_images_gives_every_parameter_a_gradient(version: int) -> None:
    checks.check_no_image_still_gives_gradients(small_network(version), row(version, 6, seed=6), SIDE)


def test_experts_that_rest_still_have_gradients() -> None:
    model = small_network(1).train()
    text = row(1, 6, seed=6)
    model(text.input_ids, labels=text.input_ids).loss.backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if "vision_mlp" in name or "vision_expert" in name]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@BOTH
def test_half_precision(version: int) -> None:
    checks.check_autocast(small_network(version), three_rows(version))


@BOTH
def test_adapters(version: int, tmp_path: Path) -> None:
    family = FAMILIES["cogvlm" if version == 1 else "cogvlm2"]
    checks.check_adapters(
        small_network(version), family.network, row(version, 1, "image", 4, seed=7), {"language": 20, "vision": 12, "merger": 4}, tmp_path
    )


@BOTH
def test_every_parameter_belongs_to_one_part(version: int) -> None:
    model = small_network(version)
    counts = checks.check_parts(model, FAMILIES["cogvlm"].network)
    conv = 2 if version == 2 else 0
    assert counts["merger"] == 2 + 6 + conv
    assert isinstance(model.get_submodule(FAMILIES["cogvlm"].network.vision_module), torch.nn.Module)
    assert len(list(model.get_submodule(FAMILIES["cogvlm"].network.decoder_layers).children())) == 2


def test_each_expert_sees_its_own_tokens_alone() -> None:
    model, example = small_network(1).eval(), row(1, 1, "image", 4, seed=8)
    seen: dict[str, int] = {}
    for expert in ("language_mlp", "vision_mlp"):
        model.get_submodule(f"model.layers.0.mlp.{expert}").register_forward_hook(
            lambda _module, inputs, _output, expert=expert: seen.__setitem__(expert, inputs[0].shape[0])
        )
    model(**example.inputs())
    assert seen == {"vision_mlp": PLACEHOLDERS[1] - 1, "language_mlp": 1 + 1 + 4}  # eoi goes to language


EXPERT_CASES = [
    pytest.param([0, 1, 1, 1, 0, 0], [0, 6], [0, 1, 1, 0, 0, 0], id="boi and patches, not eoi"),
    pytest.param([0, 1, 1, 1], [0, 4], [0, 1, 1, 0], id="nothing follows"),
    pytest.param([0, 1, 1, 1, 1, 1, 1, 0], [0, 4, 8], [0, 1, 1, 0, 1, 1, 0, 0], id="the next document's image does not count"),
    pytest.param([0, 0, 0], [0, 1, 3], [0, 0, 0], id="text"),
]


@pytest.mark.parametrize(("image", "borders", "expected"), EXPERT_CASES)
def test_which_tokens_the_vision_expert_takes(image: list[int], borders: list[int], expected: list[int]) -> None:
    sight = Sight(segments=Segments(torch.tensor(borders, dtype=torch.int32), borders))
    assert vision_expert_mask(torch.tensor([image]).bool(), sight).long().tolist() == [expected]


POSITION_CASES = [
    pytest.param([1] * 7, [0, 1, 1, 1, 1, 0, 0], [0, 1, 2, 2, 3, 4, 5], id="an image takes three"),
    pytest.param([1] * 6, [0, 1, 1, 1, 0, 0], [0, 1, 2, 3, 4, 5], id="one patch"),
    pytest.param([1] * 4, [0, 0, 0, 0], [0, 1, 2, 3], id="text"),
    pytest.param([1, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0, 1], [0, 1, 2, 2, 3, 4, 4], id="padding on the right, taken for an image"),
    pytest.param([0, 0, 1, 1, 1, 1, 1], [1, 0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 2, 3, 4], id="padding on the left"),
]


@pytest.mark.parametrize(("real", "image", "expected"), POSITION_CASES)
def test_positions(real: list[int], image: list[int], expected: list[int]) -> None:
    assert shared_image_positions(torch.tensor([real]), torch.tensor([image]).bool()).tolist() == [expected]


def test_rotary_tables_follow_the_working_dtype() -> None:
    positions = torch.arange(300)[None]
    exact, _ = rotary_tables(positions, 128, 10000.0, torch.float32)
    rounded, _ = rotary_tables(positions, 128, 10000.0, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    error = (rounded.double() - exact.double()).abs().amax(dim=(0, 2))
    assert error[:64].max().item() == pytest.approx(0.18, abs=0.01)  # as measured in the published code
    assert error[:256].max().item() == pytest.approx(0.74, abs=0.01)
    assert torch.equal(rounded[0, 256], rounded[0, 257])


def test_rotary_dtype_of_the_config() -> None:
    example = row(1, 1, "image", 4, seed=9)
    plain, as_trained = small_network(1).eval(), small_network(1, rotary_dtype="bfloat16").eval()
    difference = largest_difference(plain(**example.inputs()).logits, as_trained(**example.inputs()).logits)
    assert 1e-4 < difference < 0.5


def test_placeholders_that_do_not_fit_the_images() -> None:
    example = row(1, 1, "image", 4, seed=1)
    with pytest.raises(AssertionError, match="18 placeholders for 2 images of 18 features each"):
        small_network(1)(example.input_ids, image_mask=example.image_mask, pixel_values=torch.zeros(2, 3, SIDE, SIDE))
    with pytest.raises(AssertionError, match="another image size"):
        small_network(1)(example.input_ids, image_mask=example.image_mask, pixel_values=torch.zeros(1, 3, 28, 28))


# ---- config.json


def test_a_config_without_model_type_is_recognised(tmp_path: Path) -> None:
    published = {"architectures": ["CogVLMForCausalLM"], "vision_config": VISION, "hidden_size": 32, "template_version": "base"}
    published |= {"auto_map": {"AutoConfig": "configuration_cogvlm.CogVLMConfig"}, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(published))
    config = open_config(str(tmp_path))
    assert isinstance(config, CogVLMConfig)
    assert (config.hidden_size, config.dtype, config.vision_config) == (32, torch.bfloat16, VISION)
    small_network(1).config.save_pretrained(tmp_path)
    assert open_config(str(tmp_path)).to_dict()["model_type"] == "cogvlm"


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param({"architectures": ["CogAgentForCausalLM"], "vision_config": VISION}, id="cogagent"),
        pytest.param({"model_type": "chatglm", "vision_config": VISION}, id="glm-4v"),
        pytest.param({"model_type": "qwen2_vl"}, id="of transformers"),
        pytest.param({"model_type": "cogvlm"}, id="no vision section"),
        pytest.param({}, id="nothing"),
    ],
)
def test_other_configs_are_refused(raw: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"some/base, config\.json"):
        config_of(raw, "some/base")
