"""Commands that say what a data set costs. Each imports what it needs, so that --help is instant."""

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from boxcar.tools.commands.options import workflow_file


@click.command()
@click.argument("target")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE | SHARDS]...")
@workflow_file
@click.option("--family", "families", multiple=True, metavar="FAMILY[=TOKENIZER]", help="Another family to audit; can be repeated.")
@click.option("--cutoffs", metavar="N,N,...", help="Values of cutoff_len to try. Default: up to the longest sample.")
@click.option("--pixels", metavar="N,N,...", help="Values of image_max_pixels to try. Default: up to the largest image.")
@click.option("--keep", metavar="SHARE", help="Write the cheapest setting that keeps this share of turns into the workflow, such as 99.5%.")
@click.option("--base", default="", help="Folder (or downloaded hub id) with the base's config.json: FLOPs, GPU-hours, memory.")
@click.option("--gpu", default="H100", show_default=True, help="GPU whose peak FLOP/s is used.")
@click.option("--mfu", type=float, help="Share of the peak that training reaches. Default: 0.35, an assumption.")
@click.option("--as", "consumers", multiple=True, metavar="TRAINER", help="What llama-factory or ms-swift[:left|:right] would do.")
@click.option("--against", multiple=True, metavar="WORKFLOW", help="Look for this source's images in another workflow's (leakage).")
@click.option("--perceptual", is_flag=True, help="Also find images that look alike; decodes every image.")
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
    """Report what a data set costs, what a cutoff or a resolution would lose, and what is wrong with it. Needs no GPU and no torch.

    \b
    boxcar audit coco_qwen25vl --html                      annotations, without converting them
    boxcar audit coco_qwen25vl --cutoffs 1024,2048,4096 --pixels 262144,1003520 --base Qwen/Qwen2.5-VL-7B-Instruct
    boxcar audit coco_qwen25vl --family qwen3_vl --as llama-factory --against coco_val
    boxcar audit shards/coco_qwen25vl                      the same from shards
    boxcar audit coco_qwen25vl --keep 99.5%                and write the chosen settings

    Lengths are conversion's own, to the token. TARGET is a workflow, or a folder of shards.
    """
    from boxcar.tools.auditing.command import is_shards, numbers, run_audit, share
    from boxcar.tools.auditing.run import Request
    from boxcar.tools.workflows import load_workflow

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


@click.command()
@click.argument("first")
@click.argument("second")
@click.option("--json", "as_json", is_flag=True, help="Print the differences as JSON.")
def diff(first: str, second: str, as_json: bool) -> None:
    """Compare two conversions or audits: contracts, counts, tokens. Exit code 1 where they differ.

    \b
    boxcar diff shards/a shards/b
    boxcar diff audits/coco_qwen25vl shards/coco_qwen25vl
    """
    from boxcar.tools.auditing.command import run_diff

    sys.exit(run_diff(first, second, as_json=as_json))
