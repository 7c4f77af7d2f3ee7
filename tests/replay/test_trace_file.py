"""Our trace format: what is written is read back, and what is wrong is named."""

import dataclasses
import gzip
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mulsched.errors import InvalidArgument, TraceError
from mulsched.replay import Trace, read_trace, synthetic_trace, write_trace

HEADER = {"format": "mulsched-trace", "version": 1, "block_size": 16}
REQUEST = {"arrival_s": 1.5, "prompt_tokens": 40, "output_tokens": 5, "runs": [7, 2]}


def written(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def assert_equal(one, other):
    for field in dataclasses.fields(Trace):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            assert a.tolist() == b.tolist(), field.name
        else:
            assert a == b, field.name


def test_a_file_by_hand_is_read(tmp_path):
    follow_up = REQUEST | {
        "arrival_s": 3,
        "session": 4,
        "previous": 0,
        "think_s": 0.25,
        "runs": [7, 2, 90, 1],
    }
    trace = read_trace(written(tmp_path / "a.jsonl", HEADER, REQUEST, follow_up))
    assert trace.name == "a.jsonl"
    assert trace.block_size == 16
    assert trace.arrival_s.tolist() == [1.5, 3.0]
    assert trace.block_ids(1).tolist() == [7, 8, 90]
    assert trace.session.tolist() == [-1, 4]
    assert trace.previous.tolist() == [-1, 0]
    assert trace.think_s.tolist() == [0, 0.25]
    assert (trace.synthetic, trace.notes) == (False, ())


def test_the_header_of_the_written_file_says_what_it_is(tmp_path):
    write_trace(
        read_trace(written(tmp_path / "in", HEADER | {"notes": ["by hand"]}, REQUEST)), tmp_path / "out"
    )
    header, request = map(json.loads, (tmp_path / "out").read_text().splitlines())
    assert header == HEADER | {"name": "in", "synthetic": False, "notes": ["by hand"], "requests": 1}
    assert request == REQUEST


def test_a_synthetic_trace_comes_back_and_stays_synthetic(tmp_path):
    trace = synthetic_trace("tool_agent", duration_s=60, seed=2)
    write_trace(trace, tmp_path / "t.jsonl.gz")
    assert_equal(read_trace(tmp_path / "t.jsonl.gz"), trace)


def test_equal_traces_are_equal_files_whatever_their_names(tmp_path):
    trace = synthetic_trace("chat", duration_s=20)
    files = [tmp_path / name for name in ("one.gz", "two.gz", "plain")]
    for file in files:
        write_trace(trace, file)
    packed, again, plain = (file.read_bytes() for file in files)
    assert packed == again
    assert gzip.decompress(packed) == plain


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"version": 2}, "version 2 is newer than 1, the newest that this mulsched reads"),
        ({"version": 0}, "version must lie in 1.."),
        ({"version": "1"}, "version must be an integer, got '1'"),
        ({"block_size": 0}, "block_size must lie in 1.."),
        ({"block_size": 2**14 + 1}, "block_size must lie in 1..16384, got 16385"),
        ({"notes": "n"}, "notes must be a list of strings, got 'n'"),
        ({"notes": [1]}, "notes must be a list of strings, got [1]"),
        ({"name": 3}, "name must be a str, got 3"),
        ({"synthetic": 1}, "synthetic must be a bool, got 1"),
        ({"requests": 0}, "requests must lie in 1.."),
        ({"block_sizes": 1}, "unknown field 'block_sizes', expected block_size, format"),
    ],
)
def test_a_bad_header_is_named_and_ends_the_reading(header, message, tmp_path):
    with pytest.raises(TraceError, match=re.escape(message)) as caught:
        read_trace(written(tmp_path / "bad", HEADER | header, REQUEST), bad_lines=[])
    assert str(caught.value).startswith("bad:1: ")


def test_a_newer_version_is_told_before_what_else_is_new(tmp_path):
    with pytest.raises(TraceError, match="version 2 is newer"):
        read_trace(written(tmp_path / "bad", HEADER | {"version": 2, "codec": "x"}))


def test_a_file_that_was_cut_short_is_noticed(tmp_path):
    with pytest.raises(TraceError, match="bad:1: the header promises 2 requests, the file has 1"):
        read_trace(written(tmp_path / "bad", HEADER | {"requests": 2}, REQUEST))


def test_a_file_without_header_is_told_what_it_lacks(tmp_path):
    with pytest.raises(
        TraceError, match='bad:1: a header with "format": "mulsched-trace" expected, got None'
    ):
        read_trace(written(tmp_path / "bad", REQUEST), format="mulsched")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sesion": 1}, "unknown field 'sesion', expected arrival_s, output_tokens"),
        ({"arrival_s": 1}, "arrival_s goes back from 1.5 to 1"),
        ({"arrival_s": float("nan")}, "arrival_s must lie in -(2**48-1)..2**48-1, got nan"),
        ({"arrival_s": "2"}, "arrival_s must be a number, got '2'"),
        ({"prompt_tokens": 0}, "prompt_tokens must lie in 1.."),
        ({"output_tokens": 0}, "output_tokens must lie in 1.."),
        ({"output_tokens": 1.5}, "output_tokens must be an integer, got 1.5"),
        ({"session": -2}, "session must lie in -1.."),
        ({"previous": 1}, "previous of request 1 must be an earlier one, got 1"),
        ({"think_s": -1}, "think_s must lie in 0.."),
        ({"runs": [1]}, "runs must be a list of start, length pairs, got [1]"),
        ({"runs": None}, "runs must be a list of start, length pairs, got None"),
        ({"runs": [0.5, 1]}, "runs must hold integers in 0..2**48-1, got [0.5, 1]"),
        ({"runs": [2**48 - 1, 2]}, "block ids must lie in 0..2**48-1"),
        ({"runs": [0, 4]}, "40 tokens have 3 blocks of 16, runs have 4"),
    ],
)
def test_a_bad_request_is_named(change, message, tmp_path):
    with pytest.raises(TraceError, match=re.escape(message)) as caught:
        read_trace(written(tmp_path / "bad", HEADER, REQUEST, REQUEST | change))
    assert str(caught.value).startswith("bad:3: ")


def test_what_follows_a_bad_line_that_is_left_out_follows_none(tmp_path):
    bad = []
    lines = [REQUEST, REQUEST | {"runs": 0}, REQUEST | {"previous": 1}, REQUEST | {"previous": 2}]
    trace = read_trace(written(tmp_path / "bad", HEADER, *lines), bad_lines=bad)
    assert bad == ["bad:3: runs must be a list of start, length pairs, got 0"]
    assert trace.previous.tolist() == [-1, -1, 1]
    assert trace.notes == ("1 bad lines left out",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arrival_s": np.array([1e300])}, "arrival_s goes up to 2**48-1, got 1e+300"),
        ({"session": np.array([2**48])}, "session goes up to 2**48-1, got 281474976710656"),
        ({"prompt_tokens": np.array([16])}, "request 0 has 16 tokens and 2 blocks of 16"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_and_nothing_written(change, message, tmp_path):
    trace = read_trace(written(tmp_path / "in", HEADER, REQUEST))
    with pytest.raises(InvalidArgument, match=re.escape(message)):
        write_trace(dataclasses.replace(trace, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


COUNTS = st.integers(1, 2**48 - 1)
SECONDS = st.floats(0, 2**40)


@st.composite
def traces(draw):
    n = draw(st.integers(1, 4))
    block_size = draw(st.integers(1, 2**14))
    prompts, runs = [], []
    for _ in range(n):
        length = st.one_of(st.integers(0, 3), st.integers(0, 2**30))
        run = draw(st.lists(st.tuples(st.integers(0, 2**47), length), max_size=3))
        runs.append(run)
        blocks = sum(length for _, length in run)
        prompts.append(
            max(1, (blocks - 1) * block_size + draw(st.integers(1, block_size)) if blocks else draw(COUNTS))
        )
    flat = np.array([pair for run in runs for pair in run], dtype=np.int64).reshape(-1, 2)
    each = {"min_size": n, "max_size": n}
    return Trace(
        name=draw(st.text(max_size=4)),
        block_size=block_size,
        arrival_s=np.sort(draw(st.lists(st.floats(-(2**40), 2**40), **each))),
        prompt_tokens=np.array(prompts),
        output_tokens=np.array(draw(st.lists(COUNTS, **each))),
        run_start=flat[:, 0].copy(),
        run_length=flat[:, 1].copy(),
        run_offset=np.cumsum([0, *map(len, runs)]),
        session=np.array(draw(st.lists(st.integers(-1, 2**48 - 1), **each))),
        previous=np.array([draw(st.integers(-1, i - 1)) for i in range(n)]),
        think_s=np.array(draw(st.lists(SECONDS, **each))),
        synthetic=draw(st.booleans()),
        notes=tuple(draw(st.lists(st.text(max_size=4), max_size=2))),
    )


@settings(max_examples=50)
@given(traces(), st.sampled_from(["t.jsonl", "t.jsonl.gz"]))
def test_every_trace_comes_back_equal(tmp_path_factory, trace, name):
    file = tmp_path_factory.getbasetemp() / name
    write_trace(trace, file)
    assert_equal(read_trace(file), trace)
