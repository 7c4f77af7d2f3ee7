"""Messages of an engine with a full cache: what vLLM 0.32 publishes while it prefills and decodes.

One message a step. A step admits a request now and then, whose prompt is stored in one event, and gives each
running request a token, so that some of them fill a block: an event each. Each block that is stored pushes
another out, an event each, the oldest requests first and the tails of their prompts first. Recorded messages
have the same shape: long stores while it prefills, else a few blocks and as many removals.
"""

import random
from collections import deque

import msgspec

BLOCK_SIZE = 16


def engine_messages(
    n_messages, *, running=128, prompt_blocks=64, answer_tokens=256, cache_blocks=16_384, seed=1
):
    """Yield (payload, blocks stored and removed). The first messages fill the cache."""
    rng = random.Random(seed)
    cached = deque()  # by request that has ended, the first to go first
    held = 0
    active = []  # [hashes, tokens to come]
    for _ in range(n_messages):
        stored, removed = [], []
        if len(active) < running and rng.random() < running / answer_tokens:
            hashes = [rng.getrandbits(64) for _ in range(prompt_blocks)]
            active.append([hashes.copy(), answer_tokens])
            stored.append(store(rng, hashes, None))
        for request in active:
            request[1] -= 1
            if rng.random() < 1 / BLOCK_SIZE:
                request[0].append(rng.getrandbits(64))
                stored.append(store(rng, request[0][-1:], request[0][-2]))
        new = sum(len(event["block_hashes"]) for event in stored)
        held += new
        while held > cache_blocks and cached:
            removed.append(
                {"type": "BlockRemoved", "block_hashes": [cached[0].pop()], "medium": "GPU", "group_idx": 0}
            )
            held -= 1
            if not cached[0]:
                cached.popleft()
        cached += [request[0] for request in active if request[1] == 0]
        active = [request for request in active if request[1] > 0]
        if stored:
            yield msgspec.msgpack.encode([1.0, removed + stored, 0]), new + len(removed)  # fmt: skip


def store(rng, hashes, parent):
    """Return the fields of a BlockStored."""
    return {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": parent,
        "token_ids": [rng.randrange(150_000) for _ in range(BLOCK_SIZE * len(hashes))],
        "block_size": BLOCK_SIZE,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [None] * len(hashes),
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    }
