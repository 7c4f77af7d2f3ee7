"""Waiting for a process's lines, with an end."""

import threading
from contextlib import contextmanager


@contextmanager
def killed_after(seconds, process):
    """Kill the process if the block takes longer: whoever reads its output then reads its end."""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
