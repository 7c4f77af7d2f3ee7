"""Messages of engines, encoded here from the published formats."""

import msgspec

FIELDS = {
    "BlockStored": ["block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name",
                    "extra_keys", "group_idx", "kv_cache_spec_kind"],
    "BlockRemoved": ["block_hashes", "medium", "group_idx"],
    "AllBlocksCleared": [],
}  # fmt: skip
ENCODINGS = ["map", "array"]


def stored(hashes, tokens, parent=None, block_size=4, **fields):
    event = {"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent, "token_ids": tokens}
    return event | {"block_size": block_size, "lora_id": None, "medium": "GPU", "lora_name": None} | fields


def removed(hashes, **fields):
    return {"type": "BlockRemoved", "block_hashes": hashes, "medium": "GPU"} | fields


def cleared():
    return {"type": "AllBlocksCleared"}


def as_array(event):
    """The event as older engines write it, up to the last field that it has."""
    names = FIELDS[event["type"]]
    values = [event.get(name) for name in names]
    while values and names[len(values) - 1] not in event:
        values.pop()
    return [event["type"], *values]


def batch(*events, encoding="map", ts=1.5, rank=0):
    """The payload of a message."""
    return msgspec.msgpack.encode([ts, [as_array(e) if encoding == "array" else e for e in events], rank])
