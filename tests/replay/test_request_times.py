"""Recordings of real engines."""

import json

import numpy as np
import pytest

from mulsched.errors import ProfileError
from mulsched.replay.request_times import RequestTimes, read_request_times

ROW = {
    "request_id": "a",
    "input_toks": 100,
    "output_toks": 11,
    "arrival_time": 1_700_000_000.0,
    "queued_ts": 50.25,
    "scheduled_ts": 50.5,
    "first_token_ts": 51.0,
    "last_token_ts": 53.0,
}


def later(seconds, **changes):
    moved = {name: value + seconds for name, value in ROW.items() if isinstance(value, float)}
    return ROW | moved | changes


def written(tmp_path, *rows):
    file = tmp_path / "run.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def columns(**changes):
    times = {
        "arrival_s": np.array([0.0, 1.0]),
        "scheduled_s": np.array([0.0, 1.5]),
        "first_token_s": np.array([0.5, 2.0]),
        "finish_s": np.array([1.0, 2.0]),
        "prompt_tokens": np.array([10, 20]),
        "output_tokens": np.array([3, 1]),
    }
    return RequestTimes("run", **(times | changes))


def test_clocks_are_aligned_by_the_request_that_the_engine_took_first(tmp_path):
    # the second one waited 0.125 s longer for the step under way: that belongs to its time to first token
    rows = [later(2.0, queued_ts=52.375), ROW, ""]
    run = read_request_times(written(tmp_path, *rows))
    assert run.name == "run"
    assert run.arrival_s.tolist() == [0.0, 2.0]
    assert run.scheduled_s.tolist() == [0.25, 2.25]
    assert run.first_token_s.tolist() == [0.75, 2.75]
    assert run.finish_s.tolist() == [2.75, 4.75]
    assert run.prompt_tokens.tolist() == [100, 100]
    assert run.ttft_s.tolist() == [0.75, 0.75]
    assert run.tpot_s.tolist() == [0.2, 0.2]


def test_one_token_has_no_time_per_token():
    np.testing.assert_array_equal(columns().tpot_s, [0.25, np.nan])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "run.jsonl:2: JSON expected"),
        ("[]", "run.jsonl:2: an object with input_toks, "),
        ("{}", "run.jsonl:2: an object with input_toks, "),
        (ROW | {"input_toks": 0}, "run.jsonl:2: input_toks must be a number of tokens, at least 1, got 0"),
        (ROW | {"output_toks": 1.5}, "run.jsonl:2: output_toks must be a number of tokens, .*got 1.5"),
        (ROW | {"input_toks": True}, "run.jsonl:2: input_toks must be a number of tokens, .*got True"),
        (ROW | {"queued_ts": "x"}, "run.jsonl:2: queued_ts must be a finite number of seconds, got 'x'"),
        (ROW | {"last_token_ts": float("nan")}, "run.jsonl:2: last_token_ts must be a finite number"),
        (ROW | {"scheduled_ts": 60.0}, "run.jsonl:2: queued_ts, .* must not decrease, got .*60.0"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, message):
    with pytest.raises(ProfileError, match=message):
        read_request_times(written(tmp_path, ROW, row))


def test_a_file_without_requests_is_refused(tmp_path):
    with pytest.raises(ProfileError, match="run.jsonl: no requests"):
        read_request_times(written(tmp_path, ""))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finish_s": np.array([1.0])}, "columns must have one length above 0, got 2 and"),
        ({"arrival_s": np.array([1.0, 0.0])}, "in the order of their arrival"),
        ({"arrival_s": np.array([0.0, np.nan])}, "times must be finite"),
        ({"scheduled_s": np.array([0.0, 0.5])}, "request 1 must arrive, be scheduled, begin and end"),
        ({"first_token_s": np.array([0.0, 2.0])}, "request 0 must arrive, be scheduled, begin and end"),
        ({"finish_s": np.array([0.5, 2.0])}, "request 0 must arrive, be scheduled, begin and end"),
        ({"prompt_tokens": np.array([10, 0])}, "request 1 has no prompt or no output"),
        ({"output_tokens": np.array([0, 1])}, "request 0 has no prompt or no output"),
    ],
)
def test_columns_fit_together(changes, message):
    with pytest.raises(ProfileError, match=f"run: .*{message}"):
        columns(**changes)
