"""Profiles: limits, built-in ones, and files."""

import pytest

from mulsched.errors import InvalidArgument
from mulsched.replay import Profile, Roofline, StepTable, builtin_profile, load_profile
from mulsched.replay.capacity import GPUS, MODELS, kv_blocks
from mulsched.replay.profile import BUILTIN_PROFILES, roofline
from mulsched.replay.step_time import MoeRoofline


@pytest.mark.parametrize("limit", ["block_size", "max_batched_tokens", "max_num_seqs", "kv_blocks"])
def test_limits_are_at_least_1(limit):
    with pytest.raises(InvalidArgument, match=f"{limit} must be at least 1, got 0"):
        Profile("x", Roofline(), **{limit: 0})


def test_the_built_in_engine_is_of_the_right_order():
    step = builtin_profile().step_time
    # weights of 16 GB at 2.5 TB/s: 6.4 ms; 4,096 tokens of 16 GFLOP at 692 TFLOP/s: 95 ms
    assert 0.006 < step(0, 0, 1, 500) < 0.009
    assert 0.090 < step(4096, 0, 0, 0) < 0.110


def test_every_built_in_profile_has_its_name_and_takes_time():
    assert BUILTIN_PROFILES[0] == builtin_profile().name
    for name in BUILTIN_PROFILES:
        profile = builtin_profile(name)
        assert profile.name == name
        assert profile.step_time(100, 0, 4, 1000) > profile.step_time(0, 0, 4, 1000) > 0


def test_the_engines_of_the_paper_hold_what_their_gpu_leaves():
    for name, model in [("qwen2-7b-h20", "Qwen2-7B"), ("qwen3-30b-a3b-h20", "Qwen3-30B-A3B")]:
        assert builtin_profile(name).kv_blocks == kv_blocks(MODELS[model], GPUS["H20-96GB"].memory_bytes)


def test_the_engines_of_the_paper_are_of_the_right_order():
    dense, mixture = (builtin_profile(name).step_time for name in ("qwen2-7b-h20", "qwen3-30b-a3b-h20"))
    # 15.2 GB of weights at 3.0 TB/s: 5.1 ms; 4,096 tokens of 15.2 GFLOP at 104 TFLOP/s: 602 ms
    assert 0.005 < dense(0, 0, 1, 500) < 0.007
    assert 0.60 < dense(4096, 0, 0, 0) < 0.65
    # 3.3e9 parameters for one token, 61 GB of weights for 256
    assert 0.003 < mixture(0, 0, 1, 500) < 0.004
    assert 0.020 < mixture(0, 0, 256, 0) < 0.023
    assert 0.26 < mixture(4096, 0, 0, 0) < 0.33


def test_a_mixture_of_experts_has_a_roofline_of_its_own():
    step = roofline(MODELS["Qwen3-30B-A3B"], GPUS["H20-96GB"])
    assert isinstance(step, MoeRoofline)
    assert step.active_parameters == pytest.approx(3.3e9, rel=0.02)
    assert step.shared_parameters + step.expert_parameters == MODELS["Qwen3-30B-A3B"].parameters


def test_another_name_is_refused():
    with pytest.raises(InvalidArgument, match=r"built-in profiles are builtin-8b, .*, got 'gpt'"):
        builtin_profile("gpt")


def test_a_table_file_is_a_profile_of_its_name(tmp_path):
    file = tmp_path / "gpu.csv"
    rows = [f"prefill,{n},{p},0,0,{n + p + 1}" for n in (1, 2) for p in (0, 1)]
    rows += [f"decode,0,0,{b},{c},{b + c}" for b in (1, 2) for c in (1, 2)]
    file.write_text("kind,new_tokens,prefix_tokens,decode_batch,decode_ctx,latency_ms\n" + "\n".join(rows))
    profile = load_profile(file, kv_blocks=7)
    assert (profile.name, profile.kv_blocks) == ("gpu", 7)
    assert isinstance(profile.step_time, StepTable)
    assert profile.step_time(2, 1, 0, 0) == pytest.approx(0.004)
