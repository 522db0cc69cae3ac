"""The output folder: whose it is, who may work in it, what is believed after a crash."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from boxcar.pipelines.readers.reader import Unit
from boxcar.pipelines.shards.arrow_files import write_batches, write_quarantine
from boxcar.pipelines.shards.work_folder import MAX_ATTEMPTS, STATE_FOLDER, Commit, Run, SavedPlan, WorkDir, settings_of, stamps_of
from boxcar.schemas.errors import BoxcarError, ConfigError
from boxcar.schemas.manifest import Counts
from boxcar.schemas.record import Rejected
from boxcar.schemas.row import ROW_SCHEMA
from tests.small_sets import CONTRACT, config

PLAN = SavedPlan(fingerprint="00ff", units=[("index.json", 0, 2), ("index.json", 2, 3)], num_records=3, notes=["a note"], rejected=[])


def a_run(**changes: Any) -> Run:
    settings = {"cutoff_len": 1024, "seed": 0, "tasks": {"caption": {"share": 1.0, "weight": 1.0}}}
    return msgspec.structs.replace(Run(boxcar_version="1", settings=settings, contract=CONTRACT, stamps={"annotations": (1, 2)}), **changes)


def opened(folder: Path) -> WorkDir:
    work = WorkDir(str(folder))
    work.open(a_run())
    return work


def a_commit(work: WorkDir, number: int = 0) -> Commit:
    """A unit with rows and a quarantine on disk."""
    rows = write_batches(work.name("rows", number, "arrow"), ROW_SCHEMA, [])
    rejected = write_quarantine(work.name("rejected", number, "jsonl"), [Rejected("reason", "position", "detail")])
    return Commit(number=number, rows=rows, images=None, rejected=rejected, counts=Counts(records_read=1))


# ---- what decides the output


def test_settings_that_cannot_change_a_byte_are_no_part_of_a_run(tmp_path: Path) -> None:
    first = config("a.json", "out", tmp_path, num_workers=1)
    second = config("a.json", "elsewhere", tmp_path, num_workers=8, executor="ray")
    assert settings_of(first) == settings_of(second)
    assert {"output", "executor", "num_workers"}.isdisjoint(settings_of(first))
    assert settings_of(first) != settings_of(config("a.json", "out", tmp_path, seed=1))


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        pytest.param({}, True, id="the same"),
        pytest.param({"stamps": {}}, True, id="annotations touched"),
        pytest.param({"boxcar_version": "2"}, False, id="another version"),
        pytest.param({"settings": {"cutoff_len": 1024, "seed": 1}}, False, id="another setting"),
        pytest.param({"contract": msgspec.structs.replace(CONTRACT, tokenizer_fingerprint="ff00")}, False, id="another tokenizer"),
    ],
)
def test_a_run_goes_on_under_the_same_key_only(changes: dict[str, Any], same: bool) -> None:
    assert (a_run(**changes).key == a_run().key) is same


def test_the_key_does_not_depend_on_the_order_of_settings() -> None:
    backwards = dict(reversed(list(a_run().settings.items())))
    assert a_run(settings=backwards).key == a_run().key


def test_stamps_are_size_and_time_of_every_annotation_file(tmp_path: Path) -> None:
    for name, content in (("a.json", b"12345"), ("c.json", b"")):
        (tmp_path / name).write_bytes(content)
        os.utime(tmp_path / name, ns=(0, 10**18 + 7))
    settings = config(tmp_path / "a.json", tmp_path, tmp_path, captions=f"file://{tmp_path}/c.json")
    assert stamps_of(settings) == {"annotations": (5, 10**18 + 7), "captions": (0, 10**18 + 7)}


@pytest.mark.parametrize("annotations", ["s3://bucket/a.json", "{}", "{}/no such file"], ids=["remote", "folder", "missing"])
def test_no_stamp_vouches_for_what_is_no_local_file(tmp_path: Path, annotations: str) -> None:
    assert stamps_of(config(annotations.format(tmp_path), tmp_path, tmp_path)) is None


# ---- whose folder it is


def test_a_new_folder_becomes_the_runs_own(tmp_path: Path) -> None:
    work = opened(tmp_path / "shards" / "new")
    assert sorted(os.listdir(work.folder)) == [STATE_FOLDER]
    assert work.saved_stamps == {"annotations": (1, 2)}
    work.open(a_run())


def test_a_remote_output_is_refused() -> None:
    with pytest.raises(ConfigError, match="s3://bucket/shards, expected a local or shared folder"):
        WorkDir("s3://bucket/shards")


def test_an_output_may_be_a_uri_of_a_local_folder(tmp_path: Path) -> None:
    assert WorkDir(f"file://{tmp_path}/a b").folder == tmp_path / "a b"


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        pytest.param({"settings": {**a_run().settings, "cutoff_len": 2048}}, "cutoff_len 1024 there, 2048 here", id="a setting"),
        pytest.param(
            {"settings": {**a_run().settings, "tasks": {"caption": {"share": 0.5, "weight": 1.0}}}},
            "found another conversion: tasks.caption.share 1.0 there, 0.5 here, expected",
            id="a nested setting, alone",
        ),
        pytest.param({"settings": {"cutoff_len": 1024, "seed": 0}}, "tasks.caption.share 1.0 there, None here", id="a setting less"),
        pytest.param({"contract": msgspec.structs.replace(CONTRACT, max_pixels=9)}, "max_pixels: 1003520 here, 9 there", id="the contract"),
        pytest.param({"boxcar_version": "2"}, "boxcar 1 there, 2 here", id="the version"),
    ],
)
def test_another_run_is_refused_with_both_values(tmp_path: Path, changes: dict[str, Any], found: str) -> None:
    work = opened(tmp_path)
    work.write_plan(PLAN)
    before = (work.state / "run.json").read_bytes()
    with pytest.raises(ConfigError) as caught:
        work.open(a_run(**changes))
    assert found in str(caught.value)
    assert (work.state / "run.json").read_bytes() == before


def test_a_run_that_ended_before_its_plan_gives_way_to_another(tmp_path: Path) -> None:
    """A wrong path in the first try must not stand in the way of the second."""
    work = opened(tmp_path)
    other = a_run(stamps={}, boxcar_version="2")
    work.open(other)
    assert json.loads((work.state / "run.json").read_bytes())["boxcar_version"] == "2"
    work.require_own(other)
    with pytest.raises(ConfigError, match="boxcar 2 there, 1 here"):
        work.require_own(a_run())


def test_a_run_that_is_only_about_to_plan_gives_way_to_nobody(tmp_path: Path) -> None:
    work = opened(tmp_path)
    with work.lock(), pytest.raises(BoxcarError, match="another boxcar convert that writes to it"):
        WorkDir(str(tmp_path)).open(a_run(boxcar_version="2"))
    assert json.loads((work.state / "run.json").read_bytes())["boxcar_version"] == "1"


@pytest.mark.parametrize("made", ["manifest.json", f"{STATE_FOLDER}/units/00000.json"])
def test_what_was_made_under_a_run_keeps_its_folder(tmp_path: Path, made: str) -> None:
    work = opened(tmp_path)
    (tmp_path / made).touch()
    with pytest.raises(ConfigError, match="found another conversion"):
        work.open(a_run(boxcar_version="2"))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        pytest.param("thesis.tex", "1 files, such as 'thesis.tex'", id="a file"),
        pytest.param("photos/a.jpg", "1 files, such as 'photos'", id="a folder"),
        pytest.param("manifest.json", "another conversion, without its state", id="a conversion copied without its state"),
    ],
)
def test_a_folder_of_other_files_is_refused_and_left_as_it_was(tmp_path: Path, name: str, found: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("precious")
    with pytest.raises(ConfigError, match=f"found {found}, expected an empty folder.*nothing was written"):
        WorkDir(str(tmp_path)).open(a_run())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]
    assert not (tmp_path / STATE_FOLDER).exists()


@pytest.mark.parametrize("output", ["file", "file/below"])
def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path, output: str) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ConfigError, match="found a file, expected a folder"):
        WorkDir(str(tmp_path / output)).open(a_run())
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"boxcar_version": "1"}', b'{"boxcar_version": "\xff"}'],
    ids=["empty", "cut", "of another shape", "no UTF-8"],
)
def test_a_damaged_state_is_named_and_not_overwritten(tmp_path: Path, content: bytes) -> None:
    work = opened(tmp_path)
    (work.state / "run.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.json: found a file of another version or damaged"):
        work.open(a_run())
    assert (work.state / "run.json").read_bytes() == content


# ---- who works in it


def test_one_driver_at_a_time(tmp_path: Path) -> None:
    work = opened(tmp_path)
    with work.lock(), pytest.raises(BoxcarError, match="another boxcar convert that writes to it"), WorkDir(str(tmp_path)).lock():
        pytest.fail("the lock was given twice")
    with work.lock():
        pass


def test_a_driver_that_was_killed_holds_no_lock(tmp_path: Path) -> None:
    work = opened(tmp_path)
    holder = (
        "import sys, time; from boxcar.pipelines.shards.work_folder import WorkDir\n"
        "with WorkDir(sys.argv[1]).lock():\n print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", holder, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(BoxcarError, match="another boxcar convert"), work.lock():
            pass
        process.kill()
        process.wait()
        with work.lock():
            pass


# ---- plans


def test_a_plan_comes_back_as_it_was_written(tmp_path: Path) -> None:
    work = opened(tmp_path)
    assert work.read_plan() is None
    work.write_plan(PLAN)
    assert work.read_plan() == PLAN
    assert PLAN.unit(1) == Unit("index.json", 2, 3)


def test_the_index_is_ready_from_its_plan_to_the_next_clearing(tmp_path: Path) -> None:
    """Otherwise a plan could be believed whose index was made of other annotations, or half made."""
    work = opened(tmp_path)
    assert not work.index_is_ready
    folder = work.clear_index()
    (folder / "old.arrow").touch()
    assert not work.index_is_ready
    work.write_plan(PLAN)
    assert work.index_is_ready
    assert os.listdir(work.clear_index()) == []
    assert not work.index_is_ready
    assert work.read_plan() == PLAN, "its fingerprint is still needed"


@pytest.mark.parametrize("content", [b"", b"{", b'{"units": 1}'], ids=["empty", "cut", "of another shape"])
def test_a_damaged_plan_is_an_error_of_ours(tmp_path: Path, content: bytes) -> None:
    work = opened(tmp_path)
    work.write_plan(PLAN)
    (work.state / "plan.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"plan\.json: found a file of another version or damaged"):
        work.read_plan()


# ---- units


def test_a_commit_comes_back_as_it_was_written(tmp_path: Path) -> None:
    work = opened(tmp_path)
    commit = a_commit(work, 7)
    assert work.read_commit(7) is None
    work.write_commit(commit)
    assert work.read_commit(7) == commit
    assert [entry.name for entry in commit.files] == ["rows-00007.arrow", "rejected-00007.jsonl"]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["rows-00000.arrow", "rejected-00000.jsonl"])
@pytest.mark.parametrize("damage", [_flip, _cut, Path.unlink], ids=["a bit flipped", "cut", "deleted"])
def test_a_unit_is_believed_only_while_its_files_are_whole(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    work = opened(tmp_path)
    work.write_commit(a_commit(work))
    damage(tmp_path / name)
    assert work.read_commit(0) is None


@pytest.mark.parametrize("content", [b"", b"{", b'{"number": 0}', b'{"number": "\xff"}'], ids=["empty", "cut", "other shape", "no UTF-8"])
def test_a_damaged_commit_is_none(tmp_path: Path, content: bytes) -> None:
    work = opened(tmp_path)
    work.write_commit(a_commit(work))
    (work.units_folder / "00000.json").write_bytes(content)
    assert work.read_commit(0) is None


def test_units_beyond_five_digits_have_names_of_their_own(tmp_path: Path) -> None:
    work = WorkDir(str(tmp_path))
    names = {work.name("rows", number, "arrow").name for number in (1, 10_000, 100_000, 1_000_000)}
    assert names == {"rows-00001.arrow", "rows-10000.arrow", "rows-100000.arrow", "rows-1000000.arrow"}


# ---- workers that die

DIES = """
import os, sys
from boxcar.pipelines.shards.work_folder import WorkDir
with WorkDir(sys.argv[1]).attempt(3) as allowed:
    print(allowed, flush=True)
    if allowed:
        os._exit(9)
"""


def test_a_unit_that_kills_its_workers_is_given_up_after_a_few(tmp_path: Path) -> None:
    work = opened(tmp_path)
    runs = [
        subprocess.run([sys.executable, "-c", DIES, tmp_path], capture_output=True, text=True, check=False) for _ in range(MAX_ATTEMPTS + 2)
    ]
    assert [run.stdout for run in runs] == ["True\n"] * MAX_ATTEMPTS + ["False\n"] * 2
    assert [run.returncode for run in runs] == [9] * MAX_ATTEMPTS + [0] * 2
    with work.attempt(4) as allowed:
        assert allowed, "another unit is not to blame"
    work.forget_attempts()
    with work.attempt(3) as allowed:
        assert allowed, "the next driver tries anew"


def test_a_unit_that_works_may_be_tried_without_end(tmp_path: Path) -> None:
    work = opened(tmp_path)
    for _ in range(MAX_ATTEMPTS + 3):
        with work.attempt(0) as allowed:
            assert allowed
    assert os.listdir(work.units_folder) == []


def test_markers_of_attempts_are_no_commits(tmp_path: Path) -> None:
    work = opened(tmp_path)
    commit = a_commit(work)
    with work.attempt(0):
        work.write_commit(commit)
        work.forget_attempts()
    assert work.read_commit(0) == commit


# ---- the end


def test_what_writers_that_died_left_half_written_is_swept(tmp_path: Path) -> None:
    work = opened(tmp_path)
    commit = a_commit(work)
    work.write_commit(commit)
    for folder, name in ((tmp_path, "rows-00001.arrow"), (work.state, "plan.json"), (work.units_folder, "00001.json")):
        (folder / f".{name}.4711.tmp").write_bytes(b"half")
    work.sweep()
    assert sorted(os.listdir(tmp_path)) == [STATE_FOLDER, "rejected-00000.jsonl", "rows-00000.arrow"]
    assert sorted(os.listdir(work.state)) == ["run.json", "units"]
    assert work.read_commit(0) == commit


def test_a_complete_conversion_keeps_only_whose_it_is(tmp_path: Path) -> None:
    work = opened(tmp_path)
    (work.clear_index() / "images.arrow").touch()
    work.write_plan(PLAN)
    work.write_commit(a_commit(work))
    work.finish()
    assert [path.relative_to(work.state) for path in work.state.rglob("*")] == [Path("run.json")]
    assert json.loads((work.state / "run.json").read_bytes())["boxcar_version"] == "1"
    assert sorted(os.listdir(tmp_path)) == [STATE_FOLDER, "rejected-00000.jsonl", "rows-00000.arrow"]
    work.finish()


# ---- a first try that came to nothing


def test_a_run_that_read_nothing_gives_way_to_one_with_other_settings(tmp_path: Path) -> None:
    work = opened(tmp_path)
    corrected = a_run(settings={"cutoff_len": 2048})
    work.open(corrected)
    work.require_own(corrected)
    with pytest.raises(ConfigError, match="cutoff_len 2048 there, 1024 here"):
        work.require_own(a_run())
