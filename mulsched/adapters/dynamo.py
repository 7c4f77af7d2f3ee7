"""LMetric over the workers of a Dynamo ``KvRouter``, by its loads, its events and its direct routing.

::

    workers = LMetricWorkers(kv_router, block_size=16)
    events = asyncio.create_task(workers.follow("tcp://10.0.0.1:40331", "tcp://10.0.0.2:42879"))
    async for output in workers.generate(token_ids, "model"):
        ...

Needs no import of Dynamo, only its ``dynamo.llm.KvRouter`` object, so any version that has these methods will
do; written for ai-dynamo-runtime 1.6.1, and run with workers of its ``dynamo.mocker``.
"""

import asyncio
import functools
import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from mulsched.errors import InvalidEvents, MissingExtra, NoEligibleInstance
from mulsched.events.apply import apply_batch
from mulsched.events.dynamo import decode_dynamo, decode_dynamo_message
from mulsched.lifecycle import Lifecycle
from mulsched.router import PolicyLike, Router
from mulsched.types import CacheCleared, Namespace

try:
    import zmq
    import zmq.asyncio
except ImportError as error:
    raise MissingExtra("Dynamo's event plane needs pyzmq: pip install 'mulsched[events]'") from error

__all__ = ["LMetricWorkers"]

Worker = tuple[int, int]  # id, data-parallel rank
Send = Callable[[int, int], Awaitable[AsyncIterator[Any]]]  # to a worker

_QUEUE_MESSAGES = 10_000  # before ZeroMQ drops some, which shows as a gap; arbitrary


class LMetricWorkers:
    """Chooses the worker of each request, books it in the same step, and has Dynamo send it there.

    What is cached comes from Dynamo's events, ``block_size`` tokens a block. Dynamo's own counts of active
    requests add those of other routers, if its ``KvRouterConfig`` has ``router_replica_sync``. First tokens
    and ends are those of the stream. ``counts`` says what became of the events.
    """

    def __init__(
        self,
        kv_router: Any,
        *,
        block_size: int,
        policy: PolicyLike = "lmetric",
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kv_router = kv_router
        self._block_size = block_size
        self._clock = clock
        self._workers: dict[str, Worker] = {}
        self._loading = asyncio.Lock()  # meanwhile nothing newer than Dynamo's dump may be applied
        self.lifecycle = Lifecycle(Router(block_size=block_size, policy=policy, seed=seed))
        self.counts: Counter[str] = Counter()

    async def load_index(self) -> None:
        """Take over what Dynamo's index holds now, in place of what is known. O(blocks), of all workers."""
        async with self._loading:
            events = json.loads(await self._kv_router.dump_events())
            self.counts["index_loads"] += 1
            for name in self._workers:
                self.lifecycle.router.apply(CacheCleared(name))
            for event in events:
                self.apply(json.dumps(event).encode(), event["worker_id"])

    def apply(self, event: bytes, worker_id: int) -> None:
        """Apply one event of a worker, in JSON, with or without its envelope. Raises InvalidEvents."""
        rank = decode_dynamo(event, "", block_size=self._block_size).data_parallel_rank
        name = self._add(worker_id, rank or 0)
        batch = decode_dynamo(event, name, block_size=self._block_size)
        apply_batch(self.lifecycle.router, batch, self.counts)

    async def follow(self, *endpoints: str) -> None:
        """Apply what workers publish on Dynamo's ZMQ event plane, until cancelled.

        ``endpoints``: of the channels of topic ``kv-events`` in Dynamo's discovery, one for each worker. What
        a publisher said before it was heard, or what was lost on the way, is taken over from Dynamo's index;
        where that lags behind the worker, so do we. Raises ZMQError for an endpoint that is none.
        """
        expected: dict[bytes, int] = {}
        with zmq.asyncio.Context.instance().socket(zmq.SUB) as socket:
            socket.setsockopt(zmq.RCVHWM, _QUEUE_MESSAGES)
            socket.subscribe("kv-events")
            for endpoint in endpoints:
                socket.connect(endpoint)
            await self.load_index()
            while True:
                frames = await socket.recv_multipart()
                if len(frames) != 4:
                    self.counts["unreadable_messages"] += 1  # what it said is missed as a gap
                    continue
                _, publisher, number, message = frames
                sequence = int.from_bytes(number, "big")
                if sequence != expected.get(publisher, 0):
                    await self.load_index()
                expected[publisher] = sequence + 1
                async with self._loading:
                    self._apply_message(message)

    def _apply_message(self, message: bytes) -> None:
        try:
            for batch in decode_dynamo_message(message, block_size=self._block_size, instance=self._add):
                apply_batch(self.lifecycle.router, batch, self.counts)
        except InvalidEvents:
            self.counts["unreadable_messages"] += 1

    def generate(self, token_ids: Sequence[int], model: str, **options: Any) -> AsyncIterator[Any]:
        """Yield what ``KvRouter.generate`` does, from the worker that was chosen; ``options`` are passed on.

        A worker that Dynamo cannot send to is passed over; one that breaks off is not, since the request may
        be why. Raises NoEligibleInstance, InvalidTokens, and what Dynamo raises.
        """
        tokens = list(token_ids)
        send = functools.partial(self._kv_router.generate, tokens, model, **options)
        return self._generate(tokens, None, lambda worker_id, rank: send(worker_id=worker_id, dp_rank=rank))

    def generate_from_request(self, request: Mapping[str, Any]) -> AsyncIterator[Any]:
        """Do what ``generate`` does for a ``PreprocessedRequest``; ``routing`` may hold a ``lora_name``."""
        routing = request.get("routing") or {}

        def send(worker_id: int, rank: int) -> Awaitable[AsyncIterator[Any]]:
            direct = {**routing, "backend_instance_id": worker_id, "dp_rank": rank}
            sent: Awaitable[AsyncIterator[Any]] = self._kv_router.generate_from_request(
                {**request, "routing": direct}
            )
            return sent

        return self._generate(list(request["token_ids"]), routing.get("lora_name"), send)

    async def _generate(self, tokens: list[int], lora: str | None, send: Send) -> AsyncIterator[Any]:
        candidates = self._take_loads(await self._kv_router.get_potential_loads(tokens, lora_name=lora))
        request_id = uuid.uuid4().hex
        outputs = await self._send(tokens, lora, send, request_id, candidates)
        signal = self.lifecycle.cancel
        try:
            async for output in outputs:
                if signal is not self.lifecycle.finish:
                    self.lifecycle.first_token(request_id, now=self._clock())
                    signal = self.lifecycle.finish
                yield output
        finally:
            signal(request_id, now=self._clock())

    async def _send(
        self, tokens: list[int], lora: str | None, send: Send, request_id: str, candidates: list[str]
    ) -> AsyncIterator[Any]:
        """Send to the best candidate that can be reached: Dynamo lists a dead worker until its lease ends."""
        namespace = None if lora is None else Namespace(lora=lora)
        while True:
            name = self.lifecycle.route(
                tokens, request_id=request_id, now=self._clock(), candidates=candidates, namespace=namespace
            ).instance
            try:
                return await send(*self._workers[name])
            except BaseException as error:
                candidates = [each for each in candidates if each != name and each in self._workers]
                if not candidates or not isinstance(error, Exception):
                    self.lifecycle.cancel(request_id, now=self._clock())
                    raise
                self.counts["unreachable_workers"] += 1

    def _add(self, worker_id: int, rank: int) -> str:
        name = f"{worker_id}/{rank}"
        if name not in self._workers:
            self._workers[name] = worker_id, rank
            self.lifecycle.router.add_instance(name)
        return name

    def _take_loads(self, loads: Sequence[dict[str, int]]) -> list[str]:
        """Add the workers that are new, forget those that are gone, take over their loads; return names."""
        active = {self._add(load["worker_id"], load["dp_rank"]): load["active_requests"] for load in loads}
        for name in self._workers.keys() - active.keys():
            self.lifecycle.remove_instance(name)
            del self._workers[name]
        if not active:
            raise NoEligibleInstance("Dynamo names no worker")
        for name, requests in active.items():
            self.lifecycle.router.report_load(name, running=requests, waiting=0)
        return list(active)
