"""Values that cross the library's edge: namespaces, requests, and engine events."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "AFTER_PARENT",
    "REMOVED",
    "STARTS_PROMPT",
    "BlockRemoved",
    "BlockStored",
    "CacheCleared",
    "EngineHash",
    "Event",
    "EventRun",
    "InstanceRemoved",
    "Keys",
    "Namespace",
    "Request",
    "RunApplied",
]

Keys = NDArray[np.uint64]
"""Block keys of a prompt, shape ``(n_blocks,)``."""

EngineHash = int | bytes
"""The id an engine gives a cached block: opaque, never recomputed."""


@dataclass(frozen=True, slots=True)
class Namespace:
    """What besides tokens must be equal for two prompts to share KV cache.

    ``lora`` alone seeds the keys with ``seed + xxh3_64(lora)``, the convention of Dynamo and smg; any
    other combination of fields seeds them with a hash of all fields. The salt seeds the first key only.
    An empty namespace equals none.
    """

    lora: str | None = None
    model: str | None = None
    cache_salt: str | None = None


class Request(NamedTuple):
    """One request as a policy sees it.

    ``keys`` has shape ``(n_blocks,)``; ``prompt_tokens`` also counts the partial block at the end.
    """

    prompt_tokens: int
    keys: Keys
    request_id: Hashable = None
    session: str | None = None


@dataclass(frozen=True, slots=True)
class BlockStored:
    """An engine cached the blocks ``block_hashes``, in order, right after the block ``parent_hash``.

    A block that it has cached already under the same hash is a copy, and is removed as often as stored;
    unless ``counts_copies`` is false, for engines that hold a block once and may announce it again.
    Content comes either as ``token_ids`` (``block_size`` per block) or as ready ``block_keys``, into which
    ``namespace`` and ``extra_keys`` have gone already; they are for ``token_ids``. ``extra_keys`` names, per
    block, the multimodal content in it (``None`` for text only). ``medium`` is where the copy lies:
    ``"GPU"``, ``"CPU"``, ``"DISK"``, or another tier's name in capitals.
    """

    instance: str
    block_hashes: Sequence[EngineHash] | NDArray[np.uint64]
    parent_hash: EngineHash | None
    block_size: int
    token_ids: Sequence[int] | NDArray[np.integer] | None = None
    block_keys: Keys | None = None
    namespace: Namespace | None = None
    extra_keys: Sequence[bytes | None] | None = None
    medium: str = "GPU"
    counts_copies: bool = True


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """An engine evicted the blocks ``block_hashes`` from ``medium``, one copy of each."""

    instance: str
    block_hashes: Sequence[EngineHash] | NDArray[np.uint64]
    medium: str = "GPU"


@dataclass(frozen=True, slots=True)
class CacheCleared:
    """An engine dropped its whole prefix cache, on every medium."""

    instance: str


@dataclass(frozen=True, slots=True)
class InstanceRemoved:
    """An instance is gone, with its cache and its queue."""

    instance: str


class RunApplied(NamedTuple):
    """What became of the events of a run."""

    blocks_stored: int
    stores_refused: int
    """Events, not blocks, whose parent was unknown."""
    blocks_removed: int
    blocks_known: int
    """How many of those removed had been known."""


STARTS_PROMPT, AFTER_PARENT, REMOVED = range(3)
"""What an event of a run is; ``KvKind`` in csrc/kv_event.hpp."""


@dataclass(frozen=True, slots=True)
class EventRun:
    """Stores and removals of one instance on one medium, in order, in arrays: many for the price of one.

    ``table`` has shape ``(n_events, 3)``, uint64: what an event is (STARTS_PROMPT, AFTER_PARENT or
    REMOVED: 0, 1, 2), how many blocks it has, and the parent's hash. ``block_hashes``: of all
    events, shape ``(n_blocks,)``; ``token_ids``: of all stores, ``block_size`` a block, uint32. The rest is
    as in ``BlockStored`` and true of all stores; the namespace has no cache salt. Iterating makes the events
    one by one, with the hashes as words of 64 bits.
    """

    instance: str
    table: NDArray[np.uint64]
    block_hashes: Keys
    token_ids: NDArray[np.uint32]
    block_size: int
    namespace: Namespace | None = None
    medium: str = "GPU"
    counts_copies: bool = True

    def __len__(self) -> int:
        """Return how many events there are."""
        return len(self.table)

    def __iter__(self) -> Iterator[BlockStored | BlockRemoved]:
        """Make the events."""
        at = token = 0
        for kind, n_blocks, parent in self.table.tolist():
            hashes = self.block_hashes[at : at + n_blocks]
            at += n_blocks
            if kind == REMOVED:
                yield BlockRemoved(self.instance, hashes, self.medium)
                continue
            tokens = self.token_ids[token : token + n_blocks * self.block_size]
            token += len(tokens)
            yield BlockStored(
                self.instance,
                hashes,
                parent if kind == AFTER_PARENT else None,
                self.block_size,
                tokens,
                namespace=self.namespace,
                medium=self.medium,
                counts_copies=self.counts_copies,
            )


Event = BlockStored | BlockRemoved | CacheCleared | InstanceRemoved
