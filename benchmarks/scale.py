"""How replay and decisions scale: ``python benchmarks/scale.py [--requests N] [--instances N] [--png FILE]``.

First a replay of synthetic chat at 1.75 requests per second and instance, about two thirds of what the
built-in engines take; then the cost of one decision against instances and blocks in the index, medians of
single calls.
"""

import argparse
import resource
import time
from pathlib import Path

import numpy as np

from mulsched import Router
from mulsched.replay import builtin_profile, replay, synthetic_trace

RATE_PER_INSTANCE = 1.75
PROMPT_BLOCKS = 128
HOLDERS = 4  # instances that hold each prompt of the index


def replay_cost(requests: int, instances: int) -> None:
    """Replay and print seconds and memory."""
    rate = RATE_PER_INSTANCE * instances
    trace = synthetic_trace("chat", duration_s=requests / rate, seed=0, rate_per_s=rate)
    start = time.perf_counter()
    result = replay(trace, "lmetric", profile=builtin_profile(), instances=instances)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"replay: {len(trace):,} requests of {trace.arrival_s[-1]:,.0f} s on {instances:,} instances in "
        f"{seconds:.1f} s, {1e6 * seconds / len(trace):.0f} us a request, peak {peak:.1f} GiB; "
        f"hit ratio {result.summary()['hit_ratio']:.3f}"
    )


def decision_us(instances: int, blocks: int, *, calls: int = 400) -> float:
    """Return the median microseconds of ``select_keys``: half of the prompts cached, on some instances."""
    rng = np.random.default_rng(0)
    router = Router(block_size=16)
    names = [f"instance-{i}" for i in range(instances)]
    for name in names:
        router.add_instance(name)
    prompts = rng.integers(0, 2**63, (max(1, blocks // PROMPT_BLOCKS), PROMPT_BLOCKS), dtype=np.uint64)
    for i, keys in enumerate(prompts):
        for holder in range(min(HOLDERS, instances)):
            router.index.store(names[(i + holder * 7) % instances], keys, engine_hashes=keys)
    asked = [
        prompts[rng.integers(len(prompts))]
        if rng.random() < 0.5
        else rng.integers(0, 2**63, PROMPT_BLOCKS, dtype=np.uint64)
        for _ in range(calls)
    ]
    seconds = []
    for keys in asked:
        start = time.perf_counter_ns()
        router.select_keys(keys, prompt_tokens=16 * PROMPT_BLOCKS)
        seconds.append(time.perf_counter_ns() - start)
    return float(np.median(seconds)) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--instances", type=int, default=1_000)
    parser.add_argument("--png", type=Path, help="plot the cost of a decision (needs matplotlib)")
    options = parser.parse_args()
    replay_cost(options.requests, options.instances)
    sizes, counts = (10_000, 100_000, 1_000_000), (4, 16, 64, 256, 1000)
    costs = {size: [decision_us(n, size) for n in counts] for size in sizes}
    print(f"\nus a decision\n{'blocks':>10}" + "".join(f"{n:>8}" for n in counts) + "  instances")
    for size in sizes:
        print(f"{size:>10,}" + "".join(f"{us:>8.1f}" for us in costs[size]))
    if options.png:
        plot(options.png, counts, costs)


def plot(path: Path, counts: tuple[int, ...], costs: dict[int, list[float]]) -> None:
    """Write the cost of a decision as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for (size, us), marker in zip(costs.items(), "os^", strict=True):
        axes.plot(counts, us, marker=marker, label=f"{size:,} blocks in the index")
    axes.set(
        xscale="log", xlabel="instances", ylabel="median time of select_keys, us", ylim=(0, None),
        title=f"One decision, prompts of {PROMPT_BLOCKS} blocks, LMetric",
    )  # fmt: skip
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
