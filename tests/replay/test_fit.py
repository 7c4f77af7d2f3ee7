"""Calibration, on runs that the engine model itself made with coefficients that are known here."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from mulsched.errors import InvalidArgument, MissingExtra
from mulsched.replay import Trace, replay
from mulsched.replay.fit import fit_profile, schedules_ahead, shown_limits, simulate
from mulsched.replay.profile import Profile
from mulsched.replay.request_times import RequestTimes
from mulsched.replay.step_time import FittedStep

TRUE = FittedStep(
    step_s=0.012,
    decode_s=5e-5,
    context_s=1e-7,
    prefill_s=0.004,
    new_token_s=4e-5,
    attention_s=2e-9,
    mixed_decode_s=6e-5,
)
ENGINE = Profile("true", TRUE, max_batched_tokens=2048, max_num_seqs=256, kv_blocks=20_000)
AHEAD = replace(ENGINE, schedules_ahead=True)
LOADS = [(0, 0, 4, 500), (0, 0, 40, 1000), (1000, 0, 20, 800), (2048, 1000, 40, 800)]


def requests_of(n=80, rate=8.0, seed=1):
    """Arrivals and lengths; the times are made up until an engine has run."""
    rng = np.random.default_rng(seed)
    arrival = np.cumsum(rng.exponential(1 / rate, n))
    arrival -= arrival[0]
    return RequestTimes(
        "made",
        arrival,
        arrival,
        arrival + 1,
        arrival + 2,
        rng.integers(50, 3000, n),
        rng.integers(20, 150, n),
    )


def run_of(engine=ENGINE, **made):
    requests = requests_of(**made)
    run = simulate(requests, engine)
    return replace(requests, first_token_s=run.first_token_s, finish_s=run.finish_s)


def error_of(step):
    return max(abs(step(*load) / TRUE(*load) - 1) for load in LOADS)


def test_a_lone_request_takes_the_sum_of_its_steps():
    requests = RequestTimes(
        "one", *(np.array([t]) for t in (3.0, 3.0, 4.0, 5.0)), np.array([3000]), np.array([3])
    )
    run = simulate(requests, ENGINE)
    first = 3.0 + TRUE(2048, 0, 0, 0) + TRUE(952, 2048, 0, 0)
    assert run.first_token_s[0] == pytest.approx(first)
    assert run.finish_s[0] == pytest.approx(first + TRUE(0, 0, 1, 3000) + TRUE(0, 0, 1, 3001))
    assert (run.joined_s[0], run.joined[0], run.first_token[0], run.finish[0]) == (3.0, 0, 2, 4)


def test_an_engine_that_schedules_ahead_takes_requests_a_step_later():
    times = [np.array([0.0, 0.001])] * 2 + [np.array([1.0, 1.0]), np.array([2.0, 2.0])]
    requests = RequestTimes("two", *times, np.array([10, 10]), np.array([5, 5]))
    at_once, ahead = simulate(requests, ENGINE), simulate(requests, AHEAD)
    assert at_once.first_token[1] == 2
    assert ahead.first_token[1] == 3
    assert ahead.joined_s[1] == at_once.joined_s[1]


def test_an_idle_engine_takes_requests_at_once_however_it_schedules():
    requests = requests_of(5, rate=0.01)
    at_once, ahead = simulate(requests, ENGINE), simulate(requests, AHEAD)
    np.testing.assert_array_equal(at_once.first_token_s, ahead.first_token_s)


@pytest.mark.parametrize("engine", [ENGINE, AHEAD, replace(AHEAD, max_num_seqs=4)])
def test_a_replay_on_one_instance_has_the_times_of_the_simulation(engine):
    requests = requests_of()
    blocks = requests.prompt_tokens // 16
    trace = Trace(
        name="made",
        block_size=16,
        arrival_s=requests.arrival_s,
        prompt_tokens=requests.prompt_tokens,
        output_tokens=requests.output_tokens,
        run_start=np.cumsum(blocks) - blocks,  # none is another's
        run_length=blocks,
        run_offset=np.arange(81),
        session=np.full(80, -1),
        previous=np.full(80, -1),
        think_s=np.zeros(80),
    )
    result, run = replay(trace, "lmetric", profile=engine, instances=1), simulate(requests, engine)
    assert result.first_token_s.tolist() == run.first_token_s.tolist()
    assert result.finish_s.tolist() == run.finish_s.tolist()


@pytest.mark.parametrize("engine", [ENGINE, AHEAD])
def test_that_an_engine_schedules_ahead_is_found_and_kept_in_its_profile(engine):
    requests = requests_of(40, rate=60.0)
    requests = replace(requests, prompt_tokens=requests.prompt_tokens // 30)  # prompts of one step
    run = simulate(requests, engine)
    made = replace(requests, scheduled_s=run.joined_s, first_token_s=run.first_token_s, finish_s=run.finish_s)
    known = {name: getattr(TRUE, name) for name in TRUE.__slots__}
    fit = fit_profile(made, kv_blocks=20_000, known=known)
    assert fit.profile.schedules_ahead == engine.schedules_ahead


def test_coefficients_that_made_a_run_come_back():
    fit = fit_profile(run_of(), kv_blocks=20_000, schedule_ahead=False)
    assert fit.error < 0.02
    assert error_of(fit.profile.step_time) < 0.05


def test_they_come_back_from_the_first_half_of_an_engine_that_schedules_ahead():
    run = run_of(AHEAD)
    half = np.arange(80) < 40
    fit = fit_profile(run, kv_blocks=20_000, scored=half, schedule_ahead=True)
    again = simulate(run, fit.profile)
    np.testing.assert_allclose(again.finish_s[~half], run.finish_s[~half], rtol=0.03)


def test_what_is_not_scored_changes_nothing():
    run = run_of()
    half = np.arange(80) < 40
    spoilt = replace(run, first_token_s=run.first_token_s + ~half, finish_s=run.finish_s + 2.0 * ~half)
    one, other = (fit_profile(r, kv_blocks=20_000, scored=half, schedule_ahead=False) for r in (run, spoilt))
    assert one == other


def test_known_coefficients_stay_and_the_others_follow():
    known = {"context_s": TRUE.context_s, "attention_s": TRUE.attention_s}
    step = fit_profile(run_of(), kv_blocks=20_000, known=known, schedule_ahead=False).profile.step_time
    assert (step.context_s, step.attention_s) == (TRUE.context_s, TRUE.attention_s)
    assert error_of(step) < 0.05


def test_nothing_is_left_to_fit_when_all_are_known():
    known = {name: getattr(TRUE, name) for name in TRUE.__slots__}
    fit = fit_profile(run_of(), kv_blocks=20_000, known=known, schedule_ahead=False)
    assert fit.profile.step_time == TRUE
    assert fit.error == 0


def test_the_memory_that_made_a_run_is_found_among_candidates():
    run = run_of(replace(ENGINE, kv_blocks=600))
    fit = fit_profile(run, kv_blocks=[1200, 800, 600, 450], max_num_seqs=256, schedule_ahead=False)
    assert fit.profile.kv_blocks == 600


def test_memory_that_never_fills_is_the_first_candidate():
    fit = fit_profile(run_of(n=20), kv_blocks=[9000, 7000, 8000], schedule_ahead=False)
    assert fit.profile.kv_blocks == 9000


def made(scheduled, first_token, finish, prompts, arrival=None):
    n = len(scheduled)
    columns = [np.array(c, dtype=float) for c in (arrival or scheduled, scheduled, first_token, finish)]
    return RequestTimes("made", *columns, np.array(prompts), np.full(n, 2))


def test_requests_that_the_budget_cut_show_it():
    # at 1 s: 1,000 + 900 fit beside one that decodes, and the last only in part; at 3 s nobody is cut
    run = made([0, 1, 1, 1, 3, 3], [0.5, 2, 2, 2.5, 4, 4], [9, 9, 9, 9, 9, 9], [100, 1000, 900, 400, 10, 10])
    assert shown_limits(run) == (2048, None)


def test_requests_that_wait_for_a_full_engine_show_how_many_it_runs():
    run = made([0, 0, 3, 4], [1, 1, 3.5, 4.5], [3, 4, 5, 6], [10] * 4, arrival=[0, 0, 1, 2])
    assert shown_limits(run) == (None, 2)


def test_requests_that_wait_for_memory_show_no_number():
    # the three that waited found two, one and one running
    finish = [2, 4, 9, 4.5, 6, 8]
    run = made([0, 0, 0, 3, 5, 7], [1, 1, 1, 3.5, 5.5, 7.5], finish, [10] * 6, arrival=[0, 0, 0, 1, 2, 3])
    assert shown_limits(run) == (None, None)


def test_ends_of_steps_between_scheduling_and_first_token_show_scheduling_ahead():
    starts = np.arange(20.0)
    at_once = made(starts, starts + 1, starts + 3, [10] * 20)
    ahead = made(starts, starts + 2, starts + 3, [10] * 20)
    assert not schedules_ahead(at_once)
    assert schedules_ahead(ahead)


def test_limits_that_a_run_shows_are_taken_and_others_are_vllms():
    run = replace(run_of(n=20), scheduled_s=requests_of(n=20).arrival_s)
    profile = fit_profile(run, kv_blocks=20_000, schedule_ahead=False).profile
    assert (profile.max_batched_tokens, profile.max_num_seqs) == (2048, 256)
    given = fit_profile(run, kv_blocks=20_000, max_batched_tokens=512, max_num_seqs=7).profile
    assert (given.max_batched_tokens, given.max_num_seqs) == (512, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scored": np.zeros(20, dtype=bool)}, r"scored must choose from 20 requests, got 0 of \(20,\)"),
        ({"scored": np.ones(3, dtype=bool)}, r"scored must choose from 20 requests, got 3 of \(3,\)"),
        ({"known": {"speed": 1.0}}, "known must be of step_s, .*, got speed"),
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1, got 0"),
        ({"kv_blocks": []}, "kv_blocks must be a number or candidates, got none"),
        ({"kv_blocks": 3}, "request .* needs .* blocks, the engine has 3"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(InvalidArgument, match=message):
        fit_profile(requests_of(20), **({"kv_blocks": 20_000} | arguments))


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MissingExtra, match=r"pip install 'mulsched\[fit\]'"):
        fit_profile(run_of(n=5), kv_blocks=20_000)
