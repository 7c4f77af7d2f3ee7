"""The command line, in this process and as a program."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mulsched.cli import main

MOONCAKE = str(Path(__file__).parent / "replay" / "data" / "mooncake.jsonl")


def test_replay_prints_a_row_per_policy_the_notes_and_the_noise_floor(capsys):
    arguments = ["replay", MOONCAKE, "--instances", "2", "--policy", "lmetric", "--policy", "vllm"]
    assert main([*arguments, "--processes", "1"]) == 0
    out = capsys.readouterr().out
    assert "mooncake.jsonl: 3 requests, 2 instances x 26000 blocks, builtin-8b" in out
    assert [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")] == [
        "lmetric",
        "vllm",
    ]
    assert "Note: arrivals spread within timestamp ticks, seeded" in out
    assert "Noise floor: lmetric with other ties and seed moves ttft_mean" in out


def test_replay_without_a_trace_is_synthetic_and_says_so(capsys):
    assert (
        main(["replay", "--duration", "5", "--policy", "lmetric", "--no-noise-floor", "--processes", "1"])
        == 0
    )
    captured = capsys.readouterr()
    assert "achieved    target" in captured.out
    assert "synthetic:chat (synthetic)" in captured.out
    assert "Noise floor:" not in captured.out
    assert "lmetric" in captured.err  # the progress bar


def test_json_and_csv_to_standard_output_are_all_there_is(capsys):
    arguments = ["replay", MOONCAKE, "--policy", "vllm", "--policy", "vllm", "--processes", "1"]
    assert main([*arguments, "--json", "-"]) == 0
    loaded = json.loads(capsys.readouterr().out)
    assert [r["policy"] for r in loaded["results"]] == ["vllm"]
    assert loaded["results"][0]["instances"] == 16
    assert main([*arguments, "--csv", "-"]) == 0
    assert len(list(csv.DictReader(io.StringIO(capsys.readouterr().out)))) == 1


def test_results_are_written_to_files(tmp_path, capsys):
    files = tmp_path / "r.json", tmp_path / "r.csv"
    arguments = ["replay", MOONCAKE, "--policy", "vllm", "--processes", "1"]
    assert main([*arguments, "--json", str(files[0]), "--csv", str(files[1])]) == 0
    assert json.loads(files[0].read_text())["results"][0]["trace"] == "mooncake.jsonl"
    assert files[1].read_text().count("\n") == 2
    assert "TTFT" in capsys.readouterr().out


def test_the_rate_can_be_scaled(capsys):
    main(["replay", MOONCAKE, "--policy", "vllm", "--processes", "1", "--json", "-"])
    slow = json.loads(capsys.readouterr().out)["results"][0]["requests_per_s"]
    main(["replay", MOONCAKE, "--policy", "vllm", "--processes", "1", "--json", "-", "--rate-scale", "100"])
    assert json.loads(capsys.readouterr().out)["results"][0]["requests_per_s"] > slow


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["replay", "nowhere.jsonl"], "No such file or directory: 'nowhere.jsonl'"),
        (["replay", "--policy", "best"], "unknown policy 'best', expected one of aibrix"),
        (["replay", MOONCAKE, "--format", "azure"], "mooncake.jsonl:1: "),
        (["replay", MOONCAKE, "--rate-scale", "nan"], "finite number above 0, got nan"),
        (["replay", MOONCAKE, "--instances", "0", "--processes", "1"], "at least 1, got 0"),
        (["replay", MOONCAKE, "--processes", "0"], "--processes must be at least 1, got 0"),
        (["replay", MOONCAKE, "--kv-blocks", "5", "--processes", "1"], "raise kv_blocks"),
        (["replay", MOONCAKE, "--duration", "-5"], "no request is left"),
        (["replay", "--profile", MOONCAKE], "mooncake.jsonl:1: columns kind"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, arguments, message):
    assert main(arguments) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mulsched:")]
    assert len(error) == 1
    assert message in error[0]


def test_info_tells_backend_and_policies(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "backend" in out
    assert "lmetric" in out


def test_it_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "mulsched", "info"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("mulsched ")
