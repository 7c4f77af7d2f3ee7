"""What the strategies draw is what a router can meet."""

from collections import Counter
from random import Random

import numpy as np
import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st
from model import ModelIndex

from mulsched import BlockRemoved, BlockStored, CacheCleared, InstanceRemoved, Router
from mulsched.errors import InvalidArgument
from mulsched.testing import Cancel, Dispatch, Finish, FirstToken, make_columns, run_lives, strategies

QUICK = settings(max_examples=40, database=None)


@QUICK
@given(strategies.columns())
def test_columns_are_such_as_a_router_fills(c):
    prompt = c.request.prompt_tokens
    assert 1 <= len(c) <= 5
    assert len(c.request.keys) == prompt // c.block_size
    assert (c.matched_blocks <= len(c.request.keys)).all()
    assert (c.matched_blocks <= c.cached_blocks).all()
    assert (
        c.hit_tokens
        == np.minimum(c.matched_blocks * c.block_size, (prompt - 1) // c.block_size * c.block_size)
    ).all()
    assert (c.new_prefill_tokens == prompt - c.hit_tokens).all()
    assert (c.p_tokens == c.queued_prefill_tokens + c.new_prefill_tokens).all()
    assert (c.batch_size == c.running + c.waiting + 1).all()
    assert (c.context_tokens[c.batch_size == 1] == 0).all()
    assert len(set(c.last_chosen.tolist())) == len(c)
    assert (c.last_chosen < c.decision).all()


@pytest.mark.parametrize("removal", ["any", "tail_first"])
@QUICK
@given(data=st.data())
def test_events_apply_and_leave_what_a_naive_model_holds(removal, data):
    events = data.draw(strategies.event_lists(removal=removal))
    router, model = Router(block_size=16), ModelIndex()
    for row, name in enumerate(("i0", "i1")):
        router.add_instance(name)
        model.add_row(row, -1, True)
    for event in events:
        router.apply(event)
        row = int(event.instance[1])
        if isinstance(event, BlockStored):
            keys = event.block_keys.tolist() if event.block_keys is not None else event.token_ids[::16]
            assert model.store_named(row, event.parent_hash, event.block_hashes, keys) >= 0
        elif isinstance(event, BlockRemoved):
            assert model.remove_named(row, event.block_hashes) == len(event.block_hashes)
        elif isinstance(event, CacheCleared):
            model.clear(row)
        else:
            assert isinstance(event, InstanceRemoved)
            model.remove_row(row)
    for name in router.instances:
        assert router.index.blocks(name) == model.blocks(int(name[1]))


@QUICK
@given(strategies.request_lives(), strategies.clusters(), st.sampled_from(["lmetric", "preble", "sticky"]))
def test_lives_are_legal_and_booked(steps, cluster, policy):
    router = cluster.router(policy)
    before = sum(router.load(name)["waiting"] + router.load(name)["running"] for name in router.instances)
    decisions = run_lives(router, steps)
    kinds = Counter(map(type, steps))
    assert len(decisions) == kinds[Dispatch]
    after = sum(router.load(name)["waiting"] + router.load(name)["running"] for name in router.instances)
    assert after - before == kinds[Dispatch] - kinds[Finish] - kinds[Cancel]


def test_requests_overlap_and_are_cancelled_before_and_after_their_first_token():
    def early_and_late(steps):
        started = [step.request_id for step in steps if isinstance(step, FirstToken)]
        ended = [step.request_id for step in steps if isinstance(step, Cancel)]
        return any(r in started for r in ended) and any(r not in started for r in ended)

    # prompts and sessions are not asked about, and shrinking them takes most of the time
    lives = strategies.request_lives(prompts=st.just([1]), sessions=False)
    found = find(lives, early_and_late, settings=settings(database=None), random=Random(0))
    assert len(found) == 5


@QUICK
@given(strategies.prompts(block_size=4))
def test_a_prompt_has_tokens(prompt):
    assert prompt


def test_prompts_share_trunks_and_part():
    pair = st.tuples(strategies.prompts(block_size=4), strategies.prompts(block_size=4))
    one, other = find(
        pair, lambda p: p[0][:4] == p[1][:4] and len(p[0]) >= 8 <= len(p[1]) and p[0][4:8] != p[1][4:8],
        settings=settings(database=None, max_examples=2000), random=Random(0),
    )  # fmt: skip
    assert len(one) == len(other) == 8


@pytest.mark.parametrize(
    ("given_columns", "message"),
    [
        ({}, "lists of one length, got none"),
        ({"running": [1], "waiting": [1, 2]}, "lists of one length"),
        ({"running": [-1]}, "running must be at least 0, got -1"),
        ({"prompt_tokens": 16, "matched_blocks": [2]}, "16 tokens have 1 blocks, got 2 matched"),
    ],
)
def test_columns_by_hand_refuse_what_cannot_be(given_columns, message):
    with pytest.raises(InvalidArgument, match=message):
        make_columns(**given_columns)
