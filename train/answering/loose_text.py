"""A text that is almost JSON, almost tagged or almost prose, as a tree: brackets, tags, strings and numbers, whatever is broken.

    text  ->  Node "root" [ Prose | Node "{" [ Member(key, items) ] | Node "[" | Node "(" | Node "box" | Node "quad" | Ref | COMMA ]

One pass with a stack and no second look at what was read: the time is linear in the text, whatever the text is. Says nothing about boxes
(`train.answering.loose_boxes` does) and knows no family. What had to be mended is noted by name.
"""

import json
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, TypeAlias

NodeKind = Literal["root", "[", "(", "{", "box", "quad"]


MAX_DEPTH = 100
"""Brackets nested deeper are read as if they were not there: no answer has them, and a model that repeats "[" writes thousands."""


class Mark(Enum):
    """What separates."""

    COMMA = ","
    SEMICOLON = ";"


@dataclass(slots=True, frozen=True)
class Text:
    """A string, or a word that stands where a value should."""

    content: str
    quoted: bool


@dataclass(slots=True, frozen=True)
class Ref:
    """What stands between the tags of a label."""

    label: str


@dataclass(slots=True, frozen=True)
class Prose:
    """Text outside of all brackets and tags."""

    content: str


@dataclass(slots=True)
class Member:
    """A key of an object and everything up to the next key."""

    key: str
    items: "list[Item]" = field(default_factory=list)


@dataclass(slots=True)
class Node:
    """Brackets or tags and what they hold."""

    kind: NodeKind
    start: int
    stop: int = 0
    is_complete: bool = True
    """False: the text ended before it was closed."""
    items: "list[Item]" = field(default_factory=list)
    """Of an object: what stands before its first key."""
    members: list[Member] = field(default_factory=list)


Item: TypeAlias = float | Text | Ref | Prose | Mark | Node


@dataclass(slots=True)
class LooseText:
    """The tree, and how it had to be mended."""

    root: Node
    repairs: tuple[str, ...]
    """Names, each once, in the order of their first time."""
    tags: frozenset[str]
    """Every tag that stands in the text."""


_ASCII = str.maketrans("［］【】（）｛｝，、；：０１２３４５６７８９．－", "[][](){},,;:0123456789.-")
"""One character for one: places in the translated text are places in the original."""
_TAGS = {
    "<ref>": "ref",
    "</ref>": "/ref",
    "<|object_ref_start|>": "ref",
    "<|object_ref_end|>": "/ref",
    "<box>": "box",
    "</box>": "/",
    "<|box_start|>": "box",
    "<|box_end|>": "/",
    "<quad>": "quad",
    "</quad>": "/",
    "<|quad_start|>": "quad",
    "<|quad_end|>": "/",
}
TAG = re.compile("|".join(map(re.escape, _TAGS)))
_START = re.compile(rf"[\[({{]|{TAG.pattern}")
NUMBER = r"[-+]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][-+]?[0-9]++)?"
_TOKEN = re.compile(
    rf"""(?P<space>\s++)
    |(?P<number>{NUMBER}(?=[\s,;:|<"'\])}}]|\Z))
    |(?P<tag>{TAG.pattern})
    |(?P<open>[\[({{])
    |(?P<close>[\])}}])
    |(?P<separator>[,;])
    |(?P<quote>["'“‘])
    |(?P<word>[^\s\[\](){{}},;:"'“‘<>][^\s\[\](){{}},;:"<>]*+)
    |(?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
_KEY = re.compile(r"([^\W\d][\w-]{0,40})\s*+:")
_COLON = re.compile(r"\s*+:")
_VALUE_END = re.compile(r"[,}\]\n<]")
_OPENS = {"]": "[", ")": "(", "}": "{"}
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’"}
_IN_STRING = {quote: re.compile(rf"[\\\n{quote}]") for quote in _QUOTES.values()}
_AFTER_STRING = re.compile(
    r"""\s*+(?:[:\]})<]|,\s*+(?:["'“{\[}\]]|-?[0-9]|[A-Za-z_]\w{0,40}\s{0,40}:|\Z)|["'“]\w{1,40}["'”]\s{0,40}:|\Z)"""
)
"""What follows a quote that closes a string: before anything else, the quote belongs to the string."""


def read_loosely(text: str) -> LooseText:
    """The tree of a text. Takes any text; linear in its length."""
    reader = _Reader(text)
    return LooseText(reader.read(), tuple(reader.repairs), frozenset(reader.tags))


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.plain = text.translate(_ASCII)
        self.root = Node("root", 0, len(text))
        self.open = [self.root]
        self.num_open = dict.fromkeys(("[", "(", "{", "box", "quad"), 0)
        self.repairs: dict[str, None] = {}
        self.tags: set[str] = set()

    def read(self) -> Node:
        position = 0
        while position < len(self.plain):
            if len(self.open) == 1:
                position = self._prose(position)
            if position < len(self.plain):
                position = self._take(position)
        if len(self.open) > 1:
            self._note("unclosed")
        while len(self.open) > 1:
            self._close(len(self.plain), is_complete=False)
        return self.root

    def _note(self, repair: str) -> None:
        self.repairs.setdefault(repair)

    @property
    def _items(self) -> list[Item]:
        top = self.open[-1]
        return top.members[-1].items if top.members else top.items

    def _prose(self, start: int) -> int:
        opening = _START.search(self.plain, start)
        stop = opening.start() if opening else len(self.plain)
        between = self.text[start:stop]
        if self.plain[start:stop].strip() == ",":
            self.root.items.append(Mark.COMMA)
        elif between.strip():
            self.root.items.append(Prose(between))
        return stop

    def _take(self, position: int) -> int:
        """Read one token inside of brackets or tags, or the bracket or tag that follows prose; returns where the next one begins."""
        token = _TOKEN.match(self.plain, position)
        assert token is not None  # the last alternative takes any character
        kind, word = token.lastgroup, token[0]
        if kind == "tag":
            return self._tag(word, position, token.end())
        if kind == "word":
            return self._word(word, position, token.end())
        if kind == "quote" and self._may_quote():
            return self._string(position)
        if kind == "number":
            self._items.append(float(word))
        elif kind == "separator":
            self._items.append(Mark(word))
        elif kind == "open":
            self._open_bracket(word, position)
        elif kind == "close":
            self._close_bracket(word, token.end())
        elif kind != "space":
            self._items.append(Text(word, quoted=False))
        return token.end()

    # ---- words and strings

    def _word(self, word: str, start: int, stop: int) -> int:
        is_object = self.open[-1].kind == "{"
        expects_key = is_object and not (self.open[-1].members and not self._items)
        if (expects_key or self.open[-1].kind == "[") and (key := _KEY.match(self.plain, start)):
            self._note("unquoted")
            self._key(key[1], start)
            return key.end()
        if is_object and not expects_key:  # a value of several words
            end = _VALUE_END.search(self.plain, start)
            stop = end.start() if end else len(self.plain)
        self._items.append(Text(self.text[start:stop].strip(), quoted=False))
        return stop

    def _may_quote(self) -> bool:
        """Whether a quote opens a string here: where a key or value may stand. Elsewhere it is an apostrophe."""
        kind = self.open[-1].kind
        if kind != "[":
            return kind == "{"
        last = self._items[-1] if self._items else Mark.COMMA
        return isinstance(last, Mark) or (isinstance(last, Text) and last.quoted)

    def _string(self, start: int) -> int:
        content, position = self._string_content(start)
        if self.text[start] != '"':
            self._note("single_quotes" if self.text[start] == "'" else "full_width")
        if colon := _COLON.match(self.plain, position):
            self._key(content, start)
            return colon.end()
        self._items.append(Text(content, quoted=True))
        return position

    def _string_content(self, start: int) -> tuple[str, int]:
        """From the opening quote to the quote that closes the string, the end of the line or of the text."""
        stops, position = _IN_STRING[_QUOTES[self.text[start]]], start + 1
        end = after = len(self.text)
        while stop := stops.search(self.text, position):
            position = stop.end()
            if stop[0] == "\\":
                position += 1
            elif stop[0] == "\n" or _AFTER_STRING.match(self.plain, position):
                end, after = stop.start(), stop.start() if stop[0] == "\n" else position
                break
            else:
                self._note("unescaped_quotes")
        if end == after:
            self._note("unclosed")
        content = self.text[start + 1 : end]
        if "\\" not in content:
            return content, after
        try:
            return str(json.loads(f'"{content}"')), after
        except ValueError:  # unescaped quotes beside escaped ones, or an escape that is none
            return content.replace('\\"', '"'), after

    def _key(self, key: str, start: int) -> None:
        """A member of an object begins. Where brackets inside of the object are still open, or no object is, one is missing."""
        has_comma = self._take_comma()  # it belongs behind the brackets that are missing
        if not self._close_until("{", start):
            self._note("missing_bracket")
            self._push("{", start)
        top = self.open[-1]
        if top.members and not has_comma:
            self._note("missing_comma")
        top.members.append(Member(key.strip()))

    def _take_comma(self) -> bool:
        """Whether the last thing was a comma; it is taken away."""
        if not self._items or self._items[-1] is not Mark.COMMA:
            return False
        self._items.pop()
        return True

    # ---- brackets and tags

    def _push(self, kind: NodeKind, start: int) -> None:
        node = Node(kind, start)
        self._items.append(node)
        self.open.append(node)
        self.num_open[kind] += 1

    def _close(self, stop: int, *, is_complete: bool = True) -> None:
        node = self.open.pop()
        node.stop, node.is_complete = stop, is_complete
        self.num_open[node.kind] -= 1

    def _open_bracket(self, bracket: str, start: int) -> None:
        if len(self.open) > MAX_DEPTH:
            return
        if bracket == "{" and self.open[-1].kind == "{" and self._items:  # {"a": 1, {"a": 2}
            self._note("missing_bracket")
            has_comma = self._take_comma()
            self._close(start)
            if has_comma:
                self._items.append(Mark.COMMA)
        self._push("[" if bracket == "[" else "(" if bracket == "(" else "{", start)

    def _close_bracket(self, bracket: str, stop: int) -> None:
        if self._close_until(_OPENS[bracket], stop - 1):
            self._close(stop)
        else:
            self._note("missing_bracket")

    def _close_until(self, kind: str, stop: int) -> bool:
        """Close what is open inside of the innermost node of this kind; False: none is open."""
        if not self.num_open[kind]:
            return False
        while self.open[-1].kind != kind:
            self._note("missing_bracket")
            self._close(stop)
        return True

    def _tag(self, tag: str, start: int, stop: int) -> int:
        self.tags.add(tag)
        role = _TAGS[tag]
        if role == "ref":
            following = TAG.search(self.plain, stop)
            end = following.start() if following else len(self.plain)
            self._items.append(Ref(self.text[stop:end].strip()))
            if following is None or _TAGS[following[0]] != "/ref":
                self._note("unclosed")
                return end
            self.tags.add(following[0])
            return following.end()
        if role in ("box", "quad"):
            if self.num_open["box"] or self.num_open["quad"]:
                self._note("unclosed")
                self._close_tag(start)
            self._push("box" if role == "box" else "quad", start)
        elif role == "/" and (self.num_open["box"] or self.num_open["quad"]):
            self._close_tag(stop)
        return stop

    def _close_tag(self, stop: int) -> None:
        while self.open[-1].kind not in ("box", "quad"):
            self._note("missing_bracket")
            self._close(stop)
        self._close(stop)
