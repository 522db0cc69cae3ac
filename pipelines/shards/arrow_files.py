"""Shards on disk: Arrow IPC files, uncompressed so that they are memory-mapped, complete or not there at all, hashed block by block.

    rows-00012.arrow     rows of unit 12                    rejected-00012.jsonl   its quarantine, where anything was rejected
    images-00012.arrow   embedded images of unit 12         manifest.json          last

Block k of an Arrow file is record batch k (the first with the schema before it), and the last block is the footer: together they cover
every byte, and one batch can be checked alone when it is first read.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import msgspec
import pyarrow as pa
import xxhash

from boxcar.pipelines.storage import atomic_write
from boxcar.schemas.errors import ShardError
from boxcar.schemas.manifest import BlockHash, FileEntry
from boxcar.schemas.record import Rejected

ROWS_PER_BATCH = 1024


def image_shard_name(number: int) -> str:
    """The file that `shard` of a row's image means."""
    return f"images-{number:05d}.arrow"


def write_batches(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> FileEntry:
    """Write an Arrow IPC file atomically. Raises BoxcarError where the disk is full or the folder cannot be written."""
    num_rows = 0
    with atomic_write(path) as stream:
        borders = [0]
        with pa.ipc.new_file(pa.PythonFile(stream, mode="w"), schema) as writer:
            for batch in batches:
                borders.append(stream.tell())
                writer.write_batch(batch)
                num_rows += batch.num_rows
            borders.append(stream.tell())
        stream.flush()
        borders.append(stream.tell())
        blocks = hash_blocks(Path(stream.name), _stretches(borders))
    return FileEntry(path.name, num_rows, borders[-1], blocks)


def _stretches(borders: Sequence[int]) -> list[tuple[int, int]]:
    """(offset, num_bytes) between neighbouring borders, empty ones left out."""
    return [(start, stop - start) for start, stop in pairwise(borders) if stop > start]


def hash_blocks(path: Path, stretches: Sequence[tuple[int, int]]) -> list[BlockHash]:
    """xxh3-128 of each stretch of a file."""
    with pa.memory_map(str(path)) as source:
        return [BlockHash(offset, size, xxhash.xxh3_128_hexdigest(source.read_at(size, offset))) for offset, size in stretches]


def write_rows(path: Path, table: pa.Table) -> FileEntry:
    """Write a unit's rows, ROWS_PER_BATCH to a batch, however the table is cut."""
    return write_batches(path, table.schema, table.combine_chunks().to_batches(max_chunksize=ROWS_PER_BATCH))


def write_quarantine(path: Path, rejected: Sequence[Rejected]) -> FileEntry:
    """Write rejected records, one JSON object a line."""
    data = b"".join(msgspec.json.encode(entry) + b"\n" for entry in rejected)
    with atomic_write(path) as stream:
        stream.write(data)
    return FileEntry(path.name, len(rejected), len(data), [BlockHash(0, len(data), xxhash.xxh3_128_hexdigest(data))])


def check_file(folder: Path, entry: FileEntry) -> list[str]:
    """What is wrong with a file on disk, block by block; [] where it is as it was written."""
    path = folder / entry.name
    try:
        size = path.stat().st_size
    except OSError as error:
        return [f"{entry.name}: found {error.strerror}, expected {entry.num_bytes} bytes"]
    if size != entry.num_bytes:
        return [f"{entry.name}: found {size} bytes, expected {entry.num_bytes}"]
    found = hash_blocks(path, [(block.offset, block.num_bytes) for block in entry.blocks])
    return [
        f"{entry.name}, bytes {block.offset}..{block.offset + block.num_bytes}: found hash {new.xxh3_128}, expected {block.xxh3_128}"
        for block, new in zip(entry.blocks, found, strict=True)
        if block != new
    ]


def open_rows(path: Path, schema: pa.Schema) -> pa.ipc.RecordBatchFileReader:
    """Memory-map a shard. Raises ShardError where it is no Arrow file or of another schema version."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
    except (OSError, pa.ArrowInvalid) as error:
        raise ShardError(str(path), found=f"a file that does not open ({error})", expected="an Arrow IPC file written by Boxcar") from error
    found = reader.schema.metadata or {}
    expected = schema.metadata
    if found != expected or reader.schema != schema:
        raise ShardError(
            str(path),
            found=f"schema {found.get(b'boxcar.schema', b'?').decode()} version {found.get(b'boxcar.version', b'?').decode()}",
            expected=f"{expected[b'boxcar.schema'].decode()} version {expected[b'boxcar.version'].decode()}",
            fix="Convert again with this version of Boxcar.",
        )
    return reader


def read_row(folder: Path, files: Sequence[FileEntry], row: int, schema: pa.Schema) -> dict[str, object]:
    """Row number `row` over all shards, in their order. Raises ShardError where there is no such row."""
    total = sum(entry.num_rows for entry in files)
    if not 0 <= row < total:
        raise ShardError(
            str(folder), found=f"row {row}", expected=f"0..{total - 1}" if total else "a conversion with rows (this one wrote none)"
        )
    for entry in files:
        if row < entry.num_rows:
            reader = open_rows(folder / entry.name, schema)
            batch, within = divmod(row, ROWS_PER_BATCH)
            found: dict[str, object] = reader.get_batch(batch).slice(within, 1).to_pylist()[0]
            return found
        row -= entry.num_rows
    raise AssertionError("unreachable: the row lies within the total")
