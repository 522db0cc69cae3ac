"""Qwen-VL (version 1) against numbers of the published code, and properties of the small network."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from boxcar.pipelines.families.catalog import FAMILIES
from boxcar.schemas.errors import ConfigError
from boxcar.train.data.pixels import squares
from boxcar.train.data.stream import resize_pixels
from boxcar.train.network.native.catalog import config_of
from boxcar.train.network.native.qwen_vl import NUM_QUERIES, QWenLMHeadModel, QwenVLConfig, sine_cosine_table, stretch_of
from tests.golden.drawn import qwen_vl_weights, recorded
from tests.places import GOLDEN
from tests.train.network.native import checks
from tests.train.network.native.checks import TOLERANCE, Document, largest_difference, largest_recorded_difference

SIDE = 28
VISUAL: dict[str, Any] = {"heads": 2, "image_size": SIDE, "layers": 2, "mlp_ratio": 2.0, "output_dim": 128, "patch_size": 14, "width": 32}
NETWORK = FAMILIES["qwen_vl"].network


def small_network(**options: Any) -> QWenLMHeadModel:
    torch.manual_seed(0)
    size: dict[str, Any] = {"vocab_size": 64, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "kv_channels": 32}
    return QWenLMHeadModel(QwenVLConfig(**size, intermediate_size=128, visual=VISUAL, initializer_range=0.1, **options))


def row(*parts: int | str, seed: int) -> Document:
    return checks.document(*parts, placeholders=NUM_QUERIES, side=SIDE, seed=seed, opens=(1,), closes=(2,))


def three_rows() -> list[Document]:
    return [row(3, "image", 5, seed=1), row(6, seed=2), row("image", 2, "image", 3, seed=3)]


# ---- the published code's numbers


class Golden:
    def __init__(self) -> None:
        info = json.loads((GOLDEN / "qwen_vl.json").read_text())
        self.info = info["A_448_interp"]
        self.model = QWenLMHeadModel(config_of(self.info["config"] | {"model_type": "qwen"}, "golden")).eval()
        weights = qwen_vl_weights({name: tuple(shape) for name, shape in self.info["params"].items()})
        table = {"transformer.visual.attn_pool.pos_embed": sine_cosine_table(16, 256)}
        self.model.load_state_dict(weights | table)
        self.case = load_file(GOLDEN / "qwen_vl.safetensors")
        ids = self.case["input_ids"]
        opened, closed = (ids == info["image_start_id"]).long(), (ids == info["image_end_id"]).long()
        square = resize_pixels(Image.fromarray(self.case["image0_u8"].numpy()), (448, 448), "exact")
        self.inputs = {
            "input_ids": ids,
            "image_mask": (opened.cumsum(1) - opened - closed.cumsum(1)) > 0,  # what stands strictly between <img> and </img>
            "pixel_values": squares(torch.tensor(square).flatten(), [(448, 448)], "clip", torch.float32),
            "attention_mask": self.case["attention_mask"],
        }


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_logits_and_loss_equal_the_published_code(mode: str) -> None:
    golden = Golden()
    golden.model.train(mode == "train")
    with torch.no_grad():
        output = golden.model(**golden.inputs, labels=golden.case["labels"])
    assert largest_recorded_difference(output.logits, golden.case["logits"]) <= TOLERANCE
    assert largest_difference(output.loss, golden.case["loss"][0]) <= TOLERANCE


def test_features_of_images_equal_the_published_code() -> None:
    golden = Golden()
    with torch.no_grad():
        features = golden.model.transformer.visual(golden.inputs["pixel_values"])
    assert largest_recorded_difference(features, golden.case["visual.features"]) <= TOLERANCE


def test_hidden_states_equal_the_published_code() -> None:
    """Of the first 8 tokens before the layers, and of the last 4 behind the final norm."""
    golden = Golden()
    seen: dict[str, torch.Tensor] = {}
    golden.model.transformer.h[0].register_forward_hook(lambda _module, inputs, _output: seen.update(embedded=inputs[0]))
    positions = golden.model.positions(golden.case["attention_mask"], None)
    with torch.no_grad():
        states = golden.model.hidden_states(position_ids=positions, **golden.inputs)
    assert largest_difference(seen["embedded"][:, :8], golden.case["eval.hidden0"]) <= TOLERANCE
    assert largest_difference(states[:, -4:], golden.case["eval.hidden_last"]) <= TOLERANCE


def test_text_alone_equals_the_published_code() -> None:
    golden = Golden()
    logits = golden.model(golden.inputs["input_ids"][:, :4]).logits  # what stands before the image
    assert largest_recorded_difference(logits, golden.case["textonly.eval_logits"]) <= TOLERANCE


def test_gradients_equal_the_published_code() -> None:
    golden = Golden()
    golden.model.train()
    golden.model(**golden.inputs, labels=golden.case["labels"]).loss.backward()
    parameters = dict(golden.model.named_parameters())
    expected = [(*name.partition(".")[::2], value) for name, value in golden.case.items() if name.startswith("grad")]
    assert len(expected) == 7
    for kind, name, gradient in expected:
        found = parameters[name].grad
        assert found is not None
        part = found.flatten()[: gradient.numel()] if kind == "grad_begin" else recorded(found)
        assert largest_difference(part, gradient) <= TOLERANCE, name


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens_equal_the_published_code(use_cache: bool) -> None:
    golden = Golden()
    expected = golden.info["greedy"]["eval.greedy_with_cache" if use_cache else "eval.greedy_no_cache"]
    found = golden.model.generate(**golden.inputs, max_new_tokens=len(expected), do_sample=False, use_cache=use_cache)
    assert found[0, -len(expected) :].tolist() == expected


def test_the_table_of_sines_is_the_stored_one() -> None:
    stored = load_file(GOLDEN / "qwen_vl.safetensors")["pos_embed"]
    assert largest_recorded_difference(sine_cosine_table(16, 256), stored) < 1e-6


def test_names_and_shapes_are_the_published_ones() -> None:
    published = json.loads((GOLDEN / "published_state_dict_shapes.json").read_text())["qwen_vl"]
    with torch.device("meta"):
        model = QWenLMHeadModel(QwenVLConfig())
    assert checks.shapes_of(model) == checks.published_shapes(published["state_dict"])
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == published["n_params"]


# ---- properties of the small network


def test_a_pack_of_three_documents_equals_each_alone() -> None:
    checks.check_packed_equals_single(small_network(), three_rows())


def test_a_pack_of_text_equals_each_alone() -> None:
    checks.check_packed_equals_single(small_network(), [row(count, seed=count) for count in (4, 9, 1)])


def test_padding_changes_nothing() -> None:
    checks.check_padding_changes_nothing(small_network(), three_rows(), pad_token=5)


@pytest.mark.parametrize("parts", [(2, "image", 4), (7,)], ids=["image", "text"])
def test_the_cache_gives_what_whole_rows_give(parts: tuple[int | str, ...]) -> None:
    checks.check_cache_equals_whole_rows(small_network(), row(*parts, seed=4))


def test_rows_generate_together() -> None:
    checks.check_rows_generate_together(small_network(), three_rows(), pad_token=5)


def test_save_and_load(tmp_path: Path) -> None:
    checks.check_round_trip(small_network(), row(1, "image", 4, seed=5), tmp_path)


def test_activation_checkpointing_keeps_the_gradients() -> None:
    checks.check_checkpointing_keeps_gradients(small_network(), three_rows())


def test_a_batch_of_no_images_gives_every_parameter_a_gradient() -> None:
    checks.check_no_image_still_gives_gradients(small_network(), row(6, seed=6), SIDE)


def test_half_precision() -> None:
    checks.check_autocast(small_network(), three_rows())


def test_adapters(tmp_path: Path) -> None:
    checks.check_adapters(small_network(), NETWORK, row(1, "image", 4, seed=7), {"language": 8, "vision": 8, "merger": 1}, tmp_path)


def test_every_parameter_belongs_to_one_part() -> None:
    model = small_network()
    counts = checks.check_parts(model, NETWORK)
    assert counts["merger"] == 1 + 1 + 4 + 4 + 2 + 1  # query, kv_proj, attn, ln_q and ln_kv, ln_post, proj
    assert "transformer.visual.attn_pool.pos_embed" not in dict(model.named_parameters()), "frozen in the published code"
    assert isinstance(model.get_submodule(NETWORK.vision_module), torch.nn.Module)
    assert len(list(model.get_submodule(NETWORK.decoder_layers).children())) == 2


def test_what_stands_between_the_image_tokens_does_not_matter() -> None:
    model, example = small_network().eval(), row(2, "image", 4, seed=8)
    path = torch.where(example.image_mask, 7, example.input_ids)
    expected = model(**example.inputs()).logits
    assert torch.equal(model(path, image_mask=example.image_mask, pixel_values=example.pixel_values).logits, expected)


def test_positions_stretch_to_larger_images() -> None:
    model = small_network().eval()
    small, large = (model.transformer.visual(torch.zeros(1, 3, side, side)) for side in (16 * 14, 32 * 14))
    assert small.shape == large.shape == (1, NUM_QUERIES, 128)


# ---- rules of evaluation


@pytest.mark.parametrize(
    ("num_tokens", "stretch"), [(1, 1.0), (1024, 1.0), (2048, 1.0), (2049, 3.0), (4096, 3.0), (4097, 7.0), (8192, 7.0), (8193, 15.0)]
)
def test_how_far_a_prompt_stretches_the_rotary_base(num_tokens: int, stretch: float) -> None:
    assert stretch_of(num_tokens, 2048) == stretch


def test_long_prompts_are_evaluated_with_a_larger_base() -> None:
    ids = row(40, seed=9).input_ids
    stretched = small_network(seq_length=16, use_logn_attn=False).eval()
    by_hand = small_network(use_dynamic_ntk=False, use_logn_attn=False, rotary_emb_base=10000.0 * 7.0 ** (32 / 30)).eval()
    plain = small_network(use_dynamic_ntk=False, use_logn_attn=False).eval()
    assert largest_difference(stretched(ids).logits, by_hand(ids).logits) < 1e-5
    assert largest_difference(stretched(ids).logits, plain(ids).logits) > 1e-3
    assert largest_difference(stretched.train()(ids).logits, plain(ids).logits) < 1e-5


def test_rows_stretch_by_their_own_length() -> None:
    model = small_network(seq_length=16).eval()
    rows = [row(40, seed=9), row(10, seed=10)]
    ids = torch.stack([rows[0].input_ids[0], torch.nn.functional.pad(rows[1].input_ids[0], (0, 30))])
    real = torch.tensor([[1] * 40, [1] * 10 + [0] * 30])
    together = model(ids, attention_mask=real).logits
    assert largest_difference(together[0], model(rows[0].input_ids).logits[0]) < 1e-5
    assert largest_difference(together[1, :10], model(rows[1].input_ids).logits[0]) < 1e-5


def test_queries_beyond_the_trained_length_grow() -> None:
    ids = row(40, seed=9).input_ids
    grown, plain = (small_network(seq_length=16, use_dynamic_ntk=False, use_logn_attn=logn).eval() for logn in (True, False))
    assert torch.equal(grown(ids).logits[:, :16], plain(ids).logits[:, :16])
    assert largest_difference(grown(ids).logits[:, 16:], plain(ids).logits[:, 16:]) > 1e-3
    assert torch.equal(grown.train()(ids).logits, plain.train()(ids).logits)


@pytest.mark.parametrize(("num_tokens", "stretch"), [(14, 1.0), (20, 3.0)], ids=["short prompt", "long prompt"])
def test_decoding_keeps_the_stretch_of_the_prompt(num_tokens: int, stretch: float) -> None:
    """Though the row grows from 14 beyond 16, or from 20 beyond 32."""
    model = small_network(seq_length=16).eval()
    fixed = small_network(seq_length=16, use_dynamic_ntk=False, rotary_emb_base=10000.0 * stretch ** (32 / 30)).eval()
    options = {"max_new_tokens": 16, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    prompt = row(num_tokens, seed=11).input_ids
    found, expected = model.generate(prompt, **options), fixed.generate(prompt, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert largest_difference(torch.stack(found.logits), torch.stack(expected.logits)) < 1e-5


# ---- config.json


def test_qwen_without_eyes_is_refused() -> None:
    with pytest.raises(ConfigError, match="without a section `visual`"):
        config_of({"model_type": "qwen", "hidden_size": 4096}, "Qwen/Qwen-7B")


def test_a_partial_rotary_is_refused() -> None:
    with pytest.raises(ConfigError, match="rotary_pct"):
        config_of({"model_type": "qwen", "rotary_pct": 0.5, "visual": VISUAL}, "base")
