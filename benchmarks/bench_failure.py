"""What the failure detector adds to a decision: 8,192 tokens, nothing in alarm; and mode paper alone."""

import itertools

import numpy as np
import pytest

from mulsched import Router, block_keys
from mulsched.failure import FailureDetector

PROMPT_TOKENS = 8192
BOOKED = 256
RNG = np.random.default_rng(2)
SYSTEM = RNG.integers(0, 100_000, 2048, dtype=np.uint32)
KEYS = [
    block_keys(np.concatenate([SYSTEM, RNG.integers(0, 100_000, PROMPT_TOKENS - 2048, dtype=np.uint32)]), 16)
    for _ in range(BOOKED)
]


def busy_router(detector, instances):
    """Every instance holds the system prompt, and 256 requests are in flight."""
    router = Router(detector=detector)
    for i in range(instances):
        router.add_instance(f"i{i}", cache_blocks=60_000)
        router.route_keys(KEYS[0], prompt_tokens=PROMPT_TOKENS, request_id=("warm", i), candidates=[f"i{i}"])
        router.finish(("warm", i))
    for i in range(BOOKED):
        router.route_keys(KEYS[i], prompt_tokens=PROMPT_TOKENS, request_id=i)
    return router


@pytest.mark.benchmark(group="route and finish, keys known, 512 blocks")
@pytest.mark.parametrize("instances", [16, 64])
@pytest.mark.parametrize("detector", [None, FailureDetector], ids=["without", "detector"])
def bench_route_and_finish(benchmark, detector, instances, quick):
    router = busy_router(detector and detector(), instances)
    ids = itertools.count(BOOKED)

    def route():
        request_id = next(ids)
        router.finish(request_id - BOOKED)
        router.route_keys(KEYS[request_id % BOOKED], prompt_tokens=PROMPT_TOKENS, request_id=request_id)

    benchmark.pedantic(route, rounds=1 if quick else 20_000)
    benchmark.extra_info |= {"tokens": PROMPT_TOKENS, "instances": instances}


@pytest.mark.benchmark(group="mode paper: dispatch, 1,000 requests in the window")
@pytest.mark.parametrize("classes", [32, 900])
def bench_paper_dispatch(benchmark, classes, quick):
    router = Router()
    for i in range(16):
        router.add_instance(f"i{i}", cache_blocks=60_000)
    decisions = []
    for i in range(classes):
        prompt = RNG.integers(0, 100_000, 321, dtype=np.uint32)
        router.route(prompt, request_id=i)
        decisions.append(router.select(prompt).columns)
    detector = FailureDetector(mode="paper")
    order = itertools.cycle(RNG.permutation(classes).tolist())

    def dispatch():
        detector.dispatch(decisions[next(order)], 0, 0)

    benchmark.pedantic(dispatch, rounds=1 if quick else 10_000, warmup_rounds=1 if quick else 2_000)
    benchmark.extra_info |= {"classes": classes}
