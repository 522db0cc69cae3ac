import json
from pathlib import Path
from typing import Any

import pytest

from boxcar.pipelines.readers.coco import CocoReader
from boxcar.pipelines.readers.reader import Reader, SourcePlan
from boxcar.schemas.record import PIXELS, ImageRef, Record, Region, Rejected
from boxcar.schemas.workflow import SourceConfig
from tests.places import SHARED

File = dict[str, Any]

COCO_MINI = SHARED / "data/coco_mini"

FILE: File = {
    "images": [
        {"license": 4, "file_name": "000000000009.jpg", "coco_url": "http://x/train2017/9.jpg", "height": 480, "width": 640, "id": 9},
        {"license": 4, "file_name": "000000000007.jpg", "height": 100, "width": 200, "id": 7},
    ],
    "annotations": [
        {"segmentation": [[1, 2, 3, 4, 5, 6]], "area": 9, "iscrowd": 0, "image_id": 9, "bbox": [1, 2, 3.5, 4], "category_id": 90, "id": 1},
        {
            "segmentation": {"counts": [272, 2], "size": [480, 640]},
            "iscrowd": 1,
            "image_id": 9,
            "bbox": [0, 0, 9, 9],
            "category_id": 1,
            "id": 2,
        },
    ],
    "categories": [{"supercategory": "indoor", "id": 90, "name": "toothbrush"}, {"supercategory": "person", "id": 1, "name": "person"}],
}
VOCABULARY = ("person", "toothbrush")


def load(tmp_path: Path, file: File, per_unit: int = 1000, **settings: Any) -> tuple[SourcePlan, list[Record | Rejected]]:
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(file))
    return load_path(tmp_path, path, per_unit, **settings)


def load_path(tmp_path: Path, path: Path, per_unit: int = 1000, **settings: Any) -> tuple[SourcePlan, list[Record | Rejected]]:
    reader: Reader = CocoReader()
    config = SourceConfig.model_validate({"reader": "coco", "annotations": str(path), **settings})
    plan = reader.plan(config, tmp_path / "work", per_unit)
    return plan, [item for unit in plan.units for item in reader.read(config, unit)]


def records(tmp_path: Path, file: File, **settings: Any) -> dict[str, Record]:
    """The records by id, where nothing was rejected while reading."""
    _, items = load(tmp_path, file, **settings)
    found = {}
    for item in items:
        assert isinstance(item, Record), item
        found[item.record_id] = item
    return found


def with_annotations(*annotations: object) -> File:
    return {**FILE, "annotations": [*FILE["annotations"], *annotations]}


def test_an_image_becomes_a_record(tmp_path: Path) -> None:
    plan, items = load(tmp_path, FILE, split="train", language="zh")
    assert items == [
        Record(
            record_id="9",
            position="instances.json, image 9",
            images=(ImageRef("000000000009.jpg", 640, 480),),
            regions=(
                Region((1, 2, 4.5, 6), "toothbrush", region_id="annotation 1"),
                Region((0, 0, 9, 9), "person", is_crowd=True, region_id="annotation 2"),
            ),
            box_space=PIXELS,
            vocabulary=VOCABULARY,
            language="zh",
            split="train",
        ),
        Record(
            record_id="7",
            position="instances.json, image 7",
            images=(ImageRef("000000000007.jpg", 200, 100),),
            vocabulary=VOCABULARY,
            language="zh",
            split="train",
        ),
    ]
    assert (plan.num_records, plan.rejected, plan.notes) == (2, (), ())


@pytest.mark.parametrize(
    ("more", "box"),
    [
        pytest.param({}, (1, 2, 4, 6), id="no segmentation, area, iscrowd or id"),
        pytest.param({"bbox": [-5, 2.25, 1000, 0]}, (-5, 2.25, 995, 2.25), id="outside and flat: a later rule judges"),
        pytest.param({"bbox": [1e2, 2, 3, 4]}, (100, 2, 103, 6), id="an exponent"),
        pytest.param({"segmentation": None, "area": None, "attributes": {"bbox": [0]}}, (1, 2, 4, 6), id="nulls and other keys"),
    ],
)
def test_boxes(tmp_path: Path, more: dict[str, Any], box: tuple[float, ...]) -> None:
    file = {**FILE, "annotations": [{"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4], **more}]}
    [region] = records(tmp_path, file)["7"].regions
    assert region.box == box
    assert region.region_id == "annotation without id"


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_box_that_is_not_finite_is_passed_on(tmp_path: Path, number: float) -> None:
    file = with_annotations({"id": 3, "image_id": 7, "category_id": 1, "bbox": [number, 2, 3, 4]})
    [region] = records(tmp_path, file)["7"].regions
    assert region.box[0] == pytest.approx(number, nan_ok=True)
    assert region.box[1] == 2


@pytest.mark.parametrize(
    ("flags", "is_crowd", "is_difficult"),
    [
        ({"iscrowd": 0, "ignore": 0}, False, False),
        ({"iscrowd": 1}, True, False),
        ({"iscrowd": True, "ignore": False}, True, False),
        ({"iscrowd": 1.0, "ignore": 0.0}, True, False),
        ({"iscrowd": None, "ignore": None}, False, False),
        ({"ignore": 1}, False, True),
        ({"ignore": True, "iscrowd": False}, False, True),
    ],
    ids=str,
)
def test_flags(tmp_path: Path, flags: dict[str, Any], is_crowd: bool, is_difficult: bool) -> None:
    file = with_annotations({"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4], **flags})
    [region] = records(tmp_path, file)["7"].regions
    assert (region.is_crowd, region.is_difficult) == (is_crowd, is_difficult)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        pytest.param({}, (None, None), id="missing"),
        pytest.param({"width": None, "height": 0}, (None, None), id="null and zero"),
        pytest.param({"width": -1, "height": 0.5}, (None, None), id="negative, and less than a pixel"),
        pytest.param({"width": float("nan"), "height": float("inf")}, (None, None), id="NaN and infinity"),
        pytest.param({"width": 640.0, "height": 480}, (640, 480), id="float"),
    ],
)
def test_declared_size(tmp_path: Path, more: dict[str, Any], expected: tuple[int | None, int | None]) -> None:
    [image] = records(tmp_path, {**FILE, "images": [{"id": 9, "file_name": "a.jpg", **more}]})["9"].images
    assert (image.declared_width, image.declared_height) == expected


@pytest.mark.parametrize("name", ["train/a.jpg", "s3://bucket/a.jpg", "/data/a.jpg", "été/照片 😀.jpg", "x" * 3000 + ".jpg"])
def test_file_names_are_passed_on(tmp_path: Path, name: str) -> None:
    [image] = records(tmp_path, {**FILE, "images": [{"id": 9, "file_name": name}]})["9"].images
    assert image.path == name


def test_names_of_categories(tmp_path: Path) -> None:
    categories = [
        {"id": 90, "name": "  歯ブラシ 🪥 "},
        {"id": "1", "name": "person"},
        {"id": 2, "name": "person"},
        {"id": 1, "name": "person"},
    ]
    file = {**with_annotations({"id": 3, "image_id": 9, "category_id": "2", "bbox": [0, 0, 1, 1]}), "categories": categories}
    record = records(tmp_path, file)["9"]
    assert [region.label for region in record.regions] == ["歯ブラシ 🪥", "person", "person"]
    assert record.vocabulary == ("person", "歯ブラシ 🪥")


@pytest.mark.parametrize(("exhaustive", "vocabulary"), [(None, VOCABULARY), (True, VOCABULARY), (False, ())])
def test_vocabulary(tmp_path: Path, exhaustive: bool | None, vocabulary: tuple[str, ...]) -> None:
    assert {record.vocabulary for record in records(tmp_path, FILE, exhaustive=exhaustive).values()} == {vocabulary}


def test_no_annotations_at_all_are_images_without_objects(tmp_path: Path) -> None:
    found = records(tmp_path, {**FILE, "annotations": []}, exhaustive=True)
    assert [(record.regions, record.vocabulary) for record in found.values()] == [((), VOCABULARY)] * 2


def test_a_category_that_is_never_annotated_is_not_taught_as_absent_unless_the_user_says_so(tmp_path: Path) -> None:
    # Roboflow puts a heading first among the categories: every image shows cells, and none has a box of that name.
    file = {**FILE, "categories": [{"id": 0, "name": "cells"}, *FILE["categories"]]}
    plan, items = load(tmp_path, file)
    assert {item.vocabulary for item in items if isinstance(item, Record)} == {VOCABULARY}
    assert [note for note in plan.notes if "'cells'" in note and "exhaustive: true" in note]
    plan, items = load(tmp_path, file, exhaustive=True)
    assert {item.vocabulary for item in items if isinstance(item, Record)} == {("cells", *VOCABULARY)}
    assert plan.notes == ()


# What cannot be used


def test_an_unknown_category_is_rejected_alone(tmp_path: Path) -> None:
    wrong = {"id": 3, "image_id": 9, "category_id": 2, "bbox": [0, 0, 1, 1]}
    _, [rejected, first, _] = load(tmp_path, with_annotations(wrong))
    assert rejected == Rejected(
        "unknown_category",
        "instances.json, annotation 3, image 9",
        "found category_id 2, expected one of the 2 in the file (90, 1)",
        "annotation 3",
    )
    assert isinstance(first, Record)
    assert len(first.regions) == 2
    assert first.vocabulary == VOCABULARY


@pytest.mark.parametrize("box", [[1, 2, 3], None, ["1", "2", "3", "4"]], ids=str)
def test_a_label_with_a_broken_box_is_neither_exhaustive_nor_absent_in_its_image(tmp_path: Path, box: object) -> None:
    """The box is gone, but the object is there: to teach that there is none would be a lie."""
    wrong = {"segmentation": [[0.5] * 2000], "image_id": 7, "bbox": box, "category_id": 1, "id": 3}
    plan, [first, second] = load(tmp_path, with_annotations(wrong))
    [rejected] = plan.rejected
    assert rejected.reason == "broken_annotation"
    assert rejected.position == f"instances.json, byte {json.dumps(with_annotations(wrong)).index(json.dumps(wrong))}"
    assert isinstance(first, Record)
    assert isinstance(second, Record)
    assert (first.not_exhaustive, first.vocabulary) == ((), VOCABULARY)
    assert (second.not_exhaustive, second.vocabulary) == (("person",), ("toothbrush",))
    assert second.regions == ()


@pytest.mark.parametrize(
    ("category", "not_exhaustive", "vocabulary"),
    [
        pytest.param(None, ("toothbrush", "person"), (), id="unreadable: it may be any"),
        pytest.param(404, (), VOCABULARY, id="unknown: it is none of them"),
    ],
)
def test_a_broken_box_without_a_label(
    tmp_path: Path, category: object, not_exhaustive: tuple[str, ...], vocabulary: tuple[str, ...]
) -> None:
    plan, items = load(tmp_path, with_annotations({"image_id": 7, "category_id": category, "bbox": None}))
    assert [item.reason for item in plan.rejected] == ["broken_annotation"]
    assert len(items) == 2
    assert isinstance(items[1], Record)
    assert (items[1].not_exhaustive, items[1].vocabulary) == (not_exhaustive, vocabulary)


def test_a_broken_box_without_an_image_leaves_no_label_absent_anywhere(tmp_path: Path) -> None:
    plan, items = load(tmp_path, with_annotations({"category_id": 1, "bbox": [0, 0, 1, 1]}), exhaustive=True)
    assert [item.reason for item in plan.rejected] == ["broken_annotation"]
    assert [item.vocabulary for item in items if isinstance(item, Record)] == [(), ()]
    assert "no category is taken as absent" in plan.notes[0]


def test_duplicate_and_nameless_images_are_rejected_alone(tmp_path: Path) -> None:
    file = {**FILE, "images": [*FILE["images"], {"id": "9", "file_name": "again.jpg"}, {"id": 5, "file_name": ""}]}
    plan, items = load(tmp_path, file, per_unit=2)
    assert [(item.reason, item.record_id) for item in items if isinstance(item, Rejected)] == [("duplicate_id", "9"), ("no_file_name", "5")]
    assert [(item.record_id, len(item.regions)) for item in items if isinstance(item, Record)] == [("9", 2), ("7", 0)]
    assert plan.num_records == 4


def test_an_annotation_of_an_unknown_image_belongs_to_no_unit(tmp_path: Path) -> None:
    plan, items = load(tmp_path, with_annotations({"id": 3, "image_id": 404, "category_id": 1, "bbox": [0, 0, 1, 1]}))
    assert [(item.reason, item.record_id) for item in plan.rejected] == [("unknown_image", "annotation 3")]
    assert all(isinstance(item, Record) for item in items)
    assert plan.num_records == 3


# Captions, and the real file


def test_captions_stand_in_the_same_record(tmp_path: Path) -> None:
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"annotations": [{"image_id": 7, "caption": "Nothing."}, {"image_id": 7, "caption": "Ein Bild."}]}))
    found = records(tmp_path, FILE, captions=str(captions))
    assert [(key, record.captions, len(record.regions)) for key, record in found.items()] == [
        ("9", (), 2),
        ("7", ("Nothing.", "Ein Bild."), 0),
    ]


@pytest.mark.skipif(not COCO_MINI.is_dir(), reason=f"the real photographs of COCO are not at {COCO_MINI}")
@pytest.mark.parametrize("per_unit", [7, 1000])
def test_real_photographs(tmp_path: Path, per_unit: int) -> None:
    plan, items = load_path(tmp_path, COCO_MINI / "instances.json", per_unit, captions=str(COCO_MINI / "captions.json"))
    found = [item for item in items if isinstance(item, Record)]
    regions = [region for record in found for region in record.regions]
    assert (len(items), len(found), plan.num_records) == (80, 80, 80)
    assert (len(regions), sum(region.is_crowd for region in regions)) == (739, 8)
    assert sum(len(record.captions) for record in found) == 400
    assert (plan.rejected, plan.notes) == ((), ())
    assert len(plan.units) == -(-80 // per_unit)
    assert {len(record.vocabulary) for record in found} == {80}
    for record in found:
        [image] = record.images
        assert (COCO_MINI / "images" / image.path).is_file()
        assert image.declared_width is not None
        assert all(region.box[2] <= image.declared_width + 0.01 for region in record.regions)
