"""KV events on the wire."""

import asyncio

import msgspec
import numpy as np
import pytest
import zmq
import zmq.asyncio

from mulsched import BlockRemoved, BlockStored, CacheCleared, Namespace
from mulsched.errors import InvalidArgument
from mulsched.mock_engine.kv_events import KvEventPublisher, encode_batch

ANYWHERE = "tcp://127.0.0.1:*"
END = b"\xff" * 8


def stored(hashes=(2**63, 7), parent=None, salt=None):
    token_ids = np.arange(4 * len(hashes), dtype=np.uint32)
    namespace = None if salt is None else Namespace(cache_salt=salt)
    return BlockStored(
        "gpu-0", np.array(hashes, dtype=np.uint64), parent, 4, token_ids=token_ids, namespace=namespace
    )


def removed(*hashes):
    return BlockRemoved("gpu-0", np.array(hashes, dtype=np.uint64))


def decoded(events, event_format="map"):
    return msgspec.msgpack.decode(encode_batch(1.5, events, event_format))


def run(scenario):
    async def guarded():
        async with asyncio.timeout(30):
            await scenario()

    asyncio.run(guarded())


class Published:
    """A publisher, and sockets that listen to it."""

    async def __aenter__(self):
        self.publisher = KvEventPublisher(
            ANYWHERE, ANYWHERE, clock=lambda: 1.5, topic="kv", buffer_messages=3
        )
        self.context = zmq.asyncio.Context()
        self.replay = self.context.socket(zmq.DEALER)
        self.replay.connect(self.publisher.replay_endpoint)
        return self

    async def __aexit__(self, *error):
        await self.publisher.close()
        self.context.destroy(linger=0)

    async def replayed(self, start):
        await self.replay.send_multipart([b"", start.to_bytes(8, "big")])
        messages = []
        while True:
            empty, topic, number, payload = await self.replay.recv_multipart()
            assert empty == b""
            if number == END:
                assert (topic, payload) == (b"", b"")
                return messages
            messages.append((topic, int.from_bytes(number, "big"), msgspec.msgpack.decode(payload)))


def test_a_batch_is_time_events_and_rank():
    assert decoded([CacheCleared("gpu-0")]) == [1.5, [{"type": "AllBlocksCleared"}], 0]


def test_a_stored_event_has_the_fields_of_vllm():
    assert decoded([stored()])[1] == [
        {
            "type": "BlockStored",
            "block_hashes": [2**63, 7],
            "parent_block_hash": None,
            "token_ids": list(range(8)),
            "block_size": 4,
            "lora_id": None,
            "medium": "GPU",
            "lora_name": None,
            "extra_keys": [None, None],
            "group_idx": 0,
            "kv_cache_spec_kind": "full_attention",
        }
    ]


def test_a_removed_block_is_an_event_of_its_own():
    assert decoded([removed(1, 2)])[1] == [
        {"type": "BlockRemoved", "block_hashes": [number], "medium": "GPU", "group_idx": 0}
        for number in (1, 2)
    ]


def test_arrays_begin_with_the_type():
    events = [stored(), removed(7), CacheCleared("gpu-0")]
    assert decoded(events, "array")[1] == [
        ["BlockStored", [2**63, 7], None, list(range(8)), 4, None, "GPU", None],
        ["BlockRemoved", [7], "GPU"],
        ["AllBlocksCleared"],
    ]


@pytest.mark.parametrize(("parent", "keys"), [(None, [["s"], None]), (9, [None, None])])
def test_a_salt_is_on_the_first_block_of_a_prompt_only(parent, keys):
    assert decoded([stored(parent=parent, salt="s")])[1][0]["extra_keys"] == keys


def test_an_array_with_a_salt_goes_on_to_it():
    assert decoded([stored(salt="s")], "array")[1][0][7:] == [None, [["s"], None]]


def test_messages_are_topic_number_and_batch():
    async def scenario():
        async with Published() as it:
            live = it.context.socket(zmq.SUB)
            live.subscribe("kv")
            monitor = live.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
            live.connect(it.publisher.endpoint)
            await monitor.recv_multipart()
            live.disable_monitor()
            # a subscription arrives some time after the connection: send until one is heard
            sent = 0
            while not await live.poll(1):
                it.publisher.publish([removed(sent)])
                sent += 1
            topic, number, payload = await live.recv_multipart()
            expected = int.from_bytes(number, "big")
            assert (topic, len(number)) == (b"kv", 8)
            assert msgspec.msgpack.decode(payload)[1][0]["block_hashes"] == [expected]

    run(scenario)


def test_a_replay_begins_with_the_number_asked_for():
    async def scenario():
        async with Published() as it:
            for number in range(3):
                it.publisher.publish([removed(number)])
            assert [message[:2] for message in await it.replayed(0)] == [(b"kv", 0), (b"kv", 1), (b"kv", 2)]
            assert [batch[1][0]["block_hashes"] for _, _, batch in await it.replayed(2)] == [[2]]
            assert await it.replayed(3) == []

    run(scenario)


def test_a_replay_has_the_latest_messages_only():
    async def scenario():
        async with Published() as it:
            for number in range(5):
                it.publisher.publish([removed(number)])
            assert [number for _, number, _ in await it.replayed(0)] == [2, 3, 4]

    run(scenario)


def test_a_request_that_is_none_is_passed_over():
    async def scenario():
        async with Published() as it:
            await it.replay.send_multipart([b"", b"abc"])
            await it.replay.send_multipart([b"x"])
            assert await it.replayed(0) == []

    run(scenario)


def test_an_address_in_use_is_refused():
    async def scenario():
        async with Published() as it:
            with pytest.raises(InvalidArgument, match=r"cannot listen on tcp://127\.0\.0\.1:\d+: "):
                KvEventPublisher(it.publisher.endpoint, None, clock=lambda: 0.0)

    run(scenario)
