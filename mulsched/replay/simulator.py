"""Replay: a trace through the production router into modelled engines.

Events happen in the order of their times; at the same time ends of steps come before arrivals, and each kind
in the order in which it was planned. A step that ends tells the router of first tokens, of finished requests
and of changes in the cache, as an engine's response stream and KV events would.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from heapq import heappop, heappush
from multiprocessing import get_context
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mulsched.errors import InvalidArgument
from mulsched.policies import Policy, Ties, get
from mulsched.replay.engine import EngineModel
from mulsched.replay.profile import Profile
from mulsched.replay.trace import Trace
from mulsched.router import Router
from mulsched.types import BlockRemoved, BlockStored

__all__ = ["CacheSource", "Loop", "ReplayResult", "replay", "replay_many"]

CacheSource = Literal["events", "predicted"]
Loop = Literal["open", "closed"]
Progress = Callable[[int, int], None]

_STEP_END, _ARRIVAL = 0, 1
_PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, slots=True, eq=False)
class ReplayResult:
    """What happened to each of n requests, and under what.

    ``arrival_s``, ``first_token_s``, ``finish_s``: (n,) seconds from the start. ``instance`` (n,): where it
    went. ``cached_tokens`` (n,): prompt tokens that the engine found in its cache; ``hit_tokens`` (n,): what
    the router thought it would. ``prompt_tokens``, ``output_tokens`` (n,) as in the trace.
    """

    trace: str
    synthetic: bool
    policy: str
    parameters: Mapping[str, Any]
    profile: str
    seed: int
    ties: str
    instances: int
    kv_blocks: int
    loop: str
    cache_source: str
    arrival_s: NDArray[np.float64]
    first_token_s: NDArray[np.float64]
    finish_s: NDArray[np.float64]
    instance: NDArray[np.int64]
    cached_tokens: NDArray[np.int64]
    hit_tokens: NDArray[np.int64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    preemptions: int

    @property
    def label(self) -> str:
        """The policy and the parameters it was given, as in ``linear(weight=0.5)``."""
        given = ", ".join(f"{name}={value}" for name, value in self.parameters.items())
        return f"{self.policy}({given})" if given else self.policy

    @property
    def ttft_s(self) -> NDArray[np.float64]:
        """Time to first token, (n,) seconds."""
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> NDArray[np.float64]:
        """Time per output token after the first, seconds; without requests of one token."""
        several = self.output_tokens > 1
        tpot: NDArray[np.float64] = (self.finish_s - self.first_token_s)[several] / (
            self.output_tokens[several] - 1
        )
        return tpot

    def summary(self) -> dict[str, float]:
        """Return the figures of a report by name; times in seconds, ratios of prompt tokens.

        ``request_spread`` and ``prefill_spread`` are the busiest instance's share over the mean one's.
        """
        figures = {}
        for name, values in (("ttft", self.ttft_s), ("tpot", self.tpot_s)):
            figures[f"{name}_mean_s"] = float(values.mean()) if len(values) else math.nan
            for q in _PERCENTILES:
                figures[f"{name}_p{q}_s"] = float(np.percentile(values, q)) if len(values) else math.nan
        span = float(self.finish_s.max() - self.arrival_s.min())
        new_tokens = self.prompt_tokens - self.cached_tokens
        requests = np.bincount(self.instance, minlength=self.instances)
        prefill = np.bincount(self.instance, weights=new_tokens, minlength=self.instances)
        return figures | {
            "requests_per_s": len(self.arrival_s) / span,
            "output_tokens_per_s": float(self.output_tokens.sum()) / span,
            "hit_ratio": float(self.cached_tokens.sum() / self.prompt_tokens.sum()),
            "predicted_hit_ratio": float(self.hit_tokens.sum() / self.prompt_tokens.sum()),
            "request_spread": float(requests.max() / requests.mean()),
            "prefill_spread": float(prefill.max() / prefill.mean()),
            "preemptions": float(self.preemptions),
        }


class _Replay:
    """The state of one replay."""

    def __init__(
        self,
        trace: Trace,
        router: Router,
        engines: list[EngineModel],
        *,
        closed: bool,
        observed: bool,
        block_size: int,
    ) -> None:
        self.trace = trace
        self.router = router
        self.engines = engines
        self.names = router.instances
        self.closed = closed
        self.observed = observed
        self.block_size = block_size
        self.events: list[tuple[float, int, int, int]] = []  # time, kind, sequence number, subject
        self.planned = 0
        n = len(trace)
        self.arrival_s = np.array(trace.arrival_s)
        self.first_token_s, self.finish_s = np.zeros(n), np.zeros(n)
        self.instance, self.cached = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
        self.hits = np.zeros(n, dtype=np.int64)
        self.follow_ups: dict[int, list[int]] = {}
        self.finished = 0

    def run(self, progress: Progress | None) -> None:
        for i, previous in enumerate(self.trace.previous.tolist()):
            if self.closed and previous >= 0:
                self.follow_ups.setdefault(previous, []).append(i)
            else:
                self.plan(float(self.trace.arrival_s[i]), _ARRIVAL, i)
        every = max(1, len(self.trace) // 100)
        told = 0
        while self.events:
            now, kind, _, subject = heappop(self.events)
            if kind == _ARRIVAL:
                self.arrive(subject, now)
            else:
                self.end_step(subject, now)
            if progress is not None and self.finished >= told + every:
                told = self.finished
                progress(told, len(self.trace))
        if progress is not None:
            progress(self.finished, len(self.trace))

    def plan(self, time: float, kind: int, subject: int) -> None:
        heappush(self.events, (time, kind, self.planned, subject))
        self.planned += 1

    def arrive(self, i: int, now: float) -> None:
        trace = self.trace
        keys = trace.keys(i, self.block_size)
        prompt, session = int(trace.prompt_tokens[i]), int(trace.session[i])
        decision = self.router.route_keys(
            keys,
            prompt_tokens=prompt,
            request_id=i,
            session=str(session) if session >= 0 else None,
            now=now,
        )
        at = int(decision.columns.rows[decision.position])
        self.arrival_s[i], self.instance[i], self.hits[i] = now, at, decision.hit_tokens
        engine = self.engines[at]
        engine.submit(i, keys, prompt, int(trace.output_tokens[i]))
        if not engine.stepping:
            self.start_step(at, now)

    def start_step(self, at: int, now: float) -> None:
        ends = self.engines[at].start_step(now)
        if ends is not None:
            self.plan(ends, _STEP_END, at)

    def end_step(self, at: int, now: float) -> None:
        result = self.engines[at].end_step()
        for change in self.engines[at].take_changes() if self.observed else ():
            name = self.names[at]
            if change.stored:
                self.router.apply(
                    BlockStored(name, change.keys, change.parent, self.block_size, block_keys=change.keys)
                )
            else:
                self.router.apply(BlockRemoved(name, change.keys))
        for i, cached in result.first_tokens:
            assert isinstance(i, int)
            self.first_token_s[i], self.cached[i] = now, cached
            self.router.first_token(i)
        for i in result.finished:
            assert isinstance(i, int)
            self.finish_s[i] = now
            self.finished += 1
            self.router.finish(i)
            for follow_up in self.follow_ups.get(i, ()):
                self.plan(now + float(self.trace.think_s[follow_up]), _ARRIVAL, follow_up)
        self.start_step(at, now)


def replay(
    trace: Trace,
    policy: str | Policy,
    *,
    parameters: Mapping[str, Any] | None = None,
    profile: Profile,
    instances: int = 16,
    kv_blocks: int | None = None,
    cache_source: CacheSource = "events",
    loop: Loop = "open",
    seed: int = 0,
    ties: Ties | None = None,
    progress: Progress | None = None,
) -> ReplayResult:
    """Replay a trace under one policy and return what happened to each request.

    ``parameters`` are keywords of the factory of a policy given by name. ``kv_blocks`` replaces the
    profile's. ``cache_source``: the router learns of caches from the engines'
    events, or predicts them. ``loop``: requests arrive by the trace's times, or (closed) a follow-up arrives
    its think time after the end of the request before it. ``progress(done, all)`` is called now and then.
    Deterministic: the same arguments give the same result.

    Raises UnknownPolicy, InvalidArgument (among others: a request that no engine can hold).
    """
    given = dict(parameters or {})
    if given and not isinstance(policy, str):
        raise InvalidArgument(f"parameters {given} go with a policy's name, got a Policy")
    blocks = profile.kv_blocks if kv_blocks is None else kv_blocks
    if instances < 1 or blocks < 1:
        raise InvalidArgument(f"instances and kv_blocks must be at least 1, got {instances} and {blocks}")
    if cache_source not in get_args(CacheSource) or loop not in get_args(Loop):
        raise InvalidArgument(
            f"cache_source must be events or predicted and loop open or closed, got {cache_source}, {loop}"
        )
    longest = int((trace.prompt_tokens + trace.output_tokens).max())
    if longest > blocks * profile.block_size:
        raise InvalidArgument(
            f"{trace.name} has a request of {longest} tokens, an engine holds {blocks * profile.block_size}: "
            "raise kv_blocks or limit prompts"
        )
    chosen = get(policy, **given) if isinstance(policy, str) else policy
    router = Router(block_size=profile.block_size, policy=chosen, seed=seed, ties=ties)
    for i in range(instances):
        router.add_instance(f"instance-{i}", cache_blocks=blocks if cache_source == "predicted" else None)
    run = _Replay(
        trace,
        router,
        [EngineModel(profile, kv_blocks=blocks) for _ in range(instances)],
        closed=loop == "closed",
        observed=cache_source == "events",
        block_size=profile.block_size,
    )
    run.run(progress)
    return ReplayResult(
        trace=trace.name,
        synthetic=trace.synthetic,
        policy=chosen.name,
        parameters=given,
        profile=profile.name,
        seed=seed,
        ties=ties or chosen.ties,
        instances=instances,
        kv_blocks=blocks,
        loop=loop,
        cache_source=cache_source,
        arrival_s=run.arrival_s,
        first_token_s=run.first_token_s,
        finish_s=run.finish_s,
        instance=run.instance,
        cached_tokens=run.cached,
        hit_tokens=run.hits,
        prompt_tokens=trace.prompt_tokens,
        output_tokens=trace.output_tokens,
        preemptions=sum(engine.preemptions for engine in run.engines),
    )


_channel: Any = None  # in a worker process: where progress goes


def _start_worker(channel: Any) -> None:
    global _channel
    _channel = channel


def _work(job: int, trace: Trace, options: dict[str, Any]) -> ReplayResult:
    return replay(trace, progress=lambda done, total: _channel.put((job, done, total)), **options)


def replay_many(
    trace: Trace,
    jobs: Sequence[dict[str, Any]],
    *,
    processes: int = 1,
    progress: Callable[[int, int, int], None] | None = None,
) -> list[ReplayResult]:
    """Replay a trace once for each job, a dict of arguments of :func:`replay`, in parallel processes.

    ``progress(job, done, all)`` is called in this process. With more than one process policies must be
    names. Results come in the order of the jobs and do not depend on ``processes``.
    Raises as :func:`replay`.
    """
    if processes <= 1 or len(jobs) <= 1:
        results = []
        for job, options in enumerate(jobs):
            tell = None if progress is None else _telling(progress, job)
            results.append(replay(trace, progress=tell, **options))
        return results
    context = get_context("spawn")  # fork would copy locks that other threads hold
    channel = context.SimpleQueue()
    with ProcessPoolExecutor(
        min(processes, len(jobs)), mp_context=context, initializer=_start_worker, initargs=(channel,)
    ) as pool:
        futures = [pool.submit(_work, job, trace, options) for job, options in enumerate(jobs)]
        for future in futures:
            future.add_done_callback(lambda _: channel.put(None))
        left = len(futures)
        while left:
            message = channel.get()
            if message is None:
                left -= 1
            elif progress is not None:
                progress(*message)
        return [future.result() for future in futures]


def _telling(progress: Callable[[int, int, int], None], job: int) -> Progress:
    return lambda done, total: progress(job, done, total)
