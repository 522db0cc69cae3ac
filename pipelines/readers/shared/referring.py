"""Referring expressions joined with the boxes of an instances.json: what RefCOCO and gRefCOCO share.

    refs (pickle | JSON list) ──> referrals of the wanted split ──┐
                                                                   ├─ join ──> refs.arrow: a row per ref and target, by image ──> units
    instances.json ──4 MB blocks──> what the referrals name of it ─┘

    unit ──> image by image: phrases gathered, those of two meanings taken off ──> Record | Rejected

Memory is bounded by the refs (`refs_file`; 280,000 sentences in the largest set) and the annotations that they name, whatever
the size of instances.json.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import pyarrow as pa
import xxhash

from boxcar.pipelines import storage
from boxcar.pipelines.readers.reader import SourcePlan, Unit
from boxcar.pipelines.readers.shared.coco_index import (
    BROKEN_ANNOTATION,
    UNKNOWN_IMAGE,
    CocoAnnotation,
    CocoCategory,
    CocoImage,
    Id,
    annotation_name,
    annotation_of_shape,
    broken_annotation,
    check_categories,
    check_keys,
    image_path,
    read_categories,
    region_frame,
    side_px,
)
from boxcar.pipelines.readers.shared.coco_rows import NO_FILE_NAME, UNKNOWN_CATEGORY, declared_pixels
from boxcar.pipelines.readers.shared.json_blocks import Block, read_arrays
from boxcar.pipelines.readers.shared.refs_file import Row, TargetsOf, read_wanted
from boxcar.schemas.errors import AnnotationError
from boxcar.schemas.record import ImageRef, Record, Region, Rejected
from boxcar.schemas.workflow import SourceConfig

TABLE_NAME = "refs.arrow"

UNKNOWN_ANNOTATION = "unknown_annotation"
OTHER_IMAGE = "annotation_of_other_image"
AMBIGUOUS_PHRASE = "ambiguous_phrase"


@dataclass
class _Instances:
    """What the refs name of an instances.json."""

    images: pl.DataFrame
    annotations: pl.DataFrame
    labels: dict[str, str]
    broken: dict[str, str]
    """Annotation id -> what is wrong with it and where."""
    notes: list[str]


class _Collector:
    """Keeps the images and annotations with these ids of one pass over a file."""

    def __init__(self, path: str, image_ids: set[str], annotation_ids: set[str]) -> None:
        self.path, self.image_ids, self.annotation_ids = path, image_ids, annotation_ids
        self.seen: set[str] = set()
        self.categories: list[tuple[Id, str]] = []
        self.images: list[tuple[str, str, float | None, float | None]] = []
        self.annotations = [region_frame([])]
        self.broken: dict[str, str] = {}
        self.num_bad = {"images": 0, "annotations": 0}
        self.num_derived = 0

    def take(self, block: Block[Any]) -> None:
        self.seen.add(block.key)
        if block.key == "categories":
            self.categories += read_categories(self.path, block)
            return
        if block.key == "images":
            self.num_bad[block.key] += len(block.bad)
            for image in block.items:
                if str(image.id) in self.image_ids:
                    self.images.append((str(image.id), image_path(image), side_px(image.width), side_px(image.height)))
            return
        self._keep([item for item in block.items if str(item.id) in self.annotation_ids], broken=False)
        for bad in block.bad:
            if shaped := annotation_of_shape(self.path, bad):
                self.num_derived += 1
                self._keep([shaped] if str(shaped.id) in self.annotation_ids else [], broken=False)
                continue
            self.num_bad[block.key] += 1
            annotation = broken_annotation(self.path, bad)
            if annotation is not None and str(annotation.id) in self.annotation_ids:
                self.broken[str(annotation.id)] = f"byte {bad.offset}: {bad.error}"
                self._keep([annotation], broken=True)

    def _keep(self, annotations: list[CocoAnnotation], *, broken: bool) -> None:
        if annotations:
            self.annotations.append(region_frame(annotations, broken=broken).with_columns(pl.col("image_id").cast(pl.String)))

    def close(self) -> _Instances:
        check_keys(self.path, self.seen, ["images", "annotations", "categories"])
        check_categories(self.path, self.categories)
        images = pl.DataFrame(
            self.images,
            {"image_id": pl.String, "file_name": pl.String, "image_width": pl.Float64, "image_height": pl.Float64},
            orient="row",
        )
        self.annotations[0] = self.annotations[0].with_columns(pl.col("image_id").cast(pl.String))
        annotations = pl.concat(self.annotations).rename({"image_id": "box_image", "id": "annotation"})
        source = self.path.rpartition("/")[2]
        notes = [f"{source}: {count} {key} cannot be read" for key, count in self.num_bad.items() if count]
        if self.num_derived:
            notes.append(f"{source}: {self.num_derived} annotations have no bbox: the hull of their segmentation is taken")
        once = {"images": images.unique("image_id", keep="first", maintain_order=True)}
        once["annotations"] = annotations.unique("annotation", keep="first", maintain_order=True)
        for key, before in (("images", images.height), ("annotations", annotations.height)):
            if once[key].height < before:
                notes.append(f"{source}: {before - once[key].height} {key} have the id of another; the first stays")
        labels = {str(key): name for key, name in self.categories}
        return _Instances(once["images"], once["annotations"], labels, self.broken, notes)


def _read_instances(path: str, refs: pl.DataFrame) -> _Instances:
    targets = refs["targets"].explode().drop_nulls()
    collector = _Collector(path, set(refs["image_id"].to_list()), set(targets.to_list()))
    for block in read_arrays(path, {"images": CocoImage, "annotations": CocoAnnotation, "categories": CocoCategory}):
        collector.take(block)
    return collector.close()


# Plan


def plan_refs(config: SourceConfig, work_dir: Path, records_per_unit: int, kind: type[Row], targets_of: TargetsOf[Row]) -> SourcePlan:
    """Join refs and instances into one table in the work folder, and cut its images into units: ranges of its rows."""
    if not config.instances:
        raise AnnotationError(
            config.annotations,
            found="no `instances`",
            expected="the instances.json that holds the boxes",
            fix="Set `instances`. It comes with the refs; for gRefCOCO it is RefCOCO's, or COCO's instances_train2014.json.",
        )
    refs = read_wanted(config.annotations, config.split, kind, targets_of)
    instances = _read_instances(config.instances, refs.frame)
    table, rejected = _join(refs.frame, instances, config.annotations.rpartition("/")[2])
    if not table.height:
        first = (refs.rejected + rejected)[:1]
        raise AnnotationError(
            config.annotations,
            found=f"no ref that can be used ({first[0].position}: {first[0].detail})" if first else "no ref with a sentence",
            expected="refs whose annotations and images are in `instances`",
            fix=f"Is {config.instances} the file that belongs to these refs?",
        )
    work_dir.mkdir(parents=True, exist_ok=True)
    path = work_dir / TABLE_NAME
    with storage.atomic_write(path) as stream:
        # One batch, so that a unit is a slice.
        table.write_ipc(stream, compression="uncompressed", record_batch_size=table.height)
    numbers = table["image_index"].to_numpy()
    firsts = np.flatnonzero(np.diff(numbers, prepend=-1)).tolist()
    hashes = f"{storage.hash_file(config.annotations)} {storage.hash_file(config.instances)}"
    all_rejected = (*refs.rejected, *rejected)
    return SourcePlan(
        fingerprint=xxhash.xxh3_128_hexdigest(hashes.encode()),
        units=tuple(Unit(str(path), start, stop) for start, stop in pairwise([*firsts[::records_per_unit], table.height])),
        num_records=len(firsts) + len(all_rejected),
        notes=(*refs.notes, *instances.notes),
        rejected=all_rejected,
    )


def _join(refs: pl.DataFrame, instances: _Instances, source: str) -> tuple[pl.DataFrame, list[Rejected]]:
    """One row per ref and target (null for no target), by image; and the refs that lack a target: whole, for a part of "the two dogs" is
    none of it."""
    # No join keeps the order of its left side unless it is told to.
    joined = (
        refs.explode("targets")
        .rename({"targets": "annotation"})
        .join(instances.images, on="image_id", how="left", maintain_order="left")
        .join(instances.annotations, on="annotation", how="left", maintain_order="left")
        .with_columns(
            label=pl.col("category_id").replace_strict(instances.labels, default=None, return_dtype=pl.String),
            image_index=pl.col("ref").min().over("image_id"),
        )
    )
    is_box = pl.col("annotation").is_not_null()
    reason = (
        pl.when(pl.col("file_name").is_null())
        .then(pl.lit(UNKNOWN_IMAGE))
        .when(is_box & pl.col("broken").is_null())
        .then(pl.lit(UNKNOWN_ANNOTATION))
        .when(pl.col("broken"))
        .then(pl.lit(BROKEN_ANNOTATION))
        .when(is_box & (pl.col("box_image") != pl.col("image_id")))
        .then(pl.lit(OTHER_IMAGE))
        .when(is_box & pl.col("label").is_null())
        .then(pl.lit(UNKNOWN_CATEGORY))
    )
    judged = joined.with_columns(reason=reason)
    wrong = judged.filter(pl.col("reason").is_not_null()).unique("ref", keep="first", maintain_order=True)
    good = judged.filter(pl.col("reason").is_null().all().over("ref")).drop("reason", "category_id", "box_image", "broken")
    rejected = [
        Rejected(row["reason"], f"{source}, {row['name']}", _what_is_wrong(row, instances), row["name"], str(row["phrases"])[:2000])
        for row in wrong.iter_rows(named=True)
    ]
    return good.sort("image_index", "ref", maintain_order=True), rejected


def _what_is_wrong(row: dict[str, Any], instances: _Instances) -> str:
    annotation, image = row["annotation"], row["image_id"]
    details = {
        UNKNOWN_IMAGE: f"found image_id {image}, expected the id of an image in `instances`",
        UNKNOWN_ANNOTATION: f"found ann_id {annotation}, expected the id of an annotation in `instances`",
        BROKEN_ANNOTATION: f"found annotation {annotation} unreadable ({instances.broken.get(annotation)}), expected a box [x, y, w, h]",
        OTHER_IMAGE: f"found annotation {annotation} in image {row['box_image']}, expected it in image {image}",
        UNKNOWN_CATEGORY: f"found category_id {row['category_id']} of annotation {annotation}, expected one of {len(instances.labels)}",
    }
    return details[row["reason"]]


# Units


def read_refs_unit(config: SourceConfig, unit: Unit) -> Iterator[Record | Rejected]:
    """The images of a unit, in the order in which the refs first name them."""
    with pa.memory_map(unit.path) as file:
        rows = pl.from_arrow(pa.ipc.open_file(file).get_batch(0).slice(unit.start, unit.stop - unit.start))
    source = config.annotations.rpartition("/")[2]
    for _, of_image in groupby(cast(pl.DataFrame, rows).iter_rows(named=True), key=lambda row: row["image_index"]):
        yield from _image(config, source, list(of_image))


def _image(config: SourceConfig, source: str, rows: list[dict[str, Any]]) -> Iterator[Record | Rejected]:
    """The record of an image, from its refs and their targets."""
    image_id: str = rows[0]["image_id"]
    position = f"{source}, image {image_id}"
    if not rows[0]["file_name"]:
        yield Rejected(NO_FILE_NAME, position, "found neither file_name nor coco_url in `instances`, expected one of them", image_id)
        return
    meanings: dict[str, _Phrase] = {}
    for number, group in groupby(rows, key=lambda row: row["ref"]):
        of_ref = list(group)
        targets = frozenset(row["annotation"] for row in of_ref if row["annotation"] is not None)
        for phrase in of_ref[0]["phrases"]:
            # "Left man" and "left man" are the same words to whoever must answer them.
            meanings.setdefault(phrase.casefold(), _Phrase(phrase)).by_ref[number] = (of_ref[0]["name"], targets)
    phrases: dict[str, list[str]] = {row["annotation"]: [] for row in rows if row["annotation"] is not None}
    absent = []
    for meaning in meanings.values():
        targets, *others = {targets for _, targets in meaning.by_ref.values()}
        if others:
            yield Rejected(AMBIGUOUS_PHRASE, position, meaning.contradiction(), ", ".join(name for name, _ in meaning.by_ref.values()))
            continue
        for annotation in targets:
            phrases[annotation].append(meaning.text)
        if not targets:
            absent.append(meaning.text)
    boxes = {row["annotation"]: row for row in rows if row["annotation"] is not None}
    splits = {row["split"] for row in rows}
    yield Record(
        record_id=image_id,
        position=position,
        images=(ImageRef(rows[0]["file_name"], declared_pixels(rows[0]["image_width"]), declared_pixels(rows[0]["image_height"])),),
        regions=tuple(_region(boxes[annotation], texts) for annotation, texts in phrases.items()),
        absent=tuple(absent),
        # Only what somebody referred to has a box here: of no label are these all.
        not_exhaustive=tuple(dict.fromkeys(row["label"] for row in boxes.values())),
        language=config.language,
        split=splits.pop() if len(splits) == 1 else "",
    )


@dataclass
class _Phrase:
    """A phrase of one image, and the annotations that each ref means by it."""

    text: str
    by_ref: dict[int, tuple[str, frozenset[str]]] = field(default_factory=dict)
    """Number of the ref -> its name and the annotations; none where it means nothing in the image."""

    def contradiction(self) -> str:
        found = ", ".join(
            f"{' and '.join(annotation_name(target) for target in sorted(targets)) or 'nothing'} by {name}"
            for name, targets in self.by_ref.values()
        )
        return f"found {self.text!r} for {found}, expected one meaning in one image"


def _region(row: dict[str, Any], phrases: list[str]) -> Region:
    x, y = row["x"], row["y"]
    return Region(
        (x, y, x + row["width"], y + row["height"]),
        row["label"],
        tuple(phrases),
        is_crowd=row["iscrowd"],
        is_difficult=row["ignore"],
        region_id=annotation_name(row["annotation"]),
    )
