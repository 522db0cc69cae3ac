"""The annotation formats by name: the one place that sees them all."""

from pathlib import Path

from boxcar.pipelines.readers.coco import CocoReader
from boxcar.pipelines.readers.coco_captions import CocoCaptionsReader
from boxcar.pipelines.readers.cogvlm_text import CogvlmTextReader
from boxcar.pipelines.readers.grefcoco import GrefcocoReader
from boxcar.pipelines.readers.jsonl import JsonlReader
from boxcar.pipelines.readers.labelme import LabelmeReader
from boxcar.pipelines.readers.lvis import LvisReader
from boxcar.pipelines.readers.qwen_vl_chat import QwenVlChatReader
from boxcar.pipelines.readers.reader import Reader, SourcePlan
from boxcar.pipelines.readers.refcoco import RefcocoReader
from boxcar.pipelines.readers.shared.compressed import unpacked
from boxcar.pipelines.readers.sharegpt import ShareGptReader
from boxcar.pipelines.readers.swift import SwiftReader
from boxcar.pipelines.readers.voc import VocReader
from boxcar.pipelines.readers.yolo import YoloReader
from boxcar.schemas.errors import AnnotationError, ConfigError
from boxcar.schemas.workflow import SourceConfig

READERS: dict[str, Reader] = {
    "coco": CocoReader(),
    "coco_captions": CocoCaptionsReader(),
    "lvis": LvisReader(),
    "refcoco": RefcocoReader(),
    "grefcoco": GrefcocoReader(),
    "voc": VocReader(),
    "yolo": YoloReader(),
    "labelme": LabelmeReader(),
    "jsonl": JsonlReader(),
    "sharegpt": ShareGptReader(),
    "ms_swift": SwiftReader(),
    "qwen_vl_chat": QwenVlChatReader(),
    "cogvlm_text": CogvlmTextReader(),
}


def plan_source(config: SourceConfig, work_dir: Path, records_per_unit: int, *, unlabelled: bool = False) -> SourcePlan:
    """Cut a source into units; compressed files are unpacked into `work_dir`.

    unlabelled: whether images without annotations will do. Raises AnnotationError where there is nothing to cut, or nothing to teach.
    """
    plan = find_reader(config.reader).plan(unpacked(config, work_dir), work_dir, records_per_unit)
    if not plan.units:
        fix = "Check `annotations`, `reader` and `split`."
        raise AnnotationError(config.annotations, found="no records", expected="one at least", fix=fix)
    if plan.unlabelled and not unlabelled:
        raise AnnotationError(
            config.annotations,
            found=plan.unlabelled,
            expected="annotations to learn from",
            fix="Name the file with the annotations. `boxcar audit` says what the images cost in visual tokens.",
        )
    return plan


def find_reader(name: str, where: str = "convert.reader") -> Reader:
    """The reader of that name. Raises ConfigError with the names there are."""
    if name not in READERS:
        raise ConfigError(where, found=repr(name), expected=f"one of {', '.join(READERS)}")
    return READERS[name]
