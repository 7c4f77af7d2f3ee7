"""A request router for Ray Serve and Ray Serve LLM.

::

    from ray.serve.config import RequestRouterConfig

    @serve.deployment(
        num_replicas=4,
        request_router_config=RequestRouterConfig(
            request_router_class="mulsched.adapters.ray_serve:LMetricRequestRouter",
            request_router_kwargs={"cache_tokens": 400_000},
        ),
    )
    class Engine: ...

Each process that has a handle to the deployment, such as the proxy of a node, has a router of its own and
sees its own requests only, unless ``shared=True`` lets one actor decide for all. Written for Ray 2.60, where
the interface is alpha.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mulsched.adapters._bodies import BodyRouter, End, as_body
from mulsched.errors import MissingExtra
from mulsched.prompt_routing import PromptKeys

try:
    from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

    from mulsched.adapters._ray_actor import RouterActor
except ImportError as error:
    raise MissingExtra("the Ray Serve adapter needs ray[serve]: pip install 'mulsched[ray]'") from error

__all__ = ["LMetricRequestRouter"]

_NOT_COMPUTED = ("tokenize", "detokenize")  # methods of Ray Serve LLM whose prompts no engine computes


class LMetricRequestRouter(RequestRouter):  # type: ignore[misc]
    """Sends a request to the replica of the smallest score, and books it there in the same step.

    ``request_router_kwargs`` are the arguments of ``initialize_state``. The prompt is the first argument of
    the call that is a text, a body as a mapping, or an object with ``messages``, ``prompt`` or ``input``;
    a call without one is placed by load alone, and so is one of ``tokenize`` or ``detokenize``. Ray tells the
    end of a request, never its first token. Of a request for which a replica is only picked
    (``choose_replica(_reserve=False)``, as in direct streaming of Ray Serve LLM) it tells nothing: such a one
    is not booked, and the load that it meets is the queues that replicas tell when asked.
    """

    def initialize_state(
        self,
        *,
        prefill_tokens_per_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        shared: bool = False,
        shared_timeout_s: float = 0.5,
        **options: Any,
    ) -> None:
        """Take the keyword arguments of :class:`BodyRouter`.

        ``prefill_tokens_per_s``: what an engine was measured to do; a wrong rate may cost more than none.
        ``shared``: decide and book in one actor for all processes with a handle to this deployment. Where it
        has not answered within ``shared_timeout_s`` (by default three times the p99 of 64 asked at once, see
        docs/adapters-results.md), the process decides by what it knows itself.
        """
        options["prefill_tokens_per_s"] = prefill_tokens_per_s
        self._clock = clock
        self._open: set[str] = set()
        self._sending: set[int] = set()  # identities of the pending requests that Ray itself will send
        self._numbers = itertools.count()
        self.bodies = BodyRouter(**options)
        self.shared: RouterActor | None = None
        if shared:
            name = f"{self._deployment_id.app_name}#{self._deployment_id.name}"
            self.shared = RouterActor(name, shared_timeout_s, clock, **options)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Add replicas that are new, forget those that are gone."""
        super().update_replicas(replicas)
        self._follow_replicas()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Forget a replica: what it had cached, and its requests, which Ray retries or fails."""
        super().on_replica_actor_died(replica_id)
        self._follow_replicas()

    def _follow_replicas(self) -> None:
        known = self.bodies.lifecycle.router.instances
        names = dict.fromkeys(replica_id.to_full_id_str() for replica_id in self.curr_replicas)
        self.bodies.set_instances(names)
        gone = [name for name in known if name not in names]
        if self.shared is not None and gone:
            self.shared.forget(gone)

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """Give a call an id of its own: calls made while one request is served share that request's id.

        Ray's queue keeps one pending call for each id, so it forgets all but the last of those that a
        deployment makes at once, and they wait for ever.
        """
        metadata = pending_request.metadata
        if not is_retry and metadata.internal_request_id in self._open:
            own = f"{metadata.internal_request_id}/{next(self._numbers)}"
            pending_request.metadata = metadata = replace(metadata, internal_request_id=own)
        self._open.add(metadata.internal_request_id)
        self._sending.add(id(pending_request))
        try:
            return await super()._choose_replica_for_request(pending_request, is_retry=is_retry)
        except BaseException:
            self._open.discard(metadata.internal_request_id)
            raise
        finally:
            self._sending.discard(id(pending_request))

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Reserve a replica for a request.

        Ray asks again while the replica turns out to be full: the reservation then moves, to one of those
        that are not known to be full if there are any.
        """
        if pending_request is None:  # nothing to book
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # these are all the candidates
        request_id = pending_request.metadata.internal_request_id
        prompt = self._read(pending_request)
        if id(pending_request) not in self._sending:
            return await self._pick(prompt, candidate_replicas)

        def on_done(future: Any) -> None:
            if future.cancelled():  # the caller went while the request waited for a replica
                self._end(("cancel", request_id, None))

        pending_request.future.add_done_callback(on_done)
        free = self.select_available_replicas(candidate_replicas) or candidate_replicas
        names = [replica.replica_id.to_full_id_str() for replica in free]
        chosen = None
        if self.shared is not None:
            chosen = await self.shared.reserve(prompt, request_id, names)
        # those that did not die while the actor was asked
        replicas = {replica_id.to_full_id_str(): r for replica_id, r in self.curr_replicas.items()}
        candidates = [name for name in names if name in replicas]
        if not candidates:  # Ray asks again
            return []
        if chosen is not None and chosen in candidates:
            candidates = [chosen]
        now = self._clock()
        name = self.bodies.reserve_keys(prompt, request_id=request_id, now=now, candidates=candidates)
        if self.shared is not None and name != chosen:
            self.shared.book(prompt, request_id, name)
        return [[replicas[name]]]

    def _read(self, pending_request: PendingRequest) -> PromptKeys:
        if pending_request.metadata.call_method in _NOT_COMPUTED:
            return self.bodies.read(None)
        arguments = [*pending_request.args, *pending_request.kwargs.values()]
        return self.bodies.read(next((body for body in map(as_body, arguments) if body is not None), None))

    async def _pick(
        self, prompt: PromptKeys, candidate_replicas: list[RunningReplica]
    ) -> list[list[RunningReplica]]:
        """Choose a replica for a request that others will send, by the queues that replicas tell now."""
        told = {
            replica.replica_id.to_full_id_str(): (replica, queue)
            for replica, queue in await self._probe_queue_lens(candidate_replicas, 0)
            if replica.replica_id in self.curr_replicas  # did not die meanwhile
        }
        if not told:  # Ray asks again
            return []
        # one that does not answer is no idle one
        told = {name: entry for name, entry in told.items() if entry[1] is not None} or told
        report = self.bodies.lifecycle.router.report_load
        for name in told:
            report(name, running=told[name][1] or 0, waiting=0)
        chosen = self.bodies.pick_keys(prompt, now=self._clock(), candidates=told)
        for name in told:  # it is old by the next decision
            report(name, running=0, waiting=0)
        return [[told[chosen][0]]]

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """End a request: it succeeded, failed, or the replica rejected it and Ray will choose again."""
        self._open.discard(internal_request_id)
        self._end(("finish", internal_request_id, replica_id.to_full_id_str()))

    def _end(self, end: End) -> None:
        self.bodies.end(end, now=self._clock())
        if self.shared is not None:
            self.shared.end(end)
