"""Policies that predict latencies."""

import math
from collections import Counter

import numpy as np
import pytest
from columns import choose, columns, make_columns, rows
from hypothesis import given

from mulsched import policies
from mulsched.policies._policy import select
from mulsched.replay import Roofline

# a step takes 10 ms, 1 ms more for each request and 10 us for each token of context
MODEL = {
    "prefill_tokens_per_s": 1000,
    "chunk_tokens": 100,
    "step_overhead_s": 0.010,
    "decode_request_s": 0.001,
    "decode_context_token_s": 10e-6,
}


def polyserve(**parameters):
    return policies.polyserve(**(MODEL | {"ttft_target_s": 0.5, "tpot_target_s": 0.030} | parameters))


def least_ttft(**parameters):
    return policies.least_ttft(**(MODEL | parameters))


def test_the_predicted_ttft_is_prefill_and_a_step_for_every_chunk():
    c = make_columns(
        prompt=100, matched=[0, 5, 0], queued=[0, 0, 101], running=[0, 3, 0], context=[0, 900, 0]
    )
    # 100 tokens and one step of 10 + 1 + 1 ms; 20 and one of 10 + 4 + 10 ms; 201 and three of 12 ms
    assert least_ttft().score(c).tolist() == pytest.approx([0.112, 0.044, 0.237])


def test_the_predicted_tpot_is_a_step_with_everyone_there():
    c = make_columns(prompt=100, running=[0, 3], waiting=[0, 1], context=[0, 900])
    assert polyserve().score(c).tolist() == pytest.approx([-0.012, -0.025])


@pytest.mark.parametrize(
    ("policy", "given_columns", "expected"),
    [
        # all within the targets: the busiest
        (polyserve(), {"prompt": 100, "running": [0, 5, 3]}, 1),
        # as many requests, but longer ones
        (polyserve(), {"prompt": 100, "running": [3, 3], "context": [200, 300]}, 1),
        # 10 + 20 + 1 ms is beyond 30 ms, 10 + 19 + 1 ms is not
        (polyserve(tpot_target_s=0.0301), {"prompt": 100, "running": [19, 18, 0]}, 1),
        # the busiest has 500 tokens to compute: 600 ms for those alone
        (polyserve(), {"prompt": 100, "running": [5, 2, 0], "queued": [500, 0, 0]}, 1),
        # a cached prompt brings the same one within 500 ms again: 420 ms and 5 steps of 15 ms
        (polyserve(), {"prompt": 100, "matched": [5, 0, 0], "running": [4, 2, 0], "queued": [400, 0, 0]}, 0),
        # equal predictions: the least recently chosen
        (polyserve(), {"prompt": 100, "running": [1, 1], "last_chosen": [4, 3]}, 1),
        # what is cached need not be computed
        (least_ttft(), {"prompt": 100, "matched": [0, 5]}, 1),
        # a queue may cost more than a cache saves
        (least_ttft(), {"prompt": 100, "matched": [0, 5], "queued": [0, 90]}, 0),
        # decoding delays the first token: 20 tokens and 110 ms against 100 tokens and 11 ms
        (least_ttft(), {"prompt": 100, "matched": [0, 5], "running": [0, 99]}, 0),
    ],
)
def test_it_decides_as_its_source_does(policy, given_columns, expected):
    assert choose(policy, make_columns(**given_columns)) == expected


def test_polyserve_draws_among_all_where_none_is_within_its_targets():
    policy = polyserve(ttft_target_s=0)
    chosen = Counter(choose(policy, make_columns(running=[0, 9, 30], decision=d)) for d in range(1500))
    # 500 expected each, standard deviation 18
    assert all(abs(chosen[i] - 500) < 90 for i in range(3))


def test_what_is_beyond_the_targets_has_no_score():
    policy = polyserve()
    scores = select(policy, make_columns(prompt=100, running=[0, 50]), policy.ties)[1]
    assert np.isnan(scores).tolist() == [False, True]


@pytest.mark.parametrize("name", ["polyserve", "least_ttft"])
def test_the_defaults_are_the_built_in_roofline_s(name):
    given, engine = policies.parameters(name), Roofline()
    token_s = 2 * engine.parameters / engine.compute
    assert 1 / given["prefill_tokens_per_s"] == pytest.approx(token_s, rel=0.01)
    assert given["decode_request_s"] == pytest.approx(token_s, rel=0.01)
    weights_s = 2 * engine.parameters / engine.bandwidth
    assert given["step_overhead_s"] == pytest.approx(engine.overhead_s + weights_s, rel=0.01)
    assert given["decode_context_token_s"] == pytest.approx(engine.kv_bytes / engine.bandwidth, rel=0.01)


def test_predictions_come_close_to_the_built_in_engine():
    # a prompt of a whole step on an idle instance; a short one beside 31 others, 1,000 tokens of context each
    ttft = policies.least_ttft().score(make_columns(prompt=4096, running=[0]))[0]
    tpot = -policies.polyserve().score(make_columns(prompt=1000, running=[31], context=[31_000]))[0]
    assert ttft == pytest.approx(Roofline()(4096, 0.0, 0, 0.0), rel=0.1)
    assert tpot == pytest.approx(Roofline()(0, 0.0, 32, 1000.0), rel=0.1)


# -- against the definitions in a loop ----------------------------------------------------------------------


def predictions(c):
    """TTFT and TPOT of each candidate."""
    for x in rows(c):
        step = 0.010 + x["batch_size"] * 0.001 + (x["context_tokens"] + c.request.prompt_tokens) * 10e-6
        yield x, x["p_tokens"] / 1000 + math.ceil(x["p_tokens"] / 100) * step, step


def first(candidates):
    """Of pairs of a cost and a candidate: the cheapest, then the smaller batch, then who waited longest."""
    return min(candidates, key=lambda e: (e[0], e[1]["batch_size"], e[1]["last_chosen"], e[1]["i"]))[1]["i"]


@given(c=columns())
def test_polyserve_agrees_with_its_definition_in_a_loop(c):
    within = [(-tpot, x) for x, ttft, tpot in predictions(c) if ttft <= 0.5 and tpot <= 0.06]
    expected = first(within or [(x["u"], x) for x in rows(c)])
    assert expected == choose(polyserve(tpot_target_s=0.06), c)


@given(c=columns())
def test_least_ttft_agrees_with_its_definition_in_a_loop(c):
    assert first([(ttft, x) for x, ttft, _ in predictions(c)]) == choose(least_ttft(), c)
