"""Refs files: what people said about the objects of an image, as a pickle (RefCOCO) or a JSON list (gRefCOCO).

    file ──> refs, one by one ──> those of the wanted split, as columns

A pickle can run anything, but what it wants to run, it must name first (`posix.system`, `builtins.eval`): an unpickler that finds no name
runs nothing, and what is left is plain data. Protocols 0 to 5, and Python 2's, whose strings are bytes.
"""

import io
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import msgspec
import polars as pl

from boxcar.pipelines import storage
from boxcar.pipelines.readers.shared.coco_index import Id
from boxcar.pipelines.readers.shared.json_blocks import count_offsets, decode_element, read_range
from boxcar.schemas.errors import AnnotationError
from boxcar.schemas.record import Rejected

REFS_PER_RANGE = 4096
BROKEN_REF = "broken_ref"
_REF_KEYS = frozenset({"ref_id", "image_id", "ann_id", "split", "sentences", "sent", "raw", "no_target"})
_REF_DEPTH = 3
"""A ref, its sentences, a sentence."""


class Refused(Exception):
    """One ref that cannot be understood: what was found and what was expected."""


class Sentence(msgspec.Struct, gc=False):
    """One expression: as normalised by its makers, and as it was typed."""

    sent: str | None = None
    raw: str | None = None


class RefRow(msgspec.Struct, kw_only=True):
    """One element of a refs file; `ann_id` is the format's own."""

    image_id: Id
    sentences: list[Sentence]
    ref_id: Id = ""
    split: str = ""


Row = TypeVar("Row", bound=RefRow)
TargetsOf = Callable[[Row], list[Id]]
"""The annotations a ref means, [] for none. Raises Refused."""


# Pickles


class _ForbiddenGlobal(Exception):
    pass


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise _ForbiddenGlobal(f"{module_name}.{global_name}")


def _load_pickle(path: str) -> Any:
    """The object of a pickle, with bytes where Python 2 wrote its strings.

    Raises AnnotationError where it names any class or function, or is no pickle.
    """
    data = storage.read_bytes(path)
    try:
        return _PlainUnpickler(io.BytesIO(data), encoding="bytes").load()
    except _ForbiddenGlobal as forbidden:
        raise AnnotationError(
            path,
            found=f"a pickle that asks for the forbidden global {forbidden}",
            expected="lists, dictionaries, strings and numbers alone",
            fix="Nothing of it was run. Get the file from where it was first published, or have its owner write it as JSON.",
        ) from None
    except Exception as error:  # a broken pickle raises what it likes: UnpicklingError, EOFError, IndexError, TypeError, MemoryError, ...
        found = f"{data[:20]!r}, which is neither JSON nor a whole pickle ({type(error).__name__}: {error})"
        raise AnnotationError(path, found=found, expected="refs as a pickle or a JSON list") from error


def _plain(value: object, depth: int = _REF_DEPTH) -> object:
    """The known keys of an unpickled ref, with text for bytes. What is deeper than a ref or of another kind is [], which fits nowhere: a
    pickle may hold itself, or a list of lists of lists that none could print."""
    if isinstance(value, dict) and depth:
        named = ((_text(key), inner) for key, inner in value.items())
        return {key: _plain(inner, depth - 1) for key, inner in named if key in _REF_KEYS}
    if isinstance(value, list | tuple) and depth:
        return [_plain(inner, depth - 1) for inner in value]
    return _text(value) if value is None or isinstance(value, bytes | str | int | float) else []


def _text(value: object) -> object:
    """Bytes as the text they are: UTF-8, or else Latin-1, which takes any byte."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin1")


# Refs


def read_refs(path: str, kind: type[Row]) -> Iterator[tuple[str, Row | Rejected]]:
    """(where it stands, ref) of each element of a refs file. Raises AnnotationError where it is no list."""
    source = path.rpartition("/")[2]
    with storage.open_input(path) as stream:
        head = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head or head.startswith(b"{"):
        raise AnnotationError(
            path, found="an object at the top" if head else "an empty file", expected="a list of refs: [{...}, ...]", fix="Check `reader`."
        )
    if head.startswith(b"["):
        decoder = msgspec.json.Decoder(list[kind])  # type: ignore[valid-type]
        for start, stop in count_offsets(path, REFS_PER_RANGE)[0]:
            for offset, raw in read_range(path, start, stop):
                where = f"{source}, byte {offset}"
                try:
                    yield where, decode_element(raw, decoder)[0]
                except msgspec.DecodeError as error:
                    yield where, _broken(where, error, raw[:2000].decode(errors="replace"))
        return
    refs = _load_pickle(path)
    if not isinstance(refs, list | tuple):
        raise AnnotationError(path, found=f"a pickled {type(refs).__name__}", expected="a list of refs", fix="Check `reader`.")
    for number, ref in enumerate(refs):
        where = f"{source}, element {number}"
        row = _plain(ref)
        try:
            yield where, msgspec.convert(row, kind)
        except msgspec.ValidationError as error:
            yield where, _broken(where, error, repr(row)[:2000])


def _broken(where: str, error: Exception, text: str) -> Rejected:
    return Rejected(BROKEN_REF, where, f'found {error}, expected a ref {{"image_id", "ann_id", "sentences"}}', source_text=text)


def _phrases(sentences: list[Sentence]) -> list[str]:
    """The sentences, blanks made single; `raw` where `sent` is blank."""
    texts = (" ".join((sentence.sent or "").split()) or " ".join((sentence.raw or "").split()) for sentence in sentences)
    return list(dict.fromkeys(text for text in texts if text))


@dataclass
class WantedRefs:
    """The refs of the wanted split, in columns. `targets` of a ref that means nothing in the image is [null]."""

    frame: pl.DataFrame
    rejected: list[Rejected]
    notes: list[str]


_REFS_SCHEMA: dict[str, pl.DataType | type[pl.DataType]] = {
    "ref": pl.Int64,
    "name": pl.String,
    "image_id": pl.String,
    "split": pl.String,
    "phrases": pl.List(pl.String),
    "targets": pl.List(pl.String),
}


def read_wanted(path: str, split: str, kind: type[Row], targets_of: TargetsOf[Row]) -> WantedRefs:
    """All refs of a split ("": of every split). Raises AnnotationError where there is no such split, or nothing readable."""
    splits: Counter[str] = Counter()
    rejected: list[Rejected] = []
    rows: list[tuple[int, str, str, str, list[str], list[str | None]]] = []
    num_silent = 0
    for number, (where, ref) in enumerate(read_refs(path, kind)):
        if isinstance(ref, Rejected):
            rejected.append(ref)
            continue
        splits[ref.split] += 1
        if split not in ("", ref.split):
            continue
        name = f"ref {ref.ref_id}" if ref.ref_id != "" else where.rpartition(", ")[2]
        try:
            targets: list[str | None] = [*dict.fromkeys(map(str, targets_of(ref)))]
        except Refused as refused:
            rejected.append(Rejected(BROKEN_REF, where, str(refused), name))
            continue
        if phrases := _phrases(ref.sentences):
            rows.append((number, name, str(ref.image_id), ref.split, phrases, targets or [None]))
        else:
            num_silent += 1
    if not splits:
        first = f"{len(rejected)} refs, none that can be read ({rejected[0].position}: {rejected[0].detail})" if rejected else ""
        raise AnnotationError(path, found=first or "an empty list", expected="one readable ref at least", fix="Check `reader`.")
    if split and split not in splits:
        known = ", ".join(f"{name or 'without split'} ({count} refs)" for name, count in splits.items())
        raise AnnotationError(path, found=f"no split {split!r}", expected=f"one of {known}", fix='Set `split` to one of them, or to "".')
    notes = [f"{num_silent} refs without a sentence are left out"] if num_silent else []
    return WantedRefs(pl.DataFrame(rows, schema=_REFS_SCHEMA, orient="row"), rejected, notes)
