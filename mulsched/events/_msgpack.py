"""What vLLM's and SGLang's messages have in common: batches of tagged events in msgpack.

A batch is an array ``[timestamp, events, data-parallel rank]`` or a map of these. An event is a map with a
``type`` key, or, from older engines, an array that begins with the type; more fields may follow than are
known, and those at the end may be missing. A batch is decoded in one piece; if that fails, event by event,
so that one that cannot be read costs only itself. msgspec believes no length before it has seen the bytes,
and limits the depth; token ids and hashes, nearly all of the bytes, stay bytes until the core reads them into
arrays.
"""

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mulsched._backend import BACKEND
from mulsched.errors import InvalidEvents, InvalidType, MissingExtra
from mulsched.events.batch import EventBatch, KvEvent, PackedEvents, content_key, medium_name
from mulsched.types import BlockRemoved, BlockStored, CacheCleared, EngineHash, EventRun, Namespace

try:
    import msgspec
except ImportError as error:
    raise MissingExtra("KV events need msgspec: pip install 'mulsched[events]'") from error

if BACKEND == "native":
    from mulsched._native import split_kv_events, unpack_uint32, unpack_uint64
else:
    from mulsched.events._msgpack_integers_py import split_kv_events, unpack_uint32, unpack_uint64

__all__ = ["decode"]

Hash = int | bytes
Raw = msgspec.Raw
_UNREADABLE = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)
_BYTES = (bytes, bytearray, memoryview)
_KNOWN = ("BlockStored", "BlockRemoved", "AllBlocksCleared")


class StoredMap(msgspec.Struct, tag="BlockStored", gc=False):
    """BlockStored as vLLM (since June 2026) and SGLang write it."""

    block_hashes: Raw
    parent_block_hash: Hash | None
    token_ids: Raw
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: Any = None
    group_idx: int | None = None
    cache_salt: str | None = None


class RemovedMap(msgspec.Struct, tag="BlockRemoved", gc=False):
    """BlockRemoved with a ``type`` key."""

    block_hashes: Raw
    medium: str | None = None
    group_idx: int | None = None


class ClearedMap(msgspec.Struct, tag="AllBlocksCleared", gc=False):
    """AllBlocksCleared with a ``type`` key."""


class StoredArray(msgspec.Struct, tag="BlockStored", array_like=True, gc=False):
    """BlockStored as older engines write it; where vLLM has the adapter's name, SGLang has a map."""

    block_hashes: Raw
    parent_block_hash: Hash | None
    token_ids: Raw
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | dict[str, Any] | None = None
    extra_keys: Any = None
    group_idx: int | None = None

    @property
    def cache_salt(self) -> str | None:
        """The salt in SGLang's map."""
        salt = self.lora_name.get("cache_salt") if isinstance(self.lora_name, dict) else None
        return salt if isinstance(salt, str) else None


class RemovedArray(msgspec.Struct, tag="BlockRemoved", array_like=True, gc=False):
    """BlockRemoved as an array."""

    block_hashes: Raw
    medium: str | None = None
    group_idx: int | None = None


class ClearedArray(msgspec.Struct, tag="AllBlocksCleared", array_like=True, gc=False):
    """AllBlocksCleared as an array."""


MapEvent = StoredMap | RemovedMap | ClearedMap
ArrayEvent = StoredArray | RemovedArray | ClearedArray
WireEvent = MapEvent | ArrayEvent


class _Batch(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: list[Raw]
    data_parallel_rank: int | None = None


class _BatchMap(msgspec.Struct, gc=False):
    ts: float
    events: list[Raw]
    data_parallel_rank: int | None = None


class _MapEvents(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: list[MapEvent]
    data_parallel_rank: int | None = None


class _ArrayEvents(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: list[ArrayEvent]
    data_parallel_rank: int | None = None


class _Type(msgspec.Struct, gc=False):
    type: str


_decode_batch = msgspec.msgpack.Decoder(_Batch).decode
_decode_batch_map = msgspec.msgpack.Decoder(_BatchMap).decode
_decode_map_events = msgspec.msgpack.Decoder(_MapEvents).decode
_decode_array_events = msgspec.msgpack.Decoder(_ArrayEvents).decode
_decode_map_event = msgspec.msgpack.Decoder(MapEvent).decode
_decode_array_event = msgspec.msgpack.Decoder(ArrayEvent).decode
_decode_map_type = msgspec.msgpack.Decoder(_Type).decode
_decode_array = msgspec.msgpack.Decoder(list[Any]).decode
_decode_hashes = msgspec.msgpack.Decoder(list[Hash]).decode


class _Ignored(Exception):
    """The event is understood and does not concern the router."""


class _Malformed(Exception):
    """The event cannot be read. Its argument is its type, if that can be."""


_Read = WireEvent | _Malformed | None  # None: of a type that is not known


def decode(payload: bytes, instance: str, *, group_idx: int, counts_copies: bool) -> EventBatch:
    """Return the events of a batch. O(bytes). Raises InvalidEvents (the batch itself cannot be read)."""
    if not isinstance(payload, _BYTES):
        raise InvalidType(f"payload must be bytes, got {type(payload).__name__}")
    said = _Said(instance, group_idx, counts_copies)
    split = split_kv_events(payload, group_idx) if 0 <= group_idx < 2**31 else None
    if split is None:
        batch, read = _read(payload)
        for event in read:
            said.add(event)
        return said.batch(batch.ts, batch.data_parallel_rank)
    timestamp, rank, said.ignored, parts = split
    for part in parts:
        if len(part) == 2:
            begin, end = part
            said.add(_read_event(memoryview(payload).cast("B")[begin:end]))
        else:
            said.add_run(*part)
    return said.batch(timestamp, rank)


class _Said:
    """What a batch has said so far."""

    def __init__(self, instance: str, group_idx: int, counts_copies: bool) -> None:
        self._instance = instance
        self._group_idx = group_idx
        self._counts_copies = counts_copies
        self._parts: list[KvEvent | EventRun] = []
        self._removed: list[tuple[str, Any]] = []  # a run of removals, which are often of one block each
        self.ignored = 0
        self._unknown = self._malformed = 0
        self._removals_lost = self._packed = False

    def add(self, event: _Read) -> None:
        try:
            if event is None:
                self._unknown += 1
            elif isinstance(event, _Malformed):
                raise event
            elif isinstance(event, StoredMap | StoredArray):
                stored = _stored(event, self._instance, self._group_idx, self._counts_copies)
                self._end_run()
                self._parts.append(stored)
            elif isinstance(event, RemovedMap | RemovedArray):
                _of_group(event.group_idx, self._group_idx)
                self._removed.append((medium_name(event.medium), _hashes(event.block_hashes)))
            else:
                self._end_run()
                self._parts.append(CacheCleared(self._instance))
        except _Ignored:
            self.ignored += 1
        except _Malformed as error:
            self._malformed += 1
            self._removals_lost = self._removals_lost or str(error) != "BlockStored"

    def add_run(
        self,
        medium: str | None,
        lora_name: str | None,
        lora_id: int | None,
        block_size: int,
        table: NDArray[np.uint64],
        hashes: NDArray[np.uint64],
        tokens: NDArray[np.uint32],
    ) -> None:
        """Add what the core has read."""
        self._end_run()
        lora = _lora(lora_name, lora_id)
        namespace = None if lora is None else Namespace(lora=lora)
        name = medium_name(medium)
        self._parts.append(
            EventRun(self._instance, table, hashes, tokens, block_size, namespace, name, self._counts_copies)
        )
        self._packed = True

    def batch(self, timestamp: float, rank: int | None) -> EventBatch:
        self._end_run()
        return EventBatch(
            timestamp,
            PackedEvents(self._parts) if self._packed else cast(list[KvEvent], self._parts),
            rank,
            self._unknown,
            self.ignored,
            self._malformed,
            self._removals_lost,
        )

    def _end_run(self) -> None:
        """Append a removal per medium and run of removed hashes."""
        if not self._removed:
            return
        for medium, run in groupby(self._removed, key=itemgetter(0)):
            parts = [hashes for _, hashes in run]
            if all(isinstance(part, np.ndarray) for part in parts):
                self._parts.append(BlockRemoved(self._instance, np.concatenate(parts), medium))
            else:
                self._parts.append(BlockRemoved(self._instance, [h for part in parts for h in part], medium))
        self._removed.clear()


def _is_map(data: Any) -> bool:
    return len(data) > 0 and (data[0] & 0xF0 == 0x80 or data[0] in (0xDE, 0xDF))


def _read(payload: bytes) -> tuple[_Batch | _BatchMap | _MapEvents | _ArrayEvents, Sequence[_Read]]:
    for decode_events in (_decode_map_events, _decode_array_events):
        try:
            batch = decode_events(payload)
            return batch, batch.events
        except _UNREADABLE:
            pass
    try:
        raws = (_decode_batch_map if _is_map(payload) else _decode_batch)(payload)
    except _UNREADABLE as error:
        raise InvalidEvents(f"not a batch of KV events: {error}") from None
    return raws, [_read_event(memoryview(raw)) for raw in raws.events]


def _read_event(data: memoryview) -> _Read:
    is_map = _is_map(data)
    try:
        event: WireEvent = (_decode_map_event if is_map else _decode_array_event)(data)
        return event
    except _UNREADABLE:
        pass
    try:
        tag = _decode_map_type(data).type if is_map else _decode_array(data)[0]
    except (*_UNREADABLE, IndexError):
        tag = None
    return None if isinstance(tag, str) and tag not in _KNOWN else _Malformed(tag)


def _of_group(event_group: int | None, group_idx: int) -> None:
    if event_group is not None and event_group != group_idx:
        raise _Ignored


def _hashes(raw: msgspec.Raw) -> NDArray[np.uint64] | list[EngineHash]:
    words = unpack_uint64(raw)
    if words is not None:
        return words
    try:
        hashes: list[EngineHash] = _decode_hashes(raw)
        return hashes
    except _UNREADABLE:
        raise _Malformed from None


def _lora(name: str | None, lora_id: int | None) -> str | None:
    return str(lora_id) if name is None and lora_id is not None else name


def _stored(
    event: StoredMap | StoredArray, instance: str, group_idx: int, counts_copies: bool
) -> BlockStored:
    _of_group(event.group_idx, group_idx)
    tokens = unpack_uint32(event.token_ids)
    if tokens is not None and len(tokens) == 0:
        raise _Ignored  # vLLM's offloading may name a block and not say what is in it
    try:
        hashes = _hashes(event.block_hashes)
    except _Malformed:
        raise _Malformed("BlockStored") from None
    if tokens is None or len(tokens) != len(hashes) * event.block_size:
        raise _Malformed("BlockStored")
    lora = _lora(event.lora_name if isinstance(event.lora_name, str) else None, event.lora_id)
    parent = event.parent_block_hash
    salt, contents = event.cache_salt, None
    if event.extra_keys is not None:
        salt, contents = _extra_keys(event, len(hashes), lora)
    return BlockStored(
        instance,
        hashes,
        parent % 2**64 if isinstance(parent, int) else parent,
        event.block_size,
        tokens,
        None,
        None if lora is None and salt is None else Namespace(lora=lora, cache_salt=salt),
        contents,
        medium_name(event.medium),
        counts_copies,
    )


def _extra_keys(
    event: StoredMap | StoredArray, n_blocks: int, lora: str | None
) -> tuple[str | None, list[bytes | None] | None]:
    """Return the cache salt, if these blocks start a prompt, and the content key of each block.

    vLLM lists, per block and untagged, the adapter's name, ``(identifier, offset)`` of multimodal content,
    the salt (in a prompt's first block only), and digests of prompt embeddings as bytes. Older versions
    list content by a bare identifier; in a first block that cannot be told from a salt, and is taken for
    one.
    """
    blocks = event.extra_keys
    if not isinstance(blocks, list) or len(blocks) != n_blocks:
        raise _Malformed("BlockStored")
    salt = None
    contents: list[bytes | None] = []
    for position, keys in enumerate(blocks):
        items: list[tuple[str, int]] = []
        for key in keys if isinstance(keys, list) else () if keys is None else (keys,):
            match key:
                case [str(identifier), int(offset)] if -(2**63) <= offset < 2**63:
                    items.append((identifier, offset))
                case bytes():
                    items.append((key.hex(), 0))
                case str() | int() if str(key) == lora or key == event.lora_id:
                    pass
                case str() if position == 0 and event.parent_block_hash is None:
                    salt = key
                case str():
                    items.append((key, 0))
                case _:
                    raise _Malformed("BlockStored")
        contents.append(content_key(items) if items else None)
    return salt, contents if any(contents) else None
