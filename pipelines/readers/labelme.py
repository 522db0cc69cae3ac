r"""LabelMe JSON: one file per image, shapes drawn by hand.

    what        in the file                                  in the record
    points      pixels from 0, continuous, any corner first  xyxy, pixels, 0-based, half-open: least and greatest x and y
    size        imageWidth, imageHeight                      declared_width, declared_height; None where 0, null or missing
    image       imagePath, relative to the JSON file         path below `images`, or relative to `annotations`

    shape_type                              box
    rectangle (2 or 4 points), rotation     least and greatest coordinates; LabelMe draws from any corner, so no order is a fault
    polygon, linestrip                      bounding box
    circle                                  centre and a point on the rim: centre -+ radius
    mask                                    its two corners are pixel numbers, the last one included: + 1
    point, points, line                     none

Traps, and what is done:
- a shape without a box says that there is an object which no box shows: its label goes to `not_exhaustive`, so that nobody asks for all
  of them.
- shapes of one label and one `group_id` are the parts of one object (wkentaro/labelme#714): one region around them.
- imagePath from Windows (`..\images\a.jpg`, `C:\data\a.jpg`): slashes are turned, and of a path with a drive or a host, which means
  nothing here, the name remains, beside the JSON file. Where `images` is set and the path does not lead below it, the image is looked for
  there, under the JSON file's own subfolder and the image's name. Other absolute paths and URIs stay.
- imageData holds the image itself in base64: skipped by the decoder. An image that is only there (imagePath null) is rejected.
- LabelMe shows images upright (EXIF) and writes their upright size: passed on as declared, a later step compares it with the file.
- the old LabelMe's XML, which datumaro calls `label_me`, is another format: an error that says so.
- files without shape_type (before 2018) hold polygons. `flags` are ignored; X-AnyLabeling's `difficult` is kept.

Labels are an open vocabulary, for nobody promises that all of them were drawn everywhere. With `exhaustive: true` the vocabulary is that of
the whole folder, at the price of one more pass.

Reasons of rejection: broken_json, not_labelme, bad_shape, missing_image, unreadable_file.
"""

import math
import posixpath
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec

from boxcar.pipelines.readers.reader import COMMON_KEYS, Refused, SourcePlan, Unit
from boxcar.pipelines.readers.shared.file_per_image import (
    UTF8_BOM,
    ListedFile,
    list_annotations,
    read_file,
    read_records,
    read_settings,
    relative_path,
    write_listing,
)
from boxcar.pipelines.storage import is_uri, join
from boxcar.schemas.record import Box, ImageRef, Record, Region, Rejected
from boxcar.schemas.workflow import SourceConfig

_FIX = (
    "LabelMe JSON is one .json file per image. XML files are the old LabelMe's format (datumaro's `label_me`) or Pascal VOC: "
    "read VOC with `reader: voc`, convert the old one with datumaro to VOC or COCO."
)
_NO_BOX = frozenset({"point", "points", "line"})
_NUM_POINTS = {
    "rectangle": (2, 4),
    "rotation": (4, 4),
    "circle": (2, 2),
    "mask": (2, 2),
    "polygon": (3, None),
    "linestrip": (2, None),
}
"""Least and greatest number of points of the shapes that have a box."""
_OTHER_MACHINE = re.compile(r"[A-Za-z]:/|//")


class _Settings(msgspec.Struct, frozen=True):
    vocabulary: tuple[str, ...]


class _Shape(msgspec.Struct):
    label: str
    points: list[tuple[float, float]]
    shape_type: str | None = None
    group_id: int | float | str | None = None
    difficult: bool | None = None


class _File(msgspec.Struct, rename={"image_path": "imagePath", "image_width": "imageWidth", "image_height": "imageHeight"}):
    """The fields that are read; all others, imageData among them, are skipped without being decoded."""

    shapes: list[_Shape]
    image_path: str | None = None
    image_width: float | None = None
    image_height: float | None = None


class _Outline(msgspec.Struct, rename={"image_path": "imagePath", "image_width": "imageWidth", "image_height": "imageHeight"}):
    """A `_File` whose shapes are not checked: where it decodes and `_File` does not, a shape is at fault."""

    shapes: list[msgspec.Raw]
    image_path: str | None = None
    image_width: float | None = None
    image_height: float | None = None


class LabelmeReader:
    name = "labelme"
    uses = COMMON_KEYS | {"exhaustive"}

    def plan(self, config: SourceConfig, work_dir: Path, records_per_unit: int) -> SourcePlan:
        notes: list[str] = []
        listed = list_annotations(config.annotations, ".json", notes, fix=_FIX)
        labels: set[str] = set()
        if config.exhaustive:
            for name, _ in listed:
                try:
                    labels.update(shape.label.strip() for shape in _decode(read_file(join(config.annotations, name))).shapes)
                except Refused:
                    continue  # said, and counted, when its unit is read
            labels.discard("")
        files = [ListedFile(name[: -len(".json")], name, "", num_bytes) for name, num_bytes in listed]
        fingerprint, units = write_listing(work_dir, files, _Settings(tuple(sorted(labels))), records_per_unit)
        return SourcePlan(fingerprint, units, len(files), tuple(notes))

    def read(self, config: SourceConfig, unit: Unit) -> Iterator[Record | Rejected]:
        return read_records(unit, config.annotations, partial(_record, config, read_settings(unit, _Settings)))


def _decode(data: bytes) -> _File:
    try:
        return msgspec.json.decode(data.removeprefix(UTF8_BOM), type=_File)
    except msgspec.ValidationError as error:
        reason = "bad_shape" if _is_labelme(data) else "not_labelme"
        raise Refused(reason, f"found another structure ({error}), expected LabelMe's shapes with label and points") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused("broken_json", f"found {error}, expected JSON in UTF-8") from error


def _is_labelme(data: bytes) -> bool:
    """Whether everything but the shapes themselves has LabelMe's structure. data: JSON."""
    try:
        msgspec.json.decode(data.removeprefix(UTF8_BOM), type=_Outline)
    except msgspec.ValidationError:
        return False
    return True


def _record(config: SourceConfig, settings: _Settings, file: ListedFile, data: bytes) -> Record:
    content = _decode(data)
    if not content.image_path:
        raise Refused("missing_image", "found no imagePath, expected the image's path relative to this file")
    path = _image_path(config, file.annotation, content.image_path)
    image = ImageRef(path, _size(content.image_width), _size(content.image_height))
    regions: dict[tuple[str, str], Region] = {}
    not_exhaustive: dict[str, None] = {}
    for number, shape in enumerate(content.shapes, 1):
        label, where = shape.label.strip(), f"shape {number}"
        if not label:
            raise Refused("bad_shape", f"{where}: found an empty label, expected a category name")
        if shape.shape_type in _NO_BOX:
            not_exhaustive[label] = None
            continue
        region = Region(_box(shape, f"{where} ({label})"), label, is_difficult=bool(shape.difficult), region_id=where)
        key = (label, where if shape.group_id is None else f"group {shape.group_id}")
        regions[key] = _merged(regions[key], region) if key in regions else region
    return Record(
        record_id=file.record_id,
        position=file.annotation,
        images=(image,),
        regions=tuple(regions.values()),
        # A label with a point alone is in the image, so it must not be in a vocabulary in which no region means absent.
        vocabulary=tuple(label for label in settings.vocabulary if label not in not_exhaustive),
        not_exhaustive=tuple(not_exhaustive),
        language=config.language,
        split=config.split,
    )


def _merged(first: Region, other: Region) -> Region:
    (a0, b0, a1, b1), (c0, d0, c1, d1) = first.box, other.box
    return Region(
        (min(a0, c0), min(b0, d0), max(a1, c1), max(b1, d1)),
        first.label,
        is_difficult=first.is_difficult and other.is_difficult,
        region_id=f"{first.region_id} and {other.region_id.removeprefix('shape ')}",
    )


def _box(shape: _Shape, where: str) -> Box:
    kind = shape.shape_type or "polygon"
    if kind not in _NUM_POINTS:
        raise Refused("bad_shape", f"{where}: found shape_type {kind!r}, expected one of {', '.join([*_NUM_POINTS, *sorted(_NO_BOX)])}")
    least, greatest = _NUM_POINTS[kind]
    points = shape.points
    if len(points) < least or (greatest and len(points) > greatest):
        expected = f"{least}" if greatest == least else f"{least} to {greatest}" if greatest else f"at least {least}"
        raise Refused("bad_shape", f"{where}: found {len(points)} points in a {kind}, expected {expected}")
    if kind == "circle":
        (cx, cy), rim = points
        radius = math.dist((cx, cy), rim)
        return (cx - radius, cy - radius, cx + radius, cy + radius)
    last = 1 if kind == "mask" else 0
    xs, ys = zip(*points, strict=True)
    return (min(xs), min(ys), max(xs) + last, max(ys) + last)


def _size(number: float | None) -> int | None:
    return int(number) if number and number >= 1 else None


def _image_path(config: SourceConfig, annotation: str, image_path: str) -> str:
    """The image as its ImageRef names it: relative to `images` where that is set, else to the folder of the annotations."""
    path = image_path.replace("\\", "/") if not is_uri(image_path) else image_path
    if _OTHER_MACHINE.match(path):
        path = posixpath.basename(path)
    folder = posixpath.dirname(annotation)
    full = join(folder, path)
    if is_uri(full) or posixpath.isabs(full):
        return full
    if not config.images:
        return posixpath.normpath(full)
    below = relative_path(join(config.annotations, full), config.images)
    return below if not below.startswith("../") and not is_uri(below) else join(folder, posixpath.basename(path))
