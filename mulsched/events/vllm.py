"""KV events of vLLM."""

from mulsched.events import _msgpack
from mulsched.events.batch import EventBatch

__all__ = ["decode_vllm"]


def decode_vllm(payload: bytes, instance: str, *, group_idx: int = 0) -> EventBatch:
    """Return the events in the third part of a message of vLLM's publisher.

    Events may be maps (vLLM since June 2026) or arrays, hashes numbers or bytes. ``group_idx``: the cache
    group to follow; a hybrid model announces each block once for each of its groups. O(bytes).
    Raises InvalidEvents (the batch itself cannot be read), InvalidType.
    """
    return _msgpack.decode(payload, instance, group_idx=group_idx, counts_copies=True)
