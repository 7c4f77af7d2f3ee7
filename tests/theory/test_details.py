"""Backs docs/theory.md, section 6: the +1, the queue term, the last token, ties."""

import itertools
from collections import Counter

import numpy as np
import pytest
from columns import choose, make_columns
from hypothesis import given, settings
from hypothesis import strategies as st

from mulsched import Router
from mulsched.policies import Policy
from mulsched.scorers import Multiplicative

PRODUCT = Policy(name="product", score=Multiplicative())


def counted(added):
    """The product with ``added`` to the requests there, in place of 1."""
    return Policy(name="counted", score=lambda c: c.p_tokens * (c.running + c.waiting + added))


def unfloored(c):
    """The product without the last-token rule: a prompt that is cached whole has no new tokens."""
    new = c.request.prompt_tokens - np.minimum(c.matched_blocks * c.block_size, c.request.prompt_tokens)
    return (c.queued_prefill_tokens + new) * c.batch_size


# -- +1


def test_without_the_one_an_idle_instance_wins_whatever_is_cached_elsewhere():
    # a hit of 999 in 1000 tokens beside one request that decodes, against a cold idle instance
    c = make_columns(prompt=1000, matched=[999, 0], running=[1, 0], block_size=1)
    assert choose(counted(1), c) == 0
    assert choose(counted(0), c) == 1


def test_without_the_one_idle_instances_tie_whatever_is_cached():
    c = make_columns(prompt=1000, matched=[0, 999], running=[0, 0], last_chosen=[-1, 5], block_size=1)
    assert choose(counted(1), c) == 1
    assert choose(counted(0), c) == 0


@settings(max_examples=40)
@given(st.integers(1, 100), st.integers(1, 100), st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
def test_a_larger_constant_moves_decisions_only_towards_fewer_p_tokens(p, q, b, d, added):
    # (P, requests) of two instances: once the one with fewer P-tokens wins, it wins for every larger constant
    fewer, more = sorted([(p, b), (q, d)])
    if fewer[0] * (fewer[1] + added) < more[0] * (more[1] + added):
        assert fewer[0] * (fewer[1] + added + 1) < more[0] * (more[1] + added + 1)


# -- the queue term


def test_a_queue_is_charged_once_per_request_and_breaks_affinity():
    # a session's instance holds 7,600 of 8,000 tokens, with 8 requests and 1,600 queued; the other is idle
    home = {"prompt": 8000, "matched": [475, 0], "running": [7, 0], "waiting": [1, 0]}
    c = make_columns(queued=[1600, 0], **home)
    assert choose(PRODUCT, c) == 1  # 2000 * 9 against 8000 * 1, though it waits for 2000 tokens, not 8000
    once = Policy(name="once", score=lambda c: c.queued_prefill_tokens + c.new_prefill_tokens * c.batch_size)
    assert choose(once, c) == 0  # 1600 + 400 * 9
    assert choose(PRODUCT, make_columns(queued=[0, 0], **home)) == 0


@settings(max_examples=40)
@given(st.integers(0, 1000), st.integers(1, 1000), st.integers(1, 50))
def test_the_product_charges_a_queue_batch_size_times(queued, new, batch_size):
    c = make_columns(prompt=new, queued=[queued], running=[batch_size - 1])
    assert Multiplicative()(c)[0] - new * batch_size == queued * batch_size


# -- the last token


@pytest.mark.parametrize("block_size", [1, 2, 3, 16])
def test_a_full_hit_computes_at_least_one_token_and_at_most_a_block(block_size):
    for prompt in range(1, 4 * block_size + 1):
        router = Router(block_size=block_size)
        router.add_instance("a", cache_blocks=100)
        tokens = list(range(prompt))
        router.route(tokens, request_id="first")
        router.finish("first")
        again = router.select(tokens)
        assert again.matched_blocks == prompt // block_size
        assert 1 <= again.new_prefill_tokens <= block_size


def routed(policy, requests, *, instances=2, ties=None):
    """How many of the same prompt each instance gets when the first holds it, each prefilled at once."""
    router = Router(block_size=1, policy=policy, ties=ties)
    for row in range(instances):
        router.add_instance(f"i{row}", cache_blocks=10_000)
    sent = Counter()
    for number in range(requests):
        candidates = ["i0"] if number == 0 else None
        decision = router.route(list(range(20)), request_id=number, candidates=candidates)
        router.first_token(number)
        sent[decision.instance] += 1
    return sent


def test_without_the_last_token_a_full_hit_is_taken_at_any_batch():
    assert routed(unfloored, 500) == {"i0": 500}


def test_with_the_last_token_the_herd_ends_at_the_length_of_the_prompt():
    # 1 * BS against 20 * 1: the last within the bound ties and leaves; then both hold it
    assert routed("lmetric", 20) == {"i0": 19, "i1": 1}
    assert routed("lmetric", 500) == {"i0": 250, "i1": 250}


# -- ties


def spread(requests, instances, *, ties, policy="lmetric", finish=False, shared=True, seed=0):
    """The most of a burst that one instance gets; with ``finish`` each is done before the next comes."""
    router = Router(policy=policy, ties=ties, seed=seed)
    for row in range(instances):
        router.add_instance(f"i{row}", cache_blocks=10_000)
    sent = Counter()
    for number in range(requests):
        prompt = range(100) if shared else range(100 * number, 100 * number + 100)
        sent[router.route(list(prompt), request_id=number).instance] += 1
        if finish:
            router.finish(number)
    return max(sent.values())


SIZES = list(itertools.product(range(1, 14), range(1, 5)))


@pytest.mark.parametrize("ties", ["first", "least_recent", "random"])
def test_a_booked_burst_spreads_evenly_under_any_tie_rule(ties):
    # every booking raises both factors, so no instance gets a second before all have one
    for requests, instances in SIZES:
        assert spread(requests, instances, ties=ties) == -(-requests // instances)


def test_where_scores_ignore_bookings_the_first_row_gets_the_whole_burst():
    for requests, instances in SIZES:
        blind = {"policy": "most_hits", "shared": False}  # a prefix in flight would be a hit
        assert spread(requests, instances, ties="first", **blind) == requests
        for ties in ("least_recent", "random"):  # after the lowest batch size, which a booking raises
            assert spread(requests, instances, ties=ties, **blind) == -(-requests // instances)


def test_a_score_of_hits_alone_follows_a_prefix_in_flight_under_any_tie_rule():
    for ties in ("first", "least_recent", "random"):
        assert spread(8, 4, ties=ties, policy="most_hits") == 8


def test_on_an_idle_fleet_the_first_row_gets_every_cold_request_one_after_another():
    for requests, instances in SIZES:
        alone = {"finish": True, "shared": False}
        assert spread(requests, instances, ties="first", **alone) == requests
        assert spread(requests, instances, ties="least_recent", **alone) == -(-requests // instances)


def test_on_an_idle_fleet_random_ties_draw_the_place_of_each_cold_request():
    alone = {"ties": "random", "finish": True, "shared": False}
    for requests, instances in SIZES:
        assert -(-requests // instances) <= spread(requests, instances, **alone) <= requests
    # of all places of 4 requests on 2 instances, the most is 2, 3 or 4 with 3/8, 1/2 and 1/8: mean 2.75
    most = [spread(4, 2, seed=seed, **alone) for seed in range(400)]
    assert set(most) == {2, 3, 4}
    deviation = (7 / 16 / 400) ** 0.5
    assert abs(sum(most) / 400 - 2.75) < 4 * deviation


def test_decisions_from_one_stale_state_all_fall_on_one_instance_under_either_rule():
    # a tie rule cannot see what has not been booked; only a draw can part equals, and it is one per decision
    for ties in ("first", "least_recent", "random"):
        router = Router(ties=ties)
        for row in range(4):
            router.add_instance(f"i{row}", cache_blocks=100)
        decisions = [router.select(list(range(100))) for _ in range(8)]
        assert len({decision.instance for decision in decisions}) == 1
