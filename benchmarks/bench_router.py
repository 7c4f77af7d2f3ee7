"""Whole decisions: 8,192 tokens, 64 instances, a warm prefix on some."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from inputs import INSTANCES, PROMPT_TOKENS

from mulsched import BlockStored, Router

SIZES = {"tokens": PROMPT_TOKENS, "instances": INSTANCES}
RNG = np.random.default_rng(2)
SYSTEM = RNG.integers(0, 100_000, 2048, dtype=np.uint32)
PROMPTS = [
    np.concatenate([SYSTEM, RNG.integers(0, 100_000, PROMPT_TOKENS - 2048, dtype=np.uint32)])
    for _ in range(64)
]


def composed(columns):
    """LMetric as a user would write it in numpy."""
    return columns.p_tokens * columns.batch_size


def warm_router(policy="lmetric"):
    router = Router(policy=policy)
    for i in range(INSTANCES):
        router.add_instance(f"i{i}", cache_blocks=60_000)
    for i, prompt in enumerate(PROMPTS):
        router.route(prompt, request_id=("warm", i))
        router.finish(("warm", i))
    return router


@pytest.mark.benchmark(group="route, 8,192 tokens x 64 instances")
@pytest.mark.parametrize("policy", ["lmetric", composed], ids=["fused", "numpy score"])
def bench_route(benchmark, policy, quick):
    router, ids, turn = warm_router(policy), itertools.count(), itertools.cycle(PROMPTS)

    def fresh():
        request_id = next(ids)
        if request_id >= 64:  # 64 requests are booked at any time
            router.finish(request_id - 64)
        return (next(turn),), {"request_id": request_id}

    benchmark.pedantic(router.route, setup=fresh, rounds=1 if quick else 5000)
    benchmark.extra_info |= SIZES


@pytest.mark.benchmark(group="select, 8,192 tokens x 64 instances")
@pytest.mark.parametrize("policy", ["lmetric", composed], ids=["fused", "numpy score"])
def bench_select(benchmark, policy, quick):
    """Between two bookings, as a route is: alone, it would find warm caches and nothing booked."""
    router, ids = warm_router(policy), itertools.count()

    def fresh():
        request_id = next(ids)
        if request_id >= 64:
            router.finish(request_id - 64)
        router.route(PROMPTS[request_id % 64], request_id=request_id)
        return (PROMPTS[(request_id + 32) % 64],), {}

    benchmark.pedantic(router.select, setup=fresh, rounds=1 if quick else 5000)
    benchmark.extra_info |= SIZES


TIERS = [None, {"CPU": 0.1}, {"CPU": 0.1, "DISK": 0.5}]


@pytest.mark.benchmark(group="select over storage tiers, 8,192 tokens x 64 instances")
@pytest.mark.parametrize("tier_cost_ratio", TIERS, ids=["GPU only", "CPU", "CPU and disk"])
def bench_select_over_tiers(benchmark, tier_cost_ratio):
    """Every instance holds half of the prompt on its GPU and all of it in every tier."""
    router, prompt = Router(tier_cost_ratio=tier_cost_ratio), PROMPTS[0]
    hashes = np.arange(PROMPT_TOKENS // 16, dtype=np.uint64)
    for i in range(INSTANCES):
        router.add_instance(f"i{i}")
        for medium in router.media:
            n = len(hashes) // 2 if medium == "GPU" else len(hashes)
            router.apply(BlockStored(f"i{i}", hashes[:n], None, 16, prompt[: 16 * n], medium=medium))
    benchmark(router.select, prompt)
    benchmark.extra_info |= SIZES


@pytest.mark.benchmark(group="first token and finish")
def bench_life(benchmark, quick):
    router, ids = warm_router(), itertools.count()

    def fresh():
        request_id = next(ids)
        router.route(PROMPTS[request_id % 64], request_id=request_id)
        return (request_id,), {}

    def end(request_id):
        router.first_token(request_id)
        router.finish(request_id)

    benchmark.pedantic(end, setup=fresh, rounds=1 if quick else 3000)
    benchmark.extra_info |= SIZES


PURE = """
import statistics, sys, time
sys.path.insert(0, sys.argv[3])
from bench_router import PROMPTS, composed, warm_router
router = warm_router({"fused": "lmetric", "numpy score": composed}[sys.argv[2]])
took = {"route": [], "select": []}
for i in range(int(sys.argv[1])):
    prompt = PROMPTS[i % 64]
    for name, call in (
        ("select", lambda: router.select(prompt)),
        ("route", lambda: router.route(prompt, request_id=i)),
    ):
        start = time.perf_counter()
        call()
        took[name].append(time.perf_counter() - start)
    router.finish(i)
print(*(statistics.median(took[name]) for name in ("route", "select")))
"""


def pure_python(benchmark, quick, score):
    """The twin is chosen at import: run it in a process of its own; medians of route and select, us."""
    environment = os.environ | {"MULSCHED_BACKEND": "python"}
    command = [sys.executable, "-c", PURE, "5" if quick else "200", score, str(Path(__file__).parent)]
    done = benchmark.pedantic(
        lambda: subprocess.run(command, env=environment, capture_output=True, text=True, check=True), rounds=1
    )
    return [1e6 * float(seconds) for seconds in done.stdout.split()]


@pytest.mark.benchmark(group="route, 8,192 tokens x 64 instances")
@pytest.mark.parametrize("score", ["fused", "numpy score"])
def bench_route_in_pure_python(benchmark, quick, score):
    route, _ = pure_python(benchmark, quick, score)
    benchmark.extra_info |= SIZES | {"median_us": route}


@pytest.mark.benchmark(group="select, 8,192 tokens x 64 instances")
@pytest.mark.parametrize("score", ["fused", "numpy score"])
def bench_select_in_pure_python(benchmark, quick, score):
    _, select = pure_python(benchmark, quick, score)
    benchmark.extra_info |= SIZES | {"median_us": select}
