"""Which rows an epoch visits, in which order, and which of a row's turns it takes. Pure NumPy: hashes in place of random numbers.

    row ──> visits (source weights) ──> shuffled order ──> progress t ──> how many turns, which difficulty is open
                                                                              └──> keys by hash ──> the first that fit the cutoff

Every choice is a hash of (seed, purpose, epoch, sample, turn). No state, no order of evaluation and no rank is in it: the same on every
machine, for every cut of the rows into shards, before and after a restart.

Turns are drawn without replacement, with chances in proportion to their weights w: by the smallest -ln(u) / w, u uniform by hash. That is
the order of the Gumbel-top-k keys ln w - ln(-ln u), with one logarithm less. A logarithm may differ in its last bit between processors:
keys are rounded to 24 bits, and a run plans once and hands the table to its workers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from boxcar.pipelines.ragged import IntColumn, Ragged, offsets_of
from boxcar.schemas.errors import ConfigError
from boxcar.schemas.task import TASK_NAMES, TaskName
from boxcar.schemas.training import MixtureConfig, ScheduleConfig
from boxcar.train.planning.index import QUANTILES, PlanIndex

FloatColumn = npt.NDArray[np.float64]
Hashes = npt.NDArray[np.uint64]

NO_LIMIT = 1 << 30
"""Turns of a sample, where only the cutoff limits them."""
ABSENT = TASK_NAMES.index("absent")
_CHUNK_ROWS = 1 << 16
"""16 bits of the sort keys; with 8 turns to a row, the arrays of a chunk stay in the caches."""
_CHUNK_TURNS = 1 << 20
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class Purpose(IntEnum):
    """What a hash is for, so that no two choices hang together. Numbers stay as they are: they are part of every plan."""

    SHUFFLE = 1
    SOURCE = 2
    TASK = 3
    KEY = 4
    PACE = 5
    ABSENT_COUNT = 6
    ABSENT_PLACE = 7
    TURN_ORDER = 8
    CYCLE = 9
    STEP_ORDER = 10


def mix(values: Hashes) -> Hashes:
    """One step of splitmix64 (Steele, Lea, Flood 2014) from each value as its state. A new array."""
    mixed = values + np.uint64(_GOLDEN)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def hash_chain(*values: int) -> np.uint64:
    """The hash of a few integers of up to 64 bits: h = mix(h ^ value) for each, from 0."""
    state = np.zeros(1, np.uint64)
    for value in values:
        state = mix(state ^ np.uint64(value & _MASK))
    return np.uint64(state[0])


def uniform(hashes: Hashes) -> FloatColumn:
    """Numbers in (0, 1), ends left out: the upper 52 bits of each hash, and a half. With 53 bits the largest would round to 1."""
    return ((hashes >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def epoch_value(epoch: int, repeat: int) -> int:
    """What stands for the epoch in hashes: a row that comes again within an epoch is dealt with as in another epoch."""
    return epoch | repeat << 32


# ---- schedules: functions of the progress t in [0, 1) of the run


def ramp(schedule: ScheduleConfig, progress: FloatColumn) -> FloatColumn:
    """min(1, t / tau)."""
    return np.minimum(1.0, progress / schedule.ramp)


def competence(schedule: ScheduleConfig, progress: FloatColumn) -> FloatColumn:
    """c(t) = ((t / tau)(1 - c0^p) + c0^p)^(1/p), at most 1: the quantile of difficulty that is open (Platanios et al. 2019)."""
    start = schedule.start_competence**schedule.ramp_power
    return np.asarray((ramp(schedule, progress) * (1 - start) + start) ** (1 / schedule.ramp_power))


def turn_limit(schedule: ScheduleConfig, progress: FloatColumn) -> IntColumn:
    """R(t) = round(R0 (R1 / R0)^min(1, t / tau)): turns of a sample; NO_LIMIT where only the cutoff limits them."""
    first, last = schedule.turns_per_sample, schedule.turns_per_sample_end
    if first is None or schedule.kind == "all":
        return np.full(len(progress), NO_LIMIT)
    growth = (last if last is not None else first) / first
    return np.maximum(1, np.rint(first * growth ** ramp(schedule, progress)).astype(np.int64))


def absent_share(schedule: ScheduleConfig, progress: FloatColumn) -> FloatColumn:
    """rho(t): share of absent turns. Only where schedule.absent_share is set."""
    first = schedule.absent_share or 0.0
    last = schedule.absent_share_end if schedule.absent_share_end is not None else first
    return np.asarray(first + (last - first) * ramp(schedule, progress))


def gates(schedule: ScheduleConfig) -> bool:
    """Whether difficulty, or what stands for it, changes a turn's chances."""
    return schedule.kind in ("progressive", "random_paced", "anti") and not schedule.cyclic and schedule.gate_floor < 1


def moves(schedule: ScheduleConfig) -> bool:
    """Whether anything changes along the ramp."""
    return gates(schedule) or schedule.turns_per_sample_end is not None or schedule.absent_share_end is not None


# ---- visits


@dataclass(frozen=True)
class Visits:
    """Rows of an epoch: V visits in the order of the rows, a row's repeats side by side."""

    rows: IntColumn
    """(V,)."""
    repeats: npt.NDArray[np.int32]
    """(V,) how often the row has come before in this epoch."""
    order: IntColumn
    """(V,) the visits in shuffled order."""

    def progress(self, epoch: int, epochs: float) -> FloatColumn:
        """(V,) t of each visit: where it stands in the run of so many epochs. From 1 on, it lies behind the end of the run."""
        place = np.empty(len(self.rows))
        place[self.order] = np.arange(len(self.rows))
        return np.asarray((epoch + (place + 0.5) / len(self.rows)) / epochs)


def source_weights(index: PlanIndex, mixture: MixtureConfig) -> FloatColumn:
    """(sources,) how often a row of each source comes in an epoch. Raises ConfigError for a source that is not there."""
    if mixture.temperature is not None:
        counts = np.bincount(index.source_codes, minlength=len(index.sources)).astype(np.float64)
        shares = counts ** (1 / mixture.temperature)
        return np.asarray(shares / shares.sum() * counts.sum() / np.maximum(counts, 1))
    if unknown := sorted(set(mixture.sources) - set(index.sources)):
        raise ConfigError(
            "mixture.sources", found=f"the source {unknown[0]!r}", expected=f"one of the shards' own: {', '.join(sorted(index.sources))}"
        )
    return np.array([mixture.sources.get(name, 1.0) for name in index.sources])


def visits_of_epoch(index: PlanIndex, mixture: MixtureConfig, seed: int, epoch: int) -> Visits:
    """Rows of a source of weight w come floor(w) times, and once more with chance frac(w). Shuffled by hash, equal hashes by row."""
    weights = source_weights(index, mixture)
    if (weights == 1).all():
        rows, repeats = np.arange(index.num_rows), np.zeros(index.num_rows, np.int32)
    else:
        whole = np.floor(weights)
        chance = uniform(mix(hash_chain(seed, Purpose.SOURCE, epoch) ^ index.sample_keys))
        times = (whole[index.source_codes] + (chance < (weights - whole)[index.source_codes])).astype(np.int64)
        rows = np.repeat(np.arange(index.num_rows), times)
        repeats = (np.arange(len(rows)) - np.repeat(offsets_of(times)[:-1], times)).astype(np.int32)
    hashes = np.empty(len(rows), np.uint64)
    for repeat in range(int(repeats.max(initial=-1)) + 1):
        here = slice(None) if not repeats.any() else repeats == repeat
        hashes[here] = mix(hash_chain(seed, Purpose.SHUFFLE, epoch_value(epoch, repeat)) ^ index.sample_keys[rows[here]])
    # Stable: a sample that stands in two folders has one hash, and which of the two comes first must not hang on the sort's own ways.
    return Visits(rows, repeats, np.argsort(hashes, kind="stable"))


# ---- turns


@dataclass
class Tally:
    """What became of the turns of the visits, as exact counts: offered = chosen + left out."""

    turns: IntColumn = field(default_factory=lambda: np.zeros(len(TASK_NAMES), np.int64))
    """(tasks,) chosen."""
    documents: IntColumn = field(default_factory=lambda: np.zeros(len(TASK_NAMES), np.int64))
    """(tasks,) samples with at least one chosen turn of the task."""
    turns_over_cutoff: int = 0
    turns_not_in_share: int = 0
    """By mixture.tasks or the phase's."""
    turns_not_chosen: int = 0
    """By the schedule, or because the document was full."""
    rows_over_cutoff: int = 0
    rows_not_in_share: int = 0
    rows_not_chosen: int = 0
    """By the share of absent turns: a row has no others."""
    examples_over_cutoff: list[int] = field(default_factory=list)
    """Rows."""
    examples_not_in_share: list[int] = field(default_factory=list)
    examples_not_chosen: list[int] = field(default_factory=list)
    contested: int = 0
    """Visits whose turns were not all taken, so that the schedule chose."""

    def add(self, other: "Tally") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class Documents:
    """D documents: what of a row stands in one piece of a pack."""

    visits: IntColumn
    """(D,) rows of the visits that were asked for."""
    turns: Ragged[np.int16]
    """Positions of each one's turns within its row, in their order in the text."""
    tokens: npt.NDArray[np.int32]
    """(D,)."""


@dataclass(frozen=True)
class Chooser:
    """Chooses turns under one schedule, of one epoch of one seed."""

    index: PlanIndex
    schedule: ScheduleConfig
    task_shares: FloatColumn
    """(tasks,) share of the turns of each task that take part."""
    cutoff_len: int
    seed: int
    epoch: int
    repeat: int
    cursor: npt.NDArray[np.int32] | None = None
    """(N, 2) for a cyclic schedule: where each row goes on, of its turns (absent ones apart, where they have a share). Is moved on."""

    def choose(self, rows: IntColumn, progress: FloatColumn, tally: Tally) -> Documents:
        """rows: (V,) ascending. progress: (V,) of each. What is left out is counted in the tally."""
        visits, tokens, lengths, turns = [], [], [], []
        for first, last in self._chunks(rows):
            chunk = _Chunk(self, rows[first:last], progress[first:last])
            made = chunk.documents(tally)
            visits.append(made.visits + first)
            tokens.append(made.tokens)
            lengths.append(made.turns.lengths.astype(np.int32))
            turns.append(made.turns.values)
        if not visits:
            return Documents(np.zeros(0, np.int64), Ragged(np.zeros(0, np.int16), np.zeros(1, np.int64)), np.zeros(0, np.int32))
        joined = Ragged(np.concatenate(turns), offsets_of(np.concatenate(lengths)))
        return Documents(np.concatenate(visits), joined, np.concatenate(tokens))

    def _chunks(self, rows: IntColumn) -> Iterator[tuple[int, int]]:
        """(first, last) of stretches of at most _CHUNK_ROWS rows and some _CHUNK_TURNS turns."""
        first = 0
        while first < len(rows):
            last = min(first + _CHUNK_ROWS, len(rows))
            counts = self.index.turn_offsets[rows[first:last] + 1] - self.index.turn_offsets[rows[first:last]]
            last = first + max(1, int(np.searchsorted(np.cumsum(counts), _CHUNK_TURNS, side="right")))
            yield first, min(last, len(rows))
            first = last

    def visit_hashes(self, purpose: Purpose, rows: IntColumn) -> Hashes:
        return mix(hash_chain(self.seed, purpose, epoch_value(self.epoch, self.repeat)) ^ self.index.sample_keys[rows])

    def run_hashes(self, purpose: Purpose, rows: IntColumn) -> Hashes:
        """The same in every epoch."""
        return mix(hash_chain(self.seed, purpose) ^ self.index.sample_keys[rows])


class _Chunk:
    """Some rows and all their turns, as flat columns: turn i of the chunk is turn `position[i]` of row `owner[i]`."""

    def __init__(self, chooser: Chooser, rows: IntColumn, progress: FloatColumn) -> None:
        index = chooser.index
        self.chooser, self.rows, self.progress = chooser, rows, progress
        starts = index.turn_offsets[rows]
        self.counts = index.turn_offsets[rows + 1] - starts
        self.offsets = offsets_of(self.counts)
        self.owner = np.repeat(np.arange(len(rows)), self.counts)
        self.position = np.arange(self.offsets[-1]) - self.offsets[:-1][self.owner]
        contiguous = rows[-1] - rows[0] + 1 == len(rows)
        self.flat = slice(starts[0], starts[0] + self.offsets[-1]) if contiguous else starts[self.owner] + self.position
        self.tokens = index.turn_tokens[self.flat].astype(np.int64)
        self.tasks = index.turn_tasks[self.flat]
        self.base = index.base_tokens[rows].astype(np.int64)
        self.ordered = index.ordered[rows]
        self.open = 0 if index.one_question_per_image else index.turn_open_tokens

    def documents(self, tally: Tally) -> Documents:
        fits, eligible = self._eligible()
        chosen = self._chosen(fits, eligible, tally)
        num_chosen = self._sums(chosen)
        self._count(fits, eligible, chosen, num_chosen, tally)
        places = np.flatnonzero(chosen)
        owner, position = self._in_order(places)
        index = self.chooser.index
        if index.one_question_per_image:
            single = self.base[owner] + self.tokens[self.offsets[:-1][owner] + position]
            return Documents(owner, Ragged(position.astype(np.int16), np.arange(len(owner) + 1)), single.astype(np.int32))
        has = num_chosen > 0
        total = self.base - self.open + self._sums(np.where(chosen, self.tokens + self.open, 0))
        return Documents(np.flatnonzero(has), Ragged(position.astype(np.int16), offsets_of(num_chosen[has])), total[has].astype(np.int32))

    def _sums(self, per_turn: npt.NDArray[np.generic]) -> IntColumn:
        """(rows,) sum over each row's turns. No row is without turns."""
        return np.add.reduceat(per_turn, self.offsets[:-1], dtype=np.int64)

    def _turn_hashes(self, of_rows: Hashes, places: IntColumn | slice = slice(None)) -> Hashes:
        return mix(of_rows[self.owner[places]] ^ self.position[places].astype(np.uint64))

    def _eligible(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Turns that fit the cutoff alone (a dialogue's: all together), and those of them that take part by their task's share."""
        cutoff = self.chooser.cutoff_len
        fits = self.tokens <= (cutoff - self.base)[self.owner]
        if self.ordered.any():
            whole = self.base - self.open + self._sums(self.tokens + self.open)
            fits = np.where(self.ordered[self.owner], (whole <= cutoff)[self.owner], fits)
        shares = self.chooser.task_shares
        if (shares >= 1).all():
            return fits, fits
        # A dialogue takes part or not as one: by its first turn.
        asked = np.where(self.ordered[self.owner], self.offsets[:-1][self.owner], np.arange(len(self.owner)))
        chance = uniform(self._turn_hashes(self.chooser.visit_hashes(Purpose.TASK, self.rows)))
        return fits, fits & (chance < shares[self.tasks])[asked]

    def _chosen(self, fits: npt.NDArray[np.bool_], eligible: npt.NDArray[np.bool_], tally: Tally) -> npt.NDArray[np.bool_]:
        """Eligible turns that are taken: all where nothing stands against it, else the first by key."""
        schedule = self.chooser.schedule
        limit = np.where(self.ordered, NO_LIMIT, turn_limit(schedule, self.progress))
        num_eligible = self._sums(eligible)
        contested = num_eligible > limit
        if not self.chooser.index.one_question_per_image:
            contested |= self.base - self.open + self._sums(np.where(eligible, self.tokens + self.open, 0)) > self.chooser.cutoff_len
        with_absent = schedule.absent_share is not None and schedule.kind != "all"
        if with_absent:
            contested |= self._sums(eligible & (self.tasks == ABSENT)) > 0
            contested &= ~self.ordered
        places = np.flatnonzero(eligible & contested[self.owner])
        tally.contested += int(np.count_nonzero(contested))
        if not len(places):
            return eligible
        group = (self.tasks == ABSENT).astype(np.int64) if with_absent else np.zeros(len(self.tasks), np.int64)
        keys = self._keys(places, fits, group)
        order = self._sort(places, keys, group)
        if with_absent:
            order = self._with_absent_share(order, group, np.minimum(limit, num_eligible))
        taken = order[self._that_fit(order, limit)]
        chosen = eligible & ~contested[self.owner]
        chosen[taken] = True
        if schedule.cyclic:
            self._move_cursor(taken, keys, fits, group)
        return chosen

    def _keys(self, places: IntColumn, fits: npt.NDArray[np.bool_], group: IntColumn) -> npt.NDArray[np.uint32]:
        """(turns of the chunk,) uint32, small ones first; set at `places` only."""
        chooser, schedule = self.chooser, self.chooser.schedule
        if schedule.cyclic:
            return self._cyclic_keys(fits, group)
        keys = np.zeros(len(self.owner), np.uint32)
        hashes = self._turn_hashes(chooser.visit_hashes(Purpose.KEY, self.rows), places)
        if not gates(schedule):
            keys[places] = hashes >> np.uint64(32)
            return keys
        owner = self.owner[places]
        if schedule.kind == "random_paced":
            difficulty = uniform(self._turn_hashes(chooser.run_hashes(Purpose.PACE, self.rows), places))
        else:
            quantiles = chooser.index.turn_quantiles[self.flat][places] / QUANTILES
            difficulty = 1 - quantiles if schedule.kind == "anti" else quantiles
        beyond = (difficulty - competence(schedule, self.progress)[owner]) / schedule.gate_width
        weights = schedule.gate_floor + (1 - schedule.gate_floor) / (1 + np.exp(np.minimum(beyond, 700)))
        # Positive floats sort as their bits do. 24 bits of a key are enough to choose by; equal ones go by position.
        keys[places] = (-np.log(uniform(hashes)) / np.maximum(weights, 1e-30)).astype(np.float32).view(np.uint32)
        return keys

    def _cyclic_keys(self, fits: npt.NDArray[np.bool_], group: IntColumn) -> npt.NDArray[np.uint32]:
        """Rank of each turn in the row's fixed order, counted from where the row's cursor stands."""
        assert self.chooser.cursor is not None
        places = np.flatnonzero(fits)
        fixed = np.zeros(len(self.owner), np.uint32)
        fixed[places] = self._turn_hashes(self.chooser.run_hashes(Purpose.CYCLE, self.rows), places) >> np.uint64(32)
        order = self._sort(places, fixed, group)
        segment = 2 * self.owner[order] + group[order]
        counts = np.bincount(segment, minlength=2 * len(self.rows))
        rank = np.arange(len(order)) - offsets_of(counts)[:-1][segment]
        cursor = self.chooser.cursor[self.rows].ravel()
        keys = np.zeros(len(self.owner), np.uint32)
        keys[order] = (rank - cursor[segment]) % counts[segment]
        return keys

    def _move_cursor(self, taken: IntColumn, keys: npt.NDArray[np.uint32], fits: npt.NDArray[np.bool_], group: IntColumn) -> None:
        """Behind the last turn that was taken, so that the next visit begins there."""
        assert self.chooser.cursor is not None
        segment = 2 * self.owner + group
        counts = np.maximum(np.bincount(segment[fits], minlength=2 * len(self.rows)), 1)
        moved = np.zeros(2 * len(self.rows), np.int64)
        np.maximum.at(moved, segment[taken], keys[taken].astype(np.int64) + 1)
        cursor = self.chooser.cursor[self.rows].ravel()
        self.chooser.cursor[self.rows] = ((cursor + moved) % counts).reshape(-1, 2)

    def _sort(self, places: IntColumn, keys: npt.NDArray[np.uint32], group: IntColumn) -> IntColumn:
        """`places` by row, group, key, position: one sort of 64-bit numbers, row 16 bits, group 1, key 32, position 15."""
        packed = (self.owner[places] << 1 | group[places]).astype(np.uint64) << np.uint64(47)
        packed |= keys[places].astype(np.uint64) << np.uint64(15) | self.position[places].astype(np.uint64)
        packed.sort()
        return np.asarray(self.offsets[:-1][(packed >> np.uint64(48)).astype(np.int64)] + (packed & np.uint64(0x7FFF)).astype(np.int64))

    def _with_absent_share(self, order: IntColumn, group: IntColumn, limit: IntColumn) -> IntColumn:
        """Of each row's turns, the first floor(rho R + u) absent ones and the rest others, dealt evenly, so that a document that is full
        sooner keeps the share.

        order: turns by row, group and key. limit: (rows,) R, at most the eligible turns."""
        owner = self.owner[order]
        segment = 2 * owner + group[order]
        available = np.bincount(segment, minlength=2 * len(self.rows))
        rank = np.arange(len(order)) - offsets_of(available)[:-1][segment]
        share = absent_share(self.chooser.schedule, self.progress)
        luck = uniform(self.chooser.visit_hashes(Purpose.ABSENT_COUNT, self.rows))
        wanted = available.reshape(-1, 2).copy()
        wanted[:, 1] = np.minimum(wanted[:, 1], np.floor(share * limit + luck).astype(np.int64))
        wanted[:, 0] = np.minimum(wanted[:, 0], np.maximum(limit - wanted[:, 1], 0))
        num_kept = wanted.ravel()
        kept = rank < num_kept[segment]
        order, segment, rank = order[kept], segment[kept], rank[kept]
        of_rows = self.chooser.visit_hashes(Purpose.ABSENT_PLACE, self.rows)
        shift = uniform(mix(np.repeat(of_rows, 2) ^ np.tile(np.arange(2, dtype=np.uint64), len(self.rows))))
        keys = np.zeros(len(self.owner), np.uint32)
        keys[order] = ((rank + shift[segment]) / num_kept[segment] * (2.0**32 - 1)).astype(np.uint32)
        return self._sort(order, keys, np.zeros(len(self.owner), np.int64))

    def _that_fit(self, order: IntColumn, limit: IntColumn) -> npt.NDArray[np.bool_]:
        """Of each row's turns in this order, the first ones, while their number and their tokens fit."""
        owner = self.owner[order]
        counts = np.bincount(owner, minlength=len(self.rows))
        firsts = offsets_of(counts)[:-1]
        within = np.arange(len(order)) - firsts[owner] < limit[owner]
        if self.chooser.index.one_question_per_image:
            return np.asarray(within)
        running = offsets_of(self.tokens[order] + self.open)
        used = running[1:] - running[firsts][owner]
        return np.asarray(within & (used <= (self.chooser.cutoff_len - self.base + self.open)[owner]))

    def _in_order(self, places: IntColumn) -> tuple[IntColumn, IntColumn]:
        """(row of the chunk, position) of chosen turns in the order of the text: by hash, or as stored; dialogues as stored."""
        if self.chooser.schedule.turn_order == "hash":
            hashes = self._turn_hashes(self.chooser.visit_hashes(Purpose.TURN_ORDER, self.rows), places) >> np.uint64(32)
            keys = np.zeros(len(self.owner), np.uint32)
            keys[places] = np.where(self.ordered[self.owner[places]], self.position[places].astype(np.uint64), hashes)
            places = self._sort(places, keys, np.zeros(len(self.owner), np.int64))
        return self.owner[places], self.position[places]

    def _count(
        self,
        fits: npt.NDArray[np.bool_],
        eligible: npt.NDArray[np.bool_],
        chosen: npt.NDArray[np.bool_],
        num_chosen: IntColumn,
        tally: Tally,
    ) -> None:
        num_fitting, num_eligible = self._sums(fits), self._sums(eligible)
        tally.turns += np.bincount(self.tasks[chosen], minlength=len(TASK_NAMES))
        flags = np.where(chosen, np.left_shift(np.uint8(1), self.tasks), np.uint8(0))
        present = np.bitwise_or.reduceat(flags, self.offsets[:-1])
        tally.documents += np.array([np.count_nonzero(present & (1 << task)) for task in range(len(TASK_NAMES))])
        tally.turns_over_cutoff += int(self.offsets[-1] - num_fitting.sum())
        tally.turns_not_in_share += int((num_fitting - num_eligible).sum())
        tally.turns_not_chosen += int((num_eligible - num_chosen).sum())
        for name, here in (
            ("over_cutoff", num_fitting == 0),
            ("not_in_share", (num_fitting > 0) & (num_eligible == 0)),
            ("not_chosen", (num_eligible > 0) & (num_chosen == 0)),
        ):
            setattr(tally, f"rows_{name}", getattr(tally, f"rows_{name}") + int(np.count_nonzero(here)))
            examples = getattr(tally, f"examples_{name}")
            if len(examples) < 3:
                examples.extend(self.rows[np.flatnonzero(here)[: 3 - len(examples)]].tolist())


def task_shares(tasks: Mapping[TaskName, float]) -> FloatColumn:
    """(tasks,) share of each task, 1 where nothing is said."""
    return np.array([tasks.get(name, 1.0) for name in TASK_NAMES])
