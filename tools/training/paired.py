"""Means, spreads and paired differences of a few repeated runs. Plain numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

LEVEL = 0.95
MIN_PAIRS = 3
"""With two pairs the interval of 95 % is 12.7 standard errors wide to either side, and one says nothing."""


@dataclass(frozen=True)
class Summary:
    """Of the values of some runs."""

    mean: float
    sd: float | None
    """Standard deviation of a sample (n - 1); None of a single value."""


@dataclass(frozen=True)
class Difference:
    """Of pairs of runs of the same seeds: first minus second."""

    first: str
    second: str
    by_pair: tuple[float, ...]
    mean: float
    sd: float | None
    low: float | None
    high: float | None
    """Interval of LEVEL for the mean by Student's t; None with fewer than MIN_PAIRS pairs."""

    @property
    def told_apart(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def summary(values: Sequence[float]) -> Summary:
    """values: at least one."""
    return Summary(fmean(values), stdev(values) if len(values) > 1 else None)


def difference(first: str, second: str, first_values: Sequence[float], second_values: Sequence[float]) -> Difference:
    """Values of two kinds of runs, by seed in the same order. Pairs share shuffling, choices by hash and initial weights, and so their
    differences spread less than the values do."""
    pairs = tuple(one - other for one, other in zip(first_values, second_values, strict=True))
    found = summary(pairs)
    low = high = None
    if len(pairs) >= MIN_PAIRS and found.sd is not None:
        reach = student_t_quantile(LEVEL, len(pairs) - 1) * found.sd / math.sqrt(len(pairs))
        low, high = found.mean - reach, found.mean + reach
    return Difference(first, second, pairs, found.mean, found.sd, low, high)


def student_t_quantile(level: float, degrees: int) -> float:
    """The t for which P(|T| <= t) = level. level: in (0, 1). degrees: of freedom, at least 1.

    By bisection of the distribution, which has a closed form for whole degrees; neither the standard library, NumPy nor torch has the
    quantile, and SciPy for this alone would be a large guest.
    """
    low, high = 0.0, 1.0
    while _within(high, degrees) < level:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _within(middle, degrees) < level else (low, middle)
    return high


def _within(t: float, degrees: int) -> float:
    """P(|T| <= t): Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 (odd degrees) and 26.7.4 (even)."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine, sine = math.cos(angle), math.sin(angle)
    term = cosine if degrees % 2 else 1.0
    total = 0.0
    for power in range(1 + degrees % 2, degrees, 2):
        total += term
        term *= cosine**2 * power / (power + 1)
    return 2 / math.pi * (angle + sine * total) if degrees % 2 else sine * total
