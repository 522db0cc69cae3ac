"""Qwen-VL's and Qwen-VL-Chat's conversations: images and boxes inside the text, as finetune.py of QwenLM/Qwen-VL reads them.

    what            in the file                                                       in the record
    messages        `conversations` [{from: user|assistant, value}]                   turns
    images          `Picture 1: <img>a.jpg</img>` and a newline, in questions         ImageMark; prefix and newline are the template's
    boxes           `<ref>dog</ref><box>(x0,y0),(x1,y1)</box>`, integers              BoxMark, label "dog"; thousandths, [0, 1000)
    several boxes   `<ref>dogs</ref><box>..</box><box>..</box>`                       one BoxMark with all of them
    without phrase  `<box>(x0,y0),(x1,y1)</box>`                                      BoxMark, no label
    quadrilateral   `<quad>(x,y),(x,y),(x,y),(x,y)</quad>`                            its bounding box: Boxcar has no quads
    phrase alone    `<ref>dog</ref>`                                                  the text `dog`
    id              `id`; without it a hash of the row                                record_id

Checked against README.md and finetune.py of QwenLM/Qwen-VL.

Traps, and what is done:
- numbers above 1000 are pixels: the row is rejected. 1000 itself, which the range excludes, is taken: some writers round up to it.
- `<ref> Woman</ref>`: the blank belongs to the sentence and moves out of the label.
- images are numbered through the whole conversation. A `Picture N` out of order is rejected: the model's text will be numbered again, and
  a question about "Picture 2" would then mean another image. An image without the prefix (the base model's form) is taken, and keeps its
  newline.
- tags that are cut or broken, such as the base model's evaluation prompt that ends in `<box>`: rejected, they would be tokens of their
  own.
- boxes after a second image: rejected, for a box does not say which image it lies in.
"""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import msgspec

from boxcar.pipelines.readers.reader import COMMON_KEYS, Refused, SourcePlan, Unit
from boxcar.pipelines.readers.shared.marked_text import (
    CONVERSATION_KEYS,
    Marks,
    Message,
    Place,
    compile_forms,
    image_refs,
    pair_turns,
    plan_rows,
    read_rows,
    split_text,
)
from boxcar.schemas.record import PER_MILLE, Record, Rejected, TextPart
from boxcar.schemas.workflow import SourceConfig

PICTURE_NUMBER = "picture_number"

# The Int4 checkpoint's copy of the tokenizer writes no blank after the colon.
_PATTERN = compile_forms("ref", "ref_only", "stray_ref", starts="<P", picture=r"Picture [0-9]+: ?<img>.*?</img>\n?|<img>.*?</img>")
_PICTURE = re.compile(r"(?:Picture ([0-9]+): ?)?<img>(.*?)</img>", re.DOTALL)


class _Row(msgspec.Struct):
    id: str | int | None = None
    conversations: list[Message] | None = None


class QwenVlChatReader:
    name = "qwen_vl_chat"
    uses = COMMON_KEYS

    def plan(self, config: SourceConfig, work_dir: Path, records_per_unit: int) -> SourcePlan:
        return plan_rows(config, records_per_unit)

    def read(self, config: SourceConfig, unit: Unit) -> Iterator[Record | Rejected]:
        return read_rows(unit, _Row, partial(_record, config))


def _parse(marks: Marks, form: str, found: str) -> Sequence[TextPart]:
    if form != "picture":
        return marks.parse(form, found)
    mark = marks.image()
    number = _PICTURE.match(found)
    assert number is not None
    if number[1] is not None and int(number[1]) != mark.image_index + 1:
        raise Refused(
            PICTURE_NUMBER, f"found Picture {number[1]} for image {mark.image_index + 1} of the conversation, expected the same number"
        )
    return (mark,)


def _record(config: SourceConfig, row: _Row, place: Place) -> Record:
    if row.conversations is None:
        raise Refused(CONVERSATION_KEYS, "found no `conversations`, expected [{from, value}, ...]")
    texts = [message.text or "" for message in row.conversations]
    images = image_refs([path.strip() for text in texts for _, path in _PICTURE.findall(text)])
    marks = Marks(len(images), PER_MILLE)
    system, turns = pair_turns(row.conversations, lambda text: split_text(text, _PATTERN, partial(_parse, marks)))
    return Record(
        record_id=place.record_id,
        position=place.position,
        images=images,
        dialogue=turns,
        box_space=PER_MILLE,
        language=config.language,
        split=config.split,
        system=system,
    )
