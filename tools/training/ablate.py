"""`boxcar ablate`: what region sampling does on your data. The kinds of schedules as arms, at equal tokens, each with several seeds.

    config ──> tokens that every arm can offer ──> epochs of each (arm, seed) for that many ──> ordinary runs ──> held-out metric of each

A run is `boxcar train`'s own, in `<output>/ablate-<digest>/<arm>-seed<seed>`. One that is finished is read, one that was interrupted goes
on; more arms or seeds later only add runs.

Equal tokens: all tokens of the documents count, those of images and questions as well as labelled ones, and padding does not. That is what
a run costs. By labelled tokens alone images would be free, and an arm of many images with few turns each would get them for nothing.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

from boxcar.pipelines.cluster import connected
from boxcar.schemas.errors import ConfigError, TrainingError
from boxcar.schemas.training import ScheduleConfig, ScheduleKind, TrainConfig
from boxcar.tools.training.loss_plot import plot_losses
from boxcar.train.job import OnEvent, content_of, digest_of, train
from boxcar.train.planning.index import PlanIndex, load_manifest, read_index
from boxcar.train.planning.plan import EpochContent, plan_epoch
from boxcar.train.planning.run_length import contents_of_run, epochs_for_tokens
from boxcar.train.running.run_folder import METRICS, RUN, RunFolder, require_new_or_same
from boxcar.train.running.trackers import read_events, steps_of

ARMS: tuple[ScheduleKind, ...] = get_args(ScheduleKind)
CONTROL: ScheduleKind = "uniform"
"""As many turns of a sample as the other arms take, without a gate."""

SMALL_IS_GOOD = ("loss", "failed")
"""Metrics of the validation; of all others, a large one is good."""

Watch = Callable[[str, int, int], AbstractContextManager[OnEvent]]
"""(what is run, its number from 0, number of all) -> an ear for its events while it runs."""


@dataclass(frozen=True)
class Run:
    """One arm with one seed, trained to its end."""

    seed: int
    folder: str
    epochs: int | float
    steps: int
    samples: int
    turns: int
    tokens: int
    """Trained on; samples that were left out because of a bad image are not among them."""
    value: float
    """The metric at the end."""
    curve: tuple[tuple[int, float], ...]
    """(tokens, metric) of each validation."""


@dataclass(frozen=True)
class Arm:
    """All runs of one kind of schedule."""

    kind: ScheduleKind
    same_as: ScheduleKind | None
    """An earlier arm that chooses the very same turns here: its runs are this one's, too."""
    runs: tuple[Run, ...]
    """In the order of the seeds."""

    @property
    def values(self) -> list[float]:
        return [run.value for run in self.runs]


@dataclass(frozen=True)
class Ablation:
    """What was run and what came of it."""

    workflow: str
    folder: str
    metric: str
    mode: Literal["min", "max"]
    """Whether a small or a large metric is good."""
    tokens: int
    """Of each run, as nearly as whole samples allow."""
    contested: float
    """Share of the control's samples in which there were more turns than could be taken, so that a schedule had a choice."""
    control: ScheduleKind
    arms: tuple[Arm, ...]

    def arm(self, kind: ScheduleKind) -> Arm:
        return next(arm for arm in self.arms if arm.kind == kind)


@contextmanager
def unwatched(_what: str, _number: int, _total: int) -> Iterator[OnEvent]:
    """Nobody listens."""
    yield lambda _: None


def ablate(
    config: TrainConfig,
    workflow_name: str,
    *,
    arms: Sequence[ScheduleKind] = ARMS,
    num_seeds: int = 3,
    tokens: int | None = None,
    metric: str = "loss",
    mode: Literal["min", "max"] | None = None,
    watch: Watch = unwatched,
) -> Ablation:
    """Run what is not yet run, and read the metric of every run.

    config: as `train.job.resolve` gives it; its seed is the first one, and early stopping is switched off. tokens: of each run; None: the
    least that any kind of schedule offers over the config's epochs. metric: of train.validation, by name. mode: whether a small or a large
    one is good; None: by its name.

    Raises ConfigError where nothing is held out, or where the arms would be one and the same; BoxcarError as `train` does.
    """
    _require_sound(config, arms, metric)
    index = read_index(config.shards)
    config = _equal_for_all(config, index)
    _require_held_out(config, index)
    offered = {kind: _offered(index, with_kind(config, kind)) for kind in ARMS}
    same = _same_choices(arms, offered)
    control = CONTROL if CONTROL in arms else arms[0]
    budget = tokens or min(sum(content.tokens for content in contents) for contents in offered.values())
    folder = f"{config.output.rstrip('/')}/ablate-{_digest(config, index, budget)[:10]}"
    ran = [kind for kind in arms if kind not in same]
    runs: dict[ScheduleKind, list[Run]] = {kind: [] for kind in ran}
    with _one_cluster(config):
        # Seed by seed, so that what is there after an interruption can be compared.
        for number in range(num_seeds * len(ran)):
            kind, seed = ran[number % len(ran)], config.seed + number // len(ran)
            settings = _settings(config, index, kind, seed, budget, folder)
            if not _is_finished(settings, index):
                with watch(f"{kind}, seed {seed}", number, num_seeds * len(ran)) as on_event:
                    train(settings, workflow_name, resume=True, on_event=on_event)
            runs[kind].append(_read(settings, index, metric))
    return Ablation(
        workflow_name,
        folder,
        metric,
        mode or ("min" if metric.partition("/")[0] in SMALL_IS_GOOD else "max"),
        budget,
        _contested(offered[control]),
        control,
        tuple(Arm(kind, same.get(kind), tuple(runs[same.get(kind, kind)])) for kind in arms),
    )


# ---- what is run


def with_kind(config: TrainConfig, kind: ScheduleKind) -> TrainConfig:
    """The config with this kind of schedule, in every phase. `all` takes every turn that fits: limits are not for it."""

    def changed(schedule: ScheduleConfig) -> ScheduleConfig:
        limits = ("turns_per_sample", "turns_per_sample_end", "absent_share", "absent_share_end") if kind == "all" else ()
        return schedule.model_copy(update={"kind": kind} | dict.fromkeys(limits))

    phases = tuple(
        phase if phase.schedule is None else phase.model_copy(update={"schedule": changed(phase.schedule)}) for phase in config.phases
    )
    return config.model_copy(update={"schedule": changed(config.schedule), "phases": phases})


def _require_sound(config: TrainConfig, arms: Sequence[ScheduleKind], metric: str) -> None:
    if len(arms) < 2 or len(set(arms)) < len(arms):
        raise ConfigError("--arms", found=", ".join(arms) or "nothing", expected="two or more, each once")
    if config.max_steps is not None:
        raise ConfigError(
            "train.max_steps",
            found=f"{config.max_steps}",
            expected="nothing, for arms are compared at equal tokens and not at equal steps",
            fix="--tokens N shortens all arms alike; rates and ramps then end there.",
        )
    if config.validation is None:
        raise ConfigError(
            "train.validation",
            found="nothing",
            expected="shards that are not trained on: a training loss does not say what sampling is good for, least of all where the arms "
            "train on different turns",
            fix="Convert a held-out part of the annotations as a workflow of its own, and name it: validation.shards=[shards/NAME_val].",
        )
    if metric != "loss" and config.validation.generate is None:
        raise ConfigError(
            "--metric",
            found=repr(metric),
            expected="loss, for without validation.generate nothing else is measured",
            fix="validation.generate={} measures boxes that the model writes.",
        )


def _equal_for_all(config: TrainConfig, index: PlanIndex) -> TrainConfig:
    """What holds for every arm: one cutoff, and no early stop, which would end arms at different tokens."""
    assert config.validation is not None, "asked for before"
    validation = config.validation.model_copy(update={"early_stop": None})
    return config.model_copy(update={"cutoff_len": config.cutoff_len or index.cutoff_len, "validation": validation})


def _require_held_out(config: TrainConfig, index: PlanIndex) -> None:
    assert config.validation is not None, "asked for before"
    trained = {folder.manifest.manifest_xxh3_128: folder.path for folder in index.folders}
    for path in config.validation.shards:
        if (manifest := load_manifest(path).manifest_xxh3_128) in trained:
            raise ConfigError(
                "train.validation.shards",
                found=f"{path}, which is trained on ({trained[manifest]})",
                expected="shards that are not trained on",
                fix="Convert a held-out part of the annotations as a workflow of its own.",
            )


def _same_choices(arms: Sequence[ScheduleKind], offered: dict[ScheduleKind, list[EpochContent]]) -> dict[ScheduleKind, ScheduleKind]:
    """Arms that choose what an earlier one does, and which. Raises ConfigError where that is all of them."""
    first: dict[tuple[str, ...], ScheduleKind] = {}
    same: dict[ScheduleKind, ScheduleKind] = {}
    for kind in arms:
        chosen = tuple(content.digest for content in offered[kind])
        if chosen in first:
            same[kind] = first[chosen]
        first.setdefault(chosen, kind)
    if len(first) == 1:
        raise ConfigError(
            "train.schedule",
            found=f"{', '.join(arms)} that choose the very same turns",
            expected="schedules that have a choice",
            fix="Set schedule.turns_per_sample below the turns that samples have (`boxcar plan` counts them), gate_floor below 1 and no "
            "`cyclic`.",
        )
    return same


def _offered(index: PlanIndex, config: TrainConfig) -> list[EpochContent]:
    contents = contents_of_run(index, config)
    if not any(content.tokens for content in contents):
        plan_epoch(index, config, 0)  # says why there is nothing
    return contents


def _contested(contents: Sequence[EpochContent]) -> float:
    return sum(content.contested for content in contents) / max(1, sum(content.visits for content in contents))


def _digest(config: TrainConfig, index: PlanIndex, tokens: int) -> str:
    """Of what all arms and seeds share."""
    shared = with_kind(config, CONTROL).model_copy(update={"seed": 0, "epochs": 1})
    return digest_of({**content_of(shared, index), "tokens": tokens})


def _settings(config: TrainConfig, index: PlanIndex, kind: ScheduleKind, seed: int, tokens: int, folder: str) -> TrainConfig:
    """Of one run."""
    settings = with_kind(config, kind).model_copy(update={"seed": seed, "output": folder, "name": f"{kind}-seed{seed}"})
    return settings.model_copy(update={"epochs": epochs_for_tokens(index, settings, tokens)})


@contextmanager
def _one_cluster(config: TrainConfig) -> Iterator[None]:
    """Ray once for all runs: starting it takes seconds."""
    if config.placement.executor == "inline":
        yield
        return
    with connected():
        yield


# ---- what came of it


def _folder(settings: TrainConfig) -> RunFolder:
    return RunFolder(f"{settings.output}/{settings.name}")


def _events(settings: TrainConfig) -> list[dict[str, Any]]:
    return read_events(_folder(settings).read(METRICS) or b"")


def _is_finished(settings: TrainConfig, index: PlanIndex) -> bool:
    """Raises TrainingError where the folder is another run's."""
    folder = _folder(settings)
    if (made_of := folder.read(RUN)) is None:
        return False
    require_new_or_same(folder, content_of(settings, index), json.loads(made_of), resume=True)
    events = _events(settings)
    num_steps = [event["num_steps"] for event in events if event["event"] == "started"]
    return any(event["event"] == "finished" and event["step"] == num_steps[-1] for event in events)


def _read(settings: TrainConfig, index: PlanIndex, metric: str) -> Run:
    folder, steps = _folder(settings), steps_of(_events(settings))
    contents = contents_of_run(index, settings)
    if folder.local is not None:
        plot_losses(steps, folder.local / "loss.png", f"{folder.local.parent.name}/{folder.local.name}")
    name = f"validation/{metric}"
    curve = tuple((int(step["tokens"]), float(step[name])) for step in steps if name in step)
    if name not in steps[-1]:
        known = sorted(key.removeprefix("validation/") for key in steps[-1] if key.startswith("validation/"))
        raise ConfigError("--metric", found=repr(metric), expected=f"a metric of the validation: {', '.join(known)}")
    if not math.isfinite(curve[-1][1]):
        raise TrainingError(
            folder.uri,
            found=f"a {name} of {curve[-1][1]}",
            expected="a number",
            fix="Has the held-out slice a labelled token of weight above 0?",
        )
    return Run(
        seed=settings.seed,
        folder=folder.uri,
        epochs=settings.epochs,
        steps=steps[-1]["step"],
        samples=sum(content.documents for content in contents),
        turns=sum(content.turns for content in contents),
        tokens=steps[-1]["tokens"],
        value=curve[-1][1],
        curve=curve,
    )
