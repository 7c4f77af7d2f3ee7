"""Results of benchmark tools as traces: lengths and arrivals, and no prefixes."""

import json
import re

import pytest

from mulsched.errors import TraceError
from mulsched.replay import read_trace

NO_PREFIXES = "the trace has no prefixes: every prompt is its own"
VLLM = {
    "date": "20260102-030405",
    "backend": "vllm",
    "num_prompts": 3,
    "request_rate": "inf",
    "duration": 10.0,
    "completed": 2,
    "request_throughput": 0.2,
    "input_lens": [100, 200, 300],
    "output_lens": [10, 0, 30],
    "start_times": [5001.5, 5000.25, 5000.0],
    "ttfts": [0.1, 0.0, 0.2],
    "itls": [[0.01], [], [0.01]],
    "generated_texts": ["a", "", "b"],
    "errors": ["", "timeout", ""],
}
STAMP = {
    "request_id": "bench-0",
    "input_toks": 235,
    "output_toks": 53,
    "arrival_time": 1787267980.5,
    "queued_ts": 1.0,
    "first_token_ts": 2.0,
}
GUIDELLM = {
    "metadata": {"version": 1},
    "benchmarks": [
        {
            "requests": {
                "successful": [
                    {
                        "request_id": "a",
                        "request_start_time": 1700000004.0,
                        "prompt_tokens": 64,
                        "output_tokens": 8,
                    },
                    {
                        "request_id": "b",
                        "request_start_time": 1700000000.0,
                        "prompt_tokens": 32,
                        "output_tokens": 4,
                    },
                ],
                "incomplete": [{}],
                "errored": None,
                "total": None,
            }
        },
    ],
}


def aiperf(start_s, end_s, session="s", error=None):
    return {
        "metadata": {
            "x_correlation_id": session,
            "turn_index": 0,
            "request_start_ns": int(start_s * 1e9),
            "request_end_ns": int(end_s * 1e9),
            "was_cancelled": False,
        },
        "metrics": {
            "input_sequence_length": {"value": 550, "unit": "tokens"},
            "output_sequence_length": {"value": 9.0, "unit": "tokens"},
        },
        "error": error,
    }


def written(path, *records, **style):
    path.write_text("".join(json.dumps(record, **style) + "\n" for record in records))
    return path


def test_a_vllm_result_keeps_the_requests_that_succeeded(tmp_path):
    trace = read_trace(written(tmp_path / "r.json", VLLM))
    assert trace.arrival_s.tolist() == [0, 1.5]
    assert trace.prompt_tokens.tolist() == [300, 100]
    assert trace.output_tokens.tolist() == [30, 10]
    assert trace.notes == ("1 failed requests left out", NO_PREFIXES)
    assert trace.stats().hit_ratio == 0


def test_runs_that_were_appended_come_one_after_another(tmp_path):
    trace = read_trace(written(tmp_path / "r.jsonl", VLLM, VLLM))
    assert trace.arrival_s.tolist() == [0, 1.5, 10, 11.5]
    assert "2 runs, one after another" in trace.notes


def test_json_over_several_lines_is_read_too(tmp_path):
    assert len(read_trace(written(tmp_path / "r.json", VLLM, indent=2))) == 2
    assert len(read_trace(written(tmp_path / "g.json", GUIDELLM, indent=2))) == 2


def test_vllm_time_stamps_are_read(tmp_path):
    trace = read_trace(written(tmp_path / "t.jsonl", STAMP, STAMP | {"arrival_time": 1787267981.0}))
    assert trace.arrival_s.tolist() == [0, 0.5]
    assert trace.prompt_tokens.tolist() == [235, 235]
    assert trace.output_tokens.tolist() == [53, 53]
    assert trace.notes == (NO_PREFIXES,)


def test_a_guidellm_report_keeps_what_succeeded(tmp_path):
    trace = read_trace(written(tmp_path / "g.json", GUIDELLM))
    assert trace.arrival_s.tolist() == [0, 4]
    assert trace.prompt_tokens.tolist() == [32, 64]
    assert trace.notes == ("1 failed requests left out", NO_PREFIXES)


def test_the_benchmarks_of_a_sweep_keep_their_times(tmp_path):
    old = {"start_time": 1700000100.0, "prompt_tokens": 16, "output_tokens": 2}
    report = {"benchmarks": [*GUIDELLM["benchmarks"], {"requests": {"successful": [old]}}]}
    trace = read_trace(written(tmp_path / "g.json", report))
    assert trace.arrival_s.tolist() == [0, 4, 100]
    assert "2 benchmarks, at the times they ran" in trace.notes


def test_turns_of_an_aiperf_session_follow_each_other_in_whatever_order_they_ended(tmp_path):
    records = [aiperf(5, 6), aiperf(1, 2), aiperf(1.5, 9, "t"), aiperf(3, 4, error={"code": 500})]
    trace = read_trace(written(tmp_path / "p.jsonl", *records))
    assert trace.arrival_s.tolist() == [0, 0.5, 4]
    assert trace.session.tolist() == [0, 1, 0]
    assert trace.previous.tolist() == [-1, -1, 0]
    assert trace.think_s.tolist() == [0, 0, 3]
    assert trace.output_tokens.tolist() == [9, 9, 9]
    assert trace.notes == ("1 failed requests left out", NO_PREFIXES)


def test_aiperf_records_without_session_have_none(tmp_path):
    assert read_trace(written(tmp_path / "p", aiperf(1, 2, None))).session.tolist() == [-1]


def test_a_result_without_figures_per_request_says_how_to_get_them(tmp_path):
    short = {k: v for k, v in VLLM.items() if k not in ("input_lens", "start_times")}
    with pytest.raises(TraceError, match="r:1: no list input_lens: .* --save-detailed"):
        read_trace(written(tmp_path / "r", short))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (VLLM | {"output_lens": [1]}, ":1: output_lens must be a list of 3 items"),
        (VLLM | {"errors": [""]}, ":1: errors must be a list of 3 items"),
        (VLLM | {"input_lens": [100, 200, "x"]}, ":1: request 2: input_lens must be an integer, got 'x'"),
        (VLLM | {"start_times": [1, 2, float("nan")]}, ":1: request 2: start_times must lie in"),
        (VLLM | {"duration": None}, ":1: duration must be a number, got None"),
        (VLLM | {"errors": ["a", "b", "c"]}, "the file has no requests"),
        (STAMP | {"input_toks": 0}, ":1: input_toks must lie in 1.."),
        ({"benchmarks": 3}, ":1: benchmarks must be a list, got int"),
        ({"benchmarks": [3]}, ":1: benchmark 0 must be an object, got int"),
        ({"benchmarks": [{"requests": []}]}, ":1: requests of benchmark 0 must be an object, got list"),
        (
            {"benchmarks": [{"requests": {"successful": [{"start_time": 1, "output_tokens": 3}]}}]},
            ":1: benchmark 0: request 0: field 'prompt_tokens' is missing",
        ),
        (aiperf(1, 2) | {"metrics": None}, ":1: metrics must be an object, got NoneType"),
        (aiperf(1, 2) | {"metrics": {}}, ":1: input_sequence_length must be an object, got NoneType"),
        (aiperf(1, 2, 7), ":1: x_correlation_id must be a string, got 7"),
        (aiperf(-1, 2), ":1: request_start_ns must be an integer in 0.."),
    ],
)
def test_a_bad_record_is_named(record, message, tmp_path):
    with pytest.raises(TraceError, match=re.escape(message)):
        read_trace(written(tmp_path / "bad", record))


def test_a_bad_request_in_a_result_leaves_the_others(tmp_path):
    bad = []
    trace = read_trace(written(tmp_path / "r", VLLM | {"input_lens": [0, 200, 300]}), bad_lines=bad)
    assert len(trace) == 1
    assert bad == ["r:1: request 0: input_lens must lie in 1..2**48-1, got 0"]
