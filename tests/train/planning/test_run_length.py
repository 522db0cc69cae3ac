"""Runs of a number of tokens: as near as whole samples allow, with every schedule, shorter and longer than the workflow says."""

from typing import Any

import pytest

from boxcar.schemas.training import PlanConfig
from boxcar.train.planning.index import PlanIndex
from boxcar.train.planning.plan import plan_epoch
from boxcar.train.planning.run_length import contents_of_run, epochs_for_tokens
from tests.small_index import R, T, drawn_rows, index_of

CUTOFF = 400
SCHEDULES = [
    pytest.param({"kind": "all"}, id="all"),
    pytest.param({"kind": "uniform", "turns_per_sample": 2}, id="uniform"),
    pytest.param({"turns_per_sample": 2, "gate_floor": 0.03, "ramp": 0.5}, id="a strict gate"),
    pytest.param({"turns_per_sample": 1, "turns_per_sample_end": 6, "ramp": 1.0}, id="more and more turns"),
    pytest.param({"turns_per_sample": 2, "cyclic": True}, id="cyclic"),
]


def tokens_of_run(index: PlanIndex, settings: PlanConfig) -> int:
    return sum(content.tokens for content in contents_of_run(index, settings))


def config(**changes: Any) -> PlanConfig:
    return PlanConfig.model_validate({"cutoff_len": CUTOFF, "global_batch": 4, "epochs": 3, **changes})


@pytest.mark.parametrize("share", [0.04, 0.3, 1.0, 1.7])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_has_the_tokens_that_are_asked_for(schedule: dict[str, Any], share: float) -> None:
    index, settings = index_of(drawn_rows(300)), config(schedule=schedule)
    wanted = int(tokens_of_run(index, settings) * share)
    epochs = epochs_for_tokens(index, settings, wanted)
    found = tokens_of_run(index, settings.model_copy(update={"epochs": epochs}))
    assert abs(found - wanted) <= CUTOFF, "a pack is the most that a sample can have"
    if share == 1.0:
        assert epochs == 3


def test_what_is_counted_is_what_is_planned() -> None:
    index, settings = index_of(drawn_rows(200)), config(schedule={"turns_per_sample": 2}, mixture={"sources": {"set": 1.3}})
    epochs = epochs_for_tokens(index, settings, 50_000)
    settings = settings.model_copy(update={"epochs": epochs})
    planned = [plan_epoch(index, settings, epoch).counts.tokens for epoch in range(settings.num_epochs)]
    assert sum(planned) == tokens_of_run(index, settings)
    assert sum(planned) == pytest.approx(50_000, abs=CUTOFF)


@pytest.mark.parametrize(("tokens", "epochs"), [(1, 0.25), (60, 0.25), (130, 0.25), (190, 0.5), (480, 1), (600, 1.25), (5000, 10.5)])
def test_a_run_ends_between_samples(tokens: int, epochs: float) -> None:
    """Four samples of 120 tokens: the nearest number of them, at least one."""
    index = index_of([R(f"{number}", (T(20),), 100) for number in range(4)])
    assert epochs_for_tokens(index, config(schedule={"kind": "all"}), tokens) == epochs


def test_a_whole_number_of_epochs_stays_one() -> None:
    index = index_of([R(f"{number}", (T(20),), 100) for number in range(4)])
    found = epochs_for_tokens(index, config(epochs=1.5, schedule={"kind": "all"}), 960)
    assert isinstance(found, int)
    assert found == 2
