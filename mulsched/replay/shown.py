"""What plots of single requests show, reduced to what a picture can hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mulsched.replay.results import RequestReader, Results, Row

__all__ = ["PROBABILITIES", "Shown", "batch_over_time", "load_shown", "shown_rows"]

Floats = NDArray[np.float64]

PROBABILITIES: Floats = np.concatenate([np.linspace(0, 0.99, 331), np.linspace(0.99, 1, 101)[1:]])
"""Where CDFs are sampled: steps of .003, and of .0001 in the last hundredth."""

_BINS = 240


@dataclass(frozen=True, slots=True)
class Shown:
    """A row's first run: quantiles at ``PROBABILITIES`` and the load of each instance over time.

    ``tpot_s`` is None where no request has a second token. ``batch``: shape (n_instances, bins), the mean
    number of requests at an instance from arrival to first token, and from there to the end where it decodes,
    until ``until_s``: the end of the run, but at most
    a quarter longer than requests arrive, or an overloaded policy would squeeze the others.
    """

    row: Row
    ttft_s: Floats
    tpot_s: Floats | None
    batch: Floats
    until_s: float


def shown_rows(results: Results) -> list[Row]:
    """Return the rows at the reference rate, of a sweep only the best by mean TTFT x mean TPOT."""
    rows = results.at(results.reference_rate)
    best: dict[str, Row] = {}
    for row in rows:
        kept = best.get(row.series)
        if kept is None or _balanced(row.figures) < _balanced(kept.figures):
            best[row.series] = row
    return [row for row in rows if row.role == "result" or row is best[row.series]]


def _balanced(figures: Mapping[str, float]) -> float:
    return figures["ttft_mean_s"] * figures["tpot_mean_s"]


def load_shown(results: Results, requests: RequestReader) -> list[Shown]:
    """Read what is shown, one run at a time. Raises ResultsError."""
    return [_shown(results, row, requests.read(results.runs[row.runs[0]])) for row in shown_rows(results)]


def _shown(results: Results, row: Row, columns: Mapping[str, NDArray[Any]]) -> Shown:
    ttft = columns["first_token_s"] - columns["arrival_s"]
    gaps = columns["output_tokens"] - 1
    several = gaps > 0
    tpot = (columns["finish_s"] - columns["first_token_s"])[several] / gaps[several]
    end, last_arrival = float(columns["finish_s"].max()), float(columns["arrival_s"].max())
    until = min(end, 1.25 * last_arrival) if last_arrival > 0 else end
    instances = int(results.settings["instances"])
    return Shown(
        row=row,
        ttft_s=np.quantile(ttft, PROBABILITIES),
        tpot_s=np.quantile(tpot, PROBABILITIES) if len(tpot) else None,
        batch=np.array(
            [
                _stay(columns, "instance", i, "arrival_s", "first_token_s", until)
                + _stay(columns, "decode_instance", i, "first_token_s", "finish_s", until)
                for i in range(instances)
            ]
        ),
        until_s=until,
    )


def _stay(
    columns: Mapping[str, NDArray[Any]], where: str, i: int, since: str, to: str, until: float
) -> Floats:
    """Return the load of those who are at instance i from one of their times to another."""
    there = columns[where] == i
    return batch_over_time(columns[since][there], columns[to][there], until, _BINS)


def batch_over_time(arrival_s: Floats, finish_s: Floats, until_s: float, bins: int) -> Floats:
    """Return the mean number of requests that are there in each of ``bins`` equal parts of ``0..until_s``.

    Each request counts from its arrival to its end, in proportion where it covers part of a bin.
    O(n log n + bins log n) for n requests.
    """
    edges = np.linspace(0, until_s, bins + 1)
    request_seconds = _elapsed(arrival_s, edges) - _elapsed(finish_s, edges)
    batch: Floats = np.diff(request_seconds) / (until_s / bins)
    return np.maximum(batch, 0.0)  # rounding may leave -1e-12


def _elapsed(start_s: Floats, at_s: Floats) -> Floats:
    """Return the sum, over all starts before each time, of the time since."""
    starts = np.sort(start_s)
    sums = np.concatenate([[0.0], np.cumsum(starts)])
    before = np.searchsorted(starts, at_s)
    elapsed: Floats = before * at_s - sums[before]
    return elapsed
