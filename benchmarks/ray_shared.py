"""What it costs to ask the shared router of Ray Serve, in milliseconds.

Two processes on two nodes of a cluster on this machine reserve and end requests of 8,192 tokens among 16
replicas, first one after the other, then as many at once as the actor takes.
"""

import argparse
import asyncio
import os
import time

import numpy as np
import ray
from ray.cluster_utils import Cluster

from mulsched.adapters._bodies import BodyRouter
from mulsched.adapters._ray_actor import RouterActor

REPLICAS = [f"app#Engine#replica{i}" for i in range(16)]
OPTIONS = {"cache_tokens": 400_000, "prefill_tokens_per_s": 8_000}
IN_FLIGHT = 32  # twice the replicas, as many as a process of Serve asks for at once


def prompts(count, seed):
    """Block keys of prompts that share their first half with one of eight."""
    rng = np.random.default_rng(seed)
    starts = np.random.default_rng(0).integers(1, 2**63, (8, 256), dtype=np.uint64)
    return [
        (np.concatenate([starts[rng.integers(8)], rng.integers(1, 2**63, 256, dtype=np.uint64)]), 8192 * 4)
        for _ in range(count)
    ]


async def ask(count, seed, in_flight):
    """Return the seconds that each reservation took."""
    router = RouterActor("benchmark", 60.0, time.monotonic, **OPTIONS)
    await router.reserve(prompts(1, 0)[0], (seed, "first"), REPLICAS)
    work = iter(enumerate(prompts(count, seed)))
    took = []

    async def client():
        for number, prompt in work:
            start = time.perf_counter()
            replica = await router.reserve(prompt, (seed, number), REPLICAS)
            took.append(time.perf_counter() - start)
            router.end(("finish", (seed, number), replica))

    await asyncio.gather(*(client() for _ in range(in_flight)))
    assert router.local_decisions == 0
    return took


class Front:
    """A process that has a router, or asks one."""

    def ask(self, count, seed, in_flight):
        return asyncio.run(ask(count, seed, in_flight))

    def alone(self, count, seed):
        bodies, took = BodyRouter(**OPTIONS), []
        bodies.set_instances(REPLICAS)
        for number, prompt in enumerate(prompts(count, seed)):
            start = time.perf_counter()
            bodies.reserve_keys(prompt, request_id=number, now=start, candidates=REPLICAS)
            took.append(time.perf_counter() - start)
            bodies.end(("finish", number, None), now=start)
        return took


def show(name, took):
    p50, p99 = np.percentile(np.concatenate(took) * 1e3, [50, 99])
    print(f"{name:42} p50 {p50:7.3f}  p99 {p99:7.3f}", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=2000)
    count = parser.parse_args().requests
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(
        initialize_head=True, head_node_args={**node, "resources": {"a": 1}, "include_dashboard": False}
    )
    cluster.add_node(**node, resources={"b": 1})
    ray.init(address=cluster.address, log_to_driver=False)
    a, b = (ray.remote(num_cpus=0)(Front).options(resources={name: 0.5}).remote() for name in "ab")
    ray.get([a.ask.remote(10, 1, 1), b.ask.remote(10, 2, 1)])
    actor = ray.get_actor("benchmark", namespace="mulsched")
    show("in the process itself", ray.get([a.alone.remote(count, 3)]))
    for name, front, seed in (("a", a, 4), ("b", b, 5)):
        show(f"the actor, asked from node {name}", ray.get([front.ask.remote(count, seed, 1)]))
    cpu = actor.__ray_call__.remote(lambda shared: time.process_time())
    start, before = time.perf_counter(), ray.get(cpu)
    show(
        f"the actor, {IN_FLIGHT} at once from both",
        ray.get([a.ask.remote(count, 6, IN_FLIGHT), b.ask.remote(count, 7, IN_FLIGHT)]),
    )
    elapsed = time.perf_counter() - start
    cpu = ray.get(actor.__ray_call__.remote(lambda shared: time.process_time())) - before
    print(
        f"then {2 * count / elapsed:.0f} requests/s, {cpu / (2 * count) * 1e3:.3f} ms of the actor's CPU each"
    )
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs, Ray {ray.__version__}")
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
