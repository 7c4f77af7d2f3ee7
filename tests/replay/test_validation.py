"""Every problem of a trace file is found, not only the first."""

import json
from pathlib import Path

import pytest

from mulsched.errors import InvalidArgument
from mulsched.replay import synthetic_trace, validate_trace, write_trace

DATA = Path(__file__).parent / "data"


def mooncake(at, *ids):
    return {"timestamp": at, "input_length": 512 * len(ids), "output_length": 1, "hash_ids": ids}


def written(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("name", ["mooncake.jsonl", "bailian.jsonl", "agentic.jsonl", "azure.csv"])
def test_a_good_file_has_no_problems(name):
    problems, trace = validate_trace(DATA / name)
    assert problems == []
    assert len(trace) >= 2


def test_every_bad_line_is_named_and_the_rest_is_read(tmp_path):
    file = written(tmp_path / "t", mooncake(0, 0, 1), [], mooncake(-1, 0), mooncake(1, 0, 1))
    problems, trace = validate_trace(file)
    assert problems == [
        "t:2: a JSON object expected, got list",
        "t:3: timestamp must lie in 0..2**48-1, got -1",
    ]
    assert len(trace) == 2


def test_a_file_without_a_good_line_has_no_trace(tmp_path):
    assert validate_trace(written(tmp_path / "t", {"hash_ids": 3})) == (
        ["t:1: field 'timestamp' is missing", "t: the file has no requests"],
        None,
    )
    assert validate_trace(written(tmp_path / "t", {"a": 3}))[1] is None


@pytest.mark.parametrize(
    ("requests", "wrong"),
    [
        ([(0, 1, 2), (0, 1, 2), (0, 1, 3)], None),
        ([(0, 1, 2), (5, 1)], "request 1: block id 1"),
        ([(0, 1, 2), (1, 2)], "request 1: block id 1"),
        ([(0, 1, 0)], "request 0: block id 0"),
        ([(0, 1, 2**40), (0, 2**40)], f"request 1: block id {2**40}"),
    ],
)
def test_ids_that_are_not_chained_are_told(requests, wrong, tmp_path):
    file = written(tmp_path / "t", *(mooncake(at, *ids) for at, ids in enumerate(requests)))
    problems, _ = validate_trace(file)
    assert problems == ([f"t: {wrong} follows another id than before: not chained"] if wrong else [])


def test_a_partial_block_at_the_end_is_checked_too(tmp_path):
    partial = mooncake(1, 5, 1) | {"input_length": 600}
    assert len(validate_trace(written(tmp_path / "t", mooncake(0, 0, 1), partial))[0]) == 1


@pytest.mark.parametrize("workload", ["chat", "tool_agent"])
def test_synthetic_traces_are_chained(workload, tmp_path):
    write_trace(synthetic_trace(workload, duration_s=60), tmp_path / "t.gz")
    assert validate_trace(tmp_path / "t.gz")[0] == []


def test_an_unknown_format_and_a_missing_file_are_errors_of_the_caller(tmp_path):
    with pytest.raises(InvalidArgument, match="unknown trace format 'x'"):
        validate_trace(DATA / "azure.csv", format="x")
    with pytest.raises(FileNotFoundError):
        validate_trace(tmp_path / "none")
