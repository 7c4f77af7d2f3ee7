"""Messages of vLLM and SGLang, plain and odd, as Hypothesis strategies."""

import contextlib

import msgspec
import pytest
from hypothesis import strategies as st
from kv_wire import ENCODINGS, FIELDS, as_array, batch, cleared, removed, stored

from mulsched.events import _msgpack

__all__ = ["MESSAGES", "PLAIN_MESSAGES", "without_splitting"]

SMALL = st.integers(0, 6)
HASHES = st.lists(SMALL | st.sampled_from([-1, 2**64 - 1, b"x", 1.5]), max_size=4)
ODD = st.sampled_from(
    [None, 0, 1, 2, -1, 2**31, 2**40, "", "GPU", "CPU", "gpu", "\u00e9", b"\0", [], [None], [None, None], {}, {"a": [1]}, 1.5, True]
)  # fmt: skip


def a_store(hashes, parent, tokens, odd):
    return stored(hashes, list(range(4 * len(hashes))) if tokens is None else tokens, parent, **odd)


OPTIONAL = [*FIELDS["BlockStored"], "cache_salt", "later", "type"]
STORES = st.builds(
    a_store,
    HASHES,
    st.none() | SMALL | st.sampled_from([-3, b"p"]),
    st.none() | st.just([]) | st.lists(ODD, max_size=4),
    st.dictionaries(st.sampled_from(OPTIONAL), ODD, max_size=2),
)
REMOVALS = st.builds(
    lambda hashes, odd: removed(hashes, **odd),
    HASHES,
    st.dictionaries(st.sampled_from(["medium", "group_idx", "later", "block_hashes"]), ODD, max_size=1),
)
PLAIN = st.builds(
    lambda n, parent, medium: stored(
        list(range(n)), list(range(4 * n)), parent, medium=medium, extra_keys=[None] * n
    ),
    st.integers(1, 3),
    st.none() | SMALL,
    st.sampled_from(["GPU", "GPU", None, "CPU"]),
)
EVENTS = PLAIN | STORES | REMOVALS | st.just(cleared()) | ODD


def on_the_wire(event, encoding):
    known = isinstance(event, dict) and event.get("type") in list(FIELDS)  # the type may be unhashable
    return as_array(event) if encoding == "array" and known else event


MESSAGES = st.builds(
    lambda events, encodings, head, tail: msgspec.msgpack.encode(
        [head, [on_the_wire(e, c) for e, c in zip(events, encodings * len(events), strict=False)], *tail]
    ),
    st.lists(EVENTS, max_size=6),
    st.lists(st.sampled_from(ENCODINGS), min_size=1, max_size=3),
    st.sampled_from([1.0, 1.0, 1, "x"]),
    st.lists(ODD, max_size=2),
)

ENGINES_STORES = st.builds(
    lambda n, first, size, parent, fields: stored(
        list(range(first, first + n)), [t % 5 for t in range(size * n)], parent, block_size=size, **fields
    ),
    st.integers(0, 3),
    SMALL,
    st.sampled_from([4, 4, 4, 4, 8]),
    st.none() | SMALL,
    st.sampled_from(
        [{}, {}, {}, {}, {"lora_name": "a"}, {"lora_id": 12}, {"medium": "CPU"}, {"medium": "DEVICE"}, {"group_idx": 1}]
    ),
)  # fmt: skip
ENGINES_REMOVALS = st.builds(
    lambda hashes, medium: removed(hashes, medium=medium),
    st.lists(SMALL, max_size=3),
    st.sampled_from(["GPU", "GPU", "GPU", None, "CPU"]),
)
PLAIN_MESSAGES = st.builds(
    lambda events, encoding: batch(*events, encoding=encoding),
    st.lists(ENGINES_STORES | ENGINES_REMOVALS, max_size=8),
    st.sampled_from(ENCODINGS),
)
"""Of events that the core splits into runs."""


@contextlib.contextmanager
def without_splitting():
    """Leave every message to the decoder of single events."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_msgpack, "split_kv_events", lambda data, group_idx, max_parts: None)
        yield
