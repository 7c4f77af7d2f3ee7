"""Which endpoint a request goes to, and what its life tells the router. No protocol, no sockets."""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import numpy as np

from mulsched.decision import Decision
from mulsched.errors import InvalidArgument, InvalidType
from mulsched.lifecycle import Lifecycle
from mulsched.prompt_reader import PromptReader
from mulsched.prompt_routing import PromptKeys

__all__ = ["EndpointPicker", "Pick", "Refusal"]


@dataclass(frozen=True, slots=True)
class Pick:
    """The chosen endpoints, the best first. ``request_id`` is None if nothing was booked."""

    endpoints: tuple[str, ...]
    decision: Decision
    request_id: Hashable = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request goes nowhere: an HTTP status and a message for the client."""

    status: int
    message: str


class EndpointPicker:
    """Picks endpoints for OpenAI-style requests and books them; instances are named ``ip:port``.

    ``prompts``: reads them; the router's block size is its ``router_block_size``. ``clock``: seconds, such as
    ``time.monotonic``. ``fallbacks``: how many more endpoints to name, for proxies that try them in turn.
    ``max_in_flight``: how many requests per endpoint, on average over all, are let in at once; None for no
    limit.

    A request without a prompt that is understood goes where the load is least: with a body it is booked as
    one token, without one (a list of models) not at all. Raises InvalidType, InvalidArgument.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        *,
        prompts: PromptReader,
        clock: Callable[[], float],
        fallbacks: int = 0,
        max_in_flight: int | None = None,
    ) -> None:
        if not isinstance(lifecycle, Lifecycle):
            raise InvalidType(f"lifecycle must be a Lifecycle, got {type(lifecycle).__name__}")
        if lifecycle.router.block_size != prompts.router_block_size:
            raise InvalidArgument(
                f"the router's block_size must be that of prompts, {prompts.router_block_size}, "
                f"got {lifecycle.router.block_size}"
            )
        if fallbacks < 0:
            raise InvalidArgument(f"fallbacks must be at least 0, got {fallbacks}")
        if max_in_flight is not None and max_in_flight < 1:
            raise InvalidArgument(f"max_in_flight must be at least 1, got {max_in_flight}")
        self.lifecycle = lifecycle
        self.counts: Counter[str] = Counter()
        """Requests by what became of them: ``picked``, ``without_prompt``, ``moved``, ``finished``,
        ``cancelled``, and ``refused_STATUS``."""
        self._clock = clock
        self._prompts = prompts
        self._fallbacks = fallbacks
        self._max_in_flight = max_in_flight
        self._request_ids = itertools.count()  # a client's own could be another's

    async def pick(self, body: bytes | None, subset: Iterable[str] | None) -> Pick | Refusal:
        """Choose for a request with this body, among ``subset`` (None for all), and book it.

        Of ``subset`` only known endpoints count.
        """
        prompt = None if body is None else await self._read(body)
        router = self.lifecycle.router
        known = router.instances
        candidates = None if subset is None else tuple(set(subset).intersection(known))
        if not (known if candidates is None else candidates):
            return self.refuse(503, "no endpoint is ready")
        if self._max_in_flight is not None and len(self.lifecycle) >= self._max_in_flight * len(known):
            return self.refuse(429, "too many requests are in flight")
        if prompt is None:
            keys, length = self._prompts.unreadable
            return self._named(router.select_keys(keys, prompt_tokens=length, candidates=candidates))
        request_id = next(self._request_ids)
        decision = self.lifecycle.route_keys(
            prompt.keys,
            prompt_tokens=prompt.length,
            request_id=request_id,
            candidates=candidates,
            now=self._clock(),
        )
        self.counts["picked"] += 1
        if prompt is self._prompts.unreadable:
            self.counts["without_prompt"] += 1
        return self._named(decision, request_id)

    async def _read(self, body: bytes) -> PromptKeys:
        try:
            return await self._prompts.read(json.loads(body))
        except (ValueError, RecursionError):  # neither JSON nor UTF-8
            return self._prompts.unreadable

    def _named(self, decision: Decision, request_id: Hashable = None) -> Pick:
        first = decision.instance
        if not self._fallbacks:
            return Pick((first,), decision, request_id)
        order = np.argsort(decision.scores, kind="stable").tolist()  # what a filter excluded is last
        names = decision.columns.instances
        others = [names[at] for at in order if at != decision.position and not np.isnan(decision.scores[at])]
        return Pick((first, *others[: self._fallbacks]), decision, request_id)

    def refuse(self, status: int, message: str) -> Refusal:
        """Count and return a refusal."""
        self.counts[f"refused_{status}"] += 1
        return Refusal(status, message)

    def served_by(self, pick: Pick, endpoint: str) -> None:
        """Record who served a request: its booking moves there if that is another endpoint."""
        booked = self.lifecycle.instance(pick.request_id)
        if booked is None or endpoint == booked or endpoint not in self.lifecycle.router.instances:
            return
        request = pick.decision.columns.request
        self.counts["moved"] += 1
        self.lifecycle.route_keys(
            request.keys,
            prompt_tokens=request.prompt_tokens,
            request_id=pick.request_id,
            now=self._clock(),
            candidates=[endpoint],
        )

    def first_token(self, pick: Pick) -> None:
        """Record that a request's answer has begun."""
        if pick.request_id is not None:
            self.lifecycle.first_token(pick.request_id, now=self._clock())

    def finish(self, pick: Pick) -> None:
        """Record that a request's answer is complete."""
        if pick.request_id is not None:
            self.counts["finished"] += 1
            self.lifecycle.finish(pick.request_id, now=self._clock())

    def cancel(self, pick: Pick) -> None:
        """Record that a request failed or was given up."""
        if pick.request_id is not None:
            self.counts["cancelled"] += 1
            self.lifecycle.cancel(pick.request_id, now=self._clock())
