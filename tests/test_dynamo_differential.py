"""Our index against Dynamo's RadixTree, and our keys against its block hashes.

Opt in: pip install '.[dynamo]', then pytest -m dynamo. Dynamo wants blocks removed leaf first.
"""

import importlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mulsched import Namespace, PrefixIndex, block_keys

pytestmark = pytest.mark.dynamo

WORKERS = (1, 2, 3)
KEYS = st.integers(0, 2)


def dynamo():
    return importlib.import_module("dynamo.llm")


class Both:
    """The same events for both indexes; hashes name prefixes, as an engine's do."""

    def __init__(self):
        self.ours, self.theirs = PrefixIndex(), dynamo().RadixTree()
        self.events = 0
        self.held = {worker: [] for worker in WORKERS}
        for worker in WORKERS:
            self.ours.add_instance(str(worker), engine_hashes=True)

    def tell(self, worker, data):
        self.events += 1
        self.theirs.apply_event(worker, json.dumps({"event_id": self.events, "data": data}).encode())

    def store(self, worker, path):
        held = self.held[worker]
        known = max(n for n in range(len(path) + 1) if n == 0 or path[:n] in held)
        new = [path[:n] for n in range(known + 1, len(path) + 1)]
        if not new:
            return
        parent = hash_of(path[:known]) if known else None
        hashes = [hash_of(prefix) for prefix in new]
        keys = [prefix[-1] for prefix in new]
        self.ours.store(str(worker), keys, parent=parent, engine_hashes=hashes)
        blocks = [{"block_hash": h, "tokens_hash": k} for h, k in zip(hashes, keys, strict=True)]
        self.tell(worker, {"stored": {"parent_hash": parent, "blocks": blocks}})
        held += new

    def remove_a_leaf(self, worker, draw):
        held = self.held[worker]
        leaves = [p for p in held if not any(len(q) > len(p) and q[: len(p)] == p for q in held)]
        if not leaves:
            return
        leaf = leaves[draw % len(leaves)]
        held.remove(leaf)
        self.ours.remove(str(worker), [hash_of(leaf)])
        self.tell(worker, {"removed": {"block_hashes": [hash_of(leaf)]}})

    def clear(self, worker):
        self.held[worker] = []
        self.ours.clear(str(worker))
        self.tell(worker, "cleared")

    def compare(self, path):
        ours = {int(w): n for w, n in self.ours.match_by_instance(list(path)).items() if n}
        theirs = {w: n for (w, _), n in self.theirs.find_matches(list(path)).scores.items() if n}
        assert theirs == ours


def hash_of(prefix):
    """An engine hash for a prefix: any injective number will do."""
    return int("1" + "".join(map(str, prefix)), 4)


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["store", "store", "remove", "clear"]),
        st.sampled_from(WORKERS),
        st.lists(KEYS, min_size=1, max_size=6).map(tuple),
        st.integers(0, 100),
    ),
    max_size=25,
)


@settings(max_examples=100)
@given(OPERATIONS, st.lists(st.lists(KEYS, min_size=1, max_size=7), max_size=5))
def test_both_indexes_match_alike(operations, paths):
    both = Both()
    for operation, worker, path, draw in operations:
        if operation == "store":
            both.store(worker, path)
        elif operation == "remove":
            both.remove_a_leaf(worker, draw)
        elif draw % 4 == 0:
            both.clear(worker)
        both.compare(path)
    for path in paths:
        both.compare(path)


def test_block_keys_are_its_local_block_hashes():
    tokens = np.random.default_rng(1).integers(0, 150_000, 1000).tolist()
    assert block_keys(tokens, 16).tolist() == dynamo().compute_block_hash_for_seq(tokens, 16)


def test_an_adapters_keys_are_its_own_too():
    tokens = list(range(100))
    theirs = dynamo().compute_block_hash_for_seq(tokens, 16, lora_name="adapter")
    assert block_keys(tokens, 16, namespace=Namespace(lora="adapter")).tolist() == theirs
