from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from boxcar.pipelines.readers.reader import Reader, SourcePlan
from boxcar.pipelines.readers.shared.file_per_image import ROWS_PER_BATCH
from boxcar.pipelines.readers.voc import VocReader
from boxcar.schemas.errors import AnnotationError
from boxcar.schemas.record import PIXELS, ImageRef, Record, Region, Rejected
from boxcar.schemas.workflow import SourceConfig
from tests.places import SHARED

BCCD = SHARED / "data/bccd"


def thing(name: str = "cat", corners: Iterable[object] = (10, 20, 30, 40), more: str = "") -> str:
    tags = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    box = "".join(f"<{tag}>{value}</{tag}>" for tag, value in tags)
    return f"<object><name>{name}</name>{more}<bndbox>{box}</bndbox></object>"


def xml(*objects: str, filename: str = "", width: object = 200, height: object = 100) -> str:
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation><filename>{filename}</filename>{size}{''.join(objects)}</annotation>"


def write(folder: Path, **files: str | bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for stem, content in files.items():
        (folder / f"{stem}.xml").write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def load(tmp_path: Path, folder: Path | str, per_unit: int = 1000, **settings: Any) -> tuple[SourcePlan, list[Record | Rejected]]:
    reader: Reader = VocReader()
    config = SourceConfig.model_validate({"reader": "voc", "annotations": str(folder), **settings})
    plan = reader.plan(config, tmp_path / "work", per_unit)
    return plan, [item for unit in plan.units for item in reader.read(config, unit)]


def one(tmp_path: Path, *objects: str, **settings: Any) -> Record:
    """The record of a folder with this one file."""
    _, [record] = load(tmp_path, write(tmp_path / "xml", a=xml(*objects)), **settings)
    assert isinstance(record, Record)
    return record


def test_a_file_becomes_a_record(tmp_path: Path) -> None:
    write(tmp_path / "xml", first=xml(thing(), filename="first.jpg"))
    touch(tmp_path / "photos", "first.jpg")
    _, records = load(tmp_path, tmp_path / "xml", images=str(tmp_path / "photos"), split="mine", language="zh")
    assert records == [
        Record(
            record_id="first",
            position="first.xml",
            images=(ImageRef("first.jpg", 200, 100),),
            regions=(Region((9.0, 19.0, 30.0, 40.0), "cat", region_id="object 1"),),
            box_space=PIXELS,
            vocabulary=("cat",),
            language="zh",
            split="mine",
        )
    ]


@pytest.mark.parametrize(
    ("corners", "voc_origin", "expected"),
    [
        pytest.param((1, 1, 200, 100), 1, (0, 0, 200, 100), id="whole image, 1-based: the golden case of FORMATS.md D2"),
        pytest.param((0, 0, 200, 100), 0, (0, 0, 200, 100), id="whole image, 0-based"),
        pytest.param((1.5, 2.25, 3.5, 4.75), 1, (0.5, 1.25, 3.5, 4.75), id="floats"),
        pytest.param((5, 6, 5, 6), 1, (5, 6, 5, 6), id="a click without a drag keeps no extent"),
        pytest.param((30, 40, 10, 20), 1, (30, 40, 9, 19), id="swapped corners stay swapped, around the same pixels"),
        pytest.param((-4, 1, 999, 5), 1, (-5, 0, 999, 5), id="outside the image is for a later room"),
    ],
)
def test_corners(tmp_path: Path, corners: tuple[float, ...], voc_origin: int, expected: tuple[float, ...]) -> None:
    assert one(tmp_path, thing(corners=corners), voc_origin=voc_origin).regions[0].box == expected


def test_nan_is_for_a_later_room(tmp_path: Path) -> None:
    box = one(tmp_path, thing(corners=("nan", 1, 5, 5))).regions[0].box
    assert box[0] != box[0]


@pytest.mark.parametrize(
    ("boxes", "x0", "sentence"),
    [
        pytest.param([(10, 0, 20, 20), (1, 1, 5, 5)], 10, "1 with xmin or ymin = 0, 1 with 1, 0 with", id="a zero: 0-based"),
        pytest.param([(10, 1, 20, 20)], 9, "0 with xmin or ymin = 0, 1 with 1, 0 with", id="a one: 1-based"),
        pytest.param([(10, 20, 200, 30)], 9, "1 with xmax = width", id="ends at the width: 1-based"),
        pytest.param([(10, 20, 30, 100)], 9, "1 with xmax = width or ymax = height", id="ends at the height: 1-based"),
        pytest.param([(10, 20, 30, 30)], 9, "no box touches a border", id="nothing touches: 1-based, as the format says"),
        pytest.param([(10, 20, 30, 30), (0, 0, 0, 0)], 9, "found 1 boxes", id="a dummy box of zeros is no evidence"),
    ],
)
def test_origin_is_detected(tmp_path: Path, boxes: list[tuple[int, ...]], x0: int, sentence: str) -> None:
    folder = write(tmp_path / "xml", a=xml(*[thing(corners=box) for box in boxes]))
    plan, [record] = load(tmp_path, folder)
    assert isinstance(record, Record)
    assert record.regions[0].box[0] == x0
    [note] = plan.notes
    assert sentence in note
    assert note.startswith("voc_origin: found")
    assert note.endswith("set voc_origin: 0 or 1 to decide it yourself")


def test_origin_is_that_of_the_whole_folder_in_every_split(tmp_path: Path) -> None:
    write(tmp_path / "Annotations", a=xml(thing(corners=(0, 0, 5, 5))), b=xml(thing(corners=(1, 1, 5, 5))))
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/val.txt").write_text("b\n")
    _, [record] = load(tmp_path, tmp_path, split="val")
    assert isinstance(record, Record)
    assert record.regions[0].box == (1, 1, 5, 5)


def test_told_origin_against_the_evidence_is_noted(tmp_path: Path) -> None:
    folder = write(tmp_path / "xml", a=xml(thing(corners=(0, 0, 5, 5))))
    plan, _ = load(tmp_path, folder, voc_origin=1)
    assert "reads them as 1-based, as it was told" in plan.notes[0]
    plan, _ = load(tmp_path, folder, voc_origin=0)
    assert plan.notes == ()


def test_objects_as_tools_write_them(tmp_path: Path) -> None:
    disordered = "<object><bndbox><ymax>4</ymax><xmax>3</xmax><ymin>2</ymin><xmin>1</xmin></bndbox><name> dog\n</name></object>"
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    box = "<bndbox><xmin>{0}</xmin><ymin>{0}</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    several = f"<object><name>zebra</name>{box.format(2)}{box.format(3)}</object>"
    record = one(tmp_path, disordered, thing("man", more=f"<difficult>1</difficult>{part}"), several, voc_origin=0)
    assert record.regions == (
        Region((1, 2, 3, 4), "dog", region_id="object 1"),
        Region((10, 20, 30, 40), "man", is_difficult=True, region_id="object 2"),
        Region((2, 2, 9, 9), "zebra", region_id="object 3"),
        Region((3, 3, 9, 9), "zebra", region_id="object 3"),
    )


def test_an_image_without_objects_is_a_verified_negative(tmp_path: Path) -> None:
    _, records = load(tmp_path, write(tmp_path / "xml", a=xml(thing()), b=xml()))
    assert isinstance(records[1], Record)
    assert records[1].regions == ()
    assert records[1].vocabulary == ("cat",)


@pytest.mark.parametrize(("exhaustive", "expected"), [(None, ("cat", "dog")), (True, ("cat", "dog")), (False, ())])
def test_vocabulary(tmp_path: Path, exhaustive: bool | None, expected: tuple[str, ...]) -> None:
    _, records = load(tmp_path, write(tmp_path / "xml", a=xml(thing("dog")), b=xml(thing("cat"))), exhaustive=exhaustive)
    assert [record.vocabulary for record in records if isinstance(record, Record)] == [expected, expected]


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [(0, 0, (None, None)), ("", "x", (None, None)), ("640.0", 480, (640, 480)), (-1, "nan", (None, None)), (100, 200, (100, 200))],
    ids=["zero", "no number", "float", "negative and nan", "wrong sizes are passed on"],
)
def test_declared_size(tmp_path: Path, width: object, height: object, expected: tuple[int | None, int | None]) -> None:
    _, [record] = load(tmp_path, write(tmp_path / "xml", a=xml(thing(), width=width, height=height)))
    assert isinstance(record, Record)
    assert (record.images[0].declared_width, record.images[0].declared_height) == expected


@pytest.mark.parametrize(
    ("filename", "on_disk", "expected", "noted"),
    [
        pytest.param("a.jpg", ["a.jpg"], "a.jpg", False, id="as it should be"),
        pytest.param("a", ["a.PNG"], "a.PNG", False, id="without suffix"),
        pytest.param("", ["a.jpeg"], "a.jpeg", False, id="empty"),
        pytest.param("a.jpg", ["a.png"], "a.png", False, id="another suffix"),
        pytest.param("IMG.2020", ["IMG.2020.jpg"], "IMG.2020.jpg", False, id="a dot that begins no suffix"),
        pytest.param("C:\\data\\b.jpg", ["b.jpg"], "b.jpg", False, id="Windows path"),
        pytest.param("old_name.jpg", ["a.jpg"], "a.jpg", False, id="left over from before a renaming"),
        pytest.param("b.jpg", ["a.jpg", "b.jpg"], "a.jpg", True, id="names another image that exists"),
        pytest.param("b.jpg", [], "b.jpg", False, id="no image here: as declared"),
        pytest.param("", [], "a.jpg", False, id="no image and no name: VOC's own suffix"),
    ],
)
def test_image_of_an_annotation(tmp_path: Path, filename: str, on_disk: list[str], expected: str, noted: bool) -> None:
    (tmp_path / "photos").mkdir()
    touch(tmp_path / "photos", *on_disk)
    folder = write(tmp_path / "xml", a=xml(thing(), filename=filename))
    plan, [record] = load(tmp_path, folder, images=str(tmp_path / "photos"))
    assert isinstance(record, Record)
    assert record.images[0].path == expected
    assert any("name another image" in note for note in plan.notes) == noted


@pytest.mark.parametrize(
    ("annotations", "prefix"),
    [("data", "JPEGImages/"), ("data/Annotations", "../JPEGImages/")],
    ids=["root", "folder of XML files"],
)
def test_without_images_the_sibling_folder_is_used(tmp_path: Path, annotations: str, prefix: str) -> None:
    write(tmp_path / "data/Annotations/day", a=xml(thing(), filename="a.jpg"))
    touch(tmp_path / "data/JPEGImages", "day/a.jpg")
    _, [record] = load(tmp_path, tmp_path / annotations)
    assert isinstance(record, Record)
    assert record.record_id == "day/a"
    assert record.images[0].path == f"{prefix}day/a.jpg"


def test_split_lists(tmp_path: Path) -> None:
    write(tmp_path / "Annotations", **{stem: xml(thing(stem)) for stem in ("a", "b", "c d")})
    lists = tmp_path / "ImageSets/Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("c d\na\n\na\ngone\n")
    (lists / "b_train.txt").write_text("a -1\nb  1\n")
    (lists / "empty.txt").write_text("x\n")
    plan, records = load(tmp_path, tmp_path / "Annotations", split="train")
    assert [(record.record_id, isinstance(record, Record) and record.split) for record in records] == [("a", "train"), ("c d", "train")]
    assert [(row.reason, row.record_id) for row in plan.rejected] == [("missing_annotation", "gone")]
    assert plan.num_records == 2
    assert isinstance(records[0], Record)
    assert records[0].vocabulary == ("a", "b", "c d"), "the vocabulary is the data set's, not the split's"
    _, records = load(tmp_path, tmp_path, split="b_train")
    assert [record.record_id for record in records] == ["a", "b"]
    with pytest.raises(AnnotationError, match=r"val.txt: found no such split list, expected one of empty, train"):
        load(tmp_path, tmp_path, split="val")
    with pytest.raises(AnnotationError, match="found 1 names, none of an XML file"):
        load(tmp_path, tmp_path, split="empty")


@pytest.mark.parametrize(
    ("content", "reason", "detail"),
    [
        pytest.param("<annotation><object>", "broken_xml", "line 1", id="cut off"),
        pytest.param("", "broken_xml", "no element found", id="empty file"),
        pytest.param("<html/>", "not_voc", "<html>", id="another root"),
        pytest.param(
            xml("<object><name>cat</name></object>"), "bad_object", "object 1 (cat): found <name>, expected a <bndbox>", id="no box"
        ),
        pytest.param(xml("<object><name>a</name><robndbox/></object>"), "bad_object", "<robndbox>", id="rotated box"),
        pytest.param(xml(thing(), thing(" ")), "bad_object", "object 2: found no <name>", id="no name"),
        pytest.param(xml(thing(), thing("dog", (1, 2, "x", 4))), "bad_object", "object 2 (dog): found xmin='1'", id="no number"),
        pytest.param(xml("<object><name>a</name><bndbox/></object>"), "bad_object", "found nothing in <bndbox>", id="no corners"),
        pytest.param('<?xml version="1.0" encoding="foo"?><annotation/>', "broken_xml", "foo", id="unknown encoding"),
        pytest.param(b'<?xml version="1.0" encoding="gbk"?><annotation>\xff\xff', "broken_xml", "decode", id="not in its encoding"),
    ],
)
def test_a_file_that_cannot_be_understood_is_rejected_whole_and_alone(
    tmp_path: Path, content: str | bytes, reason: str, detail: str
) -> None:
    folder = write(tmp_path / "xml", a=xml(thing()), b=content, c=xml(thing()))
    plan, [before, rejected, after] = load(tmp_path, folder)
    assert isinstance(before, Record)
    assert isinstance(after, Record)
    assert isinstance(rejected, Rejected)
    assert (rejected.reason, rejected.position, rejected.record_id) == (reason, "b.xml", "b")
    assert detail in rejected.detail
    assert rejected.source_text == (content if isinstance(content, str) else content.decode(errors="replace"))
    assert plan.num_records == 3


BOMB = '<!DOCTYPE annotation [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]><annotation><filename>&b;</filename></annotation>'
FETCH = '<!DOCTYPE annotation [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation><filename>&x;</filename></annotation>'


@pytest.mark.parametrize(
    "content",
    [BOMB.encode(), FETCH.encode(), BOMB.encode("utf-16"), BOMB.encode("utf-16-be")],
    ids=["bomb", "external file", "UTF-16", "UTF-16 without mark"],
)
def test_entities_are_refused(tmp_path: Path, content: bytes) -> None:
    _, [_, rejected] = load(tmp_path, write(tmp_path / "xml", a=xml(thing()), b=content))
    assert isinstance(rejected, Rejected)
    assert rejected.reason == "unsafe_xml"


def test_an_external_dtd_is_never_fetched(tmp_path: Path) -> None:
    (tmp_path / "x.dtd").write_text('<!ENTITY x "fetched">')
    content = f'<!DOCTYPE annotation SYSTEM "file://{tmp_path}/x.dtd"><annotation><object><name>&x;</name></object></annotation>'
    _, [_, rejected] = load(tmp_path, write(tmp_path / "xml", a=xml(thing()), b=content))
    assert isinstance(rejected, Rejected)
    assert rejected.reason in ("broken_xml", "bad_object")
    assert "fetched" not in rejected.detail


@pytest.mark.parametrize("encoding", ["gb2312", "GBK", "big5", "shift_jis", "utf-8", "utf-16", "latin-1"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    label = "caf\xe9" if encoding == "latin-1" else "山"
    content = f'<?xml version="1.0" encoding="{encoding}"?>{xml(thing(label))}'.encode(encoding)
    _, [record] = load(tmp_path, write(tmp_path / "xml", a=content))
    assert isinstance(record, Record)
    assert record.regions[0].label == label


def test_files_with_strange_names_and_hidden_copies(tmp_path: Path) -> None:
    folder = write(tmp_path / "xml", **{"tab\t and\nline": xml(thing()), "山": xml(thing())})
    write(folder / ".ipynb_checkpoints", a=xml(thing()))
    plan, records = load(tmp_path, folder)
    assert [record.record_id for record in records] == ["tab\t and\nline", "山"]
    assert "1 hidden files" in plan.notes[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda path: None, "found no such folder, expected a folder", id="missing"),
        pytest.param(lambda path: path.write_text(xml()), "found a file, expected a folder", id="a file"),
        pytest.param(lambda path: path.mkdir(), "found a folder with nothing, expected at least one .xml file. Name the", id="empty"),
        pytest.param(lambda path: touch(path, "a.json", "b.json"), "found a folder with 2 x .json, expected", id="another format"),
        pytest.param(lambda path: write(path, a="<html/>"), "no file among 1 that can be read; a.xml: found a root", id="all broken"),
    ],
)
def test_a_source_that_cannot_be_read_as_a_whole(tmp_path: Path, make: object, message: str) -> None:
    assert callable(make)
    make(tmp_path / "xml")
    with pytest.raises(AnnotationError) as caught:
        load(tmp_path, tmp_path / "xml")
    assert message in str(caught.value)


def test_a_missing_image_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="found no such folder"):
        load(tmp_path, write(tmp_path / "xml", a=xml()), images=str(tmp_path / "nowhere"))


def test_a_file_that_vanishes_after_the_plan_is_rejected(tmp_path: Path) -> None:
    folder = write(tmp_path / "xml", a=xml(), b=xml())
    config = SourceConfig(reader="voc", annotations=str(folder))
    plan = VocReader().plan(config, tmp_path / "work", 10)
    (folder / "a.xml").unlink()
    [gone, record] = VocReader().read(config, plan.units[0])
    assert isinstance(gone, Rejected)
    assert gone.reason == "unreadable_file"
    assert isinstance(record, Record)


def test_units_hold_every_file_once_in_order(tmp_path: Path) -> None:
    num_files = ROWS_PER_BATCH + 5
    folder = write(tmp_path / "xml", **{f"{number:05}": "<annotation/>" for number in range(num_files)})
    plan, records = load(tmp_path, folder, per_unit=1000)
    assert [(unit.start, unit.stop) for unit in plan.units] == [(0, 1000), (1000, 2000), (2000, 3000), (3000, 4000), (4000, num_files)]
    assert [record.record_id for record in records] == [f"{number:05}" for number in range(num_files)]


def test_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    def fingerprint(place: str, per_unit: int = 10, **files: str) -> str:
        return load(tmp_path, write(tmp_path / place, **files), per_unit)[0].fingerprint

    first = fingerprint("one", a=xml(thing(corners=(5, 5, 9, 9))))
    assert fingerprint("two", per_unit=1, a=xml(thing(corners=(5, 5, 9, 9)))) == first
    assert fingerprint("three", b=xml(thing(corners=(5, 5, 9, 9)))) != first
    assert fingerprint("four", a=xml(thing(corners=(5, 0, 9, 9)))) != first, "same size, another origin"


@pytest.mark.skipif(not BCCD.exists(), reason="the real data of shared/data/bccd is not here")
def test_real_blood_cells(tmp_path: Path) -> None:
    plan, records = load(tmp_path, BCCD, per_unit=100)
    assert len(plan.units) == 4
    assert len(records) == 364
    good = [record for record in records if isinstance(record, Record)]
    assert len(good) == 364
    assert sum(len(record.regions) for record in good) == 4888
    assert {record.vocabulary for record in good} == {("Platelets", "RBC", "WBC")}
    assert "4886 boxes, 0 with xmin or ymin = 0, 610 with 1, 545 with xmax = width" in plan.notes[0]
    assert "read as 1-based" in plan.notes[0]
    flat = [
        (record.record_id, region.box)
        for record in good
        for region in record.regions
        if region.box[0] == region.box[2] or region.box[1] == region.box[3]
    ]
    assert flat == [("BloodImage_00338", (504, 337, 504, 337)), ("BloodImage_00343", (181, 329, 181, 329))]
    assert all((BCCD / record.images[0].path).exists() for record in good)
    for split, number in {"train": 205, "val": 87, "test": 72}.items():
        assert load(tmp_path, BCCD / "Annotations", split=split)[0].num_records == number


FLAT = "<x1>10</x1><y1>20</y1><x2>30.5</x2><y2>20</y2><x3>30</x3><y3>44</y3>"
NESTED = "<pt><x>10</x><y>20</y></pt><pt><x>30.5</x><y>20</y></pt><pt><x>30</x><y>44</y></pt><username>a</username>"


@pytest.mark.parametrize("corners", [FLAT, NESTED], ids=["x1 y1", "pt"])
def test_a_polygon_without_a_box_is_its_hull(tmp_path: Path, corners: str) -> None:
    polygon = f"<polygon>{corners}</polygon>"
    folder = write(tmp_path / "xml", a=xml(f"<object><name>dog</name>{polygon}</object>", thing(more=polygon)))
    plan, [record] = load(tmp_path, folder, voc_origin=0)
    assert isinstance(record, Record)
    assert [region.box for region in record.regions] == [(10, 20, 30.5, 44), (10, 20, 30, 40)]
    assert "1 objects have no <bndbox>: the hull of their <polygon> is taken" in plan.notes


@pytest.mark.parametrize("corners", ["", "<x1>1</x1><y1>2</y1>", "<x1>a</x1><y1>2</y1><x2>1</x2><y2>1</y2><x3>1</x3><y3>1</y3>"])
def test_a_polygon_that_cannot_be_read_rejects_the_file(tmp_path: Path, corners: str) -> None:
    bad = xml(f"<object><name>dog</name><polygon>{corners}</polygon></object>")
    _, [_, rejected] = load(tmp_path, write(tmp_path / "xml", a=xml(thing()), b=bad))
    assert isinstance(rejected, Rejected)
    assert (rejected.reason, "<polygon>" in rejected.detail) == ("bad_object", True)
