"""How far a figure moves when nothing but chance changes, and whether two figures differ by more."""

import math
from collections.abc import Sequence

from mulsched.errors import InvalidArgument

__all__ = ["LEVEL", "PUBLISHED_NOISE", "half_width", "student_t", "welch_half_width"]

LEVEL = 0.95
"""Level of every interval, two-sided."""

PUBLISHED_NOISE = {"mean": 0.023, "p99": 0.062}
"""What tie order alone moved TTFT by in independent tests of LMetric: means by 1.3-2.3 %, 99th percentiles by
2.4-6.2 %. The upper ends; that TPOT and goodput are no quieter is assumed."""


def student_t(degrees: int) -> float:
    """Return the t that Student's distribution stays within, on both sides, with probability ``LEVEL``.

    By bisection of the finite sums for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4), to
    ten digits. O(degrees). Raises InvalidArgument for degrees below 1.
    """
    if degrees < 1:
        raise InvalidArgument(f"degrees of freedom must be at least 1, got {degrees}")
    low, high = 0.0, 16.0  # 12.7 with one degree of freedom, less with more
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < LEVEL else (low, middle)
    return (low + high) / 2


def _within(t: float, degrees: int) -> float:
    """Return the probability that Student's distribution lies in ``-t..t``."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine = math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(odd, degrees - 1, 2):
        total += term
        term *= cosine**2 * (k + 1) / (k + 2)
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def _variance_of_mean(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)


def half_width(values: Sequence[float]) -> float:
    """Return half the width of the mean's confidence interval, by Student's t; NaN for a single value."""
    if len(values) < 2:
        return math.nan
    return student_t(len(values) - 1) * math.sqrt(_variance_of_mean(values))


def welch_half_width(first: Sequence[float], second: Sequence[float]) -> float:
    """Return half the width of the confidence interval of the difference of two means; NaN below two values.

    Welch's, so the spreads may differ. Degrees of freedom by Welch and Satterthwaite, rounded down.
    """
    if len(first) < 2 or len(second) < 2:
        return math.nan
    one, other = _variance_of_mean(first), _variance_of_mean(second)
    if one + other == 0:
        return 0.0
    degrees = (one + other) ** 2 / (one**2 / (len(first) - 1) + other**2 / (len(second) - 1))
    return student_t(max(1, int(degrees + 1e-9))) * math.sqrt(one + other)
