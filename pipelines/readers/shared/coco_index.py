"""COCO-shaped JSON of any size -> Arrow tables cut by image, joined out of core. Shared by COCO, LVIS and the captions.

    instances.json ──4 MB blocks──> annotations, 250,000 at a time ──polars: join, sort by image──> runs on disk
                                                                                                        |
    unit k = images k n .. (k + 1) n   <── the stretch of each run that belongs to them (memory-mapped) ┘

Memory is bounded by one run, whatever the size of the file. (One streaming join and sort of 20 million annotations in polars 2.1 takes
2.8 GB; in runs of 250,000 it stays near 0.2 GB.)
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import polars as pl
import pyarrow as pa

from boxcar.pipelines import storage
from boxcar.pipelines.readers.shared.coco_shapes import decode_shaped, hull_xywh
from boxcar.pipelines.readers.shared.json_blocks import BadElement, Block, decode_element, element_spans, read_arrays
from boxcar.schemas.errors import AnnotationError
from boxcar.schemas.record import Rejected

ANNOTATIONS_PER_RUN = 250_000
INDEX_NAME = "index.json"
MAX_LISTED = 10_000
"""Rows that are rejected one by one; more of them are counted in a note, for a file may hold ten million."""
KEYS_WINDOW_BYTES = 64 << 10
Id = int | str
Flag = bool | int | float | None
"""0 or 1 by the format; exporters also write true, 1.0 and null."""

Side = float | Annotated[str, msgspec.Meta(pattern=r"\A[0-9]{1,9}\Z")]
"""Width or height in pixels; some exporters write it as a string of digits."""

BROKEN_IMAGE = "broken_image_entry"
BROKEN_ANNOTATION = "broken_annotation"
UNKNOWN_IMAGE = "unknown_image"


class CocoImage(msgspec.Struct, gc=False):
    """One of `images`. LVIS has no file_name but a coco_url, and says what is verified absent or not exhaustive."""

    id: Id
    file_name: str = ""
    width: Side | None = None
    height: Side | None = None
    coco_url: str = ""
    neg_category_ids: list[Id] = []
    not_exhaustive_category_ids: list[Id] = []


def image_path(image: CocoImage) -> str:
    """The file name, or the folder and name at the end of coco_url; "" where there is neither."""
    return image.file_name or "/".join(image.coco_url.split("/")[-2:])


class CocoCategory(msgspec.Struct, gc=False):
    """One of `categories`."""

    id: Id
    name: str


class CocoAnnotation(msgspec.Struct, gc=False):
    """One of `annotations` of an instances file. bbox is [x, y, width, height], pixels, 0-based."""

    image_id: Id
    category_id: Id
    bbox: tuple[float, float, float, float]
    id: Id = ""
    iscrowd: Flag = 0
    ignore: Flag = 0


class _AnnotationKeys(msgspec.Struct):
    """What can still be read of a broken annotation."""

    image_id: Any = None
    category_id: Any = None
    id: Any = None


_KEYS_DECODER = msgspec.json.Decoder(list[_AnnotationKeys])


class CocoCaption(msgspec.Struct, gc=False):
    """One of `annotations` of a captions file."""

    image_id: Id
    caption: str


class CocoIndex(msgspec.Struct):
    """What `build_index` prepared; paths are in the index's own folder."""

    source_name: str
    """The file's name, for messages."""
    num_images: int
    categories: list[tuple[Id, str]]
    annotation_runs: list[str]
    caption_runs: list[str]
    duplicate_images: list[int]
    """Image numbers whose id stood before."""
    unused_categories: list[str] = []
    """Names of categories without a single annotation in the file."""
    is_labelled: bool = True
    """False: the file has images alone."""
    is_exhaustive: bool = True
    """False: an annotation could not be read at all, so any image may hold one object more, and no label is verified absent."""


@dataclass
class Problems:
    """What is wrong with rows of the file, found while indexing."""

    rejected: list[Rejected] = field(default_factory=list)
    num_unlisted: dict[tuple[str, str], int] = field(default_factory=dict)
    """(file, reason) -> how many rows beyond `MAX_LISTED`."""
    num_lost_captions: int = 0
    num_unplaced: int = 0
    """Annotations of which not even the image can be read."""

    num_derived: int = 0
    """Annotations without a bbox, whose box is the hull of their segmentation."""

    def bad(self, reason: str, source: str, element: BadElement, expected: str) -> None:
        if self._has_room(source, reason, 1):
            self.rejected.append(
                Rejected(reason, f"{source}, byte {element.offset}", f"found {element.error}, expected {expected}", "", element.text)
            )

    def dangling(self, source: str, frame: pl.DataFrame) -> None:
        """Annotations (id, image_id) of images that are not in the file."""
        room = self._has_room(source, UNKNOWN_IMAGE, frame.height)
        for annotation, image in frame.select("id", pl.col("image_id").cast(pl.String)).head(room).iter_rows():
            name = annotation_name(annotation)
            detail = f"found image_id {image}, expected the id of an image"
            self.rejected.append(Rejected(UNKNOWN_IMAGE, f"{source}, {name}", detail, name))

    def _has_room(self, source: str, reason: str, count: int) -> int:
        """How many of these rows may still be listed; the others are counted."""
        room = min(max(MAX_LISTED - len(self.rejected), 0), count)
        if room < count:
            self.num_unlisted[source, reason] = self.num_unlisted.get((source, reason), 0) + count - room
        return room

    def notes(self) -> list[str]:
        notes = [f"{source}: {count} more rows rejected as {reason}" for (source, reason), count in self.num_unlisted.items()]
        if self.num_lost_captions:
            notes.append(f"{self.num_lost_captions} captions belong to images that are not among the images")
        if self.num_derived:
            notes.append(f"{self.num_derived} annotations have no bbox: the hull of their segmentation is taken")
        if self.num_unplaced:
            notes.append(
                f"{self.num_unplaced} annotations cannot be read at all, so that any image may hold an object without a box: no category "
                "is taken as absent"
            )
        return notes


def annotation_name(annotation_id: str) -> str:
    return f"annotation {annotation_id}" if annotation_id else "annotation without id"


def _id_series(name: str, values: list[Id]) -> pl.Series:
    """Ids as Int64, or as text where any is text or needs more than 64 bits (unsigned hashes)."""
    if all(type(value) is int and -(2**63) <= value < 2**63 for value in values):
        return pl.Series(name, values, dtype=pl.Int64)
    return pl.Series(name, [str(value) for value in values], dtype=pl.String)


def _same_type(left: pl.DataFrame, right: pl.DataFrame, key: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    if left.schema[key] == right.schema[key]:
        return left, right
    return left.with_columns(pl.col(key).cast(pl.String)), right.with_columns(pl.col(key).cast(pl.String))


def side_px(side: Side | None) -> float | None:
    return float(side) if isinstance(side, str) else side


def _sides_px(sides: list[Side | None]) -> pa.DoubleArray:
    """A column of widths or heights; it is converted one by one only where one of them is a string."""
    return pa.array(list(map(side_px, sides)) if str in set(map(type, sides)) else sides, pa.float64())


class _Images:
    """The images of a file: written to disk block by block, with only their ids in memory."""

    SCHEMA = pa.schema(
        [
            pa.field("id", pa.string()),
            pa.field("file_name", pa.string()),
            pa.field("width", pa.float64()),
            pa.field("height", pa.float64()),
            pa.field("negative", pa.list_(pa.string())),
            pa.field("not_exhaustive", pa.list_(pa.string())),
        ]
    )

    def __init__(self, path: Path) -> None:
        self._writer = pa.ipc.new_file(str(path), self.SCHEMA)
        self._ids: list[pl.Series] = []

    def add(self, images: list[CocoImage]) -> None:
        if not images:
            return
        self._ids.append(_id_series("image_id", [image.id for image in images]))
        columns = [
            pa.array([str(image.id) for image in images]),
            pa.array([image_path(image) for image in images], pa.string()),
            _sides_px([image.width for image in images]),
            _sides_px([image.height for image in images]),
            pa.array([list(map(str, image.neg_category_ids)) for image in images], pa.list_(pa.string())),
            pa.array([list(map(str, image.not_exhaustive_category_ids)) for image in images], pa.list_(pa.string())),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=self.SCHEMA))

    def close(self) -> tuple[pl.DataFrame, list[int]]:
        """(image_id, image_index) of the first image of each id, and the numbers of the others."""
        self._writer.close()
        if any(series.dtype == pl.String for series in self._ids):
            self._ids = [series.cast(pl.String) for series in self._ids]
        ids = pl.concat(self._ids) if self._ids else pl.Series("image_id", [], dtype=pl.Int64)
        frame = pl.DataFrame({"image_id": ids}).with_row_index("image_index").with_columns(pl.col("image_index").cast(pl.Int64))
        first = frame["image_id"].is_first_distinct()
        return frame.filter(first), frame.filter(~first)["image_index"].to_list()


class _RunWriter:
    """Collects rows with an image_id, and writes them ANNOTATIONS_PER_RUN at a time, joined with the images and sorted by them."""

    def __init__(self, stem: Path, images: pl.DataFrame, on_dangling: Callable[[pl.DataFrame], None]) -> None:
        self.stem, self.images, self.on_dangling = stem, images, on_dangling
        self.names: list[str] = []
        self.num_rows = 0
        self.used_categories: set[str] = set()
        self._parts: list[pl.DataFrame] = []
        self._pending = 0

    def add(self, frame: pl.DataFrame) -> None:
        numbered = frame.with_columns(row=pl.int_range(self.num_rows, self.num_rows + frame.height, dtype=pl.Int64, eager=True))
        self.num_rows += frame.height
        if "category_id" in frame.columns:
            self.used_categories.update(frame["category_id"].unique())
        self._parts.append(numbered)
        self._pending += frame.height
        if self._pending >= ANNOTATIONS_PER_RUN:
            self.flush()

    def flush(self) -> None:
        if not self._pending:
            return
        if any(part.schema["image_id"] == pl.String for part in self._parts):
            self._parts = [part.with_columns(pl.col("image_id").cast(pl.String)) for part in self._parts]
        left, right = _same_type(pl.concat(self._parts), self.images, "image_id")
        self._parts, self._pending = [], 0
        # First the few images of this run, by a hash of the run: a hash of all images would be built anew for every run.
        here = right.join(left.select("image_id").unique(), on="image_id", how="semi")
        joined = left.join(here, on="image_id", how="left", maintain_order="left")
        dangling = joined.filter(pl.col("image_index").is_null())
        if dangling.height:
            self.on_dangling(dangling)
        run = joined.filter(pl.col("image_index").is_not_null()).drop("image_id").sort("image_index", "row")
        name = f"{self.stem.name}-{len(self.names):05d}.arrow"
        run.write_ipc(self.stem.with_name(name), compression="uncompressed", record_batch_size=max(run.height, 1))
        self.names.append(name)


def build_index(path: str, captions_path: str | None, folder: Path, *, with_regions: bool = True) -> tuple[CocoIndex, Problems]:
    """Read the file (and its captions) once, and write images and runs into `folder`; twice where annotations stand before images.

    Raises AnnotationError where the file is broken as a whole, or holds no images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    build = _Build(path, folder, with_regions=with_regions)
    for block in read_arrays(path, {"images": CocoImage, "annotations": build.annotation_type, "categories": CocoCategory}):
        build.take(block)
    is_labelled = not with_regions or build.num_annotations > 0 or ("annotations" in build.seen and bool(build.categories))
    if is_labelled:
        check_keys(path, build.seen, ["images", "annotations", "categories"] if with_regions else ["images", "annotations"])
        if with_regions:
            check_categories(path, build.categories)
    else:
        check_keys(path, build.seen, ["images"])
    if build.too_early:
        for block in read_arrays(path, {"annotations": build.annotation_type}):
            build.add_annotations(build.writer, block)
    build.writer.flush()
    if not build.num_images:
        broken = next((item for item in build.problems.rejected if item.reason == BROKEN_IMAGE), None)
        found = f'nothing readable in the list "images" ({broken.position}: {broken.detail})' if broken else 'an empty list "images"'
        raise AnnotationError(path, found=found, expected="one image at least")
    names = build.writer.names
    index = CocoIndex(
        source_name=build.source,
        num_images=build.num_images,
        categories=build.categories,
        annotation_runs=names if with_regions else [],
        caption_runs=names if not with_regions else [],
        duplicate_images=build.duplicates,
        unused_categories=[name for key, name in build.categories if str(key) not in build.writer.used_categories],
        is_exhaustive=is_labelled and build.problems.num_unplaced == 0,
        is_labelled=is_labelled,
    )
    if captions_path is not None:
        index.caption_runs = _index_captions(captions_path, build)
    with storage.atomic_write(folder / INDEX_NAME) as stream:
        stream.write(msgspec.json.encode(index))
    return index, build.problems


class _Build:
    """The state of one pass over a file."""

    def __init__(self, path: str, folder: Path, *, with_regions: bool) -> None:
        self.path, self.folder, self.with_regions = path, folder, with_regions
        self.source = path.rpartition("/")[2]
        self.problems = Problems()
        self.categories: list[tuple[Id, str]] = []
        self.seen: set[str] = set()
        self.num_annotations = 0
        self.too_early = False
        """Annotations stood before the images: a second pass must read them."""
        self._images = _Images(folder / "images.arrow")
        self._writer: _RunWriter | None = None
        self.image_ids = pl.DataFrame()
        self.duplicates: list[int] = []

    @property
    def annotation_type(self) -> type[Any]:
        return CocoAnnotation if self.with_regions else CocoCaption

    @property
    def num_images(self) -> int:
        return self.image_ids.height + len(self.duplicates)

    @property
    def writer(self) -> "_RunWriter":
        """The writer of annotations. The first use closes the images: all of them must have been read."""
        if self._writer is None:
            self.image_ids, self.duplicates = self._images.close()
            self._writer = _run_writer(self.folder, self.source, self.image_ids, self.problems, with_regions=self.with_regions)
        return self._writer

    def take(self, block: Block[Any]) -> None:
        self.seen.add(block.key)
        if block.key == "annotations":
            self.num_annotations += len(block.items) + len(block.bad)
        if block.key == "images":
            if self._writer is not None:
                raise AnnotationError(self.path, found='the key "images" again', expected="it once", fix="Join the two lists.")
            self._images.add(block.items)
            for bad in block.bad:
                self.problems.bad(BROKEN_IMAGE, self.source, bad, '{"id", "file_name", "width", "height"}')
        elif block.key == "categories":
            self.categories += read_categories(self.path, block)
        elif self.too_early or "images" not in self.seen:
            self.too_early = True
        else:
            self.add_annotations(self.writer, block)

    def add_annotations(self, writer: "_RunWriter", block: Block[Any]) -> None:
        _add_annotations(writer, block, self.path, self.problems, with_regions=self.with_regions)


def check_keys(path: str, seen: set[str], wanted: list[str]) -> None:
    """Raises AnnotationError where a list is missing."""
    if missing := [key for key in wanted if key not in seen]:
        expected = f"a COCO file with {', '.join(wanted)}"
        raise AnnotationError(path, found=f"no key {', '.join(map(repr, missing))}", expected=expected, fix="Check `reader`.")


def read_categories(path: str, block: Block[CocoCategory]) -> list[tuple[Id, str]]:
    """(id, name) of a block. Raises AnnotationError: without its category, a thousand boxes have no label."""
    expected = 'a category {"id", "name"}'
    if block.bad:
        raise AnnotationError(f"{path}, byte {block.bad[0].offset}", found=block.bad[0].error, expected=expected)
    categories = [(category.id, category.name.strip()) for category in block.items]
    for key, name in categories:
        if not name:
            raise AnnotationError(path, found=f"category {key} without a name", expected=expected)
    return categories


def check_categories(path: str, categories: list[tuple[Id, str]]) -> None:
    """Raises AnnotationError where there are none, or where one id has two names: nobody knows which is meant."""
    if not categories:
        raise AnnotationError(path, found='an empty list "categories"', expected="one category at least")
    names: dict[str, str] = {}
    for key, name in categories:
        if (first := names.setdefault(str(key), name)) != name:
            raise AnnotationError(path, found=f"category {key} twice: {first!r} and {name!r}", expected="each id once", fix="Renumber one.")


def _run_writer(folder: Path, source: str, image_ids: pl.DataFrame, problems: Problems, *, with_regions: bool) -> _RunWriter:
    def dangling(frame: pl.DataFrame) -> None:
        problems.dangling(source, frame.filter(~pl.col("broken")))  # a broken one was rejected as such

    def no_caption(frame: pl.DataFrame) -> None:
        problems.num_lost_captions += frame.height

    return _RunWriter(folder / ("regions" if with_regions else "captions"), image_ids, dangling if with_regions else no_caption)


def _index_captions(path: str, build: _Build) -> list[str]:
    source = path.rpartition("/")[2]
    writer = _run_writer(build.folder, source, build.image_ids, build.problems, with_regions=False)
    seen = False
    for block in read_arrays(path, {"annotations": CocoCaption}):
        seen = True
        _add_annotations(writer, block, path, build.problems, with_regions=False)
    if not seen:
        raise AnnotationError(path, found="no key 'annotations'", expected="a COCO captions file")
    writer.flush()
    return writer.names


def _add_annotations(writer: _RunWriter, block: Block[Any], path: str, problems: Problems, *, with_regions: bool) -> None:
    source = path.rpartition("/")[2]
    if block.items:
        writer.add(region_frame(block.items) if with_regions else _caption_frame(block.items))
    derived = []
    for bad in block.bad:
        if with_regions and '"segments_info"' in bad.text:
            raise AnnotationError(
                path,
                found="panoptic annotations (segments_info, with masks in PNG files)",
                expected="instances with a bbox",
                fix="Name the instances file of the same images, such as instances_val2017.json.",
            )
        if with_regions and (annotation := annotation_of_shape(path, bad)):
            derived.append(annotation)
            continue
        expected = '{"image_id", "category_id", "bbox": [x, y, width, height]}' if with_regions else '{"image_id", "caption"}'
        problems.bad(BROKEN_ANNOTATION, source, bad, expected)
        if with_regions:
            if annotation := broken_annotation(path, bad):
                # Its box cannot be read, but its label is now incomplete in that image: the row says so.
                writer.add(region_frame([annotation], broken=True))
            else:
                problems.num_unplaced += 1
    if derived:
        problems.num_derived += len(derived)
        writer.add(region_frame(derived))


def broken_annotation(path: str, bad: BadElement) -> CocoAnnotation | None:
    """What can still be read of a bad element: its image, and its id and category ("" where not); None where not even the image can."""
    keys = _keys_of(bad.text) or _keys_of(_read_element(path, bad.offset))
    if keys is None or (image_id := _readable_id(keys.image_id)) is None:
        return None
    category, annotation = _readable_id(keys.category_id), _readable_id(keys.id)
    return CocoAnnotation(image_id, "" if category is None else category, (0.0,) * 4, "" if annotation is None else annotation)


def annotation_of_shape(path: str, bad: BadElement) -> CocoAnnotation | None:
    """The annotation of a bad element that lacks nothing but its box, with the hull of its segmentation as box; None where it is worse."""
    shaped = decode_shaped(bad.text) or decode_shaped(_read_element(path, bad.offset))
    box = hull_xywh(shaped.segmentation) if shaped else None
    if shaped is None or box is None:
        return None
    return CocoAnnotation(shaped.image_id, shaped.category_id, box, shaped.id, shaped.iscrowd, shaped.ignore)


def _keys_of(text: str) -> _AnnotationKeys | None:
    try:
        return decode_element(text.encode(), _KEYS_DECODER)[0]
    except msgspec.DecodeError:
        return None


def _read_element(path: str, offset: int) -> str:
    """The whole element that starts at this byte. A BadElement keeps only its beginning, and COCO writes the ids behind a long polygon."""
    with storage.open_input(path) as stream:
        stream.seek(offset)
        window: bytes = stream.read(KEYS_WINDOW_BYTES)
        while not (spans := element_spans(window)[0]) and (more := stream.read(len(window))):
            window += more
    return (window[slice(*spans[0])] if spans else window).decode(errors="replace")


def _readable_id(value: object) -> Id | None:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def region_frame(annotations: list[CocoAnnotation], *, broken: bool = False) -> pl.DataFrame:
    """One row per annotation. broken: its box could not be read, and is 0."""
    boxes = np.fromiter(chain.from_iterable([item.bbox for item in annotations]), np.float64, 4 * len(annotations)).reshape(-1, 4)
    return pl.DataFrame(
        {
            "image_id": _id_series("image_id", [item.image_id for item in annotations]),
            "id": pl.Series([str(item.id) for item in annotations], dtype=pl.String),
            "category_id": pl.Series([str(item.category_id) for item in annotations], dtype=pl.String),
            "x": boxes[:, 0],
            "y": boxes[:, 1],
            "width": boxes[:, 2],
            "height": boxes[:, 3],
            "iscrowd": pl.Series([bool(item.iscrowd) for item in annotations], dtype=pl.Boolean),
            "ignore": pl.Series([bool(item.ignore) for item in annotations], dtype=pl.Boolean),
            "broken": pl.Series([broken] * len(annotations), dtype=pl.Boolean),
        }
    )


def _caption_frame(captions: list[CocoCaption]) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "image_id": _id_series("image_id", [item.image_id for item in captions]),
            "caption": pl.Series([item.caption for item in captions], dtype=pl.String),
        }
    )
