"""`boxcar plan`: what an epoch will be, as tables, as JSON, and as a picture."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from boxcar.schemas.errors import ConfigError
from boxcar.schemas.task import TASK_NAMES
from boxcar.schemas.training import PlanConfig
from boxcar.schemas.workflow import Workflow
from boxcar.tools.plain import visible
from boxcar.tools.tables import Table, result_console
from boxcar.train.planning.index import QUANTILES, PlanIndex, read_index
from boxcar.train.planning.plan import plan_epoch, stages_of
from boxcar.train.planning.plan_table import Plan
from boxcar.train.planning.sampling import competence, gates

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REASONS = {
    "over_cutoff": "longer than cutoff_len",
    "task_share": "by the share of its task",
    "schedule": "not chosen this time",
    "source_weight": "by the weight of its source",
}
_MAX_BINS = 120
_PACKS_AT_ONCE = 1 << 16
_LOW_FILL, _HIGH_IMBALANCE = 0.97, 0.02


def report(workflow: Workflow, name: str, epoch: int, *, as_json: bool, plot: Path | None) -> None:
    """Plan an epoch of a workflow and say what it is. Raises BoxcarError."""
    config = with_shards(workflow)
    index = read_index(config.shards)
    plan = plan_epoch(index, config, epoch)
    if plot is not None:
        draw(plan, index, config, plot)
    if as_json:
        print(json.dumps(as_dict(plan, name), indent=1))
    else:
        print_plan(result_console(), plan, config, name, plot)


def with_shards(workflow: Workflow) -> PlanConfig:
    """The train section, planning what was converted where it names no shards itself."""
    assert workflow.train is not None, "the caller asked for this section"
    if workflow.train.shards:
        return workflow.train
    if workflow.convert is None:
        raise ConfigError("train.shards", found="nothing", expected="folders of shards, or a convert section with an `output`")
    return workflow.train.model_copy(update={"shards": (workflow.convert.output,)})


def as_dict(plan: Plan, name: str) -> dict[str, Any]:
    """Everything that the tables say, as plain data."""
    head = {"workflow": name, "epoch": plan.epoch, "seed": plan.seed, "cutoff_len": plan.cutoff_len, "fingerprint": plan.fingerprint}
    return {**head, **msgspec.to_builtins(plan.counts)}


# ---- for the terminal


def print_plan(console: Console, plan: Plan, config: PlanConfig, name: str, plot: Path | None = None) -> None:
    """Totals, tasks, sources, phases, what is left out, and what to do next."""
    console.print()
    console.print(_totals(plan, config))
    console.print(_tasks(plan))
    if len(plan.counts.sources) > 1:
        console.print(_sources(plan))
    console.print(_phases(plan, config))
    if plan.counts.rows_left_out or plan.counts.turns_left_out:
        console.print(_left_out(plan))
    for note in notes(plan, config):
        console.print(Text(visible(f"Note: {note}"), style="yellow"))
    console.print(Text("Next", style="bold"))
    if plot is not None:
        console.print(Text(f"  look at {plot}"))
    else:
        console.print(Text(f"  boxcar plan {name} --plot plan.png     the same as a picture"))
    console.print(Text(f"  boxcar train {name}                    train on it"))


def _table(title: str, *columns: str, header: bool = True) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=header, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        left = column.startswith("<") or not number
        table.add_column(column.removeprefix("<"), justify="left" if left else "right", overflow="fold")
    return table


def _totals(plan: Plan, config: PlanConfig) -> Table:
    counts = plan.counts
    table = _table(f"Epoch {plan.epoch + 1} of {config.epochs:g}", "", "", "<", header=False)
    last = f", the last one of {counts.last_step_packs}" if counts.last_step_packs else ""
    table.add_row("steps", f"{counts.steps:,}", f"of {config.global_batch} {_packs(config)}{last}, over all workers")
    table.add_row(_packs(config), f"{counts.packs:,}", f"of up to {plan.cutoff_len:,} tokens")
    table.add_row("samples", f"{counts.samples:,}", _per(counts.samples, counts.packs, "a pack"))
    if counts.documents != counts.samples:
        table.add_row("sequences", f"{counts.documents:,}", "one for each question")
    table.add_row("turns", f"{counts.turns:,}", f"{_per(counts.turns, counts.samples, 'a sample')}, of {counts.turns_offered:,}")
    visual = f"{counts.visual_tokens / counts.tokens:.0%} visual, {_per(counts.tokens, counts.steps, 'a step')}"
    table.add_row("tokens", f"{counts.tokens:,}", visual)
    full = "of what packs can hold" if config.packing == "packed" else "of the longest sample of each step"
    table.add_row("fill", f"{counts.fill:.2%}", full)
    if counts.imbalance is not None:
        of = f"mean over steps: dearest of {counts.imbalance_ranks} ranks above the mean cost"
        table.add_row("imbalance", f"{counts.imbalance:.2%}", of)
    return table


def _packs(config: PlanConfig) -> str:
    return "packs" if config.packing == "packed" else "rows of one sample"


def _per(many: int, few: int, what: str) -> str:
    value = many / max(few, 1)
    return f"{value:,.0f} {what}" if value >= 100 else f"{value:.1f} {what}"


def _tasks(plan: Plan) -> Table:
    table = _table("Tasks", "task", "samples", "turns", "share of turns")
    for name, task in sorted(plan.counts.tasks.items(), key=lambda item: -item[1].turns):
        table.add_row(name, f"{task.samples:,}", f"{task.turns:,}", f"{task.turns / plan.counts.turns:.1%}")
    return table


def _sources(plan: Plan) -> Table:
    table = _table("Sources", "source", "rows", "samples", "turns", "tokens", "share of tokens")
    for name, source in sorted(plan.counts.sources.items(), key=lambda item: -item[1].tokens):
        numbers = (source.rows, source.samples, source.turns, source.tokens)
        table.add_row(escape(visible(name)), *(f"{number:,}" for number in numbers), f"{source.tokens / plan.counts.tokens:.1%}")
    return table


def _phases(plan: Plan, config: PlanConfig) -> Table:
    table = _table("Phases", "phase", "of the run", "<schedule", "steps", "samples", "turns each", "opens")
    stages = stages_of(config)
    for phase in plan.counts.phases:
        stage = stages[phase.number]
        start, stop = max(stage.start, plan.epoch / config.epochs), min(stage.until, (plan.epoch + 1) / config.epochs)
        opened = "all"
        if gates(stage.schedule):
            first, last = competence(stage.schedule, np.array([start, stop]))
            opened = f"{first:.0%} to {last:.0%}"
        table.add_row(
            str(phase.number + 1),
            f"{start:.0%} to {stop:.0%}",
            phase.schedule + (", cyclic" if stage.schedule.cyclic else ""),
            f"{phase.steps:,}",
            f"{phase.documents:,}",
            f"{phase.turns / phase.documents:.1f}",
            opened,
        )
    return table


def _left_out(plan: Plan) -> Table:
    counts = plan.counts
    table = _table("Left out of this epoch", "<why", "samples", "turns", "<for example")
    for reason in [reason for reason in REASONS if reason in {*counts.rows_left_out, *counts.turns_left_out}]:
        rows, turns = counts.rows_left_out.get(reason), counts.turns_left_out.get(reason)
        example = escape(visible(rows.examples[0])) if rows and rows.examples else ""
        table.add_row(REASONS[reason], f"{rows.count:,}" if rows else "-", f"{turns:,}" if turns else "-", example)
    return table


def notes(plan: Plan, config: PlanConfig) -> list[str]:
    """What a person should know before booking a GPU for this."""
    counts, found = plan.counts, []
    if not counts.contested_samples and any(gates(stages_of(config)[phase.number].schedule) for phase in counts.phases):
        found.append("every turn of every sample fits, so the schedule chooses nothing; schedule.turns_per_sample gives it a choice.")
    if config.packing == "packed" and counts.packs * _LOW_FILL > -(-counts.tokens // plan.cutoff_len):
        found.append("packs are not well filled: samples are few, or long against cutoff_len; try a larger cutoff_len or pack_window.")
    if counts.imbalance is not None and counts.imbalance > _HIGH_IMBALANCE:
        found.append("ranks will wait for each other: steps mix expensive and cheap packs; a larger pack_window sorts them better.")
    if "over_cutoff" in counts.rows_left_out:
        found.append("samples over the cutoff are not trained on: raise cutoff_len, or convert with a smaller image_max_pixels.")
    if counts.steps < 10:
        found.append(f"{counts.steps} steps an epoch are few; a smaller global_batch makes more of them.")
    return found


# ---- the picture


@dataclass(frozen=True)
class Curves:
    """Columns over bins of steps."""

    steps: npt.NDArray[np.float64]
    """(B,) middle of each bin."""
    visual: npt.NDArray[np.float64]
    """(B,) mean visual tokens of a pack."""
    text: npt.NDArray[np.float64]
    tasks: npt.NDArray[np.float64]
    """(tasks, B) turns."""
    difficulty: npt.NDArray[np.float64]
    """(B,) mean quantile of the turns."""


def curves(plan: Plan, index: PlanIndex) -> Curves:
    """What is trained on along the epoch."""
    num_bins = min(_MAX_BINS, plan.num_steps)
    packs = plan.packs.select(["step", "documents", "num_tokens"])
    sums = np.zeros((4, num_bins))
    tasks = np.zeros(len(TASK_NAMES) * num_bins)
    for start in range(0, packs.num_rows, _PACKS_AT_ONCE):
        part = packs.slice(start, _PACKS_AT_ONCE)
        bins = part["step"].to_numpy().astype(np.int64) * num_bins // plan.num_steps
        rows, of_pack, turns, of_document = _turns_of(part)
        tokens, visual = part["num_tokens"].to_numpy(), index.visual_tokens[rows]
        document_bins = bins[of_pack]
        turn_bins = document_bins[of_document]
        places = index.turn_offsets[rows][of_document] + turns
        sums[0] += np.bincount(bins, minlength=num_bins)
        sums[1] += np.bincount(bins, tokens, num_bins)
        sums[2] += np.bincount(document_bins, visual, num_bins)
        sums[3] += np.bincount(turn_bins, index.turn_quantiles[places] / QUANTILES, num_bins)
        tasks += np.bincount(index.turn_tasks[places].astype(np.int64) * num_bins + turn_bins, minlength=len(tasks))
    by_task = tasks.reshape(len(TASK_NAMES), num_bins)
    middles = (np.arange(num_bins) + 0.5) * plan.num_steps / num_bins
    return Curves(middles, sums[2] / sums[0], (sums[1] - sums[2]) / sums[0], by_task, sums[3] / by_task.sum(axis=0))


def _turns_of(packs: Any) -> tuple[npt.NDArray[np.int64], ...]:
    """(rows of the documents, pack of each document, positions of the turns, document of each turn)."""
    lists = packs["documents"].combine_chunks()
    documents = lists.flatten()
    turns = documents.field("turns")
    num_documents, num_turns = np.diff(lists.offsets.to_numpy()), np.diff(turns.offsets.to_numpy())
    return (
        documents.field("row").to_numpy(),
        np.repeat(np.arange(len(num_documents)), num_documents),
        turns.flatten().to_numpy().astype(np.int64),
        np.repeat(np.arange(len(num_turns)), num_turns),
    )


INK, SOFT, GRID = "#22303c", "#6b7a88", "#e4e9ee"
VISUAL, TEXT, EMPTY = "#2f6db3", "#e8a33d", "#eef1f4"
TASK_COLOURS = ("#2f6db3", "#7fb2e5", "#e8a33d", "#c9613f", "#8e8e93", "#4f9d69", "#8a63b8")


def draw(plan: Plan, index: PlanIndex, config: PlanConfig, path: Path) -> None:
    """A PNG of four panels: fill of packs, tokens along the epoch, tasks along the epoch, difficulty against what is open."""
    import matplotlib  # noqa: PLC0415  only for --plot

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415
    from matplotlib.layout_engine import ConstrainedLayoutEngine  # noqa: PLC0415

    found = curves(plan, index)
    spacious = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15, wspace=0.04, hspace=0.04)
    figure, ((fill, tokens), (tasks, difficulty)) = pyplot.subplots(2, 2, figsize=(12.5, 8.5), dpi=110, layout=spacious)
    counts = plan.counts
    figure.suptitle(
        f"Epoch {plan.epoch + 1} of {config.epochs:g}:  {counts.steps:,} steps of {config.global_batch} {_packs(config)},  "
        f"{counts.samples:,} samples,  {counts.turns:,} turns,  {counts.tokens:,} tokens",
        fontsize=12.5,
        fontweight="bold",
        color=INK,
        x=0.012,
        ha="left",
    )

    _draw_fill(fill, plan)
    _draw_tokens(tokens, plan, found)
    _draw_tasks(tasks, found)
    _draw_difficulty(difficulty, plan, config, found)
    for axes in (tokens, tasks, difficulty):
        _mark_phases(axes, plan, named=axes is difficulty)
        axes.set_xlim(0, plan.num_steps)
        axes.set_xlabel("step", color=SOFT)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        expected = "the name of a picture, such as plan.png, in a folder that exists"
        raise ConfigError(str(path), found=f"{error}", expected=expected) from error
    finally:
        pyplot.close(figure)


def _panel(axes: "Axes", title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11.5, color=INK, pad=26)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b8c2cc")
    axes.tick_params(colors=SOFT, labelsize=9)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_fill(axes: "Axes", plan: Plan) -> None:
    fill = plan.packs["num_tokens"].to_numpy() / plan.cutoff_len
    low = float(np.quantile(fill, 0.001))
    lowest = 0.98 if low > 0.98 else 0.9 if low > 0.9 else 0.0
    axes.hist(np.maximum(fill, lowest), bins=50, range=(lowest, 1.0), weights=np.full(len(fill), 100 / len(fill)), color=VISUAL)
    axes.set_xlim(lowest, 1.0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.1%}" if lowest > 0.9 else f"{value:.0%}")
    axes.set_xlabel("tokens of a pack, of cutoff_len", color=SOFT)
    axes.set_ylabel("packs, %", color=SOFT)
    said = f"fill {plan.counts.fill:.2%}"
    if plan.counts.imbalance is not None:
        said += f"\nimbalance {plan.counts.imbalance:.2%} over {plan.counts.imbalance_ranks} ranks"
    # At the left: bars stand at the right.
    axes.text(0.04, 0.94, said, transform=axes.transAxes, va="top", color=INK, fontsize=10)
    _panel(axes, "How full packs are")


def _draw_tokens(axes: "Axes", plan: Plan, found: Curves) -> None:
    steps = _stretched(found.steps, plan.num_steps)
    visual, text = _padded(found.visual), _padded(found.text)
    room = np.maximum(plan.cutoff_len - visual - text, 0)
    axes.stackplot(steps, visual, text, room, colors=(VISUAL, TEXT, EMPTY), labels=("visual", "text", "empty"), linewidth=0)
    axes.set_ylim(0, plan.cutoff_len)
    axes.set_ylabel("tokens, mean of a pack", color=SOFT)
    _panel(axes, "What packs are filled with")
    _legend(axes)


def _draw_tasks(axes: "Axes", found: Curves) -> None:
    used = [code for code in range(len(TASK_NAMES)) if found.tasks[code].any()]
    shares = 100 * found.tasks[used] / found.tasks.sum(axis=0)
    steps = _stretched(found.steps, found.steps[-1] + found.steps[0])
    axes.stackplot(
        steps,
        *(_padded(share) for share in shares),
        colors=[TASK_COLOURS[code] for code in used],
        labels=[TASK_NAMES[code] for code in used],
        linewidth=0,
    )
    axes.set_ylim(0, 100)
    axes.set_ylabel("turns, %", color=SOFT)
    _panel(axes, "Which tasks come when")
    _legend(axes)


def _draw_difficulty(axes: "Axes", plan: Plan, config: PlanConfig, found: Curves) -> None:
    axes.plot(found.steps, found.difficulty, color=VISUAL, linewidth=2, label="mean of the chosen turns")
    axes.axhline(0.5, color=SOFT, linewidth=1, linestyle=":", label="of all turns")
    first_step, labelled = 0, False
    stages = stages_of(config)
    for phase in plan.counts.phases:
        stage = stages[phase.number]
        if gates(stage.schedule):
            start, stop = max(stage.start, plan.epoch / config.epochs), min(stage.until, (plan.epoch + 1) / config.epochs)
            progress = np.linspace(start, stop, 200)
            steps = np.linspace(first_step, first_step + phase.steps, 200)
            name = None if labelled else "open (competence)"
            axes.plot(steps, competence(stage.schedule, progress), color=TEXT, linewidth=2, linestyle="--", label=name)
            labelled = True
        first_step += phase.steps
    axes.set_ylim(0, 1.03)
    axes.set_ylabel("quantile of difficulty", color=SOFT)
    _panel(axes, "How hard the chosen turns are")
    _legend(axes)


def _legend(axes: "Axes") -> None:
    """In a line between title and panel, where it covers nothing."""
    legend = axes.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=len(TASK_NAMES),
        frameon=False,
        fontsize=9,
        labelcolor=SOFT,
        handlelength=1.2,
        handletextpad=0.5,
        columnspacing=1.2,
        borderaxespad=0.2,
        borderpad=0.1,
    )
    legend.set_in_layout(False)


def _mark_phases(axes: "Axes", plan: Plan, *, named: bool) -> None:
    border = 0
    for before, phase in pairwise(plan.counts.phases):
        border += before.steps
        axes.axvline(border, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        if named:
            label = f" phase {phase.number + 1}"
            axes.text(border, 0.02, label, transform=axes.get_xaxis_transform(), color=INK, fontsize=9, va="bottom")


def _stretched(steps: npt.NDArray[np.float64], num_steps: float) -> Sequence[float]:
    """Middles of bins, and both ends, so that areas reach from side to side."""
    return [0.0, *steps.tolist(), float(num_steps)]


def _padded(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.concatenate([values[:1], values, values[-1:]])
