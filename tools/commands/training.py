"""Commands that plan, train and compare runs. Each imports what it needs, so that --help is instant."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from boxcar.tools.commands.options import overrides_argument, workflow_file

ARMS = ("all", "uniform", "progressive", "random_paced", "anti")


@click.command()
@click.argument("name")
@overrides_argument
@workflow_file
@click.option("--epoch", default=0, show_default=True, type=click.IntRange(min=0), help="Which epoch, from 0.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan's counts as JSON instead of the tables.")
@click.option("--plot", type=click.Path(path_type=Path), help="PNG to write: fill, tokens, tasks and difficulty along the epoch.")
def plan(name: str, overrides: Sequence[str], path: Path, epoch: int, as_json: bool, plot: Path | None) -> None:
    """Show the plan of an epoch of workflow NAME: steps, tokens, fill, balance, tasks, sources, phases, and what is left out.

    \b
    boxcar plan coco_qwen25vl
    boxcar plan coco_qwen25vl cutoff_len=8192 schedule.turns_per_sample=8 --plot plan.png
    boxcar plan coco_qwen25vl --epoch 2 --json

    Only the shards' columns of lengths are read; no image, no GPU.
    """
    from boxcar.tools.training.plan_report import report
    from boxcar.tools.workflows import load_workflow

    report(load_workflow(path, name, "train", overrides), name, epoch, as_json=as_json, plot=plot)


@click.command()
@click.argument("name")
@overrides_argument
@workflow_file
@click.option("--resume", is_flag=True, help="Continue the run of the same settings from its newest complete checkpoint.")
@click.option("--json", "as_json", is_flag=True, help="Print the end state as JSON instead of the summary.")
def train(name: str, overrides: Sequence[str], path: Path, resume: bool, as_json: bool) -> None:
    """Train an adapter on the shards of workflow NAME.

    \b
    boxcar train coco_qwen25vl
    boxcar train coco_qwen25vl placement.num_workers=8 learning_rate.language=2e-4 lora.rank=64
    ray job submit --working-dir . -- boxcar train coco_qwen25vl output=/mnt/shared/runs

    A run's folder is named by what decides its result; the same run again is refused without --resume.
    """
    from boxcar.tools.training.train import train_with_progress
    from boxcar.tools.workflows import load_workflow

    train_with_progress(load_workflow(path, name, "train", overrides), name, resume=resume, as_json=as_json)


def _arms(_ctx: click.Context, _parameter: click.Parameter, value: str) -> list[str]:
    """A list with commas, checked. The names are those of schemas.training.ScheduleKind, which --help must not wait for."""
    arms = [arm.strip() for arm in value.split(",") if arm.strip()]
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(ARMS)}")
    return arms


@click.command()
@click.argument("name")
@overrides_argument
@workflow_file
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(min=1), help="Runs of each arm; 3 or more give intervals.")
@click.option("--arms", default=",".join(ARMS), show_default=True, callback=_arms, help="Kinds of schedules; `uniform` is the control.")
@click.option("--tokens", type=click.IntRange(min=1), help="Tokens of each run. Default: the smallest total of an arm over `epochs`.")
@click.option("--metric", default="loss", show_default=True, help="Metric of train.validation at the end, such as mean_iou.")
@click.option(
    "--mode", type=click.Choice(["min", "max"]), help="Whether a lower or a higher value is better. Default: by the metric's name."
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON instead of the tables.")
@click.option("--plot", type=click.Path(path_type=Path), help="PNG to write: the metric along the tokens, and the differences.")
def ablate(
    name: str,
    overrides: Sequence[str],
    path: Path,
    seeds: int,
    arms: Any,
    tokens: int | None,
    metric: str,
    mode: Any,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Measure what region sampling does on the data of workflow NAME: the kinds of schedules at equal tokens, with several seeds.

    \b
    boxcar ablate coco_qwen25vl schedule.turns_per_sample=8 validation.shards=[shards/coco_val]
    boxcar ablate coco_qwen25vl schedule.turns_per_sample=8 --tokens 20000000 --seeds 5 --plot ablation.png

    Every run is one of `boxcar train`. Run again after a crash or Ctrl-C, or with more seeds or arms, it does only what is missing.
    """
    from boxcar.tools.training.ablate_report import ablate_with_progress
    from boxcar.tools.workflows import load_workflow

    workflow = load_workflow(path, name, "train", overrides)
    ablate_with_progress(workflow, name, arms=arms, num_seeds=seeds, tokens=tokens, metric=metric, mode=mode, as_json=as_json, plot=plot)


@click.command()
@click.argument("name", required=False)
@overrides_argument
@workflow_file
@click.option("--cluster", is_flag=True, help="Ask every node of the Ray cluster (RAY_ADDRESS), and compare.")
def doctor(name: str | None, overrides: Sequence[str], path: Path, cluster: bool) -> None:
    """Check what training needs: versions, GPUs, shards, disk space, size of the upload. With NAME, for that workflow's train section.

    \b
    boxcar doctor
    ray job submit --working-dir . -- boxcar doctor coco_qwen25vl --cluster

    Exit code 1 if something is missing. `boxcar train` makes the same comparison before it starts on several nodes.
    """
    from boxcar.tools.training.doctor import doctor as examine
    from boxcar.tools.workflows import load_workflow
    from boxcar.train.job import resolve

    config = resolve(load_workflow(path, name, "train", overrides)) if name else None
    sys.exit(examine(config, cluster=cluster, working_dir=Path.cwd()))


@click.command("demo-base")
@click.option(
    "--work", default="data/demo-base", show_default=True, type=click.Path(path_type=Path), help="Where drawings and the run are kept."
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write. Default: the one that the quick start uses.")
def demo_base(work: Path, out: Path | None) -> None:
    """Train the quick start's small network again, from random weights (six minutes of two cores)."""
    from boxcar.tools.quickstart.demo_base import make_base
    from boxcar.tools.quickstart.scene_files import BASE

    make_base(work, out or BASE)
