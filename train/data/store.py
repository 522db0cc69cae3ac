"""Rows and embedded images of converted folders, at random, local or remote. A block that was not checked is never read.

    row 4711 ──> folder, shard, batch ──> block (`schemas.manifest.BlockHash`) ──> record batch ──> the fields that training needs
                                             local    a slice of the memory-mapped file; hashed when first touched
                                             remote   a file of the block cache; hashed when opened, fetched again where it is bad

Block k of a shard is its record batch k, with offset, size and hash in the manifest. So what is fetched from an object store is one range
of a file, what is checked is exactly what is read, and a block's hash is its name in the cache: several processes, runs and data sets share
a cache without knowing of each other.
"""

import fcntl
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from boxcar.pipelines import storage
from boxcar.pipelines.ragged import offsets_of
from boxcar.pipelines.shards.arrow_files import ROWS_PER_BATCH, image_shard_name
from boxcar.pipelines.shards.embed import IMAGES_PER_BATCH
from boxcar.schemas.contract import FrameContract
from boxcar.schemas.errors import AnnotationError, BoxcarError, ShardError, StorageError
from boxcar.schemas.manifest import BlockHash, FileEntry
from boxcar.schemas.row import IMAGE_SHARD_SCHEMA, ROW_SCHEMA, ROW_SCHEMA_VERSION
from boxcar.train.planning.index import Folder, load_manifest

MAX_OPEN_BATCHES = 512
"""Record batches that a process holds open. A remote one keeps the disk space of its block, evicted or not, until it is let go."""
MAX_OPEN_REMOTE_FILES = 64
NUM_FETCH_LOCKS = 64
ABANDONED_SECONDS = 3600.0
"""After which an unfinished file of the cache is nobody's any more."""
_ARROW_MAGIC_BYTES = 8
_LOG = logging.getLogger(__name__)

Row = dict[str, Any]
"""What `train.data.documents.compose` reads: sample_id, row, folder, ordered, header_ids, images and turns; ids are read-only views."""


def default_cache_dir() -> Path:
    """Below the system's temporary folder, one for each user."""
    return Path(gettempdir()) / f"boxcar-cache-{os.getuid()}"


class ShardStore:
    """Rows over folders of shards, numbered in the order of folders, shards and rows, as `train.planning.index` numbers them.

    Picklable: a process opens files when it first reads. The cache is used for remote folders only.
    """

    def __init__(self, folders: Sequence[str], cache_dir: Path | str | None = None, cache_bytes: int = 50 << 30) -> None:
        """folders: local paths or URIs. cache_bytes: most that blocks of remote shards may take. Raises ShardError and ContractError."""
        opened: list[Folder] = []
        for path in folders:
            manifest = load_manifest(path)
            version = manifest.contract.row_schema_version
            if version != ROW_SCHEMA_VERSION:
                fix = "Convert again with this version of Boxcar."
                raise ShardError(path, found=f"row version {version}", expected=f"row version {ROW_SCHEMA_VERSION}", fix=fix)
            opened.append(Folder(path, manifest, opened[-1].first_row + opened[-1].num_rows if opened else 0))
            opened[0].manifest.contract.require_equal(manifest.contract, f"{path}, beside {opened[0].path}")
        self._set(tuple(opened), Path(cache_dir or default_cache_dir()), cache_bytes)

    def _set(self, folders: tuple[Folder, ...], cache_dir: Path, cache_bytes: int) -> None:
        self.folders = folders
        self.cache = BlockCache(cache_dir, cache_bytes)
        self._files = [(number, entry) for number, folder in enumerate(folders) for entry in folder.manifest.shards]
        self._first_rows = offsets_of(np.array([entry.num_rows for _, entry in self._files], np.int64))
        self._image_files = [{entry.name: entry for entry in folder.manifest.image_shards} for folder in folders]
        self._maps: dict[str, pa.Buffer] = {}
        self._verified: set[tuple[str, int]] = set()
        self._batches: OrderedDict[tuple[str, int], Any] = OrderedDict()

    def __getstate__(self) -> tuple[Any, ...]:
        return self.folders, self.cache.folder, self.cache.max_bytes

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._set(*state)

    @property
    def num_rows(self) -> int:
        return int(self._first_rows[-1])

    @property
    def contract(self) -> FrameContract:
        """Of all folders."""
        return self.folders[0].manifest.contract

    @property
    def is_remote(self) -> bool:
        """Whether reading needs connections, which do not survive a fork."""
        return any(storage.local_path(path) is None for one in self.folders for path in (one.path, one.manifest.images_root))

    def row(self, number: int) -> Row:
        """The fields of a row that training needs; image paths are joined with their folder's images_root. Raises ShardError."""
        if not 0 <= number < self.num_rows:
            fix = "The plan was made from other shards: plan again."
            raise ShardError(
                ", ".join(one.path for one in self.folders), found=f"row {number}", expected=f"0..{self.num_rows - 1}", fix=fix
            )
        file = int(np.searchsorted(self._first_rows, number, side="right")) - 1
        folder, entry = self._files[file]
        batch, within = divmod(number - int(self._first_rows[file]), ROWS_PER_BATCH)
        rows = self._batch(folder, entry, batch, ROW_SCHEMA)
        row: Row = rows.row(within, self.folders[folder].manifest.images_root)
        return {**row, "row": number, "folder": folder}

    def whole_row(self, number: int) -> Row:
        """Every field of a row, as Python objects: what evaluation and pages need. Image paths are joined, `row` and `folder` added, as
        `row` has them. Raises ShardError."""
        found = self.row(number)
        file = int(np.searchsorted(self._first_rows, number, side="right")) - 1
        folder, entry = self._files[file]
        batch, within = divmod(number - int(self._first_rows[file]), ROWS_PER_BATCH)
        whole: Row = self._batch(folder, entry, batch, ROW_SCHEMA).batch.slice(within, 1).to_pylist()[0]
        images = [{**all_of_it, **image} for all_of_it, image in zip(whole["images"], found["images"], strict=True)]
        return {**whole, "images": images, "row": number, "folder": found["folder"]}

    def image_bytes(self, folder: int, shard: int, shard_row: int) -> bytes:
        """An embedded image: the original file, or a PNG of the model's size. Raises ShardError."""
        name = image_shard_name(shard)
        entry = self._image_files[folder].get(name)
        if entry is None or not 0 <= shard_row < entry.num_rows:
            found = "no such image shard" if entry is None else f"image {shard_row} of {entry.num_rows}"
            raise ShardError(storage.join(self.folders[folder].path, name), found=found, expected="the image that a row points at")
        batch, within = divmod(shard_row, IMAGES_PER_BATCH)
        data: bytes = self._batch(folder, entry, batch, IMAGE_SHARD_SCHEMA).column("bytes")[within].as_py()
        return data

    def _batch(self, folder: int, entry: FileEntry, number: int, schema: pa.Schema) -> Any:
        """_RowBatch, or the record batch itself for images."""
        where = storage.join(self.folders[folder].path, entry.name)
        key = where, number
        if key not in self._batches:
            batch = _parse(self._block(where, entry, number), schema, where, number)
            self._batches[key] = _RowBatch(batch) if schema is ROW_SCHEMA else batch
            if len(self._batches) > MAX_OPEN_BATCHES:
                self._batches.popitem(last=False)
        self._batches.move_to_end(key)
        return self._batches[key]

    def _block(self, where: str, entry: FileEntry, number: int) -> pa.Buffer:
        block = entry.blocks[number]
        local = storage.local_path(where)
        if local is None:
            return self.cache.read(where, number, block)
        if where not in self._maps:
            self._maps[where] = _map_shard(local, entry)
        data = self._maps[where].slice(block.offset, block.num_bytes)
        if (where, number) not in self._verified:
            found = xxhash.xxh3_128_hexdigest(data)
            if found != block.xxh3_128:
                raise _bad_block(where, number, block, found, "Copy the file anew, or convert again; `boxcar verify` checks every byte.")
            self._verified.add((where, number))
        return data


def _map_shard(path: str, entry: FileEntry) -> pa.Buffer:
    try:
        with pa.memory_map(path) as source:
            data = source.read_buffer()  # stays mapped after the descriptor is closed
    except OSError as error:
        found = "no such file" if isinstance(error, FileNotFoundError) else f"{error}"
        raise ShardError(path, found=found, expected="a shard that the manifest names", fix="Convert again, or copy it anew.") from error
    if data.size != entry.num_bytes:
        raise ShardError(path, found=f"{data.size} bytes", expected=f"{entry.num_bytes}", fix="Copy the file anew, or convert again.")
    return data


def _bad_block(where: str, number: int, block: BlockHash, found: str, fix: str) -> ShardError:
    stretch = f"block {number} (bytes {block.offset}..{block.offset + block.num_bytes})"
    return ShardError(where, found=f"{stretch} with the hash {found}", expected=block.xxh3_128, fix=fix)


def _parse(data: pa.Buffer, schema: pa.Schema, where: str, number: int) -> pa.RecordBatch:
    """The record batch of a block, without a copy. The first block of a file holds the schema before it."""
    try:
        if number:
            return pa.ipc.read_record_batch(data, schema)
        source = pa.BufferReader(data)
        source.seek(_ARROW_MAGIC_BYTES)
        found = pa.ipc.read_schema(source)
        if found != schema or found.metadata != schema.metadata:
            raise ShardError(where, found="another schema", expected="this version's", fix="Convert again with this version of Boxcar.")
        return pa.ipc.read_record_batch(pa.ipc.read_message(source), schema)
    except (OSError, pa.ArrowException) as error:
        raise ShardError(where, found=f"block {number} that Arrow does not read ({error})", expected="a record batch") from error


class _RowBatch:
    """Columns of a record batch of rows as NumPy views: a row costs microseconds, and text is never touched."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.batch = batch
        self.sample_ids = batch.column("sample_id")
        self.ordered = batch.column("ordered").to_numpy(zero_copy_only=False)
        self.header_ids = _Lists(batch.column("header_ids"))
        images = batch.column("images")
        self.image_offsets = images.offsets.to_numpy()
        self.paths = images.values.field("path")
        self.shards = images.values.field("shard").fill_null(-1).to_numpy()
        self.shard_rows = images.values.field("shard_row").fill_null(-1).to_numpy()
        sizes = ("width", "height", "resized_width", "resized_height", "grid_t", "grid_h", "grid_w", "visual_tokens")
        self.image_numbers = {name: images.values.field(name).to_numpy() for name in sizes}
        turns = batch.column("turns")
        self.turn_offsets = turns.offsets.to_numpy()
        self.tasks = turns.values.field("task")
        self.prompt_ids = _Lists(turns.values.field("prompt_ids"))
        self.answer_ids = _Lists(turns.values.field("answer_ids"))
        self.is_coordinate = turns.values.field("answer_is_coordinate")
        self.difficulty = turns.values.field("difficulty").to_numpy()
        self.weight = turns.values.field("weight").to_numpy()

    def row(self, number: int, images_root: str) -> Row:
        images = range(self.image_offsets[number], self.image_offsets[number + 1])
        turns = range(self.turn_offsets[number], self.turn_offsets[number + 1])
        return {
            "sample_id": self.sample_ids[number].as_py(),
            "ordered": bool(self.ordered[number]),
            "header_ids": self.header_ids[number],
            "images": [self._image(image, images_root) for image in images],
            "turns": [self._turn(turn) for turn in turns],
        }

    def _image(self, number: int, images_root: str) -> dict[str, Any]:
        embedded = self.shards[number] >= 0
        return {
            "path": None if embedded else storage.join(images_root, self.paths[number].as_py()),
            "shard": int(self.shards[number]) if embedded else None,
            "shard_row": int(self.shard_rows[number]) if embedded else None,
            **{name: int(values[number]) for name, values in self.image_numbers.items()},
        }

    def _turn(self, number: int) -> dict[str, Any]:
        return {
            "task": self.tasks[number].as_py(),
            "prompt_ids": self.prompt_ids[number],
            "answer_ids": self.answer_ids[number],
            "answer_is_coordinate": self.is_coordinate[number].values.to_numpy(zero_copy_only=False),
            "difficulty": float(self.difficulty[number]),
            "weight": float(self.weight[number]),
        }


class _Lists:
    """A list column of ids."""

    def __init__(self, lists: pa.ListArray) -> None:
        self.offsets = lists.offsets.to_numpy()
        self.values: npt.NDArray[np.int32] = lists.values.to_numpy()

    def __getitem__(self, number: int) -> npt.NDArray[np.int32]:
        return self.values[self.offsets[number] : self.offsets[number + 1]]


class BlockCache:
    """Blocks of remote files in a local folder, at most `max_bytes` of them, the longest unused leave first.

    A block is a file named by its hash: written beside and renamed, so that it is whole or not there; checked whenever it is opened;
    deleted and fetched again where it is bad. Any number of processes may share the folder. A block that is evicted while mapped stays
    readable to who has it (and keeps its disk space until then).
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._inputs: OrderedDict[str, pa.NativeFile] = OrderedDict()
        """Open remote files: opening one costs two requests."""

    def read(self, where: str, number: int, block: BlockHash) -> pa.Buffer:
        """The bytes of a block of the remote file `where`, checked. Raises ShardError where it is not as it was written, StorageError where
        the storage does not answer."""
        path = self.folder / f"{block.xxh3_128}-{block.num_bytes}.block"
        data = _open_block(path)
        if data is None or not _is_sound(data, block):
            with self._lock(f"fetch-{int(block.xxh3_128[:8], 16) % NUM_FETCH_LOCKS:02d}"):
                data = _open_block(path)  # another process may have fetched it meanwhile
                if data is not None and not _is_sound(data, block):
                    _LOG.warning("%s: block %d was damaged in the cache (%s); fetching it again", where, number, path)
                    path.unlink(missing_ok=True)
                    data = None
                if data is None:
                    data = self._keep(path, self._fetch(where, number, block))
        with suppress(OSError):  # evicted meanwhile: it stays mapped
            os.utime(path)
        return data

    def _fetch(self, where: str, number: int, block: BlockHash) -> pa.Buffer:
        for _ in range(2):
            try:
                data = self._input(where).read_at(block.num_bytes, block.offset)
            except AnnotationError as error:
                if isinstance(error.__cause__, OSError):  # not a missing file, but no answer
                    raise _no_answer(where, error.__cause__) from error
                raise ShardError(where, found=error.found, expected="a shard that the manifest names", fix=error.fix) from error
            except OSError as error:
                self._inputs.pop(where, None)
                raise _no_answer(where, error) from error
            data = pa.py_buffer(data)
            if _is_sound(data, block):
                return data
            _LOG.warning("%s: block %d did not arrive as it was written", where, number)
        found = f"{xxhash.xxh3_128_hexdigest(data)} ({data.size} bytes), twice"
        raise _bad_block(where, number, block, found, "Upload the file again; `boxcar verify` checks every byte of a local copy.")

    def _input(self, where: str) -> pa.NativeFile:
        if where not in self._inputs:
            self._inputs[where] = storage.open_input(where)
            if len(self._inputs) > MAX_OPEN_REMOTE_FILES:
                self._inputs.popitem(last=False)[1].close()
        self._inputs.move_to_end(where)
        return self._inputs[where]

    def _keep(self, path: Path, data: pa.Buffer) -> pa.Buffer:
        """Write a block and map it, so that processes share its pages. One that is larger than the whole cache is not kept."""
        if data.size > self.max_bytes:
            return data
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with self._lock("count"):
                self._make_room(data.size)
                beside.write_bytes(data)
                mapped = _open_block(beside)
                os.rename(beside, path)
        except OSError as error:
            with suppress(OSError):
                beside.unlink()
            raise self._refused(error) from error
        assert mapped is not None, "it was written a moment ago"
        return mapped

    def _refused(self, error: OSError) -> BoxcarError:
        return BoxcarError(
            str(self.folder),
            found=f"{error.strerror or error} while keeping a block of a remote shard",
            expected=f"a writable folder with {self.max_bytes / 1e9:g} GB of free disk space",
            fix="Lower train.cache_gb, or set train.cache_dir to a larger disk.",
        )

    def _make_room(self, num_bytes: int) -> None:
        """Count `num_bytes` more, and evict where that is too much. Under the lock, as writing is, so that the bound holds at any time."""
        count = self.folder / ".bytes"
        try:
            total = int(count.read_text())
        except (OSError, ValueError):
            total = self.max_bytes  # not known: look
        if total + num_bytes > self.max_bytes:
            total = self._evict(self.max_bytes - num_bytes)
        count.write_text(str(total + num_bytes))

    def _evict(self, down_to: int) -> int:
        """Delete blocks, the longest unused first, until `down_to` bytes are left, and a tenth is free where anything must go at all.
        Returns what is left."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # renamed or healed meanwhile
                    status = entry.stat()
                    if entry.name.endswith(".block"):
                        found.append((status.st_mtime, status.st_size, entry.path))
                    elif entry.name.endswith(".tmp") and time.time() - status.st_mtime > ABANDONED_SECONDS:
                        os.unlink(entry.path)
        total = sum(size for _, size, _ in found)
        if total <= down_to:
            return total
        for _, size, path in sorted(found):
            with suppress(FileNotFoundError):
                os.unlink(path)
            total -= size
            if total <= min(down_to, self.max_bytes * 9 // 10):
                break
        return total

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Between processes; a process that dies lets go."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            stream = open(self.folder / f".{name}.lock", "w")  # noqa: SIM115  (closed below)
        except OSError as error:
            raise self._refused(error) from error
        with stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield


def _no_answer(where: str, error: OSError) -> StorageError:
    return StorageError(where, found=f"{error}", expected="a file that can be read", fix="Check the connection and the credentials.")


def _open_block(path: Path) -> pa.Buffer | None:
    """A mapped file of the cache; None where there is none."""
    try:
        with pa.memory_map(str(path)) as source:
            return source.read_buffer()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_sound(data: pa.Buffer, block: BlockHash) -> bool:
    return data.size == block.num_bytes and xxhash.xxh3_128_hexdigest(data) == block.xxh3_128
