"""``mulsched mock-engine``, as it is started."""

import json
import re
import signal
import subprocess
import sys
import urllib.request

import pytest
from bounded import killed_after


@pytest.fixture
def started():
    """Two engines on free ports; their first lines."""
    command = [
        sys.executable,
        "-m",
        "mulsched",
        "mock-engine",
        "--port",
        "0",
        "--count",
        "2",
        "--speed",
        "100",
    ]
    events = ["--kv-events", "tcp://127.0.0.1:*", "--kv-replay", "tcp://127.0.0.1:*", "--block-size", "32"]
    with subprocess.Popen([*command, *events], stdout=subprocess.PIPE, text=True) as process:
        try:
            with killed_after(60, process):
                lines = [process.stdout.readline() for _ in range(2)]
            yield process, lines
        finally:
            process.kill()


def fetched(url, body=None):
    with urllib.request.urlopen(url, data=body, timeout=30) as response:
        return response.read().decode()


def test_it_serves_as_many_engines_as_asked_for_until_it_is_told_to_stop(started):
    process, lines = started
    pattern = r"mock-(\d): (http://127\.0\.0\.1:\d+)/v1, model mock, KV events tcp://127\.0\.0\.1:\d+\n"
    engines = [re.fullmatch(pattern, line).groups() for line in lines]
    assert [number for number, _ in engines] == ["0", "1"]
    for _, url in engines:
        done = json.loads(fetched(f"{url}/v1/completions", b'{"prompt": "once", "max_tokens": 2}'))
        assert done["usage"]["completion_tokens"] == 2
        assert 'block_size="32"' in fetched(f"{url}/metrics")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0


def test_a_port_in_use_is_one_line_and_status_2(started):
    _, lines = started
    port = re.search(r":(\d+)/v1", lines[0])[1]
    command = [sys.executable, "-m", "mulsched", "mock-engine", "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "address already in use" in line


def test_without_the_extra_it_says_which():
    program = "import sys; sys.modules['zmq'] = None; from mulsched.cli import main; sys.exit(main(['mock-engine']))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'mulsched[gateway]'" in done.stderr
