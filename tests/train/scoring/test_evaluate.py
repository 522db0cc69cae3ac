"""A run is measured: what is asked, what is refused, what is written, and that nothing is measured twice."""

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pytest
import torch

from boxcar.schemas.adapter import loads
from boxcar.schemas.errors import ConfigError, ContractError
from boxcar.schemas.evaluation import EvaluateConfig
from boxcar.train.answering.adapter import Opened, open_adapter
from boxcar.train.answering.predict import PredictConfig
from boxcar.train.data.store import ShardStore
from boxcar.train.scoring.evaluate import ANSWERS_SCHEMA, answer_all, answers_table, evaluate, finished, slice_of
from boxcar.train.scoring.questions import SCORED_SCHEMA
from boxcar.train.scoring.score import results_of, score
from tests import small_sets
from tests.small_adapter import train_adapter
from tests.small_sets import copy_demo, demo_config, run


@pytest.fixture(scope="module")
def scenes(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards to train on, and the same scenes' shards under other names: held out, embedded, of other prompts."""
    folder = copy_demo(demo, tmp_path_factory.mktemp("scenes") / "demo")
    run(demo_config(folder, folder / "shards"))
    run(demo_config(folder, folder / "embedded", image_storage="embed"))
    other = {"detect": {"share": 1.0, "prompts": {"en": ["Box every {label}."]}}}
    run(demo_config(folder, folder / "other-prompts", tasks=other))
    run(demo_config(folder, folder / "other-pixels", image_max_pixels=50176))
    return folder


@pytest.fixture(scope="module")
def adapter(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(train_adapter(scenes / "shards", scenes / "base-qwen2_5_vl", tmp_path_factory.mktemp("runs")))


def _config(scenes: Path, *shards: str, **changes: Any) -> EvaluateConfig:
    settings: dict[str, Any] = {
        "shards": [str(scenes / name) for name in shards or ("shards",)],
        "max_samples": 3,
        "max_new_tokens": 3,
        "use_gpu": False,
        "allow_leakage": True,
        "score_rule": "const",
    }
    return EvaluateConfig.model_validate(settings | changes)


@pytest.fixture(scope="module")
def opened(adapter: str) -> Opened:
    return open_adapter(adapter, torch.device("cpu"), torch.float32)


def test_everything_is_written_and_nothing_is_measured_twice(scenes: Path, adapter: str, tmp_path: Path) -> None:
    config = _config(scenes, output=str(tmp_path / "results"), score_rule="logprob", forgetting=[str(scenes / "embedded")])
    assert finished(config, adapter) is None
    results = evaluate(config, adapter)
    assert list(results["arms"]) == ["adapter", "base"]
    assert list(results["forgetting"]["arms"]) == ["adapter", "base"]
    folder = Path(results["folder"])
    assert {path.name for path in folder.iterdir()} == {"results.json", "results.md", "answers-adapter.arrow", "answers-base.arrow"}
    with pa.memory_map(str(folder / "answers-adapter.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
    assert table.schema == ANSWERS_SCHEMA
    assert table.num_rows == results["arms"]["adapter"]["num_answers"] > 3
    again = score(table.select(SCORED_SCHEMA.names).cast(SCORED_SCHEMA)).to_json()
    assert json.loads(json.dumps(again)) == results["arms"]["adapter"]["boxes"], "the table holds all that the figures need"
    assert "rec mean_iou" in (folder / "results.md").read_text()
    known = finished(config, adapter)
    assert known is not None
    assert known["arms"] == json.loads(json.dumps(results["arms"]))
    assert finished(config.model_copy(update={"max_new_tokens": 4}), adapter) is None


def test_the_slice_is_fixed_by_the_seed(scenes: Path) -> None:
    shards = [str(scenes / "shards")]
    store = ShardStore(shards)

    def names(num: int | None, seed: int) -> list[str]:
        return list(dict.fromkeys(one.row["sample_id"] for one in slice_of(store, shards, ("detect",), num, seed)))

    assert names(4, 0) == names(4, 0)
    assert set(names(4, 0)) < set(names(8, 0)), "more samples are the same ones and others"
    assert names(4, 0) != names(4, 1)
    assert len(names(None, 0)) == store.num_rows


def test_images_that_were_trained_on_are_refused(scenes: Path, adapter: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="images that were trained on") as caught:
        evaluate(_config(scenes, allow_leakage=False, output=str(tmp_path)), adapter)
    assert "evaluate.allow_leakage=true" in str(caught.value)
    with pytest.raises(ConfigError, match="images that were trained on"):
        evaluate(_config(scenes, "embedded", allow_leakage=False, output=str(tmp_path)), adapter)
    copies = tmp_path / "copies"
    shutil.copytree(scenes / "images", copies)
    for path in copies.iterdir():
        path.rename(path.with_name(f"renamed-{path.name}"))
    annotations = (scenes / "instances.json").read_text().replace('"file_name": "', '"file_name": "renamed-')
    (tmp_path / "renamed.json").write_text(annotations)
    settings = {"images": str(copies), "tokenizer": str(scenes / "tokenizer")}
    run(small_sets.config(tmp_path / "renamed.json", tmp_path / "renamed", **settings))
    with pytest.raises(ConfigError, match="images that were trained on"):
        evaluate(_config(scenes, allow_leakage=False, shards=[str(tmp_path / "renamed")], output=str(tmp_path / "out")), adapter)


def test_training_shards_that_are_gone_are_said_to_be(scenes: Path, adapter: str, tmp_path: Path) -> None:
    copy = tmp_path / "adapter"
    shutil.copytree(Path(adapter) / "adapter", copy)
    card = loads((copy / "boxcar.json").read_bytes(), "")
    gone = msgspec.structs.replace(card, train_shards={str(tmp_path / "gone"): "0" * 32})
    (copy / "boxcar.json").write_bytes(gone.dumps())
    results = evaluate(_config(scenes, allow_leakage=False, compare_base=False, output=str(tmp_path / "out")), str(copy))
    assert "not compared, for they are not here" in results["leakage"]
    assert list(results["arms"]) == ["adapter"]


def test_another_frame_is_refused(scenes: Path, opened: Opened) -> None:
    with pytest.raises(ContractError, match="max_pixels: "):
        answer_all(_config(scenes, "other-pixels", allow_prompt_mismatch=True), opened, [str(scenes / "other-pixels")], lambda _: None)


def test_other_prompts_need_leave_and_can_be_compared(scenes: Path, opened: Opened) -> None:
    shards = [str(scenes / "other-prompts")]
    with pytest.raises(ContractError, match=r"(?s)prompts: .*allow_prompt_mismatch=true"):
        answer_all(_config(scenes, "other-prompts"), opened, shards, lambda _: None)
    config = _config(scenes, "other-prompts", ask_as="both", compare_base=False, tasks=["detect"])
    theirs, own = answer_all(config, opened, shards, lambda _: None)
    assert (theirs.name, own.name) == ("adapter", "adapter (its own prompts)")
    assert all(question.startswith("Box every ") for question in theirs.table["question"].to_pylist())
    bank = opened.frame.bank["detect"]["en"]
    asked = [prompt.replace("{label}", label) for prompt in bank for (label,) in own.table["asked"].to_pylist()]
    assert set(own.table["question"].to_pylist()) <= set(asked)
    assert own.table["sample_id"] == theirs.table["sample_id"]


def test_no_turn_to_ask(scenes: Path, opened: Opened) -> None:
    with pytest.raises(ConfigError, match="no turn of refer"):
        answer_all(_config(scenes, tasks=["refer"]), opened, [str(scenes / "shards")], lambda _: None)


def test_a_perfect_reply_scores_one(scenes: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """The truth's own text as the reply: every figure is what rounding to the family's grid leaves."""
    from boxcar.train.answering import predict  # noqa: PLC0415
    from boxcar.train.answering.generate import Reply  # noqa: PLC0415

    shards = [str(scenes / "shards")]
    store = ShardStore(shards)
    asked = list(slice_of(store, shards, ("detect", "detect_joint", "absent"), None, 0))
    # One prompt a batch and one batch a window: replies are made in the order asked.
    monkeypatch.setattr(predict, "BATCHES_PER_WINDOW", 1)
    answers = iter([one.row["turns"][one.turn]["answer"] for one in asked])

    def parrot(*_: Any, **__: Any) -> list[Reply]:
        return [Reply([], next(answers), None, complete=True)]

    monkeypatch.setattr(predict, "generate", parrot)
    table = answers_table(opened, PredictConfig(batch_size=1), store, asked)
    results = score(table.select(SCORED_SCHEMA.names).cast(SCORED_SCHEMA), draws=0)
    assert results_of(results.to_json()) == results
    assert results.value("objects", "f1_50") == 1.0
    assert results.value("format", "failed") == 0.0
    assert results.value("objects", "hallucinated") == 0.0
    iou = results.value("rec", "mean_iou")
    assert iou is not None
    assert iou > 0.9
