"""Runs of events in arrays: the same as the events one by one, on the index and on the router."""

import numpy as np
import pytest
from backends import BACKENDS, new_backend
from hypothesis import given
from hypothesis import strategies as st

from mulsched import (
    BlockRemoved,
    BlockSizeMismatch,
    BlockStored,
    InvalidArgument,
    InvalidType,
    MulschedError,
    Namespace,
    PrefixIndex,
    Router,
    UnknownInstance,
    block_keys,
)
from mulsched.types import EventRun, RunApplied

START, AFTER, REMOVED = 0, 1, 2


def a_run(*events, tokens=None, block_size=4, **fields):
    """A run of (kind, hashes, parent), a store of hash h of the tokens h, h, h, h."""
    table = np.array([(k, len(h), p) for k, h, p in events], np.uint64).reshape(-1, 3)
    hashes = np.array([h for _, some, _ in events for h in some], np.uint64)
    if tokens is None:
        tokens = [t for k, some, _ in events if k != REMOVED for h in some for t in [h % 5] * block_size]
    return EventRun("a", table, hashes, np.array(tokens, np.uint32), block_size, **fields)


def a_router(**instance):
    router = Router(block_size=4)
    router.add_instance("a", **instance)
    return router


def content(router):
    router.index.check()
    return router.index.dump(), router.index.removed_unknown


def hit(router, tokens, **options):
    return router.select(tokens, **options).hit_tokens


def one_by_one(router, run):
    stored = refused = removed = 0
    for event in run:
        try:
            router.apply(event)
        except MulschedError:
            refused += 1
            continue
        if isinstance(event, BlockStored):
            stored += len(event.block_hashes)
        else:
            removed += len(event.block_hashes)
    return stored, refused, removed


def test_a_run_is_its_events_in_order():
    run = a_run((START, [1, 2], 0), (REMOVED, [2], 0), (AFTER, [3], 1), medium="CPU", counts_copies=False)
    read = [(type(e), list(e.block_hashes), e.medium) for e in run]
    assert read == [(BlockStored, [1, 2], "CPU"), (BlockRemoved, [2], "CPU"), (BlockStored, [3], "CPU")]
    first, _, last = run
    assert (first.parent_hash, last.parent_hash, list(last.token_ids)) == (None, 1, [3] * 4)
    assert (len(run), first.counts_copies) == (3, False)


def test_a_run_says_what_became_of_its_events():
    router = a_router()
    run = a_run((START, [1, 2], 0), (AFTER, [3], 9), (AFTER, [4], 2), (REMOVED, [4, 7], 0))
    assert router.apply_run(run) == RunApplied(
        blocks_stored=3, stores_refused=1, blocks_removed=2, blocks_known=1
    )
    assert (hit(router, [1] * 4 + [2] * 4 + [4] * 5), router.index.removed_unknown) == (8, 1)


def test_a_run_of_an_adapter_is_found_by_its_requests_only():
    router = a_router()
    router.apply_run(a_run((START, [1], 0), namespace=Namespace(lora="sql")))
    assert [hit(router, [1] * 5, namespace=n) for n in (Namespace(lora="sql"), None)] == [4, 0]


def test_stores_whose_parents_are_unknown_leave_a_predicted_cache_alone():
    router = a_router(cache_blocks=10)
    router.route([1] * 9, request_id="r")
    router.first_token("r")
    before = content(router)
    assert router.apply_run(a_run((AFTER, [1], 9), (AFTER, [2], 1))) == RunApplied(0, 2, 0, 0)
    assert content(router) == before
    router.apply_run(a_run((AFTER, [1], 9), (START, [2], 0)))
    assert (hit(router, [1] * 9), hit(router, [2] * 5)) == (0, 4)


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (a_run((START, [1], 0), block_size=8), BlockSizeMismatch, "stores blocks of 8 tokens, the router's are 4"),
        (a_run((START, [1], 0), medium="CPU"), InvalidArgument, "a run on the GPU without a cache salt expected"),
        (a_run((START, [1], 0), namespace=Namespace(cache_salt="s")), InvalidArgument, "without a cache salt"),
        (a_run((START, [1], 0), tokens=[1] * 3), InvalidArgument, "whole blocks of 4 token_ids expected, got 3"),
        (a_run((START, [1], 0), tokens=[1] * 8), InvalidArgument, "as many keys as they store expected, got 1 and 2"),
        (a_run((3, [1], 0)), InvalidArgument, "a kind of event in 0..2 expected, got 3"),
    ],
)  # fmt: skip
def test_a_run_that_does_not_fit_is_refused_and_changes_nothing(run, error, message):
    router = a_router()
    router.apply_run(a_run((START, [1], 0), (START, [2], 0)))
    before = content(router)
    with pytest.raises(error, match=message):
        router.apply_run(run)
    assert content(router) == before


def test_a_run_of_an_instance_that_is_not_there_is_refused():
    with pytest.raises(UnknownInstance, match="unknown instance 'a'"):
        Router(block_size=4).apply_run(a_run((START, [1], 0)))


@pytest.mark.parametrize("table", [[[0, 1, 0]], np.zeros((1, 3), np.int64), np.zeros(3, np.uint64)])
def test_a_table_that_is_none_is_refused(table):
    index = PrefixIndex()
    index.add_instance("a", engine_hashes=True)
    with pytest.raises(InvalidType, match="table must be an array of uint64 with 2 dimensions"):
        index.apply_run("a", table, np.zeros(1, np.uint64), np.zeros(1, np.uint64))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("table", "n_hashes", "n_keys"),
    [
        ([(START, 2, 0)], 1, 2),
        ([(START, 2, 0)], 2, 1),
        ([(REMOVED, 1, 0)], 1, 1),
        ([(START, 2**64 - 1, 0), (START, 2, 0)], 1, 1),
        ([(3, 0, 0)], 0, 0),
        ([(START, 1)], 1, 1),
        ([], 1, 0),
    ],
)
def test_a_table_that_does_not_fit_its_arrays_is_refused_before_anything_is_done(
    name, table, n_hashes, n_keys
):
    backend = new_backend(name)
    backend.add_row(0, -1, True)
    columns = 2 if table == [(START, 1)] else 3
    with pytest.raises(ValueError, match="expected, got"):
        backend.apply_run(
            0, np.array(table, np.uint64).reshape(-1, columns), np.zeros(n_hashes, np.uint64), np.zeros(n_keys, np.uint64)
        )  # fmt: skip
    assert backend.blocks(0) == 0


def test_a_long_run_is_applied_without_the_gil_and_the_same():
    n = 1000
    router = a_router()
    events = [(AFTER if h else START, [h], h - 1 if h else 0) for h in range(n)]
    assert router.apply_run(a_run(*events)).blocks_stored == n
    assert hit(router, [h % 5 for h in range(n) for _ in range(4)] + [0]) == 4 * n


RUNS = st.lists(
    st.tuples(st.sampled_from([START, AFTER, REMOVED]), st.lists(st.integers(0, 7), max_size=4), st.integers(0, 7)),
    max_size=12,
)  # fmt: skip


@given(st.lists(RUNS, max_size=3), st.booleans(), st.booleans())
def test_a_run_does_what_its_events_do_one_by_one(runs, counts_copies, predicted):
    instance = {"cache_blocks": 5} if predicted else {}
    at_once, singly = a_router(**instance), a_router(**instance)
    for router in (at_once, singly):
        router.add_instance("b")
    for events in runs:
        run = a_run(*events, counts_copies=counts_copies)
        assert at_once.apply_run(run)[:3] == one_by_one(singly, run)
    assert content(at_once) == content(singly)


@given(st.lists(RUNS, max_size=3), st.booleans())
def test_the_twins_agree_on_runs(runs, counts_copies):
    results = []
    for name in BACKENDS:
        backend = new_backend(name)
        backend.add_row(0, -1, True)
        applied = []
        for events in runs:
            run = a_run(*events)
            keys = block_keys(run.token_ids, 4)
            applied.append(backend.apply_run(0, run.table, run.block_hashes, keys, counts_copies))
        backend.check()
        results.append((applied, backend.edges()))
    assert all(result == results[0] for result in results)
