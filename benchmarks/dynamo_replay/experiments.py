"""The same trace through both engines, one thing changed at a time, request by request."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from dynamo_replay.simulators import Outcome, Setup, run_dynamo, run_mulsched
from mulsched.replay import Trace, synthetic_trace

AMPLE = 400_000
"""Blocks that no trace here fills."""


@dataclass(frozen=True)
class Agreement:
    """Shares of requests on which two outcomes agree: instance, cached tokens, and times to 1 us."""

    instance: float
    cached: float
    ttft: float
    finish: float
    worst_ttft_ms: float

    @classmethod
    def between(cls, one: Outcome, other: Outcome) -> "Agreement":
        ttft = np.abs(one.ttft_s - other.ttft_s)
        finish = np.abs(one.finish_s - other.finish_s)
        return cls(
            instance=float((one.instance == other.instance).mean()),
            cached=float((one.cached_tokens == other.cached_tokens).mean()),
            ttft=float((ttft < 1e-6).mean()),
            finish=float((finish < 1e-6).mean()),
            worst_ttft_ms=1e3 * float(ttft.max()),
        )


@dataclass(frozen=True)
class Experiment:
    """What is changed against the rows above, and the trace and engines that it is run on."""

    changed: str
    trace: Trace
    setup: Setup

    def run(self) -> tuple[Outcome, Outcome, Agreement]:
        """Return Dynamo's outcome, ours, and how they agree, under round robin."""
        theirs, ours = run_dynamo(self.trace, self.setup), run_mulsched(self.trace, self.setup)
        return theirs, ours, Agreement.between(theirs, ours)


def without_sharing(trace: Trace) -> Trace:
    """Every block of every prompt is its own."""
    none = np.zeros(0, dtype=np.int64)
    return replace(
        trace, run_start=none, run_length=none, run_offset=np.zeros(len(trace) + 1, dtype=np.int64)
    )


def of_one_length(trace: Trace, prompt_tokens: int) -> Trace:
    """No prompt shares anything, and the mean of several is a whole number of tokens."""
    return replace(without_sharing(trace), prompt_tokens=np.full(len(trace), prompt_tokens))


def twice(trace: Trace, after_s: float) -> Trace:
    """Each request comes again ``after_s`` later."""
    arrival = np.concatenate([trace.arrival_s, trace.arrival_s + after_s])
    order = np.argsort(arrival, kind="stable")
    source = order % len(trace)
    length = np.diff(trace.run_offset)[source]
    offset = np.concatenate([[0], np.cumsum(length)])
    runs = np.arange(offset[-1]) + np.repeat(trace.run_offset[source] - offset[:-1], length)
    alone = np.full(len(order), -1)
    return Trace(
        name=f"{trace.name}, each twice",
        block_size=trace.block_size,
        arrival_s=arrival[order],
        prompt_tokens=trace.prompt_tokens[source],
        output_tokens=trace.output_tokens[source],
        run_start=trace.run_start[runs],
        run_length=trace.run_length[runs],
        run_offset=offset,
        session=alone,
        previous=alone,
        think_s=np.zeros(len(order)),
    )


def two_that_do_not_fit() -> Trace:
    """The second prompt's first chunk fits beside the first request, the whole of it does not."""
    return Trace(
        name="two",
        block_size=16,
        arrival_s=np.array([0.0, 1.0]),
        prompt_tokens=np.array([8_000, 10_000]),
        output_tokens=np.array([200, 50]),
        run_start=np.array([0, 10_000]),
        run_length=np.array([500, 625]),
        run_offset=np.array([0, 1, 2]),
        session=np.array([-1, -1]),
        previous=np.array([-1, -1]),
        think_s=np.zeros(2),
    )


def experiments(*, duration_s: float = 240.0) -> Iterator[Experiment]:
    chat = synthetic_trace("chat", duration_s=duration_s, seed=1)
    dense = synthetic_trace("chat", duration_s=duration_s / 2, seed=1).scale_rate(8)
    one = Setup(instances=1, kv_blocks=AMPLE, fixed_timing=True)
    four = replace(one, instances=4)
    yield Experiment("one worker, ample cache, nothing shared, fixed step times", without_sharing(chat), one)
    yield Experiment("prompts share prefixes", chat, one)
    yield Experiment("four workers", chat, four)
    yield Experiment("8 x the rate, 2,048 tokens a step", dense, replace(four, max_batched_tokens=2_048))
    yield Experiment("8 x the rate, 32 requests at a time", dense, replace(four, max_num_seqs=32))
    yield Experiment("one worker, every prompt twice within 1 us", twice(chat, 1e-6), one)
    yield Experiment("four workers, 8,000 blocks: eviction", chat, replace(four, kv_blocks=8_000))
    yield Experiment("8 x the rate, 6,000 blocks: preemption", dense, replace(four, kv_blocks=6_000))
    yield Experiment(
        "a prompt that does not fit yet, 2,048 tokens a step",
        two_that_do_not_fit(),
        replace(one, kv_blocks=1_000, max_batched_tokens=2_048),
    )
    formula = replace(four, fixed_timing=False)
    yield Experiment("four workers, ample cache, Dynamo's formula for step times", chat, formula)
    yield Experiment(
        "the same, every prompt 1,000 tokens, nothing shared", of_one_length(chat, 1_000), formula
    )
