"""LLaMA-Factory's sharegpt conversations, and LLaVA's: a JSON list or JSON lines of rows with messages and images.

    what            in the file                                                        in the record
    messages        `conversations` [{from, value}] or `messages` [{role, content}]    turns; human and user ask, gpt and assistant answer
    system prompt   a first message of role system, else the column `system`           system; "" is as good as none, as in LLaMA-Factory
    images          `images` (list or one path), or LLaVA's `image`                    images, in order; relative to the workflow's `images`
    place           `<image>`, one for each image, in questions                        ImageMark
    boxes           in the text, in any form of `pipelines.readers.shared.marked_text`                BoxMark, in the workflow's `box_space`
    id              `id`; without it a hash of the row                                 record_id

Other columns are ignored, as LLaMA-Factory does. Checked against its data/converter.py @f816ae4 and data/README.md.

Traps, and what is done:
- boxes of an unknown space. Nothing in the file says whether `(493,169)` are pixels or thousandths: a row with boxes is rejected until
  the workflow sets `box_space`. Lists in prose, [x0, y0, x1, y1], stay text until then; the plan's notes say so.
- LLaVA's own boxes are fractions of the image *padded to a square* (haotian-liu/LLaVA#606; #822 doubts it for some of its sources).
  Boxcar has no such space: `relative` means fractions of the image itself. The plan's notes warn.
- markers and images that differ in number: LLaMA-Factory raises, and so the row is rejected; also a single image without a marker, as in
  older LLaVA files, since nobody knows where it belongs.
- a box after the second image: rejected, for the text does not say which one it is in.
- `images: "a.jpg"` is one path, not six of one letter (hiyouga/LLaMA-Factory#5883).
- observation, function_call and other tool roles, the column `tools`, videos and sounds: rejected, since a Record cannot say them.
- `kto_tag: false` marks an answer that people disliked: rejected, for training would teach it.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from boxcar.pipelines.readers.reader import COMMON_KEYS, Refused, SourcePlan, Unit
from boxcar.pipelines.readers.shared.marked_text import (
    BOX_SPACE_KEYS,
    CONVERSATION_KEYS,
    UNSUPPORTED_MEDIA,
    UNTRAINED_ANSWER,
    Marks,
    Message,
    Place,
    compile_forms,
    declared_space,
    image_refs,
    pair_turns,
    plan_rows,
    read_rows,
    split_text,
)
from boxcar.schemas.record import PIXELS, Record, Rejected
from boxcar.schemas.workflow import SourceConfig

UNSUPPORTED_TOOLS = "unsupported_tools"

# `<ref>` alone, and strays of it, are ordinary text in pages about wikis and web sites.
_PATTERN = compile_forms("image", "json", "stray_json", "tags", "tag_ref", "stray_tag", "ref", "brackets", "list")


class _Row(msgspec.Struct):
    id: str | int | None = None
    conversations: list[Message] | None = None
    messages: list[Message] | None = None
    images: list[str] | str | None = None
    image: list[str] | str | None = None
    system: str | None = None
    tools: Any = None
    videos: Any = None
    audios: Any = None
    kto_tag: Any = None


class ShareGptReader:
    name = "sharegpt"
    uses = COMMON_KEYS | BOX_SPACE_KEYS

    def plan(self, config: SourceConfig, work_dir: Path, records_per_unit: int) -> SourcePlan:
        return plan_rows(config, records_per_unit, _notes(config))

    def read(self, config: SourceConfig, unit: Unit) -> Iterator[Record | Rejected]:
        return read_rows(unit, _Row, partial(_record, config))


def _notes(config: SourceConfig) -> tuple[str, ...]:
    if config.box_space is None:
        return ("box_space is not set: number lists such as [10, 20, 30, 40] stay text, and rows with other boxes are rejected",)
    if config.box_space == "relative":
        return (
            "box_space: relative means fractions of the image itself; LLaVA's own data count on the image padded to a square "
            "(haotian-liu/LLaVA#606) and must be converted before",
        )
    return ()


def _record(config: SourceConfig, row: _Row, place: Place) -> Record:
    if (row.conversations is None) == (row.messages is None):
        found = "neither" if row.messages is None else "both"
        raise Refused(CONVERSATION_KEYS, f"found {found} of `conversations` and `messages`, expected one")
    if row.tools:
        raise Refused(UNSUPPORTED_TOOLS, "found `tools`, expected a conversation without tools")
    if row.videos or row.audios:
        raise Refused(UNSUPPORTED_MEDIA, "found videos or audios, expected images only")
    if row.kto_tag is False:
        raise Refused(UNTRAINED_ANSWER, "found `kto_tag: false`, an answer that must not be taught")
    images = image_refs(row.images, row.image)
    space = declared_space(config)
    marks = Marks(len(images), space)
    system, turns = pair_turns(row.conversations or row.messages or [], lambda text: split_text(text, _PATTERN, marks.parse))
    marks.check_images()
    return Record(
        record_id=place.record_id,
        position=place.position,
        images=images,
        dialogue=turns,
        box_space=space or PIXELS,
        language=config.language,
        split=config.split,
        system=system or row.system or None,
    )
