"""Small data sets, conversions of them, and what is then in a folder: for the tests of whole conversions."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from boxcar.pipelines.convert import OnCommit, Progress, convert
from boxcar.pipelines.shards.arrow_files import open_rows
from boxcar.pipelines.shards.work_folder import STATE_FOLDER, Commit
from boxcar.schemas import manifest as manifests
from boxcar.schemas.contract import FrameContract
from boxcar.schemas.manifest import Manifest
from boxcar.schemas.row import ROW_SCHEMA
from boxcar.schemas.workflow import ConvertConfig

BOXCAR = str(Path(sys.executable).with_name("boxcar"))
ONLY_DETECT = {name: {"share": 0} for name in ("detect_joint", "refer", "describe", "absent", "caption", "dialogue")}

CONTRACT = FrameContract(
    family="qwen2_5_vl",
    resize="smart_resize(patch 14, merge 2, bicubic)",
    min_pixels=3136,
    max_pixels=1_003_520,
    image_normalisation="clip",
    box_grid="round(x * (resized_width / width)), 0..resized_width - 1",
    box_text_example='[{"bbox_2d": [1, 2, 3, 4]}]',
    header_example="<|im_start|>user\n",
    turn_open="<|im_start|>user\n",
    answer_open="<|im_end|>\n<|im_start|>assistant\n",
    turn_close="<|im_end|>\n",
    question_prefix="",
    question_suffix="",
    turn_open_ids=[1, 2],
    answer_open_ids=[3, 4],
    turn_close_ids=[5],
    image_token_id=6,
    extra_placeholders=0,
    one_question_per_image=False,
    prompts={"detect": {"en": ["Find {label}."]}},
    not_found={"en": "[]"},
    tokenizer_fingerprint="00ff",
    tokenizer="somewhere/tokenizer",
)
"""A contract made by hand, of no real tokenizer."""


def config(annotations: Path | str, output: Path | str, tokenizer: Path | str, **changes: Any) -> ConvertConfig:
    """A COCO conversion in this process, two records to a unit, but for these changes."""
    settings = {
        "reader": "coco",
        "annotations": str(annotations),
        "family": "qwen2_5_vl",
        "tokenizer": str(tokenizer),
        "cutoff_len": 1024,
        "output": str(output),
        "executor": "inline",
        "records_per_shard": 2,
    }
    return ConvertConfig.model_validate({**settings, **changes})


def demo_config(demo: Path, output: Path | str, **changes: Any) -> ConvertConfig:
    """The demo workflow: 12 records are 6 units."""
    paths = {"captions": str(demo / "captions.json"), "images": str(demo / "images"), "tokenizer": demo / "tokenizer"}
    return config(demo / "instances.json", output, **{**paths, **changes})


def run(settings: ConvertConfig, committed: OnCommit = lambda _: None) -> Manifest:
    """Convert, and return the manifest. Fails where the folder was complete already."""
    manifest, was_complete = convert(settings, Progress(lambda *_: None, committed))
    assert not was_complete
    return manifest


class Stopped(Exception):
    """What stands in for Ctrl-C in the middle of a conversion."""


def run_until(settings: ConvertConfig, num_units: int) -> None:
    """Convert this many units, then stop as a mistake in the caller would. 0: after the plan."""
    num_done = 0

    def count(_: Commit) -> None:
        nonlocal num_done
        num_done += 1
        check()

    def check() -> None:
        if num_done == num_units:
            raise Stopped

    try:
        convert(settings, Progress(lambda *_: check(), count))
    except Stopped:
        return
    raise AssertionError("the conversion has fewer units")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but its state, by name."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and STATE_FOLDER not in path.relative_to(folder).parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """All rows of a conversion, in order."""
    tables = [open_rows(folder / entry.name, ROW_SCHEMA).read_all() for entry in manifests.load(folder).shards]
    return [row for table in tables for row in table.to_pylist()]


def rewrite_manifest(folder: Path, manifest: Manifest) -> None:
    """Put a changed manifest in place, with its hash made right."""
    (folder / manifests.MANIFEST_NAME).write_bytes(manifests.dump(manifest))


def read_table(path: Path) -> pa.Table:
    """A whole Arrow file, copied into memory so that the file may be written anew."""
    return pa.ipc.open_file(path.read_bytes()).read_all()


def write_coco(
    folder: Path,
    images: Sequence[Mapping[str, object]],
    annotations: Sequence[Mapping[str, object]] = (),
    categories: Sequence[str] = ("cat", "dog"),
) -> Path:
    """instances.json in a folder; annotations get their ids from 1 where they have none. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "images": images,
        "annotations": [{"id": number, **annotation} for number, annotation in enumerate(annotations, 1)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(categories, 1)],
    }
    path = folder / "instances.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def picture(path: Path, size_wh: tuple[int, int] = (64, 48), mode: str = "RGB", **options: Any) -> Path:
    """A picture with a gradient, so that it has an upside and a left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    gradient = Image.linear_gradient("L").resize(size_wh)
    image = Image.merge("RGB", (gradient, gradient.rotate(180), gradient.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
    image.convert(mode).save(path, **options)
    return path


def boxcar(*arguments: object, cwd: Path | None = None, stdin: bytes | None = None) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own, with its output as text."""
    done = subprocess.run([BOXCAR, *map(str, arguments)], cwd=cwd, input=stdin, capture_output=True, check=False)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def copy_demo(demo: Path, folder: Path) -> Path:
    """A demo data set that a test may change."""
    shutil.copytree(demo, folder)
    return folder
