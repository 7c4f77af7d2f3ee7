"""What vLLM's and SGLang's messages have in common: batches of tagged events in msgpack.

A batch is an array ``[timestamp, events, data-parallel rank]`` or a map of these. An event is a map with a
``type`` key, or, from older engines, an array that begins with the type; more fields may follow than are
known, and those at the end may be missing. A batch is decoded in one piece; if that fails, event by event,
so that one that cannot be read costs only itself, until there are too many of them. msgspec believes no
length before it has seen the bytes, and limits the depth; token ids and hashes, nearly all of the bytes, stay
bytes until the core reads them into arrays. What is read in Python is limited: it holds the event loop up.
"""

import contextlib
from collections.abc import Callable, Iterable
from itertools import groupby
from operator import itemgetter
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mulsched._backend import BACKEND
from mulsched.errors import InvalidEvents, InvalidType, MissingExtra
from mulsched.events.batch import (
    EventBatch,
    KvEvent,
    PackedEvents,
    SplitRuns,
    adapter,
    content_key,
    event_run,
    medium_name,
)
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
_NIL = Raw(b"\xc0")
_UNREADABLE = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)
_KNOWN = ("BlockStored", "BlockRemoved", "AllBlocksCleared")

# A publisher that writes more of these is of a format that is not known, and each costs some microseconds.
_MAX_MALFORMED = 64
# In a message: runs, and events that are looked at one by one; docs/events.md has what they take. A step of
# SGLang with a salt and pages of one token has one for each token, 8,192 if chunks of prefill are as long.
_MAX_PARTS = 16_384
# Hashes that are bytes, and keys of content, count as one of these for so many bytes: half a MiB in all.
_PART_BYTES = 32


class StoredMap(msgspec.Struct, tag="BlockStored", gc=False):
    """BlockStored as vLLM (since June 2026) and SGLang write it."""

    block_hashes: Raw
    parent_block_hash: Hash | None
    token_ids: Raw
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: Raw = _NIL
    group_idx: int | None = None
    cache_salt: str | None = None


class RemovedMap(msgspec.Struct, tag="BlockRemoved", gc=False):
    """BlockRemoved with a ``type`` key."""

    block_hashes: Raw
    medium: str | None = None
    group_idx: int | None = None


class ClearedMap(msgspec.Struct, tag="AllBlocksCleared", gc=False):
    """AllBlocksCleared with a ``type`` key."""


class _Salt(msgspec.Struct, gc=False):
    cache_salt: str | None = None


class StoredArray(msgspec.Struct, tag="BlockStored", array_like=True, gc=False):
    """BlockStored as older engines write it; where vLLM has the adapter's name, SGLang has a map."""

    block_hashes: Raw
    parent_block_hash: Hash | None
    token_ids: Raw
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | _Salt | None = None
    extra_keys: Raw = _NIL
    group_idx: int | None = None

    @property
    def cache_salt(self) -> str | None:
        """The salt in SGLang's map."""
        return self.lora_name.cache_salt if isinstance(self.lora_name, _Salt) else None


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
    events: Raw
    data_parallel_rank: int | None = None


class _BatchMap(msgspec.Struct, gc=False):
    ts: float
    events: Raw
    data_parallel_rank: int | None = None


class _ArrayType(msgspec.Struct, array_like=True, gc=False):
    type: str


class _MapType(msgspec.Struct, gc=False):
    type: str


_decode_batch = msgspec.msgpack.Decoder(_Batch).decode
_decode_batch_map = msgspec.msgpack.Decoder(_BatchMap).decode
_decode_map_events = msgspec.msgpack.Decoder(list[MapEvent]).decode
_decode_array_events = msgspec.msgpack.Decoder(list[ArrayEvent]).decode
_decode_events = msgspec.msgpack.Decoder(list[Raw]).decode
_decode_map_event = msgspec.msgpack.Decoder(MapEvent).decode
_decode_array_event = msgspec.msgpack.Decoder(ArrayEvent).decode
_decode_map_type = msgspec.msgpack.Decoder(_MapType).decode
_decode_array_type = msgspec.msgpack.Decoder(_ArrayType).decode
_decode_hashes = msgspec.msgpack.Decoder(list[Hash]).decode
_decode_extra_keys = msgspec.msgpack.Decoder(list[Any]).decode


class _Ignored(Exception):
    """The event is understood and does not concern the router."""


class _Malformed(Exception):
    """The event cannot be read. Its argument is its type, if that can be."""


_Read = WireEvent | _Malformed | None  # None: of a type that is not known


def decode(payload: bytes, instance: str, *, group_idx: int, counts_copies: bool) -> EventBatch:
    """Return the events of a batch. O(bytes).

    Raises InvalidEvents (the batch itself, or too much of it, cannot be read; too much that is not plain).
    """
    if type(payload) is not bytes:
        if not isinstance(payload, bytes | bytearray | memoryview):
            raise InvalidType(f"payload must be bytes, got {type(payload).__name__}")
        payload = bytes(payload)  # of a subclass too: the core takes bytes alone
    message = split_kv_events(payload, group_idx, _MAX_PARTS) if 0 <= group_idx < 2**31 else None
    if message and message.plain_within(_MAX_PARTS):
        runs = PackedEvents(SplitRuns(message, instance, counts_copies))
        return EventBatch(message.timestamp, runs, message.rank, 0, message.ignored)
    said = _Said(instance, group_idx, counts_copies)
    if message is None:
        batch, read = _read(payload)
        for event in read:
            said.add(event)
        return said.batch(batch.ts, batch.data_parallel_rank)
    said.ignored = message.ignored
    for position in range(len(message)):
        part = message.part(position)
        if len(part) == 2:
            begin, end = part
            said.add(_read_event(memoryview(payload)[begin:end]))
        else:
            said.add_run(event_run(part, instance, counts_copies))
    return said.batch(message.timestamp, message.rank)


class _Said:
    """What a batch has said so far."""

    def __init__(self, instance: str, group_idx: int, counts_copies: bool) -> None:
        self._instance = instance
        self._group_idx = group_idx
        self._counts_copies = counts_copies
        self._parts: list[KvEvent | EventRun] = []
        self._removed: list[tuple[str, Any]] = []  # a run of removals, which are often of one block each
        self._left = _MAX_PARTS
        self.ignored = 0
        self._unknown = self._malformed = 0
        self._removals_lost = self._packed = False

    def spend(self, parts: int) -> None:
        """Take from what may be looked at. Raises InvalidEvents."""
        self._left -= parts
        if self._left < 0:
            raise InvalidEvents(f"a message must not have more than {_MAX_PARTS} events that are not plain")

    def add(self, event: _Read) -> None:
        self.spend(1)
        try:
            if event is None:
                self._unknown += 1
            elif isinstance(event, _Malformed):
                self._lose(event)
            elif isinstance(event, StoredMap | StoredArray):
                stored = _stored(event, self._instance, self._group_idx, self._counts_copies, self.spend)
                self._end_run()
                self._parts.append(stored)
            elif isinstance(event, RemovedMap | RemovedArray):
                _of_group(event.group_idx, self._group_idx)
                self._removed.append((medium_name(event.medium), _hashes(event.block_hashes, self.spend)))
            else:
                self._end_run()
                self._parts.append(CacheCleared(self._instance))
        except _Ignored:
            self.ignored += 1
        except _Malformed as error:
            self._lose(error)

    def _lose(self, event: _Malformed) -> None:
        self._malformed += 1
        if self._malformed > _MAX_MALFORMED:
            raise InvalidEvents(f"more than {_MAX_MALFORMED} events of a message cannot be read") from None
        self._removals_lost = self._removals_lost or str(event) != "BlockStored"

    def add_run(self, run: EventRun) -> None:
        """Add what the core has read."""
        self._end_run()
        self.spend(1 if run.medium == "GPU" else len(run))  # what lies elsewhere is applied one by one
        self._parts.append(run)
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


def _read(payload: bytes) -> tuple[_Batch | _BatchMap, Iterable[_Read]]:
    try:
        batch = (_decode_batch_map if _is_map(payload) else _decode_batch)(payload)
        if _length(batch.events) > _MAX_PARTS:
            raise InvalidEvents(f"a message must not have more than {_MAX_PARTS} events that are not plain")
        for decode_events in (_decode_map_events, _decode_array_events):
            with contextlib.suppress(*_UNREADABLE):
                return batch, decode_events(batch.events)
        raws = _decode_events(batch.events)
    except _UNREADABLE as error:
        raise InvalidEvents(f"not a batch of KV events: {error}") from None
    return batch, (_read_event(memoryview(raw)) for raw in raws)


def _length(raw: msgspec.Raw) -> int:
    """Return how many items an array claims; 0 if it is none."""
    data = memoryview(raw)
    if data[0] & 0xF0 == 0x90:
        return data[0] & 0x0F
    return int.from_bytes(data[1 : 3 if data[0] == 0xDC else 5], "big") if data[0] in (0xDC, 0xDD) else 0


def _read_event(data: memoryview) -> _Read:
    is_map = _is_map(data)
    try:
        event: WireEvent = (_decode_map_event if is_map else _decode_array_event)(data)
        return event
    except _UNREADABLE:
        pass
    try:
        tag = (_decode_map_type if is_map else _decode_array_type)(data).type
    except _UNREADABLE:
        tag = None
    return _Malformed(tag) if tag is None or tag in _KNOWN else None


def _of_group(event_group: int | None, group_idx: int) -> None:
    if event_group is not None and event_group != group_idx:
        raise _Ignored


def _hashes(raw: msgspec.Raw, spend: Callable[[int], None]) -> NDArray[np.uint64] | list[EngineHash]:
    words = unpack_uint64(raw)
    if words is not None:
        return words
    spend(len(memoryview(raw)) // _PART_BYTES)
    try:
        hashes: list[EngineHash] = _decode_hashes(raw)
        return hashes
    except _UNREADABLE:
        raise _Malformed from None


def _stored(
    event: StoredMap | StoredArray,
    instance: str,
    group_idx: int,
    counts_copies: bool,
    spend: Callable[[int], None],
) -> BlockStored:
    _of_group(event.group_idx, group_idx)
    tokens = unpack_uint32(event.token_ids)
    if tokens is not None and len(tokens) == 0:
        raise _Ignored  # vLLM's offloading may name a block and not say what is in it
    try:
        hashes = _hashes(event.block_hashes, spend)
    except _Malformed:
        raise _Malformed("BlockStored") from None
    if tokens is None or len(tokens) != len(hashes) * event.block_size:
        raise _Malformed("BlockStored")
    lora = adapter(event.lora_name if isinstance(event.lora_name, str) else None, event.lora_id)
    parent = event.parent_block_hash
    salt, contents = event.cache_salt, None
    if event.extra_keys != _NIL:
        spend(len(memoryview(event.extra_keys)) // _PART_BYTES)
        salt, contents = _extra_keys(event, event.extra_keys, len(hashes), lora)
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
    event: StoredMap | StoredArray, raw: msgspec.Raw, n_blocks: int, lora: str | None
) -> tuple[str | None, list[bytes | None] | None]:
    """Return the cache salt, if these blocks start a prompt, and the content key of each block.

    vLLM lists, per block and untagged, the adapter's name, ``(identifier, offset)`` of multimodal content,
    the salt (in a prompt's first block only), and digests of prompt embeddings as bytes. Older versions
    list content by a bare identifier; in a first block that cannot be told from a salt, and is taken for
    one.
    """
    if _length(raw) != n_blocks:
        raise _Malformed("BlockStored")
    try:
        blocks = _decode_extra_keys(raw)
    except _UNREADABLE:
        raise _Malformed("BlockStored") from None
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
