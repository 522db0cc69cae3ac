"""`boxcar plan`: the tables, the JSON and the picture of an epoch, and what is said where there can be none."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from boxcar.schemas.task import TASK_NAMES
from boxcar.schemas.training import PhaseConfig, PlanConfig, ScheduleConfig
from boxcar.tools.cli import main
from boxcar.tools.training.plan_report import curves, draw, notes
from boxcar.train.planning.plan import plan_epoch
from tests.small_index import R, T, drawn_rows, index_of
from tests.small_sets import demo_config, run


def invoke(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["plan", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def flow(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a workflow `small`, converted."""
    folder = tmp_path_factory.mktemp("plan")
    convert = demo_config(demo, folder / "shards")
    run(convert)
    path = folder / "flows.yaml"
    train = {"output": "runs", "global_batch": 2, "epochs": 2}
    path.write_text(yaml.safe_dump({"small": {"convert": convert.model_dump(mode="json"), "train": train}}))
    return path


def counts(flow: Path, *arguments: object) -> dict[str, Any]:
    result = invoke("small", "--file", flow, "--json", *arguments)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_the_plan_as_json_alone(flow: Path) -> None:
    found = counts(flow)
    assert (found["workflow"], found["epoch"], found["cutoff_len"]) == ("small", 0, 1024)
    assert (found["rows"], found["visits"], found["samples"]) == (12, 12, 12)
    assert found["turns"] == found["turns_offered"] == sum(task["turns"] for task in found["tasks"].values())
    assert found["steps"] == -(-found["packs"] // 2)
    assert 0.5 < found["fill"] <= 1
    assert found["tokens"] == found["sources"]["instances"]["tokens"]
    assert [phase["schedule"] for phase in found["phases"]] == ["progressive"]
    assert counts(flow) == found


def test_overrides_and_epochs_change_the_plan(flow: Path) -> None:
    plain = counts(flow)
    fewer = counts(flow, "schedule.turns_per_sample=2", "schedule.absent_share=0.5")
    assert fewer["turns"] < plain["turns"]
    assert fewer["turns_left_out"]["schedule"] == plain["turns"] - fewer["turns"]
    assert counts(flow, "cutoff_len=512")["cutoff_len"] == 512
    assert counts(flow, "--epoch", 1)["fingerprint"] != plain["fingerprint"]
    assert counts(flow, "packing=padded")["packs"] == 12


def test_the_tables_answer_what_an_epoch_will_be(flow: Path) -> None:
    result = invoke("small", "--file", flow, "schedule.turns_per_sample=1", "cutoff_len=300")
    assert result.exit_code == 0
    for word in ("Epoch 1 of 2", "steps", "fill", "imbalance", "Tasks", "detect", "Phases", "progressive", "Left out", "boxcar train"):
        assert word in result.stdout, word
    assert "not chosen this time" in result.stdout


def test_the_picture_is_drawn(flow: Path, tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    result = invoke("small", "--file", flow, "--plot", picture)
    assert result.exit_code == 0
    assert "plan.png" in result.stdout.replace("\n", "")
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert image.width > 1000
        pixels = np.asarray(image.convert("L"))
    for name, panel in {"fill": pixels[: len(pixels) // 2], "tasks": pixels[len(pixels) // 2 :]}.items():
        assert 0.02 < (panel < 200).mean() < 0.9, f"{name}: neither empty nor one block"


def test_the_picture_shows_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Titles, bars and areas, read from the figure itself."""
    kept: list[Figure] = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    index, config = index_of(drawn_rows(60)), PlanConfig(cutoff_len=400, global_batch=4)
    plan = plan_epoch(index, config, 0)
    draw(plan, index, config, tmp_path / "plan.png")
    panels = {axes.get_title(loc="left"): axes for axes in kept[0].axes}
    assert list(panels) == ["How full packs are", "What packs are filled with", "Which tasks come when", "How hard the chosen turns are"]
    bars = [bar.get_height() for bar in panels["How full packs are"].patches if isinstance(bar, Rectangle)]
    assert sum(bars) == pytest.approx(100), "percent of the packs"
    assert panels["What packs are filled with"].get_legend_handles_labels()[1] == ["visual", "text", "empty"]
    assert panels["Which tasks come when"].get_legend_handles_labels()[1] == [name for name in TASK_NAMES if name in plan.counts.tasks]
    assert all(axes.get_xlim() == (0, plan.num_steps) for axes in list(panels.values())[1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            ["cutoff_len=20"], "BudgetError: cutoff_len: found 20 tokens, and no sample that fits, expected at least", id="cutoff"
        ),
        pytest.param(["shards=[nowhere]"], "ShardError: nowhere/manifest.json: found no such file", id="no shards"),
        pytest.param(["--epoch", "5"], "ConfigError: epoch: found 5, expected 0..1", id="epoch"),
        pytest.param(["mixture.sources={coco: 2}"], "found the source 'coco', expected one of the shards' own: instances", id="source"),
        pytest.param(["schedule.turn_per_sample=3"], "small.train.schedule.turn_per_sample: unknown key", id="unknown key"),
        pytest.param(["schedule.kind=hard"], "small.train.schedule.kind: found 'hard'", id="unknown kind"),
        pytest.param(["--plot", "/nowhere/plan.png"], "ConfigError: /nowhere/plan.png: found", id="picture"),
        pytest.param(["--plot", "plan.nonsense"], "ConfigError: plan.nonsense: found", id="format of the picture"),
    ],
)
def test_mistakes_are_named(flow: Path, arguments: list[str], message: str) -> None:
    result = invoke("small", "--file", flow, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_workflow_without_a_train_section_says_so(tmp_path: Path) -> None:
    path = tmp_path / "flows.yaml"
    path.write_text("small: {description: nothing}")
    result = invoke("small", "--file", path)
    assert result.exit_code == 2
    assert "expected a section `train:`" in result.stderr


# ---- what is drawn and said


def test_curves_are_sums_over_the_packs() -> None:
    rows = drawn_rows(300)
    index = index_of(rows)
    plan = plan_epoch(index, PlanConfig(global_batch=2), 0, 600)
    found = curves(plan, index)
    assert len(found.steps) == min(120, plan.num_steps)
    assert found.tasks.sum() == plan.counts.turns
    assert {name: int(found.tasks[code].sum()) for code, name in enumerate(TASK_NAMES) if found.tasks[code].any()} == {
        name: task.turns for name, task in plan.counts.tasks.items()
    }
    mean = (found.difficulty * found.tasks.sum(axis=0)).sum() / found.tasks.sum()
    chosen = [
        rows[document["row"]].turns[turn].difficulty
        for pack in plan.packs["documents"].to_pylist()
        for document in pack
        for turn in document["turns"]
    ]
    assert mean == pytest.approx(np.mean(chosen), abs=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(PlanConfig(global_batch=64), id="one step that is not whole"),
        pytest.param(PlanConfig(packing="padded"), id="padded"),
        pytest.param(PlanConfig(phases=(PhaseConfig(until=0.5, schedule=ScheduleConfig(kind="all")), PhaseConfig(until=1.0))), id="phases"),
    ],
)
def test_every_kind_of_plan_can_be_drawn(settings: PlanConfig, tmp_path: Path) -> None:
    index = index_of(drawn_rows(60))
    draw(plan_epoch(index, settings, 0, 600), index, settings, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("rows", "settings", "expected"),
    [
        pytest.param([R(f"s/{n}", (T(),), 105) for n in range(4000)], {}, ["the schedule chooses nothing"], id="nothing to choose"),
        pytest.param(
            [R(f"s/{n}", (T(),) * 4, 82) for n in range(400)],
            {"schedule": {"turns_per_sample": 2}, "global_batch": 2},
            [],
            id="all is well",
        ),
        pytest.param([R(f"s/{n}", (T(),), 500) for n in range(400)], {"schedule": {"kind": "all"}}, ["not well filled"], id="long samples"),
        pytest.param(
            [R("a", (T(),)), R("b", (T(),), 5000)],
            {"schedule": {"kind": "all"}},
            ["samples over the cutoff", "1 steps an epoch are few"],
            id="over the cutoff",
        ),
    ],
)
def test_notes_say_what_to_look_at(rows: list[R], settings: dict[str, Any], expected: list[str]) -> None:
    config = PlanConfig.model_validate(settings)
    found = notes(plan_epoch(index_of(rows), config, 0, 1000), config)
    assert len(found) == len(expected), found
    for note, words in zip(found, expected, strict=True):
        assert words in note
