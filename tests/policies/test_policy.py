"""Filters, scores, ties and the registry: what every policy is run by."""

import re
from collections import Counter

import numpy as np
import pytest
from columns import columns, make_columns, rows
from hypothesis import given
from hypothesis import strategies as st

from mulsched import Router, policies
from mulsched.errors import InvalidArgument, InvalidType, NoEligibleInstance, NonFiniteScore, UnknownPolicy
from mulsched.policies import Policy, _policy
from mulsched.policies._policy import pick, select


def zeros(c):
    return np.zeros(len(c))


def test_the_smallest_score_wins():
    assert pick(make_columns(running=[0, 0, 0]), np.array([3.0, 1.0, 2.0]), "least_recent") == 1


@pytest.mark.parametrize("ties", ["least_recent", "random"])
def test_equal_scores_go_to_the_smallest_batch(ties):
    assert pick(make_columns(running=[3, 1, 2]), np.zeros(3), ties) == 1


def test_then_to_the_least_recently_chosen_then_to_the_lowest_row():
    assert pick(make_columns(last_chosen=[5, 2, 9]), np.zeros(3), "least_recent") == 1
    assert pick(make_columns(last_chosen=[-1, -1, -1]), np.zeros(3), "least_recent") == 0


def test_first_takes_the_lowest_row_at_once():
    assert pick(make_columns(running=[3, 1], last_chosen=[5, 2]), np.zeros(2), "first") == 0


def test_random_ties_reach_everyone_and_repeat_with_the_seed():
    chosen = [
        pick(make_columns(running=[0, 0, 0], decision=d, seed=1), np.zeros(3), "random") for d in range(60)
    ]
    again = [
        pick(make_columns(running=[0, 0, 0], decision=d, seed=1), np.zeros(3), "random") for d in range(60)
    ]
    assert set(chosen) == {0, 1, 2}
    assert chosen == again


def test_random_ties_are_fair_and_independent_of_the_draws_of_a_score():
    cs = [make_columns(running=[0, 0, 0], decision=d) for d in range(1500)]
    chosen = [pick(c, np.zeros(3), "random") for c in cs]
    # 500 expected each, standard deviation 18; likewise for agreement with the smallest draw
    assert all(abs(count - 500) < 90 for count in Counter(chosen).values())
    agreed = sum(i == int(np.argmin(c.uniform)) for i, c in zip(chosen, cs, strict=True))
    assert abs(agreed - 500) < 90


def test_random_ties_do_not_depend_on_who_lost():
    c = make_columns(running=[0, 0, 0, 0], decision=7)
    among_three = pick(c, np.array([0.0, 1.0, 0.0, 0.0]), "random")
    alone = c.take(np.array([True, False, True, True]))
    assert c.instances[among_three] == alone.instances[pick(alone, np.zeros(3), "random")]


def test_filters_chain_and_the_score_sees_who_is_left():
    seen = []

    def score(c):
        seen.append(list(c.instances))
        return c.batch_size.astype(float)

    policy = Policy(
        name="p", score=score, filters=(lambda c: c.running < 9, lambda c: c.running > c.running.min())
    )
    position, scores = select(policy, make_columns(running=[0, 9, 4, 6]), "least_recent")
    assert seen == [["i2", "i3"]]
    assert position == 2
    assert np.isnan(scores).tolist() == [True, True, False, False]


def test_a_filter_that_leaves_nobody_raises():
    policy = Policy(name="strict", score=zeros, filters=(lambda c: c.running < 0,))
    with pytest.raises(NoEligibleInstance, match="filter 0 of policy 'strict' left none of 2 candidates"):
        select(policy, make_columns(running=[1, 2]), "first")


def test_filters_after_the_first_see_only_who_is_left():
    seen = []

    def watch(c):
        seen.append(list(c.instances))
        return c.running < 6

    select(
        Policy(name="p", score=zeros, filters=(watch, watch, watch)),
        make_columns(running=[7, 5, 6]),
        "first",
    )
    assert seen == [["i0", "i1", "i2"], ["i1"], ["i1"]]


def test_a_later_filter_that_leaves_nobody_counts_who_it_saw():
    policy = Policy(name="strict", score=zeros, filters=(lambda c: c.running > 0, lambda c: c.running > 9))
    with pytest.raises(NoEligibleInstance, match="filter 1 of policy 'strict' left none of 2 candidates"):
        select(policy, make_columns(running=[0, 1, 2]), "first")


@pytest.mark.parametrize("mask", [np.array([1, 0]), np.array([True]), np.array([[True, True]])])
def test_a_filter_must_return_a_mask(mask):
    policy = Policy(name="p", score=zeros, filters=(lambda c: mask,))
    with pytest.raises(InvalidArgument, match="must return a bool mask of shape"):
        select(policy, make_columns(running=[1, 2]), "first")


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        ([1.0, float("nan")], NonFiniteScore, "gave nan for instance 'i1'"),
        ([float("inf"), 1.0], NonFiniteScore, "gave inf for instance 'i0'"),
        ([1.0], InvalidArgument, "shape \\(2,\\), got shape \\(1,\\)"),
        (1.0, InvalidArgument, "got shape \\(\\)"),
        (["a", "b"], InvalidType, "must return numbers"),
        ([True, False], InvalidType, "must return numbers, got dtype bool"),
        ([1j, 2], InvalidType, "must return numbers, got dtype complex"),
        (
            [float("nan"), float("inf")],
            NonFiniteScore,
            "policy 'p' gave nan for instance 'i0'; scores must be finite",
        ),
    ],
)
def test_scores_must_be_finite_one_for_each(scores, error, message):
    with pytest.raises(error, match=message):
        select(Policy(name="p", score=lambda c: np.array(scores)), make_columns(running=[1, 2]), "first")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "one score per candidate, shape (2,), got shape (): None"),
        ({"i0": 1.0, "i1": 2.0}, "got shape (): {'i0': 1.0, 'i1': 2.0}"),
        ([1.0], "got shape (1,): [1.0]"),
        ([[1.0], [2.0, 3.0]], "got shape (): [[1.0], [2.0, 3.0]]"),
        ([1.0, None], "must return numbers, got dtype object, the first is 1.0"),
        (["1", "2"], "must return numbers, got dtype <U1, the first is '1'"),
        ([True, False], "got dtype bool, the first is True"),
        ([1j, 2], "got dtype complex128, the first is 1j"),
        (np.array(["2026", "2027"], dtype="datetime64[Y]"), "got dtype datetime64[Y], the first is "),
        (range(10**6), "got shape (1000000,): range(0, 1000000)"),
    ],
)
def test_what_is_no_score_is_refused_with_its_value_and_nothing_is_booked(returned, message):
    router = Router(policy=lambda c: returned)
    for name in ("i0", "i1"):
        router.add_instance(name, cache_blocks=10)
    with pytest.raises((InvalidArgument, InvalidType), match=re.escape(message)):
        router.route([1, 2, 3], request_id=1)
    assert [router.load(name)["waiting"] for name in router.instances] == [0, 0]


def test_the_message_names_the_instance_even_behind_a_filter():
    policy = Policy(
        name="p", score=lambda c: np.where(c.running > 4, np.nan, 0.0), filters=(lambda c: c.running > 0,)
    )
    with pytest.raises(NonFiniteScore, match="gave nan for instance 'i2'"):
        select(policy, make_columns(running=[0, 1, 5]), "first")


@pytest.mark.parametrize("scores", [[3, 1], (3.0, 1.0), np.array([3, 1], dtype=np.uint8)])
def test_scores_may_be_any_real_numbers(scores):
    assert select(Policy(name="p", score=lambda c: scores), make_columns(running=[0, 0]), "first")[0] == 1


def test_negative_scores_are_compared_as_numbers():
    policy = Policy(name="p", score=lambda c: np.array([-1.0, -2.0, 0.0]))
    assert select(policy, make_columns(running=[0, 0, 0]), "first")[0] == 1


def test_a_policy_hears_of_booked_decisions_only():
    heard = []
    policy = Policy(
        name="p", score=zeros, on_dispatch=lambda c, position: heard.append((c.instances, position))
    )
    router = Router(policy=policy)
    for instance in ("a", "b"):
        router.add_instance(instance)
    router.select([1, 2])
    assert heard == []
    router.route([1, 2], request_id=1)
    router.dispatch(router.select([1, 2]), request_id=2)
    assert heard == [(("a", "b"), 0), (("a", "b"), 1)]


def test_a_policy_checks_what_it_is_made_of():
    with pytest.raises(InvalidType, match="must be callable"):
        Policy(name="p", score=3)
    with pytest.raises(InvalidArgument, match="ties must be"):
        Policy(name="p", score=zeros, ties="coin")
    with pytest.raises(InvalidType, match="the name of a policy must be a str, got int"):
        Policy(name=3, score=zeros)
    for filters in (zeros, [zeros], (zeros, None)):
        with pytest.raises(InvalidType, match="filters of policy 'p' must be a tuple of callables"):
            Policy(name="p", score=zeros, filters=filters)
    with pytest.raises(InvalidType, match="on_dispatch of policy 'p' must be callable or None, got 3"):
        Policy(name="p", score=zeros, on_dispatch=3)


def test_the_registry_builds_a_new_policy_each_time():
    assert policies.get("sticky") is not policies.get("sticky")
    assert set(policies.names()) >= {"lmetric", "vllm", "preble"}


def test_a_registered_policy_is_found_by_name_until_replaced(monkeypatch):
    monkeypatch.setattr(_policy, "_REGISTRY", dict(_policy._REGISTRY))
    policies.register("mine", lambda *, x=1: Policy(name=f"mine-{x}", score=zeros))
    assert policies.get("mine", x=3).name == "mine-3"
    with pytest.raises(InvalidArgument, match="'mine' is registered already"):
        policies.register("mine", lambda: None)
    policies.register("mine", lambda: Policy(name="other", score=zeros), replace=True)
    assert policies.get("mine").name == "other"


def test_bad_registrations_and_unknown_names_are_refused():
    with pytest.raises(InvalidType, match="must be a str, got int"):
        policies.register(3, lambda: None)
    with pytest.raises(InvalidType, match="must be callable, got str"):
        policies.register("x", "y")
    for name in ("best", None, []):
        with pytest.raises(UnknownPolicy, match=f"expected one of {', '.join(policies.names())}$"):
            policies.get(name)


def test_an_unknown_parameter_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'weights'"):
        policies.get("linear", weights=0.5)


@given(columns(), st.sampled_from(["least_recent", "first"]), st.integers(1, 4))
def test_a_pick_agrees_with_the_rule_of_ties_in_a_loop(c, ties, kinds):
    scores = (c.running % kinds).astype(float)
    keys = ("batch_size", "last_chosen", "i") if ties == "least_recent" else ("i",)
    expected = min(rows(c), key=lambda x: (scores[x["i"]], *(x[key] for key in keys)))["i"]
    assert expected == pick(c, scores, ties)


@given(columns(), st.sampled_from(["least_recent", "random", "first"]))
def test_a_pick_has_the_smallest_score_and_then_the_smallest_batch(c, ties):
    scores = (c.running % 3).astype(float)
    chosen = pick(c, scores, ties)
    assert scores[chosen] == scores.min()
    if ties != "first":
        assert c.batch_size[chosen] == c.batch_size[scores == scores.min()].min()
