"""Ratings of several people: merged as stated, agreement as computed by hand, and every bad file refused with its reason."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from boxcar.schemas.errors import ConfigError
from boxcar.tools.measuring.rate import figures_of, read_ratings
from tests.tools.test_cli import invoke, mistake

HEAD = {"format": "boxcar-ratings", "version": 1, "page": "ab" * 16, "subject": "adapter", "shown": 4, "of": 4}
ROWS: dict[str, tuple[str, float | None, bool | None]] = {
    "a": ("refer", 0.9, True),
    "b": ("refer", 0.6, True),
    "c": ("detect", 0.2, False),
    "d": ("absent", None, True),
}


def export(rater: str, ratings: dict[str, str], **changes: Any) -> dict[str, Any]:
    rows = [
        {"sample_id": name, "turn": 0, "rating": rating, "task": ROWS[name][0], "iou": ROWS[name][1], "right": ROWS[name][2]}
        for name, rating in ratings.items()
    ]
    return {**HEAD, "rater": rater, "ratings": rows, **changes}


def as_json(folder: Path, rater: str, ratings: dict[str, str], **changes: Any) -> Path:
    path = folder / f"{rater}-{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps(export(rater, ratings, **changes)), encoding="utf-8")
    return path


def as_csv(folder: Path, rater: str, ratings: dict[str, str]) -> Path:
    """As the page's button writes it."""
    content = export(rater, ratings)
    path = folder / f"{rater}.csv"
    with path.open("w", encoding="utf-8", newline="") as stream:
        head = {key: content[key] for key in ("format", "version", "page", "subject", "rater", "shown", "of")}
        writer = csv.DictWriter(stream, [*head, "sample_id", "turn", "rating", "task", "iou", "right"])
        writer.writeheader()
        for row in content["ratings"]:
            writer.writerow({**head, **row, "right": {True: "true", False: "false", None: ""}[row["right"]]})
    return path


ANN = {"a": "right", "b": "loose", "c": "wrong", "d": "right"}
BOB = {"a": "right", "b": "right", "c": "wrong", "d": "right"}


@pytest.mark.parametrize("write", [as_json, as_csv])
def test_two_raters_by_hand(tmp_path: Path, write: Any) -> None:
    figures = figures_of(read_ratings([write(tmp_path, "Ann", ANN), write(tmp_path, "Bob", BOB)]))
    assert figures["raters"]["Ann"]["right"] == pytest.approx({"count": 2, "rate": 0.5, "low": 0.150, "high": 0.850}, abs=5e-4)
    everyone = figures["all"]
    assert (everyone["num"], everyone["right"]["count"], everyone["wrong"]["count"], everyone["disputed"]["count"]) == (4, 2, 1, 1)
    # Observed 3/4; by chance (2*3 + 1*0 + 1*1 + 0) / 16 = 7/16.
    (kappa,) = figures["kappa"]
    assert (kappa["raters"], kappa["num"], kappa["observed"]) == (["Ann", "Bob"], 4, 0.75)
    assert kappa["kappa"] == pytest.approx((12 / 16 - 7 / 16) / (9 / 16))
    against = figures["human_and_iou"]
    assert against["num"] == 3, "b is disputed"
    assert against["agreement"]["rate"] == 1.0
    assert against["table"]["right"] == {"metric_right": 2, "metric_wrong": 0, "mean_iou": 0.9}
    assert against["table"]["wrong"] == {"metric_right": 0, "metric_wrong": 1, "mean_iou": 0.2}
    assert against["point_biserial"] == pytest.approx(1.0), "two points"
    assert figures["by_task"]["absent"]["right"]["rate"] == 1.0


def test_three_raters_have_a_majority(tmp_path: Path) -> None:
    files = [as_json(tmp_path, "Ann", ANN), as_json(tmp_path, "Bob", BOB), as_json(tmp_path, "Cleo", {"b": "loose"})]
    figures = figures_of(read_ratings(files))
    assert figures["all"]["loose"]["count"] == 1
    assert "disputed" not in figures["all"]
    against = figures["human_and_iou"]
    assert against["agreement"]["rate"] == 0.75, "people find b loose, IoU .6 is right"
    assert against["table"]["loose"]["metric_right"] == 1
    # Right: .9; not right: .6, .2. Pearson by hand.
    assert against["point_biserial"] == pytest.approx(0.8220, abs=1e-4)
    kappas = {tuple(entry["raters"]): entry["num"] for entry in figures["kappa"]}
    assert kappas == {("Ann", "Bob"): 4, ("Ann", "Cleo"): 1, ("Bob", "Cleo"): 1}


def test_a_rater_s_two_files_are_one(tmp_path: Path) -> None:
    ratings = read_ratings([as_json(tmp_path, "Ann", {"a": "right", "b": "loose"}), as_json(tmp_path, "Ann", {"b": "loose", "c": "wrong"})])
    assert ratings.by_rater == {"Ann": {("a", 0): "right", ("b", 0): "loose", ("c", 0): "wrong"}}


def test_the_command_prints_and_speaks_json(tmp_path: Path) -> None:
    files = [as_json(tmp_path, "Ann", ANN, shown=4, of=90), as_json(tmp_path, "Bob <b>[red]", BOB, shown=4, of=90)]
    told = invoke("rate", *files).output
    assert "Bob <b>[red]" in told, "a name is text, no markup"
    assert "point-biserial" in told
    assert "4 of 90 questions, evenly" in told
    assert json.loads(invoke("rate", *files, "--json").output)["num_questions"] == 4


BAD: dict[str, tuple[Any, str]] = {
    "no_such_file": (None, "no such file"),
    "picture": (b"\x89PNG\r\n\x1a\n\xff", "can't decode"),
    "other_json": (b'{"a": 1}', "missing required field"),
    "list": (b"[1, 2]", "no rows"),
    "cut_json": (json.dumps(export("Ann", ANN)).encode()[:-5], "not an export of ratings"),
    "other_version": (json.dumps(export("Ann", ANN, version=2)).encode(), "boxcar-ratings version 2"),
    "other_format": (json.dumps(export("Ann", ANN, format="x")).encode(), "x version 1"),
    "unknown_rating": (json.dumps(export("Ann", {"a": "perfect"})).encode(), "rating 'perfect'"),
    "nobody": (json.dumps(export(" ", ANN)).encode(), "no rater's name"),
    "nothing": (json.dumps(export("Ann", {})).encode(), "no rating"),
    "other_csv": (b"a,b\n1,2\n", "format"),
    "ragged_csv": (b"a,b\n1,2,3\n", "cells than columns"),
    "empty": (b"", "no rows"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused(tmp_path: Path, name: str) -> None:
    content, reason = BAD[name]
    path = tmp_path / "ratings.json"
    if content is not None:
        path.write_bytes(content)
    told = mistake("rate", path)
    assert reason in told
    assert str(path) in told


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    first = as_json(tmp_path, "Ann", ANN)
    with pytest.raises(ConfigError, match="ratings of page cdcd"):
        read_ratings([first, as_json(tmp_path, "Bob", BOB, page="cd" * 16)])
    with pytest.raises(ConfigError, match="'wrong' by Ann, who said 'right'"):
        read_ratings([first, as_json(tmp_path, "Ann", {"a": "wrong"})])
    with pytest.raises(ConfigError, match="no file"):
        read_ratings([])
