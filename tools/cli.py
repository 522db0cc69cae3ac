"""The command line. One command for each verb; what a command needs is imported inside it, so that --help is instant."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from schemas.errors import BoxcarError
from tools.plain import visible

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130


class _Group(click.Group):
    """Prints the user's mistakes without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BoxcarError as error:
            click.echo(visible(f"{type(error).__name__}: {error}"), err=True)
            ctx.exit(EXIT_MISTAKE)
        except KeyboardInterrupt:
            click.echo("Stopped.", err=True)
            ctx.exit(EXIT_INTERRUPTED)
        except BrokenPipeError:
            # The reader of our output went away (`boxcar ... | head`): nothing more to say, and no traceback at exit.
            sys.stdout = None
            ctx.exit(0)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="boxcar-vl", prog_name="boxcar")
def main() -> None:
    """Boxcar: annotations in, a grounded vision-language model out.

    \b
    boxcar convert NAME      annotations to shards whose rows know their exact cost in tokens
    boxcar plan NAME         what an epoch of training will be, before a GPU is booked
    boxcar train NAME        shards to an adapter, on one machine or a cluster
    boxcar show SHARDS       look at a sample, its boxes drawn as its answer text says
    boxcar verify SHARDS     check every hash and every row
    boxcar tokens FAMILY WxH what an image costs

    Workflows stand in workflows.yaml; every key can be overridden: boxcar convert NAME cutoff_len=2048.
    """


@main.command()
@click.argument("name")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--file", "path", default="workflows.yaml", show_default=True, type=click.Path(path_type=Path), help="File of workflows.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest's counts as JSON instead of the summary.")
def convert(name: str, overrides: Sequence[str], path: Path, as_json: bool) -> None:
    """Convert the annotations of workflow NAME to Arrow shards.

    \b
    boxcar convert coco_qwen25vl
    boxcar convert coco_qwen25vl cutoff_len=2048 tasks.caption.share=0 executor=inline
    ray job submit --working-dir . -- boxcar convert coco_qwen25vl output=/mnt/shared/shards

    Run again after a crash or Ctrl-C, it does only what is missing. Bad records are counted and kept in rejected-*.jsonl.
    """
    from tools.progress import convert_with_progress
    from tools.workflows import load_workflow

    workflow = load_workflow(path, name, "convert", overrides)
    assert workflow.convert is not None
    convert_with_progress(workflow.convert, as_json=as_json)


@main.command()
@click.argument("name")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--file", "path", default="workflows.yaml", show_default=True, type=click.Path(path_type=Path), help="File of workflows.")
@click.option("--epoch", default=0, show_default=True, type=click.IntRange(min=0), help="Which epoch, from 0.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan's counts as JSON instead of the tables.")
@click.option("--plot", type=click.Path(path_type=Path), help="PNG to write: fill, tokens, tasks and difficulty along the epoch.")
def plan(name: str, overrides: Sequence[str], path: Path, epoch: int, as_json: bool, plot: Path | None) -> None:
    """Say what an epoch of workflow NAME will be: steps, tokens, fill, balance, tasks, sources, phases, and what is left out.

    \b
    boxcar plan coco_qwen25vl
    boxcar plan coco_qwen25vl cutoff_len=8192 schedule.turns_per_sample=8 --plot plan.png
    boxcar plan coco_qwen25vl --epoch 2 --json

    Only the shards' columns of lengths are read; no image, no GPU.
    """
    from tools.plan_report import report
    from tools.workflows import load_workflow

    report(load_workflow(path, name, "train", overrides), name, epoch, as_json=as_json, plot=plot)


@main.command()
@click.argument("name")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--file", "path", default="workflows.yaml", show_default=True, type=click.Path(path_type=Path), help="File of workflows.")
@click.option("--resume", is_flag=True, help="Go on with the run of these very settings from its newest whole checkpoint.")
@click.option("--json", "as_json", is_flag=True, help="Print the end state as JSON instead of the summary.")
def train(name: str, overrides: Sequence[str], path: Path, resume: bool, as_json: bool) -> None:
    """Train an adapter on the shards of workflow NAME.

    \b
    boxcar train coco_qwen25vl
    boxcar train coco_qwen25vl placement.num_workers=8 learning_rate.language=2e-4 lora.rank=64
    ray job submit --working-dir . -- boxcar train coco_qwen25vl output=/mnt/shared/runs

    A run's folder is named by what decides its result; the same run again is refused unless --resume says to go on.
    """
    from tools.training import train_with_progress
    from tools.workflows import load_workflow

    train_with_progress(load_workflow(path, name, "train", overrides), name, resume=resume, as_json=as_json)


@main.command()
@click.argument("name", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--file", "path", default="workflows.yaml", show_default=True, type=click.Path(path_type=Path), help="File of workflows.")
@click.option("--cluster", is_flag=True, help="Ask every node of the Ray cluster (RAY_ADDRESS), and compare.")
def doctor(name: str | None, overrides: Sequence[str], path: Path, cluster: bool) -> None:
    """Check what training needs: versions, GPUs, shards, storage, room, size of an upload. With NAME, for that workflow's train section.

    \b
    boxcar doctor
    ray job submit --working-dir . -- boxcar doctor coco_qwen25vl --cluster

    Exit code 1 where something stands in the way. `boxcar train` makes the same comparison before it starts on several nodes.
    """
    from tools.doctor import doctor as examine
    from tools.workflows import load_workflow
    from train.job import resolve

    config = resolve(load_workflow(path, name, "train", overrides)) if name else None
    sys.exit(examine(config, cluster=cluster, working_dir=Path.cwd()))


@main.command()
@click.argument("family")
@click.argument("sizes", nargs=-1, metavar="[WIDTHxHEIGHT | image_max_pixels=N | image_min_pixels=N]...")
@click.option("--json", "as_json", is_flag=True, help="JSON lines from standard input to standard output.")
def tokens(family: str, sizes: Sequence[str], as_json: bool) -> None:
    """Say what images of a size cost in FAMILY: resized size, grid, visual tokens.

    \b
    boxcar tokens qwen2_5_vl 1920x1080 640x480
    boxcar tokens qwen3_vl 4000x3000 image_max_pixels=1003520
    echo '{"width": 640, "height": 480, "max_pixels": 1003520}' | boxcar tokens qwen2_5_vl --json
    """
    from tools.tokens import print_json_lines, print_table

    if as_json:
        print_json_lines(family, sizes, sys.stdin.buffer, sys.stdout)
    else:
        print_table(family, sizes)


@main.command()
@click.argument("shards", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def verify(shards: Path, as_json: bool) -> None:
    """Check every hash and every invariant of every row in SHARDS. Exit code 1 where something is wrong."""
    from tools.progress import verify_with_progress

    sys.exit(verify_with_progress(shards, as_json=as_json))


@main.command()
@click.argument("shards", type=click.Path(path_type=Path))
@click.option("--row", default=0, show_default=True, help="Number of the row over all shards.")
@click.option("--out", type=click.Path(path_type=Path), help="PNG to write. Default: row-ROW.png in the current folder.")
@click.option("--images", help="Where relative image paths start, if not where they were at conversion.")
@click.option("--no-picture", is_flag=True, help="Print only.")
def show(shards: Path, row: int, out: Path | None, images: str | None, no_picture: bool) -> None:
    """Print a row of SHARDS for people, and draw its boxes on the resized image: decoded from the answer text, not from the annotations."""
    from tools.show import show_row

    show_row(shards, row, None if no_picture else out or Path(f"row-{row}.png"), images)


@main.command()
def schema() -> None:
    """Print the JSON Schema of workflows.yaml, for editors."""
    from pipelines.families.catalog import FAMILIES
    from pipelines.readers.catalog import READERS
    from tools.workflows import json_schema

    click.echo(json.dumps(json_schema(list(READERS), list(FAMILIES)), indent=2, ensure_ascii=False))


@main.command()
def families() -> None:
    """List the model families and their conventions."""
    from tools.tokens import print_families

    print_families()


@main.command()
def formats() -> None:
    """List the annotation formats."""
    from tools.tokens import print_formats

    print_formats()


@main.command()
@click.option("--out", default="data/demo", show_default=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--images", "num_images", default=60, show_default=True, type=click.IntRange(min=1), help="How many scenes to draw.")
def demo(out: Path, num_images: int) -> None:
    """Draw a small COCO data set with a tokenizer of its own, to try everything without a download."""
    from tools.demo import write_demo

    write_demo(out, num_images)


if __name__ == "__main__":
    main()
