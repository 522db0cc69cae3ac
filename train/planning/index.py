"""The columns of shards that planning needs, for all rows of all folders: lengths, difficulty, tasks, weights. No image, no text, no ids.

    folders ──> shards ──> record batches (memory-mapped, or ranges of remote files) ──> PlanIndex, one array a column

8 turns to a row are about 180 bytes of index: ten million rows are planned in memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from boxcar.pipelines import storage
from boxcar.pipelines.boxes import difficulty
from boxcar.pipelines.ragged import IntColumn, offsets_of
from boxcar.schemas import manifest as manifests
from boxcar.schemas.contract import FrameContract
from boxcar.schemas.errors import AnnotationError, ShardError
from boxcar.schemas.manifest import Manifest
from boxcar.schemas.row import ROW_SCHEMA
from boxcar.schemas.task import TASK_NAMES

MAX_TURNS_OF_A_ROW = 1 << 15
"""Positions of turns in a plan are int16."""
QUANTILES = (1 << 16) - 1
"""The quantile 1 as it is stored."""
_COLUMNS = ("sample_id", "source", "images", "turns", "ordered", "header_tokens", "visual_tokens", "total_tokens")
_SCHEMA = pa.schema([ROW_SCHEMA.field(name) for name in _COLUMNS], metadata=ROW_SCHEMA.metadata)


@dataclass(frozen=True)
class Folder:
    """One conversion among those that are planned together."""

    path: str
    manifest: Manifest
    first_row: int
    """Number of its first row over all folders."""

    @property
    def num_rows(self) -> int:
        return sum(entry.num_rows for entry in self.manifest.shards)


@dataclass(frozen=True)
class PlanIndex:
    """N rows with T turns, in the order of folders, shards and rows. Lengths in tokens of the language model."""

    sample_keys: npt.NDArray[np.uint64]
    """(N,) xxh3_64 of the sample id: what choices are made by, so that they do not depend on where a row lies."""
    base_tokens: npt.NDArray[np.int32]
    """(N,) header and all images' placeholders: what a document has before its turns."""
    visual_tokens: npt.NDArray[np.int32]
    """(N,) the placeholders among them."""
    num_patches: npt.NDArray[np.int32]
    """(N,) patches of all images."""
    patches_squared: npt.NDArray[np.float32]
    """(N,) sum over the images of patches^2."""
    ordered: npt.NDArray[np.bool_]
    """(N,) dialogues: all turns in their order, or none."""
    source_codes: npt.NDArray[np.int16]
    """(N,) rows of `sources`."""
    sources: tuple[str, ...]
    turn_offsets: IntColumn
    """(N + 1,) turns of row r are turn_offsets[r] .. turn_offsets[r + 1]."""
    turn_tokens: npt.NDArray[np.int32]
    """(T,) question, answer, answer_open and turn_close, without placeholders; between two turns of a document stands turn_open."""
    turn_quantiles: npt.NDArray[np.uint16]
    """(T,) difficulty among all turns of the task, 0..QUANTILES: easiest to hardest."""
    turn_tasks: npt.NDArray[np.uint8]
    """(T,) rows of schemas.task.TASK_NAMES."""
    turn_open_tokens: int
    one_question_per_image: bool
    """True: each turn is a document of its own, behind its row's header and images."""
    folders: tuple[Folder, ...] = ()
    """() for an index that was made up."""

    @property
    def num_rows(self) -> int:
        return len(self.sample_keys)

    @property
    def num_turns(self) -> int:
        return len(self.turn_tokens)

    @property
    def contract(self) -> FrameContract:
        """Of all folders."""
        return self.folders[0].manifest.contract

    @property
    def cutoff_len(self) -> int:
        """The largest cutoff that a folder was made with, so that every row of each has a turn that fits."""
        return max(int(folder.manifest.settings["cutoff_len"]) for folder in self.folders)

    def describe(self, row: int) -> str:
        """A row for people: as `boxcar show FOLDER --row N` takes it."""
        for folder in reversed(self.folders):
            if row >= folder.first_row:
                return f"{folder.path}, row {row - folder.first_row}"
        return f"row {row}"


def read_index(folders: Sequence[str]) -> PlanIndex:
    """Read the index of folders of shards (local paths or URIs) of one contract.

    Raises ShardError for a shard that is missing, damaged or of another version, ContractError where the contracts differ. Remote shards
    are read as a whole but for the columns outside the turns; nothing is kept.
    """
    if not folders:
        raise ShardError("shards", found="no folder", expected="at least one folder of shards", fix="Name one in `shards`.")
    opened: list[Folder] = []
    for path in folders:
        first_row = opened[-1].first_row + opened[-1].num_rows if opened else 0
        opened.append(Folder(path, load_manifest(path), first_row))
        opened[0].manifest.contract.require_equal(opened[-1].manifest.contract, f"{path}, beside {opened[0].path}")
    return _Reading(tuple(opened)).run()


def load_manifest(folder: str) -> Manifest:
    """The manifest of a local or remote folder. Raises ShardError."""
    local = storage.local_path(folder)
    if local is not None:
        return manifests.load(Path(local))
    where = storage.join(folder, manifests.MANIFEST_NAME)
    try:
        data = storage.read_bytes(where)
    except AnnotationError as error:
        raise ShardError(where, found=error.found, expected="the manifest of a complete conversion", fix=error.fix) from error
    return manifests.loads(data, where)


def quantile_tables(folders: Sequence[Folder]) -> npt.NDArray[np.uint16]:
    """(tasks, bins) uint16: bin of the raw difficulty -> quantile among the turns of the task, over all folders.

    Half of a bin's own turns count as easier: where all turns of a task are as hard as each other (captions of one length) they stand in
    the middle, not at the end, and a gate neither prefers nor shuns them.
    """
    counts = np.zeros((len(TASK_NAMES), difficulty.NUM_BINS), np.int64)
    for folder in folders:
        for task, histogram in folder.manifest.counts.difficulty_histograms.items():
            for number, count in histogram.items():
                counts[TASK_NAMES.index(task), int(number)] += count
    below = np.cumsum(counts, axis=1) - counts
    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # Integers to the end: 2 below + counts <= 2 totals, and the product of some 2^34 turns with 2^17 still fits.
    return np.asarray((2 * below + counts) * QUANTILES // (2 * totals), np.uint16)


class _Reading:
    """Fills the columns batch by batch; their sizes stand in the manifests, so that nothing is held twice."""

    def __init__(self, folders: tuple[Folder, ...]) -> None:
        self.folders = folders
        self.contract = folders[0].manifest.contract
        self.num_rows = sum(folder.num_rows for folder in folders)
        self.num_turns = sum(sum(folder.manifest.counts.turns.values()) for folder in folders)
        self.rows: dict[str, npt.NDArray[Any]] = {
            "sample_keys": np.empty(self.num_rows, np.uint64),
            "base_tokens": np.empty(self.num_rows, np.int32),
            "visual_tokens": np.empty(self.num_rows, np.int32),
            "num_patches": np.empty(self.num_rows, np.int32),
            "patches_squared": np.empty(self.num_rows, np.float32),
            "ordered": np.empty(self.num_rows, np.bool_),
            "source_codes": np.empty(self.num_rows, np.int16),
        }
        self.turns: dict[str, npt.NDArray[Any]] = {
            "turn_tokens": np.empty(self.num_turns, np.int32),
            "turn_quantiles": np.empty(self.num_turns, np.uint16),
            "turn_tasks": np.empty(self.num_turns, np.uint8),
        }
        self.turn_offsets = np.zeros(self.num_rows + 1, np.int64)
        self.sources: dict[str, int] = {}
        self.quantiles = quantile_tables(folders)
        self.row = self.turn = 0

    def run(self) -> PlanIndex:
        for folder in self.folders:
            first_turn = self.turn
            for entry in folder.manifest.shards:
                path = storage.join(folder.path, entry.name)
                stop = self.row + entry.num_rows
                with _as_shard_error(path):
                    for batch in record_batches(path, _SCHEMA):
                        _require(self.row + batch.num_rows <= stop, "more rows than the manifest says")
                        self._take(batch, path)
                    _require(self.row == stop, "fewer rows than the manifest says")
            if self.turn - first_turn != sum(folder.manifest.counts.turns.values()):
                raise ShardError(
                    folder.path, found=f"{self.turn - first_turn} turns", expected="as many as the manifest counts", fix="Convert again."
                )
        return PlanIndex(
            **self.rows,
            **self.turns,
            turn_offsets=self.turn_offsets,
            sources=tuple(self.sources),
            turn_open_tokens=len(self.contract.turn_open_ids),
            one_question_per_image=self.contract.one_question_per_image,
            folders=self.folders,
        )

    def _take(self, batch: pa.RecordBatch, path: str) -> None:
        columns: Mapping[str, pa.Array] = dict(zip(_COLUMNS, batch.columns, strict=True))
        for name in ("sample_id", "source"):
            columns[name].validate(full=True)
        turns = columns["turns"].values
        turn_offsets = _offsets(columns["turns"])
        num_turns = int(turn_offsets[-1])
        _require(self.turn + num_turns <= self.num_turns, "more turns than the manifest counts")
        _require(bool((np.diff(turn_offsets) < MAX_TURNS_OF_A_ROW).all()), f"a row of {MAX_TURNS_OF_A_ROW} turns or more")
        ordered = columns["ordered"].to_numpy(zero_copy_only=False)

        answers = np.diff(_offsets(turns.field("answer_ids")))[:num_turns]
        around = len(self.contract.answer_open_ids) + len(self.contract.turn_close_ids)
        turn_tokens = self._question_tokens(turns.field("prompt_ids"), turn_offsets, ordered) + answers + around
        tasks = _codes(turns.field("task").slice(0, num_turns), {name: code for code, name in enumerate(TASK_NAMES)}, grow=False)
        raw = turns.field("difficulty").to_numpy()[:num_turns]
        weights = turns.field("weight").to_numpy()[:num_turns]
        _require(bool(((raw >= 0) & (raw <= 1)).all()), "a difficulty outside 0..1")
        _require(bool((np.isfinite(weights) & (weights >= 0)).all()), "a loss weight that is negative or no number")

        base = columns["header_tokens"].to_numpy().astype(np.int64) + columns["visual_tokens"].to_numpy()
        self._check_totals(base, turn_tokens, turn_offsets, columns["total_tokens"].to_numpy(), path)
        patches, squared = _patches(columns["images"])
        rows = {
            "sample_keys": [xxhash.xxh3_64_intdigest(key) for key in columns["sample_id"].view(pa.binary()).to_pylist()],
            "base_tokens": base,
            "visual_tokens": columns["visual_tokens"].to_numpy(),
            "num_patches": patches,
            "patches_squared": squared,
            "ordered": ordered,
            "source_codes": _codes(columns["source"], self.sources, grow=True),
        }
        for name, values in rows.items():
            self.rows[name][self.row : self.row + batch.num_rows] = values
        per_turn = {
            "turn_tokens": turn_tokens,
            "turn_quantiles": self.quantiles[tasks, difficulty.bins(raw)],
            "turn_tasks": tasks,
        }
        for name, values in per_turn.items():
            self.turns[name][self.turn : self.turn + num_turns] = values
        self.turn_offsets[self.row + 1 : self.row + batch.num_rows + 1] = self.turn + turn_offsets[1:]
        self.row += batch.num_rows
        self.turn += num_turns

    def _question_tokens(self, prompts: pa.ListArray, turn_offsets: IntColumn, ordered: npt.NDArray[np.bool_]) -> IntColumn:
        """(turns of the batch,) ids of each question without image tokens, which only a dialogue has there."""
        offsets = _offsets(prompts)[: turn_offsets[-1] + 1]
        tokens: IntColumn = np.diff(offsets)
        if ordered.any():
            # The ids themselves are read for dialogues alone: they are most of a shard.
            ids = prompts.values.to_numpy()
            for row in np.flatnonzero(ordered):
                first, last = turn_offsets[row], turn_offsets[row + 1]
                start = offsets[first]
                running = offsets_of((ids[start : offsets[last]] == self.contract.image_token_id).astype(np.int64))
                tokens[first:last] -= np.diff(running[offsets[first : last + 1] - start])
        return tokens

    def _check_totals(
        self, base: IntColumn, turn_tokens: IntColumn, turn_offsets: IntColumn, totals: npt.NDArray[np.int32], path: str
    ) -> None:
        """Lengths stand in a row twice, by turn and in sum: a shard in which they differ is damaged."""
        num_turns = np.diff(turn_offsets)
        expected = np.diff(offsets_of(turn_tokens)[turn_offsets])
        if self.contract.one_question_per_image:
            expected = expected + num_turns * base
        else:
            expected = expected + base + (num_turns - 1) * len(self.contract.turn_open_ids)
        wrong = np.flatnonzero((expected != totals) | (num_turns == 0))
        if len(wrong):
            row = int(wrong[0])
            raise ShardError(
                f"{path}, row {self._row_of_shard(path, row)}",
                found=f"total_tokens {totals[row]} over {num_turns[row]} turns that make {expected[row]}",
                expected="one length",
                fix="The shard is damaged (`boxcar verify` says where): convert again.",
            )

    def _row_of_shard(self, path: str, row_of_batch: int) -> int:
        for folder in self.folders:
            first = folder.first_row
            for entry in folder.manifest.shards:
                if storage.join(folder.path, entry.name) == path:
                    return self.row + row_of_batch - first
                first += entry.num_rows
        raise AssertionError("unreachable: the path is a shard's")


class _Damaged(ValueError):
    """What is wrong with a batch, in words."""


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise _Damaged(otherwise)


@contextmanager
def _as_shard_error(path: str) -> Iterator[None]:
    """Whatever Arrow says of a damaged file becomes a ShardError that names it."""
    try:
        yield
    except ShardError:
        raise
    except (OSError, pa.ArrowException, ValueError, KeyError, IndexError, AnnotationError) as error:
        found = error.found if isinstance(error, AnnotationError) else f"{error}"
        missing = isinstance(error, FileNotFoundError) or "no such file" in found
        raise ShardError(
            path,
            found="no such file" if missing else f"a shard that cannot be read ({found})",
            expected="the file that the manifest names, as it was written",
            fix="Convert again, or copy the folder anew; `boxcar verify` checks every byte.",
        ) from error


def record_batches(path: str, schema: pa.Schema, whole: pa.Schema = ROW_SCHEMA) -> Iterator[pa.RecordBatch]:
    """The record batches of a local or remote Arrow file of the schema `whole`, of these columns alone. Raises ShardError for another."""
    options = pa.ipc.IpcReadOptions(included_fields=[whole.get_field_index(name) for name in schema.names])
    local = storage.local_path(path)
    with pa.memory_map(local) if local is not None else storage.open_input(path) as source:
        reader = pa.ipc.open_file(source, options=options)
        found = reader.schema.metadata or {}
        if found != schema.metadata or reader.schema != schema:
            raise ShardError(
                path,
                found=f"schema {found.get(b'boxcar.schema', b'?').decode()} version {found.get(b'boxcar.version', b'?').decode()}",
                expected=f"row version {schema.metadata[b'boxcar.version'].decode()}",
                fix="Convert again with this version of Boxcar.",
            )
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


def _offsets(lists: pa.ListArray) -> IntColumn:
    """(N + 1,) int64 offsets of a list column, checked: Arrow itself trusts them."""
    offsets: IntColumn = lists.offsets.to_numpy().astype(np.int64)
    sound = offsets[0] == 0 and bool((np.diff(offsets) >= 0).all()) and offsets[-1] <= len(lists.values)
    _require(sound, "list offsets out of range")
    return offsets


def _codes(strings: pa.Array, codes: dict[str, int], *, grow: bool) -> npt.NDArray[np.int64]:
    """(N,) codes of strings. `grow`: a string that is not there yet gets the next code."""
    strings.validate(full=True)
    encoded = strings.dictionary_encode()
    names = encoded.dictionary.to_pylist()
    for name in names:
        if grow:
            codes.setdefault(name, len(codes))
        _require(name in codes, f"the task {name!r}, expected one of {', '.join(codes)}")
    return np.asarray(np.array([codes[name] for name in names], np.int64)[encoded.indices.to_numpy()])


def _patches(images: pa.ListArray) -> tuple[IntColumn, IntColumn]:
    """(N,) patches of all images of each row, and the sum of their squares."""
    offsets = _offsets(images)
    grid = [images.values.field(name).to_numpy().astype(np.int64) for name in ("grid_t", "grid_h", "grid_w")]
    patches = grid[0] * grid[1] * grid[2]
    return np.asarray(np.diff(offsets_of(patches)[offsets])), np.asarray(np.diff(offsets_of(patches**2)[offsets]))
