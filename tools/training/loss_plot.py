"""The loss of a run as a picture: what a person looks at first."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

_SMOOTHING = 0.9


def plot_losses(steps: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Four panels from the step events of a run (`trackers.steps_of`): loss, loss by token class, gradient and rate, speed."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 7.5), layout="constrained")
    figure.suptitle(title)
    numbers = np.array([event["step"] for event in steps])
    _loss(axes[0][0], numbers, steps)
    _classes(axes[0][1], numbers, steps)
    _gradient(axes[1][0], numbers, steps)
    _speed(axes[1][1], numbers, steps)
    for panel in axes.flat:
        panel.set_xlabel("step")
        panel.grid(alpha=0.25)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _column(steps: Sequence[dict[str, Any]], name: str) -> npt.NDArray[np.float64]:
    return np.array([event.get(name, np.nan) for event in steps], dtype=np.float64)


def _smooth(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Moving average over what is there, without the bias of its start."""
    out, average, weight = np.full(len(values), np.nan), 0.0, 0.0
    for place, value in enumerate(values):
        if np.isfinite(value):
            average = _SMOOTHING * average + (1 - _SMOOTHING) * value
            weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        if weight:
            out[place] = average / weight
    return out


def _loss(panel: Axes, numbers: npt.NDArray[Any], steps: Sequence[dict[str, Any]]) -> None:
    loss = _column(steps, "loss")
    panel.plot(numbers, loss, color="tab:blue", alpha=0.3, linewidth=1, label="each step")
    panel.plot(numbers, _smooth(loss), color="tab:blue", linewidth=2, label="moving average")
    validation = _column(steps, "validation/loss")
    seen = np.isfinite(validation)
    if seen.any():
        panel.plot(numbers[seen], validation[seen], "o-", color="tab:red", label="validation")
    panel.set_title("Loss (cross-entropy by weight, nats a token)")
    panel.legend()


def _classes(panel: Axes, numbers: npt.NDArray[Any], steps: Sequence[dict[str, Any]]) -> None:
    names = sorted({name for event in steps for name in event if name.startswith("loss/") and name.endswith(("/coordinates", "/words"))})
    colours = {task: f"C{number}" for number, task in enumerate(dict.fromkeys(name.split("/")[1] for name in names))}
    for name in names:
        _, task, kind = name.split("/")
        style = "-" if kind == "coordinates" else ":"
        panel.plot(numbers, _smooth(_column(steps, name)), style, color=colours[task], label=f"{task}, {kind}")
    panel.set_title("Loss by task and token class (moving average)")
    if names:
        panel.legend(fontsize=7, ncols=2)


def _gradient(panel: Axes, numbers: npt.NDArray[Any], steps: Sequence[dict[str, Any]]) -> None:
    panel.plot(numbers, _column(steps, "grad_norm"), color="tab:purple", linewidth=1)
    panel.set_yscale("log")
    panel.set_title("Gradient norm before clipping (purple), learning rates (grey)")
    rates = panel.twinx()
    for name in sorted({name for event in steps for name in event if name.startswith("learning_rate/")}):
        rates.plot(numbers, _column(steps, name), color="tab:gray", linewidth=1, label=name.partition("/")[2])
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def _speed(panel: Axes, numbers: npt.NDArray[Any], steps: Sequence[dict[str, Any]]) -> None:
    panel.plot(numbers, _column(steps, "tokens_per_second"), color="tab:green", linewidth=1)
    panel.set_ylim(bottom=0)
    panel.set_title("Useful tokens a second")
    mfu = _column(steps, "mfu")
    if np.isfinite(mfu).any():
        other = panel.twinx()
        other.plot(numbers, 100 * mfu, color="tab:orange", linewidth=1)
        other.set_ylim(0, 100)
        other.set_ylabel("MFU, %")
