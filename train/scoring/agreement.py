"""How far raters agree, and how sure a rate is."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class Kappa:
    """Cohen's kappa of two raters."""

    kappa: float | None
    """1: they always agree; 0: as often as by chance; below: less. None: not defined, both gave one and the same answer throughout."""
    observed: float
    """Share of the items that both rated alike."""
    expected: float
    """The share that chance would give, from how often each rater gives each answer."""
    num: int
    """Items that both rated."""


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> Kappa:
    """Agreement of two raters on the same items, beyond chance: (observed - expected) / (1 - expected) (Cohen 1960).

    first[i] and second[i] are the answers to item i, of any kinds that can be compared. Raises ValueError where they are of different
    length or empty.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} ratings, expected as many of both, one at least")
    num = len(first)
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / num
    of_first, of_second = Counter(first), Counter(second)
    # In whole numbers: that chance alone makes them agree must not hang on a rounding.
    by_chance = sum(count * of_second[answer] for answer, count in of_first.items())
    kappa = None if by_chance == num * num else (observed - by_chance / num**2) / (1 - by_chance / num**2)
    return Kappa(kappa, observed, by_chance / num**2, num)


def wilson_interval(hits: int, num: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a rate (1927): unlike the rate plus and minus its error, it stays within [0, 1] and is honest at 0 of n.

    hits of num; num 0 gives (0, 1): nothing is known. Raises ValueError where hits are not in 0..num or confidence not in (0, 1).
    """
    if not 0 <= hits <= num or not 0 < confidence < 1:
        raise ValueError(f"{hits} of {num} at confidence {confidence}, expected 0 <= hits <= num and 0 < confidence < 1")
    if num == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = hits / num
    middle = (rate + z * z / (2 * num)) / (1 + z * z / num)
    half = z * math.sqrt(rate * (1 - rate) / num + z * z / (4 * num * num)) / (1 + z * z / num)
    # At the ends the bound is the end itself; rounding would miss it by a hair.
    return (0.0 if hits == 0 else max(0.0, middle - half)), (1.0 if hits == num else min(1.0, middle + half))
