"""Policies that follow the cache or the session."""

import bisect
import math
from collections import Counter, OrderedDict

import numpy as np
import pytest
import xxhash
from columns import choose, columns, make_columns, reorder, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from mulsched import Router, policies


@pytest.mark.parametrize(
    ("name", "given_columns", "expected"),
    [
        # 9 blocks against 3, whatever the load
        ("most_hits", {"matched": [3, 9], "running": [0, 99]}, 1),
        # no hits at all: the smaller batch
        ("most_hits", {"matched": [0, 0], "running": [2, 1]}, 1),
        # all hit alike and are loaded alike: the one chosen longer ago
        ("most_hits", {"matched": [4, 4], "last_chosen": [8, 3]}, 1),
        # both compute the last block of a full match again, so both hit 5 blocks: the smaller batch
        ("most_hits", {"prompt": 96, "matched": [6, 5], "running": [1, 0]}, 1),
        # 1000 + 0 against 856 + 100, whatever the batch
        ("least_p_tokens", {"matched": [0, 9], "queued": [0, 100], "running": [0, 50]}, 1),
        # 1000 + 0 against 856 + 200
        ("least_p_tokens", {"matched": [0, 9], "queued": [0, 200]}, 0),
        # 1000 each: the smaller batch
        ("least_p_tokens", {"running": [5, 4]}, 1),
    ],
)
def test_it_decides_as_its_definition_says(name, given_columns, expected):
    assert choose(name, make_columns(**given_columns)) == expected


# -- sticky -------------------------------------------------------------------------------------------------


def test_sticky_returns_to_the_last_instance_of_the_session():
    policy = policies.get("sticky")
    policy.on_dispatch(make_columns(running=[0, 0], session="s"), 1)
    assert choose(policy, make_columns(running=[0, 9], session="s")) == 1


@pytest.mark.parametrize("session", [None, "", "other"])
def test_sticky_takes_the_least_loaded_without_a_known_session(session):
    policy = policies.get("sticky")
    policy.on_dispatch(make_columns(running=[0, 0], session="s"), 1)
    policy.on_dispatch(make_columns(running=[0, 0], session=None), 1)
    assert choose(policy, make_columns(running=[0, 9], session=session)) == 0


def test_sticky_takes_the_least_loaded_when_the_home_is_no_candidate():
    policy = policies.get("sticky")
    policy.on_dispatch(make_columns(running=[0, 0], session="s"), 1)
    assert choose(policy, make_columns(running=[3, 1], session="s", names=["a", "b"])) == 1


def test_sticky_moves_home_with_the_session():
    policy = policies.get("sticky")
    for position in (0, 2):
        policy.on_dispatch(make_columns(running=[0, 0, 0], session="s"), position)
    assert choose(policy, make_columns(running=[0, 0, 9], session="s")) == 2


def test_sticky_forgets_the_session_that_was_used_longest_ago():
    policy = policies.get("sticky", max_sessions=2)
    for session in ("a", "b", "a", "c"):
        policy.on_dispatch(make_columns(running=[0, 0], session=session), 1)
    there = {s: choose(policy, make_columns(running=[0, 9], session=s)) for s in "abc"}
    assert there == {"a": 1, "b": 0, "c": 1}


def test_looking_at_a_session_does_not_make_it_recent():
    policy = policies.get("sticky", max_sessions=2)
    for session in ("a", "b"):
        policy.on_dispatch(make_columns(running=[0, 0], session=session), 1)
    choose(policy, make_columns(running=[0, 0], session="a"))
    policy.on_dispatch(make_columns(running=[0, 0], session="c"), 1)
    assert choose(policy, make_columns(running=[0, 9], session="a")) == 0


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from([None, *"abcd"]), columns(min_size=3, max_size=3)), max_size=20))
def test_sticky_agrees_with_a_dictionary(requests):
    policy, homes = policies.get("sticky", max_sessions=2), OrderedDict()
    for session, drawn in requests:
        c = make_columns(running=drawn.running, last_chosen=drawn.last_chosen, session=session)
        expected = homes.get(session)
        if expected is None:
            expected = min(rows(c), key=lambda x: (x["running"], x["last_chosen"], x["i"]))["i"]
        chosen = choose(policy, c)
        assert expected == chosen
        policy.on_dispatch(c, chosen)
        if session:
            homes[session] = chosen
            homes.move_to_end(session)
            while len(homes) > 2:
                homes.popitem(last=False)


# -- consistent hashing with bounded loads ------------------------------------------------------------------


def walk(c, balance, virtual_nodes, prefix_blocks):
    """From the key on along the sorted points to the first instance with room."""
    key = c.request.session.encode() if c.request.session else c.request.keys[:prefix_blocks].tobytes()
    points = sorted(
        (xxhash.xxh3_64_intdigest(f"{name}#{i}".encode()), position)
        for position, name in enumerate(c.instances)
        for i in range(virtual_nodes)
    )
    loads = [x["running"] + x["waiting"] for x in rows(c)]
    bound = math.ceil(balance * (sum(loads) + 1) / len(loads))
    start = bisect.bisect_left(points, (xxhash.xxh3_64_intdigest(key), -1))
    for _, position in points[start:] + points[:start]:
        if loads[position] < bound:
            return position
    raise AssertionError("somebody always has room")


@settings(max_examples=60)
@given(
    # small loads, for which one request more or less is full or not
    running=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    session=st.none() | st.integers(0, 50).map(str),
    keys=st.lists(st.integers(0, 9), max_size=4),
    balance=st.sampled_from([1.0, 1.25, 3.0]),
    virtual_nodes=st.sampled_from([1, 3]),
    prefix_blocks=st.integers(1, 3),
)
def test_the_ring_agrees_with_a_walk_along_its_points(
    running, session, keys, balance, virtual_nodes, prefix_blocks
):
    c = make_columns(running=running, session=session, keys=keys)
    parameters = {"balance": balance, "virtual_nodes": virtual_nodes, "prefix_blocks": prefix_blocks}
    policy = policies.get("consistent_hash_bounded", **parameters)
    assert walk(c, **parameters) == choose(policy, c)


def test_few_sessions_move_when_an_instance_leaves():
    names = [f"gpu-{i}" for i in range(8)]
    policy = policies.get("consistent_hash_bounded")

    def homes(members):
        return {
            s: members[choose(policy, make_columns(running=[0] * len(members), names=members, session=s))]
            for s in (f"s{i}" for i in range(400))
        }

    before, after = homes(names), homes(names[:-1])
    moved = [s for s in before if before[s] != after[s]]
    assert all(before[s] == "gpu-7" for s in moved)
    assert homes(names) == before


def test_any_str_is_a_session_or_an_instance_on_the_ring():
    r = Router(policy="consistent_hash_bounded")
    r.add_instance("\ud800")
    assert r.select([1], session="\udc00").instance == "\ud800"


def test_sessions_spread_over_the_ring():
    policy = policies.get("consistent_hash_bounded")
    chosen = Counter(choose(policy, make_columns(running=[0] * 8, session=f"s{i}")) for i in range(800))
    # 100 expected; shares of a ring with 100 points each vary by about 10 %
    assert sorted(chosen) == list(range(8))
    assert all(50 < count < 160 for count in chosen.values())


def test_a_full_instance_is_passed_over_and_found_again():
    policy = policies.get("consistent_hash_bounded")
    home = choose(policy, make_columns(running=[0, 0, 0], session="s"))
    running = [0, 0, 0]
    running[home] = 5  # the bound is ceil(1.25 * 6 / 3) = 3
    assert choose(policy, make_columns(running=running, session="s")) != home
    running[home] = 1  # and here ceil(1.25 * 2 / 3) = 1
    assert choose(policy, make_columns(running=running, session="s")) != home
    assert choose(policy, make_columns(running=[1, 1, 1], session="s")) == home


def test_no_instance_is_filled_beyond_the_bound():
    policy = policies.get("consistent_hash_bounded")
    running = [0] * 5
    for placed in range(1, 200):
        # one session asks all the time, the others now and then
        session = "hot" if placed % 3 else f"s{placed}"
        running[choose(policy, make_columns(running=running, session=session))] += 1
        assert max(running) <= math.ceil(1.25 * placed / 5)


def test_without_a_session_equal_beginnings_go_together():
    policy = policies.get("consistent_hash_bounded", prefix_blocks=2)

    def home(keys, session=None):
        return choose(policy, make_columns(running=[0] * 16, keys=keys, session=session))

    assert home([1, 2, 3]) == home([1, 2, 9]) != home([7, 2, 3])
    assert len({home([k, 0]) for k in range(40)}) > 8
    assert home([1, 2], session="s") == home([7, 8], session="s")


def test_a_prompt_without_blocks_has_a_place_too():
    assert 0 <= choose("consistent_hash_bounded", make_columns(prompt=3, running=[0, 0])) < 2


@settings(max_examples=30)
@given(c=columns(min_size=2), data=st.data())
def test_the_ring_remembers_nothing_about_other_candidates(c, data):
    policy = policies.get("consistent_hash_bounded", virtual_nodes=5)
    expected = policy.score(c)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(c), max_size=len(c)).filter(any)))
    policy.score(c.take(mask))
    policy.score(reorder(c, list(range(len(c)))[::-1]))
    assert expected.tolist() == policy.score(c).tolist()


# -- against the definitions in a loop ----------------------------------------------------------------------


def first(key):
    def naive(c):
        def everything(x):
            return (key(x, c), x["running"] + x["waiting"], x["last_chosen"], x["i"])

        return min(rows(c), key=everything)["i"]

    return naive


def hits(x, c):
    """Whole blocks, but never the last token."""
    return min(16 * x["matched_blocks"], (c.request.prompt_tokens - 1) // 16 * 16)


NAIVE = {
    "most_hits": first(lambda x, c: -hits(x, c)),
    "least_p_tokens": first(lambda x, c: x["queued_prefill_tokens"] + c.request.prompt_tokens - hits(x, c)),
}


@pytest.mark.parametrize("name", sorted(NAIVE))
@given(c=columns())
def test_it_agrees_with_its_definition_in_a_loop(name, c):
    assert NAIVE[name](c) == choose(name, c)
