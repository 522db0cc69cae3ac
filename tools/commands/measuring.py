"""Commands that ask a trained adapter, and show and rate what it answers. Each imports what it needs, so that --help is instant."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from boxcar.tools.commands.options import overrides_argument, workflow_file


@click.command()
@click.argument("name")
@overrides_argument
@workflow_file
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def evaluate(name: str, overrides: Sequence[str], path: Path, as_json: bool) -> None:
    """Measure the adapter of workflow NAME on held-out shards, against its base.

    \b
    boxcar evaluate coco_qwen25vl adapter=runs/coco_qwen25vl-1a2b3c
    boxcar evaluate quickstart max_samples=50 ask_as=both

    Accuracy, mean IoU, precision, recall and F1, absent objects, COCO AP, format; with intervals, by size, task, language and source.
    Another frame contract is refused, and so are images that were trained on.
    """
    from boxcar.tools.measuring.evaluate import evaluate_with_progress
    from boxcar.tools.workflows import load_workflow

    evaluate_with_progress(load_workflow(path, name, "evaluate", overrides), name, as_json=as_json)


@click.command()
@click.option("--adapter", required=True, help="A run's folder, or its adapter/.")
@click.option("--image", help="One image: a path or URI.")
@click.option("--query", "text", default="", help="What to look for; with --task question, the question itself.")
@click.option("--queries", type=click.Path(path_type=Path), help='Many: a file with a line {"image": ..., "query": ...} for each.')
@click.option(
    "--out", type=click.Path(path_type=Path), help="With --queries: the file of answers to write, a line each, in the same order."
)
@click.option(
    "--task",
    type=click.Choice(["refer", "detect", "detect_joint", "absent", "caption", "question"]),
    help="Which of the training's questions is asked. Default: the first of these that was trained.",
)
@click.option("--language", default="en", show_default=True, type=click.Choice(["en", "zh"]))
@click.option("--stepwise", is_flag=True, help="Crowded images: first which categories and how many, then the boxes of each.")
@click.option("--base", default="", help="Where the base is now, if it has moved.")
@click.option("--tokenizer", default="", help="Where the tokenizer is now, if it has moved.")
@click.option("--images", default="", help="With --queries: where relative paths of images start. Default: the folder of the file.")
@click.option("--max-new-tokens", default=512, show_default=True, type=click.IntRange(min=1))
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(min=1))
@click.option("--logprobs", is_flag=True, help="Add a score: the mean log-probability of the tokens of numbers.")
@click.option("--executor", default="inline", show_default=True, type=click.Choice(["inline", "ray"]), help="With --queries.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(min=1), help="With --executor ray; with GPUs, one GPU each.")
@click.option("--draw", type=click.Path(path_type=Path), help="PNG to write: the boxes on the original image.")
@click.option("--json", "as_json", is_flag=True, help="Print answers as lines of JSON.")
def predict(
    adapter: str,
    image: str | None,
    text: str,
    queries: Path | None,
    out: Path | None,
    task: Any,
    language: Any,
    stepwise: bool,
    base: str,
    tokenizer: str,
    images: str,
    max_new_tokens: int,
    batch_size: int,
    logprobs: bool,
    executor: Any,
    workers: int,
    draw: Path | None,
    as_json: bool,
) -> None:
    """Find things in images with a trained adapter; boxes come back in pixels of the original image.

    \b
    boxcar predict --adapter runs/demo-1a2b3c --image street.jpg --query "the red car" --draw found.png
    boxcar predict --adapter runs/demo-1a2b3c --image crowd.jpg --stepwise
    boxcar predict --adapter runs/demo-1a2b3c --queries queries.jsonl --out answers.jsonl --executor ray --workers 8

    Template, prompts, resize and tokenizer are those of training (boxcar.json), or it is refused with the difference.
    """
    from boxcar.tools.measuring import predict as tool
    from boxcar.train.answering.predict_job import PredictSpec

    folder = str(queries.parent) if queries else ""
    spec = PredictSpec(adapter, base, tokenizer, task, images or folder, batch_size, max_new_tokens, logprobs)
    if (image is None) == (queries is None):
        raise click.UsageError("Give --image, or --queries with --out.")
    if queries is not None:
        if out is None:
            raise click.UsageError("--queries needs --out, the file of answers.")
        sys.exit(tool.predict_many(spec, queries, out, executor=executor, num_workers=workers))
    assert image is not None
    if stepwise:
        tool.predict_stepwise(spec, image, text, language, draw=draw, as_lines=as_json)
    else:
        tool.predict_one(spec, image, text, language, draw=draw, as_lines=as_json)


@click.command()
@click.argument("source", metavar="RESULTS|SHARDS")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write. Default: view/ within the source.")
@click.option("--max-items", default=1000, show_default=True, type=click.IntRange(min=1), help="If there are more: a stratified sample.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the sample.")
def view(source: str, out: Path | None, max_items: int, seed: int) -> None:
    """Write a page of RESULTS or SHARDS: one folder that a browser opens from disk, without a network.

    \b
    boxcar view runs/demo-1a2b3c/evaluation-4d5e6f
    boxcar view shards/demo --out pages/demo --max-items 300

    Boxes on the image as the model sees it, truth, adapter and base to switch on and off; questions, raw and parsed replies; filters and
    sorting; raters press 1-4 and export a file for `boxcar rate`. Of results, the sample is even over task, size, right and wrong.
    """
    from boxcar.tools.pages.view import write_page

    click.echo(f"open {write_page(source, out, max_items=max_items, seed=seed)}")


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@click.option("--results", type=click.Path(path_type=Path), help="The evaluation that was rated: IoU is then read there, not in the files.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON instead of the tables.")
def rate(files: Sequence[Path], results: Path | None, as_json: bool) -> None:
    """Merge what raters exported from a page of `boxcar view`.

    \b
    boxcar rate ratings-ann.json ratings-bob.csv
    boxcar rate ratings-*.json --results runs/demo-1a2b3c/evaluation-4d5e6f --json

    Rates with Wilson intervals, Cohen's kappa of each pair of raters, and how far people agree with IoU.
    """
    from boxcar.tools.measuring.rate import rate as merge

    merge(files, results, as_json=as_json)
