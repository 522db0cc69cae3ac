"""`boxcar export-data --to parquet`: conversations, images and boxes in Parquet, with a dataset card (README.md).

    data/SPLIT-00000.parquet ...    rows in the order of the shards; a new file after BYTES_PER_FILE

| column    | type                                                       | content                                                         |
|-----------|------------------------------------------------------------|-----------------------------------------------------------------|
| id        | string                                                     | the sample's id (with #turn where each turn is a row)           |
| messages  | list<struct<role, content: list<struct<type, text>>>>      | what transformers' chat templates and TRL take                  |
| images    | list<struct<bytes, path>>                                  | upright; Hugging Face's Image feature                           |
| objects   | struct<bbox, category, image_index>, lists of one length   | each box once: xyxy, pixels of the upright image, float64       |

The Hugging Face features are written into the schema, so that `datasets` decodes the images by itself.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from boxcar.pipelines import storage
from boxcar.tools.exporting.conversation import Job, boxes_in_file
from boxcar.tools.exporting.export_files import ImageFile
from boxcar.train.data.messages import question_parts, system_prompt
from boxcar.train.data.store import Row

BYTES_PER_FILE = 500 << 20
"""Of a Parquet file, about: what the Hugging Face hub recommends."""
ROWS_PER_GROUP = 100
"""What is held in memory; also what a reader of one row must decode."""

_CONTENT = pa.list_(pa.struct([("type", pa.string()), ("text", pa.string())]))
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", _CONTENT)]))),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        (
            "objects",
            pa.struct(
                [
                    ("bbox", pa.list_(pa.list_(pa.float64(), 4))),
                    ("category", pa.list_(pa.string())),
                    ("image_index", pa.list_(pa.int32())),
                ]
            ),
        ),
    ]
)


def _value(dtype: str) -> dict[str, str]:
    return {"dtype": dtype, "_type": "Value"}


def _list(feature: Any, length: int = -1) -> dict[str, Any]:
    return {"feature": feature, "length": length, "_type": "List"}


_FEATURES = {
    "id": _value("string"),
    "messages": _list({"role": _value("string"), "content": _list({"type": _value("string"), "text": _value("string")})}),
    "images": _list({"_type": "Image"}),
    "objects": {
        "bbox": _list(_list(_value("float64"), 4)),
        "category": _list(_value("string")),
        "image_index": _list(_value("int32")),
    },
}
_HF_METADATA = {"huggingface": json.dumps({"info": {"features": _FEATURES}})}

_CARD = """
---
configs:
- config_name: default
  data_files:
{data_files}
task_categories:
- image-text-to-text
- object-detection
tags:
- grounding
- boxcar
---

# Boxes and conversations, written by `boxcar export-data`

```python
from datasets import load_dataset
dataset = load_dataset("FOLDER")                      # the folder of this file; `datasets` decodes the images
import polars
table = polars.scan_parquet("FOLDER/data/*.parquet")
```

| column | content |
|---|---|
| `id` | id of the sample |
| `messages` | conversation for chat templates and TRL; `{{"type": "image"}}` stands for the next of `images` |
| `images` | {images}, upright |
| `objects` | `bbox`: [x0, y0, x1, y1] in pixels of the image in `images`; `category`; `image_index` |

**Boxes in the text** are {grid}.{warning}

Model family: {title}. Train and serve with the pixel limits of the conversion: at least {min_pixels:,}, at most {max_pixels:,} pixels
(`size={{"shortest_edge": {min_pixels}, "longest_edge": {max_pixels}}}` of the image processor).

`objects` holds the boxes of all turns of a row, each once. Captions and absent objects have no boxes.
"""
_ABSOLUTE = " With other limits, or another resize, every box in the text is wrong; `objects` is not affected."


def write_parquet(job: Job) -> str:
    """Write data/*.parquet. Returns the text of the dataset card."""
    writers: dict[str, _Split] = {}
    with ExitStack() as stack:
        for row in job.rows():
            name = _split_name(row["split"])
            if name not in writers:
                writers[name] = stack.enter_context(_Split(job.out / "data", name))
            for entry in _entries(job, row):
                writers[name].add(entry)
                job.counts.update({"rows": 1, "boxes": len(entry["objects"]["bbox"])})
    family, limits = job.frame.family, job.frame.limits
    files = "".join(f"  - split: {name}\n    path: data/{name}-*.parquet\n" for name in writers)
    return _CARD.format(
        data_files=files.rstrip("\n"),
        images="bytes of the image files" if job.image_bytes else "paths of the image files",
        grid=family.grid.description,
        warning=_ABSOLUTE if family.grid.needs_resized_size else "",
        title=family.title,
        min_pixels=limits.min_pixels,
        max_pixels=limits.max_pixels,
    )


def _split_name(split: str) -> str:
    """A name that Hugging Face takes for a split: word characters and dots."""
    return "".join(char if char.isalnum() or char in "_." else "_" for char in split) or "train"


class _Split:
    """The files of one split, written row group by row group."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._name = folder, name
        self._rows: list[dict[str, Any]] = []
        self._number = 0
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> "_Split":
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) == ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        path = self._folder / f"{self._name}-{self._number:05d}.parquet"
        if self._writer is None:
            self._writer = pq.ParquetWriter(path, SCHEMA.with_metadata(_HF_METADATA), compression="zstd")
        self._writer.write_table(pa.Table.from_pylist(self._rows, SCHEMA.with_metadata(_HF_METADATA)))
        self._rows = []
        if path.stat().st_size >= BYTES_PER_FILE:
            self._writer.close()
            self._writer = None
            self._number += 1


def _entries(job: Job, row: Row) -> Iterator[dict[str, Any]]:
    """The Parquet rows of a row: one, or one for each turn where the family's template knows one question for an image."""
    files = [job.files.find(image, row["folder"]) for image in row["images"]]
    images = [_image(file, with_bytes=job.image_bytes) for file in files]
    groups = [[turn] for turn in row["turns"]] if job.frame.family.chat.one_question_per_image else [row["turns"]]
    for number, turns in enumerate(groups):
        yield {
            "id": row["sample_id"] if len(groups) == 1 else f"{row['sample_id']}#{number}",
            "messages": _messages(job, row, turns),
            "images": images,
            "objects": _objects(row, turns, files),
        }


def _messages(job: Job, row: Row, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    system = system_prompt(job.frame, row)
    found = [] if system is None else [_message("system", [system])]
    for parts, turn in zip(question_parts(job.frame.family, row, [turn["question"] for turn in turns]), turns, strict=True):
        found += [_message("user", parts), _message("assistant", [turn["answer"]])]
    return found


def _message(role: str, parts: Sequence[str | None]) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "image" if part is None else "text", "text": part} for part in parts]}


def _image(file: ImageFile, *, with_bytes: bool) -> dict[str, Any]:
    return (
        {"bytes": storage.read_bytes(file.path), "path": file.path.rpartition("/")[2]} if with_bytes else {"bytes": None, "path": file.path}
    )


def _objects(row: Row, turns: list[dict[str, Any]], files: list[ImageFile]) -> dict[str, list[Any]]:
    boxes: dict[tuple[Any, ...], None] = {}
    for turn in turns:
        place = max(0, turn["image_index"])
        if turn["boxes"] and (turn["image_index"] >= 0 or len(files) == 1):
            for label, box in zip(turn["labels"], boxes_in_file(files[place], turn["boxes"], row["images"][place]), strict=True):
                boxes[tuple(box), label, place] = None
    return {
        "bbox": [list(box) for box, _, _ in boxes],
        "category": [label for _, label, _ in boxes],
        "image_index": [place for _, _, place in boxes],
    }
