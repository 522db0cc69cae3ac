"""The examples of docs/examples, one for each annotation format, are converted as the documentation says."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import boxcar
from boxcar.pipelines.readers.catalog import READERS
from boxcar.schemas.manifest import load
from boxcar.tools.api.runs import convert
from tests.places import ROOT

EXAMPLES = ROOT / "docs/examples"
TOKENIZER = ROOT / "tools/quickstart/base"
DOG, PERSON = (80, 120, 280, 360), (400, 100, 500, 400)
BOXES = {name: {DOG, PERSON} for name in ("coco", "refcoco", "grefcoco", "voc", "yolo", "labelme")} | {
    "coco_captions": set(),
    "lvis": {DOG},  # more persons than boxes, perhaps: the file says so, and nobody asks for them
    **{name: {DOG} for name in ("sharegpt", "ms_swift", "qwen_vl_chat", "cogvlm_text", "jsonl")},
}


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "examples"
    shutil.copytree(EXAMPLES, folder)
    for place in ("images", "images/val2017"):  # LVIS names the folder of COCO as well
        (folder / place).mkdir(exist_ok=True)
        Image.new("RGB", (640, 480), "grey").save(folder / place / "street.jpg")
    monkeypatch.chdir(folder)
    return folder


def test_every_format_has_an_example() -> None:
    assert set(yaml.safe_load((EXAMPLES / "workflows.yaml").read_text())) == set(READERS)


@pytest.mark.parametrize("name", READERS)
def test_the_example_of_a_format_is_converted(name: str, examples: Path) -> None:
    convert(name, file=examples / "workflows.yaml", tokenizer=str(TOKENIZER), executor="inline")
    counts = load(examples / "shards" / name).counts
    assert (counts.records_read, counts.records_written, counts.num_rejected) == (1, 1, 0)
    found = {
        tuple(np.round(box)) for sample in boxcar.load(examples / "shards" / name) for turn in sample.turns for box in turn.boxes_xyxy_px
    }
    assert found == BOXES[name]
