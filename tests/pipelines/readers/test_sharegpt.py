import json
from pathlib import Path
from typing import Any

import pytest

from boxcar.pipelines.readers.reader import Reader
from boxcar.pipelines.readers.sharegpt import ShareGptReader
from boxcar.schemas.record import PER_MILLE, PIXELS, BoxMark, BoxSpace, DialogueTurn, ImageMark, ImageRef, Record, Rejected
from boxcar.schemas.workflow import SourceConfig

Row = dict[str, Any]


def load(tmp_path: Path, *rows: Row, per_unit: int = 100, **settings: Any) -> list[Record | Rejected]:
    path = tmp_path / "train.json"
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    reader: Reader = ShareGptReader()
    config = SourceConfig.model_validate({"reader": "sharegpt", "annotations": str(path), **settings})
    plan = reader.plan(config, tmp_path / "work", per_unit)
    return [item for unit in plan.units for item in reader.read(config, unit)]


def one(tmp_path: Path, row: Row, **settings: Any) -> Record:
    [item] = load(tmp_path, row, **settings)
    assert isinstance(item, Record), item
    return item


def rejected(tmp_path: Path, row: Row, **settings: Any) -> Rejected:
    [item] = load(tmp_path, row, **settings)
    assert isinstance(item, Rejected), item
    return item


def talk(question: str = "<image>What is it?", answer: str = "A dog.", **more: Any) -> Row:
    spoken = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "r", "conversations": spoken, "images": ["a.jpg"], **more}


def test_a_row_becomes_a_dialogue(tmp_path: Path) -> None:
    row: Row = {
        "id": 7,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "<image><image>\nWhich is older?"},
            {"role": "assistant", "content": "左边的。"},
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "Its paint."},
        ],
        "images": ["cars/a.jpg", "/data/b.jpg"],
        "note": "other columns are ignored",
    }
    assert one(tmp_path, row, split="train", language="zh") == Record(
        record_id="7",
        position="train.json, byte 3",
        images=(ImageRef("cars/a.jpg"), ImageRef("/data/b.jpg")),
        dialogue=(
            DialogueTurn((ImageMark(0), ImageMark(1), "\nWhich is older?"), ("左边的。",)),
            DialogueTurn(("Why?",), ("Its paint.",)),
        ),
        box_space=PIXELS,
        language="zh",
        split="train",
        system="Be brief.",
    )


def test_images_may_come_in_later_turns(tmp_path: Path) -> None:
    row = talk(images=["a.jpg", "b.jpg"])
    row["conversations"] += talk("And <image>?", "A cat.")["conversations"]
    assert [turn.question for turn in one(tmp_path, row).dialogue] == [(ImageMark(0), "What is it?"), ("And ", ImageMark(1), "?")]


@pytest.mark.parametrize(
    "columns",
    [
        pytest.param({"images": ["a.jpg"]}, id="list"),
        pytest.param({"images": "a.jpg"}, id="one-path"),
        pytest.param({"images": None, "image": "a.jpg"}, id="llava"),
        pytest.param({"images": [], "image": ["a.jpg"]}, id="llava-list"),
    ],
)
def test_the_image_column_has_several_forms(tmp_path: Path, columns: Row) -> None:
    assert one(tmp_path, talk() | columns).images == (ImageRef("a.jpg"),)


def test_a_row_without_images_is_a_text_dialogue(tmp_path: Path) -> None:
    record = one(tmp_path, talk("What is [1, 2, 3, 4] + 1?", "[2, 3, 4, 5]", images=None), box_space="pixels")
    assert record.dialogue == (DialogueTurn(("What is [1, 2, 3, 4] + 1?",), ("[2, 3, 4, 5]",)),)


@pytest.mark.parametrize(
    ("row", "system"),
    [
        pytest.param(talk(), None, id="none"),
        pytest.param(talk(system="From the column."), "From the column.", id="column"),
        pytest.param(talk(system=""), None, id="empty-column"),
    ],
)
def test_the_system_prompt_may_be_a_column(tmp_path: Path, row: Row, system: str | None) -> None:
    assert one(tmp_path, row).system == system


def test_a_system_message_beats_the_column(tmp_path: Path) -> None:
    row = talk(system="column")
    row["conversations"].insert(0, {"from": "system", "value": "message"})
    assert one(tmp_path, row).system == "message"


QWEN2 = "<|object_ref_start|>dog<|object_ref_end|><|box_start|>(493,169),(539,297)<|box_end|>"
FENCED = '```json\n[\n\t{"bbox_2d": [493, 169, 539, 297], "label": "dog"}\n]\n```'


@pytest.mark.parametrize("answer", [QWEN2, FENCED, "<ref>dog</ref><box>(493,169),(539,297)</box>"])
def test_boxes_are_read_in_the_declared_space(tmp_path: Path, answer: str) -> None:
    record = one(tmp_path, talk(answer=answer), box_space="per_mille")
    assert record.box_space == PER_MILLE
    assert record.dialogue[0].answer == (BoxMark(((493, 169, 539, 297),), "dog"),)


def test_boxes_of_a_resized_image_carry_their_resize(tmp_path: Path) -> None:
    record = one(tmp_path, talk(answer=FENCED), box_space="resized", box_space_max_pixels=1003520)
    assert record.box_space == BoxSpace("resized", "qwen2_5_vl", 0, 1003520)


@pytest.mark.parametrize("answer", [QWEN2, FENCED, "[[086,540,400,760]]"])
def test_boxes_of_an_undeclared_space_are_rejected_with_the_key_to_set(tmp_path: Path, answer: str) -> None:
    bad, good = load(tmp_path, talk(answer=answer), talk())
    assert isinstance(bad, Rejected)
    assert isinstance(good, Record)
    assert bad.reason == "box_space_undeclared"
    assert "set `box_space` to pixels, relative, per_mille or resized" in bad.detail


def test_lists_stay_text_until_the_space_is_declared_and_the_plan_says_so(tmp_path: Path) -> None:
    row = talk("<image>Where?", "At [0.1, 0.2, 0.3, 0.4].")
    assert one(tmp_path, row).dialogue[0].answer == ("At [0.1, 0.2, 0.3, 0.4].",)
    assert one(tmp_path, row, box_space="relative").dialogue[0].answer == ("At ", BoxMark(((0.1, 0.2, 0.3, 0.4),)), ".")
    config = SourceConfig(reader="sharegpt", annotations=str(tmp_path / "train.json"))
    assert "stay text" in ShareGptReader().plan(config, tmp_path, 10).notes[0]


def test_the_plan_warns_of_llavas_padded_square(tmp_path: Path) -> None:
    load(tmp_path, talk())
    config = SourceConfig(reader="sharegpt", annotations=str(tmp_path / "train.json"), box_space="relative")
    assert "LLaVA#606" in ShareGptReader().plan(config, tmp_path, 10).notes[0]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        pytest.param(talk("What is it?"), "image_marker_mismatch", id="no-marker-for-one-image"),
        pytest.param(talk("<image><image>?"), "image_marker_mismatch", id="two-markers-for-one-image"),
        pytest.param(talk(images=["a.jpg", "b.jpg"]), "image_marker_mismatch", id="one-marker-for-two-images"),
        pytest.param(talk(images=[]), "image_marker_mismatch", id="marker-without-image"),
        pytest.param(talk("<image_1>What?"), "image_marker_mismatch", id="numbered-marker"),
        pytest.param(talk("What is it?", "<image>"), "image_outside_question", id="image-in-answer"),
        pytest.param(talk(answer=" "), "empty_answer", id="empty-answer"),
        pytest.param(talk(image="b.jpg"), "bad_image_path", id="both-image-columns"),
        pytest.param(talk(images=[""]), "bad_image_path", id="empty-path"),
        pytest.param(talk(messages=[]), "conversation_keys", id="both-conversations"),
        pytest.param({"id": 1, "text": "a"}, "conversation_keys", id="no-conversation"),
        pytest.param(talk(tools='[{"name": "search"}]'), "unsupported_tools", id="tools"),
        pytest.param(talk(videos=["a.mp4"]), "unsupported_media", id="video"),
        pytest.param(talk(kto_tag=False), "untrained_answer", id="disliked-answer"),
        pytest.param(talk() | {"conversations": "hello"}, "unreadable_row", id="conversation-is-no-list"),
        pytest.param(talk() | {"conversations": []}, "turn_order", id="no-message"),
        pytest.param(talk() | {"conversations": talk()["conversations"][:1]}, "turn_order", id="no-answer"),
        pytest.param(
            talk() | {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "b"}]},
            "unsupported_role",
            id="tool-call",
        ),
    ],
)
def test_a_row_that_cannot_be_said_is_rejected_alone(tmp_path: Path, row: Row, reason: str) -> None:
    bad, good = load(tmp_path, row, talk())
    assert isinstance(bad, Rejected)
    assert bad.reason == reason
    assert isinstance(good, Record)


def test_a_missing_marker_comes_with_the_way_out(tmp_path: Path) -> None:
    found = rejected(tmp_path, talk("What is it?"))
    assert "found 0 image markers for 1 images" in found.detail
    assert "Write the image's marker" in found.detail
    assert found.record_id == "r"
    assert "What is it?" in found.source_text


@pytest.mark.parametrize("answer", [QWEN2, "[10, 20, 30, 40]"])
def test_a_box_after_two_images_is_rejected(tmp_path: Path, answer: str) -> None:
    row = talk("<image><image>Where is the dog?", answer, images=["a.jpg", "b.jpg"])
    assert rejected(tmp_path, row, box_space="pixels").reason == "ambiguous_box_image"


def test_tags_and_markup_of_web_pages_stay_text(tmp_path: Path) -> None:
    row = talk("What does <ref>Smith</ref> mean in <box>?", "A <video> citation.", images=None)
    assert one(tmp_path, row).dialogue == (DialogueTurn(("What does <ref>Smith</ref> mean in <box>?",), ("A <video> citation.",)),)


def test_units_hold_what_the_whole_holds(tmp_path: Path) -> None:
    rows = [talk(f"<image>{number}") | {"id": number} for number in range(7)]
    whole = load(tmp_path, *rows)
    assert [item.record_id for item in whole] == [str(number) for number in range(7)]
    assert all(load(tmp_path, *rows, per_unit=size) == whole for size in (1, 2, 3, 7))


def test_json_lines_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps(talk() | {"id": number}) for number in range(3)))
    config = SourceConfig(reader="sharegpt", annotations=str(path))
    reader = ShareGptReader()
    plan = reader.plan(config, tmp_path, 2)
    assert [item.record_id for unit in plan.units for item in reader.read(config, unit)] == ["0", "1", "2"]
