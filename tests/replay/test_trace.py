"""The columnar trace: ids, keys, cuts and figures."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulsched.errors import InvalidArgument, TraceError
from mulsched.replay import Trace, lru_hit_ratio


def trace(prompts=(64, 80, 64), runs=((0, 4), (0, 3, 10, 2), (0, 4)), **changes):
    n = len(prompts)
    flat = [x for run in runs for x in run]
    columns = {
        "name": "test",
        "block_size": 16,
        "arrival_s": np.arange(n, dtype=float) * 10,
        "prompt_tokens": np.array(prompts),
        "output_tokens": np.full(n, 5),
        "run_start": np.array(flat[::2], dtype=np.int64),
        "run_length": np.array(flat[1::2], dtype=np.int64),
        "run_offset": np.concatenate([[0], np.cumsum([len(run) // 2 for run in runs])]),
        "session": np.full(n, -1),
        "previous": np.full(n, -1),
        "think_s": np.zeros(n),
    }
    return Trace(**(columns | changes))


def test_block_ids_expand_the_runs():
    assert trace().block_ids(1).tolist() == [0, 1, 2, 10, 11]
    assert len(trace(runs=((), (0, 5), (0, 4))).block_ids(0)) == 0


def test_equal_prefixes_have_equal_keys_and_others_do_not():
    one, two, three = (trace().keys(i) for i in range(3))
    assert len(one) == 4
    assert len(two) == 5
    assert (one == three).all()
    assert (one[:3] == two[:3]).all()
    assert not set(one[3:].tolist()) & set(two[3:].tolist())


def test_a_trace_block_is_cut_into_equal_parts_with_keys_of_their_own():
    big = trace(prompts=(100,), runs=((7, 2),), block_size=64)
    keys = big.keys(0, 16)
    assert len(keys) == 6
    assert len(set(keys.tolist())) == 6
    assert (trace(prompts=(70,), runs=((7, 2),), block_size=64).keys(0, 16) == keys[:4]).all()


def test_blocks_without_an_id_are_private():
    short = trace(prompts=(64, 64), runs=((0, 2), (0, 2)))
    one, two = short.keys(0), short.keys(1)
    assert (one[:2] == two[:2]).all()
    assert not set(one[2:].tolist()) & set(two.tolist())


@pytest.mark.parametrize("i", [-1, 3])
def test_a_request_that_is_not_there_is_refused(i):
    with pytest.raises(InvalidArgument, match=rf"test has requests 0\.\.2, got {i}"):
        trace().block_ids(i)
    with pytest.raises(InvalidArgument, match=rf"test has requests 0\.\.2, got {i}"):
        trace().keys(i)


@pytest.mark.parametrize("block_size", [0, -1, 5, 32])
def test_a_block_size_that_does_not_divide_is_refused(block_size):
    with pytest.raises(InvalidArgument, match=f"must divide the trace's 16, got {block_size}"):
        trace().keys(0, block_size)


def test_a_slice_keeps_its_window_and_cuts_links():
    linked = trace(session=np.array([0, 0, 0]), previous=np.array([-1, 0, 1]))
    cut = linked.slice(10, 30)
    assert cut.arrival_s.tolist() == [0, 10]
    assert cut.previous.tolist() == [-1, 0]
    assert cut.block_ids(0).tolist() == [0, 1, 2, 10, 11]
    with pytest.raises(TraceError, match="no request is left of 3"):
        linked.slice(100, 200)


def test_a_scaled_rate_moves_arrivals_and_not_thinking():
    fast = trace(think_s=np.array([0, 4.0, 4.0])).scale_rate(2)
    assert fast.arrival_s.tolist() == [0, 5, 10]
    assert fast.think_s.tolist() == [0, 4, 4]
    for factor in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InvalidArgument, match="finite number above 0"):
            trace().scale_rate(factor)


def test_stats_count_hits_of_an_endless_cache():
    stats = trace().stats()
    assert stats.requests == 3
    assert stats.unique_blocks == 6
    assert stats.hit_ratio == pytest.approx((3 + 4) * 16 / 208)
    assert np.isnan(stats.gap_p50_s)


def test_stats_do_not_depend_on_how_large_the_ids_are():
    far = trace(run_start=trace().run_start + 2**40)
    assert dataclasses.astuple(far.stats()) == pytest.approx(
        dataclasses.astuple(trace().stats()), nan_ok=True
    )
    assert lru_hit_ratio(far, 0.5) == lru_hit_ratio(trace(), 0.5)


def test_hits_from_the_own_session_are_told_apart():
    stats = trace(session=np.array([0, 1, 0])).stats()
    assert stats.same_session_share == pytest.approx(4 / 7)


def test_an_lru_of_everything_reaches_the_ideal():
    assert lru_hit_ratio(trace(), 1.0) == pytest.approx(trace().stats().hit_ratio)
    assert lru_hit_ratio(trace(), 0.2) < trace().stats().hit_ratio
    with pytest.raises(InvalidArgument, match=r"fraction must lie in 0\.\.1, got 0"):
        lru_hit_ratio(trace(), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arrival_s": np.array([0.0, 2.0, 1.0])}, "in order"),
        ({"arrival_s": np.array([0.0, np.nan, 1.0])}, "finite"),
        ({"prompt_tokens": np.array([1, 0, 3])}, "prompt_tokens of request 1 must be at least 1"),
        ({"output_tokens": np.array([1, 1])}, "output_tokens has 2 rows, expected 3"),
        ({"think_s": np.array([0, -1.0, 0])}, "think_s must be finite"),
        ({"previous": np.array([-1, 1, 0])}, "previous must be an earlier request"),
        ({"run_offset": np.array([0, 1])}, "run_offset does not fit"),
        ({"run_offset": np.array([0, 3, 1, 4])}, "run_offset does not fit"),
        ({"run_length": np.array([4, 3, 2])}, "run_length has 3 rows, expected 4"),
        ({"run_length": np.array([4, 3, -2, 4])}, "run lengths must not be negative"),
        ({"run_start": np.array([0, 0, -1, 0])}, "block ids must lie in 0..2"),
        ({"run_start": np.array([0, 0, 2**48, 0])}, "block ids must lie in 0..2"),
        ({"run_start": np.array([0, 0, 2**63 - 1, 0])}, "block ids must lie in 0..2"),  # the end would wrap
        ({"session": np.array([0, -2, 0])}, "session of request 1 must be at least -1"),
        ({"session": np.array([0.0, 1.0, 0.0])}, "session must be int64 in one dimension, got float64"),
        ({"arrival_s": [0.0, 1.0, 2.0]}, "arrival_s must be float64 in one dimension, got list"),
        ({"block_size": 0}, "block_size must lie in 1..16384, got 0"),
    ],
)
def test_columns_that_do_not_fit_raise(change, message):
    with pytest.raises(TraceError, match=re.escape(message)):
        dataclasses.replace(trace(), **change)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 6)), max_size=5), st.integers(1, 400))
def test_keys_are_as_many_as_whole_blocks_and_follow_the_ids(runs, prompt):
    one = trace(prompts=(prompt,), runs=(tuple(x for run in runs for x in run),), block_size=32)
    ids = [start + i for start, length in runs for i in range(length)]
    assert one.block_ids(0).tolist() == ids
    keys = one.keys(0, 16)
    assert len(keys) == prompt // 16
    by_id = {}
    for position, key in enumerate(keys[: 2 * len(ids)].tolist()):
        assert by_id.setdefault((ids[position // 2], position % 2), key) == key
