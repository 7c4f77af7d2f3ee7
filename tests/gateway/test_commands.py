"""The commands as a user runs them."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
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


@contextlib.contextmanager
def started(*arguments):
    command = [sys.executable, "-m", "mulsched", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with killed_after(60, process):
        try:
            yield process, re.search(r"http://[\d.:]+", process.stdout.readline())[0]
        finally:
            process.terminate()
            process.communicate()


def heard(process, wanted):
    """Read the log until all events, of an engine each, were there."""
    for line in process.stderr:
        told = json.loads(line)
        for address in (told.get("instance"), *told.get("instances", ())):
            wanted.discard((told["event"], address))
        if not wanted:
            return
    raise AssertionError(f"the log ends without {wanted}")


def answered(url):
    body = json.dumps({"model": "mock", "prompt": "hello", "max_tokens": 3}).encode()
    with urllib.request.urlopen(urllib.request.Request(url + "/v1/completions", body), timeout=30) as answer:
        return answer.status


def test_a_sighup_while_the_engines_are_first_checked_has_the_file_read_again(tmp_path):
    path = tmp_path / "engines"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        path.write_text(f"http://{address}")
        command = [sys.executable, "-m", "mulsched", "serve", "--port", "0", "--engines-file", str(path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        with killed_after(60, process):
            checked, _ = silent.accept()
            path.write_text("")
            process.send_signal(signal.SIGHUP)
            heard(process, {("engine_leaving", address), ("engine_removed", address)})
            checked.close()
            assert "over 0 engines" in process.stdout.readline()
            process.terminate()
            process.communicate()
    assert process.returncode == 0


def test_engines_that_are_processes_come_and_go_on_sighup(tmp_path):
    path = tmp_path / "engines"
    path.write_text("# none yet\n")
    engine = ("mock-engine", "--port", "0", "--speed", "1000")
    gateway = ("serve", "--port", "0", "--engines-file", str(path))
    with started(*engine) as (_, first), started(*engine) as (_, second), started(*gateway) as (process, url):
        with pytest.raises(urllib.error.HTTPError, match="503"):
            answered(url)
        one, other = (engine.removeprefix("http://") for engine in (first, second))
        path.write_text(first)
        process.send_signal(signal.SIGHUP)
        heard(process, {("engine_added", one), ("kv_tokens", one)})  # the last before it gets requests
        assert answered(url) == 200
        path.write_text(second)
        process.send_signal(signal.SIGHUP)
        heard(process, {("engine_added", other), ("kv_tokens", other), ("engine_removed", one)})
        assert answered(url) == 200
        with urllib.request.urlopen(f"{url}/instances", timeout=30) as answer:
            shown = json.loads(answer.read())
        assert [each["instance"] for each in shown["instances"]] == [other]
        assert [each["instance"] for each in shown["decisions"]] == [other, one]
