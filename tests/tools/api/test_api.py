"""The functions of `import boxcar`: instant to import, without torch, and equal to what the commands and the modules below them give."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import boxcar
from boxcar.pipelines.families.catalog import FAMILIES, find_family
from boxcar.schemas.errors import ConfigError, ShardError
from tests.small_sets import config, run
from tests.tools.test_cli import invoke


@pytest.fixture(scope="module")
def shards(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The drawn scenes for three ways of writing boxes and keeping images."""
    folder = tmp_path_factory.mktemp("api")
    found = {}
    for family, storage in (("qwen2_5_vl", "reference"), ("qwen3_vl", "embed"), ("qwen2_vl", "embed_resized")):
        output = folder / family
        settings = {"family": family, "image_storage": storage, "captions": str(demo / "captions.json")}
        run(config(demo / "instances.json", output, demo / "tokenizer", images=str(demo / "images"), **settings))
        found[family] = str(output)
    return found


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_loads_nothing() -> None:
    code = "import sys; before = set(sys.modules); import boxcar; print(sorted(set(sys.modules) - before - {'typing', 'importlib'}))"
    loaded = _python(code)
    assert not {"numpy", "pyarrow", "torch", "ray", "pydantic"} & set(loaded.split("'"))


def test_no_function_needs_torch_or_ray(shards: dict[str, str]) -> None:
    code = (
        f"import sys, boxcar; s = boxcar.load({shards['qwen2_5_vl']!r}); s[0].messages; s[0].images[0].open();"
        "boxcar.tokens('qwen3_vl', 640, 480); boxcar.parse('[]', 'qwen3_vl', (64, 64)); boxcar.score([[[0, 0, 1, 1]]], [[]]);"
        "boxcar.convert, boxcar.audit; print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    assert _python(code) == "[]"


def test_names_are_listed_and_an_unknown_one_is_refused() -> None:
    assert set(boxcar.__all__) <= set(dir(boxcar))
    for name in boxcar.__all__:
        assert getattr(boxcar, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        boxcar.lod  # noqa: B018


# ---- load


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen2_vl"])
def test_a_sample_has_its_boxes_in_both_units_and_its_images(shards: dict[str, str], family: str) -> None:
    samples = boxcar.load(shards[family])
    assert len(samples) == 12
    num_boxes = 0
    for sample in samples:
        image = sample.images[0]
        assert image.open_resized().size == image.resized_size_wh
        if family != "qwen2_vl":
            assert image.open().size == image.size_wh
        assert sample.num_visual_tokens == image.num_visual_tokens
        for turn in sample.turns:
            assert len(turn.labels) == len(turn.boxes_xyxy_px) or turn.task in ("absent", "caption")
            sizes = [np.tile(np.array(size), (len(turn.boxes_xyxy_px), 1)) for size in (image.size_wh, image.resized_size_wh)]
            expected = find_family(family).grid.quantise(turn.boxes_xyxy_px, sizes[0], sizes[1])
            np.testing.assert_array_equal(turn.boxes_in_text, expected)
            num_boxes += len(expected)
    assert num_boxes > 20


def test_messages_are_those_of_a_chat_template(shards: dict[str, str]) -> None:
    sample = boxcar.load(shards["qwen2_5_vl"])[-1]
    roles = [message["role"] for message in sample.messages]
    assert roles == ["system", *["user", "assistant"] * len(sample.turns)]
    assert sample.messages[0]["content"] == [{"type": "text", "text": "You are a helpful assistant."}]
    assert sample.messages[1]["content"] == [{"type": "image"}, {"type": "text", "text": sample.turns[0].question}]
    assert sample.messages[2]["content"] == [{"type": "text", "text": sample.turns[0].answer}]
    assert [part["type"] for part in sample.messages[3]["content"]] == ["text"]


def test_images_stand_where_a_dialogue_has_them(demo: Path, tmp_path: Path) -> None:
    scenes = sorted((demo / "images").iterdir())[:2]
    row = {
        "messages": [
            {"role": "system", "content": "Answer briefly."},
            {"role": "user", "content": "Compare <image> with <image>, please."},
            {"role": "assistant", "content": "They differ."},
        ],
        "images": [str(path) for path in scenes],
    }
    annotations = tmp_path / "rows.jsonl"
    annotations.write_text(json.dumps(row))
    run(config(annotations, tmp_path / "out", demo / "tokenizer", reader="sharegpt", images="", cutoff_len=4096))
    sample = boxcar.load(tmp_path / "out")[0]
    assert sample.ordered
    assert sample.messages[0]["content"] == [{"type": "text", "text": "Answer briefly."}]
    shown = [part["text"] if part["type"] == "text" else None for part in sample.messages[1]["content"]]
    assert shown == ["Compare ", None, " with ", None, ", please."]
    assert [image.path for image in sample.images] == row["images"]


def test_samples_are_indexed_as_a_list_and_pickled(shards: dict[str, str]) -> None:
    samples = boxcar.load([shards["qwen3_vl"]])
    assert samples[-1].sample_id == samples[11].sample_id
    assert [one.sample_id for one in samples[2:4]] == [samples[2].sample_id, samples[3].sample_id]
    with pytest.raises(IndexError, match="found sample 12, expected one of 12"):
        samples[12]
    samples[0].messages  # noqa: B018  (opens the tokenizer)
    copy = pickle.loads(pickle.dumps(samples))  # noqa: S301
    assert copy[3].turns[0].answer == samples[3].turns[0].answer


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"manifest\.json"):
        boxcar.load(tmp_path)


# ---- tokens and parse


@given(st.sampled_from(sorted(FAMILIES)), st.integers(30, 3000), st.integers(30, 3000))
def test_tokens_are_those_of_the_command(family: str, width: int, height: int) -> None:
    cost = boxcar.tokens(family, width, height)
    known = find_family(family)
    limits = known.resize.published_limits
    sizes = known.resize(np.array([width]), np.array([height]), limits.min_pixels, limits.max_pixels)
    assert (cost.resized_width, cost.resized_height) == (sizes.width[0], sizes.height[0])
    assert cost.num_visual_tokens == sizes.visual_tokens[0]
    assert cost.num_tokens == cost.num_visual_tokens + known.chat.boundary_tokens


def test_a_published_count() -> None:
    assert boxcar.tokens("qwen2_5_vl", 640, 480).num_visual_tokens == 391
    assert boxcar.tokens("qwen3_vl", 640, 480).num_visual_tokens == 300


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        pytest.param(("qwen9", 10, 10), {}, "qwen9", id="family"),
        pytest.param(("qwen2_5_vl", 0, 10), {}, "0x10: found a side without pixels", id="no pixels"),
        pytest.param(("qwen2_5_vl", 3, 1000), {}, "3x1000: found a size that the family refuses", id="aspect ratio"),
        pytest.param(("qwen2_5_vl", 10, 10), {"image_max_pixels": 3}, "image_max_pixels: found 3", id="limit"),
        pytest.param(("cogvlm", 10, 10), {"image_max_pixels": 10**6}, "resizes every image to one size", id="fixed size"),
    ],
)
def test_what_cannot_be_counted_is_refused(arguments: Any, settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        boxcar.tokens(*arguments, **settings)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen2_vl"])
def test_an_answer_is_parsed_back_to_its_boxes(shards: dict[str, str], family: str) -> None:
    num = 0
    for sample in boxcar.load(shards[family]):
        for turn in sample.turns:
            if turn.task not in ("detect", "detect_joint", "refer"):
                continue
            image = sample.images[0]
            limits = {"image_min_pixels": None, "image_max_pixels": 1_003_520}
            reply = boxcar.parse(turn.answer, family, image.size_wh, **limits)
            assert reply.status == "strict"
            assert len(reply.boxes_xyxy_px) == len(turn.boxes_xyxy_px)
            unit_px = (
                max(np.array(image.size_wh) / 1000) if family != "qwen2_5_vl" else max(np.divide(image.size_wh, image.resized_size_wh))
            )
            assert np.abs(reply.boxes_xyxy_px - turn.boxes_xyxy_px).max() <= unit_px + 1
            num += 1
    assert num >= 12


def test_points_come_in_original_pixels() -> None:
    reply = boxcar.parse('[{"point_2d": [500, 250], "label": "tip"}]', "qwen3_vl", (200, 100))
    assert reply.points_xy_px.tolist() == [[100.0, 25.0]]
    assert (reply.point_labels, reply.boxes_xyxy_px.shape) == (("tip",), (0, 4))


# ---- score

ONE = [0, 0, 10, 10]
HALF = [0, 0, 10, 5]


@pytest.mark.parametrize(
    ("truth", "predicted", "settings", "metric", "value"),
    [
        pytest.param([[ONE]], [[HALF]], {}, ("rec", "mean_iou"), 0.5, id="iou"),
        pytest.param([[ONE], [ONE]], [[ONE], []], {}, ("rec", "acc_50"), 0.5, id="nothing found"),
        pytest.param([[ONE, HALF]], [[ONE]], {}, ("objects", "recall_50"), 0.5, id="recall"),
        pytest.param([[]], [[ONE]], {"asked": [["cat"]]}, ("grec", "n_acc"), 0.0, id="absent, given a box"),
        pytest.param([[]], [[]], {}, ("grec", "n_acc"), 1.0, id="absent, none given"),
        pytest.param(
            [[ONE, HALF]],
            [[ONE, HALF]],
            {"truth_labels": [["cat", "dog"]], "predicted_labels": [["cat", "cow"]]},
            ("objects", "stray"),
            0.5,
            id="a label that was not asked for",
        ),
        pytest.param([np.array([ONE])], [np.zeros((0, 4))], {}, ("objects", "recall_50"), 0.0, id="arrays"),
    ],
)
def test_scores(truth: Any, predicted: Any, settings: Any, metric: Any, value: float) -> None:
    assert boxcar.score(truth, predicted, **settings, draws=0).value(*metric) == value


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        pytest.param(([[ONE]], []), {}, "predicted_boxes: found 0 entries, expected 1", id="lengths"),
        pytest.param(([[ONE]], [[[0, 0, 1]]]), {}, r"shape \(1, 3\)", id="three numbers"),
        pytest.param(([[ONE]], [[ONE]]), {"asked": [["a", "b"]]}, "truth_labels: found nothing, and 2 labels asked for", id="labels"),
    ],
)
def test_lists_that_do_not_fit_are_refused(arguments: Any, settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        boxcar.score(*arguments, **settings)


# ---- convert and audit


def test_convert_and_audit_give_what_the_commands_give(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings: dict[str, Any] = {
        "reader": "coco",
        "annotations": demo / "instances.json",
        "images": demo / "images",
        "family": "qwen2_5_vl",
        "tokenizer": demo / "tokenizer",
        "cutoff_len": 1024,
        "output": tmp_path / "shards",
        "executor": "inline",
    }
    steps: list[tuple[int, int]] = []
    done = boxcar.convert(**settings, on_progress=lambda done, total: steps.append((done, total)))
    assert done.manifest.counts.records_written == len(boxcar.load(done.output)) == 12
    assert (steps[0], steps[-1]) == ((0, 1), (1, 1))
    assert boxcar.convert(**settings).was_complete
    written = "".join(f"    {key}: {value}\n" for key, value in settings.items())
    (tmp_path / "workflows.yaml").write_text(f"mine:\n  convert:\n{written}")
    assert boxcar.convert("mine").was_complete
    result = boxcar.audit("mine", cutoffs=[256, 512], duplicates=False)
    shown = invoke("audit", "mine", "--cutoffs", "256,512", "--no-duplicates", "--json")
    assert result.dumps().decode() == shown.stdout
    of_shards = boxcar.audit(done.output, duplicates=False)
    assert of_shards.families[0].contract == result.families[0].contract


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"reader": "coco"}, r"settings: found.*convert\.annotations: missing", id="missing"),
        pytest.param({"reader": "coco", "cutof_len": 3}, r"convert\.cutof_len: unknown key", id="unknown"),
    ],
)
def test_wrong_settings_are_named(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        boxcar.convert(**settings)
