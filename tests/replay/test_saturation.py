"""The rate that is too much."""

import dataclasses

import numpy as np
import pytest

from mulsched.errors import InvalidArgument
from mulsched.policies import PolicySpec
from mulsched.replay import Roofline, builtin_profile, replay, synthetic_trace
from mulsched.replay.saturation import SATURATION_FRACTIONS, is_saturated, rates_to_saturation

# an engine so slow that few requests fill it
SLOW = dataclasses.replace(builtin_profile(), step_time=Roofline(compute=0.7 * 989e12 / 20))
OPTIONS = {"profile": SLOW, "instances": 1}
LMETRIC = PolicySpec("lmetric")


@pytest.fixture(scope="module")
def trace():
    return synthetic_trace("api", duration_s=20, seed=1, rate_per_s=4)


def test_more_than_a_twentieth_unserved_at_the_last_arrival_is_saturation(trace):
    result = replay(trace, "vllm", **OPTIONS)
    last, n = result.arrival_s.max(), len(trace)
    for late, expected in ((n // 20 + 1, False), (n // 20 + 2, True)):
        first = np.where(np.arange(n) < late, last + 1, result.arrival_s)
        assert is_saturated(dataclasses.replace(result, first_token_s=first)) is expected


def test_the_grid_ends_just_beyond_where_the_first_policy_saturates(trace):
    rates = rates_to_saturation(LMETRIC, trace.scale_rate, OPTIONS)
    assert len(rates) == len(SATURATION_FRACTIONS)
    served = rates[SATURATION_FRACTIONS.index(1.0)]
    assert not is_saturated(replay(trace.scale_rate(served * 0.999), "lmetric", **OPTIONS))
    assert is_saturated(replay(trace.scale_rate(served * 1.12), "lmetric", **OPTIONS))
    assert rates[1] == pytest.approx(served / 2, rel=0.01)


def test_it_searches_below_a_trace_that_is_too_fast(trace):
    fast = trace.scale_rate(64)
    rates = rates_to_saturation(LMETRIC, fast.scale_rate, OPTIONS)
    assert rates[-1] < 1
    assert rates == pytest.approx(
        [r / 64 for r in rates_to_saturation(LMETRIC, trace.scale_rate, OPTIONS)], rel=0.02
    )


def test_progress_says_which_rate_is_tried(trace):
    told = []
    rates_to_saturation(LMETRIC, trace.scale_rate, OPTIONS, progress=lambda *message: told.append(message))
    assert told[0][0] == "does rate 1 saturate?"


def test_a_closed_loop_is_refused(trace):
    with pytest.raises(InvalidArgument, match="no rate saturates: give the rates"):
        rates_to_saturation(LMETRIC, trace.scale_rate, OPTIONS | {"loop": "closed"})


def test_a_trace_that_nothing_saturates_is_refused(trace):
    one = trace.take(np.arange(len(trace)) < 2)
    idle = dataclasses.replace(one, arrival_s=np.array([0.0, 1e7]))
    with pytest.raises(InvalidArgument, match="no saturating rate lies between"):
        rates_to_saturation(LMETRIC, idle.scale_rate, OPTIONS)
