"""Figures of one replay that a report does not have: load by instance over time, recovery after a burst."""

import numpy as np
from numpy.typing import NDArray

from mulsched.replay import ReplayResult

Floats = NDArray[np.float64]

WINDOW_S = 10.0
WARM_UP_S = 20.0  # of an empty cluster, left out of what counts as calm
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
    "preemptions",
)
"""Of :meth:`ReplayResult.summary`, in the rows of a result file."""
JUDGED = ("ttft_mean_s", "ttft_p99_s", "tpot_mean_s", "tpot_p99_s")


def in_flight(result: ReplayResult, times: Floats) -> NDArray[np.int64]:
    """Return how many requests each instance has at each time, shape ``(n_times, n_instances)``."""
    counts = np.empty((len(times), result.instances), dtype=np.int64)
    for i in range(result.instances):
        here = result.instance == i
        come = np.sort(result.arrival_s[here])
        gone = np.sort(result.finish_s[here])
        counts[:, i] = np.searchsorted(come, times, "right") - np.searchsorted(gone, times, "right")
    return counts


def burst_spread(result: ReplayResult, window: tuple[float, float]) -> float:
    """Return the busiest instance's requests that arrived in the window over the mean one's."""
    inside = (result.arrival_s >= window[0]) & (result.arrival_s < window[1])
    counts = np.bincount(result.instance[inside], minlength=result.instances)
    return float(counts.max() / counts.mean())


def recovery_s(starts: Floats, levels: Floats, window: tuple[float, float]) -> float:
    """Return how long after the window's end a level is back where it was before the window; NaN for never.

    ``levels``: means over ``WINDOW_S`` from ``starts`` on, NaN where there is nothing. Back is the first mean
    after the end that does not exceed the largest one between the warm-up and the window's start.
    """
    calm = levels[(starts >= WARM_UP_S) & (starts + WINDOW_S <= window[0])]
    after = (starts >= window[1]) & (levels <= np.nanmax(calm))
    return float(starts[after][0] - window[1]) if after.any() else float("nan")


def window_starts(result: ReplayResult) -> Floats:
    """Return a window's start each second, the last within the arrivals."""
    return np.arange(0.0, max(1.0, float(result.arrival_s.max()) - WINDOW_S))


def ttft_levels(result: ReplayResult, background: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Return window starts, and the mean TTFT of the background's requests that arrive in each."""
    starts = window_starts(result)
    arrival, ttft = result.arrival_s[background], result.ttft_s[background]
    total = np.concatenate([[0.0], np.cumsum(ttft)])
    first, last = np.searchsorted(arrival, starts), np.searchsorted(arrival, starts + WINDOW_S)
    n = np.where(last > first, last - first, np.nan)
    return starts, (total[last] - total[first]) / n


def batch_levels(result: ReplayResult) -> tuple[Floats, Floats]:
    """Return window starts, and the mean over each of the fullest instance's requests, by the second."""
    starts = window_starts(result)
    fullest = in_flight(result, np.arange(len(starts) + WINDOW_S)).max(axis=1)
    total = np.concatenate([[0.0], np.cumsum(fullest)])
    width = int(WINDOW_S)
    return starts, (total[width : width + len(starts)] - total[: len(starts)]) / width


def burst_figures(
    result: ReplayResult, background: NDArray[np.bool_], window: tuple[float, float] | None
) -> dict[str, float]:
    """Return the figures of a burst by name, NaN without a window."""
    if window is None:
        return dict.fromkeys(BURST_FIGURES, float("nan"))
    values = (
        burst_spread(result, window),
        recovery_s(*ttft_levels(result, background), window),
        recovery_s(*batch_levels(result), window),
    )
    return dict(zip(BURST_FIGURES, values, strict=True))


BURST_FIGURES = ("burst_spread", "ttft_recovery_s", "batch_recovery_s")
