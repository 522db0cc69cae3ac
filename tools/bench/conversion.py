"""What converting costs."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from PIL import Image

from boxcar.pipelines.images.image_file import read_header
from boxcar.pipelines.readers.shared.coco_index import CocoAnnotation, CocoCategory, CocoImage
from boxcar.pipelines.readers.shared.json_blocks import read_arrays
from boxcar.schemas import manifest as manifests
from boxcar.tools.bench import data
from boxcar.tools.bench.measure import BOXCAR, Cost, run

BYTES_PER_ANNOTATION = 520
"""Of `write_giant_coco`, and about the average of COCO 2017."""


def write_workflow(work: Path, annotations: Path, images: Path, tokenizer: Path, **changes: object) -> Path:
    """A workflows.yaml with one workflow `bench`."""
    section: dict[str, object] = {
        "reader": "coco",
        "annotations": str(annotations),
        "images": str(images),
        "family": "qwen2_5_vl",
        "tokenizer": str(tokenizer.absolute()),
        "cutoff_len": 4096,
        "image_max_pixels": 1003520,
        "output": str(work / "shards"),
    }
    path = work / "workflows.yaml"
    path.write_text(yaml.safe_dump({"bench": {"convert": section | changes}}))
    return path


def convert_command(workflows: Path, *overrides: str) -> list[str]:
    return [*BOXCAR, "convert", "bench", "--file", str(workflows), "--json", *overrides]


def prepare(photographs: Path, work: Path, samples: int, boxes: int) -> tuple[Path, Path]:
    """(annotations, images) of a synthetic COCO set; made once for each size."""
    folder = work / f"coco-{samples}-{boxes}"
    images = folder / "images"
    annotations = folder / "instances.json"
    if not annotations.exists():
        data.write_coco(annotations.with_suffix(".tmp"), data.linked_photographs(photographs, images, samples), boxes)
        annotations.with_suffix(".tmp").rename(annotations)
    return annotations, images


def throughput(photographs: Path, tokenizer: Path, work: Path, samples: int, boxes: int, executor: str) -> None:
    annotations, images = prepare(photographs, work, samples, boxes)
    output = work / f"shards-{samples}-{executor}"
    remove(output)
    workflows = write_workflow(work, annotations, images, tokenizer, output=str(output), executor=executor)
    start = run([*BOXCAR, "--version"])
    cost = run(convert_command(workflows))
    _print(cost)
    counts = manifests.load(output).counts
    num_turns, num_tokens = sum(counts.turns.values()), counts.visual_tokens + counts.text_tokens
    print(f"samples {counts.records_written:,}, boxes {counts.boxes_kept:,}, turns {num_turns:,}, tokens {num_tokens:,}")
    print(f"CPU-ms a sample: {cost.cpu_s / samples * 1e3:.3f} (of them {start.cpu_s / samples * 1e3:.4f} to start Python)")
    if executor == "ray":
        print("(the start of Ray, its servers and its workers are in these figures; `--executor inline` is without them)")


def giant_coco(photographs: Path, tokenizer: Path, work: Path, gigabytes: float, executor: str) -> None:
    per_image = 8 * BYTES_PER_ANNOTATION + 100
    num_images = int(gigabytes * 1e9 / per_image)
    folder = work / f"giant-{gigabytes:g}"
    annotations = folder / "instances.json"
    names = data.linked_photographs(photographs, folder / "images", min(num_images, 1000))
    if not annotations.exists():
        # All images link to the same thousand names: the file is what is measured here.
        repeated = [names[number % len(names)] for number in range(num_images)]
        data.write_giant_coco(annotations.with_suffix(".tmp"), repeated, 8)
        annotations.with_suffix(".tmp").rename(annotations)
    size = annotations.stat().st_size
    print(f"{size / 1e9:.2f} GB, {num_images:,} images")
    kinds = {"images": CocoImage, "annotations": CocoAnnotation, "categories": CocoCategory}
    parse_s = _cpu(lambda: sum(len(block.items) for block in read_arrays(str(annotations), kinds)))
    print(f"typed parse alone: {size / 1e6 / parse_s:.0f} MB for one CPU-second")
    output = work / "shards-giant"
    remove(output)
    workflows = write_workflow(work, annotations, folder / "images", tokenizer, output=str(output), executor=executor)
    cost = run(convert_command(workflows))
    _print(cost)
    each, speed = cost.cpu_s / num_images * 1e3, size / 1e6 / cost.cpu_s
    print(f"whole conversion: {each:.3f} CPU-ms a sample, {speed:.0f} MB of JSON for one CPU-second")
    for name, peak_mb in sorted(cost.peak_by_name_mb.items(), key=lambda item: -item[1])[:4]:
        print(f"  {name}: {peak_mb:.0f} MB")


def headers(photographs: Path, passes: int) -> None:
    paths = [str(path) for path in sorted(photographs.iterdir())]

    def pillow(path: str) -> object:
        with Image.open(path) as image:
            return image.size, image.getexif().get(0x0112, 1)

    for name, read in (("boxcar", read_header), ("boxcar, without the check for truncation", _read_unchecked), ("Pillow", pillow)):
        cpu = _cpu(lambda read=read: [read(path) for _ in range(passes) for path in paths])  # type: ignore[misc]
        print(f"{name}: {len(paths) * passes / cpu:,.0f} headers for one CPU-second")


def _read_unchecked(path: str) -> object:
    return read_header(path, check_end=False)


def _cpu(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _print(cost: Cost) -> None:
    memory = f"peak anonymous memory of one process {cost.peak_anon_mb:.0f} MB"
    print(f"exit {cost.exit_code}, {cost.cpu_s:.1f} CPU-s, {cost.wall_s:.1f} s, {memory}")


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
