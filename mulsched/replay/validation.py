"""What is wrong with a trace file, all of it and not only the first thing."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mulsched.errors import TraceError
from mulsched.replay.readers import read_trace
from mulsched.replay.trace import Trace, dense_ids

__all__ = ["unchained", "validate_trace"]


def validate_trace(path: str | Path, *, format: str | None = None) -> tuple[list[str], Trace | None]:
    """Return every problem of a trace file, and the trace of what is right in it; None if there is none.

    The problems are those for which :func:`read_trace` would raise, each with file and line, and requests
    whose block ids are not chained. O(blocks). Raises InvalidArgument (unknown format), OSError.
    """
    problems: list[str] = []
    try:
        trace = read_trace(path, format=format, bad_lines=problems)
    except TraceError as error:
        return [*problems, str(error)], None
    return [*problems, *unchained(trace)], trace


def unchained(trace: Trace) -> Iterator[str]:
    """Yield what is wrong with each request that has a block id after another one than before.

    An id stands for a block and all before it, so it always follows the same id. Where it does not, a replay
    would find prefixes cached that never were. O(blocks).
    """
    requests, bound, _ = dense_ids(trace, whole=False)
    parent = np.full(bound, -2)  # -1 for the first block of a prompt
    for i, ids in enumerate(requests):
        before = np.concatenate([[-1], ids])[:-1]
        new = parent[ids] == -2
        parent[ids[new]] = before[new]
        wrong = np.flatnonzero(parent[ids] != before)
        if len(wrong):
            block = int(trace.block_ids(i)[wrong[0]])
            yield f"{trace.name}: request {i}: block id {block} follows another id than before: not chained"
