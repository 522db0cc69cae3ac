"""The annotation formats by name: the one place that sees them all."""

from pipelines.readers.coco import CocoReader
from pipelines.readers.coco_captions import CocoCaptionsReader
from pipelines.readers.cogvlm_text import CogvlmTextReader
from pipelines.readers.grefcoco import GrefcocoReader
from pipelines.readers.jsonl import JsonlReader
from pipelines.readers.labelme import LabelmeReader
from pipelines.readers.lvis import LvisReader
from pipelines.readers.qwen_vl_chat import QwenVlChatReader
from pipelines.readers.reader import Reader
from pipelines.readers.refcoco import RefcocoReader
from pipelines.readers.sharegpt import ShareGptReader
from pipelines.readers.swift import SwiftReader
from pipelines.readers.voc import VocReader
from pipelines.readers.yolo import YoloReader
from schemas.errors import ConfigError

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
