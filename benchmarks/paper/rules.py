"""Pure rules of the comparison: the maximum rate, the noise floor, verdicts, who loses."""

import math
from collections.abc import Callable, Mapping, Sequence

SERVED_SHARE = 0.95
RATE_TOLERANCE = 1.06
STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}  # two-sided, 95 %

FIGURES = (
    "ttft_mean_s",
    "ttft_p50_s",
    "ttft_p95_s",
    "ttft_p99_s",
    "tpot_mean_s",
    "tpot_p50_s",
    "tpot_p95_s",
    "tpot_p99_s",
    "requests_per_s",
    "hit_ratio",
    "request_spread",
    "prefill_spread",
    "preemptions",
)
JUDGED = ("ttft_mean_s", "ttft_p99_s", "tpot_mean_s", "tpot_p99_s")
"""Figures by which one policy beats another: smaller is better."""


def largest_rate(
    served: Callable[[float], float], *, start: float = 1.0, tolerance: float = RATE_TOLERANCE
) -> float:
    """Return the largest scale of the rate at which ``served`` is at least SERVED_SHARE, by bisection.

    ``served(scale)`` falls with the scale. The result serves enough; ``tolerance`` times it does not.
    """
    good, bad = start, start
    while served(good) < SERVED_SHARE:
        bad, good = good, good / 2
    while bad <= good or served(bad) >= SERVED_SHARE:
        good, bad = max(good, bad), max(good, bad) * 2
    while bad / good > tolerance:
        middle = math.sqrt(good * bad)
        if served(middle) >= SERVED_SHARE:
            good = middle
        else:
            bad = middle
    return good


def objective(figures: Mapping[str, float]) -> float:
    """Return what tuning makes smallest: the geometric mean of mean TTFT and mean TPOT."""
    return math.sqrt(figures["ttft_mean_s"] * figures["tpot_mean_s"])


def mean(values: Sequence[float]) -> float:
    """Return the mean."""
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """Return the sample standard deviation; needs two values."""
    centre = mean(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1))


def interval(values: Sequence[float]) -> float:
    """Return half the width of the 95 % confidence interval of the mean."""
    return STUDENT_T[len(values) - 1] * deviation(values) / math.sqrt(len(values))


def noise_floor(values: Sequence[float]) -> float:
    """Return the noise floor of a figure, as a share of its mean: the 95 % interval of one more run.

    ``t * s * sqrt(1 + 1/n) / mean`` of n repeats. A single run of another policy that lies within it of the
    mean of the repeats does not differ from them.
    """
    centre = mean(values)
    if centre == 0:
        return 0.0
    spread = STUDENT_T[len(values) - 1] * deviation(values) * math.sqrt(1 + 1 / len(values))
    return spread / abs(centre)


def change(ours: float, theirs: float) -> float:
    """Return by how much ``ours`` is above ``theirs``, as a share of theirs; negative is better."""
    return ours / theirs - 1


def compare(other: float, reference: float, floor: float) -> str:
    """Return whether another policy's figure is "better", "worse" or "same" as the reference's mean."""
    difference = change(other, reference)
    if abs(difference) <= floor:
        return "same"
    return "better" if difference < 0 else "worse"


def verdict(paper: float, changes: Sequence[float]) -> str:
    """Return whether a claimed change is reproduced, by the changes on each trace.

    Reproduced: the median trace has at least four fifths of it. In part: the median has half of it, or the
    trace where it is largest has four fifths. Else not.
    """
    shares = sorted(c / paper for c in changes)
    n = len(shares)
    median = (shares[(n - 1) // 2] + shares[n // 2]) / 2
    if median >= 0.8:
        return "reproduced"
    if median >= 0.5 or shares[-1] >= 0.8:
        return "in part"
    return "not reproduced"
