"""What a real engine did: when each request of a run came, was scheduled, began and ended."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mulsched.errors import ProfileError

__all__ = ["RequestTimes", "read_request_times"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_COUNTS = ("input_toks", "output_toks")
_TIMES = ("arrival_time", "queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts")


@dataclass(frozen=True, slots=True, eq=False)
class RequestTimes:
    """The n requests of a run in the order of their arrival, times in seconds after the first one's.

    ``arrival_s`` (n,): when the server took the request. ``scheduled_s`` (n,): when the engine first put it
    into a step. ``first_token_s``, ``finish_s`` (n,): when its first and its last token were made.
    ``prompt_tokens``, ``output_tokens`` (n,), at least 1.
    Raises ProfileError unless there is a request and all columns are of one length and in these orders.
    """

    name: str
    arrival_s: Floats
    scheduled_s: Floats
    first_token_s: Floats
    finish_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints

    def __post_init__(self) -> None:
        n = len(self.arrival_s)
        columns = (
            self.scheduled_s,
            self.first_token_s,
            self.finish_s,
            self.prompt_tokens,
            self.output_tokens,
        )
        if n == 0 or any(len(column) != n for column in columns):
            raise ProfileError(
                f"{self.name}: columns must have one length above 0, got {n} and {[len(c) for c in columns]}"
            )
        if not all(np.isfinite(column).all() for column in (self.arrival_s, *columns)):
            raise ProfileError(f"{self.name}: times must be finite")
        if (np.diff(self.arrival_s) < 0).any():
            raise ProfileError(f"{self.name}: requests must be in the order of their arrival")
        in_order = (self.arrival_s <= self.scheduled_s) & (self.scheduled_s < self.first_token_s)
        in_order &= (self.first_token_s < self.finish_s) | (self.output_tokens == 1)
        if not in_order.all():
            raise ProfileError(
                f"{self.name}: request {int(in_order.argmin())} must arrive, be scheduled, begin and end in "
                "this order, and take time"
            )
        for tokens in (self.prompt_tokens, self.output_tokens):
            if tokens.min() < 1:
                raise ProfileError(f"{self.name}: request {int(tokens.argmin())} has no prompt or no output")

    @property
    def ttft_s(self) -> Floats:
        """Time to first token, (n,) seconds."""
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> Floats:
        """Time per output token after the first, (n,) seconds; NaN for requests of one token."""
        return time_per_token(self.first_token_s, self.finish_s, self.output_tokens)


def time_per_token(first_token_s: Floats, finish_s: Floats, output_tokens: Ints) -> Floats:
    """Return seconds per output token after the first, NaN where there is only one."""
    after = np.where(output_tokens > 1, output_tokens - 1.0, np.nan)
    tpot: Floats = (finish_s - first_token_s) / after
    return tpot


def read_request_times(path: str | Path) -> RequestTimes:
    """Read a file of a vLLM run: a JSON object a line with input_toks, output_toks, arrival_time, queued_ts,
    scheduled_ts, first_token_ts, last_token_ts (seconds).

    ``arrival_time`` is of the wall clock, the others of the engine's monotonic one. The clocks are aligned by
    the smallest ``queued_ts - arrival_time`` of the file. The engine stamps ``queued_ts`` when it takes new
    requests between two steps, so it is no arrival: a simulation from it would not wait for the step that was
    under way.

    Raises ProfileError (file and line), FileNotFoundError.
    """
    file = Path(path)
    rows = []
    with file.open() as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                rows.append(_row(line, f"{file.name}:{number}"))
    if not rows:
        raise ProfileError(f"{file.name}: no requests")
    rows.sort(key=lambda row: row[2])
    columns = np.array(rows)
    arrival, queued = columns[:, 2], columns[:, 3]
    # on the engine's clock, from the first arrival; doubles of wall-clock size keep 0.2 microseconds
    since = arrival - arrival[0]
    start = float((queued - since).min())
    return RequestTimes(
        file.stem,
        arrival_s=since,
        scheduled_s=columns[:, 4] - start,
        first_token_s=columns[:, 5] - start,
        finish_s=columns[:, 6] - start,
        prompt_tokens=columns[:, 0].astype(np.int64),
        output_tokens=columns[:, 1].astype(np.int64),
    )


def _row(line: str, where: str) -> list[float]:
    try:
        row = json.loads(line)
        values = [row[name] for name in (*_COUNTS, *_TIMES)]
    except json.JSONDecodeError as error:
        raise ProfileError(f"{where}: JSON expected: {error}") from None
    except (KeyError, TypeError):
        raise ProfileError(f"{where}: an object with {', '.join((*_COUNTS, *_TIMES))} expected") from None
    for name, value in zip(_COUNTS, values, strict=False):
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**48:
            raise ProfileError(f"{where}: {name} must be a number of tokens, at least 1, got {value!r}")
    times = values[len(_COUNTS) :]
    for name, value in zip(_TIMES, times, strict=True):
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise ProfileError(f"{where}: {name} must be a finite number of seconds, got {value!r}")
    if times[1:] != sorted(times[1:]):
        raise ProfileError(f"{where}: {', '.join(_TIMES[1:])} must not decrease, got {times[1:]}")
    return values
