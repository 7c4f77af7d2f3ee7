"""The native replay against its twin, which drives the production Router: equal to the last bit."""

from dataclasses import fields, replace
from typing import get_args

import numpy as np
import pytest
from backends import BACKENDS
from hypothesis import given
from hypothesis import strategies as st

from mulsched import policies
from mulsched.errors import NonFiniteScore
from mulsched.failure import Mitigation
from mulsched.policies import Policy
from mulsched.replay import Disaggregation, Profile, Roofline, Trace, builtin_profile, replay, simulator
from mulsched.replay._replay_py import run_replay as run_python
from mulsched.replay.step_table import StepTable
from mulsched.replay.step_time import FittedStep, MoeRoofline, expert_shares

SMALL = Profile("small", Roofline(), block_size=4, max_batched_tokens=24, max_num_seqs=4, kv_blocks=40)

REQUESTS = st.lists(
    st.tuples(
        st.floats(0, 0.1),  # gap
        st.lists(st.integers(0, 1), max_size=6),  # path
        st.integers(0, 3),  # tokens beyond the last block
        st.integers(1, 20),  # output
        st.integers(-1, 3),  # session
        st.booleans(),  # follows the session's request before
    ),
    min_size=1,
    max_size=12,
)


def trace_of(drawn):
    """Chained ids from a small alphabet, so that prefixes are shared; 8-token blocks, two of the engine's."""
    n = len(drawn)
    ids = [
        [2**d + int("0" + "".join(map(str, p[:d])), 2) for d in range(1, len(p) + 1)] for _, p, *_ in drawn
    ]
    session = np.array([s for *_, s, _ in drawn])
    previous = np.full(n, -1)
    for i, (*_, s, follows) in enumerate(drawn):
        before = np.flatnonzero(session[:i] == s)
        if follows and s >= 0 and len(before):
            previous[i] = before[-1]
    return Trace(
        name="drawn",
        block_size=8,
        arrival_s=np.cumsum([gap for gap, *_ in drawn]),
        prompt_tokens=np.array([max(1, 8 * len(path) + rest) for _, path, rest, *_ in drawn]),
        output_tokens=np.array([output for _, _, _, output, *_ in drawn]),
        run_start=np.array([i for path in ids for i in path], dtype=np.int64),
        run_length=np.ones(sum(map(len, ids)), dtype=np.int64),
        run_offset=np.concatenate([[0], np.cumsum([len(path) for path in ids])]),
        session=session,
        previous=previous,
        think_s=np.where(previous >= 0, 0.01, 0.0),
    )


def outcome(result):
    told = {f.name: getattr(result, f.name) for f in fields(result)}
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in told.items()}


def twins(trace, policy, **options):
    """Results of both twins, or of one where only that is there."""
    results = []
    for backend in BACKENDS:
        with pytest.MonkeyPatch.context() as patch:
            if backend == "python":
                patch.setattr(simulator, "run_replay", run_python)
            results.append(outcome(replay(trace, policy, **({"profile": SMALL, "instances": 3} | options))))
    return results


@given(
    drawn=REQUESTS,
    policy=st.sampled_from(policies.names()),
    loop=st.sampled_from(["open", "closed"]),
    cache_source=st.sampled_from(["events", "predicted"]),
    ties=st.sampled_from([None, "random", "first"]),
    delay=st.sampled_from([0.0, 0.03]),
    loss=st.sampled_from([0.0, 0.3]),
    in_flight=st.sampled_from(["ignore", "cached"]),
    split=st.sampled_from([None, Disaggregation(1), Disaggregation(2, "lmetric", 1e-4)]),
    blocks=st.sampled_from([20, 200]),
    schedules_ahead=st.booleans(),
    seed=st.integers(-5, 5),
)
def test_the_twins_agree_on_every_request(
    drawn, policy, loop, cache_source, ties, delay, loss, in_flight, split, blocks, schedules_ahead, seed
):
    options = {
        "profile": replace(SMALL, schedules_ahead=schedules_ahead),
        "loop": loop,
        "cache_source": cache_source,
        "ties": ties,
        "state_delay_s": delay,
        "event_loss_ratio": loss,
        "in_flight": in_flight,
        "disaggregation": split,
        "kv_blocks": blocks,
        "seed": seed,
    }
    first, *others = twins(trace_of(drawn), policy, **options)
    assert others in ([], [first])


@pytest.mark.parametrize("mitigation", get_args(Mitigation))
@pytest.mark.parametrize("weight", ["tokens", "requests"])
def test_the_twins_agree_while_a_class_is_in_alarm(mitigation, weight):
    rng = np.random.default_rng(3)
    drawn = [  # a prefix that most ask for, with room to herd
        (
            rng.random() / 400,
            [1, 1, 1, 1, *rng.integers(0, 2, 2).tolist()] if i % 4 else [0],
            1,
            20,
            -1,
            False,
        )
        for i in range(200)
    ]
    raised, results = [], []
    for options in ({}, {"in_flight": "cached", "cache_source": "predicted"}, {"state_delay_s": 0.01}):
        for backend in BACKENDS:
            policy = policies.get("lmetric_guarded", mitigation=mitigation, weight=weight, confidence=0.5)
            with pytest.MonkeyPatch.context() as patch:
                if backend == "python":
                    patch.setattr(simulator, "run_replay", run_python)
                results.append(
                    outcome(replay(trace_of(drawn), policy, profile=SMALL, instances=3, **options))
                )
            raised.append(policy.detector.alarms_raised)
    n = len(BACKENDS)
    assert all(results[i] == results[i - i % n] and raised[i] == raised[i - i % n] > 0 for i in range(3 * n))


TABLE = StepTable(
    prefill={(n, p): 0.004 + 2e-5 * n + 1e-8 * n * p for n in (1, 16, 64) for p in (0, 100, 1000)},
    decode={(b, c): 0.005 + 1e-4 * b + 1e-8 * b * c for b in (1, 4, 9) for c in (50, 200, 800)},
    mixed={(n, 0, b, c): 0.006 + 3e-5 * n + 1e-4 * b for n in (8, 32) for b in (2, 8) for c in (100, 400)},
)


def test_with_every_event_heard_no_stored_block_is_without_its_parent():
    rng = np.random.default_rng(1)
    for _ in range(20):  # of prompts that repeat, so that engines hold copies, and evict
        drawn = [
            (rng.random() / 10, rng.integers(0, 2, rng.integers(0, 7)).tolist(), 0, 5, -1, False)
            for _ in range(40)
        ]
        for result in twins(trace_of(drawn), "lmetric", profile=SMALL, instances=2):
            assert result["orphans"] == 0


@pytest.mark.parametrize("instances", [1, 65])
def test_a_prefix_in_flight_counts_only_when_asked_and_alike_in_both_twins(instances):
    # two equal prompts at once, and a third when they are done
    drawn = [(gap, [1, 0, 1], 1, 4, -1, False) for gap in (0.0, 0.0, 9.0)]
    hits = {}
    for in_flight in ("ignore", "cached"):
        first, *others = twins(trace_of(drawn), "most_hits", instances=instances, in_flight=in_flight)
        assert others in ([], [first])
        hits[in_flight] = first["hit_tokens"]
    assert hits["ignore"][1] == 0 < hits["cached"][1] == hits["cached"][2] == hits["ignore"][2]


@pytest.mark.parametrize("instances", [64, 65])
def test_the_twins_agree_at_the_most_instances_that_a_mask_holds_and_beyond(chat, instances):
    first, *others = twins(chat, "lmetric", profile=builtin_profile(), instances=instances, kv_blocks=4000)
    assert len(set(first["instance"])) == instances
    assert others in ([], [first])


def test_the_twins_agree_where_ids_are_not_chained():
    rng = np.random.default_rng(2)
    drawn = [(rng.random() / 20, [0] * rng.integers(1, 7), 0, 5, -1, False) for _ in range(60)]
    trace = trace_of(drawn)
    trace.run_start[:] = rng.integers(0, 5, len(trace.run_start))  # an id follows now one, now another
    first, *others = twins(trace, "lmetric", kv_blocks=20)
    assert others in ([], [first])


@pytest.mark.parametrize(
    "step_time",
    [
        TABLE,
        FittedStep(0.004, 1e-5, 1e-8, 1e-3, 1e-5, 1e-9, 1e-5),
        MoeRoofline(3e9, 2e9, 28e9, expert_shares(128, 8), 98_304, 786_432, 6e14, 2.5e12),
    ],
    ids=["table", "fitted", "experts"],
)
def test_step_times_are_the_same_to_the_last_bit(chat, step_time):
    first, *others = twins(chat, "lmetric", profile=Profile("any", step_time, max_batched_tokens=300))
    assert others in ([], [first])


def test_a_step_time_of_ones_own_is_called(chat):
    class Mine:
        counts_pairs = True

        def __call__(self, *load):
            return Roofline()(*load)

    mine = Profile("mine", Mine())
    first, *others = twins(chat, "lmetric", profile=mine)
    same = twins(chat, "lmetric", profile=builtin_profile())[0]
    assert others in ([], [first])
    assert first["finish_s"] == same["finish_s"]


def test_a_dispatch_callback_that_counts_as_false_is_called(chat):
    class Seen(list):
        def __call__(self, columns, position):
            self.append(position)

    seen = Seen()
    policy = replace(policies.get("lmetric"), on_dispatch=seen)
    assert replay(chat, policy, profile=builtin_profile(), instances=3).instance.tolist() == seen


def test_an_error_in_a_policy_comes_out_of_the_replay(chat):
    broken = Policy(name="broken", score=lambda columns: np.full(len(columns), np.nan))
    for backend in BACKENDS:
        with pytest.MonkeyPatch.context() as patch:
            if backend == "python":
                patch.setattr(simulator, "run_replay", run_python)
            with pytest.raises(NonFiniteScore, match="policy 'broken' gave nan for instance 'instance-0'"):
                replay(chat, broken, profile=SMALL, instances=3, kv_blocks=20_000)


def test_an_error_in_a_step_time_comes_out_of_the_replay(chat):
    def failing(*load):
        raise ZeroDivisionError("no time")

    with pytest.raises(ZeroDivisionError, match="no time"):
        replay(chat, "lmetric", profile=Profile("failing", failing), instances=3)


def test_an_error_in_the_progress_callback_stops_the_replay(chat):
    def progress(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replay(chat, "lmetric", profile=builtin_profile(), instances=3, progress=progress)
