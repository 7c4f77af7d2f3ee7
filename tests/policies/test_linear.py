"""Policies that add weighted indicators, and LMetric, which multiplies them."""

import math
from collections import Counter

import pytest
from columns import choose, columns, make_columns, rows
from hypothesis import example, given
from hypothesis import strategies as st

from mulsched import policies


@pytest.mark.parametrize(
    ("policy", "given_columns", "expected"),
    [
        # (100 - 0) * 3 = 300 against (100 - 80) * 10 = 200
        ("lmetric", {"prompt": 100, "matched": [0, 5], "running": [2, 9]}, 1),
        # queued tokens count: 100 * 1 against (20 + 500) * 1
        ("lmetric", {"prompt": 100, "matched": [0, 5], "queued": [0, 500]}, 0),
        # a full hit still computes 16 tokens: 16 * 10 = 160 against 160 * 1; then the smaller batch
        ("lmetric", {"prompt": 160, "matched": [10, 0], "running": [9, 0]}, 1),
        # .7 * 1 + .3 * .1 = .73 against .7 * .2 + .3 * 1 = .44
        ("linear", {"prompt": 100, "matched": [0, 5], "running": [0, 9]}, 1),
        # .1 * 1 + .9 * .1 = .19 against .1 * .2 + .9 * 1 = .92
        (policies.linear(weight=0.1), {"prompt": 100, "matched": [0, 5], "running": [0, 9]}, 0),
        # weight 0 is load only, weight 1 cache only
        (policies.linear(weight=0), {"prompt": 100, "matched": [0, 6], "running": [0, 1]}, 0),
        (policies.linear(weight=1), {"prompt": 100, "matched": [0, 1], "running": [0, 99]}, 1),
        # 100 / 16 + 100 / 16 = 12.5 against 20 / 16 + (200 + 100) / 16 = 20
        ("dynamo", {"prompt": 100, "matched": [0, 5], "context": [0, 200]}, 0),
        # 3 * 100 / 16 + 100 / 16 = 25 against 3 * 20 / 16 + 300 / 16 = 22.5
        (policies.dynamo(overlap_weight=3), {"prompt": 100, "matched": [0, 5], "context": [0, 200]}, 1),
        # queued tokens are prefill blocks: 100 + 100 = 200 against (20 + 100) + 100 = 220, in 16ths
        ("dynamo", {"prompt": 100, "matched": [0, 5], "queued": [0, 100]}, 0),
        # worst in all three has no chance, so the other is drawn
        ("bailian", {"prompt": 100, "matched": [0, 5], "running": [3, 1], "context": [50, 40]}, 1),
        # the hits differ and nothing else does: load counts for nothing
        ("bailian", {"prompt": 100, "matched": [0, 1], "running": [4, 4], "context": [50, 50]}, 1),
    ],
)
def test_it_decides_as_its_definition_says(policy, given_columns, expected):
    for decision in range(20):
        assert choose(policy, make_columns(**given_columns, decision=decision)) == expected


def test_bailian_draws_in_proportion_to_desirability():
    # .7 * 1 + .15 * 0 + .15 * 1 = .85, .7 * 0 + .15 * 1 + .15 * .5 = .225, .7 * .2 + .15 * .5 + .15 * 0 = .215
    c = {"prompt": 100, "matched": [5, 0, 1], "running": [4, 0, 2], "context": [0, 50, 100]}
    chosen = Counter(choose("bailian", make_columns(**c, decision=d)) for d in range(4000))
    total = 0.85 + 0.225 + 0.215
    # standard deviations up to 30
    assert abs(chosen[0] - 4000 * 0.85 / total) < 110
    assert abs(chosen[1] - 4000 * 0.225 / total) < 110
    assert abs(chosen[2] - 4000 * 0.215 / total) < 110


def test_bailian_draws_anyone_when_all_are_equal():
    chosen = Counter(choose("bailian", make_columns(running=[2, 2, 2], decision=d)) for d in range(1500))
    # 500 expected each, standard deviation 18
    assert all(abs(chosen[i] - 500) < 90 for i in range(3))


def test_dynamo_with_a_temperature_softens():
    # costs normalised to 0, .5, 1 at temperature .5: odds 1, e**-1, e**-2
    policy = policies.dynamo(temperature=0.5)
    cs = [make_columns(prompt=100, matched=[4, 2, 0], decision=d) for d in range(4000)]
    chosen = Counter(choose(policy, c) for c in cs)
    total = sum(math.exp(-k) for k in range(3))
    # standard deviations up to 30
    assert all(abs(chosen[k] - 4000 * math.exp(-k) / total) < 110 for k in range(3))


def test_dynamo_without_a_temperature_takes_the_least():
    assert {choose("dynamo", make_columns(prompt=100, matched=[4, 2], decision=d)) for d in range(50)} == {0}


def test_dynamo_draws_among_equal_costs():
    chosen = Counter(choose("dynamo", make_columns(running=[0, 0], decision=d)) for d in range(1000))
    # 500 expected each, standard deviation 16
    assert abs(chosen[0] - 500) < 80


def test_a_very_small_temperature_is_the_least_cost():
    policy = policies.dynamo(temperature=1e-200)
    c = [make_columns(prompt=100, matched=[0, 4], decision=d) for d in range(20)]
    assert {choose(policy, x) for x in c} == {1}


# -- against the definitions in a loop ----------------------------------------------------------------------


def best(keyed):
    """Position of the smallest value, then as ties="least_recent" says."""
    return min(keyed, key=lambda pair: (pair[0], pair[1]["batch_size"], pair[1]["last_chosen"]))[1]["i"]


def naive_lmetric(c):
    return best([(x["p_tokens"] * x["batch_size"], x) for x in rows(c)])


def linear_values(c, weight):
    most = max(x["running"] + x["waiting"] + 1 for x in rows(c))
    prompt = c.request.prompt_tokens
    # written as the score is: equal values must be equal in the last bit to tie
    return [
        weight * ((prompt - x["hit_tokens"]) / prompt)
        + (1 - weight) * ((x["running"] + x["waiting"] + 1) / most)
        for x in rows(c)
    ]


def dynamo_costs(c, weight):
    return [
        weight * ((x["queued_prefill_tokens"] + x["new_prefill_tokens"]) / 16)
        + (x["context_tokens"] + c.request.prompt_tokens) / 16
        for x in rows(c)
    ]


def drawn(c, weights):
    """Position of a weighted random choice: of exponential clocks at these rates the first to ring."""
    if not any(weights):
        weights = [1.0] * len(weights)
    clocks = [-math.log1p(-x["u"]) / w if w else math.inf for x, w in zip(rows(c), weights, strict=True)]
    return clocks.index(min(clocks))


def scaled(values):
    low, high = min(values), max(values)
    return [(v - low) / (high - low) if high > low else 0.0 for v in values]


def naive_bailian(c, hit, batch, tokens):
    r = rows(c)
    parts = (
        scaled([x["matched_blocks"] for x in r]),
        scaled([-x["batch_size"] for x in r]),
        scaled([-x["context_tokens"] for x in r]),
    )
    return drawn(c, [hit * h + batch * b + tokens * t for h, b, t in zip(*parts, strict=True)])


@given(c=columns())
def test_lmetric_agrees_with_its_definition_in_a_loop(c):
    assert naive_lmetric(c) == choose("lmetric", c)


@given(c=columns(), weight=st.sampled_from([0.0, 0.25, 0.55, 0.7, 1.0]))
def test_linear_agrees_with_its_definition_in_a_loop(c, weight):
    policy, expected = policies.linear(weight=weight), linear_values(c, weight)
    assert expected == pytest.approx(policy.score(c))
    assert best(zip(expected, rows(c), strict=True)) == choose(policy, c)


@given(c=columns(), weight=st.sampled_from([0.0, 0.5, 1.0, 3.0]))
def test_dynamo_agrees_with_its_definition_in_a_loop(c, weight):
    policy, costs = policies.dynamo(overlap_weight=weight), dynamo_costs(c, weight)
    assert costs == pytest.approx(policy.score(c))
    assert costs[choose(policy, c)] == min(costs)


@given(c=columns(), heat=st.sampled_from([0.05, 0.5, 1.0, 10.0]))
def test_dynamo_with_a_temperature_agrees_with_softmax_in_a_loop(c, heat):
    weights = [math.exp(-cost / heat) for cost in scaled(dynamo_costs(c, 1.0))]
    assert drawn(c, weights) == choose(policies.dynamo(temperature=heat), c)


@given(c=columns(), weights=st.sampled_from([(0.7, 0.15, 0.15), (1.0, 0.0, 0.0), (0.0, 0.5, 0.5)]))
@example(c=make_columns(running=[1]), weights=(0.7, 0.15, 0.15))
def test_bailian_agrees_with_its_definition_in_a_loop(c, weights):
    names = ("hit_weight", "batch_weight", "token_weight")
    policy = policies.bailian(**dict(zip(names, weights, strict=True)))
    assert naive_bailian(c, *weights) == choose(policy, c)
