"""Image shards: the images of a unit's rows as bytes, once for each distinct content, in files of their own.

Converting again for another family, cutoff or resolution rewrites only the rows where the images are stored as they came (`embed`).
`embed_resized` stores what the model sees, as PNG, so that training neither decodes large photographs nor resizes.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from boxcar.pipelines import storage
from boxcar.pipelines.boxes.rules import References
from boxcar.pipelines.images.image_file import ImageHeader, decode_image, encode_png, resize_image
from boxcar.pipelines.rows.encode import EmbeddedImages, Sized
from boxcar.pipelines.shards.arrow_files import write_batches
from boxcar.schemas.manifest import FileEntry
from boxcar.schemas.row import IMAGE_SHARD_SCHEMA

IMAGES_PER_BATCH = 32


def embed_images(
    path: Path, shard: int, images_root: str, references: References, sized: Sized, records: Sequence[int], *, resized: bool
) -> tuple[EmbeddedImages, FileEntry]:
    """Write the images of these records. `records`: rows of the unit's records, ascending."""
    rows = np.full(len(references.paths), -1, np.int64)
    wanted = [row for record in records for row in range(references.offsets[record], references.offsets[record + 1])]
    entry = write_batches(path, IMAGE_SHARD_SCHEMA, _batches(_distinct(wanted, rows, images_root, references, sized, resized=resized)))
    return EmbeddedImages(shard, rows), entry


def _distinct(
    wanted: Sequence[int],
    rows: npt.NDArray[np.int64],
    images_root: str,
    references: References,
    sized: Sized,
    *,
    resized: bool,
) -> Iterator[dict[str, object]]:
    """One entry for each distinct image; fills `rows` with the entry's number on the way."""
    numbers: dict[tuple[str, int, int], int] = {}
    """(content hash, resized size) -> entry."""
    known_paths: dict[tuple[str, int, int], int] = {}
    for row in wanted:
        header = references.headers[row]
        assert isinstance(header, ImageHeader), "records with unreadable images are rejected before"
        size = (int(sized.sizes.width[row]), int(sized.sizes.height[row])) if resized else (0, 0)
        path = (references.paths[row], *size)
        if path not in known_paths:
            where = storage.join(images_root, references.paths[row])
            data = storage.read_bytes(where)
            content = (xxhash.xxh3_128_hexdigest(data), *size)
            if content not in numbers:
                numbers[content] = len(numbers)
                yield _entry(references.paths[row], content[0], data, header, size, where, resized=resized)
            known_paths[path] = numbers[content]
        rows[row] = known_paths[path]


def _entry(
    path: str, content: str, data: bytes, header: ImageHeader, size: tuple[int, int], where: str, *, resized: bool
) -> dict[str, object]:
    entry: dict[str, object] = {"path": path, "content_xxh3_128": content}
    if not resized:
        stored = {"format": header.format, "width": header.stored_width, "height": header.stored_height, "orientation": header.orientation}
        return {**entry, **stored, "bytes": data}
    shrunk = resize_image(decode_image(data, where), size)
    return {**entry, "format": "png", "width": size[0], "height": size[1], "orientation": 1, "bytes": encode_png(shrunk)}


def _batches(entries: Iterator[dict[str, object]]) -> Iterator[pa.RecordBatch]:
    pending: list[dict[str, object]] = []
    for entry in entries:
        pending.append(entry)
        if len(pending) == IMAGES_PER_BATCH:
            yield pa.RecordBatch.from_pylist(pending, IMAGE_SHARD_SCHEMA)
            pending = []
    if pending:
        yield pa.RecordBatch.from_pylist(pending, IMAGE_SHARD_SCHEMA)
