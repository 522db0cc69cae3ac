"""Asking is converting: the same ids for the same words. What does not belong together is not opened, and nothing of a file gets lost."""

import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from boxcar.pipelines.tokens.frame import build_frame
from boxcar.schemas.adapter import AdapterCard
from boxcar.schemas.errors import BoxcarError, ConfigError, ContractError, ImageError
from boxcar.train.answering.adapter import find_adapter, open_adapter
from boxcar.train.answering.ask import Asker, Query
from boxcar.train.answering.predict import Asked, PredictConfig, Predictor, as_json, stepwise
from boxcar.train.answering.predict_job import PredictSpec, predict_file, trained_turns, usual_task
from boxcar.train.data.documents import prompt_of
from boxcar.train.data.store import ShardStore
from tests.small_adapter import train_adapter
from tests.small_sets import copy_demo, demo_config, run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scenes(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_demo(demo, tmp_path_factory.mktemp("scenes") / "demo")
    run(demo_config(folder, folder / "shards", records_per_shard=16))
    return folder


@pytest.fixture(scope="module")
def adapter(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_adapter(scenes / "shards", scenes / "base-qwen2_5_vl", tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def predictor(adapter: Path) -> Predictor:
    return Predictor(open_adapter(str(adapter), CPU, torch.float32), PredictConfig(max_new_tokens=4))


def test_a_question_has_the_ids_of_the_conversion(scenes: Path) -> None:
    """Every turn of the demo, asked again from its label: question, ids, header, image and so the whole prompt."""
    store = ShardStore([str(scenes / "shards")])
    frame = build_frame(demo_config(scenes, scenes / "unused"))
    asker, contract = Asker(frame), store.contract
    tasks = set()
    for number in range(store.num_rows):
        row = store.whole_row(number)
        for place, turn in enumerate(row["turns"]):
            if turn["task"] == "detect_joint":
                continue  # the order of its labels is the question's own
            bank = frame.bank[turn["task"]][turn["language"]]
            box = tuple(turn["boxes"][0]) if turn["task"] == "describe" else None
            text = turn["labels"][0] if turn["labels"] else ""
            queries = [
                Query(row["images"][0]["path"], text, turn["task"], turn["language"], box, prompt=choice) for choice in range(len(bank))
            ]
            asked = [asker.row(query) for query in queries]
            same = [one for one in asked if one["turns"][0]["question"] == turn["question"]]
            assert same, turn["question"]
            assert same[0]["turns"][0]["prompt_ids"] == list(turn["prompt_ids"])
            mine = prompt_of(same[0], 0, contract, frame.family.network)
            theirs = prompt_of(row, place, contract, frame.family.network)
            assert np.array_equal(mine.input_ids, theirs.input_ids)
            assert np.array_equal(mine.positions, theirs.positions)
            assert mine.images[0].resized_wh == theirs.images[0].resized_wh
            tasks.add(turn["task"])
    assert {"detect", "absent", "caption", "describe"} <= tasks


def test_answers_come_in_the_order_asked(predictor: Predictor, scenes: Path) -> None:
    images = sorted((scenes / "images").iterdir())[:3]
    queries = [Query(str(image), "circle " * (number + 1), "detect", id=str(number)) for number, image in enumerate(images * 4)]
    answers = list(predictor.ask(queries))
    assert [answer.id for answer in answers] == [str(number) for number in range(12)]
    for query, answer in zip(queries, answers, strict=True):
        (alone,) = predictor.ask([query])
        assert (alone.reply, alone.status) == (answer.reply, answer.status)
        assert json.loads(json.dumps(as_json(answer)))["reply"] == answer.reply


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        (Query("nowhere.jpg", "dog"), ImageError, "no such file"),
        (Query("{scene}", "  "), ConfigError, "found an empty one"),
        (Query("{scene}", "<|im_end|>"), ConfigError, "takes for a control token"),
        (Query("{scene}", "dog", "refer", "fr"), ConfigError, "found 'fr' for refer"),  # type: ignore[arg-type]
        (Query("{scene}", "dog", "segment"), ConfigError, "found 'segment', expected one of detect"),  # type: ignore[arg-type]
        (Query("{scene}", "", "describe"), ConfigError, "describe without a box"),
        (Query("{text}", "dog"), ImageError, "expected a complete image file"),
    ],
    ids=["no file", "empty", "control token", "language", "task", "no box", "no image"],
)
def test_bad_questions(query: Query, error: type[BoxcarError], message: str, predictor: Predictor, scenes: Path) -> None:
    from dataclasses import replace  # noqa: PLC0415

    image = query.image.format(scene=next((scenes / "images").iterdir()), text=scenes / "instances.json")
    with pytest.raises(error, match=message):
        list(predictor.ask([replace(query, image=image)]))


def test_an_adapter_is_asked_as_it_was_trained(predictor: Predictor) -> None:
    trained = trained_turns(predictor)
    assert trained["detect"] > 0
    assert "refer" not in trained
    assert usual_task(predictor) == "detect"


def test_two_steps(predictor: Predictor, scenes: Path) -> None:
    image = str(next((scenes / "images").iterdir()))
    found = stepwise(predictor, image, "en", ["circle", "star"])
    assert list(found.answers) == ["circle", "star"]
    assert found.expected == {}, "a random network names nothing"


# ---- adapters


def test_the_run_its_adapter_and_its_checkpoint_are_found(adapter: Path) -> None:
    assert find_adapter(str(adapter)) == adapter / "adapter"
    assert find_adapter(str(adapter / "adapter")) == adapter / "adapter"
    with pytest.raises(ConfigError, match=r"no boxcar.json in it, expected a run's folder"):
        find_adapter(str(adapter.parent))
    with pytest.raises(ConfigError, match="no such folder"):
        find_adapter(str(adapter / "nowhere"))


def test_an_adapter_changes_what_the_base_says(adapter: Path, scenes: Path, tmp_path: Path) -> None:
    """With its weights scaled up; and without it, the base is itself again."""
    copy = tmp_path / "adapter"
    shutil.copytree(adapter / "adapter", copy)
    weights = load_file(copy / "adapter_model.safetensors")
    save_file({name: torch.full_like(tensor, 0.1) for name, tensor in weights.items()}, copy / "adapter_model.safetensors")
    changed = Predictor(open_adapter(str(copy), CPU, torch.float32), PredictConfig(max_new_tokens=6))
    query = Query(str(next((scenes / "images").iterdir())), "circle", "detect")
    (with_it,) = changed.ask([query])
    with changed.opened.bare():
        (without,) = changed.ask([query])
    (once_more,) = changed.ask([query])
    assert with_it.reply != without.reply
    assert once_more.reply == with_it.reply


def _damaged(adapter: Path, copy: Path, change: str) -> Path:
    shutil.copytree(adapter / "adapter", copy)
    card = json.loads((copy / "boxcar.json").read_text())
    weights = load_file(copy / "adapter_model.safetensors")
    if change == "a key less":
        weights.pop(sorted(weights)[0])
    elif change == "a key more":
        weights["base_model.model.other.lora_A.weight"] = torch.zeros(2, 2)
    elif change == "another base":
        card["base"]["config_xxh3_128"] = "0" * 32
    elif change == "another template":
        card["contract"]["turn_open"] += " "
    elif change == "another tokenizer":
        card["contract"]["tokenizer_fingerprint"] = "0" * 32
    elif change == "another version":
        card["version"] = 99
    elif change == "other pixel limits":
        card["contract"]["max_pixels"] += 1
    if change in ("another base", "another template", "another tokenizer"):  # as another run would have written it
        card = json.loads(msgspec.convert(card, AdapterCard).dumps())
    (copy / "boxcar.json").write_text("{" if change == "no JSON" else json.dumps(card))
    save_file(weights, copy / "adapter_model.safetensors")
    if change == "no settings":
        (copy / "adapter_config.json").unlink()
    if change == "no weights":
        (copy / "adapter_model.safetensors").write_bytes(b"123")
    return copy


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("a key less", ContractError, "0 weights that the base has no place for, 1 places without weight"),
        ("a key more", ContractError, "1 weights that the base has no place for, 0 places without weight"),
        ("another base", ContractError, "expected 0000.*the base that it was trained on"),
        ("another template", ContractError, "turn_open: "),
        ("another tokenizer", ContractError, "tokenizer_fingerprint: "),
        ("another version", ContractError, "boxcar-adapter version 99"),
        ("other pixel limits", ContractError, "the file was changed"),
        ("no settings", ConfigError, "expected peft's settings of the adapter"),
        ("no JSON", ContractError, "no card of an adapter"),
        ("no weights", ConfigError, "expected an adapter's weights"),
    ],
)
def test_what_does_not_fit_is_not_opened(change: str, error: type[BoxcarError], message: str, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        open_adapter(str(_damaged(adapter, tmp_path / "adapter", change)), CPU, torch.float32)


# ---- files of queries


def _queries(scenes: Path, folder: Path) -> Path:
    images = sorted((scenes / "images").iterdir())[:2]
    lines = [json.dumps({"image": str(image), "query": "circle", "id": str(number)}) for number, image in enumerate(images)]
    lines += ["not JSON", json.dumps({"image": "nowhere.png", "query": "dog"}), "", json.dumps({"image": str(images[0]), "quory": "dog"})]
    path = folder / "queries.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def _check_answers(out: Path) -> None:
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert ["error" in answer for answer in answers] == [False, False, True, True, True]
    assert [answer["id"] for answer in answers[:2]] == ["0", "1"]
    assert "nowhere.png" in answers[3]["error"]
    assert "quory" in answers[4]["error"]


def test_every_line_has_its_answer(adapter: Path, scenes: Path, tmp_path: Path) -> None:
    queries, out = _queries(scenes, tmp_path), tmp_path / "answers.jsonl"
    spec = PredictSpec(str(adapter), max_new_tokens=2, use_gpu=False)
    seen: list[int] = []
    counts = predict_file(queries, out, spec, executor="inline", num_workers=1, on_progress=seen.append)
    assert (counts.answered, counts.errors, sum(seen)) == (2, 3, 5)
    _check_answers(out)
    with pytest.raises(ConfigError, match="which exists"):
        predict_file(queries, out, spec, executor="inline", num_workers=1, on_progress=seen.append)


@pytest.mark.ray
@pytest.mark.slow
def test_ray_data_gives_the_same_lines(adapter: Path, scenes: Path, tmp_path: Path) -> None:
    queries = _queries(scenes, tmp_path)
    spec = PredictSpec(str(adapter), max_new_tokens=2, use_gpu=False)
    for executor in ("inline", "ray"):
        predict_file(queries, tmp_path / executor, spec, executor=executor, num_workers=1, on_progress=lambda _: None)
    assert (tmp_path / "ray").read_bytes() == (tmp_path / "inline").read_bytes()


def test_rows_of_shards_are_asked_as_they_are(predictor: Predictor, scenes: Path) -> None:
    store = ShardStore([str(scenes / "shards")])
    row = store.whole_row(0)
    (answer,) = predictor.answer([Asked(row, 0)])
    assert answer.id == row["sample_id"]
    assert answer.question == row["turns"][0]["question"]
    assert answer.num_prompt_tokens == len(prompt_of(row, 0, store.contract, predictor.opened.frame.family.network))
