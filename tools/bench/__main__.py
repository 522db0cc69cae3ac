"""Benchmarks: `python -m tools.bench NAME`. Not tests: they print figures with the conditions under which they were taken.

Whatever a benchmark needs and cannot draw itself (photographs, a tokenizer) is named on the command line.
"""

from pathlib import Path

import click

from tools.bench import measure

PHOTOGRAPHS = click.option(
    "--photographs", required=True, type=click.Path(path_type=Path, exists=True), help="Folder of photographs to link to."
)
TOKENIZER = click.option("--tokenizer", required=True, type=click.Path(path_type=Path, exists=True), help="Folder with tokenizer.json.")
WORK = click.option("--work", default="/tmp/boxcar-bench", show_default=True, type=click.Path(path_type=Path), help="Folder for data.")


@click.group()
def main() -> None:
    """Figures with the conditions under which they were taken."""
    click.echo(measure.conditions())


@main.command()
@PHOTOGRAPHS
@TOKENIZER
@WORK
@click.option("--samples", default=100_000, show_default=True)
@click.option("--boxes", default=8, show_default=True, help="Boxes an image, on average.")
@click.option("--executor", default="inline", show_default=True, type=click.Choice(["inline", "ray"]))
def convert(photographs: Path, tokenizer: Path, work: Path, samples: int, boxes: int, executor: str) -> None:
    """CPU-milliseconds a sample of a whole conversion: COCO, referenced images, Qwen2.5-VL."""
    from tools.bench import conversion

    conversion.throughput(photographs, tokenizer, work, samples, boxes, executor)


@main.command()
@PHOTOGRAPHS
@TOKENIZER
@WORK
@click.option("--gigabytes", default=10.0, show_default=True)
@click.option("--executor", default="inline", show_default=True, type=click.Choice(["inline", "ray"]))
def coco(photographs: Path, tokenizer: Path, work: Path, gigabytes: float, executor: str) -> None:
    """Parsing speed and memory of one giant COCO file."""
    from tools.bench import conversion

    conversion.giant_coco(photographs, tokenizer, work, gigabytes, executor)


@main.command()
@WORK
@click.option("--data", required=True, type=click.Path(path_type=Path, exists=True), help="Folder with coco_mini/ and bccd/.")
@click.option("--tokenizer", "tokenizers", multiple=True, required=True, metavar="FAMILY=FOLDER", help="Once for each family.")
@click.option("--labels", default=2000, show_default=True, help="Adversarial labels.")
def exact(work: Path, data: Path, tokenizers: tuple[str, ...], labels: int) -> None:
    """Composed ids against the tokenizer's own encoding, every family, every row."""
    from tools.bench import exactness

    folders = {family: Path(folder) for family, _, folder in (entry.partition("=") for entry in tokenizers)}
    exactness.compare(data, folders, labels, work / "exact")


@main.command()
@PHOTOGRAPHS
@TOKENIZER
@WORK
@click.option("--kills", default=50, show_default=True)
@click.option("--samples", default=20_000, show_default=True)
@click.option("--executor", default="inline", show_default=True, type=click.Choice(["inline", "ray"]))
def kill(photographs: Path, tokenizer: Path, work: Path, kills: int, samples: int, executor: str) -> None:
    """SIGKILL a conversion at random moments, run it again, compare every byte."""
    from tools.bench import robustness

    robustness.kill(photographs, tokenizer, work, kills, samples, executor)


@main.command()
@PHOTOGRAPHS
@TOKENIZER
@WORK
@click.option("--samples", default=20_000, show_default=True)
def workers(photographs: Path, tokenizer: Path, work: Path, samples: int) -> None:
    """The same conversion with 1, 2 and 7 workers: compare every byte."""
    from tools.bench import robustness

    robustness.workers(photographs, tokenizer, work, samples)


@main.command()
@click.argument("shards", type=click.Path(path_type=Path, exists=True))
@click.option("--flips", default=1000, show_default=True)
def flips(shards: Path, flips: int) -> None:
    """Flip single bits in a copy of a conversion: how many does verify report?"""
    from tools.bench import robustness

    robustness.flip_bits(shards, flips)


@main.command()
@PHOTOGRAPHS
@click.option("--passes", default=50, show_default=True)
def headers(photographs: Path, passes: int) -> None:
    """Image headers for one CPU-second, warm disk, against Pillow."""
    from tools.bench import conversion

    conversion.headers(photographs, passes)


@main.command()
@PHOTOGRAPHS
@WORK
@click.option("--samples", default=160, show_default=True, help="Of the loader's part.")
@click.option("--passes", default=5, show_default=True)
def stream(photographs: Path, work: Path, samples: int, passes: int) -> None:
    """CPU-milliseconds and bytes an image, from file to batch, against the Hugging Face image processor."""
    from tools.bench import streaming

    streaming.throughput(photographs, work, samples, passes)


@main.command()
@click.option("--rows", default=10_000_000, show_default=True)
@click.option("--turns", default=8, show_default=True, help="Turns a row.")
@click.option("--turns-per-sample", type=int, help="Of the schedule. Default: as many as fit, so that all are taken.")
@click.option("--kind", default="progressive", show_default=True)
@click.option("--window", default=100_000, show_default=True)
@click.option("--cutoff", default=4096, show_default=True)
@click.option("--global-batch", default=16, show_default=True)
def plan(rows: int, turns: int, turns_per_sample: int | None, kind: str, window: int, cutoff: int, global_batch: int) -> None:
    """Seconds and memory of planning an epoch of a synthetic index; fill, and balance over 8 ranks."""
    from schemas.training import ScheduleConfig
    from tools.bench import planning

    schedule = ScheduleConfig.model_validate({"kind": kind, "turns_per_sample": turns_per_sample})
    planning.plan(rows, turns, schedule, window, cutoff, global_batch)


if __name__ == "__main__":
    main()
