"""Policies that do not look at the cache."""

from collections import Counter

import pytest
from columns import choose, columns, make_columns, rows
from hypothesis import given


@pytest.mark.parametrize(
    ("name", "given_columns", "expected"),
    [
        # the oldest decision is 2
        ("round_robin", {"last_chosen": [4, 2, 3]}, 1),
        # never chosen goes before chosen, whatever the load
        ("round_robin", {"last_chosen": [0, -1], "running": [0, 99]}, 1),
        # none was chosen yet: the first
        ("round_robin", {"running": [9, 0]}, 0),
        # 3, 4 and 2 requests
        ("least_loaded", {"running": [3, 0, 1], "waiting": [0, 4, 1]}, 2),
        # 2 each: the one chosen longer ago
        ("least_loaded", {"running": [2, 1], "waiting": [0, 1], "last_chosen": [7, 5]}, 1),
        # 4 * 1 + 0 = 4 against 5
        ("vllm", {"running": [0, 5], "waiting": [1, 0]}, 0),
        # 4 * 1 + 0 = 4 against 3
        ("vllm", {"running": [0, 3], "waiting": [1, 0]}, 1),
        # 4 each: fewer requests in all
        ("vllm", {"running": [4, 0], "waiting": [0, 1]}, 1),
        # two candidates are always both drawn
        ("power_of_two", {"running": [3, 2]}, 1),
    ],
)
def test_it_decides_as_its_definition_says(name, given_columns, expected):
    assert choose(name, make_columns(**given_columns)) == expected


@pytest.mark.parametrize("name", ["least_loaded", "vllm", "power_of_two", "round_robin", "random"])
def test_the_cache_does_not_matter(name):
    for decision in range(20):
        bare = make_columns(running=[4, 2, 3], decision=decision)
        warm = make_columns(running=[4, 2, 3], matched=[60, 0, 9], cached=[99, 0, 50], decision=decision)
        assert choose(name, bare) == choose(name, warm)


def test_round_robin_takes_turns_even_when_candidates_change():
    last, taken = [-1, -1, -1], []
    for decision in range(9):
        # the second is away for decisions 3, 4 and 5
        present = [0, 2] if 3 <= decision < 6 else [0, 1, 2]
        position = choose("round_robin", make_columns(last_chosen=[last[i] for i in present]))
        taken.append(present[position])
        last[taken[-1]] = decision
    assert taken == [0, 1, 2, 0, 2, 0, 1, 2, 0]


def test_random_is_uniform_whatever_the_load():
    chosen = Counter(choose("random", make_columns(running=[0, 9, 0, 0], decision=d)) for d in range(2000))
    # 500 expected each, standard deviation 19
    assert sorted(chosen) == [0, 1, 2, 3]
    assert all(abs(count - 500) < 90 for count in chosen.values())


def test_random_differs_with_the_seed_and_repeats_with_it():
    def sequence(seed):
        return [choose("random", make_columns(running=[0] * 5, decision=d, seed=seed)) for d in range(30)]

    assert sequence(1) == sequence(1) != sequence(2)


def test_power_of_two_draws_every_pair_alike():
    # 6 pairs of 4: the least loaded is in 3, the next is the better of 2, the next of 1, the worst of none
    chosen = Counter(
        choose("power_of_two", make_columns(running=[3, 2, 1, 0], decision=d)) for d in range(3000)
    )
    # 1500, 1000, 500 expected, standard deviations up to 27
    assert chosen[0] == 0
    assert abs(chosen[1] - 500) < 110
    assert abs(chosen[2] - 1000) < 110
    assert abs(chosen[3] - 1500) < 110


def first(key):
    return lambda c: min(rows(c), key=key)["i"]


def tie(x):
    return (x["batch_size"], x["last_chosen"], x["i"])


def naive_power_of_two(c):
    drawn = sorted(rows(c), key=lambda x: x["u"])[:2]
    return min(drawn, key=lambda x: (x["running"] + x["waiting"], *tie(x)))["i"]


NAIVE = {
    "round_robin": first(lambda x: (x["last_chosen"], x["i"])),
    "random": first(lambda x: x["u"]),
    "least_loaded": first(lambda x: (x["running"] + x["waiting"], *tie(x))),
    "vllm": first(lambda x: (4 * x["waiting"] + x["running"], *tie(x))),
    "power_of_two": naive_power_of_two,
}


@pytest.mark.parametrize("name", sorted(NAIVE))
@given(c=columns())
def test_it_agrees_with_its_definition_in_a_loop(name, c):
    assert NAIVE[name](c) == choose(name, c)
