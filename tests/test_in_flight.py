"""Prefixes in flight: how much of a path others share, by both twins. The rest is in test_router.py."""

import importlib

import numpy as np
import pytest
from backends import BACKENDS
from hypothesis import given
from hypothesis import strategies as st

PATHS = st.lists(st.integers(0, 2), max_size=12).map(lambda keys: np.array(keys, dtype=np.uint64))


@pytest.fixture(params=BACKENDS)
def common_blocks(request):
    return twin(request.param)


def twin(name):
    module = {"native": "mulsched._native", "python": "mulsched._prefix_index_py"}[name]
    return importlib.import_module(module).common_blocks


def path(*keys):
    return np.array(keys, dtype=np.uint64)


def test_of_several_the_one_that_shares_most_counts(common_blocks):
    assert common_blocks(path(1, 2, 3, 4), [path(1), path(1, 2, 3), path(1, 2)]) == 3


def test_an_equal_block_after_a_difference_does_not_count(common_blocks):
    assert common_blocks(path(1, 2, 3), [path(1), path(9, 2, 3)]) == 1


@pytest.mark.parametrize("others", [[], [path()], [path(2, 1)]])
def test_nothing_may_be_shared(common_blocks, others):
    assert common_blocks(path(1, 2), others) == 0


@given(PATHS, st.lists(PATHS, max_size=6))
def test_the_twins_agree_with_a_count_of_one_block_after_the_other(keys, others):
    expected = 0
    for other in others:
        n = 0
        while n < min(len(keys), len(other)) and keys[n] == other[n]:
            n += 1
        expected = max(expected, n)
    assert [twin(name)(keys, others) for name in BACKENDS] == [expected] * len(BACKENDS)
