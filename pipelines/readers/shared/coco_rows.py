"""From a COCO index to records: the images of a unit with their regions and captions, and the checks that COCO's readers share."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
import pyarrow as pa
import xxhash

from boxcar.pipelines import storage
from boxcar.pipelines.readers.reader import SourcePlan, Unit
from boxcar.pipelines.readers.shared.coco_index import INDEX_NAME, CocoIndex, annotation_name, build_index
from boxcar.schemas.record import ImageRef, Region, Rejected

UNKNOWN_CATEGORY = "unknown_category"
DUPLICATE_IMAGE = "duplicate_id"
NO_FILE_NAME = "no_file_name"

RegionRow = tuple[str, str, float, float, float, float, bool, bool, bool]
"""id, category_id, x, y, width, height, iscrowd, ignore, broken."""
_REGION_COLUMNS = ("id", "category_id", "x", "y", "width", "height", "iscrowd", "ignore", "broken")


@dataclass(frozen=True)
class IndexedImage:
    """One image with all that belongs to it, in the order of the source."""

    number: int
    image_id: str
    file_name: str
    width: float | None
    height: float | None
    negative: list[str]
    not_exhaustive: list[str]
    regions: list[RegionRow]
    captions: list[str]


def read_index(path: str) -> CocoIndex:
    return msgspec.json.decode(Path(path).read_bytes(), type=CocoIndex)


def images_of(index_path: str, index: CocoIndex, start: int, stop: int) -> Iterator[IndexedImage]:
    """Images start .. stop - 1 with their regions and captions."""
    folder = Path(index_path).parent
    with pa.memory_map(str(folder / "images.arrow")) as source:
        images = _slice_batches(pa.ipc.open_file(source), start, stop)
    regions, region_borders = _rows_of(folder, index.annotation_runs, _REGION_COLUMNS, start, stop)
    captions, caption_borders = _rows_of(folder, index.caption_runs, ("caption",), start, stop)
    for offset, image in enumerate(zip(*(column.to_pylist() for column in images.columns), strict=True)):
        own_regions = regions[region_borders[offset] : region_borders[offset + 1]]
        own_captions = captions[caption_borders[offset] : caption_borders[offset + 1]]
        image_id, file_name, width, height, negative, not_exhaustive = image
        texts = [caption for (caption,) in own_captions]
        yield IndexedImage(start + offset, image_id, file_name, width, height, negative, not_exhaustive, own_regions, texts)


def _slice_batches(reader: pa.ipc.RecordBatchFileReader, start: int, stop: int) -> pa.Table:
    """Rows start .. stop - 1 over the batches of a file."""
    parts, first = [], 0
    for number in range(reader.num_record_batches):
        if first >= stop:
            break
        batch = reader.get_batch(number)
        if first + batch.num_rows > start:
            parts.append(batch.slice(max(start - first, 0), min(stop, first + batch.num_rows) - max(start, first)))
        first += batch.num_rows
    return pa.Table.from_batches(parts, reader.schema)


def _rows_of(folder: Path, runs: list[str], columns: tuple[str, ...], start: int, stop: int) -> tuple[list[Any], list[int]]:
    """The rows of images start .. stop - 1 as tuples, and where those of each image begin and end."""
    parts = []
    for name in runs:
        with pa.memory_map(str(folder / name)) as source:
            table = pa.ipc.open_file(source).read_all()
        if table.num_rows:
            # One batch a run, ascending by image: the stretch is found by bisection without touching the rest of the file.
            first, last = np.searchsorted(table["image_index"].chunk(0).to_numpy(), [start, stop])
            part = pl.from_arrow(table.slice(int(first), int(last - first)))
            assert isinstance(part, pl.DataFrame)
            parts.append(part)
    if not parts:
        return [], [0] * (stop - start + 1)
    rows = pl.concat(parts, rechunk=True).sort("image_index", "row")
    borders = np.searchsorted(rows["image_index"].to_numpy(), np.arange(start, stop + 1)).tolist()
    return list(zip(*(rows[column].to_list() for column in columns), strict=True)), borders


def plan_index(path: str, captions_path: str | None, work_dir: Path, records_per_unit: int, *, with_regions: bool) -> SourcePlan:
    """Index a file and cut its images into units."""
    fingerprint = storage.hash_file(path)
    if captions_path is not None:
        fingerprint = xxhash.xxh3_128_hexdigest(f"{fingerprint} {storage.hash_file(captions_path)}".encode())
    index, problems = build_index(path, captions_path, work_dir, with_regions=with_regions)
    index_path = str(work_dir / INDEX_NAME)
    starts = range(0, index.num_images, records_per_unit)
    return SourcePlan(
        fingerprint=fingerprint,
        units=tuple(Unit(index_path, start, min(start + records_per_unit, index.num_images)) for start in starts),
        num_records=index.num_images + len(problems.rejected),
        notes=tuple(problems.notes()),
        unlabelled="" if index.is_labelled else "images without annotations, as image_info_*.json of COCO has them",
        rejected=tuple(problems.rejected),
    )


def refused_image(index: CocoIndex, entry: IndexedImage, duplicates: set[int]) -> Rejected | None:
    """Why an image cannot be a record, if so."""
    position = f"{index.source_name}, image {entry.image_id}"
    if entry.number in duplicates:
        detail = f"found the image id {entry.image_id} again ({entry.file_name}), expected each id once; the first stays"
        return Rejected(DUPLICATE_IMAGE, position, detail, entry.image_id)
    if not entry.file_name:
        return Rejected(NO_FILE_NAME, position, "found neither file_name nor coco_url, expected one of them", entry.image_id)
    return None


def image_ref(entry: IndexedImage) -> ImageRef:
    return ImageRef(entry.file_name, declared_pixels(entry.width), declared_pixels(entry.height))


def declared_pixels(number: float | None) -> int | None:
    """A declared width or height; None where it says nothing (0, -1 and NaN stand for "unknown" in some exports)."""
    return int(number) if number is not None and math.isfinite(number) and number >= 1 else None


def regions_of(entry: IndexedImage, labels: dict[str, str]) -> tuple[Region, ...]:
    """The readable regions of known categories."""
    return tuple(
        Region((x, y, x + width, y + height), labels[category], is_crowd=crowd, is_difficult=ignore, region_id=annotation_name(annotation))
        for annotation, category, x, y, width, height, crowd, ignore, broken in entry.regions
        if not broken and category in labels
    )


def broken_labels(entry: IndexedImage, labels: dict[str, str]) -> tuple[str, ...]:
    """Labels with an annotation that cannot be read: neither exhaustive nor absent in this image. All of them, where one lacks even its
    category."""
    broken = {row[1] for row in entry.regions if row[-1]}
    return tuple(dict.fromkeys(label for category, label in labels.items() if category in broken or "" in broken)) if broken else ()


def unknown_categories(index: CocoIndex, entry: IndexedImage, labels: dict[str, str]) -> Iterator[Rejected]:
    """Readable annotations whose category the file does not list."""
    for annotation, category, *_, broken in entry.regions:
        if category not in labels and not broken:
            known = ", ".join(list(labels)[:10]) + (", ..." if len(labels) > 10 else "")
            yield Rejected(
                UNKNOWN_CATEGORY,
                f"{index.source_name}, {annotation_name(annotation)}, image {entry.image_id}",
                f"found category_id {category}, expected one of the {len(labels)} in the file ({known})",
                annotation_name(annotation),
            )
