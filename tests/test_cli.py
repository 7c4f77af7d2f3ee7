"""The command line, in this process and as a program."""

import csv
import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mulsched.cli import main
from mulsched.replay import synthetic_trace, write_trace

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
    assert "Noise floor: lmetric with other ties and seed moves mean TTFT" in out


def test_replay_without_a_trace_is_synthetic_and_says_so(capsys):
    assert (
        main(["replay", "--duration", "5", "--policy", "lmetric", "--no-noise-floor", "--processes", "1"])
        == 0
    )
    captured = capsys.readouterr()
    assert "achieved    target" in captured.out
    assert "synthetic:chat (synthetic)" in captured.out
    assert "Noise floor:" not in captured.out
    assert "1 of 1 replays" in captured.err  # the progress bar


def test_a_burst_is_replayed_by_name(capsys):
    arguments = ["replay", "--workload", "hot_class", "--rate-scale", "0.2", "--policy", "lmetric"]
    assert main([*arguments, "--processes", "1", "--no-noise-floor"]) == 0
    assert "synthetic:hot_class (synthetic)" in capsys.readouterr().out


def test_a_synthetic_trace_of_ones_own_has_no_targets_and_is_replayed(capsys, tmp_path):
    trace = dataclasses.replace(synthetic_trace("chat", duration_s=5, seed=1), name="mine")
    write_trace(trace, tmp_path / "mine.jsonl")
    assert main(["replay", str(tmp_path / "mine.jsonl"), "--policy", "lmetric", "--processes", "1"]) == 0
    out = capsys.readouterr().out
    assert "mine (synthetic)" in out
    assert "achieved" not in out


def test_json_and_csv_to_standard_output_are_all_there_is(capsys):
    arguments = ["replay", MOONCAKE, "--policy", "vllm", "--policy", "vllm", "--processes", "1"]
    assert main([*arguments, "--json", "-"]) == 0
    loaded = json.loads(capsys.readouterr().out)
    assert [r["label"] for r in loaded["results"]] == ["vllm", "vllm"]
    assert [r["role"] for r in loaded["results"]] == ["result", "noise"]
    assert loaded["settings"]["instances"] == 16
    assert main([*arguments, "--csv", "-"]) == 0
    assert len(list(csv.DictReader(io.StringIO(capsys.readouterr().out)))) == 2


def test_results_are_written_to_files(tmp_path, capsys):
    files = tmp_path / "r.json", tmp_path / "r.csv"
    arguments = ["replay", MOONCAKE, "--policy", "vllm", "--processes", "1"]
    assert main([*arguments, "--json", str(files[0]), "--csv", str(files[1])]) == 0
    assert json.loads(files[0].read_text())["settings"]["trace"] == "mooncake.jsonl"
    assert files[1].read_text().count("\n") == 3
    assert "TTFT" in capsys.readouterr().out


def replayed(capsys, *arguments):
    """The results of ``mulsched replay`` with these arguments, from its JSON."""
    assert main(["replay", *arguments, "--processes", "1", "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_rate_can_be_scaled(capsys):
    slow, fast = (
        replayed(capsys, MOONCAKE, "--policy", "vllm", *more)["results"][0]["figures"]["requests_per_s"]
        for more in ([], ["--rate-scale", "100"])
    )
    assert fast > slow


def test_a_policy_takes_parameters(capsys):
    loaded = replayed(
        capsys, MOONCAKE, "--policy", "linear:weight=0.5", "--policy", "linear", "--no-noise-floor"
    )
    assert [r["label"] for r in loaded["results"]] == ["linear(weight=0.5)", "linear"]


def test_a_swept_rate_is_that_of_rate_scale(capsys):
    swept = replayed(capsys, "--duration", "5", "--policy", "vllm", "--sweep", "rate=1,2", "--no-noise-floor")
    alone = replayed(capsys, "--duration", "5", "--policy", "vllm", "--rate-scale", "2", "--no-noise-floor")
    assert swept["settings"]["rate_scales"] == [1, 2]
    assert swept["results"][1]["figures"] == alone["results"][0]["figures"]


def test_a_sweep_of_the_rate_goes_up_to_saturation(capsys):
    arguments = [
        "--duration",
        "10",
        "--instances",
        "1",
        "--policy",
        "vllm",
        "--sweep",
        "rate",
        "--no-noise-floor",
    ]
    rates = replayed(capsys, *arguments)["settings"]["rate_scales"]
    assert len(rates) == 7
    assert rates == sorted(rates)


def test_tuning_objective_repeats_and_slo_reach_the_results(capsys):
    arguments = [
        "--tune",
        "linear:weight=0,1",
        "--objective",
        "ttft_p99",
        "--repeat",
        "2",
        "--slo",
        "ttft=0.5",
    ]
    loaded = replayed(capsys, MOONCAKE, "--policy", "vllm", *arguments)
    settings = loaded["settings"]
    assert (settings["objective"], settings["repeat"]) == ("ttft_p99", 2)
    assert settings["slo"] == {"ttft_s": 0.5, "tpot_s": None}
    assert [r["role"] for r in loaded["results"]] == ["result", "result", "trial", "trial"]
    assert loaded["results"][1]["tuned"] is True
    assert "goodput_per_s" in loaded["results"][0]["half_widths"]


def test_late_and_lost_state_and_split_pools_reach_the_results(capsys):
    arguments = [
        "--state-delay",
        "0.1",
        "--event-loss",
        "0.5",
        "--instances",
        "3",
        "--prefill-instances",
        "1",
    ]
    settings = replayed(capsys, MOONCAKE, "--policy", "vllm", *arguments)["settings"]
    assert (settings["state_delay_s"], settings["event_loss_ratio"]) == (0.1, 0.5)
    assert settings["disaggregation"]["prefill_instances"] == 1


def test_a_built_in_profile_goes_by_name(capsys):
    settings = replayed(capsys, MOONCAKE, "--policy", "vllm", "--profile", "qwen2-7b-h20")["settings"]
    assert settings["profile"] == settings["engine"]["name"] == "qwen2-7b-h20"


def test_engines_that_schedule_ahead_are_asked_for_and_named(capsys):
    settings = replayed(capsys, MOONCAKE, "--policy", "vllm", "--schedules-ahead")["settings"]
    assert settings["profile"] == "builtin-8b scheduling ahead"
    assert settings["engine"]["schedules_ahead"] is True


def test_results_that_are_kept_make_a_page_and_pictures(tmp_path, capsys):
    out, page = str(tmp_path / "out"), tmp_path / "page.html"
    arguments = ["replay", MOONCAKE, "--policy", "vllm", "--processes", "1", "--out", out]
    assert main(arguments) == 0
    assert f"Results are in {out}; a page of plots: mulsched report {out}" in capsys.readouterr().out
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
    assert settings["command"] == f"mulsched {' '.join(arguments)}"
    assert main(["report", out, "-o", str(page), "--png", str(tmp_path / "png")]) == 0
    assert page.read_text().startswith("<!doctype html>")
    assert (tmp_path / "png" / "ttft_cdf.png").exists()
    assert str(page) in capsys.readouterr().out


def test_results_that_are_kept_are_not_written_over(tmp_path, capsys):
    arguments = ["replay", MOONCAKE, "--policy", "vllm", "--processes", "1", "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert main(arguments) == 2
    assert "holds results.json already" in capsys.readouterr().err


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
        (["replay", MOONCAKE, "--workload", "chat"], "give a TRACE or a --workload"),
        (["replay", "--format", "azure"], "--format goes with a TRACE file only"),
        (["replay", "--max-prompt-tokens", "5"], "--max-prompt-tokens goes with a TRACE file only"),
        (["replay", "--policy", "linear:slope=1"], "has no parameter 'slope'"),
        (
            ["replay", "--sweep", "rate=1", "--sweep", "weight"],
            "one --sweep at a time, got rate=1 and weight",
        ),
        (["replay", "--sweep", "rate=1", "--rate-scale", "2"], "--rate-scale and --sweep rate both set"),
        (["replay", "--sweep", "rate", "--loop", "closed"], "no rate saturates"),
        (["replay", "--sweep", "rate=0,1"], "above 0"),
        (["replay", "--sweep", "temperature=1"], "none of lmetric, vllm"),
        (["replay", "--sweep", "weight", "--tune", "linear"], "sweep weight or tune it"),
        (["replay", "--tune", "lmetric"], "say which parameter of 'lmetric' to tune"),
        (["replay", "--objective", "ttft_mean"], "--objective goes with --tune"),
        (["replay", "--tune", "linear", "--objective", "goodput"], "needs an SLO"),
        (["replay", "--repeat", "0"], "repeat must be at least 1, got 0"),
        (["replay", "--repeat", "2", "--no-noise-floor"], "leave out --no-noise-floor"),
        (["replay", "--slo", "fast"], "expected an SLO like ttft=0.5,tpot=0.05"),
        (["replay", "--json", "-", "--csv", "-"], "both write to standard output"),
        (["replay", "--prefill-instances", "0"], "prefill_instances must be at least 1, got 0"),
        (["mock-engine", "--count", "0"], "--count must be at least 1, got 0"),
        (["mock-engine", "--speed", "0"], "speed must be above 0 and finite, got 0.0"),
        (["mock-engine", "--kv-blocks", "0"], "kv_blocks must be at least 1, got 0"),
        (["mock-engine", "--kv-replay", "tcp://127.0.0.1:5558"], "--kv-replay goes with --kv-events"),
        (["mock-engine", "--kv-events", "5557"], "expected an endpoint like tcp://127.0.0.1:5557, got 5557"),
        (["mock-engine", "--tokenizer", "nowhere.json"], "nowhere.json"),
        (["report", "nowhere"], "nowhere holds no results"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, arguments, message):
    assert main(arguments) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mulsched:")]
    assert len(error) == 1
    assert message in error[0]


@pytest.mark.parametrize("command", [["replay", "--rate", "2"], ["trace", "generate", "t", "--rate", "2"]])
def test_options_are_taken_by_their_whole_names(capsys, command):
    with pytest.raises(SystemExit):
        main(command)
    assert "unrecognized arguments: --rate" in capsys.readouterr().err


def test_info_tells_backend_and_policies(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "backend" in out
    assert "  lmetric\n" in out
    assert "  linear:weight=0.7\n" in out


def test_commands_load_without_any_extra():
    extras = [
        "rich",
        "jinja2",
        "matplotlib",
        "pyarrow",
        "scipy",
        "aiohttp",
        "msgspec",
        "prometheus_client",
        "zmq",
    ]
    blocked = f"import sys; sys.modules.update(dict.fromkeys({extras}))"
    program = f"{blocked}; from mulsched.cli import main; sys.exit(main(['info']))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("mulsched ")


def test_it_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "mulsched", "info"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("mulsched ")
