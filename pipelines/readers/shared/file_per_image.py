"""Formats of one annotation file per image: list the files once, cut the listing into units, read a unit file by file.

    folder --write_listing()--> files-<fingerprint>.arrow, Units --read_records(parse)--> Record | Rejected, one by one

The listing is an Arrow file: a unit maps its own rows and no others, and no file name (tab, newline, CJK) can break it. Every path in it is
relative to the folder of the annotations, so a data set may move without changing its fingerprint. What a reader found out about the whole
source (class names, the number of the first pixel) travels in the listing's metadata as JSON.

A parser says `raise Refused(reason, detail)` for a file that it cannot understand; that file becomes one `Rejected` and the rest goes on.
"""

import os
import posixpath
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import pyarrow as pa
import pyarrow.fs as pafs

from boxcar.pipelines.readers.reader import Refused, Unit
from boxcar.pipelines.storage import atomic_write, fingerprint_listing, is_uri, join, list_files, local_path, read_bytes, resolve
from boxcar.schemas.errors import AnnotationError
from boxcar.schemas.record import Record, Rejected

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".jfif", ".mpo", ".jp2", ".avif", ".heic")
ROWS_PER_BATCH = 4096
SOURCE_TEXT_CHARS = 2000
UTF8_BOM = b"\xef\xbb\xbf"

_SCHEMA = pa.schema([("record_id", pa.string()), ("annotation", pa.string()), ("image", pa.string())])

Settings = TypeVar("Settings", bound=msgspec.Struct)


class ListedFile(msgspec.Struct, frozen=True, gc=False):
    """One row of the listing."""

    record_id: str
    annotation: str
    """Relative to the folder of the annotations."""
    image: str
    """What the record's ImageRef says; "" where only the annotation file knows it."""
    num_bytes: int = 0
    """Size of the annotation file. Part of the fingerprint; not stored."""


def path_type(path: str) -> pafs.FileType:
    filesystem, inner = resolve(path)
    return filesystem.get_file_info(inner).type


def is_folder(path: str) -> bool:
    return bool(path_type(path) == pafs.FileType.Directory)


def is_file(path: str) -> bool:
    return bool(path_type(path) == pafs.FileType.File)


def normal_path(path: str) -> str:
    """A path or URI without `.` and `..`, absolute: object stores take no `..`."""
    local = local_path(path)
    if local is not None:
        return os.path.abspath(local)
    scheme, _, rest = path.partition("://")
    return f"{scheme}://{posixpath.normpath(rest)}"


def relative_path(path: str, folder: str) -> str:
    """`path` as seen from `folder`, with `..` where it lies beside it; unchanged where the two are on different file systems."""
    path, folder = normal_path(path), normal_path(folder)
    return posixpath.relpath(path, folder) if _host(path) == _host(folder) else path


def _host(path: str) -> str:
    return "/".join(path.split("/")[:3]) if is_uri(path) else ""


def without_hidden(files: list[tuple[str, int]], notes: list[str]) -> list[tuple[str, int]]:
    """Leave out `.ipynb_checkpoints/` copies, macOS `._name` twins and the like: they repeat other files or hold no annotation."""
    seen = [(name, size) for name, size in files if not name.startswith(".") and "/." not in name]
    if len(seen) < len(files):
        notes.append(f"{len(files) - len(seen)} hidden files (a name or folder that begins with a dot) are not read")
    return seen


def list_annotations(folder: str, suffix: str, notes: list[str], *, fix: str) -> list[tuple[str, int]]:
    """(path relative to the folder, bytes) of its annotation files, sorted. Raises AnnotationError with this `fix` where there is none."""
    files = without_hidden(list_files(folder, (suffix,)), notes)
    if not files:
        others: dict[str, int] = {}
        for name, _ in list_files(folder, ()):
            ending = posixpath.splitext(name)[1].lower() or "no suffix"
            others[ending] = others.get(ending, 0) + 1
        found = ", ".join(f"{count} x {ending}" for ending, count in sorted(others.items())[:8]) or "nothing"
        raise AnnotationError(folder, found=f"a folder with {found}", expected=f"at least one {suffix} file", fix=fix)
    return files


def image_stem(name: str) -> str:
    """The name without the suffix of an image format; any other suffix ("IMG.2020") belongs to the name."""
    stem, suffix = posixpath.splitext(name)
    return stem if suffix.lower() in IMAGE_SUFFIXES else name


class ImageNames(dict[str, str]):
    """The images of a folder: path relative to it without suffix -> with suffix."""

    def find(self, stem: str) -> str | None:
        """The image of a stem, if there is one, in any of Unicode's forms: archives made by macOS hold u and a combining mark where the
        annotations have one letter."""
        if stem in self or stem.isascii():
            return self.get(stem)
        return self.get(unicodedata.normalize("NFC", stem)) or self.get(unicodedata.normalize("NFD", stem))


def list_images(folder: str, notes: list[str]) -> ImageNames:
    """The images of a folder. One listing is cheaper than asking the disk for every annotation file."""
    images = ImageNames()
    num_twins = 0
    for name, _ in without_hidden(list_files(folder, IMAGE_SUFFIXES), []):
        first = images.setdefault(image_stem(name), name)
        num_twins += first is not name
    if num_twins:
        notes.append(
            f"{num_twins} images of {folder} differ from another in the suffix alone; the first by name is read, the others are not"
        )
    return images


def write_listing(
    work_dir: Path, files: Sequence[ListedFile], settings: msgspec.Struct, records_per_unit: int
) -> tuple[str, tuple[Unit, ...]]:
    """Store the listing in the work folder. Returns its fingerprint (settings, names and sizes) and the units: ranges of its rows."""
    encoded = msgspec.json.encode(settings)
    rows = [(f"{file.record_id}\0{file.annotation}\0{file.image}", file.num_bytes) for file in files]
    fingerprint = fingerprint_listing([(encoded.decode(), len(encoded)), *rows])
    work_dir.mkdir(parents=True, exist_ok=True)
    path = work_dir / f"files-{fingerprint}.arrow"
    schema = _SCHEMA.with_metadata({"settings": encoded})
    with atomic_write(path) as stream, pa.ipc.new_file(stream, schema) as writer:
        for start in range(0, len(files), ROWS_PER_BATCH):
            part = files[start : start + ROWS_PER_BATCH]
            columns = [[file.record_id for file in part], [file.annotation for file in part], [file.image for file in part]]
            writer.write_batch(pa.record_batch([pa.array(column, pa.string()) for column in columns], schema=schema))
    ends = [*range(records_per_unit, len(files), records_per_unit), len(files)]
    return fingerprint, tuple(Unit(str(path), start, stop) for start, stop in zip([0, *ends], ends, strict=False) if start < stop)


def read_settings(unit: Unit, kind: type[Settings]) -> Settings:
    with pa.memory_map(unit.path) as source:
        return msgspec.json.decode(pa.ipc.open_file(source).schema.metadata[b"settings"], type=kind)


def read_file(path: str) -> bytes:
    """The bytes of one annotation file. Raises Refused where a local file cannot be read.

    A remote error is raised as it is: the network may mend itself, and a retry must not find another set of records.
    """
    try:
        return read_bytes(path)
    except (AnnotationError, OSError) as error:
        if is_uri(path):
            raise
        raise Refused("unreadable_file", str(error)) from error


def read_records(unit: Unit, folder: str, parse: Callable[[ListedFile, bytes], Record]) -> Iterator[Record | Rejected]:
    """The unit's files below `folder`, each as its record or its rejection."""
    for file in _rows(unit):
        data = b""
        result: Record | Rejected
        try:
            data = read_file(normal_path(join(folder, file.annotation)))
            result = parse(file, data)
        except Refused as refused:
            result = Rejected(
                reason=refused.reason,
                position=file.annotation,
                detail=refused.detail,
                record_id=file.record_id,
                source_text=data[: 4 * SOURCE_TEXT_CHARS].decode("utf-8", "replace")[:SOURCE_TEXT_CHARS],
            )
        yield result


def _rows(unit: Unit) -> Iterator[ListedFile]:
    with pa.memory_map(unit.path) as source:
        reader = pa.ipc.open_file(source)
        for number in range(unit.start // ROWS_PER_BATCH, -(-unit.stop // ROWS_PER_BATCH)):
            first = number * ROWS_PER_BATCH
            offset = max(unit.start - first, 0)
            batch = reader.get_batch(number).slice(offset, min(unit.stop - first, ROWS_PER_BATCH) - offset)
            for record_id, annotation, image in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                yield ListedFile(record_id, annotation, image)
