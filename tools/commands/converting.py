"""Commands that make shards and look at them. Each imports what it needs, so that --help is instant."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from boxcar.tools.commands.options import overrides_argument, workflow_file


@click.command()
@click.argument("name")
@overrides_argument
@workflow_file
@click.option("--json", "as_json", is_flag=True, help="Print the manifest's counts as JSON instead of the summary.")
def convert(name: str, overrides: Sequence[str], path: Path, as_json: bool) -> None:
    """Convert the annotations of workflow NAME to Arrow shards.

    \b
    boxcar convert coco_qwen25vl
    boxcar convert coco_qwen25vl cutoff_len=2048 tasks.caption.share=0 executor=inline
    ray job submit --working-dir . -- boxcar convert coco_qwen25vl output=/mnt/shared/shards

    Run again after a crash or Ctrl-C, it does only what is missing. Bad records are counted and kept in rejected-*.jsonl.
    """
    from boxcar.tools.converting.progress import convert_with_progress
    from boxcar.tools.workflows import load_workflow

    workflow = load_workflow(path, name, "convert", overrides)
    assert workflow.convert is not None
    convert_with_progress(workflow.convert, as_json=as_json)


@click.command()
@click.argument("shards", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def verify(shards: Path, as_json: bool) -> None:
    """Check every hash and every invariant of every row in SHARDS. Exit code 1 where something is wrong."""
    from boxcar.tools.converting.progress import verify_with_progress

    sys.exit(verify_with_progress(shards, as_json=as_json))


@click.command()
@click.argument("shards", type=click.Path(path_type=Path))
@click.option("--row", default=0, show_default=True, help="Number of the row over all shards.")
@click.option("--out", type=click.Path(path_type=Path), help="PNG to write. Default: row-ROW.png in the current folder.")
@click.option("--images", help="Where relative image paths start, if not where they were at conversion.")
@click.option("--no-picture", is_flag=True, help="Print only, without a picture.")
def show(shards: Path, row: int, out: Path | None, images: str | None, no_picture: bool) -> None:
    """Print a row of SHARDS, and draw its boxes on the resized image: read from the answer text, not from the annotations."""
    from boxcar.tools.converting.show import show_row

    show_row(shards, row, None if no_picture else out or Path(f"row-{row}.png"), images)


@click.command()
@click.argument("family")
@click.argument("sizes", nargs=-1, metavar="[WIDTHxHEIGHT | image_max_pixels=N | image_min_pixels=N]...")
@click.option("--json", "as_json", is_flag=True, help="JSON lines from standard input to standard output.")
def tokens(family: str, sizes: Sequence[str], as_json: bool) -> None:
    """Show what images of a size cost in FAMILY: resized size, grid, visual tokens.

    \b
    boxcar tokens qwen2_5_vl 1920x1080 640x480
    boxcar tokens qwen3_vl 4000x3000 image_max_pixels=1003520
    echo '{"width": 640, "height": 480, "max_pixels": 1003520}' | boxcar tokens qwen2_5_vl --json
    """
    from boxcar.tools.converting.tokens import print_json_lines, print_table

    if as_json:
        print_json_lines(family, sizes, sys.stdin.buffer, sys.stdout)
    else:
        print_table(family, sizes)


@click.command()
def families() -> None:
    """List the model families and their conventions."""
    from boxcar.tools.converting.tokens import print_families

    print_families()


@click.command()
def formats() -> None:
    """List the annotation formats."""
    from boxcar.tools.converting.tokens import print_formats

    print_formats()


@click.command()
def schema() -> None:
    """Print the JSON Schema of workflows.yaml, for editors."""
    from boxcar.pipelines.families.catalog import FAMILIES
    from boxcar.pipelines.readers.catalog import READERS
    from boxcar.tools.workflows import json_schema

    click.echo(json.dumps(json_schema(list(READERS), list(FAMILIES)), indent=2, ensure_ascii=False))


@click.command()
@click.option("--out", default="data/demo", show_default=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--images", "num_images", default=60, show_default=True, type=click.IntRange(min=1), help="How many scenes to draw.")
def demo(out: Path, num_images: int) -> None:
    """Draw a small COCO data set with a tokenizer of its own, to try everything without a download."""
    from boxcar.tools.quickstart.demo import write_demo

    write_demo(out, num_images)
