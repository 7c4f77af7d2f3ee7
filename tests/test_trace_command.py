"""``mulsched trace``: info, validate, convert, generate."""

import argparse
import json
import stat
from pathlib import Path

import pytest

from mulsched.cli import main
from mulsched.commands._workload import add_trace_options, rate_scale_of, trace_at
from mulsched.replay import read_trace, write_trace

DATA = Path(__file__).parent / "replay" / "data"
MOONCAKE = str(DATA / "mooncake.jsonl")
REQUEST = {
    "timestamp": 5,
    "prompt": "What is the capital of France?",
    "usage": {"prompt_tokens": 48, "completion_tokens": 9},
}


@pytest.fixture
def log(tmp_path):
    file = tmp_path / "access.jsonl"
    file.write_text("".join(json.dumps(REQUEST | {"timestamp": t}) + "\n" for t in range(3)))
    return str(file)


def test_info_prints_figures_and_notes(capsys):
    assert main(["trace", "info", str(DATA / "bailian.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "requests         3 in 60 s, 0.05/s\n" in out
    assert "sessions         2, 50.0% with one request\n" in out
    assert "follow-ups       1, p50 60.0 s, p90 60.0 s after the request before\n" in out
    assert "note             think time: gap between arrivals, since ends are not recorded\n" in out


def test_a_trace_without_sessions_says_nothing_of_them(capsys):
    main(["trace", "info", str(DATA / "azure.csv")])
    out = capsys.readouterr().out
    assert "session" not in out
    assert "nan" not in out


def test_validate_is_0_for_a_good_file(capsys):
    assert main(["trace", "validate", MOONCAKE]) == 0
    captured = capsys.readouterr()
    assert captured.out.endswith(f"{MOONCAKE}: valid\n")
    assert captured.err == ""


def test_validate_is_2_for_a_bad_file_and_prints_as_many_problems_as_asked(capsys, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(Path(MOONCAKE).read_text() + "x\n" * 5)
    assert main(["trace", "validate", str(bad), "--limit", "2"]) == 2
    captured = capsys.readouterr()
    first, second, rest = captured.err.splitlines()
    assert first.startswith("bad.jsonl:4: not JSON")
    assert second.startswith("bad.jsonl:5: not JSON")
    assert rest == "... and 3 more"
    assert "requests         3" in captured.out
    assert captured.out.endswith("bad.jsonl: 5 problems\n")


def test_any_trace_is_converted_to_ours(tmp_path, capsys):
    out = tmp_path / "t.jsonl.gz"
    assert main(["trace", "convert", MOONCAKE, str(out), "--name", "kimi", "--seed", "4"]) == 0
    trace, original = read_trace(out), read_trace(MOONCAKE, seed=4)
    assert trace.name == "kimi"
    assert trace.arrival_s.tolist() == original.arrival_s.tolist()
    assert trace.notes == original.notes
    assert "trace            kimi\n" in capsys.readouterr().out


def test_a_converted_trace_is_replayed_by_name(tmp_path, capsys):
    out = str(tmp_path / "t.jsonl")
    main(["trace", "convert", MOONCAKE, out])
    assert main(["replay", out, "--policy", "vllm", "--processes", "1", "--no-noise-floor"]) == 0
    assert "mooncake.jsonl: 3 requests" in capsys.readouterr().out


def test_blocks_of_another_size_are_read_as_told(tmp_path, capsys):
    file = tmp_path / "in"
    file.write_text('{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [0, 1, 2]}\n')
    assert main(["trace", "convert", str(file), str(tmp_path / "out"), "--hash-block-tokens", "256"]) == 0
    assert read_trace(tmp_path / "out").block_size == 256


def test_bad_lines_are_skipped_counted_and_told_on_request(tmp_path, capsys, log):
    Path(log).write_text(Path(log).read_text() + "x\n")
    arguments = ["trace", "convert", log, str(tmp_path / "out"), "--from", "openai"]
    assert main(arguments) == 2
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--skip-bad"]) == 0
    captured = capsys.readouterr()
    assert "access.jsonl:4: not JSON" in captured.err
    assert "note             1 bad lines left out\n" in captured.out
    assert len(read_trace(tmp_path / "out")) == 3


def test_a_log_with_text_becomes_a_trace_that_validates_and_names_no_file(tmp_path, capsys, log):
    out = tmp_path / "out.jsonl"
    options = ["--block-size", "8", "--chars-per-token", "0.625", "--name", "shared"]
    assert main(["trace", "convert", log, str(out), "--from", "openai", *options]) == 0
    assert main(["trace", "validate", str(out)]) == 0
    header, *requests = map(json.loads, out.read_text().splitlines())
    assert header["name"] == "shared"
    assert requests[1] == {"arrival_s": 1.0, "prompt_tokens": 48, "output_tokens": 9, "runs": [0, 6]}
    assert "access" not in out.read_text()


def test_a_salt_is_made_for_its_owner_only_and_used_again(tmp_path, capsys, log):
    salt = tmp_path / "salt"
    arguments = ["trace", "convert", log, str(tmp_path / "out"), "--from", "openai", "--salt-file", str(salt)]
    assert main(arguments) == 0
    made = salt.read_text()
    assert stat.S_IMODE(salt.stat().st_mode) == 0o600
    assert len(bytes.fromhex(made)) == 32
    assert main(arguments) == 0
    assert salt.read_text() == made


def test_sessions_and_times_are_read_where_told(tmp_path, capsys, log):
    lines = [REQUEST | {"timestamp": None, "at": t, "user": "u"} for t in (3, 8)]
    Path(log).write_text("".join(json.dumps(line) + "\n" for line in lines))
    fields = ["--session-field", "user", "--time-field", "at"]
    assert main(["trace", "convert", log, str(tmp_path / "out"), "--from", "openai", *fields]) == 0
    trace = read_trace(tmp_path / "out")
    assert trace.arrival_s.tolist() == [0, 5]
    assert trace.previous.tolist() == [-1, 0]


def test_generate_writes_a_synthetic_trace_and_prints_its_calibration(tmp_path, capsys):
    out = tmp_path / "t.jsonl.gz"
    options = ["--workload", "coder", "--duration", "60", "--seed", "5", "--rate-scale", "0.4"]
    assert main(["trace", "generate", str(out), *options]) == 0
    assert "achieved    target" in capsys.readouterr().out
    trace = read_trace(out)
    assert trace.synthetic
    assert trace.name == "synthetic:coder"
    assert 60 < len(trace) < 240


def test_generate_writes_a_burst_and_prints_its_figures(tmp_path, capsys):
    out = tmp_path / "t.jsonl"
    options = ["--workload", "hot_class", "--rate-scale", "0.2"]
    assert main(["trace", "generate", str(out), *options]) == 0
    assert "requests are of hot classes" in capsys.readouterr().out
    assert read_trace(out).arrival_s[-1] == pytest.approx(180, abs=10)


@pytest.mark.parametrize("workload", ["api", "hot_class"])
def test_generate_makes_the_trace_that_replay_makes_of_the_same_options(workload, tmp_path, capsys):
    out = tmp_path / "t.jsonl"
    options = ["--workload", workload, "--duration", "50", "--seed", "3", "--rate-scale", "0.5"]
    assert main(["trace", "generate", str(out), *options]) == 0
    parser = argparse.ArgumentParser()
    add_trace_options(parser)
    parsed = parser.parse_args(options)
    write_trace(trace_at(parsed)(rate_scale_of(parsed)), tmp_path / "replayed")
    assert out.read_bytes() == (tmp_path / "replayed").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["validate", MOONCAKE, "--limit", "-1"], "--limit must be at least 0, got -1"),
        (["info", "nowhere"], "No such file or directory: 'nowhere'"),
        (["convert", MOONCAKE, "out", "--salt-file", "s"], "--salt-file goes with --from openai only"),
        (["convert", MOONCAKE, "out", "--block-size", "8"], "--block-size goes with --from openai only"),
        (
            ["convert", MOONCAKE, "out", "--from", "openai", "--seed", "1"],
            "--seed does not go with --from openai",
        ),
        (
            ["convert", MOONCAKE, "out", "--from", "openai", "--salt-file", MOONCAKE],
            "hexadecimal digits expected",
        ),
        (["convert", MOONCAKE, "out", "--from", "openai"], "mooncake.jsonl:1: no messages, prompt or input"),
        (["convert", MOONCAKE, "out", "--from", "azure"], "mooncake.jsonl:1: 3 cells expected"),
        (
            ["convert", MOONCAKE, "out", "--hash-block-tokens", "0"],
            "hash_block_tokens must lie in 1..16384, got 0",
        ),
        (["generate", "out", "--duration", "0"], "duration_s must be finite and above 0, got 0"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["trace", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mulsched: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_log_with_text_is_told_how_to_become_a_trace(log, capsys):
    assert main(["trace", "info", log]) == 2
    assert "converted by mulsched trace convert --from openai" in capsys.readouterr().err
