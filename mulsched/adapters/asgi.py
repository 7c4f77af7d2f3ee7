"""An ASGI middleware that chooses the instance, for proxies written as an ASGI application.

::

    app = LMetricMiddleware(proxy, instances=["http://10.0.0.1:8000", "http://10.0.0.2:8000"])

The application behind it forwards a request to ``scope["state"]["mulsched.instance"]``. No extra is needed.
"""

import json
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from mulsched.adapters._bodies import BodyRouter
from mulsched.lifecycle import Lifecycle

__all__ = ["INSTANCE", "LMetricMiddleware"]

INSTANCE = "mulsched.instance"

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class LMetricMiddleware:
    """Reserves an instance for each POST request, and signals its first token and its end.

    The first part of an answer's body counts as the first token: exact for streams, late for whole answers,
    whose prefill stays booked until they come. A status of 400 or more, an exception, and a client that goes
    away cancel the request. ``instances`` may change: :meth:`set_instances`. ``options``: keyword arguments
    of :class:`BodyRouter`.
    """

    def __init__(
        self,
        app: App,
        *,
        instances: Iterable[str] = (),
        clock: Callable[[], float] = time.monotonic,
        **options: Any,
    ) -> None:
        self._app = app
        self._clock = clock
        self.bodies = BodyRouter(**options)
        self.set_instances(instances)

    def set_instances(self, instances: Iterable[str]) -> None:
        """Add the instances that are new, forget with all their state those that are gone."""
        self.bodies.set_instances(instances)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve a connection; what is not a POST request is passed on unchanged."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        lifecycle, request_id = self.bodies.lifecycle, uuid.uuid4().hex
        parts, body = await _read(receive)
        if not lifecycle.router.instances:
            await _refuse(send)
            return
        instance = self.bodies.reserve(body, request_id=request_id, now=self._clock())

        async def replay() -> Message:
            return parts.pop(0) if parts else await receive()

        state = {**scope.get("state", {}), INSTANCE: instance}
        watch = Watch(send, lifecycle, request_id, self._clock)
        await watch.run(self._app, {**scope, "state": state}, replay)


class Watch:
    """Signals a request's first token and its end by the messages of its answer."""

    def __init__(self, send: Send, lifecycle: Lifecycle, request_id: str, clock: Callable[[], float]) -> None:
        self._send = send
        self._lifecycle = lifecycle
        self._request_id = request_id
        self._clock = clock
        self._good = self._begun = self._whole = False

    async def run(self, app: App, scope: Message, receive: Receive) -> None:
        """Run the application on the request. Raises what it raises."""
        try:
            await app(scope, receive, self._look)
        finally:
            self._signal(self._lifecycle.finish if self._whole else self._lifecycle.cancel)

    def _signal(self, signal: Callable[..., bool]) -> None:
        if self._lifecycle.instance(self._request_id) is not None:  # else never booked, or lost with it
            signal(self._request_id, now=self._clock())

    async def _look(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._good = message["status"] < 400
        elif self._good and not self._begun and message.get("body"):
            self._begun = True
            self._signal(self._lifecycle.first_token)
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._whole = self._good


async def _read(receive: Receive) -> tuple[list[Message], Any]:
    """Return the messages of a request, to be received again, and the JSON in them, None if it is none."""
    parts = [await receive()]
    while parts[-1]["type"] == "http.request" and parts[-1].get("more_body", False):
        parts.append(await receive())
    try:
        return parts, json.loads(b"".join(part.get("body", b"") for part in parts))
    except (ValueError, RecursionError):
        return parts, None


async def _refuse(send: Send) -> None:
    headers = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": b"no instance is known"})
