"""A log of what a live router decided, as JSON Lines: enough to replay the traffic, and no prompt text.

The format is in docs/record-format.md; ``mulsched.replay.read_trace`` reads it as one more trace format.

A prompt's block keys are written once: a line names an earlier decision and how many leading blocks it shares
with that one, and has the keys of the rest. A key tells of its block alone, so prompts are compared by a hash
of each block and all before it: if one is known, those before it are, and a binary search finds the deepest.
A table from that hash to a decision remembers up to ``known_keys`` of them and then starts anew, which costs
bytes and nothing else.
"""

import json
import threading
from base64 import b64encode
from collections.abc import Hashable
from itertools import repeat
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mulsched.block_keys import path_hashes
from mulsched.decision import Decision
from mulsched.errors import InvalidArgument, InvalidType
from mulsched.indicators import COLUMNS
from mulsched.load import check_count, check_now
from mulsched.types import Keys

__all__ = ["FORMAT", "VERSION", "Recorder"]

FORMAT = "mulsched-router-log"
VERSION = 1
"""The version that is written; every version up to it is read."""

_ENCODER = json.JSONEncoder(separators=(",", ":"))  # json.dumps makes one a call


class Recorder:
    """Writes decisions, first tokens and ends to a new file.

    It stands beside a router, however decisions are made, and nobody calls it but you: give it what ``route``
    or ``dispatch`` booked, and what the router or its :class:`~mulsched.Lifecycle` is told of later.
    ``block_size``: the router's. ``units_per_token``: how much of what the router counts is a token on
    average, 1 for token ids, ``prompt_routing.CHARACTERS_PER_TOKEN`` where the gateway or an adapter routes
    text; None if unknown: the log is then read as tokens, with a note. ``known_keys``: how many block keys
    are remembered, about 110 bytes each; the default, arbitrary, takes 29 MB.

    Lines are buffered: ``flush`` writes them, ``close`` too, and a process that is killed loses the buffer
    and tears at most the last line. Each call takes one lock, so threads may share a recorder.
    ``now``: seconds on one clock. ``request_id``: str and int are written as they are, others by ``repr``.

    Raises InvalidType, InvalidArgument, FileExistsError: a log is never overwritten.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        block_size: int = 16,
        units_per_token: int | None = None,
        known_keys: int = 2**18,
    ) -> None:
        self._block_size = check_count(block_size, "block_size", least=1)
        self._known_keys = check_count(known_keys, "known_keys", least=1)
        if self._block_size > 2**14:
            raise InvalidArgument(f"block_size must lie in 1..{2**14}, got {block_size}")
        units: dict[str, int] = {}
        if units_per_token is not None:
            units["units_per_token"] = check_count(units_per_token, "units_per_token", least=1)
            if self._block_size % units_per_token:
                raise InvalidArgument(
                    f"block_size must be a multiple of units_per_token, got {block_size} and "
                    f"{units_per_token}"
                )
        self._decisions = 0
        self._decision_of: dict[int, int] = {}
        self._lock = threading.Lock()
        header = {"format": FORMAT, "version": VERSION, "block_size": self._block_size, **units}
        header["columns"] = COLUMNS
        self._file = Path(path).open("x", encoding="utf-8", newline="\n")  # noqa: SIM115 closed by close()
        self._write(header)

    def dispatched(self, decision: Decision, *, now: float, request_id: Hashable = None) -> None:
        """Record a booked decision. O(blocks), most of it for those not seen yet.

        ``request_id``: None takes the decision's, which ``route`` sets. Raises InvalidType, InvalidArgument
        (no request id, another block size), ValueError (closed).
        """
        if not isinstance(decision, Decision):
            raise InvalidType(f"decision must be a Decision, got {type(decision).__name__}")
        request_id = decision.request_id if request_id is None else request_id
        if request_id is None:
            raise InvalidArgument("the decision has no request id: pass request_id")
        columns = decision.columns
        if columns.block_size != self._block_size:
            raise InvalidArgument(
                f"the decision's block_size must be {self._block_size}, as recorded, got {columns.block_size}"
            )
        line = {
            "event": "dispatched",
            "t": _seconds(now),
            "id": _name(request_id),
            "instance": decision.instance,
            "prompt_tokens": columns.request.prompt_tokens,
            "candidates": len(columns),
            "policy": decision.policy,
            "score": decision.score,
            "columns": columns.table[:, decision.position].tolist(),
        }
        if decision.alarm is not None:
            line["alarm"] = str(decision.alarm)
        keys = columns.request.keys
        paths = path_hashes(keys)
        with self._lock:
            shared, line["decision"] = self._known(paths), self._decisions
            if shared:
                line["shared"] = [self._decision_of[int(paths[shared - 1])], shared]
            if shared < len(keys):
                line["keys"] = b64encode(keys[shared:].astype("<u8", copy=False).tobytes()).decode()
            self._write(line)
            # only now: a line that could not be written is nothing to refer to
            self._remember(paths[shared:].tolist())

    def first_token(self, request_id: Hashable, *, now: float) -> None:
        """Record a request's first token. Raises InvalidType, InvalidArgument, ValueError (closed)."""
        line = {"event": "first_token", "t": _seconds(now), "id": _name(request_id)}
        with self._lock:
            self._write(line)

    def finished(self, request_id: Hashable, *, now: float, output_tokens: int | None = None) -> None:
        """Record a request's end; ``output_tokens``: of its answer, None if the host does not know.

        Without them a replay makes one token. Raises as ``first_token``.
        """
        self._end("finished", request_id, now, output_tokens)

    def cancelled(self, request_id: Hashable, *, now: float, output_tokens: int | None = None) -> None:
        """Record that a request was taken off: it failed, its client left, or it is tried elsewhere.

        A replay leaves it out if no first token was recorded, so that a retry counts once; else it makes
        ``output_tokens``, what the client got, or one. Raises as ``first_token``.
        """
        self._end("cancelled", request_id, now, output_tokens)

    def _end(self, event: str, request_id: Hashable, now: float, output_tokens: int | None) -> None:
        line: dict[str, Any] = {"event": event, "t": _seconds(now), "id": _name(request_id)}
        if output_tokens is not None:
            line["output_tokens"] = check_count(output_tokens, "output_tokens")
        with self._lock:
            self._write(line)

    def _known(self, paths: Keys) -> int:
        """Return how many leading blocks are in the table."""
        low, high = 0, len(paths)
        while low < high:
            middle = (low + high) // 2
            if int(paths[middle]) in self._decision_of:
                low = middle + 1
            else:
                high = middle
        return low

    def _remember(self, new: list[int]) -> None:
        if len(self._decision_of) + len(new) > self._known_keys:
            # a part would break the search: all of a prompt's blocks are known up to one, and none beyond
            self._decision_of.clear()
        else:
            self._decision_of.update(zip(new, repeat(self._decisions)))
        self._decisions += 1

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(_ENCODER.encode(line) + "\n")

    def flush(self) -> None:
        """Write what is buffered. Raises OSError, ValueError (closed)."""
        with self._lock:
            self._file.flush()

    def close(self) -> None:
        """Write what is buffered and close the file; again does nothing. Raises OSError."""
        with self._lock:
            self._file.close()

    def __enter__(self) -> "Recorder":
        """Return the recorder."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()


def _seconds(now: float) -> float:
    if now is None:
        raise InvalidType("now must be a number of seconds, got None")
    check_now(now)
    return float(now)


def _name(request_id: Hashable) -> str | int:
    if isinstance(request_id, str):
        return request_id
    if isinstance(request_id, int | np.integer) and not isinstance(request_id, bool):
        return int(request_id)
    return repr(request_id)
