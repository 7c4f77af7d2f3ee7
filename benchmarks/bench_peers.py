"""Beside Dynamo's RadixTree (ai-dynamo-runtime 1.6.1), from Python, one call at a time.

Opt in: pip install '.[dynamo]', then taskset -c 0 pytest benchmarks/bench_peers.py -m peers. Its tree answers
from a thread of its own: unpinned one measures the wake-up, which flatters us.
"""

import importlib
import itertools
import json

import numpy as np
import pytest
from inputs import PROMPT_BLOCKS

from mulsched import PrefixIndex

pytestmark = pytest.mark.peers

RNG = np.random.default_rng(6)
SHARED = RNG.integers(0, 2**63, 128, dtype=np.uint64)


def paths(n):
    return [
        np.concatenate([SHARED, RNG.integers(0, 2**63, PROMPT_BLOCKS - 128, dtype=np.uint64)])
        for _ in range(n)
    ]


def stored(path):
    chain = [int(k) for k in np.cumsum(path)]
    blocks = [{"block_hash": h, "tokens_hash": int(k)} for h, k in zip(chain, path, strict=True)]
    return {"event_id": 1, "data": {"stored": {"parent_hash": None, "blocks": blocks}}}


@pytest.mark.benchmark(group="peers: match, 512 blocks x 64 instances, 128 shared by all")
@pytest.mark.parametrize("name", ["mulsched", "dynamo"])
def bench_match(benchmark, name):
    tree = importlib.import_module("dynamo.llm").RadixTree()
    index = PrefixIndex()
    prompts = paths(64)
    for i, path in enumerate(prompts):
        index.add_instance(f"i{i}")
        index.store(f"i{i}", path)
        tree.apply_event(i, json.dumps(stored(path)).encode())
    if name == "mulsched":
        turn = itertools.cycle(prompts)
        best = benchmark(lambda: index.match(next(turn))).max()
    else:
        lists = itertools.cycle([path.tolist() for path in prompts])
        best = max(benchmark(lambda: tree.find_matches(next(lists)).scores).values())
    assert best == PROMPT_BLOCKS


@pytest.mark.benchmark(group="peers: block keys of 4,096 tokens from a list")
@pytest.mark.parametrize("name", ["mulsched", "dynamo"])
def bench_keys(benchmark, name):
    from mulsched import block_keys

    tokens = RNG.integers(0, 100_000, 4096).tolist()
    hashing = (
        importlib.import_module("dynamo.llm").compute_block_hash_for_seq if name == "dynamo" else block_keys
    )
    assert len(benchmark(hashing, tokens, 16)) == 256
