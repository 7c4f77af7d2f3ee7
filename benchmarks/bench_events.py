"""KV events: decoded, and decoded and applied to a router.

Blocks of 16 tokens with ids below 150,000 and engine hashes of 64 bits; messages of 64 blocks, in events of
64 blocks (a prefill) or of one (answers that grow). ``blocks`` in ``extra_info`` is what a round handles.
Dynamo's RadixTree (marker ``peers``) gets the same blocks ready hashed, as its own JSON.
"""

import importlib
import json
import random
from collections import Counter

import msgspec
import pytest

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
)
MESSAGE_BLOCKS = 64


def stores(n_blocks, event_blocks):
    """The fields of BlockStored events of prompts that share nothing."""
    rng = random.Random(1)
    for _ in range(0, n_blocks, event_blocks):
        hashes = [rng.getrandbits(64) for _ in range(event_blocks)]
        tokens = [rng.randrange(150_000) for _ in range(16 * event_blocks)]
        yield ["BlockStored", hashes, None, tokens, 16, None, "GPU", None]


def messages(n_blocks, event_blocks, encoding):
    events = list(stores(n_blocks, event_blocks))
    if encoding == "map":
        events = [dict(zip(FIELDS, event, strict=True)) for event in events]
    per_message = MESSAGE_BLOCKS // event_blocks
    return [
        msgspec.msgpack.encode([1.0, events[i : i + per_message], 0])
        for i in range(0, len(events), per_message)
    ]


def fresh_router():
    router = Router(block_size=16)
    router.add_instance("a")
    return (router,), {}


@pytest.mark.parametrize("event_blocks", [64, 1])
@pytest.mark.parametrize("encoding", ["map", "array"])
@pytest.mark.parametrize("what", ["decode", "decode and apply"])
@pytest.mark.benchmark(group="events")
def bench_events(benchmark, quick, what, encoding, event_blocks):
    n_blocks = 640 if quick else 64_000 if event_blocks == 64 else 6_400
    payloads = messages(n_blocks, event_blocks, encoding)
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


@pytest.mark.peers
@pytest.mark.parametrize("event_blocks", [64, 1])
@pytest.mark.benchmark(group="events")
def bench_dynamo_radix_tree(benchmark, quick, event_blocks):
    dynamo = importlib.import_module("dynamo.llm")
    n_blocks = 640 if quick else 64_000 if event_blocks == 64 else 6_400
    payloads = [
        json.dumps({"event_id": n, "data": {"stored": {"parent_hash": None, "blocks": [
            {"block_hash": h, "tokens_hash": h} for h in event[1]]}}}).encode()
        for n, event in enumerate(stores(n_blocks, event_blocks))
    ]  # fmt: skip
    benchmark.extra_info["blocks"] = n_blocks

    def apply(tree):
        for payload in payloads:
            tree.apply_event(0, payload)
        assert len(tree.dump_tree_as_events()) > 0  # waits for its thread

    benchmark.pedantic(apply, setup=lambda: ((dynamo.RadixTree(),), {}), rounds=1 if quick else 10)
