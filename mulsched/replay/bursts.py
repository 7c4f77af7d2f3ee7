"""Synthetic bursts of hot prefixes: the traffic in which a cache-aware score may herd.

A background workload runs all along at its own rate. On top of it come classes of requests that share a
prefix, each from its start to its end, so many that they make up a given share of all arrivals. One request
of each class comes ahead of its burst, so that the burst finds its prefix on one instance and no other.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from mulsched.errors import InvalidArgument
from mulsched.replay.synthetic import BLOCK_SIZE, WORKLOADS, check_positive, synthetic_trace
from mulsched.replay.trace import Floats, Ints, Trace

__all__ = ["BURSTS", "Burst", "HotClass", "burst_trace", "steady_burst"]

_LEAD_S = 20.0  # time for the first request's prefill, and for its answer if that is not long
_SIGMA = 0.5  # of the lognormal lengths of suffixes and answers: arbitrary, the answers of chat have .66


@dataclass(frozen=True, slots=True)
class HotClass:
    """Requests that share a prefix, and when they come.

    ``share_ratio``: of all arrivals, while the class is at its height. ``trunk_tokens``: the shared prefix,
    of which the first ``common_tokens`` are shared with the other classes that have some; both are rounded
    down to whole blocks of 16. ``suffix_tokens`` and ``output_tokens``: medians of lognormals with sigma .5;
    a suffix of 0 makes all prompts of the class equal. From ``start_s`` the rate rises linearly for
    ``ramp_s``, stays, and drops to nothing at ``end_s``. ``seeded``: one request comes 20 s before the start.
    Raises InvalidArgument.
    """

    share_ratio: float
    trunk_tokens: int
    suffix_tokens: int
    output_tokens: int
    start_s: float
    end_s: float
    ramp_s: float = 0.0
    common_tokens: int = 0
    seeded: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.share_ratio < 1:
            raise InvalidArgument(f"share_ratio must lie between 0 and 1, got {self.share_ratio}")
        if not 0 <= self.start_s < self.end_s < math.inf or not 0 <= self.ramp_s <= self.end_s - self.start_s:
            raise InvalidArgument(
                f"a class needs 0 <= start_s < end_s and a ramp within, got {self.start_s}, {self.end_s} and "
                f"ramp_s {self.ramp_s}"
            )
        if not 0 <= self.common_tokens <= self.trunk_tokens or self.trunk_tokens < BLOCK_SIZE:
            raise InvalidArgument(
                f"trunk_tokens must be at least {BLOCK_SIZE} and hold common_tokens, got {self.trunk_tokens} "
                f"and {self.common_tokens}"
            )
        if self.suffix_tokens < 0 or self.output_tokens < 1:
            raise InvalidArgument(
                "suffix_tokens must be at least 0 and output_tokens at least 1, got "
                f"{self.suffix_tokens} and {self.output_tokens}"
            )


@dataclass(frozen=True, slots=True)
class Burst:
    """A background, one of ``WORKLOADS``, the hot classes on top of it, and how long to watch.

    The shares add up to less than 1. Raises InvalidArgument.
    """

    background: str
    hot: tuple[HotClass, ...]
    duration_s: float = 180.0

    def __post_init__(self) -> None:
        if self.background not in WORKLOADS:
            raise InvalidArgument(
                f"background must be one of {', '.join(WORKLOADS)}, got {self.background!r}"
            )
        total = math.fsum(hot.share_ratio for hot in self.hot)
        if not self.hot or total >= 1:
            raise InvalidArgument(
                f"a burst needs hot classes with shares that add up to less than 1, got {len(self.hot)} with "
                f"{total:g} in all"
            )
        check_positive(duration_s=self.duration_s)


def _between(share_ratio: float, trunk: int, suffix: int, output: int) -> HotClass:
    return HotClass(share_ratio, trunk, suffix, output, start_s=45.0, end_s=120.0)


def _thinking(share_ratio: float) -> HotClass:
    return HotClass(share_ratio, 16_384, 128, 3600, start_s=120.0, end_s=540.0)


BURSTS = {
    "hot_class": Burst("chat", (_between(0.4, 16_384, 128, 300),)),
    "hot_classes": Burst("chat", (_between(0.05, 16_384, 128, 300),) * 8),
    "hot_long_output": Burst("chat", (_between(0.4, 16_384, 128, 1500),)),
    "hot_growing": Burst("chat", (replace(_between(0.6, 16_384, 128, 600), ramp_s=75.0),)),
    "hot_common_trunk": Burst("chat", (replace(_between(0.08, 16_384, 128, 600), common_tokens=12_288),) * 5),
    "hot_short_trunk": Burst("chat", (_between(0.4, 4096, 128, 300),)),
    "hot_identical": Burst("chat", (replace(_between(0.5, 16_384, 0, 300), seeded=False),)),
    "hot_everywhere": Burst(
        "chat", (replace(_between(0.2, 4096, 0, 300), start_s=0.0, end_s=180.0, seeded=False),) * 4
    ),
    "hot_thinking": Burst("thinking", (_thinking(0.5),), duration_s=720.0),
    "hot_thinking_pair": Burst("thinking", (_thinking(0.125),) * 2, duration_s=720.0),
}
"""Bursts by name. On 16 instances a class whose prefix has one holder is over its share above 1/16.

``hot_class``: one class over its share. ``hot_classes``: eight, each under it, together far over.
``hot_long_output``: answers of 1,500 tokens, so that requests pile up. ``hot_growing``: rises all along, then
vanishes at once. ``hot_common_trunk``: five classes of one system prompt and different tools.
``hot_short_trunk``: as ``hot_class`` with a prefix that is cheap to compute again. ``hot_identical``: equal
prompts, on no instance when they start to come. ``hot_everywhere``: four prompts make up four fifths of the
traffic all along, so that soon every instance holds them all. ``hot_thinking``, ``hot_thinking_pair``: one
class of half of the arrivals, two of an eighth each, in long answers.

Prefixes have 16,384 tokens, as a system prompt with many tools has: with 4,096 the prefix is soon cheaper to
compute again than to queue for, and LMetric spreads the class by itself. Sizes are arbitrary otherwise.
"""


def steady_burst(burst: Burst) -> Burst:
    """Return the burst with all its classes at their height all along: to find how much is too much."""
    steady = (
        replace(hot, start_s=0.0, end_s=burst.duration_s, ramp_s=0.0, seeded=False) for hot in burst.hot
    )
    return replace(burst, hot=tuple(steady))


def burst_trace(
    burst: str | Burst,
    *,
    duration_s: float | None = None,
    seed: int = 0,
    rate_per_s: float | None = None,
) -> Trace:
    """Return a seeded trace of a burst, one of ``BURSTS`` or one's own, 16-token blocks.

    ``duration_s``: by default the burst's. ``rate_per_s``: of the background, by default its workload's; the
    hot classes' follows from it and their shares. Hot requests are of no session. O(requests).
    Raises InvalidArgument, InvalidType.
    """
    if isinstance(burst, str):
        if burst not in BURSTS:
            raise InvalidArgument(f"unknown burst {burst!r}, expected one of {', '.join(BURSTS)}")
        name, burst = burst, BURSTS[burst]
    else:
        name = "burst"
    rate = WORKLOADS[burst.background].rate_per_s if rate_per_s is None else rate_per_s
    duration = burst.duration_s if duration_s is None else duration_s
    check_positive(duration_s=duration, rate_per_s=rate)
    background = synthetic_trace(burst.background, duration_s=duration, seed=seed, rate_per_s=rate)
    # the background draws from the seed itself
    rng = np.random.default_rng([seed, 1])
    top = rate / (1 - math.fsum(hot.share_ratio for hot in burst.hot))
    free = int((background.run_start + background.run_length).max())
    common = max(hot.common_tokens for hot in burst.hot) // BLOCK_SIZE
    parts = [
        _Part(background.arrival_s, background.prompt_tokens, background.output_tokens, _runs(background))
    ]
    common_start, free = free, free + common
    for hot in burst.hot:
        part, free = _hot_part(hot, top * hot.share_ratio, duration, common_start, free, rng)
        parts.append(part)
    return _joined(f"synthetic:{name}", background, parts)


@dataclass(frozen=True, slots=True)
class _Part:
    """Requests of one origin; ``runs`` (n, 3, 2): start and length of common, trunk and other blocks."""

    arrival_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    runs: Ints


def _runs(background: Trace) -> Ints:
    """Return the background's two runs a request, and an empty one before them."""
    runs = np.stack([background.run_start, background.run_length], axis=1).reshape(-1, 2, 2)
    return np.concatenate([np.zeros((len(runs), 1, 2), dtype=np.int64), runs], axis=1)


def _hot_part(
    hot: HotClass, rate: float, duration_s: float, common_start: int, free: int, rng: np.random.Generator
) -> tuple[_Part, int]:
    """Return a class's requests and the first block id beyond theirs; block ids from ``free`` on are new."""
    arrival = np.sort(rng.uniform(hot.start_s, hot.end_s, rng.poisson(rate * (hot.end_s - hot.start_s))))
    risen = (arrival - hot.start_s) >= hot.ramp_s * rng.random(len(arrival))
    arrival = arrival[risen]
    if hot.seeded:
        arrival = np.concatenate([[max(0.0, hot.start_s - _LEAD_S)], arrival])
    arrival = arrival[arrival < duration_s]
    n = len(arrival)
    common, trunk = hot.common_tokens // BLOCK_SIZE, hot.trunk_tokens // BLOCK_SIZE
    suffix = np.zeros(n, dtype=np.int64)
    if hot.suffix_tokens:
        suffix = np.maximum(1, hot.suffix_tokens * rng.lognormal(0, _SIGMA, n)).astype(np.int64)
    output = np.maximum(1, hot.output_tokens * rng.lognormal(0, _SIGMA, n)).astype(np.int64)
    own = suffix // BLOCK_SIZE
    runs = np.empty((n, 3, 2), dtype=np.int64)
    runs[:, 0] = common_start, common
    runs[:, 1] = free, trunk - common
    runs[:, 2, 0] = free + trunk - common + np.cumsum(own) - own
    runs[:, 2, 1] = own
    return _Part(arrival, trunk * BLOCK_SIZE + suffix, output, runs), free + trunk - common + int(own.sum())


def _joined(name: str, background: Trace, parts: list[_Part]) -> Trace:
    arrival = np.concatenate([part.arrival_s for part in parts])
    order = np.argsort(arrival, kind="stable")
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    hot = len(order) - len(background)
    runs = np.concatenate([part.runs for part in parts])[order]
    follows = background.previous >= 0
    previous = np.where(follows, place[np.where(follows, background.previous, 0)], -1)
    none = np.full(hot, -1, dtype=np.int64)
    return Trace(
        name=name,
        block_size=BLOCK_SIZE,
        arrival_s=arrival[order],
        prompt_tokens=np.concatenate([part.prompt_tokens for part in parts])[order],
        output_tokens=np.concatenate([part.output_tokens for part in parts])[order],
        run_start=runs[:, :, 0].ravel(),
        run_length=runs[:, :, 1].ravel(),
        run_offset=np.arange(0, 3 * len(order) + 1, 3),
        session=np.concatenate([background.session, none])[order],
        previous=np.concatenate([previous, none])[order],
        think_s=np.concatenate([background.think_s, np.zeros(hot)])[order],
        synthetic=True,
        notes=(*background.notes, f"{hot} of {len(order)} requests are of hot classes"),
    )
