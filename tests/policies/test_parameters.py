"""Parameters of policies, and weighted random choice."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from columns import make_columns

from mulsched import policies
from mulsched.errors import InvalidArgument, InvalidType
from mulsched.policies._parameters import at_least, weighted_race, whole_at_least

NUMBERS = [
    # policy, parameter, a value just out of range
    ("linear", "weight", 1.1),
    ("linear", "weight", -0.1),
    ("dynamo", "overlap_weight", -1),
    ("dynamo", "temperature", -0.5),
    ("bailian", "hit_weight", -1),
    ("bailian", "batch_weight", -1),
    ("bailian", "token_weight", -1),
    ("aibrix", "imbalance", -1),
    ("aibrix", "deviations", -1),
    ("sglang_cache_aware", "cache_threshold", 1.5),
    ("sglang_cache_aware", "balance_abs", -1),
    ("sglang_cache_aware", "balance_rel", 0.5),
    ("llm_d", "affinity_threshold", 1.5),
    ("llm_d", "max_ttft_penalty_s", -1),
    ("llm_d", "peak_prefill_tokens_per_s", 0),
    ("llm_d", "full_load_tokens", 0),
    ("preble", "hit_threshold", -0.1),
    ("preble", "window_s", -1),
    ("preble", "prefill_tokens_per_s", 0),
    ("preble", "decode_s", -1),
    ("consistent_hash_bounded", "balance", 0.9),
    ("polyserve", "ttft_target_s", -1),
    ("polyserve", "tpot_target_s", -1),
    *[
        (name, parameter, bad)
        for name in ("polyserve", "least_ttft")
        for parameter, bad in (
            ("prefill_tokens_per_s", 0),
            ("chunk_tokens", 0),
            ("step_overhead_s", -1),
            ("decode_request_s", -1),
            ("decode_context_token_s", -1),
        )
    ],
]
COUNTS = [
    ("sticky", "max_sessions"),
    ("consistent_hash_bounded", "virtual_nodes"),
    ("consistent_hash_bounded", "prefix_blocks"),
]


@pytest.mark.parametrize(("name", "parameter", "bad"), NUMBERS)
def test_numbers_out_of_range_are_refused(name, parameter, bad):
    for value in (bad, float("nan"), float("inf"), -float("inf")):
        with pytest.raises(InvalidArgument, match=f"{parameter} must be finite and .*, got {value}"):
            policies.get(name, **{parameter: value})


@pytest.mark.parametrize(("name", "parameter", "bad"), NUMBERS)
def test_what_is_no_number_is_refused(name, parameter, bad):
    for value, kind in (("1", "str"), (None, "NoneType"), (True, "bool"), (1j, "complex")):
        with pytest.raises(InvalidType, match=f"{parameter} must be a number, got {kind}"):
            policies.get(name, **{parameter: value})


@pytest.mark.parametrize(("name", "parameter"), COUNTS)
def test_counts_are_whole_and_at_least_one(name, parameter):
    for value, kind in ((1.5, "float"), (float("nan"), "float"), ("1", "str"), (True, "bool")):
        with pytest.raises(InvalidType, match=f"{parameter} must be an int, got {kind}"):
            policies.get(name, **{parameter: value})
    for value in (0, -1):
        with pytest.raises(InvalidArgument, match=f"{parameter} must be at least 1, got {value}"):
            policies.get(name, **{parameter: value})


def test_parameters_are_keyword_only():
    with pytest.raises(TypeError):
        policies.linear(0.5)


def test_numbers_of_numpy_are_numbers():
    assert at_least(np.float32(0.5), "x", 0) == 0.5
    assert at_least(np.int64(3), "x", 0) == 3.0
    assert whole_at_least(np.int64(3), "x", 1) == 3


def test_the_message_names_both_ends():
    with pytest.raises(InvalidArgument, match=r"share must be finite and in 0\.\.1, got 2"):
        at_least(2, "share", 0, most=1)
    with pytest.raises(InvalidType, match="share must be a number, got Fraction"):
        at_least(Fraction(1, 2), "share", 0, most=1)


def test_a_race_is_won_in_proportion_to_the_weights():
    weights = np.array([1.0, 2.0, 5.0])
    won = Counter(
        int(np.argmin(weighted_race(make_columns(running=[0, 0, 0], decision=d), np.log(weights))))
        for d in range(4000)
    )
    # 500, 1000, 2500 expected; the largest standard deviation is 31
    assert abs(won[0] - 500) < 120
    assert abs(won[1] - 1000) < 120
    assert abs(won[2] - 2500) < 120


def test_a_race_stays_finite_for_weights_of_any_size():
    c = make_columns(running=[0, 0, 0])
    assert np.isfinite(weighted_race(c, np.array([-1e300, 0.0, 1e300]))).all()
