"""vLLM's and SGLang's events: both encodings, and what is done with what cannot be read."""

import contextlib
import pickle

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kv_messages import MESSAGES, PLAIN_MESSAGES, without_splitting
from kv_wire import ENCODINGS, as_array, batch, cleared, removed, stored

import mulsched
from mulsched import BlockRemoved, BlockStored, CacheCleared, InvalidEvents, InvalidType, Namespace
from mulsched.events import _msgpack, _msgpack_integers_py, content_key, decode_sglang, decode_vllm
from mulsched.events._msgpack import split_kv_events, unpack_uint32, unpack_uint64

TOKENS = [1, 200, 70_000, 3, 4, 5, 6, 2**32 - 1]


def plain(event):
    """An event with its arrays as lists, to compare."""
    fields = {name: getattr(event, name) for name in event.__dataclass_fields__}
    return type(event), {n: v.tolist() if isinstance(v, np.ndarray) else v for n, v in fields.items()}


def said(batch):
    """A batch's events, those neighbours in one that remove from the same medium."""
    events = []
    for event in batch.events:
        kind, fields = plain(event)
        if (
            events
            and kind is BlockRemoved
            and events[-1][0] is kind
            and events[-1][1]["medium"] == event.medium
        ):
            events[-1][1]["block_hashes"] += fields["block_hashes"]
        else:
            events.append((kind, fields))
    return events


def events_of(*events, encoding="map", decode=decode_vllm, **options):
    return said(decode(batch(*events, encoding=encoding), "gpu-0", **options))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_three_events_are_read_in_order(encoding):
    read = events_of(stored([7, 8], TOKENS), removed([8]), cleared(), encoding=encoding)
    assert read == [
        plain(BlockStored("gpu-0", [7, 8], None, 4, TOKENS)),
        plain(BlockRemoved("gpu-0", [8])),
        plain(CacheCleared("gpu-0")),
    ]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_batch_says_when_and_on_which_rank(encoding):
    decoded = decode_vllm(batch(cleared(), encoding=encoding, ts=12.25, rank=3), "a")
    assert (decoded.timestamp, decoded.data_parallel_rank) == (12.25, 3)


@pytest.mark.parametrize(
    "payload",
    [[1.0, []], {"ts": 1, "events": []}, {"ts": 1.0, "events": [], "more": [1]}, [1.0, [], None, "more"]],
)
def test_a_batch_may_be_short_or_long_or_a_map(payload):
    decoded = decode_vllm(msgspec.msgpack.encode(payload), "a")
    assert (decoded.timestamp, decoded.data_parallel_rank, decoded.events) == (1.0, None, [])


@pytest.mark.parametrize("hashes", [[0, 2**64 - 1], [-1, -(2**63)], [b"\0" * 32, b"\1" * 32], [b"x", 5]])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_hashes_are_numbers_or_bytes(hashes, encoding):
    [(_, event), (_, gone)] = events_of(stored(hashes, TOKENS), removed(hashes), encoding=encoding)
    expected = hashes if any(isinstance(h, bytes) for h in hashes) else [h % 2**64 for h in hashes]
    assert (event["block_hashes"], gone["block_hashes"]) == (expected, expected)


@pytest.mark.parametrize("parent", [None, 5, -5, b"\2" * 32])
def test_a_parent_is_a_hash_or_none(parent):
    [(_, event)] = events_of(stored([7, 8], TOKENS, parent))
    assert event["parent_hash"] == (parent % 2**64 if isinstance(parent, int) else parent)


def test_an_array_that_ends_early_has_the_defaults():
    short = ["BlockStored", [7, 8], None, TOKENS, 4]
    decoded = decode_vllm(msgspec.msgpack.encode([1.0, [short, ["BlockRemoved", [7]]], 0]), "gpu-0")
    assert [plain(e) for e in decoded.events] == [
        plain(BlockStored("gpu-0", [7, 8], None, 4, TOKENS)),
        plain(BlockRemoved("gpu-0", [7])),
    ]


def test_fields_that_are_not_known_are_passed_over():
    long = [*as_array(stored([7, 8], TOKENS, extra_keys=None, group_idx=0, kv_cache_spec_kind="x")), 1, [2]]
    for event in (long, stored([7, 8], TOKENS, later={"a": [1]}, session_id="s")):
        decoded = decode_vllm(msgspec.msgpack.encode([1.0, [event], 0]), "gpu-0")
        assert [plain(e) for e in decoded.events] == [plain(BlockStored("gpu-0", [7, 8], None, 4, TOKENS))]


# -- what is not just blocks on the GPU ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("medium", "name"),
    [(None, "GPU"), ("GPU", "GPU"), ("CPU", "CPU"), ("CPU_PINNED", "CPU"), ("STORAGE", "DISK"), ("DISK", "DISK"), ("EXTERNAL", "EXTERNAL"), ("nvlink", "NVLINK")],
)  # fmt: skip
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_copies_on_different_media_are_told_apart(medium, name, encoding):
    read = events_of(stored([7, 8], TOKENS, medium=medium), removed([7], medium=medium), encoding=encoding)
    assert [event["medium"] for _, event in read] == [name, name]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_other_cache_groups_are_left_out_and_counted(encoding):
    wire = [f for g in (None, 0, 1) for f in (stored([7, 8], TOKENS, group_idx=g), removed([7], group_idx=g))]
    decoded = decode_vllm(batch(*wire, encoding=encoding), "a")
    assert (len(decoded.events), decoded.ignored) == (4, 2)
    assert decode_vllm(batch(*wire), "a", group_idx=1).ignored == 2


@pytest.mark.parametrize(
    ("fields", "namespace"),
    [
        ({}, None),
        ({"lora_name": "sql", "lora_id": 1}, Namespace(lora="sql")),
        ({"lora_id": 1}, Namespace(lora="1")),
        ({"extra_keys": [("salt",), None]}, Namespace(cache_salt="salt")),
        (
            {"lora_name": "sql", "extra_keys": [("sql", "salt"), ("sql",)]},
            Namespace(lora="sql", cache_salt="salt"),
        ),
        ({"lora_name": "sql", "extra_keys": ["sql", "sql"]}, Namespace(lora="sql")),
    ],
)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_adapter_and_salt_become_the_namespace(fields, namespace, encoding):
    [(_, event)] = events_of(stored([7, 8], TOKENS, **fields), encoding=encoding)
    assert (event["namespace"], event["extra_keys"]) == (namespace, None)


def test_multimodal_content_becomes_content_keys():
    extra = [(("image", 2),), (("image", -2), ("other", 1))]
    [(_, event)] = events_of(stored([7, 8], TOKENS, extra_keys=extra))
    assert event["extra_keys"] == [content_key([("image", 2)]), content_key([("image", -2), ("other", 1)])]


def test_content_that_differs_in_any_way_has_different_keys():
    items = [[("a", 0)], [("a", 1)], [("a", -1)], [("ab", 0)], [("a", 0), ("b", 0)], [("a", 0), ("a", 0)]]
    assert len({content_key(i) for i in items}) == len(items)


def test_blocks_without_tokens_are_left_out_and_counted():
    decoded = decode_vllm(batch(stored([7], [], block_size=0, medium="CPU"), removed([7])), "a")
    assert (len(decoded.events), decoded.ignored, decoded.malformed) == (1, 1, 0)


def test_a_run_of_removals_becomes_one_event_for_each_medium():
    read = events_of(removed([1]), removed([2, 3]), removed([4], medium="CPU"), removed([b"5"]), removed([6]))
    assert [(e["medium"], e["block_hashes"]) for _, e in read] == [
        ("GPU", [1, 2, 3]), ("CPU", [4]), ("GPU", [b"5", 6])
    ]  # fmt: skip


# -- SGLang -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", [
    {"type": "BlockStored", "block_hashes": [7, -8], "parent_block_hash": None, "token_ids": TOKENS, "block_size": 4,
     "lora_id": None, "medium": "CPU_PINNED", "cache_salt": "salt"},
    ["BlockStored", [7, -8], None, TOKENS, 4, None, "CPU_PINNED", {"cache_salt": "salt"}],
])  # fmt: skip
def test_sglangs_salt_is_read_from_a_field_or_a_map_in_place_of_the_adapter(wire):
    decoded = decode_sglang(msgspec.msgpack.encode([1.0, [wire], 2]), "a")
    assert [plain(event) for event in decoded.events] == [
        plain(BlockStored("a", [7, 2**64 - 8], None, 4, TOKENS, namespace=Namespace(cache_salt="salt"), medium="CPU", counts_copies=False))
    ]  # fmt: skip


def test_only_vllm_keeps_copies_of_a_block():
    wire = batch(stored([7, 8], TOKENS))
    assert [decode(wire, "a").events[0].counts_copies for decode in (decode_vllm, decode_sglang)] == [
        True,
        False,
    ]


# -- what cannot be read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_event_of_unknown_type_costs_only_itself(encoding):
    payload = msgspec.msgpack.decode(batch(stored([7, 8], TOKENS), removed([8]), encoding=encoding))
    payload[1].insert(1, ["Touched", 1] if encoding == "array" else {"type": "Touched", "x": 1})
    decoded = decode_vllm(msgspec.msgpack.encode(payload), "a")
    assert (len(decoded.events), decoded.unknown, decoded.malformed) == (2, 1, 0)


def test_both_encodings_may_be_in_one_batch():
    payload = [1.0, [stored([7, 8], TOKENS), as_array(removed([8])), cleared()], 0]
    assert len(decode_vllm(msgspec.msgpack.encode(payload), "a").events) == 3


@pytest.mark.parametrize(
    "event",
    [
        stored([7], TOKENS),  # eight tokens are not one block of four
        stored([7, 8], TOKENS, block_size=-4),
        stored([7, 8], TOKENS, block_size="4"),
        stored([7, 8], [-1, *TOKENS[1:]]),
        stored([7, 8], [2**32, *TOKENS[1:]]),
        stored([7, 8], [(1, 2)] * 8),
        stored("78", TOKENS),
        stored([7.5, 8], TOKENS),
        stored([7, 8], TOKENS, parent="x"),
        stored([7, 8], TOKENS, extra_keys=[None]),
        stored([7, 8], TOKENS, extra_keys=[None, 1.5]),
        stored([7, 8], TOKENS, extra_keys=[None, [["image", 2**63]]]),
        {"type": "BlockStored"},
    ],
)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_store_that_cannot_be_read_costs_only_itself(event, encoding):
    decoded = decode_vllm(batch(removed([1]), event, removed([8]), encoding=encoding), "a")
    assert (decoded.malformed, decoded.removals_lost) == (1, False)
    assert said(decoded) == [plain(BlockRemoved("a", [1, 8]))]


@pytest.mark.parametrize(
    "event", [removed(7), removed(["x"]), {"type": "BlockRemoved"}, {"a": 1}, [], 7, None, {"type": 1}]
)
def test_what_may_have_been_a_removal_is_said_to_be_lost(event):
    decoded = decode_vllm(msgspec.msgpack.encode([1.0, [event], 0]), "a")
    assert (decoded.malformed, decoded.removals_lost) == (1, True)


HOSTILE = {
    "nothing": b"",
    "a number": b"\x01",
    "no events": msgspec.msgpack.encode([1.0]),
    "events that are none": msgspec.msgpack.encode([1.0, 7]),
    "a billion events claimed": b"\x93\xcb" + b"\0" * 8 + b"\xdd\x3b\x9a\xca\x00",
    "a gigabyte claimed": b"\x93\xcb" + b"\0" * 8 + b"\xc6\x40\x00\x00\x00",
    "deep arrays": b"\x91" * 100_000,
    "deep maps": b"\x81\xa1a" * 100_000,
    "deep events": b"\x93\xcb" + b"\0" * 8 + b"\x91" * 100_000,
    "a deep extra key": b"\x93\xcb" + b"\0" * 8 + b"\x91\x81\xaaextra_keys" + b"\x91" * 100_000,
}


@pytest.mark.parametrize("payload", HOSTILE.values(), ids=HOSTILE)
def test_a_message_that_is_no_batch_is_refused(payload):
    with pytest.raises(InvalidEvents, match="not a batch of KV events"):
        decode_vllm(payload, "a")


def test_a_payload_that_is_not_bytes_is_refused():
    with pytest.raises(InvalidType, match="payload must be bytes, got str"):
        decode_vllm("x", "a")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_truncated_message_is_refused_at_every_length(encoding):
    whole = batch(stored([7, b"8"], TOKENS, extra_keys=[("salt",), None]), removed([8]), encoding=encoding)
    for length in range(len(whole)):
        with pytest.raises(InvalidEvents):
            decode_vllm(whole[:length], "a")


@given(st.binary(max_size=60), st.integers(0, 200), st.sampled_from(ENCODINGS))
def test_bytes_that_are_changed_anywhere_raise_nothing_else(noise, at, encoding):
    whole = batch(stored([7, 8], TOKENS, extra_keys=[("s", ("i", 1)), None]), removed([8]), encoding=encoding)
    at %= len(whole)
    with contextlib.suppress(InvalidEvents):
        decode_vllm(whole[:at] + noise + whole[at + len(noise) :], "a")


# -- what the core splits, and what it leaves to the decoder ------------------------------------------------------


def whole(payload, decode):
    """All that a payload says."""
    try:
        decoded = decode(payload, "a")
    except InvalidEvents:
        return "refused"
    counts = decoded.unknown, decoded.ignored, decoded.malformed, decoded.removals_lost
    return repr(decoded.timestamp), decoded.data_parallel_rank, counts, said(decoded)


def unsplit(payload, decode):
    """The same by the decoder of single events."""
    with without_splitting():
        return whole(payload, decode)


@given(MESSAGES | PLAIN_MESSAGES, st.sampled_from([decode_vllm, decode_sglang]))
def test_splitting_a_message_changes_nothing_of_what_it_says(payload, decode):
    assert whole(payload, decode) == unsplit(payload, decode)


@given(MESSAGES, st.binary(max_size=6), st.integers(0, 400), st.booleans())
def test_splitting_a_broken_message_changes_nothing_of_what_it_says(payload, noise, at, cut):
    at %= len(payload)
    payload = payload[:at] + noise + (b"" if cut else payload[at + len(noise) :])
    assert whole(payload, decode_vllm) == unsplit(payload, decode_vllm)


def test_what_an_engine_writes_is_split_and_not_decoded_event_by_event():
    if mulsched.BACKEND == "native":
        plain = {
            "extra_keys": [None, None],
            "group_idx": 0,
            "kv_cache_spec_kind": "full",
            "kv_cache_spec_sliding_window": None,
        }
        events = [
            stored([7, 8], TOKENS, **plain),
            removed([7], group_idx=0),
            stored([9, 7], TOKENS, 8, **plain),
        ]
        for encoding in ENCODINGS:
            [run] = decode_vllm(batch(*events, encoding=encoding), "a").parts
            assert run.table.tolist() == [[0, 2, 0], [2, 1, 0], [1, 2, 8]]


def test_runs_end_where_the_adapter_or_the_medium_changes():
    events = [
        stored([n], TOKENS[:4], **more)
        for n, more in enumerate([{}, {}, {"lora_name": "l"}, {"lora_id": 3}, {"medium": "CPU"}])
    ]
    decoded = decode_vllm(batch(*events, removed([0], medium="CPU")), "a")
    assert [event.namespace and event.namespace.lora for event in decoded.events[:-1]] == [
        None,
        None,
        "l",
        "3",
        None,
    ]
    if mulsched.BACKEND == "native":
        assert [len(run) for run in decoded.parts] == [2, 1, 1, 2]


def test_a_payload_may_be_of_a_class_of_bytes():
    class Frame(bytes):
        pass

    message = batch(stored([7, 8], TOKENS), removed([8]))
    assert whole(Frame(message), decode_vllm) == whole(message, decode_vllm)


def test_a_batch_can_be_sent_to_another_process():
    decoded = decode_vllm(batch(stored([7, 8], TOKENS, lora_name="a"), removed([8])), "a")
    there = pickle.loads(pickle.dumps(decoded))
    assert (there.timestamp, said(there)) == (decoded.timestamp, said(decoded))


def test_the_runs_of_a_message_are_a_sequence():
    if mulsched.BACKEND != "native":
        return  # there are no runs
    stores = [stored([n], TOKENS[:4], lora_name=name) for n, name in enumerate("abc")]
    parts = decode_vllm(batch(*stores), "a").parts
    names = [run.namespace.lora for run in (*parts, parts[-1], *parts[:2])]
    assert (len(parts), names) == (3, ["a", "b", "c", "c", "a", "b"])
    with pytest.raises(IndexError):
        parts[3]


@pytest.mark.parametrize(("events", "clears"), [([], False), ([removed([1])], False), ([cleared()], True)])
def test_a_batch_says_whether_the_cache_was_cleared(events, clears):
    assert decode_vllm(batch(stored([7], TOKENS[:4]), *events), "a").clears == clears


ALTERNATING = {
    "nothing known": [None],
    "media": [removed([1]), removed([1], medium="CPU")],
    "adapters": [stored([7], TOKENS[:4], lora_name="a"), stored([7], TOKENS[:4], lora_name="b")],
    "plain and not": [removed([1]), ["Touched"]],
}


@pytest.mark.parametrize("events", ALTERNATING.values(), ids=ALTERNATING)
def test_a_message_of_too_many_parts_is_not_split_and_its_events_are_not_looked_at(events, monkeypatch):
    payload = msgspec.msgpack.encode([1.0, events * (20_000 // len(events)), 0])
    assert split_kv_events(payload, 0, LIMIT) is None
    counted = Counted(monkeypatch)
    with pytest.raises(InvalidEvents, match="must not have more than 16384"):
        decode_vllm(payload, "a")
    assert counted.calls == 0


def test_a_message_may_have_as_many_parts_as_the_limit():
    payload = batch(*[removed([1]), removed([1], medium="CPU")] * 3)
    if mulsched.BACKEND == "native":
        assert [split_kv_events(payload, 0, most) is None for most in (5, 6)] == [True, False]


# -- how much is looked at ----------------------------------------------------------------------------------------

BAD = [
    None,
    [],
    {"type": 1},
    ["BlockRemoved", 7],
    stored([7], TOKENS),
    stored([7, 8], TOKENS, extra_keys=[None, 1.5]),
]
LIMIT = 16_384
NOT_PLAIN = {
    "unknown types": ["Touched"],
    "clearings": ["AllBlocksCleared"],
    "removals of hashes that are bytes": ["BlockRemoved", [b""]],
    "salts": stored([7], TOKENS[:4], extra_keys=[["salt"]]),
    "stores elsewhere": stored([7], TOKENS[:4], medium="CPU"),
}


class Counted:
    """Calls of the decoders and readers of single events."""

    def __init__(self, patch):
        self.calls = 0
        for name in ("_decode_map_event", "_decode_array_event", "_decode_map_type", "_decode_array_type"):
            patch.setattr(_msgpack, name, self._counting(getattr(_msgpack, name)))
        patch.setattr(_msgpack, "_stored", self._counting(_msgpack._stored))
        patch.setattr(_msgpack, "_hashes", self._counting(_msgpack._hashes))

    def _counting(self, function):
        def counted(*arguments):
            self.calls += 1
            return function(*arguments)

        return counted


@pytest.mark.parametrize("framing", [[1.0, ..., 0], [1, ..., 0], {"ts": 1.0, "events": ...}])
@pytest.mark.parametrize("bad", BAD, ids=repr)
def test_a_message_is_given_up_after_64_events_that_cannot_be_read(bad, framing, monkeypatch):
    def message(n):
        events = [removed([1]), *[bad] * n]
        if isinstance(framing, dict):
            return msgspec.msgpack.encode(framing | {"events": events})
        return msgspec.msgpack.encode([events if part is ... else part for part in framing])

    assert decode_vllm(message(64), "a").malformed == 64
    counted = Counted(monkeypatch)
    with pytest.raises(InvalidEvents, match="more than 64 events of a message cannot be read"):
        decode_vllm(message(10_000), "a")
    assert counted.calls <= 5 * 65


@pytest.mark.parametrize("event", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_a_message_is_given_up_after_16384_events_that_are_not_plain(event, monkeypatch):
    decode_vllm(msgspec.msgpack.encode([1.0, [event] * LIMIT, 0]), "a")
    counted = Counted(monkeypatch)
    with pytest.raises(InvalidEvents, match="must not have more than 16384 events that are not plain"):
        decode_vllm(msgspec.msgpack.encode([1.0, [event] * 60_000, 0]), "a")
    assert counted.calls <= 3 * (LIMIT + 1)


def test_a_message_claims_how_many_events_it_has_and_too_many_are_not_looked_at(monkeypatch):
    counted = Counted(monkeypatch)
    for framing in ([1, [None] * 100_000], {"ts": 1.0, "events": [None] * 100_000}):
        with pytest.raises(InvalidEvents, match="must not have more than 16384"):
            decode_vllm(msgspec.msgpack.encode(framing), "a")
    assert counted.calls == 0


@pytest.mark.parametrize(
    "event",
    [removed([b""] * 300_000), stored([7], TOKENS[:4], extra_keys=[["a"] * 300_000])],
    ids=["hashes", "keys"],
)
def test_one_event_must_not_have_what_many_may_not(event, monkeypatch):
    decoded = []
    for name in ("_decode_hashes", "_decode_extra_keys"):
        monkeypatch.setattr(_msgpack, name, decoded.append)
    with pytest.raises(InvalidEvents, match="must not have more than 16384"):
        decode_vllm(batch(event), "a")
    assert decoded == []


def test_what_an_engine_writes_of_a_long_prompt_is_within_the_limits():
    pages = [stored([n], [n], n - 1 if n else None, block_size=1, cache_salt="s") for n in range(8_192)]
    assert len(decode_sglang(batch(*pages), "a").events) == 8_192
    n = 10_000
    hashes = [b"%032d" % i for i in range(n)]
    [event] = decode_vllm(batch(stored(hashes, [70_000] * 16 * n, block_size=16)), "a").events
    assert len(event.block_hashes) == n


@pytest.mark.parametrize("claimed", [2**32 - 1, 100_000])
def test_many_events_that_each_claim_a_long_array_take_linear_time(claimed):
    event = b"\x83\xa4type\xacBlockRemoved\xacblock_hashes\xdd" + claimed.to_bytes(4, "big") + b"\xc0"
    payload = b"\x93\xcb" + bytes(8) + b"\xdc\x27\x10" + event * 10_000
    assert whole(payload, decode_vllm) == "refused"


# -- integers ---------------------------------------------------------------------------------------------------

ANYTHING = st.recursive(
    st.integers(-(2**63), 2**64 - 1) | st.integers(-300, 300) | st.none() | st.booleans() | st.floats() | st.text(max_size=3) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
ARRAYS = st.lists(st.integers(-(2**63), 2**64 - 1) | st.integers(-300, 300), max_size=70) | ANYTHING


def as_list(array):
    return None if array is None else (array.dtype.name, array.tolist())


@given(ARRAYS.map(msgspec.msgpack.encode), st.binary(max_size=2), st.integers(0, 2))
def test_both_readers_of_integers_agree_on_anything(data, tail, cut):
    data = data[: len(data) - cut] + tail
    for name, read in (("unpack_uint32", unpack_uint32), ("unpack_uint64", unpack_uint64)):
        assert as_list(read(data)) == as_list(getattr(_msgpack_integers_py, name)(data))


@pytest.mark.parametrize("read", [unpack_uint32, _msgpack_integers_py.unpack_uint32])
@pytest.mark.parametrize("n", [0, 15, 16, 65_535, 65_536])
def test_arrays_of_every_header_are_read(read, n):
    assert read(msgspec.msgpack.encode(list(range(n)))).tolist() == list(range(n))


def test_a_view_of_wider_items_is_read_by_its_bytes():
    message = batch(stored([1], [1, 2, 3, 4], lora_name="a"), stored([2], [5, 6, 7, 8], 1, cache_salt="abc"))
    assert len(message) % 2 == 0
    read, expected = (decode_vllm(m, "a") for m in (memoryview(message).cast("H"), message))
    assert (len(read.events), read.malformed) == (len(expected.events), expected.malformed) == (2, 0)
