"""Backs docs/theory.md, sections 1 to 3: the product alone, on columns."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from columns import choose, columns, make_columns, reorder
from hypothesis import given, settings
from hypothesis import strategies as st

from mulsched.policies import Policy, linear
from mulsched.scorers import Custom, Linear, Multiplicative

PRODUCT = Policy(name="product", score=Multiplicative())
GRID = [(p, b) for p in range(1, 5) for b in range(1, 5)]


def candidates(*pairs):
    """Columns with these p_tokens and batch sizes; nothing cached, the prompt is one token."""
    return make_columns(prompt=1, queued=[p - 1 for p, _ in pairs], running=[b - 1 for _, b in pairs])


def chosen(score, *pairs):
    return choose(Policy(name="score", score=score), candidates(*pairs))


def best(score, pairs):
    """All positions with the smallest score, in exact numbers."""
    scores = [score(Fraction(p), Fraction(b)) for p, b in pairs]
    return {i for i, value in enumerate(scores) if value == min(scores)}


def product(p, b):
    return p * b


pairs = st.tuples(st.integers(1, 10**6), st.integers(1, 10**3))
rows = st.lists(pairs, min_size=1, max_size=6)
scales = st.fractions(min_value=Fraction(1, 10**6), max_value=10**6).filter(lambda x: x > 0)


# -- 1. scale


@settings(max_examples=40)
@given(rows, scales, scales)
def test_scaling_either_factor_changes_no_decision(candidates, a, b):
    assert best(lambda p, bs: (a * p) * (b * bs), candidates) == best(product, candidates)


@settings(max_examples=40)
@given(columns(), st.integers(-20, 20), st.integers(-20, 20))
def test_scaling_either_column_changes_no_decision_of_the_production_pick(c, a, b):
    # powers of two scale doubles without rounding
    scaled = Policy(name="scaled", score=lambda x: (x.p_tokens * 2.0**a) * (x.batch_size * 2.0**b))
    assert choose(scaled, c) == choose(PRODUCT, c)


@settings(max_examples=40)
@given(rows, scales, scales, st.integers(1, 4), st.integers(1, 4))
def test_products_of_any_powers_are_as_invariant(candidates, a, b, i, j):
    assert best(lambda p, bs: (a * p) ** i * (b * bs) ** j, candidates) == best(
        lambda p, bs: p**i * bs**j, candidates
    )


def test_the_exponents_decide():
    pair = [(4, 2), (2, 5)]
    assert best(lambda p, b: p * b, pair) == {0}
    assert best(lambda p, b: p**2 * b, pair) == {1}


@pytest.mark.parametrize(
    "score",
    [
        lambda p, b: p + b,
        lambda p, b: p * b + p,
        lambda p, b: p * b + b,
        lambda p, b: max(p, b),
        lambda p, b: p * (1 + b * b),
    ],
    ids=["sum", "p*b+p", "p*b+b", "max", "p*(1+b^2)"],
)
def test_scores_that_are_no_product_of_powers_mind_the_unit(score):
    assert any(
        best(lambda p, b: score(a * p, k * b), two) != best(score, two)  # noqa: B023
        for two in itertools.combinations(GRID, 2)
        for a in (Fraction(1, 100), Fraction(1), Fraction(100))
        for k in (Fraction(1, 100), Fraction(1), Fraction(100))
    )


def test_a_constant_added_to_a_factor_changes_decisions():
    pair = [(1, 4), (3, 1)]
    assert best(product, pair) == {1}
    assert best(lambda p, b: (p + 1) * b, pair) == {1}
    assert best(lambda p, b: p * (b + 1), pair) == {0}


# -- 2. linear scores


@settings(max_examples=40)
@given(rows)
def test_the_product_is_the_sum_of_logarithms(candidates_):
    c = candidates(*candidates_)
    by_logs = choose(
        Policy(name="logs", score=Custom(lambda c: np.log(c.p_tokens) + np.log(c.batch_size) + 1)), c
    )
    # logarithms round, so equal products may part: what is chosen is a smallest product all the same
    assert by_logs in best(product, candidates_)


@settings(max_examples=40)
@given(pairs, pairs)
def test_two_candidates_compare_as_in_a_linear_score_with_their_mean_weights(one, two):
    (p, b), (q, d) = one, two
    assert p * b - q * d == Fraction(b + d, 2) * (p - q) + Fraction(p + q, 2) * (b - d)


@settings(max_examples=40)
@given(pairs, st.integers(-1000, 1000), st.integers(-1000, 1000))
def test_near_a_point_the_product_is_linear_but_for_the_product_of_the_steps(at, dp, db):
    p, b = at
    assert (p + dp) * (b + db) - (p * b + b * dp + p * db) == dp * db


@settings(max_examples=40)
@given(rows)
def test_for_every_decision_some_linear_weights_agree(candidates_):
    winner = chosen(Multiplicative(), *candidates_)
    p, b = candidates_[winner]
    assert winner in best(lambda x, y: b * x + p * y, candidates_)


def test_no_fixed_linear_weights_agree_with_two_decisions():
    busy, quiet = [(100, 10), (200, 4)], [(1, 4), (2, 3)]
    assert (chosen(Multiplicative(), *busy), chosen(Multiplicative(), *quiet)) == (1, 0)
    # weights u, v take 1 of the busy pair where 100 u < 6 v, and 0 of the quiet one where u > v: with
    # both, v > 50/3 u and u > v, which no u, v >= 0 satisfy; beyond the proof, over all ratios
    for u, v in itertools.product(range(41), repeat=2):
        score = Linear({"p_tokens": u, "batch_size": v})
        one, two = score(candidates(*busy)), score(candidates(*quiet))
        assert not (one[1] < one[0] and two[0] < two[1])


def test_no_fixed_weight_of_a_normalised_linear_score_agrees_with_two_decisions():
    short, long = [(1, 3), (2, 2), (4, 1)], [(1, 4), (2, 2), (3, 1)]
    assert (chosen(Multiplicative(), *short), chosen(Multiplicative(), *long)) == (0, 2)
    # the first wants a weight of P above 4/7, the second one below 3/7
    for step in range(201):
        w = step / 200
        score = Linear({"p_tokens": w, "batch_size": 1 - w}, normalise="max")
        assert (chosen(score, *short), chosen(score, *long)) != (0, 2)


def test_between_two_candidates_the_product_is_the_normalised_linear_score_of_weight_one_half():
    half = Fraction(1, 2)
    for one, two in itertools.combinations(GRID, 2):
        most_p, most_b = max(one[0], two[0]), max(one[1], two[1])
        if (one[0] - two[0]) * (one[1] - two[1]) >= 0:
            continue  # one is no worse in both
        normalised = best(lambda p, b: half * p / most_p + half * b / most_b, [one, two])  # noqa: B023
        assert normalised == best(product, [one, two])


def test_the_linear_policy_of_weight_one_half_decides_as_the_product_on_two_idle_queues():
    # a cold instance and a warm one that is busier: 1 - hit/L and BS/max are both normalised by the largest
    for matched, busier in itertools.product(range(1, 60, 7), range(1, 40, 3)):
        c = make_columns(prompt=961, matched=[0, matched], running=[3, 3 + busier])
        product, half = PRODUCT.score(c), linear(weight=0.5).score(c)
        if product[0] != product[1]:
            assert (product[0] < product[1]) == (half[0] < half[1])


# -- when is the product what a request costs


def run(prompts, decoding, *, output=3):
    """First-token and finish times, step by step, of prompts in a queue and of requests that decode.

    A step computes a token of the first prompt in the queue, or, if there is none, one output token of all.
    """
    left, outputs = list(prompts), [0] * len(prompts) + [output] * decoding
    first, finish = [0] * len(outputs), [0] * len(outputs)
    at = 0
    while any(left) or any(outputs):
        at += 1
        if any(left):
            head = next(i for i, tokens in enumerate(left) if tokens)
            left[head] -= 1
            if left[head] == 0:
                first[head], outputs[head] = at, output
            continue
        for i, tokens in enumerate(outputs):
            if tokens:
                outputs[i] -= 1
                finish[i] = at
    return first, finish


def added_delay(queue, decoding, new):
    """By how many steps a prompt delays everybody: itself to its first token, the others to their ends."""
    _, without = run(queue, decoding)
    first, finish = run([*queue, new], decoding)
    others = finish[: len(queue)] + finish[len(queue) + 1 :]
    return first[len(queue)] + sum(others) - sum(without)


prompts = st.integers(1, 12)


@settings(max_examples=40)
@given(prompts, st.integers(0, 8))
def test_with_an_empty_queue_the_product_is_the_delay_that_a_request_adds(new, decoding):
    assert added_delay([], decoding, new) == new * (decoding + 1)


@settings(max_examples=40)
@given(st.lists(prompts, max_size=4), st.integers(0, 8), prompts)
def test_the_delay_counts_the_queue_once_and_the_product_once_per_request(queue, decoding, new):
    queued, batch_size = sum(queue), len(queue) + decoding + 1
    assert added_delay(queue, decoding, new) == queued + new * batch_size
    product = (queued + new) * batch_size
    assert product - added_delay(queue, decoding, new) == queued * (batch_size - 1)


def test_the_product_may_choose_the_instance_that_delays_everybody_more():
    # warm: 10 new tokens behind 20 queued ones, 8 requests there; cold and idle: 150 new tokens
    c = make_columns(
        prompt=150, matched=[140, 0], queued=[20, 0], running=[7, 0], waiting=[1, 0], block_size=1
    )
    assert Multiplicative()(c).tolist() == [30 * 9, 150]
    assert choose(PRODUCT, c) == 1
    assert added_delay([20], 7, 10) == 110 < added_delay([], 0, 150) == 150


# -- 3. monotone, dominance


def dominates(one, two):
    return one[0] <= two[0] and one[1] <= two[1] and one != two


def test_a_dominated_candidate_is_never_chosen():
    for size in (2, 3):
        for some in itertools.product(GRID, repeat=size):
            winner = some[chosen(Multiplicative(), *some)]
            assert not any(dominates(other, winner) for other in some)


@settings(max_examples=40)
@given(columns(), st.data())
def test_a_smaller_factor_never_loses_a_decision_won(c, data):
    winner = choose(PRODUCT, c)
    table = c.table.copy()
    less = data.draw(st.integers(0, int(table[3, winner])))
    fewer = data.draw(st.integers(0, int(table[5, winner])))
    table[[3, 4], winner] -= less
    table[[5, 7], winner] -= fewer
    better = reorder(c, range(len(c)))
    better.table = table
    assert choose(PRODUCT, better) == winner


@settings(max_examples=40)
@given(columns(min_size=2), st.data())
def test_a_candidate_that_does_not_win_may_leave(c, data):
    winner = choose(PRODUCT, c)
    loser = data.draw(st.sampled_from([i for i in range(len(c)) if i != winner]))
    mask = np.arange(len(c)) != loser
    left = c.take(mask)
    assert left.instances[choose(PRODUCT, left)] == c.instances[winner]


@settings(max_examples=40)
@given(st.integers(1, 2**40 - 1), st.integers(1, 2**13 - 1), st.booleans())
def test_products_below_2_to_the_53_are_exact(p, b, in_p):
    other = (p + 1, b) if in_p else (p, b + 1)
    assert chosen(Multiplicative(), other, (p, b)) == 1
