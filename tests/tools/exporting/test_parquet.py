"""Parquet as other programs read it: by the real `datasets` package, and by polars."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest

import boxcar
from boxcar.tools.exporting import to_parquet
from boxcar.tools.exporting.export_data import export_data
from tests.small_sets import config, run
from tests.small_tokenizers import folder_of
from tests.tools.exporting.test_exporters import shards  # noqa: F401  (the same four pictures, three ways)
from tests.tools.test_cli import invoke


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def _dataset(folder: Path) -> Any:
    import datasets  # noqa: PLC0415

    return datasets.load_dataset(str(folder), cache_dir=str(folder.parent / "cache"))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "qwen2_vl", "shrunk"])
def test_datasets_reads_conversations_images_and_boxes(shards: dict[str, Path], tmp_path: Path, name: str) -> None:  # noqa: F811
    readme, counts = export_data(str(shards[name]), "parquet", tmp_path / "out")
    assert readme == tmp_path / "out/README.md"
    samples = boxcar.load(shards[name])
    loaded = _dataset(tmp_path / "out")
    assert list(loaded) == ["train"]
    assert len(loaded["train"]) == counts["rows"] == len(samples)
    num_boxes = 0
    for row, sample in zip(loaded["train"], samples, strict=True):
        messages = [
            {"role": message["role"], "content": [{"text": None, **part} for part in message["content"]]} for message in sample.messages
        ]
        assert row["messages"] == messages
        sizes = [image.resized_size_wh if name == "shrunk" else image.size_wh for image in sample.images]
        assert [image.size for image in row["images"]] == sizes, "upright, whatever EXIF says"
        width, height = (after / before for after, before in zip(sizes[0], sample.images[0].size_wh, strict=True))
        expected = {
            (label, *(round(value * scale, 2) for value, scale in zip(box, (width, height) * 2, strict=True)))
            for turn in sample.turns
            for label, box in zip(turn.labels, turn.boxes_xyxy_px.tolist(), strict=len(turn.boxes_xyxy_px) > 0)
        }
        objects = row["objects"]
        found = {(label, *(round(v, 2) for v in box)) for label, box in zip(objects["category"], objects["bbox"], strict=True)}
        assert found == expected
        assert objects["image_index"] == [0] * len(objects["bbox"])
        num_boxes += len(objects["bbox"])
    assert num_boxes == counts["boxes"] == 13


def test_polars_reads_the_same_rows(shards: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    export_data(str(shards["qwen3_vl"]), "parquet", tmp_path / "out")
    table = pl.read_parquet(tmp_path / "out/data/*.parquet")
    assert table["id"].to_list() == [sample.sample_id for sample in boxcar.load(shards["qwen3_vl"])]
    assert table["objects"].struct.field("bbox").list.len().sum() == 13


def test_paths_in_place_of_bytes(shards: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    invoke("export-data", str(shards["qwen2_5_vl"]), "--to", "parquet", "--out", str(tmp_path / "out"), "--images", "paths")
    images = pq.read_table(tmp_path / "out/data/train-00000.parquet")["images"].to_pylist()
    assert [image["bytes"] for row in images for image in row] == [None] * 4
    assert all(Path(image["path"]).is_absolute() and Path(image["path"]).is_file() for row in images for image in row)
    assert len(_dataset(tmp_path / "out")["train"][3]["images"]) == 1


def test_splits_and_files(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = sorted((demo / "images").iterdir())
    rows = [
        {"id": str(number), "image": str(images[number]), "regions": [{"label": "a", "box": [1, 2, 30, 40]}], "split": split}
        for number, split in enumerate(["val", "a-b", "val", "val"])
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(config(tmp_path / "rows.jsonl", tmp_path / "shards", demo / "tokenizer", reader="jsonl", images=""))
    monkeypatch.setattr(to_parquet, "BYTES_PER_FILE", 1)
    monkeypatch.setattr(to_parquet, "ROWS_PER_GROUP", 2)
    export_data(str(tmp_path / "shards"), "parquet", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out/data").iterdir()) == [
        "a_b-00000.parquet",
        "val-00000.parquet",
        "val-00001.parquet",
    ]
    loaded = _dataset(tmp_path / "out")
    assert {name: len(split) for name, split in loaded.items()} == {"val": 3, "a_b": 1}


def test_a_family_with_one_question_for_an_image_has_a_row_for_each_turn(demo: Path, tmp_path: Path) -> None:
    settings = {"family": "cogvlm", "images": str(demo / "images"), "cutoff_len": 2048}
    run(config(demo / "instances.json", tmp_path / "shards", Path(folder_of("vicuna")), **settings))
    export_data(str(tmp_path / "shards"), "parquet", tmp_path / "out")
    num_turns = sum(len(sample.turns) for sample in boxcar.load(tmp_path / "shards"))
    rows = _dataset(tmp_path / "out")["train"]
    assert len(rows) == num_turns
    assert len(set(rows["id"])) == num_turns
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert row["messages"][0]["content"][0]["type"] == "image"
