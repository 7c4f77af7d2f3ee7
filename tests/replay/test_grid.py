"""What a sweep or a tuning varies."""

import pytest

from mulsched.errors import InvalidArgument, UnknownPolicy
from mulsched.policies import PolicySpec
from mulsched.replay.grid import DEFAULT_GRIDS, Grid, Tune, parse_grid, parse_tune


def test_a_grid_is_read():
    assert parse_grid("rate=0.25, 0.5,1") == Grid("rate", (0.25, 0.5, 1))


def test_a_known_parameter_has_default_values():
    assert parse_grid("weight").values[0] == 0
    assert parse_grid("weight").values[-1] == 1
    assert len(parse_grid("weight").values) == 21


def test_a_policy_alone_is_tuned_in_what_has_defaults():
    assert parse_tune("linear").grid.parameter == "weight"
    assert parse_tune("dynamo").grid == Grid("overlap_weight", DEFAULT_GRIDS["overlap_weight"])


def test_a_parameter_and_values_of_tuning_are_read():
    assert parse_tune("linear:weight=0,0.5") == Tune("linear", Grid("weight", (0, 0.5)))
    assert parse_tune("linear:weight").grid == parse_grid("weight")


def test_a_tuning_is_a_spec_for_each_value():
    assert parse_tune("linear:weight=0,0.5").specs == [
        PolicySpec("linear", {"weight": 0}),
        PolicySpec("linear", {"weight": 0.5}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate", "'rate' has no default values, write rate=VALUE"),
        ("hit_weight", "no default values"),
        ("rate=", "expected numbers, as in rate=0.25,0.5, got 'rate='"),
        ("rate=fast", "expected numbers"),
        ("rate=1,1", "must differ and ascend"),
        ("rate=2,1", "must differ and ascend"),
        ("rate=1,inf", "must be finite"),
        ("rate=nan", "must be finite"),
    ],
)
def test_a_grid_that_is_none_is_refused(text, message):
    with pytest.raises(InvalidArgument, match=message):
        parse_grid(text)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("best", UnknownPolicy, "unknown policy 'best'"),
        ("bailian", InvalidArgument, "say which parameter of 'bailian' to tune.*it has hit_weight, batch"),
        ("lmetric", InvalidArgument, "it has none"),
        ("lmetric:weight", InvalidArgument, "policy 'lmetric' has no parameter 'weight'"),
        ("linear:weight=0,2", InvalidArgument, "weight must be finite and in 0..1, got 2"),
    ],
)
def test_a_tuning_that_makes_no_sense_is_refused(text, error, message):
    with pytest.raises(error, match=message):
        parse_tune(text)
