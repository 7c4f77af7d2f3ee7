"""KV cache events of TensorRT-LLM, in JSON as ``GET /kv_cache_events`` gives them."""

from typing import Any

import numpy as np

from mulsched.errors import InvalidEvents, MissingExtra
from mulsched.events.batch import EventBatch, KvEvent, content_key
from mulsched.types import BlockRemoved, BlockStored, Namespace

try:
    import msgspec
except ImportError as error:
    raise MissingExtra("KV events need msgspec: pip install 'mulsched[events]'") from error

__all__ = ["decode_tensorrt_llm"]


class _Token(msgspec.Struct, gc=False):
    token_id: int
    token_extra_id: int = 0


class _Block(msgspec.Struct, gc=False):
    block_hash: int
    tokens: list[_Token]
    lora_id: int | None = None


class _Stored(msgspec.Struct, gc=False):
    blocks: list[_Block]
    parent_hash: int | None = None


class _Removed(msgspec.Struct, gc=False):
    block_hashes: list[int]


class _Level(msgspec.Struct, gc=False):
    old_value: int
    new_value: int


class _Updated(msgspec.Struct, gc=False):
    block_hash: int
    cache_level: _Level | None = None  # null if the priority alone changed


class _Event(msgspec.Struct, gc=False):
    event_id: int
    data: dict[str, Any]
    window_size: int | None = None
    attention_dp_rank: int | None = None


_decode = msgspec.json.Decoder(list[_Event]).decode


def decode_tensorrt_llm(
    payload: bytes, instance: str, *, block_size: int, window_size: int | None = None
) -> EventBatch:
    """Return the events of one answer, a JSON list.

    ``window_size``: only events of this attention window, for models that have several; None for all.
    A block that is not full ends its event: what follows it cannot be shared. A block that an ``updated``
    event moves off the GPU (cache level 0) is removed; one that is moved back stays so, since the event does
    not say what is in it. So the router may know less than the engine holds, and never more.
    ``event_ids`` are those of all events: a hole between two answers means that the engine's buffer ran
    over, and the cache should be cleared. O(bytes). Raises InvalidEvents.
    """
    try:
        wire = _decode(payload)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidEvents(f"not a list of TensorRT-LLM's events: {error}") from None
    events: list[KvEvent] = []
    unknown = ignored = malformed = 0
    removals_lost = False
    for event in wire:
        kind = event.data.get("type")
        if kind == "created" or (window_size is not None and event.window_size != window_size):
            ignored += 1
            continue
        try:
            if kind == "stored":
                stored = _stored(msgspec.convert(event.data, _Stored), instance, block_size)
                if stored is None:
                    ignored += 1
                else:
                    events.append(stored)
            elif kind == "updated":
                updated = msgspec.convert(event.data, _Updated)
                if updated.cache_level is not None and updated.cache_level.new_value > 0:
                    gone = np.array([updated.block_hash], dtype=np.uint64)
                    events.append(BlockRemoved(instance, gone))
                else:
                    ignored += 1
            elif kind == "removed":
                removed = msgspec.convert(event.data, _Removed)
                events.append(BlockRemoved(instance, np.array(removed.block_hashes, dtype=np.uint64)))
            else:
                unknown += 1
        except (msgspec.ValidationError, OverflowError):
            malformed += 1
            removals_lost = removals_lost or kind != "stored"
    ranks = {event.attention_dp_rank for event in wire}
    return EventBatch(
        timestamp=0.0,
        events=events,
        data_parallel_rank=ranks.pop() if len(ranks) == 1 else None,
        unknown=unknown,
        ignored=ignored,
        malformed=malformed,
        removals_lost=removals_lost,
        event_ids=[event.event_id for event in wire],
    )


def _stored(stored: _Stored, instance: str, block_size: int) -> BlockStored | None:
    """Return the event's whole blocks; None if there are none."""
    blocks = stored.blocks
    whole = next((i for i, block in enumerate(blocks) if len(block.tokens) != block_size), len(blocks))
    if whole == 0:
        return None
    tokens = [token.token_id for block in blocks[:whole] for token in block.tokens]
    contents = [
        content_key(
            [(str(token.token_extra_id), i) for i, token in enumerate(block.tokens) if token.token_extra_id]
        )
        or None
        for block in blocks[:whole]
    ]
    lora = blocks[0].lora_id
    return BlockStored(
        instance,
        np.array([block.block_hash for block in blocks[:whole]], dtype=np.uint64),
        stored.parent_hash,
        block_size,
        np.array(tokens, dtype=np.uint32),
        namespace=None if lora is None else Namespace(lora=str(lora)),
        extra_keys=contents if any(contents) else None,
        counts_copies=False,
    )
