"""Commands that run all stages of a workflow. Each imports what it needs, so that --help is instant."""

import sys
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

    After an interruption it continues. `quickstart` needs no file.
    """
    from boxcar.tools.run import run_workflow

    run_workflow(path, name, overrides, page)


@click.command()
@click.argument("folder", default=".", type=click.Path(path_type=Path))
@workflow_file
@click.option("--family", default="qwen2_5_vl", show_default=True, help="Model family; `boxcar families` lists them.")
@click.option("--tokenizer", default="", help="Hugging Face id or folder with tokenizer.json. Default: the published one of the family.")
@click.option("--yes", is_flag=True, help="Ask nothing; take the defaults.")
@click.option("--no-audit", is_flag=True, help="Choose no cutoff and resolution by an audit.")
def init(folder: Path, path: Path, family: str, tokenizer: str, yes: bool, no_audit: bool) -> None:
    """Find the annotations in FOLDER, and write a commented workflow for each.

    \b
    boxcar init data/my_set
    boxcar init data/my_set --yes --family qwen3_vl --tokenizer Qwen/Qwen3-VL-8B-Instruct
    boxcar init LLaMA-Factory/data          the entries of its dataset_info.json become workflows

    Format, counts, image sizes, splits and the folder of the images are found by looking into the files. cutoff_len and image_max_pixels
    are the cheapest that keep 99.9% of the turns, by a first audit. New workflows are added to the end of --file.
    """
    from boxcar.tools.starting.init import init as look_and_write

    sys.exit(look_and_write(folder, path, family, tokenizer, ask=not yes, audit=not no_audit))
