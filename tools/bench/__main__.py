"""Benchmarks: `python -m tools.bench NAME`. Not tests: they print figures with the conditions under which they were taken.

Whatever a benchmark needs and cannot draw itself (photographs, a tokenizer) is named on the command line.
"""

from pathlib import Path

import click

from boxcar.tools.bench import measure

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
    from boxcar.tools.bench import conversion

    conversion.throughput(photographs, tokenizer, work, samples, boxes, executor)


@main.command()
@PHOTOGRAPHS
@TOKENIZER
@WORK
@click.option("--gigabytes", default=10.0, show_default=True)
@click.option("--executor", default="inline", show_default=True, type=click.Choice(["inline", "ray"]))
def coco(photographs: Path, tokenizer: Path, work: Path, gigabytes: float, executor: str) -> None:
    """Parsing speed and memory of one giant COCO file."""
    from boxcar.tools.bench import conversion

    conversion.giant_coco(photographs, tokenizer, work, gigabytes, executor)


@main.command()
@WORK
@click.option("--data", required=True, type=click.Path(path_type=Path, exists=True), help="Folder with coco_mini/ and bccd/.")
@click.option("--tokenizer", "tokenizers", multiple=True, required=True, metavar="FAMILY=FOLDER", help="Once for each family.")
@click.option("--labels", default=2000, show_default=True, help="Adversarial labels.")
def exact(work: Path, data: Path, tokenizers: tuple[str, ...], labels: int) -> None:
    """Composed ids against the tokenizer's own encoding, every family, every row."""
    from boxcar.tools.bench import exactness

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
    from boxcar.tools.bench import robustness

    robustness.kill(photographs, tokenizer, work, kills, samples, executor)


@main.command()
@PHOTOGRAPHS
@TOKENIZER
@WORK
@click.option("--samples", default=20_000, show_default=True)
def workers(photographs: Path, tokenizer: Path, work: Path, samples: int) -> None:
    """The same conversion with 1, 2 and 7 workers: compare every byte."""
    from boxcar.tools.bench import robustness

    robustness.workers(photographs, tokenizer, work, samples)


@main.command()
@click.argument("shards", type=click.Path(path_type=Path, exists=True))
@click.option("--flips", default=1000, show_default=True)
def flips(shards: Path, flips: int) -> None:
    """Flip single bits in a copy of a conversion: how many does verify report?"""
    from boxcar.tools.bench import robustness

    robustness.flip_bits(shards, flips)


@main.command()
@PHOTOGRAPHS
@click.option("--passes", default=50, show_default=True)
def headers(photographs: Path, passes: int) -> None:
    """Image headers for one CPU-second, warm disk, against Pillow."""
    from boxcar.tools.bench import conversion

    conversion.headers(photographs, passes)


@main.command()
@PHOTOGRAPHS
@WORK
@click.option("--samples", default=160, show_default=True, help="Of the loader's part.")
@click.option("--passes", default=5, show_default=True)
def stream(photographs: Path, work: Path, samples: int, passes: int) -> None:
    """CPU-milliseconds and bytes an image, from file to batch, against the Hugging Face image processor."""
    from boxcar.tools.bench import streaming

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
    from boxcar.schemas.training import ScheduleConfig
    from boxcar.tools.bench import planning

    schedule = ScheduleConfig.model_validate({"kind": kind, "turns_per_sample": turns_per_sample})
    planning.plan(rows, turns, schedule, window, cutoff, global_batch)


@main.command()
@click.option("--models", default="3b,7b", show_default=True, help="Sizes of Qwen2.5-VL, separated by commas.")
@click.option("--tokens", type=click.IntRange(min=1), help="Of a pack. Default: 4096, tiny 512.")
@click.option("--steps", default=10, show_default=True, type=click.IntRange(min=1), help="Measured steps.")
@click.option("--warmup", default=3, show_default=True, type=click.IntRange(min=1), help="Steps before them.")
@click.option("--arms", metavar="NAME;NAME", help="Only arms whose names contain one of these.")
@click.option("--peak-tflops", type=float, help="Of the device, for MFU. Default: the published figure, where known.")
@click.option("--tiny", is_flag=True, help="A dry run with a tiny network, on a CPU, too.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write every figure to this file.")
def gpu(
    models: str,
    tokens: int | None,
    steps: int,
    warmup: int,
    arms: str | None,
    peak_tflops: float | None,
    tiny: bool,
    json_path: Path | None,
) -> None:
    """Qwen2.5-VL with random weights and LoRA: useful tokens/s, MFU and memory, against transformers' Trainer."""
    from boxcar.tools.bench import gpu as bench
    from boxcar.tools.bench.qwen_sizes import SIZES

    if unknown := [size for size in models.split(",") if size not in SIZES]:
        raise click.UsageError(f"--models: found {', '.join(unknown)}, expected some of {', '.join(SIZES)}")
    if not tiny and not bench.has_device():
        raise click.UsageError("found no CUDA device; --tiny is a dry run without one")
    sizes = ["tiny"] if tiny else models.split(",")
    if not bench.run(sizes, tokens or (512 if tiny else 4096), steps, warmup, peak_tflops, json_path, arms):
        raise SystemExit(1)


@main.command()
@PHOTOGRAPHS
@TOKENIZER
@WORK
@click.option("--samples", default=100_000, show_default=True, help="Annotated samples, over linked photographs.")
@click.option("--repeat", default=10, show_default=True, help="Times that the grid goes through their columns.")
@click.option("--rows", default="1000000,2000000", show_default=True, help="Rows of shards, separated by commas; 0: none.")
@click.option("--pictures", default=1000, show_default=True, help="Photographs for the comparison with the processor; 0: none.")
def audit(photographs: Path, tokenizer: Path, work: Path, samples: int, repeat: int, rows: str, pictures: int) -> None:
    """The what-if grid of 50 settings, header pass, shards, and the same counts by the Hugging Face processor."""
    from boxcar.tools.bench import auditing

    auditing.grid(photographs, tokenizer, work, samples, repeat)
    if rows != "0":
        auditing.shards(photographs, tokenizer, work, samples, tuple(map(int, rows.split(","))))
    if pictures:
        auditing.against_processor(photographs, pictures)


@main.command()
@WORK
@click.option("--rows", default=20_011, show_default=True, help="Of the plan; a prime, so that nothing divides it.")
@click.option("--turns", default=8, show_default=True, help="Turns a row.")
@click.option("--changes", default=200, show_default=True, help="Random triples of steps at which the number of workers changes.")
@click.option("--kills", default=10, show_default=True)
@click.option("--epochs", default=4, show_default=True, help="Of the runs that are killed.")
def resume(work: Path, rows: int, turns: int, changes: int, kills: int, epochs: int) -> None:
    """Order of samples after resuming at every step, and losses after SIGKILL, against what is never cut."""
    from boxcar.tools.bench import resuming

    resuming.sequences(rows, turns, changes)
    folder = resuming.drawn_shards(work)
    resuming.streams(folder)
    resuming.kills(folder, kills, epochs)


@main.command()
@click.option("--hidden", default=3584, show_default=True)
@click.option("--vocabulary", default=152_064, show_default=True)
@click.option("--tokens", default=2048, show_default=True)
@click.option("--labelled", default=0.3, show_default=True, help="Share of the tokens.")
@click.option("--chunk", default=256, show_default=True, help="Labelled tokens whose logits exist at a time.")
@click.option("--threads", default=1, show_default=True)
@click.option("--passes", default=1, show_default=True)
def loss(hidden: int, vocabulary: int, tokens: int, labelled: float, chunk: int, threads: int, passes: int) -> None:
    """Seconds and memory of the chunked loss over labelled tokens, against the logits of all of them. On a CPU."""
    from boxcar.tools.bench import head

    head.compare(head.Case(hidden, vocabulary, tokens, labelled, chunk, threads), passes)


if __name__ == "__main__":
    main()
