"""The floor plan: this house keeps it, and every fault of a small made-up house is seen."""

import subprocess
import sys
from pathlib import Path

import pytest

from boxcar.tools.floors import circles, house, problems
from tests.places import ROOT as REPOSITORY

ROOMS = ("schemas/errors", "pipelines/tokens/tokenizer", "pipelines/readers/reader", "pipelines/readers/catalog", "train/loop", "tools/cli")


def build(root: Path, **sources: str) -> Path:
    """A house of these rooms, empty but for the sources given by name with two underscores for a slash."""
    for room in {*ROOMS, *(name.replace("__", "/") for name in sources)}:
        path = root / f"{room}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(sources.get(room.replace("/", "__"), ""))
    return root


def test_this_house_keeps_its_plan() -> None:
    assert problems(REPOSITORY) == []


def test_the_plan_names_every_room_and_ends_well() -> None:
    done = subprocess.run([sys.executable, "-m", "tools.floors"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line for line in done.stdout.splitlines() if line and not line.startswith(" ")] == [
        "tools/",
        "train/",
        "pipelines/",
        "schemas/",
    ]
    for path in (REPOSITORY / "pipelines").glob("[!_]*"):
        assert f"\n  {path.stem}" in done.stdout


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("", id="nothing"),
        pytest.param("import json\nimport numpy as np\nfrom pathlib import Path\n", id="libraries"),
        pytest.param("import boxcar.schemas.errors\nfrom boxcar.pipelines.tokens import tokenizer\n", id="down and sideways"),
        pytest.param("def f() -> None:\n    import boxcar.schemas.errors\n", id="down, late"),
    ],
)
def test_a_good_house_has_no_faults(tmp_path: Path, source: str) -> None:
    assert problems(build(tmp_path, pipelines__convert=source)) == []


@pytest.mark.parametrize(
    ("room", "source", "fault"),
    [
        pytest.param("pipelines__convert", "import boxcar.tools.cli\n", "convert imports tools.cli: an arrow", id="up"),
        pytest.param(
            "pipelines__convert",
            "from boxcar.tools import cli\n",
            "convert imports tools.cli: an arrow",
            id="up, from the folder",
        ),
        pytest.param("pipelines__convert", "from boxcar.tools.cli import main\n", "convert imports tools.cli: an arrow", id="up, a name"),
        pytest.param("pipelines__convert", "from boxcar.tools import nothing\n", "an arrow that points up", id="up, to what is not there"),
        pytest.param(
            "pipelines__convert", "def f():\n  if x:\n    import boxcar.train.loop\n", "pipelines.convert imports train.loop", id="up, late"
        ),
        pytest.param(
            "schemas__row",
            "from boxcar.pipelines.tokens import tokenizer\n",
            "imports pipelines.tokens.tokenizer: an arrow",
            id="up, from below",
        ),
        pytest.param("schemas__row", "from ..tools import cli\n", "schemas.row imports tools.cli: an arrow", id="up, relative"),
        pytest.param("schemas__row", "import tests.small_sets\n", "schemas.row imports tests", id="tests"),
        pytest.param("tools__show", "from tests.small_sets import run\n", "tools.show imports tests", id="tests, from the roof"),
        pytest.param("pipelines__convert", "import torch.nn\n", "pipelines.convert imports torch: no torch below", id="torch"),
        pytest.param(
            "pipelines__convert", "from transformers import AutoTokenizer\n", "imports transformers: no torch below", id="transformers"
        ),
        pytest.param(
            "pipelines__convert", "try:\n  import torch\nexcept ImportError:\n  pass\n", "imports torch", id="torch, if it is there"
        ),
        pytest.param("pipelines__readers__coco", "from boxcar.pipelines.readers import voc\n", "a sibling", id="sibling"),
        pytest.param("pipelines__readers__coco", "from .voc import read\n", "a sibling", id="sibling, relative"),
        pytest.param("pipelines__readers__coco", "from boxcar.pipelines.readers.catalog import READERS\n", "a sibling", id="the catalog"),
        pytest.param("pipelines__tokens__tokenizer", "import boxcar.pipelines.convert\n", "a circle: ", id="circle"),
        pytest.param("pipelines__readers__coco", "import boxcar.pipelines.tokens.frame\n", "a circle of folders: ", id="circle of folders"),
        pytest.param("pipelines__convert", "from pipelines.tokens import frame\n", "write boxcar.pipelines", id="not as installed"),
    ],
)
def test_a_fault_is_named(tmp_path: Path, room: str, source: str, fault: str) -> None:
    sources = {
        "pipelines__convert": "import boxcar.pipelines.tokens.tokenizer\n",
        "pipelines__readers__voc": "",
        "pipelines__tokens__frame": "",
        "pipelines__tokens__tokenizer": "import boxcar.pipelines.readers.reader\n",
    }
    root = build(tmp_path, **(sources | {room: source}))
    found = problems(root)
    assert any(fault in line for line in found), found


FAMILIES = {
    "pipelines__families__catalog": (
        "from boxcar.pipelines.families import red, blue\nFAMILIES = {'red_vl': red.FAMILY, 'blue_vl': blue.FAMILY}\n"
    ),
    "pipelines__families__red": "from boxcar.pipelines.families.patches import PixelLimits, RedResize\n",
    "pipelines__families__blue": "",
    "pipelines__families__patches": "",
}


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        pytest.param("from boxcar.pipelines.families.patches import RedResize\n", "imports pipelines.families.patches.Red", id="rule"),
        pytest.param("def f():\n  from boxcar.pipelines.families.patches import PixelLimits, RedResize\n", "RedResize", id="rule, late"),
        pytest.param("from boxcar.pipelines.families import patches\n", "imports pipelines.families.patches: let", id="a file of rules"),
        pytest.param("from boxcar.pipelines.families.patches import *\n", "imports pipelines.families.patches.*: let", id="every rule"),
        pytest.param("from boxcar.pipelines.families.red import FAMILY\n", "imports pipelines.families.red.FAMILY", id="one family"),
        pytest.param("from boxcar.pipelines.families import red\n", "imports pipelines.families.red: let", id="one family's file"),
        pytest.param("from boxcar.pipelines import families\n", "imports pipelines.families: let", id="the folder"),
        pytest.param("def f(name):\n  return name == 'red_vl'\n", "loop, line 2, compares with 'red_vl'", id="equal"),
        pytest.param("def f(family):\n  return 'blue_vl' != family.name\n", "'blue_vl'", id="not equal"),
        pytest.param("def f(name):\n  return name in ('x', 'blue_vl')\n", "'blue_vl'", id="one of"),
        pytest.param("NAMES = {'x', 'blue_vl'}\ndef f(name):\n  return name in NAMES\n", "line 3, compares with 'blue_vl'", id="constant"),
        pytest.param("def f(name):\n  match name:\n    case 'x' | 'red_vl':\n      return 1\n", "line 3, compares with", id="match"),
        pytest.param("_SIZES = {'x': 1, 'red_vl': 2}\n", "line 1, compares with 'red_vl'", id="key of a dict"),
    ],
)
def test_a_question_who_a_family_is_is_named(tmp_path: Path, source: str, fault: str) -> None:
    found = problems(build(tmp_path, **FAMILIES, train__loop=source))
    assert len(found) == 1
    assert fault in found[0]
    assert found[0].endswith(": let the family answer (pipelines/families/family.py)")


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("from boxcar.pipelines.families.patches import PixelLimits, ResizeRule\n", id="an interface"),
        pytest.param("from boxcar.pipelines.families.catalog import FAMILIES\nFAMILIES['red_vl']\n", id="a choice"),
        pytest.param("DEFAULT = 'red_vl'\ndef f(name='red_vl'):\n  return {'family': name}\n", id="a default"),
        pytest.param("def f(name):\n  return name == 'green_vl'\n", id="no family"),
        pytest.param("def f(name):\n  'red_vl'\n  return g(family='red_vl')\n", id="an argument"),
    ],
)
def test_a_family_may_be_chosen_and_its_interface_used(tmp_path: Path, source: str) -> None:
    assert problems(build(tmp_path, **FAMILIES, train__loop=source)) == []


def test_an_init_that_is_not_empty_is_named(tmp_path: Path) -> None:
    (build(tmp_path) / "pipelines" / "readers" / "__init__.py").write_text("from boxcar.pipelines.readers.reader import Reader\n")
    assert problems(tmp_path) == ["pipelines/readers/__init__.py is not empty: import a name from the file that owns it"]


def test_tokens_may_ask_transformers_and_nobody_else(tmp_path: Path) -> None:
    assert problems(build(tmp_path, pipelines__tokens__tokenizer="def f():\n    import transformers\n")) == []
    assert len(problems(build(tmp_path, pipelines__tokens__tokenizer="def f():\n    import torch\n"))) == 1


def test_a_reader_may_enter_what_readers_share_and_the_catalog_all_of_them(tmp_path: Path) -> None:
    coco = "from boxcar.pipelines.readers.reader import Reader\n"
    assert (
        problems(build(tmp_path, pipelines__readers__coco=coco, pipelines__readers__catalog="import boxcar.pipelines.readers.coco\n")) == []
    )


@pytest.mark.parametrize(
    ("arrows", "num_circles"),
    [
        pytest.param({"a": {"b", "c"}, "b": {"c"}, "c": set()}, 0, id="two ways to one room"),
        pytest.param({"a": {"b"}, "b": {"a"}}, 1, id="two rooms"),
        pytest.param({"a": {"b"}, "b": {"c"}, "c": {"b"}}, 1, id="a circle behind a way"),
        pytest.param({"a": {"b", "c"}, "b": {"a"}, "c": {"a"}}, 2, id="two circles"),
        pytest.param({"a": {"json"}}, 0, id="libraries"),
    ],
)
def test_circles_are_found(arrows: dict[str, set[str]], num_circles: int) -> None:
    found = circles(arrows)
    assert len(found) == num_circles
    assert all(circle[0] == circle[-1] for circle in found)


def test_imports_are_read_from_the_real_files() -> None:
    arrows = house(REPOSITORY)
    assert {"pipelines.rows.unit", "pipelines.shards.work_folder", "schemas.manifest"} <= arrows["pipelines.convert"]
    assert "ray" in arrows["pipelines.cluster"], "also where a function imports"
    assert arrows["schemas.errors"] == set()
