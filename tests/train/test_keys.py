"""Keys of the train section that few people set: each one has an effect, and it is the one that its description promises."""

from pathlib import Path
from typing import Any

import pytest
import torch

from boxcar.schemas.errors import ConfigError
from boxcar.schemas.evaluation import EvaluateConfig
from boxcar.schemas.training import LoraConfig, TrainConfig
from boxcar.train import worker
from boxcar.train.data.store import ShardStore
from boxcar.train.job import run_config_of, train
from boxcar.train.network.model import attach_lora
from boxcar.train.running.run_folder import METRICS
from boxcar.train.running.trackers import read_events, steps_of
from boxcar.train.scoring.evaluate import evaluate
from tests.small_sets import copy_demo, demo_config, run
from tests.train.tiny import tiny_base
from tests.train.worlds import Setting, trainer_of


def adapted(folder: Path, **settings: Any) -> Any:
    return attach_lora(tiny_base(folder, "qwen2_5_vl"), LoraConfig(rank=4, alpha=32, **settings), seed=0)


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 32 / 4), (True, 32 / 2)])
def test_use_rslora_scales_by_the_root_of_the_rank(tmp_path: Path, use_rslora: bool, scaling: float) -> None:
    model = adapted(tmp_path, use_rslora=use_rslora)
    scalings = {module.scaling["default"] for module in model.modules() if isinstance(getattr(module, "scaling", None), dict)}
    assert scalings == {scaling}


@pytest.mark.parametrize("use_dora", [False, True])
def test_use_dora_adds_a_magnitude_to_each_layer(tmp_path: Path, use_dora: bool) -> None:
    names = [name for name, weight in adapted(tmp_path, use_dora=use_dora).named_parameters() if weight.requires_grad]
    magnitudes = [name for name in names if "lora_magnitude_vector" in name]
    assert len(magnitudes) == (sum("lora_A" in name for name in names) if use_dora else 0)


def test_adam_betas_reach_the_optimizer(tmp_path: Path) -> None:
    trainer, _ = trainer_of(Setting(options={"adam_betas": [0.8, 0.95]}), tmp_path)
    optimizer: torch.optim.Optimizer = trainer.strategy._optimizer  # type: ignore[attr-defined]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.95)}


def test_log_every_steps_thins_the_steps_out_but_for_the_last(tmp_path: Path) -> None:
    trainer, world = trainer_of(Setting(num_steps=5, global_batch=1, options={"log_every_steps": 2}), tmp_path)
    trainer.run()
    assert [event["step"] for event in world.events if event["event"] == "step"] == [2, 4, 5]


@pytest.mark.parametrize(("alarm_drop", "alarms"), [(0.15, [3]), (0.25, [])])
def test_alarm_drop_says_when_a_task_falls(tmp_path: Path, alarm_drop: float, alarms: list[int]) -> None:
    generate = {"max_samples": 1, "alarm_drop": alarm_drop}
    validation = {"shards": ["unused"], "every_steps": 1, "generate": generate}
    trainer, world = trainer_of(Setting(num_steps=3, global_batch=1, options={"validation": validation}), tmp_path)
    measured = iter([{"mean_iou/refer": value} for value in (0.5, 0.6, 0.4)])
    world.measure = lambda: next(measured)  # type: ignore[method-assign]
    trainer.run()
    assert [event["step"] for event in world.events if event["event"] == "task_falls"] == alarms


@pytest.mark.parametrize(("max_failures", "num_to_keep"), [(0, 1), (7, 5)])
def test_max_failures_and_num_to_keep_are_handed_to_ray_train(max_failures: int, num_to_keep: int) -> None:
    config = TrainConfig.model_validate({"output": "runs", "num_to_keep": num_to_keep, "placement": {"max_failures": max_failures}})
    made = run_config_of(config, "name")
    assert made.failure_config is not None
    assert made.checkpoint_config is not None
    assert (made.failure_config.max_failures, made.checkpoint_config.num_to_keep) == (max_failures, num_to_keep)


def settings_of(demo: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """A run in this process on the demo's shards."""
    return {
        "shards": [str(demo / "shards")],
        "base": str(demo / "base-qwen2_5_vl"),
        "init": "random",
        "output": str(folder / "runs"),
        "precision": "fp32",
        "global_batch": 1,
        "loader_workers": 0,
        "trackers": [],
        "placement": {"executor": "inline", "use_gpu": False},
        **changes,
    }


def test_keys_of_a_whole_run(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """num_to_keep: checkpoints that stay. cache_gb: the limit of the local copy. peak_tflops: what MFU is measured against."""
    limits: list[int] = []

    def store(shards: Any, folder: str | None, max_bytes: int) -> ShardStore:
        limits.append(max_bytes)
        return ShardStore(shards, folder, max_bytes)

    monkeypatch.setattr(worker, "ShardStore", store)
    folder = copy_demo(demo, tmp_path / "demo")
    run(demo_config(folder, folder / "shards"))
    settings = settings_of(folder, tmp_path, max_steps=4, checkpoint_every_steps=1, num_to_keep=2, cache_gb=0.25, peak_tflops=0.5)
    run_folder = Path(train(TrainConfig.model_validate(settings), "keys")["folder"])
    assert sorted(path.name for path in run_folder.glob("step-*")) == ["step-00000003", "step-00000004"]
    assert limits == [250_000_000]
    step = list(steps_of(read_events((run_folder / METRICS).read_bytes())))[-1]
    assert 0 < step["mfu"] < 1


def test_without_peak_tflops_a_cpu_has_no_mfu(tmp_path: Path) -> None:
    trainer, world = trainer_of(Setting(num_steps=1, global_batch=1), tmp_path)
    trainer.run()
    assert all("mfu" not in event for event in world.events)


def test_caption_metrics_ask_for_their_package_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ConfigError("evaluate.caption_metrics", found="no pycocoevalcap", expected="that package")

    monkeypatch.setattr("boxcar.train.scoring.evaluate.require_captions", missing)
    config = EvaluateConfig.model_validate({"shards": ["shards"], "tasks": ["caption"]})
    with pytest.raises(ConfigError, match="no pycocoevalcap"):
        evaluate(config.model_copy(update={"caption_metrics": True}), "nowhere")
    with pytest.raises(ConfigError, match=r"evaluate\.caption_metrics=true: nothing would be measured"):
        evaluate(config, "nowhere")


@pytest.mark.parametrize(("free", "recomputed"), [(1e12, 0), (1.0, "all"), (None, "all")])
def test_gradient_checkpointing_auto_asks_how_much_memory_is_free(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: float | None, recomputed: object
) -> None:
    monkeypatch.setattr(worker, "free_bytes", lambda _: free)
    folder = copy_demo(demo, tmp_path / "demo")
    run(demo_config(folder, folder / "shards"))
    settings = settings_of(folder, tmp_path, max_steps=1)
    run_folder = Path(train(TrainConfig.model_validate(settings), "memory")["folder"])
    [memory] = [event for event in read_events((run_folder / METRICS).read_bytes()) if event["event"] == "memory"]
    assert memory["recomputed_layers"] == (memory["layers"] if recomputed == "all" else recomputed)
    if free is not None:
        assert (memory["available_gb"], memory["fits"]) == (round(free / 1e9, 2), free > 1)
