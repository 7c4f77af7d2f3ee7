"""The prefix index: match, store, remove, memory."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from inputs import INSTANCES, PROMPT_BLOCKS

from mulsched import PrefixIndex

BATCH = 64


def describe(benchmark, index):
    total = index.memory()["total"]
    held = sum(index.blocks(name) for name in index.instances)
    benchmark.extra_info |= {
        "unique_blocks": len(index),
        "blocks_held": held,
        "nodes": index.n_nodes,
        "bytes_per_block_and_instance": round(total / held, 1),
        "bytes_per_unique_block": round(total / len(index), 1),
    }


@pytest.mark.benchmark(group="match, 512 blocks x 64 instances")
@pytest.mark.parametrize("kind", ["hit", "partial", "miss"])
def bench_match(benchmark, big_index, kind):
    index, paths = big_index
    strangers = np.random.default_rng(9).integers(0, 2**64, PROMPT_BLOCKS, dtype=np.uint64)
    asked = {
        "hit": paths,
        "partial": [np.concatenate([path[:256], strangers[256:]]) for path in paths[:1000]],
        "miss": [strangers],
    }[kind]
    # another path each time, so that the tree is not all in the cache of the processor
    turn = itertools.cycle(asked)
    matched = benchmark(lambda: index.match(next(turn)))
    assert matched.shape == (INSTANCES,)
    assert matched.max() == {"hit": 512, "partial": 256, "miss": 0}[kind]
    describe(benchmark, index)


def store_events(benchmark, events, rounds):
    rng = np.random.default_rng(3)
    keys = rng.integers(0, 2**64, (events, BATCH), dtype=np.uint64)
    hashes = rng.integers(0, 2**64, (events, BATCH), dtype=np.uint64)
    made = []

    def fresh():
        index = PrefixIndex()
        index.add_instance("a", engine_hashes=True)
        made[:] = [index]
        return (index,), {}

    def store(index):
        # sequences of 8 events, each after the last
        for i in range(events):
            parent = hashes[i - 1, -1] if i % 8 else None
            index.store("a", keys[i], parent=parent, engine_hashes=hashes[i])

    benchmark.pedantic(store, setup=fresh, rounds=rounds)
    assert made[0].blocks("a") == events * BATCH
    describe(benchmark, made[0])
    benchmark.extra_info["blocks_per_round"] = events * BATCH


@pytest.mark.benchmark(group="store and memory, events of 64 blocks with engine hashes")
def bench_store_events(benchmark, backend, quick):
    store_events(benchmark, 50 if quick else 2000 if backend == "native" else 400, 1 if quick else 7)


@pytest.mark.benchmark(group="store and memory, a million blocks in events of 64 with engine hashes")
def bench_store_a_million_blocks(benchmark, quick):
    store_events(benchmark, 50 if quick else 16_000, 1 if quick else 7)


@pytest.mark.benchmark(group="store, a predicted path of 512 blocks, LRU full")
def bench_store_predicted(benchmark, backend, quick):
    index = PrefixIndex()
    index.add_instance("a", capacity_blocks=2_000 if quick else 60_000)
    rng = np.random.default_rng(4)
    paths = rng.integers(0, 2**64, (20 if quick else 500, PROMPT_BLOCKS), dtype=np.uint64)
    for path in paths:
        index.store("a", path)
    turn = itertools.cycle(paths)
    benchmark(lambda: index.store("a", next(turn)))
    describe(benchmark, index)


@pytest.mark.benchmark(group="remove, 64 blocks by engine hash, tail first")
def bench_remove(benchmark, backend, quick):
    rng = np.random.default_rng(5)
    keys = rng.integers(0, 2**64, PROMPT_BLOCKS, dtype=np.uint64)
    index = PrefixIndex()
    index.add_instance("a", engine_hashes=True)
    index.store("a", keys[:-64], engine_hashes=keys[:-64])

    def fill():
        index.store("a", keys[-64:], parent=keys[-65], engine_hashes=keys[-64:])
        return (), {}

    removed = benchmark.pedantic(
        lambda: index.remove("a", keys[:-65:-1]), setup=fill, rounds=1 if quick else 500
    )
    assert removed == 64
    describe(benchmark, index)


@pytest.mark.benchmark(group="memory")
@pytest.mark.parametrize("kind", ["named", "bounded"])
@pytest.mark.parametrize("name", ["native", "python"])
def bench_memory(benchmark, name, kind, quick):
    """Bytes a block by the index's account and by the operating system's; how long it takes says nothing."""
    blocks = 20_000 if quick else {"native": 1_000_000, "python": 100_000}[name]
    command = [sys.executable, str(Path(__file__).parent / "memory.py"), kind, str(blocks)]
    environment = os.environ | {"MULSCHED_BACKEND": name}
    done = benchmark.pedantic(
        lambda: subprocess.run(command, env=environment, capture_output=True, text=True, check=True), rounds=1
    )
    benchmark.extra_info |= json.loads(done.stdout)
