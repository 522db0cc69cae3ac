"""The plan of an epoch: every document once, whatever the number of workers, the place of the rows and the step it goes on at."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boxcar.schemas.errors import BudgetError, ConfigError, ShardError
from boxcar.schemas.training import PhaseConfig, PlanConfig, ScheduleConfig, TrainConfig
from boxcar.tools.bench.planning import synthetic_index
from boxcar.train.planning.plan import content_of_epoch, plan_epoch, smallest_sample, window_stops
from boxcar.train.planning.plan_table import PLAN_SCHEMA, Plan, packs_of_step, rank_packs, read_plan, write_plan
from tests.small_index import Doc, R, T, documents_of, drawn_rows, index_of, length, packs_of

CUTOFF = 400
PRIME = 211


def config(**changes: Any) -> PlanConfig:
    return PlanConfig.model_validate({"global_batch": 4, "pack_window": 50, "epochs": 2, **changes})


SETTINGS = [
    pytest.param({}, id="the default"),
    pytest.param({"schedule": {"turns_per_sample": 2}}, id="progressive"),
    pytest.param({"schedule": {"turns_per_sample": 2, "cyclic": True}}, id="cyclic"),
    pytest.param({"packing": "padded"}, id="padded"),
    pytest.param({"mixture": {"sources": {"a": 2.5, "b": 0.5}}}, id="weighted sources"),
    pytest.param(
        {"schedule": {"turns_per_sample": 3, "absent_share": 0.1, "absent_share_end": 0.4}, "mixture": {"temperature": 3.0}},
        id="temperature and absent turns",
    ),
    pytest.param(
        {"phases": [{"until": 0.2, "schedule": {"kind": "all"}}, {"until": 0.55, "tasks": {"caption": 0.0}}, {"until": 1.0}]},
        id="phases",
    ),
]


def two_sources(num_rows: int = PRIME) -> list[R]:
    return [*drawn_rows(num_rows // 3, 1, source="a"), *drawn_rows(num_rows - num_rows // 3, 2, source="b")]


def cut(plan: Plan, first_step: int, last_step: int, world: int) -> list[list[int]]:
    """The packs of each rank."""
    ranks: list[list[int]] = [[] for _ in range(world)]
    for step in range(first_step, last_step):
        packs = packs_of_step(plan, step)
        for rank in range(world):
            ranks[rank] += rank_packs(packs.start, packs.stop, rank, world)
    return ranks


@pytest.mark.parametrize("changes", SETTINGS)
def test_every_document_comes_once_and_no_pack_is_too_long(changes: dict[str, Any]) -> None:
    rows = two_sources()
    plan = plan_epoch(index_of(rows), config(**changes), 1, CUTOFF)
    assert plan.packs.schema.equals(PLAN_SCHEMA)
    packs = packs_of(plan.packs)
    for pack, tokens in zip(packs, plan.packs["num_tokens"].to_pylist(), strict=True):
        assert sum(length(rows[document.row], document.turns) for document in pack) == tokens <= CUTOFF
        if changes.get("packing") == "padded":
            assert len(pack) == 1
    visits = np.bincount([document.row for pack in packs for document in pack], minlength=len(rows))
    fits = np.array(
        [
            min(length(row, [turn]) for turn in range(len(row.turns))) <= CUTOFF
            if not row.ordered
            else length(row, range(len(row.turns))) <= CUTOFF
            for row in rows
        ]
    )
    assert (visits[~fits] == 0).all()
    if not changes or set(changes) == {"packing"}:
        assert (visits[fits] == 1).all()


@pytest.mark.parametrize("changes", SETTINGS)
def test_what_the_plan_counts_is_what_it_holds(changes: dict[str, Any]) -> None:
    rows = two_sources()
    plan = plan_epoch(index_of(rows), config(**changes), 0, CUTOFF)
    counts, documents = plan.counts, documents_of(plan)
    turns = [rows[document.row].turns[turn] for document in documents for turn in document.turns]
    assert counts.documents == counts.samples == len(documents)
    assert counts.turns == len(turns)
    assert counts.packs == plan.packs.num_rows
    assert counts.steps == plan.packs["step"].to_pylist()[-1] + 1
    assert counts.tokens == sum(plan.packs["num_tokens"].to_pylist())
    assert {name: task.turns for name, task in counts.tasks.items()} == {
        task: sum(turn.task == task for turn in turns) for task in {turn.task for turn in turns}
    }
    for name, source in counts.sources.items():
        of_source = [document for document in documents if rows[document.row].source == name]
        assert source.samples == len(of_source)
        assert source.turns == sum(len(document.turns) for document in of_source)
        assert source.tokens == sum(length(rows[document.row], document.turns) for document in of_source)
    left = {reason: entry.count for reason, entry in counts.rows_left_out.items()}
    assert counts.visits == counts.samples + sum(count for reason, count in left.items() if reason != "source_weight")
    assert counts.turns_offered == counts.turns + sum(counts.turns_left_out.values())
    assert sum(phase.steps for phase in counts.phases) == counts.steps
    assert sum(phase.documents for phase in counts.phases) == counts.documents
    sizes = np.diff(plan.step_offsets)
    assert counts.last_step_packs == (0 if sizes.min() == 4 else sizes.min())
    assert 0.5 < counts.fill <= 1


# ---- what a plan does not depend on


def content(plan: Plan) -> list[tuple[int, list[Doc]]]:
    return list(zip(plan.packs["step"].to_pylist(), packs_of(plan.packs), strict=True))


@pytest.mark.parametrize("changes", SETTINGS)
def test_the_same_again_is_the_same(changes: dict[str, Any]) -> None:
    first, second = (plan_epoch(index_of(two_sources()), config(**changes), 1, CUTOFF) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert first.packs.equals(second.packs, check_metadata=True)
    assert first.counts == second.counts
    other = plan_epoch(index_of(two_sources()), config(**changes, seed=1), 1, CUTOFF)
    assert other.fingerprint != first.fingerprint
    assert plan_epoch(index_of(two_sources()), config(**changes), 0, CUTOFF).fingerprint != first.fingerprint


@pytest.mark.parametrize("changes", SETTINGS)
def test_rows_in_another_order_are_trained_on_in_the_same_order(changes: dict[str, Any]) -> None:
    rows = two_sources()
    order = np.random.default_rng(0).permutation(len(rows))
    plain = content(plan_epoch(index_of(rows), config(**changes), 1, CUTOFF))
    moved = content(plan_epoch(index_of([rows[row] for row in order]), config(**changes), 1, CUTOFF))
    assert [(step, [Doc(int(order[doc.row]), doc.turns) for doc in pack]) for step, pack in moved] == plain


@settings(max_examples=25)
@given(
    num_rows=st.integers(1, 120),
    seed=st.integers(0, 2**63 - 1),
    global_batch=st.integers(1, 9),
    window=st.integers(1, 200),
    world=st.integers(1, 12),
    limit=st.none() | st.integers(1, 5),
)
def test_any_cut_over_ranks_holds_every_pack_once(
    num_rows: int, seed: int, global_batch: int, window: int, world: int, limit: int | None
) -> None:
    rows = [R("short", (T(),)), *drawn_rows(num_rows, seed % 1000)]
    settings = config(global_batch=global_batch, pack_window=window, seed=seed, schedule={"turns_per_sample": limit})
    plan = plan_epoch(index_of(rows), settings, 0, CUTOFF)
    ranks = cut(plan, 0, plan.num_steps, world)
    assert sorted(pack for rank in ranks for pack in rank) == list(range(plan.packs.num_rows))
    documents = documents_of(plan)
    assert len({document.row for document in documents}) == len(documents)
    for step in range(plan.num_steps - 1):
        assert len(packs_of_step(plan, step)) == global_batch


@pytest.mark.parametrize("changes", SETTINGS)
def test_workers_may_come_and_go_at_any_step(changes: dict[str, Any]) -> None:
    """2 -> 4 -> 1 -> 3 workers, each time from a plan that is made anew: every document of the epoch once, in the same order of steps."""
    rows = two_sources()

    def made() -> Plan:
        return plan_epoch(index_of(rows), config(**changes), 1, CUTOFF)

    plan = made()
    whole = content(plan)
    borders = [0, plan.num_steps // 5, plan.num_steps // 2, plan.num_steps * 3 // 4, plan.num_steps]
    seen: list[int] = []
    for world, first, last in zip((2, 4, 1, 3), borders, borders[1:], strict=False):
        again = made()
        ranks = cut(again, first, last, world)
        seen += [pack for rank in ranks for pack in rank]
        assert max(map(len, ranks)) - min(map(len, ranks)) <= last - first
    assert sorted(seen) == list(range(len(whole)))
    for step in range(plan.num_steps + 1):
        remaining = made() if step % 7 == 0 else plan
        first = int(remaining.step_offsets[step])
        assert content(remaining)[first:] == [entry for entry in whole if entry[0] >= step]


def test_costs_are_even_over_ranks_and_packs_are_full() -> None:
    plan = plan_epoch(synthetic_index(30_000, 4), PlanConfig(schedule=ScheduleConfig(kind="all")), 0, 4096)
    assert plan.counts.imbalance is not None
    assert plan.counts.imbalance < 0.002
    assert plan.counts.fill > 0.995
    steps = plan.packs["cost"].to_numpy()[: plan.num_steps * 16 - 16].reshape(-1, 16)
    for world in (2, 3, 5, 8, 16):
        sums = np.stack([steps[:, rank::world].sum(axis=1) / len(range(rank, 16, world)) for rank in range(world)])
        assert (sums.max(axis=0) / sums.mean(axis=0) - 1).mean() < 0.005


# ---- schedules over a run


def difficulty_of_steps(plan: Plan, rows: Sequence[R]) -> list[float]:
    """Mean difficulty of the turns of each step."""
    found = []
    for step in range(plan.num_steps):
        of_step = packs_of_step(plan, step)
        packs = packs_of(plan.packs.slice(of_step.start, len(of_step)))
        found.append(np.mean([rows[doc.row].turns[turn].difficulty for pack in packs for doc in pack for turn in doc.turns]))
    return [float(value) for value in found]


def test_hard_turns_come_later_within_an_epoch_too() -> None:
    rows = [R(f"s/{number}", tuple(T(difficulty=(place + 0.5) / 10) for place in range(10))) for number in range(8000)]
    schedule = {"turns_per_sample": 3, "ramp": 1.0, "gate_floor": 0.0, "gate_width": 0.02, "start_competence": 0.2}
    plan = plan_epoch(index_of(rows), PlanConfig.model_validate({"schedule": schedule, "global_batch": 8}), 0, CUTOFF)
    means = np.array(difficulty_of_steps(plan, rows))
    tenths = [part.mean() for part in np.array_split(means, 10)]
    assert tenths == sorted(tenths)
    assert tenths[0] < 0.25
    assert tenths[-1] > 0.45


def test_windows_are_small_along_the_ramp_and_as_wished_behind_it() -> None:
    progress = (np.arange(100_000) + 0.5) / 100_000
    moving = ScheduleConfig(turns_per_sample=3, ramp=0.2)
    stops = window_stops(progress, moving, PlanConfig(pack_window=30_000))
    assert stops[:2] == [1250, 2500]
    assert [stop for stop in stops if stop >= 20_000] == [20_000, 50_000, 80_000, 100_000]
    assert window_stops(progress, ScheduleConfig(kind="all"), PlanConfig(pack_window=30_000)) == [30_000, 60_000, 90_000, 100_000]
    assert window_stops(progress, ScheduleConfig(gate_floor=1.0), PlanConfig(pack_window=100_000)) == [100_000]
    assert window_stops(progress[:10], moving, PlanConfig()) == [10]
    assert window_stops(progress[-10:], moving, PlanConfig()) == [10]


def test_phases_part_the_run_and_have_their_own_tasks() -> None:
    rows = [R(f"s/{number}", (T(task="detect"), T(task="caption"))) for number in range(2000)]
    phases = (
        PhaseConfig(until=0.25, tasks={"detect": 0.0}),
        PhaseConfig(until=0.75, tasks={"detect": 0.5}, schedule=ScheduleConfig(kind="all")),
        PhaseConfig(until=1.0, schedule=ScheduleConfig(turns_per_sample=1)),
    )
    plans = [plan_epoch(index_of(rows), config(phases=phases, mixture={"tasks": {"caption": 0.0}}), epoch, CUTOFF) for epoch in (0, 1)]
    first, second = (plan.counts.phases for plan in plans)
    assert [(phase.number, phase.schedule) for phase in first] == [(0, "progressive"), (1, "all")]
    assert [(phase.number, phase.schedule) for phase in second] == [(1, "all"), (2, "progressive")]
    assert [phase.documents for phase in first] == [1000, 1000]
    for plan in plans:
        phases = plan.packs["phase"].to_pylist()
        assert phases == sorted(phases)
        for phase, pack in zip(plan.packs["phase"].to_pylist(), packs_of(plan.packs), strict=True):
            turns = {document.turns for document in pack}
            if phase == 0:
                assert turns == {(1,)}, "captions alone"
            if phase == 2:
                assert turns == {(0,)}, "no caption takes part by the mixture"
    halves = [doc.turns for doc in documents_of(plans[0]) if len(doc.turns) == 2]
    assert len(halves) == pytest.approx(500, abs=80)


def test_cyclic_epochs_go_on_where_the_last_one_stopped() -> None:
    rows = [R(f"s/{number}", (T(),) * 7) for number in range(60)]
    settings = config(epochs=7, schedule={"turns_per_sample": 2, "cyclic": True})
    seen = np.zeros((60, 7), np.int64)
    for epoch in range(7):
        for document in documents_of(plan_epoch(index_of(rows), settings, epoch, CUTOFF)):
            seen[document.row, list(document.turns)] += 1
    assert (seen == 2).all()


def test_cyclic_visits_of_one_epoch_go_on_as_well() -> None:
    rows = [R(f"s/{number}", (T(),) * 6) for number in range(40)]
    settings = config(schedule={"turns_per_sample": 2, "cyclic": True}, mixture={"sources": {"set": 3.0}})
    plan = plan_epoch(index_of(rows), settings, 0, CUTOFF)
    counts = np.zeros((40, 6), np.int64)
    for document in documents_of(plan):
        counts[document.row, list(document.turns)] += 1
    assert (counts == 1).all()


def test_one_question_an_image_plans_turns_as_documents() -> None:
    rows = [R(f"s/{number}", (T(20), T(30), T(350)), 100) for number in range(50)]
    plan = plan_epoch(index_of(rows, one_question_per_image=True), config(), 0, CUTOFF)
    documents = documents_of(plan)
    assert sorted((document.row, document.turns) for document in documents) == [(row, (turn,)) for row in range(50) for turn in (0, 1)]
    assert (plan.counts.samples, plan.counts.documents) == (50, 100)
    assert plan.counts.turns_left_out == {"over_cutoff": 50}
    assert plan.packs["num_tokens"].to_pylist() == [
        sum(100 + rows[doc.row].turns[doc.turns[0]].tokens for doc in pack) for pack in packs_of(plan.packs)
    ]


def test_left_out_rows_are_counted_and_named() -> None:
    rows = [R("a", (T(),)), R("b", (T(),), base=4000), R("c", (T(), T(9000)))]
    plan = plan_epoch(index_of(rows), config(), 0, CUTOFF)
    assert plan.counts.rows_left_out["over_cutoff"].count == 1
    assert plan.counts.rows_left_out["over_cutoff"].examples == ["row 1"]
    assert plan.counts.turns_left_out == {"over_cutoff": 2}


# ---- mistakes


@pytest.mark.parametrize(
    ("rows", "changes", "epoch", "kind", "message"),
    [
        pytest.param([], {}, 0, ShardError, "shards: found no rows, expected shards with samples", id="nothing"),
        pytest.param(
            [R("a", (T(900), T(700)), 100), R("b", (T(450),) * 2, 100, ordered=True)],
            {},
            0,
            BudgetError,
            r"cutoff_len: found 400 tokens, and no sample that fits, expected at least 800, the smallest sample with one turn \(row 0\)",
            id="a cutoff below every sample",
        ),
        pytest.param([R("a", (T(),))], {}, 2, ConfigError, r"epoch: found 2, expected 0\.\.1 \(`epochs` is 2\)", id="no such epoch"),
        pytest.param(
            [R("a", (T(),)), R("b", (T(),))],
            {"epochs": 1.1},
            1,
            ConfigError,
            r"epochs: found 1\.1, a last part of an epoch without a sample, expected a part that is a multiple of 1/2",
            id="a part of an epoch too short for a sample",
        ),
        pytest.param([R("a", (T(),))], {"mixture": {"sources": {"set": 0}}}, 0, ConfigError, "weights that leave no row", id="no source"),
        pytest.param(
            [R("a", (T(),))],
            {"mixture": {"tasks": {"detect": 0}}},
            0,
            ConfigError,
            "found no sample left: 0 over the cutoff, 1 by the tasks' shares",
            id="no task",
        ),
        pytest.param(
            [R("a", (T(task="absent"),))],
            {"schedule": {"absent_share": 0.0}},
            0,
            ConfigError,
            "1 by the share of absent turns",
            id="only absent turns",
        ),
        pytest.param(
            [R("a", (T(),)), R("b", (T(),))],
            {"phases": [{"until": 0.1}, {"until": 1.0}]},
            0,
            ConfigError,
            r"phases\[0\]: found no sample between 0 and 0\.1 of the run",
            id="a phase too short for a sample",
        ),
    ],
)
def test_a_plan_that_cannot_be_says_why(rows: list[R], changes: dict[str, Any], epoch: int, kind: type, message: str) -> None:
    index = index_of(rows) if rows else synthetic_index(0, 1)
    with pytest.raises(kind, match=message):
        plan_epoch(index, config(**changes), epoch, CUTOFF)


@pytest.mark.parametrize("changes", SETTINGS)
def test_the_last_epoch_may_be_a_part_of_one(changes: dict[str, Any]) -> None:
    """It visits the first samples of that epoch's order, ramps and phases end with it, and its counts add up."""
    rows, settings = two_sources(), config(**changes, epochs=1.25)
    index = index_of(rows)
    last = plan_epoch(index, settings, 1, CUTOFF)
    whole = plan_epoch(index, config(**changes), 1, CUTOFF)
    assert last.counts.visits == pytest.approx(whole.counts.visits / 4, abs=0.51)
    without_source = [left.count for name, left in last.counts.rows_left_out.items() if name != "source_weight"]
    assert last.counts.samples + sum(without_source) == last.counts.visits
    assert last.counts.turns + sum(last.counts.turns_left_out.values()) == last.counts.turns_offered
    assert last.counts.phases[-1].number == max(0, len(settings.phases) - 1)
    here, there = ({document.row for document in documents_of(plan)} for plan in (last, whole))
    if "phases" not in changes:  # whose tasks, and so the rows, hang on the progress
        assert here <= there
    content = content_of_epoch(index, settings, 1, CUTOFF)
    counts = last.counts
    assert (content.visits, content.documents, content.turns, content.tokens, content.contested) == (
        counts.visits,
        counts.documents,
        counts.turns,
        counts.tokens,
        counts.contested_samples,
    )


def test_contents_are_equal_where_the_chosen_turns_are() -> None:
    index = index_of(two_sources())

    def digest(**schedule: Any) -> str:
        return content_of_epoch(index, config(schedule=schedule), 0, CUTOFF).digest

    assert digest(kind="all") == digest(kind="uniform") == digest(kind="progressive", gate_floor=1.0)
    chosen = [digest(kind=kind, turns_per_sample=2) for kind in ("uniform", "progressive", "random_paced", "anti")]
    assert len({digest(kind="all"), *chosen}) == 5


def test_the_smallest_sample_is_found() -> None:
    rows = [R("a", (T(50), T(40)), 100), R("b", (T(10), T(20)), 90, ordered=True), R("c", (T(30),), 100)]
    assert smallest_sample(index_of(rows)) == (90 + 10 + 3 + 20, 1)


# ---- on disk


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    settings = TrainConfig(output="runs", epochs=2, schedule=ScheduleConfig(turns_per_sample=2))
    plan = plan_epoch(index_of(two_sources()), settings, 1, CUTOFF)
    path = tmp_path / "plan.arrow"
    write_plan(path, plan)
    again = read_plan(path)
    assert again.packs.equals(plan.packs, check_metadata=True)
    assert (again.counts, again.epoch, again.seed, again.cutoff_len, again.settings, again.fingerprint) == (
        plan.counts,
        1,
        0,
        CUTOFF,
        plan.settings,
        plan.fingerprint,
    )
    assert again.step_offsets.tolist() == plan.step_offsets.tolist()
    assert again.settings["schedule"]["turns_per_sample"] == 2
    assert "output" not in again.settings, "the plan's own settings alone"
    write_plan(tmp_path / "again.arrow", again)
    assert (tmp_path / "again.arrow").read_bytes() == path.read_bytes()


def test_a_damaged_plan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.arrow"
    write_plan(path, plan_epoch(index_of(two_sources()), config(), 0, CUTOFF))
    data = path.read_bytes()
    rows = data.index(np.array(read_plan(path).packs["documents"].to_pylist()[0][0]["row"], np.int64).tobytes())
    path.write_bytes(data[:rows] + b"\x7f" + data[rows + 1 :])
    with pytest.raises(ShardError, match=r"plan\.arrow"):
        read_plan(path)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ShardError, match="a plan that cannot be read"):
        read_plan(path)
    with pytest.raises(ShardError, match="cannot be read"):
        read_plan(tmp_path / "none.arrow")


def test_another_arrow_file_is_no_plan(tmp_path: Path) -> None:
    table = pa.table({"a": [1]})
    with pa.ipc.new_file(str(tmp_path / "other.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ShardError, match="another kind or version of file, expected a plan of version 1"):
        read_plan(tmp_path / "other.arrow")
