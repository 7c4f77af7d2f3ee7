"""Step times: the built-in formula and interpolation from tables."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulsched.errors import InvalidArgument, ProfileError
from mulsched.replay import Profile, Roofline, builtin_profile, load_profile

HEADER = "kind,new_tokens,prefix_tokens,decode_batch,decode_ctx,latency_ms\n"
# bilinear by construction: prefill 5 + n/100 + p/1000, decode 5 + b/2 + b*c/1000
PREFILL = [(n, p) for n in (100, 200, 400) for p in (0, 1000)]
DECODE = [(b, c) for b in (1, 4, 8) for c in (100, 1000, 2000)]


def table(tmp_path, *, drop=(), extra=""):
    rows = [f"prefill,{n},{p},0,0,{5 + n / 100 + p / 1000}" for n, p in PREFILL]
    rows += [f"decode,0,0,{b},{c},{5 + b / 2 + b * c / 1000}" for b, c in DECODE if (b, c) not in drop]
    rows += ["mixed,100,0,4,1000,10.4"]
    file = tmp_path / "gpu.csv"
    file.write_text(HEADER + "\n".join(rows) + "\n" + extra)
    return file


def test_table_points_come_back_as_they_are(tmp_path):
    step = load_profile(table(tmp_path)).step_time
    for n, p in PREFILL:
        assert step(n, p, 0, 0) == pytest.approx((5 + n / 100 + p / 1000) / 1000)
    for b, c in DECODE:
        assert step(0, 0, b, c) == pytest.approx((5 + b / 2 + b * c / 1000) / 1000)


def test_between_and_beyond_the_points_it_is_bilinear(tmp_path):
    step = load_profile(table(tmp_path)).step_time
    assert step(150, 500, 0, 0) == pytest.approx((5 + 1.5 + 0.5) / 1000)
    assert step(800, 4000, 0, 0) == pytest.approx((5 + 8 + 4) / 1000)
    assert step(0, 0, 16, 3000) == pytest.approx((5 + 8 + 48) / 1000)
    assert step(1, 0, 0, 0) == step(100, 0, 0, 0)  # below the table a step costs what its first row says


def test_cells_that_no_memory_holds_are_extended_in_a_line(tmp_path):
    step = load_profile(table(tmp_path, drop=[(8, 2000)])).step_time
    assert step(0, 0, 8, 2000) == pytest.approx((5 + 4 + 16) / 1000)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("prefill,1,2\n", "gpu.csv:18: numbers expected"),
        ("prefill,1,0,0,0,fast\n", "gpu.csv:18: numbers expected"),
        ("prefill,1,0,0,0,-1\n", "gpu.csv:18: latency_ms must be finite and above 0, got -1"),
        ("prefill,1,0,0,0,nan\n", "gpu.csv:18: latency_ms must be finite"),
        ("train,1,0,0,0,5\n", "gpu.csv:18: kind must be prefill, decode or mixed, got 'train'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, extra, message):
    with pytest.raises(ProfileError, match=message):
        load_profile(table(tmp_path, extra=extra))


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n"])
def test_a_file_without_the_columns_is_refused(tmp_path, content):
    file = tmp_path / "x.csv"
    file.write_text(content)
    with pytest.raises(ProfileError, match="x.csv:1: columns kind"):
        load_profile(file)


def test_a_table_without_a_kind_or_with_a_hole_is_refused(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text(HEADER + "prefill,1,0,0,0,5\n")
    with pytest.raises(ProfileError, match="x.csv: prefill rows must span at least 2 x 2 points, got 1 x 1"):
        load_profile(file)
    with pytest.raises(ProfileError, match="decode row for 4, 100 is missing"):
        load_profile(table(tmp_path, drop=[(4, 100)]))


@pytest.mark.parametrize("limit", ["block_size", "max_batched_tokens", "max_num_seqs", "kv_blocks"])
def test_limits_are_at_least_1(limit):
    with pytest.raises(InvalidArgument, match=f"{limit} must be at least 1, got 0"):
        Profile("x", Roofline(), **{limit: 0})


def test_the_built_in_engine_is_of_the_right_order():
    step = builtin_profile().step_time
    # weights of 16 GB at 2.5 TB/s: 6.4 ms; 4,096 tokens of 16 GFLOP at 692 TFLOP/s: 95 ms
    assert 0.006 < step(0, 0, 1, 500) < 0.009
    assert 0.090 < step(4096, 0, 0, 0) < 0.110


@given(st.integers(1, 8192), st.integers(0, 100_000), st.integers(0, 256), st.integers(1, 30_000))
def test_more_work_takes_no_less_time(new, prefix, batch, context):
    step = builtin_profile().step_time
    here = step(new, prefix, batch, context)
    assert here > 0
    assert step(new + 1, prefix, batch, context) >= here
    assert step(new, prefix + 100, batch, context) >= here
    assert step(new, prefix, batch + 1, context) >= here
    assert step(new, prefix, batch, context + 100) >= here
