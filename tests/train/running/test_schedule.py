"""Learning rates, the loss watch, early stopping."""

import pytest

from boxcar.schemas.training import EarlyStopConfig, LearningRateConfig, LossWatchConfig
from boxcar.train.running.schedule import EarlyStop, LossWatch, rate_factor


@pytest.mark.parametrize(
    ("schedule", "final", "expected"),
    [
        ("constant", 0.0, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", 0.0, [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("linear", 0.2, [0.5, 1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]),
        ("cosine", 0.0, [0.5, 1.0, 1.0, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060]),
    ],
    ids=["constant", "linear", "linear to a fifth", "cosine"],
)
def test_rates_over_ten_steps(schedule: str, final: float, expected: list[float]) -> None:
    config = LearningRateConfig.model_validate({"schedule": schedule, "warmup": 0.2, "final": final})
    assert [rate_factor(step, 10, config) for step in range(10)] == pytest.approx(expected, abs=1e-5)


WATCH = LossWatchConfig(factor=1.3, steps=3, smoothing=0.01)


def _watch(losses: list[dict[str, float]]) -> list[tuple[str, int] | None]:
    watch = LossWatch()
    return [watch.see(step, loss, WATCH) for step, loss in enumerate(losses, start=1)]


def test_a_loss_that_rises_is_reported_once_with_its_bin_and_the_last_low_step() -> None:
    found = _watch([{"easy": value} for value in (2.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0)])
    assert found == [None, None, None, None, None, ("easy", 3), None]


def test_a_harder_mix_is_no_rise() -> None:
    found = _watch([{"easy": 1.0}, {"easy": 1.0}, {"hard": 3.0}, {"hard": 3.0}, {"hard": 3.0}, {"easy": 1.0, "hard": 3.0}])
    assert found == [None] * 6


def test_a_short_bump_is_no_rise() -> None:
    assert _watch([{"easy": value} for value in (1.0, 2.0, 2.0, 1.0, 2.0, 2.0, 1.0)]) == [None] * 7


def test_a_watch_goes_on_from_its_state() -> None:
    losses = [{"easy": value} for value in (2.0, 1.0, 2.0, 2.0, 2.0)]
    watch = LossWatch()
    for step in (1, 2, 3):
        watch.see(step, losses[step - 1], WATCH)
    again = LossWatch.of(watch.state())
    assert [again.see(step, losses[step - 1], WATCH) for step in (4, 5)] == [None, ("easy", 2)]


@pytest.mark.parametrize(
    ("mode", "values", "stops"),
    [
        ("min", [3.0, 2.0, 2.5, 2.5], [False, False, False, True]),
        ("max", [0.1, 0.5, 0.4, 0.6, 0.6, 0.6], [False, False, False, False, False, True]),
        ("max", [0.5, 0.505, 0.508], [False, False, True]),
    ],
    ids=["loss", "accuracy", "too little gain"],
)
def test_early_stop(mode: str, values: list[float], stops: list[bool]) -> None:
    config = EarlyStopConfig.model_validate({"mode": mode, "patience": 2, "min_delta": 0.01})
    state = EarlyStop()
    assert [state.see(value, config) for value in values] == stops
