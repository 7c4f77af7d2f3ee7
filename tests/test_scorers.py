"""Scores and their composition."""

import numpy as np
import pytest
from columns import columns, make_columns
from hypothesis import given
from hypothesis import strategies as st

from mulsched.errors import InvalidArgument, InvalidType
from mulsched.scorers import Custom, Linear, Multiplicative, lexicographic, min_max


def test_the_product_is_lmetric_unless_told_otherwise():
    c = make_columns(prompt=100, matched=[5, 0], running=[1, 3])
    assert Multiplicative()(c).tolist() == [20 * 2, 100 * 4]
    assert Multiplicative("new_prefill_tokens")(c).tolist() == [20, 100]


def test_a_linear_score_is_the_weighted_sum():
    c = make_columns(prompt=100, matched=[5, 0], running=[1, 3])
    assert Linear({"new_prefill_tokens": 0.5, "batch_size": 2})(c).tolist() == [14, 58]


def test_normalised_by_the_largest_or_to_the_range():
    c = make_columns(running=[1, 3, 5], waiting=[0, 0, 0])
    assert Linear({"running": 2.0}, normalise="max")(c).tolist() == pytest.approx([0.4, 1.2, 2])
    assert Linear({"running": 2.0}, normalise="min_max")(c).tolist() == [0, 1, 2]


def test_each_indicator_may_have_its_own_normalisation():
    c = make_columns(prompt=100, matched=[5, 0], running=[1, 3])
    normalise = {"new_prefill_tokens": "prompt", "batch_size": "max"}
    score = Linear({"new_prefill_tokens": 1, "batch_size": 2, "running": 1}, normalise=normalise)
    assert score(c).tolist() == pytest.approx([0.2 + 1 + 1, 1 + 2 + 3])


@pytest.mark.parametrize("normalise", ["max", "min_max"])
def test_a_column_of_zeros_normalises_to_zero(normalise):
    assert Linear({"waiting": 5.0}, normalise=normalise)(make_columns(running=[1, 3])).tolist() == [0, 0]


def test_a_custom_score_has_a_name_and_becomes_float():
    def by_running(c):
        return c.running

    score = Custom(by_running)
    assert score.name == "by_running"
    assert score(make_columns(running=[1, 3])).dtype == np.float64
    assert repr(Custom(by_running, name="mine")) == "Custom(mine)"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: Multiplicative("speed"),
            InvalidArgument,
            "unknown indicator 'speed', expected one of matched",
        ),
        (lambda: Linear({}), InvalidArgument, "at least one indicator, got none"),
        (lambda: Linear({"speed": 1}), InvalidArgument, "unknown indicator 'speed'"),
        (
            lambda: Linear({"running": float("nan")}),
            InvalidArgument,
            "weight of 'running' must be finite, got nan",
        ),
        (lambda: Linear({"running": float("inf")}), InvalidArgument, "must be finite, got inf"),
        (lambda: Linear({"running": np.float64("nan")}), InvalidArgument, "must be finite, got nan"),
        (lambda: Linear({"running": None}), InvalidType, "must be a number, got NoneType"),
        (lambda: Multiplicative("running", 3), InvalidArgument, "unknown indicator 3"),
        (lambda: Linear({"running": "1"}), InvalidType, "must be a number, got str"),
        (lambda: Linear({"running": True}), InvalidType, "must be a number, got bool"),
        (lambda: Linear([("running", 1)]), InvalidType, "weights must map indicators to numbers, got list"),
        (lambda: Linear({"running": 1}, normalise="z"), InvalidArgument, "must be None, 'max', 'min_max' or"),
        (
            lambda: Linear({"running": 1}, normalise={"waiting": "max"}),
            InvalidArgument,
            "normalise names 'waiting', which has no weight",
        ),
        (lambda: Custom(5), InvalidType, "a score must be callable, got int"),
    ],
)
def test_bad_scores_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_scores_say_what_they_are_made_of():
    assert repr(Multiplicative("running", "waiting")) == "Multiplicative('running', 'waiting')"
    assert repr(Linear({"running": 2}, normalise="max")) == "Linear({'running': 2.0}, normalise='max')"


def test_weights_are_copied_and_may_be_numbers_of_numpy():
    weights = {"running": np.int64(2)}
    score = Linear(weights)
    weights["running"] = 5
    assert score(make_columns(running=[1, 3])).tolist() == [2, 6]


def test_scores_leave_the_columns_alone():
    c = make_columns(prompt=100, matched=[5, 0], running=[1, 3])
    table = c.table.copy()
    for score in (Multiplicative(), Linear({"running": 2.0}, normalise="min_max")):
        assert score(c).tolist() == score(c).tolist()
    assert (c.table == table).all()


def test_a_product_beyond_int64_is_still_right():
    # 10**12 * 10**6 * 10**6 = 10**24 does not fit in 64 bits
    c = make_columns(queued=[10**12], running=[10**6], waiting=[10**6])
    score = Multiplicative("queued_prefill_tokens", "running", "waiting")(c)
    assert score.tolist() == pytest.approx([1e24])


def test_a_custom_callable_object_is_named_after_its_class():
    class ByRunning:
        def __call__(self, c):
            return c.running.tolist()

    score = Custom(ByRunning())
    assert score.name == "ByRunning"
    assert score(make_columns(running=[1, 3])).tolist() == [1, 3]


def test_min_max_of_equal_values_is_zero():
    assert min_max(np.array([7.0, 7.0])).tolist() == [0, 0]
    assert min_max(np.array([-3.0])).tolist() == [0]
    assert min_max(np.array([2.0, 4.0, 3.0])).tolist() == [0, 1, 0.5]


def test_min_max_depends_on_candidates_that_cannot_win():
    # the loss that the class names: a third, hopeless candidate turns the choice between two around
    score = Linear({"running": 1.0, "waiting": 1.1}, normalise="min_max")
    two = score(make_columns(running=[0, 4], waiting=[3, 0]))
    three = score(make_columns(running=[0, 4, 4], waiting=[3, 0, 30]))
    assert two[1] < two[0]
    assert three[0] < three[1] < three[2]


def test_lexicographic_takes_keys_of_any_type():
    assert lexicographic(np.array([True, False, False]), np.array([0.5, 0.7, 0.5])).tolist() == [2, 1, 0]
    big = np.array([2**63 + 1, 2**63], dtype=np.uint64)
    assert lexicographic(big).tolist() == [1, 0]


def test_lexicographic_ranks_by_the_first_key_then_the_next():
    first, second = np.array([1, 0, 1, 0]), np.array([5, 9, 4, 9])
    assert lexicographic(first, second).tolist() == [2, 0, 1, 0]


@given(columns())
def test_lexicographic_orders_as_tuples_do(c):
    ranks = lexicographic(-c.hit_tokens, c.batch_size)
    keys = list(zip((-c.hit_tokens).tolist(), c.batch_size.tolist(), strict=True))
    assert ranks.tolist() == [sorted(set(keys)).index(key) for key in keys]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8))
def test_min_max_lies_in_the_unit_interval(values):
    scaled = min_max(np.array(values))
    assert ((scaled >= 0) & (scaled <= 1)).all()


@given(columns(), st.integers(1, 1000))
def test_a_product_does_not_mind_the_unit(c, factor):
    def scaled(x):
        return x.p_tokens * factor * x.batch_size

    plain, other = Multiplicative()(c), Custom(scaled)(c)
    assert np.argsort(plain, kind="stable").tolist() == np.argsort(other, kind="stable").tolist()


@given(columns(), st.sampled_from([None, "max", "min_max"]))
def test_a_linear_score_agrees_with_its_definition_in_a_loop(c, normalise):
    weights = {"queued_prefill_tokens": 0.5, "batch_size": 2.0, "waiting": -1.0}

    def column(name):
        values = c[name].tolist()
        low, high = (0, max(values)) if normalise == "max" else (min(values), max(values))
        if normalise is None:
            return values
        return [(v - low) / (high - low) if high > low else 0.0 for v in values]

    parts = {name: column(name) for name in weights}
    expected = [sum(w * parts[name][i] for name, w in weights.items()) for i in range(len(c))]
    assert Linear(weights, normalise=normalise)(c).tolist() == pytest.approx(expected)


@given(columns())
def test_a_product_agrees_with_its_definition_in_a_loop(c):
    expected = [p * b for p, b in zip(c.p_tokens.tolist(), c.batch_size.tolist(), strict=True)]
    assert Multiplicative()(c).tolist() == expected
