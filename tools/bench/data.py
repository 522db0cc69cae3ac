"""Synthetic annotations over linked photographs, in any number and size."""

import json
import os
from pathlib import Path
from typing import TextIO

import numpy as np

from boxcar.pipelines.images.image_file import read_header


def linked_photographs(source: Path, folder: Path, num_images: int) -> list[tuple[str, int, int]]:
    """`num_images` names that link to the photographs of `source` in turn: (name, width, height)."""
    photographs = sorted(source.iterdir())
    sizes = [read_header(str(path)) for path in photographs]
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number in range(num_images):
        path, header = photographs[number % len(photographs)], sizes[number % len(photographs)]
        name = f"{number:09d}{path.suffix}"
        link = folder / name
        if not link.is_symlink():
            os.symlink(path.absolute(), link)
        names.append((name, header.width, header.height))
    return names


def write_coco(path: Path, images: list[tuple[str, int, int]], boxes_per_image: int, *, num_categories: int = 80, seed: int = 0) -> int:
    """A COCO instances file with random boxes, written as it is drawn; returns its size in bytes.

    As in COCO 2017, an image has some three categories, and several boxes of most.
    """
    rng = np.random.default_rng(seed)
    next_id = 1
    with open(path, "w") as stream:
        _write_images(stream, images)
        for number, (_, width, height) in enumerate(images):
            count = int(rng.integers(max(boxes_per_image // 2, 1), boxes_per_image * 3 // 2 + 1))
            corners = rng.random((count, 4))
            sides = np.maximum(corners[:, 2:] * 0.4, 0.02) * (width, height)
            starts = corners[:, :2] * ((width, height) - sides)
            boxes = np.concatenate([starts, sides], axis=1).round(2)
            here = rng.integers(1, num_categories + 1, 1 + min(int(rng.poisson(2)), 6))
            categories = rng.choice(here, count)
            for box, category in zip(boxes.tolist(), categories.tolist(), strict=True):
                entry = {"id": next_id, "image_id": number + 1, "category_id": category, "bbox": box, "iscrowd": 0, "area": box[2] * box[3]}
                stream.write((", " if next_id > 1 else "") + json.dumps(entry))
                next_id += 1
        _write_categories(stream, num_categories)
    return path.stat().st_size


def write_giant_coco(
    path: Path, images: list[tuple[str, int, int]], boxes_per_image: int, *, num_categories: int = 80, seed: int = 0
) -> int:
    """As `write_coco`, with segmentations, from a pool of ten thousand boxes: a gigabyte in seconds."""
    rng = np.random.default_rng(seed)
    pool = []
    for _ in range(10_000):
        x, y, width, height = (float(value) for value in rng.integers(1, 150, 4))
        polygon = (rng.random(44) * width + x).round(2).tolist()
        category = int(rng.integers(1, num_categories + 1))
        box = f'"bbox": [{x}, {y}, {width}, {height}], "area": {width * height * 0.6:.4f}'
        pool.append(f'"segmentation": [{polygon}], "iscrowd": 0, {box}, "category_id": {category}')
    with open(path, "w", buffering=1 << 22) as stream:
        _write_images(stream, images)
        next_id = 1
        for number in range(len(images)):
            for drawn in rng.integers(0, len(pool), boxes_per_image).tolist():
                comma = ", " if next_id > 1 else ""
                stream.write(f'{comma}{{{pool[drawn]}, "image_id": {number + 1}, "id": {next_id}}}')
                next_id += 1
        _write_categories(stream, num_categories)
    return path.stat().st_size


def _write_images(stream: TextIO, images: list[tuple[str, int, int]]) -> None:
    stream.write('{"info": {"description": "synthetic"}, "images": [')
    for number, (name, width, height) in enumerate(images):
        entry = {"id": number + 1, "file_name": name, "width": width, "height": height}
        stream.write((", " if number else "") + json.dumps(entry))
    stream.write('], "annotations": [')


def _write_categories(stream: TextIO, num_categories: int) -> None:
    names = [{"id": number, "name": f"thing {number}"} for number in range(1, num_categories + 1)]
    stream.write(f'], "categories": {json.dumps(names)}}}')
