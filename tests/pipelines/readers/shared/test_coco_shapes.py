"""Annotations without a bbox: the hull of their segmentation, against cocoapi's own code for run lengths."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boxcar.pipelines.readers.coco import CocoReader
from boxcar.pipelines.readers.shared.coco_shapes import decode_shaped, hull_xywh
from boxcar.schemas.record import Record
from boxcar.schemas.workflow import SourceConfig


@pytest.mark.parametrize(
    ("segmentation", "expected"),
    [
        ([[10, 20, 30, 20, 30, 45.5]], (10, 20, 20, 25.5)),
        ([[10, 20, 30, 20, 30, 40], [5, 60, 6, 61, 7, 60]], (5, 20, 25, 41)),
        ([10, 20, 30, 20, 30, 40], (10, 20, 20, 20)),
        ({"size": [4, 5], "counts": [5, 2, 13]}, (1, 1, 1, 2)),  # column 1, rows 1 and 2
        ({"size": [4, 5], "counts": [5, 4, 11]}, (1, 0, 2, 4)),  # over the end of a column
        ({"size": [4, 5], "counts": [0, 20]}, (0, 0, 5, 4)),
        ({"size": [4, 5], "counts": [20]}, None),
        ({"size": [4, 5], "counts": "not\x7f"}, None),
        ({"size": [4, 5]}, None),
        ({"counts": [1, 2]}, None),
        ([[5, 5, 5, 5, 5, 5]], None),
        ([], None),
        ([[]], None),
        ([[1, 2, 3]], None),
        ([["a", "b"]], None),
        ([[float("nan"), 1.0]], None),
        (None, None),
        ("x", None),
    ],
)
def test_hull(segmentation: Any, expected: Any) -> None:
    assert hull_xywh(segmentation) == expected


@given(st.data())
def test_run_lengths_are_read_as_cocoapi_reads_them(data: st.DataObject) -> None:
    mask_api = pytest.importorskip("faster_coco_eval.core.mask", reason="pip install '.[eval]'")
    height, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    bits = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width)) if height * width <= 100 else None
    flat = np.array(bits, np.uint8) if bits else np.random.default_rng(data.draw(st.integers(0, 999))).integers(0, 40, height * width) < 1
    encoded = mask_api.encode(np.asfortranarray(flat.reshape(height, width).astype(np.uint8)))
    counts = encoded["counts"]
    text = counts.decode() if isinstance(counts, bytes) else counts
    expected = tuple(np.asarray(mask_api.toBbox([encoded]))[0].tolist())
    assert hull_xywh({"size": [height, width], "counts": text}) == (expected if flat.any() else None)


def test_only_annotations_without_a_box_are_shaped() -> None:
    with_box = {"image_id": 1, "category_id": 2, "bbox": [1, 2, 3], "segmentation": [[1, 2, 3, 4]]}
    assert decode_shaped(json.dumps(with_box)) is None, "a broken box is not replaced by a guess"
    assert decode_shaped(json.dumps(with_box | {"bbox": []})) is not None
    assert decode_shaped('{"image_id": 1') is None


@pytest.mark.parametrize("bbox", [{}, {"bbox": []}, {"bbox": None}], ids=["missing", "empty", "null"])
def test_a_coco_file_with_polygons_alone(tmp_path: Path, bbox: dict[str, Any]) -> None:
    polygon = [10.0, 20.0] * 1000 + [30.0, 44.0]  # longer than what is kept of a bad element
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4]},
        {"segmentation": [[10, 20, 30, 20, 30, 40]], "id": 2, "image_id": 1, "category_id": 3, "iscrowd": 0, **bbox},
        {"segmentation": [polygon], "id": 3, "image_id": 1, "category_id": 3, **bbox},
        {"segmentation": [], "id": 4, "image_id": 1, "category_id": 3, **bbox},
    ]
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 48}],
        "annotations": annotations,
        "categories": [{"id": 3, "name": "dog"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    config = SourceConfig(reader="coco", annotations=str(tmp_path / "a.json"))
    plan = CocoReader().plan(config, tmp_path / "work", 10)
    assert "2 annotations have no bbox: the hull of their segmentation is taken" in plan.notes
    assert [entry.reason for entry in plan.rejected] == ["broken_annotation"]
    (record,) = CocoReader().read(config, plan.units[0])
    assert isinstance(record, Record)
    assert [(region.region_id, region.box) for region in record.regions] == [
        ("annotation 1", (1, 2, 4, 6)),
        ("annotation 2", (10, 20, 30, 40)),
        ("annotation 3", (10, 20, 30, 44)),
    ]
    assert record.not_exhaustive == ("dog",), "annotation 4 has neither box nor shape"
