"""The index under COCO's readers: what stands in the file, by image, whatever the order, the ids, and the number of runs."""

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from boxcar.pipelines.readers.catalog import plan_source
from boxcar.pipelines.readers.coco import CocoReader
from boxcar.pipelines.readers.reader import SourcePlan
from boxcar.pipelines.readers.shared import coco_index, json_blocks
from boxcar.pipelines.readers.shared.coco_index import build_index
from boxcar.pipelines.readers.shared.coco_rows import IndexedImage, images_of, plan_index, read_index
from boxcar.schemas.errors import AnnotationError
from boxcar.schemas.record import Record
from boxcar.schemas.workflow import SourceConfig

File = dict[str, Any]

FILE: File = {
    "images": [{"id": 7, "file_name": "a.jpg", "width": 640, "height": 480}, {"id": 3, "file_name": "b.jpg"}],
    "annotations": [
        {"id": 1, "image_id": 3, "category_id": 90, "bbox": [1, 2, 3, 4]},
        {"id": 2, "image_id": 7, "category_id": 1, "bbox": [0.5, 0, 10, 10], "iscrowd": 1, "segmentation": {"counts": [9], "size": [3, 3]}},
        {"id": 3, "image_id": 3, "category_id": 1, "bbox": [5, 6, 7, 8], "ignore": 1},
    ],
    "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}],
}
IN_IMAGES: list[tuple[Any, ...]] = [
    ("7", "a.jpg", 640, 480, [("2", "1", 0.5, 0, 10, 10, True, False, False)]),
    ("3", "b.jpg", None, None, [("1", "90", 1, 2, 3, 4, False, False, False), ("3", "1", 5, 6, 7, 8, False, True, False)]),
]


def load(
    folder: Path, content: File | str, per_unit: int = 100, captions: File | None = None, *, with_regions: bool = True
) -> tuple[SourcePlan, list[IndexedImage]]:
    """The plan of a file, and the images of its units."""
    path = folder / "instances.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    captions_path = None
    if captions is not None:
        captions_path = str(folder / "captions.json")
        Path(captions_path).write_text(json.dumps(captions))
    plan = plan_index(str(path), captions_path, folder / "work", per_unit, with_regions=with_regions)
    return plan, [image for unit in plan.units for image in images_of(unit.path, read_index(unit.path), unit.start, unit.stop)]


def in_images(images: list[IndexedImage]) -> list[tuple[Any, ...]]:
    return [(image.image_id, image.file_name, image.width, image.height, image.regions) for image in images]


def with_annotations(*annotations: object) -> File:
    return {**FILE, "annotations": [*FILE["annotations"], *annotations]}


# The layout of the file


@pytest.mark.parametrize("order", [*permutations(["info", "images", "annotations", "categories"])], ids=" ".join)
def test_keys_in_every_order(tmp_path: Path, order: tuple[str, ...]) -> None:
    file = {"info": {"images": [{"id": 99}], "year": 2017}, **FILE}
    plan, images = load(tmp_path, {key: file[key] for key in order})
    assert in_images(images) == IN_IMAGES
    assert plan.num_records == 2
    assert plan.rejected == ()
    assert plan.notes == ()


@pytest.mark.parametrize("order", [("images", "annotations"), ("annotations", "images")], ids=" ".join)
def test_an_annotation_is_rejected_once_in_either_order(tmp_path: Path, order: tuple[str, ...]) -> None:
    file = with_annotations(
        {"id": 4, "image_id": 3, "category_id": 1, "bbox": [1]}, {"id": 5, "image_id": 8, "category_id": 1, "bbox": [0] * 4}
    )
    plan, images = load(tmp_path, {key: file[key] for key in (*order, "categories")})
    assert [item.reason for item in plan.rejected] == ["broken_annotation", "unknown_image"]
    assert [len(image.regions) for image in images] == [1, 3]


@pytest.mark.parametrize("layout", [{"indent": 4}, {"indent": "\t"}, {"separators": (",", ":")}, {"ensure_ascii": False}], ids=str)
def test_layouts(tmp_path: Path, layout: dict[str, Any]) -> None:
    file = {**FILE, "images": [{"id": 7, "file_name": "照片/été 😀.jpg"}, {"id": 3, "file_name": "n" * 5000 + '{"[.jpg'}]}
    _, images = load(tmp_path, json.dumps(file, **layout))
    assert [image.file_name for image in images] == ["照片/été 😀.jpg", "n" * 5000 + '{"[.jpg']
    assert [image.regions for image in images] == [entry[-1] for entry in IN_IMAGES]


def test_a_byte_order_mark(tmp_path: Path) -> None:
    assert in_images(load(tmp_path, "\ufeff" + json.dumps(FILE))[1]) == IN_IMAGES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("", "found an empty file", id="empty"),
        pytest.param(" \n", "found an empty file", id="blank"),
        pytest.param("[]", "byte 0: found a list at the top", id="a list at the top"),
        pytest.param("\x89PNG", "byte 0: found b'.*PNG' at the top", id="an image"),
        pytest.param({"annotations": FILE["annotations"]}, "found no key 'images', 'categories', expected a COCO file", id="missing keys"),
        pytest.param('{"images": []}', 'found an empty list "images"', id="nothing"),
        pytest.param({**FILE, "images": []}, 'found an empty list "images"', id="no images"),
        pytest.param(
            {**FILE, "images": [{"id": None}]}, r'nothing readable in the list "images" \(instances.json, byte 12', id="all broken"
        ),
        pytest.param({**FILE, "images": None}, "byte 11: found the key 'images' without a list", id="null for a list"),
        pytest.param({**FILE, "annotations": {"1": {}}}, "found the key 'annotations' without a list", id="a dictionary for a list"),
        pytest.param({**FILE, "categories": []}, 'found an empty list "categories"', id="no categories"),
        pytest.param({**FILE, "categories": ["cat"]}, r"byte \d+: found Expected `object`, got `str`", id="categories are names"),
        pytest.param({**FILE, "categories": [{"id": 1, "name": " "}]}, "found category 1 without a name", id="a blank category"),
        pytest.param(
            {**FILE, "categories": [{"id": 1, "name": "cat"}, {"id": "1", "name": "dog"}]},
            "found category 1 twice: 'cat' and 'dog'",
            id="twice",
        ),
        pytest.param('{"images": [{"id": 1}], "annotations": [], "images": []}', 'found the key "images" again', id="images twice"),
    ],
)
def test_a_file_that_cannot_be_read_as_a_whole(tmp_path: Path, content: File | str, message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        load(tmp_path, content)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        pytest.param(', "categories"', ', categories"', r"byte {at}: found b'.*', expected a key", id="a key without its quote"),
        pytest.param("10, 10]", "10, 10", r"byte \d+: found", id="a list without end"),
        pytest.param("4]}, ", "4]}}, ", r"byte {at}: found b'}, .* after an element", id="a bracket too many"),
        pytest.param('"b.jpg"', '"b.jpg', r"byte \d+: found the end of the file", id="a text without end"),
    ],
)
def test_broken_json_in_the_middle_is_named_by_its_byte(tmp_path: Path, old: str, new: str, message: str) -> None:
    before, _, after = json.dumps(FILE).partition(old)
    expected = message.replace("{at}", str(len(before) + (3 if "}}" in new else 2)))
    with pytest.raises(AnnotationError, match=expected):
        load(tmp_path, before + new + after)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_a_file_that_is_cut_off(tmp_path: Path, share: float) -> None:
    text = json.dumps(FILE)
    with pytest.raises(AnnotationError, match=r"instances\.json, byte \d+: found"):
        load(tmp_path, text[: int(share * len(text))])


@pytest.mark.parametrize(("name", "message"), [("gone.json", "no such file"), (".", "a folder")])
def test_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AnnotationError, match=message):
        plan_index(name, None, tmp_path / "work", 10, with_regions=True)


# Ids


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param((7, 3, 7, 3), id="numbers"),
        pytest.param(("seven", "three", "seven", "three"), id="text"),
        pytest.param((7, "3", "7", 3), id="numbers here, text there"),
        pytest.param(("7", 3, 7, "3"), id="text here, numbers there"),
        pytest.param((2**63 + 1, 3, 2**63 + 1, 3), id="more than 63 bits"),
        pytest.param((-7, 2**70, -7, str(2**70)), id="negative, and more than 64 bits"),
        pytest.param(("ü 😀", "a/b.jpg", "ü 😀", "a/b.jpg"), id="paths as ids"),
    ],
)
@pytest.mark.parametrize("runs_of", [1, 1_000_000])
def test_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids: tuple[Any, ...], runs_of: int) -> None:
    monkeypatch.setattr(coco_index, "ANNOTATIONS_PER_RUN", runs_of)
    monkeypatch.setattr(json_blocks, "BLOCK_BYTES", 64)
    first, second, of_first, of_second = ids
    boxes = [{"image_id": key, "category_id": "90", "bbox": [0, 0, 1, 1]} for key in (of_first, of_second, of_first)]
    plan, images = load(tmp_path, {**FILE, "images": [{"id": first}, {"id": second}], "annotations": boxes})
    assert [(image.image_id, len(image.regions)) for image in images] == [(str(first), 2), (str(second), 1)]
    assert plan.rejected == ()
    assert images[0].regions[0][:2] == ("", "90")


@pytest.mark.parametrize("order", [("images", "annotations"), ("annotations", "images")], ids=" ".join)
def test_the_first_of_two_images_with_one_id_gets_the_annotations(tmp_path: Path, order: tuple[str, ...]) -> None:
    file = {**FILE, "images": [{"id": 7, "file_name": "a.jpg"}, {"id": "7", "file_name": "again.jpg"}, {"id": 3}]}
    plan, images = load(tmp_path, {key: file[key] for key in (*order, "categories")})
    assert [(image.file_name, len(image.regions)) for image in images] == [("a.jpg", 1), ("again.jpg", 0), ("", 2)]
    assert read_index(plan.units[0].path).duplicate_images == [1]


# Rows that cannot be used


def test_annotations_of_images_that_are_not_there(tmp_path: Path) -> None:
    file = with_annotations(
        {"id": 4, "image_id": 8, "category_id": 1, "bbox": [0] * 4}, {"image_id": "x", "category_id": 1, "bbox": [0] * 4}
    )
    plan, images = load(tmp_path, file)
    assert in_images(images) == IN_IMAGES
    assert [(item.reason, item.position, item.detail) for item in plan.rejected] == [
        ("unknown_image", "instances.json, annotation 4", "found image_id 8, expected the id of an image"),
        ("unknown_image", "instances.json, annotation without id", "found image_id x, expected the id of an image"),
    ]
    assert plan.num_records == 4


@pytest.mark.parametrize(
    ("more", "category"),
    [
        pytest.param({"bbox": [1, 2, 3]}, "1", id="three numbers"),
        pytest.param({"bbox": [1, 2, 3, 4, 5]}, "1", id="five numbers"),
        pytest.param({"bbox": []}, "1", id="no numbers"),
        pytest.param({"bbox": None}, "1", id="null"),
        pytest.param({"bbox": ["1", "2", "3", "4"]}, "1", id="strings"),
        pytest.param({"bbox": {"x": 1}}, "1", id="a dictionary"),
        pytest.param({}, "1", id="no bbox"),
        pytest.param({"bbox": None, "area": float("nan")}, "1", id="with a NaN elsewhere"),
        pytest.param({"bbox": [0, 0, 1, 1], "iscrowd": "no"}, "1", id="a flag in words"),
        pytest.param({"bbox": [0, 0, 1, 1], "category_id": 1.0}, "1", id="a category as 1.0"),
        pytest.param({"bbox": [0, 0, 1, 1], "image_id": 3.0}, "1", id="an image as 3.0"),
        pytest.param({"bbox": [0, 0, 1, 1], "category_id": None}, "", id="no category: any label may be incomplete"),
        pytest.param({"bbox": [0, 0, 1, 1], "category_id": True}, "", id="a category as true"),
        pytest.param({"bbox": [0, 0, 1, 1], "id": None}, "1", id="id is null"),
    ],
)
@pytest.mark.parametrize("length", [1, 900, 60_000], ids=["short", "a polygon of 4 kB before the ids", "a polygon of 300 kB"])
def test_an_annotation_that_cannot_be_read_marks_its_image(tmp_path: Path, more: dict[str, Any], category: str, length: int) -> None:
    """COCO writes the polygon before image_id and category_id: what a message shows of the element does not reach them."""
    wrong = {"segmentation": [[1.25] * length], "image_id": 3, "category_id": 1, "id": 4, **more}
    plan, images = load(tmp_path, with_annotations(wrong))
    [rejected] = plan.rejected
    at = json.dumps(with_annotations(wrong)).index(json.dumps(wrong))
    assert (rejected.reason, rejected.position) == ("broken_annotation", f"instances.json, byte {at}")
    assert rejected.source_text == json.dumps(wrong)[:2000]
    assert in_images(images)[0] == IN_IMAGES[0]
    assert images[1].regions[:2] == IN_IMAGES[1][-1]
    [broken] = images[1].regions[2:]
    assert broken[1] == category
    assert broken[-1]
    assert plan.notes == ()


@pytest.mark.parametrize(
    "wrong",
    [{"category_id": 1, "bbox": None}, {"image_id": None, "category_id": 1, "bbox": [0] * 4}, 7, "text", [], {"image_id": [3]}, None],
    ids=str,
)
def test_an_annotation_of_nobody_knows_which_image_opens_the_vocabulary(tmp_path: Path, wrong: object) -> None:
    plan, images = load(tmp_path, with_annotations(wrong))
    assert in_images(images) == IN_IMAGES
    assert [item.reason for item in plan.rejected] == ["broken_annotation"]
    assert not read_index(plan.units[0].path).is_exhaustive
    assert plan.notes == (
        "1 annotations cannot be read at all, so that any image may hold an object without a box: no category is taken as absent",
    )


def test_a_broken_annotation_of_an_unknown_image_is_rejected_once(tmp_path: Path) -> None:
    plan, _ = load(tmp_path, with_annotations({"image_id": 8, "category_id": 1, "bbox": None}))
    assert [item.reason for item in plan.rejected] == ["broken_annotation"]


@pytest.mark.parametrize(
    "wrong", [{"file_name": "c.jpg"}, {"id": 8, "file_name": None}, {"id": 8, "width": "640 px"}, {"id": 8, "height": "-1"}, 8], ids=str
)
def test_an_image_entry_that_cannot_be_read(tmp_path: Path, wrong: object) -> None:
    plan, images = load(tmp_path, {**FILE, "images": [FILE["images"][0], wrong, FILE["images"][1]]})
    assert in_images(images) == IN_IMAGES
    [rejected] = plan.rejected
    assert (rejected.reason, rejected.position) == (
        "broken_image_entry",
        f"instances.json, byte {json.dumps(FILE['images'])[1:].index('}') + 15}",
    )


def test_more_rejected_rows_than_anybody_reads_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco_index, "MAX_LISTED", 3)
    monkeypatch.setattr(coco_index, "ANNOTATIONS_PER_RUN", 2)
    broken = [{"image_id": 3, "category_id": 1, "bbox": None}] * 2
    dangling = [{"image_id": 8, "category_id": 1, "bbox": [0, 0, 1, 1]}] * 5
    plan, _ = load(tmp_path, with_annotations(*broken, *dangling))
    assert len(plan.rejected) == 3
    assert len(plan.notes) == 2
    for note in plan.notes:
        listed = sum(note.endswith(f"rejected as {item.reason}") for item in plan.rejected)
        more = int(note.removeprefix("instances.json: ").split()[0])
        assert listed + more == (2 if note.endswith("broken_annotation") else 5)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_forbids_are_read(tmp_path: Path, number: str) -> None:
    text = json.dumps(FILE).replace("[1, 2, 3, 4]", f"[1, {number}, 3, 4]").replace('"width": 640', f'"width": {number}')
    plan, images = load(tmp_path, text)
    assert plan.rejected == ()
    expected = float(number)
    assert images[1].regions[0][3] == pytest.approx(expected, nan_ok=True)
    assert images[1].regions[1] == IN_IMAGES[1][-1][1]
    assert images[0].width == pytest.approx(expected, nan_ok=True)


# Captions


CAPTIONS: File = {
    "images": FILE["images"],
    "annotations": [{"image_id": 3, "id": 1, "caption": "b"}, {"image_id": 7, "id": 2, "caption": "a"}],
}


def test_captions_join_by_image(tmp_path: Path) -> None:
    more = {"annotations": [*CAPTIONS["annotations"], {"image_id": "3", "caption": "Zwei Hunde. 两只狗"}]}
    plan, images = load(tmp_path, FILE, captions=more)
    assert [image.captions for image in images] == [["a"], ["b", "Zwei Hunde. 两只狗"]]
    assert in_images(images) == IN_IMAGES
    assert plan.fingerprint != load(tmp_path, FILE)[0].fingerprint
    assert plan.fingerprint != load(tmp_path, FILE, captions=CAPTIONS)[0].fingerprint


@pytest.mark.parametrize("runs_of", [1, 1_000_000])
def test_captions_of_unknown_images_are_noted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs_of: int) -> None:
    monkeypatch.setattr(coco_index, "ANNOTATIONS_PER_RUN", runs_of)
    captions = {"annotations": [*CAPTIONS["annotations"], *[{"image_id": key, "caption": "?"} for key in (8, 9, 9)]]}
    plan, images = load(tmp_path, FILE, captions=captions)
    assert plan.notes == ("3 captions belong to images that are not among the images",)
    assert [image.captions for image in images] == [["a"], ["b"]]


def test_a_caption_that_cannot_be_read_is_rejected_alone(tmp_path: Path) -> None:
    captions = {"annotations": [*CAPTIONS["annotations"], {"image_id": 3, "caption": None}]}
    plan, images = load(tmp_path, FILE, captions=captions)
    [rejected] = plan.rejected
    assert rejected.reason == "broken_annotation"
    assert rejected.position.startswith("captions.json, byte ")
    assert [image.captions for image in images] == [["a"], ["b"]]
    assert plan.notes == ()


def test_a_captions_file_without_annotations(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"captions\.json: found no key 'annotations'"):
        load(tmp_path, FILE, captions={"images": []})


# Runs and units


def test_units(tmp_path: Path) -> None:
    file = {**FILE, "images": [{"id": key} for key in range(5)], "annotations": []}
    plan, images = load(tmp_path, file, per_unit=2)
    assert [(unit.start, unit.stop) for unit in plan.units] == [(0, 2), (2, 4), (4, 5)]
    assert [image.number for image in images] == [0, 1, 2, 3, 4]
    assert [image.regions for image in images] == [[]] * 5
    assert load(tmp_path, file, per_unit=3)[0].fingerprint == plan.fingerprint


annotation_lists = st.lists(st.tuples(st.integers(0, 6), st.sampled_from(["good", "good", "good", "broken", "text id"])), max_size=30)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    annotations=annotation_lists,
    runs_of=st.sampled_from([1, 2, 3, 7]),
    per_unit=st.sampled_from([1, 2, 3, 5]),
    block_bytes=st.sampled_from([16, 100, 1000]),
    early=st.booleans(),
)
def test_many_runs_give_what_one_gives(
    tmp_path_factory: pytest.TempPathFactory,
    annotations: list[tuple[int, str]],
    runs_of: int,
    per_unit: int,
    block_bytes: int,
    early: bool,
) -> None:
    boxes = [
        {
            "id": number,
            "image_id": str(image) if kind == "text id" else image,
            "category_id": 1,
            "bbox": None if kind == "broken" else [number] * 4,
        }
        for number, (image, kind) in enumerate(annotations)
    ]
    captions = {"annotations": [{"image_id": image, "caption": f"{number}"} for number, (image, _) in enumerate(annotations)]}
    file = {**FILE, "images": [{"id": key} for key in range(5)], "annotations": boxes}
    if early:
        file = {key: file[key] for key in ("annotations", "images", "categories")}
    one_plan, expected = load(tmp_path_factory.mktemp("one"), file, captions=captions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coco_index, "ANNOTATIONS_PER_RUN", runs_of)
        patch.setattr(json_blocks, "BLOCK_BYTES", block_bytes)
        plan, images = load(tmp_path_factory.mktemp("many"), file, per_unit, captions)
    # Broken rows come behind the readable ones of their block, so that their places depend on the blocks; they are marks, not regions.
    assert [readable(image) for image in images] == [readable(image) for image in expected]
    assert [broken(image) for image in images] == [broken(image) for image in expected]
    assert plan.fingerprint == one_plan.fingerprint
    assert sorted(plan.rejected, key=str) == sorted(one_plan.rejected, key=str)
    assert plan.notes == one_plan.notes


def readable(image: IndexedImage) -> tuple[Any, ...]:
    return image.number, image.image_id, [row for row in image.regions if not row[-1]], image.captions


def broken(image: IndexedImage) -> list[Any]:
    return sorted(row for row in image.regions if row[-1])


def test_an_index_is_the_same_twice(tmp_path: Path) -> None:
    (tmp_path / "instances.json").write_text(json.dumps(FILE))
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second, second):
        build_index(str(tmp_path / "instances.json"), None, folder)
    assert {path.name: path.read_bytes() for path in first.iterdir()} == {path.name: path.read_bytes() for path in second.iterdir()}


def test_ids_and_sizes_of_images_as_strings_of_digits(tmp_path: Path) -> None:
    images = [{"id": "7", "file_name": "a.jpg", "width": "640", "height": "480"}, {"id": "3", "file_name": "b.jpg"}]
    assert in_images(load(tmp_path, {**FILE, "images": images})[1]) == IN_IMAGES


@pytest.mark.parametrize(
    "file",
    [
        {"images": FILE["images"]},
        {"images": FILE["images"], "categories": FILE["categories"]},
        {**FILE, "annotations": [], "categories": []},
    ],
)
def test_images_alone_can_be_audited_and_not_converted(tmp_path: Path, file: dict[str, Any]) -> None:
    (tmp_path / "image_info_test.json").write_text(json.dumps(file))
    config = SourceConfig(reader="coco", annotations=str(tmp_path / "image_info_test.json"))
    plan = plan_source(config, tmp_path / "audit", 10, unlabelled=True)
    assert plan.num_records == 2
    records = list(CocoReader().read(config, plan.units[0]))
    assert [(record.regions, record.vocabulary) for record in records if isinstance(record, Record)] == [((), ())] * 2
    with pytest.raises(AnnotationError, match=r"found images without annotations, as image_info_\*.json .* `boxcar audit` says"):
        plan_source(config, tmp_path / "convert", 10)


def test_an_empty_list_of_annotations_says_that_there_is_nothing_in_the_images(tmp_path: Path) -> None:
    (tmp_path / "instances.json").write_text(json.dumps({**FILE, "annotations": []}))
    assert plan_source(SourceConfig(reader="coco", annotations=str(tmp_path / "instances.json")), tmp_path / "work", 10).num_records == 2


def test_panoptic_annotations_are_named(tmp_path: Path) -> None:
    annotation = {"segments_info": [{"id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}], "file_name": "a.png", "image_id": 7}
    (tmp_path / "panoptic.json").write_text(json.dumps({**FILE, "annotations": [annotation]}))
    config = SourceConfig(reader="coco", annotations=str(tmp_path / "panoptic.json"))
    with pytest.raises(AnnotationError, match=r"panoptic annotations .* Name the instances file"):
        plan_source(config, tmp_path / "work", 10)


def test_a_file_of_coco_stuff_is_named(tmp_path: Path) -> None:
    (tmp_path / "stuff_val2017.json").write_text(json.dumps(FILE))
    plan = plan_source(SourceConfig(reader="coco", annotations=str(tmp_path / "stuff_val2017.json")), tmp_path / "work", 10)
    assert any("COCO-Stuff" in note for note in plan.notes)
