"""What plots show of single requests."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_results import MadeResults

from mulsched.replay.shown import batch_over_time, load_shown, shown_rows


def test_a_request_counts_in_each_bin_as_long_as_it_is_there():
    # 0.5 to 2.25 of four bins of a second
    batch = batch_over_time(np.array([0.5]), np.array([2.25]), 4.0, 4)
    assert batch.tolist() == [0.5, 1, 0.25, 0]


def test_requests_add_up():
    batch = batch_over_time(np.array([0.0, 0.0, 1.0]), np.array([1.0, 2.0, 2.0]), 2.0, 2)
    assert batch.tolist() == [2, 2]


def test_an_instance_that_nobody_visits_is_empty():
    assert batch_over_time(np.array([]), np.array([]), 3.0, 3).tolist() == [0, 0, 0]


def test_what_lies_after_the_last_bin_does_not_count():
    assert batch_over_time(np.array([0.0, 5.0]), np.array([9.0, 6.0]), 2.0, 2).tolist() == [1, 1]


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0, 50)), max_size=20), st.integers(1, 30))
def test_the_time_of_all_requests_is_kept(stays, bins):
    arrival = np.array([start for start, _ in stays], dtype=np.float64)
    finish = arrival + np.array([length for _, length in stays], dtype=np.float64)
    batch = batch_over_time(arrival, finish, 100.0, bins)
    assert (batch >= 0).all()
    assert batch.sum() * 100.0 / bins == pytest.approx((finish - arrival).sum(), abs=1e-6)


def test_a_request_is_where_it_prefills_until_its_first_token_and_then_where_it_decodes():
    class Requests:
        def read(self, run):
            times = {"arrival_s": [0.0, 8.0], "first_token_s": [4.0, 8.0], "finish_s": [10.0, 8.0]}
            tokens = {"instance": [0, 0], "decode_instance": [1, 1], "output_tokens": [3, 1]}
            return {name: np.array(values) for name, values in (times | tokens).items()}

    (shown,) = load_shown(MadeResults().add("lmetric").results(), Requests())
    assert shown.until_s == 10  # a quarter longer than arrivals
    bins = shown.batch.shape[1]
    assert shown.batch[0].sum() * 10 / bins == pytest.approx(4)
    assert shown.batch[1].sum() * 10 / bins == pytest.approx(6)
    assert shown.ttft_s[-1] == 4
    assert shown.tpot_s.tolist() == pytest.approx([3.0] * len(shown.tpot_s))


def test_a_sweep_is_shown_by_its_best_point():
    made = MadeResults().add("lmetric")
    for weight, ttft in ((0, 0.3), (0.5, 0.2), (1, 0.4)):
        made.add(f"linear(weight={weight})", role="sweep", series="linear", ttft_mean_s=ttft)
    assert [row.label for row in shown_rows(made.results())] == ["lmetric", "linear(weight=0.5)"]


def test_of_a_sweep_of_the_rate_the_reference_is_shown():
    made = MadeResults()
    for rate in (1.0, 2.0, 4.0):
        made.add("lmetric", rate=rate)
    assert [row.rate_scale for row in shown_rows(made.results())] == [2.0]
