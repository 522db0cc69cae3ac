"""`boxcar verify`: every hash of every file, every invariant of every row. Needs no tokenizer and opens no referenced image.

manifest ──> files: size, hash of each block        rows: lengths add up, placeholders match grids, boxes inside images,
                                                          the boxes in the answer text are the boxes of the row
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from boxcar.pipelines.families.catalog import find_family
from boxcar.pipelines.families.family import Family
from boxcar.pipelines.images.image_file import decode_image
from boxcar.pipelines.ragged import offsets_of
from boxcar.pipelines.shards.arrow_files import check_file, image_shard_name, open_rows
from boxcar.pipelines.shards.work_folder import STATE_FOLDER
from boxcar.schemas import manifest as manifests
from boxcar.schemas.errors import BoxcarError, ImageError, ShardError
from boxcar.schemas.manifest import MANIFEST_NAME, FileEntry, Manifest
from boxcar.schemas.row import IMAGE_SHARD_SCHEMA, ROW_SCHEMA
from boxcar.schemas.task import TASK_NAMES

MAX_PROBLEMS_PER_FILE = 20
OnFile = Callable[[str, int, int], None]
BOX_TASKS = ("detect", "detect_joint", "refer")


class Report(msgspec.Struct):
    """What was checked and what is wrong; no problems: all is well."""

    num_files: int = 0
    num_rows: int = 0
    num_turns: int = 0
    visual_tokens: int = 0
    text_tokens: int = 0
    problems: list[str] = []


def verify_folder(folder: Path, on_file: OnFile = lambda *_: None) -> Report:
    """Check a conversion. Never raises for what is wrong with the data: it is in the report."""
    report = Report()
    try:
        manifest = manifests.load(folder)
    except ShardError as error:
        report.problems.append(str(error))
        return report
    files = [*manifest.shards, *manifest.image_shards, *manifest.quarantine]
    report.num_files = len(files) + 1
    report.problems += _strangers(folder, files)
    for number, entry in enumerate(files):
        on_file(entry.name, number, len(files))
        problems = check_file(folder, entry)
        if not problems:
            problems = list(_content_problems(folder, entry, manifest, report))
        report.problems += problems[:MAX_PROBLEMS_PER_FILE]
        if len(problems) > MAX_PROBLEMS_PER_FILE:
            report.problems.append(f"{entry.name}: {len(problems) - MAX_PROBLEMS_PER_FILE} more problems")
    on_file("", len(files), len(files))
    report.problems += _count_problems(manifest, report)
    return report


def _strangers(folder: Path, files: list[FileEntry]) -> list[str]:
    known = {entry.name for entry in files} | {MANIFEST_NAME, STATE_FOLDER}
    return [f"{entry.name}: found a file that the manifest does not know" for entry in sorted(folder.iterdir()) if entry.name not in known]


def _count_problems(manifest: Manifest, report: Report) -> list[str]:
    counts = manifest.counts
    problems = []
    if counts.records_read != counts.records_written + counts.num_rejected:
        problems.append(f"manifest: {counts.records_read} records read, {counts.records_written} written + {counts.num_rejected} rejected")
    if not report.problems and report.num_rows != counts.rows_written:
        problems.append(f"manifest: {counts.rows_written} rows written, {report.num_rows} found")
    if not report.problems and report.num_turns != sum(counts.turns.values()):
        problems.append(f"manifest: {sum(counts.turns.values())} turns written, {report.num_turns} found")
    for name in ("visual_tokens", "text_tokens"):
        if not report.problems and getattr(report, name) != getattr(counts, name):
            problems.append(f"manifest: {name} {getattr(counts, name)}, {getattr(report, name)} found")
    return problems


def _content_problems(folder: Path, entry: FileEntry, manifest: Manifest, report: Report) -> Iterator[str]:
    path = folder / entry.name
    try:
        if entry in manifest.shards:
            family = find_family(manifest.contract.family)
            for batch in _batches(path, ROW_SCHEMA):
                report.num_rows += batch.num_rows
                checker = _RowChecker(batch, manifest, family)
                report.num_turns += len(checker.turns)
                text = int(batch.column("text_tokens").to_numpy().sum())
                report.text_tokens += text
                report.visual_tokens += int(batch.column("total_tokens").to_numpy().sum()) - text
                yield from (f"{entry.name}, {problem}" for problem in checker.problems())
        elif entry in manifest.image_shards:
            for batch in _batches(path, IMAGE_SHARD_SCHEMA):
                yield from (f"{entry.name}, {problem}" for problem in _image_problems(batch))
    except BoxcarError as error:
        yield str(error)
    except KeyError as error:
        yield f"manifest: found no {error} in the settings, expected all that convert writes"


def _batches(path: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    reader = open_rows(path, schema)
    for number in range(reader.num_record_batches):
        yield reader.get_batch(number)


def _image_problems(batch: pa.RecordBatch) -> Iterator[str]:
    for row in batch.to_pylist():
        try:
            size = decode_image(row["bytes"], row["path"]).size
        except ImageError as error:
            yield str(error)
            continue
        stored = (row["width"], row["height"])
        upright = stored[::-1] if row["orientation"] >= 5 else stored
        if size != upright:
            yield f"{row['path']}: found {size} after decoding, expected {upright}"


class _RowChecker:
    """The invariants of one record batch, as columns where that is possible."""

    def __init__(self, batch: pa.RecordBatch, manifest: Manifest, family: Family) -> None:
        self.batch, self.manifest, self.family = batch, manifest, family
        self.contract = manifest.contract
        self.ids: list[str] = batch.column("sample_id").to_pylist()
        images, turns = batch.column("images"), batch.column("turns")
        self.images, self.turns = images.flatten(), turns.flatten()
        self.image_offsets = offsets_of(images.value_lengths().to_numpy())
        self.turn_offsets = offsets_of(turns.value_lengths().to_numpy())
        self.row_of_turn = np.repeat(np.arange(batch.num_rows), np.diff(self.turn_offsets))

    def problems(self) -> Iterator[str]:
        yield from self._unique_ids()
        yield from self._places()
        yield from self._sizes()
        yield from self._lengths()
        yield from self._turn_columns()
        yield from self._boxes()

    def _ints(self, name: str) -> npt.NDArray[np.int64]:
        return np.asarray(self.batch.column(name).to_numpy(), np.int64)

    def _image_ints(self, name: str) -> npt.NDArray[np.int64]:
        return np.asarray(self.images.field(name).to_numpy(), np.int64)

    def _report(self, rows: npt.NDArray[Any], what: Callable[[int], str]) -> Iterator[str]:
        for row in np.flatnonzero(rows).tolist():
            yield f"row {self.ids[row]}: {what(row)}"

    def _unique_ids(self) -> Iterator[str]:
        if len(set(self.ids)) != len(self.ids):
            yield "found a sample id twice in one batch, expected each once"

    def _places(self) -> Iterator[str]:
        """An image is either a path or a row of an image shard that there is."""
        has_path, has_shard, has_row = (
            self.images.field(name).is_valid().to_numpy(zero_copy_only=False) for name in ("path", "shard", "shard_row")
        )
        shard, row = (self.images.field(name).fill_null(-1).to_numpy() for name in ("shard", "shard_row"))
        num_stored = {entry.name: entry.num_rows for entry in self.manifest.image_shards}
        limits = np.zeros(len(shard), np.int64)
        for number in np.unique(shard).tolist():
            limits[shard == number] = num_stored.get(image_shard_name(number), 0)
        for image in np.flatnonzero((has_shard != has_row) | (has_path == has_shard)).tolist():
            found = "both a path and an image shard" if has_path[image] else "neither a path nor a row of an image shard"
            yield f"{self._row_of_image(image)}: {found} for an image"
        for image in np.flatnonzero(has_shard & has_row & ((row < 0) | (row >= limits))).tolist():
            yield f"{self._row_of_image(image)}: row {row[image]} of image shard {shard[image]}, which has {limits[image]}"
        orientation = self._image_ints("orientation")
        for image in np.flatnonzero((orientation < 1) | (orientation > 8)).tolist():
            yield f"{self._row_of_image(image)}: orientation {orientation[image]}, expected 1..8"

    def _row_of_image(self, image: int) -> str:
        return f"row {self.ids[int(np.searchsorted(self.image_offsets, image, side='right')) - 1]}"

    def _sizes(self) -> Iterator[str]:
        """Grids and tokens follow from the resized size, and that from the original one, but for images that were shrunk to fit."""
        width, height = self._image_ints("width"), self._image_ints("height")
        names = ("resized_width", "resized_height", "grid_t", "grid_h", "grid_w", "visual_tokens")
        found = {name: self._image_ints(name) for name in names}
        low, high = self.contract.min_pixels, self.contract.max_pixels
        expected = self.family.resize(width, height, low, high)
        same = (found["resized_width"] == expected.width) & (found["resized_height"] == expected.height) & ~expected.refused
        # A shrunk image keeps the family's arithmetic from its resized size on.
        area = found["resized_width"] * found["resized_height"]
        again = self.family.resize(np.maximum(found["resized_width"], 1), np.maximum(found["resized_height"], 1), 1, np.maximum(area, 1))
        shrunk = bool(self.manifest.counts.images_shrunk) & (area < expected.width * expected.height)
        derived = (again.grid_h == found["grid_h"]) & (again.grid_w == found["grid_w"]) & (again.visual_tokens == found["visual_tokens"])
        bad = ~(derived & (same | shrunk) & (found["grid_t"] == 1))
        for image in np.flatnonzero(bad).tolist():
            values = {name: int(column[image]) for name, column in found.items()}
            yield f"{self._row_of_image(image)}: image of {width[image]}x{height[image]} px with {values}, against the resize rule"

    def _lengths(self) -> Iterator[str]:
        contract = self.contract
        prompts, answers = self.turns.field("prompt_ids"), self.turns.field("answer_ids")
        prompt_lengths = prompts.value_lengths().to_numpy()
        answer_lengths = answers.value_lengths().to_numpy()
        in_prompts = _count_per_list(prompts, contract.image_token_id)
        own = prompt_lengths - in_prompts + answer_lengths + len(contract.answer_open_ids) + len(contract.turn_close_ids)
        headers = self.batch.column("header_ids")
        in_header = _count_per_list(headers, contract.image_token_id)
        images = np.diff(self.image_offsets)
        placeholders = in_header + _sums(in_prompts, self.turn_offsets)
        yield from self._report(placeholders != images, lambda row: f"{placeholders[row]} image tokens for {images[row]} images")
        visual = _sums(self._image_ints("visual_tokens") + contract.extra_placeholders, self.image_offsets)
        header = headers.value_lengths().to_numpy() - in_header
        num_turns = np.diff(self.turn_offsets)
        if contract.one_question_per_image:
            total = num_turns * (header + visual) + _sums(own, self.turn_offsets)
            text = total - num_turns * visual
        else:
            total = header + visual + _sums(own, self.turn_offsets) + (num_turns - 1) * len(contract.turn_open_ids)
            text = total - visual
        longest = np.array([own[a:b].max(initial=0) for a, b in zip(self.turn_offsets, self.turn_offsets[1:], strict=False)], np.int64)
        ordered = np.asarray(self.batch.column("ordered").to_numpy(zero_copy_only=False)) & (not contract.one_question_per_image)
        alone = np.where(ordered, total, header + visual + longest)
        columns = {"header_tokens": header, "visual_tokens": visual, "text_tokens": text, "total_tokens": total, "max_turn_tokens": alone}
        for name, expected in columns.items():
            found = self._ints(name)
            for row in np.flatnonzero(found != expected).tolist():
                yield f"row {self.ids[row]}: {name} {found[row]}, expected {expected[row]}"
        cutoff = int(self.manifest.settings["cutoff_len"])
        yield from self._report(alone > cutoff, lambda row: f"{alone[row]} tokens with one turn, over cutoff_len {cutoff}")
        yield from self._report(num_turns == 0, lambda _: "no turns")

    def _turn_columns(self) -> Iterator[str]:
        flags = self.turns.field("answer_is_coordinate").value_lengths().to_numpy()
        answers = self.turns.field("answer_ids").value_lengths().to_numpy()
        difficulty, weight = self.turns.field("difficulty").to_numpy(), self.turns.field("weight").to_numpy()
        checks = {
            "answer_is_coordinate is not as long as answer_ids": flags != answers,
            "an empty answer": answers == 0,
            "a difficulty outside [0, 1]": ~((difficulty >= 0) & (difficulty <= 1)),
            "a weight that is not positive": ~(weight > 0),
        }
        for what, bad in checks.items():
            for turn in np.flatnonzero(bad).tolist():
                yield f"row {self.ids[self.row_of_turn[turn]]}, turn {turn - self.turn_offsets[self.row_of_turn[turn]]}: {what}"

    def _boxes(self) -> Iterator[str]:
        """Boxes lie in their images, and the text says them."""
        rules = self.manifest.settings["rules"]
        may_hang_over = "keep" in (rules["overhang"], rules["mostly_outside"], rules["xywh_confusion"])
        sizes = np.stack([self._image_ints("width"), self._image_ints("height")], axis=1)
        resized = np.stack([self._image_ints("resized_width"), self._image_ints("resized_height")], axis=1)
        for number, turn in enumerate(self.turns.to_pylist()):
            row = self.row_of_turn[number]
            where = f"row {self.ids[row]}, turn {number - self.turn_offsets[row]} ({turn['task']})"
            if turn["task"] not in TASK_NAMES:
                yield f"{where}: task {turn['task']!r}, expected one of {', '.join(TASK_NAMES)}"
            boxes = np.array(turn["boxes"], np.float64).reshape(-1, 4)
            if not np.isfinite(boxes).all():
                yield f"{where}: a box that is not finite: {boxes.tolist()}"
                continue
            if len(boxes) and turn["image_index"] >= 0:
                image = self.image_offsets[row] + turn["image_index"]
                if image >= self.image_offsets[row + 1]:
                    yield f"{where}: image_index {turn['image_index']} of {self.image_offsets[row + 1] - self.image_offsets[row]} images"
                    continue
                size = np.tile(sizes[image], (len(boxes), 1))
                inside = (boxes >= 0).all() and (boxes[:, 2:] <= size).all() and (boxes[:, :2] < boxes[:, 2:]).all()
                if not (inside or may_hang_over):
                    yield f"{where}: a box outside the image of {size[0].tolist()}: {boxes.tolist()}"
                values = self.family.grid.quantise(boxes, size, np.tile(resized[image], (len(boxes), 1))).tolist()
                yield from (f"{where}: {problem}" for problem in self._text_problems(turn, values))
            elif turn["task"] in BOX_TASKS or turn["task"] == "describe":
                yield f"{where}: no box"
            elif turn["task"] == "absent" and self.family.box_text.parse_answer(turn["answer"]):
                yield f"{where}: boxes for an absent object: {turn['answer']!r}"

    def _text_problems(self, turn: dict[str, Any], values: list[list[int]]) -> Iterator[str]:
        box_text = self.family.box_text
        if turn["task"] in BOX_TASKS:
            parsed = box_text.parse_answer(turn["answer"])
            if parsed is None:
                yield f"an answer that is not in the family's form: {turn['answer']!r}"
            elif [list(box.values) for box in parsed] != values:
                yield f"the answer says {[box.values for box in parsed]}, the boxes of the row are {values}"
            elif [box.label for box in parsed if box.label is not None] not in ([], turn["labels"]):
                yield f"the answer names {[box.label for box in parsed]}, the labels of the row are {turn['labels']}"
            return
        said = [list(box.values) for text in (turn["question"], turn["answer"]) for box in box_text.find_boxes(text)]
        rest = iter(said)
        # A dialogue may hold numbers of its own that look like boxes: those of the row must be among them, in order.
        if not all(any(value == other for other in rest) for value in values):
            yield f"the text says {said}, the boxes of the row are {values}"


def _sums(values: npt.NDArray[Any], offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Sum of each stretch of a column."""
    running = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=running[1:])
    return np.asarray(running[offsets[1:]] - running[offsets[:-1]])


def _count_per_list(lists: pa.ListArray, wanted: int) -> npt.NDArray[np.int64]:
    """How often an id stands in each list."""
    return _sums(lists.flatten().to_numpy() == wanted, offsets_of(lists.value_lengths().to_numpy()))
