"""The plan of an epoch: a table of packs in the order in which they are trained on. Pure: (index, settings, epoch) -> table.

    index ──> visits, shuffled (sampling) ──> turns of each (sampling) ──> packs, steps (packing) ──> Plan
                                              └── phase by phase ──────────────────────────┘

A rank takes its cut of each step. To resume at step k, or with another number of workers, is to go on in the same table: every document of
the epoch comes exactly once, and nothing is replayed.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from boxcar.pipelines.ragged import IntColumn, Ragged, concat
from boxcar.schemas.errors import BudgetError, ConfigError, ShardError
from boxcar.schemas.task import TASK_NAMES, TaskName
from boxcar.schemas.training import PlanConfig, ScheduleConfig
from boxcar.train.planning.index import PlanIndex
from boxcar.train.planning.packing import CostModel, Layout, lay_out
from boxcar.train.planning.plan_table import (
    DOCUMENT,
    PLAN_SCHEMA,
    PLAN_VERSION,
    LeftOut,
    PhaseCount,
    Plan,
    PlanCounts,
    SourceCount,
    TaskCount,
    bytes_of,
    fingerprint_of,
)
from boxcar.train.planning.sampling import (
    Chooser,
    Documents,
    Purpose,
    Tally,
    Visits,
    hash_chain,
    mix,
    moves,
    task_shares,
    visits_of_epoch,
)

IMBALANCE_RANKS = 8
"""Workers for which the imbalance of costs is stated, where global_batch can be divided among so many."""
RAMP_WINDOWS = 16
"""At least so many windows in a ramp, so that what changes along it also comes in that order ..."""
MIN_RAMP_WINDOW = 1024
"""... but none of less than so many documents, which would pack badly."""


@dataclass(frozen=True)
class Stage:
    """A phase with what it takes from the train section."""

    number: int
    start: float
    until: float
    """Shares of the run."""
    schedule: ScheduleConfig
    tasks: Mapping[TaskName, float]


def stages_of(config: PlanConfig) -> list[Stage]:
    """The phases; one that is the whole run where none are said."""
    tasks: Mapping[TaskName, float] = config.mixture.tasks
    if not config.phases:
        return [Stage(0, 0.0, 1.0, config.schedule, tasks)]
    starts = [0.0, *(phase.until for phase in config.phases)]
    return [
        Stage(
            number,
            starts[number],
            phase.until,
            phase.schedule or config.schedule,
            tasks if phase.tasks is None else phase.tasks,
        )
        for number, phase in enumerate(config.phases)
    ]


def plan_epoch(
    index: PlanIndex, config: PlanConfig, epoch: int, cutoff_len: int | None = None, cost_model: CostModel | None = None
) -> Plan:
    """The plan of one epoch. cutoff_len: tokens of a pack; None: the config's, or that of the shards.

    Raises BudgetError where no sample fits the cutoff, ConfigError where the settings leave nothing to train on.
    """
    here = _Epoch.of(index, config, epoch, cutoff_len)
    phases = []
    for chosen in here.documents(here.cursor()):
        if not len(chosen.documents.visits):
            _nothing_left(here, chosen)
        phases.append(_PlannedPhase.of(here, chosen, cost_model or CostModel()))
    if not phases:
        raise ConfigError("phases", found="phases that leave this epoch without a sample", expected="at least one")
    return _assemble(here, phases)


@dataclass(frozen=True)
class EpochContent:
    """What an epoch holds, counted without packs: much cheaper than its plan."""

    visits: int
    """Of rows in this epoch, up to the end of the run."""
    documents: int
    turns: int
    tokens: int
    """Of all documents, as `PlanCounts.tokens`: images, questions and answers."""
    contested: int
    """Visits whose turns did not all come: where the schedule chose."""
    digest: str
    """xxh3_128 of the chosen turns of every document, in order: equal where two schedules choose the same."""


def content_of_epoch(index: PlanIndex, config: PlanConfig, epoch: int, cutoff_len: int | None = None) -> EpochContent:
    """As `plan_epoch`, but an epoch that holds nothing is no mistake here. Raises ConfigError where the settings leave no visit."""
    here = _Epoch.of(index, config, epoch, cutoff_len)
    documents = turns = tokens = contested = 0
    digest = xxhash.xxh3_128()
    for chosen in here.documents(here.cursor()):
        made = chosen.documents
        documents += len(made.visits)
        turns += len(made.turns.values)
        tokens += int(made.tokens.sum(dtype=np.int64))
        contested += chosen.tally.contested
        for column in (here.visits.rows[made.visits], made.turns.lengths.astype(np.int64), made.turns.values):
            digest.update(bytes_of(column))
    return EpochContent(here.num_visits, documents, turns, tokens, contested, digest.hexdigest())


@dataclass(frozen=True)
class _Chosen:
    """The documents of a phase within an epoch."""

    stage: Stage
    documents: Documents
    """Their `visits` are rows of the epoch's visits."""
    tally: Tally


@dataclass(frozen=True)
class _Epoch:
    """One epoch of one run: what is planned."""

    index: PlanIndex
    config: PlanConfig
    number: int
    cutoff_len: int
    """Tokens of a pack."""
    visits: Visits
    progress: npt.NDArray[np.float64]
    """Of each visit, as a share of the run; 1 and above: behind its end."""

    @classmethod
    def of(cls, index: PlanIndex, config: PlanConfig, number: int, cutoff_len: int | None) -> "_Epoch":
        """Raises ConfigError or ShardError where there are no visits within the run."""
        visits, progress = _visits(index, config, number)
        return cls(index, config, number, cutoff_len or config.cutoff_len or index.cutoff_len, visits, progress)

    @property
    def num_visits(self) -> int:
        """Up to the end of the run."""
        return int(np.count_nonzero(self.progress < 1))

    def documents(self, cursor: npt.NDArray[np.int32] | None) -> Iterator[_Chosen]:
        """Documents of each phase that has visits in this epoch. cursor: where cyclic schedules go on; it is moved."""
        in_order = self.progress[self.visits.order]
        for stage in stages_of(self.config):
            # The last phase ends at 1, which no progress reaches.
            first, last = np.searchsorted(in_order, [stage.start, stage.until])
            if first == last:
                if stage.start * self.config.epochs >= self.number and stage.until * self.config.epochs <= self.number + 1:
                    _empty_phase(stage)
                continue
            here = np.sort(self.visits.order[first:last])
            shares, tally, made = task_shares(stage.tasks), Tally(), []
            for repeat in np.unique(self.visits.repeats[here]).tolist():
                again = here[self.visits.repeats[here] == repeat]
                chooser = Chooser(self.index, stage.schedule, shares, self.cutoff_len, self.config.seed, self.number, repeat, cursor)
                documents = chooser.choose(self.visits.rows[again], self.progress[again], tally)
                made.append(Documents(again[documents.visits], documents.turns, documents.tokens))
            yield _Chosen(stage, _joined(made), tally)

    def cursor(self) -> npt.NDArray[np.int32] | None:
        """Where cyclic schedules go on in this epoch: the epochs before it are gone through, so that the plan needs no state."""
        if not any(stage.schedule.cyclic for stage in stages_of(self.config)):
            return None
        cursor = np.zeros((self.index.num_rows, 2), np.int32)
        for number in range(self.number):
            visits = visits_of_epoch(self.index, self.config.mixture, self.config.seed, number)
            earlier = _Epoch(self.index, self.config, number, self.cutoff_len, visits, visits.progress(number, self.config.epochs))
            for _ in earlier.documents(cursor):
                pass
        return cursor


def _visits(index: PlanIndex, config: PlanConfig, epoch: int) -> tuple[Visits, npt.NDArray[np.float64]]:
    """The visits of an epoch and the progress of each. Raises ConfigError or ShardError where there are none within the run."""
    if not 0 <= epoch < config.num_epochs:
        raise ConfigError("epoch", found=str(epoch), expected=f"0..{config.num_epochs - 1} (`epochs` is {config.epochs:g})")
    if not index.num_rows:
        raise ShardError(", ".join(config.shards) or "shards", found="no rows", expected="shards with samples", fix="Convert again.")
    visits = visits_of_epoch(index, config.mixture, config.seed, epoch)
    if not len(visits.rows):
        raise ConfigError("mixture.sources", found="weights that leave no row", expected="a weight above 0")
    progress = visits.progress(epoch, config.epochs)
    if progress.min() >= 1:
        raise ConfigError(
            "epochs",
            found=f"{config.epochs}, a last part of an epoch without a sample",
            expected=f"a part that is a multiple of 1/{len(visits.rows)}, for so many samples an epoch",
        )
    return visits, progress


def _joined(parts: Sequence[Documents]) -> Documents:
    if len(parts) == 1:
        return parts[0]
    return Documents(
        np.concatenate([part.visits for part in parts]),
        concat([part.turns for part in parts]),
        np.concatenate([part.tokens for part in parts]),
    )


def _empty_phase(stage: Stage) -> None:
    raise ConfigError(
        f"phases[{stage.number}]",
        found=f"no sample between {stage.start:g} and {stage.until:g} of the run",
        expected="phases long enough for a sample each",
        fix="Move `until`, or train for more epochs.",
    )


def _nothing_left(epoch: _Epoch, chosen: _Chosen) -> None:
    tally = chosen.tally
    if tally.rows_over_cutoff and not tally.rows_not_in_share and not tally.rows_not_chosen:
        smallest, row = smallest_sample(epoch.index)
        raise BudgetError(
            "cutoff_len",
            found=f"{epoch.cutoff_len} tokens, and no sample that fits",
            expected=f"at least {smallest}, the smallest sample with one turn ({epoch.index.describe(row)})",
            fix="Raise cutoff_len, or convert with a smaller image_max_pixels.",
        )
    raise ConfigError(
        f"phase {chosen.stage.number}",
        found=f"no sample left: {tally.rows_over_cutoff:,} over the cutoff, {tally.rows_not_in_share:,} by the tasks' shares, "
        f"{tally.rows_not_chosen:,} by the share of absent turns",
        expected="at least one",
        fix="Look at `mixture.tasks` and at the phase's `tasks`.",
    )


def smallest_sample(index: PlanIndex) -> tuple[int, int]:
    """(tokens, row) of the shortest document: a row with its shortest turn, a dialogue with all."""
    firsts = index.turn_offsets[:-1]
    shortest = np.minimum.reduceat(index.turn_tokens, firsts).astype(np.int64)
    whole = np.add.reduceat(index.turn_tokens, firsts, dtype=np.int64) + (np.diff(index.turn_offsets) - 1) * index.turn_open_tokens
    tokens = index.base_tokens + np.where(index.ordered, whole, shortest)
    row = int(tokens.argmin())
    return int(tokens[row]), row


@dataclass(frozen=True)
class _PlannedPhase:
    """A phase of the epoch, planned. Columns over documents and packs stand in the order of training."""

    stage: Stage
    tally: Tally
    layout: Layout
    visits: IntColumn
    turns: Ragged[np.int16]
    doc_tokens: npt.NDArray[np.int32]
    num_patches: IntColumn
    """(P,)."""
    num_tokens: IntColumn
    costs: npt.NDArray[np.float64]

    @classmethod
    def of(cls, epoch: _Epoch, chosen: _Chosen, cost_model: CostModel) -> "_PlannedPhase":
        index, config, documents = epoch.index, epoch.config, chosen.documents
        progress = epoch.progress[documents.visits]
        shuffled = np.argsort(progress, kind="stable")
        rows = epoch.visits.rows[documents.visits]
        costs = cost_model.of_documents(documents.tokens, index.num_patches[rows], index.patches_squared[rows])
        stream = hash_chain(config.seed, Purpose.STEP_ORDER, epoch.number, chosen.stage.number)
        most_steps = len(shuffled) // config.global_batch + 1
        layout = lay_out(
            documents.tokens[shuffled],
            costs[shuffled],
            window_stops(progress[shuffled], chosen.stage.schedule, config),
            mix(stream ^ np.arange(most_steps, dtype=np.uint64)),
            capacity=epoch.cutoff_len,
            global_batch=config.global_batch,
            packed=config.packing == "packed",
        )
        order = shuffled[layout.documents]
        firsts = layout.pack_offsets[:-1]
        return cls(
            stage=chosen.stage,
            tally=chosen.tally,
            layout=layout,
            visits=documents.visits[order],
            turns=documents.turns.take(order),
            doc_tokens=documents.tokens[order],
            num_patches=np.add.reduceat(index.num_patches[rows[order]], firsts, dtype=np.int64),
            num_tokens=np.add.reduceat(documents.tokens[order], firsts, dtype=np.int64),
            costs=np.add.reduceat(costs[order], firsts),
        )

    @property
    def num_steps(self) -> int:
        return len(self.layout.step_offsets) - 1

    def table(self, visits: Visits, first_step: int) -> pa.Table:
        packs = self.layout
        if packs.pack_offsets[-1] >= 1 << 31 or self.turns.offsets[-1] >= 1 << 31:
            found = f"{self.turns.offsets[-1]:,} turns in a phase"
            raise BudgetError("the plan", found=found, expected="fewer than 2^31", fix="Plan fewer shards, or more phases.")
        fields = list(DOCUMENT)
        turns = pa.ListArray.from_arrays(pa.array(self.turns.offsets.astype(np.int32)), pa.array(self.turns.values), type=fields[1].type)
        documents = pa.StructArray.from_arrays([pa.array(visits.rows[self.visits]), turns], fields=fields)
        columns = [
            pa.array(np.repeat(np.arange(first_step, first_step + self.num_steps, dtype=np.int32), np.diff(packs.step_offsets))),
            pa.array(np.full(len(self.costs), self.stage.number, np.int16)),
            pa.ListArray.from_arrays(pa.array(packs.pack_offsets.astype(np.int32)), documents, type=PLAN_SCHEMA.field("documents").type),
            pa.array(self.num_tokens.astype(np.int32)),
            pa.array(self.num_patches.astype(np.int32)),
            pa.array(self.costs.astype(np.float32)),
        ]
        return pa.table(columns, schema=PLAN_SCHEMA)


def window_stops(progress: npt.NDArray[np.float64], schedule: ScheduleConfig, config: PlanConfig) -> list[int]:
    """Ascending stops of the windows among which packs are filled. progress: (D,) of each document, ascending.

    Within a window, steps are in any order. Along a ramp that would mix its end into its beginning, so windows are smaller there.
    """
    num_documents = len(progress)
    ramp_end = int(np.searchsorted(progress, schedule.ramp)) if moves(schedule) else 0
    stops: list[int] = []
    if ramp_end:
        per_run = ramp_end / max(min(schedule.ramp, float(progress[-1])) - float(progress[0]), 1e-12)
        size = min(config.pack_window, max(MIN_RAMP_WINDOW, int(per_run * schedule.ramp / RAMP_WINDOWS)))
        stops += range(size, ramp_end, size)
        stops.append(ramp_end)
    stops += range(ramp_end + config.pack_window, num_documents, config.pack_window)
    return stops if stops and stops[-1] == num_documents else [*stops, num_documents]


def _assemble(epoch: _Epoch, phases: Sequence[_PlannedPhase]) -> Plan:
    tables, first_step = [], 0
    for phase in phases:
        tables.append(phase.table(epoch.visits, first_step))
        first_step += phase.num_steps
    packs = pa.concat_tables(tables)
    settings = epoch.config.model_dump(mode="json", include=set(PlanConfig.model_fields))
    samples = xxhash.xxh3_128_hexdigest(bytes_of(epoch.index.sample_keys))
    fingerprint = fingerprint_of(packs, samples, epoch.cutoff_len)
    counts = _count(epoch, phases)
    metadata = {
        "boxcar.schema": "plan",
        "boxcar.version": str(PLAN_VERSION),
        "epoch": str(epoch.number),
        "seed": str(epoch.config.seed),
        "cutoff_len": str(epoch.cutoff_len),
        "settings": json.dumps(settings, sort_keys=True),
        "counts": msgspec.json.encode(counts, order="sorted").decode(),
        "samples": samples,
        "fingerprint": fingerprint,
    }
    return Plan(packs.replace_schema_metadata(metadata), counts, epoch.number, epoch.config.seed, epoch.cutoff_len, settings, fingerprint)


def _count(epoch: _Epoch, phases: Sequence[_PlannedPhase]) -> PlanCounts:
    index, visits, config = epoch.index, epoch.visits, epoch.config
    tally = Tally()
    for phase in phases:
        tally.add(phase.tally)
    sources = np.zeros((len(index.sources), 3), np.int64)
    seen = np.zeros(len(visits.rows), np.bool_)
    visual = capacity = 0
    for phase in phases:
        rows = visits.rows[phase.visits]
        codes = index.source_codes[rows]
        first = ~seen[phase.visits] if not index.one_question_per_image else np.unique(phase.visits, return_index=True)[1]
        seen[phase.visits] = True
        for column, weights in enumerate((None, phase.turns.lengths, phase.doc_tokens)):
            of = codes[first] if weights is None else codes
            sources[:, column] += np.bincount(of, weights, len(index.sources)).astype(np.int64)
        visual += int(index.visual_tokens[rows].sum(dtype=np.int64))
        capacity += _capacity(phase, epoch)
    tokens = sum(int(phase.num_tokens.sum()) for phase in phases)
    num_rows = np.bincount(index.source_codes, minlength=len(index.sources)).tolist()
    imbalance, ranks = _imbalance(phases, config.global_batch)
    smallest = min(int(np.diff(phase.layout.step_offsets)[-1]) for phase in phases)
    return PlanCounts(
        rows=index.num_rows,
        visits=epoch.num_visits,
        samples=int(np.count_nonzero(seen)),
        documents=sum(len(phase.visits) for phase in phases),
        turns=int(tally.turns.sum()),
        turns_offered=int(tally.turns.sum()) + tally.turns_over_cutoff + tally.turns_not_in_share + tally.turns_not_chosen,
        packs=sum(len(phase.costs) for phase in phases),
        steps=sum(phase.num_steps for phase in phases),
        tokens=tokens,
        visual_tokens=visual,
        fill=tokens / capacity,
        imbalance=imbalance,
        imbalance_ranks=ranks,
        last_step_packs=smallest if smallest < config.global_batch else 0,
        contested_samples=tally.contested,
        tasks={
            name: TaskCount(int(tally.documents[code]), int(tally.turns[code])) for code, name in enumerate(TASK_NAMES) if tally.turns[code]
        },
        sources={name: SourceCount(num_rows[code], *sources[code].tolist()) for code, name in enumerate(index.sources)},
        phases=[
            PhaseCount(
                number=phase.stage.number,
                until=phase.stage.until,
                schedule=phase.stage.schedule.kind,
                steps=phase.num_steps,
                packs=len(phase.costs),
                documents=len(phase.visits),
                turns=len(phase.turns.values),
                tokens=int(phase.num_tokens.sum()),
            )
            for phase in phases
        ],
        rows_left_out=_rows_left_out(index, visits, tally),
        turns_left_out={
            name: count
            for name, count in (
                ("over_cutoff", tally.turns_over_cutoff),
                ("task_share", tally.turns_not_in_share),
                ("schedule", tally.turns_not_chosen),
            )
            if count
        },
    )


def _rows_left_out(index: PlanIndex, visits: Visits, tally: Tally) -> dict[str, LeftOut]:
    reasons = {
        "over_cutoff": (tally.rows_over_cutoff, tally.examples_over_cutoff),
        "task_share": (tally.rows_not_in_share, tally.examples_not_in_share),
        "schedule": (tally.rows_not_chosen, tally.examples_not_chosen),
    }
    if visits.repeats.any() or len(visits.rows) < index.num_rows:
        unseen = np.ones(index.num_rows, np.bool_)
        unseen[visits.rows] = False
        reasons["source_weight"] = (int(np.count_nonzero(unseen)), np.flatnonzero(unseen)[:3].tolist())
    return {name: LeftOut(count, [index.describe(row) for row in rows[:3]]) for name, (count, rows) in reasons.items() if count}


def _capacity(phase: _PlannedPhase, epoch: _Epoch) -> int:
    if epoch.config.packing == "packed":
        return len(phase.costs) * epoch.cutoff_len
    longest = np.maximum.reduceat(phase.num_tokens, phase.layout.step_offsets[:-1])
    return int((longest * np.diff(phase.layout.step_offsets)).sum())


def _imbalance(phases: Sequence[_PlannedPhase], global_batch: int) -> tuple[float | None, int]:
    ranks = max(number for number in range(1, IMBALANCE_RANKS + 1) if global_batch % number == 0)
    found = []
    for phase in phases:
        # A smaller step stands behind the whole ones.
        whole = int(np.count_nonzero(np.diff(phase.layout.step_offsets) == global_batch))
        by_rank = phase.costs[: whole * global_batch].reshape(whole, global_batch // ranks, ranks).sum(axis=1)
        found.append(by_rank.max(axis=1) / by_rank.mean(axis=1) - 1)
    steps = np.concatenate(found)
    return (float(steps.mean()) if len(steps) else None), ranks
