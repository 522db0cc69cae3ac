"""An audit's columns from shards instead of annotations: memory-mapped, some ROWS_PER_CHUNK rows at a time, whatever their number.

What conversion left out is not in the shards: a larger cutoff or resolution brings no rejected record back, and a record that was split
stays in parts. Each row is a sample of its own here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from boxcar.pipelines.audit.columns import NO_CODE, Texts, Things
from boxcar.pipelines.audit.what_if import Grammar
from boxcar.pipelines.ragged import IntColumn, offsets_of
from boxcar.pipelines.shards.arrow_files import open_rows
from boxcar.pipelines.tokens.frame import Frame
from boxcar.schemas import manifest as manifests
from boxcar.schemas.errors import ShardError
from boxcar.schemas.manifest import Manifest
from boxcar.schemas.row import ROW_SCHEMA
from boxcar.schemas.task import TASK_NAMES

ROWS_PER_CHUNK = 1 << 14


@dataclass(frozen=True)
class ShardFolder:
    """One conversion among those that are audited together."""

    path: Path
    manifest: Manifest


def open_folders(paths: Sequence[Path]) -> list[ShardFolder]:
    """Raises ShardError for a folder without a manifest, ContractError where the contracts differ."""
    folders = [ShardFolder(path, manifests.load(path)) for path in paths]
    for folder in folders[1:]:
        folders[0].manifest.contract.require_equal(folder.manifest.contract, f"{folder.path}, beside {folders[0].path}")
    return folders


def read_shards(folders: Sequence[ShardFolder], frame: Frame, grammar: Grammar) -> Iterator[tuple[Things, Texts]]:
    """The columns of all rows, in their order. frame: of the folders' contract. Raises ShardError for a damaged shard."""
    for folder in folders:
        for entry in folder.manifest.shards:
            path = folder.path / entry.name
            reader = open_rows(path, ROW_SCHEMA)
            pending: list[pa.RecordBatch] = []
            for number in range(reader.num_record_batches):
                pending.append(reader.get_batch(number))
                if sum(batch.num_rows for batch in pending) >= ROWS_PER_CHUNK:
                    yield _columns(pending, frame, grammar, path)
                    pending = []
            if pending:
                yield _columns(pending, frame, grammar, path)


def _columns(batches: Sequence[pa.RecordBatch], frame: Frame, grammar: Grammar, path: Path) -> tuple[Things, Texts]:
    try:
        return _Chunk(pa.Table.from_batches(batches).combine_chunks(), frame, grammar).columns()
    except (pa.ArrowException, ValueError, IndexError) as error:
        raise ShardError(
            str(path),
            found=f"rows that cannot be read ({error})",
            expected="the file as it was written",
            fix="`boxcar verify` says what is damaged.",
        ) from error


class _Chunk:
    """Some rows of a shard."""

    def __init__(self, table: pa.Table, frame: Frame, grammar: Grammar) -> None:
        self.frame, self.grammar = frame, grammar
        self.columns_by_name = {name: table[name].chunk(0) for name in table.column_names if table.num_rows}
        self.num_rows = table.num_rows

    def columns(self) -> tuple[Things, Texts]:
        named = self.columns_by_name
        images, turns = named["images"], named["turns"]
        image_offsets, turn_offsets = _offsets(images), _offsets(turns)
        pictures, asked = images.flatten(), turns.flatten()
        sizes_wh = np.stack([pictures.field(name).to_numpy() for name in ("width", "height")], axis=1).astype(np.int32)
        resized_wh = np.stack([pictures.field(name).to_numpy() for name in ("resized_width", "resized_height")], axis=1).astype(np.int64)
        num_turns = len(asked)
        row_of_turn = np.repeat(np.arange(self.num_rows), np.diff(turn_offsets))
        tasks = _codes(asked.field("task"), TASK_NAMES)
        box_offsets = _offsets(asked.field("boxes"))
        boxes = asked.field("boxes").flatten().flatten().to_numpy().reshape(-1, 4)
        image_index = asked.field("image_index").to_numpy().astype(np.int64)
        # Boxes of several images in one turn: which is whose the row does not say, so their numbers stay as they are stored.
        placed = np.repeat(image_index >= 0, np.diff(box_offsets))
        owner = np.repeat(np.arange(num_turns), np.diff(box_offsets))[placed]
        references = image_offsets[row_of_turn[owner]] + image_index[owner]
        own_offsets = offsets_of(np.bincount(owner, minlength=num_turns))
        values = self.frame.family.grid.quantise(boxes[placed], sizes_wh[references].astype(np.int64), resized_wh[references])
        numbers = self.grammar.numbers.of_boxes(values)
        first, place = _distinct(boxes[placed], references)

        prompts, answers = asked.field("prompt_ids"), asked.field("answer_ids")
        ordered = named["ordered"].to_numpy(zero_copy_only=False)
        question = np.diff(_offsets(prompts))
        if ordered.any():
            is_image = offsets_of((prompts.flatten().to_numpy() == self.frame.image_token_id).astype(np.int64))
            question = question - np.diff(is_image[_offsets(prompts)])
        flags = asked.field("answer_is_coordinate")
        asked_boxes = self._question_boxes(flags, own_offsets, image_index)
        running = offsets_of(numbers)
        border = own_offsets[:-1] + asked_boxes
        in_question, in_answer = running[border] - running[own_offsets[:-1]], running[own_offsets[1:]] - running[border]
        digits = np.diff(offsets_of(flags.flatten().to_numpy(zero_copy_only=False).astype(np.int64))[_offsets(flags)])
        if (wrong := np.flatnonzero((digits != in_answer) & (image_index >= 0))).size:
            raise ValueError(
                f"turn {int(wrong[0])} of a chunk has {digits[wrong[0]]} tokens of numbers where its boxes take {in_answer[wrong[0]]}"
            )
        labels = asked.field("labels")
        names, label_codes, box_labels = _labels(labels, tasks, np.diff(box_offsets), placed)
        things = Things(
            num_read=self.num_rows,
            sample_ids=named["sample_id"].to_pylist(),
            positions=named["position"].to_pylist(),
            splits=named["split"].to_pylist(),
            rejected=np.zeros(self.num_rows, np.bool_),
            reasons={},
            image_offsets=image_offsets,
            paths=[path or "" for path in pictures.field("path").to_pylist()],
            sizes_wh=sizes_wh,
            own_limits=self._own_limits(sizes_wh, resized_wh),
            box_references=references[first].astype(np.int32),
            boxes=boxes[placed][first],
            box_labels=box_labels[first],
            labels=names,
            num_boxes_read=len(first),
            rules={},
            lint={},
        )
        texts = Texts(
            refused=np.zeros(self.num_rows, np.bool_),
            refusals={},
            first_reasons=np.full(self.num_rows, NO_CODE, np.int32),
            text_records=np.zeros(0, np.int32),
            text_reasons=np.zeros(0, np.int32),
            text_counts=np.zeros(0, np.int32),
            reason_names=[],
            reason_examples={},
            without_turns={},
            draft_records=np.arange(self.num_rows, dtype=np.int32),
            draft_ordered=ordered,
            draft_header=named["header_tokens"].to_numpy().astype(np.int32),
            draft_suffixed=np.zeros(self.num_rows, np.bool_),
            turn_offsets=turn_offsets,
            turn_tasks=tasks.astype(np.uint8),
            turn_question=(question - in_question).astype(np.int32),
            turn_answer=(np.diff(_offsets(answers)) - in_answer).astype(np.int32),
            turn_labels=label_codes,
            labels=names,
            turn_question_boxes=asked_boxes.astype(np.int32),
            box_offsets=own_offsets,
            box_rows=place.astype(np.int32),
        )
        return things, texts

    def _question_boxes(self, flags: pa.ListArray, box_offsets: IntColumn, image_index: IntColumn) -> IntColumn:
        """(T,) boxes in the question: all but those of the answer, of which each number is a run of coordinate tokens."""
        values = flags.flatten().to_numpy(zero_copy_only=False)
        offsets = _offsets(flags)
        starts = values & ~np.concatenate([[False], values[:-1]])[: len(values)]
        first = offsets[:-1][np.diff(offsets) > 0]
        starts[first] = values[first]
        runs = np.diff(offsets_of(starts.astype(np.int64))[offsets])
        return np.where(image_index >= 0, np.maximum(np.diff(box_offsets) - runs // 4, 0), 0)

    def _own_limits(self, sizes_wh: npt.NDArray[np.int32], resized_wh: IntColumn) -> IntColumn:
        """(M,) the pixel limit of images that were shrunk below the contract's; 0 for all others."""
        resize, limits = self.frame.family.resize, self.frame.limits
        usual = resize(sizes_wh[:, 0], sizes_wh[:, 1], limits.min_pixels, limits.max_pixels)
        own = np.zeros(len(sizes_wh), np.int64)
        for image in np.flatnonzero((usual.width != resized_wh[:, 0]) | (usual.height != resized_wh[:, 1])).tolist():
            token = int(resize.pixels_for(np.array(1)))
            steps = np.arange(token, limits.max_pixels + 1, token)
            width, height = sizes_wh[image].tolist()
            sizes = resize(width, height, *limits.lowered(steps))
            fitting = steps[(sizes.width == resized_wh[image, 0]) & (sizes.height == resized_wh[image, 1])]
            if not len(fitting):
                raise ValueError(f"an image of {sizes_wh[image].tolist()} px stands as {resized_wh[image].tolist()}, which no limit gives")
            own[image] = fitting[-1]
        return own


def _offsets(lists: pa.ListArray) -> IntColumn:
    """(N + 1,) int64 from 0, of a list column that may be a slice of another."""
    offsets: IntColumn = lists.offsets.to_numpy().astype(np.int64)
    return np.asarray(offsets - offsets[0])


def _codes(strings: pa.Array, names: Sequence[str]) -> IntColumn:
    encoded = strings.dictionary_encode()
    codes = np.array([names.index(name) for name in encoded.dictionary.to_pylist()], np.int64)
    return np.asarray(codes[encoded.indices.to_numpy()])


def _distinct(boxes: npt.NDArray[np.float64], references: IntColumn) -> tuple[IntColumn, IntColumn]:
    """(first place of each distinct box of an image, row of each box among them): several turns may speak of one box."""
    keys = references.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = np.ascontiguousarray(boxes).view(np.uint64).reshape(-1, 4)
    for column in range(4):
        keys = (keys ^ bits[:, column] ^ (bits[:, column] >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        keys ^= keys >> np.uint64(31)
    _, first, place = np.unique(keys, return_index=True, return_inverse=True)
    return first, place


def _labels(
    labels: pa.ListArray, tasks: IntColumn, num_boxes: IntColumn, placed: npt.NDArray[np.bool_]
) -> tuple[list[str], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """(names, (T,) code of what a detect or absent turn asks for, (placed boxes,) code of each box's label)."""
    offsets = _offsets(labels)
    encoded = labels.flatten().dictionary_encode()
    names: list[str] = encoded.dictionary.to_pylist()
    codes = encoded.indices.to_numpy().astype(np.int32)
    counts = np.diff(offsets)
    asks = np.isin(tasks, [TASK_NAMES.index("detect"), TASK_NAMES.index("absent")]) & (counts > 0)
    turn_codes = np.full(len(tasks), NO_CODE, np.int32)
    turn_codes[asks] = codes[offsets[:-1][asks]]
    if "" not in names:
        names.append("")
    own = np.full(int(num_boxes.sum()), names.index(""), np.int32)
    matched = counts == num_boxes
    own[np.repeat(matched, num_boxes)] = codes[np.repeat(matched, counts)]
    return names, turn_codes, own[placed]
