"""The load table: what is queued and running on each instance, as row-aligned columns.

A request is *booked* by life-cycle calls::

    dispatch ──► first_token ──► finish        cancel() ends a booking at any stage;
    waiting +1   waiting -1      running -1    expire() ends those whose end was never heard of
    queued +new  running +1
                 queued -new

``queued_prefill_tokens`` is the sum of the new prefill tokens of the requests that wait, each as counted
when it was dispatched (LMetric, arXiv 2603.15202, section 5.1).

Reported metrics are reconciled with the bookings by one rule. What an instance reports and the bookings do
not explain is *foreign*: traffic of other routers, or bookings lost in a restart. Foreign load is added to
the bookings until the next report::

    foreign_total   = max(0, reported running + waiting - booked running + waiting)     at the report
    foreign_waiting = min(foreign_total, max(0, reported waiting - booked waiting))
    foreign_running = foreign_total - foreign_waiting
    foreign_queued  = max(0, reported queued tokens - booked queued tokens)

Requests booked here and also seen by the engine are thus counted once, and a request dispatched after the
report adds to it at once. The total comes first because a request that we think waits may already run.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mulsched.errors import (
    DuplicateRequest,
    InvalidArgument,
    InvalidType,
    LifecycleError,
    UnknownRequest,
)
from mulsched.types import Keys

__all__ = ["LOAD_COLUMNS", "Booking", "LoadTable", "check_count"]

LOAD_COLUMNS = ("queued_prefill_tokens", "running", "waiting", "context_tokens", "last_chosen")
"""Names of the rows of ``LoadTable.table``."""

_QUEUED, _RUNNING, _WAITING = range(3)

# Sums of millions of such counts fit into int64. Arbitrary: a million prompts of a million tokens.
_COUNT_LIMIT = 2**40


@dataclass(slots=True, eq=False)
class Booking:
    """One dispatched request: where it is and what it was booked for."""

    row: int
    new_prefill_tokens: int
    prompt_tokens: int
    keys: Keys
    now: float | None
    waiting: bool = True


def check_now(now: Any) -> None:
    """Raise InvalidType or InvalidArgument unless ``now`` is None or a finite number."""
    if now is None:
        return
    if isinstance(now, bool) or not isinstance(now, int | float | np.integer | np.floating):
        raise InvalidType(f"now must be a number of seconds or None, got {type(now).__name__}")
    if not math.isfinite(now):
        raise InvalidArgument(f"now must be finite, got {now}")


def check_count(value: Any, name: str, *, least: int = 0) -> int:
    """Return a count of tokens or requests as int. Raises InvalidType, InvalidArgument (out of range)."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InvalidType(f"{name} must be an int, got {type(value).__name__}")
    if not least <= value < _COUNT_LIMIT:
        wanted = f"at least {least}" if value < least else "below 2**40"
        raise InvalidArgument(f"{name} must be {wanted}, got {value}")
    return int(value)


class LoadTable:
    """Load per row, booked by life-cycle calls and reconciled with reports.

    ``table``, shape ``(len(LOAD_COLUMNS), capacity)`` int64, holds the effective values: booked plus
    foreign. Rows beyond those added are zero; the array is replaced when it has to grow. Rows are the
    caller's; request ids are any hashable. Every call but ``add_row`` is O(1) unless it says otherwise.
    """

    __slots__ = (
        "_bookings",
        "_context",
        "_foreign",
        "_last_chosen",
        "_queued",
        "_running",
        "_waiting",
        "table",
    )

    def __init__(self) -> None:
        self._set_table(np.zeros((len(LOAD_COLUMNS), 8), dtype=np.int64))
        # effective minus booked, of the first three columns
        self._foreign = np.zeros((3, 8), dtype=np.int64)
        self._bookings: dict[Hashable, Booking] = {}

    def _set_table(self, table: NDArray[np.int64]) -> None:
        self.table = table
        # to add to one entry, which through the array would take twice as long
        self._queued, self._running, self._waiting, self._context, self._last_chosen = (
            memoryview(column) for column in table
        )

    def __len__(self) -> int:
        """Return how many requests are booked."""
        return len(self._bookings)

    def __contains__(self, request_id: object) -> bool:
        """Return whether the request is booked."""
        return request_id in self._bookings

    def add_row(self, row: int) -> None:
        """Start an empty row. O(1) amortised."""
        capacity = self.table.shape[1]
        if row >= capacity:
            grown = max(row + 1, 2 * capacity) - capacity
            self._set_table(np.pad(self.table, ((0, 0), (0, grown))))
            self._foreign = np.pad(self._foreign, ((0, 0), (0, grown)))
        self.table[:, row] = 0
        self._last_chosen[row] = -1
        self._foreign[:, row] = 0

    def remove_row(self, row: int) -> list[Hashable]:
        """Empty the row and return the ids of the requests that were booked on it. O(bookings)."""
        lost = [request_id for request_id, booking in self._bookings.items() if booking.row == row]
        for request_id in lost:
            del self._bookings[request_id]
        self.table[:, row] = 0
        self._foreign[:, row] = 0
        return lost

    def booking(self, request_id: Hashable) -> Booking:
        """Return a request's booking. Raises UnknownRequest."""
        try:
            return self._bookings[request_id]
        except (KeyError, TypeError):
            raise UnknownRequest(
                f"unknown request {request_id!r}: never dispatched, or finished, cancelled or expired"
            ) from None

    def check_new(self, request_id: Hashable) -> None:
        """Raise DuplicateRequest if the request is booked, InvalidType if the id is not hashable."""
        try:
            booked = request_id in self._bookings
        except TypeError:
            raise InvalidType(f"request_id must be hashable, got {type(request_id).__name__}") from None
        if booked:
            raise DuplicateRequest(f"request {request_id!r} is booked already")

    def dispatch(self, request_id: Hashable, booking: Booking, *, decision: int) -> None:
        """Book a request that ``check_new`` has let pass; ``decision`` is the number of its decision."""
        self._bookings[request_id] = booking
        row = booking.row
        self._queued[row] += booking.new_prefill_tokens
        self._waiting[row] += 1
        self._context[row] += booking.prompt_tokens
        self._last_chosen[row] = decision

    def first_token(self, request_id: Hashable) -> Booking:
        """Record that the request's prefill is done. Raises UnknownRequest, LifecycleError (second time)."""
        booking = self.booking(request_id)
        if not booking.waiting:
            raise LifecycleError(f"request {request_id!r} has had its first token")
        booking.waiting = False
        row = booking.row
        self._queued[row] -= booking.new_prefill_tokens
        self._waiting[row] -= 1
        self._running[row] += 1
        return booking

    def add_prefill(self, booking: Booking, tokens: int) -> None:
        """Raise the new prefill tokens of a request that waits."""
        booking.new_prefill_tokens += tokens
        self._queued[booking.row] += tokens

    def end(self, request_id: Hashable) -> Booking:
        """Take a request off the table, whatever its stage. Raises UnknownRequest."""
        booking = self.booking(request_id)
        del self._bookings[request_id]
        row = booking.row
        if booking.waiting:
            self._queued[row] -= booking.new_prefill_tokens
            self._waiting[row] -= 1
        else:
            self._running[row] -= 1
        self._context[row] -= booking.prompt_tokens
        return booking

    def older_than(self, *, now: float, older_than_s: float) -> list[Hashable]:
        """Return the ids of requests dispatched more than ``older_than_s`` before ``now``, oldest first.

        A booking that was made without a time is never among them. O(bookings).
        Raises InvalidType, InvalidArgument (not finite, negative age).
        """
        check_now(now)
        check_now(older_than_s)
        if now is None or older_than_s is None:
            raise InvalidType("expire needs now and older_than_s in seconds, got None")
        if older_than_s < 0:
            raise InvalidArgument(f"older_than_s must be at least 0, got {older_than_s}")
        return [
            request_id
            for request_id, booking in self._bookings.items()
            if booking.now is not None and now - booking.now > older_than_s
        ]

    def report(
        self,
        row: int,
        *,
        running: int | None = None,
        waiting: int | None = None,
        queued_prefill_tokens: int | None = None,
    ) -> None:
        """Reconcile the row with what its instance reports; None leaves that quantity as it was.

        ``running`` and ``waiting`` belong together. See the module's docstring for the rule.
        Raises InvalidType, InvalidArgument (outside 0..2**40-1; running without waiting or the reverse).
        """
        if (running is None) != (waiting is None):
            raise InvalidArgument(
                f"running and waiting are reported together, got running={running}, waiting={waiting}"
            )
        counts = None
        if running is not None:
            counts = (check_count(running, "running"), check_count(waiting, "waiting"))
        queued = None
        if queued_prefill_tokens is not None:
            queued = check_count(queued_prefill_tokens, "queued_prefill_tokens")
        booked = self.table[:3, row] - self._foreign[:, row]
        foreign = self._foreign[:, row].copy()
        if counts is not None:
            total = max(0, sum(counts) - int(booked[_RUNNING] + booked[_WAITING]))
            foreign[_WAITING] = min(total, max(0, counts[1] - int(booked[_WAITING])))
            foreign[_RUNNING] = total - foreign[_WAITING]
        if queued is not None:
            foreign[_QUEUED] = max(0, queued - int(booked[_QUEUED]))
        self._foreign[:, row] = foreign
        self.table[:3, row] = booked + foreign

    def load(self, row: int) -> dict[str, int]:
        """Return the row's effective values by column."""
        return {name: int(self.table[column, row]) for column, name in enumerate(LOAD_COLUMNS)}
