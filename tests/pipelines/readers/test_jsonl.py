import json
import math
from pathlib import Path
from typing import Any

import pytest

from boxcar.pipelines.readers import jsonl
from boxcar.pipelines.readers.jsonl import JsonlReader
from boxcar.pipelines.readers.reader import Reader
from boxcar.schemas.record import (
    PER_MILLE,
    PIXELS,
    RELATIVE,
    BoxMark,
    BoxSpace,
    DialogueTurn,
    ImageMark,
    ImageRef,
    Record,
    Region,
    Rejected,
)
from boxcar.schemas.workflow import SourceConfig

Row = dict[str, Any]


def load(tmp_path: Path, *rows: Row, **settings: Any) -> list[Record | Rejected]:
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    reader: Reader = JsonlReader()
    config = SourceConfig.model_validate({"reader": "jsonl", "annotations": str(path), **settings})
    plan = reader.plan(config, tmp_path / "work", 2)
    return [item for unit in plan.units for item in reader.read(config, unit)]


def one(tmp_path: Path, row: Row, **settings: Any) -> Record:
    [item] = load(tmp_path, row, **settings)
    assert isinstance(item, Record), item
    return item


def rejected(tmp_path: Path, row: Row, **settings: Any) -> Rejected:
    [item] = load(tmp_path, row, **settings)
    assert isinstance(item, Rejected), item
    return item


def test_a_row_can_say_all_that_a_record_holds(tmp_path: Path) -> None:
    row: Row = {
        "id": "7",
        "images": [{"path": "a.jpg", "width": 640, "height": 480}, "b.jpg"],
        "regions": [
            {"box": [10, 20, 110, 220.5], "label": "dog", "phrases": ["the dog", "left one"]},
            {"box": [1, 2, 3, 4], "label": "dog", "image": 1, "crowd": True, "difficult": True, "id": 99},
            {"box": [5, 6, 7, 8], "image": 1},
        ],
        "captions": ["Two dogs."],
        "dialogue": [
            {"question": "<image><image>What is at <box:0>?", "answer": "A dog. More: <box:1,2|two dogs>"},
            {"question": "Sure?", "answer": "Yes."},
        ],
        "absent": ["cat"],
        "vocabulary": ["dog", "cat", "bird"],
        "not_exhaustive": ["bird"],
        "box_space": "per_mille",
        "language": "zh",
        "split": "val",
        "system": "Be brief.",
    }
    assert one(tmp_path, row) == Record(
        record_id="7",
        position="train.jsonl, byte 0",
        images=(ImageRef("a.jpg", 640, 480), ImageRef("b.jpg")),
        regions=(
            Region((10, 20, 110, 220.5), "dog", ("the dog", "left one")),
            Region((1, 2, 3, 4), "dog", image_index=1, is_crowd=True, is_difficult=True, region_id="99"),
            Region((5, 6, 7, 8), "", image_index=1),
        ),
        captions=("Two dogs.",),
        dialogue=(
            DialogueTurn(
                (ImageMark(0), ImageMark(1), "What is at ", BoxMark(((10, 20, 110, 220.5),)), "?"),
                ("A dog. More: ", BoxMark(((1, 2, 3, 4), (5, 6, 7, 8)), "two dogs", 1)),
            ),
            DialogueTurn(("Sure?",), ("Yes.",)),
        ),
        box_space=PER_MILLE,
        absent=("cat",),
        vocabulary=("dog", "cat", "bird"),
        not_exhaustive=("bird",),
        language="zh",
        split="val",
        system="Be brief.",
    )


def test_what_is_missing_is_the_workflows(tmp_path: Path) -> None:
    record = one(
        tmp_path, {"image": "a.jpg", "id": 1, "captions": None, "regions": None}, language="zh", split="train", box_space="relative"
    )
    assert record == Record("1", "train.jsonl, byte 0", (ImageRef("a.jpg"),), box_space=RELATIVE, language="zh", split="train")
    assert one(tmp_path, {"image": {"path": "a.jpg"}}).box_space == PIXELS


def test_a_row_goes_before_the_workflow(tmp_path: Path) -> None:
    record = one(tmp_path, {"image": "a.jpg", "box_space": "pixels", "language": "en", "system": ""}, language="zh", box_space="relative")
    assert (record.box_space, record.language, record.system) == (PIXELS, "en", "")


def test_resized_boxes_carry_the_workflows_resize(tmp_path: Path) -> None:
    record = one(tmp_path, {"image": "a.jpg", "box_space": "resized"}, box_space_family="qwen2_vl", box_space_min_pixels=3136)
    assert record.box_space == BoxSpace("resized", "qwen2_vl", 3136, 0)


def test_rows_of_another_split_are_left_out(tmp_path: Path) -> None:
    rows = [{"id": "a", "split": "train"}, {"id": "b", "split": "val"}, {"id": "c"}]
    kept = [item for item in load(tmp_path, *rows, split="val") if isinstance(item, Record)]
    assert [(record.record_id, record.split) for record in kept] == [("b", "val"), ("c", "val")]
    assert len(load(tmp_path, *rows)) == 3


def test_no_mark_of_a_family_is_read(tmp_path: Path) -> None:
    text = 'See [1, 2, 3, 4] <box>(1,2),(3,4)</box> {"bbox_2d": [1,2,3,4]} <b> [[086,540,400,760]]'
    record = one(tmp_path, {"dialogue": [{"question": text, "answer": text}]}, box_space="pixels")
    assert record.dialogue == (DialogueTurn((text,), (text,)),)


def test_a_coordinate_that_is_no_number_is_left_to_the_rules(tmp_path: Path) -> None:
    record = one(tmp_path, {"image": "a.jpg", "regions": [{"box": [1, 2, math.nan, math.inf], "label": "a"}]})
    assert record.regions[0].box[3] == math.inf
    assert math.isnan(record.regions[0].box[2])


def talk(question: str, answer: str, **more: Any) -> Row:
    return {"image": "a.jpg", "regions": [{"box": [1, 2, 3, 4]}], "dialogue": [{"question": question, "answer": answer}], **more}


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        pytest.param({"image": "a.jpg", "region": []}, "unknown_key", "unknown field `region`", id="unknown-key"),
        pytest.param(
            {"image": "a.jpg", "regions": [{"box": [1, 2, 3, 4], "lable": "a"}]}, "unknown_key", "`lable` - at `row.regions", id="misspelt"
        ),
        pytest.param({"images": [{"path": "a.jpg", "w": 3}]}, "unknown_key", "`w`", id="unknown-key-of-image"),
        pytest.param({"image": "a.jpg", "regions": [{"box": [1, 2, 3]}]}, "unreadable_row", "length 4", id="three-numbers"),
        pytest.param({"image": "a.jpg", "regions": [{"label": "a"}]}, "unreadable_row", "required field `box`", id="no-box"),
        pytest.param({"image": "a.jpg", "regions": [{"box": [1, 2, 3, "4"]}]}, "unreadable_row", "Expected `float`", id="number-as-text"),
        pytest.param({"image": {"path": "a.jpg", "width": 0}}, "unreadable_row", "row.image.width", id="no-width"),
        pytest.param({"image": "a.jpg", "box_space": "percent"}, "unreadable_row", "row.box_space", id="box-space"),
        pytest.param({"image": "a.jpg", "images": ["b.jpg"]}, "bad_image_path", "both", id="both-image-keys"),
        pytest.param({"image": ""}, "bad_image_path", "''", id="empty-path"),
        pytest.param({"regions": [{"box": [1, 2, 3, 4]}]}, "unknown_image", "region 0", id="region-without-image"),
        pytest.param({"image": "a.jpg", "regions": [{"box": [1, 2, 3, 4], "image": 1}]}, "unknown_image", "image 1", id="image-index"),
        pytest.param(
            {"image": "a.jpg", "regions": [{"box": [1, 2, 3, 4], "image": -1}]}, "unreadable_row", "`int` >= 0", id="negative-index"
        ),
        pytest.param(talk("<image>?", "<box:1>"), "unknown_region", "<box:1>", id="region-number"),
        pytest.param(talk("<image>?", "<box:a>"), "malformed_box", "<box:", id="no-region-number"),
        pytest.param(talk("<image>?", "<box:0"), "malformed_box", "<box:", id="mark-not-closed"),
        pytest.param(talk("?", "a"), "image_marker_mismatch", "found 0 image markers", id="no-marker"),
        pytest.param(talk("<image><image>?", "a"), "image_marker_mismatch", "found 2 image markers", id="two-markers"),
        pytest.param(talk("<image>?", ""), "empty_answer", "empty", id="empty-answer"),
        pytest.param(talk("?", "<image>"), "image_outside_question", "answer", id="image-in-answer"),
    ],
)
def test_a_row_that_does_not_fit_is_rejected_alone(tmp_path: Path, row: Row, reason: str, detail: str) -> None:
    bad, good = load(tmp_path, row, {"image": "a.jpg"})
    assert isinstance(bad, Rejected)
    assert (bad.reason, detail in bad.detail) == (reason, True), bad.detail
    assert isinstance(good, Record)


def test_a_mark_holds_boxes_of_one_image(tmp_path: Path) -> None:
    row = talk("<image><image>?", "<box:0,1>", regions=[{"box": [1, 2, 3, 4]}, {"box": [1, 2, 3, 4], "image": 1}])
    row["images"] = [row.pop("image"), "b.jpg"]
    assert rejected(tmp_path, row).reason == "malformed_box"


def test_the_example_of_the_docstring_is_read(tmp_path: Path) -> None:
    text = jsonl.__doc__
    assert text is not None
    example = text[text.index("{") : text.index("key   ")]
    record = one(tmp_path, json.loads(example))
    assert record.dialogue[0].answer == ("It is here: ", BoxMark(((10, 20, 110, 220),), "dog"), ".")


def test_a_json_list_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"id": 1}, {"id": 2}, 3], indent=2))
    reader = JsonlReader()
    config = SourceConfig(reader="jsonl", annotations=str(path))
    items = [item for unit in reader.plan(config, tmp_path, 2).units for item in reader.read(config, unit)]
    assert [type(item).__name__ for item in items] == ["Record", "Record", "Rejected"]
