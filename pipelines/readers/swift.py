"""ms-swift's standard format: messages with `<image>`, `<ref-object>` and `<bbox>`, and the `objects` that stand for them.

    what            in the file                                                 in the record
    messages        `messages` [{role: system|user|assistant, content}]         turns
    images          `images` (list or one path), or `image`                     images, in order; relative to the workflow's `images`
    boxes           `objects.bbox` [[x0, y0, x1, y1], ...], one per `<bbox>`    xyxy, as they are
    space           `objects.bbox_type`: real (also if missing), norm1          pixels of the original image; relative
                    norm_1, norm_1000 (ms-swift 2)                              relative; thousandths
    image of a box  `objects.image_id`, from 0; 0 for all if missing            BoxMark.image_index
    phrases         `objects.ref`, one per `<ref-object>`                       label of the boxes right behind it, otherwise text
    id              `id`; without it a hash of the row                          record_id

Checked against docs/source_en/Customization/Custom-dataset.md @025fc6b and swift/template/base.py @02142f2.

Traps, and what is done:
- refs and boxes are not paired by their places in the lists: `<ref-object><bbox><bbox> and <ref-object><bbox>` has two refs and three
  boxes. A label is the `<ref-object>` right before a run of `<bbox>`, with only blanks between; a run without one has no label. Boxes of
  a run that lie in different images become one mark for each image.
- counts that differ. ms-swift drops what is left over, or leaves `<bbox>` in the text; its own documentation once gave three refs for two
  `<ref-object>`. Here the row is rejected. It fills a short `image_id` with zeros; here that is rejected too, unless the list is missing
  or empty.
- two numbers are a point, which ms-swift allows: rejected, Boxcar has boxes only.
- markers fewer than images: ms-swift puts the missing ones before the first message, be it the system prompt. Here the row is rejected.
- swapped corners are ordered by ms-swift in silence; here they stay for the rule about them.
- rows without `objects` may hold the boxes of one family in their text (ms-swift's "method 1"): read as in sharegpt, with `box_space`.
  Both in one row is rejected: a record has one space.
- ms-swift 2's rows (`query`, `response`, `history`, <img> tags, `objects` as a string) are read: see `shared.query_rows`.
- `rejected_response` is ignored; `label: false` and `loss: false` are answers not to be taught, tool roles and videos cannot be said:
  rejected, each with its reason.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import msgspec

from boxcar.pipelines.readers.reader import COMMON_KEYS, Refused, SourcePlan, Unit
from boxcar.pipelines.readers.shared.marked_text import (
    BOX_COUNT_MISMATCH,
    BOX_OUT_OF_RANGE,
    BOX_SPACE_KEYS,
    CONVERSATION_KEYS,
    LIMITS,
    MALFORMED_BOX,
    POINT_NOT_BOX,
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
from boxcar.pipelines.readers.shared.query_rows import Objects, messages_of, with_image_marks, with_objects
from boxcar.schemas.record import PER_MILLE, PIXELS, RELATIVE, Box, BoxMark, Record, Rejected, TextPart
from boxcar.schemas.workflow import SourceConfig

REF_COUNT_MISMATCH = "ref_count_mismatch"
IMAGE_ID_MISMATCH = "image_id_mismatch"
UNKNOWN_BBOX_TYPE = "unknown_bbox_type"
MIXED_BOX_FORMS = "mixed_box_forms"

_REF, _BBOX = "<ref-object>", "<bbox>"
_SPACES = {"real": PIXELS, "norm1": RELATIVE, "norm_1": RELATIVE, "norm_1000": PER_MILLE}
_PATTERN = compile_forms(
    *("image", "json", "stray_json", "tags", "tag_ref", "stray_tag", "ref", "brackets", "list"),
    placeholders=rf"(?:{_REF}\s*+)?{_BBOX}(?>(?:\s*+{_BBOX})*)",
    ref_object=_REF,
)


class _Row(msgspec.Struct):
    id: str | int | None = None
    messages: list[Message] | None = None
    conversations: list[Message] | None = None
    query: str | None = None
    response: str | None = None
    history: list[list[str]] | None = None
    system: str | None = None
    images: list[str] | str | None = None
    image: list[str] | str | None = None
    objects: Objects | str | None = None
    label: Any = None
    videos: Any = None
    audios: Any = None


class SwiftReader:
    name = "ms_swift"
    uses = COMMON_KEYS | BOX_SPACE_KEYS

    def plan(self, config: SourceConfig, work_dir: Path, records_per_unit: int) -> SourcePlan:
        return plan_rows(config, records_per_unit)

    def read(self, config: SourceConfig, unit: Unit) -> Iterator[Record | Rejected]:
        return read_rows(unit, _Row, partial(_record, config))


class _ObjectMarks:
    """Hands out a row's refs and boxes in the order of their placeholders; the forms of other families are `marks`' business."""

    def __init__(self, objects: Objects, messages: Sequence[Message], marks: Marks) -> None:
        self.marks = marks
        boxes = [_box(numbers) for numbers in objects.bbox or []]
        image_ids = objects.image_id or [0] * len(boxes)
        if len(image_ids) != len(boxes) or any(not 0 <= image_id < marks.num_images for image_id in image_ids):
            raise Refused(IMAGE_ID_MISMATCH, f"found image_id {image_ids[:20]} for {len(boxes)} boxes and {marks.num_images} images")
        limit = LIMITS.get(_SPACES[objects.bbox_type or "real"].kind, math.inf)
        if any(number > limit for box in boxes for number in box):
            detail = f"found a number above {limit:g} in `objects.bbox`, expected none, as bbox_type {objects.bbox_type} says"
            raise Refused(BOX_OUT_OF_RANGE, detail)
        refs = objects.ref or []
        _check_count(REF_COUNT_MISMATCH, messages, _REF, "ref", len(refs))
        _check_count(BOX_COUNT_MISMATCH, messages, _BBOX, "bbox", len(boxes))
        self.has_objects = bool(refs or boxes)
        self.refs = iter(refs)
        self.boxes = zip(image_ids, boxes, strict=True)

    def parse(self, form: str, found: str) -> Sequence[TextPart]:
        if form == "ref_object":
            return (next(self.refs),)
        if form == "placeholders":
            label = next(self.refs) if found.startswith(_REF) else ""
            run = islice(self.boxes, found.count(_BBOX))
            by_image = groupby(run, key=lambda pair: pair[0])
            return [BoxMark(tuple(box for _, box in pairs), label, image_id) for image_id, pairs in by_image]
        if self.has_objects and form == "list":
            return (found,)
        if self.has_objects and form != "image":
            raise Refused(MIXED_BOX_FORMS, f"found {found[:100]!r} in a row with `objects`, expected <bbox> in its place")
        return self.marks.parse(form, found)


def _check_count(reason: str, messages: Sequence[Message], placeholder: str, key: str, num_objects: int) -> None:
    """The system prompt does not count: nothing is put in its place there."""
    num_placeholders = sum((message.text or "").count(placeholder) for message in messages if message.speaker != "system")
    if num_placeholders != num_objects:
        raise Refused(reason, f"found {num_placeholders} {placeholder} for {num_objects} entries of `objects.{key}`, expected as many")


def _box(numbers: list[float]) -> Box:
    if len(numbers) == 2:
        raise Refused(POINT_NOT_BOX, f"found the point {numbers} in `objects.bbox`, expected a box of 4 numbers")
    if len(numbers) != 4:
        raise Refused(MALFORMED_BOX, f"found {len(numbers)} numbers in an entry of `objects.bbox`, expected 4")
    x0, y0, x1, y1 = numbers
    return x0, y0, x1, y1


def _record(config: SourceConfig, row: _Row, place: Place) -> Record:
    messages = row.messages or row.conversations
    if messages is None and row.query is not None and row.response is not None:
        messages = messages_of(row.query, row.response, row.history, row.system)
    if messages is None:
        raise Refused(CONVERSATION_KEYS, "found neither `messages` nor `query` and `response`, expected a row of ms-swift")
    if row.videos or row.audios:
        raise Refused(UNSUPPORTED_MEDIA, "found videos or audios, expected images only")
    if row.label is False:
        raise Refused(UNTRAINED_ANSWER, "found `label: false`, an answer that must not be taught")
    images = image_refs(row.images, row.image)
    if row.query is not None:
        messages, paths = with_image_marks(messages, [image.path for image in images])
        images = image_refs(paths)
    if isinstance(row.objects, str):
        messages, objects = with_objects(messages, row.objects)
    else:
        objects = row.objects or Objects()
    bbox_space = _SPACES.get(objects.bbox_type or "real")
    if bbox_space is None:
        raise Refused(UNKNOWN_BBOX_TYPE, f"found bbox_type {objects.bbox_type!r}, expected one of {', '.join(_SPACES)}")
    text_space = declared_space(config)
    marks = Marks(len(images), text_space)
    placeholders = _ObjectMarks(objects, messages, marks)
    system, turns = pair_turns(messages, lambda text: split_text(text, _PATTERN, placeholders.parse))
    marks.check_images()
    return Record(
        record_id=place.record_id,
        position=place.position,
        images=images,
        dialogue=turns,
        box_space=bbox_space if placeholders.has_objects else text_space or PIXELS,
        language=config.language,
        split=config.split,
        system=system,
    )
