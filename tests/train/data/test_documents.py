"""Documents of every family: their ids are the conversation's own encoding, their labels the family's published rule."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from boxcar.pipelines.boxes import difficulty
from boxcar.pipelines.families.catalog import FAMILIES, find_family
from boxcar.pipelines.tokens.frame import Frame
from boxcar.schemas.errors import ShardError
from boxcar.schemas.record import BoxMark, DialogueTurn, ImageMark, Record
from boxcar.schemas.task import TASK_NAMES
from boxcar.schemas.training import LossConfig
from boxcar.train.data.documents import GROUPS_PER_TASK, NO_LABEL, NUM_GROUPS, Document, compose, group_name, group_of, group_quartile
from tests.small_units import EVERY_TASK, convert, frame_of, image, record, region, rows_of, settings

EVERY_FAMILY = sorted(FAMILIES)
CHATML = ["qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen_vl"]
PLAIN = LossConfig()
QUANTILES = np.full((len(TASK_NAMES), difficulty.NUM_BINS), 40_000, np.uint16)
"""Every turn is in the third quartile."""
SYSTEM = "You are a helpful assistant."

_MADE: dict[str, tuple[Frame, list[dict[str, Any]]]] = {}


def made(family: str) -> tuple[Frame, list[dict[str, Any]]]:
    """A family's frame, and rows of every kind that it takes."""
    if family not in _MADE:
        config = settings(family, tasks=EVERY_TASK, cutoff_len=find_family(family).max_sequence)
        regions = (region("dog", (1, 2, 300, 200), "the big dog"), region("cat", (40, 50, 90, 100)), region("dog", (300, 300, 400, 410)))
        records = [record("regions", regions=regions, captions=("A dog, a cat and a dog.",), absent=("bus",))]
        if find_family(family).chat.max_images is None:
            two = (image(640, 480, "a.jpg"), image(100, 300, "b.jpg"))
            question = (ImageMark(0), "Here is one ", ImageMark(1), "and another.")
            dialogue = (
                DialogueTurn(question, ("Two pictures.",)),
                DialogueTurn(("Where is the dog?",), ("There: ", BoxMark(((10.0, 20.0, 60.0, 80.0),), "dog"), ".")),
            )
            records.append(Record("dialogue", "rows.jsonl, row 2", two, dialogue=dialogue))
        result = convert(config, records)
        assert not result.rejected
        _MADE[family] = frame_of(config), rows_of(result)
    return _MADE[family]


def documents(family: str, loss: LossConfig = PLAIN) -> Iterator[tuple[dict[str, Any], list[int], Document]]:
    """(row, turns, document) of all turns of every row; a document for each where the family knows one question an image."""
    frame, rows = made(family)
    contract = frame.contract()
    for row in rows:
        everything = list(range(len(row["turns"])))
        for turns in [[turn] for turn in everything] if contract.one_question_per_image else [everything]:
            yield row, turns, compose(row, turns, contract, frame.family.network, loss, QUANTILES)


def encode(frame: Frame, text: str) -> list[int]:
    """By the library: control text and specials as they are recognised in it."""
    ids: list[int] = frame.tokenizer.backend.encode(text, add_special_tokens=False).ids
    return ids


def collapsed(document: Document, frame: Frame, row: dict[str, Any]) -> list[int]:
    """The ids with one image token for each image again."""
    counts = [one["visual_tokens"] + frame.family.chat.extra_placeholders for one in row["images"]]
    ids, place = [], 0
    while place < len(document):
        ids.append(int(document.input_ids[place]))
        is_image = ids[-1] == frame.image_token_id and counts
        step = counts.pop(0) if is_image else 1
        assert set(document.input_ids[place : place + step].tolist()) == {ids[-1]}
        place += step
    assert not counts
    return ids


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_lengths_are_those_that_the_conversion_counted(family: str) -> None:
    totals: dict[str, int] = {}
    for row, _, document in documents(family):
        totals[row["sample_id"]] = totals.get(row["sample_id"], 0) + len(document)
        for array in (document.label_weights, document.label_groups, document.positions[0]):
            assert len(array) == len(document)
    assert totals == {row["sample_id"]: row["total_tokens"] for row in made(family)[1]}


@pytest.mark.parametrize("family", CHATML)
def test_ids_of_chatml_are_the_encoding_of_the_conversation(family: str) -> None:
    frame, _ = made(family)
    image_text = frame.family.chat.image_in_question
    for row, turns, document in documents(family):
        text = "" if family == "qwen3_vl" else f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
        images = "" if row["ordered"] else image_text(1)
        for turn in (row["turns"][number] for number in turns):
            text += f"<|im_start|>user\n{images}{turn['question']}<|im_end|>\n<|im_start|>assistant\n{turn['answer']}<|im_end|>\n"
            images = ""
        assert collapsed(document, frame, row) == encode(frame, text)


@pytest.mark.parametrize("family", [name for name in EVERY_FAMILY if name not in CHATML])
def test_ids_of_cogvlm_are_prompt_and_answer_encoded_apart(family: str) -> None:
    frame, _ = made(family)
    begin, end = ("<|begin_of_text|>", "<|end_of_text|>") if family == "cogvlm2" else ("<s>", "</s>")
    special = frame.tokenizer.special_ids
    for row, turns, document in documents(family):
        turn = row["turns"][turns[0]]
        expected = [special[begin], frame.image_token_id, *encode(frame, turn["question"]), *encode(frame, turn["answer"]), special[end]]
        assert collapsed(document, frame, row) == expected


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_labels_are_answers_and_what_closes_them(family: str) -> None:
    frame, _ = made(family)
    if frame.family.network.trains_frame:
        pytest.skip("its frame is trained as well: next test")
    for row, turns, document in documents(family):
        expected = [token for number in turns for token in (*row["turns"][number]["answer_ids"], *frame.turn_close_ids)]
        assert document.input_ids[document.label_weights > 0].tolist() == expected
        assert document.label_weights[0] == 0


def test_labels_of_qwen_vl_are_those_of_its_finetuning_script() -> None:
    """`preprocess` of QwenLM/Qwen-VL finetune.py, written down again from its description."""
    frame, _ = made("qwen_vl")
    special = frame.tokenizer.special_ids
    start, end, newline = special["<|im_start|>"], special["<|im_end|>"], encode(frame, "\n")
    assert len(newline) == 1
    for row, turns, document in documents("qwen_vl"):
        system = encode(frame, f"system\n{SYSTEM}")
        ids, labels = [start, *system, end, *newline], [start, *[None] * len(system), end, *newline]
        images = [] if row["ordered"] else encode(frame, "Picture 1: <img><imgpad></img>\n")
        for turn in (row["turns"][number] for number in turns):
            user = [*encode(frame, "user\n"), *images, *turn["prompt_ids"]]
            ids += [start, *user, end, *newline]
            labels += [start, *[None] * len(user), end, *newline]
            role = encode(frame, "assistant\n")
            ids += [start, *role, *turn["answer_ids"], end, *newline]
            labels += [start, *[None] * len(role), *turn["answer_ids"], end, *newline]
            images = []
        labels[0] = None  # nothing comes before it: shifted away
        assert collapsed(document, frame, row) == ids
        trained = [token for token in labels if token is not None]
        assert document.input_ids[document.label_weights > 0].tolist() == trained


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_weights_by_turn_task_and_token_class(family: str) -> None:
    loss = LossConfig(tasks={"detect": 2.0, "caption": 0.0}, coordinates=0.5, words=3.0)
    frame, _ = made(family)
    for row, turns, document in documents(family, loss):
        expected: list[float] = []
        for number in turns:
            turn = row["turns"][number]
            scale = turn["weight"] * loss.tasks.get(turn["task"], 1.0)
            expected += [scale * (0.5 if flag else 3.0) for flag in turn["answer_is_coordinate"]]
            expected += [scale * 3.0] * len(frame.turn_close_ids)
        if frame.family.network.trains_frame:
            assert set(document.label_weights.tolist()) == {0.0, *expected}
        else:
            found = document.label_weights[document.label_weights > 0]
            np.testing.assert_array_equal(found, np.array([weight for weight in expected if weight], np.float32))


def test_weights_of_turns_multiply() -> None:
    frame, rows = made("qwen2_5_vl")
    turn = {**rows[0]["turns"][0], "weight": 0.25}
    document = compose({**rows[0], "turns": [turn]}, [0], frame.contract(), frame.family.network, PLAIN, QUANTILES)
    assert set(document.label_weights.tolist()) == {0.0, 0.25}


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_groups_name_task_class_and_quartile(family: str) -> None:
    for row, turns, document in documents(family):
        labelled = document.label_weights > 0
        assert (document.label_groups[~labelled] == NO_LABEL).all()
        names = {group_name(group) for group in document.label_groups[labelled].tolist()}
        wanted = {f"{row['turns'][number]['task']}/words" for number in turns}
        wanted |= {f"{row['turns'][n]['task']}/coordinates" for n in turns if any(row["turns"][n]["answer_is_coordinate"])}
        assert names == wanted
        assert {group_quartile(group) for group in document.label_groups[labelled].tolist()} == {2}


def test_groups_are_one_to_one() -> None:
    every = {group_of(task, quartile, is_coordinate=flag) for task in TASK_NAMES for quartile in range(4) for flag in (False, True)}
    assert every == set(range(NUM_GROUPS))
    assert group_name(group_of("detect", 3, is_coordinate=True)) == "detect/coordinates"
    assert group_quartile(group_of("caption", 3, is_coordinate=False)) == 3
    assert len(TASK_NAMES) * GROUPS_PER_TASK == NUM_GROUPS


@pytest.mark.parametrize(("quantile", "quartile"), [(0, 0), (16383, 0), (16384, 1), (32768, 2), (49152, 3), (65535, 3)])
def test_quartiles_of_quantiles(quantile: int, quartile: int) -> None:
    frame, rows = made("qwen2_5_vl")
    table = np.full_like(QUANTILES, quantile)
    document = compose(rows[0], [0], frame.contract(), frame.family.network, PLAIN, table)
    assert {group_quartile(group) for group in document.label_groups[document.label_groups >= 0].tolist()} == {quartile}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen_vl"])
def test_any_turns_in_any_order(family: str) -> None:
    frame, rows = made(family)
    contract, network = frame.contract(), frame.family.network
    row = rows[0]
    assert len(row["turns"]) >= 4
    document = compose(row, [3, 0, 2], contract, network, PLAIN, QUANTILES)
    ids = list(row["header_ids"])
    for place, number in enumerate([3, 0, 2]):
        turn = row["turns"][number]
        ids += contract.turn_open_ids if place else []
        ids += turn["prompt_ids"] + contract.answer_open_ids + turn["answer_ids"] + contract.turn_close_ids
    assert collapsed(document, frame, row) == ids


def test_images_of_a_dialogue_stand_in_their_order() -> None:
    frame, rows = made("qwen2_5_vl")
    row = next(row for row in rows if row["ordered"])
    document = compose({**row, "row": 7}, range(len(row["turns"])), frame.contract(), frame.family.network, PLAIN, QUANTILES)
    assert [slot.path for slot in document.images] == ["a.jpg", "b.jpg"]
    assert [slot.size_wh for slot in document.images] == [(640, 480), (100, 300)]
    assert document.images[1].where == f"sample {row['sample_id']} (row 7), image 2 of 2 (b.jpg)"
    is_image = document.input_ids == frame.image_token_id
    runs = [len(run) for run in re.findall("x+", "".join("x" if flag else "." for flag in is_image))]
    assert runs == [one["visual_tokens"] for one in row["images"]]
    # An image starts where the text stopped, and moves on by its longer side.
    first = int(np.flatnonzero(is_image)[0])
    assert document.positions[1:, first].tolist() == [first] * 3
    assert document.positions[0].tolist() == list(range(len(document)))


@pytest.mark.parametrize(
    ("turns", "ordered"),
    [([], False), ([0, 0], False), ([99], False), ([-1], False), ([0], True), ([1, 0], True)],
    ids=["none", "twice", "beyond", "negative", "part of a dialogue", "a dialogue in another order"],
)
def test_plans_of_other_shards_are_refused(turns: list[int], ordered: bool) -> None:
    frame, rows = made("qwen2_5_vl")
    row = next(row for row in rows if row["ordered"] == ordered)
    with pytest.raises(ShardError, match="plan again"):
        compose(row, turns, frame.contract(), frame.family.network, PLAIN, QUANTILES)


def test_several_turns_where_an_image_takes_one_question_are_refused() -> None:
    frame, rows = made("cogvlm")
    with pytest.raises(ShardError, match="plan again"):
        compose(rows[0], [0, 1], frame.contract(), frame.family.network, PLAIN, QUANTILES)


def test_a_row_with_too_few_image_tokens_is_refused() -> None:
    frame, rows = made("qwen2_5_vl")
    header = [token for token in rows[0]["header_ids"] if token != frame.image_token_id]
    with pytest.raises(ShardError, match="0 image tokens for 1 images"):
        compose({**rows[0], "header_ids": header}, [0], frame.contract(), frame.family.network, PLAIN, QUANTILES)


@pytest.mark.parametrize("raw", [0.0, 1 / 4096, 0.1, 0.49999, 0.5, 0.9999, 1.0])
def test_bins_are_those_of_the_histograms(raw: float) -> None:
    """The quartile is looked up in the bin that the conversion counted the turn in."""
    frame, rows = made("qwen2_5_vl")
    score = float(np.float32(raw))
    row = {**rows[0], "turns": [{**rows[0]["turns"][0], "difficulty": score}]}
    table = np.zeros_like(QUANTILES)
    table[:, difficulty.bins(np.array([score], np.float32))] = 65_535
    document = compose(row, [0], frame.contract(), frame.family.network, PLAIN, table)
    assert {group_quartile(group) for group in document.label_groups[document.label_groups >= 0].tolist()} == {3}
