"""ZeroMQ's sockets, read without a turn of the event loop for each message."""

import asyncio
from contextlib import contextmanager

import pytest
import zmq

from mulsched.events.readable import Readable, read


@contextmanager
def a_pair():
    """Two sockets; what is sent on the one is there on the other."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as near, context.socket(zmq.PAIR) as far:
        near.bind("inproc://pair")
        far.connect("inproc://pair")
        yield near, far


@pytest.mark.parametrize(
    ("limits", "n_read"),
    [({}, 10), ({"messages": 4}, 4), ({"size": 20}, 4), ({"messages": 3, "size": 20}, 3)],
)
def test_what_waits_is_read_up_to_a_limit_and_no_further(limits, n_read):
    with a_pair() as (near, far):
        for n in range(10):
            far.send_multipart([bytes(4), bytes([n])])
        first = read(near, **limits)
        assert [frames[1][0] for frames in first + read(near)] == list(range(10))
        assert len(first) == n_read


def test_what_comes_wakes_a_loop_that_waits():
    async def scenario(near, far):
        readable = Readable(near)
        try:
            waiting = asyncio.create_task(readable.wait(20))
            await asyncio.sleep(0)
            far.send(b"x")
            assert await waiting
            assert read(near) == [[b"x"]]
            assert not await readable.wait(0)
        finally:
            readable.close()

    with a_pair() as (near, far):
        asyncio.run(scenario(near, far))


def test_what_comes_in_the_turn_in_which_the_time_is_over_is_not_missed():
    async def scenario(near, far):
        readable = Readable(near)
        try:
            waiting = asyncio.create_task(readable.wait(0))
            asyncio.get_running_loop().call_soon(readable._wake, near)
            assert await waiting
        finally:
            readable.close()

    with a_pair() as (near, far):
        asyncio.run(scenario(near, far))


def test_what_nobody_reads_does_not_keep_the_loop_awake(monkeypatch):
    woken = []
    wake = Readable._wake
    monkeypatch.setattr(Readable, "_wake", lambda self, socket: (woken.append(socket), wake(self, socket)))

    async def scenario(near, far):
        readable = Readable(near)
        try:
            far.send(b"x")
            assert await readable.wait(20)
            for _ in range(100):
                await asyncio.sleep(0)
            assert len(woken) < 10
        finally:
            readable.close()

    with a_pair() as (near, far):
        asyncio.run(scenario(near, far))
