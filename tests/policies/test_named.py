"""What holds for every named policy, whatever its rule; the rules are tested in the files beside this one."""

import re
from pathlib import Path

import numpy as np
import pytest
from columns import choose, columns, make_columns, reorder
from hypothesis import given, settings
from hypothesis import strategies as st

from mulsched import Policy, Router, policies
from mulsched.policies._policy import select

NAMES = policies.names()
PAGE = Path(__file__).parents[2] / "docs" / "policies.md"


def used(name, history):
    """A policy that has been told of these decisions, each by a policy of its own."""
    policy = policies.get(name)
    for c in history:
        if policy.on_dispatch is not None:
            policy.on_dispatch(c, choose(policy, c))
    return policy


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20)
@given(c=columns(now=10.0), history=st.lists(columns(now=9.0), max_size=3))
def test_scores_are_finite_pure_and_someone_is_chosen(name, c, history):
    policy = used(name, history)
    table = c.table.copy()
    position, scores = select(policy, c, policy.ties)
    assert 0 <= position < len(c)
    assert np.isfinite(scores[position])
    again = select(policy, c, policy.ties)
    assert again[0] == position
    assert np.array_equal(again[1], scores, equal_nan=True)
    assert (c.table == table).all()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20)
@given(c=columns(min_size=2, now=10.0), history=st.lists(columns(now=9.0), max_size=3), data=st.data())
def test_the_order_of_the_candidates_does_not_matter(name, c, history, data):
    # last_chosen differs everywhere and draws go by row, so nothing is left to the order
    policy = used(name, history)
    shuffled = reorder(c, data.draw(st.permutations(range(len(c)))))
    assert c.instances[choose(policy, c)] == shuffled.instances[choose(policy, shuffled)]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15)
@given(c=columns(max_size=1, now=10.0))
def test_the_only_candidate_is_chosen(name, c):
    assert choose(name, c) == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "given_columns",
    [
        {"running": [0] * 4},
        {"running": [7] * 4, "waiting": [2] * 4, "queued": [50] * 4, "context": [90] * 4, "cached": [3] * 4},
        # everything cached everywhere, whole blocks only
        {"prompt": 64, "matched": [4] * 4},
        # not even one block
        {"prompt": 1, "running": [0] * 4},
    ],
)
def test_equal_instances_all_have_their_turn(name, given_columns):
    # the hash ring goes by the session, the others by draws or by who was chosen longest ago
    last, chosen = np.full(4, -1), set()
    for decision in range(60):
        c = make_columns(
            **given_columns, last_chosen=last, decision=decision, session=f"s{decision}", now=1.0
        )
        position = choose(name, c)
        last[position] = decision
        chosen.add(position)
    assert chosen == {0, 1, 2, 3}


@pytest.mark.parametrize("name", NAMES)
def test_scores_stay_finite_for_large_numbers(name):
    c = make_columns(
        prompt=10**7,
        matched=[0, 600_000, 625_000],
        queued=[10**12, 0, 10**12],
        running=[10**6, 0, 10**6],
        waiting=[0, 10**6, 10**6],
        context=[10**13, 0, 1],
        cached=[10**8, 10**9, 0],
        decision=10**12,
        seed=2**63,
        now=1e12,
    )
    policy = used(name, [c] * 3)
    assert np.isfinite(policy.score(c)).all()


@pytest.mark.parametrize("name", NAMES)
def test_policies_of_two_routers_share_no_state(name):
    c = make_columns(running=[0, 0, 0], session="s", now=1.0)
    one, other, fresh = (policies.get(name) for _ in range(3))
    for _ in range(5):
        if one.on_dispatch is not None:
            one.on_dispatch(c, 2)
    busy = make_columns(running=[0, 0, 3], session="s", now=1.0)
    scores = [select(policy, busy, policy.ties)[1] for policy in (fresh, other)]
    assert np.array_equal(*scores, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12)
@given(
    requests=st.lists(
        st.tuples(
            st.integers(1, 70),
            st.sampled_from([None, "s", "t"]),
            st.sets(st.sampled_from(["a", "b", "c"]), min_size=1),
            st.booleans(),
        ),
        max_size=12,
    )
)
def test_through_a_router_the_choice_is_a_candidate_and_a_what_if_comes_true(name, requests):
    router = Router(block_size=16, policy=name, seed=3)
    for instance in "abc":
        router.add_instance(instance, cache_blocks=20)
    for i, (length, session, candidates, ends) in enumerate(requests):
        prompt, now = list(range(length)), float(i)
        if_asked = router.select(prompt, candidates=candidates, session=session, now=now)
        decision = router.route(prompt, request_id=i, candidates=candidates, session=session, now=now)
        assert decision.instance in candidates
        assert decision.instance == if_asked.instance
        router.first_token(i)
        if ends:
            router.finish(i)


@pytest.mark.parametrize("name", NAMES)
def test_its_docstring_has_the_five_heads_and_its_policy_a_source(name):
    policy = policies.get(name)
    doc = getattr(policies, name).__doc__
    heads = ("What it does:", "Intent:", "Inputs:", "Parameters:", "Known losses:")
    places = [doc.find(f"\n    {head}") for head in heads]
    assert -1 not in places
    assert places == sorted(places)
    assert policy.source
    assert policy.name == name


if PAGE.exists():

    def test_the_page_lists_all_policies():
        listed = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)
        assert sorted(listed) == list(NAMES)

    def test_the_code_of_the_page_runs(monkeypatch):
        monkeypatch.setattr(policies._policy, "_REGISTRY", dict(policies._policy._REGISTRY))
        scope = {}
        for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
            exec(compile(code, PAGE.name, "exec"), scope)
        built = [value for value in scope.values() if isinstance(value, Router)]
        assert built
        for router in built:
            for instance in ("a", "b", "c"):
                router.add_instance(instance, cache_blocks=100)
            for i in range(5):
                router.route(list(range(40)), request_id=i, session="s", now=float(i))
        assert isinstance(policies.get("guarded"), Policy)
