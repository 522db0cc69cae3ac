"""Conversations with image and box marks in their text, and files of such rows: what the readers of conversations share.

    file --plan_rows--> byte ranges --read_rows(parse)--> Record | Rejected, one by one
    row's messages --pair_turns--> questions and answers --split_text(forms)--> str | ImageMark | BoxMark

    form       as people write it                                                       becomes
    image      <image>                                                                  ImageMark, numbered in order of appearance
    json       [{"bbox_2d": [x0, y0, x1, y1], "label": "dog"}, ...], bare or fenced     a BoxMark for each run of equal labels
    tags       <|object_ref_start|>dog<|object_ref_end|><|box_start|>(x0,y0),(x1,y1)<|box_end|>...   one BoxMark, label "dog"
    ref        <ref>dog</ref><box>(x0,y0),(x1,y1)</box>..., also <box>[[x0, y0, x1, y1], ...]</box>   one BoxMark, label "dog"
               <quad>(x,y),(x,y),(x,y),(x,y)</quad>, <|quad_start|>...                   its bounding box: Boxcar has no quads
    brackets   [[086,540,400,760;...]], three digits each                               one BoxMark, no label
    list       [x0, y0, x1, y1] and [[x0, y0, x1, y1], ...] in prose                    one BoxMark, no label; see below

Text between marks stays exactly as it is written. Blanks at the edge of a label move out of it, into the text (Qwen-VL writes `<ref>
Woman</ref>`); a ref without a box loses its tags and stays as text, for they are one family's way to write a phrase.

The first four forms are unmistakable: where the workflow does not say in which space they are, where they are broken, or where they hold
a point, the row is refused, because numbers of an unknown space would pass for text and teach a lie. A plain list may be anything. It is
a box only if the caller asks for that form, the record has an image, its corners are in order and its numbers are possible in the
declared space.

No form says which image its box lies in. That is clear with one image, or where one has been shown so far; otherwise the row is refused.

A parser says `raise Refused(reason, detail)`; that row becomes one `Rejected` and the rest goes on.
"""

import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import msgspec
import xxhash

from boxcar.pipelines import storage
from boxcar.pipelines.readers.reader import Refused, SourcePlan, Unit
from boxcar.pipelines.readers.shared.json_blocks import count_offsets, decode_element, read_range
from boxcar.schemas.errors import AnnotationError
from boxcar.schemas.record import Box, BoxMark, BoxSpace, BoxSpaceKind, DialogueTurn, ImageMark, ImageRef, Record, Rejected, TextPart
from boxcar.schemas.workflow import SourceConfig

UNREADABLE_ROW = "unreadable_row"
UNKNOWN_KEY = "unknown_key"
CONVERSATION_KEYS = "conversation_keys"
TURN_ORDER = "turn_order"
UNSUPPORTED_ROLE = "unsupported_role"
UNSUPPORTED_MEDIA = "unsupported_media"
EMPTY_ANSWER = "empty_answer"
UNTRAINED_ANSWER = "untrained_answer"
BAD_IMAGE_PATH = "bad_image_path"
IMAGE_OUTSIDE_QUESTION = "image_outside_question"
IMAGE_MARKER_MISMATCH = "image_marker_mismatch"
BOX_SPACE_UNDECLARED = "box_space_undeclared"
BOX_OUT_OF_RANGE = "box_out_of_range"
BOX_WITHOUT_IMAGE = "box_without_image"
AMBIGUOUS_BOX_IMAGE = "ambiguous_box_image"
MALFORMED_BOX = "malformed_box"
POINT_NOT_BOX = "point_not_box"
BOX_COUNT_MISMATCH = "box_count_mismatch"

"""The keys of SourceConfig that every format of rows understands."""
BOX_SPACE_KEYS = frozenset({"box_space", "box_space_family", "box_space_min_pixels", "box_space_max_pixels"})

SOURCE_TEXT_CHARS = 2000
LIMITS: dict[BoxSpaceKind, float] = {"relative": 1.5, "per_mille": 1000.0}
"""Above this no coordinate is of that space. Fractions have room, for a box may hang over the border; thousandths are cut to it."""


# Files of rows


class Row(Protocol):
    """A decoded row: a msgspec struct that has at least the row's own id."""

    @property
    def id(self) -> str | int | None: ...


RowT = TypeVar("RowT", bound=Row)


@dataclass(frozen=True)
class Place:
    """What a row is called: in its source, and for people."""

    record_id: str
    position: str


def plan_rows(config: SourceConfig, records_per_unit: int, notes: tuple[str, ...] = ()) -> SourcePlan:
    """Units of `records_per_unit` elements of a JSON list, or lines of a JSONL file."""
    path = config.annotations
    ranges, num_rows = count_offsets(path, records_per_unit)
    if not num_rows:
        raise AnnotationError(path, found="a list without rows", expected="at least one row")
    return SourcePlan(storage.hash_file(path), tuple(Unit(path, start, stop) for start, stop in ranges), num_rows, notes)


def read_rows(unit: Unit, row_type: type[RowT], parse: Callable[[RowT, Place], Record | None]) -> Iterator[Record | Rejected]:
    """The rows of a unit. `parse` raises Refused where it cannot use a row, and returns None where the row is none of the wanted split."""
    decoder = msgspec.json.Decoder(list[row_type])  # type: ignore[valid-type]
    name = posixpath.basename(unit.path)
    for offset, element in read_range(unit.path, unit.start, unit.stop):
        raw = element.strip()
        place = Place(xxhash.xxh3_64_hexdigest(raw), f"{name}, byte {offset}")
        try:
            row = _decode_row(raw, decoder)
            if row.id not in (None, ""):
                place = Place(str(row.id), place.position)
            record = parse(row, place)
        except Refused as refused:
            text = raw[: 4 * SOURCE_TEXT_CHARS].decode(errors="replace")[:SOURCE_TEXT_CHARS]
            yield Rejected(refused.reason, place.position, refused.detail, place.record_id, text)
        else:
            if record is not None:
                yield record


def _decode_row(raw: bytes, decoder: "msgspec.json.Decoder[list[RowT]]") -> RowT:
    try:
        rows = decode_element(raw, decoder)
    except msgspec.DecodeError as error:
        problem = str(error).replace("$[0]", "row")
        raise Refused(UNKNOWN_KEY if "unknown field" in problem else UNREADABLE_ROW, f"found: {problem}") from None
    if len(rows) != 1:
        raise Refused(UNREADABLE_ROW, f"found {len(rows)} JSON values where one row is expected")
    return rows[0]


# Messages and turns


class Message(msgspec.Struct):
    """One message of a conversation, in either spelling: role and content, or from and value."""

    role: str = ""
    content: str | None = None
    sender: str = msgspec.field(default="", name="from")
    value: str | None = None
    loss: bool | float | None = None
    """ms-swift: whether this answer is trained."""

    @property
    def speaker(self) -> str:
        return self.role or self.sender

    @property
    def text(self) -> str | None:
        return self.content if self.content is not None else self.value


_QUESTION, _ANSWER, _SYSTEM = "question", "answer", "system"
_ROLES = {"human": _QUESTION, "user": _QUESTION, "gpt": _ANSWER, "assistant": _ANSWER, "system": _SYSTEM}
_IMAGE_MARKER = re.compile(r"<image>|<img>")


def pair_turns(messages: Sequence[Message], split: Callable[[str], tuple[TextPart, ...]]) -> tuple[str | None, tuple[DialogueTurn, ...]]:
    """The system prompt, None where there is none, and the turns. `split` gets the texts of questions and answers in order, each once."""
    spoken = [_said(number, message) for number, message in enumerate(messages, start=1)]
    system = None
    if spoken and spoken[0][0] == _SYSTEM:
        system = spoken.pop(0)[1]
        if _IMAGE_MARKER.search(system):
            raise Refused(IMAGE_OUTSIDE_QUESTION, "found an image in the system prompt, expected images in questions only")
    roles = [role for role, _ in spoken]
    if not roles or len(roles) % 2 or roles != [_QUESTION, _ANSWER] * (len(roles) // 2):
        found = ", ".join(roles[:12]) or "no message"
        raise Refused(TURN_ORDER, f"found {found}; expected question, answer, question, answer, ... after an optional system prompt")
    turns = []
    for (_, asked), (_, answered) in zip(spoken[::2], spoken[1::2], strict=True):
        turns.append(make_turn(split(asked), split(answered)))
    return system, tuple(turns)


def make_turn(question: tuple[TextPart, ...], answer: tuple[TextPart, ...]) -> DialogueTurn:
    if all(isinstance(part, str) and not part.strip() for part in answer):
        raise Refused(EMPTY_ANSWER, "found an empty answer, expected text or boxes")
    if any(isinstance(part, ImageMark) for part in answer):
        raise Refused(IMAGE_OUTSIDE_QUESTION, "found an image in an answer, expected images in questions only")
    return DialogueTurn(question, answer)


def _said(number: int, message: Message) -> tuple[str, str]:
    role = _ROLES.get(message.speaker)
    if role is None:
        # To render a tool's words as a user's would teach a template that no tool ever speaks.
        raise Refused(UNSUPPORTED_ROLE, f"found role {message.speaker!r} in message {number}, expected one of {', '.join(_ROLES)}")
    text = message.text
    if text is None:
        raise Refused(UNREADABLE_ROW, f"found message {number} without text, expected `content` or `value`")
    if role == _ANSWER and message.loss is not None and not message.loss:
        raise Refused(
            UNTRAINED_ANSWER, f"found `loss: false` in message {number}; Boxcar trains every answer. Take the turn out of the row"
        )
    return role, text


def image_refs(*columns: Sequence[str] | str | None) -> tuple[ImageRef, ...]:
    """The images of a row, whose paths stand in one of these columns: a list, a single path, or nothing."""
    filled = [[column] if isinstance(column, str) else column for column in columns if column]
    if len(filled) > 1:
        raise Refused(BAD_IMAGE_PATH, "found images under two keys, expected one of them")
    paths = filled[0] if filled else []
    for path in paths:
        if not path.strip() or path.startswith("data:"):
            raise Refused(BAD_IMAGE_PATH, f"found {path[:40]!r}, expected the path or URI of an image file")
    return tuple(ImageRef(path) for path in paths)


# Marks

_TEXT = "text"
"""Name of what is no form."""


class Marks:
    """Reads the marks of one record's texts, in order: numbers its images and knows the space of its boxes."""

    def __init__(self, num_images: int, space: BoxSpace | None) -> None:
        self.num_images = num_images
        self.num_seen = 0
        self.space = space
        """None: boxes in the text are refused."""

    def parse(self, form: str, found: str) -> Sequence[TextPart]:
        """The parts that a piece of text of this form stands for."""
        return _PARSERS[form](self, found)

    def image(self) -> ImageMark:
        self.num_seen += 1
        return ImageMark(self.num_seen - 1)

    def boxes(self, found: str, boxes: Sequence[Box], label: str = "") -> BoxMark:
        """A mark of boxes that `found` says."""
        if self.space is None:
            raise Refused(
                BOX_SPACE_UNDECLARED,
                f"found the box {found[:100]!r}, expected to know its space: set `box_space` to pixels, relative, per_mille or resized",
            )
        limit = LIMITS.get(self.space.kind)
        if limit is not None and any(number > limit for box in boxes for number in box):
            raise Refused(
                BOX_OUT_OF_RANGE, f"found the box {found[:100]!r}, expected numbers up to {limit:g} in box space {self.space.kind}"
            )
        if not self.num_images:
            raise Refused(BOX_WITHOUT_IMAGE, f"found the box {found[:100]!r} in a row without images")
        if self.num_images > 1 and self.num_seen != 1:
            raise Refused(
                AMBIGUOUS_BOX_IMAGE,
                f"found the box {found[:100]!r} after {self.num_seen} of {self.num_images} images; its image is clear after exactly one. "
                "The formats ms_swift and jsonl can name the image of a box",
            )
        return BoxMark(tuple(boxes), label, 0)

    def check_images(self) -> None:
        """Raises Refused where the texts did not show every image once."""
        if self.num_seen != self.num_images:
            fix = ""
            if not self.num_seen:
                fix = ". Write the image's marker where the image belongs, usually at the start of the first question"
            raise Refused(IMAGE_MARKER_MISMATCH, f"found {self.num_seen} image markers for {self.num_images} images, expected as many{fix}")


def declared_space(config: SourceConfig) -> BoxSpace | None:
    """The space that the workflow declares; None where it is silent."""
    return None if config.box_space is None else space_of_kind(config.box_space, config)


def space_of_kind(kind: BoxSpaceKind, config: SourceConfig) -> BoxSpace:
    if kind != "resized":
        return BoxSpace(kind)
    return BoxSpace(kind, config.box_space_family, config.box_space_min_pixels or 0, config.box_space_max_pixels or 0)


def split_text(text: str, pattern: re.Pattern[str], parse: Callable[[str, str], Sequence[TextPart]]) -> tuple[TextPart, ...]:
    """Text cut at its marks. `parse` gets the name of the form and the text found, and returns what stands there instead.

    No part is an empty string and no two strings are neighbours.
    """
    parts: list[TextPart] = []
    end = 0
    for match in pattern.finditer(text):
        if match.lastgroup is None or match.lastgroup == _TEXT:
            continue
        _append(parts, text[end : match.start()])
        for part in parse(match.lastgroup, match[0]):
            _append(parts, part)
        end = match.end()
    _append(parts, text[end:])
    return tuple(parts)


def _append(parts: list[TextPart], part: TextPart) -> None:
    if isinstance(part, str) and parts and isinstance(before := parts[-1], str):
        parts[-1] = before + part
    elif part != "":
        parts.append(part)


def compile_forms(*names: str, starts: str = "<[{`\"'", **more: str) -> re.Pattern[str]:
    """One expression of `more` forms of the caller's own, then these of this file; where two fit, the first wins.

    No pattern has a capturing group: the one that matched is known as the match's `lastgroup`. Every form starts with one of the characters
    `starts`, or at the start of the text. The last alternative takes all text up to the next of them, so that prose is
    scanned by one class of characters and not by every form at every letter, which is five times slower.

    A repeated group that must not give back is written `(?>(?:...)*)`, not as a possessive repeat, which Python 3.11.0 to 3.11.4 (Debian 12
    ships one of them) matches wrongly: https://github.com/python/cpython/issues/106052. A class of characters may be possessive.
    """
    forms = more | {name: FORMS[name] for name in names} | {_TEXT: rf"(?s:.)[^{re.escape(starts)}]*+"}
    return re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in forms.items()))


def number_list(count: int, number: str = r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?") -> str:
    """The pattern of `count` numbers with commas between."""
    return rf"\s*+{number}" + rf"\s*+,\s*+{number}" * (count - 1) + r"\s*+"


_LIST = rf"\[{number_list(4)}\]"
_LISTS = rf"\[\s*+{_LIST}(?>(?:\s*+,\s*+{_LIST})*)\s*+\]"
_PAIR = rf"\({number_list(2)}\)"
_THREE_DIGITS = number_list(4, "[0-9]{3}")

# Strings are skipped whole, for a label may hold braces.
_STRING = r'"(?>(?:[^"\\]|\\.)*)"'
_OBJECT = rf'\{{(?=(?:[^{{}}"]|{_STRING})*?"(?:bbox_2d|point_2d)"\s*+:\s*+\[+\s*+[-+.0-9])(?>(?:[^{{}}"]|{_STRING})*)\}}'
_OBJECTS = rf"{_OBJECT}(?>(?:\s*+(?:,\s*+)?{_OBJECT})*)"
_JSON = rf"\[\s*+{_OBJECTS}\s*+(?:,\s*+)?\]|{_OBJECTS}"
_JSON = rf"```(?:json|JSON)?\s*+(?:{_JSON})\s*+```|{_JSON}"

_TAG_REF = r"<\|object_ref_start\|>(?>(?:[^<]|<(?!\|))*)<\|object_ref_end\|>"
_TAG_BOX = r"(?:<\|box_start\|>[^<]*+<\|box_end\|>|<\|quad_start\|>[^<]*+<\|quad_end\|>)"
_REF = r"<ref>(?>(?:[^<]|<(?!/?ref>))*)</ref>"
_REF_BOX = r"(?:<box>[-+.,()\[\]\s0-9]++</box>|<quad>[-+.,()\s0-9]++</quad>)"

FORMS = {
    "image": "<image>",
    # An answer that is nothing but JSON keeps no blanks around it: whoever writes it in another family's form starts from marks alone.
    "json": rf"\A\s*+(?:{_JSON})\s*+\Z|{_JSON}",
    "stray_json": r"""["'](?:bbox_2d|point_2d)\\?["']\s*+:\s*+\[+\s*+[-+.]?[0-9]""",
    "tags": rf"(?:{_TAG_REF}\s*+)?{_TAG_BOX}(?>(?:\s*+{_TAG_BOX})*)",
    "tag_ref": _TAG_REF,
    "stray_tag": r"<\|(?:object_ref|box|quad)_(?:start|end)\|>",
    "ref": rf"(?:{_REF}\s*+)?{_REF_BOX}(?>(?:\s*+{_REF_BOX})*)",
    "ref_only": _REF,
    "stray_ref": r"</?(?:ref|box|quad|img)>",
    "brackets": rf"\[\[{_THREE_DIGITS}(?>(?:;{_THREE_DIGITS})*)\]\]",
    # Any list that starts with a number or a list, taken whole, so that no row of a matrix passes for a box.
    "list": r"(?<!\[)\[(?=\s*[-+.0-9\[])(?>(?:[^\[\]]++|\[[^\[\]]*+\])*)\](?!\])",
}
"""Patterns by name. The order in `compile_forms` matters: the whole form before its stray pieces."""

_NUMBERS = re.compile(number_list(1))
_FOUR_NUMBERS = re.compile(rf"{_LIST}|{_LISTS}|{_PAIR}\s*+,?\s*+{_PAIR}|\s*+[0-9]+(?:\s+[0-9]+){{3}}\s*+")
_POINT = re.compile(rf"{_PAIR}|\[{number_list(2)}\]")
_CORNERS = re.compile(rf"{_PAIR}(?:\s*+,?\s*+{_PAIR}){{3}}")
_BODIES = re.compile(r"<\|?(box|quad)(?:_start\|)?>([^<]*+)<")
_LABEL = re.compile(r"<(?:ref|\|object_ref_start\|)>(.*?)<(?:/ref|\|object_ref_end\|)>", re.DOTALL)
_OBJECT_ONLY = re.compile(_OBJECT)
_PLAIN_LISTS = re.compile(rf"{_LIST}|{_LISTS}")


class _BoxObject(msgspec.Struct, forbid_unknown_fields=True):
    bbox_2d: Box
    label: str = ""


_BOX_OBJECT = msgspec.json.Decoder(_BoxObject)


def boxes_of(text: str) -> list[Box]:
    """The boxes of a text that is known to hold four numbers for each."""
    numbers = [float(number) for number in _NUMBERS.findall(text)]
    return list(zip(numbers[::4], numbers[1::4], numbers[2::4], numbers[3::4], strict=True))


def _parse_image(marks: Marks, _: str) -> Sequence[TextPart]:
    return (marks.image(),)


def _parse_json(marks: Marks, found: str) -> Sequence[TextPart]:
    runs: list[tuple[str, list[Box]]] = []
    for text in _OBJECT_ONLY.findall(found):
        if '"point_2d"' in text:
            raise Refused(POINT_NOT_BOX, f"found the point {text[:100]!r}, expected a box of 4 numbers")
        try:
            item = _BOX_OBJECT.decode(text)
        except msgspec.DecodeError as error:
            expected = 'expected {"bbox_2d": [x0, y0, x1, y1], "label": "..."} and no other key'
            raise Refused(MALFORMED_BOX, f"found {text[:100]!r} ({error}), {expected}") from None
        if runs and runs[-1][0] == item.label:
            runs[-1][1].append(item.bbox_2d)
        else:
            runs.append((item.label, [item.bbox_2d]))
    return [marks.boxes(found, boxes, label) for label, boxes in runs]


def _parse_tagged(marks: Marks, found: str) -> Sequence[TextPart]:
    boxes: list[Box] = []
    for kind, body in _BODIES.findall(found):
        if _POINT.fullmatch(body.strip()):
            raise Refused(POINT_NOT_BOX, f"found the point {body[:100]!r}, expected a box of two corners")
        if kind == "box" and _FOUR_NUMBERS.fullmatch(body.strip()):
            boxes += boxes_of(body)
        elif kind == "quad" and _CORNERS.fullmatch(body.strip()):
            numbers = [float(number) for number in _NUMBERS.findall(body)]
            boxes.append((min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2])))
        else:
            raise Refused(MALFORMED_BOX, f"found {body[:100]!r} in a {kind}, expected (x0,y0),(x1,y1) or, for a quad, four such corners")
    label = _LABEL.match(found)
    if label is None:
        return (marks.boxes(found, boxes),)
    before, phrase, after = _stripped(label[1])
    return before, marks.boxes(found, boxes, phrase), after


def _stripped(text: str) -> tuple[str, str, str]:
    """Blanks before, text, blanks after."""
    core = text.strip()
    start = text.find(core) if core else len(text)
    return text[:start], core, text[start + len(core) :]


def _parse_ref_only(_: Marks, found: str) -> Sequence[TextPart]:
    label = _LABEL.match(found)
    assert label is not None
    return (label[1],)


def _parse_stray(_: Marks, found: str) -> Sequence[TextPart]:
    raise Refused(MALFORMED_BOX, f"found {found[:100]!r} that is no part of a whole box, expected the complete form")


def _parse_brackets(marks: Marks, found: str) -> Sequence[TextPart]:
    return (marks.boxes(found, boxes_of(found)),)


def _parse_list(marks: Marks, found: str) -> Sequence[TextPart]:
    if marks.space is None or not marks.num_images or not _PLAIN_LISTS.fullmatch(found):
        return (found,)
    boxes = boxes_of(found)
    limit = LIMITS.get(marks.space.kind, float("inf"))
    if not all(0 <= x0 < x1 <= limit and 0 <= y0 < y1 <= limit for x0, y0, x1, y1 in boxes):
        return (found,)
    return (marks.boxes(found, boxes),)


_PARSERS: dict[str, Callable[[Marks, str], Sequence[TextPart]]] = {
    "image": _parse_image,
    "json": _parse_json,
    "stray_json": _parse_stray,
    "tags": _parse_tagged,
    "tag_ref": _parse_ref_only,
    "stray_tag": _parse_stray,
    "ref": _parse_tagged,
    "ref_only": _parse_ref_only,
    "stray_ref": _parse_stray,
    "brackets": _parse_brackets,
    "list": _parse_list,
}
