"""A publisher of KV events like vLLM's, on loopback, that can lose messages and restart."""

import asyncio

import zmq
import zmq.asyncio

END = (-1).to_bytes(8, "big", signed=True)


class Publisher:
    """Use as ``async with``; ``port`` 0 takes any port."""

    def __init__(self, *, kept=10_000, answers=True, topic=b"kv", replay_topic=True, ports=(0, 0)):
        self.kept, self.answers, self.topic, self.replay_topic = kept, answers, topic, replay_topic
        self.ports = ports
        self.published = []
        self.asked = []

    async def __aenter__(self):
        self.context = zmq.asyncio.Context()
        # an XPUB says when a subscription arrives
        self.live, self.replay = self.context.socket(zmq.XPUB), self.context.socket(zmq.ROUTER)
        self.endpoint, self.replay_endpoint = (
            self._bind(socket, port)
            for socket, port in zip((self.live, self.replay), self.ports, strict=True)
        )
        self.task = asyncio.create_task(self._answer())
        return self

    async def __aexit__(self, *_):
        self.task.cancel()
        await asyncio.wait([self.task])
        self.context.destroy(linger=0)

    @staticmethod
    def _bind(socket, port):
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(f"tcp://127.0.0.1:{port or '*'}")
        return socket.getsockopt_string(zmq.LAST_ENDPOINT)

    async def subscribed(self):
        await self.live.recv()

    async def publish(self, payload, *, lose=False):
        self.published.append(payload)
        if not lose:
            sequence = len(self.published) - 1
            await self.live.send_multipart((self.topic, sequence.to_bytes(8, "big"), payload))

    async def _answer(self):
        while True:
            client, empty, start = await self.replay.recv_multipart()
            first = int.from_bytes(start, "big")
            self.asked.append(first)
            topic = [self.topic] if self.replay_topic else []
            if not self.answers:
                continue
            for sequence in range(max(first, len(self.published) - self.kept, 0), len(self.published)):
                number = sequence.to_bytes(8, "big")
                await self.replay.send_multipart((client, empty, *topic, number, self.published[sequence]))
            await self.replay.send_multipart((client, empty, *([b""] if topic else []), END, b""))


async def until(condition):
    """Let the loop run until the condition holds."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0)
