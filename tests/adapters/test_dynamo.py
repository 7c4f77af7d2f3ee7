"""The Dynamo adapter: its life cycle on a stand-in of KvRouter; events from the real RadixTree (``-m dynamo``)."""

import asyncio
import json
from collections import Counter

import pytest

from mulsched import NoEligibleInstance, block_keys
from mulsched.adapters.dynamo import LMetricWorkers

BLOCK = 4


class KvRouter:
    """The methods of ``dynamo.llm.KvRouter`` 1.6.1 that the adapter calls, without workers behind them."""

    def __init__(self, workers=(11, 12, 13), outputs=("a", "b")):
        self.workers, self.outputs, self.sent = list(workers), outputs, []
        self.active = Counter()
        self.dump = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def get_potential_loads(self, token_ids):
        return [
            {
                "worker_id": worker,
                "dp_rank": 0,
                "potential_prefill_tokens": len(token_ids),
                "potential_decode_blocks": 0,
                "active_requests": self.active[worker],
            }
            for worker in self.workers
        ]

    async def generate(self, token_ids, model, worker_id=None, dp_rank=None):
        self.sent.append(worker_id)

        async def stream():
            await self.gate.wait()
            for output in self.outputs:
                if isinstance(output, Exception):
                    raise output
                yield output

        return stream()

    async def dump_events(self):
        return json.dumps(self.dump)


def stored(worker, tokens):
    keys = block_keys(list(tokens), BLOCK).tolist()
    blocks = [{"block_hash": key ^ 1, "tokens_hash": key} for key in keys]
    return {
        "worker_id": worker,
        "event": {"event_id": 0, "data": {"stored": {"parent_hash": None, "blocks": blocks}}, "dp_rank": 0},
    }


async def ask(workers, tokens):
    return [output async for output in workers.generate(tokens, "m")]


def test_a_prompt_goes_to_the_worker_whose_events_told_of_its_prefix():
    router = KvRouter()
    router.dump = [stored(12, range(40))]
    workers = LMetricWorkers(router, block_size=BLOCK)

    async def run():
        await workers.load_index()
        return [await ask(workers, [*range(40), turn]) for turn in range(3)]

    assert asyncio.run(run()) == [["a", "b"]] * 3
    assert router.sent == [12, 12, 12]
    assert workers.counts["blocks_stored"] == 10


def test_concurrent_requests_do_not_herd():
    async def run():
        router = KvRouter()
        router.gate.clear()
        workers = LMetricWorkers(router, block_size=BLOCK)
        tasks = [asyncio.ensure_future(ask(workers, range(40 * i, 40 * i + 40))) for i in range(12)]
        while len(router.sent) < 12:
            await asyncio.sleep(0)
        router.gate.set()
        await asyncio.gather(*tasks)
        return Counter(router.sent), len(workers.lifecycle)

    assert asyncio.run(run()) == (Counter({11: 4, 12: 4, 13: 4}), 0)


def test_requests_of_other_routers_count():
    router = KvRouter()
    router.active.update({11: 5, 13: 5})
    asyncio.run(ask(LMetricWorkers(router, block_size=BLOCK), range(40)))
    assert router.sent == [12]


def test_a_stream_that_breaks_leaves_nothing_booked():
    workers = LMetricWorkers(KvRouter(outputs=("a", RuntimeError("gone"))), block_size=BLOCK)
    with pytest.raises(RuntimeError, match="gone"):
        asyncio.run(ask(workers, list(range(40))))
    assert len(workers.lifecycle) == 0


def test_a_worker_that_is_gone_is_forgotten():
    router = KvRouter()
    workers = LMetricWorkers(router, block_size=BLOCK)
    asyncio.run(ask(workers, list(range(40))))
    router.workers = [11]
    asyncio.run(ask(workers, list(range(40))))
    assert workers.lifecycle.router.instances == ("11/0",)


def test_without_workers_nothing_is_booked():
    workers = LMetricWorkers(KvRouter(workers=()), block_size=BLOCK)
    with pytest.raises(NoEligibleInstance, match="no worker"):
        asyncio.run(ask(workers, list(range(40))))
    assert len(workers.lifecycle) == 0


@pytest.mark.dynamo
def test_an_index_that_dynamo_dumped_is_taken_over_whole():
    from dynamo.llm import RadixTree

    tree = RadixTree()
    for worker, tokens in ((11, range(40)), (12, range(24)), (13, range(100, 140))):
        tree.apply_event(worker, json.dumps(stored(worker, tokens)["event"]).encode())
    router = KvRouter()
    dump = tree.dump_tree_as_events()
    router.dump = json.loads(dump) if isinstance(dump, str | bytes) else [json.loads(event) for event in dump]
    workers = LMetricWorkers(router, block_size=BLOCK)
    asyncio.run(workers.load_index())
    keys = block_keys(list(range(40)), BLOCK)
    ours = workers.lifecycle.router.index.match_by_instance(keys)
    theirs = tree.find_matches(keys.tolist()).scores
    assert {f"{worker}/{rank}": n for (worker, rank), n in theirs.items()} == {
        k: n for k, n in ours.items() if n
    }
