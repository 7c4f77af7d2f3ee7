"""Storage tiers below the GPU: what is loaded, what it costs, and what events do to it."""

from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulsched import BlockRemoved, BlockStored, CacheCleared, Multiplicative, Router
from mulsched.errors import InvalidArgument, InvalidType, UnknownBlock, UnknownInstance
from mulsched.indicators import COLUMNS
from mulsched.scorers import Linear

BLOCKS = list(range(10))  # block keys; the engine's names are 100 more
PROMPT_TOKENS = 42
SCORES = (
    Multiplicative(),
    Linear(
        {"new_prefill_tokens": 0.7, "running": 0.3},
        normalise={"new_prefill_tokens": "prompt", "running": "max"},
    ),
)


def router(tier_cost_ratio=None, instances=("a", "b"), **options):
    made = Router(block_size=4, tier_cost_ratio=tier_cost_ratio, **options)
    for instance in instances:
        made.add_instance(instance)
    return made


def keys(blocks):
    return np.array(blocks, dtype=np.uint64)


def store(r, medium, blocks, instance="a", parent="the block before"):
    if parent == "the block before":
        parent = None if blocks[0] == 0 else 99 + blocks[0]
    names = [100 + block for block in blocks]
    r.apply(BlockStored(instance, names, parent, 4, block_keys=keys(blocks), medium=medium))


def remove(r, medium, blocks, instance="a"):
    r.apply(BlockRemoved(instance, [100 + block for block in blocks], medium))


def indicators(r, instance="a", blocks=BLOCKS, prompt_tokens=PROMPT_TOKENS):
    decision = r.select_keys(keys(blocks), prompt_tokens=prompt_tokens, candidates=[instance])
    return decision.hit_tokens, decision.lower_tier_tokens, decision.new_prefill_tokens


def test_by_default_only_the_gpu_counts():
    r = router()
    store(r, "GPU", BLOCKS[:3])
    store(r, "CPU", BLOCKS)
    assert indicators(r) == (12, 0, 30)
    assert (r.media, r.lower_tiers) == (("GPU",), {})


def test_what_a_tier_holds_after_the_gpus_part_is_loaded_at_its_price():
    r = router({"CPU": 0.25})
    store(r, "GPU", BLOCKS[:3])
    store(r, "CPU", BLOCKS[3:8])
    assert indicators(r) == (12, 20, 42 - 12 - 20 + 5)


def test_a_price_is_rounded_up_to_a_token():
    r = router({"CPU": 0.01})
    store(r, "CPU", BLOCKS[:1])
    assert indicators(r) == (0, 4, 42 - 4 + 1)


def test_a_block_on_both_media_is_not_loaded():
    r = router({"CPU": 0.5})
    store(r, "GPU", BLOCKS[:4])
    store(r, "CPU", BLOCKS[:6])
    assert indicators(r) == (16, 8, 18 + 4)


def test_eviction_from_one_medium_leaves_the_copy_on_the_other():
    r = router({"CPU": 0.5})
    store(r, "GPU", BLOCKS[:4])
    store(r, "CPU", BLOCKS[:4])
    remove(r, "GPU", BLOCKS[2:4])
    assert indicators(r)[:2] == (8, 8)
    remove(r, "CPU", BLOCKS[:4])
    assert indicators(r)[:2] == (8, 0)


def test_a_block_that_only_a_tier_holds_ends_the_gpus_part():
    r = router({"CPU": 0})
    store(r, "GPU", BLOCKS[:6])
    store(r, "CPU", [2])
    remove(r, "GPU", [2])
    assert indicators(r) == (8, 4, 30)  # block 3 is on the GPU, and the CPU is asked for it


def test_tiers_are_asked_from_the_cheapest_each_from_where_the_one_before_ended():
    r = router({"DISK": 0.5, "CPU": 0.25})
    assert r.media == ("GPU", "CPU", "DISK")
    store(r, "GPU", BLOCKS[:2])
    store(r, "CPU", BLOCKS[2:4])
    store(r, "DISK", BLOCKS[:7])
    store(r, "CPU", BLOCKS[7:8])  # behind the disk's part: the CPU is not asked again
    assert indicators(r) == (8, 20, 42 - 28 + 2 + 6)


def test_the_last_token_of_a_prompt_is_computed_though_a_tier_has_it():
    r = router({"CPU": 0})
    store(r, "GPU", BLOCKS[:2])
    store(r, "CPU", BLOCKS)
    assert indicators(r, prompt_tokens=40) == (8, 28, 4)


def test_a_prefix_in_flight_is_not_loaded_again():
    r = router({"CPU": 0.5})
    store(r, "CPU", BLOCKS)
    r.route_keys(keys(BLOCKS[:5]), prompt_tokens=20, request_id=1, candidates=["a"])
    assert indicators(r)[:2] == (20, 20)


def test_who_counted_on_a_load_that_is_cancelled_is_booked_for_it():
    r = router({"CPU": 0.25})
    store(r, "CPU", BLOCKS)
    for request_id in (1, 2):
        r.route_keys(keys(BLOCKS), prompt_tokens=PROMPT_TOKENS, request_id=request_id, candidates=["a"])
    assert r.load("a")["queued_prefill_tokens"] == 2 + 10 + 2
    r.cancel(1)
    assert r.load("a")["queued_prefill_tokens"] == 2 + 10


def test_the_price_is_what_waits_in_the_queue():
    r = router({"CPU": 0.25})
    store(r, "CPU", BLOCKS)
    r.route_keys(keys(BLOCKS), prompt_tokens=PROMPT_TOKENS, request_id=1, candidates=["a"])
    assert r.load("a")["queued_prefill_tokens"] == 2 + 10
    r.first_token(1)
    assert r.load("a")["queued_prefill_tokens"] == 0


def test_a_copy_below_the_gpu_beats_none_and_loses_to_one_on_the_gpu():
    r = router({"CPU": 0.25}, instances="abc")
    store(r, "CPU", BLOCKS, "b")
    assert r.select_keys(keys(BLOCKS), prompt_tokens=PROMPT_TOKENS).instance == "b"
    store(r, "GPU", BLOCKS, "c")
    assert r.select_keys(keys(BLOCKS), prompt_tokens=PROMPT_TOKENS).instance == "c"


def test_an_explanation_shows_what_is_loaded_if_anything_is():
    r = router({"CPU": 0.25})
    assert "lower_tier_tokens" not in r.select_keys(keys(BLOCKS), prompt_tokens=PROMPT_TOKENS).explain()
    store(r, "CPU", BLOCKS)
    head, chosen = r.select_keys(keys(BLOCKS), prompt_tokens=PROMPT_TOKENS).explain().splitlines()[1:3]
    assert (head.split()[-1], chosen.split()[-1]) == ("lower_tier_tokens", "40")


# -- events ---------------------------------------------------------------------------------------------


def test_blocks_of_a_tier_may_follow_one_that_another_medium_holds():
    r = router({"CPU": 0, "DISK": 0})
    store(r, "GPU", BLOCKS[:2])
    store(r, "CPU", BLOCKS[2:4])
    store(r, "DISK", BLOCKS[4:6])
    assert [r.lower_tiers[medium].blocks("a") for medium in ("CPU", "DISK")] == [2, 2]
    assert indicators(r)[:2] == (8, 16)


def test_a_parent_that_no_medium_holds_raises_and_stores_nothing():
    r = router({"CPU": 0})
    with pytest.raises(UnknownBlock, match="engine hash 101"):
        store(r, "CPU", BLOCKS[2:4])
    assert r.lower_tiers["CPU"].blocks("a") == 0


def test_the_gpu_does_not_follow_a_block_that_only_a_tier_holds():
    r = router({"CPU": 0})
    store(r, "CPU", BLOCKS[:2])
    with pytest.raises(UnknownBlock):
        store(r, "GPU", BLOCKS[2:4])


def test_clearing_clears_every_tier():
    r = router({"CPU": 0, "DISK": 0.5})
    for medium in r.media:
        store(r, medium, BLOCKS)
    r.apply(CacheCleared("a"))
    assert indicators(r) == (0, 0, 42)


def test_events_of_media_that_are_not_named_change_nothing():
    r = router({"CPU": 0})
    store(r, "TAPE", BLOCKS)
    remove(r, "TAPE", BLOCKS)
    assert indicators(r) == (0, 0, 42)
    with pytest.raises(UnknownInstance):
        store(r, "CPU", BLOCKS, "c")


def test_an_instance_that_is_removed_takes_its_tiers_along():
    r = router({"CPU": 0})
    store(r, "CPU", BLOCKS)
    r.remove_instance("a")
    r.add_instance("c")
    assert indicators(r, "c") == (0, 0, 42)
    store(r, "CPU", BLOCKS[:5], "c")
    assert (indicators(r, "c")[1], indicators(r, "b")[1]) == (20, 0)


def test_a_predicted_cache_stays_predicted_while_only_tiers_tell():
    r = Router(block_size=4, tier_cost_ratio={"CPU": 0})
    r.add_instance("a", cache_blocks=100)
    r.route_keys(keys(BLOCKS[:3]), prompt_tokens=12, request_id=1)
    r.finish(1)
    store(r, "CPU", BLOCKS)
    assert indicators(r)[:2] == (12, 28)


@pytest.mark.parametrize(
    ("ratios", "error", "message"),
    [
        ([("CPU", 0.1)], InvalidType, "must map media to numbers, got list"),
        ({1: 0.1}, InvalidType, "must be a str, got int"),
        ({"GPU": 0.1}, InvalidArgument, "another than GPU, in capitals, got 'GPU'"),
        ({"cpu": 0.1}, InvalidArgument, "in capitals, got 'cpu'"),
        ({"": 0.1}, InvalidArgument, "got ''"),
        ({"CPU": True}, InvalidType, "ratio of CPU must be a number, got bool"),
        ({"CPU": "0.1"}, InvalidType, "must be a number, got str"),
        ({"CPU": -0.1}, InvalidArgument, "must lie in 0..1, got -0.1"),
        ({"CPU": 1.5}, InvalidArgument, "must lie in 0..1, got 1.5"),
        ({"CPU": float("nan")}, InvalidArgument, "got nan"),
    ],
)
def test_a_cost_ratio_that_is_none_is_refused(ratios, error, message):
    with pytest.raises(error, match=message):
        router(ratios)


# -- properties -----------------------------------------------------------------------------------------

MEDIA = ("GPU", "CPU", "DISK")
RATIOS = st.fixed_dictionaries({}, optional={m: st.sampled_from([0, 0.1, 0.25, 0.5, 1]) for m in MEDIA[1:]})
# blocks of a chain on media of two instances: a parent is always known, since engines name blocks alike
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["store", "store", "store", "remove", "clear"]),
        st.sampled_from(MEDIA),
        st.sampled_from("ab"),
        st.integers(0, 7),
        st.integers(1, 8),
    ),
    max_size=30,
)


def carry_out(r, operations):
    """Apply the operations; return what each instance holds on each medium, by the meaning of the events."""
    held = {(instance, medium): [] for instance in "ab" for medium in MEDIA}
    for kind, medium, instance, first, n in operations:
        blocks = BLOCKS[first : first + n]
        there = held[instance, medium]
        if kind == "clear":
            r.apply(CacheCleared(instance))
            held |= {(instance, m): [] for m in MEDIA}
        elif medium not in r.media:
            (store if kind == "store" else remove)(r, medium, blocks, instance)
        elif kind == "remove":
            remove(r, medium, blocks, instance)
            for block in blocks:
                if block in there:
                    there.remove(block)
        else:
            known = [medium] if medium == "GPU" else r.media
            if first == 0 or any(first - 1 in held[instance, m] for m in known):
                store(r, medium, blocks, instance)
                there += blocks
            else:
                with pytest.raises(UnknownBlock):
                    store(r, medium, blocks, instance)
    return held


def expected(held, ratios, instance, prompt_tokens):
    """(hit, lower, new) in plain steps."""
    most = (prompt_tokens - 1) // 4 * 4
    at, ends, cost = 0, [], 0.0
    for medium in ("GPU", *sorted(ratios, key=ratios.get)):
        while at < prompt_tokens // 4 and at in held[instance, medium]:
            at += 1
        ends.append(min(4 * at, most))
        cost += 0 if medium == "GPU" else ratios[medium] * (ends[-1] - ends[-2])
    return ends[0], ends[-1] - ends[0], prompt_tokens - ends[-1] + ceil(cost)


@given(RATIOS, OPERATIONS, st.integers(1, 42))
def test_a_router_counts_what_a_naive_model_counts(ratios, operations, prompt_tokens):
    r = router(ratios)
    held = carry_out(r, operations)
    for instance in "ab":
        found = indicators(r, instance, BLOCKS[: prompt_tokens // 4], prompt_tokens)
        assert expected(held, ratios, instance, prompt_tokens) == found
    for index in r.lower_tiers.values():
        index.check()


@given(RATIOS, OPERATIONS, st.sampled_from(MEDIA), st.integers(0, 9))
def test_a_block_more_on_any_medium_never_makes_an_instance_look_worse(ratios, operations, medium, block):
    r = router(ratios)
    held = carry_out(r, operations)
    before = r.select_keys(keys(BLOCKS), prompt_tokens=PROMPT_TOKENS, candidates=["a"])
    if block and not any(block - 1 in held["a", m] for m in (["GPU"] if medium == "GPU" else r.media)):
        return
    store(r, medium, [block])
    after = r.select_keys(keys(BLOCKS), prompt_tokens=PROMPT_TOKENS, candidates=["a"])
    assert after.new_prefill_tokens <= before.new_prefill_tokens
    assert after.score <= before.score
    assert after.columns.p_tokens[0] >= 1


@given(OPERATIONS, st.integers(1, 42))
def test_at_a_ratio_of_1_a_tier_is_worth_nothing(operations, prompt_tokens):
    decisions = []
    for ratios in (None, {"CPU": 1, "DISK": 1.0}):
        r = router(ratios)
        carry_out(r, operations)
        decisions.append(r.select_keys(keys(BLOCKS[: prompt_tokens // 4]), prompt_tokens=prompt_tokens))
    without, with_tiers = (decision.columns.table for decision in decisions)
    lower = COLUMNS.index("lower_tier_tokens")
    assert (np.delete(without, lower, 0) == np.delete(with_tiers, lower, 0)).all()
    assert decisions[0].instance == decisions[1].instance


@given(st.sampled_from(SCORES), RATIOS, OPERATIONS, st.integers(0, 10_000))
def test_the_fused_pick_over_tiers_is_that_of_the_score_in_python(score, ratios, operations, queued):
    decisions = []
    for policy in (score, lambda columns: score(columns)):
        r = router(ratios, policy=policy, ties="random", seed=3)
        carry_out(r, operations)
        r.report_load("a", queued_prefill_tokens=queued, running=3, waiting=1)
        decisions.append(r.select_keys(keys(BLOCKS), prompt_tokens=PROMPT_TOKENS))
    assert decisions[0].instance == decisions[1].instance
    assert decisions[0].scores.tolist() == decisions[1].scores.tolist()
