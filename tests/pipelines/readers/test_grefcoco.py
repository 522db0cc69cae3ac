import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from boxcar.pipelines.readers.grefcoco import GrefcocoReader
from boxcar.pipelines.readers.reader import Reader, SourcePlan
from boxcar.schemas.errors import AnnotationError
from boxcar.schemas.record import ImageRef, Record, Region, Rejected
from boxcar.schemas.workflow import SourceConfig

Ref = dict[str, Any]

INSTANCES = {
    "images": [{"id": 9, "file_name": "COCO_train2014_000000000009.jpg", "height": 480, "width": 640}],
    "annotations": [
        {"id": 90, "image_id": 9, "bbox": [10, 20, 30, 40], "category_id": 1, "iscrowd": 0},
        {"id": 91, "image_id": 9, "bbox": [50, 20, 30, 40], "category_id": 1, "iscrowd": 0},
        {"id": 92, "image_id": 9, "bbox": [0, 0, 5, 5], "category_id": 18, "iscrowd": 1},
    ],
    "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
}


def ref(number: int, targets: Any, *sentences: str, split: str = "train", **more: Any) -> Ref:
    """A ref as grefs(unc).json holds it."""
    is_none = targets in ([-1], -1)
    return {
        "ann_id": targets,
        "category_id": [-1] if is_none else [1],
        "file_name": "COCO_train2014_000000000009_16.jpg",
        "image_id": 9,
        "no_target": is_none,
        "ref_id": number,
        "sent_ids": [number],
        "sentences": [{"raw": text, "sent": text, "sent_id": 1, "tokens": text.split()} for text in sentences],
        "split": split,
        **more,
    }


def load(tmp_path: Path, *refs: Ref, write: Any = json.dumps, **settings: Any) -> tuple[SourcePlan, list[Record | Rejected]]:
    path = tmp_path / "grefs(unc).json"
    content = write(refs)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "instances.json").write_text(json.dumps(INSTANCES))
    reader: Reader = GrefcocoReader()
    config = SourceConfig.model_validate(
        {"reader": "grefcoco", "annotations": str(path), "instances": str(tmp_path / "instances.json"), **settings}
    )
    plan = reader.plan(config, tmp_path / "work", 1000)
    return plan, [item for unit in plan.units for item in reader.read(config, unit)]


def one(tmp_path: Path, *refs: Ref, **settings: Any) -> Record:
    plan, [record] = load(tmp_path, *refs, **settings)
    assert plan.rejected == ()
    assert isinstance(record, Record), record
    return record


def phrases(record: Record) -> dict[str, tuple[str, ...]]:
    return {region.region_id: region.phrases for region in record.regions}


@pytest.mark.parametrize("write", [json.dumps, pickle.dumps], ids=["json", "pickle"])
def test_one_several_and_no_targets(tmp_path: Path, write: Any) -> None:
    refs = [ref(1, [90], "left man"), ref(2, [91, 90], "both men", "the two"), ref(3, [-1], "the zebra", "a giraffe")]
    assert one(tmp_path, *refs, write=write) == Record(
        record_id="9",
        position="grefs(unc).json, image 9",
        images=(ImageRef("COCO_train2014_000000000009.jpg", 640, 480),),
        regions=(
            Region((10, 20, 40, 60), "person", ("left man", "both men", "the two"), region_id="annotation 90"),
            Region((50, 20, 80, 60), "person", ("both men", "the two"), region_id="annotation 91"),
        ),
        absent=("the zebra", "a giraffe"),
        not_exhaustive=("person",),
        split="train",
    )


@pytest.mark.parametrize(
    ("targets", "regions", "absent"),
    [
        pytest.param(90, {"annotation 90": ("x",)}, (), id="a number"),
        pytest.param([90, 90], {"annotation 90": ("x",)}, (), id="the same twice"),
        pytest.param(["90", 91], {"annotation 90": ("x",), "annotation 91": ("x",)}, (), id="text and number"),
        pytest.param([92, 90], {"annotation 92": ("x",), "annotation 90": ("x",)}, (), id="with a crowd, which a later rule judges"),
        pytest.param([-1], {}, ("x",), id="none"),
        pytest.param(-1, {}, ("x",), id="none, a number"),
        pytest.param(["-1"], {}, ("x",), id="none, text"),
    ],
)
def test_targets(tmp_path: Path, targets: Any, regions: dict[str, tuple[str, ...]], absent: tuple[str, ...]) -> None:
    record = one(tmp_path, ref(1, targets, "x", no_target=None))
    assert phrases(record) == regions
    assert record.absent == absent


def test_an_image_of_absent_things_alone_is_a_record(tmp_path: Path) -> None:
    record = one(tmp_path, ref(1, [-1], "the zebra"))
    assert record.regions == ()
    assert record.not_exhaustive == ()
    assert record.images == (ImageRef("COCO_train2014_000000000009.jpg", 640, 480),)


@pytest.mark.parametrize(
    ("wrong", "reason", "detail"),
    [
        pytest.param(ref(5, [91, -1], "x"), "broken_ref", "found ann_id [91, -1], expected", id="none among real ones"),
        pytest.param(ref(5, [], "x"), "broken_ref", "found ann_id [], expected", id="an empty list"),
        pytest.param(
            ref(5, [91], "x", no_target=True), "broken_ref", "found no_target: true with ann_id [91]", id="no_target with targets"
        ),
        pytest.param(ref(5, [-1], "x", no_target=False), "broken_ref", "found no_target: false", id="no_target false without targets"),
        pytest.param(ref(5, [91, 404], "x"), "unknown_annotation", "found ann_id 404", id="one of two unknown: no part of the answer"),
        pytest.param(ref(5, [-1], "x", image_id=404), "unknown_image", "found image_id 404", id="no target in an unknown image"),
    ],
)
def test_a_ref_that_cannot_be_understood_is_rejected_whole_and_alone(tmp_path: Path, wrong: Ref, reason: str, detail: str) -> None:
    plan, [record] = load(tmp_path, ref(1, [90], "left man"), wrong)
    [rejected] = plan.rejected
    assert (rejected.reason, rejected.record_id) == (reason, "ref 5")
    assert detail in rejected.detail
    assert isinstance(record, Record)
    assert phrases(record) == {"annotation 90": ("left man",)}
    assert record.absent == ()


@pytest.mark.parametrize(
    ("first", "second", "detail"),
    [
        pytest.param([90], [91], "annotation 90 by ref 1, annotation 91 by ref 2", id="other objects"),
        pytest.param([90], [90, 91], "annotation 90 by ref 1, annotation 90 and annotation 91 by ref 2", id="one, and one more"),
        pytest.param([-1], [90], "nothing by ref 1, annotation 90 by ref 2", id="absent and present"),
    ],
)
def test_a_phrase_of_two_meanings_is_taken_off_both(tmp_path: Path, first: Any, second: Any, detail: str) -> None:
    _, [rejected, record] = load(tmp_path, ref(1, first, "man", "one"), ref(2, second, "MAN", "two"))
    assert isinstance(rejected, Rejected)
    assert rejected.reason == "ambiguous_phrase"
    assert detail in rejected.detail
    assert isinstance(record, Record)
    assert {phrase for region in record.regions for phrase in region.phrases} | set(record.absent) == {"one", "two"}


def test_the_same_targets_in_another_order_are_one_meaning(tmp_path: Path) -> None:
    record = one(tmp_path, ref(1, [90, 91], "both"), ref(2, [91, 90], "both"), ref(3, -1, "cat"), ref(4, [-1], "cat"))
    assert phrases(record) == {"annotation 90": ("both",), "annotation 91": ("both",)}
    assert record.absent == ("cat",)


def test_refs_without_sentences_are_left_out(tmp_path: Path) -> None:
    plan, [record] = load(tmp_path, ref(1, [90]), ref(2, [91], "man"), ref(3, [-1]))
    assert isinstance(record, Record)
    assert phrases(record) == {"annotation 91": ("man",)}
    assert plan.notes == ("2 refs without a sentence are left out",)


def test_split(tmp_path: Path) -> None:
    refs = [ref(1, [90], "left man"), ref(2, [-1], "the zebra", split="val")]
    record = one(tmp_path, *refs, split="val")
    assert (record.split, record.absent, record.regions) == ("val", ("the zebra",), ())
    with pytest.raises(AnnotationError, match=r"found no split 'testA', expected one of train \(1 refs\), val \(1 refs\)"):
        load(tmp_path, *refs, split="testA")


def test_a_broken_ref_is_named_by_its_byte(tmp_path: Path) -> None:
    plan, _ = load(tmp_path, ref(1, [90], "left man"), {"ann_id": [90]})
    first = len(json.dumps([ref(1, [90], "left man")])) - 1
    assert [item.position for item in plan.rejected] == [f"grefs(unc).json, byte {first + 2}"]


def test_mdetrs_file_is_another_format(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="found an object at the top, expected a list of refs"):
        load(tmp_path, write=lambda refs: json.dumps({"images": [], "annotations": [{"bbox": [0, 0, 0, 0], "empty": True}]}))
