"""`boxcar rate`: what raters exported from a page, merged: rates with intervals, agreement between raters, and agreement with IoU.

| figure            | definition                                                                                                       |
|-------------------|------------------------------------------------------------------------------------------------------------------|
| rate              | share of the questions that were given an answer; Wilson's 95 % interval, questions taken as independent         |
| of all raters     | a question counts as what more than half of its raters said; where none was, it is disputed                      |
| kappa             | Cohen's, of each pair of raters, over the four answers, on the questions that both rated                          |
| human and IoU     | a person's "right" against the metric's, which is `verdict`: as many boxes as are true, each at IoU >= .5        |
| point-biserial    | Pearson's correlation of "right" (1 or 0) with the question's IoU, where something true is there                 |

Where a page showed a sample, its strata are equally large: rates are then of what was shown, not of the whole set.
"""

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.text import Text

from boxcar.schemas.errors import ConfigError
from boxcar.tools.plain import visible
from boxcar.tools.tables import Table, result_console
from boxcar.train.scoring.agreement import cohen_kappa, wilson_interval

RATINGS: Mapping[str, str] = {"right": "right", "loose": "loose", "wrong": "wrong thing", "none": "should be none"}
"""As files have them, and as people read them; the keys 1 to 4 of the page."""
FORMAT, VERSION = "boxcar-ratings", 1
DISPUTED = "disputed"
_FORMULA = tuple("=+-@\t\r'")
"""What a cell of the page's CSV begins with that has a quote before it: spreadsheets would run it."""

Name = tuple[str, int]
"""(sample_id, turn): a question."""


class _Rated(msgspec.Struct):
    sample_id: str
    turn: int
    rating: str
    task: str = ""
    iou: float | None = None
    right: bool | None = None


class _Export(msgspec.Struct):
    format: str
    version: int
    page: str
    subject: str
    rater: str
    ratings: list[_Rated]
    shown: int = 0
    of: int = 0


@dataclass(frozen=True)
class Ratings:
    """Everything that was rated of one page."""

    page: str
    subject: str
    by_rater: dict[str, dict[Name, str]]
    facts: dict[Name, _Rated]
    """Task, IoU and the metric's verdict of each question."""
    shown: int
    of: int


def rate(files: Sequence[Path], results: Path | None, *, as_json: bool) -> None:
    """Merge and print. Raises ConfigError where a file is no export, or files do not belong together."""
    figures = figures_of(read_ratings(files, results))
    if as_json:
        print(json.dumps(figures, ensure_ascii=False))
    else:
        _print(figures)


# ---- reading


def read_ratings(files: Sequence[Path], results: Path | None = None) -> Ratings:
    """The ratings of all files. results: an evaluation's folder; IoU and verdict are then its own and not the files'.

    Raises ConfigError where a file is no export of a page, where two are of different pages, and where one rater gave a question two
    different answers.
    """
    exports = [(path, _read(path)) for path in files]
    if not exports:
        raise ConfigError("boxcar rate", found="no file", expected="files that raters exported from a page of `boxcar view`")
    first_path, first = exports[0]
    by_rater: dict[str, dict[Name, str]] = {}
    facts: dict[Name, _Rated] = {}
    for path, export in exports:
        if (export.page, export.subject) != (first.page, first.subject):
            raise ConfigError(
                str(path),
                found=f"ratings of page {export.page[:12]} ({export.subject})",
                expected=f"page {first.page[:12]} ({first.subject}), as in {first_path}",
                fix="Rates of different pages do not mix: give one page's files at a time.",
            )
        mine = by_rater.setdefault(export.rater, {})
        for one in export.ratings:
            name = one.sample_id, one.turn
            if mine.get(name, one.rating) != one.rating:
                raise ConfigError(
                    f"{path}, {one.sample_id}, turn {one.turn}",
                    found=f"{one.rating!r} by {export.rater}, who said {mine[name]!r} in another place",
                    expected="one answer of a rater to a question",
                    fix="Give only the newer of a rater's files; two people need two names.",
                )
            mine[name] = one.rating
            facts.setdefault(name, one)
    if results is not None:
        facts = _facts_of(results, facts, first)
    shown, of = max((export.shown, export.of) for _, export in exports)
    return Ratings(first.page, first.subject, by_rater, facts, shown, of)


def _read(path: Path) -> _Export:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        found = "no such file" if isinstance(error, FileNotFoundError) else f"{error}"
        raise ConfigError(str(path), found=found, expected="a file exported from a page of `boxcar view`") from error
    try:
        export = msgspec.convert(json.loads(text) if text.lstrip().startswith("{") else _from_csv(text), _Export)
    except (ValueError, KeyError) as error:  # json's and msgspec's errors are ValueErrors
        raise ConfigError(
            str(path),
            found=f"a file that is not an export of ratings ({error})",
            expected="JSON or CSV as the page's buttons write it",
            fix="Export again; a spreadsheet may have changed the columns.",
        ) from error
    if (export.format, export.version) != (FORMAT, VERSION):
        raise ConfigError(str(path), found=f"{export.format} version {export.version}", expected=f"{FORMAT} version {VERSION}")
    for one in export.ratings:
        if one.rating not in RATINGS:
            where = f"{path}, {one.sample_id}, turn {one.turn}"
            raise ConfigError(where, found=f"rating {one.rating!r}", expected=f"one of {', '.join(RATINGS)}")
    if not export.rater.strip() or not export.ratings:
        found = "no rater's name" if export.ratings else "no rating"
        raise ConfigError(str(path), found=found, expected="ratings by somebody")
    return export


def _from_csv(text: str) -> dict[str, Any]:
    """The content of an export from its CSV. Raises ValueError and KeyError where it is none."""
    rows = list(csv.DictReader(io.StringIO(text)))
    if not rows:
        raise ValueError("no rows")
    if any(None in row or None in row.values() for row in rows):
        raise ValueError("rows with more or fewer cells than columns")
    cells = [
        {key: value[1:] if value[:1] == "'" and value[1:].startswith(_FORMULA) else value for key, value in row.items()} for row in rows
    ]
    fixed = ("format", "version", "page", "subject", "rater", "shown", "of")
    head: dict[str, Any] = {key: cells[0][key] for key in fixed}
    if any({key: cell[key] for key in fixed} != head for cell in cells):
        raise ValueError("rows of several exports; give them one by one")
    ratings = [
        {
            "sample_id": cell["sample_id"],
            "turn": int(cell["turn"]),
            "rating": cell["rating"],
            "task": cell["task"],
            "iou": float(cell["iou"]) if cell["iou"] else None,
            "right": {"true": True, "false": False, "": None}[cell["right"].lower()],
        }
        for cell in cells
    ]
    return {**head, "version": int(head["version"]), "shown": int(head["shown"]), "of": int(head["of"]), "ratings": ratings}


def _facts_of(folder: Path, rated: dict[Name, _Rated], export: _Export) -> dict[Name, _Rated]:
    """IoU and verdict from an evaluation's own answers."""
    from boxcar.tools.pages.view_items import load_answers, load_results  # noqa: PLC0415  (brings torch)
    from boxcar.train.scoring.verdict import verdicts  # noqa: PLC0415

    results = load_results(folder)
    if results["fingerprint"] != export.page:
        raise ConfigError(
            str(folder),
            found=f"another evaluation ({results['fingerprint'][:12]})",
            expected=f"the one whose page was rated ({export.page[:12]})",
        )
    table = load_answers(folder, export.subject)
    judged = verdicts(table)
    places = {name: row for row, name in enumerate(zip(table["sample_id"].to_pylist(), table["turn"].to_pylist(), strict=True))}
    facts = {}
    for name, one in rated.items():
        if name not in places:
            where = f"{folder}, {name[0]}, turn {name[1]}"
            raise ConfigError(where, found="no answer to a question that was rated", expected="the answers that were rated")
        place = places[name]
        iou, right = float(judged.iou[place]), int(judged.right[place])
        facts[name] = msgspec.structs.replace(one, iou=None if math.isnan(iou) else iou, right=None if right < 0 else bool(right))
    return facts


# ---- figures


def figures_of(ratings: Ratings) -> dict[str, Any]:
    """Everything, ready for JSON. Rates are shares in [0, 1] with the ends of their 95 % intervals."""
    merged = _merged(ratings.by_rater)
    by_task: dict[str, Counter[str]] = {}
    for name, answer in merged.items():
        by_task.setdefault(ratings.facts[name].task, Counter())[answer] += 1
    return {
        "page": ratings.page,
        "subject": ratings.subject,
        "num_questions": len(merged),
        "page_shows": ratings.shown,
        "page_is_of": ratings.of,
        "raters": {rater: _rates(Counter(answers.values())) for rater, answers in ratings.by_rater.items()},
        "all": _rates(Counter(merged.values())),
        "by_task": {task: _rates(counts) for task, counts in sorted(by_task.items())},
        "kappa": _kappas(ratings.by_rater),
        "human_and_iou": _human_and_iou(merged, ratings.facts),
    }


def _merged(by_rater: Mapping[str, Mapping[Name, str]]) -> dict[Name, str]:
    """What more than half of a question's raters said, or DISPUTED."""
    said: dict[Name, list[str]] = {}
    for answers in by_rater.values():
        for name, answer in answers.items():
            said.setdefault(name, []).append(answer)
    merged = {}
    for name, answers_of_one in said.items():
        answer, count = Counter(answers_of_one).most_common(1)[0]
        merged[name] = answer if 2 * count > len(answers_of_one) else DISPUTED
    return merged


def _rates(counts: Counter[str]) -> dict[str, Any]:
    num = counts.total()
    rates: dict[str, Any] = {"num": num}
    for answer in (*RATINGS, *([DISPUTED] if counts[DISPUTED] else [])):
        low, high = wilson_interval(counts[answer], num)
        rates[answer] = {"count": counts[answer], "rate": counts[answer] / num, "low": low, "high": high}
    return rates


def _kappas(by_rater: Mapping[str, Mapping[Name, str]]) -> list[dict[str, Any]]:
    found = []
    for first, second in combinations(by_rater, 2):
        both = [name for name in by_rater[first] if name in by_rater[second]]
        entry: dict[str, Any] = {"raters": [first, second], "num": len(both), "kappa": None, "observed": None}
        if both:
            kappa = cohen_kappa([by_rater[first][name] for name in both], [by_rater[second][name] for name in both])
            entry |= {"kappa": kappa.kappa, "observed": kappa.observed}
        found.append(entry)
    return found


def _human_and_iou(merged: Mapping[Name, str], facts: Mapping[Name, _Rated]) -> dict[str, Any]:
    """People's right against the metric's; disputed questions, and those that no metric judges, are left out."""
    judged = [(answer, facts[name]) for name, answer in merged.items() if answer != DISPUTED and facts[name].right is not None]
    table = {
        answer: {
            "metric_right": sum(bool(fact.right) for given, fact in judged if given == answer),
            "metric_wrong": sum(not fact.right for given, fact in judged if given == answer),
            "mean_iou": _mean([fact.iou for given, fact in judged if given == answer and fact.iou is not None]),
        }
        for answer in RATINGS
    }
    figures: dict[str, Any] = {"num": len(judged), "table": table, "agreement": None, "kappa": None, "point_biserial": None}
    if judged:
        people, metric = [given == "right" for given, _ in judged], [bool(fact.right) for _, fact in judged]
        agreed = sum(a == b for a, b in zip(people, metric, strict=True))
        low, high = wilson_interval(agreed, len(judged))
        figures["agreement"] = {"rate": agreed / len(judged), "low": low, "high": high}
        figures["kappa"] = cohen_kappa(people, metric).kappa
        with_iou = [(float(given == "right"), fact.iou) for given, fact in judged if fact.iou is not None]
        figures["point_biserial"] = _correlation(with_iou)
    return figures


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Pearson's; None where one of the two never varies."""
    if len(pairs) < 2:
        return None
    columns = np.array(pairs).T
    if (np.ptp(columns, axis=1) == 0).any():
        return None
    return float(np.corrcoef(columns)[0, 1])


# ---- for people


def _print(figures: dict[str, Any]) -> None:
    console = result_console(soft_wrap=True)
    answers = [*RATINGS, *([DISPUTED] if DISPUTED in figures["all"] else [])]
    table = Table("rated by", "questions", *[RATINGS.get(answer, answer) for answer in answers], title="Rates in percent, 95 % intervals")
    groups = [*figures["raters"].items(), ("all of them", figures["all"])]
    groups += [(f"  {task}", rates) for task, rates in figures["by_task"].items()] if len(figures["by_task"]) > 1 else []
    for who, rates in groups:
        table.add_row(Text(visible(who)), str(rates["num"]), *[_rate(rates.get(answer)) for answer in answers])
    console.print(table)
    for entry in figures["kappa"]:
        first, second = entry["raters"]
        if entry["num"]:
            kappa = "not defined (both gave one answer throughout)" if entry["kappa"] is None else f"{entry['kappa']:.2f}"
            told = f"Cohen's kappa {kappa}, same answer to {entry['observed']:.0%} of {entry['num']} questions"
        else:
            told = "no question that both rated"
        console.print(Text(visible(f"{first} and {second}: {told}")))
    _print_against_iou(console, figures["human_and_iou"])
    if figures["page_is_of"] > figures["page_shows"]:
        console.print(
            f"The page showed {figures['page_shows']:,} of {figures['page_is_of']:,} questions, evenly from its strata: "
            "these are rates of what was rated, not of the whole set."
        )


def _rate(entry: dict[str, Any] | None) -> str:
    return "" if entry is None else f"{100 * entry['rate']:.1f} [{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]"


def _print_against_iou(console: Console, against: dict[str, Any]) -> None:
    if not against["num"]:
        console.print("No question that IoU judges was rated.")
        return
    table = Table("people say", "metric: right", "metric: wrong", "mean IoU", title="People and IoU (right: every box at IoU >= 0.5)")
    for answer, row in against["table"].items():
        mean = "–" if row["mean_iou"] is None else f"{row['mean_iou']:.2f}"
        table.add_row(RATINGS[answer], str(row["metric_right"]), str(row["metric_wrong"]), mean)
    console.print(table)
    agreement = against["agreement"]
    facts = [f"Same verdict on {_rate(agreement)} % of {against['num']} questions"]
    facts += [] if against["kappa"] is None else [f"kappa {against['kappa']:.2f}"]
    facts += [] if against["point_biserial"] is None else [f"point-biserial correlation with IoU {against['point_biserial']:.2f}"]
    console.print("; ".join(facts) + ".")
