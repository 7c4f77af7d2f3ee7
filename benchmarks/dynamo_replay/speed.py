"""Wall time of both simulators for the same job, in a fresh process, pinned to one core or free."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import median

import numpy as np

from dynamo_replay.simulators import Outcome, Setup, run_dynamo, run_mulsched
from mulsched.replay import Roofline, Trace, synthetic_trace

ROUTERS = (("round_robin", "round_robin"), ("kv_router", "dynamo"), ("kv_router", "lmetric"))
"""Dynamo's router modes and the policies of ours that are timed beside them."""


@dataclass(frozen=True)
class Job:
    name: str
    trace: Trace
    setup: Setup


@dataclass(frozen=True)
class Times:
    """Medians of one simulator in seconds: see Outcome."""

    call_s: float
    cpu_s: float
    own_clock_s: float

    @classmethod
    def of(cls, runs: Sequence[Outcome]) -> "Times":
        return cls(
            *(median(getattr(run, name) for run in runs) for name in ("call_s", "cpu_s", "own_clock_s"))
        )


def short_answers(requests: int) -> Trace:
    """As Dynamo's own generator makes them: 1,024 tokens, half shared in 8 groups, 32 out, every 10 ms."""
    at = np.arange(requests)
    groups, blocks = 8, 32
    private = groups * blocks + at * blocks
    return Trace(
        name="short answers",
        block_size=16,
        arrival_s=0.01 * at,
        prompt_tokens=np.full(requests, 1_024),
        output_tokens=np.full(requests, 32),
        run_start=np.column_stack([at % groups * blocks, private]).ravel(),
        run_length=np.full(2 * requests, blocks),
        run_offset=2 * np.arange(requests + 1),
        session=np.full(requests, -1),
        previous=np.full(requests, -1),
        think_s=np.zeros(requests),
    )


def first_requests(trace: Trace, count: int) -> Trace:
    return trace.take(np.arange(len(trace)) < count)


def jobs(count: int, longer_s: float) -> Iterator[Job]:
    setup = Setup()
    yield Job("short answers", short_answers(count), setup)
    chat = synthetic_trace("chat", duration_s=count / 5, seed=1)
    yield Job("chat", first_requests(chat, count), setup)
    yield Job("api", synthetic_trace("api", duration_s=longer_s, seed=1), setup)


def measure(
    job: Job, router_mode: str, policy: str, *, pinned: bool, repeats: int
) -> tuple[Times, Times, Times]:
    """Time Dynamo, ours with Dynamo's formula for step times, and ours with the built-in roofline."""
    cores = os.sched_getaffinity(0)
    # set before Dynamo is loaded, so that its threads inherit it
    with ProcessPoolExecutor(
        1,
        mp_context=get_context("spawn"),
        initializer=os.sched_setaffinity,
        initargs=(0, {min(cores)} if pinned else cores),
    ) as process:
        return process.submit(_times, job, router_mode, policy, repeats).result()


def _times(job: Job, router_mode: str, policy: str, repeats: int) -> tuple[Times, Times, Times]:
    def once(trace: Trace) -> tuple[Outcome, Outcome, Outcome]:
        return (
            run_dynamo(trace, job.setup, router_mode, details=False),
            run_mulsched(trace, job.setup, policy),
            run_mulsched(trace, job.setup, policy, profile_step=Roofline()),
        )

    once(first_requests(job.trace, 10))  # imports, and Dynamo's threads
    # in turns, so that a machine that is busy for a while is busy for all
    theirs, ours, roofline = zip(*(once(job.trace) for _ in range(repeats)), strict=True)
    return Times.of(theirs), Times.of(ours), Times.of(roofline)
