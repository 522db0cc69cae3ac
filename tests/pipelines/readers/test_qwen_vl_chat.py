import json
from pathlib import Path
from typing import Any

import pytest

from boxcar.pipelines.readers.qwen_vl_chat import QwenVlChatReader
from boxcar.pipelines.readers.reader import Reader
from boxcar.schemas.record import PER_MILLE, BoxMark, DialogueTurn, ImageMark, ImageRef, Record, Rejected
from boxcar.schemas.workflow import SourceConfig

Row = dict[str, Any]


def load(tmp_path: Path, *rows: Row, **settings: Any) -> list[Record | Rejected]:
    path = tmp_path / "train.json"
    path.write_text(json.dumps(rows, ensure_ascii=False))
    reader: Reader = QwenVlChatReader()
    config = SourceConfig.model_validate({"reader": "qwen_vl_chat", "annotations": str(path), **settings})
    plan = reader.plan(config, tmp_path / "work", 2)
    return [item for unit in plan.units for item in reader.read(config, unit)]


def talk(*spoken: str, **more: Any) -> Row:
    names = ("user", "assistant") * len(spoken)
    return {"id": "identity_1", "conversations": [{"from": name, "value": text} for name, text in zip(names, spoken, strict=False)], **more}


def one(tmp_path: Path, row: Row, **settings: Any) -> Record:
    [item] = load(tmp_path, row, **settings)
    assert isinstance(item, Record), item
    return item


DEMO = "https://qianwen-res.oss-cn-beijing.aliyuncs.com/Qwen-VL/assets/demo.jpeg"


def test_the_readmes_conversation_becomes_a_dialogue(tmp_path: Path) -> None:
    row = talk(
        f"Picture 1: <img>{DEMO}</img>\n图中的狗是什么品种？",
        "图中是一只拉布拉多犬。",
        "框出图中的格子衬衫",
        "<ref>格子衬衫</ref><box>(588,499),(725,789)</box>",
    )
    assert one(tmp_path, row, language="zh", split="train") == Record(
        record_id="identity_1",
        position="train.json, byte 1",
        images=(ImageRef(DEMO),),
        dialogue=(
            DialogueTurn((ImageMark(0), "图中的狗是什么品种？"), ("图中是一只拉布拉多犬。",)),
            DialogueTurn(("框出图中的格子衬衫",), (BoxMark(((588, 499, 725, 789),), "格子衬衫"),)),
        ),
        box_space=PER_MILLE,
        language="zh",
        split="train",
    )


def test_several_pictures_are_numbered_through(tmp_path: Path) -> None:
    row = talk(
        "Picture 1: <img>a.jpg</img>\nPicture 2:<img>b.jpg</img>\nWhich?", "The first.", "Picture 3: <img>c.jpg</img>\nNow?", "The last."
    )
    record = one(tmp_path, row)
    assert record.images == (ImageRef("a.jpg"), ImageRef("b.jpg"), ImageRef("c.jpg"))
    assert [turn.question for turn in record.dialogue] == [(ImageMark(0), ImageMark(1), "Which?"), (ImageMark(2), "Now?")]


def test_an_image_without_prefix_keeps_its_newline(tmp_path: Path) -> None:
    assert one(tmp_path, talk("<img> a.jpg </img>\nWhat?", "A dog.")).dialogue[0].question == (ImageMark(0), "\nWhat?")


@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        pytest.param(
            "<ref>Two apples</ref><box>(302,257),(582,671)</box><box>(603,252),(878,642)</box>",
            (BoxMark(((302, 257, 582, 671), (603, 252, 878, 642)), "Two apples"),),
            id="several-boxes-of-a-ref",
        ),
        pytest.param("It is <box>(1,2),(3,4)</box>.", ("It is ", BoxMark(((1, 2, 3, 4),)), "."), id="box-without-ref"),
        pytest.param("<ref> Woman</ref><box>(1,2),(3,4)</box>", (" ", BoxMark(((1, 2, 3, 4),), "Woman")), id="blank-in-the-ref"),
        pytest.param("<ref>It</ref><quad>(1,2),(9,3),(8,7),(0,6)</quad>", (BoxMark(((0, 2, 9, 7),), "It"),), id="quad"),
        pytest.param("a <ref>dog</ref>", ("a dog",), id="ref-without-box"),
        pytest.param("<box>(0,0),(1000,999)</box>", (BoxMark(((0, 0, 1000, 999),)),), id="a-thousand-is-taken"),
        pytest.param("[1, 2, 3, 4] and [[001,002,003,004]]", ("[1, 2, 3, 4] and [[001,002,003,004]]",), id="forms-of-others-are-text"),
    ],
)
def test_boxes_and_refs(tmp_path: Path, answer: str, parts: tuple[object, ...]) -> None:
    assert one(tmp_path, talk("Picture 1: <img>a.jpg</img>\n?", answer)).dialogue[0].answer == parts


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        pytest.param(talk("Picture 1: <img>a</img>\n?", "<box>(10,20),(1920,1080)</box>"), "box_out_of_range", id="pixels"),
        pytest.param(talk("Picture 1: <img>a</img>\n?", "<box>(10,20)</box>"), "point_not_box", id="point"),
        pytest.param(talk("<img>a</img><ref>dog</ref><box>", "(1,2),(3,4)</box>"), "malformed_box", id="evaluation-prompt"),
        pytest.param(talk("Picture 1: <img>a</img>\n?", "<box>dog</box>"), "malformed_box", id="no-numbers"),
        pytest.param(talk("Picture 1: <img>a", "b"), "malformed_box", id="image-not-closed"),
        pytest.param(talk("?", "<box>(1,2),(3,4)</box>"), "box_without_image", id="no-image"),
        pytest.param(talk("Picture 1: <img></img>\n?", "a"), "bad_image_path", id="empty-path"),
        pytest.param(talk("?", "<img>a</img>"), "image_outside_question", id="image-in-answer"),
        pytest.param(talk("Picture 2: <img>a</img>\n?", "b"), "picture_number", id="first-picture-is-2"),
        pytest.param(talk("Picture 1: <img>a</img>\n?", "b", "Picture 1: <img>c</img>\n?", "d"), "picture_number", id="numbered-anew"),
        pytest.param(
            talk("Picture 1: <img>a</img>\nPicture 2: <img>b</img>\n?", "<box>(1,2),(3,4)</box>"),
            "ambiguous_box_image",
            id="box-after-two-images",
        ),
        pytest.param(talk("Picture 1: <img>a</img>\n?", " "), "empty_answer", id="empty-answer"),
        pytest.param(talk("?"), "turn_order", id="no-answer"),
        pytest.param({"messages": []}, "conversation_keys", id="other-key"),
    ],
)
def test_a_row_that_does_not_fit_is_rejected_alone(tmp_path: Path, row: Row, reason: str) -> None:
    bad, good = load(tmp_path, row, talk("a", "b"))
    assert isinstance(bad, Rejected)
    assert bad.reason == reason
    assert isinstance(good, Record)


def test_a_row_without_pictures_is_a_text_dialogue(tmp_path: Path) -> None:
    assert one(tmp_path, talk("a", "b")).dialogue == (DialogueTurn(("a",), ("b",)),)
