"""Policies as text."""

import pytest

from mulsched import policies
from mulsched.errors import InvalidArgument, InvalidType, UnknownPolicy
from mulsched.policies import PolicySpec, parse_spec


def test_a_name_alone_has_no_parameters():
    assert parse_spec("lmetric") == PolicySpec("lmetric", {})


def test_parameters_follow_a_colon():
    assert parse_spec("bailian: hit_weight = 0.5, batch_weight=0") == PolicySpec(
        "bailian", {"hit_weight": 0.5, "batch_weight": 0}
    )


def test_a_whole_number_stays_whole():
    assert parse_spec("sticky:max_sessions=10").parameters == {"max_sessions": 10}


def test_the_label_is_that_of_a_result():
    assert parse_spec("linear:weight=0.5").label == "linear(weight=0.5)"
    assert parse_spec("vllm").label == "vllm"


def test_given_adds_and_replaces():
    spec = PolicySpec("linear", {"weight": 0.5})
    assert spec.given(weight=0.6).parameters == {"weight": 0.6}
    assert spec.parameters == {"weight": 0.5}


def test_parameters_of_a_policy_are_those_of_its_factory():
    assert policies.parameters("linear") == {"weight": 0.7}
    assert policies.parameters("lmetric") == {}


@pytest.mark.parametrize("name", policies.names())
def test_every_policy_is_built_from_its_defaults_as_text(name):
    defaults = ",".join(f"{key}={value}" for key, value in policies.parameters(name).items())
    assert parse_spec(f"{name}:{defaults}" if defaults else name).name == name


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("best", UnknownPolicy, "unknown policy 'best'"),
        ("", UnknownPolicy, "unknown policy ''"),
        ("linear:", InvalidArgument, "got 'linear:'"),
        ("linear:weight", InvalidArgument, "expected NAME:PARAMETER=VALUE"),
        ("linear:weight=", InvalidArgument, "got 'linear:weight='"),
        ("linear:weight=1,weight=0", InvalidArgument, "gives 'weight' twice"),
        ("linear:slope=1", InvalidArgument, "has no parameter 'slope', expected weight"),
        ("lmetric:weight=1", InvalidArgument, "expected none: it has no parameters"),
        ("linear:weight=2", InvalidArgument, "weight must be finite and in 0..1, got 2"),
        ("linear:weight=nan", InvalidArgument, "must be finite"),
        ("linear:weight=much", InvalidType, "weight must be a number, got str"),
    ],
)
def test_a_spec_that_says_nothing_sensible_is_refused(text, error, message):
    with pytest.raises(error, match=message):
        parse_spec(text)
