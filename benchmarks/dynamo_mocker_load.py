"""Dynamo's own choice of workers beside ours: the same load, in real time, on workers of ``dynamo.mocker``.

PYTHONPATH=tests/adapters python benchmarks/dynamo_mocker_load.py, with docs/adapters.md's packages. Each run
has fresh workers; runs of the two take turns. Prints a table.
"""

import argparse
import asyncio
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dynamo_mocker import BLOCK_SIZE, ENDPOINT, Workers, until

from mulsched.adapters.dynamo import LMetricWorkers

WORKERS = 3
WAIT_S = 60
NAMES = ("dynamo", "lmetric")


def load(seed, count, rate):
    """Return arrivals: time in s, prompt, and output tokens."""
    rng = random.Random(seed)
    prefixes = [rng.choices(range(2, 500), k=rng.randint(500, 3000)) for _ in range(12)]
    weights = [1 / (i + 1) for i in range(len(prefixes))]
    now, arrivals = 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        prompt = rng.choices(prefixes, weights)[0] + rng.choices(range(2, 500), k=rng.randint(50, 500))
        arrivals.append((now, prompt, rng.randint(20, 100)))
    return arrivals


async def answer(send, prompt, output_tokens):
    """Return time to first token, mean time between tokens, and cached tokens of one request."""
    start = time.perf_counter()
    stop = {"max_tokens": output_tokens, "ignore_eos": True}
    times, cached = [], 0
    async for output in await send(prompt, stop):
        if output["token_ids"]:
            times.append(time.perf_counter())
        if len(times) == 1 and output.get("completion_usage"):
            cached = output["completion_usage"]["prompt_tokens_details"]["cached_tokens"]
    return times[0] - start, (times[-1] - times[0]) / (len(times) - 1), cached


async def drive(name, workers, arrivals):
    from dynamo.llm import KvRouter, KvRouterConfig
    from dynamo.runtime import DistributedRuntime

    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp", event_plane="zmq")
    endpoint = runtime.endpoint(ENDPOINT)
    client = await endpoint.client()

    async def there():
        return len(client.instance_ids()) == WORKERS and len(workers.channels()) == WORKERS

    await until(there, WAIT_S, workers.logs)
    kv_router = KvRouter(endpoint, BLOCK_SIZE, KvRouterConfig())

    async def listed():
        return len(await kv_router.get_potential_loads([1])) == WORKERS

    await until(listed, WAIT_S, workers.logs)
    ours = LMetricWorkers(kv_router, block_size=BLOCK_SIZE)
    events = asyncio.create_task(ours.follow(*workers.channels().values()))

    async def send(prompt, stop):
        if name == "dynamo":
            return await kv_router.generate(prompt, "m", stop_conditions=stop)
        return ours.generate(prompt, "m", stop_conditions=stop)

    async def at(start, when, prompt, output_tokens):
        await asyncio.sleep(start + when - time.perf_counter())
        return await answer(send, prompt, output_tokens)

    await answer(send, [2] * 20, 2)
    start = time.perf_counter()
    answers = await asyncio.gather(*(at(start, *arrival) for arrival in arrivals))
    events.cancel()
    runtime.shutdown()
    prompt_tokens = sum(len(prompt) for _, prompt, _ in arrivals)
    return answers, sum(cached for _, _, cached in answers) / prompt_tokens


def one(name, seed, args):
    """Run one load on fresh workers; return its figures."""
    with tempfile.TemporaryDirectory() as directory:
        workers = Workers(Path(directory), "--num-gpu-blocks-override", str(args.blocks))
        os.environ.update(workers.environment)
        with workers.run(WORKERS):
            answers, hit = asyncio.run(drive(name, workers, load(seed, args.requests, args.rate)))
    ttft = sorted(first * 1e3 for first, _, _ in answers)
    itl = [each * 1e3 for _, each, _ in answers]
    p99 = ttft[int(0.99 * len(ttft))]
    return statistics.fmean(ttft), p99, statistics.fmean(itl), 100 * hit


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--rate", type=float, default=15.0, help="requests a second")
    parser.add_argument("--blocks", type=int, default=600, help="a worker's cache")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--one", help="a router and a seed, as NAME:SEED: print its figures")
    args = parser.parse_args()
    name, _, seed = (args.one or "").partition(":")
    if name:
        print(*one(name, int(seed), args), flush=True)
        return
    print("| router | seed | TTFT mean, ms | p99 | ITL mean, ms | hit, % |")
    print("| --- | --- | --- | --- | --- | --- |")
    for seed in range(args.seeds):
        for name in NAMES if seed % 2 else reversed(NAMES):
            print(f"| {name} | {seed} |", *(f"{figure:.1f} |" for figure in child(name, seed)), flush=True)


def child(name, seed):
    command = [sys.executable, __file__, *sys.argv[1:], "--one", f"{name}:{seed}"]
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    return [float(figure) for figure in told.splitlines()[-1].split()]


if __name__ == "__main__":
    main()
