"""ZeroMQ's sockets on an event loop, read without a turn of the loop and a future for each message."""

import asyncio
import contextlib
from typing import Any

from mulsched.errors import MissingExtra

try:
    import zmq
except ImportError as error:
    raise MissingExtra("subscribing to KV events needs pyzmq: pip install 'mulsched[events]'") from error

__all__ = ["Readable", "read"]


def read(
    socket: "zmq.Socket[Any]", *, messages: int | None = None, size: int | None = None
) -> list[list[bytes]]:
    """Return the messages that wait, of some ``size`` bytes: the first that reaches it is the last."""
    taken: list[list[bytes]] = []
    left = size
    while len(taken) != messages and (left is None or left > 0):
        try:
            frames = socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            break
        taken.append(frames)
        if left is not None:
            left -= sum(map(len, frames))
    return taken


class Readable:
    """Waits on the running event loop until some of these sockets may be read.

    What a socket has may be waited for only after it has been read until it had nothing.
    """

    def __init__(self, *sockets: "zmq.Socket[Any]") -> None:
        self._loop = asyncio.get_running_loop()
        self._woken = asyncio.Event()
        self._descriptors = [socket.fileno() for socket in sockets]
        for descriptor, socket in zip(self._descriptors, sockets, strict=True):
            self._loop.add_reader(descriptor, self._wake, socket)

    def _wake(self, socket: "zmq.Socket[Any]") -> None:
        self._woken.set()
        # else the descriptor stays ready until the socket is read, and the loop spins while nobody reads it
        socket.getsockopt(zmq.EVENTS)

    async def wait(self, timeout_s: float | None) -> bool:
        """Return whether a socket may have something; False when the time is over. None waits for ever."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._woken.wait()
        # also where both came in one turn, as after something that held the loop up
        woken = self._woken.is_set()
        self._woken.clear()
        return woken

    def close(self) -> None:
        """Stop watching; before the sockets are closed."""
        for descriptor in self._descriptors:
            self._loop.remove_reader(descriptor)
