"""metrics.jsonl outlives crashes; trackers elsewhere get every number, and a resumed run goes on in the same place."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from boxcar.schemas.errors import ConfigError
from boxcar.train.running.run_folder import METRICS, RunFolder
from boxcar.train.running.trackers import IDS, JsonLines, open_trackers, read_events, steps_of


@pytest.mark.parametrize(
    ("before", "steps"),
    [
        (b"", [3]),
        (b'{"event": "step", "step": 1}\n', [1, 3]),
        (b'{"event": "step", "step": 1}\n{"event": "step", "st', [1, 3]),
        (b'{"event": "st', [3]),
    ],
    ids=["empty", "whole", "cut", "nothing but a cut line"],
)
def test_a_line_that_a_crash_cut_is_left_out_and_not_run_into(tmp_path: Path, before: bytes, steps: list[int]) -> None:
    (tmp_path / METRICS).write_bytes(before)
    JsonLines(RunFolder(str(tmp_path))).log({"event": "step", "step": 3})
    written = (tmp_path / METRICS).read_bytes()
    assert [event["step"] for event in steps_of(read_events(written))] == steps
    assert len(written.splitlines()) == len(steps)


def test_events_before_the_last_line_is_whole() -> None:
    assert read_events(b'{"event": "a"}\n{"event"') == [{"event": "a"}]
    assert read_events(b"") == []


def test_what_was_gone_back_over_counts_once() -> None:
    events = [{"event": "step", "step": step, "loss": 1.0} for step in (1, 2, 3)]
    events += [{"event": "resumed", "step": 1}, {"event": "step", "step": 2, "loss": 2.0}]
    assert [(event["step"], event["loss"]) for event in steps_of(events)] == [(1, 1.0), (2, 2.0)]


EVENTS: list[dict[str, Any]] = [
    {"event": "resumed", "step": 0},
    *({"event": "step", "step": step, "loss": 1.0 / step, "loss/detect/words": 2.0 * step} for step in (1, 2, 3)),
]
AGAIN: list[dict[str, Any]] = [{"event": "resumed", "step": 2}, {"event": "step", "step": 3, "loss": 0.25, "loss/detect/words": 6.0}]


def _attempt(names: Sequence[str], folder: RunFolder, events: Sequence[dict[str, Any]]) -> None:
    opened = open_trackers(names, folder, "mine")
    for event in events:
        for tracker in opened:
            tracker.log(event)
    for tracker in opened:
        tracker.close()


def test_tensorboard_shows_what_was_done_again_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415

    for events in (EVENTS, AGAIN):
        _attempt(["tensorboard"], RunFolder(str(tmp_path)), events)
        time.sleep(1.1)  # files of attempts are named by the second
    shown = EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    assert [(one.step, round(one.value, 6)) for one in shown.Scalars("loss")] == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert shown.Tags()["scalars"] == ["loss", "loss/detect/words"]


def test_mlflow_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="pip install mlflow")
    pytest.importorskip("sqlalchemy", reason="mlflow-skinny has no store of its own")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    folder = RunFolder(str(tmp_path / "run"))
    _attempt(["mlflow"], folder, EVENTS)
    _attempt(["mlflow"], folder, [*AGAIN, {"event": "finished"}])
    (run,) = mlflow.search_runs(output_format="list")
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert [(one.step, one.value) for one in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (3, 0.25)]


def test_mlflow_without_a_store_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="pip install mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="without MLFLOW_TRACKING_URI"):
        open_trackers(["mlflow"], RunFolder(str(tmp_path)), "mine")


def test_wandb_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = RunFolder(str(tmp_path))
    for events in (EVENTS, AGAIN):
        _attempt(["wandb"], folder, events)
        time.sleep(1.1)  # folders of attempts are named by the second
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    assert {path.stem for path in files} == {"run-" + json.loads((tmp_path / IDS).read_bytes())["wandb"]}


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_tracker_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"pip install {name}"):
        open_trackers([name], RunFolder(str(tmp_path)), "mine")
