import json
from pathlib import Path
from typing import Any

import pytest

from boxcar.pipelines.readers.reader import Reader
from boxcar.pipelines.readers.swift import SwiftReader
from boxcar.schemas.record import PER_MILLE, PIXELS, RELATIVE, BoxMark, DialogueTurn, ImageMark, ImageRef, Record, Rejected
from boxcar.schemas.workflow import SourceConfig

Row = dict[str, Any]


def load(tmp_path: Path, *rows: Row, **settings: Any) -> list[Record | Rejected]:
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    reader: Reader = SwiftReader()
    config = SourceConfig.model_validate({"reader": "ms_swift", "annotations": str(path), **settings})
    plan = reader.plan(config, tmp_path / "work", 2)
    return [item for unit in plan.units for item in reader.read(config, unit)]


def talk(question: str, answer: str, **more: Any) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], "images": ["/xxx/x.jpg"], **more}


def one(tmp_path: Path, row: Row, **settings: Any) -> Record:
    [item] = load(tmp_path, row, **settings)
    assert isinstance(item, Record), item
    return item


def reason(tmp_path: Path, row: Row, **settings: Any) -> str:
    [item] = load(tmp_path, row, **settings)
    assert isinstance(item, Rejected), item
    return item.reason


# The three examples of ms-swift's documentation.
DESCRIBE: Row = talk(
    "<image>Describe the image.",
    "<ref-object><bbox> and <ref-object><bbox> are playing on the beach",
    objects={"ref": ["a dog", "a woman"], "bbox": [[331.5, 761.4, 853.5, 1594.8], [676.5, 685.8, 1099.5, 1427.4]]},
)
FIND: Row = talk(
    "<image>Find the <ref-object> in the image",
    "<bbox><bbox>",
    objects={"ref": ["sheep"], "bbox": [[90.9, 160.8, 135, 212.8], [360.9, 480.8, 495, 532.8]]},
)
CLICK: Row = talk("<image>Help me open Google Chrome", "Action: click(start_box='<bbox>')", objects={"ref": [], "bbox": [[615, 226]]})


def test_a_ref_right_before_boxes_is_their_label(tmp_path: Path) -> None:
    record = one(tmp_path, DESCRIBE | {"id": "r"}, split="val")
    assert record == Record(
        record_id="r",
        position="train.jsonl, byte 0",
        images=(ImageRef("/xxx/x.jpg"),),
        dialogue=(
            DialogueTurn(
                (ImageMark(0), "Describe the image."),
                (
                    BoxMark(((331.5, 761.4, 853.5, 1594.8),), "a dog"),
                    " and ",
                    BoxMark(((676.5, 685.8, 1099.5, 1427.4),), "a woman"),
                    " are playing on the beach",
                ),
            ),
        ),
        box_space=PIXELS,
        split="val",
    )


def test_a_ref_elsewhere_is_text_and_its_boxes_have_no_label(tmp_path: Path) -> None:
    [turn] = one(tmp_path, FIND).dialogue
    assert turn.question == (ImageMark(0), "Find the sheep in the image")
    assert turn.answer == (BoxMark(((90.9, 160.8, 135, 212.8), (360.9, 480.8, 495, 532.8))),)


def test_refs_and_boxes_are_not_paired_by_place(tmp_path: Path) -> None:
    answer = "<ref-object> <bbox><bbox>, a <ref-object> and <bbox>; <ref-object>\n<bbox>"
    boxes = [[number, 0, number + 1, 1] for number in range(4)]
    row = talk("<image>?", answer, objects={"ref": ["a", "b", "c"], "bbox": boxes})
    [turn] = one(tmp_path, row).dialogue
    assert turn.answer == (
        BoxMark(((0, 0, 1, 1), (1, 0, 2, 1)), "a"),
        ", a b and ",
        BoxMark(((2, 0, 3, 1),)),
        "; ",
        BoxMark(((3, 0, 4, 1),), "c"),
    )


def test_placeholders_are_counted_through_all_turns(tmp_path: Path) -> None:
    row = talk("<image>What is at <bbox>?", "A <ref-object>.", objects={"ref": ["dog", "cat"], "bbox": [[1, 2, 3, 4], [5, 6, 7, 8]]})
    row["messages"] += talk("And the <ref-object>?", "<bbox>")["messages"]
    assert one(tmp_path, row).dialogue == (
        DialogueTurn((ImageMark(0), "What is at ", BoxMark(((1, 2, 3, 4),)), "?"), ("A dog.",)),
        DialogueTurn(("And the cat?",), (BoxMark(((5, 6, 7, 8),)),)),
    )


def test_image_ids_name_the_image_of_each_box(tmp_path: Path) -> None:
    objects = {"ref": ["dogs"], "bbox": [[1, 0, 2, 1], [2, 0, 3, 1], [3, 0, 4, 1]], "image_id": [0, 1, 1]}
    row = talk("<image><image>Find <ref-object>", "<bbox><bbox><bbox>", objects=objects, images=["a.jpg", "b.jpg"])
    assert one(tmp_path, row).dialogue[0].answer == (BoxMark(((1, 0, 2, 1),), "", 0), BoxMark(((2, 0, 3, 1), (3, 0, 4, 1)), "", 1))
    row["objects"]["image_id"] = []
    assert one(tmp_path, row).dialogue[0].answer == (BoxMark(((1, 0, 2, 1), (2, 0, 3, 1), (3, 0, 4, 1))),)


@pytest.mark.parametrize(("bbox_type", "space"), [(None, PIXELS), ("real", PIXELS), ("norm1", RELATIVE)])
def test_the_bbox_type_is_the_space(tmp_path: Path, bbox_type: str | None, space: object) -> None:
    row = talk("<image>?", "<bbox>", objects={"ref": [], "bbox": [[0.1, 0.2, 0.3, 0.4]], "bbox_type": bbox_type})
    assert one(tmp_path, row, box_space="per_mille").box_space == space


def with_objects(answer: str = "<bbox>", **objects: Any) -> Row:
    return talk("<image>?", answer, objects={"ref": [], "bbox": [[1, 2, 3, 4]], **objects})


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param(CLICK, "point_not_box", id="point"),
        pytest.param(with_objects(bbox=[[1, 2, 3]]), "malformed_box", id="three-numbers"),
        pytest.param(with_objects(bbox=[[1, 2, 3, 4, 5, 6, 7, 8]]), "malformed_box", id="eight-numbers"),
        pytest.param(with_objects("<bbox><bbox>"), "box_count_mismatch", id="boxes-too-few"),
        pytest.param(with_objects("none"), "box_count_mismatch", id="boxes-too-many"),
        pytest.param(talk("<image>?", "<bbox>"), "box_count_mismatch", id="no-objects"),
        pytest.param(talk("<image>?", "<bbox>", objects={}), "box_count_mismatch", id="empty-objects"),
        pytest.param(
            with_objects(ref=["a", "b", "c"], answer="<ref-object> <ref-object><bbox>"), "ref_count_mismatch", id="three-refs-for-two"
        ),
        pytest.param(with_objects("<ref-object><bbox>"), "ref_count_mismatch", id="no-refs"),
        pytest.param(with_objects(image_id=[0, 0]), "image_id_mismatch", id="image-ids-too-many"),
        pytest.param(with_objects(image_id=[1]), "image_id_mismatch", id="image-id-of-no-image"),
        pytest.param(with_objects(image_id=[-1]), "image_id_mismatch", id="negative-image-id"),
        pytest.param(with_objects(bbox_type="norm1000"), "unknown_bbox_type", id="bbox-type"),
        pytest.param(with_objects(bbox_type="norm1"), "box_out_of_range", id="pixels-called-norm1"),
        pytest.param(with_objects("<bbox> <|box_start|>(1,2),(3,4)<|box_end|>"), "mixed_box_forms", id="two-forms"),
        pytest.param(
            talk("<image>?", "a", objects='[{"caption": "a", "bbox": [1, 2, 3, 4]}]'), "box_count_mismatch", id="objects-without-place"
        ),
        pytest.param(talk("?", "a"), "image_marker_mismatch", id="no-marker"),
        pytest.param(talk("<image>?", "a", videos=["a.mp4"]), "unsupported_media", id="video"),
        pytest.param(talk("<image>?", "a", label=False), "untrained_answer", id="disliked-answer"),
        pytest.param({"messages": [{"role": "assistant", "content": "I love music"}]}, "turn_order", id="pre-training"),
        pytest.param(
            {"messages": [{"role": "user", "content": "a"}, {"role": "tool_call", "content": "b"}]}, "unsupported_role", id="tool-call"
        ),
    ],
)
def test_a_row_that_does_not_fit_is_rejected_alone(tmp_path: Path, row: Row, expected: str) -> None:
    bad, good = load(tmp_path, row, DESCRIBE)
    assert isinstance(bad, Rejected)
    assert bad.reason == expected
    assert isinstance(good, Record)


def test_a_mismatch_names_both_counts(tmp_path: Path) -> None:
    [item] = load(tmp_path, with_objects("<bbox><bbox>"))
    assert isinstance(item, Rejected)
    assert item.detail == "found 2 <bbox> for 1 entries of `objects.bbox`, expected as many"


def test_a_placeholder_in_the_system_prompt_takes_no_box(tmp_path: Path) -> None:
    row = with_objects("no box")
    row["messages"].insert(0, {"role": "system", "content": "Answer with <bbox>."})
    assert reason(tmp_path, row) == "box_count_mismatch"
    row = with_objects()
    row["messages"].insert(0, {"role": "system", "content": "Answer with <bbox>."})
    assert one(tmp_path, row).system == "Answer with <bbox>."


def test_swapped_corners_stay_for_the_rule_about_them(tmp_path: Path) -> None:
    assert one(tmp_path, with_objects(bbox=[[3, 4, 1, 2]])).dialogue[0].answer == (BoxMark(((3, 4, 1, 2),)),)


def test_lists_in_a_row_with_objects_are_text(tmp_path: Path) -> None:
    assert one(tmp_path, with_objects("[1, 2, 3, 4] <bbox>"), box_space="pixels").dialogue[0].answer[0] == "[1, 2, 3, 4] "


def test_rows_without_objects_hold_boxes_of_the_declared_space(tmp_path: Path) -> None:
    row = talk("<image>Find the <|object_ref_start|>sheep<|object_ref_end|>", "<|box_start|>(101,201),(150,266)<|box_end|>")
    record = one(tmp_path, row, box_space="per_mille")
    assert record.box_space == PER_MILLE
    assert record.dialogue == (DialogueTurn((ImageMark(0), "Find the sheep"), (BoxMark(((101, 201, 150, 266),)),)),)
    assert reason(tmp_path, row) == "box_space_undeclared"


# ---- rows of ms-swift 2, as its documentation shows them


def old(query: str, response: str, **more: Any) -> Row:
    return {"query": query, "response": response, **more}


def entry(bbox: Any, caption: str = "guy in red", **more: Any) -> str:
    return json.dumps([{"caption": caption, "bbox": bbox, "bbox_type": "real", "image": 0, **more}])


PATH = "/coco2014/train2014/COCO_train2014_000000001507.jpg"
GUY = (138.0, 136.0, 235.0, 359.0)


def test_a_query_and_its_response(tmp_path: Path) -> None:
    record = one(tmp_path, old("Find <bbox>", "<ref-object>", images=[PATH], objects=entry([138, 136, 235, 359])))
    assert record.images == (ImageRef(PATH),)
    assert record.dialogue == (DialogueTurn((ImageMark(0), "Find ", BoxMark((GUY,))), ("guy in red",)),)
    assert record.box_space == PIXELS


def test_one_place_for_several_boxes(tmp_path: Path) -> None:
    record = one(tmp_path, old("Find <ref-object>", "<bbox>", images=[PATH], objects=entry([[138, 136, 235, 359], [1, 2, 3, 4]])))
    assert record.dialogue == (DialogueTurn((ImageMark(0), "Find guy in red"), (BoxMark((GUY, (1.0, 2.0, 3.0, 4.0))),)),)


@pytest.mark.parametrize(("bbox_type", "space"), [("real", PIXELS), ("norm_1000", PER_MILLE), ("norm_1", RELATIVE)])
def test_the_spaces_of_ms_swift_2(tmp_path: Path, bbox_type: str, space: Any) -> None:
    box = [0.1, 0.2, 0.3, 0.4]
    row = old(f"<img>{PATH}</img>Find <ref-object>", "<bbox>", objects=entry(box, bbox_type=bbox_type))
    record = one(tmp_path, row)
    assert (record.images, record.box_space) == ((ImageRef(PATH),), space)


def test_history_and_system(tmp_path: Path) -> None:
    row = old("and now?", "FFFFF", history=[["<img>a.jpg</img> Describe the image", "xxx"], ["CCCCC", "DDDDD"]], system="S")
    record = one(tmp_path, row)
    assert record.system == "S"
    assert record.images == (ImageRef("a.jpg"),)
    assert [(turn.question, turn.answer) for turn in record.dialogue] == [
        ((ImageMark(0), " Describe the image"), ("xxx",)),
        (("CCCCC",), ("DDDDD",)),
        (("and now?",), ("FFFFF",)),
    ]


@pytest.mark.parametrize(
    ("images", "places"),
    [(["a", "b"], [[0], [1]]), (["a"], [[0], []]), (["a", "b", "c"], [[0, 1, 2], []])],
    ids=["each", "one", "all first"],
)
def test_images_that_no_text_mentions(tmp_path: Path, images: list[str], places: list[list[int]]) -> None:
    record = one(tmp_path, old("second", "2", history=[["first", "1"]], images=images))
    found = [[part.image_index for part in turn.question if isinstance(part, ImageMark)] for turn in record.dialogue]
    assert found == places


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (old("<img>a.jpg</img>x", "y", images=["b.jpg"]), "bad_image_path"),
        (old("x", "y", history=[["alone"]]), "unreadable_row"),
        (old("<bbox>", "y", images=["a.jpg"], objects="not json"), "unreadable_row"),
        (old("<bbox>", "y", images=["a.jpg"], objects=entry("wide")), "malformed_box"),
        (old("<bbox><bbox>", "y", images=["a.jpg"], objects=entry([1, 2, 3, 4])), "box_count_mismatch"),
        (old("<bbox>", "y", images=["a.jpg"], objects=entry([1, 2, 3, 4], bbox_type="norm1000")), "unknown_bbox_type"),
        (old("<bbox>", "y", images=["a.jpg"], objects=entry([1, 2, 3, 4000], bbox_type="norm_1000")), "box_out_of_range"),
        ({"query": "x"}, "conversation_keys"),
    ],
)
def test_rows_of_ms_swift_2_that_are_refused(tmp_path: Path, row: Row, expected: str) -> None:
    assert reason(tmp_path, row) == expected


def test_objects_as_a_string_beside_messages(tmp_path: Path) -> None:
    record = one(tmp_path, talk("<image> Find <ref-object>", "<bbox>", objects=entry([138, 136, 235, 359])))
    assert record.dialogue[0].answer == (BoxMark((GUY,)),)
