"""Loading a tokenizer, refusing what cannot be composed exactly, and encoding no string twice."""

import json
import re
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from boxcar.pipelines.tokens import tokenizer as tokens
from boxcar.pipelines.tokens.tokenizer import PieceTable, TextTokenizer, byte_level_from_ranks, load_tokenizer
from boxcar.schemas.errors import TokenizerError
from tests.small_tokenizers import QWEN_V1_SPECIALS, corpus, folder_of, needs_real_qwen, ranks_of, real_qwen_ranks, tiktoken_lines, trained

HARD = [
    "a dog",
    '"]}, {"bbox_2d": [1, 22, 333]}',
    "红色的车 🙂",
    "e\u0301\u212b",
    "  \n\t ",
    "it's 3.5%, [[086,540]]",
    "\x00\x7f",
    "ﬁ²ﾊﾟ",
    "長い" * 30,
]


def saved(tokenizer: Tokenizer, folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def changed(name: str, folder: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """One of the small tokenizers, its file edited."""
    content = json.loads(trained(name).to_str())
    change(content)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return str(folder)


# ---- borders of digits


@pytest.mark.parametrize("name", ["qwen2", "qwen_v1", "vicuna", "llama3"])
def test_the_families_tokenizers_keep_digits_to_themselves(name: str) -> None:
    loaded = load_tokenizer(folder_of(name))
    assert loaded.encode(HARD) == [trained(name).encode(text, add_special_tokens=False).ids for text in HARD]


JOINED = ["1,", "a1", "[0", "Ġ7", "▁7", "12)", "(3", "x10x", "0x", "2d", "狗1"]


@pytest.mark.parametrize("token", JOINED)
def test_a_token_that_joins_a_digit_with_anything_is_refused(token: str, tmp_path: Path) -> None:
    def add(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        content["model"]["vocab"] = {**vocabulary, token: len(vocabulary)}
        content["added_tokens"] = [{**added, "id": added["id"] + 1} for added in content["added_tokens"]]

    with pytest.raises(TokenizerError, match=re.escape(repr(token))):
        load_tokenizer(changed("qwen2", tmp_path, add))


def test_a_vocabulary_that_learned_digits_with_other_text_is_refused(tmp_path: Path) -> None:
    """GPT-2's way: digits are not split from what follows them within a word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=900, show_progress=False, special_tokens=["<s>"]))
    with pytest.raises(TokenizerError, match="joins a digit with other text"):
        load_tokenizer(saved(tokenizer, tmp_path))


def test_tokens_of_several_digits_and_byte_tokens_pass() -> None:
    assert any(token.isdigit() and len(token) > 1 for token in trained("llama3").get_vocab())
    assert "<0x30>" in trained("vicuna").get_vocab()
    load_tokenizer(folder_of("llama3"))
    load_tokenizer(folder_of("vicuna"))


def by_hand(vocabulary: Sequence[str], merges: list[tuple[str, str]]) -> TextTokenizer:
    """A tokenizer that `load_tokenizer` would refuse."""
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(vocabulary)}, merges=merges))
    return TextTokenizer(backend, {"<s>": 99}, re.compile("<s>"), "")


@pytest.mark.parametrize(
    ("gap", "after", "before"), [("[", False, True), ("]", True, False), ("a[", False, True), ("]a", True, False), ("]a[", True, True)]
)
def test_a_gap_that_runs_into_a_number_is_noticed_when_it_is_encoded(gap: str, after: bool, before: bool) -> None:
    table = PieceTable(by_hand(["0", "[", "]", "a", "[0", "0]"], [("[", "0"), ("0", "]")]))
    table.intern_gap("a", after_number=after, before_number=before)
    table.encode_pending()
    table.intern_gap(gap, after_number=after, before_number=before)
    with pytest.raises(TokenizerError, match="run over its border with a digit"):
        table.encode_pending()


# ---- where tokenizers come from

MISSING = [
    pytest.param("/no/such/folder", "no such folder", id="an absolute path"),
    pytest.param("./here", "no such folder", id="a relative path"),
    pytest.param("~/there", "no such folder", id="a path at home"),
    pytest.param("just-a-name", "no such folder", id="a name without an owner"),
    pytest.param("a/path/of/three", "no such folder", id="three names"),
]


@pytest.mark.parametrize(("where", "found"), MISSING)
def test_a_path_that_leads_nowhere_is_no_hub_id(where: str, found: str) -> None:
    with pytest.raises(TokenizerError, match=f"found {found}, expected a folder with tokenizer.json, or a hub id"):
        load_tokenizer(where)


def test_a_hub_id_that_does_not_load_says_why_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreachable:
        @staticmethod
        def from_pretrained(where: str) -> Tokenizer:
            raise Exception(f"401 for {where}\nand much more")  # the library raises nothing more special

    monkeypatch.setattr(tokens, "Tokenizer", Unreachable)
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer("nobody/nothing")
    assert "found a hub id that does not load (401 for nobody/nothing), expected a reachable hub repository" in str(caught.value)
    assert "Without a network, download the tokenizer files into a folder" in caught.value.fix


def test_a_folder_without_a_tokenizer_says_what_it_should_hold(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"found a folder without a tokenizer, expected tokenizer\.json or qwen\.tiktoken or tok"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"version": "1.0"}', "\x00\x01"])
def test_a_file_that_is_no_tokenizer_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    for where in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(TokenizerError, match=re.escape(str(tmp_path / "tokenizer.json"))):
            load_tokenizer(str(where))


def test_a_sentencepiece_model_without_transformers_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TokenizerError, match="pip install"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_special_tokens_is_no_chat_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    tokenizer.add_tokens([AddedToken("<b>", special=False)])
    with pytest.raises(TokenizerError, match="found no special tokens"):
        load_tokenizer(saved(tokenizer, tmp_path))


def test_a_file_and_its_folder_are_the_same_tokenizer_loaded_once(tmp_path: Path) -> None:
    where = saved(trained("qwen2"), tmp_path)
    assert load_tokenizer(where) is load_tokenizer(where)
    assert load_tokenizer(where).fingerprint == load_tokenizer(str(Path(where) / "tokenizer.json")).fingerprint


def test_what_a_file_says_of_cutting_and_padding_is_not_done(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(trained("qwen2").to_str())
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    loaded = load_tokenizer(saved(tokenizer, tmp_path))
    assert loaded.encode(HARD) == load_tokenizer(folder_of("qwen2")).encode(HARD)


def test_nothing_is_put_before_or_behind_a_text() -> None:
    for name, first in (("vicuna", "<s>"), ("llama3", "<|begin_of_text|>")):
        loaded = load_tokenizer(folder_of(name))
        assert trained(name).encode("a").ids[0] == loaded.special_ids[first]
        assert loaded.special_ids[first] not in loaded.encode(["a"])[0]


# ---- control text


def test_special_tokens_of_control_text_stand_by_their_ids() -> None:
    loaded = load_tokenizer(folder_of("qwen2"))
    ids = loaded.special_ids
    between = loaded.encode(["system\nBe brief.", "\n", "user\n"])
    found = loaded.control_ids("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|>")
    opened, closed = ids["<|im_start|>"], ids["<|im_end|>"]
    assert found == [opened, *between[0], closed, *between[1], opened, *between[2], ids["<|vision_start|>"], ids["<|image_pad|>"]]
    assert loaded.control_ids("") == []
    assert loaded.control_ids("no special token") == loaded.encode(["no special token"])[0]


def test_of_two_special_tokens_the_longer_is_meant(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(trained("qwen2").to_str())
    tokenizer.add_special_tokens(["<a>", "<a>b"])
    loaded = load_tokenizer(saved(tokenizer, tmp_path))
    assert loaded.control_ids("<a>b<a>") == [loaded.special_ids["<a>b"], loaded.special_ids["<a>"]]


# ---- fingerprints


def swap_two(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    (one, first), (other, second) = sorted(vocabulary.items(), key=lambda item: item[1])[-2:]
    vocabulary[one], vocabulary[other] = second, first


def without_normalizer(content: dict[str, Any]) -> None:
    content["normalizer"] = None


def another_pattern(content: dict[str, Any]) -> None:
    split = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    split["Regex"] = split["Regex"].replace(r" ?[^\s", r"[^\s")


def one_more_special(content: dict[str, Any]) -> None:
    content["added_tokens"].append({**content["added_tokens"][-1], "content": "<|more|>", "id": content["added_tokens"][-1]["id"] + 1})


def without_merges(content: dict[str, Any]) -> None:
    content["model"]["merges"] = content["model"]["merges"][:50]


DIFFERENCES = [swap_two, without_normalizer, another_pattern, one_more_special, without_merges]


@pytest.mark.parametrize("change", DIFFERENCES, ids=lambda change: change.__name__)
def test_a_fingerprint_tells_tokenizers_apart(change: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    own = load_tokenizer(folder_of("qwen2")).fingerprint
    assert own == load_tokenizer(changed("qwen2", tmp_path / "same", lambda content: None)).fingerprint
    assert own != load_tokenizer(changed("qwen2", tmp_path / "other", change)).fingerprint


def test_fingerprints_of_the_families_differ() -> None:
    names = ["qwen2", "qwen_v1", "vicuna", "llama3"]
    assert len({load_tokenizer(folder_of(name)).fingerprint for name in names}) == len(names)


# ---- qwen.tiktoken


def test_a_tiktoken_file_gives_the_tokenizer_that_its_ranks_came_from(tmp_path: Path) -> None:
    known = trained("qwen_v1")
    ranks = ranks_of(known.get_vocab(with_added_tokens=False))
    (tmp_path / "qwen.tiktoken").write_bytes(tiktoken_lines(ranks) + b"\n")
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.backend.get_vocab() == known.get_vocab()
    assert list(loaded.special_ids) == list(QWEN_V1_SPECIALS)
    assert list(loaded.special_ids.values()) == list(range(len(ranks), len(ranks) + len(QWEN_V1_SPECIALS)))
    merges = [json.loads(backend.to_str())["model"]["merges"] for backend in (loaded.backend, known)]
    assert merges[0] == merges[1]
    assert loaded.fingerprint == load_tokenizer(folder_of("qwen_v1")).fingerprint
    for text in [*HARD, *corpus()][:400]:
        assert loaded.encode([text]) == [known.encode(text, add_special_tokens=False).ids]
        assert loaded.backend.decode(loaded.encode([text])[0]) == known.decode(known.encode(text, add_special_tokens=False).ids)


@given(st.lists(st.text("ab", min_size=2, max_size=6), unique=True, max_size=8), st.text("ab", max_size=30))
def test_ranks_merge_as_tiktoken_merges_them(words: list[str], text: str) -> None:
    ranks = {bytes([byte]): byte for byte in range(256)}
    for word in words:  # keep those that two tokens of lower rank make when merging by rank, as training would
        parts = tiktoken_encode(word.encode(), ranks)
        if len(parts) == 2:
            ranks[word.encode()] = len(ranks)
    backend = byte_level_from_ranks(ranks, ("<|endoftext|>",))
    assert backend.encode(text).ids == [ranks[part] for part in tiktoken_encode(text.encode(), ranks)]


def tiktoken_encode(text: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """tiktoken's own loop: of all neighbours, join the pair of the lowest rank, the leftmost first."""
    parts = [bytes([byte]) for byte in text]
    while True:
        joined = [(ranks[left + right], place) for place, (left, right) in enumerate(pairwise(parts)) if left + right in ranks]
        if not joined:
            return parts
        _, place = min(joined)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def test_a_rank_that_no_two_others_make_is_refused() -> None:
    with pytest.raises(TokenizerError, match="no two others make"):
        byte_level_from_ranks({**{bytes([byte]): byte for byte in range(256)}, b"abc": 256}, ("<|endoftext|>",))


@needs_real_qwen
def test_the_published_ranks_give_the_published_tokenizer() -> None:
    published, built = load_tokenizer(folder_of("qwen2_real")), load_tokenizer(folder_of("qwen_v1_real"))
    assert len(real_qwen_ranks()) == 151_643
    texts = [*HARD, *corpus()]
    assert published.encode(texts) == built.encode(texts)
    assert (built.special_ids["<|im_start|>"], built.special_ids["<ref>"], built.special_ids["<imgpad>"]) == (151644, 151851, 151859)


# ---- pieces


class Counting(TextTokenizer):
    """Remembers what it was asked to encode."""

    asked: list[str]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        self.asked += texts
        return super().encode(texts)


def counting_table() -> tuple[PieceTable, list[str]]:
    loaded = load_tokenizer(folder_of("qwen2"))
    tokenizer = Counting(loaded.backend, loaded.special_ids, loaded.special_pattern, loaded.fingerprint)
    object.__setattr__(tokenizer, "asked", [])
    table = PieceTable(tokenizer)
    tokenizer.asked.clear()
    return table, tokenizer.asked


def test_no_piece_is_encoded_twice() -> None:
    table, asked = counting_table()
    for _ in range(3):
        codes = [table.intern_gap("dog"), table.intern_gap("dog", after_number=True), table.intern_gap("cat"), table.intern_gap("dog")]
        table.intern_numbers(np.array([[1, 2, 2, 1]]), "%d")
        table.intern_separators([", ", "),(", ", "])
        table.encode_pending()
    assert len(asked) == len(set(asked)) == 7
    assert codes == [0, 1, 2, 0]


def test_pieces_keep_their_codes_when_more_come() -> None:
    table, _ = counting_table()
    gap = table.intern_gap("a dog at [", before_number=True)
    table.encode_pending()
    before = table.ids.row(gap).tolist()
    for number in range(300):
        table.intern_gap(f"gap number {number}")
        table.encode_pending() if number % 100 == 0 else None
    table.encode_pending()
    assert table.ids.row(gap).tolist() == before
    assert bytes(table.texts.row(gap)).decode() == "a dog at ["
    assert len(table.ids) == len(table.texts) == 301


def test_a_table_that_grew_too_large_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MAX_CACHED_PIECES", 3)
    table, asked = counting_table()
    for text in "abc":
        table.intern_gap(text)
    assert table.forget_if_large() is False
    table.intern_gap("d")
    table.encode_pending()
    assert table.forget_if_large() is True
    assert len(table.ids) == 0
    asked.clear()
    assert table.intern_gap("d") == 0
    table.encode_pending()
    assert asked == ["d"]
    assert table.ids.row(0).tolist() == table.tokenizer.encode(["d"])[0]


@pytest.mark.parametrize("name", ["qwen2", "vicuna", "llama3"])
@given(st.text(max_size=12))
def test_pieces_are_cut_from_their_surroundings(name: str, text: str) -> None:
    table = PieceTable(load_tokenizer(folder_of(name)))
    gap = "]" + text + "["  # between numbers a gap begins and ends with the family's own brackets
    between = table.intern_gap(gap, after_number=True, before_number=True)
    start, end = table.intern_gap(gap, before_number=True), table.intern_gap(gap, after_number=True)
    [[number]] = table.intern_numbers(np.array([[7]]), "%d").tolist()
    table.encode_pending()
    pieces = [table.ids.row(code).tolist() for code in (start, number, between, number, end)]
    assert [token for piece in pieces for token in piece] == table.tokenizer.encode([f"{gap}7{gap}7{gap}"])[0]
