"""Where a run's events go: metrics.jsonl always, TensorBoard, MLflow and W&B by switch. Rank 0 only."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Protocol

from schemas.errors import ConfigError
from train.run_folder import METRICS, RunFolder


class Tracker(Protocol):
    """An ear for events; those named "step" carry numbers."""

    def log(self, event: dict[str, Any]) -> None: ...

    def flush(self) -> None:
        """At checkpoints and at the end."""


class JsonLines:
    """metrics.jsonl in the run's folder, only ever appended to: after a resume, a step's last line counts."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._remote = folder.local is None
        path = Path(mkdtemp()) / METRICS if folder.local is None else folder.local / METRICS
        if self._remote:  # an object store cannot append: the file is kept here and copied at every flush
            path.write_bytes(folder.read(METRICS) or b"")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and (whole := _whole_lines(path.read_bytes())) < path.stat().st_size:
            os.truncate(path, whole)  # a crash cut the last line: what is appended must not run into it
        self._path = path

    def log(self, event: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"time": round(time.time(), 3), **event}) + "\n")

    def flush(self) -> None:
        if self._remote:
            self._folder.write(METRICS, self._path.read_bytes())


def read_events(data: bytes) -> list[dict[str, Any]]:
    """The events of a metrics.jsonl; a last line that was cut by a crash is left out."""
    return [json.loads(line) for line in data[: _whole_lines(data)].splitlines()]


def _whole_lines(data: bytes) -> int:
    return data.rfind(b"\n") + 1


def steps_of(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The step events in order, each step once: what a later attempt wrote replaces what it went back over."""
    by_step: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["event"] in ("resumed", "rolled_back"):
            by_step = {step: kept for step, kept in by_step.items() if step <= event["step"]}
        elif event["event"] == "step":
            by_step[event["step"]] = event
    return [by_step[step] for step in sorted(by_step)]


class TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  (an extra)

        self._writer = SummaryWriter(str(folder))

    def log(self, event: dict[str, Any]) -> None:
        if event["event"] == "step":
            for name, value in numbers(event):
                self._writer.add_scalar(name, value, event["step"])

    def flush(self) -> None:
        self._writer.flush()


class MLflow:
    def __init__(self, run_name: str) -> None:
        import mlflow  # noqa: PLC0415  (an option)

        self._mlflow = mlflow
        mlflow.start_run(run_name=run_name)

    def log(self, event: dict[str, Any]) -> None:
        if event["event"] == "step":
            self._mlflow.log_metrics(dict(numbers(event)), step=event["step"])

    def flush(self) -> None:
        """MLflow sends as it goes."""


class WandB:
    def __init__(self, run_name: str) -> None:
        import wandb  # noqa: PLC0415  (an option)

        self._run = wandb.init(name=run_name, id=run_name, resume="allow")

    def log(self, event: dict[str, Any]) -> None:
        if event["event"] == "step":
            self._run.log(dict(numbers(event)), step=event["step"])

    def flush(self) -> None:
        """W&B sends as it goes."""


def numbers(event: dict[str, Any]) -> list[tuple[str, float]]:
    return [(name, value) for name, value in event.items() if name not in ("event", "step", "time") and isinstance(value, int | float)]


def open_trackers(names: Sequence[str], folder: RunFolder, run_name: str) -> list[Tracker]:
    """JSON lines and the trackers of these names. Raises ConfigError where one that was asked for is not installed."""
    trackers: list[Tracker] = [JsonLines(folder)]
    for name in names:
        try:
            if name == "tensorboard":
                if folder.local is not None:
                    trackers.append(TensorBoard(folder.local / "tensorboard"))
            elif name == "mlflow":
                trackers.append(MLflow(run_name))
            else:
                trackers.append(WandB(run_name))
        except ImportError as error:
            if name == "tensorboard":
                continue  # the default, where it is installed
            raise ConfigError("train.trackers", found=f"{name!r}", expected="an installed package", fix=f"pip install {name}") from error
    return trackers
