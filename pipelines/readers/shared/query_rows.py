"""ms-swift 2's rows (`query`, `response`, `history`) in the form of ms-swift 3: messages, images, objects.

    query, response, history [[query, response], ...], system     messages, the history first
    images, or <img>path</img> in the text                        images, with <image> in the text
    objects '[{"caption", "bbox", "bbox_type", "image"}, ...]'    ref, bbox, image_id; an entry of several boxes as several <bbox>

Checked against the examples of ms-swift 2's documentation (custom data sets; grounding of Qwen-VL, InternVL2 and Qwen2-VL), not its code.

Images that no text mentions: one for each question where there are as many as questions, else all before the first.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from boxcar.pipelines.readers.reader import Refused
from boxcar.pipelines.readers.shared.marked_text import BAD_IMAGE_PATH, BOX_COUNT_MISMATCH, MALFORMED_BOX, UNREADABLE_ROW, Message

_IMAGE, _REF, _BBOX = "<image>", "<ref-object>", "<bbox>"
_TAG = re.compile(r"<img>(.*?)</img>", re.DOTALL)


class Objects(msgspec.Struct):
    """`objects` as ms-swift 3 writes them: refs and boxes in the order of their placeholders."""

    ref: list[str] | None = None
    bbox: list[list[float]] | None = None
    bbox_type: str | None = None
    image_id: list[int] | None = None


class _Entry(msgspec.Struct):
    bbox: Any = None
    caption: str | None = None
    bbox_type: str = "real"
    image: int = 0


_ENTRIES = msgspec.json.Decoder(list[_Entry])


def messages_of(query: str, response: str, history: Sequence[Sequence[str]] | None, system: str | None) -> list[Message]:
    """The conversation, the history first. Raises Refused where an entry of the history is no pair."""
    messages = [Message(role="system", content=system)] if system else []
    for pair in [*(history or []), (query, response)]:
        if len(pair) != 2:
            raise Refused(UNREADABLE_ROW, f"found {len(pair)} texts in an entry of `history`, expected [query, response]")
        messages += [Message(role="user", content=pair[0]), Message(role="assistant", content=pair[1])]
    return messages


def with_image_marks(messages: Sequence[Message], images: list[str]) -> tuple[list[Message], list[str]]:
    """The messages with <image> where each image stands, and the images in that order."""
    tagged = [path.strip() for message in messages for path in _TAG.findall(message.content or "")]
    if tagged and images:
        raise Refused(BAD_IMAGE_PATH, "found `images` and <img> tags, expected one of them")
    if tagged:
        return [_changed(message, _TAG.sub(_IMAGE, message.content or "")) for message in messages], tagged
    questions = [number for number, message in enumerate(messages) if message.role == "user"]
    if not images or any(_IMAGE in (messages[number].content or "") for number in questions):
        return list(messages), images
    marked = list(messages)
    counts = dict.fromkeys(questions, 1) if len(questions) == len(images) else {questions[0]: len(images)}
    for number, count in counts.items():
        marked[number] = _changed(marked[number], _IMAGE * count + (marked[number].content or ""))
    return marked, images


def with_objects(messages: Sequence[Message], encoded: str) -> tuple[list[Message], Objects]:
    """`objects` that are a string of JSON: the messages with a <bbox> for each box, and the objects. Raises Refused."""
    try:
        entries = _ENTRIES.decode(encoded) if encoded.strip() else []
    except msgspec.DecodeError as error:
        detail = f"found {error} in the string `objects`, expected JSON: [{{caption, bbox, bbox_type, image}}, ...]"
        raise Refused(UNREADABLE_ROW, detail) from error
    kinds = {entry.bbox_type for entry in entries} or {"real"}
    if len(kinds) > 1:
        raise Refused(UNREADABLE_ROW, f"found the bbox_types {', '.join(sorted(kinds))} in one row, expected one")
    boxes = [list(_boxes_of(entry)) for entry in entries]
    texts = "".join(message.content or "" for message in messages if message.role != "system")
    num_places = texts.count(_BBOX)
    if entries and not num_places and _REF not in texts:
        raise Refused(BOX_COUNT_MISMATCH, f"found {len(entries)} entries of `objects`, and no {_BBOX} or {_REF} in the text")
    if num_places:
        if num_places != len(entries):
            raise Refused(BOX_COUNT_MISMATCH, f"found {num_places} {_BBOX} for {len(entries)} entries of `objects`, expected as many")
        counts = iter([len(group) for group in boxes])
        messages = [
            message if message.role == "system" else _changed(message, re.sub(_BBOX, lambda _: _BBOX * next(counts), message.content or ""))
            for message in messages
        ]
    objects = Objects(
        ref=[entry.caption or "" for entry in entries] if _REF in texts else None,
        bbox=[box for group in boxes for box in group] if num_places else None,
        bbox_type=next(iter(kinds)),
        image_id=[entry.image for entry, group in zip(entries, boxes, strict=True) for _ in group] if num_places else None,
    )
    return list(messages), objects


def _boxes_of(entry: _Entry) -> Iterator[list[float]]:
    try:
        several = msgspec.convert(entry.bbox, list[list[float]] | None)
    except msgspec.ValidationError:
        try:
            several = [msgspec.convert(entry.bbox, list[float])]
        except msgspec.ValidationError as error:
            raise Refused(MALFORMED_BOX, f"found {str(entry.bbox)[:100]} as bbox in `objects`, expected 4 numbers or lists of 4") from error
    yield from several or []


def _changed(message: Message, text: str) -> Message:
    return msgspec.structs.replace(message, content=text)
