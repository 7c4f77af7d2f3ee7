"""KV events: decoded, and decoded and applied to a router.

Blocks of 16 tokens with ids below 150,000 and engine hashes of 64 bits, with the fields that vLLM writes:
128 requests that grow in turns, as those of a batch that decodes do, and the mix of ``engine_stream``.
``blocks`` in ``extra_info`` is what a round handles; blocks a second by CPU time come with
``--benchmark-timer=time.process_time``. Dynamo's RadixTree (marker ``peers``) gets the same blocks ready
hashed, as its own JSON.
"""

import importlib
import json
import random
from collections import Counter

import msgspec
import pytest
from engine_stream import engine_messages

from mulsched import Router
from mulsched.events import apply_batch, decode_vllm

FIELDS = (
    "type",
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
    "group_idx",
)
REQUESTS = 128


def stores(n_events, event_blocks):
    """The fields of BlockStored events of requests that share nothing."""
    rng = random.Random(1)
    parents = [None] * REQUESTS
    for n in range(n_events):
        hashes = [rng.getrandbits(64) for _ in range(event_blocks)]
        tokens = [rng.randrange(150_000) for _ in range(16 * event_blocks)]
        parent, parents[n % REQUESTS] = parents[n % REQUESTS], hashes[-1]
        yield ["BlockStored", hashes, parent, tokens, 16, None, "GPU", None, [None] * event_blocks, 0]


def messages(n_blocks, event_blocks, message_events, encoding="map"):
    n_messages = -(-n_blocks // (event_blocks * message_events))
    events = list(stores(n_messages * message_events, event_blocks))
    if encoding == "map":
        events = [dict(zip(FIELDS, event, strict=True)) for event in events]
    return [
        msgspec.msgpack.encode([1.0, events[i : i + message_events], 0])
        for i in range(0, len(events), message_events)
    ]


def fresh_router():
    router = Router(block_size=16)
    router.add_instance("a")
    return (router,), {}


@pytest.mark.parametrize("message_events", [1, 16, 128])
@pytest.mark.parametrize("event_blocks", [1, 4, 16, 64, 512])
@pytest.mark.parametrize("encoding", ["map", "array"])
@pytest.mark.parametrize("what", ["decode", "decode and apply"])
@pytest.mark.benchmark(group="events")
def bench_events(benchmark, quick, what, encoding, event_blocks, message_events):
    payloads = messages(640 if quick else 16_384, event_blocks, message_events, encoding)
    n_blocks = len(payloads) * event_blocks * message_events
    benchmark.extra_info["blocks"] = n_blocks

    def decode(router):
        for payload in payloads:
            decode_vllm(payload, "a")

    def decode_and_apply(router):
        counts = Counter()
        for payload in payloads:
            apply_batch(router, decode_vllm(payload, "a"), counts)
        assert counts["blocks_stored"] == n_blocks

    target = decode if what == "decode" else decode_and_apply
    benchmark.pedantic(target, setup=fresh_router, rounds=1 if quick else 10)


@pytest.mark.benchmark(group="events")
def bench_engine(benchmark, quick):
    """Steps of an engine that prefills and decodes with a full cache."""
    stream = list(engine_messages(50 if quick else 2_500))
    n_blocks = sum(blocks for _, blocks in stream)
    benchmark.extra_info |= {"blocks": n_blocks, "messages": len(stream)}

    def decode_and_apply(router):
        counts = Counter()
        for payload, _ in stream:
            apply_batch(router, decode_vllm(payload, "a"), counts)
        assert counts["blocks_stored"] + counts["blocks_removed"] == n_blocks

    benchmark.pedantic(decode_and_apply, setup=fresh_router, rounds=1 if quick else 10)


@pytest.mark.peers
@pytest.mark.parametrize("event_blocks", [64, 1])
@pytest.mark.benchmark(group="events")
def bench_dynamo_radix_tree(benchmark, quick, event_blocks):
    dynamo = importlib.import_module("dynamo.llm")
    n_blocks = 640 if quick else 64_000 if event_blocks == 64 else 6_400
    payloads = [
        json.dumps({"event_id": n, "data": {"stored": {"parent_hash": event[2], "blocks": [
            {"block_hash": h, "tokens_hash": h} for h in event[1]]}}}).encode()
        for n, event in enumerate(stores(n_blocks // event_blocks, event_blocks))
    ]  # fmt: skip
    benchmark.extra_info["blocks"] = n_blocks

    def apply(tree):
        for payload in payloads:
            tree.apply_event(0, payload)
        assert len(tree.dump_tree_as_events()) > 0  # waits for its thread

    benchmark.pedantic(apply, setup=lambda: ((dynamo.RadixTree(),), {}), rounds=1 if quick else 10)
