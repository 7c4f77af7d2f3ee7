"""Every named policy against its definition: by hand, against a naive re-implementation, and by properties."""

import math
from collections import Counter

import numpy as np
import pytest
from columns import columns, make_columns
from hypothesis import given, settings
from hypothesis import strategies as st

from mulsched import policies
from mulsched.errors import InvalidArgument, InvalidType
from mulsched.indicators import COLUMNS
from mulsched.policies._policy import select

RANDOM = ("random", "power_of_two", "bailian", "dynamo")


def choose(name, c, **parameters):
    policy = policies.get(name, **parameters)
    return select(policy, c, policy.ties)[0]


# -- by hand ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given_columns", "expected"),
    [
        # (100 - 0) * 3 = 300 against (100 - 80) * 10 = 200
        ("lmetric", {"prompt": 100, "matched": [0, 5], "running": [2, 9]}, 1),
        # queued tokens count: 100 * 1 against (20 + 500) * 1
        ("lmetric", {"prompt": 100, "matched": [0, 5], "queued": [0, 500]}, 0),
        ("round_robin", {"last_chosen": [4, 2, 3]}, 1),
        ("least_loaded", {"running": [3, 0, 1], "waiting": [0, 4, 1]}, 2),
        # 4 * 1 + 0 = 4 against 5
        ("vllm", {"running": [0, 5], "waiting": [1, 0]}, 0),
        ("vllm", {"running": [0, 3], "waiting": [1, 0]}, 1),
        ("most_hits", {"matched": [3, 9], "running": [0, 99]}, 1),
        # a shorter queue wins whatever the batch
        ("least_p_tokens", {"matched": [0, 9], "queued": [0, 100], "running": [0, 50]}, 1),
        # .7 * 1 + .3 * .1 = .73 against .7 * .2 + .3 * 1 = .44
        ("linear", {"prompt": 100, "matched": [0, 5], "running": [0, 9]}, 1),
        # (100 + 0) / 16 against 20 / 16 + 200 / 16
        ("dynamo", {"prompt": 100, "matched": [0, 5], "context": [0, 200]}, 0),
        # 9 requests apart: fewest requests only
        ("aibrix", {"matched": [5, 0], "running": [9, 0]}, 1),
        # within the gate: most hits, though busier (mean 2, deviation 2: both within 4)
        ("aibrix", {"matched": [5, 0], "running": [4, 0]}, 0),
        # no hits anywhere: fewest requests
        ("aibrix", {"matched": [0, 0], "running": [1, 0]}, 1),
        # mean 2.67 + deviation 2.49 = 5.16 excludes the warm one with 6
        ("aibrix", {"matched": [9, 0, 1], "running": [6, 2, 0]}, 2),
        # more than half matched: that one
        ("sglang_cache_aware", {"prompt": 100, "matched": [0, 4], "cached": [1, 9]}, 1),
        # half or less: the smallest cache
        ("sglang_cache_aware", {"prompt": 100, "matched": [0, 3], "cached": [1, 9]}, 0),
        # 33 apart and 1.1 times: fewest requests, whatever is cached
        ("sglang_cache_aware", {"prompt": 100, "matched": [0, 6], "running": [0, 33]}, 0),
        # 33 apart but not 1.1 times as many: the cache decides
        ("sglang_cache_aware", {"prompt": 100, "matched": [0, 6], "running": [1000, 1033]}, 1),
        # at least .8 cached: only those, then the fewest tokens in flight
        ("llm_d", {"prompt": 100, "matched": [5, 5, 0], "queued": [900, 500, 0]}, 1),
        # nobody has .8: fewest tokens in flight
        ("llm_d", {"prompt": 100, "matched": [4, 0], "queued": [900, 500]}, 1),
        # the warm one is more than 18 s behind (300,000 / 15,928 = 18.8): everyone
        ("llm_d", {"prompt": 100, "matched": [5, 0], "queued": [300_000, 0]}, 1),
        # more than half matched: the longest match
        ("preble", {"prompt": 100, "matched": [4, 0], "running": [9, 0], "now": 1.0}, 0),
        # half or less: the least work, here the fewest new tokens
        ("preble", {"prompt": 100, "matched": [0, 3], "now": 1.0}, 1),
    ],
)
def test_it_decides_as_its_source_does(name, given_columns, expected):
    assert choose(name, make_columns(**given_columns)) == expected


def test_power_of_two_takes_the_better_of_the_two_drawn():
    for decision in range(50):
        c = make_columns(running=[5, 1, 3, 2], decision=decision)
        drawn = np.argsort(c.uniform)[:2].tolist()
        assert choose("power_of_two", c) == min(drawn, key=lambda i: c.running[i])


def test_random_is_uniform():
    chosen = Counter(choose("random", make_columns(running=[0, 9, 0, 0], decision=d)) for d in range(2000))
    assert sorted(chosen) == [0, 1, 2, 3]
    # 500 expected, standard deviation 19
    assert all(400 < count < 600 for count in chosen.values())


def test_bailian_draws_in_proportion_to_desirability():
    # hits .7 * 1 + .15 * 1 + .15 * 1 = 1 against .7 * 0 + .15 + .15 = .3: 10 to 3
    chosen = Counter(
        choose("bailian", make_columns(prompt=100, matched=[5, 0], decision=d)) for d in range(2000)
    )
    assert 0.72 < chosen[0] / 2000 < 0.82


def test_dynamo_with_a_temperature_softens():
    # normalised costs 0 and 1 at temperature 1: odds e to 1
    c = [make_columns(prompt=100, matched=[5, 0], decision=d) for d in range(2000)]
    warm = sum(choose("dynamo", x, temperature=1.0) == 0 for x in c) / 2000
    assert abs(warm - math.e / (1 + math.e)) < 0.04
    assert all(choose("dynamo", x) == 0 for x in c[:20])


def test_sticky_returns_to_the_last_instance_of_the_session():
    policy = policies.get("sticky")
    first = make_columns(running=[0, 0], session="s")
    policy.on_dispatch(first, 1)
    assert select(policy, make_columns(running=[0, 9], session="s"), policy.ties)[0] == 1
    assert select(policy, make_columns(running=[0, 9], session="other"), policy.ties)[0] == 0
    assert select(policy, make_columns(running=[0, 9]), policy.ties)[0] == 0
    # its home is no candidate
    elsewhere = make_columns(running=[3, 1], session="s", names=["a", "b"])
    assert select(policy, elsewhere, policy.ties)[0] == 1


def test_sticky_forgets_the_least_recent_session():
    policy = policies.get("sticky", max_sessions=1)
    policy.on_dispatch(make_columns(running=[0, 0], session="old"), 1)
    policy.on_dispatch(make_columns(running=[0, 0], session="new"), 1)
    assert select(policy, make_columns(running=[0, 9], session="old"), policy.ties)[0] == 0
    assert select(policy, make_columns(running=[0, 9], session="new"), policy.ties)[0] == 1


def test_consistent_hashing_keeps_a_session_and_moves_few_when_one_leaves():
    names = [f"gpu-{i}" for i in range(8)]
    sessions = [f"s{i}" for i in range(400)]

    def home(session, members):
        c = make_columns(running=[0] * len(members), names=members, session=session)
        return members[choose("consistent_hash_bounded", c)]

    before = {s: home(s, names) for s in sessions}
    after = {s: home(s, names[:-1]) for s in sessions}
    moved = [s for s in sessions if before[s] != after[s]]
    assert all(before[s] == "gpu-7" for s in moved)
    assert 10 < Counter(before.values())["gpu-7"] < 110  # 50 expected


def test_consistent_hashing_passes_over_a_full_instance():
    free = make_columns(running=[0, 0, 0], session="s")
    home = choose("consistent_hash_bounded", free)
    running = [0, 0, 0]
    running[home] = 5  # bound: ceil(1.25 * 6 / 3) = 3
    assert choose("consistent_hash_bounded", make_columns(running=running, session="s")) != home


def test_consistent_hashing_without_a_session_follows_the_prompt():
    one, two = ([1, 2, 3], [7, 8, 9])
    a, b, c = (
        choose("consistent_hash_bounded", make_columns(running=[0] * 16, keys=keys))
        for keys in (one, one, two)
    )
    assert a == b != c


def test_preble_counts_the_work_of_its_window():
    policy = policies.get("preble", window_s=10, decode_s=1.0)
    policy.on_dispatch(make_columns(running=[0, 0], now=0.0), 0)
    assert select(policy, make_columns(running=[0, 0], now=5.0), policy.ties)[0] == 1
    policy.on_dispatch(make_columns(running=[0, 0], now=5.0), 1)
    policy.on_dispatch(make_columns(running=[0, 0], now=6.0), 1)
    assert select(policy, make_columns(running=[0, 0], now=7.0), policy.ties)[0] == 0
    # the first is out of the window by now; one is left on each side but the second has two
    assert select(policy, make_columns(running=[0, 0], now=12.0), policy.ties)[0] == 0


def test_preble_needs_the_time():
    with pytest.raises(InvalidArgument, match="policy 'preble' sums load over a time window: pass now"):
        choose("preble", make_columns(running=[0, 0]))


# -- parameters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameter", "bad"),
    [
        ("linear", "weight", 1.1),
        ("linear", "weight", -0.1),
        ("dynamo", "overlap_weight", -1),
        ("dynamo", "temperature", float("inf")),
        ("bailian", "hit_weight", -1),
        ("aibrix", "imbalance", -1),
        ("sglang_cache_aware", "cache_threshold", 2),
        ("sglang_cache_aware", "balance_rel", 0.5),
        ("llm_d", "affinity_threshold", 1.5),
        ("llm_d", "peak_prefill_tokens_per_s", 0),
        ("preble", "window_s", -1),
        ("sticky", "max_sessions", 0),
        ("consistent_hash_bounded", "balance", 0.9),
        ("consistent_hash_bounded", "virtual_nodes", 0),
    ],
)
def test_parameters_out_of_range_are_refused(name, parameter, bad):
    for value in (bad, float("nan")):
        with pytest.raises(InvalidArgument, match=f"{parameter} must be finite and .*, got"):
            policies.get(name, **{parameter: value})
    for value in ("1", None, True):
        with pytest.raises(InvalidType, match=f"{parameter} must be a number, got"):
            policies.get(name, **{parameter: value})


# -- against naive re-implementations -----------------------------------------------------------------------


def rows(c):
    """Columns as a list of dicts, for code that loops."""
    return [{name: int(c[name][i]) for name in COLUMNS} | {"i": i} for i in range(len(c))]


def naive_aibrix(c):
    r = rows(c)
    loads = [x["batch_size"] for x in r]
    if max(loads) - min(loads) > 8:
        r = [x for x in r if x["batch_size"] == min(loads)]
    else:
        mean = sum(loads) / len(loads)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in loads) / len(loads))
        r = [x for x in r if x["batch_size"] <= mean + deviation + 1e-9]
    return min(r, key=lambda x: (-x["hit_tokens"], x["batch_size"], x["last_chosen"], x["i"]))["i"]


def naive_sglang(c):
    r = rows(c)
    loads = [x["running"] + x["waiting"] for x in r]
    tie = ("batch_size", "last_chosen", "i")
    if max(loads) - min(loads) > 32 and max(loads) > 1.1 * min(loads):
        key = "batch_size"
    elif max(x["matched_blocks"] for x in r) * 16 > 0.5 * c.request.prompt_tokens:
        return min(r, key=lambda x: (-x["matched_blocks"], *(x[t] for t in tie)))["i"]
    else:
        key = "cached_blocks"
    return min(r, key=lambda x: (x[key], *(x[t] for t in tie)))["i"]


def naive_llm_d(c):
    r = rows(c)
    warm = [x for x in r if x["matched_blocks"] * 16 >= 0.8 * c.request.prompt_tokens]
    if warm:
        best = min(x["queued_prefill_tokens"] for x in warm) / 15928
        if best - min(x["queued_prefill_tokens"] for x in r) / 15928 <= 18:
            r = warm
    return min(r, key=lambda x: (x["queued_prefill_tokens"], x["batch_size"], x["last_chosen"], x["i"]))["i"]


def by(*keys):
    def naive(c):
        return min(
            rows(c), key=lambda x: (*(k(x, c) for k in keys), x["batch_size"], x["last_chosen"], x["i"])
        )["i"]

    return naive


NAIVE = {
    "lmetric": by(lambda x, c: x["p_tokens"] * x["batch_size"]),
    "least_loaded": by(lambda x, c: x["running"] + x["waiting"]),
    "vllm": by(lambda x, c: 4 * x["waiting"] + x["running"]),
    "most_hits": by(lambda x, c: -x["hit_tokens"]),
    "least_p_tokens": by(lambda x, c: x["queued_prefill_tokens"] + x["new_prefill_tokens"]),
    "aibrix": naive_aibrix,
    "sglang_cache_aware": naive_sglang,
    "llm_d": naive_llm_d,
}


@pytest.mark.parametrize("name", sorted(NAIVE))
@settings(deadline=None)
@given(c=columns())
def test_it_agrees_with_its_definition_in_a_loop(name, c):
    assert NAIVE[name](c) == choose(name, c)


# -- properties of all --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", policies.names())
@settings(max_examples=40, deadline=None)
@given(c=columns(now=10.0))
def test_scores_are_finite_pure_and_someone_is_chosen(name, c):
    policy = policies.get(name)
    table = c.table.copy()
    position, scores = select(policy, c, policy.ties)
    assert 0 <= position < len(c)
    assert np.isfinite(scores[position])
    assert select(policy, c, policy.ties)[0] == position
    assert (c.table == table).all()


@pytest.mark.parametrize("name", sorted(set(policies.names()) - set(RANDOM)))
@settings(max_examples=40, deadline=None)
@given(c=columns(min_size=2, now=10.0), data=st.data())
def test_the_order_of_the_candidates_does_not_matter(name, c, data):
    # last_chosen differs everywhere but for one -1, so no tie is left to the row
    policy = policies.get(name)
    ties = "least_recent"
    chosen = c.instances[select(policy, c, ties)[0]]
    order = data.draw(st.permutations(range(len(c))))
    shuffled = type(c)(
        request=c.request,
        instances=tuple(c.instances[i] for i in order),
        rows=c.rows[order],
        table=c.table[:, order],
        decision=c.decision,
        block_size=c.block_size,
        seed=c.seed,
        now=c.now,
    )
    assert shuffled.instances[select(policy, shuffled, ties)[0]] == chosen


@pytest.mark.parametrize("name", policies.names())
def test_its_docstring_has_the_five_heads_and_its_policy_a_source(name):
    policy = policies.get(name)
    doc = getattr(policies, name).__doc__
    for head in ("What it does:", "Intent:", "Inputs:", "Parameters:", "Known losses:"):
        assert head in doc
    assert policy.source
    assert policy.name == name
