"""`boxcar train` for people: what is being done, a bar with the loss, and what to do next."""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn

from boxcar.schemas.training import TrainConfig
from boxcar.schemas.workflow import Workflow
from boxcar.tools.plain import visible
from boxcar.tools.progress import Progress
from boxcar.tools.training.loss_plot import plot_losses
from boxcar.train.job import resolve, train
from boxcar.train.running.run_folder import METRICS
from boxcar.train.running.trackers import read_events, steps_of

_SAID = {
    "out_of_memory": "out of memory at step {step}: activations of all layers are recomputed from now on",
    "early_stop": "stopped early: no improvement of {best} for {waited} validations",
    "stopping": "asked to stop: saved at step {step}",
    "endangered": "preemption notice: saved at step {step}; training continues until the machine is taken",
    "task_falls": "{metric} fell to {value:.3f} (its best: {best:.3f}) at step {step}",
    "rolled_back": "went back to step {step}, learning rates now x {rate_scale:g}",
    "checkpoint_damaged": "checkpoint of step {step} is damaged and left aside: {problems}",
    "no_checkpoint_before_the_rise": "no checkpoint is left from before step {since_step}: not going back",
}


class RunBar:
    """What the events of a run look like in a terminal."""

    def __init__(self, progress: Progress, *, first: bool = True) -> None:
        """first: of several runs of one network, which is then described once."""
        self._progress = progress
        self._first = first
        self._task: TaskID = progress.add_task("starting", total=None, detail="")

    def see(self, event: dict[str, Any]) -> None:
        kind, update = event["event"], self._progress.update
        if kind == "planning":
            update(self._task, description="planning", detail=event["what"])
        elif kind == "started":
            if self._first:
                self._describe(event)
            update(self._task, description="training", total=event["num_steps"], detail="")
        elif kind == "memory" and self._first:
            self._say_memory(event)
        elif kind == "resumed":
            if event["step"]:
                self._say(f"goes on from the checkpoint of step {event['step']}")
            update(self._task, completed=event["step"])
        elif kind == "step":
            speed = f"{event['tokens_per_second']:,.0f} tokens/s" + (f", MFU {event['mfu']:.1%}" if "mfu" in event else "")
            update(self._task, completed=event["step"], detail=f"loss {event['loss']:.4f}, gradient {event['grad_norm']:.2f}, {speed}")
        elif kind == "dropped":
            self._say("left out: " + "; ".join(event["samples"]))
        elif kind == "loss_rises":
            samples = ", ".join(entry["sample"] for entry in event["hardest_samples"])
            self._say(
                f"the loss of difficulty bin {event['difficulty_bin']} has been rising since step {event['since_step']}: lower the "
                f"learning rate? Gradient norm {event['grad_norm']:.2f}; hardest samples of step {event['step']}: {samples}"
            )
        elif kind in _SAID:
            self._say(_SAID[kind].format(**event))

    def _say_memory(self, event: dict[str, Any]) -> None:
        what = f"recomputes the activations of {event['recomputed_layers']} of {event['layers']} layers (gradient_checkpointing: auto)"
        if "predicted_gb" in event:
            what += f": a step takes some {event['predicted_gb']:.1f} GB of {event['available_gb']:.1f} GB that are free"
        self._say(what)

    def _describe(self, event: dict[str, Any]) -> None:
        share = event["trainable_parameters"] / max(1, event["parameters"])
        parts = ", ".join(event["trained_parts"])
        self._say(
            f"{event['trainable_parameters']:,} of {event['parameters']:,} parameters are trained ({share:.2%}; {parts}) "
            f"by {event['world_size']} workers"
        )

    def close(self) -> None:
        """Take the bar away."""
        self._progress.remove_task(self._task)

    def _say(self, text: str) -> None:
        self._progress.console.print(visible(text), markup=False, soft_wrap=True)


def run_progress(console: Console) -> Progress:
    """A bar for runs, which says in `detail` what is going on."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
        TimeRemainingColumn(),
        console=console,
    )


def train_with_progress(workflow: Workflow, name: str, *, resume: bool, as_json: bool) -> None:
    """Train, draw the loss, and say where everything is."""
    errors = Console(stderr=True)
    config: TrainConfig = resolve(workflow)
    with run_progress(errors) as progress:
        try:
            state = train(config, name, resume=resume, on_event=RunBar(progress).see)
        except (KeyboardInterrupt, SystemExit):
            errors.print(f"Saved checkpoints are kept. To continue: {_again(sys.argv[1:])}", markup=False, soft_wrap=True)
            raise
    folder = Path(state["folder"])
    plot = None
    if folder.is_dir():
        plot = folder / "loss.png"
        plot_losses(steps_of(read_events((folder / METRICS).read_bytes())), plot, folder.name)
    if as_json:
        print(json.dumps(state))
        return
    console = Console(soft_wrap=True)
    console.print(f"\n{state['step']} of {state['num_steps']} steps, {state['tokens']:,} tokens. In {state['folder']}:", markup=False)
    console.print("  adapter/       the adapter with its frame contract; `PeftModel.from_pretrained(base, ...)` loads it", markup=False)
    console.print("  metrics.jsonl  every step; `tensorboard --logdir` that folder shows it, too", markup=False)
    if plot:
        console.print("  loss.png       look at it", markup=False)
    if state["step"] < state["num_steps"]:
        console.print(f"To continue: {_again(sys.argv[1:])}", markup=False)
        if config.max_steps == state["step"]:
            console.print(f"max_steps={config.max_steps} ended it: give a larger one, or none.", markup=False)


def _again(words: Sequence[str]) -> str:
    """The command that goes on with a run that this one began: without its last step, which may have stood in the file as well."""
    kept = [word for word in words if not word.removeprefix("train.").startswith("max_steps=")]
    resumes = [] if "--resume" in kept or kept[:1] != ["train"] else ["--resume"]  # `boxcar run` goes on by itself
    return shlex.join(["boxcar", *kept, *resumes])
