"""Commands that write for other programs. Each imports what it needs, so that --help is instant."""

from pathlib import Path

import click


@click.command()
@click.option("--adapter", required=True, help="A run's folder, or its adapter/.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="New folder to write.")
@click.option("--merge", is_flag=True, help="Merge base and adapter into one model. Default: the adapter alone.")
@click.option("--base", default="", help="Where the base is now, if it has moved.")
@click.option("--tokenizer", default="", help="Where the tokenizer is now, if it has moved.")
def export(adapter: str, out: Path, merge: bool, base: str, tokenizer: str) -> None:
    """Write an adapter for transformers and vLLM: safetensors, tokenizer, and a processor with the pixel limits of training.

    \b
    boxcar export --adapter runs/demo-1a2b3c --out exported/demo --merge
    boxcar export --adapter runs/demo-1a2b3c --out exported/demo-adapter

    README.md in the folder has code that loads it without Boxcar, and the rule from a reply's numbers to pixels of the image.
    """
    from boxcar.tools.exporting.export import export_and_tell

    export_and_tell(adapter, out, merge=merge, base=base, tokenizer=tokenizer)


@click.command("export-data")
@click.argument("shards")
@click.option("--to", required=True, type=click.Choice(["coco", "llama-factory", "ms-swift", "parquet"]), help="Target format.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="New folder to write.")
@click.option("--tokenizer", default="", help="Where the tokenizer is now, if it has moved.")
@click.option(
    "--images", type=click.Choice(["bytes", "paths"]), default="bytes", show_default=True, help="parquet: the images, or their paths."
)
def export_data(shards: str, to: str, out: Path, tokenizer: str, images: str) -> None:
    """Write SHARDS as a data set for LLaMA-Factory, ms-swift, COCO tools or as Parquet; a README in it says how its boxes are written.

    parquet is read by datasets.load_dataset, TRL and polars.

    \b
    boxcar export-data shards/coco_qwen25vl --to llama-factory --out lf
    boxcar export-data shards/coco_qwen25vl --to ms-swift --out swift
    boxcar export-data shards/coco_qwen25vl --to coco --out coco
    boxcar export-data shards/coco_qwen25vl --to parquet --out parquet
    """
    from boxcar.tools.exporting.export_data import export_data as write

    _tell_counts(*write(shards, to, out, tokenizer, image_bytes=images == "bytes"))


@click.command("export-results")
@click.argument("results", type=click.Path(path_type=Path))
@click.option("--to", required=True, type=click.Choice(["coco-detections", "label-studio"]), help="Target format.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON file to write; others stand beside it.")
@click.option("--arm", default="adapter", show_default=True, help="Whose answers: adapter or base.")
@click.option("--images-url", default="", help="label-studio: prefix of the image file names.")
def export_results(results: Path, to: str, out: Path, arm: str, images_url: str) -> None:
    """Write the answers of RESULTS for another program; a .txt beside the file says what boxes and scores are.

    \b
    boxcar export-results runs/demo-1a2b3c/evaluation-4d5e6f --to coco-detections --out detections.json
    boxcar export-results runs/demo-1a2b3c/evaluation-4d5e6f --to label-studio --out tasks.json --images-url "/data/local-files/?d=coco/"
    """
    from boxcar.tools.exporting.export_results import export_results as write

    _tell_counts(out.with_name(f"{out.stem}.txt"), write(results, to, out, arm=arm, images_url=images_url))


def _tell_counts(readme: Path, counts: dict[str, int]) -> None:
    for name, count in sorted(counts.items()):
        click.echo(f"{name}: {count}")
    click.echo(f"read {readme}")
