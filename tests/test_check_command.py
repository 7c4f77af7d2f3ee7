"""``mulsched check``: exit status, every kind of input, table, JSON, plot, and the page that explains them."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from mulsched import Router
from mulsched.cli import main
from mulsched.record import Recorder
from mulsched.replay import Burst, HotClass, burst_trace, write_trace

DATA = Path(__file__).parent / "replay" / "data"
PAGE = Path(__file__).parent.parent / "docs" / "check.md"
FEW = ["--instances", "4", "--processes", "1"]


@pytest.fixture(scope="module")
def burst(tmp_path_factory):
    hot = HotClass(0.6, 16_384, 64, 100, start_s=10.0, end_s=20.0)
    path = tmp_path_factory.mktemp("burst") / "burst.jsonl"
    write_trace(burst_trace(Burst("api", (hot,), duration_s=30.0), seed=0, rate_per_s=4.0), path)
    return str(path)


@pytest.mark.parametrize("name", ["mooncake.jsonl", "bailian.jsonl", "agentic.jsonl", "azure.csv"])
def test_a_safe_trace_of_any_format_has_status_0(capsys, name):
    assert main(["check", str(DATA / name), "--window", "600", *FEW]) == 0
    assert ": safe." in capsys.readouterr().out


def test_a_trace_at_risk_has_status_1(capsys, burst):
    assert main(["check", burst, *FEW, "--window", "10"]) == 1
    assert ": at risk." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no such file"], "No such file"),
        ([str(DATA / "mooncake.jsonl"), "--window", "0"], "window_s must be finite and above 0, got 0.0"),
        ([str(DATA / "mooncake.jsonl"), "--instances", "0"], "instances must be at least 1, got 0"),
        (
            [str(DATA / "mooncake.jsonl"), "--plot", "margin.pdf"],
            "--plot must name a file that ends in .svg or",
        ),
        ([str(DATA / "mooncake.jsonl"), "--cache-blocks", "1"], "raise kv_blocks or limit prompts"),
        ([str(DATA / "mooncake.jsonl"), "--classes", "0"], "--classes must be in 1..16, got 0"),
        ([str(DATA / "mooncake.jsonl"), "--classes", "17"], "--classes must be in 1..16, got 17"),
        ([str(DATA / "mooncake.jsonl"), "--processes", "0"], "--processes must be at least 1, got 0"),
        ([__file__], "not a line of any known format"),
    ],
)
def test_bad_input_has_status_2_and_says_why(capsys, arguments, message):
    assert main(["check", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_option_has_status_2():
    with pytest.raises(SystemExit, match="2"):
        main(["check", "--no-such-option"])


def test_json_to_standard_output_is_all_there_is(capsys, burst):
    status = main(["check", burst, *FEW, "--json", "-"])
    loaded = json.loads(capsys.readouterr().out)
    assert (status, loaded["instances"]) == (int(loaded["at_risk"]), 4)
    assert {"share_ratio", "holders", "margin", "verdict"} <= loaded["windows"][0]["classes"][0].keys()


def two_hot_classes(path):
    hot = HotClass(0.3, 16_384, 64, 100, start_s=0.0, end_s=20.0)
    other = HotClass(0.3, 8_192, 64, 100, start_s=0.0, end_s=20.0)
    write_trace(burst_trace(Burst("api", (hot, other), duration_s=20.0), seed=0, rate_per_s=4.0), path)
    return str(path)


def test_more_classes_of_a_window_have_a_line_each_with_their_own_margins(capsys, tmp_path):
    trace, out = two_hot_classes(tmp_path / "two.jsonl"), tmp_path / "check.json"
    shown = {}
    for k in ("1", "2"):
        main(["check", trace, *FEW, "--window", "600", "--classes", k, "--json", str(out)])
        rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
        shown[k] = [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]
    _, second, *_ = json.loads(out.read_text())["windows"][0]["classes"]
    assert (len(shown["1"]), len(shown["2"])) == (1, 2)
    assert shown["2"][0] == shown["1"][0]
    assert shown["2"][1][:4] == ["", "", f"{second['prefix_tokens']:,}", str(second["requests"])]
    assert shown["2"][1][7:10] == [
        f"{second['margin']:+.3f}",
        f"{second['work_margin']:+.3f}",
        second["verdict"],
    ]


@pytest.mark.parametrize(("name", "start"), [("margin.png", b"\x89PNG"), ("margin.svg", b"<?xml")])
def test_the_margin_is_plotted(capsys, tmp_path, burst, name, start):
    main(["check", burst, *FEW, "--window", "10", "--plot", str(tmp_path / name)])
    assert (tmp_path / name).read_bytes().startswith(start)


def test_a_routers_log_is_checked_as_the_trace_that_it_is(capsys, tmp_path):
    router = Router()
    router.add_instance("a", cache_blocks=10_000)
    prefix = np.arange(1, 257, dtype=np.uint64)
    log = str(tmp_path / "router.jsonl")
    with Recorder(log) as recorder:
        for i in range(60):
            keys = prefix if i % 2 else prefix + np.uint64(1000 * (i + 1))
            decision = router.route_keys(keys, prompt_tokens=4100, request_id=i, now=float(i))
            recorder.dispatched(decision, now=float(i))
            recorder.finished(i, now=i + 0.5, output_tokens=10)
    assert main(["check", log, *FEW, "--json", "-"]) in (0, 1)
    (worst, *_) = json.loads(capsys.readouterr().out)["windows"][0]["classes"]
    assert (worst["requests"], worst["prefix_tokens"]) == (30, 4096)
    assert main(["replay", log, *FEW, "--policy", "lmetric", "--no-noise-floor"]) == 0
    assert "router.jsonl: 60 requests" in capsys.readouterr().out


def test_the_page_shows_what_its_command_prints(capsys):
    command, printed = re.search(
        r"```\n\$ (mulsched check [^\n]*)\n(.*?)```", PAGE.read_text(), re.DOTALL
    ).groups()
    assert main([*shlex.split(command)[1:], "--processes", "1"]) == 1
    out = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert out == printed.splitlines()
