"""Random operations on the twins and on the naive model: one content, one answer, one tree."""

import os
from functools import partial

import numpy as np
import pytest
from backends import BACKENDS, new_backend
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from model import ModelIndex

from mulsched._prefix_index_py import PrefixIndexPy, _Tree

# Small enough that random paths meet, part, and meet again.
KEYS = st.lists(st.integers(0, 2), max_size=6)
HASHES = st.integers(0, 7)
BOUNDED, UNBOUNDED, NAMED = (0, 1, 2), (3, 4), (5, 6)
ROWS = BOUNDED + UNBOUNDED + NAMED


def words(values):
    return np.array(values, dtype=np.uint64)


def twins():
    return [partial(new_backend, name) for name in BACKENDS]


class IndexMachine(RuleBasedStateMachine):
    """Every operation goes to all backends and to the model; everything they return must agree."""

    backends = staticmethod(twins)

    @initialize(capacities=st.lists(st.integers(1, 6), min_size=3, max_size=3))
    def start(self, capacities):
        self.model = ModelIndex()
        self.indexes = [backend() for backend in self.backends()]
        for row in ROWS:
            self.all("add_row", row, capacities[row] if row in BOUNDED else -1, row in NAMED)

    def all(self, operation, *arguments):
        as_words = [words(a) if isinstance(a, list) else a for a in arguments]
        expected = getattr(self.model, operation)(*arguments)
        for index in self.indexes:
            assert expected == getattr(index, operation)(*as_words), operation
        return expected

    @rule(row=st.sampled_from(BOUNDED + UNBOUNDED), keys=KEYS)
    def store(self, row, keys):
        self.all("store", row, keys)

    @rule(row=st.sampled_from(BOUNDED + UNBOUNDED), keys=KEYS, start=st.integers(0, 6))
    def discard(self, row, keys, start):
        self.all("discard", row, keys, min(start, len(keys)))

    @rule(row=st.sampled_from(BOUNDED), capacity=st.integers(1, 6))
    def resize(self, row, capacity):
        self.all("resize", row, capacity)

    @rule(
        row=st.sampled_from(NAMED),
        parent=st.none() | HASHES,
        blocks=st.lists(st.tuples(HASHES, st.integers(0, 2)), max_size=4),
    )
    def store_named(self, row, parent, blocks):
        self.all("store_named", row, parent, [h for h, _ in blocks], [k for _, k in blocks])

    @rule(row=st.sampled_from(NAMED), hashes=st.lists(HASHES, max_size=4))
    def remove_named(self, row, hashes):
        self.all("remove_named", row, hashes)

    @rule(row=st.sampled_from(ROWS))
    def clear(self, row):
        self.all("clear", row)

    @rule(row=st.sampled_from(ROWS))
    def replace_row(self, row):
        capacity = self.model.capacity[row]
        self.all("remove_row", row)
        self.all("add_row", row, capacity, row in NAMED)

    @rule(keys=KEYS)
    def match(self, keys):
        for index in self.indexes:
            matched = np.full(max(ROWS) + 1, -5, dtype=np.int64)
            index.match(words(keys), matched)
            assert [self.model.match(keys, row) for row in ROWS] == matched.tolist()

    @invariant()
    def counts_agree_with_the_model(self):
        for index in self.indexes:
            assert self.model.unique_blocks() == index.unique_blocks()
            for row in ROWS:
                assert self.model.blocks(row) == index.blocks(row)

    @invariant()
    def trees_are_canonical_and_equal(self):
        for index in self.indexes:
            index.check()
            assert self.indexes[0].edges() == index.edges()
            assert len(index.edges()) == index.nodes()
            for row in ROWS:
                assert self.indexes[0].lru(row) == index.lru(row)

    @invariant()
    def nothing_is_left_of_nothing(self):
        if self.model.unique_blocks() == 0:
            for index in self.indexes:
                assert index.nodes() == 0

    @invariant()
    def bounded_rows_evict_in_the_models_order(self):
        for index in self.indexes:
            start = starts(index)
            for row in BOUNDED:
                order = [
                    tuple(path[:n])
                    for path in index.lru(row)
                    for n in range(len(path), start[tuple(path)], -1)
                ]
                assert self.model.order[row] == order


def starts(index):
    """The depth where each node's edge starts, by the node's path from the root."""
    found, above = {}, []
    for start, keys, _ in index.edges():
        above = above[:start] + keys
        found[tuple(above)] = start
    return found


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(
    max_examples=int(os.environ.get("MULSCHED_MACHINE_EXAMPLES", "60")), stateful_step_count=30, deadline=None
)


@given(st.lists(st.tuples(st.sampled_from(UNBOUNDED), KEYS), max_size=12), st.randoms(use_true_random=False))
def test_the_same_content_has_the_same_nodes_by_any_route(paths, random):
    for backend in twins():
        straight, detour = backend(), backend()
        for index in (straight, detour):
            for row in UNBOUNDED:
                index.add_row(row, -1, False)
        for row, keys in paths:
            straight.store(row, words(keys))
        extra = [(row, [*keys, 0, 1]) for row, keys in paths]
        shuffled = random.sample(paths + extra, 2 * len(paths))
        for row, keys in shuffled:
            detour.store(row, words(keys))
        held = {
            row: {tuple(k[:n]) for r, k in paths if r == row for n in range(1, len(k) + 1)}
            for row in UNBOUNDED
        }
        for row, keys in extra:
            for n in range(len(keys), 0, -1):
                if tuple(keys[:n]) not in held[row]:
                    detour.discard(row, words(keys[:n]), n - 1)
        assert straight.edges() == detour.edges()


class ForgetsNoRemoval(PrefixIndexPy):
    def remove_named(self, row, hashes):
        return sum(name in self._tree.rows[row].names for name in set(hashes.tolist()))


class EvictsTheNewest(PrefixIndexPy):
    def _evict(self, row):
        state = self._tree.rows[row]
        while state.blocks > state.capacity:
            self._tree.drop_holder(state.tail, row)


class NeverMergingTree(_Tree):
    def _mergeable(self, parent, child):
        return False


class NeverMerges(PrefixIndexPy):
    def __init__(self):
        self._tree = NeverMergingTree()


@pytest.mark.parametrize("broken", [ForgetsNoRemoval, EvictsTheNewest, NeverMerges])
def test_the_harness_catches_a_broken_index(broken):
    class Machine(IndexMachine):
        backends = staticmethod(lambda: [PrefixIndexPy, broken])

    quick = settings(
        max_examples=1000,
        derandomize=True,
        stateful_step_count=20,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Machine, settings=quick)
