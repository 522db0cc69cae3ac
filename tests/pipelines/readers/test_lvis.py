import json
from pathlib import Path
from typing import Any

import pytest

from boxcar.pipelines.readers.lvis import LvisReader
from boxcar.pipelines.readers.reader import Reader, SourcePlan
from boxcar.schemas.record import ImageRef, Record, Region, Rejected
from boxcar.schemas.workflow import SourceConfig

File = dict[str, Any]

CATEGORIES = [
    {"id": 1, "name": "aerosol_can", "synset": "aerosol.n.02", "frequency": "c"},
    {"id": 12, "name": "crab_(animal)", "frequency": "f"},
    {"id": 1203, "name": "zucchini"},
    {"id": 7, "name": "stop_sign"},
]


def lvis(*images: File, annotations: tuple[File, ...] = ()) -> File:
    return {"info": {}, "images": list(images), "annotations": list(annotations), "categories": CATEGORIES}


def image(number: int = 9, **more: object) -> File:
    """An image as lvis_v1_train.json holds it: no file_name."""
    return {
        "id": number,
        "coco_url": f"http://images.cocodataset.org/train2017/{number:012}.jpg",
        "width": 640,
        "height": 480,
        "neg_category_ids": [],
        "not_exhaustive_category_ids": [],
        **more,
    }


def box(number: int, category: Any, image: int = 9, **more: object) -> File:
    return {"id": number, "area": 1.5, "segmentation": [[1, 2]], "image_id": image, "bbox": [1, 2, 3, 4], "category_id": category, **more}


def load(tmp_path: Path, file: File, **settings: Any) -> tuple[SourcePlan, list[Record | Rejected]]:
    path = tmp_path / "lvis_v1_val.json"
    path.write_text(json.dumps(file))
    reader: Reader = LvisReader()
    config = SourceConfig.model_validate({"reader": "lvis", "annotations": str(path), **settings})
    plan = reader.plan(config, tmp_path / "work", 2)
    return plan, [item for unit in plan.units for item in reader.read(config, unit)]


def one(tmp_path: Path, file: File, **settings: Any) -> Record:
    _, [record] = load(tmp_path, file, **settings)
    assert isinstance(record, Record), record
    return record


def test_an_image_becomes_a_record(tmp_path: Path) -> None:
    file = lvis(image(neg_category_ids=[1203, 7], not_exhaustive_category_ids=[12]), annotations=(box(1, 12), box(2, 1)))
    assert one(tmp_path, file, split="val") == Record(
        record_id="9",
        position="lvis_v1_val.json, image 9",
        images=(ImageRef("train2017/000000000009.jpg", 640, 480),),
        regions=(
            Region((1, 2, 4, 6), "crab (animal)", region_id="annotation 1"),
            Region((1, 2, 4, 6), "aerosol can", region_id="annotation 2"),
        ),
        absent=("zucchini", "stop sign"),
        not_exhaustive=("crab (animal)",),
        split="val",
    )


@pytest.mark.parametrize(
    ("more", "path"),
    [
        pytest.param({}, "train2017/000000000009.jpg", id="the folder and the name: LVIS val holds images of train2017"),
        pytest.param({"coco_url": "https://h/a/b/val2017/1.jpg"}, "val2017/1.jpg", id="another folder"),
        pytest.param({"file_name": "COCO_val2014_000000000009.jpg"}, "COCO_val2014_000000000009.jpg", id="LVIS 0.5 has names"),
    ],
)
def test_file_names(tmp_path: Path, more: File, path: str) -> None:
    assert one(tmp_path, lvis(image(**more))).images[0].path == path


def test_an_image_without_a_name_is_rejected(tmp_path: Path) -> None:
    _, [rejected] = load(tmp_path, lvis(image(coco_url="")))
    assert isinstance(rejected, Rejected)
    assert rejected.reason == "no_file_name"
    assert "neither file_name nor coco_url" in rejected.detail


def test_only_what_was_checked_is_absent(tmp_path: Path) -> None:
    """Of 1,203 categories an image was searched for a few: the others may be there without a box."""
    _, items = load(tmp_path, lvis(image(1, neg_category_ids=[7]), image(2), image(3, neg_category_ids=[1, 12])))
    found = [item for item in items if isinstance(item, Record)]
    assert [record.absent for record in found] == [("stop sign",), (), ("aerosol can", "crab (animal)")]
    assert {record.vocabulary for record in found} == {()}


def test_ids_of_no_category_and_ids_in_text(tmp_path: Path) -> None:
    record = one(tmp_path, lvis(image(neg_category_ids=["7", 404], not_exhaustive_category_ids=[404, "1"]), annotations=(box(1, "1203"),)))
    assert record.absent == ("stop sign",)
    assert record.not_exhaustive == ("aerosol can",)
    assert [region.label for region in record.regions] == ["zucchini"]


def test_a_broken_box_makes_its_label_neither_exhaustive_nor_absent(tmp_path: Path) -> None:
    file = lvis(image(neg_category_ids=[7, 12]), annotations=(box(1, 7, bbox=None), box(2, 1203, bbox=[1, 2, 3])))
    plan, [record] = load(tmp_path, file)
    assert [item.reason for item in plan.rejected] == ["broken_annotation"] * 2
    assert isinstance(record, Record)
    assert record.absent == ("crab (animal)",)
    assert record.not_exhaustive == ("zucchini", "stop sign")


def test_an_unknown_category_is_rejected_alone(tmp_path: Path) -> None:
    _, [rejected, record] = load(tmp_path, lvis(image(), annotations=(box(1, 404), box(2, 7))))
    assert isinstance(rejected, Rejected)
    assert (rejected.reason, rejected.record_id) == ("unknown_category", "annotation 1")
    assert isinstance(record, Record)
    assert [region.label for region in record.regions] == ["stop sign"]


def test_captions_of_coco_join(tmp_path: Path) -> None:
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"annotations": [{"image_id": 9, "id": 1, "caption": "A crab."}]}))
    assert one(tmp_path, lvis(image()), captions=str(captions)).captions == ("A crab.",)


def test_units(tmp_path: Path) -> None:
    plan, items = load(tmp_path, lvis(*(image(number) for number in range(5)), annotations=(box(1, 7, image=4), box(2, 7, image=0))))
    assert [(unit.start, unit.stop) for unit in plan.units] == [(0, 2), (2, 4), (4, 5)]
    assert [len(item.regions) for item in items if isinstance(item, Record)] == [1, 0, 0, 0, 1]
