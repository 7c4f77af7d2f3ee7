"""KV events of SGLang."""

from mulsched.events import _msgpack
from mulsched.events.batch import EventBatch

__all__ = ["decode_sglang"]


def decode_sglang(payload: bytes, instance: str) -> EventBatch:
    """Return the events in the third part of a message of SGLang's publisher.

    Events may be maps (SGLang 0.5.23) or arrays. SGLang's tree holds a block once on each medium and may
    announce it again when it is loaded back, so a second BlockStored adds no copy. O(bytes).
    Raises InvalidEvents (the batch itself cannot be read), InvalidType.
    """
    return _msgpack.decode(payload, instance, group_idx=0, counts_copies=False)
