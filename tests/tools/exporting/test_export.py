"""An exported folder in plain transformers: the code of its README gives the tokens, pixels, replies and boxes of `boxcar predict`."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from boxcar.pipelines.families.catalog import FAMILIES, find_family
from boxcar.pipelines.tokens.frame import Frame
from boxcar.pipelines.tokens.tokenizer import load_tokenizer
from boxcar.schemas.adapter import CARD, loads
from boxcar.schemas.errors import ConfigError
from boxcar.tools.exporting.export import export
from boxcar.train.answering.adapter import open_adapter
from boxcar.train.answering.ask import Asker, Query
from boxcar.train.answering.export import _write_tokenizer, chat_template, processor_of
from boxcar.train.answering.parse import parse, to_original_px
from boxcar.train.answering.predict import PredictConfig, Predictor
from boxcar.train.data import pixels
from boxcar.train.data.documents import prompt_of
from boxcar.train.data.stream import load_pixels
from tests.small_adapter import write_adapter
from tests.small_results import reply_of
from tests.small_sets import demo_config, picture, run
from tests.small_tokenizers import REAL_QWEN, needs_real_qwen
from tests.tools.test_cli import invoke, mistake

NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
MAX_PIXELS = 50_176
NUM_NEW = 12


@pytest.fixture(scope="module")
def places(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Shards, an adapter of random LoRA weights, and its export, for each family."""
    folder = tmp_path_factory.mktemp("export")
    found: dict[str, Path] = {"picture": picture(folder / "street.png", (300, 200))}
    for name in NAMES:
        shards = folder / f"shards-{name}"
        limits = {"image_max_pixels": MAX_PIXELS} | ({"image_min_pixels": 3136} if name == "qwen3_vl" else {})
        run(demo_config(demo, shards, family=name, records_per_shard=16, **limits))
        found[f"shards-{name}"] = shards
        found[f"adapter-{name}"] = write_adapter(folder / f"adapter-{name}", demo / f"base-{name}", shards)
        found[name] = folder / f"merged-{name}"
        export(str(found[f"adapter-{name}"]), found[name], merge=True)
    return found


def snippet_of(folder: Path, number: int = 0) -> str:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text("utf-8"), re.DOTALL)[number]  # type: ignore[no-any-return]


def ran(folder: Path) -> dict[str, Any]:
    """The names that the README's own code defines."""
    names: dict[str, Any] = {"__name__": "snippet"}
    exec(compile(snippet_of(folder), "README.md", "exec"), names)
    return names


@pytest.mark.parametrize("name", NAMES)
def test_plain_transformers_gives_what_predict_gives(places: dict[str, Path], name: str) -> None:
    opened = open_adapter(str(places[f"adapter-{name}"]), torch.device("cpu"), torch.float32)
    predictor = Predictor(opened, PredictConfig(max_new_tokens=NUM_NEW))
    query = Query(str(places["picture"]), "red circle")
    (answer,) = predictor.ask([query])
    names = ran(places[name])

    inputs, size, resized = names["inputs_of"](places["picture"], answer.question)
    assert (size, resized) == (answer.size_wh, answer.resized_wh)
    prompt = prompt_of(Asker(opened.frame).row(query), 0, opened.frame.contract(), opened.frame.family.network)
    assert inputs["input_ids"][0].tolist() == prompt.input_ids.tolist()
    image = load_pixels(prompt.images[0], None, "exact")  # type: ignore[arg-type]
    ours = pixels.qwen_patches(
        torch.from_numpy(image.copy()).flatten(),
        [image.shape[:2]],
        pixels.patch_rule(opened.frame.family),
        opened.frame.family.image_normalisation,
        torch.float32,
    )
    assert torch.equal(inputs["pixel_values"], ours)

    reply, *_ = names["ask"](places["picture"], answer.question, NUM_NEW)
    assert reply == answer.reply
    assert len(reply) > 3
    with opened.bare():
        (bare,) = predictor.ask([query])
    assert bare.reply != answer.reply, "the adapter is in the merged weights"


@pytest.mark.parametrize("name", NAMES)
def test_the_snippet_s_rule_gives_predict_s_boxes(places: dict[str, Path], name: str) -> None:
    names, family = ran(places[name]), find_family(name)
    size, resized = (300, 200), (252, 168)
    rng = np.random.default_rng(0)
    labels = ["dog", 'the "big" one', "狗"]
    for _ in range(20):
        corners = np.sort(rng.uniform(0, 1, (3, 2, 2)), axis=1).reshape(3, 4) * np.tile(size, 2)
        values = family.grid.quantise(corners, np.tile(size, (3, 1)), np.tile(resized, (3, 1)))
        reply = reply_of(values, labels, family)
        parsed = parse(reply, family, resized)
        expected = to_original_px(parsed.boxes, family.grid, size, resized)
        found = names["boxes_of"](reply, size, resized)
        assert np.array([box for _, box in found]) == pytest.approx(expected)
        assert [label for label, _ in found] == list(parsed.labels) == labels
    assert names["boxes_of"]("There are 4 things: 1, 2, 3, 4.", size, resized) == []
    swapped = reply_of([[90, 80, 10, 2000]], ["dog"], family)
    parsed = parse(swapped, family, resized)
    expected = to_original_px(parsed.boxes, family.grid, size, resized)
    assert [box for _, box in names["boxes_of"](swapped, size, resized)] == [pytest.approx(box) for box in expected.tolist()]


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_says_what_training_used(places: dict[str, Path], name: str) -> None:
    folder = places[name]
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    low = 3136
    assert settings["size"] == {"shortest_edge": low, "longest_edge": MAX_PIXELS}
    assert (settings["min_pixels"], settings["max_pixels"]) == (low, MAX_PIXELS)
    assert settings["processor_class"] == processor_of(find_family(name))
    assert settings["image_mean"][0] == (0.5 if name == "qwen3_vl" else 0.48145466)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["do_sample"] is False
    card = loads((folder / CARD).read_bytes(), "")
    assert card.contract.turn_close_ids[0] in generation["eos_token_id"]
    assert (card.method, card.base.random_seed) == ("full", None)
    assert any(path.suffix == ".safetensors" for path in folder.iterdir())
    assert not list(folder.glob("adapter_*"))
    vllm = snippet_of(folder, 1)
    compile(vllm, "README.md", "exec")
    assert f'"max_pixels": {MAX_PIXELS}' in vllm
    prompt = json.loads(re.search(r"^prompt = (.*)$", vllm, re.MULTILINE)[1])  # type: ignore[index]
    assert prompt.startswith(card.contract.header_example)
    assert prompt.endswith(card.contract.answer_open)


def test_boxcar_opens_its_own_export(places: dict[str, Path], tmp_path: Path) -> None:
    """Moved to another place, tokenizer and all: the same reply as the adapter's."""
    moved = tmp_path / "moved"
    shutil.copytree(places["qwen2_5_vl"], moved)
    query = Query(str(places["picture"]), "red circle")
    replies = []
    for folder in (places["adapter-qwen2_5_vl"], moved):
        opened = open_adapter(str(folder), torch.device("cpu"), torch.float32)
        (answer,) = Predictor(opened, PredictConfig(max_new_tokens=NUM_NEW)).ask([query])
        replies.append(answer.reply)
    assert replies[0] == replies[1]
    again = export(str(moved), tmp_path / "again", merge=False)
    assert again.merged
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (moved / "model.safetensors").read_bytes()


def test_an_adapter_alone_runs_on_its_base(places: dict[str, Path], demo: Path, tmp_path: Path) -> None:
    name = "qwen3_vl"
    adapter = write_adapter(tmp_path / "adapter", demo / f"base-{name}", places[f"shards-{name}"], pretrained=tmp_path / "base")
    told = invoke("export", "--adapter", adapter, "--out", tmp_path / "out").output
    assert "the adapter of" in told
    assert "adapter_model.safetensors" in told
    opened = open_adapter(str(adapter), torch.device("cpu"), torch.float32)
    (answer,) = Predictor(opened, PredictConfig(max_new_tokens=NUM_NEW)).ask([Query(str(places["picture"]), "red circle")])
    reply, *_ = ran(tmp_path / "out")["ask"](places["picture"], answer.question, NUM_NEW)
    assert reply == answer.reply
    assert "max_lora_rank=4" in snippet_of(tmp_path / "out", 1)
    # The base has moved.
    shutil.move(tmp_path / "base", tmp_path / "elsewhere")
    export(str(adapter), tmp_path / "other", merge=False, base=str(tmp_path / "elsewhere"))
    assert json.loads((tmp_path / "other" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path / "elsewhere")
    assert f"BASE = {str(tmp_path / 'elsewhere')!r}" in (tmp_path / "other" / "README.md").read_text()


# ---- templates


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if processor_of(family)])
def test_our_template_renders_our_prompts(places: dict[str, Path], name: str) -> None:
    chat = find_family(name).chat
    tokenizer = AutoTokenizer.from_pretrained(str(places[name]))
    template = chat_template(chat)
    image: dict[str, Any] = {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}]}

    def render(messages: list[dict[str, Any]], **options: Any) -> str:
        text: str = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
        return text

    assert render([image], add_generation_prompt=True) == f"{chat.header(chat.default_system, 2)}Which?{chat.answer_open}"
    system = {"role": "system", "content": "Say {{ little }}."}
    assert render([system, image], add_generation_prompt=True) == f"{chat.header('Say {{ little }}.', 2)}Which?{chat.answer_open}"
    done = [image, {"role": "assistant", "content": "Both."}]
    assert render(done) == f"{chat.header(chat.default_system, 2)}Which?{chat.answer_open}Both.{chat.turn_close}"


@needs_real_qwen
def test_a_published_template_that_renders_our_prompts_stays(tmp_path: Path) -> None:
    family = find_family("qwen2_5_vl")
    frame = Frame(family, load_tokenizer(str(REAL_QWEN)), family.resize.published_limits, family.prompts, str(REAL_QWEN))
    published = json.loads((REAL_QWEN / "chat_template.json").read_text())["chat_template"]
    assert _write_tokenizer(tmp_path, frame, str(REAL_QWEN)) == []
    assert (tmp_path / "chat_template.jinja").read_text() == published
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    text = "<|im_start|>Where is the 3rd 狗?<|box_end|> naïve"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == frame.tokenizer.backend.encode(text, add_special_tokens=False).ids


def test_another_template_is_replaced_and_said(places: dict[str, Path], tmp_path: Path) -> None:
    family = find_family("qwen3_vl")
    source = tmp_path / "source"
    shutil.copytree(places["qwen3_vl"], source)
    (source / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    frame = Frame(family, load_tokenizer(str(source)), family.resize.published_limits, family.prompts, str(source))
    (tmp_path / "out").mkdir()
    (note,) = _write_tokenizer(tmp_path / "out", frame, str(source))
    assert "does not render the prompts of training" in note
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == chat_template(family.chat)


# ---- what cannot be


def test_refusals(places: dict[str, Path], tmp_path: Path) -> None:
    adapter = places["adapter-qwen2_5_vl"]
    assert "base with random weights" in mistake("export", "--adapter", adapter, "--out", tmp_path / "a")
    assert not (tmp_path / "a").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    assert "files that are there already" in mistake("export", "--adapter", adapter, "--out", tmp_path / "full", "--merge")
    assert "no such folder" in mistake("export", "--adapter", tmp_path / "nothing", "--out", tmp_path / "a", "--merge")
    told = mistake("export", "--adapter", adapter, "--out", tmp_path / "a", "--merge", "--base", tmp_path / "nothing")
    assert "config.json" in told
    broken = tmp_path / "broken"
    shutil.copytree(adapter, broken)
    (broken / "adapter_model.safetensors").write_bytes(b"no tensors")
    assert "adapter_model.safetensors" in mistake("export", "--adapter", broken, "--out", tmp_path / "a", "--merge")
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")], "nothing half written stays"


def test_a_family_without_a_processor(places: dict[str, Path], demo: Path, tmp_path: Path) -> None:
    """CogVLM and Qwen-VL v1: the adapter with its contract, and no snippet that could not run."""
    from tests.small_sets import config, write_coco  # noqa: PLC0415
    from tests.small_tokenizers import folder_of  # noqa: PLC0415

    picture(tmp_path / "images" / "1.png")
    annotations = write_coco(
        tmp_path, [{"id": 1, "file_name": "1.png", "width": 64, "height": 48}], [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 20]}]
    )
    run(config(annotations, tmp_path / "shards", folder_of("vicuna"), family="cogvlm", images=str(tmp_path / "images"), cutoff_len=2048))
    adapter = tmp_path / "adapter"
    shutil.copytree(places["adapter-qwen2_5_vl"], adapter)
    from msgspec.structs import replace  # noqa: PLC0415

    from boxcar.schemas import manifest as manifests  # noqa: PLC0415

    card = loads((adapter / CARD).read_bytes(), "")
    base = replace(card.base, random_seed=None)
    (adapter / CARD).write_bytes(replace(card, contract=manifests.load(tmp_path / "shards").contract, base=base).dumps())
    with pytest.raises(ConfigError, match=r"no processor.*Without --merge the adapter is exported"):
        export(str(adapter), tmp_path / "out", merge=True)
    exported = export(str(adapter), tmp_path / "out", merge=False)
    assert exported.processor is None
    text = (tmp_path / "out" / "README.md").read_text()
    assert "```python" not in text
    assert "only `boxcar predict`" in text
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "boxcar.json", "tokenizer.json")
    }


def test_an_image_on_nothing_and_one_that_is_turned(places: dict[str, Path], tmp_path: Path) -> None:
    """The README's own loading of images, against ours: transparency on white, EXIF applied."""
    names = ran(places["qwen2_5_vl"])
    clear = Image.new("RGBA", (90, 60), (255, 0, 0, 0))
    clear.paste((0, 128, 0, 255), (10, 10, 40, 50))
    clear.save(tmp_path / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "turned.jpg", (90, 60), exif=exif)
    frame = open_adapter(str(places["adapter-qwen2_5_vl"]), torch.device("cpu"), torch.float32).frame
    for name in ("clear.png", "turned.jpg"):
        inputs, size, resized = names["inputs_of"](tmp_path / name, "Where?")
        row = Asker(frame).row(Query(str(tmp_path / name), "x"))
        assert size == (row["images"][0]["width"], row["images"][0]["height"])
        slot = prompt_of(row, 0, frame.contract(), frame.family.network).images[0]
        image = load_pixels(slot, None, "exact")  # type: ignore[arg-type]
        assert resized == (image.shape[1], image.shape[0])
        ours = pixels.qwen_patches(
            torch.from_numpy(image.copy()).flatten(), [image.shape[:2]], pixels.patch_rule(frame.family), "clip", torch.float32
        )
        assert torch.equal(inputs["pixel_values"], ours)
