"""The Dynamo adapter on a stand-in of KvRouter and of its event plane; events from the real RadixTree (``-m dynamo``).

With a real KvRouter and workers: test_dynamo_mocker.py.
"""

import asyncio
import json
from collections import Counter

import msgspec
import pytest
import zmq
import zmq.asyncio

from mulsched import Namespace, NoEligibleInstance, block_keys
from mulsched.adapters.dynamo import LMetricWorkers

BLOCK = 4


class KvRouter:
    """The methods of ``dynamo.llm.KvRouter`` 1.6.1 that the adapter calls, without workers behind them."""

    def __init__(self, workers=(11, 12, 13), outputs=("a", "b")):
        self.workers, self.outputs, self.sent = list(workers), outputs, []
        self.active = Counter()
        self.dead = set()  # and still listed, as Dynamo does until the lease ends
        self.dump = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def get_potential_loads(self, token_ids, lora_name=None):
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
        if worker_id in self.dead:
            raise Exception("no endpoints available to route work")  # Dynamo raises this very class

        async def stream():
            await self.gate.wait()
            for output in self.outputs:
                if isinstance(output, Exception):
                    raise output
                yield output

        return stream()

    async def generate_from_request(self, request):
        routing = request["routing"]
        return await self.generate(
            request["token_ids"], request["model"], routing["backend_instance_id"], routing["dp_rank"]
        )

    async def dump_events(self):
        return json.dumps(self.dump)


def stored(worker, tokens, lora=None):
    keys = block_keys(list(tokens), BLOCK, namespace=Namespace(lora=lora)).tolist()
    blocks = [{"block_hash": key ^ 1, "tokens_hash": key} for key in keys]
    return {
        "worker_id": worker,
        "event": {"event_id": 0, "data": {"stored": {"parent_hash": None, "blocks": blocks}}, "dp_rank": 0},
    }


def message(*router_events):
    """Return a message of Dynamo's event plane."""
    payload = msgspec.msgpack.encode(router_events)
    envelope = msgspec.msgpack.encode(
        {"publisher_id": 7, "sequence": 0, "topic": "kv-events", "payload": payload}
    )
    return b"\x01" + len(envelope).to_bytes(4, "big") + envelope


def frames(publisher, sequence, message):
    return [b"kv-events", publisher.to_bytes(8, "big"), sequence.to_bytes(8, "big"), message]


async def followed(router, published):
    """Return workers that have applied, in turn, what a publisher sent them."""
    workers = LMetricWorkers(router, block_size=BLOCK)
    with zmq.asyncio.Context() as context, context.socket(zmq.XPUB) as publisher:
        port = publisher.bind_to_random_port("tcp://127.0.0.1")
        events = asyncio.ensure_future(workers.follow(f"tcp://127.0.0.1:{port}"))
        await publisher.recv()  # the subscription
        for sent in published:
            await publisher.send_multipart(sent)
        last = stored(99, range(BLOCK))
        await publisher.send_multipart(frames(99, 0, message(last)))
        while "99/0" not in workers.lifecycle.router.instances:
            await asyncio.sleep(0)
        events.cancel()
        await asyncio.wait([events])
    return workers


def matched(workers, tokens, **options):
    return workers.lifecycle.router.index.match_by_instance(block_keys(list(tokens), BLOCK, **options))


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


def test_a_worker_that_cannot_be_reached_is_passed_over():
    router = KvRouter()
    router.dead = {11, 12}
    workers = LMetricWorkers(router, block_size=BLOCK)
    assert asyncio.run(ask(workers, range(40))) == ["a", "b"]
    assert (router.sent[-1], len(workers.lifecycle)) == (13, 0)
    assert workers.counts["unreachable_workers"] == len(router.sent) - 1


def test_where_none_can_be_reached_nothing_is_left_booked():
    router = KvRouter()
    router.dead = {11, 12, 13}
    workers = LMetricWorkers(router, block_size=BLOCK)
    with pytest.raises(Exception, match="no endpoints"):
        asyncio.run(ask(workers, range(40)))
    assert (sorted(router.sent), len(workers.lifecycle)) == ([11, 12, 13], 0)


def test_a_request_cancelled_while_it_is_sent_is_not_sent_again():
    async def run():
        router = KvRouter()
        router.generate = lambda *args, **options: asyncio.Event().wait()
        workers = LMetricWorkers(router, block_size=BLOCK)
        task = asyncio.ensure_future(ask(workers, range(40)))
        while not len(workers.lifecycle):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        return len(workers.lifecycle), workers.counts["unreachable_workers"]

    assert asyncio.run(run()) == (0, 0)


def test_a_request_for_a_lora_adapter_goes_where_the_adapters_blocks_are():
    router = KvRouter()
    router.dump = [stored(12, range(40)), stored(13, range(40), lora="adapter")]
    workers = LMetricWorkers(router, block_size=BLOCK)
    request = {"token_ids": [*range(40), 1], "model": "m", "routing": {"lora_name": "adapter"}}

    async def run():
        await workers.load_index()
        return [output async for output in workers.generate_from_request(request)]

    assert asyncio.run(run()) == ["a", "b"]
    assert router.sent == [13]
    assert request["routing"] == {"lora_name": "adapter"}


def test_published_events_reach_the_index():
    published = [frames(1, 0, message(stored(11, range(40)), stored(12, range(20))))]
    workers = asyncio.run(followed(KvRouter(), published))
    assert matched(workers, range(40)) == {"11/0": 10, "12/0": 5, "99/0": 1}


def test_a_removed_block_is_removed():
    removal = stored(11, range(40))
    removal["event"]["data"] = {
        "removed": {"block_hashes": [block_keys(list(range(40)), BLOCK).tolist()[4] ^ 1]}
    }
    published = [frames(1, 0, message(stored(11, range(40)))), frames(1, 1, message(removal))]
    workers = asyncio.run(followed(KvRouter(), published))
    assert matched(workers, range(40))["11/0"] == 4


@pytest.mark.parametrize("sequences", [(3,), (0, 2), (1, 0)])
def test_after_a_gap_the_index_is_taken_over_anew(sequences):
    router = KvRouter()
    router.dump = [stored(12, range(20))]
    published = [frames(1, each, message(stored(11, range(40)))) for each in sequences]
    workers = asyncio.run(followed(router, published))
    assert matched(workers, range(40)) == {"11/0": 10, "12/0": 5, "99/0": 1}
    assert workers.counts["index_loads"] == {(3,): 2, (0, 2): 2, (1, 0): 3}[sequences]


def test_an_index_taken_over_replaces_what_was_known():
    router = KvRouter()
    router.dump = [stored(11, range(40))]
    workers = LMetricWorkers(router, block_size=BLOCK)
    asyncio.run(workers.load_index())
    router.dump = [stored(12, range(20))]
    asyncio.run(workers.load_index())
    assert matched(workers, range(40)) == {"11/0": 0, "12/0": 5}


@pytest.mark.parametrize("bad", [b"", b"\x02", b"\x01\0\0\0\0", b"\x01\0\0\0\1\xc1", message()[:-1]])
def test_messages_that_cannot_be_read_are_counted(bad):
    workers = asyncio.run(
        followed(KvRouter(), [frames(1, 0, bad), frames(1, 1, message(stored(11, range(40))))])
    )
    assert workers.counts["unreadable_messages"] == 1
    assert matched(workers, range(40))["11/0"] == 10


def test_a_message_of_another_shape_is_counted():
    workers = asyncio.run(
        followed(KvRouter(), [[b"kv-events", b"?"], frames(1, 0, message(stored(11, range(40))))])
    )
    assert workers.counts["unreadable_messages"] == 1
    assert matched(workers, range(40))["11/0"] == 10


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
