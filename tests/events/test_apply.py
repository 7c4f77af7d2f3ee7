"""Batches onto a router: decoded, applied, counted."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kv_messages import MESSAGES, PLAIN_MESSAGES, without_splitting
from kv_wire import ENCODINGS, batch, cleared, removed, stored

import mulsched
from mulsched import InvalidEvents, Namespace, Router, block_keys
from mulsched.events import apply_batch, content_key, decode_dynamo, decode_sglang, decode_vllm

PROMPT = list(range(100, 117))


def router_after(*events, decode=decode_vllm, counts=None, tier_cost_ratio=None, **options):
    router = Router(block_size=4, tier_cost_ratio=tier_cost_ratio)
    router.add_instance("gpu-0")
    apply_batch(router, decode(batch(*events, **options), "gpu-0"), Counter() if counts is None else counts)
    return router


def hit(router, **options):
    return router.select(PROMPT, **options).hit_tokens


WHOLE = stored([1, 2, 3, 4], PROMPT[:16])


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([WHOLE], 16),
        ([WHOLE, removed([3])], 8),
        ([WHOLE, cleared()], 0),
        ([stored([1, 2], PROMPT[:8]), stored([3, 4], PROMPT[8:16], 2)], 16),
        ([stored([b"a", b"b"], PROMPT[:8]), stored([b"c"], PROMPT[8:12], b"b"), removed([b"b"])], 4),
        ([stored([-1], PROMPT[:4]), stored([5], PROMPT[4:8], 2**64 - 1)], 8),
        ([stored([3, 4], PROMPT[8:16], 2)], 0),
    ],
)
def test_a_router_finds_what_the_events_say_is_cached(events, expected, encoding):
    assert hit(router_after(*events, encoding=encoding)) == expected


def test_a_block_stored_again_is_a_copy_for_vllm_and_the_same_block_for_sglang():
    events = [WHOLE, WHOLE, removed([1, 2, 3, 4])]
    assert [hit(router_after(*events, decode=decode)) for decode in (decode_vllm, decode_sglang)] == [16, 0]


def test_copies_in_lower_tiers_do_not_count():
    counts = Counter()
    router = router_after(stored([1], PROMPT[:4], medium="CPU"), removed([1], medium="CPU"), counts=counts)
    assert (hit(router), counts["events_of_other_media"], counts["blocks_stored"]) == (0, 2, 0)
    assert hit(router_after(WHOLE, removed([1], medium="CPU"))) == 16


@pytest.mark.parametrize(
    ("decode", "names"),
    [
        (decode_vllm, ("CPU", "STORAGE")),
        (decode_sglang, ("CPU_PINNED", "DISK")),
        (decode_sglang, ("CPU", "DISK")),
    ],
)
def test_copies_in_tiers_that_the_router_counts_are_loaded(decode, names):
    counts = Counter()
    cpu, disk = names
    router = router_after(
        WHOLE,
        stored([1, 2, 3], PROMPT[:12], medium=cpu),
        stored([4], PROMPT[12:16], 3, medium=disk),
        removed([2, 4]),
        removed([1], medium=cpu),
        stored([1], PROMPT[:4], medium="REMOTE"),
        decode=decode,
        counts=counts,
        tier_cost_ratio={"CPU": 0.1, "DISK": 0.5},
    )
    decision = router.select(PROMPT)
    assert (decision.hit_tokens, decision.lower_tier_tokens, decision.new_prefill_tokens) == (4, 12, 4)
    assert {name: n for name, n in counts.items() if n} == {
        "blocks_stored": 4, "blocks_removed": 2, "lower_tier_blocks_stored": 4, "lower_tier_blocks_removed": 1,
        "events_of_other_media": 1,
    }  # fmt: skip


def test_a_clearing_clears_the_tiers_too():
    router = router_after(stored([1], PROMPT[:4], medium="CPU"), cleared(), tier_cost_ratio={"CPU": 0})
    assert router.select(PROMPT).lower_tier_tokens == 0


def test_dynamos_host_tier_is_the_cpu():
    router = Router(block_size=4, tier_cost_ratio={"CPU": 0.25})
    router.add_instance("gpu-0")
    blocks = [{"block_hash": 9, "tokens_hash": int(block_keys(PROMPT, 4)[0])}]
    event = {"event_id": 1, "data": {"stored": {"parent_hash": None, "blocks": blocks}}}
    payload = json.dumps({"worker_id": 1, "storage_tier": "host_pinned", "event": event}).encode()
    apply_batch(router, decode_dynamo(payload, "gpu-0", block_size=4), Counter())
    assert router.select(PROMPT).lower_tier_tokens == 4


def test_an_adapters_blocks_are_found_by_its_requests_only():
    router = router_after(WHOLE | {"lora_name": "sql", "lora_id": 1})
    assert [hit(router, namespace=Namespace(lora=lora)) for lora in ("sql", "other", None)] == [16, 0, 0]


def test_images_are_found_by_requests_with_the_same_images_at_the_same_place():
    router = router_after(WHOLE | {"extra_keys": [None, [("cat", 1)], [("cat", -3)], None]})
    hits = []
    for name in ("cat", "dog"):
        extra = [None, content_key([(name, 1)]), content_key([(name, -3)]), None]
        hits.append(router.select_keys(block_keys(PROMPT, 4, extra_keys=extra), prompt_tokens=17).hit_tokens)
    assert hits == [16, 4]


def test_what_the_router_refuses_is_counted_by_the_name_of_its_error():
    counts = Counter()
    wire = [stored([9], [1] * 8, block_size=8), stored([8], [1] * 4, 7), WHOLE, removed([3, 77]), cleared()]
    router_after(*wire, counts=counts)
    assert {name: n for name, n in counts.items() if n} == {
        "BlockSizeMismatch": 1, "UnknownBlock": 1, "blocks_stored": 4, "blocks_removed": 2, "caches_cleared": 1
    }  # fmt: skip


@pytest.mark.parametrize("removal", [[], [removed([1])]])
@pytest.mark.parametrize(
    "refused",
    [
        {"medium": "CPU"},
        {"medium": "CPU", "block_size": 8, "token_ids": [1] * 8},
        {"block_size": 8, "token_ids": [1] * 8},
    ],
    ids=["medium", "medium and size", "size"],
)
def test_a_run_that_does_not_count_costs_the_same_for_any_number_of_events(refused, removal, monkeypatch):
    if mulsched.BACKEND != "native":
        return  # there are no runs
    router = Router(block_size=4)
    router.add_instance("gpu-0")
    calls = []

    def counted(function):
        return lambda *arguments: (calls.append(function), function(*arguments))[1]

    for name in ("apply", "apply_run"):
        monkeypatch.setattr(Router, name, counted(getattr(Router, name)))
    counts = Counter()
    odd = [stored([n], [1] * 4) | refused for n in range(100)]
    medium = {"medium": refused.get("medium")}
    events = [*odd, *[r | medium for r in removal], *odd]
    apply_batch(router, decode_vllm(batch(*events), "gpu-0"), counts)
    name = "events_of_other_media" if "medium" in refused else "BlockSizeMismatch"
    on_gpu = "medium" not in refused
    assert counts[name] == 200 + (len(removal) if not on_gpu else 0)
    assert counts["blocks_removed"] == (len(removal) if on_gpu else 0)
    assert len(calls) <= 2


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["store", "store", "store", "remove", "clear"]), st.integers(0, 7)), max_size=30
)


@given(OPERATIONS, st.sampled_from(ENCODINGS))
def test_an_engine_that_announces_all_it_does_is_mirrored_exactly(operations, encoding):
    # A cache of one chain of eight blocks, each at most once: stores follow a held parent.
    held, wire = set(), []
    for kind, n in operations:
        if kind == "store" and n not in held and (n == 0 or n - 1 in held):
            held.add(n)
            wire.append(stored([n], [n] * 4, n - 1 if n else None))
        elif kind == "remove" and n in held:
            held.remove(n)
            wire.append(removed([n]))
        elif kind == "clear" and n == 0:
            held.clear()
            wire.append(cleared())
    router = router_after(*wire, encoding=encoding)
    expected = next((n for n in range(8) if n not in held), 8)
    prompt = [n for n in range(8) for _ in range(4)]
    assert router.select([*prompt, 9]).hit_tokens == 4 * expected
    router.index.check()


def outcome(payloads, decode, options, cache_blocks):
    """All that messages do to a router with an instance, or, with ``cache_blocks`` 0, without."""
    router, counts, refused = Router(block_size=4, **options), Counter(), 0
    if cache_blocks != 0:
        router.add_instance("a", cache_blocks=cache_blocks)
        router.route([0, 1, 2, 3, 4], request_id=1)
        router.first_token(1)
    for payload in payloads:
        try:
            batch = decode(payload, "a")
        except InvalidEvents:
            refused += 1
            continue
        apply_batch(router, batch, counts)
    # removals side by side are one event; where only some of them are plain, the core makes more of them
    for name in ("UnknownInstance", "events_of_other_media"):
        counts[name] = min(counts[name], 1)
    indexes = [router.index, *router.lower_tiers.values()]
    for index in indexes:
        index.check()
    return refused, +counts, [(index.dump(), index.removed_unknown) for index in indexes]


@given(
    st.lists(PLAIN_MESSAGES | PLAIN_MESSAGES | MESSAGES, max_size=5),
    st.sampled_from([decode_vllm, decode_sglang]),
    st.sampled_from([{}, {}, {"key_seed": 7}, {"tier_cost_ratio": {"CPU": 0.5}}]),
    st.sampled_from([None, None, 5, 0]),
)
def test_what_the_core_applies_is_what_its_events_do_one_by_one(payloads, decode, options, cache_blocks):
    at_once = outcome(payloads, decode, options, cache_blocks)
    with without_splitting():
        assert at_once == outcome(payloads, decode, options, cache_blocks)


def test_a_message_of_plain_runs_is_applied_without_arrays_of_them(monkeypatch):
    if mulsched.BACKEND != "native":
        return  # there are no runs
    runs = [stored([1, 2], PROMPT[:8]), removed([2]), stored([3], PROMPT[:4], lora_name="sql")]
    monkeypatch.setattr(Router, "apply_run", None)
    monkeypatch.setattr(Router, "apply", None)
    counts = Counter()
    router = router_after(*runs, counts=counts)
    assert counts == {"blocks_stored": 3, "blocks_removed": 1}
    assert [hit(router), hit(router, namespace=Namespace(lora="sql"))] == [4, 4]


def test_a_long_message_is_applied_without_the_gil_and_the_same():
    n = 2_000
    chain = [stored([h], [h] * 4, h - 1 if h else None) for h in range(n)]
    router = router_after(*chain)
    assert router.select([h for h in range(n) for _ in range(4)] + [0]).hit_tokens == 4 * n
