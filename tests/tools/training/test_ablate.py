"""`boxcar ablate` on drawn scenes: equal tokens, seeds, runs that are kept, what is refused, and what is said of the numbers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from boxcar.schemas.errors import ConfigError, TrainingError
from boxcar.schemas.training import ScheduleKind, TrainConfig
from boxcar.tools.cli import main
from boxcar.tools.commands.training import ARMS as NAMED
from boxcar.tools.training import ablate as ablation
from boxcar.tools.training.ablate import ARMS, Ablation, Arm, Run, ablate, with_kind
from boxcar.tools.training.ablate_report import as_dict, differences, draw, verdict
from boxcar.train.job import train
from boxcar.train.running.run_folder import METRICS
from boxcar.train.running.trackers import read_events
from tests.small_sets import config as converted
from tests.small_sets import copy_demo, run

ONLY: tuple[ScheduleKind, ...] = ("uniform", "progressive")


@pytest.fixture(scope="module")
def scenes(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with every third scene held out."""
    folder = copy_demo(demo, tmp_path_factory.mktemp("ablate") / "demo")
    for name, belongs in (("fit", lambda number: number % 3), ("held", lambda number: not number % 3)):
        for kind in ("instances", "captions"):
            content = json.loads((folder / f"{kind}.json").read_text())
            images = [image for number, image in enumerate(content["images"]) if belongs(number)]
            ids = {image["id"] for image in images}
            content |= {"images": images, "annotations": [entry for entry in content["annotations"] if entry["image_id"] in ids]}
            (folder / f"{kind}_{name}.json").write_text(json.dumps(content))
        others = {"captions": str(folder / f"captions_{name}.json"), "images": str(folder / "images"), "records_per_shard": 16}
        run(converted(folder / f"instances_{name}.json", folder / name, folder / "tokenizer", **others))
    return folder


def settings(scenes: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return {
        "shards": [str(scenes / "fit")],
        "base": str(scenes / "base-qwen2_5_vl"),
        "init": "random",
        "output": str(output),
        "precision": "fp32",
        "global_batch": 1,
        "epochs": 2,
        "schedule": {"turns_per_sample": 1},
        "learning_rate": {"language": 5e-3},
        "checkpoint_every_steps": 2,
        "gradient_checkpointing": False,
        "loader_workers": 0,
        "trackers": [],
        "placement": {"executor": "inline", "use_gpu": False},
        "validation": {"shards": [str(scenes / "held")], "every_steps": 3, "max_packs": 2, "early_stop": {"patience": 1}},
        **changes,
    }


def config(scenes: Path, output: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate(settings(scenes, output, **changes))


def events_of(entry: Run) -> list[dict[str, Any]]:
    return read_events((Path(entry.folder) / METRICS).read_bytes())


@pytest.fixture(scope="module")
def small(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Ablation:
    """Three arms, one seed."""
    return ablate(config(scenes, tmp_path_factory.mktemp("runs")), "demo", arms=("all", *ONLY), num_seeds=1)


# ---- runs


def test_every_run_trains_on_the_same_tokens_to_the_end_of_its_rates(small: Ablation) -> None:
    for arm in small.arms:
        (entry,) = arm.runs
        steps = [event for event in events_of(entry) if event["event"] == "step"]
        assert entry.tokens == steps[-1]["tokens"] == sum(step["step_tokens"] for step in steps)
        assert abs(entry.tokens - small.tokens) <= max(step["step_tokens"] for step in steps)
        assert len(steps) == entry.steps > 3
        assert steps[-1]["learning_rate/language"] < 0.4 * steps[0]["learning_rate/language"], "not broken off: the cosine has come down"
    by_kind = {arm.kind: arm.runs[0] for arm in small.arms}
    assert by_kind["all"].samples < by_kind["uniform"].samples, "more turns of an image, so fewer images"
    assert by_kind["all"].turns > by_kind["uniform"].turns


def test_the_value_is_the_held_out_loss_at_the_end(small: Ablation) -> None:
    for arm in small.arms:
        (entry,) = arm.runs
        last = [event for event in events_of(entry) if event["event"] == "step"][-1]
        assert entry.value == last["validation/loss"] == entry.curve[-1][1]
        assert entry.value != last["loss"]
        assert [tokens for tokens, _ in entry.curve] == sorted(tokens for tokens, _ in entry.curve)
        assert len(entry.curve) > 1
        assert (Path(entry.folder) / "loss.png").exists()


def test_early_stopping_is_off(small: Ablation) -> None:
    assert not [event for arm in small.arms for entry in arm.runs for event in events_of(entry) if event["event"] == "early_stop"]


def test_a_second_call_adds_seeds_and_runs_nothing_again(scenes: Path, small: Ablation, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        started.append(arguments[0].name)
        return train(*arguments, **options)

    monkeypatch.setattr(ablation, "train", counted)
    output = Path(small.folder).parent
    again = ablate(config(scenes, output), "demo", arms=("all", *ONLY), num_seeds=1)
    assert started == []
    assert again == small
    more = ablate(config(scenes, output, checkpoint_every_steps=50), "demo", arms=ONLY, num_seeds=2)
    assert started == ["uniform-seed1", "progressive-seed1"], "how often is saved does not change what is computed"
    assert more.folder == small.folder
    for kind in ONLY:
        first, second = more.arm(kind).runs
        assert first == small.arm(kind).runs[0]
        assert first.value != second.value
        assert (first.seed, second.seed) == (0, 1)


def test_an_interrupted_run_goes_on(scenes: Path, small: Ablation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(one: TrainConfig, *arguments: Any, **options: Any) -> None:
        train(one.model_copy(update={"max_steps": 2}), *arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(ablation, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ablate(config(scenes, tmp_path), "demo", arms=("all", *ONLY), num_seeds=1)
    monkeypatch.undo()
    found = ablate(config(scenes, tmp_path), "demo", arms=("all", *ONLY), num_seeds=1)
    assert [event["step"] for event in events_of(found.arms[0].runs[0]) if event["event"] == "resumed"][-1] == 2
    assert Path(found.folder).name == Path(small.folder).name
    assert [arm.values for arm in found.arms] == [arm.values for arm in small.arms]


def test_the_folder_is_another_where_anything_differs(scenes: Path, small: Ablation, monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):
        pass

    def refuse(one: TrainConfig, *_: Any, **__: Any) -> None:
        raise Asked(Path(one.output).name)

    monkeypatch.setattr(ablation, "train", refuse)
    output = Path(small.folder).parent
    names = set()
    for tokens in (900, 901):
        with pytest.raises(Asked) as caught:
            ablate(config(scenes, output), "demo", tokens=tokens)
        names.add(str(caught.value))
    with pytest.raises(Asked) as caught:
        ablate(config(scenes, output, learning_rate={"language": 1e-3}), "demo")
    names.add(str(caught.value))
    assert len(names | {Path(small.folder).name}) == 4


def test_an_arm_is_the_kind_in_every_phase(scenes: Path, tmp_path: Path) -> None:
    phases = [{"until": 0.5, "schedule": {"kind": "progressive", "turns_per_sample": 2, "absent_share": 0.1}}, {"until": 1.0}]
    made = config(scenes, tmp_path, phases=phases)
    for kind in ARMS:
        changed = with_kind(made, kind)
        schedules = [changed.schedule, changed.phases[0].schedule]
        assert [schedule.kind for schedule in schedules if schedule] == [kind, kind]
        assert changed.phases[1].schedule is None
        again = TrainConfig.model_validate(changed.model_dump(mode="json"))
        assert again == changed, "workers check it again"


def test_arms_that_choose_the_same_share_their_runs(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cyclic knows no gate: three of the arms are one."""
    trained = []

    def only_noted(one: TrainConfig, *_: Any, **__: Any) -> None:
        trained.append(one.name)

    monkeypatch.setattr(ablation, "train", only_noted)
    monkeypatch.setattr(ablation, "_read", lambda one, _index, _metric: replace(RUN, seed=one.seed, value=len(trained)))
    cyclic = config(scenes, tmp_path, schedule={"turns_per_sample": 1, "cyclic": True})
    found = ablate(cyclic, "demo", num_seeds=2)
    assert trained == ["all-seed0", "uniform-seed0", "all-seed1", "uniform-seed1"]
    assert [arm.same_as for arm in found.arms] == [None, None, "uniform", "uniform", "uniform"]
    assert found.arm("anti").runs == found.arm("uniform").runs
    assert [entry.first for entry in differences(found)] == ["all"]


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        pytest.param({"validation": None}, {}, r"train\.validation: found nothing, expected shards that are not trained on", id="none"),
        pytest.param({"max_steps": 3}, {}, r"train\.max_steps: found 3.*--tokens N shortens all arms alike", id="max_steps"),
        pytest.param({"schedule": {}}, {}, "uniform, progressive that choose the very same turns.*turns_per_sample", id="no choice"),
        pytest.param({}, {"metric": "mean_iou"}, r"--metric: found 'mean_iou', expected loss.*validation\.generate", id="not measured"),
        pytest.param({}, {"arms": ("uniform",)}, "--arms: found uniform, expected two or more", id="one arm"),
        pytest.param({}, {"arms": ("anti", "anti")}, "--arms: found anti, anti, expected two or more, each once", id="twice"),
    ],
)
def test_mistakes_are_named(scenes: Path, tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ablate(config(scenes, tmp_path, **changes), "demo", **{"arms": ONLY, **options})
    assert not list(tmp_path.iterdir())


def test_a_metric_that_the_validation_has_not(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which ones it has shows at the end of the first run."""
    generate = {"shards": [str(scenes / "held")], "max_packs": 1, "generate": {"max_samples": 1, "max_new_tokens": 1}}
    with pytest.raises(ConfigError, match=r"--metric: found 'mean_iuo', expected a metric of the validation: .*loss, mean_iou"):
        ablate(config(scenes, tmp_path, validation=generate), "demo", arms=ONLY, tokens=400, metric="mean_iuo")
    found = ablate(config(scenes, tmp_path, validation=generate), "demo", arms=ONLY, num_seeds=1, tokens=400, metric="mean_iou")
    assert (found.metric, found.mode) == ("mean_iou", "max")
    assert all(0 <= value <= 1 for arm in found.arms for value in arm.values)


def test_shards_that_are_trained_on_are_not_held_out(scenes: Path, tmp_path: Path) -> None:
    same = config(scenes, tmp_path, validation={"shards": [str(scenes / "fit")]})
    with pytest.raises(ConfigError, match="fit, which is trained on"):
        ablate(same, "demo", arms=ONLY)


def test_the_folder_of_another_run_is_refused(scenes: Path, small: Ablation) -> None:
    path = Path(small.arms[1].runs[0].folder) / "run.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"weight_decay": 0.5}))
    try:
        with pytest.raises(TrainingError, match=r"weight_decay: 0\.5 there, 0\.0 here"):
            ablate(config(scenes, Path(small.folder).parent), "demo", arms=ONLY, num_seeds=1)
    finally:
        path.write_text(before)


# ---- what is said

RUN = Run(seed=0, folder="f", epochs=1, steps=9, samples=90, turns=180, tokens=10_000, value=0.0, curve=((10_000, 0.0),))


def made_up(values: dict[ScheduleKind, list[float]], *, control: ScheduleKind = "uniform", mode: Any = "min") -> Ablation:
    arms = tuple(
        Arm(kind, None, tuple(replace(RUN, seed=seed, value=value, curve=((10_000, value),)) for seed, value in enumerate(of)))
        for kind, of in values.items()
    )
    return Ablation("demo", "runs/ablate-00", "loss", mode, 10_000, 1.0, control, arms)


UNIFORM = [1.00, 1.10, 1.20]
LOWER = [0.90, 1.01, 1.09]
SAME = [1.05, 1.06, 1.20]
VERDICTS = [
    pytest.param({"uniform": UNIFORM, "progressive": SAME}, ["No arm is better than uniform beyond the spread of the 3 seeds."], id="no"),
    pytest.param(
        {"uniform": UNIFORM, "progressive": LOWER, "random_paced": LOWER},
        ["progressive is better than uniform: -0.1 [", "random_paced is better than uniform: ", "that difficulty helped is not shown"],
        id="pacing, not difficulty",
    ),
    pytest.param(
        {"uniform": UNIFORM, "progressive": LOWER, "random_paced": UNIFORM},
        ["progressive is better than uniform: ", "going from easy to hard helped"],
        id="difficulty",
    ),
    pytest.param(
        {"uniform": UNIFORM, "progressive": LOWER},
        ["progressive is better than uniform: ", "random_paced was not compared"],
        id="no control of the pacing",
    ),
    pytest.param(
        {"uniform": LOWER, "anti": UNIFORM}, ["No arm is better than uniform", "anti is worse than uniform: +0.1 ["], id="a worse arm"
    ),
    pytest.param({"uniform": [1.0], "anti": [0.1]}, ["1 seed: the difference may be chance; take --seeds 3 or more."], id="one seed"),
    pytest.param({"uniform": [1.0, 1.1], "anti": [0.1, 0.2]}, ["2 seeds: the difference may be chance"], id="two seeds"),
]


@pytest.mark.parametrize(("values", "expected"), VERDICTS)
def test_what_is_concluded(values: dict[ScheduleKind, list[float]], expected: list[str]) -> None:
    said = " ".join(verdict(made_up(values)))
    for words in expected:
        assert words in said
    for claim in ("going from easy to hard helped", " is better than uniform: "):
        assert (claim in said) == any(claim in words for words in expected)


def test_a_metric_that_should_be_high() -> None:
    said = verdict(made_up({"uniform": LOWER, "anti": UNIFORM}, mode="max"))
    assert said[0].startswith("anti is better than uniform: +0.1 [")


def test_comparisons_are_counted_and_uneven_tokens_named() -> None:
    found = made_up({"uniform": UNIFORM, "progressive": LOWER, "random_paced": SAME})
    assert any("with 3 comparisons, up to 15% show a difference that is none" in words for words in verdict(found))
    assert [(entry.first, entry.second) for entry in differences(found)] == [
        ("progressive", "uniform"),
        ("random_paced", "uniform"),
        ("progressive", "random_paced"),
    ]
    arm = found.arms[0]
    uneven = replace(found, contested=0.25, arms=(replace(arm, runs=(replace(arm.runs[0], tokens=9_000), *arm.runs[1:])), *found.arms[1:]))
    said = " ".join(verdict(uneven))
    assert "Tokens differ by up to 11.1% between runs" in said
    assert "uniform left turns out in 25% of its samples" in said


@pytest.mark.parametrize("num_validations", [1, 4])
def test_the_picture(tmp_path: Path, num_validations: int) -> None:
    found = made_up({"all": SAME, "uniform": UNIFORM, "progressive": LOWER, "random_paced": SAME, "anti": UNIFORM})
    curve = tuple((1000 * number, 3.0 / number) for number in range(1, num_validations + 1))
    arms = tuple(replace(arm, runs=tuple(replace(entry, curve=curve) for entry in arm.runs)) for arm in found.arms)
    draw(replace(found, arms=arms), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > 1000
        colours = image.convert("RGB").resize((200, 100)).getcolors(30_000)
    assert colours is not None
    assert len(colours) > 30, "not empty"


# ---- on the command line


def invoke(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["ablate", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def flow(scenes: Path, small: Ablation, tmp_path: Path) -> Path:
    """A file of the workflow whose runs `small` has made."""
    path = tmp_path / "flows.yaml"
    path.write_text(yaml.safe_dump({"demo": {"train": settings(scenes, Path(small.folder).parent)}}))
    return path


def test_the_table(flow: Path, tmp_path: Path) -> None:
    done = invoke("demo", "--file", flow, "--seeds", 1, "--arms", "uniform,progressive", "--plot", tmp_path / "a.png")
    assert done.exit_code == 0, done.output
    for words in ("tokens a run, 1 seed, in ", "held-out loss", "progressive - uniform", "the difference may be chance", "a.png"):
        assert words in done.stdout, words
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_json_alone_stands_on_standard_output(flow: Path, small: Ablation) -> None:
    done = invoke("demo", "--file", flow, "--seeds", 1, "--arms", "all,uniform,progressive", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found == json.loads(json.dumps(as_dict(small)))
    assert [arm["kind"] for arm in found["arms"]] == ["all", "uniform", "progressive"]
    assert found["arms"][0]["mean"] == small.arms[0].runs[0].value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--arms", "uniform,hard"], "'hard' is none of all, uniform, progressive, random_paced, anti", id="unknown arm"),
        pytest.param(["--seeds", "0"], "x>=1", id="no seed"),
        pytest.param(["--plot", "/nowhere/a.png"], "ConfigError: /nowhere/a.png: found no picture that can be written", id="picture"),
        pytest.param(
            ["--seeds", "1", "--metric", "box_f1"], "--metric: found 'box_f1', expected loss, for without validation.generate", id="metric"
        ),
        pytest.param(["validation=null"], "ConfigError: train.validation: found nothing", id="nothing held out"),
    ],
)
def test_mistakes_on_the_command_line(flow: Path, arguments: list[str], message: str) -> None:
    done = invoke("demo", "--file", flow, *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.output


def test_the_command_line_names_all_kinds() -> None:
    assert NAMED == ARMS
