"""Refs as RefCOCO's makers publish them: pickles of Python 2, boxes in a COCO file beside them."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from boxcar.pipelines.readers.reader import Reader, SourcePlan
from boxcar.pipelines.readers.refcoco import RefcocoReader
from boxcar.schemas.errors import AnnotationError
from boxcar.schemas.record import PIXELS, ImageRef, Record, Region, Rejected
from boxcar.schemas.workflow import SourceConfig

Ref = dict[str, Any]

INSTANCES: dict[str, Any] = {
    "info": {"description": "a tiny RefCOCO"},
    "images": [
        {"license": 1, "file_name": "COCO_train2014_000000000009.jpg", "height": 480, "width": 640, "id": 9},
        {"license": 1, "file_name": "COCO_train2014_000000000007.jpg", "height": 100, "width": 200, "id": 7},
        {"license": 1, "file_name": "nobody_refers_to_this.jpg", "height": 1, "width": 1, "id": 8},
    ],
    "annotations": [
        {
            "segmentation": [[1, 2, 3, 4, 5, 6]],
            "area": 5.5,
            "iscrowd": 0,
            "image_id": 9,
            "bbox": [10, 20, 30, 40],
            "category_id": 1,
            "id": 90,
        },
        {"segmentation": [[1, 2]], "area": 5.5, "iscrowd": 0, "image_id": 9, "bbox": [50.5, 20, 30, 40], "category_id": 1, "id": 91},
        {"segmentation": {"counts": [1], "size": [4, 4]}, "iscrowd": 1, "image_id": 9, "bbox": [0, 0, 9, 9], "category_id": 18, "id": 92},
        {"segmentation": [], "area": 5.5, "iscrowd": 0, "image_id": 7, "bbox": [1, 2, 3, 4], "category_id": 18, "id": 70},
        {"segmentation": [], "area": 5.5, "iscrowd": 0, "image_id": 7, "bbox": [5, 2, 3, 4], "category_id": 99, "id": 71},
        {"segmentation": [[7.25] * 900], "iscrowd": 0, "image_id": 7, "bbox": [5, 2, 3], "category_id": 1, "id": 72},
    ],
    "categories": [{"supercategory": "person", "id": 1, "name": "person"}, {"supercategory": "animal", "id": 18, "name": "dog"}],
}


def ref(number: int, annotation: Any, image: Any, *sentences: str, split: str = "train", **more: Any) -> Ref:
    """A ref as refs(unc).p holds it."""
    return {
        "sent_ids": list(range(len(sentences))),
        "file_name": f"COCO_train2014_{number}_16.jpg",
        "ann_id": annotation,
        "ref_id": number,
        "image_id": image,
        "split": split,
        "sentences": [{"tokens": text.split(), "raw": f"{text}.", "sent_id": 0, "sent": text} for text in sentences],
        "category_id": 1,
        **more,
    }


def load(tmp_path: Path, refs: object, boxes: object = INSTANCES, per_unit: int = 1000, **settings: Any) -> tuple[SourcePlan, list[Any]]:
    """The plan, and what its units yield. Refs: a list, written as a pickle, or the content of a file."""
    path = tmp_path / "refs(unc).p"
    path.write_bytes(refs if isinstance(refs, bytes) else pickle.dumps(refs, protocol=2))
    (tmp_path / "instances.json").write_text(json.dumps(boxes))
    reader: Reader = RefcocoReader()
    config = SourceConfig.model_validate(
        {"reader": "refcoco", "annotations": str(path), "instances": str(tmp_path / "instances.json"), **settings}
    )
    plan = reader.plan(config, tmp_path / "work", per_unit)
    return plan, [item for unit in plan.units for item in reader.read(config, unit)]


def one(tmp_path: Path, *refs: Ref, **more: Any) -> Record:
    plan, [record] = load(tmp_path, list(refs), **more)
    assert plan.rejected == ()
    assert isinstance(record, Record), record
    return record


def phrases(record: Record) -> dict[str, tuple[str, ...]]:
    return {region.region_id: region.phrases for region in record.regions}


def test_an_image_with_its_refs_becomes_a_record(tmp_path: Path) -> None:
    refs = [
        ref(1, 91, 9, "right man", "man with hat"),
        ref(2, 70, 7, "the dog", split="val"),
        ref(3, 90, 9, "left man"),
    ]
    plan, records = load(tmp_path, refs, language="zh")
    assert records == [
        Record(
            record_id="9",
            position="refs(unc).p, image 9",
            images=(ImageRef("COCO_train2014_000000000009.jpg", 640, 480),),
            regions=(
                Region((50.5, 20, 80.5, 60), "person", ("right man", "man with hat"), region_id="annotation 91"),
                Region((10, 20, 40, 60), "person", ("left man",), region_id="annotation 90"),
            ),
            not_exhaustive=("person",),
            box_space=PIXELS,
            language="zh",
            split="train",
        ),
        Record(
            record_id="7",
            position="refs(unc).p, image 7",
            images=(ImageRef("COCO_train2014_000000000007.jpg", 200, 100),),
            regions=(Region((1, 2, 4, 6), "dog", ("the dog",), region_id="annotation 70"),),
            not_exhaustive=("dog",),
            language="zh",
            split="val",
        ),
    ]
    assert plan.num_records == 2
    assert plan.rejected == ()


def test_only_keys_that_mean_something_are_used() -> None:
    assert RefcocoReader.uses >= {"instances", "split", "annotations"}
    assert not RefcocoReader.uses & {"captions", "exhaustive", "classes", "voc_origin"}


# Pickles


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_gives_what_json_gives(tmp_path: Path, protocol: int) -> None:
    refs = [ref(1, 91, 9, "right man", "der Mann in Weiß"), ref(2, 70, 7, "狗 🐶")]
    by_json, expected = load(tmp_path, json.dumps(refs).encode())
    assert len(expected) == 2
    assert load(tmp_path, json.dumps(refs, indent=2, ensure_ascii=False).encode())[1] == expected
    plan, records = load(tmp_path, pickle.dumps(refs, protocol=protocol))
    assert records == expected
    assert plan.fingerprint != by_json.fingerprint


def python2(value: object, encoding: str) -> bytes:
    """What Python 2's pickle wrote for plain data, protocol 0: byte strings as 'S', numbers as 'I' and 'L'."""
    if isinstance(value, dict):
        return b"(d" + b"".join(python2(key, encoding) + python2(inner, encoding) + b"s" for key, inner in value.items())
    if isinstance(value, list):
        return b"(l" + b"".join(python2(inner, encoding) + b"a" for inner in value)
    if isinstance(value, str):
        return b"S" + repr(value.encode(encoding))[1:].encode() + b"\n"
    return f"L{value}L\n".encode() if int(str(value)) > 9 else f"I{value}\n".encode()


@pytest.mark.parametrize("encoding", ["utf-8", "latin1"])
def test_byte_strings_of_python_2_become_text(tmp_path: Path, encoding: str) -> None:
    refs = [ref(1, 91, 9, "right man", 'café\'s "left" \\ side'), ref(2, 70, 7, "dog")]
    assert load(tmp_path, python2(refs, encoding) + b".")[1] == load(tmp_path, refs)[1]


def test_short_byte_strings_of_python_2_protocol_2(tmp_path: Path) -> None:
    def short(text: str) -> bytes:
        return b"U" + bytes([len(text)]) + text.encode()

    sentence = b"}(" + short("sent") + short("left man") + short("tokens") + b"]u"
    numbers = short("ref_id") + b"K\x01" + short("ann_id") + b"KZ" + short("image_id") + b"K\x09"
    row = numbers + short("split") + short("val") + short("sentences") + b"]" + sentence + b"a"
    [record] = load(tmp_path, b"\x80\x02]}(" + row + b"ua.", split="val")[1]
    assert phrases(record) == {"annotation 90": ("left man",)}


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_would_run_a_command_is_blocked(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "ran"
    refs = [ref(1, 91, 9, "right man"), ref(2, 70, 7, "dog", tokens=Payload(marker))]
    with pytest.raises(AnnotationError, match=rf"forbidden global {os.system.__module__}\.system, .* Nothing of it was run"):
        load(tmp_path, pickle.dumps(refs, protocol=protocol))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"cos\nsystem\n(S'touch ran'\ntR.", "forbidden global os.system", id="GLOBAL and REDUCE"),
        pytest.param(b"(S'touch ran'\nios\nsystem\n.", "forbidden global os.system", id="INST"),
        pytest.param(b"(c__builtin__\neval\nS'1'\no.", "forbidden global __builtin__.eval", id="OBJ, Python 2's name"),
        pytest.param(b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "forbidden global os.system", id="STACK_GLOBAL"),
        pytest.param(b"\x80\x02ccopy_reg\n_reconstructor\n.", "forbidden global copy_reg._reconstructor", id="an object of Python 2"),
        pytest.param(b"\x80\x03cnumpy.core.multiarray\nscalar\n.", "numpy.core.multiarray.scalar", id="a number of numpy"),
        pytest.param(b"\x80\x02\x82\x01.", "ValueError", id="EXT1"),
        pytest.param(b"Pname\n.", "UnpicklingError", id="a persistent id"),
        pytest.param(b"\x80\x05\x97.", "UnpicklingError", id="a buffer from outside"),
        pytest.param(b"\x80\x63].", "unsupported pickle protocol: 99", id="a protocol of the future"),
        pytest.param(b"\x80\x02](", "EOFError", id="cut off"),
        pytest.param(b"\x80\x02.", "UnpicklingError", id="nothing in it"),
        pytest.param(b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "neither JSON nor a whole pickle", id="a string of 8 exabytes"),
        pytest.param(b"S'text'\n(tR.", "TypeError", id="a text is called"),
        pytest.param(b"PK\x03\x04\x14\x00", r"b'PK\\x03\\x04", id="still zipped"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", "https://git", id="a pointer of git-lfs"),
        pytest.param(b"<!DOCTYPE html>", "DOCTYPE", id="a page about a download"),
        pytest.param(b"\x80\x02}.", "found a pickled dict, expected a list of refs", id="a dictionary"),
        pytest.param(b"\x80\x02K\x01.", "found a pickled int", id="a number"),
        pytest.param(b"\x80\x02].", "found an empty list", id="no refs"),
        pytest.param(b"[]", "found an empty list", id="no refs, JSON"),
        pytest.param(b"", "found an empty file", id="empty"),
        pytest.param(b" \n", "found an empty file", id="blank"),
        pytest.param(b'{"images": [], "annotations": []}', "found an object at the top", id="a COCO file"),
        pytest.param(b'[{"ref_id": 1', r"refs\(unc\)\.p, byte \d+: found the end of the file", id="JSON, cut off"),
        pytest.param(b'[1, "two"]', "found 2 refs, none that can be read .*byte 1: found Expected `object`, got `int`", id="no refs in it"),
    ],
)
def test_a_file_that_holds_no_refs_is_named_with_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AnnotationError, match=message):
        load(tmp_path, content)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_that_holds_itself_ends(tmp_path: Path) -> None:
    endless: list[Any] = []
    endless.append(endless)
    bomb: list[Any] = []
    for _ in range(60):
        bomb = [bomb, bomb]
    circular = ref(3, 90, 9, "man")
    circular["sentences"].append(circular)
    refs = [ref(1, 91, 9, "right man"), endless, ref(2, bomb, 9, "x"), circular, ref(4, 90, 9, sent=bomb, sentences=bomb)]
    plan, [record] = load(tmp_path, refs)
    assert phrases(record) == {"annotation 91": ("right man",), "annotation 90": ("man",)}
    assert [(item.reason, item.position) for item in plan.rejected] == [
        ("broken_ref", "refs(unc).p, element 1"),
        ("broken_ref", "refs(unc).p, element 2"),
        ("broken_ref", "refs(unc).p, element 4"),
    ]


# Splits


SPLITS = [
    ref(1, 91, 9, "right man", split="train"),
    ref(2, 90, 9, "left man", split="val"),
    ref(3, 70, 7, "dog", split="testA"),
    ref(4, 70, 7, "brown dog", split="testA"),
]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        pytest.param("train", {"9": ("train", {"annotation 91": ("right man",)})}, id="of a shared image, the refs of the split alone"),
        pytest.param("val", {"9": ("val", {"annotation 90": ("left man",)})}, id="the other half"),
        pytest.param("testA", {"7": ("testA", {"annotation 70": ("dog", "brown dog")})}, id="two refs of one object"),
        pytest.param(
            "",
            {
                "9": ("", {"annotation 91": ("right man",), "annotation 90": ("left man",)}),
                "7": ("testA", {"annotation 70": ("dog", "brown dog")}),
            },
            id="all: a record of one split says which",
        ),
    ],
)
def test_split(tmp_path: Path, split: str, expected: dict[str, tuple[str, object]]) -> None:
    _, records = load(tmp_path, SPLITS, split=split)
    assert {record.record_id: (record.split, phrases(record)) for record in records} == expected


@pytest.mark.parametrize("split", ["test", "Train"])
def test_an_unknown_split_lists_those_there_are(tmp_path: Path, split: str) -> None:
    with pytest.raises(
        AnnotationError, match=rf"found no split '{split}', expected one of train \(1 refs\), val \(1 refs\), testA \(2 refs\)"
    ):
        load(tmp_path, SPLITS, split=split)


def test_refs_without_split(tmp_path: Path) -> None:
    bare = ref(1, 91, 9, "right man")
    del bare["split"]
    assert one(tmp_path, bare).split == ""
    with pytest.raises(AnnotationError, match=r"expected one of without split \(1 refs\)"):
        load(tmp_path, [bare], split="train")


# Phrases


@pytest.mark.parametrize(
    ("sentences", "expected"),
    [
        pytest.param([{"sent": "left man", "raw": "Left man!"}], ("left man",), id="sent before raw"),
        pytest.param([{"raw": "Left man!"}], ("Left man!",), id="raw where there is no sent"),
        pytest.param([{"sent": " ", "raw": "man"}, {"sent": None, "raw": "he"}], ("man", "he"), id="raw where sent is blank or null"),
        pytest.param([{"sent": "man"}, {"sent": "a man"}, {"sent": "man"}], ("man", "a man"), id="the same twice"),
        pytest.param([{"sent": "Man  left\n"}, {"sent": "man left"}], ("Man left",), id="case and blanks make no other phrase"),
        pytest.param([{"sent": ""}, {}, {"sent": "he"}], ("he",), id="blank ones"),
        pytest.param([{"sent": "x" * 5000}], ("x" * 5000,), id="very long"),
    ],
)
def test_phrases_of_a_ref(tmp_path: Path, sentences: list[dict[str, Any]], expected: tuple[str, ...]) -> None:
    record = one(tmp_path, ref(1, 91, 9, sentences=sentences))
    assert phrases(record) == {"annotation 91": expected}


def test_a_ref_without_a_sentence_is_left_out_and_counted(tmp_path: Path) -> None:
    plan, [record] = load(tmp_path, [ref(1, 91, 9, "man"), ref(2, 90, 9), ref(3, 70, 7, sentences=[{"sent": " "}])])
    assert phrases(record) == {"annotation 91": ("man",)}
    assert "2 refs without a sentence are left out" in plan.notes
    assert plan.num_records == 1


def test_a_phrase_for_two_objects_of_an_image_is_taken_off_both(tmp_path: Path) -> None:
    refs = [ref(1, 91, 9, "man", "right man"), ref(2, 90, 9, "The left one", "Man"), ref(3, 70, 7, "man")]
    _, [rejected, both, other] = load(tmp_path, refs)
    assert rejected == Rejected(
        "ambiguous_phrase",
        "refs(unc).p, image 9",
        "found 'man' for annotation 91 by ref 1, annotation 90 by ref 2, expected one meaning in one image",
        "ref 1, ref 2",
    )
    assert phrases(both) == {"annotation 91": ("right man",), "annotation 90": ("The left one",)}
    assert phrases(other) == {"annotation 70": ("man",)}


def test_two_refs_of_one_object_may_share_a_phrase(tmp_path: Path) -> None:
    record = one(tmp_path, ref(1, 91, 9, "man"), ref(1, 91, 9, "man", "he"))
    assert phrases(record) == {"annotation 91": ("man", "he")}


def test_a_phrase_is_only_compared_within_the_wanted_split(tmp_path: Path) -> None:
    record = one(tmp_path, ref(1, 91, 9, "man", split="train"), ref(2, 90, 9, "man", split="val"), split="train")
    assert phrases(record) == {"annotation 91": ("man",)}


# The join


@pytest.mark.parametrize(
    ("wrong", "reason", "detail"),
    [
        pytest.param(ref(5, 404, 9, "x"), "unknown_annotation", "found ann_id 404, expected", id="unknown annotation"),
        pytest.param(ref(5, -1, 9, "x"), "unknown_annotation", "found ann_id -1, expected", id="no target is gRefCOCO's"),
        pytest.param(ref(5, 91, 404, "x"), "unknown_image", "found image_id 404, expected", id="unknown image"),
        pytest.param(ref(5, 70, 9, "x"), "annotation_of_other_image", "annotation 70 in image 7, expected it in image 9", id="other image"),
        pytest.param(ref(5, 71, 7, "x"), "unknown_category", "found category_id 99 of annotation 71", id="unknown category"),
        pytest.param(ref(5, 72, 7, "x"), "broken_annotation", "annotation 72 unreadable (byte ", id="box of three numbers"),
    ],
)
def test_a_ref_that_cannot_be_joined_is_rejected_alone(tmp_path: Path, wrong: Ref, reason: str, detail: str) -> None:
    plan, records = load(tmp_path, [ref(1, 91, 9, "man"), wrong, ref(2, 70, 7, "dog")])
    assert [record.record_id for record in records] == ["9", "7"]
    [rejected] = plan.rejected
    assert (rejected.reason, rejected.position, rejected.record_id) == (reason, "refs(unc).p, ref 5", "ref 5")
    assert detail in rejected.detail
    assert rejected.source_text == "['x']"
    assert plan.num_records == 3


@pytest.mark.parametrize(
    ("wrong", "detail"),
    [
        pytest.param({"ref_id": 1}, "missing required field", id="keys missing"),
        pytest.param(ref(1, None, 9, "x"), ".ann_id`", id="ann_id is null"),
        pytest.param(ref(1, 9.5, 9, "x"), ".ann_id`", id="ann_id is a fraction"),
        pytest.param(ref(1, 91, 9, sentences="man"), ".sentences`", id="sentences are text"),
        pytest.param(ref(1, 91, 9, sentences=[7]), ".sentences[", id="a sentence is a number"),
        pytest.param(None, "Expected `object`", id="no ref"),
    ],
)
@pytest.mark.parametrize("write", [pickle.dumps, lambda refs: json.dumps(refs).encode()], ids=["pickle", "json"])
def test_a_ref_that_cannot_be_read_is_rejected_alone(tmp_path: Path, write: Any, wrong: Any, detail: str) -> None:
    plan, [record] = load(tmp_path, write([ref(1, 91, 9, "man"), wrong]))
    assert phrases(record) == {"annotation 91": ("man",)}
    [rejected] = plan.rejected
    assert rejected.reason == "broken_ref"
    assert rejected.position.startswith("refs(unc).p, ")
    assert detail in rejected.detail
    assert len(rejected.source_text) <= 2000


def test_ids_may_be_numbers_here_and_text_there(tmp_path: Path) -> None:
    record = one(tmp_path, ref(1, "91", "9", "man"), ref("b", 90, 9, "left"))  # type: ignore[arg-type]
    assert phrases(record) == {"annotation 91": ("man",), "annotation 90": ("left",)}


def test_a_crowd_is_flagged(tmp_path: Path) -> None:
    [region] = one(tmp_path, ref(1, 92, 9, "the pack")).regions
    assert region.is_crowd
    assert region.label == "dog"


def test_the_first_of_two_annotations_or_images_with_one_id_stays(tmp_path: Path) -> None:
    twice = {
        **INSTANCES,
        "images": [*INSTANCES["images"], {"id": 9, "file_name": "other.jpg"}],
        "annotations": [*INSTANCES["annotations"], {"id": 91, "image_id": 9, "category_id": 18, "bbox": [0, 0, 1, 1]}],
    }
    plan, [record] = load(tmp_path, [ref(1, 91, 9, "man")], twice)
    assert record == one(tmp_path, ref(1, 91, 9, "man"))
    assert "instances.json: 1 images have the id of another; the first stays" in plan.notes
    assert "instances.json: 1 annotations have the id of another; the first stays" in plan.notes


@pytest.mark.parametrize("size", [0, -1, None, float("nan")], ids=["zero", "negative", "null", "NaN"])
def test_a_declared_size_that_says_nothing(tmp_path: Path, size: float | None) -> None:
    instances = {**INSTANCES, "images": [{"id": 9, "file_name": "a.jpg", "width": size, "height": size}]}
    assert one(tmp_path, ref(1, 91, 9, "man"), boxes=instances).images == (ImageRef("a.jpg"),)


def test_an_image_without_a_name_is_rejected_once(tmp_path: Path) -> None:
    instances = {**INSTANCES, "images": [{"id": 9}, INSTANCES["images"][1]]}
    _, [rejected, _] = load(tmp_path, [ref(1, 91, 9, "man"), ref(2, 90, 9, "left"), ref(3, 70, 7, "dog")], instances)
    assert (rejected.reason, rejected.record_id) == ("no_file_name", "9")


def test_entries_of_instances_that_cannot_be_read_are_noted(tmp_path: Path) -> None:
    instances = {**INSTANCES, "images": [*INSTANCES["images"], {"id": None}]}
    plan, _ = load(tmp_path, [ref(1, 91, 9, "man")], instances)
    assert plan.notes == ("instances.json: 1 images cannot be read", "instances.json: 1 annotations cannot be read")


def test_sizes_of_images_as_strings_of_digits(tmp_path: Path) -> None:
    images = [{**image, **{key: str(image[key]) for key in ("width", "height") if key in image}} for image in INSTANCES["images"]]
    refs = [ref(1, 91, 9, "man"), ref(2, 70, 7, "dog")]
    assert load(tmp_path, refs, {**INSTANCES, "images": images})[1] == load(tmp_path, refs)[1]


@pytest.mark.parametrize("order", [("categories", "annotations", "images"), ("annotations", "images", "categories")], ids=" ".join)
def test_the_order_of_the_keys_of_instances_does_not_matter(tmp_path: Path, order: tuple[str, ...]) -> None:
    refs = [ref(1, 91, 9, "man"), ref(2, 70, 7, "dog")]
    assert load(tmp_path, refs, {key: INSTANCES[key] for key in order})[1] == load(tmp_path, refs)[1]


@pytest.mark.parametrize(
    ("instances", "message"),
    [
        pytest.param({key: INSTANCES[key] for key in ("images", "annotations")}, "found no key 'categories'", id="no categories"),
        pytest.param({**INSTANCES, "categories": [{"id": 1}]}, "missing required field `name`", id="a category without name"),
        pytest.param({**INSTANCES, "categories": [{"id": 1, "name": "a"}, {"id": "1", "name": "b"}]}, "category 1 twice", id="two names"),
        pytest.param([], "found a list at the top", id="a list"),
        pytest.param(
            {**INSTANCES, "annotations": []}, "no ref that can be used .*found ann_id 91.*Is .*instances.json the file", id="other"
        ),
    ],
)
def test_instances_that_cannot_be_used(tmp_path: Path, instances: object, message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        load(tmp_path, [ref(1, 91, 9, "man")], instances)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"instances": None}, r"found no `instances`, expected the instances\.json", id="instances not set"),
        pytest.param({"instances": "gone.json"}, "gone.json: found no such file", id="instances missing"),
        pytest.param({"annotations": "gone.p"}, r"gone\.p: found no such file", id="refs missing"),
        pytest.param({"annotations": "."}, "found a folder", id="refs are a folder"),
    ],
)
def test_files_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AnnotationError, match=message):
        load(tmp_path, [ref(1, 91, 9, "man")], **settings)


def test_a_list_of_targets_is_grefcoco(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="Set `reader: grefcoco`"):
        load(tmp_path, [ref(1, [91, 90], 9, "both men")])


# Units


@pytest.mark.parametrize("per_unit", [1, 2, 3, 5, 100])
def test_units_are_whole_images_in_the_order_of_the_refs(tmp_path: Path, per_unit: int) -> None:
    images = [{"id": key, "file_name": f"{key}.jpg", "width": 9, "height": 9} for key in range(5)]
    annotations = [{"id": key, "image_id": key // 3, "category_id": 1, "bbox": [0, 0, key, 1]} for key in range(15)]
    instances = {"images": images, "annotations": annotations, "categories": INSTANCES["categories"]}
    refs = [ref(number, key, key // 3, f"thing {key}") for number, key in enumerate([14, 3, 4, 0, 13, 9, 6, 5, 1])]
    plan, records = load(tmp_path, refs, instances, per_unit)
    assert [record.record_id for record in records] == ["4", "1", "0", "3", "2"]
    assert phrases(records[0]) == {"annotation 14": ("thing 14",), "annotation 13": ("thing 13",)}
    assert [unit.start for unit in plan.units] == [[0, 2, 5, 7, 8][image] for image in range(0, 5, per_unit)]
    assert plan.units[-1].stop == len(refs)
    again, _ = load(tmp_path, refs, instances, per_unit)
    assert again.fingerprint == plan.fingerprint
    other, _ = load(tmp_path, refs, {**instances, "info": "changed"}, per_unit)
    assert other.fingerprint != plan.fingerprint
