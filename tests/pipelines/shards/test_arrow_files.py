"""Shards: written complete or not at all, hashed over every byte, read back row by row."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import msgspec
import pyarrow as pa
import pytest
import xxhash

from boxcar.pipelines.shards import arrow_files as shards
from boxcar.pipelines.shards.arrow_files import (
    ROWS_PER_BATCH,
    check_file,
    open_rows,
    read_row,
    write_batches,
    write_quarantine,
    write_rows,
)
from boxcar.schemas.errors import ShardError
from boxcar.schemas.manifest import FileEntry
from boxcar.schemas.record import Rejected
from boxcar.schemas.row import IMAGE_SHARD_SCHEMA, ROW_SCHEMA

SCHEMA = pa.schema([pa.field("number", pa.int64(), nullable=False), pa.field("text", pa.string())], metadata={"boxcar.schema": "test"})


def table(start: int, stop: int) -> pa.Table:
    numbers = range(start, stop)
    return pa.table([pa.array(numbers, pa.int64()), pa.array([f"row {number}" for number in numbers])], schema=SCHEMA)


def written(folder: Path, *sizes: int) -> list[FileEntry]:
    """Shards of these many rows, numbered through."""
    entries, start = [], 0
    for number, size in enumerate(sizes):
        entries.append(write_rows(folder / f"rows-{number:05d}.arrow", table(start, start + size)))
        start += size
    return entries


def batches(*sizes: int) -> Iterator[pa.RecordBatch]:
    for size in sizes:
        yield from table(0, size).to_batches()


@pytest.mark.parametrize("num_rows", [0, 1, ROWS_PER_BATCH, ROWS_PER_BATCH + 1, 3 * ROWS_PER_BATCH])
def test_rows_come_back_as_they_were_written(tmp_path: Path, num_rows: int) -> None:
    [entry] = written(tmp_path, num_rows)
    reader = open_rows(tmp_path / entry.name, SCHEMA)
    assert entry.num_rows == num_rows
    assert reader.read_all() == table(0, num_rows)
    assert reader.num_record_batches == -(-num_rows // ROWS_PER_BATCH)


@pytest.mark.parametrize("sizes", [(), (0,), (1,), (5, 3), (ROWS_PER_BATCH, 1, 40)], ids=str)
def test_the_blocks_of_a_file_cover_every_byte_of_it(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    entry = write_batches(tmp_path / "file.arrow", SCHEMA, batches(*sizes))
    data = (tmp_path / "file.arrow").read_bytes()
    assert entry.num_bytes == len(data)
    assert entry.blocks[0].offset == 0
    assert all(block.offset + block.num_bytes == following.offset for block, following in pairwise(entry.blocks))
    assert entry.blocks[-1].offset + entry.blocks[-1].num_bytes == len(data)
    for block in entry.blocks:
        assert block.xxh3_128 == xxhash.xxh3_128_hexdigest(data[block.offset : block.offset + block.num_bytes])
    assert len(entry.blocks) == 1 + sum(size > 0 for size in sizes), "one for each batch, and the footer"


def test_one_batch_can_be_checked_without_the_others(tmp_path: Path) -> None:
    entry = write_batches(tmp_path / "file.arrow", SCHEMA, batches(4, 4, 4))
    second = entry.blocks[1]
    with pa.memory_map(str(tmp_path / "file.arrow")) as source:
        message = pa.ipc.read_message(pa.py_buffer(source.read_at(second.num_bytes, second.offset)))
    assert pa.ipc.read_record_batch(message, SCHEMA) == table(0, 4).to_batches()[0]


def test_the_same_rows_are_the_same_bytes_however_the_table_is_cut(tmp_path: Path) -> None:
    whole = table(0, 3000)
    pieces = pa.concat_tables([whole.slice(0, 10), whole.slice(10, 2000), whole.slice(2010)])
    first, second = write_rows(tmp_path / "a", whole), write_rows(tmp_path / "b", pieces)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert first.blocks == second.blocks
    assert read_row(tmp_path, [second], 2999, SCHEMA) == {"number": 2999, "text": "row 2999"}


def test_shards_are_uncompressed_for_memory_mapping(tmp_path: Path) -> None:
    [entry] = written(tmp_path, 1000)
    before = pa.total_allocated_bytes()
    column = open_rows(tmp_path / entry.name, SCHEMA).read_all()["text"]
    assert len(column) == 1000
    assert pa.total_allocated_bytes() - before < 1000, "mapped, not copied"


# ---- reading single rows


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(0, id="first"),
        pytest.param(ROWS_PER_BATCH - 1, id="last of a batch"),
        pytest.param(ROWS_PER_BATCH, id="first of a batch"),
        pytest.param(ROWS_PER_BATCH + 6, id="last of a shard"),
        pytest.param(ROWS_PER_BATCH + 7, id="first of the shard behind an empty one"),
        pytest.param(ROWS_PER_BATCH + 9, id="last"),
    ],
)
def test_a_row_is_found_over_batches_and_shards(tmp_path: Path, row: int) -> None:
    entries = written(tmp_path, ROWS_PER_BATCH + 7, 0, 3)
    assert read_row(tmp_path, entries, row, SCHEMA) == {"number": row, "text": f"row {row}"}


@pytest.mark.parametrize(
    ("sizes", "row", "expected"),
    [
        pytest.param((3, 2), 5, r"row 5, expected 0\.\.4", id="one too far"),
        pytest.param((3, 2), -1, r"row -1, expected 0\.\.4", id="negative"),
        pytest.param((0,), 0, "a conversion with rows", id="empty shard"),
        pytest.param((), 0, "a conversion with rows", id="no shard"),
    ],
)
def test_a_row_that_is_not_there_is_an_error(tmp_path: Path, sizes: tuple[int, ...], row: int, expected: str) -> None:
    with pytest.raises(ShardError, match=expected):
        read_row(tmp_path, written(tmp_path, *sizes), row, SCHEMA)


def test_an_arrow_file_of_another_schema_version_is_refused(tmp_path: Path) -> None:
    newer = ROW_SCHEMA.with_metadata({**ROW_SCHEMA.metadata, b"boxcar.version": b"99"})
    write_rows(tmp_path / "rows.arrow", newer.empty_table())
    with pytest.raises(ShardError, match=r"schema row version 99, expected row version 1.*Convert again"):
        open_rows(tmp_path / "rows.arrow", ROW_SCHEMA)


@pytest.mark.parametrize(
    "schema",
    [
        pytest.param(IMAGE_SHARD_SCHEMA, id="image shard"),
        pytest.param(pa.schema([("a", pa.int32())]), id="not of Boxcar"),
        pytest.param(ROW_SCHEMA.remove(1), id="a column less under the same version"),
    ],
)
def test_an_arrow_file_of_another_schema_is_refused(tmp_path: Path, schema: pa.Schema) -> None:
    write_rows(tmp_path / "rows.arrow", schema.empty_table())
    with pytest.raises(ShardError, match="expected row version 1"):
        open_rows(tmp_path / "rows.arrow", ROW_SCHEMA)


@pytest.mark.parametrize("content", [b"", b"no Arrow file", b"ARROW1\0\0" * 20], ids=["empty", "text", "magic alone"])
def test_what_is_no_arrow_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rows.arrow").write_bytes(content)
    with pytest.raises(ShardError, match=r"does not open.*expected an Arrow IPC file"):
        open_rows(tmp_path / "rows.arrow", ROW_SCHEMA)


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="does not open"):
        open_rows(tmp_path / "rows.arrow", ROW_SCHEMA)


# ---- damage


def test_every_flipped_bit_is_found_in_its_block(tmp_path: Path) -> None:
    entry = write_batches(tmp_path / "file.arrow", SCHEMA, batches(2, 2))
    data = (tmp_path / "file.arrow").read_bytes()
    assert check_file(tmp_path, entry) == []
    for bit in range(0, 8 * len(data), 29):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "file.arrow").write_bytes(damaged)
        [problem] = check_file(tmp_path, entry)
        start, stop = next((block.offset, block.offset + block.num_bytes) for block in reversed(entry.blocks) if block.offset <= bit // 8)
        assert problem.startswith(f"file.arrow, bytes {start}..{stop}: found hash ")


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-1]), "found {less} bytes, expected {size}", id="a byte less"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes() + b"\0"), "found {more} bytes, expected {size}", id="a byte more"),
        pytest.param(lambda path: path.write_bytes(b""), "found 0 bytes, expected {size}", id="emptied"),
        pytest.param(lambda path: path.unlink(), "found No such file or directory, expected {size} bytes", id="missing"),
    ],
)
def test_a_file_of_another_length_is_found(tmp_path: Path, damage: Callable[[Path], object], found: str) -> None:
    [entry] = written(tmp_path, 3)
    damage(tmp_path / entry.name)
    size = entry.num_bytes
    assert check_file(tmp_path, entry) == [f"{entry.name}: {found.format(size=size, less=size - 1, more=size + 1)}"]


def test_a_folder_in_the_place_of_a_file_is_found(tmp_path: Path) -> None:
    [entry] = written(tmp_path, 3)
    (tmp_path / entry.name).unlink()
    (tmp_path / entry.name).mkdir()
    assert len(check_file(tmp_path, entry)) == 1


# ---- writing that fails


def test_a_mistake_while_writing_leaves_no_file(tmp_path: Path) -> None:
    def fails_at_the_third() -> Iterator[pa.RecordBatch]:
        yield from batches(1, 1)
        raise ValueError("no third")

    with pytest.raises(ValueError, match="no third"):
        write_batches(tmp_path / "file.arrow", SCHEMA, fails_at_the_third())
    assert list(tmp_path.iterdir()) == []


def test_a_batch_of_another_schema_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(pa.ArrowInvalid):
        write_batches(tmp_path / "file.arrow", ROW_SCHEMA, batches(1))
    assert list(tmp_path.iterdir()) == []


# ---- quarantine


def test_the_quarantine_holds_one_json_object_a_line(tmp_path: Path) -> None:
    rejected = [
        Rejected("unknown_category", "a.json, annotation 7", "found 9, expected 1..3", "7", '{"id": 7,\n"x": "\u2028"}'),
        Rejected("missing_image", "b", "Straße 🙂", "8"),
    ]
    entry = write_quarantine(tmp_path / "rejected-00000.jsonl", rejected)
    data = (tmp_path / entry.name).read_bytes()
    assert [msgspec.json.decode(line, type=Rejected) for line in data.split(b"\n")[:-1]] == rejected
    assert (entry.num_rows, entry.num_bytes) == (2, len(data))
    assert check_file(tmp_path, entry) == []
    damaged = bytearray(data)
    damaged[3] ^= 1
    (tmp_path / entry.name).write_bytes(damaged)
    assert len(check_file(tmp_path, entry)) == 1


def test_hash_blocks_takes_any_stretches(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abcdef")
    assert [block.xxh3_128 for block in shards.hash_blocks(tmp_path / "file", [(0, 2), (1, 4)])] == [
        xxhash.xxh3_128_hexdigest(b"ab"),
        xxhash.xxh3_128_hexdigest(b"bcde"),
    ]
