"""Policies that switch between cache and load by a threshold."""

import statistics
from collections import Counter

import pytest
from columns import choose, columns, make_columns, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from mulsched import policies
from mulsched.errors import InvalidArgument
from mulsched.policies._policy import select


@pytest.mark.parametrize(
    ("policy", "given_columns", "expected"),
    [
        # 9 requests apart: the fewest requests only
        ("aibrix", {"matched": [5, 0], "running": [9, 0]}, 1),
        # 8 apart is within the gate: the most hits
        ("aibrix", {"matched": [5, 0], "running": [8, 0]}, 0),
        # the gate leaves the two idle ones, of which one is warmer
        ("aibrix", {"matched": [9, 1, 2], "running": [9, 0, 0]}, 2),
        # no hits anywhere: the fewest requests
        ("aibrix", {"matched": [0, 0], "running": [1, 0]}, 1),
        # equal hits: the fewest requests
        ("aibrix", {"matched": [3, 3, 0], "running": [2, 1, 0]}, 1),
        # 6, 2, 0: mean 2.67 + sample deviation 3.06 = 5.72 excludes the warm one
        ("aibrix", {"matched": [9, 0, 1], "running": [6, 2, 0]}, 2),
        # 5, 2, 3: mean 3.33 + sample deviation 1.53 = 4.86 excludes 5
        ("aibrix", {"matched": [9, 0, 1], "running": [5, 2, 3]}, 2),
        # 4, 2, 2, 3, 4: mean 3 + sample deviation 1 = 4 includes; that of the whole, .89, would exclude
        ("aibrix", {"matched": [9, 0, 1, 0, 0], "running": [4, 2, 2, 3, 4]}, 0),
        # more deviations let the busy one in again: 2.67 + 2 * 3.06 = 8.78
        (policies.aibrix(deviations=2), {"matched": [9, 0, 1], "running": [6, 2, 0]}, 0),
        # more than half matched: that one
        ("sglang_cache_aware", {"prompt": 100, "matched": [0, 4], "cached": [1, 9]}, 1),
        # half is not more than half: the smallest cache
        ("sglang_cache_aware", {"prompt": 96, "matched": [0, 3], "cached": [1, 9]}, 0),
        # the longest match of two over the threshold, though its cache is larger and its load higher
        ("sglang_cache_aware", {"prompt": 100, "matched": [4, 5], "cached": [1, 9], "running": [0, 9]}, 1),
        # 33 apart and 1.1 times: the fewest requests, whatever is cached
        ("sglang_cache_aware", {"prompt": 100, "matched": [0, 6], "running": [0, 33]}, 0),
        # 32 apart is within the gate
        ("sglang_cache_aware", {"prompt": 100, "matched": [0, 6], "running": [0, 32]}, 1),
        # 33 apart but not 1.1 times as many: the cache decides
        ("sglang_cache_aware", {"prompt": 100, "matched": [0, 6], "running": [1000, 1033]}, 1),
        # newer SGLang's gate: 33 apart is within 64
        (
            policies.sglang_cache_aware(balance_abs=64, balance_rel=1.5),
            {"prompt": 100, "matched": [0, 6], "running": [0, 33]},
            1,
        ),
        # at least .8 cached: only those, then the fewest uncached tokens: 20 + 900 against 20 + 500
        ("llm_d", {"prompt": 100, "matched": [5, 5, 0], "queued": [900, 500, 0]}, 1),
        # .8 exactly is enough (80 of 100), .64 is not
        ("llm_d", {"prompt": 100, "matched": [4, 5], "queued": [0, 9]}, 1),
        # nobody has .8, but what is cached is not in flight: 36 + 500 against 100 + 450
        ("llm_d", {"prompt": 100, "matched": [4, 0], "queued": [500, 450]}, 0),
        # the warm one is more than 18 s behind (300,000 / 15,928 = 18.8): everyone, so 300,020 against 100
        ("llm_d", {"prompt": 100, "matched": [5, 0], "queued": [300_000, 0]}, 1),
        # 17.6 s behind (280,000 / 15,928) is not
        ("llm_d", {"prompt": 100, "matched": [5, 0], "queued": [280_000, 0]}, 0),
        # the best warm one counts, not the worst
        ("llm_d", {"prompt": 100, "matched": [5, 5, 0], "queued": [300_000, 1000, 0]}, 1),
        # without a penalty the warm one is taken at any price
        (
            policies.llm_d(max_ttft_penalty_s=0),
            {"prompt": 100, "matched": [5, 0], "queued": [9_000_000, 0]},
            0,
        ),
        # a threshold of 0 lets everyone through
        (
            policies.llm_d(affinity_threshold=0),
            {"prompt": 100, "matched": [5, 0], "queued": [100, 0]},
            1,
        ),
        # both beyond what is counted: equal, so the smaller batch
        (
            policies.llm_d(full_load_tokens=50),
            {"prompt": 100, "queued": [100, 200], "running": [1, 0]},
            1,
        ),
        # more than half matched: the longest match
        ("preble", {"prompt": 100, "matched": [4, 5], "running": [0, 9], "now": 1.0}, 1),
        # half is not more than half, and nothing was sent yet: the smaller batch
        ("preble", {"prompt": 96, "matched": [3, 0], "running": [1, 0], "now": 1.0}, 1),
        # a full match counts as one although its last block is computed again: 16 of 16, not 0 of 16
        ("preble", {"prompt": 16, "matched": [1, 0], "running": [1, 0], "now": 1.0}, 0),
    ],
)
def test_it_decides_as_its_source_does(policy, given_columns, expected):
    assert choose(policy, make_columns(**given_columns)) == expected


def test_aibrix_draws_among_equals():
    chosen = Counter(choose("aibrix", make_columns(matched=[3, 3, 0], decision=d)) for d in range(1000))
    # 500 expected each, standard deviation 16
    assert chosen[2] == 0
    assert abs(chosen[0] - 500) < 80


def test_aibrix_prefers_fewer_requests_among_equal_hits_whatever_the_ties():
    c = make_columns(matched=[3, 3, 0], running=[2, 1, 0])
    assert select(policies.get("aibrix"), c, "first")[0] == 1


# -- preble's window ----------------------------------------------------------------------------------------


def preble(**parameters):
    return policies.get(
        "preble", **({"window_s": 10, "prefill_tokens_per_s": 1000, "decode_s": 1.0} | parameters)
    )


def cold(now, **given_columns):
    return make_columns(**({"running": [0, 0], "prompt": 500} | given_columns), now=now)


def test_preble_explores_by_the_work_sent_in_the_window():
    policy = preble()
    # two short requests, 2 * (.1 + 1) = 2.2 s, against one long one, 3 + 1 = 4 s
    for now in (0.0, 1.0):
        policy.on_dispatch(cold(now, prompt=100), 0)
    policy.on_dispatch(cold(2.0, prompt=3000), 1)
    assert policy.score(cold(3.0)).tolist() == pytest.approx([2.2, 4.0])
    assert choose(policy, cold(3.0)) == 0


def test_preble_counts_only_the_new_tokens():
    policy = preble()
    policy.on_dispatch(cold(0.0, prompt=100, matched=[5, 0]), 0)
    # 20 tokens of 100 were new
    assert policy.score(cold(0.0)).tolist() == pytest.approx([1.02, 0.0])


def test_preble_breaks_ties_of_a_long_match_by_requests_not_by_work():
    policy = preble()
    policy.on_dispatch(cold(0.0, prompt=9000), 0)
    for now in (1.0, 2.0):
        policy.on_dispatch(cold(now, prompt=1), 1)
    assert choose(policy, cold(3.0, prompt=100, matched=[5, 5])) == 0
    assert choose(policy, cold(3.0, prompt=100, matched=[0, 0])) == 1


def test_preble_forgets_what_is_as_old_as_the_window():
    policy = preble()
    policy.on_dispatch(cold(0.0), 0)
    policy.on_dispatch(cold(5.0), 1)
    assert policy.score(cold(9.9)).tolist() == pytest.approx([1.5, 1.5])
    assert policy.score(cold(10.0)).tolist() == pytest.approx([0.0, 1.5])
    assert policy.score(cold(15.0)).tolist() == [0.0, 0.0]


def test_looking_ahead_forgets_nothing():
    policy = preble()
    policy.on_dispatch(cold(0.0), 0)
    policy.score(cold(100.0))
    assert policy.score(cold(1.0)).tolist() == pytest.approx([1.5, 0.0])


def test_preble_leaves_no_rounding_behind():
    policy = preble(prefill_tokens_per_s=3.0, decode_s=0.1)
    for i in range(100):
        policy.on_dispatch(cold(i / 10, prompt=7 + i), i % 2)
    assert policy.score(cold(1000.0)).tolist() == [0.0, 0.0]
    policy.on_dispatch(cold(1000.0, prompt=6), 0)
    assert policy.score(cold(1000.0)).tolist() == [2.1, 0.0]


def test_preble_remembers_no_instance_longer_than_the_window():
    policy = preble()
    for i in range(50):
        policy.on_dispatch(cold(float(i), names=[f"pod-{i}", f"pod-{i + 1}"]), 0)
    window = policy.on_dispatch.__self__
    assert len(window._entries) == 10
    assert sorted(window._requests) == sorted(window._tokens) == [f"pod-{i}" for i in range(40, 50)]


def test_preble_needs_the_time():
    policy = preble()
    message = "policy 'preble' sums load over a time window: pass now, got None"
    for call in (lambda c: choose(policy, c), lambda c: policy.on_dispatch(c, 0)):
        with pytest.raises(InvalidArgument, match=message):
            call(make_columns(running=[0, 0]))
    # and nothing was counted
    assert policy.score(cold(0.0)).tolist() == [0.0, 0.0]


@settings(max_examples=80)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 1.0, 4.0, 10.0]), columns(min_size=3, max_size=3)), max_size=15),
    st.sampled_from([0.0, 5.0, 10.0]),
)
def test_preble_agrees_with_its_definition_in_a_loop(requests, window_s):
    policy, sent, now = preble(window_s=window_s), [], 0.0
    for later, c in requests:
        now += later
        c.now = now
        recent = [(i, new) for then, i, new in sent if now - then < window_s]
        count = Counter(i for i, _ in recent)
        new = Counter()
        for i, tokens in recent:
            new[i] += tokens
        r = rows(c)
        if max(16 * x["matched_blocks"] for x in r) / c.request.prompt_tokens > 0.5:
            value = {x["i"]: (-x["matched_blocks"], count[x["i"]]) for x in r}
        else:
            value = {x["i"]: (new[x["i"]] / 1000 + count[x["i"]] * 1.0,) for x in r}
            assert [value[i][0] for i in range(3)] == pytest.approx(policy.score(c))
        best = min(r, key=lambda x: (*value[x["i"]], x["batch_size"], x["last_chosen"], x["i"]))
        chosen = choose(policy, c)
        assert best["i"] == chosen
        policy.on_dispatch(c, chosen)
        sent.append((now, chosen, r[chosen]["new_prefill_tokens"]))


# -- against the definitions in a loop ----------------------------------------------------------------------


def naive_aibrix(c):
    """All that may win: the source draws among equals."""
    r = rows(c)
    loads = [x["running"] + x["waiting"] for x in r]
    if max(loads) - min(loads) > 8:
        r = [x for x in r if x["running"] + x["waiting"] == min(loads)]
    elif len(loads) > 1:
        limit = statistics.mean(loads) + statistics.stdev(loads) + 1e-9
        r = [x for x in r if x["running"] + x["waiting"] <= limit]
    best = min((-x["matched_blocks"], x["batch_size"]) for x in r)
    return [x["i"] for x in r if (-x["matched_blocks"], x["batch_size"]) == best]


def first(r, *keys):
    return min(r, key=lambda x: (*(x[key] for key in keys), x["batch_size"], x["last_chosen"], x["i"]))["i"]


def naive_sglang(c):
    r = rows(c)
    loads = [x["running"] + x["waiting"] for x in r]
    if max(loads) - min(loads) > 32 and max(loads) > 1.1 * min(loads):
        return first(r, "batch_size")
    longest = max(x["matched_blocks"] for x in r)
    if 16 * longest / c.request.prompt_tokens > 0.5:
        return first([x for x in r if x["matched_blocks"] == longest])
    return first(r, "cached_blocks")


def naive_llm_d(c, penalty_s):
    r = rows(c)
    sticky = [x for x in r if 16 * x["matched_blocks"] / c.request.prompt_tokens >= 0.8]
    others = [x for x in r if x not in sticky]
    if sticky:
        r = sticky
        if others and penalty_s > 0:
            seconds = [min(x["queued_prefill_tokens"] for x in part) / 15928 for part in (sticky, others)]
            if seconds[0] - seconds[1] > penalty_s:
                r = sticky + others
    return first(r, "p_tokens")


@given(c=columns())
def test_aibrix_agrees_with_its_definition_in_a_loop(c):
    assert choose("aibrix", c) in naive_aibrix(c)


@given(c=columns())
def test_sglang_agrees_with_its_definition_in_a_loop(c):
    assert naive_sglang(c) == choose("sglang_cache_aware", c)


# 160 tokens behind is 10 ms
@given(c=columns(), penalty_s=st.sampled_from([0.0, 0.01, 18.0]))
def test_llm_d_agrees_with_its_definition_in_a_loop(c, penalty_s):
    assert naive_llm_d(c, penalty_s) == choose(policies.llm_d(max_ttft_penalty_s=penalty_s), c)
