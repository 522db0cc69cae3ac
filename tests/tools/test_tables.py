"""Tables at the width of a terminal: no line is wider, and no number is cut or broken."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from boxcar.tools.cli import main
from boxcar.tools.quickstart.demo import write_demo
from boxcar.tools.tables import PIPE_WIDTH, Table, result_console

WIDTHS = (80, 120)


def rendered(table: Table, width: int) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(table)
    return stream.getvalue()


def test_a_table_that_fits_is_a_table() -> None:
    table = Table("family", "tokens", box=None)
    table.add_row("qwen2_vl", "1,024")
    assert [line.split() for line in rendered(table, 80).splitlines()] == [["family", "tokens"], ["qwen2_vl", "1,024"]]


def test_a_table_that_does_not_fit_becomes_a_block_for_each_row() -> None:
    table = Table("family", "resize", "published pixels", title="Families")
    table.add_column("boxes", overflow="fold")
    for name in ("first", "second"):
        table.add_row(name, "smart_resize(patch 14, merge 2)", "3,136..12,845,056", "x " * 30 + "end")
    lines = [line.rstrip() for line in rendered(table, 60).splitlines()]
    assert lines[:5] == [
        "Families",
        "family  first",
        "  resize            smart_resize(patch 14, merge 2)",
        "  published pixels  3,136..12,845,056",
        "  boxes             " + ("x " * 20).rstrip(),
    ]
    assert lines[5] == " " * 20 + "x " * 10 + "end", "what is folded stays in its column"
    assert lines[6:8] == ["", "family  second"]


NUMBERS = st.integers(min_value=0, max_value=10**12).map("{:,}".format)


@given(rows=st.lists(st.lists(NUMBERS, min_size=9, max_size=9), min_size=1, max_size=4), width=st.sampled_from([60, *WIDTHS]))
def test_no_number_is_cut_or_broken(rows: list[list[str]], width: int) -> None:
    table = Table(*(f"column {number}" for number in range(9)))
    for row in rows:
        table.add_row(*row)
    output = rendered(table, width)
    assert all(cell_len(line) <= width for line in output.splitlines())
    assert sorted(re.findall(r"(?<!column )(?<![\d,])\d[\d,]*", output)) == sorted(number for row in rows for number in row)


def test_a_pipe_is_as_wide_as_columns_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert result_console().width == PIPE_WIDTH
    monkeypatch.setenv("COLUMNS", "77")
    assert result_console().width == 77


# ---- the tables of the commands


@pytest.fixture(scope="module")
def workflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """workflows.yaml of a small data set that is converted already."""
    folder = tmp_path_factory.mktemp("tables")
    write_demo(folder / "demo", 12)
    base = next((folder / "demo").glob("*qwen2_5_vl*"))
    convert = {
        "reader": "coco",
        "annotations": str(folder / "demo/instances.json"),
        "images": str(folder / "demo/images"),
        "family": "qwen2_5_vl",
        "tokenizer": str(folder / "demo/tokenizer"),
        "cutoff_len": 2048,
        "output": str(folder / "shards"),
        "executor": "inline",
    }
    train = {"base": str(base), "shards": [str(folder / "shards")], "output": str(folder / "run"), "placement": {"use_gpu": False}}
    path = folder / "workflows.yaml"
    path.write_text(yaml.safe_dump({"demo": {"convert": convert, "train": train}}))
    done = invoke("convert", "demo", "--file", path)
    assert done.exit_code == 0, done.output
    return path


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "command",
    [["families"], ["formats"], ["tokens", "qwen2_5_vl", "1920x1080", "640x480"], ["audit", "demo"], ["plan", "demo"]],
    ids=lambda command: command[0],
)
def test_the_tables_of_a_command_fit(command: list[str], width: int, workflow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.chdir(workflow.parent)
    done = invoke(*command, *(["--file", workflow] if "demo" in command else []))
    assert done.exit_code == 0, done.output
    # A sentence is wrapped by the terminal; a path is never broken. Tables are what has columns.
    tables = [line for line in done.stdout.splitlines() if re.search(r"\S {2,}\S", line) and str(workflow.parent) not in line]
    assert tables
    assert [line for line in tables if cell_len(line.rstrip()) > width] == []


@pytest.mark.parametrize("width", WIDTHS)
def test_the_summary_of_a_conversion_fits(width: int, workflow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    done = invoke("convert", "demo", "--file", workflow)
    counts = json.loads((workflow.parent / "shards/manifest.json").read_bytes())["counts"]
    assert f"{counts['visual_tokens']:,}" in done.stdout
    assert [line for line in done.stdout.splitlines() if cell_len(line.rstrip()) > width and str(workflow.parent) not in line] == []
