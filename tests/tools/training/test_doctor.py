"""`boxcar doctor`: what is printed, what stands in the way, and what a job would upload."""

import platform
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from boxcar.schemas.training import TrainConfig
from boxcar.tools.cli import main
from boxcar.tools.training import doctor as examination
from boxcar.tools.training.doctor import doctor, uploaded
from boxcar.train.running.nodes import NodeFacts
from tests.small_sets import BOXCAR, copy_demo, demo_config, run


@pytest.fixture(scope="module")
def scenes(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_demo(demo, tmp_path_factory.mktemp("doctor") / "demo")
    run(demo_config(folder, folder / "shards"))
    return folder


def settings(scenes: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return {
        "shards": [str(scenes / "shards")],
        "base": str(scenes / "base-qwen2_5_vl"),
        "output": str(output),
        "loader_workers": 0,
        "placement": {"use_gpu": False},
        **changes,
    }


@pytest.fixture
def flow(scenes: Path, tmp_path: Path) -> Path:
    path = tmp_path / "flows.yaml"
    path.write_text(yaml.safe_dump({"small": {"train": settings(scenes, tmp_path / "runs")}}))
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and a wide terminal."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "300")
    return folder


def invoke(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["doctor", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def facts(host: str = "a", *, problems: tuple[str, ...] = (), cpus: float = 4, gpus: float = 0, **same: str) -> NodeFacts:
    versions = {"torch": "2.9.0", "transformers": "5.23.0", "peft": "0.17.0", "deepspeed": "not installed"}
    return NodeFacts(host, versions | same, {"polars": "2.1.0"}, list(problems), {"CPU": cpus, "GPU": gpus})


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends to be connected to these nodes."""
    from contextlib import nullcontext  # noqa: PLC0415

    def of(*nodes: NodeFacts) -> None:
        monkeypatch.setattr(examination, "connected", nullcontext)
        monkeypatch.setattr(examination, "survey", lambda _config: list(nodes))

    return of


# ---- this machine


def test_without_a_workflow(place: Path) -> None:
    result = invoke()
    assert result.exit_code == 0, result.output
    for words in ("python", "torch", "transformers", "peft", "deepspeed", "gpus", "0.0 MB in 0 files", "No problem found."):
        assert words in result.stdout, words
    assert "PROBLEM" not in result.stdout


def test_a_workflow_has_its_shards_and_its_base_in_the_table(place: Path, flow: Path, scenes: Path) -> None:
    result = invoke("small", "--file", flow)
    assert result.exit_code == 0, result.output
    shown = "".join(result.stdout.split())
    assert f"shards{scenes / 'shards'}" in shown
    assert f"base{scenes / 'base-qwen2_5_vl'}" in shown


@pytest.mark.parametrize(
    ("override", "message"),
    [
        pytest.param("shards=[/nowhere/shards]", "/nowhere/shards/manifest.json: found no such file", id="shards"),
        pytest.param("validation.shards=[/nowhere/held]", "/nowhere/held/manifest.json: found no such file", id="held-out shards"),
        pytest.param("base=/nowhere/base", "train.base: /nowhere/base/config.json is not there", id="base"),
        pytest.param("placement.num_workers=4000", "4000 workers of 1 CPUs each, and this machine of", id="more workers than CPUs"),
        pytest.param("placement.cpus_per_worker=4000", "1 workers of 4000 CPUs each, and this machine of", id="large workers"),
        pytest.param("loader_workers=4000", "1 workers with 4000 loader processes each share", id="loader processes"),
        pytest.param("output=/dev/null/runs", "/dev/null may not be written", id="output"),
    ],
)
def test_what_stands_in_the_way(place: Path, flow: Path, override: str, message: str) -> None:
    result = invoke("small", "--file", flow, override)
    assert result.exit_code == 1, result.output
    assert f"PROBLEM  {message}" in result.stdout.replace(f"{platform.node()}: ", "")
    assert "1 problem." in result.stdout


def test_little_room_on_the_disk(place: Path, flow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("boxcar.tools.training.doctor.shutil.disk_usage", lambda _path: type("Usage", (), {"free": 2e9}))
    assert "has 2.0 GB free: checkpoints need room" in invoke("small", "--file", flow).stdout
    assert "GB free" not in invoke("small", "--file", flow, "output=s3://bucket/runs").stdout, "a bucket has room"


@pytest.mark.parametrize(("deepspeed", "missing"), [(None, ["peft"]), ({"stage": 2}, ["peft", "deepspeed"])])
def test_packages_that_are_missing(
    place: Path, scenes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, deepspeed: Any, missing: list[str]
) -> None:
    monkeypatch.setattr(examination, "node_facts", lambda _needs: facts(peft="not installed"))
    config = TrainConfig.model_validate(settings(scenes, place / "runs", deepspeed=deepspeed))
    assert doctor(config, cluster=False, working_dir=place) == 1
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if line.startswith("PROBLEM")] == [f"PROBLEM  {name} is not installed" for name in missing]


# ---- a cluster


def test_nodes_that_differ(place: Path, cluster: Callable[..., None]) -> None:
    cluster(facts("n1"), facts("n2", torch="2.8.0"), facts("n3", problems=("/out: it is not shared storage",)))
    result = invoke("--cluster")
    assert result.exit_code == 1
    assert "PROBLEM  torch: 2.8.0 on n2; 2.9.0 on n1, n3\n" in result.stdout
    assert "PROBLEM  n3: /out: it is not shared storage\n" in result.stdout
    assert "2 problems." in result.stdout
    table = [line.split() for line in result.stdout.partition("working directory")[0].splitlines()]
    assert ["nodes", "n1,", "n2,", "n3"] in table
    assert ["peft", "0.17.0"] in table
    differing = table.index(["torch", "2.8.0", "on", "n2"])
    assert table[differing + 1] == ["2.9.0", "on", "n1,", "n3"]


def test_a_node_that_does_not_answer(place: Path, cluster: Callable[..., None]) -> None:
    cluster(NodeFacts("n1", {}, {}, ["no answer within 180 s"]), facts("n2"))
    result = invoke("--cluster")
    assert result.exit_code == 1
    assert "PROBLEM  n1: no answer within 180 s\n" in result.stdout
    assert "1 problem." in result.stdout


@pytest.mark.parametrize(
    ("cpus", "changes", "message"),
    [
        pytest.param([4, 4], {"num_workers": 8}, None, id="enough"),
        pytest.param([4, 4], {"num_workers": 9}, "9 workers of 1 CPUs each, and the cluster of 4 + 4 CPUs can hold 8", id="too many"),
        pytest.param([4, 4], {"num_workers": 2, "cpus_per_worker": 4}, None, id="one a node"),
        pytest.param([5, 3], {"num_workers": 2, "cpus_per_worker": 4}, "the cluster of 5 + 3 CPUs can hold 1", id="none may be cut"),
        pytest.param([1] * 9, {"num_workers": 10}, "the cluster of 9 CPUs can hold 9", id="many nodes"),
        pytest.param([4, 4], {"use_gpu": True}, "1 workers with a GPU each, the cluster has 0 GPUs", id="no GPU"),
    ],
)
def test_workers_need_room_on_nodes(
    place: Path, flow: Path, cluster: Callable[..., None], cpus: list[float], changes: dict[str, Any], message: str | None
) -> None:
    cluster(*(facts(f"n{number}", cpus=have) for number, have in enumerate(cpus)))
    result = invoke("small", "--file", flow, "--cluster", *(f"placement.{name}={value}" for name, value in changes.items()))
    assert result.exit_code == (0 if message is None else 1)
    assert message is None or message in result.stdout


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_of_this_machine(flow: Path, tmp_path: Path) -> None:
    """In a process of its own, as people start it: Ray is connected to once in a process."""
    done = subprocess.run(
        [BOXCAR, "doctor", "small", "--file", str(flow), "--cluster"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "RAY_ADDRESS is not set: this is a cluster of this machine alone" in done.stdout
    assert "No problem found." in done.stdout
    assert not list((tmp_path / "runs").iterdir()), "the token is gone"


def test_a_cluster_that_does_not_answer(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    result = invoke("--cluster")
    assert result.exit_code == 2
    assert f"ConfigError: RAY_ADDRESS: found {address}, where no cluster answers ([Errno 111] Connection refused)" in result.stderr


# ---- what a job uploads


def write(folder: Path, *names: str, content: str = "x") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def commit_all(folder: Path) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
    for command in (["init", "--quiet"], ["add", "--all", "--force"], [*identity, "commit", "--quiet", "--message", "all"]):
        subprocess.run(["git", *command], cwd=folder, check=True, capture_output=True)


FILES = (
    "train.py",
    "data/a.arrow",
    "deep/data/b.bin",
    "deep/keep.txt",
    ".venv/lib.py",
    "x/__pycache__/y.pyc",
    "logs/run.log",
    ".env",
    "ä b.py",
)
LAYOUTS = [
    pytest.param("", "", id="no ignore files"),
    pytest.param("/data/\n*.log\n", "", id="gitignore"),
    pytest.param("", "data/\n.env*\n", id="rayignore"),
    pytest.param("*.log\n", "/data/*\n# a comment\n!/data/a.arrow\n.env\n", id="both"),
]


@pytest.mark.parametrize("committed", [False, True], ids=["no repository", "all committed"])
@pytest.mark.parametrize(("gitignore", "rayignore"), LAYOUTS)
def test_what_is_uploaded_is_what_ray_packs(place: Path, tmp_path: Path, gitignore: str, rayignore: str, committed: bool) -> None:
    """Ray's own packing is the judge; a committed file is no exception from .gitignore there."""
    packaging = pytest.importorskip("ray._private.runtime_env.packaging", reason="another version of Ray has it elsewhere")
    constants = pytest.importorskip("ray._private.ray_constants")
    write(place, *FILES)
    for name, content in ((".gitignore", gitignore), (".rayignore", rayignore), ("deep/.gitignore", "*.bin\n")):
        if content:
            write(place, name, content=content)
    if committed:
        commit_all(place)
    package = tmp_path / "package.zip"
    excludes = constants.RAY_RUNTIME_ENV_DEFAULT_EXCLUDES.split(",")
    packaging._zip_files(str(place), excludes, str(package), include_gitignore=True, include_parent_dir=False)
    import zipfile  # noqa: PLC0415

    expected = {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}
    found = {path.relative_to(place).as_posix() for path in uploaded(place)}
    assert found == expected
    assert "train.py" in found
    assert ".venv/lib.py" not in found


def test_a_repository_within_is_counted(place: Path) -> None:
    write(place, "train.py", "inner/a.py")
    commit_all(place / "inner")
    assert place / "inner/a.py" in uploaded(place)


def test_without_git_everything_counts(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(place, "train.py", "data/a.bin")
    write(place, ".gitignore", content="/data/\n")
    monkeypatch.setenv("PATH", str(place))
    assert {path.name for path in uploaded(place) if path.is_file()} == {"train.py", "a.bin", ".gitignore"}


def test_an_upload_that_ray_refuses(place: Path) -> None:
    write(place, "train.py")
    for name, size in (("model.bin", 120 << 20), ("data/rows.bin", 30 << 20)):
        write(place, name)
        with (place / name).open("r+b") as stream:
            stream.truncate(size)  # a sparse file: it takes no room
    result = invoke()
    assert result.exit_code == 1
    assert "has 157 MB; Ray refuses more than 105 MB. Name in .rayignore: model.bin, data/rows.bin, train.py" in result.stdout
    write(place, ".rayignore", content="*.bin\n")
    assert invoke().exit_code == 0


@pytest.mark.parametrize("name", [".env", ".env.local", "keys/server.pem", "id.key"])
def test_secrets_would_be_uploaded(place: Path, name: str) -> None:
    write(place, name)
    result = invoke()
    assert result.exit_code == 1
    assert f"PROBLEM  {name}: would be uploaded; name it in .rayignore" in result.stdout
    write(place, ".rayignore", content=f"{Path(name).name}\n")
    assert invoke().exit_code == 0
