"""What a gateway remembers of its requests, for metrics, the live page and the log."""

from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from mulsched.decision import Decision
from mulsched.errors import MissingExtra
from mulsched.gateway.engine import Engine
from mulsched.gateway.logs import Log
from mulsched.record import Recorder

try:
    from prometheus_client import CollectorRegistry, Histogram
except ImportError as error:
    raise MissingExtra("the gateway needs prometheus-client: pip install 'mulsched[gateway]'") from error

__all__ = ["Records"]

_RECENT = 50
# Seconds: from a cached prompt on an idle engine to a long queue.
_FIRST_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_WHOLE_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Records:
    """Counts, times and the latest decisions. No prompt and no answer is in any of them.

    ``recorder`` is told too, under the ids of bookings, which no client chooses; the first failure to write
    ends it.
    """

    def __init__(
        self,
        engines: dict[str, Engine],
        registry: CollectorRegistry,
        log: Log,
        recorder: Recorder | None = None,
    ) -> None:
        self._engines = engines
        self._log = log
        self._recorder = recorder
        self.requests: Counter[tuple[str, str, int]] = Counter()
        """By path, outcome and status; 0 where none was sent."""
        self.recent: deque[tuple[float, str, Decision]] = deque(maxlen=_RECENT)
        """The latest decisions: when on the loop's clock, for which request, which."""
        self._first = Histogram(
            "mulsched_time_to_first_token_seconds", "From arrival to the first token of a stream.",
            buckets=_FIRST_S, registry=registry,
        )  # fmt: skip
        self._whole = Histogram(
            "mulsched_request_seconds", "From arrival to the end of the answer.",
            buckets=_WHOLE_S, registry=registry,
        )  # fmt: skip

    def decided(self, booking_id: str, request_id: str, decision: Decision, now: float) -> None:
        """Remember a decision; ``request_id``: as it is shown."""
        if self._recorder is not None:
            self._record(self._recorder.dispatched, decision, request_id=booking_id, now=now)
        self.recent.append((now, request_id, decision))
        counts = self._engines[decision.instance].counts
        counts["prompt_tokens"] += decision.columns.request.prompt_tokens
        counts["hit_tokens"] += decision.hit_tokens

    def first_token(self, booking_id: str, now: float) -> None:
        """Record a first token."""
        if self._recorder is not None:
            self._record(self._recorder.first_token, booking_id, now=now)

    def finished(self, booking_id: str, output_tokens: int | None, now: float) -> None:
        """Record the end of a whole answer."""
        if self._recorder is not None:
            self._record(self._recorder.finished, booking_id, now=now, output_tokens=output_tokens)

    def cancelled(self, booking_id: str, output_tokens: int | None, now: float) -> None:
        """Record that a request failed, was given up, or is about to be tried elsewhere."""
        if self._recorder is not None:
            self._record(self._recorder.cancelled, booking_id, now=now, output_tokens=output_tokens)

    def _record(self, write: Callable[..., None], *given: Any, **fields: Any) -> None:
        try:
            write(*given, **fields)
        except OSError as error:
            self._recorder = None
            self._log("record_failed", error=type(error).__name__)

    def refused(self, path: str, code: str, status: int) -> None:
        """Count a request that was refused at the door; ``path`` is one of the gateway's own."""
        self.requests[path, code, status] += 1

    def ended(
        self,
        *,
        path: str,
        request_id: str,
        decision: Decision | None,
        attempts: int,
        status: int,
        outcome: str,
        usage: tuple[int, int] | None,
        first_s: float | None,
        whole_s: float,
    ) -> None:
        """Count a request that ended, and log it."""
        self.requests[path, outcome, status] += 1
        if outcome == "finished":
            self._whole.observe(whole_s)
            if first_s is not None:
                self._first.observe(first_s)
        fields: dict[str, Any] = {
            "request_id": request_id,
            "path": path,
            "status": status,
            "outcome": outcome,
            "attempts": attempts,
            "first_token_s": None if first_s is None else round(first_s, 6),
            "duration_s": round(whole_s, 6),
        }
        if decision is not None:
            fields["instance"] = decision.instance
            fields["prompt"] = decision.columns.request.prompt_tokens
            fields["hit"] = decision.hit_tokens
            fields["score"] = decision.score
            if decision.alarm is not None:
                fields["alarm"] = str(decision.alarm)
        if usage is not None:
            fields["reported_prompt_tokens"], fields["reported_cached_tokens"] = usage
        self._log("request", **fields)
