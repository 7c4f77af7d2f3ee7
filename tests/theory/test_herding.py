"""Backs docs/theory.md, sections 4 and 5: what holders of a hot prefix get, under the production router."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mulsched import Router
from mulsched.failure_condition import (
    count_margin,
    kept_share,
    load_shares,
    tolerated_batch_ratio,
    worst_set,
)
from mulsched.scorers import Multiplicative


class Fleet:
    """Instances under a router, blocks of one token, and requests that share a prefix or share nothing.

    A hot prompt is ``prefix`` shared tokens and ``tail`` ones of its own: a holder computes ``tail`` tokens,
    another instance ``prefix + tail``.
    """

    def __init__(self, instances, *, prefix=19, tail=1, cache_blocks=100_000, policy="lmetric"):
        self.router = Router(block_size=1, policy=policy)
        self.names = [f"i{row}" for row in range(instances)]
        for name in self.names:
            self.router.add_instance(name, cache_blocks=cache_blocks)
        self.prefix = np.arange(prefix, dtype=np.uint64)
        self.tail = tail
        self.ratio = Fraction(prefix + tail, tail)
        self._requests = 0

    def _send(self, shared, own, *, prefilled=True, to=None):
        self._requests += 1
        # an own block is named after its request: nobody shares it
        unique = np.arange(own, dtype=np.uint64) + np.uint64(self._requests << 32)
        keys = np.concatenate([shared, unique])
        decision = self.router.route_keys(
            keys, prompt_tokens=len(keys), request_id=self._requests, candidates=to
        )
        if prefilled:
            self.router.first_token(self._requests)
        return decision

    def hot(self, **how):
        return self._send(self.prefix, self.tail, **how)

    def cold(self, tokens, **how):
        return self._send(self.prefix[:0], tokens, **how)

    def seed(self, *names):
        """Make these instances holders, and idle again."""
        for name in names:
            self.hot(to=[name])
            self.finish(self._requests)

    def finish(self, request_id):
        self.router.finish(request_id)

    @property
    def holders(self):
        matched = self.router.index.match_by_instance(self.prefix)
        return {name for name in self.names if matched[name] == len(self.prefix)}

    def batches(self):
        """Requests on each instance."""
        return [
            sum(self.router.load(name)[column] for column in ("running", "waiting")) for name in self.names
        ]


# -- shares of load


@settings(max_examples=40)
@given(st.integers(1, 6), st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(1, 4))
def test_by_littles_law_the_mean_number_resident_is_rate_times_residence(gap, residences, periods):
    # one request every `gap` steps, residences in turn; watched over whole periods once it has filled up
    period = gap * len(residences)
    fill = -(-max(residences) // period)
    stays = [
        (at, at + residences[i % len(residences)])
        for i, at in enumerate(range(0, (fill + periods) * period, gap))
    ]
    watched = range(fill * period, (fill + periods) * period)
    resident = sum(start <= step < end for step in watched for start, end in stays)
    rate, residence = Fraction(1, gap), Fraction(sum(residences), len(residences))
    assert Fraction(resident, len(watched)) == rate * residence


def test_a_count_may_see_a_hot_spot_where_there_is_no_work():
    # 3 of 4 requests are hot on 4 of 16 instances, and hit 99 % of 1000 tokens; the others hit nothing
    count, prefill = load_shares([3, 1], [1, 1])[0], load_shares([3, 1], [10, 1000])[0]
    assert count_margin(count, 4, 16) < 0 < count_margin(prefill, 4, 16)


def test_a_count_may_miss_a_hot_spot_of_long_outputs():
    # 1 of 5 requests is hot on 4 of 16 instances, and stays 3 times as long
    count, resident = load_shares([1, 4], [1, 1])[0], load_shares([1, 4], [30, 10])[0]
    assert count_margin(count, 4, 16) > 0 > count_margin(resident, 4, 16)


def test_classes_below_their_own_bounds_may_fail_together():
    shares, holders = [0.04] * 3, [{"i0", "i1"}, {"i0", "i1"}, {"i1"}]
    assert all(count_margin(share, len(held), 20) > 0 for share, held in zip(shares, holders, strict=True))
    assert worst_set(shares, holders, 20)[0] < 0


# -- the bound: a holder's batch against a non-holder's


@settings(max_examples=30)
@given(
    st.integers(2, 4),
    st.integers(0, 30),
    st.integers(1, 5),
    st.lists(st.sampled_from(["hot", "cold", "leave"]), min_size=20, max_size=80),
    st.randoms(use_true_random=False),
)
def test_with_empty_queues_a_holder_is_chosen_only_within_the_ratio_of_new_tokens(
    n, prefix, tail, steps, rng
):
    fleet = Fleet(n, prefix=prefix, tail=tail)
    fleet.seed("i0")
    resident = []
    for step in steps:
        if step == "leave":
            if resident:
                fleet.finish(resident.pop(rng.randrange(len(resident))))
            continue
        holders, before = fleet.holders, dict(zip(fleet.names, fleet.batches(), strict=True))
        decision = fleet.hot() if step == "hot" else fleet.cold(7)
        resident.append(decision.request_id)
        others = [before[name] + 1 for name in fleet.names if name not in holders]
        if step == "hot" and decision.instance in holders and others:
            assert before[decision.instance] + 1 <= fleet.ratio * min(others)


@pytest.mark.parametrize(("prefix", "tail"), [(1, 1), (19, 1), (90, 10), (99, 1)])
def test_the_bound_is_reached(prefix, tail):
    fleet = Fleet(2, prefix=prefix, tail=tail)
    fleet.seed("i0")
    first = [fleet.hot().instance for _ in range(int(fleet.ratio) + 1)]
    # equal products go to the smaller batch, so the last request within the ratio leaves
    assert first.index("i1") == fleet.ratio - 1
    assert fleet.ratio == tolerated_batch_ratio(tail, prefix + tail)


@settings(max_examples=40)
@given(st.integers(2, 6), st.integers(2, 400))
@example(2, 4)  # a tie, which goes to the smaller batch
@example(2, 20)
@example(2, 100)  # 9, as the page says
def test_a_burst_before_any_first_token_leaves_after_the_square_root_of_the_ratio(n, ratio):
    # k-th request: k * n_h new tokens and a batch of k, against n_o and 1
    leaves_after = math.isqrt(ratio - 1)
    fleet = Fleet(n, prefix=ratio - 1)
    fleet.seed("i0")
    instances = [fleet.hot(prefilled=False).instance for _ in range(leaves_after + 1)]
    assert instances == ["i0"] * leaves_after + ["i1"]
    assert leaves_after**2 < ratio <= (leaves_after + 1) ** 2


def test_without_the_queue_term_the_burst_leaves_only_at_the_ratio():
    fleet = Fleet(2, prefix=99, policy=Multiplicative("new_prefill_tokens", "batch_size"))
    fleet.seed("i0")
    instances = [fleet.hot(prefilled=False).instance for _ in range(100)]
    assert instances == ["i0"] * 99 + ["i1"]


@settings(max_examples=30)
@given(st.integers(1, 60).flatmap(lambda slots: st.tuples(st.just(slots), st.integers(slots + 1, 400))))
@example((4, 10))
@example((16, 100))
@example((256, 1000))  # 3, as the page says
def test_full_slots_end_the_herd_soon_after(slots_and_ratio):
    # the first `slots` requests decode; from then on they wait
    slots, ratio = slots_and_ratio
    fleet = Fleet(2, prefix=ratio - 1)
    fleet.seed("i0")
    for _ in range(slots):
        assert fleet.hot().instance == "i0"
    waiting = 0
    while fleet.hot(prefilled=False).instance == "i0":
        waiting += 1
    fits = [d for d in range(ratio + 1) if (d + 1) * (slots + d + 1) < ratio]
    assert waiting == len(fits)
    assert waiting < ratio / slots
    if (slots, ratio) == (256, 1000):
        assert waiting == 3


def test_a_queue_elsewhere_widens_the_bound():
    idle, queued = Fleet(2, prefix=9), Fleet(2, prefix=9)
    for fleet in (idle, queued):
        fleet.seed("i0")
    queued.cold(10, to=["i1"], prefilled=False)
    counts = []
    for fleet in (idle, queued):
        instances = [fleet.hot().instance for _ in range(50)]
        counts.append(instances.index("i1"))
    assert counts == [9, 39]  # 1 * BS = 10 * 1, and 1 * BS = (10 + 10) * 2


@settings(max_examples=30)
@given(
    st.integers(2, 8).flatmap(lambda n: st.tuples(st.integers(1, n - 1), st.just(n))),
    st.integers(2, 12),
    st.integers(0, 3),
)
@example((1, 2), 3, 4)
@example((1, 8), 20, 2)
@example((3, 8), 10, 3)
@example((2, 5), 4, 0)
def test_a_class_leaves_its_holders_at_a_share_whose_odds_are_the_ratio_times_the_papers(
    m_of_n, ratio, background
):
    m, n = m_of_n
    fleet = Fleet(n, prefix=ratio - 1)
    fleet.seed(*fleet.names[:m])
    for name in fleet.names[m:] * background:
        fleet.cold(5, to=[name])
    while fleet.hot().hit_tokens:
        pass
    on_holders, elsewhere = fleet.batches()[:m], sorted(fleet.batches()[m:])
    assert elsewhere == [background] * (n - m - 1) + [background + 1]
    # batch sizes as the decision saw them, with the request counted everywhere
    seen = sum(on_holders) + m
    share = seen / (seen + (n - m) * (background + 1))
    assert share == pytest.approx(kept_share(m, n, ratio))


# -- replication


@settings(max_examples=30)
@given(st.integers(2, 6), st.integers(2, 20))
@example(8, 3)
@example(5, 20)
def test_each_request_that_leaves_makes_a_holder_and_no_batch_exceeds_the_ratio_before_all_hold(n, ratio):
    fleet = Fleet(n, prefix=ratio - 1)
    fleet.seed("i0")
    held = 1
    while held < n:
        decision = fleet.hot()
        held += decision.hit_tokens == 0
        assert len(fleet.holders) == held
        assert max(fleet.batches()) <= ratio - 1
    assert sum(fleet.batches()) == (n - 1) * (ratio - 1) + 1
    for _ in range(n * ratio):
        fleet.hot()
    assert max(fleet.batches()) - min(fleet.batches()) <= 1


def herd(n, ratio, residence, requests):
    """One hot request a step, gone after ``residence`` steps: peak batch, holders, instances used."""
    fleet = Fleet(n, prefix=ratio - 1)
    fleet.seed("i0")
    resident, used, peak = [], Counter(), 0
    for _ in range(requests):
        if len(resident) == residence:
            fleet.finish(resident.pop(0))
        decision = fleet.hot()
        resident.append(decision.request_id)
        used[decision.instance] += 1
        peak = max(peak, *fleet.batches())
    return peak, len(fleet.holders), len(used)


@settings(max_examples=30)
@given(
    st.integers(2, 8), st.integers(1, 29).flatmap(lambda most: st.tuples(st.integers(1, most), st.just(most)))
)
@example(8, (1, 19))
@example(8, (19, 19))
def test_a_class_with_fewer_residents_than_the_ratio_never_leaves_its_holder(n, residence_of_most):
    # all load on one of n instances, for good: the paper's condition fails, and nothing ends it
    residence, most = residence_of_most
    assert herd(n, most + 1, residence, 4 * residence + 50) == (residence, 1, 1)
    assert count_margin(1.0, 1, n) < 0


@settings(max_examples=30)
@given(st.integers(2, 8), st.integers(2, 20), st.integers(0, 100))
@example(8, 20, 0)
@example(8, 20, 18)  # exactly two holders are full
@example(8, 20, 19)
@example(8, 20, 180)
def test_a_class_with_more_residents_spreads_until_they_fit(n, ratio, more):
    residence = ratio + more
    peak, holders, used = herd(n, ratio, residence, 4 * residence)
    assert used == holders == min(n, math.ceil(residence / (ratio - 1)))
    assert peak <= max(ratio - 1, math.ceil(residence / n) + 1)


def beside_cold_requests(cache_blocks):
    """60 hot requests resident on 4 instances, ratio 10, each followed by a cold one that ends at once."""
    fleet = Fleet(4, prefix=9, cache_blocks=cache_blocks)
    fleet.seed("i0")
    resident = []
    for _ in range(300):
        if len(resident) == 60:
            fleet.finish(resident.pop(0))
        resident.append(fleet.hot().request_id)
        fleet.finish(fleet.cold(10).request_id)
    return sorted(fleet.batches()), len(fleet.holders)


def test_large_caches_keep_the_copies_that_even_out_the_batches():
    assert beside_cold_requests(10_000) == ([15, 15, 15, 15], 4)


def test_in_small_caches_cold_requests_evict_the_newest_copy_and_the_herd_stays():
    # cold requests go to the smallest batch, which is where the herd spilled last
    assert beside_cold_requests(12) == ([2, 19, 19, 20], 3)
