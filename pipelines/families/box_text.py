"""Boxes as text: the forms that families share, as data and as a parser.

A text with n boxes is n+1 *gaps* with the boxes' numbers between them:

    gap  x0 , y0 , x1 , y1  gap  x0 , y0 , x1 , y1  gap

so that ids can be composed from cached pieces: a gap is tokenized once per label, a number once per value, and the borders between gaps
and digits are borders of every family's tokenizer (`pipelines.tokens.tokenizer` checks that). The same gaps render the text for people.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

FloatBoxes = npt.NDArray[np.float64]
"""(N, 4) float64, xyxy."""
IntBoxes = npt.NDArray[np.int64]
"""(N, 4) int64, xyxy, in the family's model units."""


@dataclass(frozen=True)
class TextBox:
    """A box as a text says it."""

    values: tuple[int, int, int, int]
    """x0, y0, x1, y1 in model units."""
    label: str | None
    """None where this form of text names no label."""


class CoordinateGrid(Protocol):
    """Pixels of the upright original image <-> the family's integer model units."""

    @property
    def description(self) -> str:
        """The rule in one line, for the frame contract."""

    @property
    def inverse_description(self) -> str:
        """The rule of `dequantise` in one line, for people and other programs."""

    def quantise(self, boxes_px: FloatBoxes, size_wh: IntBoxes, resized_wh: IntBoxes) -> IntBoxes:
        """Boxes (N, 4) inside their images -> model units. Sizes (N, 2) int64: original and resized (width, height) in pixels."""

    def dequantise(self, values: npt.NDArray[np.number], size_wh: IntBoxes, resized_wh: IntBoxes) -> FloatBoxes:
        """Model units (N, 4) -> pixels of the original image, clipped to it."""

    def largest(self, resized_wh: tuple[int, int]) -> tuple[int, int]:
        """The largest values across and down that name a place in an image of this resized size; the smallest are 0."""

    @property
    def needs_resized_size(self) -> bool:
        """True: values are right only for the size that the image was resized to. False: at every size."""

    @property
    def px_expressions(self) -> tuple[str, str]:
        """`dequantise` as Python, before clipping: of `x` by width and resized_width, of `y` by height and resized_height."""


def _corners(boxes: npt.NDArray[np.number]) -> npt.NDArray[np.float64]:
    """(N, 4) xyxy as (N, 2 corners, 2): what is said of (width, height) is then said of both corners."""
    return boxes.astype(np.float64, copy=False).reshape(-1, 2, 2)


def _rows(corners: FloatBoxes) -> FloatBoxes:
    return corners.reshape(-1, 4)


def _both(size_wh: npt.NDArray[np.number]) -> npt.NDArray[np.float64]:
    """(N, 2) sizes as (N, 1, 2), for both corners of `_corners`."""
    return size_wh.astype(np.float64)[:, None, :]


@dataclass(frozen=True)
class ThousandthGrid:
    """Thousandths of width and height. `round`: 0..1000 (Qwen2-VL, Qwen3-VL); `floor`: 0..999 (Qwen-VL v1, CogVLM)."""

    rounding: Literal["round", "floor"]

    @property
    def description(self) -> str:
        return {"round": "round(x / width * 1000), 0..1000", "floor": "floor(x / width * 1000), 0..999, read back as (v + 0.5) / 1000"}[
            self.rounding
        ]

    @property
    def inverse_description(self) -> str:
        value = {"round": "v", "floor": "(v + 0.5)"}[self.rounding]
        return f"{value} / 1000 * width (height for y) of the original image"

    def quantise(self, boxes_px: FloatBoxes, size_wh: IntBoxes, resized_wh: IntBoxes) -> IntBoxes:
        thousandths = _corners(boxes_px) / _both(size_wh) * 1000
        if self.rounding == "round":
            return _rows(np.clip(np.rint(thousandths), 0, 1000)).astype(np.int64)
        return _rows(np.clip(np.floor(thousandths), 0, 999)).astype(np.int64)

    def dequantise(self, values: npt.NDArray[np.number], size_wh: IntBoxes, resized_wh: IntBoxes) -> FloatBoxes:
        # A floored value stands for [v, v + 1): its middle is the estimate with the smallest error.
        middle = 0.5 if self.rounding == "floor" else 0.0
        whole = _both(size_wh)
        return _rows(np.clip((_corners(values) + middle) / 1000 * whole, 0, whole))

    def largest(self, resized_wh: tuple[int, int]) -> tuple[int, int]:
        return (1000, 1000) if self.rounding == "round" else (999, 999)

    @property
    def needs_resized_size(self) -> bool:
        return False

    @property
    def px_expressions(self) -> tuple[str, str]:
        x, y = ("x", "y") if self.rounding == "round" else ("(x + 0.5)", "(y + 0.5)")
        return f"{x} * width / 1000", f"{y} * height / 1000"


@dataclass(frozen=True)
class ResizedPixelGrid:
    """Absolute pixels of the resized image, clamped to its last pixel (Qwen2.5-VL, process_bbox.ipynb)."""

    description: str = "round(x * (resized_width / width)), 0..resized_width - 1"
    inverse_description: str = "v * width / resized_width (heights for y), resized as the family's rule and these pixel limits say"
    needs_resized_size: bool = True
    px_expressions: tuple[str, str] = ("x * width / resized_width", "y * height / resized_height")

    def quantise(self, boxes_px: FloatBoxes, size_wh: IntBoxes, resized_wh: IntBoxes) -> IntBoxes:
        resized = _both(resized_wh)
        return _rows(np.clip(np.rint(_corners(boxes_px) * (resized / _both(size_wh))), 0, resized - 1)).astype(np.int64)

    def dequantise(self, values: npt.NDArray[np.number], size_wh: IntBoxes, resized_wh: IntBoxes) -> FloatBoxes:
        whole = _both(size_wh)
        return _rows(np.clip(_corners(values) * (whole / _both(resized_wh)), 0, whole))

    def largest(self, resized_wh: tuple[int, int]) -> tuple[int, int]:
        # One more than `quantise` writes: a model that names the far edge itself is inside the image.
        return resized_wh


Numbers = tuple[int, int, int, int]
"""Four of a box, or of 0 to 3 for x0, y0, x1, y1."""
XYXY: Numbers = (0, 1, 2, 3)
BoxForm = Literal["json", "tags", "list"]
"""json: objects with a key for the box. tags: (x0,y0),(x1,y1) between two tags. list: [[x0,y0,x1,y1]]."""


class BoxText(Protocol):
    """How a family writes boxes."""

    @property
    def form(self) -> BoxForm:
        """The shape of its boxes: what another family writes is told apart by it."""

    @property
    def key(self) -> str:
        """Key of a box's numbers in JSON; "" for other forms."""

    @property
    def order(self) -> Numbers:
        """Which of x0, y0, x1, y1 (0 to 3) stands first, second, third and last in a box."""

    @property
    def separators(self) -> tuple[str, str, str]:
        """What stands between the first and second number of a box, the second and third, the third and last."""

    @property
    def number_format(self) -> str:
        """A printf format, such as "%d" or "%03d"."""

    @property
    def tags(self) -> tuple[str, ...]:
        """What opens and closes a label, then what opens and closes a box; () where these are no words of their own."""

    @property
    def box_pattern(self) -> str:
        """Regular expression of one box in a text, without what names it or its label."""

    @property
    def label_pattern(self) -> str | None:
        """Regular expression of one label in a text with all that marks it, the label as its group; None where nothing marks labels, or
        they cannot be taken out of the text."""

    def answer_gap(self, previous: str | None, following: str | None, *, several_labels: bool) -> str:
        """The gap between a box of `previous` and a box of `following` in a whole answer; None: at the answer's start or end."""

    def inline_gaps(self, label: str, num_boxes: int) -> list[str]:
        """The num_boxes + 1 gaps of boxes inside running text; `label` may be ""."""

    def parse_answer(self, text: str) -> list[TextBox] | None:
        """The boxes of a whole answer in exactly this form; None where it is not. Never guesses."""

    def find_boxes(self, text: str) -> list[TextBox]:
        """The boxes written in this form anywhere in a text."""


_JSON_CLOSE = "}\n]\n```"
_FENCED_LIST = re.compile(r"```json\n(\[\n\t.*\n\])\n```", re.DOTALL)
_NUMBER = "([0-9]{1,9})"
"""Longer numbers are no coordinates, and Python refuses to read very long ones."""
_JSON_STRING = r'"(?>(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*)"'


@dataclass(frozen=True)
class JsonBoxText:
    """A fenced JSON list of {"bbox_2d": [x0, y0, x1, y1], "label": "..."} (Qwen2.5-VL, Qwen3-VL). Absent: an empty list."""

    key: str = "bbox_2d"
    order: Numbers = XYXY
    form: BoxForm = "json"
    separators: tuple[str, str, str] = (", ", ", ", ", ")
    number_format: str = "%d"
    tags: tuple[str, ...] = ()
    label_pattern: str | None = None

    @property
    def box_pattern(self) -> str:
        return rf'(?<="{re.escape(self.key)}": )\[{", ".join(["[0-9]+"] * 4)}\]'

    @property
    def _open(self) -> str:
        return f'{{"{self.key}": ['

    @cached_property
    def _box(self) -> re.Pattern[str]:
        return re.compile(rf'{re.escape(self._open)}{", ".join([_NUMBER] * 4)}\](?:, "label": ({_JSON_STRING}))?\}}')

    @staticmethod
    def _label(label: str) -> str:
        return json.dumps(label, ensure_ascii=False)

    def answer_gap(self, previous: str | None, following: str | None, *, several_labels: bool) -> str:
        if previous is None:
            return f"```json\n[\n\t{self._open}"
        closed = f'], "label": {self._label(previous)}'
        return closed + (_JSON_CLOSE if following is None else f"}},\n\t{self._open}")

    def inline_gaps(self, label: str, num_boxes: int) -> list[str]:
        named = f', "label": {self._label(label)}' if label else ""
        return [self._open, *[f"]{named}}}, {self._open}"] * (num_boxes - 1), f"]{named}}}"]

    def parse_answer(self, text: str) -> list[TextBox] | None:
        if text == EMPTY_JSON_LIST:
            return []
        fenced = _FENCED_LIST.fullmatch(text)
        if fenced is None:
            return None
        try:
            entries = json.loads(fenced[1])
        except (ValueError, RecursionError):  # a model that repeats "[" nests deeper than Python's stack
            return None
        boxes = [self._entry(entry) for entry in entries]
        return None if None in boxes else [box for box in boxes if box is not None]

    def _entry(self, entry: object) -> TextBox | None:
        if not isinstance(entry, dict) or set(entry) != {self.key, "label"}:
            return None
        values, label = entry[self.key], entry["label"]
        if not (isinstance(label, str) and isinstance(values, list) and len(values) == 4):
            return None
        if not all(type(value) is int and abs(value) < 10**9 for value in values):
            return None
        return TextBox(as_xyxy(values, self.order), label)

    def find_boxes(self, text: str) -> list[TextBox]:
        return [
            TextBox(as_xyxy([int(number) for number in m.groups()[:4]], self.order), json.loads(m[5]) if m[5] is not None else None)
            for m in self._box.finditer(text)
        ]


EMPTY_JSON_LIST = "```json\n[]\n```"


@dataclass(frozen=True)
class TaggedBoxText:
    """<ref>label</ref><box>(x0,y0),(x1,y1)</box>, one ref for the neighbouring boxes of a label (Qwen-VL v1, Qwen2-VL)."""

    ref_open: str
    ref_close: str
    box_open: str
    box_close: str
    key: str = ""
    order: Numbers = XYXY
    form: BoxForm = "tags"
    separators: tuple[str, str, str] = (",", "),(", ",")
    number_format: str = "%d"

    def _ref(self, label: str) -> str:
        return f"{self.ref_open}{label}{self.ref_close}"

    def answer_gap(self, previous: str | None, following: str | None, *, several_labels: bool) -> str:
        closed = "" if previous is None else f"){self.box_close}"
        if following is None:
            return closed
        return closed + ("" if following == previous else self._ref(following)) + f"{self.box_open}("

    def inline_gaps(self, label: str, num_boxes: int) -> list[str]:
        named = self._ref(label) if label else ""
        return [f"{named}{self.box_open}(", *[f"){self.box_close}{self.box_open}("] * (num_boxes - 1), f"){self.box_close}"]

    @property
    def tags(self) -> tuple[str, ...]:
        return self.ref_open, self.ref_close, self.box_open, self.box_close

    @property
    def box_pattern(self) -> str:
        number = "[0-9]+"
        return rf"{re.escape(self.box_open)}\({number},{number}\),\({number},{number}\){re.escape(self.box_close)}"

    @property
    def label_pattern(self) -> str | None:
        return f"{re.escape(self.ref_open)}(.*?){re.escape(self.ref_close)}"

    @property
    def _group(self) -> str:
        box = rf"{re.escape(self.box_open)}\({_NUMBER},{_NUMBER}\),\({_NUMBER},{_NUMBER}\){re.escape(self.box_close)}"
        # A label holds no tag: without that, text between two refs would be one, and a cut answer of n boxes take 2^n steps to refuse.
        opening, closing = re.escape(self.ref_open), re.escape(self.ref_close)
        return rf"(?:{opening}(?P<label>(?>(?:(?!{opening}|{closing}).)*)){closing})?{box}"

    def parse_answer(self, text: str) -> list[TextBox] | None:
        if not re.fullmatch(f"(?:{re.sub('P<label>', ':', self._group)})+", text, re.DOTALL) or not text.startswith(self.ref_open):
            return None
        return self.find_boxes(text)

    def find_boxes(self, text: str) -> list[TextBox]:
        boxes: list[TextBox] = []
        label: str | None = None
        end = 0
        for match in re.finditer(self._group, text, re.DOTALL):
            if match["label"] is not None:
                label = match["label"]
            elif match.start() != end:
                label = None  # a box apart from the last one is not of its label
            numbers = [int(group) for group in match.groups()[1:]]
            boxes.append(TextBox((numbers[0], numbers[1], numbers[2], numbers[3]), label))
            end = match.end()
        return boxes


_THREE_DIGITS = ",".join(["[0-9]{3}"] * 4)
_BRACKETS = re.compile(rf"\[\[({_THREE_DIGITS}(?>(?:;{_THREE_DIGITS})*))\]\]")


@dataclass(frozen=True)
class BracketBoxText:
    """[[x0,y0,x1,y1;x0,y0,x1,y1]], three digits each (CogVLM). A label stands before its brackets where an answer has several."""

    key: str = ""
    order: Numbers = XYXY
    form: BoxForm = "list"
    separators: tuple[str, str, str] = (",", ",", ",")
    number_format: str = "%03d"
    tags: tuple[str, ...] = ()
    box_pattern: str = rf"(?:(?<=\[\[)|(?<=;)){_THREE_DIGITS}(?=;|\]\])"
    label_pattern: str | None = None

    def answer_gap(self, previous: str | None, following: str | None, *, several_labels: bool) -> str:
        if previous is not None and previous == following:
            return ";"
        closed = "" if previous is None else "]]"
        if following is None:
            return closed
        named = f"{following} " if several_labels else ""
        return f"{closed}{', ' if closed else ''}{named}[["

    def inline_gaps(self, label: str, num_boxes: int) -> list[str]:
        return [f"{label} [[" if label else "[[", *[";"] * (num_boxes - 1), "]]"]

    def parse_answer(self, text: str) -> list[TextBox] | None:
        if _BRACKETS.fullmatch(text):
            return self.find_boxes(text)
        pairs = re.split(r"(?<=\]\]), ", text)
        if len(pairs) == 1:  # an answer about one label does not name it: this is a sentence, such as "The dog is at [[...]]"
            return None
        boxes: list[TextBox] = []
        for pair in pairs:
            match = re.fullmatch(rf"(.+?) ({_BRACKETS.pattern})", pair, re.DOTALL)
            if match is None:
                return None
            boxes += [TextBox(box.values, match[1]) for box in self.find_boxes(match[2])]
        return boxes

    def find_boxes(self, text: str) -> list[TextBox]:
        boxes = []
        for match in _BRACKETS.finditer(text):
            for numbers in match[1].split(";"):
                x0, y0, x1, y1 = (int(number) for number in numbers.split(","))
                boxes.append(TextBox((x0, y0, x1, y1), None))
        return boxes


def render(gaps: Sequence[str], values: Sequence[Sequence[int]], box_text: BoxText) -> str:
    """The text of gaps (n + 1) and boxes (n, 4) in model units: what `pipelines.tokens.compose` does in columns, for one text."""
    first, second, third = box_text.separators
    pieces = [gaps[0]]
    for box, gap in zip(values, gaps[1:], strict=True):
        one, two, three, four = (box_text.number_format % box[place] for place in box_text.order)
        pieces += [one, first, two, second, three, third, four, gap]
    return "".join(pieces)


_Value = TypeVar("_Value", int, float)


def as_xyxy(numbers: Sequence[_Value], order: Numbers) -> tuple[_Value, _Value, _Value, _Value]:
    """The four numbers of a box as they stand in a text -> x0, y0, x1, y1. order: of `BoxText`."""
    x0, y0, x1, y1 = (numbers[order.index(place)] for place in range(4))
    return x0, y0, x1, y1
