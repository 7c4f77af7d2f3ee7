"""What the tests of both Ray routers call with, and how they wait."""

import time


def until(condition, timeout_s=30):
    """Poll: Ray tells of ends and deaths from its own threads and processes, and gives nothing to wait for."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def chat(text):
    return {"messages": [{"role": "user", "content": text}]}
