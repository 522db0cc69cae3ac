import json
from pathlib import Path
from typing import Any

import pytest

from boxcar.pipelines.readers.cogvlm_text import CogvlmTextReader
from boxcar.pipelines.readers.reader import Reader
from boxcar.schemas.record import PER_MILLE, BoxMark, DialogueTurn, ImageMark, ImageRef, Record, Rejected
from boxcar.schemas.workflow import SourceConfig

Row = dict[str, Any]


def load(tmp_path: Path, *rows: Row, **settings: Any) -> list[Record | Rejected]:
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    reader: Reader = CogvlmTextReader()
    config = SourceConfig.model_validate({"reader": "cogvlm_text", "annotations": str(path), **settings})
    plan = reader.plan(config, tmp_path / "work", 2)
    return [item for unit in plan.units for item in reader.read(config, unit)]


def pair(label: str, prompt: str = "Where?") -> Row:
    return {"image": "a.jpg", "prompt": prompt, "label": label}


def one(tmp_path: Path, row: Row, **settings: Any) -> Record:
    [item] = load(tmp_path, row, **settings)
    assert isinstance(item, Record), item
    return item


def test_a_row_becomes_one_turn(tmp_path: Path) -> None:
    row: Row = {
        "id": 3,
        "image": "dogs/a.jpg",
        "prompt": "描述一下图片中的目标物体并指出目标所在区域[[x0,y0,x1,y1]]？",
        "label": "图片中存在一只狗，所在区域为[[086,540,400,760]]",
    }
    assert one(tmp_path, row, language="zh", split="train") == Record(
        record_id="3",
        position="train.jsonl, byte 0",
        images=(ImageRef("dogs/a.jpg"),),
        dialogue=(DialogueTurn((ImageMark(0), row["prompt"]), ("图片中存在一只狗，所在区域为", BoxMark(((86, 540, 400, 760),)))),),
        box_space=PER_MILLE,
        language="zh",
        split="train",
    )


def test_query_and_answer_are_prompt_and_label(tmp_path: Path) -> None:
    row = {"image": "a.jpg", "query": "What is in [[010,020,030,040]]?", "answer": "A dog."}
    question = (ImageMark(0), "What is in ", BoxMark(((10, 20, 30, 40),)), "?")
    assert one(tmp_path, row).dialogue == (DialogueTurn(question, ("A dog.",)),)


@pytest.mark.parametrize(
    ("label", "parts"),
    [
        pytest.param("[[000,001,998,999]]", (BoxMark(((0, 1, 998, 999),)),), id="edges"),
        pytest.param(
            "Two dogs [[010,020,030,040;050,060,070,080]].",
            ("Two dogs ", BoxMark(((10, 20, 30, 40), (50, 60, 70, 80))), "."),
            id="several-boxes",
        ),
        pytest.param("[[86, 540, 400, 760]]", (BoxMark(((86, 540, 400, 760),)),), id="without-zeros-with-blanks"),
        pytest.param("[[010,020,010,040]]", (BoxMark(((10, 20, 10, 40),)),), id="no-width-is-for-the-rule"),
        pytest.param("answer in [[x0,y0,x1,y1]] format", ("answer in [[x0,y0,x1,y1]] format",), id="template"),
        pytest.param("as in [[1]] and [10, 20, 30, 40]", ("as in [[1]] and [10, 20, 30, 40]",), id="other-brackets"),
        pytest.param("**[[010,020,030,040]]**", ("**", BoxMark(((10, 20, 30, 40),)), "**"), id="asterisks-are-text"),
    ],
)
def test_boxes(tmp_path: Path, label: str, parts: tuple[object, ...]) -> None:
    assert one(tmp_path, pair(label)).dialogue[0].answer == parts


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        pytest.param(pair("[[086,540,1400,760]]"), "box_out_of_range", id="pixels"),
        pytest.param(pair("[[086,540,1000,760]]"), "box_out_of_range", id="a-thousand"),
        pytest.param(pair("[[400,540,100,60]]"), "box_not_xyxy", id="width-and-height"),
        pytest.param(pair("[[0.1,0.2,0.3,0.4]]"), "malformed_box", id="fractions"),
        pytest.param(pair("[[010,020,030]]"), "malformed_box", id="three-numbers"),
        pytest.param(pair("[[010,020]]"), "malformed_box", id="point"),
        pytest.param(pair("[[010,020,030,040],[050,060,070,080]]"), "malformed_box", id="two-lists"),
        pytest.param(pair("[[-10,020,030,040]]"), "malformed_box", id="negative"),
        pytest.param(pair(" "), "empty_answer", id="empty"),
        pytest.param({"prompt": "a", "label": "b"}, "unreadable_row", id="no-image"),
        pytest.param({"image": "", "prompt": "a", "label": "b"}, "bad_image_path", id="empty-path"),
        pytest.param({"image": "a.jpg", "label": "b"}, "missing_text", id="no-prompt"),
        pytest.param({"image": "a.jpg", "prompt": "a"}, "missing_text", id="no-label"),
        pytest.param(pair("b") | {"answer": "c"}, "missing_text", id="label-and-answer"),
    ],
)
def test_a_row_that_does_not_fit_is_rejected_alone(tmp_path: Path, row: Row, reason: str) -> None:
    bad, good = load(tmp_path, row, pair("b"))
    assert isinstance(bad, Rejected)
    assert bad.reason == reason
    assert isinstance(good, Record)


def test_widths_and_heights_are_named_as_the_suspicion(tmp_path: Path) -> None:
    [item] = load(tmp_path, pair("[[400,540,100,60]]"))
    assert isinstance(item, Rejected)
    assert "is it [[x,y,w,h]]?" in item.detail
