"""One publisher's events, from its sockets to a router."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any

from mulsched.errors import InvalidArgument, InvalidEvents, InvalidType, MissingExtra, MulschedError
from mulsched.events.apply import apply_batch
from mulsched.events.batch import EventBatch
from mulsched.events.readable import Readable, read
from mulsched.events.sequence import Action, Clear, Deliver, Replay, SequenceTracker, State
from mulsched.events.vllm import decode_vllm
from mulsched.router import Router
from mulsched.types import CacheCleared

try:
    import zmq
    from zmq.utils.monitor import parse_monitor_message
except ImportError as error:
    raise MissingExtra("subscribing to KV events needs pyzmq: pip install 'mulsched[events]'") from error

__all__ = ["KvEventSubscriber"]

_END = (-1).to_bytes(8, "big", signed=True)
# Of messages that were applied already: an endless stream of them must not keep live ones waiting.
_MAX_IDLE_ANSWERS = 1_000
# What is read in one turn of the event loop, and holds it up for about a millisecond; a turn costs as much as
# several messages.
_TURN_MESSAGES = 64
_TURN_BYTES = 256 * 1024


class KvEventSubscriber:
    """Keeps what a router knows of an instance's cache equal to what one publisher says.

    ``endpoint``, ``replay_endpoint``: the publisher's sockets, ``tcp://HOST:PORT``; without the second every
    lost message costs what was known. ``topic``: only messages whose topic begins so. ``decode``: from a
    message's payload to a batch, such as ``decode_vllm``, ``decode_sglang``. An engine with several
    data-parallel ranks has a publisher for each, and each rank is an instance: one subscriber for each.
    ``max_message_bytes``: a longer message ends the connection, which is then made anew; the default is some
    two million tokens. ``replay_timeout_s``: how long to wait for each message of an answer.
    ``queue_messages``: how many messages may wait here before ZeroMQ drops some, which shows as a gap. All
    defaults are arbitrary.

    A message is applied on the event loop in one piece, about a microsecond a block. Nothing that a
    publisher sends ends :meth:`run`. Use as ``async with`` or call :meth:`run` in a task of your own.

    Raises InvalidType, InvalidArgument, UnknownInstance.
    """

    def __init__(
        self,
        router: Router,
        instance: str,
        endpoint: str,
        *,
        replay_endpoint: str | None = None,
        topic: str = "",
        decode: Callable[[bytes, str], EventBatch] = decode_vllm,
        max_message_bytes: int = 8 * 2**20,
        replay_timeout_s: float = 5.0,
        queue_messages: int = 10_000,
        context: "zmq.Context[Any] | None" = None,
    ) -> None:
        for name, value in (
            ("endpoint", endpoint),
            ("replay_endpoint", replay_endpoint or ""),
            ("topic", topic),
        ):
            if not isinstance(value, str):
                raise InvalidType(f"{name} must be a str, got {type(value).__name__}")
        if not max_message_bytes > 0 or not replay_timeout_s > 0 or not queue_messages > 0:
            raise InvalidArgument(
                "max_message_bytes, replay_timeout_s and queue_messages must be above 0, got "
                f"{max_message_bytes}, {replay_timeout_s}, {queue_messages}"
            )
        router.index.row(instance)
        self.instance = instance
        self.endpoint = endpoint
        self.replay_endpoint = replay_endpoint
        self.counts: Counter[str] = Counter()
        """What came and what became of it; with the tracker's ``counts``, all there is to export."""
        self.tracker = SequenceTracker(can_replay=replay_endpoint is not None)
        self._router = router
        self._topic = topic
        self._decode = decode
        self._options = {zmq.LINGER: 0, zmq.MAXMSGSIZE: max_message_bytes, zmq.RCVHWM: queue_messages}
        self._replay_timeout_s = replay_timeout_s
        self._context = context
        self._task: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        """What is known of the instance's cache; see :mod:`mulsched.events.sequence`."""
        return self.tracker.state

    async def __aenter__(self) -> "KvEventSubscriber":
        self._task = asyncio.create_task(self.run(), name=f"KV events of {self.instance}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task])
        if not self._task.cancelled() and (failure := self._task.exception()) is not None:
            raise failure

    async def run(self) -> None:
        """Follow the publisher until cancelled. Raises ZMQError for an endpoint that is none."""
        # a socket of an asyncio context would make a future for each message
        context: zmq.Context[Any] = zmq.Context.shadow(self._context or zmq.Context.instance())
        live = self._socket(context, zmq.SUB)
        monitor = live.get_monitor_socket(zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED)
        sockets = Readable(live, monitor)
        try:
            live.subscribe(self._topic)
            live.connect(self.endpoint)
            while True:
                messages = read(live, messages=_TURN_MESSAGES, size=_TURN_BYTES)
                # read later and heeded first, so that a restart is seen before the new engine's messages
                notices = read(monitor)
                for notice in notices:
                    event = parse_monitor_message(notice)["event"]
                    await self._connection(context, live, connected=event == zmq.EVENT_CONNECTED)
                for frames in messages:
                    await self._replay_from(context, self._receive(frames))
                if messages or notices:
                    await asyncio.sleep(0)  # with more to read at once, nothing here would let others run
                # while the publisher is quiet, a replay that failed is tried again
                elif not await sockets.wait(self._replay_timeout_s if self.tracker.wants_replay else None):
                    await self._replay_from(context, self._take(self.tracker.connected()))
        finally:
            sockets.close()
            with contextlib.suppress(zmq.ZMQError):  # a terminated context waits for the sockets to be closed
                live.disable_monitor()
            monitor.close()
            live.close()

    async def _connection(
        self, context: "zmq.Context[Any]", live: "zmq.Socket[Any]", *, connected: bool
    ) -> None:
        if connected:
            self.counts["connections"] += 1
            await self._replay_from(context, self._take(self.tracker.connected()))
            return
        # ZeroMQ connects again by itself, but not after a message that is too long
        self.counts["disconnections"] += 1
        with contextlib.suppress(zmq.ZMQError):  # after such a message the connection is gone already
            live.disconnect(self.endpoint)
        live.connect(self.endpoint)

    def _socket(self, context: "zmq.Context[Any]", kind: int) -> "zmq.Socket[Any]":
        socket: zmq.Socket[Any] = context.socket(kind)
        for option, value in self._options.items():
            socket.setsockopt(option, value)
        return socket

    def _receive(self, frames: list[bytes]) -> int | None:
        """Take a live message; return where a replay must start, if it makes one necessary."""
        self.counts["messages"] += 1
        if len(frames) != 3 or len(frames[1]) != 8:
            self.counts["malformed_messages"] += 1  # what it said is missed as a gap
            return None
        return self._take(self.tracker.live(int.from_bytes(frames[1], "big"), frames[2]))

    async def _replay_from(self, context: "zmq.Context[Any]", start: int | None) -> None:
        while start is not None:
            start = self._take(await self._replay(context, start))

    def _take(self, actions: list[Action]) -> int | None:
        """Carry out all but a replay; return where that starts."""
        for action in actions:
            match action:
                case Clear():
                    self._clear()
                case Deliver(payload=payload):
                    self._deliver(payload)
                case Replay(start=start):
                    return start
        return None

    def _clear(self) -> None:
        try:
            self._router.apply(CacheCleared(self.instance))
        except MulschedError as error:  # the instance was removed
            self.counts[type(error).__name__] += 1

    def _deliver(self, payload: bytes) -> None:
        try:
            batch = self._decode(payload, self.instance)
        except InvalidEvents:
            self.counts["unreadable_messages"] += 1
            self._take(self.tracker.unreadable())
            return
        apply_batch(self._router, batch, self.counts)
        if batch.removals_lost:
            self._take(self.tracker.unreadable())
        elif batch.clears:
            self.tracker.emptied()

    async def _replay(self, context: "zmq.Context[Any]", start: int) -> list[Action]:
        """Carry out a replay up to its end; return what is to be done then."""
        assert self.replay_endpoint is not None
        dealer = self._socket(context, zmq.DEALER)
        socket = Readable(dealer)
        try:
            dealer.connect(self.replay_endpoint)
            dealer.send_multipart((b"", start.to_bytes(8, "big")), zmq.NOBLOCK)
            idle = 0
            while idle < _MAX_IDLE_ANSWERS:
                answers = read(dealer, messages=_TURN_MESSAGES, size=_TURN_BYTES)
                for frames in answers:
                    # an empty part, then topic, number and payload; before 2026 SGLang left the topic out
                    if not 3 <= len(frames) <= 4 or len(frames[-2]) != 8:
                        return self.tracker.replay_failed()
                    if frames[-2] == _END:
                        return self.tracker.replay_ended()
                    actions = self.tracker.replayed(int.from_bytes(frames[-2], "big"), frames[-1])
                    if self._take(actions) is not None:
                        return actions[-1:]
                    idle = 0 if actions else idle + 1
                if answers:
                    await asyncio.sleep(0)
                elif not await socket.wait(self._replay_timeout_s):
                    break
        finally:
            socket.close()
            dealer.close()
        return self.tracker.replay_failed()
