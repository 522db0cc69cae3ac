"""JSON files of any size, in bounded memory: arrays of objects, block by block, and lists of records by byte range.

    file --4 MB at a time--> block of whole elements --one typed decode--> list of structs
                                    |
                                    └ a block that does not decode is scanned exactly, and each of its elements decoded alone

A block is cut at the last place that looks like the border of two elements, `}` `,` `{`. The cut needs no proof: the block starts at an
element, and a cut inside an element leaves its brackets unbalanced, so that it cannot decode. Only then (nested objects, the array's end,
a bad element) the block is scanned with regard to strings and depth, at about 80 MB/s instead of 400.

What Python's json writes and JSON forbids (NaN, Infinity) decodes in the exact path, so that one such number costs one slow block.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec
from pyarrow import NativeFile

from boxcar.pipelines import storage
from boxcar.schemas.errors import AnnotationError

T = TypeVar("T")

BLOCK_BYTES = 4 << 20
MAX_ELEMENT_BYTES = 256 << 20
"""No annotation is this long: a longer element is a missing quote or bracket."""
MAX_KEY_BYTES = 64 << 10

# A string that the window cuts, even right after a backslash, is one token: its brackets are text.
_STRUCTURE = re.compile(rb'"(?>(?:[^"\\]|\\.)*)(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
_BLANKS = b" \t\r\n"
_KEY = re.compile(rb'\s*,?\s*("(?>(?:[^"\\]|\\.)*)")\s*:\s*')
_SCALAR = re.compile(rb'(?:"(?>(?:[^"\\]|\\.)*)"|[^\s,\]}"]+)')
_SEPARATOR = re.compile(rb"\s*,?\s*")
_UTF8_BOM = b"\xef\xbb\xbf"
_UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are no JSON, no UTF-8, or nested too deeply."""


@dataclass(frozen=True)
class BadElement:
    """An element that does not decode."""

    offset: int
    """Byte offset in the file."""
    text: str
    error: str


@dataclass(frozen=True)
class Block(Generic[T]):
    """Neighbouring elements of one array of the top-level object."""

    key: str
    items: list[T]
    bad: list[BadElement]
    num_bytes: int


class _Skip(msgspec.Struct):
    """Decodes any object and keeps nothing."""


_SKIP_DECODER = msgspec.json.Decoder(list[_Skip])


def read_arrays(path: str, element_types: Mapping[str, type[Any]]) -> Iterator[Block[Any]]:
    """The arrays under these keys of a file's top-level object, block by block, in the order of the file.

    An array that is there and empty yields one empty block, so that a caller can tell it from a missing one.
    Raises AnnotationError, with the byte offset, where the file is not such an object or ends too early.
    """
    decoders = {key: msgspec.json.Decoder(list[kind]) for key, kind in element_types.items()}  # type: ignore[valid-type]
    with storage.open_input(path) as stream:
        cursor = _Cursor(path, stream)
        cursor.enter_object()
        while (key := cursor.next_key()) is not None:
            decoder = decoders.get(key)
            if cursor.peek() != b"[":
                if decoder is not None:
                    raise cursor.error(f"the key {key!r} without a list", f"{key!r}: [...]")
                cursor.skip_value()
                continue
            if decoder is None:
                for _ in cursor.array_blocks(key, _SKIP_DECODER):
                    pass
                continue
            yield Block(key, [], [], 0)
            yield from cursor.array_blocks(key, decoder)


class _Cursor:
    """A window of a JSON file that moves forward. `offset` is the file position of the window's first byte."""

    def __init__(self, path: str, stream: NativeFile) -> None:
        self.path = path
        self.stream = stream
        self.window: bytes = b""
        self.offset = 0
        self.at_end = False
        self._fill(BLOCK_BYTES)
        if not self.window.strip(_BLANKS):
            raise AnnotationError(path, found="an empty file", expected="a JSON file")
        if self.window.startswith(_UTF8_BOM):
            self._advance(len(_UTF8_BOM))

    def error(self, found: str, expected: str, at: int = 0) -> AnnotationError:
        return AnnotationError(
            f"{self.path}, byte {self.offset + at}",
            found=found,
            expected=expected,
            fix="Is the file complete, and of the format that `reader` names?",
        )

    def _fill(self, num_bytes: int) -> bool:
        """Make the window at least this long, if the file is. False: nothing more came."""
        before = len(self.window)
        while len(self.window) < num_bytes and not self.at_end:
            chunk = self.stream.read(num_bytes - len(self.window))
            if not chunk:
                self.at_end = True
                break
            self.window = self.window + chunk if self.window else chunk
        return len(self.window) > before

    def _advance(self, num_bytes: int) -> None:
        self.window = self.window[num_bytes:]
        self.offset += num_bytes

    def _skip_blanks(self) -> None:
        while True:
            rest = self.window.lstrip(_BLANKS)
            self._advance(len(self.window) - len(rest))
            if rest or not self._fill(BLOCK_BYTES):
                return

    def peek(self) -> bytes:
        """The next byte that is no blank; b"" at the end of the file."""
        self._skip_blanks()
        return self.window[:1]

    def enter_object(self) -> None:
        found = self.peek()
        if found != b"{":
            what = "a list" if found == b"[" else f"{self.window[:20]!r}"
            raise self.error(f"{what} at the top", "a JSON object { ... }")
        self._advance(1)

    def next_key(self) -> str | None:
        """The next key of the top-level object, with the window left at its value; None at the object's end."""
        if self.peek() == b"}":
            return None
        self._fill(BLOCK_BYTES)
        match = _KEY.match(self.window)
        while match is None and len(self.window) < MAX_KEY_BYTES and self._fill(len(self.window) + BLOCK_BYTES):
            match = _KEY.match(self.window)
        if match is None:
            if self.peek() == b",":
                self._advance(1)
                if self.peek() == b"}":
                    return None
            raise self.error(f"{self.window[:40]!r}" if self.window else "the end of the file", 'a key "name": or the closing }')
        self._advance(match.end())
        return str(json.loads(match[1]))

    def skip_value(self) -> None:
        """Move past one value that is no array of objects."""
        if self.peek() not in (b"{", b"["):
            match = _SCALAR.match(self.window)
            # A scalar that touches the window's end may go on behind it.
            while (match is None or match.end() == len(self.window)) and self._fill(len(self.window) + BLOCK_BYTES):
                match = _SCALAR.match(self.window)
            if match is None:
                raise self.error(f"{self.window[:20]!r}", "a JSON value")
            self._advance(match.end())
            return
        wanted = BLOCK_BYTES
        while True:
            depth = 0
            for token in _STRUCTURE.finditer(self.window):
                byte = self.window[token.start()]
                if byte in b"[{":
                    depth += 1
                elif byte in b"]}":
                    depth -= 1
                    if depth == 0:
                        self._advance(token.end())
                        return
            wanted = max(wanted, len(self.window)) * 2
            if wanted > MAX_ELEMENT_BYTES or not self._fill(wanted):
                raise self.error("a value that never ends", "its closing bracket")

    def _close_list(self, closed_at: int) -> None:
        """Move past the bracket that ends a list. Raises AnnotationError where it is a `}`: a brace too many would hide the rest."""
        self._advance(closed_at)
        if self.window[:1] != b"]":
            raise self.error(f"{self.window[:20]!r} after an element", "a comma or the closing ]")
        self._advance(1)

    def array_blocks(self, key: str, decoder: "msgspec.json.Decoder[list[T]]") -> Iterator[Block[T]]:
        """The elements of the array at the window's start; the window is left behind its `]`."""
        self._advance(1)
        wanted = BLOCK_BYTES
        while True:
            self._fill(wanted)
            cut = _last_border(self.window)
            if cut:
                try:
                    items = decoder.decode(b"[" + self.window[:cut] + b"]")
                except _UNDECODABLE:
                    pass
                else:
                    block = Block(key, items, [], cut)
                    self._advance(cut)
                    self._advance(_border_length(self.window))
                    wanted = BLOCK_BYTES
                    yield block
                    continue
            spans, closed_at = element_spans(self.window)
            if spans:
                yield self._decode_alone(key, spans, decoder)
            if closed_at is not None:
                self._close_list(closed_at)
                return
            if spans:
                self._advance(spans[-1][1])
                self._advance(_border_length(self.window))
                wanted = BLOCK_BYTES
            else:
                wanted = max(wanted, len(self.window)) * 2
                if wanted > MAX_ELEMENT_BYTES or not self._fill(wanted):
                    raise self.error(
                        f"{'the end of the file' if self.at_end else 'no end of the element'} inside the list {key!r}",
                        "its closing ]",
                    )

    def _decode_alone(self, key: str, spans: list[tuple[int, int]], decoder: "msgspec.json.Decoder[list[T]]") -> Block[T]:
        items: list[T] = []
        bad: list[BadElement] = []
        for start, stop in spans:
            raw = self.window[start:stop]
            try:
                items.extend(decode_element(raw, decoder))
            except msgspec.DecodeError as error:
                bad.append(BadElement(self.offset + start, raw[:2000].decode(errors="replace"), str(error)))
        return Block(key, items, bad, spans[-1][1])


def decode_element(raw: bytes, decoder: "msgspec.json.Decoder[list[T]]") -> list[T]:
    """One element through the decoder of a list, with NaN and Infinity as Python's json writes them.

    Raises msgspec.DecodeError.
    """
    try:
        return decoder.decode(b"[" + raw + b"]")
    except msgspec.ValidationError:
        raise
    except _UNDECODABLE as error:
        try:
            value = json.loads(raw)
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair can be read, but never written
        except (ValueError, RecursionError):
            raise msgspec.DecodeError(str(error)) from None
        return msgspec.convert([value], decoder.type)


def _last_border(window: bytes) -> int:
    """Length up to and with the `}` of the last `}` `,` `{` of the window; 0 where there is none."""
    end = len(window)
    while (brace := window.rfind(b"}", 0, end)) >= 0:
        border = _SEPARATOR.match(window, brace + 1)
        assert border is not None
        if b"," in border[0] and window[border.end() : border.end() + 1] == b"{":
            return brace + 1
        end = brace
    return 0


def _border_length(window: bytes) -> int:
    match = _SEPARATOR.match(window)
    assert match is not None
    return match.end()


def element_spans(window: bytes) -> tuple[list[tuple[int, int]], int | None]:
    """(start, stop) of each complete element of an array whose first element starts the window, and where its `]` stands, or None.

    Elements that are no objects (numbers, strings) are spans of their own, so that they can be reported.
    """
    spans: list[tuple[int, int]] = []
    depth, start, gap_from = 0, 0, 0
    for token in _STRUCTURE.finditer(window):
        byte = window[token.start()]
        if byte in b"{[":
            if depth == 0:
                start = token.start()
                spans.extend(_scalars(window, gap_from, start))
            depth += 1
        elif byte in b"}]":
            if depth == 0:
                spans.extend(_scalars(window, gap_from, token.start()))
                return spans, token.start()
            depth -= 1
            if depth == 0:
                spans.append((start, token.end()))
                gap_from = token.end()
    return spans, None


def _scalars(window: bytes, start: int, stop: int) -> list[tuple[int, int]]:
    return [match.span() for match in _SCALAR.finditer(window, start, stop)]


def count_offsets(path: str, items_per_range: int) -> tuple[list[tuple[int, int]], int]:
    """Byte ranges of about `items_per_range` elements of a JSON list or lines of a JSONL file, and the number of elements.

    Ranges cover whole elements. Raises AnnotationError where the file is empty or no list of objects ends.
    """
    with storage.open_input(path) as stream:
        head = stream.read(4096).removeprefix(_UTF8_BOM).lstrip(_BLANKS)
        stream.seek(0)
        if head.startswith(b"["):
            return _list_ranges(_Cursor(path, stream), items_per_range)
        if not head.startswith(b"{"):
            raise AnnotationError(
                path, found=f"{head[:20]!r} at the start" if head else "an empty file", expected="a JSON list or JSON lines"
            )
        return _line_ranges(stream, items_per_range)


def _list_ranges(cursor: _Cursor, items_per_range: int) -> tuple[list[tuple[int, int]], int]:
    ranges: list[tuple[int, int]] = []
    num_items, first = 0, -1
    cursor.peek()
    cursor._advance(1)
    wanted = BLOCK_BYTES
    while True:
        cursor._fill(wanted)
        spans, closed_at = element_spans(cursor.window)
        for start, stop in spans:
            if first < 0:
                first = cursor.offset + start
            num_items += 1
            if num_items % items_per_range == 0:
                ranges.append((first, cursor.offset + stop))
                first = -1
        if closed_at is not None:
            if first >= 0:
                ranges.append((first, cursor.offset + closed_at))
            cursor._close_list(closed_at)
            if cursor.peek():
                raise cursor.error(f"{cursor.window[:20]!r} after the list's closing ]", "the end of the file")
            return ranges, num_items
        if spans:
            cursor._advance(spans[-1][1])
            cursor._advance(_border_length(cursor.window))
            wanted = BLOCK_BYTES
        else:
            wanted = max(wanted, len(cursor.window)) * 2
            if wanted > MAX_ELEMENT_BYTES or not cursor._fill(wanted):
                raise cursor.error("the end of the file inside the list", "its closing ]")


def _line_ranges(stream: NativeFile, items_per_range: int) -> tuple[list[tuple[int, int]], int]:
    ranges: list[tuple[int, int]] = []
    offset, first, num_items, num_pending = 0, 0, 0, 0
    carry = b""
    while chunk := stream.read(BLOCK_BYTES):
        lines = (carry + chunk).split(b"\n")
        carry = lines.pop()
        for line in lines:
            offset += len(line) + 1
            if line.strip(_BLANKS):
                num_items += 1
                num_pending += 1
                if num_pending == items_per_range:
                    ranges.append((first, offset))
                    first, num_pending = offset, 0
    if carry.strip(_BLANKS):
        num_items += 1
        num_pending += 1
    if num_pending:
        ranges.append((first, offset + len(carry)))
    return ranges, num_items


def read_range(path: str, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """(byte offset, raw JSON) of each element of a range of `count_offsets`, in a list or in lines.

    A line that is no complete JSON value is yielded like any other: its reader finds out when it decodes it.
    """
    with storage.open_input(path) as stream:
        stream.seek(0)
        is_list = stream.read(4096).removeprefix(_UTF8_BOM).lstrip(_BLANKS).startswith(b"[")
        stream.seek(start)
        data = stream.read(stop - start)
    if is_list:
        spans = element_spans(data)[0]
        # A number or string that ends the range is no element of a record list, but it was counted: its reader reports it.
        spans += _scalars(data, spans[-1][1] if spans else 0, len(data))
        for begin, end in spans:
            yield start + begin, data[begin:end]
        return
    offset = start
    for line in data.split(b"\n"):
        if line.strip(_BLANKS):
            yield offset, line.removeprefix(_UTF8_BOM)
        offset += len(line) + 1
