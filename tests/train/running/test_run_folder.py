"""A run's folder is the same thing in a folder and in an object store, and so is a run in it."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pyarrow.fs as pafs
import pytest
import torch

from boxcar.pipelines import storage
from boxcar.schemas.errors import ConfigError, StorageError
from boxcar.schemas.training import TrainConfig
from boxcar.train.answering.adapter import find_adapter
from boxcar.train.job import train
from boxcar.train.running.run_folder import METRICS, RunFolder
from boxcar.train.running.sessions import LocalSession
from boxcar.train.running.trackers import read_events, steps_of
from tests.small_sets import copy_demo, demo_config, run


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A bucket of an S3 server of this test's own."""
    if importlib.util.find_spec("moto") is None:
        pytest.skip("needs an S3 server: pip install 'moto[server]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    served = "import sys; from moto.server import main; main(sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", served, "-H", "127.0.0.1", "-p", str(port)], stderr=subprocess.DEVNULL)
    before = dict(os.environ)
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", **keys}
    try:
        _await(port)
        pafs.FileSystem.from_uri("s3://boxcar/?allow_bucket_creation=true")[0].create_dir("boxcar")
        yield "s3://boxcar"
    finally:
        process.kill()
        process.wait()
        os.environ.clear()
        os.environ |= before


def _await(port: int) -> None:
    for _ in range(300):
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the S3 server did not start")


@pytest.fixture(params=["local", "objects", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "local":
        return str(tmp_path)
    name = uuid4().hex
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/{name}"
    (tmp_path / "objects").mkdir()
    files = fsspec.filesystem("file", auto_mkdir=True)  # like an object store, it makes folders as they are named
    store = pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem("dir", path=str(tmp_path / "objects"), fs=files)))
    monkeypatch.setattr(storage, "_filesystem", lambda _: store)
    return f"objects://bucket/{name}"


def test_files_come_back_whole_and_from_a_byte_on(root: str) -> None:
    folder = RunFolder(f"{root}/run")
    assert folder.read("notes") is None
    folder.write("notes", b"0123456789")
    assert folder.read("notes") == b"0123456789"
    assert folder.read("notes", 7) == b"789"
    assert folder.read("notes", 99) == b""
    folder.delete_file("notes")
    assert folder.read("notes") is None


def test_folders_are_put_fetched_listed_and_deleted(root: str, tmp_path: Path) -> None:
    folder = RunFolder(f"{root}/run")
    assert folder.checkpoints() == []
    made = tmp_path / "made"
    made.mkdir()
    (made / "a.bin").write_bytes(b"1")
    (made / "checkpoint.json").write_text("{}")
    for name in ("step-00000003", "step-00000010", "adapter"):
        folder.put(made, name)
    assert folder.checkpoints() == [10, 3]
    found = folder.fetch("step-00000010", tmp_path / "scratch")
    assert sorted(path.name for path in found.iterdir()) == ["a.bin", "checkpoint.json"]
    folder.delete("step-00000010")
    assert folder.checkpoints() == [3]


def test_checkpoints_of_a_way_that_was_gone_back_from_are_not_kept(root: str, tmp_path: Path) -> None:
    folder = RunFolder(f"{root}/run")
    session = LocalSession(folder, 2, torch.device("cpu"))
    for step in (2, 4, 6, 3, 5):  # back from 6 to 2
        made = tmp_path / f"made-{step}"
        made.mkdir()
        (made / "checkpoint.json").write_text("{}")
        session.publish(made, step, {})
        assert not made.exists()
    assert folder.checkpoints() == [5, 3]


def test_a_run_stopped_and_resumed_there_is_the_run_without_a_stop(root: str, demo: Path, tmp_path: Path) -> None:
    scenes = copy_demo(demo, tmp_path / "demo")
    run(demo_config(scenes, scenes / "shards", records_per_shard=16))

    def config(output: str, **changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {
            "shards": [str(scenes / "shards")],
            "base": str(scenes / "base-qwen2_5_vl"),
            "init": "random",
            "output": output,
            "global_batch": 1,
            "epochs": 3,
            "learning_rate": {"language": 5e-3},
            "checkpoint_every_steps": 2,
            "loader_workers": 0,
            "placement": {"executor": "inline", "use_gpu": False},
        }
        return TrainConfig.model_validate(settings | changes)

    told: list[dict[str, Any]] = []
    whole = train(config(str(tmp_path / "whole")), "demo")
    first = train(config(root, max_steps=5), "demo", on_event=told.append)
    last = train(config(root), "demo", resume=True, on_event=told.append)
    assert (first["step"], last["step"]) == (5, whole["step"])
    there, here = RunFolder(last["folder"]), RunFolder(whole["folder"])
    events, expected = (steps_of(read_events(folder.read(METRICS) or b"")) for folder in (there, here))
    assert [event["loss"] for event in events] == [event["loss"] for event in expected]
    assert [event["step"] for event in told if event["event"] == "step"] == list(range(1, whole["step"] + 1)), "told as they come"
    assert there.checkpoints() == here.checkpoints()
    for name in ("adapter/adapter_model.safetensors", "adapter/boxcar.json"):
        assert there.read(name) == here.read(name)


def test_what_the_storage_refuses_names_the_way_out(s3: str) -> None:
    nowhere = RunFolder("s3://no-such-bucket/run")
    with pytest.raises(StorageError, match="bucket exists"):
        nowhere.write("notes", b"")


def test_options_in_a_uri_are_refused() -> None:
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL"):
        RunFolder("s3://bucket/run?region=mars&endpoint_override=http://127.0.0.1:9").read("notes")


def test_an_adapter_behind_a_uri_is_to_be_copied() -> None:
    with pytest.raises(ConfigError, match="aws s3 cp"):
        find_adapter("s3://bucket/runs/mine")
