"""Step times as formulas."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulsched.errors import InvalidArgument
from mulsched.replay.step_time import FittedStep, MoeRoofline, Roofline, expert_shares

MOE = MoeRoofline(
    active_parameters=3e9,
    shared_parameters=1e9,
    expert_parameters=30e9,
    expert_share=expert_shares(128, 8),
    kv_bytes=98_304,
    attention_flops=4 * 48 * 4096,
    compute=1e14,
    bandwidth=3e12,
    overhead_s=0.001,
)
FITTED = FittedStep(0.01, 1e-4, 1e-7, 0.002, 2e-5, 1e-9, 3e-5)
LOADS = (st.integers(0, 8192), st.integers(0, 100_000), st.integers(0, 256), st.integers(1, 30_000))


def test_a_fitted_step_is_the_sum_of_its_coefficients():
    decode = 1e-4 * 8 + 1e-7 * 8 * 500
    prefill = 0.002 + 2e-5 * 100 + 1e-9 * 100 * (40 + 50) + 3e-5 * 8
    assert FITTED(100, 40, 8, 500) == pytest.approx(0.01 + decode + prefill)
    assert FITTED(0, 0, 8, 500) == pytest.approx(0.01 + decode)
    assert FITTED(100, 40, 0, 0) == pytest.approx(0.01 + prefill - 3e-5 * 8)


@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf")])
def test_a_coefficient_is_finite_and_at_least_0(value):
    with pytest.raises(InvalidArgument, match=f"decode_s must be finite and at least 0, got {value}"):
        FittedStep(0.01, decode_s=value)


def test_a_step_takes_time():
    with pytest.raises(InvalidArgument, match="step_s must be above 0"):
        FittedStep(0.0)


def test_a_token_of_a_mixture_reads_its_experts_and_many_read_all():
    one = 2 * (1e9 + 30e9 * 8 / 128) / 3e12
    assert MOE(0, 0, 1, 0) == pytest.approx(0.001 + one)
    assert MOE(0, 0, 256, 0) == pytest.approx(0.001 + 2 * 31e9 / 3e12)


def test_a_mixture_computes_with_the_active_parameters():
    assert MOE(8192, 0, 0, 0) == pytest.approx(
        0.001 + 2 * 3e9 * 8192 / 1e14 + 4 * 48 * 4096 * 8192 * 4096 / 1e14
    )


def test_a_mixture_of_one_expert_is_dense():
    dense = Roofline()
    mixture = MoeRoofline(
        dense.parameters,
        0.0,
        dense.parameters,
        expert_shares(1, 1),
        dense.kv_bytes,
        dense.attention_flops,
        dense.compute,
        dense.bandwidth,
    )
    for load in [(0, 0, 1, 500), (4096, 100, 0, 0), (512, 0, 64, 2000)]:
        assert mixture(*load) == dense(*load)


def test_shares_of_experts_are_those_of_independent_choices():
    shares = expert_shares(128, 8)
    assert shares[:3] == pytest.approx((0.0, 1 / 16, 1 - (15 / 16) ** 2))
    assert 128 * (1 - shares[-1]) >= 0.01 > 128 * (1 - shares[-1]) * 15 / 16


@pytest.mark.parametrize("chosen", [0, 9])
def test_a_token_chooses_some_of_the_experts(chosen):
    with pytest.raises(InvalidArgument, match=rf"experts_per_token must lie in 1\.\.8, got {chosen}"):
        expert_shares(8, chosen)


@pytest.mark.parametrize("step", [Roofline(), MOE, FITTED], ids=["dense", "mixture", "fitted"])
@given(*LOADS)
def test_more_work_takes_no_less_time(step, new, prefix, batch, context):
    here = step(new, prefix, batch, context)
    assert here > 0
    assert step(new + 1, prefix, batch, context) >= here
    assert step(new, prefix + 100, batch, context) >= here
    assert step(new, prefix, batch + 1, context) >= here
    assert step(new, prefix, batch, context + 100) >= here
