import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from boxcar.pipelines.readers.reader import Reader, SourcePlan
from boxcar.pipelines.readers.yolo import YoloReader
from boxcar.schemas.errors import AnnotationError
from boxcar.schemas.record import RELATIVE, ImageRef, Record, Region, Rejected
from boxcar.schemas.workflow import SourceConfig

BOX = "0 0.5 0.5 0.25 0.5"
NAMES = "names: [cat, dog]\n"


def write(root: Path, files: Mapping[str, str | bytes]) -> Path:
    """Files by relative path; a name that ends with an image's suffix is an empty file."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def load(tmp_path: Path, annotations: Path | str, per_unit: int = 1000, **settings: Any) -> tuple[SourcePlan, list[Record | Rejected]]:
    reader: Reader = YoloReader()
    config = SourceConfig.model_validate({"reader": "yolo", "annotations": str(annotations), **settings})
    plan = reader.plan(config, tmp_path / "work", per_unit)
    return plan, [item for unit in plan.units for item in reader.read(config, unit)]


def one(tmp_path: Path, lines: str | bytes, data: str = NAMES) -> Record | Rejected:
    """What becomes of a data set of one image with these lines."""
    root = write(tmp_path / "data", {"labels/a.txt": lines, "images/a.jpg": "", "data.yaml": data})
    _, [item] = load(tmp_path, root / "labels")
    return item


def ids(records: list[Record | Rejected]) -> list[str]:
    return [record.record_id for record in records]


def paths(records: list[Record | Rejected]) -> list[str]:
    return [record.images[0].path for record in records if isinstance(record, Record)]


def test_a_file_becomes_a_record(tmp_path: Path) -> None:
    root = write(tmp_path / "data", {"labels/a.txt": f"{BOX}\n1 0.1 0.2 0.2 0.4\n", "images/a.jpg": "", "data.yaml": NAMES})
    plan, records = load(tmp_path, root, split="mine", language="zh")
    assert records == [
        Record(
            record_id="a",
            position="labels/a.txt",
            images=(ImageRef("images/a.jpg"),),
            regions=(
                Region((0.375, 0.25, 0.625, 0.75), "cat", region_id="line 1"),
                Region((0.0, 0.0, 0.2, 0.4), "dog", region_id="line 2"),
            ),
            box_space=RELATIVE,
            vocabulary=("cat", "dog"),
            language="zh",
            split="mine",
        )
    ]
    assert plan.notes == ("class names are those of data.yaml",)
    assert plan.num_records == 1


@pytest.mark.parametrize(
    ("line", "box"),
    [
        pytest.param("0 0.25 0.5 0.5 1", (0, 0, 0.5, 1), id="box"),
        pytest.param("0 0.1 0.2 0.5 0.1 0.3 0.7", (0.1, 0.1, 0.5, 0.7), id="polygon of three"),
        pytest.param("0 0.1 0.2 0.5 0.2 0.5 0.8 0.1 0.8", (0.1, 0.2, 0.5, 0.8), id="oriented box of four corners"),
        pytest.param("0.000000 0.25 0.5 0.5 1", (0, 0, 0.5, 1), id="savetxt's class id"),
        pytest.param("0\t0.25   0.5 0.5 1\r\n\r\n  \n", (0, 0, 0.5, 1), id="tabs, blanks, CRLF and blank lines"),
        pytest.param("\ufeff0 0.25 0.5 0.5 1", (0, 0, 0.5, 1), id="byte order mark"),
        pytest.param("0 320 240 20 20", (310, 230, 330, 250), id="pixels by mistake are for a later room"),
        pytest.param("0 0.5 0.5 0 0", (0.5, 0.5, 0.5, 0.5), id="no area is for a later room"),
    ],
)
def test_lines(tmp_path: Path, line: str, box: tuple[float, ...]) -> None:
    record = one(tmp_path, line)
    assert isinstance(record, Record)
    assert [region.box for region in record.regions] == [box]


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        pytest.param("0 0.5 0.5 0.5", "bad_line", "line 2: found 4 values, expected 5 (class cx cy w h)", id="four values"),
        pytest.param("0 0.5 0.5 0.5 0.5 0.9", "bad_line", "found 6 values, expected 5", id="a prediction"),
        pytest.param("0 0.5 0.5 0.5 0.5 0.9", "bad_line", "a prediction's confidence", id="a prediction, explained"),
        pytest.param("0 .1 .2 .3 .4 .5 .6 .7", "bad_line", "found 8 values", id="half a point"),
        pytest.param("0", "bad_line", "found 1 values", id="a class alone"),
        pytest.param("cat 0.5 0.5 0.5 0.5", "bad_line", "found 'cat 0.5 0.5 0.5 0.5', expected numbers", id="a name"),
        pytest.param("0,0.5,0.5,0.5,0.5", "bad_line", "found '0,0.5,", id="commas"),
        pytest.param(b"\xff\xfe0\x00", "bad_line", "expected numbers", id="UTF-16"),
        pytest.param("2 0.5 0.5 0.5 0.5", "unknown_category", "line 2: found class 2, expected 0..1", id="class above"),
        pytest.param("-1 0.5 0.5 0.5 0.5", "unknown_category", "found class -1", id="class below"),
        pytest.param("0.5 0.5 0.5 0.5 0.5", "unknown_category", "found class 0.5", id="class no whole number"),
        pytest.param("nan 0.5 0.5 0.5 0.5", "unknown_category", "found class nan", id="class not a number"),
        pytest.param("inf 0.5 0.5 0.5 0.5", "unknown_category", "found class inf", id="class infinite"),
    ],
)
def test_a_bad_line_rejects_the_file_whole_and_alone(tmp_path: Path, line: str | bytes, reason: str, detail: str) -> None:
    bad = BOX.encode() + b"\n" + (line if isinstance(line, bytes) else line.encode())
    files: dict[str, str | bytes] = {"labels/a.txt": BOX, "labels/b.txt": bad, "labels/c.txt": BOX, "data.yaml": NAMES}
    root = write(tmp_path / "data", {**files, **dict.fromkeys(["images/a.jpg", "images/b.jpg", "images/c.jpg"], "")})
    plan, [before, rejected, after] = load(tmp_path, root)
    assert isinstance(before, Record)
    assert isinstance(after, Record)
    assert isinstance(rejected, Rejected)
    assert (rejected.reason, rejected.position, rejected.record_id) == (reason, "labels/b.txt", "b")
    assert detail in rejected.detail
    assert rejected.source_text.startswith(BOX)
    assert plan.num_records == 3


def test_images_and_labels_without_each_other(tmp_path: Path) -> None:
    images = dict.fromkeys(["images/negative.PNG", "images/unlabelled.jpg", "images/deep/a.b.jpg"], "")
    labels = {"labels/negative.txt": "", "labels/orphan.txt": BOX, "labels/deep/a.b.txt": BOX, "labels/classes.txt": "cat\ndog\n"}
    plan, records = load(tmp_path, write(tmp_path / "data", {**images, **labels}))
    assert ids(records) == ["deep/a.b", "negative"]
    assert paths(records) == ["images/deep/a.b.jpg", "images/negative.PNG"]
    negative = records[1]
    assert isinstance(negative, Record)
    assert negative.regions == ()
    assert negative.vocabulary == ("cat", "dog")
    [rejected] = plan.rejected
    assert (rejected.reason, rejected.position, rejected.record_id) == ("missing_image", "labels/orphan.txt", "orphan")
    assert plan.notes == (
        "class names are those of labels/classes.txt",
        "1 of 3 images have no label file here: unlabelled, they make no record",
    )


def test_two_images_for_one_label_file_are_noted(tmp_path: Path) -> None:
    root = write(tmp_path, {"labels/a.txt": BOX, "images/a.png": "", "images/a.jpg": "", "data.yaml": NAMES})
    plan, records = load(tmp_path, root)
    assert paths(records) == ["images/a.jpg"]
    assert "1 images of" in plan.notes[1]


@pytest.mark.parametrize(
    ("settings", "vocabulary"),
    [({}, ("cat", "dog")), ({"exhaustive": True}, ("cat", "dog")), ({"exhaustive": False}, ())],
    ids=["as the format says", "told so", "told otherwise"],
)
def test_vocabulary(tmp_path: Path, settings: dict[str, bool], vocabulary: tuple[str, ...]) -> None:
    root = write(tmp_path / "data", {"labels/a.txt": BOX, "images/a.jpg": "", "data.yaml": NAMES})
    _, [record] = load(tmp_path, root, **settings)
    assert isinstance(record, Record)
    assert record.vocabulary == vocabulary


@pytest.mark.parametrize(
    ("name", "content", "vocabulary"),
    [
        pytest.param("n.yaml", "names: [b, a]", ("b", "a"), id="list, in the order of the ids"),
        pytest.param("n.yaml", "names: {3: x, 0: y, 12: z}", ("y", "x", "z"), id="mapping with gaps, in the order of the ids"),
        pytest.param("n.yml", "names: {'0': x}\nnc: 1", ("x",), id="ids as text, nc agrees"),
        pytest.param("n.yaml", "names: ['no', 7, same, same]", ("no", "7", "same"), id="quoted no, a number, a name twice"),
        pytest.param("n.txt", "\ufeffcat\r\ntraffic light\n\n", ("cat", "traffic light"), id="one a line"),
        pytest.param("coco.names", "山\n", ("山",), id="darknet's names file"),
    ],
)
def test_class_names(tmp_path: Path, name: str, content: str, vocabulary: tuple[str, ...]) -> None:
    root = write(tmp_path, {"labels/a.txt": "0 .5 .5 .5 .5", "images/a.jpg": "", "data.yaml": "names: [other]", name: content})
    _, [record] = load(tmp_path, root, classes=str(tmp_path / name))
    assert isinstance(record, Record)
    assert record.vocabulary == vocabulary


def test_class_ids_with_gaps_are_named_in_the_rejection(tmp_path: Path) -> None:
    rejected = one(tmp_path, "1 .5 .5 .5 .5", "names: {3: x, 0: y}")
    assert isinstance(rejected, Rejected)
    assert rejected.detail == "line 1: found class 1, expected 0, 3"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("names: [yes, no]", "class 0: found True, expected a class id from 0 and its name. Put quotes around it", id="bool"),
        pytest.param("names: [a, ]\nnc: 2", "found nc: 2 and 1 names", id="nc differs"),
        pytest.param("names: [a, null]", "class 1: found None", id="null"),
        pytest.param("names: [a, [b]]", "class 1: found a list", id="list in list"),
        pytest.param("names: {a: 0}", "class a: found a int", id="turned around"),
        pytest.param("names: 3", "found int of no class names", id="no list"),
        pytest.param("names: []", "found list of no class names", id="empty list"),
        pytest.param("names: [", "found broken YAML", id="broken"),
        pytest.param("- a", "found a list, expected a mapping", id="no mapping"),
        pytest.param("!!python/object/apply:os.system [ls]", "found broken YAML", id="unsafe tags are not obeyed"),
        pytest.param("path: .", "found none, expected class names", id="no names"),
    ],
)
def test_class_names_that_cannot_be_read(tmp_path: Path, content: str, message: str) -> None:
    root = write(tmp_path, {"labels/a.txt": BOX, "images/a.jpg": "", "data.yaml": content})
    with pytest.raises(AnnotationError) as caught:
        load(tmp_path, root)
    assert message in str(caught.value)


def test_blank_line_among_the_names_is_an_error_for_it_moves_the_ids(tmp_path: Path) -> None:
    root = write(tmp_path, {"labels/a.txt": BOX, "images/a.jpg": "", "n.txt": "a\n\nb\n"})
    with pytest.raises(AnnotationError, match="class 1: found ''"):
        load(tmp_path, root, classes=str(tmp_path / "n.txt"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        pytest.param("0 .5 .5 .5 .5 .1 .1 .2 .2", (0.25, 0.25, 0.75, 0.75), id="two keypoints of two values are no polygon"),
        pytest.param("0 .5 .5 .5 .5", (0.25, 0.25, 0.75, 0.75), id="a box alone"),
        pytest.param("0 .1 .2 .3 .4 .5 .6", None, id="another number of keypoints"),
    ],
)
def test_poses(tmp_path: Path, line: str, expected: tuple[float, ...] | None) -> None:
    item = one(tmp_path, line, "names: [cat]\nkpt_shape: [2, 2]")
    if isinstance(item, Rejected):
        assert expected is None
        assert "9 with the keypoints" in item.detail
    else:
        assert [region.box for region in item.regions] == [expected]


SPLIT_FOLDERS = {
    "labels/train/a.txt": BOX,
    "labels/val/b.txt": BOX,
    "images/train/a.jpg": "",
    "images/val/b.jpg": "",
    "images/val/extra.jpg": "",
}
ROBOFLOW = {"train/labels/a.txt": BOX, "valid/labels/b.txt": BOX, "train/images/a.jpg": "", "valid/images/b.jpg": ""}


@pytest.mark.parametrize(
    ("files", "data", "annotations", "split", "expected"),
    [
        pytest.param(
            SPLIT_FOLDERS, "train: images/train\nval: images/val", "data.yaml", "val", ("val/b", "images/val/b.jpg"), id="data.yaml"
        ),
        pytest.param(
            SPLIT_FOLDERS, "train: images/train\nval: images/val", "", "train", ("train/a", "images/train/a.jpg"), id="its folder"
        ),
        pytest.param(SPLIT_FOLDERS, "val: [images/val]", "data.yaml", "", ("val/b", "images/val/b.jpg"), id="the only split, a list"),
        pytest.param(
            SPLIT_FOLDERS, "path: ../x\nval: images/val/", "data.yaml", "val", ("val/b", "images/val/b.jpg"), id="path of another machine"
        ),
        pytest.param(SPLIT_FOLDERS, "path: images\nval: val", "data.yaml", "val", ("val/b", "images/val/b.jpg"), id="path below"),
        pytest.param(SPLIT_FOLDERS, "", "", "val", ("val/b", "images/val/b.jpg"), id="folder of the split's name"),
        pytest.param(SPLIT_FOLDERS, "", "labels", "val", ("val/b", "../images/val/b.jpg"), id="the same below labels"),
        pytest.param(SPLIT_FOLDERS, "", "labels/val", "", ("b", "../../images/val/b.jpg"), id="the split's folder"),
        pytest.param(
            ROBOFLOW,
            "train: ../train/images\nval: ../valid/images",
            "data.yaml",
            "val",
            ("valid/b", "valid/images/b.jpg"),
            id="Roboflow's path that begins a folder too high",
        ),
        pytest.param(ROBOFLOW, "", "valid", "", ("b", "images/b.jpg"), id="Roboflow's folder"),
        pytest.param(
            {**SPLIT_FOLDERS, "val.txt": "./images/val/b.jpg\n\nimages/val/gone.jpg\n"},
            "val: val.txt",
            "data.yaml",
            "val",
            ("val/b", "images/val/b.jpg"),
            id="a text file that lists images",
        ),
        pytest.param({"all/b.txt": BOX, "all/b.jpg": ""}, "", "all", "", ("b", "b.jpg"), id="images beside the labels"),
    ],
)
def test_layouts(tmp_path: Path, files: dict[str, str], data: str, annotations: str, split: str, expected: tuple[str, str]) -> None:
    root = write(tmp_path / "data", {**files, "data.yaml": f"{NAMES}{data}\n"})
    plan, records = load(tmp_path, root / annotations, split=split)
    assert list(zip(ids(records), paths(records), strict=True)) == [expected]
    assert plan.rejected == ()
    base = root if annotations == "data.yaml" else root / annotations
    assert (base / expected[1]).exists()


def test_without_split_all_labels_are_read_with_the_same_ids(tmp_path: Path) -> None:
    root = write(tmp_path / "data", {**SPLIT_FOLDERS, "data.yaml": f"{NAMES}train: images/train\nval: images/val\n"})
    assert ids(load(tmp_path, root)[1]) == ["train/a", "val/b"]
    assert ids(load(tmp_path, root / "labels")[1]) == ["train/a", "val/b"]


def test_train_and_val_may_be_one_folder(tmp_path: Path) -> None:
    root = write(tmp_path / "data", {**SPLIT_FOLDERS, "data.yaml": f"{NAMES}train: [images/val, ./images/val]\n"})
    plan, records = load(tmp_path, root / "data.yaml", split="train")
    assert ids(records) == ["val/b"]
    assert "1 of 2 images" in plan.notes[-1]


@pytest.mark.parametrize("images", ["images", "images/val"], ids=["root of the images", "folder of the split"])
def test_images_elsewhere(tmp_path: Path, images: str) -> None:
    write(tmp_path / "a", {"labels/val/b.txt": BOX, "data.yaml": NAMES})
    write(tmp_path / "elsewhere", {"images/val/b.webp": "", "images/train/c.webp": ""})
    _, records = load(tmp_path, tmp_path / "a", split="val", images=str(tmp_path / "elsewhere" / images))
    assert ids(records) == ["val/b"]
    assert (tmp_path / "elsewhere" / images / paths(records)[0]).exists()


@pytest.mark.parametrize(
    ("files", "annotations", "settings", "message"),
    [
        pytest.param({}, "gone", {}, "found no such folder", id="missing folder"),
        pytest.param({"a.jpg": ""}, "", {}, "found none, expected class names", id="no names"),
        pytest.param({"data.yaml": NAMES, "images/a.jpg": ""}, "", {}, "found a folder with 1 x .jpg, 1 x .yaml", id="no labels"),
        pytest.param({"labels/a.txt": BOX, "data.yaml": NAMES}, "", {}, "Set `images` to the folder of the images.", id="no images"),
        pytest.param({"data.yaml": NAMES}, "data.yaml", {"split": "val"}, "found no split 'val', expected one of no split", id="no splits"),
        pytest.param(ROBOFLOW | {"data.yaml": f"{NAMES}train: a\nval: b"}, "", {}, "found several splits and no `split`", id="which split"),
        pytest.param(ROBOFLOW | {"data.yaml": f"{NAMES}train: a\nval: b"}, "", {"split": "x"}, "one of train, val", id="unknown split"),
        pytest.param({"data.yaml": f"{NAMES}val: gone"}, "data.yaml", {}, "gone: found no such folder", id="the split's folder is missing"),
        pytest.param({"data.yaml": f"{NAMES}val: gone.txt"}, "data.yaml", {}, "gone.txt: found no such file", id="its list is missing"),
        pytest.param({"labels.txt": BOX, "data.yaml": NAMES}, "labels.txt", {}, "found a file, expected a folder", id="a file"),
    ],
)
def test_a_source_that_cannot_be_read_as_a_whole(
    tmp_path: Path, files: dict[str, str], annotations: str, settings: dict[str, Any], message: str
) -> None:
    root = write(tmp_path / "data", files)
    with pytest.raises(AnnotationError) as caught:
        load(tmp_path, root / annotations, **settings)
    assert message in str(caught.value)


def test_fingerprint_follows_names_too(tmp_path: Path) -> None:
    root = write(tmp_path / "data", {"labels/a.txt": BOX, "images/a.jpg": "", "data.yaml": "names: [cat]"})
    first = load(tmp_path, root)[0].fingerprint
    assert load(tmp_path, root, per_unit=1)[0].fingerprint == first
    write(root, {"data.yaml": "names: [dog]"})
    assert load(tmp_path, root)[0].fingerprint != first


@pytest.mark.parametrize(
    ("content", "is_list"),
    [
        pytest.param("data/obj/a.jpg\ndata/obj/b.PNG\n", True, id="paths of images"),
        pytest.param("\ufeff\n  /data/with space/a.JPG \n", True, id="byte order mark, empty line, spaces"),
        pytest.param(BOX, False, id="a label"),
        pytest.param("", False, id="empty"),
    ],
)
def test_a_list_of_images_is_not_a_label_file(tmp_path: Path, content: str, is_list: bool) -> None:
    root = write(tmp_path / "data", {"train.txt": content, "a.txt": BOX, "a.jpg": "", "data.yaml": NAMES})
    plan, records = load(tmp_path, root)
    assert ids(records) == ["a"]
    assert [(item.reason, item.position) for item in plan.rejected] == ([] if is_list else [("missing_image", "train.txt")])
    assert ("1 text files list images and are not label files, for example train.txt" in plan.notes) == is_list


@pytest.mark.parametrize(("stored", "named"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_of_images_in_another_unicode_form(tmp_path: Path, stored: Any, named: Any) -> None:
    image, label = unicodedata.normalize(stored, "Tür"), unicodedata.normalize(named, "Tür")
    root = write(tmp_path / "data", {f"labels/{label}.txt": BOX, f"images/{image}.jpg": "", "data.yaml": NAMES})
    plan, records = load(tmp_path, root)
    assert plan.rejected == ()
    assert paths(records) == [f"images/{image}.jpg"]
