"""The central property: the ids that are composed from cached pieces are the ids of the whole text.

    Qwen families      header_ids + prompt_ids + answer_open + answer_ids + turn_close + turn_open + ...  ==  encode(the whole conversation)
    CogVLM families    header_ids + prompt_ids + answer_ids + turn_close  ==  <s> image + encode(question) + encode(answer) </s>

The conversation is rendered here from the texts of the row and the templates of the model cards, and encoded by the `tokenizers` library
itself: nothing of the frame contract and nothing of `pipelines.tokens.tokenizer` helps.
"""

import json
import math
import random
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from boxcar.pipelines.families.catalog import FAMILIES
from boxcar.pipelines.images.lookup import ImageLookup
from boxcar.pipelines.readers.coco import CocoReader
from boxcar.pipelines.readers.reader import Reader
from boxcar.pipelines.readers.voc import VocReader
from boxcar.pipelines.rows.unit import UnitConverter, UnitResult
from boxcar.pipelines.tokens.compose import compose
from boxcar.pipelines.tokens.frame import Frame
from boxcar.pipelines.tokens.tokenizer import PieceTable
from boxcar.pipelines.turns.texts import Scribe
from boxcar.schemas.record import Box, BoxMark, DialogueTurn, ImageMark, ImageRef, Record, Region, Rejected, TextPart
from boxcar.schemas.workflow import ConvertConfig, SourceConfig, TaskConfig
from tests.places import GOLDEN, SHARED
from tests.small_tokenizers import TOKENIZER_OF_FAMILY, folder_of, needs_real_qwen
from tests.small_units import EVERY_TASK, frame_of, only, record, region, rows_of, settings

CHATML_SYSTEM = {
    "qwen_vl": "You are a helpful assistant.",
    "qwen2_vl": "You are a helpful assistant.",
    "qwen2_5_vl": "You are a helpful assistant.",
    "qwen3_vl": None,
}
"""The families of ChatML, and the system prompt that each inserts where none is given."""
IMAGE_TEXT = {
    "qwen_vl": "Picture {number}: <img><imgpad></img>\n",
    "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
}
IMAGE_TOKEN = {"qwen_vl": "<imgpad>", "qwen2_vl": "<|image_pad|>", "qwen2_5_vl": "<|image_pad|>", "qwen3_vl": "<|image_pad|>"}
COGVLM_CONTROL = {
    "cogvlm": ("<s>", "<unk>", "</s>"),
    "cogvlm_chat": ("<s>", "<unk>", "</s>"),
    "cogvlm_224": ("<s>", "<unk>", "</s>"),
    "cogvlm2": ("<|begin_of_text|>", "<|reserved_special_token_0|>", "<|end_of_text|>"),
}
"""Beginning, placeholder of the image, end."""
QUESTION_AND_ANSWER = ("cogvlm_chat", "cogvlm2")
"""The families whose template is "Question: {q} Answer:"."""

DECLARED_SIZES = ImageLookup("", trust_sizes=True)
EVERY_FAMILY = sorted(FAMILIES)
SMALL = [pytest.param(family, TOKENIZER_OF_FAMILY[family], id=family) for family in EVERY_FAMILY]
REAL = [
    pytest.param("qwen2_vl", "qwen2_real", id="qwen2_vl with its published tokenizer", marks=needs_real_qwen),
    pytest.param("qwen2_5_vl", "qwen2_real", id="qwen2_5_vl with its published tokenizer", marks=needs_real_qwen),
    pytest.param("qwen_vl", "qwen_v1_real", id="qwen_vl with its published ranks", marks=needs_real_qwen),
]


# ---- what a row must be, told from the outside


@cache
def library_tokenizer(name: str) -> Tokenizer:
    """The tokenizer as the library reads it from its folder."""
    file = Path(folder_of(name)) / "tokenizer.json"
    # qwen.tiktoken is no file of the library's: that backend is built by `tokenizer`, and proved against the golden ids below.
    return Tokenizer.from_file(str(file)) if file.exists() else frame_of(config_of("qwen_vl", name)).tokenizer.backend


def encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def token_text(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.id_to_token(token) or ""


def chatml(row: dict[str, Any], family: str, system: str | None) -> str:
    """The whole conversation, one placeholder for each image."""
    text = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    images = "" if row["ordered"] else "".join(IMAGE_TEXT[family].format(number=number + 1) for number in range(len(row["images"])))
    for turn in row["turns"]:
        text += f"<|im_start|>user\n{images}{turn['question']}<|im_end|>\n<|im_start|>assistant\n{turn['answer']}<|im_end|>\n"
        images = ""
    return text


def check_chatml(row: dict[str, Any], family: str, tokenizer: Tokenizer, frame: Frame, system: str | None) -> None:
    text = chatml(row, family, system)
    ids = list(row["header_ids"])
    for number, turn in enumerate(row["turns"]):
        ids += [] if number == 0 else frame.turn_open_ids
        ids += turn["prompt_ids"] + frame.answer_open_ids + turn["answer_ids"] + frame.turn_close_ids
    assert ids == encoded(tokenizer, text), text

    placeholder = tokenizer.token_to_id(IMAGE_TOKEN[family])
    assert ids.count(placeholder) == len(row["images"]) == text.count(IMAGE_TOKEN[family])
    if family == "qwen_vl":
        pictures = [IMAGE_TEXT[family].format(number=number + 1) for number in range(len(row["images"]))]
        assert [text.count(picture) for picture in pictures] == [1] * len(pictures)
    visual = sum(one["visual_tokens"] for one in row["images"])
    header = [token for token in row["header_ids"] if token != placeholder]
    assert row["header_tokens"] == len(header)
    assert row["visual_tokens"] == visual
    assert row["total_tokens"] == len(ids) - len(row["images"]) + visual
    assert row["text_tokens"] == row["total_tokens"] - visual
    around = len(frame.answer_open_ids) + len(frame.turn_close_ids)
    alone = [len([token for token in turn["prompt_ids"] if token != placeholder]) + len(turn["answer_ids"]) for turn in row["turns"]]
    longest = len(header) + visual + max(alone) + around
    assert row["max_turn_tokens"] == (row["total_tokens"] if row["ordered"] else longest)


def check_cogvlm(row: dict[str, Any], family: str, tokenizer: Tokenizer) -> None:
    begin, placeholder, end = (tokenizer.token_to_id(token) for token in COGVLM_CONTROL[family])
    assert not row["ordered"]
    lengths = []
    for turn in row["turns"]:
        found = row["header_ids"] + turn["prompt_ids"] + turn["answer_ids"] + [end]
        asked, answered = encoded(tokenizer, turn["question"]), encoded(tokenizer, turn["answer"])
        assert found == [begin, *[placeholder] * len(row["images"]), *asked, *answered, end], turn
        assert placeholder not in asked + answered
        if family in QUESTION_AND_ANSWER:
            assert turn["question"].startswith("Question: ")
            assert turn["question"].endswith(" Answer:")
        # boi and eoi are features that stand in the sequence beside the patches.
        lengths.append(len(found) - len(row["images"]) + sum(one["visual_tokens"] + 2 for one in row["images"]))
    assert row["header_tokens"] == 1
    assert row["visual_tokens"] == sum(one["visual_tokens"] + 2 for one in row["images"])
    assert row["total_tokens"] == sum(lengths)
    assert row["text_tokens"] == sum(lengths) - row["visual_tokens"] * len(row["turns"])
    assert row["max_turn_tokens"] == max(lengths)


def numbers_of(family: str, box: Sequence[float], resized: dict[str, Any]) -> list[str]:
    """A box as the family's model card writes its numbers."""
    numbers = []
    for value, side in zip(box, ("width", "height") * 2, strict=True):
        size, seen = resized[side], resized[f"resized_{side}"]
        if family == "qwen2_5_vl":
            numbers.append(min(max(round(value * (seen / size)), 0), seen - 1))
        elif family in ("qwen2_vl", "qwen3_vl"):
            numbers.append(min(max(round(value / size * 1000), 0), 1000))
        else:
            numbers.append(min(max(math.floor(value / size * 1000), 0), 999))
    return [("%d" if family.startswith("qwen") else "%03d") % number for number in numbers]


def check_coordinates(row: dict[str, Any], family: str, tokenizer: Tokenizer) -> None:
    """`answer_is_coordinate` marks the digits of the answer's boxes and nothing else."""
    for turn in row["turns"]:
        marked = zip(turn["answer_ids"], turn["answer_is_coordinate"], strict=True)
        runs = [[token_text(tokenizer, token) for token, _ in run] for flag, run in groupby(marked, key=lambda pair: pair[1]) if flag]
        found = ["".join(run) for run in runs]
        assert all(number.isascii() and number.isdigit() for number in found), found
        num_boxes = len(found) // 4
        if turn["task"] in ("detect", "detect_joint", "refer"):
            assert num_boxes == len(turn["boxes"])
        elif turn["task"] != "dialogue":
            assert num_boxes == 0
        if num_boxes and turn["image_index"] >= 0:
            resized = row["images"][turn["image_index"]]
            answered = turn["boxes"][len(turn["boxes"]) - num_boxes :]
            assert found == [number for box in answered for number in numbers_of(family, box, resized)]


def check(result: UnitResult, unit: UnitConverter, tokenizer_name: str, records: Sequence[Record]) -> None:
    """Every row of a unit."""
    tokenizer, family = library_tokenizer(tokenizer_name), unit.frame.family.name
    systems = {f"source/{one.record_id}": one.system for one in records}
    for row in rows_of(result):
        if family in CHATML_SYSTEM:
            own = systems[row["sample_id"].partition("#")[0]]
            check_chatml(row, family, tokenizer, unit.frame, CHATML_SYSTEM[family] if own is None else own)
        else:
            check_cogvlm(row, family, tokenizer)
        check_coordinates(row, family, tokenizer)
    assert result.counts.records_read == len(records) == result.counts.records_written + result.counts.num_rejected


def config_of(family: str, tokenizer: str, **changes: Any) -> ConvertConfig:
    """Every task, both languages."""
    defaults: dict[str, Any] = {"tasks": EVERY_TASK, "languages": {"en": 0.5, "zh": 0.5}, "tokenizer": folder_of(tokenizer)}
    return settings(family, **{**defaults, **changes})


@cache
def _frame(family: str, tokenizer: str) -> Frame:
    return frame_of(config_of(family, tokenizer))


def new_unit(family: str, tokenizer: str, **changes: Any) -> UnitConverter:
    """A converter without a budget: what is tested here are ids, and no text is too long, not even for a family that takes 2048 tokens."""
    config = config_of(family, tokenizer, **changes).model_copy(update={"cutoff_len": 10**6})
    return UnitConverter(config, _frame(family, tokenizer), "source")


@cache
def old_unit(family: str, tokenizer: str) -> UnitConverter:
    """One for all examples of a family, as a worker has one: caches that outlive a unit must not change its ids."""
    return new_unit(family, tokenizer)


# ---- conversations written out by hand

ONE_DOG = record(images=(ImageRef("a.jpg", 1000, 1000),), regions=(region("dog", (100, 250, 500, 750)),))
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
ASKED = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Find dog.<|im_end|>\n<|im_start|>assistant\n"
WRITTEN_OUT = {
    "qwen_vl": f"{SYSTEM}<|im_start|>user\nPicture 1: <img><imgpad></img>\nFind dog.<|im_end|>\n<|im_start|>assistant\n"
    "<ref>dog</ref><box>(100,250),(500,750)</box><|im_end|>\n",
    "qwen2_vl": f"{SYSTEM}{ASKED}<|object_ref_start|>dog<|object_ref_end|><|box_start|>(100,250),(500,750)<|box_end|><|im_end|>\n",
    # 1000 px are 1008 after the resize: 100 -> 100.8, 250 -> 252, 500 -> 504, 750 -> 756.
    "qwen2_5_vl": SYSTEM + ASKED + '```json\n[\n\t{"bbox_2d": [101, 252, 504, 756], "label": "dog"}\n]\n```<|im_end|>\n',
    "qwen3_vl": ASKED + '```json\n[\n\t{"bbox_2d": [100, 250, 500, 750], "label": "dog"}\n]\n```<|im_end|>\n',
    "cogvlm": "<s><unk> Find dog. [[100,250,500,750]]</s>",
    "cogvlm_224": "<s><unk> Find dog. [[100,250,500,750]]</s>",
    "cogvlm_chat": "<s><unk> Question: Find dog. Answer: [[100,250,500,750]]</s>",
    "cogvlm2": "<|begin_of_text|><|reserved_special_token_0|>Question: Find dog. Answer:[[100,250,500,750]]<|end_of_text|>",
}


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_row_decodes_to_the_conversation_of_the_model_card(family: str) -> None:
    name = TOKENIZER_OF_FAMILY[family]
    unit = new_unit(family, name, tasks=only(detect=TaskConfig(share=1, prompts={"en": ("Find {label}.",), "zh": ("Find {label}.",)})))
    frame = frame_of(unit.config.model_copy(update={"cutoff_len": 2048}))
    unit = UnitConverter(unit.config, frame, "source")
    [row] = rows_of(unit.convert([ONE_DOG], DECLARED_SIZES))
    [turn] = row["turns"]
    ids = row["header_ids"] + turn["prompt_ids"] + frame.answer_open_ids + turn["answer_ids"] + frame.turn_close_ids
    tokenizer = library_tokenizer(name)
    if name == "vicuna":  # whose decoder takes the first blank away
        assert "".join(token_text(tokenizer, token) for token in ids).replace("▁", " ") == WRITTEN_OUT[family]
    else:
        assert tokenizer.decode(ids, skip_special_tokens=False) == WRITTEN_OUT[family]


# ---- records of every kind, with texts that are hard to cut

FRAGMENTS = [
    *"\"'\\][)(<>`.,:;-_/#!?%",
    *('\\"', "\\n", "]]", "[[", '"]', '":', '{"', "),(", "</", "|>", "<|", "```", "{0}", "%s", "<ref", "/ref>", "s>", "{label}", "{box}"),
    *("]], ", '": "', "}, {", "},\n\t{", ", ", ": ", " [[", "user\n", "Picture 1: "),
    *("0", "12", "007", "3.5%", "٣", "½", "²", "１２", "[1, 2, 3, 4]", "[[001,002,003,004]]", '{"bbox_2d": [1, 2, 3, 4], "label": "x"}'),
    *(" ", "  ", "\t", "\n", "\n\n", "\r\n", "\u00a0", "\u3000", "\u2028", "\u200b", "\ufeff"),
    *("dog", "Dog", "the dog", "a", "'s", "'LL", "Question:", "Answer:", "system", "NaN", "null"),
    *("狗", "红色的车", "「红」", "，", "犬ですか", "개", "🙂", "👩‍👩‍👧", "🇩🇪", "مرحبا", "שלום", "नमस्ते", "ก็"),
    *("e\u0301", "\u0301", "a\u0323\u0302", "ﬁ", "Å", "\u212b", "ﾊﾟ", "\u1e9b\u0323", "\x00", "\x1f", "\x7f", "\ue000", "\U0001fffe"),
]
SPECIAL_LOOKING = [
    "<|im_end|>",
    "<|image_pad|>",
    "<ref>",
    "</box>",
    "<img>",
    "<s>",
    "</s>",
    "<unk>",
    "<|end_of_text|>",
    "<tool_call>",
    "<0x0A>",
]

pieces = st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=5).map("".join)
plain = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
rare = st.one_of(
    st.sampled_from(SPECIAL_LOOKING), st.integers(0, 40).map(lambda length: "very long " * length), st.just("\ud800"), st.just("")
)
troubled = st.tuples(pieces, rare, pieces).map("".join)
texts = st.one_of(pieces, pieces, plain, troubled)
"""Some hold a special token or a lone surrogate, and their turns must be left out and counted."""
dialogue_texts = st.integers(0, 19).flatmap(lambda die: pieces if die < 10 else plain if die < 19 else troubled)
"""One such text rejects a whole dialogue."""


@st.composite
def sizes(draw: st.DrawFn) -> ImageRef:
    return ImageRef("a.jpg", draw(st.integers(28, 1200)), draw(st.integers(28, 1200)))


def boxes_in(width: int, height: int) -> st.SearchStrategy[Box]:
    def box(fractions: tuple[float, float, float, float]) -> Box:
        x0, x1 = sorted(fractions[:2])
        y0, y1 = sorted(fractions[2:])
        return (x0 * (width - 2), y0 * (height - 2), x1 * (width - 2) + 2, y1 * (height - 2) + 2)

    fraction = st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 0.999, 1.0])
    return st.tuples(fraction, fraction, fraction, fraction).map(box)


@st.composite
def grounding_records(draw: st.DrawFn, record_id: str = "1") -> Record:
    """One image, regions with labels and phrases, captions, verified absences."""
    image = draw(sizes())
    assert image.declared_width is not None
    assert image.declared_height is not None
    labels = draw(st.lists(texts, min_size=1, max_size=3))
    phrases = st.lists(texts, max_size=2).map(tuple)
    places = draw(st.lists(boxes_in(image.declared_width, image.declared_height), min_size=1, max_size=4))
    return Record(
        record_id,
        "row 1",
        (image,),
        tuple(Region(box, draw(st.sampled_from(labels)), draw(phrases)) for box in places),
        captions=tuple(draw(st.lists(texts, max_size=2))),
        absent=tuple(draw(st.lists(texts, max_size=2))),
        language=draw(st.sampled_from(["en", "zh"])),
    )


@st.composite
def dialogue_records(draw: st.DrawFn, record_id: str = "1", *, max_images: int, max_turns: int) -> Record:
    """Images and boxes anywhere in running text; a system prompt of its own."""
    images = tuple(draw(st.lists(sizes(), min_size=1, max_size=max_images)))
    image_index = draw(st.integers(0, len(images) - 1))
    width, height = images[image_index].declared_width, images[image_index].declared_height
    assert width is not None
    assert height is not None
    marks = st.builds(
        BoxMark,
        st.lists(boxes_in(width, height), min_size=1, max_size=3).map(tuple),
        st.one_of(st.just(""), dialogue_texts),
        st.just(image_index),
    )
    num_turns = draw(st.integers(1, max_turns))
    # Images come in their order, in any of the questions, at any place.
    turn_of_image = sorted(draw(st.lists(st.integers(0, num_turns - 1), min_size=len(images), max_size=len(images))))
    turns = []
    for number in range(num_turns):
        question: list[TextPart] = list(draw(st.lists(st.one_of(dialogue_texts, marks), min_size=1, max_size=4)))
        for index in [index for index, turn in enumerate(turn_of_image) if turn == number]:
            first = 1 + max((place for place, part in enumerate(question) if isinstance(part, ImageMark)), default=-1)
            question.insert(draw(st.integers(first, len(question))), ImageMark(index))
        turns.append(DialogueTurn(tuple(question), tuple(draw(st.lists(st.one_of(dialogue_texts, marks), min_size=1, max_size=4)))))
    system = draw(st.one_of(st.none(), st.just(""), dialogue_texts))
    return Record(record_id, "row 1", images, dialogue=tuple(turns), system=system)


MODERATE = hypothesis_settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@MODERATE
@pytest.mark.parametrize(("family", "tokenizer"), SMALL)
@given(data=st.data())
def test_composed_ids_are_those_of_the_whole_text(family: str, tokenizer: str, data: st.DataObject) -> None:
    unit = old_unit(family, tokenizer)
    records = [data.draw(grounding_records(str(number))) for number in range(2)]
    check(unit.convert(records, DECLARED_SIZES), unit, tokenizer, records)


@MODERATE
@pytest.mark.parametrize(("family", "tokenizer"), SMALL)
@given(data=st.data())
def test_composed_ids_of_dialogues_are_those_of_the_whole_text(family: str, tokenizer: str, data: st.DataObject) -> None:
    unit = old_unit(family, tokenizer)
    is_chatml = family in CHATML_SYSTEM
    limits = {"max_images": 3 if is_chatml else 1, "max_turns": 3 if is_chatml or family in QUESTION_AND_ANSWER else 1}
    records = [data.draw(dialogue_records(str(number), **limits)) for number in range(2)]
    check(unit.convert(records, DECLARED_SIZES), unit, tokenizer, records)


# ---- two thousand labels, the same in every run

NUM_LABELS = 2_000


def adversarial_labels() -> list[str]:
    """Different labels that are neither blank nor hold a special token of any family."""
    rng = random.Random(20_240_601)
    labels: dict[str, None] = dict.fromkeys(
        ["0", "12", " leading", "trailing ", "  both  ", "\nnew\nline\n", "\ttab\t", "x" * 2_000, "长" * 500, '"', "\\"]
    )
    while len(labels) < NUM_LABELS:
        label = "".join(rng.choice(FRAGMENTS) for _ in range(rng.randint(1, 6)))
        if label.strip() and "<ref>" not in label and "</ref>" not in label and "<s>" not in label and "</s>" not in label:
            labels[label] = None
    return list(labels)


def labelled_records() -> Iterator[Record]:
    """Four labels to a record, one of them with two boxes; the same texts as phrases, captions and absent objects."""
    labels = adversarial_labels()
    for number in range(0, NUM_LABELS, 4):
        four = labels[number : number + 4]
        other = labels[(number + 17) % NUM_LABELS]
        places = [(10.5 * step, 7.25 * step + number % 60, 300.0 + 11 * step, 200.5 + 13 * step) for step in range(5)]
        regions = [region(label, place, f"{label} {other}") for label, place in zip([*four, four[0]], places, strict=True)]
        yield record(str(number), regions=tuple(regions), captions=(other,), absent=(f"no {other}",), language="en" if number % 8 else "zh")


@pytest.mark.parametrize(("family", "tokenizer"), [*SMALL, *REAL[1:]])
def test_two_thousand_hard_labels_compose_exactly(family: str, tokenizer: str) -> None:
    fewer = {"describe": TaskConfig(share=0.2), "refer": TaskConfig(share=0.4)}
    unit = new_unit(family, tokenizer, tasks=EVERY_TASK.model_copy(update=fewer), rules={"control_characters": "keep"})
    records = list(labelled_records())
    result = unit.convert(records, DECLARED_SIZES)
    assert not result.counts.turns_rejected
    assert not result.counts.records_rejected
    assert result.counts.turns["detect"] == NUM_LABELS
    assert set(result.counts.turns) == {"detect", "detect_joint", "refer", "describe", "absent", "caption"}
    check(result, unit, tokenizer, records)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_question_that_is_nothing_but_a_label_composes_exactly(family: str) -> None:
    """White space at its beginning would join the line break of the template."""
    bare = TaskConfig(share=1.0, prompts={"en": ("{label}",), "zh": ("{label}",)})
    unit = new_unit(family, TOKENIZER_OF_FAMILY[family], tasks=only(detect=bare))
    records = [record(str(number), regions=(region(label),)) for number, label in enumerate(adversarial_labels()[:300])]
    result = unit.convert(records, DECLARED_SIZES)
    assert result.counts.turns == {"detect": 300}
    assert all(turn["question"] == turn["question"].strip() for row in rows_of(result) for turn in row["turns"])
    check(result, unit, TOKENIZER_OF_FAMILY[family], records)


def test_no_answer_of_cogvlm_begins_with_a_blank() -> None:
    """Its tokenizer puts one first by itself; another would be a token that the model never saw there."""
    regions = tuple(region(label, (10.0 + number, 10, 90, 90)) for number, label in enumerate(("  both  ", " leading", "\tdog")))
    for row in rows_of(new_unit("cogvlm", "vicuna").convert([record(regions=regions)], DECLARED_SIZES)):
        assert all(turn["answer"] == turn["answer"].strip() for turn in row["turns"])


# ---- whole documents of real life

needs_data = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the real data sets are not beside this checkout")


@pytest.fixture(scope="module")
def real_records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, list[Record]]]:
    """Images' root and readable records of coco_mini and bccd."""
    coco, bccd = SHARED / "data/coco_mini", SHARED / "data/bccd"
    sources: dict[str, tuple[Reader, str, dict[str, str]]] = {
        "coco": (CocoReader(), "coco_mini/images", {"annotations": f"{coco}/instances.json", "captions": f"{coco}/captions.json"}),
        "voc": (VocReader(), "bccd/JPEGImages", {"annotations": str(bccd)}),
    }
    found = {}
    for name, (reader, images, places) in sources.items():
        root = str(SHARED / "data" / images)
        config = SourceConfig.model_validate({"reader": name, "images": root, **places})
        items = [item for one in reader.plan(config, tmp_path_factory.mktemp(name), 4096).units for item in reader.read(config, one)]
        found[name] = (root, [item for item in items if not isinstance(item, Rejected)])
    return found


@needs_data
@pytest.mark.parametrize(("family", "tokenizer"), [*SMALL, *REAL])
@pytest.mark.parametrize("source", ["coco", "voc"])
def test_real_data_composes_exactly(family: str, tokenizer: str, source: str, real_records: dict[str, tuple[str, list[Record]]]) -> None:
    root, records = real_records[source]
    records = records[::4] if source == "voc" else records  # microscope pictures are much alike
    unit = new_unit(family, tokenizer, trust_sizes=False)
    result = unit.convert(records, ImageLookup(root, trust_sizes=False))
    assert result.counts.rows_written > 0.9 * len(records)
    check(result, unit, tokenizer, records)


# ---- dialogues whose text is known to the letter

PICTURES = (ImageRef("a.jpg", 1000, 1000), ImageRef("b.jpg", 1000, 500))
BOX = (100.0, 200.0, 500.0, 900.0)


def talk(
    *turns: tuple[tuple[TextPart, ...], tuple[TextPart, ...]], images: tuple[ImageRef, ...] = PICTURES[:1], system: str | None = None
) -> Record:
    return record(images=images, dialogue=tuple(DialogueTurn(*turn) for turn in turns), system=system)


ASK = (ImageMark(0), "Where is it?")
DIALOGUES = [
    pytest.param(
        "qwen2_vl",
        talk((ASK, (BoxMark((BOX,), "dog"),))),
        ["<V>Where is it?", "<R>dog</R><B>(100,200),(500,900)</B>"],
        id="an answer of boxes alone is the family's answer",
    ),
    pytest.param(
        "qwen2_vl",
        talk((ASK, (BoxMark((BOX,)),))),
        ["<V>Where is it?", "<B>(100,200),(500,900)</B>"],
        id="boxes without a label",
    ),
    pytest.param(
        "qwen2_vl",
        talk((("Is", ImageMark(0), "like", ImageMark(1), "?"), ("No, ", BoxMark((BOX, BOX), "dogs", 0), ".")), images=PICTURES),
        ["Is<V>like<V>?", "No, <R>dogs</R><B>(100,200),(500,900)</B><B>(100,200),(500,900)</B>."],
        id="two images and two boxes in running text",
    ),
    pytest.param(
        "qwen_vl",
        talk((("Is ", ImageMark(0), "like ", ImageMark(1), "?"), ("No.",)), (("Sure?",), ("Yes.",)), images=PICTURES),
        ["Is Picture 1: <img><imgpad></img>\nlike Picture 2: <img><imgpad></img>\n?", "No.", "Sure?", "Yes."],
        id="pictures are numbered through the conversation",
    ),
    pytest.param(
        "qwen2_vl",
        talk(((" \n", "\n Hi. ", ImageMark(0), " \n"), ("\tYes.\n\n",))),
        ["Hi. <V>", "Yes."],
        id="white space at the ends goes, also over several parts",
    ),
    pytest.param(
        "qwen2_5_vl",
        talk((ASK, ("It is at ", BoxMark((BOX,), 'a "dog"'), "."))),
        ["<V>Where is it?", 'It is at {"bbox_2d": [101, 202, 504, 907], "label": "a \\"dog\\""}.'],
        id="JSON in running text",
    ),
    pytest.param(
        "cogvlm",
        talk(((ImageMark(0), "\nWhere is it?"), (BoxMark((BOX, BOX), "dog"),))),
        ["Where is it?", "[[100,200,500,900;100,200,500,900]]"],
        id="CogVLM's image leaves no line break behind",
    ),
    pytest.param(
        "cogvlm",
        talk((ASK, (BoxMark((BOX,), "dog"), " ", BoxMark((BOX,), "cat")))),
        ["Where is it?", "dog [[100,200,500,900]], cat [[100,200,500,900]]"],
        id="CogVLM names labels where there are several",
    ),
    pytest.param(
        "cogvlm",
        talk((ASK, (BoxMark((BOX,), "dog"), " ", BoxMark((BOX,))))),
        ["Where is it?", "dog [[100,200,500,900]] [[100,200,500,900]]"],
        id="a box with a label beside one without",
    ),
    pytest.param(
        "cogvlm_chat",
        talk((ASK, ("There.",)), ((" And now? ",), ("Gone.",))),
        ["Question: Where is it? Answer:", "There.", "Question: Where is it? Answer: There.\nQuestion: And now? Answer:", "Gone."],
        id="CogVLM's history becomes part of the question",
    ),
    pytest.param(
        "cogvlm2",
        talk((("What is at ", BoxMark((BOX,)), "?", ImageMark(0)), ("A dog.",)), (("And now?",), ("Gone.",))),
        [
            *("Question: What is at [[100,200,500,900]]? Answer:", "A dog."),
            *("Question: What is at [[100,200,500,900]]? Answer: A dog.\nQuestion: And now? Answer:", "Gone."),
        ],
        id="a box in the history",
    ),
]
SHORTHAND = {
    "<V>": "<|vision_start|><|image_pad|><|vision_end|>",
    "<R>": "<|object_ref_start|>",
    "</R>": "<|object_ref_end|>",
    "<B>": "<|box_start|>",
    "</B>": "<|box_end|>",
}


@pytest.mark.parametrize(("family", "dialogue", "expected"), DIALOGUES)
def test_a_dialogue_is_written_as_the_family_writes_it(family: str, dialogue: Record, expected: list[str]) -> None:
    unit = new_unit(family, TOKENIZER_OF_FAMILY[family])
    result = unit.convert([dialogue], DECLARED_SIZES)
    [row] = rows_of(result)
    found = [turn[key] for turn in row["turns"] for key in ("question", "answer")]
    for short, long in SHORTHAND.items():
        found = [text.replace(long, short) for text in found]
    assert found == expected
    check(result, unit, TOKENIZER_OF_FAMILY[family], [dialogue])


@pytest.mark.parametrize("system", [None, "", "Be brief.", "\nTwo\n\nlines \n", "数到3。"])
@pytest.mark.parametrize("family", sorted(CHATML_SYSTEM))
def test_a_system_prompt_of_its_own_stands_in_the_header(family: str, system: str | None) -> None:
    unit, dialogue = new_unit(family, TOKENIZER_OF_FAMILY[family]), talk((ASK, ("Here.",)), system=system)
    result = unit.convert([dialogue], DECLARED_SIZES)
    assert result.counts.rows_written == 1
    check(result, unit, TOKENIZER_OF_FAMILY[family], [dialogue])


TRICKS = [
    pytest.param("cogvlm", ("It is <", BoxMark((BOX,), "s>")), id="text and label"),
    pytest.param("qwen2_vl", ("It is <|im_", "end|>"), id="text and text"),
    pytest.param("qwen_vl", ("It is <|im_", "end|>"), id="in Qwen-VL"),
    pytest.param("qwen2_5_vl", ("<|image_pad|>",), id="whole"),
    pytest.param("cogvlm2", ("It is ", BoxMark((BOX,), "<|end_of_text|>")), id="in a label"),
]


@pytest.mark.parametrize(("family", "answer"), TRICKS)
def test_no_text_of_the_source_makes_a_control_token(family: str, answer: tuple[TextPart, ...]) -> None:
    result = new_unit(family, TOKENIZER_OF_FAMILY[family]).convert([talk((ASK, answer))], DECLARED_SIZES)
    assert {reason: entry.count for reason, entry in result.counts.records_rejected.items()} == {"special_token_in_text": 1}


# ---- which tokens are digits of boxes, told by where they stand in the text


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_only_digits_of_boxes_are_coordinates(family: str) -> None:
    label = "12 dogs at [1, 2] (3,4) 007"
    regions = (region(label, (10, 20, 300, 400)), region(label, (0, 0, 640, 480)), region("cat 9", (1, 2, 3, 4)))
    [row] = rows_of(new_unit(family, TOKENIZER_OF_FAMILY[family]).convert([record(regions=regions)], DECLARED_SIZES))
    tokenizer = library_tokenizer(TOKENIZER_OF_FAMILY[family])
    for turn in row["turns"]:
        encoding = tokenizer.encode(turn["answer"], add_special_tokens=False)
        assert encoding.ids == turn["answer_ids"]
        rest = turn["answer"]
        for digits_of_text in (label, "cat 9", "bbox_2d"):
            rest = rest.replace(digits_of_text, "x" * len(digits_of_text))
        # Offsets of a byte-level token count in letters of the text, whatever became of it.
        inside = [any(letter in "0123456789" for letter in rest[start:stop]) for start, stop in encoding.offsets]
        assert turn["answer_is_coordinate"] == inside, turn["answer"]
    assert sum(sum(turn["answer_is_coordinate"]) for turn in row["turns"]) > 20


# ---- the ids that the families' own code gave


def golden_cases(key: str) -> list[Any]:
    cases = json.loads((GOLDEN / "tokenization.json").read_text(encoding="utf-8"))[key]
    return [pytest.param(case["text"], case["ids"], id=case["text"][:40]) for case in cases]


GOLDEN_CASES = [
    *[
        pytest.param("qwen2_real", family, *case.values, id=case.id)
        for family in ("qwen2_vl", "qwen2_5_vl")
        for case in golden_cases("qwen2_vl")
    ],
    *[pytest.param("qwen_v1_real", "qwen_vl", *case.values, id=case.id) for case in golden_cases("qwen_vl_v1")],
]


@needs_real_qwen
@pytest.mark.parametrize(("tokenizer", "family", "text", "ids"), GOLDEN_CASES)
def test_golden_texts_have_their_golden_ids(tokenizer: str, family: str, text: str, ids: list[int]) -> None:
    loaded = _frame(family, tokenizer).tokenizer
    assert loaded.encode([text]) == [ids]
    assert loaded.control_ids(text) == ids
    box_text = FAMILIES[family].box_text
    if boxes := box_text.parse_answer(text):
        table = PieceTable(loaded)
        spec = Scribe(FAMILIES[family], table).boxes_answer([box.label or "" for box in boxes], list(range(len(boxes))))
        codes = table.intern_numbers(np.array([box.values for box in boxes]), box_text.number_format)
        separators = table.intern_separators(box_text.separators)
        table.encode_pending()
        composed = compose([spec], codes, separators, table)
        assert composed.ids(np.array([0])).values.tolist() == ids
        assert bytes(composed.utf8(np.array([0])).values).decode() == text
