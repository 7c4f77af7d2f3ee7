"""A routing logic for the router of vLLM's production-stack (the Python one, package ``vllm_router``).

::

    from vllm_router.app import app, initialize_all

    router = install(app)         # before the server starts
    initialize_all(app, args)
    router.take_over(app)         # in place of the routing logic that args name

That router loads no plugins, and shows a request's body only to subclasses of its own classes. Written for
its interface at 03953e36, which no package index has: tests run it in a stand-in of that request loop.
"""

import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from mulsched.adapters._bodies import BodyRouter
from mulsched.adapters.asgi import App, Message, Receive, Send, Watch
from mulsched.errors import LifecycleError, MissingExtra

try:
    from vllm_router.routers.routing_logic import PrefixAwareRouter
except ImportError as error:
    raise MissingExtra(
        "the production-stack adapter needs vllm_router from the repository vllm-project/production-stack: "
        "no package index has it, the vllm-router that pip finds is another project"
    ) from error

__all__ = ["LMetricRouter", "install"]

_ID = "mulsched.request_id"


def install(app: Any, *, clock: Callable[[], float] = time.monotonic, **options: Any) -> "LMetricRouter":
    """Add a middleware to the application that signals first tokens and ends; return the router.

    ``options``: keyword arguments of :class:`BodyRouter`. Raises LifecycleError if it was called before in
    this process: vllm_router makes one object of each class of routing logic.
    """
    bodies = BodyRouter(**options)
    router = LMetricRouter(bodies, clock)
    if router.bodies is not bodies:
        raise LifecycleError("install was called before: vllm_router has one router of a class in a process")
    app.add_middleware(_Signals, router=router, clock=clock)
    return router


class LMetricRouter(PrefixAwareRouter):  # type: ignore[misc]
    """Sends a request to the endpoint of the smallest score, and books it there in the same step.

    A failover asks again with the endpoints that are left: the booking moves. An endpoint that is not
    offered keeps its state for ``forget_after_s`` (the default is arbitrary), since a request hides endpoints
    that failed it or serve other models.
    """

    max_instance_failover_reroute_attempts = 0
    """How often a request that reached no engine is sent again; the request loop reads it here."""

    def __init__(self, bodies: BodyRouter, clock: Callable[[], float], forget_after_s: float = 600.0) -> None:
        # the parent's trie is not wanted: it grows without bound
        self.bodies = bodies
        self._clock = clock
        self._forget_after_s = forget_after_s
        self._seen: dict[str, float] = {}

    def take_over(self, app: Any) -> None:
        """Take the place of the application's routing logic, with the number of failovers set there."""
        name = "max_instance_failover_reroute_attempts"  # older versions have none
        self.max_instance_failover_reroute_attempts = getattr(app.state.router, name, 0)
        app.state.router = self

    async def route_request(
        self, endpoints: list[Any], engine_stats: Any, request_stats: Any, request: Any, request_json: Any
    ) -> str:
        """Return the URL of an endpoint. Raises NoEligibleInstance."""
        urls = [endpoint.url for endpoint in endpoints]
        now = self._clock()
        self._follow(urls, now)
        request_id = request.scope.setdefault("state", {}).setdefault(_ID, uuid.uuid4().hex)
        return self.bodies.reserve(request_json, request_id=request_id, now=now, candidates=urls)

    def _follow(self, urls: Iterable[str], now: float) -> None:
        self._seen.update(dict.fromkeys(urls, now))
        self._seen = {url: t for url, t in self._seen.items() if now - t <= self._forget_after_s}
        self.bodies.set_instances(self._seen)


class _Signals:
    def __init__(self, app: App, router: LMetricRouter, clock: Callable[[], float]) -> None:
        self._app = app
        self._lifecycle = router.bodies.lifecycle
        self._clock = clock

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        scope = {**scope, "state": {**scope.get("state", {}), _ID: request_id}}
        await Watch(send, self._lifecycle, request_id, self._clock).run(self._app, scope, receive)
