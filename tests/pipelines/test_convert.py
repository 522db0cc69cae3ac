"""Whole conversions: the same input gives the same bytes, whatever stopped, died or filled up on the way, and nothing is lost silently."""

import errno
import io
import json
import os
import random
import signal
import struct
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image

from boxcar.pipelines import convert as conversion
from boxcar.pipelines.convert import Progress, convert
from boxcar.pipelines.images.image_file import encode_png, load_image, resize_image
from boxcar.pipelines.shards.work_folder import STATE_FOLDER, Commit, WorkDir
from boxcar.pipelines.verify import verify_folder
from boxcar.schemas import manifest as manifests
from boxcar.schemas.errors import AnnotationError, BoxcarError, ConfigError, TokenizerError
from boxcar.schemas.record import Rejected
from boxcar.schemas.workflow import ConvertConfig
from tests.small_sets import (
    BOXCAR,
    ONLY_DETECT,
    config,
    contents,
    copy_demo,
    demo_config,
    picture,
    read_rows,
    read_table,
    run,
    run_until,
    write_coco,
)

NUM_UNITS = 6
"""Of the demo data set, in these tests."""


@pytest.fixture(scope="module")
def expected(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The demo converted at one go."""
    folder = tmp_path_factory.mktemp("expected")
    run(demo_config(demo, folder))
    return contents(folder)


def quarantine(folder: Path) -> list[Rejected]:
    """Every rejected record, in the order of the manifest."""
    files = [folder / entry.name for entry in manifests.load(folder).quarantine]
    return [msgspec.json.decode(line, type=Rejected) for path in files for line in path.read_bytes().splitlines()]


# ---- what comes out


def test_the_demo_is_converted_and_counted(demo: Path, tmp_path: Path) -> None:
    source = json.loads((demo / "instances.json").read_bytes())
    manifest = run(demo_config(demo, tmp_path))
    counts, rows = manifest.counts, read_rows(tmp_path)
    assert (counts.records_read, counts.records_written, counts.rows_written, counts.images) == (12, 12, 12, 12)
    assert counts.boxes_read == counts.boxes_kept == len(source["annotations"])
    assert counts.turns["caption"] == 12
    assert counts.turns["detect"] == len({(box["image_id"], box["category_id"]) for box in source["annotations"]})
    assert [row["sample_id"] for row in rows] == [f"instances/{image['id']}" for image in source["images"]]
    assert sum(counts.turns.values()) == sum(len(row["turns"]) for row in rows)
    assert counts.visual_tokens == sum(row["visual_tokens"] for row in rows)
    assert counts.text_tokens == sum(row["text_tokens"] for row in rows)
    assert manifest.settings["cutoff_len"] == 1024
    assert (manifest.quarantine, manifest.image_shards, manifest.source_notes) == ([], [], [])
    assert verify_folder(tmp_path).problems == []


def test_small_units_give_a_shard_each(demo: Path, tmp_path: Path) -> None:
    manifest = run(demo_config(demo, tmp_path, records_per_shard=5))
    assert [(entry.name, entry.num_rows) for entry in manifest.shards] == [
        ("rows-00000.arrow", 5),
        ("rows-00001.arrow", 5),
        ("rows-00002.arrow", 2),
    ]
    assert sorted(os.listdir(tmp_path)) == sorted([STATE_FOLDER, "manifest.json", *(entry.name for entry in manifest.shards)])


def test_the_rows_do_not_depend_on_how_the_input_is_cut(demo: Path, tmp_path: Path) -> None:
    for size in (1, 5, 100):
        run(demo_config(demo, tmp_path / str(size), records_per_shard=size))
    assert read_rows(tmp_path / "1") == read_rows(tmp_path / "5") == read_rows(tmp_path / "100")
    counts = [manifests.load(tmp_path / size).counts for size in ("1", "5", "100")]
    assert counts[0] == counts[1] == counts[2]


def test_progress_tells_all_units_once(demo: Path, tmp_path: Path) -> None:
    told: list[object] = []
    progress = Progress(
        lambda units, records, done: told.append((units, records, len(done.units))), lambda commit: told.append(commit.number)
    )
    convert(demo_config(demo, tmp_path), progress)
    assert told == [(NUM_UNITS, 12, 0), *range(NUM_UNITS)]


def test_a_conversion_that_is_complete_is_left_as_it_is(demo: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    first = run(demo_config(demo, tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.is_file()}
    second, was_complete = convert(demo_config(demo, tmp_path), Progress(_unexpected, _unexpected))
    assert was_complete
    assert second == first
    assert contents(tmp_path) == expected
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.is_file()} == before


def _unexpected(*_: object) -> None:
    pytest.fail("there was nothing to do")


def test_a_complete_conversion_is_found_complete_though_its_annotations_were_touched(demo: Path, tmp_path: Path) -> None:
    source = copy_demo(demo, tmp_path / "source")
    run(demo_config(source, tmp_path / "out"))
    before = contents(tmp_path / "out")
    os.utime(source / "instances.json", ns=(0, 0))
    _, was_complete = convert(demo_config(source, tmp_path / "out"), Progress(_unexpected, _unexpected))
    assert was_complete
    assert contents(tmp_path / "out") == before


def test_executor_workers_and_place_change_no_byte(demo: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    run(demo_config(demo, f"file://{tmp_path}/deep/er", num_workers=3))
    assert contents(tmp_path / "deep/er") == expected


def test_relative_paths_start_in_the_current_folder(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes]
) -> None:
    monkeypatch.chdir(demo.parent)
    relative = os.path.relpath(tmp_path / "out")
    run(demo_config(Path("demo"), relative))
    assert contents(tmp_path / "out") == expected
    manifest = manifests.load(tmp_path / "out")
    assert manifest.images_root == str(demo / "images")
    assert manifest.settings["annotations"] == str(demo / "instances.json")
    monkeypatch.chdir(tmp_path)
    _, was_complete = convert(demo_config(demo, tmp_path / "out"), Progress(_unexpected, _unexpected))
    assert was_complete


# ---- whose folder it is


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        pytest.param({"cutoff_len": 2048}, "cutoff_len 1024 there, 2048 here", id="a setting"),
        pytest.param({"tasks": {"caption": {"share": 0.5}}}, "tasks.caption.share 1.0 there, 0.5 here", id="a nested setting"),
        pytest.param({"image_max_pixels": 100_000}, "max_pixels: 12845056 here, 100000 there", id="the contract"),
        pytest.param({"family": "qwen3_vl"}, "family: 'qwen2_5_vl' here, 'qwen3_vl' there", id="the family"),
        pytest.param({"captions": None}, "captions.json' there, None here", id="a source"),
    ],
)
@pytest.mark.parametrize("complete", [False, True], ids=["stopped", "complete"])
def test_other_settings_into_the_same_folder_are_refused_with_both_values(
    demo: Path, tmp_path: Path, changes: dict[str, Any], difference: str, complete: bool
) -> None:
    if complete:
        run(demo_config(demo, tmp_path))
    else:
        run_until(demo_config(demo, tmp_path), 2)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"found another conversion.*Choose another `output`") as caught:
        run(demo_config(demo, tmp_path, **changes))
    assert difference in str(caught.value)
    assert contents(tmp_path) == before


def test_a_folder_of_other_files_is_refused_and_left_as_it_was(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match=r"1 files, such as 'thesis\.tex', expected an empty folder"):
        run(demo_config(demo, tmp_path))
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["thesis.tex"]


def test_a_file_in_the_place_of_the_folder_is_refused(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(ConfigError, match="found a file, expected a folder"):
        run(demo_config(demo, tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "precious"


def test_two_drivers_at_once_are_refused(demo: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    refusals = []

    def start_another(_: Commit) -> None:
        with pytest.raises(BoxcarError, match="another boxcar convert that writes to it, expected one at a time") as caught:
            run(demo_config(demo, tmp_path))
        refusals.append(caught.value)

    run(demo_config(demo, tmp_path), start_another)
    assert len(refusals) == NUM_UNITS
    assert contents(tmp_path) == expected


# ---- annotations that change


def test_annotations_that_changed_since_a_run_was_stopped_are_refused(demo: Path, tmp_path: Path) -> None:
    source = copy_demo(demo, tmp_path / "source")
    run_until(demo_config(source, tmp_path / "out"), 2)
    before = contents(tmp_path / "out")
    _append_a_category(source / "instances.json")
    with pytest.raises(BoxcarError, match=r"instances\.json: found annotations that changed since the conversion into this folder began"):
        run(demo_config(source, tmp_path / "out"))
    assert contents(tmp_path / "out") == before


def _append_a_category(path: Path) -> None:
    content = json.loads(path.read_bytes())
    content["categories"].append({"id": 99, "name": "late"})
    path.write_text(json.dumps(content))


def _drop_the_first_image(path: Path) -> None:
    content = json.loads(path.read_bytes())
    first = content["images"].pop(0)
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] != first["id"]]
    path.write_text(json.dumps(content))


def test_annotations_that_were_put_back_are_gone_on_with(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index of the changed file must not be taken for the old one, though size and time of the file are the old ones again."""
    source = copy_demo(demo, tmp_path / "source")
    run(demo_config(source, tmp_path / "expected"))
    run_until(demo_config(source, tmp_path / "out"), 2)
    (source / "instances.json").rename(source / "kept")
    (source / "instances.json").write_bytes((source / "kept").read_bytes())
    _drop_the_first_image(source / "instances.json")
    with pytest.raises(BoxcarError, match="annotations that changed"):
        run(demo_config(source, tmp_path / "out"))
    (source / "kept").rename(source / "instances.json")
    run(demo_config(source, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_annotations_that_were_only_touched_are_gone_on_with(demo: Path, tmp_path: Path) -> None:
    source = copy_demo(demo, tmp_path / "source")
    run(demo_config(source, tmp_path / "expected"))
    run_until(demo_config(source, tmp_path / "out"), 2)
    os.utime(source / "captions.json", ns=(0, 0))
    run(demo_config(source, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


@pytest.mark.parametrize("name", ["instances.json", "captions.json"])
def test_annotations_that_changed_after_the_end_are_refused(demo: Path, tmp_path: Path, name: str) -> None:
    source = copy_demo(demo, tmp_path / "source")
    run(demo_config(source, tmp_path / "out"))
    before = contents(tmp_path / "out")
    text = (source / name).read_text()
    (source / name).write_text(text.replace("circle", "oval__", 1))
    with pytest.raises(ConfigError, match="a complete conversion of other annotations under the same settings"):
        run(demo_config(source, tmp_path / "out"))
    assert contents(tmp_path / "out") == before
    assert verify_folder(tmp_path / "out").problems == []


# ---- stopping and going on


@pytest.mark.parametrize("order", [list(reversed(range(NUM_UNITS))), [3, 0, 5, 1, 4, 2]], ids=str)
def test_the_bytes_do_not_depend_on_the_order_of_units(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes], order: list[int]
) -> None:
    in_order = conversion._run_inline

    def shuffled(job: Any, pending: Sequence[int], num_workers: int | None) -> Iterator[int]:
        assert list(pending) == sorted(order)
        return in_order(job, order, num_workers)

    monkeypatch.setattr(conversion, "_run_inline", shuffled)
    run(demo_config(demo, tmp_path))
    assert contents(tmp_path) == expected


@pytest.mark.parametrize("num_units", range(NUM_UNITS + 1))
def test_a_run_that_was_stopped_is_gone_on_with(demo: Path, tmp_path: Path, expected: dict[str, bytes], num_units: int) -> None:
    run_until(demo_config(demo, tmp_path), num_units)
    assert not (tmp_path / "manifest.json").exists()
    assert sum(name.startswith("rows-") for name in contents(tmp_path)) == num_units
    told: list[object] = []
    progress = Progress(lambda units, records, done: told.append(len(done.units)), lambda commit: told.append(commit.number))
    convert(demo_config(demo, tmp_path), progress)
    assert told == [num_units, *range(num_units, NUM_UNITS)], "only what is missing is done"
    assert contents(tmp_path) == expected


def test_a_unit_that_is_done_twice_is_the_same(demo: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    run_until(demo_config(demo, tmp_path), 4)
    for commit in (tmp_path / STATE_FOLDER / "units").iterdir():
        commit.unlink()
    run(demo_config(demo, tmp_path))
    assert contents(tmp_path) == expected


@pytest.mark.parametrize("name", ["rows-00001.arrow", f"{STATE_FOLDER}/units/00001.json"], ids=["rows", "commit"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0], ids=["emptied", "cut", "a bit flipped"])
def test_a_damaged_unit_is_done_again(demo: Path, tmp_path: Path, expected: dict[str, bytes], name: str, kept: float) -> None:
    run_until(demo_config(demo, tmp_path), 3)
    data = bytearray((tmp_path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / name).write_bytes(data[: int(len(data) * kept)])
    told: list[int] = []
    convert(demo_config(demo, tmp_path), Progress(lambda *_: None, lambda commit: told.append(commit.number)))
    assert contents(tmp_path) == expected
    if "rows" in name or kept < 1:
        assert told == [1, 3, 4, 5]


def test_what_a_killed_writer_left_is_gone_at_the_end(demo: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    run_until(demo_config(demo, tmp_path), 3)
    (tmp_path / ".rows-00003.arrow.4711.tmp").write_bytes(b"half")
    run(demo_config(demo, tmp_path))
    assert contents(tmp_path) == expected
    assert verify_folder(tmp_path).problems == []


def test_a_record_that_can_be_used_by_now_leaves_the_quarantine(demo: Path, tmp_path: Path) -> None:
    """Killed between the quarantine and the commit of a unit; then the missing image came."""
    source = copy_demo(demo, tmp_path / "source")
    run(demo_config(source, tmp_path / "expected"))
    missing = source / "images" / "scene_0003.png"
    missing.rename(tmp_path / "later.png")
    run_until(demo_config(source, tmp_path / "out"), 2)
    assert (tmp_path / "out" / "rejected-00001.jsonl").exists()
    (tmp_path / "out" / STATE_FOLDER / "units" / "00001.json").unlink()
    (tmp_path / "later.png").rename(missing)
    run(demo_config(source, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_a_run_killed_between_manifest_and_cleaning_is_complete(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(_: WorkDir) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(WorkDir, "finish", killed)
    with pytest.raises(KeyboardInterrupt):
        run(demo_config(demo, tmp_path))
    monkeypatch.undo()
    _, was_complete = convert(demo_config(demo, tmp_path), Progress(_unexpected, _unexpected))
    assert was_complete
    assert sorted(os.listdir(tmp_path / STATE_FOLDER)) == ["lock", "run.json"]


# ---- real processes


def write_workflow(folder: Path, settings: ConvertConfig) -> Path:
    path = folder / "workflows.yaml"
    path.write_text(json.dumps({"small": {"convert": settings.model_dump(mode="json")}}))  # JSON is YAML
    return path


def start(workflow: Path) -> subprocess.Popen[str]:
    command = [BOXCAR, "convert", "small", "--file", str(workflow)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_units(process: subprocess.Popen[str], output: Path, num_units: int) -> None:
    """Until this many units are committed, or the process has ended. 0: until the folder is there."""
    while process.poll() is None:
        if num_units == 0 and (output / STATE_FOLDER).exists():
            return
        if num_units and len(list((output / STATE_FOLDER / "units").glob("*.json"))) >= num_units:
            return
        time.sleep(0.001)


def test_a_process_that_is_killed_again_and_again_ends_with_the_same_bytes(demo: Path, tmp_path: Path) -> None:
    settings = demo_config(demo, tmp_path / "out", records_per_shard=1, image_storage="embed")
    run(settings.model_copy(update={"output": str(tmp_path / "expected")}))
    workflow = write_workflow(tmp_path, settings)
    chance = random.Random(20261121)
    codes = []
    for num_units in (0, 1, 3, 5, 7, 9):
        process = start(workflow)
        wait_for_units(process, tmp_path / "out", num_units)
        time.sleep(chance.random() * 0.01)
        process.kill()
        process.communicate()
        codes.append(process.returncode)
    assert codes.count(-signal.SIGKILL) >= 3, "else this test has tested nothing"
    process = start(workflow)
    _, messages = process.communicate()
    assert process.returncode == 0, messages
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert verify_folder(tmp_path / "out").problems == []


def test_ctrl_c_says_what_is_kept_and_leaves_a_run_to_go_on_with(demo: Path, tmp_path: Path) -> None:
    annotations = _many_records(demo, tmp_path)
    settings = config(annotations, tmp_path / "out", demo / "tokenizer", images=str(demo / "images"), records_per_shard=1)
    workflow = write_workflow(tmp_path, settings)
    process = start(workflow)
    wait_for_units(process, tmp_path / "out", 1)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate()
    assert process.returncode == 130, messages
    flat = " ".join(messages.split())
    assert "Stopped." in flat
    assert "units are complete and kept in" in flat
    assert "run the same command to go on" in flat
    assert "Traceback" not in messages
    assert not (tmp_path / "out" / "manifest.json").exists()
    process = start(workflow)
    _, messages = process.communicate()
    assert process.returncode == 0, messages
    run(settings.model_copy(update={"output": str(tmp_path / "expected")}))
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def _many_records(demo: Path, folder: Path) -> Path:
    """The demo's images ten times over: long enough to be interrupted."""
    source = json.loads((demo / "instances.json").read_bytes())
    images = [{**image, "id": image["id"] + 100 * copy} for copy in range(10) for image in source["images"]]
    boxes = [
        {**box, "id": 1000 * copy + box["id"], "image_id": box["image_id"] + 100 * copy}
        for copy in range(10)
        for box in source["annotations"]
    ]
    return write_coco(folder / "many", images, boxes, [category["name"] for category in source["categories"]])


# ---- disks that are full or closed


def test_a_full_disk_at_any_moment_costs_nothing_but_another_run(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The n-th fsync of a run fails, for every n; then the run is repeated."""
    run(demo_config(demo, tmp_path / "expected", records_per_shard=6))
    expected = contents(tmp_path / "expected")
    fsync = os.fsync
    num_failures = 0
    for fails_at in range(1, 200):
        calls = 0

        def failing(descriptor: int, fails_at: int = fails_at) -> None:
            nonlocal calls
            calls += 1
            if calls == fails_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", failing)
        folder = tmp_path / str(fails_at)
        try:
            run(demo_config(demo, folder, records_per_shard=6))
        except BoxcarError as error:
            num_failures += "No space left on device while writing" in str(error)
        monkeypatch.undo()
        if calls < fails_at:
            break
        convert(demo_config(demo, folder, records_per_shard=6), Progress(lambda *_: None, lambda _: None))
        assert contents(folder) == expected
    assert num_failures > 10
    assert num_failures == fails_at - 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A folder on a file system of its own; called with mount options, again to change them."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot mount a file system here: {done.stderr.decode().strip()}")
        return folder

    yield mount
    subprocess.run(["umount", "--lazy", folder], check=False, capture_output=True)


@pytest.mark.parametrize("size", ["4k", "16k", "40k", "80k", "120k"])
def test_a_disk_that_is_full_says_so_and_more_room_ends_the_run(
    demo: Path, small_disk: Callable[[str], Path], expected: dict[str, bytes], size: str
) -> None:
    folder = small_disk(f"size={size}")
    with pytest.raises(BoxcarError, match=r"No space left on device.*continues where it stopped"):
        run(demo_config(demo, folder / "out"))
    assert not (folder / "out" / "manifest.json").exists()
    small_disk("remount,size=10m")
    run(demo_config(demo, folder / "out"))
    assert contents(folder / "out") == expected


def test_a_read_only_disk_is_an_error_of_ours(demo: Path, small_disk: Callable[[str], Path]) -> None:
    folder = small_disk("ro")
    with pytest.raises(BoxcarError, match="Read-only file system while writing"):
        run(demo_config(demo, folder / "out"))


def test_a_disk_that_becomes_read_only_costs_nothing_but_another_run(
    demo: Path, small_disk: Callable[[str], Path], expected: dict[str, bytes]
) -> None:
    folder = small_disk("size=10m")
    run_until(demo_config(demo, folder / "out"), 2)
    small_disk("remount,ro")
    with pytest.raises(BoxcarError, match="Read-only file system"):
        run(demo_config(demo, folder / "out"))
    small_disk("remount,rw")
    run(demo_config(demo, folder / "out"))
    assert contents(folder / "out") == expected


# ---- settings that cannot be meant


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        pytest.param({"voc_origin": 1}, "voc_origin", id="a key of VOC"),
        pytest.param({"classes": "names.txt"}, "classes", id="a key of YOLO"),
        pytest.param({"box_space": "relative"}, "box_space", id="a key of conversations"),
        pytest.param({"instances": "i.json"}, "instances", id="a key of RefCOCO"),
        pytest.param({"reader": "jsonl"}, "captions", id="a key of COCO"),
    ],
)
def test_a_key_that_the_format_does_not_know_is_refused(demo: Path, tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"convert.{key}: found .* does not use this key. It uses: annotations") as caught:
        run(demo_config(demo, tmp_path / "out", **changes))
    assert "reader" in caught.value.expected
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        pytest.param({"reader": "cocoa"}, ConfigError, "convert.reader: found 'cocoa', expected one of coco, ", id="reader"),
        pytest.param({"family": "gpt"}, ConfigError, "convert.family: found 'gpt', expected one of qwen2_vl, ", id="family"),
        pytest.param({"tokenizer": "/no/such"}, TokenizerError, "/no/such: found no such folder", id="tokenizer"),
        pytest.param({"cutoff_len": 10**9}, ConfigError, "convert.cutoff_len: found 1000000000, expected at most 128000", id="cutoff"),
        pytest.param({"image_max_pixels": 100}, ConfigError, "image_max_pixels: found 100, expected at least 784", id="pixels"),
        pytest.param({"output": "s3://bucket/out"}, ConfigError, "convert.output: found s3://bucket/out", id="remote output"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    demo: Path, tmp_path: Path, changes: dict[str, Any], kind: type[BoxcarError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        run(demo_config(demo, **{"output": tmp_path / "out", **changes}))
    assert list(tmp_path.iterdir()) == []


def test_a_relative_output_inside_a_ray_job_is_refused(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job's working directory is a copy that is thrown away, and the shards with it."""
    job = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0f"
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    with pytest.raises(ConfigError, match="the relative path 'shards' inside a Ray job, expected an absolute path"):
        run(demo_config(demo, "shards"))
    assert list(job.iterdir()) == []
    run(demo_config(demo, tmp_path / "out"))


# ---- sources as a whole


def _missing(folder: Path) -> Path:
    return folder / "none.json"


def _folder(folder: Path) -> Path:
    (folder / "a folder").mkdir()
    return folder / "a folder"


def _text(content: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "a.json").write_text(content)
        return folder / "a.json"

    return write


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(_missing, r"none\.json: found no such file", id="missing"),
        pytest.param(_folder, "a folder: found a folder, expected a file", id="folder"),
        pytest.param(_text(""), r"a\.json", id="empty"),
        pytest.param(
            _text('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}'), 'an empty list "images"', id="no images"
        ),
        pytest.param(_text('{"annotations": [], "categories": []}'), "no key 'images'", id="no key"),
        pytest.param(_text('{"images": [], "annotations": [], "categories": []}'), 'an empty list "images"', id="nothing"),
        pytest.param(_text('{"images": [{"id": 1, "file_name": "a.jpg"}]}'), "images without annotations", id="images alone"),
        pytest.param(_text('{"images": [{"id": 1, "file_name": "a.jpg"}'), r"a\.json.*byte \d+", id="cut"),
        pytest.param(_text("[1, 2]"), r"a\.json", id="a list"),
    ],
)
def test_annotations_that_cannot_be_read_as_a_whole_are_an_error(
    demo: Path, tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(AnnotationError, match=message):
        run(config(make(tmp_path), tmp_path / "out", demo / "tokenizer"))
    assert contents(tmp_path / "out") == {}


def test_broken_json_is_named_with_its_byte(demo: Path, tmp_path: Path) -> None:
    path = write_coco(tmp_path, [{"id": 1, "file_name": "a.png"}], [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}])
    text = path.read_text().replace('"categories": [', '"categories": <')
    path.write_text(text)
    with pytest.raises(AnnotationError, match=r"instances\.json") as caught:
        run(config(path, tmp_path / "out", demo / "tokenizer"))
    assert f"byte {text.index('<')}" in str(caught.value)


def test_a_file_is_no_folder_of_annotations(demo: Path, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="found a file"):
        run(config(demo / "instances.json", tmp_path / "out", demo / "tokenizer", reader="labelme"))


def test_a_run_that_failed_over_its_annotations_can_be_repeated(demo: Path, tmp_path: Path) -> None:
    settings = config(tmp_path / "instances.json", tmp_path / "out", demo / "tokenizer", tasks=ONLY_DETECT)
    with pytest.raises(AnnotationError):
        run(settings)
    picture(tmp_path / "a.png")
    write_coco(tmp_path, [{"id": 1, "file_name": "a.png"}], [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 30]}])
    assert run(settings).counts.records_written == 1


def test_ids_that_stand_in_several_units_are_noted(demo: Path, tmp_path: Path) -> None:
    """Within a unit the second is rejected; over units nobody sees it before the end."""
    picture(tmp_path / "a.png")
    lines = [{"id": name, "image": "a.png", "captions": [f"number {number}"]} for number, name in enumerate("abcbaa")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = run(config(path, tmp_path / "out", demo / "tokenizer", reader="jsonl", records_per_shard=3))
    assert [entry.num_rows for entry in manifest.shards] == [3, 2]
    assert [row["sample_id"] for row in read_rows(tmp_path / "out")] == ["rows/a", "rows/b", "rows/c", "rows/b", "rows/a"]
    assert manifest.source_notes == ["2 sample ids stand in more than one shard, such as 'rows/a', 'rows/b'"]
    assert manifest.counts.records_rejected["duplicate_id"].count == 1


def test_notes_of_the_reader_are_in_the_manifest(demo: Path, tmp_path: Path) -> None:
    source = copy_demo(demo, tmp_path / "source")
    captions = json.loads((source / "captions.json").read_bytes())
    captions["annotations"] += [{"image_id": 777, "caption": "lost"}] * 3
    (source / "captions.json").write_text(json.dumps(captions))
    manifest = run(demo_config(source, tmp_path / "out"))
    assert manifest.source_notes == ["3 captions belong to images that are not among the images"]


# ---- images in the shards


def turned_picture(path: Path, size_wh: tuple[int, int], orientation: int) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return picture(path, size_wh, exif=exif, quality=90)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five records of four files of three contents; the third is stored on its side."""
    picture(tmp_path / "a.jpg", (300, 200))
    picture(tmp_path / "b.png", (120, 90))
    turned_picture(tmp_path / "c.jpg", (160, 100), 6)
    (tmp_path / "copy of a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes())
    names = ["a.jpg", "b.png", "c.jpg", "copy of a.jpg", "a.jpg"]
    sizes = [(300, 200), (120, 90), (160, 100), (300, 200), (300, 200)]
    images = [{"id": n, "file_name": name, "width": w, "height": h} for n, (name, (w, h)) in enumerate(zip(names, sizes, strict=True))]
    return write_coco(tmp_path, images, [{"image_id": n, "category_id": 1, "bbox": [10, 10, 50, 60]} for n in range(5)])


def embedded(folder: Path) -> list[dict[str, Any]]:
    """The stored image of every row."""
    tables = [read_table(folder / entry.name).to_pylist() for entry in manifests.load(folder).image_shards]
    return [tables[row["images"][0]["shard"]][row["images"][0]["shard_row"]] for row in read_rows(folder)]


@pytest.mark.parametrize("records_per_shard", [100, 2], ids=["one unit", "three units"])
def test_embedded_images_are_the_files_byte_for_byte(photos: Path, demo: Path, tmp_path: Path, records_per_shard: int) -> None:
    settings = config(photos, tmp_path / "out", demo / "tokenizer", image_storage="embed", records_per_shard=records_per_shard)
    manifest = run(settings)
    names = ["a.jpg", "b.png", "c.jpg", "copy of a.jpg", "a.jpg"]
    stored = embedded(tmp_path / "out")
    assert [entry["bytes"] for entry in stored] == [(tmp_path / name).read_bytes() for name in names]
    assert [(entry["format"], entry["width"], entry["height"], entry["orientation"]) for entry in stored] == [
        ("jpeg", 300, 200, 1),
        ("png", 120, 90, 1),
        ("jpeg", 160, 100, 6),
        ("jpeg", 300, 200, 1),
        ("jpeg", 300, 200, 1),
    ]
    assert all(row["images"][0]["path"] is None for row in read_rows(tmp_path / "out"))
    num_stored = [entry.num_rows for entry in manifest.image_shards]
    assert num_stored == ([3] if records_per_shard == 100 else [2, 2, 1]), "each content once in a unit"
    assert verify_folder(tmp_path / "out").problems == []


def test_embedded_and_referenced_rows_differ_in_the_place_of_the_image_alone(photos: Path, demo: Path, tmp_path: Path) -> None:
    for storage_of_images in ("reference", "embed", "embed_resized"):
        run(config(photos, tmp_path / storage_of_images, demo / "tokenizer", image_storage=storage_of_images))
    rows = [read_rows(tmp_path / name) for name in ("reference", "embed", "embed_resized")]
    for row in chain(*rows):
        for key in ("path", "shard", "shard_row"):
            del row["images"][0][key]
    assert rows[0] == rows[1]
    for row in chain(*rows[1:]):
        del row["images"][0]["orientation"]
    assert rows[1] == rows[2]


def test_resized_images_are_what_the_model_sees(photos: Path, demo: Path, tmp_path: Path) -> None:
    manifest = run(config(photos, tmp_path / "out", demo / "tokenizer", image_storage="embed_resized", records_per_shard=100))
    stored = embedded(tmp_path / "out")
    for row, entry, name in zip(read_rows(tmp_path / "out"), stored, ["a.jpg", "b.png", "c.jpg", "copy of a.jpg", "a.jpg"], strict=True):
        image = row["images"][0]
        size = (image["resized_width"], image["resized_height"])
        assert (entry["format"], entry["width"], entry["height"], entry["orientation"]) == ("png", *size, 1)
        picture_in_shard = Image.open(io.BytesIO(entry["bytes"]))
        assert picture_in_shard.size == size
        upright = load_image(str(tmp_path / name))
        assert picture_in_shard.tobytes() == resize_image(upright, size).tobytes()
        assert entry["bytes"] == encode_png(resize_image(upright, size))
    assert stored[2]["width"] < stored[2]["height"], "stored on its side, upright here"
    assert [entry.num_rows for entry in manifest.image_shards] == [3]
    assert verify_folder(tmp_path / "out").problems == []


def test_only_images_of_rows_that_are_written_are_embedded(photos: Path, demo: Path, tmp_path: Path) -> None:
    rules = {"exif_orientation": "drop"}
    manifest = run(config(photos, tmp_path / "out", demo / "tokenizer", image_storage="embed", rules=rules, records_per_shard=100))
    assert manifest.counts.records_rejected["exif_orientation"].count == 1
    assert [entry.num_rows for entry in manifest.image_shards] == [2]


@pytest.mark.parametrize("image_storage", ["embed", "embed_resized"])
def test_an_image_that_breaks_in_its_middle_stops_nobody_else(photos: Path, demo: Path, tmp_path: Path, image_storage: str) -> None:
    """Its header and its end are whole, so that only decoding finds it. One such file must not end the conversion of ten million."""
    good = (tmp_path / "b.png").read_bytes()
    middle = good.index(b"IDAT") + 30
    (tmp_path / "b.png").write_bytes(good[:middle] + b"\0" * 8 + good[middle + 8 :])
    manifest = run(config(photos, tmp_path / "out", demo / "tokenizer", image_storage=image_storage))
    if image_storage == "embed":
        assert manifest.counts.records_written == 5, "bytes are bytes"
    else:
        assert manifest.counts.records_written == 4
        assert manifest.counts.records_rejected["truncated_image"].count == 1
        [rejected] = quarantine(tmp_path / "out")
        assert "b.png" in rejected.detail


def test_trusted_sizes_open_no_image(photos: Path, demo: Path, tmp_path: Path) -> None:
    names = ["a.jpg", "b.png", "copy of a.jpg"]
    settings = config(photos, tmp_path / "opened", demo / "tokenizer", rules={"exif_orientation": "drop"})
    assert not run(settings).sizes_trusted
    for name in [*names, "c.jpg"]:
        (tmp_path / name).unlink()
    manifest = run(config(photos, tmp_path / "trusted", demo / "tokenizer", trust_sizes=True))
    assert manifest.sizes_trusted
    assert manifest.counts.records_written == 5
    trusted = [row for row in read_rows(tmp_path / "trusted") if row["images"][0]["path"] != "c.jpg"]
    assert trusted == read_rows(tmp_path / "opened")
    assert verify_folder(tmp_path / "trusted").problems == []


def test_trusted_sizes_must_be_there(demo: Path, tmp_path: Path) -> None:
    path = write_coco(tmp_path, [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png", "width": 64, "height": 48}])
    manifest = run(config(path, tmp_path / "out", demo / "tokenizer", trust_sizes=True, exhaustive=True, tasks={"absent": {"share": 1}}))
    assert {reason: entry.count for reason, entry in manifest.counts.records_rejected.items()} == {"no_declared_size": 1}
    assert manifest.counts.records_written == 1


def test_missing_images_are_counted_and_kept_with_their_reason(demo: Path, tmp_path: Path) -> None:
    source = copy_demo(demo, tmp_path / "source")
    for number in (2, 3, 12):
        (source / "images" / f"scene_{number:04d}.png").unlink()
    manifest = run(demo_config(source, tmp_path / "out"))
    assert manifest.counts.records_written == 9
    assert manifest.counts.records_rejected["missing_image"].count == 3
    rejected = quarantine(tmp_path / "out")
    assert [(entry.reason, entry.record_id) for entry in rejected] == [
        ("missing_image", "2"),
        ("missing_image", "3"),
        ("missing_image", "12"),
    ]
    assert "scene_0003.png" in rejected[1].detail
    assert "start at the workflow's `images`" in rejected[1].detail
    assert rejected[1].position == "instances.json, image 3"
    assert json.loads(rejected[1].source_text)["record_id"] == "3"


def test_an_images_folder_that_is_wrong_loses_every_record_and_says_so(demo: Path, tmp_path: Path) -> None:
    manifest = run(demo_config(demo, tmp_path / "out", images=str(demo / "captions.json")))
    assert manifest.counts.records_written == 0
    assert manifest.counts.records_rejected["missing_image"].count == 12
    assert read_rows(tmp_path / "out") == []
    assert verify_folder(tmp_path / "out").problems == []


# ---- a data set in which everything is wrong that can be


def bomb(path: Path) -> None:
    """A PNG whose header says 100,000 x 100,000."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b"\0" * 1000), b"IEND"]
    data = b"".join(struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


LONGEST_NAME = "長" * 83 + "ab.png"
"""255 bytes of UTF-8: the longest that Linux takes."""

GOOD_BOX = [100, 60, 120, 90]
"""[x, y, width, height]; no side is shorter than a visual token."""


def dirty_set(folder: Path) -> tuple[Path, Path]:
    """(instances.json, folder of images)."""
    images = folder / "images"
    names: dict[int, str] = {}

    def add(number: int, name: str, size_wh: tuple[int, int] | None = (400, 300), mode: str = "RGB", **options: Any) -> Path:
        names[number] = name
        return picture(images / name, size_wh, mode, **options) if size_wh else images / name

    add(1, "boxes.png")
    add(2, "missing.png", None)
    add(3, "empty.png", None).touch()
    whole = picture(folder / "whole.jpg", (400, 300)).read_bytes()
    add(4, "cut.jpg", None).write_bytes(whole[: len(whole) // 2])
    add(5, "folder.png", None).mkdir()
    bomb(add(6, "bomb.png", None))
    add(7, "text.jpg", None).write_text("<html>404 Not Found</html>")
    add(8, "cmyk.jpg", mode="CMYK")
    add(9, "deep.png", mode="I;16")
    frames = [Image.new("RGB", (400, 300), colour) for colour in ("red", "blue")]
    frames[0].save(add(10, "moves.gif", None), save_all=True, append_images=frames[1:])
    add(11, "palette.png", mode="P")
    turned_picture(add(12, "turned.jpg", None), (400, 300), 6)
    turned_picture(add(13, "upside down.jpg", None), (400, 300), 3)
    add(14, "declared otherwise.png", (300, 300))
    add(15, "Straße #1 100%20 'q\" 猫🙂.png")
    add(16, LONGEST_NAME)
    names[17] = f"{LONGEST_NAME}x"
    add(18, "thin.png", (801, 4))
    add(19, "nothing on it.png")
    add(20, "sub/folder.png")
    names[21] = str(add(21, "absolute.png"))

    entries: list[dict[str, object]] = [{"id": n, "file_name": name, "width": 400, "height": 300} for n, name in names.items()]
    entries[17].update(width=801, height=4)
    entries += [
        {"id": 1, "file_name": "boxes.png", "width": 400, "height": 300},  # an id for the second time
        {"id": 31, "width": 400, "height": 300},  # no name
        {"id": [32], "file_name": "boxes.png"},  # an id that is none
    ]
    boxes: list[tuple[int, int, object, dict[str, object]]] = [
        (1, 1, [10, 10, 60, 60], {}),
        (1, 1, [10, 10, 60, 60], {}),  # duplicate
        (1, 1, [350, 100, 60, 60], {}),  # overhang by a sixth
        (1, 2, [380, 100, 80, 60], {}),  # a quarter of it inside
        (1, 2, [500, 10, 60, 60], {}),  # outside
        (1, 2, [10, 10, 0, 60], {}),  # no width
        (1, 2, [float("nan"), 10, 60, 60], {}),
        (1, 2, [300, 20, -80, 60], {}),  # corners swapped
        (1, 2, [200, 150, 390, 290], {}),  # xyxy
        (1, 2, [0.1, 0.1, 0.5, 0.5], {}),  # fractions
        (1, 2, [10, 200, 90, 90], {"iscrowd": 1}),
        (1, 2, [10, 200, 90, 90], {"ignore": 1}),
        (1, 3, [100, 200, 5, 5], {}),  # smaller than a token
        (1, 77, GOOD_BOX, {}),  # unknown category
        (99, 1, GOOD_BOX, {}),  # unknown image
        (1, 3, [1, 2, 3], {}),  # three numbers
        *[(number, 1, GOOD_BOX, {}) for number in range(2, 18)],
        (18, 1, [10, 1, 50, 2], {}),  # refused by the family, and so not judged
        (20, 1, GOOD_BOX, {}),
        (21, 1, GOOD_BOX, {}),
        (31, 1, GOOD_BOX, {}),
    ]
    annotations = [{"image_id": image, "category_id": label, "bbox": box, **more} for image, label, box, more in boxes]
    return write_coco(folder, entries, annotations, ["cat", "dog", "flea"]), images


@pytest.fixture(scope="module")
def dirty(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dirty set converted, in units of seven."""
    folder = tmp_path_factory.mktemp("dirty")
    annotations, images = dirty_set(folder)
    run(config(annotations, folder / "out", demo / "tokenizer", images=str(images), tasks=ONLY_DETECT, records_per_shard=7))
    return folder / "out"


DIRTY_REJECTIONS = {
    "missing_image": 1,
    "empty_image": 1,
    "truncated_image": 1,
    "not_a_file": 1,
    "image_bomb": 1,
    "not_an_image": 1,
    "exif_orientation": 1,
    "size_mismatch": 1,
    "unreadable_image": 1,
    "image_refused_by_family": 1,
    "no_turns": 1,
    "duplicate_id": 1,
    "no_file_name": 1,
    "broken_image_entry": 1,
    "unknown_category": 1,
    "unknown_image": 1,
    "broken_annotation": 1,
}
DIRTY_WRITTEN = {"1", "8", "9", "10", "11", "12", "15", "16", "20", "21"}


def test_of_the_dirty_set_every_record_is_written_or_rejected(dirty: Path) -> None:
    counts = manifests.load(dirty).counts
    assert {row["sample_id"].removeprefix("instances/") for row in read_rows(dirty)} == DIRTY_WRITTEN
    assert counts.records_written == len(DIRTY_WRITTEN)
    # 21 images + 3 entries, and 3 annotations that are rejected alone.
    assert counts.records_read == 27
    assert counts.num_rejected == 17


@pytest.mark.parametrize(("reason", "count"), DIRTY_REJECTIONS.items())
def test_of_the_dirty_set_every_reason_is_counted(dirty: Path, reason: str, count: int) -> None:
    rejections = manifests.load(dirty).counts.records_rejected
    assert rejections[reason].count == count
    assert len(rejections[reason].examples) == 1
    [kept] = [entry for entry in quarantine(dirty) if entry.reason == reason]
    assert rejections[reason].examples[0] == f"{kept.position}: {kept.detail}"


def test_of_the_dirty_set_no_other_reason_is_counted(dirty: Path) -> None:
    assert set(manifests.load(dirty).counts.records_rejected) == set(DIRTY_REJECTIONS)


@pytest.mark.parametrize(
    ("rule", "found"),
    [
        pytest.param("duplicate", (0, 1, 0), id="duplicate"),
        pytest.param("overhang", (0, 1, 0), id="overhang"),
        pytest.param("mostly_outside", (0, 0, 1), id="mostly outside"),
        pytest.param("outside", (0, 0, 1), id="outside"),
        pytest.param("zero_area", (0, 0, 1), id="zero area"),
        pytest.param("not_finite", (0, 0, 1), id="NaN"),
        pytest.param("swapped_corners", (0, 1, 0), id="swapped"),
        pytest.param("xywh_confusion", (0, 0, 1), id="xyxy"),
        pytest.param("relative_confusion", (0, 0, 1), id="fractions"),
        pytest.param("crowd", (0, 0, 1), id="crowd"),
        pytest.param("difficult", (0, 0, 1), id="ignored"),
        pytest.param("under_one_token", (1, 0, 0), id="small"),
        pytest.param("image_cmyk", (1, 0, 0), id="CMYK"),
        pytest.param("image_16bit", (1, 0, 0), id="16 bit"),
        pytest.param("image_animated", (1, 0, 0), id="animated"),
        pytest.param("image_palette", (1, 0, 0), id="palette"),
        pytest.param("exif_orientation", (0, 1, 1), id="EXIF"),
        pytest.param("size_mismatch", (0, 0, 1), id="size"),
    ],
)
def test_of_the_dirty_set_every_finding_is_counted(dirty: Path, rule: str, found: tuple[int, int, int]) -> None:
    finding = manifests.load(dirty).counts.rules[rule]
    assert (finding.kept, finding.fixed, finding.dropped) == found
    assert len(finding.examples) == sum(found)


def test_of_the_dirty_set_no_other_finding_is_counted(dirty: Path) -> None:
    assert sum(finding.found for finding in manifests.load(dirty).counts.rules.values()) == 19


def test_of_the_dirty_set_only_complete_labels_are_asked_for(dirty: Path) -> None:
    first = read_rows(dirty)[0]
    assert [turn["labels"] for turn in first["turns"]] == [["cat", "cat"]], "dog lost boxes, flea has one that cannot be read"
    assert first["turns"][0]["boxes"] == [[10, 10, 70, 70], [350, 100, 400, 160]]


def test_of_the_dirty_set_a_turned_image_turns_its_boxes(dirty: Path) -> None:
    [row] = [row for row in read_rows(dirty) if row["sample_id"] == "instances/12"]
    assert (row["images"][0]["width"], row["images"][0]["height"], row["images"][0]["orientation"]) == (300, 400, 6)
    x, y, width, height = GOOD_BOX
    # Orientation 6: the stored top is the right side. A point (x, y) goes to (stored height - y, x).
    assert row["turns"][0]["boxes"] == [[300 - y - height, x, 300 - y, x + width]]


def test_of_the_dirty_set_broken_rows_are_named_with_their_byte(dirty: Path) -> None:
    text = (dirty.parent / "instances.json").read_bytes()
    rejected = {entry.reason: entry for entry in quarantine(dirty)}
    for reason, element in (("broken_annotation", b'{"id": 16, "image_id"'), ("broken_image_entry", b'{"id": [32]')):
        assert rejected[reason].position == f"instances.json, byte {text.index(element)}"
        assert rejected[reason].source_text.encode().startswith(element)
    assert rejected["unknown_category"].position == "instances.json, annotation 14, image 1"
    assert rejected["unknown_image"].position == "instances.json, annotation 15"


def test_of_the_dirty_set_names_survive(dirty: Path) -> None:
    paths = {row["images"][0]["path"] for row in read_rows(dirty)}
    assert {"Straße #1 100%20 'q\" 猫🙂.png", LONGEST_NAME, "sub/folder.png"} <= paths


def test_the_dirty_set_converts_to_what_verifies(dirty: Path) -> None:
    assert verify_folder(dirty).problems == []


# ---- Ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray of this machine for the tests of this module; a session's would still be connected to while other modules start theirs."""
    import ray  # noqa: PLC0415  (seconds, and only here)

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.slow
def test_ray_gives_the_same_bytes_whatever_the_number_of_workers(
    cluster: None, demo: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    for num_workers in (1, 2):
        run(demo_config(demo, tmp_path / str(num_workers), executor="ray", num_workers=num_workers))
        assert contents(tmp_path / str(num_workers)) == expected
    run_until(demo_config(demo, tmp_path / "stopped"), 2)
    run(demo_config(demo, tmp_path / "stopped", executor="ray"))
    assert contents(tmp_path / "stopped") == expected


@pytest.mark.ray
@pytest.mark.slow
def test_a_mistake_inside_a_ray_task_is_an_error_of_ours(cluster: None, demo: Path, tmp_path: Path) -> None:
    """Somebody puts folders in the way of the shards."""
    source = copy_demo(demo, tmp_path / "source")
    settings = demo_config(source, tmp_path / "out", executor="ray", num_workers=1)

    def fill(*_: object) -> None:
        for number in range(NUM_UNITS):
            (tmp_path / "out" / f"rows-{number:05d}.arrow").mkdir()

    with pytest.raises(BoxcarError, match=r"Is a directory while writing.*What was complete before is kept"):
        convert(settings, Progress(fill, lambda _: None))
