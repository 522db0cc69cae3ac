"""`boxcar evaluate` for people: progress over the questions, then one table of arms, and where everything is."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from boxcar.schemas.errors import ConfigError
from boxcar.schemas.evaluation import EvaluateConfig
from boxcar.schemas.workflow import Workflow
from boxcar.tools.plain import visible
from boxcar.tools.progress import Progress
from boxcar.tools.tables import Table, result_console
from boxcar.train.job import complete_run, resolve
from boxcar.train.scoring.evaluate import compared, evaluate, finished


def adapter_of(workflow: Workflow, name: str) -> str:
    """The adapter that is measured: the section's, or that of the workflow's own finished run. Raises ConfigError where there is none."""
    config = workflow.evaluate
    assert config is not None, "the caller asked for this section"
    if config.adapter:
        return config.adapter
    state = None if workflow.train is None else complete_run(resolve(workflow), name)
    if state is None:
        raise ConfigError(
            "evaluate.adapter",
            found="nothing, and no finished run of this workflow's train section",
            expected="a run's folder",
            fix=f"`boxcar train {name}` first, or evaluate.adapter=runs/...",
        )
    folder: str = state["folder"]
    return folder


def measure(config: EvaluateConfig, adapter: str) -> tuple[dict[str, Any], bool]:
    """The results, and whether they were there already."""
    if (known := finished(config, adapter)) is not None:
        return known, True
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("opening the model", total=None)

        def see(event: dict[str, Any]) -> None:
            if event["event"] == "arm":
                progress.reset(bar, description=f"asking: {event['name']}", total=event["total"])
            elif event["event"] == "answer":
                progress.update(bar, completed=event["done"])

        return evaluate(config, adapter, see), False


def evaluate_with_progress(workflow: Workflow, name: str, *, as_json: bool) -> None:
    """Measure, and print."""
    config = workflow.evaluate
    assert config is not None, "the caller asked for this section"
    results, known = measure(config, adapter_of(workflow, name))
    if as_json:
        print(json.dumps(results, ensure_ascii=False))
        return
    console = result_console(soft_wrap=True)
    if known:
        console.print("Measured before: same adapter, shards and settings.")
    print_results(results, console)


def print_results(results: dict[str, Any], console: Console) -> None:
    """The arms side by side, and what to do next."""
    console.print(_table("held out", results["arms"]))
    if "forgetting" in results:
        console.print(_table("forgetting", results["forgetting"]["arms"]))
    console.print(Text(visible(f"In brackets: 95 % intervals over images. Leakage: {results['leakage']}.")))
    for name, figures in results["arms"].items():
        if figures["cut"]:
            console.print(Text(f"{name}: {figures['cut']:.1%} of the replies were cut at max_new_tokens."))
        if warning := figures.get("coco_ap", {}).get("warning"):
            console.print(Text(f"COCO AP, {name}: {warning}"))
    folder = results["folder"]
    console.print(Text(visible(f"{Path(folder) / 'results.md'} says more: by size, task, language, source. Next: boxcar view {folder}")))


def _table(title: str, arms: dict[str, Any]) -> Table:
    heads, rows = compared(arms)
    table = Table(title, *heads)
    for name, cells in rows:
        table.add_row(name, *cells)
    stats = {name: figures.get("coco_ap", {}).get("stats") for name, figures in arms.items()}
    if any(stats.values()):
        rule = next(figures["coco_ap"]["rule"] for name, figures in arms.items() if stats[name])
        for key in ("AP", "AP50"):
            values = [None if of_arm is None else of_arm[key] for of_arm in stats.values()]
            table.add_row(f"COCO {key} ({rule})", *["–" if value is None else f"{100 * value:.1f}" for value in values])
    return table
