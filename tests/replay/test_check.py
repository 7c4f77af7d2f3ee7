"""A check of a trace: classes, holders, margins and what replays say, each against another way to them."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulsched.errors import InvalidArgument
from mulsched.replay import Burst, HotClass, Trace, builtin_profile, burst_trace, replay
from mulsched.replay.check import _Search, _watched, check_trace
from mulsched.replay.check_report import plot_check, sentences
from mulsched.replay.plots import render

PROFILE = builtin_profile("qwen2-7b-h20")
HOT = Burst("api", (HotClass(0.6, 16_384, 64, 100, start_s=10.0, end_s=20.0),), duration_s=30.0)


@pytest.fixture(scope="module")
def burst():
    return burst_trace(HOT, seed=0, rate_per_s=4.0)


@pytest.fixture(scope="module")
def checked(burst):
    return check_trace(burst, profile=PROFILE, instances=6, window_s=10.0)


def trace_of(prompts, *, block_size=16, tail=0):
    """A trace of prompts that are lists of ids of whole blocks, ``tail`` tokens after each."""
    n = len(prompts)
    return Trace(
        name="made",
        block_size=block_size,
        arrival_s=np.arange(n, dtype=np.float64),
        prompt_tokens=np.array([block_size * len(p) + tail for p in prompts], dtype=np.int64),
        output_tokens=np.ones(n, dtype=np.int64),
        run_start=np.array([block for p in prompts for block in p], dtype=np.int64),
        run_length=np.ones(sum(map(len, prompts)), dtype=np.int64),
        run_offset=np.cumsum([0, *map(len, prompts)], dtype=np.int64),
        session=np.full(n, -1, dtype=np.int64),
        previous=np.full(n, -1, dtype=np.int64),
        think_s=np.zeros(n),
    )


def search(prompts, matched, *, work=None, confidence=3.0, block_size=16, engine_block=16):
    """The search in one window of these prompts; ``matched``: cached engine blocks, a row per prompt."""
    trace = trace_of(prompts, block_size=block_size, tail=1)
    n = len(prompts)
    work = np.ones(n) if work is None else np.array(work, dtype=np.float64)
    return _Search(trace, engine_block, np.arange(n), np.array(matched, dtype=np.int32), work, confidence)


def alone(first, n):
    """``n`` prompts of one block each that nobody shares."""
    return [[block] for block in range(first, first + n)]


def test_a_burst_is_at_risk_while_it_lasts(checked):
    assert [window.verdict for window in checked.windows] == ["holds", "fails", "holds"]
    assert checked.at_risk


def test_the_hot_class_is_the_worst_of_its_window(burst, checked):
    hot = np.flatnonzero((burst.session < 0) & (burst.arrival_s >= 10) & (burst.arrival_s < 20))
    worst = checked.windows[1].classes[0]
    assert (worst.request, worst.requests, worst.prefix_tokens) == (hot[0], len(hot), 16_384)
    assert worst.share_ratio == len(hot) / checked.windows[1].requests
    assert worst.margin == worst.holders / 6 - worst.share_ratio


def test_figures_of_a_window_are_those_of_the_two_policies(burst, checked):
    options = {"profile": PROFILE, "instances": 6, "seed": 0}
    lmetric, load_only = (replay(burst, name, **options) for name in ("lmetric", "least_loaded"))
    inside = (burst.arrival_s >= 10) & (burst.arrival_s < 20)
    several = burst.output_tokens > 1
    window = checked.windows[1]
    assert window.ttft_ratio == pytest.approx(lmetric.ttft_s[inside].mean() / load_only.ttft_s[inside].mean())
    tpot = [result.tpot_s[inside[several]].mean() for result in (lmetric, load_only)]
    assert window.tpot_ratio == pytest.approx(tpot[0] / tpot[1])


def test_no_window_has_less_noise_than_the_trace(burst):
    options = {"profile": PROFILE, "instances": 6}
    mean = replay(burst, "lmetric", seed=0, **options).ttft_s.mean()
    shifted = [replay(burst, "lmetric", seed=seed, ties="random", **options).ttft_s.mean() for seed in (1, 2)]
    of_trace = max(abs(other / mean - 1) for other in shifted)
    windows = check_trace(burst, profile=PROFILE, instances=6, window_s=1.0).windows
    assert min(window.ttft_noise for window in windows) == pytest.approx(of_trace)


def test_lmetric_loses_in_tpot_where_the_herd_is(checked):
    assert [window.lost for window in checked.windows] == [(), ("tpot",), ()]


def test_every_request_is_in_one_window(burst, checked):
    assert sum(window.requests for window in checked.windows) == len(burst)


def test_watching_changes_no_choice(burst):
    options = {"profile": PROFILE, "instances": 6, "kv_blocks": 3000}
    watched, _ = _watched(burst, options, 0, None)
    unseen = replay(burst, "lmetric", seed=0, **options)
    assert watched.instance.tolist() == unseen.instance.tolist()
    assert watched.finish_s.tolist() == unseen.finish_s.tolist()


def test_the_chosen_instance_has_the_blocks_that_the_router_counted_on(burst):
    result, matched = _watched(burst, {"profile": PROFILE, "instances": 6, "kv_blocks": 3000}, 0, None)
    chosen = matched[np.arange(len(burst)), result.instance] * 16
    most = (burst.prompt_tokens - 1) // 16 * 16  # the last token is always computed
    assert np.minimum(chosen, most).tolist() == result.hit_tokens.tolist()


def test_holders_are_those_of_the_median_arrival():
    prompts = [[0, 1]] * 5
    has = [[2, 0, 0, 0], [2, 2, 0, 0], [2, 2, 0, 0], [2, 2, 2, 0], [1, 2, 2, 2]]
    ((described, requests, holders),) = search(prompts, has).classes()
    assert (described.holders, holders, requests.tolist()) == (2, {0, 1}, [0, 1, 2, 3, 4])


def test_of_an_even_number_of_arrivals_the_lower_median_counts():
    ((described, _, _),) = search([[0, 1]] * 4, [[2, 0, 0], [2, 0, 0], [2, 2, 2], [2, 2, 2]]).classes()
    assert described.holders == 1


def test_arrivals_that_find_no_holder_say_nothing_of_how_many_there_are():
    ((described, _, holders),) = search([[0, 1]] * 3, [[0, 0], [0, 1], [0, 2]]).classes()
    assert (described.holders, holders) == (1, {1})


def test_a_class_that_nobody_holds_holds_the_condition():
    ((described, _, holders),) = search([[0, 1]] * 40, [[0, 1]] * 40).classes()
    assert (described.holders, described.verdict, holders) == (0, "holds", frozenset())


def test_a_block_of_the_trace_is_many_of_the_engine():
    has = [[63, 64]] * 2
    ((described, _, holders),) = search([[0, 1]] * 2, has, block_size=512).classes()
    assert (described.prefix_tokens, holders) == (1024, {1})


def test_a_partial_block_is_no_prefix():
    trace = trace_of([[0, 1]] * 2, tail=-1)
    found = _Search(trace, 16, np.arange(2), np.ones((2, 2), dtype=np.int32), np.ones(2), 3.0).prefixes()
    assert [depth for depth, _ in found] == [1]


def test_a_prefix_that_is_the_smaller_part_of_its_prompts_is_no_class():
    prompts = [[0, 1, 2 + 3 * i, 3 + 3 * i, 4 + 3 * i] for i in range(4)]
    assert search(prompts, np.full((4, 2), 5)).classes() == []


@pytest.mark.parametrize(("requests", "verdict"), [(10, "chance"), (11, "fails")])
def test_a_small_excess_may_be_chance(requests, verdict):
    # of 100 requests on 100 instances: the excess is requests - 1, three deviations 3 * sqrt(requests)
    prompts = [[0]] * requests + alone(1, 100 - requests)
    judged = search(prompts, np.eye(100, dtype=np.int32)[:1].repeat(100, axis=0)).judged(16)
    assert judged["verdict"] == verdict
    assert judged["margin"] == pytest.approx(0.01 - requests / 100)


def test_a_share_that_is_exactly_the_holders_holds():
    judged = search([[0]] * 25 + alone(1, 75), [[1, 0, 0, 0]] * 100).judged(16)
    assert (judged["margin"], judged["verdict"]) == (0.0, "holds")


def test_work_may_fail_where_requests_do_not():
    prompts = [[0]] * 40 + alone(1, 160)
    judged = search(prompts, [[1, 0, 0, 0]] * 200, work=[10.0] * 40 + [1.0] * 160).judged(16)
    assert judged["margin"] == pytest.approx(0.25 - 0.2)
    assert judged["work_margin"] == pytest.approx(0.25 - 400 / 560)
    assert judged["verdict"] == "fails"


def test_a_few_long_requests_are_no_evidence():
    prompts = [[0]] * 4 + alone(1, 96)
    judged = search(prompts, [[1, 0, 0, 0]] * 100, work=[200.0] * 4 + [1.0] * 96).judged(16)
    assert judged["work_margin"] < -0.5
    assert judged["verdict"] == "chance"


def test_a_class_without_holders_adds_nothing_to_those_that_have_some():
    prompts = [[0]] * 10 + [[1]] * 50 + alone(2, 40)
    has = np.zeros((100, 100), dtype=np.int32)
    has[:10, 0] = 1
    judged = search(prompts, has).judged(16)
    assert [found.holders for found in judged["classes"]] == [1, 0]
    assert judged["verdict"] == "chance"


def test_classes_may_fail_together_where_none_does_alone():
    prompts = [[0]] * 20 + [[1]] * 20 + [[2]] * 20 + alone(3, 40)
    judged = search(prompts, [[1, 0, 0, 0]] * 100).judged(16)
    assert [found.verdict for found in judged["classes"]] == ["holds"] * 3
    assert judged["margin"] == pytest.approx(0.25 - 0.6)
    assert judged["verdict"] == "fails"


def test_of_prefixes_inside_each_other_the_worst_is_shown():
    # twelve share blocks 0 to 2, which three of four instances have; ten of them block 3, which one has
    prompts = [[0, 1, 2, 3]] * 10 + [[0, 1, 2, 4]] * 2 + alone(50, 8)
    has = [[4, 3, 3, 0]] * 10 + [[3, 3, 4, 0]] * 10
    described = [found for found, _, _ in search(prompts, has).classes()]
    assert sorted((found.requests, found.prefix_tokens) for found in described) == [
        (2, 64),
        (10, 64),
        (12, 48),
    ]
    classes = search(prompts, has).judged(16)["classes"]
    assert [(found.requests, found.prefix_tokens) for found in classes] == [(10, 64), (2, 64)]


def test_a_trace_without_prefixes_is_safe():
    judged = search(alone(0, 50), np.zeros((50, 4))).judged(16)
    assert judged == {"classes": (), "margin": 1.0, "work_margin": 1.0, "verdict": "holds"}


def test_prompts_of_less_than_a_block_have_no_prefixes():
    trace = trace_of([[], []], tail=5)
    assert _Search(trace, 16, np.arange(2), np.zeros((2, 2), np.int32), np.ones(2), 3.0).prefixes() == []


def test_json_has_no_nan():
    trace = trace_of([[0], [1]])  # answers of one token have no TPOT
    check = check_trace(trace, profile=PROFILE, instances=2)
    text = json.dumps(check.as_dict(), allow_nan=False)
    assert json.loads(text)["windows"][0]["tpot_ratio"] is None
    assert math.isnan(check.windows[0].tpot_ratio)


def test_windows_without_requests_are_left_out():
    trace = trace_of([[i] for i in range(9)])
    windows = check_trace(
        trace.take(trace.arrival_s != 4), profile=PROFILE, instances=2, window_s=1.0
    ).windows
    assert [window.start_s for window in windows] == [0, 1, 2, 3, 5, 6, 7, 8]


def test_processes_change_nothing(burst, checked):
    assert check_trace(burst, profile=PROFILE, instances=6, window_s=10.0, processes=2) == checked


def test_sentences_count_windows(checked):
    assert sentences(checked) == [
        "The condition fails in 1 of 3 windows: at risk.",
        "By replay LMetric loses to load-only, by more than ties move it, in 1 of 3 windows, "
        "1 of them where the condition fails.",
    ]


def test_equal_checks_give_equal_plots(checked):
    first, second = (render(plot_check(checked), "svg") for _ in range(2))
    assert first == second
    assert b"<svg" in first


@pytest.mark.parametrize(
    "wrong",
    [{"window_s": 0.0}, {"window_s": math.inf}, {"confidence": -1.0}, {"classes": 17}, {"instances": 0}],
)
def test_bad_arguments_are_refused(wrong):
    with pytest.raises(InvalidArgument, match=f"{next(iter(wrong))} must"):
        check_trace(trace_of([[0]]), profile=PROFILE, **wrong)


@st.composite
def chained_prompts(draw):
    """Prompts over a small alphabet; ids name the whole prefix, as in a trace."""
    names = {}
    texts = draw(st.lists(st.text("ab", max_size=4), min_size=1, max_size=8))
    return [[names.setdefault(t[: d + 1], len(names)) for d in range(len(t))] for t in texts]


@given(chained_prompts())
def test_prefixes_are_the_longest_of_every_set_of_requests(prompts):
    longest = {}
    for prompt in prompts:
        for depth, block in enumerate(prompt, 1):
            having = tuple(i for i, other in enumerate(prompts) if block in other)
            if len(having) > 1:
                longest[having] = max(depth, longest.get(having, 0))
    found = search(prompts, np.zeros((len(prompts), 1))).prefixes()
    assert sorted((depth, tuple(requests.tolist())) for depth, requests in found) == sorted(
        (depth, having) for having, depth in longest.items()
    )


@given(chained_prompts(), st.integers(0, 2**32 - 1))
def test_shown_classes_share_no_request_and_no_margin_is_below_the_windows(prompts, seed):
    rng = np.random.default_rng(seed)
    judged = search(
        prompts, rng.integers(0, 5, (len(prompts), 3)), work=rng.random(len(prompts)) + 0.1
    ).judged(4)
    assert sum(found.requests for found in judged["classes"]) <= len(prompts)
    assert all(found.margin >= judged["margin"] for found in judged["classes"])
    assert all(found.work_margin >= judged["work_margin"] for found in judged["classes"])
