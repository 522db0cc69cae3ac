import json
from pathlib import Path
from typing import Any

import pytest

from boxcar.pipelines.readers.coco_captions import CocoCaptionsReader
from boxcar.pipelines.readers.reader import Reader, SourcePlan
from boxcar.schemas.errors import AnnotationError
from boxcar.schemas.record import ImageRef, Record, Rejected
from boxcar.schemas.workflow import SourceConfig
from tests.places import SHARED

COCO_MINI = SHARED / "data/coco_mini"

IMAGES = [{"id": 9, "file_name": "a.jpg", "width": 640, "height": 480}, {"id": "x", "file_name": "b.jpg"}]


def caption(image: object, text: object) -> dict[str, object]:
    return {"image_id": image, "id": 1, "caption": text}


def load(tmp_path: Path, path: Path, per_unit: int = 1000, **settings: Any) -> tuple[SourcePlan, list[Record | Rejected]]:
    reader: Reader = CocoCaptionsReader()
    config = SourceConfig.model_validate({"reader": "coco_captions", "annotations": str(path), **settings})
    plan = reader.plan(config, tmp_path / "work", per_unit)
    return plan, [item for unit in plan.units for item in reader.read(config, unit)]


def write(tmp_path: Path, *captions: object, **more: object) -> Path:
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"info": {}, "images": IMAGES, "annotations": captions, **more}))
    return path


@pytest.mark.parametrize("order", [("images", "annotations"), ("annotations", "images")], ids=" ".join)
def test_captions_join_by_image_in_their_order(tmp_path: Path, order: tuple[str, ...]) -> None:
    content = {"images": IMAGES, "annotations": [caption("x", "One."), caption("9", "Two dogs"), caption(9, "两只狗 🐶\n")]}
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({key: content[key] for key in order}))
    plan, items = load(tmp_path, path, split="val", language="zh")
    assert items == [
        Record(
            record_id="9",
            position="captions.json, image 9",
            images=(ImageRef("a.jpg", 640, 480),),
            captions=("Two dogs", "两只狗 🐶\n"),
            language="zh",
            split="val",
        ),
        Record(
            record_id="x", position="captions.json, image x", images=(ImageRef("b.jpg"),), captions=("One.",), language="zh", split="val"
        ),
    ]
    assert (plan.num_records, plan.rejected, plan.notes) == (2, (), ())


def test_captions_of_unknown_images_are_noted(tmp_path: Path) -> None:
    plan, items = load(tmp_path, write(tmp_path, caption(9, "One."), caption(404, "?"), caption(405, "?")))
    assert plan.notes == ("2 captions belong to images that are not among the images",)
    assert [item.captions for item in items if isinstance(item, Record)] == [("One.",), ()]


@pytest.mark.parametrize("wrong", [caption(9, None), caption(9, 7), caption(9, ["a"]), {"image_id": 9}, {"caption": "a"}, "a"], ids=str)
def test_a_caption_that_cannot_be_read_is_rejected_alone(tmp_path: Path, wrong: object) -> None:
    plan, items = load(tmp_path, write(tmp_path, caption(9, "One."), wrong, caption(9, "Two.")))
    [rejected] = plan.rejected
    assert rejected.reason == "broken_annotation"
    assert rejected.position == f"captions.json, byte {(tmp_path / 'captions.json').read_text().index(json.dumps(wrong))}"
    assert [item.captions for item in items if isinstance(item, Record)] == [("One.", "Two."), ()]


def test_a_caption_says_nothing_about_what_is_absent(tmp_path: Path) -> None:
    _, items = load(tmp_path, write(tmp_path, caption(9, "One."), "broken", categories=[{"id": 1, "name": "cat"}]))
    assert [(item.vocabulary, item.absent, item.regions) for item in items if isinstance(item, Record)] == [((), (), ())] * 2


def test_duplicate_and_nameless_images_are_rejected_alone(tmp_path: Path) -> None:
    path = write(tmp_path, caption(9, "One."), images=[*IMAGES, {"id": 9, "file_name": "again.jpg"}, {"id": 5}])
    _, items = load(tmp_path, path, per_unit=1)
    assert [(item.reason, item.record_id) for item in items if isinstance(item, Rejected)] == [("duplicate_id", "9"), ("no_file_name", "5")]
    assert [item.captions for item in items if isinstance(item, Record)] == [("One.",), ()]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        pytest.param({"images": []}, 'found an empty list "images"', id="no images"),
        pytest.param({"annotations": None}, "found the key 'annotations' without a list", id="no captions"),
    ],
)
def test_a_file_that_cannot_be_read_as_a_whole(tmp_path: Path, more: dict[str, object], message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        load(tmp_path, write(tmp_path, caption(9, "One."), **more))


def test_a_file_without_images_is_for_another_reader(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"annotations": [caption(9, "One.")]}))
    with pytest.raises(AnnotationError, match="found no key 'images', expected a COCO file with images, annotations"):
        load(tmp_path, path)


@pytest.mark.skipif(not COCO_MINI.is_dir(), reason=f"the real captions of COCO are not at {COCO_MINI}")
@pytest.mark.parametrize("per_unit", [7, 1000])
def test_real_captions(tmp_path: Path, per_unit: int) -> None:
    plan, items = load(tmp_path, COCO_MINI / "captions.json", per_unit)
    found = [item for item in items if isinstance(item, Record)]
    assert (len(items), len(found)) == (80, 80)
    assert [len(record.captions) for record in found] == [5] * 80
    assert (plan.rejected, plan.notes) == ((), ())
    assert all((COCO_MINI / "images" / record.images[0].path).is_file() for record in found)
