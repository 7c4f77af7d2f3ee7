"""Logs: a line of JSON an event, without prompts, answers, or keys."""

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

from mulsched.errors import MissingExtra

try:
    import msgspec
except ImportError as error:
    raise MissingExtra("the gateway needs msgspec: pip install 'mulsched[gateway]'") from error

__all__ = ["JsonLog", "Log", "no_log"]


class Log(Protocol):
    """Takes an event by name and its fields."""

    def __call__(self, event: str, **fields: Any) -> None: ...  # noqa: D102


def no_log(event: str, **fields: Any) -> None:
    """Log nothing."""


class JsonLog:
    """Writes each event as a line: ``time`` in seconds since 1970, ``event``, its fields.

    ``write`` takes the line's bytes; ``clock`` returns the time of day. JSON escapes line breaks, so that no
    value can pass for a line of its own. A log that cannot be written does not stop the gateway.
    """

    def __init__(self, write: Callable[[bytes], Any], clock: Callable[[], float]) -> None:
        self._write = write
        self._clock = clock
        self._encode = msgspec.json.Encoder().encode

    def __call__(self, event: str, **fields: Any) -> None:
        """Write the line."""
        line = self._encode({"time": round(self._clock(), 6), "event": event, **fields}) + b"\n"
        with contextlib.suppress(OSError):
            self._write(line)
