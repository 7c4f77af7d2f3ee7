"""The commands as a user runs them."""

import re
import signal
import subprocess
import sys
import urllib.request

from bounded import killed_after

from mulsched.cli import main


def test_the_demo_compares_policies(capsys):
    assert main(["demo", "--duration", "0.5", "--policy", "round_robin", "--policy", "lmetric"]) == 0
    told = capsys.readouterr().out
    rows = [line.split() for line in told.splitlines() if line.startswith(("round_robin", "lmetric"))]
    assert [row[0] for row in rows] == ["round_robin", "lmetric"]
    assert all(float(cell) >= 0 for row in rows for cell in row[1:])
    assert re.search(r"^\d+ streamed requests to 4 engines", told, re.MULTILINE)


def test_the_demo_refuses_a_load_that_is_none(capsys):
    for arguments in (["--rate", "0"], ["--duration", "-1"], ["--duration", "0.001"]):
        assert main(["demo", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 3


def test_the_gateway_runs_logs_records_and_stops_on_sigterm(tmp_path):
    command = [sys.executable, "-m", "mulsched", "serve", "--port", "0", "--engine", "http://127.0.0.1:9"]
    command += ["--record", str(tmp_path / "record.jsonl")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with killed_after(60, process):
        url = process.stdout.readline().split("/v1")[0]
    with urllib.request.urlopen(f"{url}/instances", timeout=30) as answer:
        assert b'"state":"starting"' in answer.read()
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=30)
    assert process.returncode == 0
    assert '"event":"listening"' in log
    assert '"event":"stopped"' in log
    assert '"block_size":64,"units_per_token":4' in (tmp_path / "record.jsonl").read_text()
