"""Confidence intervals."""

import math

import numpy as np
import pytest

from mulsched.errors import InvalidArgument
from mulsched.replay.confidence import half_width, student_t, welch_half_width


@pytest.mark.parametrize(
    ("degrees", "expected"),
    # two-sided 95 %: any printed table of Student's t
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_t_is_that_of_the_tables(degrees, expected):
    assert round(student_t(degrees), 3) == expected


def test_t_of_no_degrees_is_refused():
    with pytest.raises(InvalidArgument, match="at least 1, got 0"):
        student_t(0)


def test_an_interval_by_hand():
    # mean 2, deviation 1, so 4.303 / sqrt(3)
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_equal_values_leave_nothing_open():
    assert half_width([2.0, 2.0]) == 0
    assert welch_half_width([2.0, 2.0], [3.0, 3.0]) == 0


def test_one_value_has_no_interval():
    assert math.isnan(half_width([1.0]))
    assert math.isnan(welch_half_width([1.0], [1.0, 2.0]))


def test_welch_with_equal_spreads_is_the_pooled_interval():
    expected = student_t(4) * math.sqrt(2 / 3)
    assert welch_half_width([1.0, 2.0, 3.0], [5.0, 6.0, 7.0]) == pytest.approx(expected)


def test_welch_counts_the_degrees_of_the_wider():
    # one side knows its mean exactly, so nothing but the other's two degrees is left
    assert welch_half_width([1.0, 2.0, 3.0], [5.0, 5.0, 5.0]) == pytest.approx(half_width([1.0, 2.0, 3.0]))


def test_intervals_hold_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(3)
    samples = rng.normal(size=(2000, 4))
    held = [abs(sum(values) / 4) <= half_width(values) for values in samples.tolist()]
    # 95 %, give or take three standard errors
    assert sum(held) / 2000 == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 2000))
