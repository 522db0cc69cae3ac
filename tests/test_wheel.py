"""The wheel as a user has it: installed without the checkout, run from a project whose own folders bear the names of ours."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.places import ROOT
from tests.tools.quickstart.test_quickstart import SHORT

FOLDERS = ("schemas", "pipelines", "train", "tools")
OURS = (".package", *FOLDERS, "LICENSE", "README.md", "pyproject.toml")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tree, which is then deleted."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in OURS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    subprocess.run(build, check=True)
    shutil.rmtree(source)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the wheel. It sees the other packages of this one, but not its editable installation of Boxcar."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # A line of a .pth file is a folder to import from. The .pth files in that folder, one of which names the checkout, are not read.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True
    )
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Somebody's project, whose packages must not be imported in place of ours."""
    for name in FOLDERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise ImportError('the user\\'s own {name}')\n")
    return tmp_path


def _run(environment: Path, project: Path, *command: str) -> str:
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    variables["PYTHONPATH"] = str(project)  # as it is where a project is on the path of its own programs
    done = subprocess.run(
        [str(environment / "bin" / command[0]), *command[1:]], cwd=project, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_wheel_holds_one_package_and_all_its_files(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"boxcar"}
    kept = [path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    missing = [str(path.relative_to(ROOT)) for path in kept if f"boxcar/{path.relative_to(ROOT)}" not in names]
    assert not missing


def test_boxcar_is_the_installed_one(environment: Path, project: Path) -> None:
    found = _run(environment, project, "python", "-c", "import boxcar.train.job as job; print(job.__file__)")
    assert Path(found.strip()).is_relative_to(environment)


@pytest.mark.slow
@pytest.mark.ray
def test_a_project_with_folders_of_the_same_names_audits_converts_and_trains(environment: Path, project: Path) -> None:
    shutil.copy(ROOT / "workflows.yaml", project)
    _run(environment, project, "boxcar", "demo", "--images", "12")
    assert "samples" in _run(environment, project, "boxcar", "audit", "demo")
    _run(environment, project, "boxcar", "convert", "demo", "executor=ray", "num_workers=1")
    assert "all is well" in _run(environment, project, "boxcar", "verify", "shards/demo")
    _run(environment, project, "boxcar", "train", "demo", "placement.executor=inline", "max_steps=2")
    assert list(project.glob("runs/demo-*/step-*"))


@pytest.mark.slow
def test_the_quick_start_runs_in_such_a_project(environment: Path, project: Path) -> None:
    assert "index.html" in _run(environment, project, "boxcar", "run", "quickstart", *SHORT)
