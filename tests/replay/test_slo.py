"""Service level objectives and goodput."""

import dataclasses

import numpy as np
import pytest

from mulsched.errors import InvalidArgument
from mulsched.replay import builtin_profile, replay, synthetic_trace
from mulsched.replay.slo import Slo, goodput, parse_slo


@pytest.fixture(scope="module")
def result():
    """Four requests by hand: TTFT 0.1, 0.3, 0.1, 0.1 s; TPOT 0.02, 0.02, 0.59 s, none; over 8 s."""
    trace = synthetic_trace("chat", duration_s=5, seed=1, rate_per_s=3)
    real = replay(trace.take(np.arange(len(trace)) < 4), "vllm", profile=builtin_profile(), instances=1)
    first = np.array([0.1, 1.3, 2.1, 3.1])
    return dataclasses.replace(
        real,
        arrival_s=np.array([0.0, 1.0, 2.0, 3.0]),
        first_token_s=first,
        output_tokens=np.array([11, 11, 11, 1]),
        finish_s=np.array([0.3, 1.5, 8.0, 3.1]),
    )


def test_who_meets_both_counts(result):
    assert Slo(ttft_s=0.2, tpot_s=0.03).met(result).tolist() == [True, False, False, True]


def test_what_is_not_asked_for_does_not_count(result):
    assert Slo(ttft_s=0.2).met(result).tolist() == [True, False, True, True]
    assert Slo(tpot_s=0.03).met(result).tolist() == [True, True, False, True]


def test_goodput_is_those_per_second_of_the_span_and_their_share(result):
    assert goodput(result, Slo(ttft_s=0.2, tpot_s=0.03)) == {"goodput_per_s": 2 / 8, "slo_met_ratio": 0.5}


def test_an_slo_nobody_misses_gives_the_throughput(result):
    assert goodput(result, Slo(ttft_s=100))["goodput_per_s"] == result.summary()["requests_per_s"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ttft=0.5,tpot=0.05", Slo(0.5, 0.05)),
        ("tpot = 0.05, ttft = 1", Slo(1.0, 0.05)),
        ("ttft=2", Slo(ttft_s=2.0)),
    ],
)
def test_an_slo_is_read(text, expected):
    assert parse_slo(text) == expected


def test_an_slo_says_what_it_asks_for():
    assert str(Slo(0.5, 0.05)) == "TTFT <= 0.5 s and TPOT <= 0.05 s"


@pytest.mark.parametrize(
    "text",
    ["", "ttft", "ttft=", "itl=1", "ttft=1,ttft=2", "ttft=fast", "ttft=0", "tpot=-1", "ttft=inf", "ttft=nan"],
)
def test_an_slo_that_cannot_be_met_or_read_is_refused(text):
    with pytest.raises(InvalidArgument, match="SLO"):
        parse_slo(text)
