"""The annotation formats by name: the one place that sees them all."""

from boxcar.pipelines.readers.coco import CocoReader
from boxcar.pipelines.readers.coco_captions import CocoCaptionsReader
from boxcar.pipelines.readers.cogvlm_text import CogvlmTextReader
from boxcar.pipelines.readers.grefcoco import GrefcocoReader
from boxcar.pipelines.readers.jsonl import JsonlReader
from boxcar.pipelines.readers.labelme import LabelmeReader
from boxcar.pipelines.readers.lvis import LvisReader
from boxcar.pipelines.readers.qwen_vl_chat import QwenVlChatReader
from boxcar.pipelines.readers.reader import Reader
from boxcar.pipelines.readers.refcoco import RefcocoReader
from boxcar.pipelines.readers.sharegpt import ShareGptReader
from boxcar.pipelines.readers.swift import SwiftReader
from boxcar.pipelines.readers.voc import VocReader
from boxcar.pipelines.readers.yolo import YoloReader
from boxcar.schemas.errors import ConfigError

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


def find_reader(name: str, where: str = "convert.reader") -> Reader:
    """The reader of that name. Raises ConfigError with the names there are."""
    if name not in READERS:
        raise ConfigError(where, found=repr(name), expected=f"one of {', '.join(READERS)}")
    return READERS[name]
