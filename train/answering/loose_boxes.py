"""Boxes and points in a loosely read text: which numbers are marked as a box.

    {"bbox_2d": [x0, y0, x1, y1], "label": "..."}      json      four numbers under a key that means a box
    <box>(x0,y0),(x1,y1)</box>                         tags
    [[x0,y0,x1,y1;x0,y0,x1,y1]], [x0, y0, x1, y1]      list      four numbers between square brackets
    [(x0,y0),(x1,y1)]                                  pairs     two pairs between square brackets or under such a key
    (x0,y0),(x1,y1)                                    untagged  in running text: what is left where special tokens were not printed
    (x0, y0, x1, y1)                                   tuple     in running text

Digits outside of all brackets are words. A list of 3 or 5 numbers is no box, nor are 3 or 4 pairs in a row, nor is a list that the text
broke off in: each is counted and left out.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from boxcar.pipelines.families.box_text import BoxText, as_xyxy
from boxcar.train.answering.loose_text import NUMBER, Item, LooseText, Mark, Member, Node, NodeKind, Prose, Ref, Text, read_loosely

LooseForm = Literal["json", "tags", "list", "pairs", "untagged", "tuple"]
Role = Literal["free", "box", "point", "name", "unknown"]
"""What a list of four is where it stands: free: a box, nothing says otherwise. name: a box, and its key is its label. unknown: none."""

USUAL_KEY = "bbox_2d"
"""The one that counts as right in a reply of a family whose boxes are no JSON."""
BOX_KEYS = frozenset({USUAL_KEY, "bbox", "bboxes", "box", "boxes", "bbox2d", "bounding_box", "bounding_boxes"})
LABEL_KEYS = ("label", "name", "category", "class", "object", "phrase", "description", "text_content")
POINT_KEYS = frozenset({"point_2d", "point", "points"})
CORNER_KEYS = (("x1", "y1", "x2", "y2"), ("x0", "y0", "x1", "y1"), ("xmin", "ymin", "xmax", "ymax"), ("x_min", "y_min", "x_max", "y_max"))
NO_NAMES = frozenset({"box_2d", "xywh", "bbox_xywh", "size", "image_size", "resolution", "color", "rgba"})
"""Keys whose four numbers are something else, unless they are the family's own; where box_2d is written, y stands before x."""

_FENCE = re.compile(r"```[A-Za-z0-9]*")
_WORDY = re.compile(r"\w")
_NUMBER = re.compile(NUMBER)
_NO_NUMBER = frozenset({"nan", "-nan", "inf", "-inf", "infinity", "-infinity", "null", "none", "true", "false"})


@dataclass(slots=True)
class LooseBox:
    """Four finite numbers that a text marks as a box: those of a list as x0, y0, x1, y1 by the family's order."""

    values: tuple[float, float, float, float]
    label: str | None
    form: LooseForm
    span: tuple[int, int]
    """Where its numbers stand in the text."""
    root: Node
    """The outermost brackets or tags around it."""


@dataclass(slots=True)
class LooseBoxes:
    """Everything that a text marks, in its order."""

    boxes: list[LooseBox] = field(default_factory=list)
    points: list[tuple[float, float, str | None]] = field(default_factory=list)
    """x, y and label."""
    repairs: dict[str, int] = field(default_factory=dict)
    """How often each was made, in the order of their first time."""
    tags: frozenset[str] = frozenset()
    """Every tag that stands in the text."""
    has_prose: bool = False
    """Words or digits beside the structure."""
    has_empty: bool = False
    """An empty list, or null, where boxes could stand."""

    def note(self, repair: str) -> None:
        self.repairs[repair] = self.repairs.get(repair, 0) + 1

    def note_once(self, repair: str) -> None:
        self.repairs.setdefault(repair, 1)


@dataclass(slots=True, frozen=True)
class _Place:
    """Where items stand side by side."""

    kind: NodeKind
    role: Role
    label: str | None
    root: Node | None
    """The outermost brackets or tags around; None in running text."""
    is_tagged: bool = False
    """Between tags of a box or quad, at whatever depth."""
    is_cut: bool = False
    """The text ended in here."""

    @property
    def is_marked(self) -> bool:
        """Numbers here are meant as a box, whatever they are."""
        return self.is_tagged or self.role == "box"


def find_loosely(text: str, own: BoxText) -> LooseBoxes:
    """Boxes and points of any text; never raises, linear in its length. own: the family's, for its key and the order of its numbers."""
    return _Finder(read_loosely(text), own).find()


class _Finder:
    def __init__(self, read: LooseText, own: BoxText, *, is_nested: bool = False) -> None:
        self.own = own
        self.key = own.key or USUAL_KEY
        self.box_keys = BOX_KEYS | {self.key}
        self.is_nested = is_nested
        self.found = LooseBoxes(repairs=dict.fromkeys(read.repairs, 1), tags=read.tags)
        self.points: list[tuple[int, float, float, str | None]] = []
        self.todo: list[tuple[Sequence[Item], _Place]] = [(read.root.items, _Place("root", "free", None, None))]

    def find(self) -> LooseBoxes:
        while self.todo:  # what is found inside comes later; places in the text give the order
            self._side_by_side(*self.todo.pop())
        self.found.boxes.sort(key=lambda box: box.span)
        self.found.points = [(x, y, label) for _, x, y, label in sorted(self.points, key=lambda point: point[0])]
        return self.found

    def _side_by_side(self, items: Sequence[Item], place: _Place) -> None:
        """Items from left to right; pairs that commas join are taken together."""
        run: list[Node] = []
        is_joined = False
        for item in items:
            if item is Mark.COMMA:
                is_joined = True
                continue
            if isinstance(item, Node) and _is_pair(item):
                if not is_joined:
                    self._pairs(run, place)
                    run = []
                run.append(item)
            else:
                self._pairs(run, place)
                run = []
                place = self._one(item, place)
            is_joined = False
        self._pairs(run, place)

    def _one(self, item: Item, place: _Place) -> _Place:
        """One item that is no pair; returns the place of what follows, for a Ref names it."""
        if isinstance(item, Node):
            self._node(item, place)
        elif isinstance(item, Ref):
            return replace(place, label=item.label)
        elif isinstance(item, Prose) and _WORDY.search(_FENCE.sub("", item.content)):
            self.found.has_prose = True
            return replace(place, label=None)  # a box apart from the last one is not of its label
        elif isinstance(item, Text) and place.kind != "{" and not item.quoted and item.content.lower() not in _NO_NUMBER:
            self.found.has_prose = self.found.has_prose or bool(_WORDY.search(_FENCE.sub("", item.content)))
        return place

    def _node(self, node: Node, place: _Place) -> None:
        root = place.root or node
        if node.kind == "{":
            self._object(node, place.label, root)
            return
        is_tagged = place.is_tagged or node.kind in ("box", "quad")
        inner = _Place(node.kind, place.role, place.label, root, is_tagged, is_cut=not node.is_complete)
        numbers = _numbers(node)
        if numbers:
            self._lists(node, numbers, place, inner)
        elif numbers is not None:
            self.found.has_empty = self.found.has_empty or (node.kind == "[" and node.is_complete and place.role in ("free", "box"))
        else:
            if all(isinstance(item, float | Mark | Text) for item in node.items) and _names_no_number(node.items):
                self.found.note("dropped_not_number")
            self._separators(node)
            self.todo.append((node.items, inner))

    # ---- lists of numbers

    def _lists(self, node: Node, groups: list[list[float]], place: _Place, inner: _Place) -> None:
        """A node with nothing but numbers in it, cut at semicolons."""
        if not node.is_complete:
            cut = groups.pop()
            if len(cut) > 1 or inner.is_marked:
                self.found.note("dropped_incomplete")
        for group in groups:
            if len(group) == 4:
                box = as_xyxy(group, self.own.order)
                free: LooseForm = "tuple" if node.kind == "(" and place.kind == "root" else "list"
                self._box(box, "tags" if inner.is_tagged else free if place.role == "free" else "json", inner, (node.start, node.stop))
            elif inner.is_marked or (node.kind == "[" and len(group) > 2):
                self.found.note("dropped_wrong_length")
        if any(isinstance(item, Text) for item in node.items):
            self.found.note_once("quoted_numbers")
        if sum(item is Mark.COMMA for item in node.items) < sum(len(group) - 1 for group in groups):
            self.found.note_once("missing_comma")
        elif node.is_complete and node.items[-1] is Mark.COMMA:
            self.found.note_once("trailing_comma")

    def _pairs(self, run: Sequence[Node], place: _Place) -> None:
        """Pairs that stood side by side, joined by commas: two are a box, four in quad tags an outline."""
        if not run:
            return
        points = [_pair_of(node) for node in run]
        is_list = run[0].kind == "["
        here = replace(place, root=place.root or run[0])
        span = (run[0].start, run[-1].stop)
        if place.role == "point":
            self.points += [
                (node.start, x, y, place.label) for node, (x, y) in zip(run, points, strict=True) if math.isfinite(x) and math.isfinite(y)
            ]
        elif place.kind == "quad" and len(run) == 4:
            self.found.note("quad")
            across, down = [x for x, _ in points], [y for _, y in points]
            self._box([min(across), min(down), max(across), max(down)], "tags", here, span)
        elif place.kind != "quad" and len(run) == 2 and (place.is_marked or not is_list):
            if is_list:
                self.found.note_once("corner_lists")
            form: LooseForm = "json" if is_list else "pairs"
            form = "tags" if place.is_tagged else "untagged" if place.kind == "root" else form
            self._box([*points[0], *points[1]], form, here, span)
        elif (len(run) > 1 and place.kind != "root") or (place.is_marked and not place.is_cut):
            # A single pair whose other half was broken off has been counted; one that nothing marks as a box is none.
            self.found.note("dropped_wrong_length")

    def _separators(self, node: Node) -> None:
        """Commas that are missing or too many between the boxes and objects of a list."""
        nested = [item for item in node.items if isinstance(item, Node | Mark)]
        if node.kind != "[" or not any(isinstance(item, Node) for item in nested):
            return
        if any(isinstance(left, Node) and isinstance(right, Node) for left, right in pairwise(nested)):
            self.found.note_once("missing_comma")
        if node.is_complete and node.items[-1] is Mark.COMMA:
            self.found.note_once("trailing_comma")

    def _box(self, numbers: Sequence[float], form: LooseForm, place: _Place, span: tuple[int, int]) -> None:
        x0, y0, x1, y1 = numbers
        if not all(map(math.isfinite, numbers)):
            self.found.note("dropped_not_number")
        elif place.role in ("unknown", "point"):
            self.found.note("dropped_unknown_key")
        else:
            assert place.root is not None
            if place.role == "name":
                self.found.note_once("label_as_key")
            self.found.boxes.append(LooseBox((x0, y0, x1, y1), place.label, form, span, place.root))

    # ---- objects

    def _object(self, node: Node, label: str | None, root: Node) -> None:
        """An object, or several whose braces are missing between a key and the same key again. `label`: of what is around it."""
        if not node.members:
            self.found.has_empty = self.found.has_empty or (node.is_complete and not node.items)
        self.todo.append((node.items, _Place("{", "free", label, root, is_cut=not node.is_complete)))
        for number, members in enumerate(_parts(node.members)):
            if number:
                self.found.note_once("missing_bracket")
            named = {key: own for key in LABEL_KEYS if key in members and (own := _label_of(members[key])) is not None}
            label = next(iter(named.values()), label)
            self._members(_Object(node, root, members, frozenset(named), label))

    def _members(self, thing: "_Object") -> None:
        has_corners = self._corners(thing)
        for key, member in thing.members.items():
            if key in thing.named:
                continue
            role = thing.role_of(key, self.box_keys)
            place = thing.place(role, member.key if role == "name" else thing.label)
            if role == "box":
                self._not_a_list(member, place, thing.node)
            self.todo.append((member.items, place))
        keys = thing.members.keys()
        if has_corners or self.box_keys & keys:
            if (thing.named and "label" not in thing.named) or (self.key not in keys and not has_corners):
                self.found.note_once("other_key")
            if keys - self.box_keys - thing.named - {name for names in CORNER_KEYS for name in names}:
                self.found.note_once("extra_keys")

    def _not_a_list(self, member: Member, place: _Place, node: Node) -> None:
        """A box that is null, four numbers without brackets, or a string with a box in it."""
        numbers = [item for item in member.items if isinstance(item, float)]
        if (
            len(numbers) == 4
            and all(isinstance(item, float | Mark) for item in member.items)
            and (node.is_complete or member is not node.members[-1])
        ):
            self.found.note_once("missing_bracket")
            self._box(as_xyxy(numbers, self.own.order), "json", place, (node.start, node.stop))
        for item in member.items:
            if not isinstance(item, Text):
                continue
            if not item.quoted:
                self.found.has_empty = self.found.has_empty or item.content.lower() in ("null", "none")
                continue
            if self.is_nested:  # a string in a string in a string: the time would grow with the square of the length
                continue
            inside = _Finder(read_loosely(f"[{item.content}]"), self.own, is_nested=True).find()
            self.found.tags |= inside.tags
            for box in inside.boxes:
                self.found.note_once("quoted_box")
                form = "json" if box.form == "list" else box.form
                self._box(box.values, form, place, (node.start, node.stop))

    def _corners(self, thing: "_Object") -> bool:
        for names in CORNER_KEYS:
            if all(name in thing.members for name in names):
                numbers = [item for name in names for item in thing.members[name].items if isinstance(item, float)]
                if len(numbers) == 4:
                    self.found.note_once("corner_keys")
                    self._box(numbers, "json", thing.place("box", thing.label), thing.span)
                    return True
        return False


@dataclass(slots=True, frozen=True)
class _Object:
    """Members in braces, up to where a key comes again."""

    node: Node
    root: Node
    """The outermost brackets or tags around it."""
    members: dict[str, Member]
    """By their key in lower case."""
    named: frozenset[str]
    """Keys of its labels."""
    label: str | None

    @property
    def span(self) -> tuple[int, int]:
        return self.node.start, self.node.stop

    def role_of(self, key: str, box_keys: frozenset[str]) -> Role:
        """What a list of four is under this key. box_keys: those that hold boxes."""
        if key in box_keys:
            return "box"
        if key in POINT_KEYS:
            return "point"
        is_described = bool(self.named or (box_keys | POINT_KEYS) & self.members.keys())
        return "unknown" if is_described or key in NO_NAMES else "name"

    def place(self, role: Role, label: str | None) -> _Place:
        return _Place("{", role, label, self.root, is_cut=not self.node.is_complete)


def _numbers(node: Node) -> list[list[float]] | None:
    """The numbers of a node that holds nothing else, cut at semicolons, no group empty; numbers in quotes count. None: it holds more."""
    groups: list[list[float]] = [[]]
    for item in node.items:
        if isinstance(item, float):
            groups[-1].append(item)
        elif item is Mark.SEMICOLON:
            groups.append([])
        elif isinstance(item, Text) and item.quoted and _NUMBER.fullmatch(item.content.strip()):
            groups[-1].append(float(item.content))
        elif item is not Mark.COMMA:
            return None
    return [group for group in groups if group]


def _parts(members: Sequence[Member]) -> list[dict[str, Member]]:
    """Members by their key in lower case; where a key comes again, the next object begins."""
    parts: list[dict[str, Member]] = [{}]
    for member in members:
        if member.key.lower() in parts[-1]:
            parts.append({})
        parts[-1][member.key.lower()] = member
    return parts


def _is_pair(node: Node) -> bool:
    """(x, y) or [x, y]."""
    if node.kind not in "[(" or not node.is_complete or len(node.items) > 4:
        return False
    numbers = _numbers(node)
    return numbers is not None and [len(group) for group in numbers] == [2]


def _pair_of(node: Node) -> tuple[float, float]:
    """The two numbers of a pair."""
    [[x, y]] = _numbers(node) or []
    return x, y


def _names_no_number(items: Sequence[Item]) -> bool:
    return any(isinstance(item, Text) and item.content.lower() in _NO_NUMBER for item in items)


def _label_of(member: Member) -> str | None:
    """The label that a member gives; None where it holds something else."""
    if any(isinstance(item, Node) for item in member.items):
        return None
    for item in member.items:
        if isinstance(item, Text) and (item.quoted or item.content.lower() not in ("null", "none")):
            return item.content
        if isinstance(item, Ref):
            return item.label
        if isinstance(item, float):
            return f"{item:g}"
    return None
