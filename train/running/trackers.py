"""Where a run's events go: metrics.jsonl always, TensorBoard, MLflow and W&B by switch. Rank 0 only.

A run that is resumed goes on in the same MLflow or W&B run: their ids stand in the run's folder (`trackers.json`).
"""

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from boxcar.schemas.errors import ConfigError, StorageError
from boxcar.train.running.run_folder import METRICS, RunFolder

IDS = "trackers.json"
SECONDS_BETWEEN_COPIES = 30.0
"""Of metrics.jsonl to a remote folder, besides those at checkpoints."""
_LOG = logging.getLogger(__name__)


class Tracker(Protocol):
    """An ear for events; those named "step" carry numbers."""

    def log(self, event: dict[str, Any]) -> None: ...

    def flush(self) -> None:
        """At checkpoints."""

    def close(self) -> None:
        """At the end, however it came."""


class JsonLines:
    """metrics.jsonl in the run's folder, only ever appended to: after a resume, a step's last line counts."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._copied = time.monotonic()
        if folder.local is None:  # an object store cannot append: the file is kept here and copied
            self._scratch = TemporaryDirectory(prefix="boxcar-metrics-")
            path = Path(self._scratch.name) / METRICS
            path.write_bytes(folder.read(METRICS) or b"")
        else:
            path = folder.local / METRICS
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and (whole := _whole_lines(path.read_bytes())) < path.stat().st_size:
            os.truncate(path, whole)  # a crash cut the last line: what is appended must not run into it
        self._path = path

    def log(self, event: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"time": round(time.time(), 3), **event}) + "\n")
        if time.monotonic() - self._copied > SECONDS_BETWEEN_COPIES:
            try:
                self.flush()
            except StorageError as error:  # the next copy holds these lines, too, and that of a checkpoint must succeed
                _LOG.warning("%s", error)

    def flush(self) -> None:
        self._copied = time.monotonic()
        if self._folder.local is None and self._path.exists():
            self._folder.write(METRICS, self._path.read_bytes())

    def close(self) -> None:
        self.flush()


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
    """Event files in the run's folder, one for each attempt."""

    def __init__(self, folder: RunFolder) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  (an extra)

        self._make = SummaryWriter
        self._folder = folder
        if folder.local is None:
            self._scratch = TemporaryDirectory(prefix="boxcar-tensorboard-")
        self._path = Path(self._scratch.name) if folder.local is None else folder.local / "tensorboard"
        self._writer: Any = None

    def log(self, event: dict[str, Any]) -> None:
        if event["event"] in ("resumed", "rolled_back"):
            if self._writer is not None:
                self._writer.close()
            self._writer = self._make(str(self._path), purge_step=event["step"] + 1)  # hides what is done again
        elif event["event"] == "step":
            for name, value in numbers(event):
                self._writer.add_scalar(name, value, event["step"])

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()
        if self._folder.local is None:
            for file in self._path.iterdir():
                self._folder.write(f"tensorboard/{file.name}", file.read_bytes())

    def close(self) -> None:
        self.flush()
        if self._writer is not None:
            self._writer.close()


class MLflow:
    """A run of the tracking server that MLFLOW_TRACKING_URI names, in the experiment of MLFLOW_EXPERIMENT_NAME."""

    def __init__(self, folder: RunFolder, run_name: str) -> None:
        import mlflow  # noqa: PLC0415  (an option)

        if not mlflow.is_tracking_uri_set():
            raise ConfigError(
                "train.trackers",
                found="'mlflow' without MLFLOW_TRACKING_URI",
                expected="the server or store that keeps the runs: a worker's own folder would be lost with it",
                fix="Set MLFLOW_TRACKING_URI in the environment of every worker.",
            )
        self._mlflow = mlflow
        self._status = "FAILED"
        known = _ids(folder).get("mlflow")
        try:
            run = mlflow.start_run(run_id=known) if known else mlflow.start_run(run_name=run_name)
        except mlflow.MlflowException as error:
            raise ConfigError(
                "train.trackers",
                found=f"'mlflow', and at {mlflow.get_tracking_uri()}: {error}",
                expected=f"a store that holds run {known}" if known else "a store that takes a run",
                fix="Check MLFLOW_TRACKING_URI" + (f"; without {folder / IDS} a new run begins." if known else "."),
            ) from error
        _remember(folder, "mlflow", run.info.run_id)

    def log(self, event: dict[str, Any]) -> None:
        if event["event"] == "step":
            try:
                self._mlflow.log_metrics(dict(numbers(event)), step=event["step"])
            except self._mlflow.MlflowException as error:  # not worth a run: metrics.jsonl has every step
                _LOG.warning("MLflow did not take step %d: %s", event["step"], error)
        elif event["event"] == "finished":
            self._status = "FINISHED"

    def flush(self) -> None:
        """MLflow sends as it goes."""

    def close(self) -> None:
        self._mlflow.end_run(self._status)


class WandB:
    """A run of Weights & Biases. Its own counter must only rise, also from one attempt to the next and offline, and steps that are done
    again after a resume are told again: so it counts what was told, and the charts run over `step`."""

    def __init__(self, folder: RunFolder, run_name: str) -> None:
        import wandb  # noqa: PLC0415  (an option)

        known = _ids(folder).get("wandb")
        self._failed = True
        self._num_told = sum(event["event"] == "step" for event in read_events(folder.read(METRICS) or b""))
        where = None if folder.local is None else str(folder.local)
        self._run = wandb.init(name=run_name, id=known, resume="allow", dir=where)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        _remember(folder, "wandb", self._run.id)

    def log(self, event: dict[str, Any]) -> None:
        if event["event"] == "step":
            self._run.log({"step": event["step"], **dict(numbers(event))}, step=self._num_told)
            self._num_told += 1
        elif event["event"] == "finished":
            self._failed = False

    def flush(self) -> None:
        """W&B sends as it goes."""

    def close(self) -> None:
        self._run.finish(exit_code=int(self._failed))


def _ids(folder: RunFolder) -> dict[str, str]:
    """Of this run at trackers elsewhere."""
    found: dict[str, str] = json.loads(folder.read(IDS) or b"{}")
    return found


def _remember(folder: RunFolder, name: str, run_id: str) -> None:
    folder.write(IDS, json.dumps(_ids(folder) | {name: run_id}).encode())


def numbers(event: dict[str, Any]) -> list[tuple[str, float]]:
    return [(name, value) for name, value in event.items() if name not in ("event", "step", "time") and isinstance(value, int | float)]


def open_trackers(names: Sequence[str], folder: RunFolder, run_name: str) -> list[Tracker]:
    """JSON lines and the trackers of these names. Raises ConfigError where one that was asked for is not installed."""
    makers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(folder),
        "mlflow": lambda: MLflow(folder, run_name),
        "wandb": lambda: WandB(folder, run_name),
    }
    trackers: list[Tracker] = [JsonLines(folder)]
    for name in names:
        try:
            trackers.append(makers[name]())
        except ImportError as error:
            if name == "tensorboard":
                continue  # the default, where it is installed
            raise ConfigError("train.trackers", found=f"{name!r}", expected="an installed package", fix=f"pip install {name}") from error
    return trackers
