"""Which turns of a row are taken: by hash, in proportion, within the budget, whatever the order of the rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from boxcar.schemas.errors import ConfigError
from boxcar.schemas.task import TASK_NAMES
from boxcar.schemas.training import MixtureConfig, ScheduleConfig
from boxcar.train.planning import sampling
from boxcar.train.planning.index import PlanIndex
from boxcar.train.planning.sampling import (
    NO_LIMIT,
    Chooser,
    Tally,
    absent_share,
    competence,
    hash_chain,
    mix,
    source_weights,
    task_shares,
    turn_limit,
    uniform,
    visits_of_epoch,
)
from tests.small_index import R, T, drawn_rows, index_of, length

CUTOFF = 400


# ---- hashes


def test_mix_is_splitmix64() -> None:
    """The first outputs for the seed 1234567, as published (rosettacode.org, Pseudo-random numbers/Splitmix64)."""
    states = np.uint64(1234567) + np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mix(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param((7, 1, 13, 0), 9016128212505567000, id="four"),
        pytest.param((7, 1, 7932, 1), 9734688432083929070, id="others"),
        pytest.param((0,), 16294208416658607535, id="zero: the first output of splitmix64 for the seed 0"),
        pytest.param((2**64 - 1, 2**63), 17866137399852670886, id="64 bits"),
    ],
)
def test_chains_keep_their_values(values: tuple[int, ...], expected: int) -> None:
    """Own golden values: every plan that was ever made hangs on them."""
    assert int(hash_chain(*values)) == expected


def test_uniform_numbers_leave_out_both_ends() -> None:
    ends = uniform(np.array([0, 2**64 - 1], np.uint64))
    assert 0 < ends[0] < ends[1] < 1
    many = uniform(mix(np.arange(100_000, dtype=np.uint64)))
    assert abs(many.mean() - 0.5) < 0.005
    assert abs(many.var() - 1 / 12) < 0.001


# ---- schedules


@pytest.mark.parametrize(
    ("settings", "progress", "expected"),
    [
        pytest.param({}, 0.0, 0.3, id="start"),
        pytest.param({}, 0.2, 1.0, id="end of the ramp"),
        pytest.param({}, 0.9, 1.0, id="after it"),
        pytest.param({}, 0.1, (0.5 * (1 - 0.09) + 0.09) ** 0.5, id="half of the ramp, p = 2"),
        pytest.param({"ramp_power": 1.0}, 0.1, 0.65, id="half of the ramp, linear"),
        pytest.param({"start_competence": 1.0}, 0.0, 1.0, id="everything is open from the start"),
    ],
)
def test_competence_by_hand(settings: dict[str, Any], progress: float, expected: float) -> None:
    assert competence(ScheduleConfig(**settings), np.array([progress]))[0] == pytest.approx(expected)


@given(st.floats(0.01, 1), st.floats(0.01, 1), st.floats(1, 5))
def test_competence_rises_to_one(start: float, ramp: float, power: float) -> None:
    curve = competence(ScheduleConfig(start_competence=start, ramp=ramp, ramp_power=power), np.linspace(0, 1, 101))
    assert (np.diff(curve) >= -1e-12).all()
    assert curve[0] == pytest.approx(start)
    assert curve[-1] == pytest.approx(1)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param({}, [NO_LIMIT] * 3, id="as many as fit"),
        pytest.param({"turns_per_sample": 5}, [5, 5, 5], id="constant"),
        pytest.param({"turns_per_sample": 1, "turns_per_sample_end": 16}, [1, 4, 16], id="geometric growth"),
        pytest.param({"turns_per_sample": 16, "turns_per_sample_end": 1}, [16, 4, 1], id="shrinking"),
        pytest.param({"kind": "all"}, [NO_LIMIT] * 3, id="all"),
    ],
)
def test_turns_per_sample_by_hand(settings: dict[str, Any], expected: list[int]) -> None:
    assert turn_limit(ScheduleConfig(ramp=0.5, **settings), np.array([0.0, 0.25, 0.75])).tolist() == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param({"absent_share": 0.1}, [0.1, 0.1, 0.1], id="constant"),
        pytest.param({"absent_share": 0.05, "absent_share_end": 0.15}, [0.05, 0.1, 0.15], id="ramp"),
    ],
)
def test_absent_share_by_hand(settings: dict[str, Any], expected: list[float]) -> None:
    assert absent_share(ScheduleConfig(ramp=0.5, **settings), np.array([0.0, 0.25, 0.75])).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"turns_per_sample_end": 3}, "turns_per_sample_end without turns_per_sample", id="end of a ramp without a start"),
        pytest.param({"absent_share_end": 0.3}, "absent_share_end without absent_share", id="likewise"),
        pytest.param(
            {"kind": "all", "turns_per_sample": 3}, "all takes every turn that fits, but turns_per_sample is set", id="all of some"
        ),
        pytest.param({"kind": "all", "absent_share": 0.3}, "but absent_share is set", id="all of a share"),
    ],
)
def test_a_schedule_that_contradicts_itself_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ScheduleConfig(**settings)


# ---- choosing


def choose(
    index: PlanIndex,
    schedule: ScheduleConfig,
    *,
    progress: float = 0.5,
    seed: int = 0,
    epoch: int = 0,
    repeat: int = 0,
    tasks: dict[Any, float] | None = None,
    cutoff: int = CUTOFF,
    cursor: npt.NDArray[np.int32] | None = None,
    tally: Tally | None = None,
) -> dict[int, list[tuple[int, ...]]]:
    """Row -> the turns of its documents."""
    chooser = Chooser(index, schedule, task_shares(tasks or {}), cutoff, seed, epoch, repeat, cursor)
    rows = np.arange(index.num_rows)
    made = chooser.choose(rows, np.full(index.num_rows, progress), tally if tally is not None else Tally())
    found: dict[int, list[tuple[int, ...]]] = {}
    for place, visit in enumerate(made.visits.tolist()):
        turns = tuple(made.turns.row(place).tolist())
        found.setdefault(visit, []).append(turns)
        assert made.tokens[place] <= cutoff
    return found


SCHEDULES = [
    pytest.param({"kind": "all"}, id="all"),
    pytest.param({"kind": "uniform", "turns_per_sample": 3}, id="uniform"),
    pytest.param({}, id="the default"),
    pytest.param({"turns_per_sample": 3}, id="progressive"),
    pytest.param({"kind": "random_paced", "turns_per_sample": 3}, id="random-paced"),
    pytest.param({"kind": "anti", "turns_per_sample": 2, "gate_floor": 0.0}, id="anti"),
    pytest.param({"turns_per_sample": 3, "absent_share": 0.3}, id="share of absent turns"),
    pytest.param({"absent_share": 0.2}, id="share of absent turns, as many as fit"),
    pytest.param({"turns_per_sample": 2, "cyclic": True}, id="cyclic"),
    pytest.param({"cyclic": True, "absent_share": 0.3}, id="cyclic with a share of absent turns"),
    pytest.param({"turns_per_sample": 4, "turn_order": "stored"}, id="stored order"),
]


def cursor_for(schedule: ScheduleConfig, num_rows: int) -> Any:
    return np.zeros((num_rows, 2), np.int32) if schedule.cyclic else None


@pytest.mark.parametrize("settings", SCHEDULES)
def test_documents_are_within_the_budget_and_dialogues_are_whole(settings: dict[str, Any]) -> None:
    rows, schedule = drawn_rows(400), ScheduleConfig(**settings)
    index = index_of(rows)
    made = choose(index, schedule, progress=0.05, cursor=cursor_for(schedule, len(rows)))
    assert len(made) > 300
    for number, [turns] in made.items():
        row = rows[number]
        assert len(set(turns)) == len(turns)
        assert length(row, turns) <= CUTOFF
        if row.ordered:
            assert turns == tuple(range(len(row.turns)))
        elif schedule.turns_per_sample:
            assert len(turns) <= schedule.turns_per_sample
        if schedule.turn_order == "stored":
            assert list(turns) == sorted(turns)
    for number in set(range(len(rows))) - set(made):
        shortest = (
            length(rows[number], range(len(rows[number].turns)))
            if rows[number].ordered
            else min(length(rows[number], [turn]) for turn in range(len(rows[number].turns)))
        )
        assert shortest > CUTOFF or schedule.absent_share is not None


@pytest.mark.parametrize("settings", SCHEDULES)
def test_the_choice_depends_on_the_sample_and_not_on_where_it_lies(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rows, schedule = drawn_rows(300), ScheduleConfig(**settings)
    order = np.random.default_rng(1).permutation(len(rows))
    plain = choose(index_of(rows), schedule, progress=0.1, cursor=cursor_for(schedule, len(rows)))
    monkeypatch.setattr(sampling, "_CHUNK_ROWS", 7)
    monkeypatch.setattr(sampling, "_CHUNK_TURNS", 30)
    shuffled = choose(index_of([rows[row] for row in order]), schedule, progress=0.1, cursor=cursor_for(schedule, len(rows)))
    assert {order[row]: turns for row, turns in shuffled.items()} == plain


@pytest.mark.parametrize("settings", SCHEDULES)
def test_every_turn_is_counted_once(settings: dict[str, Any]) -> None:
    rows, schedule, tally = drawn_rows(300), ScheduleConfig(**settings), Tally()
    made = choose(index_of(rows), schedule, tasks={"refer": 0.4}, cursor=cursor_for(schedule, len(rows)), tally=tally)
    chosen = [rows[row].turns[turn].task for row, documents in made.items() for turns in documents for turn in turns]
    assert tally.turns.tolist() == [chosen.count(task) for task in TASK_NAMES]
    offered = sum(len(row.turns) for row in rows)
    assert offered == len(chosen) + tally.turns_over_cutoff + tally.turns_not_in_share + tally.turns_not_chosen
    assert len(rows) == len(made) + tally.rows_over_cutoff + tally.rows_not_in_share + tally.rows_not_chosen
    for code, task in enumerate(TASK_NAMES):
        assert tally.documents[code] == sum(any(rows[row].turns[turn].task == task for turn in made[row][0]) for row in made)


def test_all_takes_every_turn_where_they_fit_and_some_of_each_where_they_do_not() -> None:
    rows = [R("small", (T(10),) * 5), R("large", (T(100),) * 5)]
    made = choose(index_of(rows), ScheduleConfig(kind="all"))
    assert sorted(made[0][0]) == [0, 1, 2, 3, 4]
    assert len(made[1][0]) == 2, "100 + 2 * 100 + 3 are 303, 3 turns would be 406"


def many(num_rows: int, turns: Sequence[T], base: int = 20) -> PlanIndex:
    return index_of([R(f"s/{number}", tuple(turns), base) for number in range(num_rows)])


def chi_squared(counts: npt.NDArray[np.int64], expected: float) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("settings", [{"kind": "uniform"}, {"gate_floor": 1.0}, {"start_competence": 1.0}], ids=str)
def test_without_a_gate_every_turn_is_as_likely_as_the_others(settings: dict[str, Any]) -> None:
    index = many(20_000, [T(difficulty=0.4)] * 6)
    made = choose(index, ScheduleConfig(turns_per_sample=2, **settings))
    counts = np.bincount([turn for [turns] in made.values() for turn in turns], minlength=6)
    # 5 degrees of freedom, less variance than independent draws have: 20.5 is the 0.1 % point.
    assert chi_squared(counts, 20_000 * 2 / 6) < 20.5
    pairs = {tuple(sorted(turns)) for [turns] in made.values()}
    assert len(pairs) == 15


def test_the_order_within_a_sample_is_uniform_too() -> None:
    made = choose(many(12_000, [T(difficulty=step / 3) for step in range(3)]), ScheduleConfig(gate_floor=0.0), progress=0.0)
    orders = [turns for [turns] in made.values()]
    counts = np.array([orders.count(order) for order in set(orders)])
    assert len(counts) == 6
    assert chi_squared(counts, 2000) < 20.5


def test_chances_are_in_proportion_to_the_gates_weights() -> None:
    schedule = ScheduleConfig(turns_per_sample=1, gate_floor=0.1, gate_width=0.2, start_competence=0.5)
    index = many(40_000, [T(difficulty=0.2), T(difficulty=0.9)])
    weights = 0.1 + 0.9 / (1 + np.exp((np.array([0.2, 0.9]) - 0.5) / 0.2))
    found = np.mean([turns == (0,) for [turns] in choose(index, schedule, progress=0.0).values()])
    expected = weights[0] / weights.sum()
    assert abs(found - expected) < 4 * (expected * (1 - expected) / 40_000) ** 0.5


def mean_difficulty(kind: str, progress: float, epoch: int = 0) -> float:
    turns = [T(difficulty=place / 9) for place in range(10)]
    schedule = ScheduleConfig.model_validate({"kind": kind, "turns_per_sample": 3, "gate_floor": 0.03, "ramp": 0.5})
    made = choose(many(2000, turns), schedule, progress=progress, epoch=epoch)
    return float(np.mean([turn / 9 for [chosen] in made.values() for turn in chosen]))


def test_easy_turns_come_first_hard_ones_first_or_neither() -> None:
    assert mean_difficulty("progressive", 0.0) < 0.3
    assert mean_difficulty("anti", 0.0) > 0.7
    for kind in ("uniform", "random_paced"):
        assert mean_difficulty(kind, 0.0) == pytest.approx(0.5, abs=0.02)
    # At the end c = 1: the gate still weighs the hardest quantile down by half.
    for kind in ("progressive", "anti"):
        assert mean_difficulty(kind, 0.9) == pytest.approx(0.5, abs=0.04)


def test_the_mean_difficulty_rises_along_the_ramp() -> None:
    means = [mean_difficulty("progressive", progress) for progress in (0.0, 0.1, 0.2, 0.35, 0.5)]
    assert means == sorted(means)


def test_random_pacing_keeps_its_own_difficulty_over_the_run() -> None:
    index = many(3000, [T()] * 10)
    tight = ScheduleConfig(kind="random_paced", turns_per_sample=3, gate_floor=0.0, gate_width=0.01)
    loose = ScheduleConfig(kind="uniform", turns_per_sample=3)

    def shared(schedule: ScheduleConfig) -> float:
        first, second = (choose(index, schedule, progress=0.0, epoch=epoch) for epoch in (0, 1))
        return float(np.mean([len({*first[row][0]} & {*second[row][0]}) for row in first]))

    assert shared(loose) == pytest.approx(0.9, abs=0.05)
    assert shared(tight) > 1.8


@pytest.mark.parametrize("changed", [{"seed": 1}, {"epoch": 1}, {"repeat": 1}], ids=str)
def test_another_seed_epoch_or_repeat_is_another_choice(changed: dict[str, int]) -> None:
    index, schedule = many(500, [T()] * 8), ScheduleConfig(turns_per_sample=2)
    first, other = choose(index, schedule), choose(index, schedule, **changed)  # type: ignore[arg-type]
    same = np.mean([{*first[row][0]} == {*other[row][0]} for row in first])
    assert same < 0.1, "1 of 28 by chance"
    assert choose(index, schedule) == first


def test_a_little_progress_changes_few_choices() -> None:
    index = many(3000, [T(difficulty=place / 9) for place in range(10)])
    schedule = ScheduleConfig(turns_per_sample=4, ramp=0.5)
    first, later = choose(index, schedule, progress=0.30), choose(index, schedule, progress=0.31)
    assert 0 < np.mean([{*first[row][0]} != {*later[row][0]} for row in first]) < 0.1


# ---- shares


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("cutoff", [CUTOFF, 150], ids=["with room", "in a full document"])
def test_absent_turns_have_their_share(share: float, cutoff: int) -> None:
    turns = [T(task="absent" if place % 2 else "detect") for place in range(20)]
    made = choose(many(4000, turns), ScheduleConfig(turns_per_sample=8, absent_share=share), cutoff=cutoff)
    chosen = [turn % 2 for [turns] in made.values() for turn in turns]
    assert np.mean(chosen) == pytest.approx(share, abs=0.015)
    if cutoff == CUTOFF:
        assert {len(turns) for [turns] in made.values()} == {8}


def test_where_absent_turns_are_missing_others_take_their_place() -> None:
    turns = [T(task="detect")] * 9 + [T(task="absent")]
    made = choose(many(500, turns), ScheduleConfig(turns_per_sample=6, absent_share=0.5))
    assert {(sum(turn == 9 for turn in turns), len(turns)) for [turns] in made.values()} == {(1, 6)}


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_task_takes_part_by_its_share(share: float) -> None:
    index = many(4000, [T(task="detect"), T(task="caption")])
    made = choose(index, ScheduleConfig(), tasks={"caption": share})
    assert len(made) == 4000
    assert np.mean([1 in turns for [turns] in made.values()]) == pytest.approx(share, abs=0.03)


def test_a_dialogue_takes_part_as_a_whole() -> None:
    rows = [R(f"d/{number}", (T(task="dialogue"),) * 4, ordered=True) for number in range(2000)]
    made = choose(index_of(rows), ScheduleConfig(turns_per_sample=2), tasks={"dialogue": 0.5})
    assert {turns for [turns] in made.values()} == {(0, 1, 2, 3)}
    assert len(made) == pytest.approx(1000, abs=100)


def test_one_question_an_image_makes_a_document_of_each_turn() -> None:
    rows = [R("a", (T(20), T(30), T(500)), 100), R("b", (T(10),) * 5, 380)]
    index = index_of(rows, one_question_per_image=True)
    made = choose(index, ScheduleConfig())
    assert {row: sorted(turns) for row, turns in made.items()} == {0: [(0,), (1,)], 1: [(0,), (1,), (2,), (3,), (4,)]}
    limited = choose(index, ScheduleConfig(turns_per_sample=2))
    assert {row: len(turns) for row, turns in limited.items()} == {0: 2, 1: 2}


# ---- coverage


@pytest.mark.parametrize("cutoff", [CUTOFF, 120], ids=["by number", "by tokens"])
def test_cyclic_comes_to_every_turn_before_it_comes_to_one_again(cutoff: int) -> None:
    rng = np.random.default_rng(0)
    rows = [R(f"s/{row}", tuple(T(int(rng.integers(10, 40))) for _ in range(int(rng.integers(1, 12)))), 60) for row in range(200)]
    index, schedule = index_of(rows), ScheduleConfig(turns_per_sample=3, cyclic=True)
    cursor = np.zeros((len(rows), 2), np.int32)
    seen: list[list[int]] = [[] for _ in rows]
    for epoch in range(30):
        for row, [turns] in choose(index, schedule, epoch=epoch, cursor=cursor, cutoff=cutoff).items():
            seen[row] += turns
    for of_row, turns_seen in zip(rows, seen, strict=True):
        counts = np.bincount(turns_seen, minlength=len(of_row.turns))
        assert counts.max() - counts.min() <= 1
        assert counts.min() > 0


def test_cyclic_needs_as_many_epochs_as_the_turns_divided_by_their_number() -> None:
    index, cursor = many(50, [T()] * 10), np.zeros((50, 2), np.int32)
    schedule = ScheduleConfig(turns_per_sample=4, cyclic=True)
    seen: list[set[int]] = [set() for _ in range(50)]
    for epoch in range(3):
        for row, [turns] in choose(index, schedule, epoch=epoch, cursor=cursor).items():
            seen[row] |= set(turns)
    assert all(len(turns) == 10 for turns in seen)


# ---- visits


def test_every_row_is_visited_once_in_another_order_every_epoch() -> None:
    index = index_of(drawn_rows(500))
    orders = [visits_of_epoch(index, MixtureConfig(), 0, epoch).order.tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(500)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert abs(np.corrcoef(orders[0], orders[1])[0, 1]) < 0.15
    assert abs(np.corrcoef(orders[0], np.arange(500))[0, 1]) < 0.15


def test_the_shuffled_order_is_one_of_samples_not_of_rows() -> None:
    rows = drawn_rows(300)
    again = [rows[row] for row in np.random.default_rng(0).permutation(300)]
    first, second = (
        [given_rows[row].sample_id for row in visits_of_epoch(index_of(given_rows), MixtureConfig(), 3, 1).order.tolist()]
        for given_rows in (rows, again)
    )
    assert first == second


def test_a_sample_that_stands_twice_comes_in_the_order_of_its_rows() -> None:
    rows = drawn_rows(100)
    order = visits_of_epoch(index_of(rows + rows), MixtureConfig(), 0, 0).order
    assert (order[1::2] - order[::2] == 100).all()


@pytest.mark.parametrize(("weight", "expected"), [(0.0, 0), (0.25, 500), (1.0, 2000), (2.5, 5000), (3.0, 6000)])
def test_a_source_comes_as_often_as_its_weight_says(weight: float, expected: int) -> None:
    rows = [R(f"a/{number}", (T(),), source="a") for number in range(2000)] + [R("b/1", (T(),), source="b")]
    visits = visits_of_epoch(index_of(rows), MixtureConfig(sources={"a": weight}), 0, 0)
    of_a = visits.rows[visits.rows < 2000]
    assert len(of_a) == pytest.approx(expected, abs=80 if weight % 1 else 0)
    times = np.bincount(of_a, minlength=2000)
    assert set(times.tolist()) <= {int(weight), int(-(-weight // 1))}
    assert (visits.rows == 2000).sum() == 1
    assert sorted(visits.order.tolist()) == list(range(len(visits.rows)))


@pytest.mark.parametrize(
    ("temperature", "shares"),
    [
        pytest.param(1.0, [0.9, 0.1], id="1: as they are"),
        pytest.param(2.0, [0.75, 0.25], id="2: by square roots"),
        pytest.param(1e9, [0.5, 0.5], id="high: alike"),
    ],
)
def test_temperature_evens_sources_out_and_keeps_the_size_of_the_epoch(temperature: float, shares: list[float]) -> None:
    rows = [R(f"a/{number}", (T(),), source="a") for number in range(1800)] + [
        R(f"b/{number}", (T(),), source="b") for number in range(200)
    ]
    index = index_of(rows)
    weights = source_weights(index, MixtureConfig(temperature=temperature))
    assert (weights * [1800, 200] / 2000).tolist() == pytest.approx(shares)
    assert len(visits_of_epoch(index, MixtureConfig(temperature=temperature), 0, 0).rows) == pytest.approx(2000, abs=60)


def test_a_source_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="found the source 'coco', expected one of the shards' own: set"):
        visits_of_epoch(index_of(drawn_rows(3)), MixtureConfig(sources={"coco": 2.0}), 0, 0)


def test_a_row_that_comes_again_is_dealt_with_anew() -> None:
    visits = visits_of_epoch(index_of(drawn_rows(200)), MixtureConfig(sources={"set": 2.0}), 0, 0)
    place = np.empty(400, np.int64)
    place[visits.order] = np.arange(400)
    assert np.abs(place[::2] - place[1::2]).mean() > 80, "its visits are spread over the epoch"
