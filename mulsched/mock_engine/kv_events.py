"""KV events as vLLM 0.32 sends them: ZeroMQ, numbered messages, a socket that sends them again.

A message is topic, number (8 bytes, big-endian, from 0) and a batch in msgpack: ``[time, events, rank]``.
Events are maps with a ``type``, or, as vLLM before June 2026 wrote them, arrays that begin with it. A request
to the replay socket is a number; the answer is every message kept from that one on, then the number -1.
Read from recordings of vLLM 0.32.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from mulsched.errors import InvalidArgument, MissingExtra
from mulsched.mock_engine.engine import MockEvent
from mulsched.types import BlockRemoved, CacheCleared

try:
    import msgspec
    import zmq
    import zmq.asyncio
except ImportError as error:
    raise MissingExtra("the mock engine needs msgspec and pyzmq: pip install 'mulsched[gateway]'") from error

__all__ = ["FORMATS", "EventFormat", "KvEventPublisher", "encode_batch"]

EventFormat = Literal["map", "array"]
FORMATS: tuple[EventFormat, ...] = ("map", "array")

_END = (-1).to_bytes(8, "big", signed=True)
_encode = msgspec.msgpack.Encoder().encode


def encode_batch(time_s: float, events: Sequence[MockEvent], event_format: EventFormat) -> bytes:
    """Return the payload of a message. O(tokens)."""
    maps = [fields for event in events for fields in _fields(event)]
    written = maps if event_format == "map" else [_array(fields) for fields in maps]
    return _encode([time_s, written, 0])


def _fields(event: MockEvent) -> list[dict[str, Any]]:
    if isinstance(event, CacheCleared):
        return [{"type": "AllBlocksCleared"}]
    hashes = [int(number) for number in event.block_hashes]
    if isinstance(event, BlockRemoved):  # one event for each block, as in vLLM
        return [
            {"type": "BlockRemoved", "block_hashes": [number], "medium": "GPU", "group_idx": 0}
            for number in hashes
        ]
    salt = None if event.namespace is None or event.parent_hash is not None else event.namespace.cache_salt
    return [
        {
            "type": "BlockStored",
            "block_hashes": hashes,
            "parent_block_hash": event.parent_hash,
            "token_ids": np.asarray(event.token_ids).tolist(),
            "block_size": event.block_size,
            "lora_id": None,
            "medium": "GPU",
            "lora_name": None,
            "extra_keys": [None if salt is None else [salt]] + [None] * (len(hashes) - 1),
            "group_idx": 0,
            "kv_cache_spec_kind": "full_attention",
        }
    ]


def _array(fields: dict[str, Any]) -> list[Any]:
    # the fields up to the adapter's name: those that the oldest readers know
    known = (
        "type",
        "block_hashes",
        "parent_block_hash",
        "token_ids",
        "block_size",
        "lora_id",
        "medium",
        "lora_name",
    )
    array = [fields[name] for name in known if name in fields]
    salted = any(fields.get("extra_keys", ()))
    return [*array, fields["extra_keys"]] if salted else array


class KvEventPublisher:
    """Publishes one engine's events, and answers requests for those of before.

    ``endpoint``, ``replay_endpoint``: where its sockets listen, ``tcp://127.0.0.1:5557``; port ``*`` is any
    free one. vLLM connects unless the address has a ``*``; this one always listens. ``buffer_messages`` are
    kept for replay, 10,000 as in vLLM. ``clock`` returns the time of a batch, in seconds. Made on a running
    event loop; a subscriber that cannot follow loses messages, and nobody waits for it.

    Raises InvalidArgument (an address that is not to be had).
    """

    def __init__(
        self,
        endpoint: str,
        replay_endpoint: str | None,
        *,
        clock: Callable[[], float],
        topic: str = "",
        event_format: EventFormat = "map",
        buffer_messages: int = 10_000,
    ) -> None:
        self.topic = topic
        self._clock = clock
        self._format = event_format
        self._next = 0
        self._buffer: deque[tuple[bytes, bytes]] = deque(maxlen=buffer_messages)
        self._context = zmq.asyncio.Context()
        self._live = zmq.Socket(self._context, zmq.PUB)  # sending never waits, so needs no event loop
        self._replay = self._context.socket(zmq.ROUTER)
        self._replays: asyncio.Task[None] | None = None
        self.replay_endpoint = None
        try:
            self.endpoint = _listen(self._live, endpoint)
            if replay_endpoint is not None:
                self.replay_endpoint = _listen(self._replay, replay_endpoint)
        except BaseException:
            self._close_sockets()
            raise
        if replay_endpoint is not None:
            self._replays = asyncio.get_running_loop().create_task(self._answer())

    def publish(self, events: Sequence[MockEvent]) -> None:
        """Send the events as one message. O(tokens)."""
        payload = encode_batch(self._clock(), events, self._format)
        number = self._next.to_bytes(8, "big")
        self._next += 1
        self._buffer.append((number, payload))
        self._live.send_multipart([self.topic.encode(), number, payload])

    async def close(self) -> None:
        """Close the sockets."""
        if self._replays is not None:
            self._replays.cancel()
            await asyncio.wait([self._replays])
        self._close_sockets()

    def _close_sockets(self) -> None:
        self._live.close(linger=0)
        self._replay.close(linger=0)
        self._context.term()

    async def _answer(self) -> None:
        router = self._replay
        while True:
            request = await router.recv_multipart()
            if len(request) != 3 or len(request[2]) != 8:
                continue
            client, empty, start = request
            for number, payload in list(self._buffer):
                if number >= start:  # of equal length and big-endian: bytes sort as their numbers do
                    await router.send_multipart([client, empty, self.topic.encode(), number, payload])
            await router.send_multipart([client, empty, b"", _END, b""])


def _listen(socket: "zmq.Socket[Any]", endpoint: str) -> str:
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        raise InvalidArgument(f"cannot listen on {endpoint}: {error}") from None
    last = socket.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(last, bytes)
    return last.rstrip(b"\0").decode()
