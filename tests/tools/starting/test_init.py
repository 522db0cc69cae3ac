"""`boxcar init`: what stands in a folder is found, and what it writes is a workflow that works."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from boxcar.schemas.workflow import Workflow
from boxcar.tools.cli import main
from boxcar.tools.starting.folder import list_folder
from boxcar.tools.starting.sniff import Found, sniff
from boxcar.tools.starting.workflow_text import Budget, Choice, workflow_text
from tests.tools.test_cli import invoke

COCO_IMAGE = {"id": 1, "file_name": "a.jpg", "width": 64, "height": 48}
COCO_BOX = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 20]}
CAPTION = {"id": 1, "image_id": 1, "caption": "a dog"}
VOC = "<annotation><filename>a.jpg</filename><object><name>dog</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>20</ymax></bndbox></object></annotation>"  # noqa: E501


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 48), (90, 120, 30)).save(path)


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def coco(**changes: Any) -> dict[str, Any]:
    return {"images": [COCO_IMAGE], "annotations": [COCO_BOX], "categories": [{"id": 1, "name": "dog"}]} | changes


def said(answer: str, image_path: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": "<image>Where is it?"}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [image_path]}


def init(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["init", *map(str, arguments)], catch_exceptions=False)


# ---- what is found


def _qwen(value: str) -> dict[str, Any]:
    return {"conversations": [{"from": "user", "value": value}, {"from": "assistant", "value": "yes"}]}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({"instances_val2017.json": coco()}, ("coco", "val", "images"), id="coco"),
        pytest.param({"annotations/train.json": coco()}, ("coco", "train", "images"), id="coco in a folder"),
        pytest.param({"set.json.gz": coco()}, ("coco", "", "images"), id="coco, compressed"),
        pytest.param(
            {"captions.json": coco(annotations=[{"id": 1, "image_id": 1, "caption": "a"}])}, ("coco_captions", "", "images"), id="captions"
        ),
        pytest.param(
            {"lvis_v1_train.json": coco(categories=[{"id": 1, "name": "dog", "frequency": "r"}])}, ("lvis", "train", "images"), id="lvis"
        ),
        pytest.param({"image_info_test.json": {"images": [COCO_IMAGE], "categories": []}}, ("", "test", "images"), id="no annotations"),
        pytest.param({"panoptic.json": coco(annotations=[{"image_id": 1, "segments_info": []}])}, ("", "", "images"), id="panoptic"),
        pytest.param({"stuff_train.json": coco()}, ("", "train", "images"), id="stuff"),
        pytest.param({"Annotations/a.xml": VOC, "ImageSets/Main/val.txt": "a\n"}, ("voc", "val", None), id="voc"),
        pytest.param({"labels/a.txt": "0 .5 .5 .2 .2\n", "classes.txt": "dog\n"}, ("yolo", "", None), id="yolo"),
        pytest.param(
            {"labels/a.txt": "0 .5 .5 .2 .2\n", "data.yaml": "names: [dog]\nval: images\n"}, ("yolo", "val", None), id="yolo, data.yaml"
        ),
        pytest.param({"x/a.json": {"shapes": [], "imagePath": "a.jpg"}}, ("labelme", "", None), id="labelme"),
        pytest.param({"t.jsonl": {"messages": [], "images": ["a.jpg"]}}, ("sharegpt", "", "images"), id="sharegpt"),
        pytest.param({"t.json": [_qwen("<image>Where?") | {"image": "a.jpg"}]}, ("sharegpt", "", "images"), id="llava"),
        pytest.param({"t.json": [_qwen("Picture 1: <img>a.jpg</img>\nWhere?")]}, ("qwen_vl_chat", "", "images"), id="qwen-vl"),
        pytest.param({"t.jsonl": {"messages": [], "images": ["a.jpg"], "objects": {}}}, ("ms_swift", "", "images"), id="ms-swift"),
        pytest.param({"t.jsonl": {"query": "a", "response": "b", "images": ["a.jpg"]}}, ("ms_swift", "", "images"), id="ms-swift, old"),
        pytest.param({"t.json": [{"image": "a.jpg", "prompt": "a", "label": "b"}]}, ("cogvlm_text", "", "images"), id="cogvlm"),
        pytest.param({"t.jsonl": {"image": "a.jpg", "regions": []}}, ("jsonl", "", "images"), id="jsonl"),
    ],
)
def test_a_format_is_found_with_its_split_and_images(tmp_path: Path, files: dict[str, Any], expected: tuple[str, str, str | None]) -> None:
    image(tmp_path / "images" / "a.jpg")
    for name, content in files.items():
        write(tmp_path / name, content)
    (found,) = sniff(list_folder(tmp_path))
    images = None if found.images is None else str(found.images.relative_to(tmp_path))
    assert (found.reader, found.split, images) == expected
    assert not found.missing_images


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("config.json", {"model_type": "qwen2"}, id="a model's config"),
        pytest.param("broken.json", "{nope", id="broken"),
        pytest.param("empty.json", "", id="empty"),
        pytest.param("numbers.json", [1, 2], id="numbers"),
        pytest.param("ci.yaml", "jobs: {}", id="other YAML"),
        pytest.param("pom.xml", "<project/>", id="other XML"),
        pytest.param("README.txt", "names", id="text"),
    ],
)
def test_other_files_are_passed_over(tmp_path: Path, name: str, content: Any) -> None:
    write(tmp_path / name, content)
    assert sniff(list_folder(tmp_path)) == []


def test_captions_join_their_boxes_and_refs_their_instances(tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.jpg")
    write(tmp_path / "instances_train.json", coco())
    write(tmp_path / "captions_train.json", coco(annotations=[CAPTION]))
    write(tmp_path / "grefcoco" / "instances.json", coco())
    write(tmp_path / "grefcoco" / "grefs(unc).json", [{"ann_id": [1], "image_id": 1, "split": "val", "sentences": []}])
    found = sniff(list_folder(tmp_path))
    assert [(one.reader, one.split, sorted(one.keys)) for one in found] == [
        ("grefcoco", "train", ["instances"]),
        ("grefcoco", "val", ["instances"]),
        ("coco", "train", ["captions"]),
    ]


def test_images_elsewhere_are_missed(tmp_path: Path) -> None:
    write(tmp_path / "train.json", coco())
    (found,) = sniff(list_folder(tmp_path))
    assert (found.images, found.missing_images) == (None, True)


# ---- what is written


@pytest.fixture
def splits(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The drawn scenes as a folder with a training and a held-out file."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my set"
    shutil.copytree(demo / "images", folder / "images")
    whole = json.loads((demo / "instances.json").read_text())
    for name, wanted in (("instances_train.json", range(8)), ("instances_val.json", range(8, 12))):
        images = [whole["images"][number] for number in wanted]
        ids = {image["id"] for image in images}
        boxes = [box for box in whole["annotations"] if box["image_id"] in ids]
        write(folder / name, whole | {"images": images, "annotations": boxes})
    return folder


def test_what_it_writes_converts_and_plans(splits: Path, demo: Path) -> None:
    told = init(splits, "--yes", "--tokenizer", demo / "tokenizer")
    assert told.exit_code == 0
    for fact in (
        "8 records",
        "COCO boxes",
        "split train",
        "12 images in 1 folder",
        "sizes of 8 images",
        "wrote workflows.yaml: my_set_train, my_set_val",
    ):
        assert fact in told.output
    workflows = yaml.safe_load(Path("workflows.yaml").read_text())
    train, held_out = (Workflow.model_validate(workflows[name]) for name in ("my_set_train", "my_set_val"))
    assert train.needs == ("my_set_val",)
    assert train.convert is not None
    assert held_out.convert is not None
    assert train.convert.image_max_pixels == held_out.convert.image_max_pixels, "one frame contract"
    assert held_out.train is None
    assert "the cheapest that keeps 99.9% of the turns (audit of 8 records)" in Path("workflows.yaml").read_text()
    for name in ("my_set_val", "my_set_train"):
        invoke("convert", name, "executor=inline")
    assert "steps" in invoke("plan", "my_set_train").output


def test_workflows_are_added_and_never_replaced(splits: Path, demo: Path) -> None:
    Path("mine.yaml").write_text("# keep me\nother:\n  convert: {}\n")
    assert init(splits, "--yes", "--no-audit", "--file", "mine.yaml").exit_code == 0
    text = Path("mine.yaml").read_text()
    assert text.startswith("# keep me\nother:\n")
    assert list(yaml.safe_load(text)) == ["other", "my_set_train", "my_set_val"]
    again = init(splits, "--yes", "--no-audit", "--file", "mine.yaml")
    assert again.exit_code == 2
    assert "found a workflow 'my_set_train' already" in again.output
    assert Path("mine.yaml").read_text() == text


def test_without_the_tokenizer_it_says_that_nothing_was_audited(splits: Path) -> None:
    told = init(splits, "--yes", "--tokenizer", "/nowhere/tokenizer")
    assert told.exit_code == 0
    assert "not audited, for the tokenizer cannot be read" in told.output
    assert "cutoff_len: 4096  # not audited yet" in Path("workflows.yaml").read_text()


def test_it_asks_for_family_tokenizer_and_box_space(tmp_path: Path, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    image(tmp_path / "data/a.jpg")
    rows = [
        {
            "messages": [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": "[1, 2, 30, 40]"}],
            "images": ["a.jpg"],
        }
    ]
    write(tmp_path / "data/talk.json", rows)
    told = CliRunner().invoke(main, ["init", "data"], input=f"qwen3_vl\n{demo / 'tokenizer'}\npixels\n", catch_exceptions=False)
    assert told.exit_code == 0, told.output
    convert = yaml.safe_load(Path("workflows.yaml").read_text())["data_talk"]["convert"]
    assert (convert["family"], convert["box_space"], convert["tokenizer"]) == ("qwen3_vl", "pixels", str(demo / "tokenizer"))
    assert invoke("convert", "data_talk", "executor=inline").exit_code == 0


def test_llama_factory_s_entries_become_workflows(tmp_path: Path, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    image(tmp_path / "lf/pictures/a.jpg")
    rows = [
        {
            "messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A field."}],
            "images": ["pictures/a.jpg"],
        }
    ]
    write(tmp_path / "lf/talk.json", rows)
    write(tmp_path / "lf/plain.json", [{"instruction": "a", "output": "b"}])
    tags = {"role_tag": "role", "content_tag": "content"}
    entries = {
        "talk-demo": {
            "file_name": "talk.json",
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "images": "images"},
            "tags": tags,
        },
        "plain": {"file_name": "plain.json"},
        "far": {"hf_hub_url": "someone/far"},
        "gone": {"file_name": "gone.json", "formatting": "sharegpt"},
        "renamed": {"file_name": "talk.json", "formatting": "sharegpt", "columns": {"messages": "chat"}},
    }
    write(tmp_path / "lf/dataset_info.json", entries)
    told = init("lf", "--yes", "--tokenizer", demo / "tokenizer")
    assert told.exit_code == 0, told.output
    assert list(yaml.safe_load(Path("workflows.yaml").read_text())) == ["talk_demo"]
    for reason in ("formatting: alpaca; Boxcar reads sharegpt", "hf_hub_url: on a hub", "no such file", "messages: 'chat'; Boxcar reads"):
        assert f"not used: {reason}" in told.output
    assert invoke("convert", "talk_demo", "executor=inline").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["nowhere", "--yes"], "nowhere: found no such folder", id="no folder"),
        pytest.param([".", "--yes", "--family", "qwen9"], "--family: found 'qwen9'", id="family"),
    ],
)
def test_mistakes(splits: Path, arguments: list[str], message: str) -> None:
    told = init(*arguments)
    assert told.exit_code == 2
    assert message in told.output


def test_nothing_to_find(tmp_path: Path) -> None:
    told = init(tmp_path, "--yes")
    assert told.exit_code == 1
    assert "Nothing here that a reader takes" in told.output


@pytest.mark.parametrize("path", ["/a b/c.json", "/a/#x: y.json", "/a/'q' \"r\".json", "/数据/a.json", "/a/yes", "-a", "/a\\b\nc"])
def test_any_path_survives_the_yaml(path: str) -> None:
    found = Found(Path(path), "coco", "COCO", "train", Path(path), keys={"captions": path})
    budget = Budget(1024, 1003520, "why", "why")
    text = workflow_text(Choice("x", found, "qwen2_5_vl", path, path, budget, None, f"from {path}", "v", "t"))
    workflow = Workflow.model_validate(yaml.safe_load(text)["x"])
    assert workflow.convert is not None
    assert (workflow.convert.annotations, workflow.convert.images, workflow.convert.captions, workflow.convert.tokenizer) == (path,) * 4
    assert workflow.description == f"from {path}"
    assert workflow.needs == ("v", "t")
