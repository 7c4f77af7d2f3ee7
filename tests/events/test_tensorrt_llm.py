"""TensorRT-LLM's events, as its serialiser to JSON writes them."""

import json
from collections import Counter

import pytest

from mulsched import InvalidEvents, Router
from mulsched.events import apply_batch, decode_tensorrt_llm

PROMPT = list(range(100, 113))


def stored(first, n, parent=None, size=4, level=0):
    blocks = [
        {
            "type": "stored_block",
            "block_hash": block,
            "tokens": [
                {"type": "unique_token", "token_id": token, "token_extra_id": 0}
                for token in PROMPT[4 * block : 4 * block + size]
            ],
            "cache_level": level,
            "priority": 35,
        }
        for block in range(first, first + n)
    ]
    return {"type": "stored", "parent_hash": parent, "blocks": blocks}


def removed(*hashes):
    return {"type": "removed", "block_hashes": list(hashes)}


def updated(block, level=None):
    def changed(old, new):
        return {"type": "event_diff", "new_value": new, "old_value": old}

    if level is None:
        return {"type": "updated", "block_hash": block, "cache_level": None, "priority": changed(35, 50)}
    return {
        "type": "updated",
        "block_hash": block,
        "cache_level": changed(1 - level, level),
        "priority": None,
    }


def decoded(*events):
    answer = [{"event_id": i, "data": data, "window_size": 64} for i, data in enumerate(events)]
    return decode_tensorrt_llm(json.dumps(answer).encode(), "gpu-0", block_size=4)


def decision_after(*events, **options):
    router = Router(block_size=4, **options)
    router.add_instance("gpu-0")
    apply_batch(router, decoded(*events), Counter())
    return router.select(PROMPT)


def hit_after(*events):
    return decision_after(*events).hit_tokens


def on_both(*blocks_by_level):
    """One event of blocks on these levels, in order."""
    whole = stored(0, len(blocks_by_level))
    for block, level in zip(whole["blocks"], blocks_by_level, strict=True):
        block["cache_level"] = level
    return whole


@pytest.mark.parametrize(
    ("events", "hit"),
    [
        ([stored(0, 3)], 12),
        ([stored(0, 2), stored(2, 1, parent=1)], 12),
        ([stored(0, 3), removed(2)], 8),
        ([stored(0, 1), stored(1, 1, parent=0, size=3)], 4),
        ([{"type": "created", "num_blocks_per_cache_level": [9, 9]}, stored(0, 3)], 12),
    ],
)
def test_a_router_finds_what_the_events_say_is_cached(events, hit):
    assert hit_after(*events) == hit


def test_a_block_that_is_moved_off_the_gpu_is_no_hit_any_more():
    assert hit_after(stored(0, 3), updated(1, level=1)) == 4


def test_a_block_that_is_moved_back_is_no_hit_until_it_is_stored_anew():
    moved = [stored(0, 3), updated(2, level=1), updated(2, level=0)]
    assert (hit_after(*moved), hit_after(*moved, stored(2, 1, parent=1))) == (8, 12)


def test_removing_what_was_moved_off_before_changes_nothing():
    assert hit_after(stored(0, 3), updated(2, level=1), removed(2)) == 8


@pytest.mark.parametrize(
    ("events", "hit", "loaded"),
    [
        ([stored(0, 3, level=1)], 0, 12),
        ([on_both(0, 0, 1)], 8, 4),
        ([on_both(0, 1, 1), updated(2, level=0)], 4, 4),
        ([on_both(0, 1, 1), removed(2)], 4, 4),
        ([on_both(0, 0, 1), removed(1)], 4, 0),
        ([on_both(0, 0, 1), updated(1, level=1)], 4, 0),
    ],
)
def test_what_lies_in_the_hosts_memory_is_loaded_and_no_hit(events, hit, loaded):
    decision = decision_after(*events, tier_cost_ratio={"CPU": 0.5})
    assert (decision.hit_tokens, decision.lower_tier_tokens) == (hit, loaded)


def test_what_lies_in_the_hosts_memory_is_no_hit_of_a_router_without_tiers():
    assert (hit_after(stored(0, 3, level=1)), hit_after(on_both(0, 0, 1))) == (0, 8)


def test_a_level_that_is_not_known_is_malformed():
    batch = decoded(stored(0, 3, level=2))
    assert (len(batch.events), batch.malformed, batch.removals_lost) == (0, 1, False)


def test_another_priority_is_ignored_and_counted():
    batch = decoded(stored(0, 3), updated(1))
    assert (len(batch.events), batch.ignored, batch.malformed) == (1, 1, 0)


def test_an_update_that_cannot_be_read_may_have_moved_a_block():
    batch = decoded({"type": "updated", "block_hash": 1, "cache_level": 1})
    assert (batch.malformed, batch.removals_lost) == (1, True)


def test_an_answer_that_is_no_list_of_events_is_refused():
    with pytest.raises(InvalidEvents, match="not a list of TensorRT-LLM's events"):
        decode_tensorrt_llm(b'{"event_id": 1}', "gpu-0", block_size=4)
