"""Router events of Dynamo, in JSON: what its workers tell its router, and what its indexer dumps."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mulsched.errors import InvalidEvents, MissingExtra
from mulsched.events.batch import EventBatch, KvEvent, medium_name
from mulsched.types import BlockRemoved, BlockStored, CacheCleared

try:
    import msgspec
except ImportError as error:
    raise MissingExtra("KV events need msgspec: pip install 'mulsched[events]'") from error

__all__ = ["decode_dynamo"]

_UNREADABLE = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)


class _Block(msgspec.Struct, gc=False):
    block_hash: int
    tokens_hash: int


class _Stored(msgspec.Struct, gc=False):
    blocks: list[_Block]
    parent_hash: int | None = None


class _Removed(msgspec.Struct, gc=False):
    block_hashes: list[int]


class _KvCacheEvent(msgspec.Struct, gc=False):
    event_id: int
    data: Any
    dp_rank: int | None = None


class _RouterEvent(msgspec.Struct, gc=False):
    event: _KvCacheEvent
    storage_tier: str | None = None


_decode = msgspec.json.Decoder(_KvCacheEvent).decode
_decode_router_event = msgspec.json.Decoder(_RouterEvent).decode


def decode_dynamo(payload: bytes, instance: str, *, block_size: int) -> EventBatch:
    """Return the one event of a message, with or without the envelope that names worker and tier.

    Dynamo's ``tokens_hash`` is the block key of a router with the default ``key_seed``, so tokens are not
    needed; ``block_size`` is in none of its events. A worker holds a block once, whatever is announced.
    O(bytes). Raises InvalidEvents.
    """
    try:
        envelope = _decode_router_event(payload)
        event, tier = envelope.event, envelope.storage_tier
    except _UNREADABLE:
        try:
            event, tier = _decode(payload), None
        except _UNREADABLE as error:
            raise InvalidEvents(f"not an event of Dynamo's router: {error}") from None
    events: list[KvEvent] = []
    unknown, malformed, medium = 0, 0, medium_name(tier)
    match event.data:
        case "cleared":
            events.append(CacheCleared(instance))
        case {"stored": stored}:
            try:
                events.append(_stored(msgspec.convert(stored, _Stored), instance, block_size, medium))
            except (msgspec.ValidationError, OverflowError):
                malformed = 1
        case {"removed": removed}:
            try:
                hashes = _words(msgspec.convert(removed, _Removed).block_hashes)
                events.append(BlockRemoved(instance, hashes, medium))
            except (msgspec.ValidationError, OverflowError):
                malformed = 1
        case _:
            unknown = 1
    return EventBatch(
        timestamp=0.0,
        events=events,
        data_parallel_rank=event.dp_rank,
        unknown=unknown,
        malformed=malformed,
        removals_lost=malformed == 1 and "removed" in event.data,
        event_ids=(event.event_id,),
    )


def _words(hashes: list[int]) -> NDArray[np.uint64]:
    return np.array(hashes, dtype=np.uint64)


def _stored(stored: _Stored, instance: str, block_size: int, medium: str) -> BlockStored:
    return BlockStored(
        instance,
        _words([block.block_hash for block in stored.blocks]),
        stored.parent_hash,
        block_size,
        block_keys=_words([block.tokens_hash for block in stored.blocks]),
        medium=medium,
        counts_copies=False,
    )
