"""A whole run on drawn scenes, in one process: names, refusals, stopping and going on, damaged checkpoints, the adapter in plain peft."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from boxcar.schemas.errors import BudgetError, ConfigError, TrainingError
from boxcar.schemas.training import TrainConfig
from boxcar.train.job import train
from boxcar.train.running.run_folder import METRICS, RunFolder
from boxcar.train.running.sessions import LocalSession
from boxcar.train.running.trackers import read_events, steps_of
from tests.places import ROOT
from tests.small_sets import copy_demo, demo_config, run


@pytest.fixture(scope="module")
def scenes(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with shards in it."""
    folder = copy_demo(demo, tmp_path_factory.mktemp("scenes") / "demo")
    run(demo_config(folder, folder / "shards", records_per_shard=16))
    return folder


def _config(scenes: Path, output: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "shards": [str(scenes / "shards")],
        "base": str(scenes / "base-qwen2_5_vl"),
        "init": "random",
        "output": str(output),
        "precision": "fp32",
        "global_batch": 1,
        "epochs": 3,
        "learning_rate": {"language": 5e-3},
        "checkpoint_every_steps": 2,
        "loader_workers": 0,
        "trackers": [],
        "placement": {"executor": "inline", "use_gpu": False},
    }
    return TrainConfig.model_validate(settings | changes)


def _losses(folder: str) -> list[float]:
    return [event["loss"] for event in steps_of(read_events((Path(folder) / METRICS).read_bytes()))]


@pytest.fixture(scope="module")
def whole(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(_config(scenes, tmp_path_factory.mktemp("whole")), "demo")


def test_a_run_ends_with_an_adapter_that_plain_peft_loads(scenes: Path, whole: dict[str, Any]) -> None:
    from peft import PeftModel  # noqa: PLC0415
    from transformers import AutoConfig, AutoModelForImageTextToText  # noqa: PLC0415

    assert whole["step"] == whole["num_steps"] == len(_losses(whole["folder"]))
    adapter = Path(whole["folder"]) / "adapter"
    assert {"adapter_config.json", "adapter_model.safetensors", "boxcar.json"} == {path.name for path in adapter.iterdir()}
    base = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(scenes / "base-qwen2_5_vl"))
    model = PeftModel.from_pretrained(base, adapter)
    loaded = {name.replace(".default", ""): tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    written = load_file(adapter / "adapter_model.safetensors")
    assert loaded.keys() == written.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in written.items())
    assert any(tensor.abs().max() > 0 for name, tensor in written.items() if "lora_B" in name)


@pytest.mark.parametrize("stop_after", [1, 4])
def test_stopping_and_going_on_is_the_run_without_a_stop(scenes: Path, whole: dict[str, Any], tmp_path: Path, stop_after: int) -> None:
    first = train(_config(scenes, tmp_path, max_steps=stop_after), "demo")
    assert first["step"] == stop_after
    second = train(_config(scenes, tmp_path), "demo", resume=True)
    assert Path(second["folder"]).name == Path(whole["folder"]).name, "named by content"
    assert _losses(second["folder"]) == _losses(whole["folder"])
    for name in ("adapter_model.safetensors", "boxcar.json"):
        assert (Path(second["folder"]) / "adapter" / name).read_bytes() == (Path(whole["folder"]) / "adapter" / name).read_bytes()


def test_sigterm_saves_and_ends_and_the_run_can_go_on(scenes: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    config = _config(scenes, tmp_path, checkpoint_every_steps=1000, name="stopped")
    program = "import sys; from boxcar.train.job import TrainConfig, train; train(TrainConfig.model_validate_json(sys.argv[1]), 'demo')"
    metrics = tmp_path / "stopped" / METRICS
    child = subprocess.Popen([sys.executable, "-c", program, config.model_dump_json()], cwd=ROOT)
    try:
        until = time.monotonic() + 120
        while not (metrics.exists() and b'"step_tokens"' in metrics.read_bytes()):  # the first step
            assert child.poll() is None, "ended before its first step"
            assert time.monotonic() < until, "no first step within two minutes"
            time.sleep(0.005)
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=60) == 128 + signal.SIGTERM
    finally:
        child.kill()
        child.wait()
    events = read_events(metrics.read_bytes())
    finished, saved = events[-1], [event["step"] for event in events if event["event"] == "checkpoint"]
    assert (finished["event"], finished["complete"]) == ("finished", False)
    assert 0 < finished["step"] < whole["num_steps"]
    assert saved == [finished["step"]], "saved because of the signal alone"
    second = train(config, "demo", resume=True)
    assert [event["step"] for event in read_events(metrics.read_bytes()) if event["event"] == "resumed"] == [0, finished["step"]]
    assert _losses(second["folder"]) == _losses(whole["folder"])
    name = "adapter/adapter_model.safetensors"
    assert (Path(second["folder"]) / name).read_bytes() == (Path(whole["folder"]) / name).read_bytes()


def test_the_handler_of_sigterm_is_put_back(tmp_path: Path) -> None:
    session = LocalSession(RunFolder(str(tmp_path)), 2, torch.device("cpu"))
    before = signal.getsignal(signal.SIGTERM)
    with session.stop_on(signal.SIGTERM):
        assert signal.getsignal(signal.SIGTERM) is not before
        assert not session.stopping()
        signal.raise_signal(signal.SIGTERM)
        assert session.stopping()
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_same_run_again_is_refused(scenes: Path, whole: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match="or --resume"):
        train(_config(scenes, Path(whole["folder"]).parent), "demo")


def test_the_folder_of_another_run_is_refused(scenes: Path, tmp_path: Path) -> None:
    train(_config(scenes, tmp_path, name="mine", max_steps=1), "demo")
    with pytest.raises(TrainingError, match=r"another run:\n  seed: 0 there, 1 here"):
        train(_config(scenes, tmp_path, name="mine", seed=1), "demo", resume=True)


@pytest.mark.parametrize("damage", ["cut", "flipped", "unsealed"])
def test_a_damaged_checkpoint_is_left_aside_for_the_one_before(scenes: Path, whole: dict[str, Any], tmp_path: Path, damage: str) -> None:
    first = train(_config(scenes, tmp_path, max_steps=4), "demo")
    newest = Path(first["folder"]) / "step-00000004"
    victim = newest / ("checkpoint.json" if damage == "unsealed" else "trainable.safetensors")
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 4
    if damage == "unsealed":
        victim.unlink()
    else:
        victim.write_bytes(data[: len(data) // 2] if damage == "cut" else data)
    second = train(_config(scenes, tmp_path), "demo", resume=True)
    events = read_events((Path(second["folder"]) / METRICS).read_bytes())
    assert [event["step"] for event in events if event["event"] == "checkpoint_damaged"] == [4]
    assert [event["step"] for event in events if event["event"] == "resumed"] == [0, 2]
    assert _losses(second["folder"]) == _losses(whole["folder"])


def test_only_the_newest_checkpoints_are_kept(whole: dict[str, Any]) -> None:
    steps = sorted(path.name for path in Path(whole["folder"]).glob("step-*"))
    assert len(steps) == 2
    assert steps[-1] == f"step-{whole['step']:08d}"


def test_a_bad_image_stops_or_is_left_out(scenes: Path, tmp_path: Path) -> None:
    folder = copy_demo(scenes, tmp_path / "demo")
    run(demo_config(folder, folder / "other", records_per_shard=16, seed=3))
    victim = sorted((folder / "images").iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:200])
    shards = {"shards": [str(folder / "other")]}
    with pytest.raises(Exception, match=victim.name):
        train(_config(scenes, tmp_path / "stop", **shards), "demo")
    state = train(_config(scenes, tmp_path / "skip", on_bad_image="skip", **shards), "demo")
    events = read_events((Path(state["folder"]) / METRICS).read_bytes())
    dropped = [name for event in events if event["event"] == "dropped" for name in event["samples"]]
    assert len(dropped) == 3, "once an epoch"
    assert victim.name in dropped[0]
    assert state["step"] == state["num_steps"]


def test_a_cutoff_below_every_sample(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError):
        train(_config(scenes, tmp_path, cutoff_len=20), "demo")


def test_a_base_of_another_family(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model_type 'qwen3_vl'"):
        train(_config(scenes, tmp_path, base=str(scenes / "base-qwen3_vl")), "demo")


def test_a_full_disk_leaves_the_last_checkpoint(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copytree, calls = shutil.copytree, []

    def full(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return copytree(*arguments, **options)

    monkeypatch.setattr("boxcar.train.running.run_folder.shutil.copytree", full)
    with pytest.raises(Exception, match="No space left on device"):
        train(_config(scenes, tmp_path), "demo")
    (folder,) = tmp_path.iterdir()
    assert [path.name for path in folder.glob("step-*")] == ["step-00000002"]
    assert not list(folder.glob(".step-*")), "nothing half-written is left"
    assert train(_config(scenes, tmp_path), "demo", resume=True)["step"] > 2


def test_run_json_says_what_the_run_is_made_of(whole: dict[str, Any]) -> None:
    made_of = json.loads((Path(whole["folder"]) / "run.json").read_text())
    assert made_of["format"] == "boxcar-run"
    assert len(made_of["manifests"]) == 1
    assert "placement" not in made_of


def test_box_metrics_are_measured_on_the_way_and_change_nothing(scenes: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    generate = {"max_samples": 4, "max_new_tokens": 4, "tasks": ["detect", "absent"]}
    stop = {"metric": "mean_iou", "mode": "max", "patience": 1}
    validation = {"shards": [str(scenes / "shards")], "every_steps": 3, "max_packs": 1, "generate": generate, "early_stop": stop}
    state = train(_config(scenes, tmp_path, validation=validation, max_steps=9), "demo")
    events = read_events((Path(state["folder"]) / METRICS).read_bytes())
    measured = [event for event in events if "validation/mean_iou" in event]
    assert measured
    assert all(0 <= event["validation/failed"] <= 1 and "validation/mean_iou/detect" in event for event in measured)
    assert [event["event"] for event in events if event["event"] == "early_stop"] == ["early_stop"], "0 does not improve on 0"
    assert state["step"] == 6
    assert _losses(state["folder"]) == _losses(whole["folder"])[:6]


def test_a_metric_that_is_not_measured_is_refused(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mean_iou needs `generate`"):
        _config(scenes, tmp_path, validation={"shards": [str(scenes / "shards")], "early_stop": {"metric": "mean_iou"}})
    generate = {"max_samples": 2, "max_new_tokens": 2, "tasks": ["detect"]}
    validation: dict[str, Any] = {
        "shards": [str(scenes / "shards")],
        "every_steps": 1,
        "generate": generate,
        "early_stop": {"metric": "acc_99"},
    }
    with pytest.raises(TrainingError, match="'acc_99', which this validation does not measure, expected one of acc_50"):
        train(_config(scenes, tmp_path, validation=validation), "demo")
