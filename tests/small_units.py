"""Records made by hand, and their conversion in memory: no file, no Ray, one of the small tokenizers."""

from collections.abc import Iterable, Mapping
from typing import Any

from boxcar.pipelines.boxes.rules import LookUp
from boxcar.pipelines.images.image_file import ImageHeader
from boxcar.pipelines.images.lookup import FoundImage, ImageLookup
from boxcar.pipelines.rows.unit import UnitConverter, UnitResult
from boxcar.pipelines.tokens.frame import Frame, build_frame
from boxcar.schemas.errors import ImageError
from boxcar.schemas.record import Box, ImageRef, Record, Region, Rejected
from boxcar.schemas.task import TASK_NAMES as TASKS
from boxcar.schemas.workflow import ConvertConfig, TaskConfig, TasksConfig
from tests.small_tokenizers import TOKENIZER_OF_FAMILY, folder_of

EVERY_TASK = TasksConfig(
    detect=TaskConfig(share=1.0),
    detect_joint=TaskConfig(share=1.0),
    refer=TaskConfig(share=1.0),
    describe=TaskConfig(share=1.0),
    absent=TaskConfig(share=1.0),
    caption=TaskConfig(share=1.0),
    dialogue=TaskConfig(share=1.0),
)


def only(**tasks: TaskConfig) -> TasksConfig:
    """These tasks, all others off."""
    return TasksConfig(**{task: tasks.get(task, TaskConfig(share=0.0)) for task in TASKS})


def settings(family: str, **changes: Any) -> ConvertConfig:
    """A conversion for a family with its small tokenizer; the longest cutoff unless `changes` says otherwise."""
    defaults: dict[str, Any] = {
        "reader": "jsonl",
        "annotations": "rows.jsonl",
        "family": family,
        "tokenizer": folder_of(TOKENIZER_OF_FAMILY[family]),
        "cutoff_len": 2048,
        "output": "shards",
        "trust_sizes": True,
    }
    return ConvertConfig(**{**defaults, **changes})


def converter(config: ConvertConfig) -> UnitConverter:
    """As each worker has one for its life."""
    return UnitConverter(config, frame_of(config), "source")


def frame_of(config: ConvertConfig) -> Frame:
    return build_frame(config)


def convert(config: ConvertConfig, records: Iterable[Record | Rejected], lookup: LookUp | None = None) -> UnitResult:
    """One unit. Sizes are those that the records declare unless `lookup` knows the files."""
    return converter(config).convert(records, lookup or ImageLookup("", trust_sizes=True))


def rows_of(result: UnitResult) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = result.table.to_pylist()
    return rows


def header(width: int, height: int, orientation: int = 1, mode_note: str = "") -> ImageHeader:
    """Of a file whose stored pixels are this wide and high."""
    return ImageHeader("jpeg", width, height, orientation, mode_note, 1000)


def files(headers: Mapping[str, ImageHeader | ImageError]) -> LookUp:
    """Files by path, as they would be read."""

    def look_up(image: ImageRef) -> FoundImage:
        return FoundImage(image.path, headers[image.path])

    return look_up


def image(width: int | None = 640, height: int | None = 480, path: str = "a.jpg") -> ImageRef:
    return ImageRef(path, width, height)


def record(record_id: str = "1", images: tuple[ImageRef, ...] | None = None, **fields: Any) -> Record:
    """A record of one 640x480 image unless `images` says otherwise."""
    return Record(record_id, f"rows.jsonl, row {record_id}", (image(),) if images is None else images, **fields)


def region(label: str, box: Box = (100.0, 100.0, 200.0, 200.0), *phrases: str, **fields: Any) -> Region:
    return Region(box, label, phrases, **fields)
