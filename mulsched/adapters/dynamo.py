"""LMetric over the workers of a Dynamo ``KvRouter``, by its loads, its events and its direct routing.

::

    workers = LMetricWorkers(kv_router, block_size=16)
    await workers.load_index()                     # later events: workers.apply(event, worker_id)
    async for output in workers.generate(token_ids, "model"):
        ...

Needs no import of Dynamo, only its ``dynamo.llm.KvRouter`` object, so any version that has these methods will
do; written for ai-dynamo-runtime 1.6.1.
"""

import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from mulsched.errors import NoEligibleInstance
from mulsched.events.apply import apply_batch
from mulsched.events.dynamo import decode_dynamo
from mulsched.lifecycle import Lifecycle
from mulsched.router import PolicyLike, Router

__all__ = ["LMetricWorkers"]

Worker = tuple[int, int]  # id, data-parallel rank


class LMetricWorkers:
    """Chooses the worker of each request, books it in the same step, and has Dynamo send it there.

    What is cached comes from Dynamo's events, ``block_size`` tokens a block. Dynamo's own counts of active
    requests add those of other routers. First tokens and ends are those of the stream.
    ``counts`` says what became of the events.
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
        self.lifecycle = Lifecycle(Router(block_size=block_size, policy=policy, seed=seed))
        self.counts: Counter[str] = Counter()

    async def load_index(self) -> None:
        """Take over what Dynamo's index holds now."""
        for event in json.loads(await self._kv_router.dump_events()):
            self.apply(json.dumps(event).encode(), event["worker_id"])

    def apply(self, event: bytes, worker_id: int) -> None:
        """Apply one event of a worker, in JSON, with or without its envelope. Raises InvalidEvents."""
        rank = decode_dynamo(event, "", block_size=self._block_size).data_parallel_rank
        name = self._add((worker_id, rank or 0))
        batch = decode_dynamo(event, name, block_size=self._block_size)
        apply_batch(self.lifecycle.router, batch, self.counts)

    async def generate(self, token_ids: Sequence[int], model: str, **options: Any) -> AsyncIterator[Any]:
        """Yield what ``KvRouter.generate`` does, from the worker that was chosen; ``options`` are passed on.

        Raises NoEligibleInstance, InvalidTokens, and what Dynamo raises.
        """
        tokens = list(token_ids)
        candidates = self._follow(await self._kv_router.get_potential_loads(tokens))
        request_id = uuid.uuid4().hex
        name = self.lifecycle.route(
            tokens, request_id=request_id, now=self._clock(), candidates=candidates
        ).instance
        worker_id, rank = self._workers[name]
        signal = self.lifecycle.cancel
        try:
            outputs = await self._kv_router.generate(
                tokens, model, worker_id=worker_id, dp_rank=rank, **options
            )
            async for output in outputs:
                if signal is not self.lifecycle.finish:
                    self.lifecycle.first_token(request_id, now=self._clock())
                    signal = self.lifecycle.finish
                yield output
        finally:
            signal(request_id, now=self._clock())

    def _add(self, worker: Worker) -> str:
        name = f"{worker[0]}/{worker[1]}"
        if name not in self._workers:
            self._workers[name] = worker
            self.lifecycle.router.add_instance(name)
        return name

    def _follow(self, loads: Sequence[dict[str, int]]) -> list[str]:
        """Add the workers that are new, forget those that are gone, take over their loads; return names."""
        active = {self._add((load["worker_id"], load["dp_rank"])): load["active_requests"] for load in loads}
        for name in self._workers.keys() - active.keys():
            self.lifecycle.remove_instance(name)
            del self._workers[name]
        if not active:
            raise NoEligibleInstance("Dynamo names no worker")
        for name, requests in active.items():
            self.lifecycle.router.report_load(name, running=requests, waiting=0)
        return list(active)
