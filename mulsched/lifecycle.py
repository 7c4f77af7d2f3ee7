"""Requests' lives as hosts deliver them: late, twice, out of order, or never.

A :class:`~mulsched.router.Router` is strict: an unknown or repeated signal raises, so that bugs show. Hosts
cannot always be strict. A completion may overtake its reservation, a callback run twice, a client vanish, a
retry reuse its id, and some hosts (Ray Serve, LiteLLM) never say when the first token came.
:class:`Lifecycle` stands between such a host and its router; every signal leaves the bookings right, and
what was odd is counted.

Without a first-token signal a request's new tokens would stay in the queue term until it ends, many times
too long. They are released by an estimate instead: engines prefill in the order of arrival, so a request's
prefill is presumed done ``new_prefill_tokens / prefill_tokens_per_s`` after the one before it on the same
instance was, or after its dispatch if none was waiting. An end that comes earlier corrects the estimate: all
that was dispatched there before it must have been prefilled too. What the estimate costs is measured in
docs/lifecycle-results.md.
"""

import heapq
import math
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from mulsched.block_keys import Tokens
from mulsched.decision import Decision
from mulsched.errors import InvalidType, UnknownRequest
from mulsched.load import check_now
from mulsched.policies._parameters import at_least
from mulsched.router import Router
from mulsched.types import Keys, Namespace

__all__ = ["Lifecycle", "LifecycleCounts"]

Signal = Literal["first_token", "finish", "cancel"]


@dataclass(slots=True)
class LifecycleCounts:
    """What was odd so far, by kind.

    ``early``: signals that came before their reservation, and were applied to it. ``repeated``: signals that
    said nothing new, and ends of unknown requests that no reservation followed. ``stale``: signals of an
    earlier attempt on another instance. ``retried``: reservations of an id that was still booked.
    ``presumed``: first tokens by the estimate; ``implied``: those that a later request's end proved.
    ``expired``: requests whose end never came.
    """

    early: int = 0
    repeated: int = 0
    stale: int = 0
    retried: int = 0
    presumed: int = 0
    implied: int = 0
    expired: int = 0


@dataclass(slots=True)
class _Life:
    instance: str
    new_prefill_tokens: int
    reserved_s: float
    waiting: bool = True


@dataclass(slots=True)
class _PrefillQueue:
    """Requests of an instance whose prefill is not known to be done, in the order of dispatch.

    The first is presumed to run since ``since_s``. Requests that left otherwise stay until they are met.
    """

    requests: deque[tuple[Hashable, _Life]]
    since_s: float
    plan: int = 0  # number of the entry in the heap that counts


class Lifecycle:
    """Reserves instances for requests and takes their signals in whatever order they come.

    ``prefill_tokens_per_s``: None if the host reports first tokens; else the rate by which they are
    estimated (see the module's docstring). ``expire_after_s``: requests whose end has not come by then are
    cancelled. ``remember_s``: how long a signal that came before its reservation is kept, and an ended id
    is known as such.

    ``now``, in seconds on any clock of the caller's, goes with every call; one that is earlier than the
    latest seen counts as that. Each call takes one lock and is O(1) amortised beside the router's part.
    Every reservation on the router should go through here. Raises InvalidType, InvalidArgument.
    """

    def __init__(
        self,
        router: Router,
        *,
        prefill_tokens_per_s: float | None = None,
        expire_after_s: float = 3600.0,
        remember_s: float = 600.0,
    ) -> None:
        if not isinstance(router, Router):
            raise InvalidType(f"router must be a Router, got {type(router).__name__}")
        self._router = router
        self._rate: float | None = None
        if prefill_tokens_per_s is not None:
            self._rate = at_least(prefill_tokens_per_s, "prefill_tokens_per_s", 1)
        self._expire_after_s = at_least(expire_after_s, "expire_after_s", 0)
        self._remember_s = at_least(remember_s, "remember_s", 0)
        self._lives: dict[Hashable, _Life] = {}  # the oldest reservation first
        self._early: dict[Hashable, tuple[float, set[Signal]]] = {}
        self._ended: dict[Hashable, float] = {}
        self._queues: dict[str, _PrefillQueue] = {}
        self._due: list[tuple[float, int, str]] = []  # time, plan, instance: those not outdated count
        self._plans = 0
        self._now = -math.inf
        self._lock = threading.RLock()
        self.counts = LifecycleCounts()

    @property
    def router(self) -> Router:
        """The router that decides."""
        return self._router

    def __len__(self) -> int:
        """Return how many requests are reserved and have not ended."""
        return len(self._lives)

    def instance(self, request_id: Hashable) -> str | None:
        """Return where a request is reserved, None if it is not."""
        with self._lock:
            life = self._lives.get(request_id)
            return None if life is None else life.instance

    # -- reservations ------------------------------------------------------------------------------

    def route(
        self,
        tokens: Tokens,
        *,
        request_id: Hashable,
        now: float,
        candidates: Iterable[str] | None = None,
        session: str | None = None,
        namespace: Namespace | None = None,
    ) -> Decision:
        """Select an instance for a prompt of token ids and reserve it, in one atomic step.

        A ``request_id`` that is still booked is a retry: the choice is made while the earlier attempt still
        counts as load where it was, then that one is cancelled. Signals that came already are applied at
        once. Arguments and errors as :meth:`Router.route`, without DuplicateRequest.
        """
        router = self._router
        options = {"candidates": candidates, "session": session, "namespace": namespace}
        return self._reserve(router.route, router.select, tokens, request_id, now, options)

    def route_text(
        self,
        text: str,
        *,
        request_id: Hashable,
        now: float,
        candidates: Iterable[str] | None = None,
        session: str | None = None,
        namespace: Namespace | None = None,
    ) -> Decision:
        """Do what ``route`` does for a prompt of text; see :meth:`Router.select_text`."""
        router = self._router
        options = {"candidates": candidates, "session": session, "namespace": namespace}
        return self._reserve(router.route_text, router.select_text, text, request_id, now, options)

    def route_keys(
        self,
        keys: Keys,
        *,
        prompt_tokens: int,
        request_id: Hashable,
        now: float,
        candidates: Iterable[str] | None = None,
        session: str | None = None,
    ) -> Decision:
        """Do what ``route`` does for a prompt whose block keys are known; see :meth:`Router.select_keys`."""
        router = self._router
        options = {"prompt_tokens": prompt_tokens, "candidates": candidates, "session": session}
        return self._reserve(router.route_keys, router.select_keys, keys, request_id, now, options)

    def _reserve(
        self,
        route: Callable[..., Decision],
        select: Callable[..., Decision],
        prompt: Any,
        request_id: Hashable,
        now: float,
        options: dict[str, Any],
    ) -> Decision:
        with self._lock:
            now = self._advance(now)
            earlier = self._life(request_id)
            if earlier is None:
                decision = route(prompt, request_id=request_id, now=now, **options)
            else:
                decision = select(prompt, now=now, **options)
                on_its_way = earlier.waiting and decision.instance == earlier.instance
                self._apply("cancel", request_id, earlier)
                self.counts.retried += 1
                if on_its_way:  # it must not count on its own prefix, which is not coming any more
                    decision = select(prompt, now=now, **{**options, "candidates": (earlier.instance,)})
                self._router.dispatch(decision, request_id=request_id, now=now)
            life = _Life(decision.instance, decision.new_prefill_tokens, now)
            self._lives[request_id] = life
            self._ended.pop(request_id, None)
            if self._rate is not None:
                self._enqueue(request_id, life, now)
            self._apply_early(request_id)
            return decision

    def _life(self, request_id: Hashable) -> _Life | None:
        try:
            return self._lives.get(request_id)
        except TypeError:
            raise InvalidType(f"request_id must be hashable, got {type(request_id).__name__}") from None

    def _apply_early(self, request_id: Hashable) -> None:
        _, signals = self._early.pop(request_id, (0.0, set()))
        self.counts.early += len(signals)
        for signal in ("first_token", "finish", "cancel"):
            life = self._lives.get(request_id)
            if signal in signals and life is not None:
                self._apply(signal, request_id, life)

    # -- signals -----------------------------------------------------------------------------------

    def first_token(self, request_id: Hashable, *, now: float, instance: str | None = None) -> bool:
        """Record a request's first token; return whether it was news.

        ``instance``: where the signal comes from, if the host knows; with it a signal from an attempt that
        was retried elsewhere is told apart. Raises InvalidType, InvalidArgument (``now``).
        """
        return self._hear("first_token", request_id, now, instance)

    def finish(self, request_id: Hashable, *, now: float, instance: str | None = None) -> bool:
        """Record a request's end; return whether it was news. Arguments as ``first_token``."""
        return self._hear("finish", request_id, now, instance)

    def cancel(self, request_id: Hashable, *, now: float, instance: str | None = None) -> bool:
        """Take a request off at any stage; return whether it was news. Arguments as ``first_token``."""
        return self._hear("cancel", request_id, now, instance)

    def _hear(self, signal: Signal, request_id: Hashable, now: float, instance: str | None) -> bool:
        with self._lock:
            now = self._advance(now)
            life = self._life(request_id)
            if life is None:
                self._remember(signal, request_id, now)
                return False
            if instance is not None and instance != life.instance:
                self.counts.stale += 1
                return False
            if signal == "first_token" and not life.waiting:
                self.counts.repeated += 1
                return False
            return self._apply(signal, request_id, life)

    def _remember(self, signal: Signal, request_id: Hashable, now: float) -> None:
        """Keep a signal of an unknown request, unless it has ended before."""
        if request_id in self._ended:
            self.counts.repeated += 1
            return
        _, signals = self._early.setdefault(request_id, (now, set()))
        if signal in signals:
            self.counts.repeated += 1
        signals.add(signal)

    def _apply(self, signal: Signal, request_id: Hashable, life: _Life) -> bool:
        if self._rate is not None and life.waiting:
            if signal != "cancel":
                self._release_up_to(life)
            elif self._queues[life.instance].requests[0][1] is life:
                self._next_prefill(life.instance)
        if signal == "first_token":
            return self._first_token(request_id, life)
        return self._end(signal, request_id, life)

    def _first_token(self, request_id: Hashable, life: _Life) -> bool:
        life.waiting = False
        try:
            self._router.first_token(request_id)
        except UnknownRequest:  # its instance was removed behind our back
            self._lives.pop(request_id, None)
            return False
        return True

    def _end(self, signal: Signal, request_id: Hashable, life: _Life) -> bool:
        life.waiting = False
        del self._lives[request_id]
        self._ended.pop(request_id, None)
        self._ended[request_id] = self._now
        try:
            (self._router.finish if signal == "finish" else self._router.cancel)(request_id)
        except UnknownRequest:
            return False
        return True

    def remove_instance(self, instance: str) -> list[Hashable]:
        """Remove an instance from the router; return the ids of the requests that were there.

        Their late signals are then ignored, and a reservation under the same id is a new one.
        Raises UnknownInstance.
        """
        with self._lock:
            lost = self._router.remove_instance(instance)
            for request_id in lost:
                life = self._lives.pop(request_id, None)
                if life is not None:
                    life.waiting = False
                    self._ended[request_id] = self._now
            self._queues.pop(instance, None)
            return lost

    # -- time --------------------------------------------------------------------------------------

    def advance(self, now: float) -> None:
        """Let time pass: presume first tokens, cancel expired requests, forget what is old enough.

        Every other call does this too; an idle host may call it so that nothing lingers.
        Raises InvalidType, InvalidArgument.
        """
        with self._lock:
            self._advance(now)

    def _advance(self, now: float) -> float:
        if now is None:
            raise InvalidType("now must be a number of seconds, got None")
        check_now(now)
        now = self._now = max(self._now, float(now))
        while self._due and self._due[0][0] <= now:
            _, plan, instance = heapq.heappop(self._due)
            queue = self._queues.get(instance)
            if queue is not None and queue.plan == plan:
                self._release_due(instance, queue, now)
        while self._lives:
            request_id, life = next(iter(self._lives.items()))
            if now - life.reserved_s <= self._expire_after_s:
                break
            self._end("cancel", request_id, life)
            self.counts.expired += 1
        while self._ended and now - next(iter(self._ended.values())) > self._remember_s:
            del self._ended[next(iter(self._ended))]
        while self._early and now - next(iter(self._early.values()))[0] > self._remember_s:
            _, signals = self._early.pop(next(iter(self._early)))
            self.counts.repeated += len(signals)
        return now

    # -- first tokens by estimate ------------------------------------------------------------------

    def _enqueue(self, request_id: Hashable, life: _Life, now: float) -> None:
        queue = self._queues.setdefault(life.instance, _PrefillQueue(deque(), now))
        self._drop_gone(queue)
        if not queue.requests:
            queue.since_s = now
        queue.requests.append((request_id, life))
        if len(queue.requests) == 1:
            self._plan(life.instance, queue)

    @staticmethod
    def _drop_gone(queue: _PrefillQueue) -> None:
        while queue.requests and not queue.requests[0][1].waiting:
            queue.requests.popleft()

    def _due_s(self, queue: _PrefillQueue) -> float:
        assert self._rate is not None
        return queue.since_s + queue.requests[0][1].new_prefill_tokens / self._rate

    def _plan(self, instance: str, queue: _PrefillQueue) -> None:
        self._plans += 1
        queue.plan = self._plans
        heapq.heappush(self._due, (self._due_s(queue), queue.plan, instance))

    def _release_due(self, instance: str, queue: _PrefillQueue, now: float) -> None:
        self._drop_gone(queue)
        while queue.requests and self._due_s(queue) <= now:
            queue.since_s = self._due_s(queue)
            request_id, life = queue.requests.popleft()
            self._first_token(request_id, life)
            self.counts.presumed += 1
            self._drop_gone(queue)
        if queue.requests:
            self._plan(instance, queue)

    def _release_up_to(self, life: _Life) -> None:
        """Release what an instance must have prefilled before this request, which it has."""
        queue = self._queues[life.instance]
        while queue.requests[0][1] is not life:
            request_id, other = queue.requests.popleft()
            if other.waiting:
                self._first_token(request_id, other)
                self.counts.implied += 1
        self._next_prefill(life.instance)

    def _next_prefill(self, instance: str) -> None:
        """Take the first prefill of an instance off; the next one starts now."""
        queue = self._queues[instance]
        queue.requests.popleft()
        self._drop_gone(queue)
        queue.since_s = self._now
        if queue.requests:
            self._plan(instance, queue)
