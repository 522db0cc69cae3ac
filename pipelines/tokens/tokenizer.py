"""Tokenizers that never encode a string twice, and pieces whose ids can be put together.

A text with boxes is composed of *pieces*: gaps between boxes, and numbers. Composition is exact because every border between a piece
and a number is a border between a digit and something else, and the families' tokenizers never put both into one token:

    ...  [588, 499  ...      ids(text) = ids(gap) + ids("588") + ids(", ") + ids("499") + ...

`load_tokenizer` proves that for the vocabulary at hand. A gap is encoded between digits where digits stand beside it ("0" + gap + "0",
the digits' ids taken off), so that whatever the tokenizer does with neighbours (the blank that sentencepiece puts first, white space
before a word) is done as in the whole text.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from boxcar.pipelines.ragged import Ragged, concat, ragged_of
from boxcar.schemas.errors import TokenizerError

_PROBES = (
    *("a dog", " leading", "12 cats, 3.5%", "「红色」的车", "🙂 naïve — \"quoted\"\n\t{'x': [1, 2]}", "[[086,540,400,760]]"),
    "e\u0301\u212b",  # what normalisation joins
)
MAX_CACHED_PIECES = 20_000
"""Questions that name several labels are all different: without a bound they grow by half a megabyte with every unit."""


@dataclass(frozen=True)
class TextTokenizer:
    """A family's tokenizer, as conversion needs it."""

    backend: Tokenizer
    special_ids: dict[str, int]
    """Every added special token and its id."""
    special_pattern: re.Pattern[str]
    """Matches any special token in a text."""
    fingerprint: str
    """xxh3-128 in hex over the vocabulary and the ids of a few hard strings."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text by itself, without added beginning or end."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def control_ids(self, text: str) -> list[int]:
        """Ids of control text: special tokens by their ids, what stands between them encoded apart."""
        ids: list[int] = []
        end = 0
        for match in self.special_pattern.finditer(text):
            ids += self._plain(text[end : match.start()])
            ids.append(self.special_ids[match[0]])
            end = match.end()
        return ids + self._plain(text[end:])

    def _plain(self, text: str) -> list[int]:
        return self.encode([text])[0] if text else []


@lru_cache(maxsize=4)
def load_tokenizer(where: str) -> TextTokenizer:
    """From a folder with tokenizer.json (or qwen.tiktoken, or files that transformers can convert), a tokenizer.json, or a hub id.

    Kept per process: reading a vocabulary costs as much as converting thousands of samples, and Ray gives a worker many tasks.
    Raises TokenizerError where there is none, or where its tokens cross the border between digits and other text.
    """
    backend = _load_backend(where)
    backend.no_padding()
    backend.no_truncation()
    specials = {token.content: index for index, token in backend.get_added_tokens_decoder().items() if token.special}
    if not specials:
        raise TokenizerError(where, found="no special tokens", expected="a chat tokenizer")
    longest_first = sorted(specials, key=len, reverse=True)
    tokenizer = TextTokenizer(
        backend=backend,
        special_ids=specials,
        special_pattern=re.compile("|".join(map(re.escape, longest_first))),
        fingerprint=_fingerprint(backend),
    )
    _check_digit_borders(where, tokenizer)
    return tokenizer


def _load_backend(where: str) -> Tokenizer:
    path = Path(where)
    if path.is_file():
        return _from_file(path)
    if path.is_dir():
        for name, load in _LOCAL_FORMS.items():
            if (path / name).is_file():
                return load(path / name)
        raise TokenizerError(where, found="a folder without a tokenizer", expected=" or ".join(_LOCAL_FORMS))
    if where.startswith((".", "/", "~")) or where.count("/") != 1:
        raise TokenizerError(
            where, found="no such folder", expected="a folder with tokenizer.json, or a hub id such as Qwen/Qwen2.5-VL-7B-Instruct"
        )
    try:
        return Tokenizer.from_pretrained(where)
    except Exception as error:
        # tokenizers raises bare Exception for every cause: no network, no such repository, a repository without tokenizer.json.
        raise TokenizerError(
            where,
            found=f"a hub id that does not load ({str(error).splitlines()[0][:200]})",
            expected="a reachable hub repository with tokenizer.json",
            fix="Without a network, download the tokenizer files into a folder and name that folder.",
        ) from error


def _from_file(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise TokenizerError(
            str(path), found=f"a file that does not load ({error})", expected="a tokenizer.json of the tokenizers library"
        ) from error


def _from_transformers(path: Path) -> Tokenizer:
    """A sentencepiece model without tokenizer.json (Vicuna): transformers knows how to convert it."""
    try:
        import transformers  # noqa: PLC0415  (an extra, and slow to import)
    except ImportError as error:
        raise TokenizerError(
            str(path),
            found="only tokenizer.model",
            expected="tokenizer.json",
            fix="pip install 'boxcar-vl[train]' to convert it on the fly.",
        ) from error
    backend: Tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent)).backend_tokenizer
    return backend


QWEN_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN_V1_SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{index}|>" for index in range(205)),
    "<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>",
)  # fmt: skip


def _from_qwen_tiktoken(path: Path) -> Tokenizer:
    """Qwen-VL v1's own file: a line of base64 token and rank each. Specials follow the ranks (tokenization_qwen.py)."""
    import base64  # noqa: PLC0415  (only this form needs it)

    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in path.read_bytes().splitlines() if line)}
    return byte_level_from_ranks(ranks, _QWEN_V1_SPECIALS)


def byte_level_from_ranks(ranks: dict[bytes, int], specials: Sequence[str]) -> Tokenizer:
    """A byte-level BPE from tiktoken ranks: a token's merge is the pair that its lower ranks leave last."""
    alphabet = _byte_alphabet()

    def text(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = _last_pair(token, ranks, rank)
            merges.append((text(left), text(right)))
    backend = Tokenizer(models.BPE(vocab={text(token): rank for token, rank in ranks.items()}, merges=merges))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(special, special=True, normalized=False) for special in specials])
    return backend


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable letter for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in letters)
    return letters | {byte: chr(256 + index) for index, byte in enumerate(others)}


def _last_pair(token: bytes, ranks: dict[bytes, int], rank: int) -> tuple[bytes, bytes]:
    """The two parts into which merging by all ranks below this one leaves a token."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda index: ranks.get(parts[index] + parts[index + 1], rank))
        if ranks.get(parts[best] + parts[best + 1], rank) >= rank:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    if len(parts) != 2:
        raise TokenizerError("qwen.tiktoken", found=f"token {token!r} that no two others make", expected="a byte-pair vocabulary")
    return parts[0], parts[1]


_LOCAL_FORMS: dict[str, Callable[[Path], Tokenizer]] = {
    "tokenizer.json": _from_file,
    "qwen.tiktoken": _from_qwen_tiktoken,
    "tokenizer.model": _from_transformers,
}


def _fingerprint(backend: Tokenizer) -> str:
    digest = xxhash.xxh3_128()
    for token, index in sorted(backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1]):
        digest.update(f"{index}\0{token}\n".encode(errors="surrogatepass"))
    for encoding in backend.encode_batch_fast(list(_PROBES), add_special_tokens=False):
        digest.update(repr(encoding.ids).encode())
    return digest.hexdigest()


_DIGIT_AND_OTHER = re.compile(r"[0-9][^0-9]|[^0-9][0-9]")


def _check_digit_borders(where: str, tokenizer: TextTokenizer) -> None:
    """Composition is exact only if no token holds a digit together with anything else."""
    for token in tokenizer.backend.get_vocab(with_added_tokens=False):
        if _DIGIT_AND_OTHER.search(token) and not re.fullmatch(r"<0x[0-9A-F]{2}>", token) and token not in tokenizer.special_ids:
            raise TokenizerError(
                where,
                found=f"the token {token!r}, which joins a digit with other text",
                expected="digits in tokens of their own, as all of Boxcar's families have them",
                fix="Is this the tokenizer of the family that you named?",
            )


# What stands beside a piece while it is encoded: nothing at the edge of a text, a digit beside a gap, a comma before a number.
_Piece = tuple[str, str, str]
"""(left anchor, text, right anchor)."""


class PieceTable:
    """Pieces of text by number, with their ids and bytes: interned while a unit is planned, then encoded in one batch."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self._anchor_ids = {anchor: tokenizer.encode([anchor])[0] if anchor else [] for anchor in ("", "0", ",")}
        self._clear()

    def _clear(self) -> None:
        self._codes: dict[_Piece, int] = {}
        self._pending: list[_Piece] = []
        self.ids: Ragged[np.int32] = ragged_of([], np.int32)
        """Token ids of each piece; complete after `encode_pending`."""
        self.texts: Ragged[np.uint8] = ragged_of([], np.uint8)
        """UTF-8 bytes of each piece; complete after `encode_pending`."""

    def forget_if_large(self) -> bool:
        """Between units: bound the memory of long runs over free text. True: all codes given out before are void."""
        if len(self._codes) <= MAX_CACHED_PIECES:
            return False
        self._clear()
        return True

    def intern_gap(self, text: str, *, after_number: bool = False, before_number: bool = False) -> int:
        """Code of a gap: the text before, between or after the numbers of boxes, or a text without boxes."""
        return self._intern(("0" if after_number else "", text, "0" if before_number else ""))

    def intern_numbers(self, values: npt.NDArray[np.int64], number_format: str) -> npt.NDArray[np.int64]:
        """Codes of numbers, in the shape of `values`."""
        distinct, inverse = np.unique(values, return_inverse=True)
        codes = np.array([self._intern((",", number_format % value, "")) for value in distinct.tolist()], dtype=np.int64)
        return codes[inverse].reshape(values.shape)

    def intern_separators(self, separators: Sequence[str]) -> list[int]:
        """Codes of what stands between the numbers of one box."""
        return [self._intern(("0", separator, "0")) for separator in separators]

    def _intern(self, piece: _Piece) -> int:
        code = self._codes.get(piece)
        if code is None:
            code = self._codes[piece] = len(self._codes)
            self._pending.append(piece)
        return code

    def encode_pending(self) -> None:
        """Encode what was interned since the last call, in one batch. Raises TokenizerError where a border does not hold."""
        if not self._pending:
            return
        encoded = self.tokenizer.encode([left + text + right for left, text, right in self._pending])
        ids = [self._between_anchors(piece, found) for piece, found in zip(self._pending, encoded, strict=True)]
        texts = [np.frombuffer(text.encode(), np.uint8) for _, text, _ in self._pending]
        self.ids = concat([self.ids, ragged_of(ids, np.int32)])
        self.texts = concat([self.texts, ragged_of(texts, np.uint8)])
        self._pending.clear()

    def _between_anchors(self, piece: _Piece, ids: list[int]) -> list[int]:
        left, text, right = piece
        start = self._anchor_ids[left]
        stop = self._anchor_ids[right][-1:]
        if ids[: len(start)] != start or (stop and ids[-1:] != stop):
            raise TokenizerError(repr(text), found=f"ids {ids} that run over its border with a digit", expected="a border there")
        return ids[len(start) : len(ids) - len(stop)]
