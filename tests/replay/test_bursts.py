"""Bursts: seeded, with the shares, prefixes and times that their classes ask for."""

from dataclasses import replace

import numpy as np
import pytest

from mulsched.errors import InvalidArgument, InvalidType
from mulsched.replay import BURSTS, Burst, HotClass, burst_trace, steady_burst

ONE = HotClass(0.4, 1024, 64, 100, start_s=40.0, end_s=100.0)


def trace_of(*hot, duration_s=120.0, rate_per_s=40.0):
    return burst_trace(Burst("api", hot, duration_s=duration_s), seed=3, rate_per_s=rate_per_s)


def hot_requests(trace):
    return np.flatnonzero(trace.session < 0)


@pytest.mark.parametrize("name", sorted(BURSTS))
def test_the_seed_decides_everything(name):
    one, same, other = (burst_trace(name, duration_s=90, seed=seed, rate_per_s=4) for seed in (1, 1, 2))
    assert one.arrival_s.tolist() == same.arrival_s.tolist()
    assert one.run_start.tolist() == same.run_start.tolist()
    assert one.arrival_s.tolist() != other.arrival_s.tolist()
    assert one.name == f"synthetic:{name}"
    assert one.synthetic


def test_ids_cover_every_whole_block():
    trace = trace_of(ONE, replace(ONE, suffix_tokens=0))
    for i in range(len(trace)):
        assert len(trace.block_ids(i)) == trace.prompt_tokens[i] // 16


def test_a_class_has_its_share_of_the_arrivals_while_it_is_hot():
    trace = trace_of(ONE, rate_per_s=200.0)
    inside = (trace.arrival_s >= 40) & (trace.arrival_s < 100)
    assert (trace.session[inside] < 0).mean() == pytest.approx(0.4, abs=0.02)


def test_shares_of_several_classes_are_of_all_arrivals():
    trace = trace_of(*(replace(ONE, share_ratio=0.2) for _ in range(3)), rate_per_s=200.0)
    inside = (trace.arrival_s >= 40) & (trace.arrival_s < 100)
    assert (trace.session[inside] < 0).mean() == pytest.approx(0.6, abs=0.02)


def test_one_request_comes_ahead_of_the_burst():
    arrival = trace_of(ONE).arrival_s[hot_requests(trace_of(ONE))]
    assert arrival[0] == 20.0
    assert arrival[1:].min() >= 40.0
    assert arrival.max() < 100.0


def test_a_burst_that_is_not_seeded_starts_at_its_start():
    trace = trace_of(replace(ONE, seeded=False))
    assert trace.arrival_s[hot_requests(trace)].min() >= 40.0


def test_a_ramp_rises():
    trace = trace_of(replace(ONE, ramp_s=60.0), rate_per_s=200.0)
    arrival = trace.arrival_s[hot_requests(trace)]
    early, late = ((arrival >= a) & (arrival < a + 30) for a in (40, 70))
    assert late.sum() == pytest.approx(3 * early.sum(), rel=0.15)


def test_a_class_shares_its_trunk_and_nothing_else():
    trace = trace_of(ONE)
    first, second = (trace.block_ids(i) for i in hot_requests(trace)[1:3])
    assert first[:64].tolist() == second[:64].tolist()
    assert not set(first[64:]) & set(second[64:])


def test_the_background_has_no_block_of_a_class():
    trace = trace_of(ONE)
    hot = set(np.concatenate([trace.block_ids(i) for i in hot_requests(trace)]).tolist())
    background = np.concatenate([trace.block_ids(i) for i in np.flatnonzero(trace.session >= 0)])
    assert not hot & set(background.tolist())


def test_classes_share_what_they_have_in_common():
    one, other = (replace(ONE, common_tokens=512, start_s=s, end_s=s + 20) for s in (20.0, 60.0))
    trace = trace_of(one, other)
    at = hot_requests(trace)
    first, last = trace.block_ids(at[1]), trace.block_ids(at[-1])
    assert (first[:32] == last[:32]).all()
    assert not set(first[32:]) & set(last[32:])


def test_a_suffix_of_0_makes_prompts_equal():
    trace = trace_of(replace(ONE, suffix_tokens=0))
    prompts = {tuple(trace.block_ids(i).tolist()) for i in hot_requests(trace)}
    assert len(prompts) == 1


def test_a_follow_up_of_the_background_continues_the_prompt_before_it():
    trace = burst_trace(Burst("chat", (ONE,), duration_s=300.0), seed=1, rate_per_s=6.0)
    follow_ups = np.flatnonzero(trace.previous >= 0)
    assert len(follow_ups) > 20
    for i in follow_ups:
        before = trace.previous[i]
        assert trace.session[i] == trace.session[before]
        ids = trace.block_ids(before)
        assert (trace.block_ids(i)[: len(ids)] == ids).all()


def test_a_steady_burst_is_hot_all_along():
    trace = burst_trace(steady_burst(Burst("api", (ONE,), duration_s=120.0)), seed=3, rate_per_s=100.0)
    for start in range(0, 120, 30):
        inside = (trace.arrival_s >= start) & (trace.arrival_s < start + 30)
        assert (trace.session[inside] < 0).mean() == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share_ratio": 1.0}, "share_ratio must lie between 0 and 1, got 1.0"),
        ({"start_s": 100.0}, "start_s < end_s"),
        ({"ramp_s": 61.0}, "a ramp within"),
        ({"trunk_tokens": 8}, "trunk_tokens must be at least 16"),
        ({"common_tokens": 2048}, "hold common_tokens"),
        ({"output_tokens": 0}, "output_tokens at least 1"),
    ],
)
def test_a_bad_class_is_refused(changes, message):
    with pytest.raises(InvalidArgument, match=message):
        replace(ONE, **changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("video", (ONE,)), "background must be one of"),
        (("chat", ()), "got 0 with 0 in all"),
        (("chat", (ONE, ONE, ONE)), "got 3 with 1.2 in all"),
        (("chat", (ONE,), 0.0), "duration_s must be finite and above 0"),
    ],
)
def test_a_bad_burst_is_refused(arguments, message):
    with pytest.raises(InvalidArgument, match=message):
        Burst(*arguments)


def test_an_unknown_burst_is_refused():
    with pytest.raises(InvalidArgument, match="unknown burst 'cold', expected one of hot_class"):
        burst_trace("cold")


def test_a_rate_that_is_no_number_is_refused():
    with pytest.raises(InvalidType):
        burst_trace("hot_class", rate_per_s="6")
