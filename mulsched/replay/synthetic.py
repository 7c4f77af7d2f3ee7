"""Synthetic workloads, calibrated to published figures of traces that are not shipped here.

A session starts from a template (a system prompt, shared with other sessions by Zipf's law), adds its own
text, and may go on: each follow-up's prompt is the last prompt, the answer to it, and new text. Lengths and
gaps are lognormal. The constants of each workload were fitted by random search to the figures that
:func:`targets` returns; what they achieve is printed beside the targets by :func:`format_calibration`.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from mulsched.errors import InvalidArgument, InvalidType
from mulsched.replay.trace import Ints, Trace

__all__ = ["WORKLOADS", "format_calibration", "synthetic_trace", "targets"]

BLOCK_SIZE = 16
CALIBRATED_S = 7200.0
_WARM_UP_S = 3600.0  # sessions that started before the trace does bring their later turns
_MAX_TURNS = 64


@dataclass(frozen=True, slots=True)
class Workload:
    """Constants of a generator. Lengths in tokens; a lognormal is given by its median and sigma."""

    rate_per_s: float
    single_ratio: float  # of sessions
    follow_on: float  # chance that a session with a follow-up goes on once more
    templates: int
    template_zipf: float
    template_median: float
    template_sigma: float
    first_median: float
    first_sigma: float
    next_median: float
    next_sigma: float
    output_median: float
    output_sigma: float
    gap_p50_s: float
    gap_p90_s: float
    max_prompt_tokens: int


WORKLOADS = {
    "chat": Workload(
        rate_per_s=5.98,
        single_ratio=0.6805,
        follow_on=0.56,
        templates=425,
        template_zipf=0.8449,
        template_median=384.1,
        template_sigma=0.6763,
        first_median=503.4,
        first_sigma=1.373,
        next_median=6.744,
        next_sigma=0.1658,
        output_median=352.6,
        output_sigma=0.6572,
        gap_p50_s=118.1,
        gap_p90_s=912,
        max_prompt_tokens=63_511,
    ),
    "api": Workload(
        rate_per_s=24,
        single_ratio=1,
        follow_on=0,
        templates=317,
        template_zipf=1.19,
        template_median=364,
        template_sigma=0.868,
        first_median=144,
        first_sigma=1.58,
        next_median=1,
        next_sigma=0,
        output_median=41.9,
        output_sigma=1.33,
        gap_p50_s=1,
        gap_p90_s=1,
        max_prompt_tokens=16_179,
    ),
    "coder": Workload(
        rate_per_s=5.97,
        single_ratio=0.8201,
        follow_on=0.5581,
        templates=237,
        template_zipf=1.78,
        template_median=2751,
        template_sigma=0.7025,
        first_median=1551,
        first_sigma=0.5078,
        next_median=65.73,
        next_sigma=1.31,
        output_median=459.5,
        output_sigma=1.09,
        gap_p50_s=143.6,
        gap_p90_s=1720,
        max_prompt_tokens=27_346,
    ),
    "thinking": Workload(
        rate_per_s=1.5,
        single_ratio=0.947,
        follow_on=0.5,
        templates=273,
        template_zipf=0.7309,
        template_median=1377,
        template_sigma=0.7102,
        first_median=1442,
        first_sigma=1.038,
        next_median=55.41,
        next_sigma=0.4406,
        output_median=1654,
        output_sigma=1.3,
        gap_p50_s=31.36,
        gap_p90_s=288.4,
        max_prompt_tokens=52_370,
    ),
    "tool_agent": Workload(
        rate_per_s=6.67,
        single_ratio=0.5,
        follow_on=0.3813,
        templates=265,
        template_zipf=0.722,
        template_median=1990,
        template_sigma=0.443,
        first_median=3030,
        first_sigma=1.3,
        next_median=539.9,
        next_sigma=1.543,
        output_median=29.4,
        output_sigma=0.8396,
        gap_p50_s=14.22,
        gap_p90_s=69.1,
        max_prompt_tokens=132_669,
    ),
}
"""Generators by name."""

_NAN = float("nan")
_TARGET_FIELDS = (
    "rate_per_s",
    "input_mean",
    "input_p50",
    "input_p99",
    "output_mean",
    "output_p50",
    "output_p99",
    "single_session_ratio",
    "gap_p50_s",
    "gap_p90_s",
    "hit_ratio",
    "same_session_share",
)
_TARGETS = {
    "chat": (5.98, 2331, 1046, 14359, 430, 375, 1641, 0.610, 110.6, 718.5, 0.579, 0.711),
    "api": (24.0, 915, 574, 6294, 92, 39, 1006, 1.0, _NAN, _NAN, 0.542, 0.0),
    "coder": (5.97, 5748, 4540, 14406, 808, 469, 5835, 0.747, 117.7, 941.8, 0.664, 0.398),
    "thinking": (1.50, 4763, 3680, 24962, 3651, 1665, 34529, 0.947, 28.6, 254.9, 0.462, 0.282),
    "tool_agent": (6.67, _NAN, 6346, 61525, _NAN, 30, _NAN, _NAN, _NAN, _NAN, 0.553, _NAN),
}


def targets(kind: str) -> dict[str, float]:
    """Return the published figures of a workload over two hours, NaN where none is known.

    Source: third-party counts of the public Bailian traces (chat: trace A, API: trace B, coder, thinking)
    and of Mooncake's tool-agent trace. Raises InvalidArgument.
    """
    _workload(kind)
    return dict(zip(_TARGET_FIELDS, _TARGETS[kind], strict=True))


def _workload(kind: str) -> Workload:
    if kind not in WORKLOADS:
        raise InvalidArgument(f"unknown workload {kind!r}, expected one of {', '.join(WORKLOADS)}")
    return WORKLOADS[kind]


def synthetic_trace(
    kind: str, *, duration_s: float = CALIBRATED_S, seed: int = 0, rate_per_s: float | None = None
) -> Trace:
    """Return a seeded synthetic trace, 16-token blocks.

    ``rate_per_s`` changes the request rate; the other figures stay. The hit ratio grows with the duration:
    it is calibrated at 7,200 s. O(requests). Raises InvalidArgument, InvalidType.
    """
    workload = _workload(kind)
    rate = workload.rate_per_s if rate_per_s is None else rate_per_s
    check_positive(duration_s=duration_s, rate_per_s=rate)
    return _generate(workload, f"synthetic:{kind}", duration_s, rate, np.random.default_rng(seed))


def check_positive(**values: float) -> None:
    """Raise InvalidType or InvalidArgument unless every value is a finite number above 0."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidType(f"{name} must be a number, got {type(value).__name__}")
        if not (math.isfinite(value) and value > 0):
            raise InvalidArgument(f"{name} must be finite and above 0, got {value}")


def _generate(
    workload: Workload, name: str, duration_s: float, rate: float, rng: np.random.Generator
) -> Trace:
    turns_mean = 1 + (1 - workload.single_ratio) / (1 - workload.follow_on)
    span = duration_s + _WARM_UP_S
    n_sessions = int(rng.poisson(span * rate / turns_mean))
    start = np.sort(rng.uniform(-_WARM_UP_S, duration_s, n_sessions))
    follows = rng.random(n_sessions) >= workload.single_ratio
    turns = 1 + np.where(follows, rng.geometric(1 - workload.follow_on, n_sessions), 0)
    turns = np.minimum(turns, _MAX_TURNS)

    weight = np.arange(1, workload.templates + 1) ** -workload.template_zipf
    template = rng.choice(workload.templates, n_sessions, p=weight / weight.sum())
    template_blocks = _template_blocks(workload)
    template_start = np.cumsum(template_blocks) - template_blocks

    n = int(turns.sum())
    session = np.repeat(np.arange(n_sessions), turns)
    turn = np.arange(n) - np.repeat(np.cumsum(turns) - turns, turns)
    first = turn == 0
    output = np.maximum(1, _lognormal(rng, workload.output_median, workload.output_sigma, n)).astype(np.int64)
    text = np.where(
        first,
        _lognormal(rng, workload.first_median, workload.first_sigma, n),
        _lognormal(rng, workload.next_median, workload.next_sigma, n),
    )
    text = np.maximum(1, text).astype(np.int64)
    added = np.where(first, text + template_blocks[template[session]] * BLOCK_SIZE, text)
    added[1:][~first[1:]] += output[:-1][~first[1:]]
    prompt = _cumulative_by_session(added, first)
    sigma = math.log(workload.gap_p90_s / workload.gap_p50_s) / 1.2815515655446004
    gap = np.where(first, 0.0, _lognormal(rng, workload.gap_p50_s, sigma, n))
    arrival = start[session] + _cumulative_by_session(gap, first)

    # a session ends where its prompt would outgrow the context
    keep = (arrival >= 0) & (arrival < duration_s) & (prompt <= workload.max_prompt_tokens)
    order = np.flatnonzero(keep)[np.argsort(arrival[keep], kind="stable")]
    place = np.full(n, -1)
    place[order] = np.arange(len(order))
    blocks = prompt // BLOCK_SIZE
    session_blocks = np.zeros(n_sessions, dtype=np.int64)
    np.maximum.at(session_blocks, session, blocks)
    session_start = int(template_blocks.sum()) + np.cumsum(session_blocks) - session_blocks
    shared = np.minimum(blocks, template_blocks[template[session]])[order]
    return Trace(
        name=name,
        block_size=BLOCK_SIZE,
        arrival_s=arrival[order],
        prompt_tokens=prompt[order].astype(np.int64),
        output_tokens=output[order],
        run_start=np.column_stack(
            [template_start[template[session[order]]], session_start[session[order]]]
        ).ravel(),
        run_length=np.column_stack([shared, blocks[order] - shared]).ravel(),
        run_offset=np.arange(0, 2 * len(order) + 1, 2),
        session=session[order],
        previous=np.where(first, -1, np.concatenate([[-1], place[:-1]]))[order],
        think_s=np.where(first, 0.0, gap)[order],
        synthetic=True,
        notes=("synthetic: calibrated to published figures, not recorded",),
    )


def _template_blocks(workload: Workload) -> Ints:
    """Return the length of every template: lognormal quantiles in an order of low discrepancy.

    The few most popular templates make most of the hits: drawn at random, their lengths would move the hit
    ratio by a third from seed to seed.
    """
    quantiles = np.modf((np.arange(workload.templates) + 0.5) * (math.sqrt(5) - 1) / 2)[0]
    normal = [NormalDist().inv_cdf(q) for q in np.clip(quantiles, 0.005, 0.995)]
    tokens = workload.template_median * np.exp(workload.template_sigma * np.array(normal))
    blocks: Ints = np.maximum(1, np.round(tokens / BLOCK_SIZE)).astype(np.int64)
    return blocks


def _lognormal(rng: np.random.Generator, median: float, sigma: float, n: int) -> np.ndarray:
    return rng.lognormal(math.log(median), sigma, n)


def _cumulative_by_session(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Return running sums that start anew where ``first`` is true."""
    total = np.cumsum(values)
    before = np.where(first, total - values, 0)
    starts: Ints = np.maximum.accumulate(np.where(first, np.arange(len(values)), 0))
    return total - before[starts]


def format_calibration(trace: Trace) -> str:
    """Return a synthetic trace's figures next to their targets, a line each.

    Raises InvalidArgument for a trace that is not one of :data:`WORKLOADS`.
    """
    kind = trace.name.removeprefix("synthetic:")
    stats = trace.stats()
    lines = [
        f"{trace.name}: {stats.requests} requests in {stats.duration_s:.0f} s; "
        f"targets are for {CALIBRATED_S:.0f} s, a shorter trace has a lower hit ratio",
        f"{'':22}{'achieved':>10}{'target':>10}",
    ]
    for field, target in targets(kind).items():
        wanted = "-" if math.isnan(target) else f"{target:.4g}"
        lines.append(f"{field:22}{getattr(stats, field):>10.4g}{wanted:>10}")
    return "\n".join(lines)
