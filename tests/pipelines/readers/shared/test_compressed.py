"""Compressed annotation files are read as what they hold."""

import gzip
from pathlib import Path

import pyarrow as pa
import pytest

from boxcar.pipelines.convert import images_root, source_name
from boxcar.pipelines.readers.catalog import plan_source
from boxcar.pipelines.readers.shared import compressed
from boxcar.pipelines.readers.shared.compressed import unpacked, unpacked_name
from boxcar.schemas.errors import AnnotationError
from boxcar.schemas.workflow import ConvertConfig, SourceConfig

COCO = b"""{"images": [{"id": 1, "file_name": "a.jpg", "width": 8, "height": 6}], "categories": [{"id": 3, "name": "dog"}],
 "annotations": [{"id": 9, "image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4]}]}"""
ROWS = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n' * 3


def pack(folder: Path, name: str, data: bytes) -> str:
    path = folder / name
    if name.endswith(".zst"):
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(data)
    else:
        half = len(data) // 2
        path.write_bytes(gzip.compress(data[:half]) + gzip.compress(data[half:]))  # as `cat a.gz b.gz` makes them
    return str(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".GZ"])
@pytest.mark.parametrize(("reader", "name", "data"), [("coco", "instances.json", COCO), ("sharegpt", "rows.jsonl", ROWS)])
def test_a_compressed_file_is_the_plain_file(tmp_path: Path, reader: str, name: str, data: bytes, suffix: str) -> None:
    (tmp_path / name).write_bytes(data)
    plain = plan_source(SourceConfig(reader=reader, annotations=str(tmp_path / name)), tmp_path / "plain", 2)
    packed_path = pack(tmp_path, name + suffix, data)
    packed = plan_source(SourceConfig(reader=reader, annotations=packed_path), tmp_path / "packed", 2)
    assert packed.fingerprint == plain.fingerprint
    assert [(unit.start, unit.stop) for unit in packed.units] == [(unit.start, unit.stop) for unit in plain.units]
    assert packed.num_records == plain.num_records


def test_names_and_folders_are_those_of_the_file_itself(tmp_path: Path) -> None:
    config = ConvertConfig(
        reader="coco", annotations="/data/instances_train.json.gz", family="qwen2_5_vl", tokenizer="t", cutoff_len=9, output="out"
    )
    assert images_root(SourceConfig(reader="coco", annotations=pack(tmp_path, "a.json.gz", COCO))) == str(tmp_path)
    assert source_name(config) == "instances_train"
    assert [unpacked_name(path) for path in ("s3://b/a.json.zst", "a.jsonl.GZ", "a.json")] == ["a.json", "a.jsonl", "a.json"]


def test_captions_and_instances_are_unpacked_too(tmp_path: Path) -> None:
    config = SourceConfig(
        reader="coco", annotations="plain.json", captions=pack(tmp_path, "c.json.gz", COCO), instances=pack(tmp_path, "i.json.gz", ROWS)
    )
    there = unpacked(config, tmp_path / "work")
    assert there.annotations == "plain.json"
    assert Path(there.captions or "").read_bytes() == COCO
    assert Path(there.instances or "").read_bytes() == ROWS


@pytest.mark.parametrize("data", [b"no gzip at all", gzip.compress(COCO * 100)[:-20]], ids=["not gzip", "cut off"])
def test_a_damaged_file_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.json.gz"
    path.write_bytes(data)
    with pytest.raises(AnnotationError, match=r"a\.json\.gz: found .* expected a complete gzip file"):
        unpacked(SourceConfig(reader="coco", annotations=str(path)), tmp_path / "work")
    assert list((tmp_path / "work").rglob("*.json")) == []


def test_a_file_that_grows_without_bounds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "FREE_BYTES", 1 << 20)
    path = pack(tmp_path, "a.json.gz", b" " * (3 << 20))
    with pytest.raises(AnnotationError, match="more than 1,048,576 bytes inside"):
        unpacked(SourceConfig(reader="coco", annotations=path), tmp_path / "work")
