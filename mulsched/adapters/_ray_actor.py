"""The router that the processes of a Ray cluster share, as one of them sees it."""

import asyncio
import contextlib
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError
from ray.util.metrics import Counter

from mulsched.adapters._bodies import End
from mulsched.adapters._shared_router import SharedRouter
from mulsched.prompt_routing import PromptKeys

__all__ = ["RouterActor"]

_ENDS_WAIT_S = 0.01  # for a reservation to take them along; arbitrary, short beside a request
_PENDING_CALLS = 10_000  # of a process to an actor that does not answer; arbitrary


class RouterActor:
    """Asks a :class:`SharedRouter` in a named actor, which it starts where there is none.

    Ray starts the actor again where it dies, empty. ``local_decisions``: how often it gave no answer within
    ``timeout_s``, and the process decided alone; also a counter among Ray's metrics,
    ``mulsched_local_decisions``. While an answer is late nothing more is asked, only told. All calls must
    come from one event loop.
    """

    def __init__(self, name: str, timeout_s: float, clock: Callable[[], float], **options: Any) -> None:
        self._name = name
        self._timeout_s = timeout_s
        self._arguments = (clock, ray.actor.exit_actor)
        self._options = options
        self._actor: Any = None
        self._late: asyncio.Future[str] | None = None
        self._ends: list[End] = []
        self.local_decisions = 0
        self._counter = Counter(
            "mulsched_local_decisions", "Decisions without the shared router.", tag_keys=("router",)
        ).set_default_tags({"router": name})

    async def reserve(self, prompt: PromptKeys, request_id: Hashable, candidates: list[str]) -> str | None:
        """Return the replica that the actor reserved, None if it does not say."""
        if self._late is None or self._late.done():
            with contextlib.suppress(RayError):
                reference = self._connected().reserve.remote(prompt, request_id, candidates, self._take())
                answer: asyncio.Future[str] = asyncio.wrap_future(reference.future())
                answer.add_done_callback(self._on_answer)
                await asyncio.wait({answer}, timeout=self._timeout_s)
                if answer.done():
                    return answer.result()
                self._late = answer
        self.local_decisions += 1
        self._counter.inc()
        return None

    def book(self, prompt: PromptKeys, request_id: Hashable, replica: str) -> None:
        """Tell where a request went without the actor's advice or against it."""
        self._tell("reserve", prompt, request_id, [replica])

    def end(self, end: End) -> None:
        """Tell of a request's end, together with others."""
        self._ends.append(end)
        if len(self._ends) == 1:
            asyncio.get_running_loop().call_later(_ENDS_WAIT_S, self._send_ends)

    def forget(self, replicas: Iterable[str]) -> None:
        """Tell of replicas that are gone."""
        self._tell("forget", list(replicas))

    def _connected(self) -> Any:
        if self._actor is None:
            actor = ray.remote(SharedRouter).options(
                name=self._name,
                namespace="mulsched",
                get_if_exists=True,
                lifetime="detached",  # or it would die with the process that asked first
                max_restarts=-1,
                max_pending_calls=_PENDING_CALLS,
                num_cpus=0,
            )
            self._actor = actor.remote(*self._arguments, **self._options)
        return self._actor

    def _on_answer(self, answer: asyncio.Future[str]) -> None:
        if not answer.cancelled() and isinstance(answer.exception(), ActorDiedError):
            self._actor = None  # for good: the name is free

    def _take(self) -> list[End]:
        ends, self._ends = self._ends, []
        return ends

    def _send_ends(self) -> None:
        if self._ends:
            self._tell("end", self._take())

    def _tell(self, method: str, *arguments: Any) -> None:
        if self._actor is not None:
            with contextlib.suppress(RayError):  # what it misses expires
                getattr(self._actor, method).options(num_returns=0).remote(*arguments)
