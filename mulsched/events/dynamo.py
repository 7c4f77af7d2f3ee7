"""Router events of Dynamo: in JSON as its indexer dumps them, in msgpack as its workers publish them."""

from collections.abc import Callable, Iterator
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

__all__ = ["decode_dynamo", "decode_dynamo_message"]

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
    worker_id: int = 0


class _Envelope(msgspec.Struct, gc=False):
    payload: bytes


_HEADER = 5  # of a message: the version, 1, and the length of what follows, four bytes
_VERSION = b"\x01"

_decode = msgspec.json.Decoder(_KvCacheEvent).decode
_decode_router_event = msgspec.json.Decoder(_RouterEvent).decode
_decode_envelope = msgspec.msgpack.Decoder(_Envelope).decode
_decode_router_events = msgspec.msgpack.Decoder(list[_RouterEvent]).decode


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
    return _batch(event, tier, instance, block_size)


def decode_dynamo_message(
    message: bytes, *, block_size: int, instance: Callable[[int, int], str]
) -> Iterator[EventBatch]:
    """Yield the events of a message of Dynamo's event plane: the last frame under the topic ``kv-events``.

    ``instance``: the name of a worker's id and data-parallel rank. Otherwise as :func:`decode_dynamo`.
    Raises InvalidEvents before the first is yielded.
    """
    if message[:1] != _VERSION or int.from_bytes(message[1:_HEADER], "big") != len(message) - _HEADER:
        raise InvalidEvents(f"not a message of Dynamo's event plane, version 1: begins with {message[:5]!r}")
    try:
        told = _decode_router_events(_decode_envelope(message[_HEADER:]).payload)
    except _UNREADABLE as error:
        raise InvalidEvents(f"not a message of Dynamo's event plane: {error}") from None
    for each in told:
        name = instance(each.worker_id, each.event.dp_rank or 0)
        yield _batch(each.event, each.storage_tier, name, block_size)


def _batch(event: _KvCacheEvent, tier: str | None, instance: str, block_size: int) -> EventBatch:
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
