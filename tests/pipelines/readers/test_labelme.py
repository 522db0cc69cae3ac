import json
from pathlib import Path
from typing import Any

import pytest

from boxcar.pipelines.readers.labelme import LabelmeReader
from boxcar.pipelines.readers.reader import Reader, SourcePlan
from boxcar.schemas.errors import AnnotationError
from boxcar.schemas.record import PIXELS, ImageRef, Record, Region, Rejected
from boxcar.schemas.workflow import SourceConfig

CORNERS = [[10, 20], [30, 40]]


def shape(label: str = "cat", points: object = CORNERS, shape_type: str | None = "rectangle", **more: object) -> dict[str, object]:
    return {"label": label, "points": points, "group_id": None, "shape_type": shape_type, "flags": {}, **more}


def labelme(*shapes: object, **more: object) -> str:
    head = {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": "a.jpg"}
    return json.dumps({**head, "imageData": "A" * 4000, "imageHeight": 100, "imageWidth": 200, **more})


def write(folder: Path, **files: str | bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for stem, content in files.items():
        (folder / f"{stem}.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def load(tmp_path: Path, folder: Path | str, per_unit: int = 1000, **settings: Any) -> tuple[SourcePlan, list[Record | Rejected]]:
    reader: Reader = LabelmeReader()
    config = SourceConfig.model_validate({"reader": "labelme", "annotations": str(folder), **settings})
    plan = reader.plan(config, tmp_path / "work", per_unit)
    return plan, [item for unit in plan.units for item in reader.read(config, unit)]


def one(tmp_path: Path, *shapes: object, **more: object) -> Record:
    _, [record] = load(tmp_path, write(tmp_path / "json", a=labelme(*shapes, **more)))
    assert isinstance(record, Record), record
    return record


def test_a_file_becomes_a_record(tmp_path: Path) -> None:
    folder = write(tmp_path / "json", first=labelme(shape(" cat "), shape("dog", difficult=True)))
    plan, records = load(tmp_path, folder, split="mine", language="zh")
    assert records == [
        Record(
            record_id="first",
            position="first.json",
            images=(ImageRef("a.jpg", 200, 100),),
            regions=(
                Region((10, 20, 30, 40), "cat", region_id="shape 1"),
                Region((10, 20, 30, 40), "dog", is_difficult=True, region_id="shape 2"),
            ),
            box_space=PIXELS,
            language="zh",
            split="mine",
        )
    ]
    assert plan.num_records == 1
    assert plan.notes == ()


@pytest.mark.parametrize(
    ("shape_type", "points", "box"),
    [
        pytest.param("rectangle", [[10, 20], [30, 40]], (10, 20, 30, 40), id="top left first"),
        pytest.param("rectangle", [[30, 40], [10, 20]], (10, 20, 30, 40), id="bottom right first"),
        pytest.param("rectangle", [[10.5, 40], [30, 20.25]], (10.5, 20.25, 30, 40), id="bottom left first, floats"),
        pytest.param("rectangle", [[10, 20], [30, 20], [30, 40], [10, 40]], (10, 20, 30, 40), id="X-AnyLabeling's four corners"),
        pytest.param("rotation", [[5, 0], [10, 5], [5, 10], [0, 5]], (0, 0, 10, 10), id="rotated box"),
        pytest.param("polygon", [[5, 1], [9, 7], [2, 4]], (2, 1, 9, 7), id="polygon"),
        pytest.param(None, [[5, 1], [9, 7], [2, 4]], (2, 1, 9, 7), id="polygon before shape_type"),
        pytest.param("linestrip", [[5, 1], [9, 7]], (5, 1, 9, 7), id="linestrip"),
        pytest.param("circle", [[10, 10], [13, 14]], (5, 5, 15, 15), id="circle by centre and rim"),
        pytest.param("mask", [[3, 4], [5, 6]], (3, 4, 6, 7), id="mask's corners are the first and last pixel"),
        pytest.param("rectangle", [[5, 5], [5, 5]], (5, 5, 5, 5), id="no area is for a later room"),
        pytest.param("rectangle", [[-9, -9], [999, 999]], (-9, -9, 999, 999), id="outside is for a later room"),
    ],
)
def test_shapes(tmp_path: Path, shape_type: str | None, points: object, box: tuple[float, ...]) -> None:
    record = one(tmp_path, shape("x", points, shape_type))
    assert [region.box for region in record.regions] == [box]
    assert record.not_exhaustive == ()


@pytest.mark.parametrize("kind", ["point", "points", "line"])
def test_a_shape_without_box_makes_its_label_not_exhaustive(tmp_path: Path, kind: str) -> None:
    record = one(tmp_path, shape("cat"), shape("cat", [[1, 2]], kind), shape("dog", [[1, 2]], kind))
    assert [region.label for region in record.regions] == ["cat"]
    assert record.not_exhaustive == ("cat", "dog")


def test_the_parts_of_a_group_are_one_object(tmp_path: Path) -> None:
    record = one(
        tmp_path,
        shape("cow", [[0, 0], [10, 10]], group_id=1),
        shape("cow", [[50, 50], [60, 60]]),
        shape("fence", [[5, 0], [6, 30]], group_id=1),
        shape("cow", [[20, 5], [30, 15]], group_id=1),
        shape("cow", [[70, 70], [80, 80]], group_id=2),
    )
    assert [(region.label, region.box, region.region_id) for region in record.regions] == [
        ("cow", (0, 0, 30, 15), "shape 1 and 4"),
        ("cow", (50, 50, 60, 60), "shape 2"),
        ("fence", (5, 0, 6, 30), "shape 3"),
        ("cow", (70, 70, 80, 80), "shape 5"),
    ]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        pytest.param({"imageHeight": 0, "imageWidth": None}, (None, None), id="zero and null"),
        pytest.param({"imageHeight": 480.0, "imageWidth": 640}, (640, 480), id="float"),
        pytest.param({"imageHeight": 200, "imageWidth": 100}, (100, 200), id="upright size of a rotated photograph is passed on"),
    ],
)
def test_declared_size(tmp_path: Path, more: dict[str, object], expected: tuple[int | None, int | None]) -> None:
    image = one(tmp_path, shape(), **more).images[0]
    assert (image.declared_width, image.declared_height) == expected


@pytest.mark.parametrize(
    ("place", "image_path", "images", "expected"),
    [
        pytest.param("", "a.jpg", "", "a.jpg", id="beside"),
        pytest.param("day", "a.jpg", "", "day/a.jpg", id="beside, in a subfolder"),
        pytest.param("day", "../photos/./a.jpg", "", "photos/a.jpg", id="dots"),
        pytest.param("", "../photos/a.jpg", "", "../photos/a.jpg", id="outside the folder"),
        pytest.param("day", "..\\..\\photos\\a.jpg", "", "../photos/a.jpg", id="backslashes"),
        pytest.param("day", "C:\\data\\a.jpg", "", "day/a.jpg", id="a drive: the name beside the file"),
        pytest.param("", "\\\\server\\share\\a.jpg", "", "a.jpg", id="a host"),
        pytest.param("", "/data/a.jpg", "", "/data/a.jpg", id="absolute"),
        pytest.param("", "s3://bucket/a.jpg", "photos", "s3://bucket/a.jpg", id="a URI"),
        pytest.param("day", "../../photos/day/a.jpg", "photos", "day/a.jpg", id="leads below images"),
        pytest.param("day", "a.jpg", "json", "day/a.jpg", id="images is the same folder"),
        pytest.param("day", "../../old_place/a.jpg", "photos", "day/a.jpg", id="leads elsewhere: subfolder and name"),
    ],
)
def test_image_path(tmp_path: Path, place: str, image_path: str, images: str, expected: str) -> None:
    write(tmp_path / "json" / place, a=labelme(imagePath=image_path))
    _, [record] = load(tmp_path, tmp_path / "json", images=str(tmp_path / images) if images else "")
    assert isinstance(record, Record)
    assert record.images[0].path == expected
    assert record.record_id == (f"{place}/a" if place else "a")


@pytest.mark.parametrize(
    ("exhaustive", "vocabularies"),
    [(None, [(), ()]), (False, [(), ()]), (True, [("cat", "dog", "nose"), ("cat", "dog")])],
    ids=["open", "told so", "closed; a label with a point alone is not absent"],
)
def test_vocabulary(tmp_path: Path, exhaustive: bool | None, vocabularies: list[tuple[str, ...]]) -> None:
    second = labelme(shape("cat"), shape("nose", [[1, 2]], "point"))
    folder = write(tmp_path / "json", a=labelme(shape("dog")), b=second, c="{")
    plan, records = load(tmp_path, folder, exhaustive=exhaustive)
    assert [record.vocabulary for record in records if isinstance(record, Record)] == vocabularies
    assert plan.num_records == 3


@pytest.mark.parametrize(
    ("content", "reason", "detail"),
    [
        pytest.param('{"shapes": [', "broken_json", "truncated", id="cut off"),
        pytest.param('{"shapes": x}', "broken_json", "(byte 11)", id="no JSON, with its byte"),
        pytest.param(b'{"shapes": [], "imagePath": "\xff.jpg"}', "broken_json", "UTF-8", id="not UTF-8"),
        pytest.param('{"x": ' + "[" * 100_000, "broken_json", "recursion", id="nested without end"),
        pytest.param('{"images": [], "annotations": []}', "not_labelme", "`shapes`", id="a COCO file"),
        pytest.param("[]", "not_labelme", "Expected `object`", id="a list"),
        pytest.param(labelme(imagePath=None), "missing_image", "no imagePath", id="the image is only in imageData"),
        pytest.param(labelme(shape(), shape(None)), "bad_shape", "$.shapes[1].label", id="label is null"),  # type: ignore[arg-type]
        pytest.param(labelme(shape(" ")), "bad_shape", "shape 1: found an empty label", id="label is empty"),
        pytest.param(labelme(shape("a", [[1, 2, 3], [4, 5, 6]])), "bad_shape", "$.shapes[0].points", id="points of three"),
        pytest.param(
            labelme(shape("a", [[1, 2]])), "bad_shape", "shape 1 (a): found 1 points in a rectangle, expected 2 to 4", id="corner"
        ),
        pytest.param(labelme(shape("a", [], "polygon")), "bad_shape", "found 0 points in a polygon, expected at least 3", id="no points"),
        pytest.param(labelme(shape("a", CORNERS, "cuboid")), "bad_shape", "found shape_type 'cuboid'", id="unknown shape"),
    ],
)
def test_a_file_that_cannot_be_understood_is_rejected_whole_and_alone(
    tmp_path: Path, content: str | bytes, reason: str, detail: str
) -> None:
    folder = write(tmp_path / "json", a=labelme(shape()), b=content, c=labelme(shape()))
    _, [before, rejected, after] = load(tmp_path, folder)
    assert isinstance(before, Record)
    assert isinstance(after, Record)
    assert isinstance(rejected, Rejected)
    assert (rejected.reason, rejected.position, rejected.record_id) == (reason, "b.json", "b")
    assert detail in rejected.detail
    assert len(rejected.source_text) <= 2000


def test_a_byte_order_mark_and_an_image_without_shapes(tmp_path: Path) -> None:
    folder = write(tmp_path / "json", a=b"\xef\xbb\xbf" + labelme().encode())
    _, [record] = load(tmp_path, folder)
    assert isinstance(record, Record)
    assert record.regions == ()


def test_the_old_labelme_xml_is_named(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old/a.xml").write_text("<annotation/>")
    with pytest.raises(AnnotationError, match=r"found a folder with 1 x \.xml, .*the old LabelMe's format \(datumaro's `label_me`\)"):
        load(tmp_path, tmp_path / "old")


@pytest.mark.parametrize(
    ("annotations", "message"),
    [("gone", "found no such folder"), ("json/a.json", "found a file, expected a folder"), ("empty", "found a folder with nothing")],
)
def test_a_source_that_cannot_be_read_as_a_whole(tmp_path: Path, annotations: str, message: str) -> None:
    write(tmp_path / "json", a=labelme())
    (tmp_path / "empty").mkdir()
    with pytest.raises(AnnotationError, match=message):
        load(tmp_path, tmp_path / annotations)


def test_units(tmp_path: Path) -> None:
    folder = write(tmp_path / "json", **{stem: labelme(shape()) for stem in "abcde"})
    plan, records = load(tmp_path, folder, per_unit=2)
    assert [(unit.start, unit.stop) for unit in plan.units] == [(0, 2), (2, 4), (4, 5)]
    assert [record.record_id for record in records] == list("abcde")
    assert load(tmp_path, folder)[0].fingerprint == plan.fingerprint
