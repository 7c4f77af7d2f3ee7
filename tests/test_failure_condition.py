"""The failure condition on numbers: one class, several, and the least that must leave."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from mulsched.errors import InvalidArgument, InvalidType
from mulsched.failure_condition import (
    MAX_CLASSES,
    count_margin,
    kept_share,
    least_peak,
    least_spill,
    load_shares,
    tolerated_batch_ratio,
    worst_set,
)


def fleets():
    """Three classes with any holders among three instances, none included; the fourth holds nothing."""
    held = [set(s) for size in range(4) for s in itertools.combinations(range(3), size)]
    for n, parts in ((3, (40, 40, 20)), (4, (30, 30, 30)), (4, (50, 0, 20))):
        for holders in itertools.combinations_with_replacement(held, 3):
            yield n, parts, holders


def subsets(n):
    return (set(s) for size in range(1, n + 1) for s in itertools.combinations(range(n), size))


def inside(parts, holders, s):
    return sum(part for part, held in zip(parts, holders, strict=True) if held and held <= s)


def routed_peak(n, parts, holders):
    """The least peak by a linear program over all routings of classes to holders, the rest anywhere."""
    classes = [*zip(parts, (held or range(n) for held in holders), strict=True), (100 - sum(parts), range(n))]
    flows = [(c, i) for c, (_, held) in enumerate(classes) for i in held]
    sent = np.zeros((len(classes), len(flows) + 1))
    carried = np.zeros((n, len(flows) + 1))
    for at, (c, i) in enumerate(flows):
        sent[c, at] = carried[i, at] = 1
    carried[:, -1] = -1
    cost = [0] * len(flows) + [1]
    rates = [part / 100 for part, _ in classes]
    return linprog(cost, carried, np.zeros(n), sent, rates).fun * n


# -- one class


@pytest.mark.parametrize(
    ("share", "holders", "instances", "margin"),
    [
        (0.25, 4, 16, 0.0),
        (0.5, 4, 16, -0.25),
        (0.125, 4, 16, 0.125),
        (0.0, 1, 16, 1 / 16),
        (1.0, 15, 16, -1 / 16),
        (1.0, 16, 16, 0.0),
        (1.0, 1, 1, 0.0),
        (0.25, 0, 16, 0.75),  # nobody attracts it
    ],
)
def test_the_margin_of_one_class(share, holders, instances, margin):
    assert count_margin(share, holders, instances) == margin


@settings(max_examples=50)
@given(st.integers(1, 60), st.data())
def test_the_margin_has_the_sign_of_the_papers_condition(total, data):
    count = data.draw(st.integers(0, total - 1))
    n = data.draw(st.integers(2, 64))
    m = data.draw(st.integers(1, n - 1))
    x = Fraction(count, total)
    assert (count_margin(count / total, m, n) >= 0) == (x / (1 - x) <= Fraction(m, n - m))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1.5, 1, 2), InvalidArgument, "share must be in 0..1, got 1.5"),
        ((-0.5, 1, 2), InvalidArgument, "share must be finite and at least 0, got -0.5"),
        ((math.nan, 1, 2), InvalidArgument, "share must be finite and at least 0, got nan"),
        (("1", 1, 2), InvalidType, "share must be a number, got str"),
        ((True, 1, 2), InvalidType, "share must be a number, got bool"),
        ((0.5, 3, 2), InvalidArgument, r"holders must be in 0..2, the number of instances, got 3"),
        ((0.5, 1, 0), InvalidArgument, "instances must be at least 1, got 0"),
        ((0.5, 1.0, 2), InvalidType, "holders must be an int, got float"),
    ],
)
def test_a_bad_class_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        count_margin(*arguments)


# -- shares of any load


def test_shares_of_requests_of_prefill_and_of_residence_differ():
    rates = [3.0, 1.0]  # a hot prefix that hits 99 %, and long prompts
    assert load_shares(rates, [1, 1]).tolist() == [0.75, 0.25]
    assert load_shares(rates, [10, 970]).tolist() == [0.03, 0.97]
    assert load_shares(rates, [20.0, 10.0]).tolist() == pytest.approx([6 / 7, 1 / 7])


def test_no_load_has_shares_of_zero():
    assert load_shares([0, 1], [5, 0]).tolist() == [0, 0]
    assert load_shares([], []).tolist() == []


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)), min_size=1), st.floats(1e-3, 1e3))
def test_shares_do_not_mind_the_unit(classes, unit):
    rates, loads = np.array(classes, dtype=float).T
    shares = load_shares(rates, loads)
    assert load_shares(rates * unit, loads / unit) == pytest.approx(shares)
    assert shares.sum() == pytest.approx(1 if (rates * loads).any() else 0)


@pytest.mark.parametrize(
    ("rates", "loads", "error", "message"),
    [
        ([1.0], [1.0, 2.0], InvalidArgument, r"one shape \(n_classes,\), got \(1,\) and \(2,\)"),
        (1.0, 1.0, InvalidArgument, r"arrivals_per_s must have shape \(n_classes,\), got \(\)"),
        ([1.0], [-2.0], InvalidArgument, "load_per_request must be finite and at least 0, got -2.0"),
        ([math.inf], [2.0], InvalidArgument, "arrivals_per_s must be finite and at least 0, got inf"),
        (["a"], [2.0], InvalidType, r"arrivals_per_s must be numbers of shape \(n_classes,\), got \['a'\]"),
    ],
)
def test_bad_loads_are_refused(rates, loads, error, message):
    with pytest.raises(error, match=message):
        load_shares(rates, loads)


# -- several classes


def test_two_classes_below_their_own_bounds_fail_together():
    # each has 0.2 of the load on one of 4 instances, both on the same
    margin, worst = worst_set([0.2, 0.2], [{"a"}, {"a"}], 4)
    assert margin == pytest.approx(-0.15)
    assert worst == {"a"}
    assert min(count_margin(0.2, 1, 4), count_margin(0.2, 1, 4)) > 0
    assert least_peak([0.2, 0.2], [{"a"}, {"a"}], 4) == pytest.approx(1.6)


def test_the_worst_set_may_be_no_class_of_its_own():
    # three classes on the pairs of three instances: every pair carries 0.3 <= 2/4, all three 0.9 > 3/4
    shares, holders = [0.3] * 3, [{0, 1}, {1, 2}, {0, 2}]
    margin, worst = worst_set(shares, holders, 4)
    assert margin == pytest.approx(-0.15)
    assert worst == {0, 1, 2}
    assert least_peak(shares, holders, 4) == pytest.approx(1.2)


def test_a_class_without_holders_binds_nobody():
    assert worst_set([0.5], [set()], 4) == (0.5, frozenset())
    assert worst_set([], [], 4) == (1, frozenset())
    assert worst_set([0.5, 0.1], [[], [2]], 4) == (pytest.approx(0.15), {2})
    assert least_peak([1.0], [set()], 4) == 1


def test_shares_that_round_above_one_leave_no_negative_margin():
    shares = [0.5, 0.5, 2**-40]
    assert math.fsum(shares) > 1
    assert worst_set(shares, [{0, 1}] * 3, 2) == (0, {0, 1})


def test_the_worst_set_is_the_worst_of_all_subsets():
    for n, parts, holders in fleets():
        margin, worst = worst_set([part / 100 for part in parts], holders, n)
        binding = [s for s in subsets(n) if any(held and held <= s for held in holders)]
        if not binding:
            assert (margin, worst) == (pytest.approx(1 - sum(parts) / 100), frozenset())
            continue
        margins = {frozenset(s): len(s) / n - inside(parts, holders, s) / 100 for s in binding}
        assert margin == pytest.approx(min(margins.values()), abs=1e-12)
        assert margins[worst] == pytest.approx(margin, abs=1e-12)


def test_the_least_peak_is_that_of_the_best_routing():
    for n, parts, holders in fleets():
        peak = least_peak([part / 100 for part in parts], holders, n)
        assert peak == pytest.approx(routed_peak(n, parts, holders), abs=1e-7)


def test_no_routing_exceeds_the_mean_exactly_where_no_margin_is_negative():
    for n, parts, holders in fleets():
        shares = [part / 100 for part in parts]
        margin, _ = worst_set(shares, holders, n)
        assert (margin >= -1e-12) == (least_peak(shares, holders, n) <= 1 + 1e-12)


@settings(max_examples=50)
@given(st.integers(0, 100), st.integers(1, 9), st.data())
def test_one_class_of_several_is_the_paper_s(part, n, data):
    m = data.draw(st.integers(0, n))
    assert worst_set([part / 100], [range(m)], n)[0] == count_margin(part / 100, m, n)


def test_neither_order_nor_names_of_instances_matter():
    names = ["c", "a", "b"]
    for n, parts, holders in fleets():
        shares = [part / 100 for part in parts]
        renamed = [{names[i] for i in held} for held in reversed(holders)]
        margin, worst = worst_set(shares[::-1], renamed, n)
        assert margin == pytest.approx(worst_set(shares, holders, n)[0])
        assert worst <= set(names)
        assert least_peak(shares[::-1], renamed, n) == pytest.approx(least_peak(shares, holders, n))


@pytest.mark.parametrize(
    ("shares", "holders", "error", "message"),
    [
        ([0.5], [], InvalidArgument, "1 shares need as many holder sets, got 0"),
        ([0.5, 0.6], [{0}, {1}], InvalidArgument, "shares must sum to at most 1, got 1.1"),
        ([-0.5], [{0}], InvalidArgument, r"shares\[0\] must be finite and at least 0, got -0.5"),
        ([0.5], [{0, 1, 2, 3, 4}], InvalidArgument, "4 instances cannot be 5 holders"),
        ([0.5], ["gpu-0"], InvalidType, r"holders\[0\] must be a collection of instances, got 'gpu-0'"),
    ],
)
def test_bad_classes_are_refused(shares, holders, error, message):
    for function in (worst_set, least_peak):
        with pytest.raises(error, match=message):
            function(shares, holders, 4)


def test_more_holder_sets_than_can_be_enumerated_are_refused():
    many = [{i} for i in range(MAX_CLASSES + 1)]
    with pytest.raises(InvalidArgument, match="at most 16 holder sets that differ, got 17"):
        worst_set([0.01] * len(many), many, 32)


# -- the least that must leave


def peak_of(stay, h, o, e, m, n):
    """The busiest instance in exact numbers: the rest fills up the others first, then all."""
    on_holders, elsewhere = stay * h, (1 - stay) * o + e
    return max(on_holders / m, (on_holders + elsewhere) / n, (elsewhere - e) / (n - m) if m < n else 0)


@settings(max_examples=50)
@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 100), st.integers(2, 8), st.data())
def test_no_other_part_gives_a_smaller_peak(h, more, e, n, data):
    m = data.draw(st.integers(1, n - 1))
    spill = least_spill(holder_load=h, other_load=h + more, rest_load=e, holders=m, instances=n)
    best = peak_of(1 - spill, h, h + more, e, m, n)
    grid = [peak_of(Fraction(step, 40), h, h + more, e, m, n) for step in range(41)]
    assert best <= float(min(grid)) + 1e-9


@settings(max_examples=50)
@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 100), st.integers(1, 8), st.data())
def test_nothing_must_leave_exactly_where_the_margin_is_not_negative(h, more, e, n, data):
    m = data.draw(st.integers(1, n))
    spill = least_spill(holder_load=h, other_load=h + more, rest_load=e, holders=m, instances=n)
    assert (spill == 0) == (Fraction(m, n) - Fraction(h, h + e) >= 0)


def test_misses_raise_what_leaving_costs():
    loads = {"holder_load": 8.0, "rest_load": 0.0, "holders": 1, "instances": 4}
    assert least_spill(other_load=8.0, **loads) == 0.75  # no cost: spread evenly
    assert least_spill(other_load=72.0, **loads) == 0.25  # at 9 times the load the holder keeps the most


def test_a_class_without_holders_is_elsewhere():
    assert least_spill(holder_load=1.0, other_load=2.0, rest_load=3.0, holders=0, instances=4) == 1


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (0.5, InvalidArgument, "other_load must be at least holder_load, got 0.5 and 1.0"),
        (math.nan, InvalidArgument, "other_load must be finite and at least 0, got nan"),
        (None, InvalidType, "other_load must be a number, got NoneType"),
    ],
)
def test_bad_loads_of_a_class_are_refused(other, error, message):
    with pytest.raises(error, match=message):
        least_spill(holder_load=1, other_load=other, rest_load=3.0, holders=1, instances=4)


# -- the tolerated batch ratio


def test_a_hit_of_99_percent_tolerates_a_hundredfold_batch():
    assert tolerated_batch_ratio(10, 1000) == 100


@settings(max_examples=50)
@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 1000), st.integers(1, 1000))
def test_the_ratio_is_the_papers_second_condition(p_holder, p_other, b_holder, b_other):
    prefers = p_holder * b_holder <= p_other * b_other
    assert prefers == (Fraction(b_holder, b_other) <= Fraction(p_other, p_holder))
    if Fraction(b_holder, b_other) != Fraction(p_other, p_holder):
        assert prefers == (b_holder / b_other <= tolerated_batch_ratio(p_holder, p_other))


def test_no_prompt_tokens_are_refused():
    with pytest.raises(InvalidArgument, match="holder_p_tokens must be at least 1, got 0"):
        tolerated_batch_ratio(0, 5)


# -- what the product keeps on the holders


@pytest.mark.parametrize(
    ("holders", "instances", "ratio", "share"),
    [(1, 16, 1, 1 / 16), (1, 16, 15, 0.5), (4, 16, 2, 0.4), (16, 16, 3, 1), (0, 16, 3, 0)],
)
def test_the_share_that_stays(holders, instances, ratio, share):
    assert kept_share(holders, instances, ratio) == share


@settings(max_examples=50)
@given(st.integers(1, 20), st.integers(1, 20), st.fractions(Fraction(1, 100), 1000))
def test_the_share_that_stays_has_the_odds_of_the_papers_condition_times_the_ratio(m, others, ratio):
    x = kept_share(m, m + others, float(ratio))
    assert x / (1 - x) == pytest.approx(float(ratio) * m / others)


def test_a_ratio_of_zero_is_refused():
    with pytest.raises(InvalidArgument, match="batch_ratio must be above 0, got 0"):
        kept_share(1, 2, 0)
