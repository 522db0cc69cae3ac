"""Tokenizers with the structure of the families' real ones, small enough to train in memory, and the real one where it lies beside
the checkout.

What makes composing ids hard is structure, not size: which characters a pre-tokeniser holds together, whether a blank is put before a
text, how digits are grouped, what a normaliser joins. All of that is here as it is published; the vocabularies are trained on strings
that are full of borders (`"]`, `]], `, `": "`, `}, {`), so that a careless border costs a merged token and a test sees it.

    name           pre-tokeniser                  digits        normaliser                specials
    qwen2          Qwen's regex, byte level       one by one    NFC                       <|im_start|>, <|vision_start|>, ...
    qwen_v1        the same                       one by one    NFC                       <|im_start|>, <ref>, <box>, <img>, <imgpad>, ...
    vicuna         none (sentencepiece BPE)       one by one    "▁" first, "▁" for blank  <unk> 0, <s> 1, </s> 2, bytes from 3
    llama3         Llama 3's regex, byte level    up to three   none                      <|begin_of_text|>, ...
    qwen2_real     Qwen2.5-VL's published tokenizer; `shared/tokenizers` beside the checkout
    qwen_v1_real   its ranks as qwen.tiktoken, with Qwen-VL's specials
"""

import atexit
import base64
import json
import string
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from boxcar.pipelines.families.catalog import FAMILIES
from boxcar.pipelines.families.chatml import QWEN2_SPECIAL_IDS
from boxcar.pipelines.tokens.tokenizer import QWEN_SPLIT
from tests.places import SHARED

REAL_QWEN = SHARED / "tokenizers/qwen2_5_vl"
needs_real_qwen = pytest.mark.skipif(
    not (REAL_QWEN / "tokenizer.json").is_file(), reason="Qwen2.5-VL's published tokenizer is not beside this checkout"
)

TOKENIZER_OF_FAMILY = {
    "qwen2_vl": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen3_vl": "qwen2",
    "qwen_vl": "qwen_v1",
    "cogvlm": "vicuna",
    "cogvlm_chat": "vicuna",
    "cogvlm_224": "vicuna",
    "cogvlm2": "llama3",
}

QWEN_V1_SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{index}|>" for index in range(205))),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"),
)
"""tokenization_qwen.py: in this order behind the 151,643 ranks."""

LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Llama 3's tokenizer.json."""
LLAMA3_SPECIALS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>", *(f"<|reserved_special_token_{index}|>" for index in range(3, 248))),
)
"""From 128000 on in the published vocabulary."""

VOCABULARY_SIZE = 1200


def corpus() -> Iterator[str]:
    """Strings that tempt a BPE into tokens across the borders that composition relies on."""
    borders = [
        '"]',
        "]], ",
        '": "',
        "}, {",
        "[[",
        "]]",
        "),(",
        '},\n\t{"',
        ", ",
        ": ",
        "\n]\n```",
        "</",
        "|>",
        " [[",
        '\\"',
        '": ["',
        "```json\n[\n\t",
    ]
    words = ["dog", "Dog", "cat", "the dog", "红色的车", "狗", "naïve", "🙂", "left of", "'s", "bbox_2d", "Find", string.printable]
    for repeat, (border, word) in enumerate(product(borders, words)):
        yield f"{word}{border}{word}{border} {repeat}"
        yield f"{border}{repeat % 1000:03d}{border}{border}{word} {border}"
    for value in range(0, 1000, 7):
        yield f"[[{value:03d},{999 - value:03d};{value:03d}]] ({value},{value + 1}),({value}) [{value}, {value}, {value}]"
    for family in FAMILIES.values():
        for by_language in family.prompts.values():
            yield from (prompt for prompts in by_language.values() for prompt in prompts)
        yield from family.not_found.values()
    for index in range(30):
        yield f"system\nYou are a helpful assistant.\nuser\nassistant\nPicture {index}: Question: Where is it? Answer: It is here.\n"
        yield f"  two blanks{' ' * (index % 6)}\t\ttabs\n\n\nlines \r\n {'-' * index}{'.' * index}{'!' * (index % 4)}?"


def _byte_level(split: str, specials: tuple[str, ...], normalizer: normalizers.Normalizer | None, *, ignore_merges: bool) -> Tokenizer:
    """A byte-level BPE behind a regex, its specials behind its vocabulary, as Qwen and Llama 3 publish theirs."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[]
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    if ignore_merges:
        learned = json.loads(tokenizer.to_str())["model"]
        merges = [tuple(merge) for merge in learned["merges"]]
        tokenizer.model = models.BPE(vocab=learned["vocab"], merges=merges, ignore_merges=True)
    tokenizer.add_special_tokens([AddedToken(special, special=True, normalized=False) for special in specials])
    return tokenizer


def qwen2() -> Tokenizer:
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL."""
    return _byte_level(QWEN_SPLIT, tuple(QWEN2_SPECIAL_IDS), normalizers.NFC(), ignore_merges=False)


def qwen_v1() -> Tokenizer:
    """Qwen-VL and Qwen-VL-Chat."""
    return _byte_level(QWEN_SPLIT, QWEN_V1_SPECIALS, normalizers.NFC(), ignore_merges=False)


def llama3() -> Tokenizer:
    """CogVLM2. A <|begin_of_text|> is put before every text that is encoded with specials, as published."""
    tokenizer = _byte_level(LLAMA3_SPLIT, LLAMA3_SPECIALS, None, ignore_merges=True)
    first = "<|begin_of_text|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", pair=f"{first} $A {first} $B", special_tokens=[(first, tokenizer.token_to_id(first))]
    )
    return tokenizer


def vicuna() -> Tokenizer:
    """CogVLM v1: Llama 2's sentencepiece BPE as transformers converts it. A blank before every text; no pre-tokeniser at all."""
    scratch = Tokenizer(models.BPE())
    scratch.normalizer = _sentencepiece_blanks()
    # sentencepiece learns no token across a digit or across the beginning of a word; in use nothing is split beforehand.
    words = pre_tokenizers.Split(Regex("▁+[^▁]*|[^▁]+"), "isolated")
    scratch.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY_SIZE, show_progress=False, special_tokens=[])
    scratch.train_from_iterator(corpus(), trainer)
    learned = json.loads(scratch.to_str())["model"]

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(learned["vocab"], key=learned["vocab"].get)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = _sentencepiece_blanks()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(special, special=True, normalized=False) for special in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return tokenizer


def _sentencepiece_blanks() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


_TRAINED: dict[str, Callable[[], Tokenizer]] = {"qwen2": qwen2, "qwen_v1": qwen_v1, "vicuna": vicuna, "llama3": llama3}


@cache
def trained(name: str) -> Tokenizer:
    """One of the four small tokenizers; the same object every time, so do not change it."""
    return _TRAINED[name]()


@cache
def _scratch() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="boxcar-tokenizers-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@cache
def folder_of(name: str) -> str:
    """A folder that `pipelines.tokens.tokenizer.load_tokenizer` takes, for any name in this module's table."""
    if name == "qwen2_real":
        return str(REAL_QWEN)
    folder = _scratch() / name
    folder.mkdir()
    if name == "qwen_v1_real":
        (folder / "qwen.tiktoken").write_bytes(tiktoken_lines(real_qwen_ranks()))
    else:
        trained(name).save(str(folder / "tokenizer.json"))
    return str(folder)


@cache
def real_qwen_ranks() -> dict[bytes, int]:
    """The 151,643 ranks that Qwen v1 and Qwen2 share, as tiktoken has them."""
    vocabulary = json.loads((REAL_QWEN / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    return ranks_of(vocabulary)


def ranks_of(vocabulary: dict[str, int]) -> dict[bytes, int]:
    """A byte-level vocabulary's printable tokens as the bytes that they stand for."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(256 + place): byte for place, byte in enumerate(byte for byte in range(256) if byte not in printable)}
    return {bytes(byte_of[letter] for letter in token): rank for token, rank in vocabulary.items()}


def tiktoken_lines(ranks: dict[bytes, int]) -> bytes:
    """The content of a qwen.tiktoken file."""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
