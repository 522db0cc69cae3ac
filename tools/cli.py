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
ARMS = ("all", "uniform", "progressive", "random_paced", "anti")


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
    boxcar run NAME          every stage below, and only what has changed; `boxcar run quickstart` needs nothing
    boxcar audit NAME        what a data set costs, what a cutoff or resolution would lose, what is wrong with it
    boxcar convert NAME      annotations to shards whose rows know their exact cost in tokens
    boxcar plan NAME         what an epoch of training will be, before a GPU is booked
    boxcar train NAME        shards to an adapter, on one machine or a cluster
    boxcar ablate NAME       whether progressive region sampling helps on your data: control arms at equal tokens
    boxcar evaluate NAME     box metrics of an adapter and its base on held-out shards
    boxcar predict           an adapter, an image, a phrase: boxes in the image's own pixels
    boxcar view FOLDER       results or shards as a page for any browser: boxes, filters, before and after, rating
    boxcar rate FILE...      what raters exported from that page: rates, agreement, people against IoU
    boxcar export            an adapter, or base and adapter merged, for transformers and vLLM
    boxcar export-data       shards for LLaMA-Factory, ms-swift or COCO tools
    boxcar export-results    answers as COCO detections or Label Studio tasks
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
@click.argument("target")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE | SHARDS]...")
@click.option("--file", "path", default="workflows.yaml", show_default=True, type=click.Path(path_type=Path), help="File of workflows.")
@click.option(
    "--family", "families", multiple=True, metavar="FAMILY[=TOKENIZER]", help="Beside the workflow's own; may stand several times."
)
@click.option("--cutoffs", metavar="N,N,...", help="Values of cutoff_len to try. Default: up to the longest sample.")
@click.option("--pixels", metavar="N,N,...", help="Values of image_max_pixels to try. Default: up to the largest image.")
@click.option("--keep", metavar="SHARE", help="Write the cheapest setting that keeps this share of turns into the workflow, such as 99.5%.")
@click.option("--base", default="", help="Folder (or downloaded hub id) with the base's config.json: FLOPs, GPU-hours, memory.")
@click.option("--gpu", default="H100", show_default=True, help="Whose peak FLOP/s count.")
@click.option("--mfu", type=float, help="Share of the peak that training reaches. Default: 0.35, an assumption.")
@click.option("--as", "consumers", multiple=True, metavar="TRAINER", help="What llama-factory or ms-swift[:left|:right] would do.")
@click.option("--against", multiple=True, metavar="WORKFLOW", help="Look for this source's images in another workflow's (leakage).")
@click.option("--perceptual", is_flag=True, help="Look for images that look alike, too: decodes every one.")
@click.option("--no-duplicates", is_flag=True, help="Do not compare image files.")
@click.option("--tokenizer", default="", help="With shards: where the tokenizer is now, if it has moved.")
@click.option("--work", default="audits", show_default=True, type=click.Path(path_type=Path), help="Folder for columns and results.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for audit.json and audit.html. Default: WORK/TARGET.")
@click.option("--html", is_flag=True, help="Write audit.html, one page that needs no network (extra `audit`).")
@click.option("--json", "as_json", is_flag=True, help="Print the whole result as JSON instead of the tables.")
def audit(
    target: str,
    overrides: Sequence[str],
    path: Path,
    families: Sequence[str],
    cutoffs: str | None,
    pixels: str | None,
    keep: str | None,
    base: str,
    gpu: str,
    mfu: float | None,
    consumers: Sequence[str],
    against: Sequence[str],
    perceptual: bool,
    no_duplicates: bool,
    tokenizer: str,
    work: Path,
    out: Path | None,
    html: bool,
    as_json: bool,
) -> None:
    """Say what a data set costs, what a cutoff or a resolution would lose, and what is wrong with it. Needs no GPU and no torch.

    \b
    boxcar audit coco_qwen25vl --html                      annotations, without converting them
    boxcar audit coco_qwen25vl --cutoffs 1024,2048,4096 --pixels 262144,1003520 --base Qwen/Qwen2.5-VL-7B-Instruct
    boxcar audit coco_qwen25vl --family qwen3_vl --as llama-factory --against coco_val
    boxcar audit shards/coco_qwen25vl                      the same from shards
    boxcar audit coco_qwen25vl --keep 99.5%                and write the chosen settings

    Lengths are conversion's own, to the token. TARGET is a workflow, or a folder of shards.
    """
    from tools.auditing.command import is_shards, numbers, run_audit, share
    from tools.auditing.run import Request
    from tools.workflows import load_workflow

    kept = share(keep)
    sources = []
    for other in against:
        other_workflow = load_workflow(path, other, "convert")
        assert other_workflow.convert is not None
        sources.append(other_workflow.convert)
    request = Request(
        families=families,
        cutoffs=numbers(cutoffs, "--cutoffs"),
        pixels=numbers(pixels, "--pixels"),
        base=base,
        gpu=gpu,
        mfu=mfu,
        tokenizer=tokenizer,
        duplicates=not no_duplicates,
        perceptual=perceptual,
        against=sources,
        consumers=consumers,
        keep=kept,
        work=work,
    )
    if is_shards(target):
        if kept is not None:
            raise click.UsageError("--keep writes into a workflow: audit the workflow, not its shards")
        if settings := [word for word in overrides if "=" in word and not Path(word).exists()]:
            raise click.UsageError(f"{settings[0]}: shards are what they are; try settings on a workflow, or by --cutoffs and --pixels")
        folders = [Path(target), *map(Path, overrides)]
        sys.exit(run_audit(folders, None, request, file=path, out=out, page=html, as_json=as_json, write=False))
    workflow = load_workflow(path, target, "convert", overrides)
    write = kept is not None
    sys.exit(run_audit(target, workflow, request, file=path, out=out, page=html, as_json=as_json, write=write))


@main.command()
@click.argument("first")
@click.argument("second")
@click.option("--json", "as_json", is_flag=True, help="Print the differences as JSON.")
def diff(first: str, second: str, as_json: bool) -> None:
    """Compare two conversions or audits: contracts, counts, tokens. Exit code 1 where they differ.

    \b
    boxcar diff shards/a shards/b
    boxcar diff audits/coco_qwen25vl shards/coco_qwen25vl
    """
    from tools.auditing.command import run_diff

    sys.exit(run_diff(first, second, as_json=as_json))


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


def _arms(_ctx: click.Context, _parameter: click.Parameter, value: str) -> list[str]:
    """A list with commas, checked. The names are those of schemas.training.ScheduleKind, which --help must not wait for."""
    arms = [arm.strip() for arm in value.split(",") if arm.strip()]
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(ARMS)}")
    return arms


@main.command()
@click.argument("name")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--file", "path", default="workflows.yaml", show_default=True, type=click.Path(path_type=Path), help="File of workflows.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(min=1), help="Runs of each arm; 3 or more give intervals.")
@click.option("--arms", default=",".join(ARMS), show_default=True, callback=_arms, help="Kinds of schedules; `uniform` is the control.")
@click.option("--tokens", type=click.IntRange(min=1), help="Of each run. Default: the least that an arm offers over `epochs`.")
@click.option("--metric", default="loss", show_default=True, help="Metric of train.validation at the end, such as mean_iou.")
@click.option("--mode", type=click.Choice(["min", "max"]), help="Whether less or more of it is better. Default: by its name.")
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
    """Say what region sampling does on the data of workflow NAME: the kinds of schedules at equal tokens, with several seeds.

    \b
    boxcar ablate coco_qwen25vl schedule.turns_per_sample=8 validation.shards=[shards/coco_val]
    boxcar ablate coco_qwen25vl schedule.turns_per_sample=8 --tokens 20000000 --seeds 5 --plot ablation.png

    Every run is one of `boxcar train`. Run again after a crash or Ctrl-C, or with more seeds or arms, it does only what is missing.
    """
    from tools.ablate_report import ablate_with_progress
    from tools.workflows import load_workflow

    workflow = load_workflow(path, name, "train", overrides)
    ablate_with_progress(workflow, name, arms=arms, num_seeds=seeds, tokens=tokens, metric=metric, mode=mode, as_json=as_json, plot=plot)


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
@click.argument("source", metavar="RESULTS|SHARDS")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write. Default: view/ within the source.")
@click.option("--max-items", default=1000, show_default=True, type=click.IntRange(min=1), help="Of more, a sample of every stratum.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the sample.")
def view(source: str, out: Path | None, max_items: int, seed: int) -> None:
    """Write a page of RESULTS or SHARDS: one folder that a browser opens from disk, without a network.

    \b
    boxcar view runs/demo-1a2b3c/evaluation-4d5e6f
    boxcar view shards/demo --out pages/demo --max-items 300

    Boxes on the image as the model sees it, truth, adapter and base to switch on and off; questions, raw and parsed replies; filters and
    sorting; raters press 1-4 and export a file for `boxcar rate`. Of results, the sample is even over task, size, right and wrong.
    """
    from tools.view import write_page

    click.echo(f"open {write_page(source, out, max_items=max_items, seed=seed)}")


@main.command()
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
    from tools.rate import rate as merge

    merge(files, results, as_json=as_json)


@main.command()
@click.option("--adapter", required=True, help="A run's folder, or its adapter/.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="New folder to write.")
@click.option("--merge", is_flag=True, help="Base and adapter as one model. Default: the adapter alone.")
@click.option("--base", default="", help="Where the base is now, if it has moved.")
@click.option("--tokenizer", default="", help="Where the tokenizer is now, if it has moved.")
def export(adapter: str, out: Path, merge: bool, base: str, tokenizer: str) -> None:
    """Write an adapter for transformers and vLLM: safetensors, tokenizer, and a processor with the pixel limits of training.

    \b
    boxcar export --adapter runs/demo-1a2b3c --out exported/demo --merge
    boxcar export --adapter runs/demo-1a2b3c --out exported/demo-adapter

    README.md in the folder has code that loads it without Boxcar, and the rule from a reply's numbers to pixels of the image.
    """
    from tools.export import export_and_tell

    export_and_tell(adapter, out, merge=merge, base=base, tokenizer=tokenizer)


@main.command("export-data")
@click.argument("shards")
@click.option("--to", required=True, type=click.Choice(["coco", "llama-factory", "ms-swift"]), help="Who is to read it.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="New folder to write.")
@click.option("--tokenizer", default="", help="Where the tokenizer is now, if it has moved.")
def export_data(shards: str, to: str, out: Path, tokenizer: str) -> None:
    """Write SHARDS for another program, boxes in the frame that it will really use; README.txt in the folder says which.

    \b
    boxcar export-data shards/coco_qwen25vl --to llama-factory --out lf
    boxcar export-data shards/coco_qwen25vl --to ms-swift --out swift
    boxcar export-data shards/coco_qwen25vl --to coco --out coco
    """
    from tools.export_data import export_data as write

    _tell_counts(out / "README.txt", write(shards, to, out, tokenizer))


@main.command("export-results")
@click.argument("results", type=click.Path(path_type=Path))
@click.option("--to", required=True, type=click.Choice(["coco-detections", "label-studio"]), help="Who is to read it.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON file to write; others stand beside it.")
@click.option("--arm", default="adapter", show_default=True, help="Whose answers: adapter or base.")
@click.option("--images-url", default="", help="label-studio: what stands before an image's file name.")
def export_results(results: Path, to: str, out: Path, arm: str, images_url: str) -> None:
    """Write the answers of RESULTS for another program; a .txt beside the file says what boxes and scores are.

    \b
    boxcar export-results runs/demo-1a2b3c/evaluation-4d5e6f --to coco-detections --out detections.json
    boxcar export-results runs/demo-1a2b3c/evaluation-4d5e6f --to label-studio --out tasks.json --images-url "/data/local-files/?d=coco/"
    """
    from tools.export_results import export_results as write

    _tell_counts(out.with_name(f"{out.stem}.txt"), write(results, to, out, arm=arm, images_url=images_url))


def _tell_counts(readme: Path, counts: dict[str, int]) -> None:
    for name, count in sorted(counts.items()):
        click.echo(f"{name}: {count}")
    click.echo(f"read {readme}")


@main.command()
def schema() -> None:
    """Print the JSON Schema of workflows.yaml, for editors."""
    from pipelines.families.catalog import FAMILIES
    from pipelines.readers.catalog import READERS
    from tools.workflows import json_schema

    click.echo(json.dumps(json_schema(list(READERS), list(FAMILIES)), indent=2, ensure_ascii=False))


@main.command("demo-base")
@click.option(
    "--work", default="data/demo-base", show_default=True, type=click.Path(path_type=Path), help="Where drawings and the run are kept."
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write. Default: the one that the quick start uses.")
def demo_base(work: Path, out: Path | None) -> None:
    """Train the quick start's small network again, from nothing (six minutes of two cores)."""
    from tools.demo_base import make_base
    from tools.quickstart import BASE

    make_base(work, out or BASE)


@main.command()
@click.argument("name")
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--file", "path", default="workflows.yaml", show_default=True, type=click.Path(path_type=Path), help="File of workflows.")
@click.option("--page", type=click.Path(path_type=Path), help="Folder of the page. Default: view/ beside the results.")
def run(name: str, overrides: Sequence[str], path: Path, page: Path | None) -> None:
    """Run every stage of workflow NAME: convert, audit, train, evaluate, page. What is done already is skipped, by content.

    \b
    boxcar run quickstart                     drawn scenes, everything, on a laptop
    boxcar run coco_qwen25vl train.epochs=2

    Interrupted, it goes on where it was. `quickstart` needs no file.
    """
    from tools.run import run_workflow

    run_workflow(path, name, overrides, page)


@main.command()
@click.argument("name")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--file", "path", default="workflows.yaml", show_default=True, type=click.Path(path_type=Path), help="File of workflows.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def evaluate(name: str, overrides: Sequence[str], path: Path, as_json: bool) -> None:
    """Measure the adapter of workflow NAME on held-out shards, against its base.

    \b
    boxcar evaluate coco_qwen25vl adapter=runs/coco_qwen25vl-1a2b3c
    boxcar evaluate quickstart max_samples=50 ask_as=both

    Accuracy, mean IoU, precision, recall and F1, absent things, COCO AP, format; with intervals, by size, task, language and source.
    Another frame contract is refused, and so are images that were trained on.
    """
    from tools.evaluate import evaluate_with_progress
    from tools.workflows import load_workflow

    evaluate_with_progress(load_workflow(path, name, "evaluate", overrides), name, as_json=as_json)


@main.command()
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
    from tools import predict as tool
    from train.answering.predict_job import PredictSpec

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
