"""KV cache events of TensorRT-LLM, in JSON as ``GET /kv_cache_events`` gives them."""

from itertools import groupby
from typing import Any, Literal

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
    cache_level: Literal[0, 1] = 0  # the primary or the secondary pool: on the GPU, in the host's memory


class _Stored(msgspec.Struct, gc=False):
    blocks: list[_Block]
    parent_hash: int | None = None


class _Removed(msgspec.Struct, gc=False):
    block_hashes: list[int]


class _Level(msgspec.Struct, gc=False):
    old_value: Literal[0, 1]
    new_value: Literal[0, 1]


class _Updated(msgspec.Struct, gc=False):
    block_hash: int
    cache_level: _Level | None = None  # null if the priority alone changed


class _Event(msgspec.Struct, gc=False):
    event_id: int
    data: dict[str, Any]
    window_size: int | None = None
    attention_dp_rank: int | None = None


_MEDIA = ("GPU", "CPU")  # by level

_decode = msgspec.json.Decoder(list[_Event]).decode


def decode_tensorrt_llm(
    payload: bytes, instance: str, *, block_size: int, window_size: int | None = None
) -> EventBatch:
    """Return the events of one answer, a JSON list.

    ``window_size``: only events of this attention window, for models that have several; None for all.
    A block that is not full ends its event: what follows it cannot be shared. The blocks of an event become a
    store for each stretch on one medium. A block that an ``updated`` event moves is removed from the medium
    that it leaves, and not stored where it comes, since the event does not say what is in it. A ``removed``
    event does not say where the block was: it becomes a removal from each medium. So the router may know less
    than the engine holds, and never more.
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
                stores = _stores(msgspec.convert(event.data, _Stored), instance, block_size)
                ignored += not stores
                events += stores
            elif kind == "updated":
                updated = msgspec.convert(event.data, _Updated)
                moved = updated.cache_level
                if moved is None or moved.new_value == moved.old_value:
                    ignored += 1
                else:
                    gone = np.array([updated.block_hash], dtype=np.uint64)
                    events.append(BlockRemoved(instance, gone, _MEDIA[moved.old_value]))
            elif kind == "removed":
                removed = msgspec.convert(event.data, _Removed)
                hashes = np.array(removed.block_hashes, dtype=np.uint64)
                events += [BlockRemoved(instance, hashes, medium) for medium in _MEDIA]
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


def _stores(stored: _Stored, instance: str, block_size: int) -> list[BlockStored]:
    """Return the event's whole blocks, an event for each stretch of them on one medium."""
    blocks = stored.blocks
    whole = next((i for i, block in enumerate(blocks) if len(block.tokens) != block_size), len(blocks))
    parent, stores = stored.parent_hash, []
    for level, stretch in groupby(blocks[:whole], key=lambda block: block.cache_level):
        held = list(stretch)
        stores.append(_store(held, parent, instance, block_size, _MEDIA[level]))
        parent = held[-1].block_hash
    return stores


def _store(
    blocks: list[_Block], parent: int | None, instance: str, block_size: int, medium: str
) -> BlockStored:
    contents = [
        content_key(
            [(str(token.token_extra_id), i) for i, token in enumerate(block.tokens) if token.token_extra_id]
        )
        or None
        for block in blocks
    ]
    lora = blocks[0].lora_id
    return BlockStored(
        instance,
        np.array([block.block_hash for block in blocks], dtype=np.uint64),
        parent,
        block_size,
        np.array([token.token_id for block in blocks for token in block.tokens], dtype=np.uint32),
        namespace=None if lora is None else Namespace(lora=str(lora)),
        extra_keys=contents if any(contents) else None,
        medium=medium,
        counts_copies=False,
    )
