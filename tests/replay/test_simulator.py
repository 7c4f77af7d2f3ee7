"""Replays: the production router in front of modelled engines."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mulsched import policies
from mulsched.errors import InvalidArgument, UnknownPolicy
from mulsched.policies import Policy
from mulsched.replay import Disaggregation, Profile, builtin_profile, replay, replay_many, synthetic_trace

PROFILE = builtin_profile()


def run(trace, policy="lmetric", **options):
    return replay(trace, policy, **({"profile": PROFILE, "instances": 3} | options))


def test_every_request_has_one_first_token_and_one_end_in_order(chat):
    result = run(chat)
    assert (result.first_token_s > result.arrival_s).all()
    assert (result.finish_s >= result.first_token_s).all()
    assert ((result.instance >= 0) & (result.instance < 3)).all()
    assert result.arrival_s.tolist() == chat.arrival_s.tolist()


def test_with_events_the_router_knows_what_the_engine_will_find(chat):
    result = run(chat)
    # a request may find more, computed while it waited, and less, evicted: here the caches are large
    assert (result.cached_tokens >= result.hit_tokens).all()
    assert result.hit_tokens.sum() > 0.9 * result.cached_tokens.sum() > 0


def test_no_hit_is_more_than_the_ideal(chat):
    result = run(chat)
    assert 0 < result.summary()["hit_ratio"] <= chat.stats().hit_ratio
    assert (result.cached_tokens < chat.prompt_tokens).all()


def test_one_instance_with_room_for_all_reaches_the_ideal_but_for_requests_that_overlap(chat):
    slow = chat.scale_rate(0.05)
    result = run(slow, instances=1, kv_blocks=100_000)
    assert result.summary()["hit_ratio"] > 0.95 * slow.stats().hit_ratio


def test_predicted_caches_come_close_to_observed_ones(chat):
    observed, predicted = run(chat), run(chat, cache_source="predicted")
    assert predicted.summary()["hit_ratio"] == pytest.approx(observed.summary()["hit_ratio"], rel=0.1)
    assert predicted.hit_tokens.sum() > 0


def test_the_cache_pays(chat):
    by_name = {name: run(chat, name).summary() for name in ("lmetric", "round_robin")}
    assert by_name["lmetric"]["hit_ratio"] > by_name["round_robin"]["hit_ratio"]
    assert by_name["lmetric"]["ttft_mean_s"] < by_name["round_robin"]["ttft_mean_s"]


def test_parameters_reach_the_policy_and_its_label(chat):
    cache_only = run(chat, "linear", parameters={"weight": 1.0})
    load_only = run(chat, "linear", parameters={"weight": 0.0})
    assert cache_only.label == "linear(weight=1.0)"
    assert cache_only.summary()["hit_ratio"] > load_only.summary()["hit_ratio"]


def test_parameters_beside_a_policy_object_are_refused(chat):
    with pytest.raises(InvalidArgument, match="go with a policy's name"):
        run(chat, policies.get("linear"), parameters={"weight": 1.0})


def test_round_robin_spreads_evenly(chat):
    counts = np.bincount(run(chat, "round_robin").instance)
    assert counts.max() - counts.min() <= 1


def test_in_a_closed_loop_a_follow_up_waits_for_the_answer_and_the_thinking(chat):
    result = run(chat, loop="closed")
    follow_ups = np.flatnonzero(chat.previous >= 0)
    assert len(follow_ups) > 10
    expected = result.finish_s[chat.previous[follow_ups]] + chat.think_s[follow_ups]
    assert result.arrival_s[follow_ups] == pytest.approx(expected)


@pytest.mark.parametrize("name", policies.names())
def test_every_policy_replays_and_the_seed_decides(chat, name):
    short = chat.slice(0, 15)
    one, same = run(short, name, seed=5), run(short, name, seed=5)
    assert one.instance.tolist() == same.instance.tolist()
    assert one.finish_s.tolist() == same.finish_s.tolist()
    assert one.policy == name


def test_small_caches_evict_and_still_agree_with_the_router(chat):
    result = run(chat, kv_blocks=3100)
    assert result.kv_blocks == 3100
    assert result.summary()["hit_ratio"] < run(chat).summary()["hit_ratio"]


def test_golden_numbers(chat):
    summary = run(chat, seed=1).summary()
    assert {
        k: float(f"{v:.5g}") for k, v in summary.items() if k.startswith("t") or k == "hit_ratio"
    } == GOLDEN


def test_processes_do_not_change_results(chat):
    jobs = [{"policy": name, "profile": PROFILE, "instances": 2} for name in ("lmetric", "vllm")]
    short, seen = chat.slice(0, 10), []
    alone = replay_many(short, jobs)
    pooled = replay_many(short, jobs, processes=2, progress=lambda *message: seen.append(message))
    for one, other in zip(alone, pooled, strict=True):
        assert one.finish_s.tolist() == other.finish_s.tolist()
    assert {(job, done) for job, done, _ in seen if done == len(short)} == {(0, len(short)), (1, len(short))}


def test_an_error_in_a_worker_reaches_the_caller(chat):
    with pytest.raises(InvalidArgument, match="instances and kv_blocks must be at least 1"):
        replay_many(chat, [{"policy": "vllm", "profile": PROFILE, "instances": 0}] * 2, processes=2)


def test_a_policy_object_replays_too(chat):
    first = Policy(name="first", score=lambda columns: np.zeros(len(columns)), ties="first")
    assert set(run(chat.slice(0, 5), first).instance.tolist()) == {0}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"policy": "best"}, UnknownPolicy, "unknown policy 'best'"),
        ({"instances": 0}, InvalidArgument, "at least 1, got 0"),
        ({"kv_blocks": 0}, InvalidArgument, "at least 1"),
        ({"kv_blocks": 10}, InvalidArgument, "an engine holds 160"),
        ({"loop": "half"}, InvalidArgument, "loop open or closed, got events, half"),
        ({"cache_source": "guess"}, InvalidArgument, "cache_source must be events or predicted"),
    ],
)
def test_bad_options_are_refused(chat, options, error, message):
    with pytest.raises(error, match=message):
        run(chat, **options)


def test_a_length_beyond_64_bits_is_refused(chat):
    endless = dataclasses.replace(chat, output_tokens=np.full(len(chat), 2**63 - 1))
    longest = 2**63 - 1 + int(chat.prompt_tokens.max())
    with pytest.raises(InvalidArgument, match=f"a request of {longest} tokens"):
        run(endless)


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from(["lmetric", "most_hits", "random"]), st.integers(1, 4))
def test_requests_are_conserved_on_any_seed(seed, policy, instances):
    trace = synthetic_trace("tool_agent", duration_s=5, seed=seed)
    result = run(trace, policy, instances=instances, kv_blocks=9000)
    assert (result.finish_s >= result.first_token_s).all()
    assert np.bincount(result.instance, minlength=instances).sum() == len(trace)


# of the run in test_golden_numbers; a change must be explained in the CHANGELOG
GOLDEN = {
    "ttft_mean_s": 0.057228,
    "ttft_p50_s": 0.031408,
    "ttft_p95_s": 0.13799,
    "ttft_p99_s": 0.37194,
    "tpot_mean_s": 0.010092,
    "tpot_p50_s": 0.0095994,
    "tpot_p95_s": 0.013304,
    "tpot_p99_s": 0.016839,
    "hit_ratio": 0.17067,
}


def test_a_router_that_hears_late_predicts_fewer_hits(chat):
    at_once, late = run(chat), run(chat, state_delay_s=5.0)
    assert late.hit_tokens.sum() < at_once.hit_tokens.sum()
    assert late.state_delay_s == 5.0


def test_a_delay_without_end_leaves_the_router_with_its_bookings(chat):
    deaf = run(chat, state_delay_s=1e9, in_flight="ignore")
    assert deaf.hit_tokens.sum() == 0
    # nothing ever ends for it, so it spreads requests as evenly as new tokens and counts allow
    counts = np.bincount(deaf.instance)
    assert counts.max() - counts.min() <= len(chat) / 4


def test_of_lost_events_the_router_knows_nothing_and_what_follows_them_has_no_place(chat):
    lossy = run(chat, event_loss_ratio=0.2)
    assert lossy.lost_messages > 0
    assert lossy.orphans > 0
    assert lossy.hit_tokens.sum() < run(chat).hit_tokens.sum()
    assert run(chat, event_loss_ratio=1.0).hit_tokens.sum() == 0


def test_prefill_and_decode_apart_share_no_instance(chat):
    result = run(chat, instances=4, disaggregation=Disaggregation(1))
    assert set(result.instance) == {0}
    assert set(result.decode_instance) == {1, 2, 3}
    assert result.hit_tokens.sum() > 0


def test_the_transfer_delays_the_first_token_by_its_time(chat):
    one = chat.slice(0, 2).take(np.arange(len(chat.slice(0, 2))) == 0)
    near, far = (
        run(one, instances=2, disaggregation=Disaggregation(1, transfer_s_per_token=seconds))
        for seconds in (0.0, 0.001)
    )
    expected = 0.001 * one.prompt_tokens
    assert far.first_token_s - near.first_token_s == pytest.approx(expected)


def test_without_disaggregation_a_request_decodes_where_it_prefills(chat):
    result = run(chat)
    assert result.decode_instance.tolist() == result.instance.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_delay_s": -1.0}, "state_delay_s must be finite and at least 0, got -1.0"),
        ({"state_delay_s": np.nan}, "state_delay_s must be finite and at least 0, got nan"),
        ({"event_loss_ratio": 1.5}, r"event_loss_ratio must lie in 0..1, got 1.5"),
        ({"disaggregation": Disaggregation(3)}, "3 prefill instances leave none of 3 to decode"),
        ({"profile": Profile("odd", PROFILE.step_time, block_size=12)}, "must divide the trace's 16"),
    ],
)
def test_options_that_make_no_sense_are_refused(chat, options, message):
    with pytest.raises(InvalidArgument, match=message):
        run(chat, **options)


def test_a_disaggregation_without_prefill_is_refused():
    with pytest.raises(InvalidArgument, match="prefill_instances must be at least 1, got 0"):
        Disaggregation(0)
    with pytest.raises(InvalidArgument, match="transfer_s_per_token must be finite and at least 0, got -1"):
        Disaggregation(1, transfer_s_per_token=-1)
