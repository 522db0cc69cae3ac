"""Tables at the width of a terminal: no line is wider, and no number is cut or broken."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from boxcar.tools.cli import main
from boxcar.tools.measuring.evaluate import print_results
from boxcar.tools.measuring.predict import print_answer
from boxcar.tools.quickstart.demo import write_demo
from boxcar.tools.tables import PIPE_WIDTH, Table, result_console
from boxcar.tools.training.ablate_report import print_ablation
from boxcar.train.answering.predict import Answer
from boxcar.train.scoring.evaluate import compared
from tests.places import ROOT
from tests.small_results import write_results
from tests.tools.measuring.test_rate import as_json
from tests.tools.training.test_ablate import made_up

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


# ---- tables of results


def console_of(width: int) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=width, soft_wrap=True), stream


def too_wide(text: str, width: int) -> list[str]:
    """Lines with columns that are wider than the terminal; a sentence is wrapped by the terminal itself."""
    return [line for line in text.splitlines() if re.search(r"\S {2,}\S", line) and cell_len(line.rstrip()) > width]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_tables_of_an_evaluation_fit(width: int, workflow: Path, tmp_path: Path) -> None:
    results = write_results(tmp_path / "results", workflow.parent / "shards") | {"folder": "results"}
    console, stream = console_of(width)
    print_results(results, console)
    heads, rows = compared(results["arms"])
    assert heads == ["adapter", "base"]
    assert all(cell in stream.getvalue() for _, cells in rows for cell in cells), "whole, on one line"
    assert too_wide(stream.getvalue(), width) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_the_tables_of_an_ablation_fit(width: int) -> None:
    console, stream = console_of(width)
    values = [123456.789 + number for number in range(5)]
    print_ablation(console, made_up({"all": values, "uniform": values, "progressive": values, "random_paced": values, "anti": values}))
    assert stream.getvalue().count("123458.7890") == 5, "each mean once, whole"
    assert too_wide(stream.getvalue(), width) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_the_tables_of_ratings_fit(width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    files = [as_json(tmp_path, rater, {"a": "right", "b": "loose", "c": "wrong"}) for rater in ("ann", "a rater of a long name", "猫" * 12)]
    done = invoke("rate", *files)
    assert done.exit_code == 0, done.output
    assert "a rater of a long name" in done.stdout
    assert too_wide(done.stdout, width) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_the_table_of_a_prediction_fits(width: int) -> None:
    boxes = np.array([[0.0, 1.25, 12345.6, 99999.9]] * 3)
    labels = (
        "a label of more words than fit into any line of a terminal that is as narrow as eighty characters, and then some",
        "猫" * 70,
        None,
    )
    answer = Answer("1", 0, "detect", "en", "Q", "A", True, "strict", (), boxes, boxes, labels, None, (99999, 99999), (1000, 1000), 1, 1)
    console, stream = console_of(width)
    print_answer(console, answer)
    assert stream.getvalue().count("12345.6") == 3
    assert too_wide(stream.getvalue(), width) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_the_tables_of_the_doctor_fit(width: int, workflow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.chdir(workflow.parent)
    done = invoke("doctor", "demo", "--file", workflow, "placement.executor=inline")
    assert "torch" in done.stdout
    table = [line for line in done.stdout.splitlines() if not line.startswith("PROBLEM")]  # a sentence
    assert too_wide("\n".join(table), width) == []


def test_every_table_of_the_project_is_one_that_becomes_blocks() -> None:
    """`rich.table` itself breaks numbers where it has no space."""
    files = [path for path in (ROOT / "tools").rglob("*.py") if re.search(r"rich(\.| import )table", path.read_text("utf-8"))]
    assert [path.name for path in files] == ["tables.py"]
