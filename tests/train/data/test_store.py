"""Rows at random, local and remote: right, checked, healed, bounded."""

import logging
import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import xxhash

from boxcar.pipelines import storage
from boxcar.pipelines.shards.arrow_files import ROWS_PER_BATCH, write_rows
from boxcar.schemas import manifest as manifests
from boxcar.schemas.errors import BoxcarError, ContractError, ShardError
from boxcar.schemas.manifest import BlockHash, Manifest
from boxcar.train.data.store import BlockCache, Row, ShardStore
from tests.small_sets import demo_config, read_rows, read_table, rewrite_manifest, run

MB = 1 << 20


@pytest.fixture(scope="module")
def converted(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with its images embedded. To be read only."""
    folder = tmp_path_factory.mktemp("store") / "shards"
    run(demo_config(demo, folder, image_storage="embed"))
    return folder


@pytest.fixture
def copy(converted: Path, tmp_path: Path) -> Path:
    """One that a test may damage."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in converted.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def remote(converted: Path) -> str:
    """The same on Arrow's in-memory object store. Returns its URI."""
    uri = f"mock://bucket/{uuid4().hex}/shards"
    filesystem, inner = storage.resolve(uri)
    filesystem.create_dir(inner, recursive=True)
    for path in converted.iterdir():
        if path.is_file():
            write_remote(f"{uri}/{path.name}", path.read_bytes())
    return uri


def write_remote(uri: str, data: bytes) -> None:
    filesystem, inner = storage.resolve(uri)
    with filesystem.open_output_stream(inner) as stream:
        stream.write(data)


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def assert_same(row: Row, expected: dict[str, Any], images_root: str = "") -> None:
    """A row of the store against the whole row as Arrow reads it."""
    assert (row["sample_id"], row["ordered"]) == (expected["sample_id"], expected["ordered"])
    assert row["header_ids"].tolist() == expected["header_ids"]
    for image, whole in zip(row["images"], expected["images"], strict=True):
        path = None if whole["path"] is None else storage.join(images_root, whole["path"])
        assert image == {**{name: whole[name] for name in image}, "path": path}
    for turn, whole in zip(row["turns"], expected["turns"], strict=True):
        assert {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in turn.items()} == {
            name: whole[name] for name in turn
        }


# ---- rows


@pytest.mark.parametrize("image_storage", ["reference", "embed"])
def test_rows_are_what_was_written(demo: Path, tmp_path: Path, image_storage: str) -> None:
    folder = tmp_path / "shards"
    manifest = run(demo_config(demo, folder, image_storage=image_storage))
    store = ShardStore([str(folder)])
    expected = read_rows(folder)
    assert store.num_rows == len(expected) == manifest.counts.rows_written
    for number in np.random.default_rng(0).permutation(store.num_rows).tolist():
        row = store.row(number)
        assert_same(row, expected[number], manifest.images_root)
        assert (row["row"], row["folder"]) == (number, 0)


def test_rows_over_several_folders(converted: Path, copy: Path) -> None:
    store = ShardStore([str(converted), f"file://{copy}", str(converted)])
    expected = read_rows(converted)
    num_rows = len(expected)
    assert store.num_rows == 3 * num_rows
    for number in range(3 * num_rows):
        row = store.row(number)
        assert row["folder"] == number // num_rows
        assert_same(row, expected[number % num_rows])
    assert not store.is_remote


def test_embedded_images_are_the_files(converted: Path, demo: Path) -> None:
    store = ShardStore([str(converted)])
    files = {path.read_bytes() for path in (demo / "images").iterdir()}
    found = set()
    for number in range(store.num_rows):
        for image in store.row(number)["images"]:
            found.add(store.image_bytes(0, image["shard"], image["shard_row"]))
    assert found == files


def test_a_shard_of_many_batches(converted: Path, copy: Path) -> None:
    """More than ROWS_PER_BATCH rows in one file."""
    manifest = manifests.load(copy)
    table = read_table(copy / manifest.shards[0].name)
    times = ROWS_PER_BATCH // table.num_rows + 2
    many = pa.concat_tables([table] * times)
    entry = write_rows(copy / manifest.shards[0].name, many)
    rewrite_manifest(copy, msgspec.structs.replace(manifest, shards=[entry, *manifest.shards[1:]]))
    store = ShardStore([str(copy)])
    expected = table.to_pylist()
    for number in (0, 1, ROWS_PER_BATCH - 1, ROWS_PER_BATCH, many.num_rows - 1):
        assert_same(store.row(number), expected[number % table.num_rows])
    assert store.row(many.num_rows)["sample_id"] == read_rows(converted)[table.num_rows]["sample_id"]


def test_a_store_crosses_processes(converted: Path) -> None:
    store = ShardStore([str(converted)])
    store.row(0)
    other: ShardStore = pickle.loads(pickle.dumps(store))  # noqa: S301
    assert_same(other.row(3), read_rows(converted)[3])


@pytest.mark.parametrize("number", [-1, 12, 10**9])
def test_rows_that_are_not_there(converted: Path, number: int) -> None:
    with pytest.raises(ShardError, match=r"expected 0\.\.11"):
        ShardStore([str(converted)]).row(number)


@pytest.mark.parametrize(("shard", "row"), [(99, 0), (0, 99), (0, -1)])
def test_images_that_are_not_there(converted: Path, shard: int, row: int) -> None:
    with pytest.raises(ShardError, match="image"):
        ShardStore([str(converted)]).image_bytes(0, shard, row)


def test_folders_of_two_contracts(converted: Path, copy: Path) -> None:
    manifest = manifests.load(copy)
    contract = msgspec.structs.replace(manifest.contract, max_pixels=4242)
    rewrite_manifest(copy, msgspec.structs.replace(manifest, contract=contract))
    with pytest.raises(ContractError, match="max_pixels"):
        ShardStore([str(converted), str(copy)])


def test_another_row_version(copy: Path) -> None:
    manifest = manifests.load(copy)
    contract = msgspec.structs.replace(manifest.contract, row_schema_version=99)
    rewrite_manifest(copy, msgspec.structs.replace(manifest, contract=contract))
    with pytest.raises(ShardError, match="row version 99"):
        ShardStore([str(copy)])


# ---- damage, local


def blocks_of(manifest: Manifest) -> list[tuple[str, int, BlockHash]]:
    """Every record batch: (file, number, block). The last block of a file, its footer, is not read in training."""
    files = [*manifest.shards, *manifest.image_shards]
    return [(entry.name, number, block) for entry in files for number, block in enumerate(entry.blocks[:-1])]


def read_everything(store: ShardStore) -> None:
    for number in range(store.num_rows):
        for image in store.row(number)["images"]:
            store.image_bytes(image_folder(store, number), image["shard"], image["shard_row"])


def image_folder(store: ShardStore, number: int) -> int:
    folder: int = store.row(number)["folder"]
    return folder


def test_any_flipped_byte_of_a_batch_is_found(copy: Path) -> None:
    rng = np.random.default_rng(1)
    for name, number, block in blocks_of(manifests.load(copy)):
        path = copy / name
        data = path.read_bytes()
        path.write_bytes(flip(data, block.offset + int(rng.integers(block.num_bytes))))
        with pytest.raises(ShardError, match=rf"{name}: found block {number} \(bytes {block.offset}\.\."):
            read_everything(ShardStore([str(copy)]))
        path.write_bytes(data)
    read_everything(ShardStore([str(copy)]))


def test_a_batch_is_checked_once(copy: Path) -> None:
    store = ShardStore([str(copy)])
    row = store.row(0)
    path = copy / manifests.load(copy).shards[0].name
    with open(path, "r+b") as stream:  # in place: it is mapped
        stream.seek(100)
        stream.write(b"\xff")
    assert store.row(0)["sample_id"] == row["sample_id"]


@pytest.mark.parametrize("damage", ["missing", "cut", "longer"])
def test_files_that_are_not_whole(copy: Path, damage: str) -> None:
    path = copy / manifests.load(copy).shards[0].name
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(data[:-1] if damage == "cut" else data + b"x")
    with pytest.raises(ShardError, match="no such file" if damage == "missing" else f"expected {len(data)}"):
        ShardStore([str(copy)]).row(0)


# ---- remote


def test_remote_rows_are_the_local_ones(remote: str, converted: Path, tmp_path: Path) -> None:
    store = ShardStore([remote], tmp_path / "cache", 64 * MB)
    assert store.is_remote
    local = ShardStore([str(converted)])
    expected = read_rows(converted)
    for number in (5, 0, 11, 5):
        row = store.row(number)
        assert_same(row, expected[number])
        image = row["images"][0]
        assert store.image_bytes(0, image["shard"], image["shard_row"]) == local.image_bytes(0, image["shard"], image["shard_row"])


def test_what_is_cached_is_not_fetched_again(remote: str, converted: Path, tmp_path: Path) -> None:
    first = ShardStore([remote], tmp_path / "cache", 64 * MB)
    read_everything(first)
    second = ShardStore([remote], tmp_path / "cache", 64 * MB)
    filesystem, inner = storage.resolve(remote)
    for path in converted.glob("*.arrow"):
        filesystem.delete_file(f"{inner}/{path.name}")
    read_everything(second)


def test_a_bad_cached_block_is_healed(remote: str, converted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = tmp_path / "cache"
    read_everything(ShardStore([remote], cache, 64 * MB))
    expected = read_rows(converted)
    for path in sorted(cache.glob("*.block")):
        data = path.read_bytes()
        for damaged in (flip(data, len(data) // 2), data[:-1], b""):
            path.write_bytes(damaged)
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                store = ShardStore([remote], cache, 64 * MB)
                read_everything(store)
            assert "was damaged in the cache" in caplog.text
            assert path.read_bytes() == data
    for number, row in enumerate(expected):
        assert_same(store.row(number), row)


def test_a_bad_original_is_refused(remote: str, converted: Path, tmp_path: Path) -> None:
    entry = manifests.load(converted).shards[0]
    write_remote(f"{remote}/{entry.name}", flip((converted / entry.name).read_bytes(), 200))
    store = ShardStore([remote], tmp_path / "cache", 64 * MB)
    with pytest.raises(ShardError, match=rf"{entry.name}: found block 0 .* twice"):
        store.row(0)
    assert not list((tmp_path / "cache").glob("*.block"))


def test_a_bad_original_is_fetched_twice(converted: Path, tmp_path: Path) -> None:
    """A range that arrived damaged once comes again."""
    entry = manifests.load(converted).shards[0]
    data = (converted / entry.name).read_bytes()
    answers = iter([flip(data, 200), data])

    class Faulty:
        def read_at(self, num_bytes: int, offset: int) -> bytes:
            return next(answers)[offset : offset + num_bytes]

    cache = BlockCache(tmp_path / "cache", MB)
    cache._inputs["somewhere"] = Faulty()
    block = entry.blocks[0]
    assert bytes(cache.read("somewhere", 0, block)) == data[: block.num_bytes]


def test_a_missing_remote_shard(remote: str, converted: Path, tmp_path: Path) -> None:
    filesystem, inner = storage.resolve(remote)
    name = manifests.load(converted).shards[0].name
    filesystem.delete_file(f"{inner}/{name}")
    with pytest.raises(ShardError, match=f"{name}: found no such file"):
        ShardStore([remote], tmp_path / "cache", MB).row(0)


def test_a_folder_that_cannot_be_written(remote: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = ShardStore([remote], tmp_path / "file" / "cache", MB)
    with pytest.raises(BoxcarError, match=r"cache_dir"):
        store.row(0)


# ---- bounds and company


def made_up(count: int, num_bytes: int) -> tuple[str, list[BlockHash], list[bytes]]:
    """A remote file of random blocks."""
    rng = np.random.default_rng(0)
    parts = [rng.bytes(num_bytes) for _ in range(count)]
    uri = f"mock://bucket/{uuid4().hex}.arrow"
    storage.resolve(uri)[0].create_dir("bucket", recursive=True)
    write_remote(uri, b"".join(parts))
    blocks = [BlockHash(number * num_bytes, num_bytes, xxhash.xxh3_128_hexdigest(part)) for number, part in enumerate(parts)]
    return uri, blocks, parts


def cached_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.block"))


def test_the_cache_keeps_to_its_bound(tmp_path: Path) -> None:
    uri, blocks, parts = made_up(40, 1000)
    cache = BlockCache(tmp_path, 10_500)
    held = []
    for number in np.random.default_rng(2).integers(0, 40, 300).tolist():
        held.append((cache.read(uri, number, blocks[number]), number))
        assert cached_bytes(tmp_path) <= 10_500
    assert cached_bytes(tmp_path) >= 8000
    # What was evicted while somebody held it is still what it was.
    assert all(bytes(data) == parts[number] for data, number in held)


def test_the_longest_unused_leaves_first(tmp_path: Path) -> None:
    uri, blocks, _ = made_up(12, 1000)
    cache = BlockCache(tmp_path, 10_000)
    for number in range(10):
        cache.read(uri, number, blocks[number])
        os.utime(tmp_path / f"{blocks[number].xxh3_128}-1000.block", (number, number))
    cache.read(uri, 0, blocks[0])  # used again
    cache.read(uri, 10, blocks[10])
    names = {path.name.partition("-")[0] for path in tmp_path.glob("*.block")}
    assert blocks[0].xxh3_128 in names
    assert blocks[1].xxh3_128 not in names
    assert blocks[10].xxh3_128 in names


def test_a_block_larger_than_the_cache_is_not_kept(tmp_path: Path) -> None:
    uri, blocks, parts = made_up(1, 1000)
    assert bytes(BlockCache(tmp_path, 999).read(uri, 0, blocks[0])) == parts[0]
    assert cached_bytes(tmp_path) == 0


def test_unfinished_files_of_dead_processes_are_swept(tmp_path: Path) -> None:
    uri, blocks, _ = made_up(3, 1000)
    old, young = tmp_path / ".a.block.1.tmp", tmp_path / ".b.block.2.tmp"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    cache = BlockCache(tmp_path, 2500)
    for number in range(3):
        cache.read(uri, number, blocks[number])
    assert not old.exists()
    assert young.exists()


def _read_in_company(folder: Path, uri: str, blocks: list[BlockHash], parts: list[bytes], seed: int, answers: Any) -> None:
    cache = BlockCache(folder, 12_000)
    largest, wrong = 0, 0
    for number in np.random.default_rng(seed).integers(0, len(blocks), 400).tolist():
        wrong += bytes(cache.read(uri, number, blocks[number])) != parts[number]
        if number % 7 == 0:  # trouble on purpose
            (folder / f"{blocks[number].xxh3_128}-1000.block").unlink(missing_ok=True)
        with cache._lock("count"):  # while nobody writes, so that the sum is of one moment
            largest = max(largest, sum(map(_size, folder.glob("*.block"))))
    answers.put((wrong, largest))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # deleted on purpose
        return 0


def test_processes_share_a_cache(tmp_path: Path) -> None:
    """Three of them, fetching, evicting and deleting over each other."""
    uri, blocks, parts = made_up(30, 1000)
    fork = multiprocessing.get_context("fork")  # the in-memory store goes along
    answers = fork.Queue()
    processes = [
        fork.Process(target=_read_in_company, args=(tmp_path, uri, blocks, parts, seed, answers), daemon=True) for seed in range(3)
    ]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert [wrong for wrong, _ in found] == [0, 0, 0]
    assert max(largest for _, largest in found) <= 12_000
    assert not list(tmp_path.glob("*.tmp"))
