"""Calibration of a profile against a run of a real engine.

The engine model is run over the arrivals with trial coefficients. As long as what each step computes stays as
it is, the time between two steps is a sum of coefficients times known counts; so coefficients come from a
regression with non-negative solutions, the engine model is run again with them, and so on, and the best
round is kept. Nothing is random.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from mulsched.errors import InvalidArgument, MissingExtra
from mulsched.replay.engine import EngineModel
from mulsched.replay.profile import Profile
from mulsched.replay.request_times import Floats, RequestTimes, time_per_token
from mulsched.replay.step_time import FittedStep

__all__ = ["Fit", "Simulation", "fit_profile", "schedules_ahead", "shown_limits", "simulate"]

_COEFFICIENTS = tuple(field.name for field in fields(FittedStep))
_LEAST_STEP_S = 1e-6  # a step takes time, whatever the data say
_ROUNDS = 14  # 40 lower the errors of the recordings in docs/validation.md by 0.01 at most
_REWEIGHTINGS = 10
_SMALLEST_RESIDUAL = 0.005  # relative; smaller ones weigh alike
_NO_KEYS = np.zeros(0, dtype=np.uint64)


@dataclass(frozen=True, slots=True, eq=False)
class Simulation:
    """The engine model's run over the arrivals: (n,) seconds, and (n,) indices of steps.

    ``joined_s`` is when the first step began after a request's arrival, and ``joined`` counts the steps
    before it; ``first_token`` and ``finish`` count those up to the one that made the token.
    """

    first_token_s: Floats
    finish_s: Floats
    joined_s: Floats
    joined: NDArray[np.int64]
    first_token: NDArray[np.int64]
    finish: NDArray[np.int64]
    preemptions: int


@dataclass(frozen=True, slots=True)
class Fit:
    """A calibrated profile.

    ``error``: the sum of the mean relative errors of TTFT and TPOT that it was fitted to.
    """

    profile: Profile
    error: float


def simulate(requests: RequestTimes, profile: Profile) -> Simulation:
    """Run the engine model over the arrivals and lengths of a run, without a prefix cache.

    Raises InvalidArgument for a request that the engine cannot hold.
    """
    n = len(requests.arrival_s)
    engine = EngineModel(profile)
    first_token_s, finish_s, joined_s = np.zeros(n), np.zeros(n), np.zeros(n)
    joined, first_token, finish = (np.zeros(n, dtype=np.int64) for _ in range(3))
    arrival_s = requests.arrival_s.tolist()
    prompts, outputs = requests.prompt_tokens.tolist(), requests.output_tokens.tolist()
    now, arrived, steps = arrival_s[0], 0, 0
    while True:
        while arrived < n and arrival_s[arrived] <= now:
            joined_s[arrived], joined[arrived] = now, steps
            engine.submit(arrived, _NO_KEYS, prompts[arrived], outputs[arrived])
            arrived += 1
        ends = engine.start_step(now)
        if ends is None:
            if arrived == n:
                break
            now = arrival_s[arrived]
            continue
        now, steps = ends, steps + 1
        result = engine.end_step()
        for i, _ in result.first_tokens:
            first_token_s[i], first_token[i] = now, steps
        for i in result.finished:
            finish_s[i], finish[i] = now, steps
    return Simulation(first_token_s, finish_s, joined_s, joined, first_token, finish, engine.preemptions)


def schedules_ahead(requests: RequestTimes) -> bool:
    """Whether the engine plans a step while the one before runs.

    Otherwise no step ends between a request's scheduling and its first token, unless its prompt takes several
    steps. So: whether another request's first or last token falls into that time of a tenth of the requests
    with at most the median prompt (the tenth is arbitrary; a quarter to a half is what vLLM runs show).
    """
    ends = np.unique(np.concatenate([requests.first_token_s, requests.finish_s]))
    short = requests.prompt_tokens <= np.median(requests.prompt_tokens)
    after = np.searchsorted(ends, requests.scheduled_s[short], side="right")
    before = np.searchsorted(ends, requests.first_token_s[short], side="left")
    return bool((before > after).mean() > 0.1)


def shown_limits(requests: RequestTimes) -> tuple[int | None, int | None]:
    """Return max_batched_tokens and max_num_seqs where the run shows them, None where it does not.

    ``max_batched_tokens``: requests scheduled in the same step of which the last has a later first token were
    cut by the budget: it lies above the tokens of all but the last and at most at those of all, decoding
    requests included. The power of two that most such steps admit, the larger of two alike.
    ``max_num_seqs``: requests that waited more than 0.3 s found a full engine. If at least half of them
    found one number of running requests, the most that any found, that is the limit; else it was memory.
    Both count earlier requests only, so a run's beginning is enough.
    """
    order = np.lexsort((requests.arrival_s, requests.scheduled_s))
    scheduled, finish = requests.scheduled_s[order], requests.finish_s[order]
    first_token, prompts = requests.first_token_s[order], requests.prompt_tokens[order]
    running = np.array([int((finish[:i] > at).sum()) for i, at in enumerate(scheduled)])
    intervals = []
    starts = np.flatnonzero(np.diff(scheduled, prepend=-np.inf))
    for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
        if end - start > 1 and first_token[end - 1] > first_token[start]:
            total = int(running[start] + prompts[start:end].sum())
            intervals.append((total - int(prompts[end - 1]), total))
    budgets = [2**k for k in range(8, 18)]
    agree = [sum(low < budget <= high for low, high in intervals) for budget in budgets]
    budget = max(zip(agree, budgets, strict=True))[1] if intervals else None

    waited = scheduled - requests.arrival_s[order] > 0.3
    found = running[waited] + 1
    seqs = int(found.max()) if waited.any() and (found == found.max()).mean() >= 0.5 else None
    return budget, seqs


def fit_profile(
    requests: RequestTimes,
    *,
    kv_blocks: int | Iterable[int],
    scored: NDArray[np.bool_] | None = None,
    known: Mapping[str, float] | None = None,
    max_batched_tokens: int | None = None,
    max_num_seqs: int | None = None,
    schedule_ahead: bool | None = None,
) -> Fit:
    """Calibrate :class:`FittedStep` and the limits of an engine against a run.

    The engine model runs over all arrivals; only requests in ``scored`` (n,) are compared, and what they say
    decides everything. ``kv_blocks``: what the engine holds, or candidates, the likeliest first: the first is
    taken whose error is within a tenth (arbitrary) of the smallest, since a run that never fills the memory
    says nothing about it and the errors of its candidates differ by chance. ``known``: coefficients that are
    given, not fitted. Give ``context_s``, bytes of KV a token over bytes per second, unless contexts differ a
    lot: otherwise ``decode_s`` explains the same times. Limits that are None are what :func:`shown_limits`
    finds in the scored requests, which should be a run's beginning then, else 2,048 tokens and 256 requests,
    which vLLM chooses; ``schedule_ahead``, the profile's ``schedules_ahead``, is what :func:`schedules_ahead`
    finds.

    Time: candidates times 14 simulations.
    Raises InvalidArgument (no request is scored, a coefficient of another name, a request that no engine
    holds), MissingExtra without ``mulsched[fit]``.
    """
    mask = np.ones(len(requests.arrival_s), dtype=bool) if scored is None else scored
    if mask.shape != requests.arrival_s.shape or not mask.any():
        raise InvalidArgument(
            f"scored must choose from {len(requests.arrival_s)} requests, got {mask.sum()} of {mask.shape}"
        )
    fixed = dict(known or {})
    if not fixed.keys() <= set(_COEFFICIENTS):
        raise InvalidArgument(f"known must be of {', '.join(_COEFFICIENTS)}, got {', '.join(fixed)}")
    seen = _chosen(requests, mask)
    shown_tokens, shown_seqs = shown_limits(seen)
    ahead = schedules_ahead(seen) if schedule_ahead is None else schedule_ahead
    candidates = [kv_blocks] if isinstance(kv_blocks, int) else list(kv_blocks)
    fits = []
    for blocks in candidates:
        limits = Profile(
            requests.name,
            FittedStep(_LEAST_STEP_S),
            max_batched_tokens=shown_tokens or 2048 if max_batched_tokens is None else max_batched_tokens,
            max_num_seqs=shown_seqs or 256 if max_num_seqs is None else max_num_seqs,
            kv_blocks=blocks,
            schedules_ahead=ahead,
        )
        fits.append(_fit_step(requests, mask, limits, fixed))
    if not fits:
        raise InvalidArgument("kv_blocks must be a number or candidates, got none")
    least = min(fit.error for fit in fits)
    return next(fit for fit in fits if fit.error <= 1.1 * least)


def _chosen(requests: RequestTimes, mask: NDArray[np.bool_]) -> RequestTimes:
    columns = {field.name: getattr(requests, field.name) for field in fields(requests)}
    return RequestTimes(**{name: c if name == "name" else c[mask] for name, c in columns.items()})


class _Recorder:
    """A step time that keeps what it was asked for."""

    counts_pairs = True

    def __init__(self, step: FittedStep) -> None:
        self.step = step
        self.loads: list[tuple[int, float, int, float]] = []

    def __call__(
        self, new_tokens: int, prefix_tokens: float, decode_batch: int, decode_context: float
    ) -> float:
        self.loads.append((new_tokens, prefix_tokens, decode_batch, decode_context))
        return self.step(new_tokens, prefix_tokens, decode_batch, decode_context)


def _fit_step(
    requests: RequestTimes, mask: NDArray[np.bool_], limits: Profile, known: Mapping[str, float]
) -> Fit:
    """Alternate between simulation and regression."""
    free = [name for name in _COEFFICIENTS if name not in known]
    trial = {**dict.fromkeys(_COEFFICIENTS, 0.0), **_first_guess(requests, mask), **known}
    best = Fit(limits, np.inf)
    for turn in range(_ROUNDS):
        step = FittedStep(**trial)
        recorder = _Recorder(step)
        profile = replace(limits, step_time=recorder)
        run = simulate(requests, profile)
        error = _error(requests, run, mask)
        if error < best.error:
            best = Fit(replace(limits, step_time=step), error)
        if not free:
            break
        counts, target = _equations(requests, run, mask, recorder.loads)
        fitted = _regress(counts, target, known)
        weight = 1.0 if turn == 0 else 0.5  # half a step: full ones swing to and fro
        for name in free:
            trial[name] += weight * (fitted[name] - trial[name])
        trial["step_s"] = max(trial["step_s"], _LEAST_STEP_S)
    return best


def _first_guess(requests: RequestTimes, mask: NDArray[np.bool_]) -> dict[str, float]:
    """Every step takes alike: a request is in about as many as it makes tokens."""
    inside = (requests.finish_s - requests.scheduled_s) / requests.output_tokens
    return {"step_s": max(float(np.median(inside[mask])), _LEAST_STEP_S)}


def _error(requests: RequestTimes, run: Simulation, mask: NDArray[np.bool_]) -> float:
    """Mean relative error of TTFT plus that of TPOT, of requests that have one."""
    ttft = (run.first_token_s - requests.arrival_s) / requests.ttft_s
    tpot = time_per_token(run.first_token_s, run.finish_s, requests.output_tokens) / requests.tpot_s
    several = mask & (requests.output_tokens > 1)
    error = float(np.abs(ttft - 1)[mask].mean())
    return error + float(np.abs(tpot - 1)[several].mean()) if several.any() else error


def _equations(
    requests: RequestTimes,
    run: Simulation,
    mask: NDArray[np.bool_],
    loads: Sequence[tuple[int, float, int, float]],
) -> tuple[Floats, Floats]:
    """Return counts and targets whose coefficients @ counts = target, relative to the measured times.

    One row for each scored request's time to first token, after the rest of the step that was under way when
    it came, and one for the time from there to its end.
    """
    work = np.array([_counts(load) for load in loads])
    done = np.concatenate([np.zeros((1, len(_COEFFICIENTS))), work.cumsum(axis=0)])
    several = mask & (requests.output_tokens > 1)
    ttft, rest = requests.ttft_s[mask], (requests.finish_s - requests.first_token_s)[several]
    to_first = (done[run.first_token] - done[run.joined])[mask]
    to_finish = (done[run.finish] - done[run.first_token])[several]
    waited = (run.joined_s - requests.arrival_s)[mask]
    counts = np.concatenate([to_first / ttft[:, None], to_finish / rest[:, None]])
    return counts, np.concatenate([np.maximum(0.0, 1 - waited / ttft), np.ones(len(rest))])


def _counts(load: tuple[int, float, int, float]) -> tuple[float, ...]:
    """What a step counts for each of _COEFFICIENTS."""
    new, prefix, batch, context = load
    prefills = float(new > 0)
    return (1.0, batch, batch * context, prefills, new, new * (prefix + new / 2), batch * prefills)


def _regress(counts: Floats, target: Floats, known: Mapping[str, float]) -> dict[str, float]:
    """Return the non-negative coefficients with the smallest mean absolute residual."""
    try:
        from scipy.optimize import nnls  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtra("calibration needs scipy: pip install 'mulsched[fit]'") from error
    given = np.array([known.get(name, 0.0) for name in _COEFFICIENTS])
    free = np.array([name not in known for name in _COEFFICIENTS])
    target = target - counts @ given
    columns = counts[:, free]
    scale = columns.max(axis=0)
    scale[scale == 0] = 1.0  # never seen: its coefficient comes out as 0
    columns = columns / scale
    weight = np.ones(len(target))
    for _ in range(_REWEIGHTINGS):  # squares of residuals over their size are their absolute values
        solution, _ = nnls(columns * weight[:, None], target * weight)
        weight = 1 / np.sqrt(np.maximum(np.abs(columns @ solution - target), _SMALLEST_RESIDUAL))
    given[free] = solution / scale
    return dict(zip(_COEFFICIENTS, given.tolist(), strict=True))
