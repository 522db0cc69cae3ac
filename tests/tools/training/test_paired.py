"""Means, spreads and intervals, against printed tables and by hand."""

import math

import pytest

from boxcar.tools.training.paired import difference, student_t_quantile, summary

PRINTED = {
    # NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2: upper critical values of Student's t.
    0.95: {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 9: 2.262, 10: 2.228, 19: 2.093, 30: 2.042, 100: 1.984},
    0.99: {1: 63.657, 2: 9.925, 3: 5.841, 4: 4.604, 9: 3.250, 30: 2.750},
    0.80: {1: 3.078, 2: 1.886, 5: 1.476, 10: 1.372},
}


@pytest.mark.parametrize(
    ("level", "degrees", "printed"),
    [(level, degrees, printed) for level, row in PRINTED.items() for degrees, printed in row.items()],
)
def test_quantiles_are_those_of_printed_tables(level: float, degrees: int, printed: float) -> None:
    assert round(student_t_quantile(level, degrees), 3) == printed


def test_a_quantile_of_one_degree_is_that_of_cauchy() -> None:
    assert student_t_quantile(0.95, 1) == pytest.approx(math.tan(0.95 * math.pi / 2), rel=1e-12)


def test_an_interval_by_hand() -> None:
    """Differences 1, 2, 3, 6: mean 3, sd sqrt(14/3), t(3) = 3.18245; so 3 +- 3.18245 * sqrt(14/3) / 2."""
    found = difference("a", "b", [11, 22, 33, 46], [10, 20, 30, 40])
    assert (found.by_pair, found.mean) == ((1, 2, 3, 6), 3)
    assert found.sd == pytest.approx(math.sqrt(14 / 3))
    assert found.low == pytest.approx(-0.43743, abs=1e-5)
    assert found.high == pytest.approx(6.43743, abs=1e-5)
    assert not found.told_apart


@pytest.mark.parametrize(
    ("first", "second", "told_apart"),
    [
        pytest.param([1.0, 2.0, 3.0], [1.5, 2.5, 3.6], True, id="pairs differ alike, though values spread"),
        pytest.param([1.5, 2.5, 3.6], [1.0, 2.0, 3.0], True, id="the other way"),
        pytest.param([1.0, 2.0, 3.0], [1.5, 1.5, 3.6], False, id="not alike"),
        pytest.param([1.0, 2.0], [1.5, 2.5], False, id="two pairs have no interval"),
        pytest.param([1.0], [9.0], False, id="one pair"),
    ],
)
def test_what_is_told_apart(first: list[float], second: list[float], told_apart: bool) -> None:
    found = difference("a", "b", first, second)
    assert found.told_apart is told_apart
    assert (found.low is None) == (len(first) < 3)


def test_one_value_has_no_spread() -> None:
    assert summary([4.0]).sd is None
    assert summary([4.0, 6.0]).sd == pytest.approx(math.sqrt(2))
