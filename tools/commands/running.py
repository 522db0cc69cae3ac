"""Commands that run all stages of a workflow. Each imports what it needs, so that --help is instant."""

from collections.abc import Sequence
from pathlib import Path

import click

from boxcar.tools.commands.options import workflow_file


@click.command()
@click.argument("name")
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@workflow_file
@click.option("--page", type=click.Path(path_type=Path), help="Folder of the page. Default: view/ beside the results.")
def run(name: str, overrides: Sequence[str], path: Path, page: Path | None) -> None:
    """Run every stage of workflow NAME: convert, audit, train, evaluate, page. What is done already is skipped, by content.

    \b
    boxcar run quickstart                     drawn scenes, everything, on a laptop
    boxcar run coco_qwen25vl train.epochs=2

    Interrupted, it goes on where it was. `quickstart` needs no file.
    """
    from boxcar.tools.run import run_workflow

    run_workflow(path, name, overrides, page)
