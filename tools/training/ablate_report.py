"""`boxcar ablate` for people: progress, a table of arms, what may be concluded and what not, JSON, and a picture."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from boxcar.schemas.errors import ConfigError
from boxcar.schemas.training import ScheduleKind
from boxcar.schemas.workflow import Workflow
from boxcar.tools.plain import visible
from boxcar.tools.progress import Progress
from boxcar.tools.tables import Table, result_console
from boxcar.tools.training.ablate import Ablation, Arm, ablate
from boxcar.tools.training.paired import LEVEL, MIN_PAIRS, Difference, difference, summary
from boxcar.tools.training.plan_report import GRID, INK, SOFT
from boxcar.tools.training.train import RunBar, run_progress
from boxcar.train.job import OnEvent, resolve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURES = (".png", ".pdf", ".svg")
UNEVEN_TOKENS = 0.01
_COLOURS = {"all": "#8e8e93", "uniform": "#22303c", "progressive": "#2f6db3", "random_paced": "#e8a33d", "anti": "#c9613f"}
_EXIT_INTERRUPTED = 130


def ablate_with_progress(
    workflow: Workflow,
    name: str,
    *,
    arms: Sequence[ScheduleKind],
    num_seeds: int,
    tokens: int | None,
    metric: str,
    mode: Literal["min", "max"] | None,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Run the arms, and say what came of it. Raises BoxcarError."""
    errors = Console(stderr=True)
    if plot is not None:
        _require_drawable(plot)
    config = resolve(workflow)
    try:
        with run_progress(errors) as progress:
            watch = _Watch(progress).run
            found = ablate(config, name, arms=arms, num_seeds=num_seeds, tokens=tokens, metric=metric, mode=mode, watch=watch)
    except KeyboardInterrupt:
        errors.print("Stopped. The same command goes on: finished runs are kept, the last one continues from its newest checkpoint.")
        sys.exit(_EXIT_INTERRUPTED)
    if plot is not None:
        draw(found, plot)
    if as_json:
        print(json.dumps(as_dict(found), indent=1))
    else:
        print_ablation(result_console(soft_wrap=True), found, plot)


def _require_drawable(plot: Path) -> None:
    """Before hours of training, not behind them."""
    if plot.suffix not in PICTURES or not plot.absolute().parent.is_dir():
        raise ConfigError(str(plot), found="no picture that can be written", expected=f"a {', '.join(PICTURES)} in a folder that exists")


class _Watch:
    """A bar over all runs, and below it one for the run in work."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._all = progress.add_task("counting tokens", total=None, detail="")
        self._described = False

    @contextmanager
    def run(self, what: str, number: int, total: int) -> Iterator[OnEvent]:
        self._progress.update(self._all, description="runs", total=total, completed=number, detail=what)
        bar = RunBar(self._progress, first=not self._described)
        self._described = True
        try:
            yield bar.see
        finally:
            bar.close()
        self._progress.update(self._all, completed=number + 1)


# ---- what may be said


def differences(found: Ablation) -> list[Difference]:
    """Each arm against the control; and `progressive` against `random_paced`, without which no gain is one of difficulty."""
    control = found.arm(found.control)
    pairs = [(arm, control) for arm in found.arms if arm is not control and not _one_and_the_same(arm, control)]
    kinds = {arm.kind for arm in found.arms}
    if {"progressive", "random_paced"} <= kinds and found.control != "random_paced":
        progressive, paced = found.arm("progressive"), found.arm("random_paced")
        if not _one_and_the_same(progressive, paced):
            pairs.append((progressive, paced))
    return [difference(first.kind, second.kind, first.values, second.values) for first, second in pairs]


def _one_and_the_same(arm: Arm, other: Arm) -> bool:
    return (arm.same_as or arm.kind) == (other.same_as or other.kind)


def verdict(found: Ablation) -> list[str]:
    """Sentences: what the table shows, and what it does not."""
    seeds = len(found.arms[0].runs)
    compared = differences(found)
    said = []
    if seeds < MIN_PAIRS:
        said.append(f"{seeds} {_plural(seeds, 'seed')}: the difference may be chance; take --seeds {MIN_PAIRS} or more.")
    else:
        said += _of_control(found, compared, seeds)
        said += _of_difficulty(found, compared)
        if len(compared) > 1:
            most = min(1.0, len(compared) * (1 - LEVEL))
            said.append(
                f"Each interval holds for {LEVEL:.0%} by itself: of tables with {len(compared)} comparisons, up to {most:.0%} show a "
                "difference that is none."
            )
    if found.contested < 1:
        said.append(f"{found.control} left turns out in {found.contested:.0%} of its samples; in the others no schedule has a choice.")
    uneven = _unevenness(found)
    if uneven > UNEVEN_TOKENS:
        said.append(f"Tokens differ by up to {uneven:.1%} between runs: samples are long against the budget, or some were left out.")
    if found.metric == "loss":
        said.append(
            "The loss is that of the held-out answers as they stand; how good boxes are that the model writes, --metric mean_iou says "
            "(with validation.generate)."
        )
    return said


def _of_control(found: Ablation, compared: Sequence[Difference], seeds: int) -> list[str]:
    against = [entry for entry in compared if entry.second == found.control]
    better = [entry for entry in against if _is_better(entry, found)]
    worse = [entry for entry in against if entry.told_apart and not _is_better(entry, found)]
    said = [f"{entry.first} is better than {found.control}: {_interval(entry)}." for entry in better]
    if not better:
        said.append(f"No arm is better than {found.control} beyond the spread of the {seeds} seeds.")
    return said + [f"{entry.first} is worse than {found.control}: {_interval(entry)}." for entry in worse]


def _of_difficulty(found: Ablation, compared: Sequence[Difference]) -> list[str]:
    by_pair = {(entry.first, entry.second): entry for entry in compared}
    gain = by_pair.get(("progressive", "uniform"))
    if gain is None or not _is_better(gain, found):
        return []
    against_paced = by_pair.get(("progressive", "random_paced"))
    if against_paced is None:
        return ["random_paced was not compared: whether difficulty or the pacing alone helped is open."]
    if _is_better(against_paced, found):
        return ["progressive is better than random_paced, too: on these data and at this budget, going from easy to hard helped."]
    return ["progressive is not better than random_paced, which paces by chance: that difficulty helped is not shown."]


def _is_better(entry: Difference, found: Ablation) -> bool:
    return entry.told_apart and (entry.mean < 0) == (found.mode == "min")


def _unevenness(found: Ablation) -> float:
    tokens = [run.tokens for arm in found.arms for run in arm.runs]
    return (max(tokens) - min(tokens)) / max(1, min(tokens))


def _interval(entry: Difference) -> str:
    return f"{entry.mean:+.4g} [{entry.low:+.4g}, {entry.high:+.4g}]" if entry.low is not None else f"{entry.mean:+.4g}"


def _plural(number: int, word: str) -> str:
    return word if number == 1 else f"{word}s"


def as_dict(found: Ablation) -> dict[str, Any]:
    """Everything that is shown, as plain data."""
    arms = []
    for arm in found.arms:
        arms.append({**asdict(arm), **asdict(summary(arm.values))})
    return {**asdict(found), "arms": arms, "differences": [asdict(entry) for entry in differences(found)], "verdict": verdict(found)}


# ---- for the terminal


def print_ablation(console: Console, found: Ablation, plot: Path | None = None) -> None:
    """The arms, their differences, and what may be concluded."""
    seeds = len(found.arms[0].runs)
    console.print(f"\n{found.tokens:,} tokens a run, {seeds} {_plural(seeds, 'seed')}, in {visible(found.folder)}", markup=False)
    table = _table("<arm", "epochs", "steps", "samples", "turns", "tokens", f"held-out {visible(found.metric)}", "sd")
    for arm in found.arms:
        of, first = summary(arm.values), arm.runs[0]
        same = f" (as {arm.same_as})" if arm.same_as else ""
        table.add_row(
            arm.kind + same,
            f"{first.epochs:.3g}",
            *(f"{number:,}" for number in (first.steps, first.samples, first.turns, first.tokens)),
            f"{of.mean:.4f}",
            "-" if of.sd is None else f"{of.sd:.4f}",
        )
    console.print(table)
    console.print()
    table = _table("<difference, seed by seed", "mean", f"<{LEVEL:.0%} interval", "<by seed")
    for entry in differences(found):
        shown = "-" if entry.low is None else f"{entry.low:+.4f} .. {entry.high:+.4f}"
        table.add_row(f"{entry.first} - {entry.second}", f"{entry.mean:+.4f}", shown, " ".join(f"{value:+.4f}" for value in entry.by_pair))
    console.print(table)
    console.print()
    for sentence in verdict(found):
        console.print(visible(sentence), markup=False)
    if plot is not None:
        console.print(visible(f"Look at {plot}."), markup=False)


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column.removeprefix("<"), justify="left" if column.startswith("<") else "right", no_wrap=number == 0)
    return table


# ---- the picture


def draw(found: Ablation, path: Path) -> None:
    """Two panels: the metric along the tokens, a line a seed; and each difference with its pairs and its interval."""
    import matplotlib as mpl  # noqa: PLC0415  only for --plot

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415
    from matplotlib.layout_engine import ConstrainedLayoutEngine  # noqa: PLC0415

    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 4.8), dpi=110, layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1))
    seeds = len(found.arms[0].runs)
    title = f"{found.workflow}: {found.tokens:,} tokens a run, {seeds} {_plural(seeds, 'seed')}"
    figure.suptitle(title, fontsize=12.5, fontweight="bold", color=INK, x=0.012, ha="left")
    _draw_values(left, found)
    _draw_differences(right, found)
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(str(path), found=f"{error}", expected="a picture that can be written") from error
    finally:
        plt.close(figure)


def _draw_values(axes: "Axes", found: Ablation) -> None:
    """Curves where there were several validations, else the ends alone, side by side."""
    shown = [arm for arm in found.arms if arm.same_as is None]
    curves = any(len(run.curve) > 1 for arm in shown for run in arm.runs)
    for place, arm in enumerate(shown):
        colour = _COLOURS[arm.kind]
        mean = summary(arm.values).mean
        if curves:
            for run in arm.runs:
                axes.plot(*zip(*run.curve, strict=True), color=colour, linewidth=1.2, alpha=0.7, marker="o", markersize=2.5)
            axes.plot([], [], color=colour, linewidth=2, label=f"{arm.kind}, at the end {mean:.4f}")
        else:
            axes.plot([place] * len(arm.values), arm.values, "o", color=colour, alpha=0.7)
            axes.plot([place - 0.25, place + 0.25], [mean, mean], color=colour, linewidth=2.5)
    if curves:
        axes.set_xlabel("tokens", color=SOFT)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.legend(frameon=False, fontsize=9, labelcolor=SOFT)
    else:
        axes.set_xticks(range(len(shown)), [arm.kind for arm in shown])
        axes.set_xlim(-0.6, len(shown) - 0.4)
    good = "low" if found.mode == "min" else "high"
    _panel(axes, f"validation/{found.metric} ({good} is good); a {'line' if curves else 'dot'} a seed")


def _draw_differences(axes: "Axes", found: Ablation) -> None:
    entries = differences(found)
    for place, entry in enumerate(reversed(entries)):
        colour = _COLOURS[entry.first]
        if entry.low is not None and entry.high is not None:
            axes.plot([entry.low, entry.high], [place, place], color=colour, linewidth=7, alpha=0.3, solid_capstyle="butt")
        axes.plot(entry.by_pair, [place] * len(entry.by_pair), "o", color=colour, markersize=4, alpha=0.8)
        axes.plot([entry.mean, entry.mean], [place - 0.22, place + 0.22], color=colour, linewidth=2.5)
    axes.axvline(0, color=INK, linewidth=1, linestyle=":")
    axes.set_yticks(range(len(entries)), [f"{entry.first} - {entry.second}" for entry in reversed(entries)])
    axes.set_ylim(-0.6, len(entries) - 0.4)
    band = f", {LEVEL:.0%} interval" if any(entry.low is not None for entry in entries) else ""
    axes.set_xlabel(f"difference of validation/{found.metric}", color=SOFT)
    _panel(axes, f"Seed by seed: dots, mean{band}")


def _panel(axes: "Axes", title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b8c2cc")
    axes.tick_params(colors=SOFT, labelsize=9)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
