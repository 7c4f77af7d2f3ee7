"""The router: decisions, bookings, cache knowledge, and what happens on bad input."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mulsched
from mulsched import (
    BlockRemoved,
    BlockStored,
    CacheCleared,
    InstanceRemoved,
    Linear,
    Multiplicative,
    Namespace,
    Policy,
    Router,
    block_keys,
    policies,
)
from mulsched.errors import (
    BlockSizeMismatch,
    DuplicateInstance,
    DuplicateRequest,
    InvalidArgument,
    InvalidTokens,
    InvalidType,
    LifecycleError,
    NoEligibleInstance,
    NonFiniteScore,
    UnknownBlock,
    UnknownInstance,
    UnknownPolicy,
    UnknownRequest,
)

PROMPT = list(range(100))


def router(*instances, cache_blocks=1000, **options):
    made = Router(**({"block_size": 4} | options))
    for instance in instances or ("a", "b"):
        made.add_instance(instance, cache_blocks=cache_blocks)
    return made


def serve(r, tokens, request_id, **options):
    decision = r.route(tokens, request_id=request_id, **options)
    r.first_token(request_id)
    r.finish(request_id)
    return decision


def state(r):
    return (
        {name: (r.load(name), r.index.blocks(name)) for name in r.instances},
        r.index.dump(),
        r.select(PROMPT).columns.decision,
    )


# -- decisions ----------------------------------------------------------------------------------------------


def test_a_prompt_returns_to_the_instance_that_has_its_prefix():
    r = router()
    first = serve(r, PROMPT, 1)
    again = r.select([*PROMPT, 7, 7, 7])
    assert again.instance == first.instance
    assert (again.matched_blocks, again.hit_tokens, again.new_prefill_tokens) == (25, 100, 3)


def test_of_a_full_hit_the_last_token_is_computed_again():
    r = router()
    serve(r, PROMPT, 1)
    again = r.select(PROMPT)
    assert (again.matched_blocks, again.hit_tokens, again.new_prefill_tokens) == (25, 96, 4)
    assert again.score == 4


def test_load_outweighs_the_prefix_when_the_product_says_so():
    r = router()
    home = serve(r, PROMPT, 0).instance
    other = "b" if home == "a" else "a"
    longer = [*PROMPT, *range(200, 250)]  # 50 new tokens there, 150 elsewhere
    for i in range(1, 3):
        r.route(PROMPT, request_id=i, candidates=[home])
        r.first_token(i)
    # 50 * 3 against 150 * 1: equal, and the smaller batch wins
    assert r.select(longer).instance == other


def test_a_burst_of_equal_prompts_spreads_over_idle_instances():
    r = router("a", "b", "c", "d")
    assert sorted(r.route(PROMPT, request_id=i).instance for i in range(4)) == ["a", "b", "c", "d"]


def test_idle_equals_take_turns():
    r = router("a", "b", "c")
    short = [1, 2]
    assert [serve(r, short, i).instance for i in range(6)] == ["a", "b", "c", "a", "b", "c"]


def test_select_changes_nothing():
    r = router()
    serve(r, PROMPT, 1)
    before = state(r)
    one, two = r.select(PROMPT), r.select(PROMPT)
    assert state(r) == before
    assert one.instance == two.instance
    assert (one.scores == two.scores).all()


def test_route_decides_as_select_and_books():
    r = router()
    expected = r.select(PROMPT)
    decision = r.route(PROMPT, request_id="x")
    assert decision.instance == expected.instance
    assert decision.request_id == "x"
    assert r.load(decision.instance)["queued_prefill_tokens"] == 100


def test_a_selected_decision_can_be_dispatched_later():
    r = router()
    decision = r.select(PROMPT)
    r.dispatch(decision, request_id="x")
    assert r.load(decision.instance)["waiting"] == 1
    with pytest.raises(DuplicateRequest):
        r.dispatch(decision, request_id="x")
    r.remove_instance(decision.instance)
    with pytest.raises(UnknownInstance):
        r.dispatch(decision, request_id="y")


def test_candidates_limit_the_choice_in_any_order():
    r = router("a", "b", "c")
    assert r.select(PROMPT, candidates=["c"]).instance == "c"
    assert len(r.select(PROMPT, candidates=("c", "b")).columns) == 2
    assert r.select(PROMPT, candidates={"b": 1, "c": 2}).columns.instances == ("b", "c")


def test_text_and_keys_have_their_own_doors():
    r = router()
    text = "You are a helpful assistant."
    d = r.route_text(text, request_id=1)
    r.finish(1)
    assert r.select_text(text + " Hello").hit_tokens == len(text)
    assert r.select_text(text).instance == d.instance
    keys = block_keys(PROMPT, 4)
    r.route_keys(keys, prompt_tokens=100, request_id=2)
    r.finish(2)
    assert r.select(PROMPT).hit_tokens == r.select_keys(keys, prompt_tokens=100).hit_tokens == 96


def test_a_callers_array_of_keys_may_be_used_again():
    r = router("a", in_flight="cached")
    keys = block_keys(PROMPT, 4)
    r.route_keys(keys, prompt_tokens=100, request_id=1)
    keys[:] = 0
    r.first_token(1)
    assert r.select(PROMPT).hit_tokens == 96


def test_namespaces_do_not_share_prefixes():
    r = router()
    serve(r, PROMPT, 1, namespace=Namespace(lora="x"))
    assert r.select(PROMPT).hit_tokens == 0
    assert r.select(PROMPT, namespace=Namespace(lora="x")).hit_tokens == 96


def test_explain_prints_every_column_of_every_candidate_and_the_reason():
    r = router("gpu-0", "gpu-1")
    serve(r, PROMPT, 1)
    text = r.select(PROMPT).explain()
    lines = text.splitlines()
    assert lines[0] == "lmetric: 100 prompt tokens to gpu-0, score 4 of 2 candidates"
    assert lines[1].split()[2:] == list(mulsched.indicators.COLUMNS[:-1])  # nothing is loaded from a tier
    assert lines[2].startswith("*  gpu-0         4")
    assert lines[3].split()[:2] == ["gpu-1", "100"]


def test_explain_names_ties_and_filtered_candidates():
    r = router("a", "b", "c", policy="sticky")
    r.route(PROMPT, request_id=1, session="s")
    text = r.select(PROMPT, session="s").explain()
    assert "2 filtered out" in text
    assert text.count("filtered") == 3
    assert (
        "equal scores, the smallest batch wins, then the least recently chosen"
        in router().select([1]).explain()
    )
    assert "the first row wins" in router(ties="first").select([1]).explain()


def test_indicators_are_those_of_the_chosen():
    r = router()
    assert r.select(PROMPT).indicators["p_tokens"] == 100


# -- policies -------------------------------------------------------------------------------------------------


def test_a_policy_is_a_name_an_object_a_score_or_any_callable():
    for policy, name in (
        ("vllm", "vllm"),
        (Policy(name="mine", score=lambda c: c.running), "mine"),
        (Multiplicative("running"), "Multiplicative('running')"),
        (lambda c: c.running.astype(float), "<lambda>"),
    ):
        r = router(policy=policy)
        assert r.policy.name == name
        assert r.select(PROMPT).policy == name


def test_each_router_has_its_own_policy_state():
    one, two = router(policy="sticky"), router(policy="sticky")
    one.route(PROMPT, request_id=1, session="s", candidates=["b"])
    assert one.select(PROMPT, session="s").instance == "b"
    assert two.select(PROMPT, session="s").instance == "a"


def test_seeded_ties_differ_between_seeds_and_repeat():
    def chosen(seed):
        r = router("a", "b", "c", "d", ties="random", seed=seed)
        return [serve(r, [1], i).instance for i in range(12)]

    assert chosen(1) == chosen(1) != chosen(2)


@pytest.mark.parametrize(
    "policy",
    [
        Multiplicative(),
        Multiplicative("p_tokens"),
        Multiplicative("hit_tokens", "batch_size", "cached_blocks"),
        Linear({"p_tokens": 0.1, "batch_size": 3.7, "waiting": -0.3}),
        Linear({"p_tokens": 0.1, "waiting": 3.7, "last_chosen": -0.3}, normalise="max"),
        Linear(
            {"new_prefill_tokens": 0.7, "batch_size": 0.3, "waiting": 0.1},
            normalise={"new_prefill_tokens": "prompt", "batch_size": "max"},
        ),
    ],
)
@pytest.mark.parametrize(("ties", "seed"), [("least_recent", 0), ("first", 0), ("random", -5)])
@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 1), min_size=1, max_size=14),
            st.sampled_from(["wait", "run", "end"]),
            st.sets(st.sampled_from("abcd")),
        ),
        max_size=25,
    ),
    st.sampled_from(["ignore", "cached"]),
)
def test_the_fused_path_equals_the_composed_one_to_the_bit(policy, ties, seed, requests, in_flight):
    options = {"block_size": 2, "cache_blocks": 9, "in_flight": in_flight, "ties": ties, "seed": seed}
    fused = router("a", "b", "c", "d", policy=policy, **options)
    # a bare callable is never fused
    composed = router("a", "b", "c", "d", policy=lambda c: policy(c), **options)
    assert (fused._fused is not None) == (mulsched.BACKEND == "native")
    assert composed._fused is None
    for i, (tokens, stage, candidates) in enumerate(requests):
        decisions = []
        for r in (fused, composed):
            decisions.append(r.route(tokens, request_id=i, candidates=candidates or None))
            if stage != "wait":
                r.first_token(i)
            if stage == "end":
                r.finish(i)
        one, other = decisions
        assert one.instance == other.instance
        assert one.scores.tobytes() == other.scores.tobytes()
        assert (one.columns.table == other.columns.table).all()
    assert [fused.load(x) for x in "abcd"] == [composed.load(x) for x in "abcd"]


def _in_place(columns):
    tokens = columns.p_tokens
    tokens *= 20
    return tokens


def _rows_in_place(columns):
    columns.rows[:] = 0
    return columns.p_tokens


@pytest.mark.parametrize(
    "policy",
    [
        _in_place,
        _rows_in_place,
        Policy(name="p", score=_in_place, filters=(lambda c: c.rows > 0,)),
        Policy(name="p", score=lambda c: c.p_tokens, filters=(lambda c: _in_place(c) > 0,)),
    ],
)
def test_a_score_that_writes_to_its_columns_raises_and_books_nothing(policy):
    r = router(policy=policy)
    with pytest.raises(ValueError, match="read-only"):
        r.route(PROMPT, request_id=1)
    assert [r.load(name)["waiting"] for name in r.instances] == [0, 0]
    assert r._rows.tolist() == [0, 1]


def test_the_columns_of_a_decision_are_read_only():
    for policy in ("lmetric", "vllm"):
        assert not router(policy=policy).select(PROMPT).columns.p_tokens.flags.writeable


def test_a_policy_that_raises_when_told_books_nothing():
    def refuse(columns, position):
        raise RuntimeError("refused")

    r = router("a", policy=Policy(name="p", score=lambda c: c.p_tokens, on_dispatch=refuse))
    before = state(r)
    with pytest.raises(RuntimeError, match="refused"):
        r.route(PROMPT, request_id=1)
    assert state(r) == before


def test_a_score_that_is_not_finite_raises_and_books_nothing():
    for policy in (lambda c: c.running / 0.0 * np.nan, Linear({"p_tokens": 1e308, "batch_size": 1e308})):
        r = router()
        before = state(r)
        broken = router(policy=policy)
        with np.errstate(all="ignore"), pytest.raises(NonFiniteScore, match="for instance 'a'"):
            broken.route(list(range(1000)), request_id=1)
        assert broken.load("a") == r.load("a")
        assert state(r) == before


# -- the life of a request --------------------------------------------------------------------------------------


def test_a_life_goes_from_waiting_to_running_to_gone():
    r = router("a")
    r.route(PROMPT, request_id=1)
    assert (r.load("a")["waiting"], r.load("a")["queued_prefill_tokens"], r.index.blocks("a")) == (1, 100, 0)
    r.first_token(1)
    assert (r.load("a")["waiting"], r.load("a")["running"], r.index.blocks("a")) == (0, 1, 25)
    r.finish(1)
    assert r.load("a") | {"last_chosen": 0} == dict.fromkeys(r.load("a"), 0)


def test_finish_without_a_first_token_implies_it():
    r = router("a")
    r.route(PROMPT, request_id=1)
    r.finish(1)
    assert r.index.blocks("a") == 25
    assert r.load("a")["queued_prefill_tokens"] == 0


@pytest.mark.parametrize(("after_first_token", "blocks"), [(False, 0), (True, 25)])
def test_cancel_frees_at_any_stage(after_first_token, blocks):
    r = router("a")
    r.route(PROMPT, request_id=1)
    if after_first_token:
        r.first_token(1)
    r.cancel(1)
    assert r.load("a")["waiting"] == r.load("a")["running"] == 0
    assert r.index.blocks("a") == blocks


def test_misuse_of_a_life_raises_and_changes_nothing():
    r = router("a")
    r.route(PROMPT, request_id=1)
    r.first_token(1)
    before = state(r)
    with pytest.raises(LifecycleError):
        r.first_token(1)
    with pytest.raises(DuplicateRequest, match="1 is booked already"):
        r.route(PROMPT, request_id=1)
    with pytest.raises(InvalidType, match="request_id must be hashable"):
        r.route(PROMPT, request_id=[])
    assert state(r) == before
    r.finish(1)
    before = state(r)
    for call in (r.finish, r.first_token, r.cancel):
        with pytest.raises(UnknownRequest, match="unknown request 1: never dispatched, or finished"):
            call(1)
    assert state(r) == before


def test_a_finished_id_can_be_used_again():
    r = router()
    serve(r, PROMPT, 1)
    serve(r, PROMPT, 1)


def test_expired_requests_are_cancelled_and_named():
    r = router("a")
    r.route(PROMPT, request_id="old", now=0.0)
    r.route(PROMPT, request_id="new", now=50.0)
    r.route(PROMPT, request_id="timeless")
    assert r.expire(now=61.0, older_than_s=60) == ["old"]
    assert r.load("a")["waiting"] == 2
    with pytest.raises(UnknownRequest):
        r.finish("old")


def test_a_removed_instance_names_its_requests_and_is_chosen_no_more():
    r = router("a", "b")
    r.route(PROMPT, request_id=1, candidates=["a"])
    r.route(PROMPT, request_id=2, candidates=["b"])
    assert r.remove_instance("a") == [1]
    assert r.instances == ("b",)
    assert r.select(PROMPT).instance == "b"
    with pytest.raises(UnknownRequest):
        r.finish(1)
    r.add_instance("c", cache_blocks=5)
    assert r.load("c")["waiting"] == 0


def test_reported_load_counts_and_an_older_report_does_not():
    r = router("a", "b")
    assert r.report_load("a", running=9, waiting=1, queued_prefill_tokens=500, now=2.0)
    assert r.select(PROMPT).instance == "b"
    assert not r.report_load("a", running=0, waiting=0, now=1.0)
    assert r.load("a")["running"] == 9
    assert r.report_load("a", running=0, waiting=0, queued_prefill_tokens=0, now=3.0)
    assert r.load("a")["running"] == 0


# -- in flight --------------------------------------------------------------------------------------------------


def test_a_prefix_in_flight_counts_as_cached_unless_it_is_to_be_ignored():
    for options, hit in (({}, 96), ({"in_flight": "cached"}, 96), ({"in_flight": "ignore"}, 0)):
        r = router("a", **options)
        r.route(PROMPT, request_id=1)
        assert r.select(PROMPT).hit_tokens == hit


def test_a_prefix_is_queued_once_for_all_that_wait_for_it():
    r = router("a")
    r.route(PROMPT, request_id=1)
    r.route(PROMPT, request_id=2)
    assert r.load("a")["queued_prefill_tokens"] == 100 + 4


@pytest.mark.parametrize("end", ["first_token", "cancel", "finish"])
def test_what_was_in_flight_is_not_any_more(end):
    r = router("a", cache_blocks=None)
    r.route(PROMPT, request_id=1)
    getattr(r, end)(1)
    assert r.select(PROMPT).hit_tokens == 0


def test_a_prefix_that_another_request_still_brings_stays_in_flight():
    r = router("a", cache_blocks=None)
    r.route(PROMPT, request_id=1)
    r.route([*PROMPT[:40], 5, 5, 5, 5], request_id=2)
    r.cancel(1)
    assert r.select(PROMPT).hit_tokens == 40
    r.cancel(2)
    assert r.select(PROMPT).hit_tokens == 0


def test_an_equal_block_after_a_difference_takes_nothing_of_the_others_out_of_flight():
    r = router("a", cache_blocks=None)
    r.route(PROMPT[:80], request_id="goes")
    r.route([*PROMPT[:48], *[5] * 32], request_id="shares 48 tokens")
    r.route([*PROMPT[:16], *[6] * 32, *PROMPT[48:]], request_id="shares 16, and is equal again from 48 on")
    r.first_token("goes")
    assert r.select(PROMPT).hit_tokens == 48


def test_the_first_token_of_one_leaves_the_prefix_of_the_others_in_flight():
    r = router("a", cache_blocks=None)
    for request_id in range(3):
        r.route(PROMPT, request_id=request_id)
    for done, queued in ((1, 104), (0, 4)):
        r.first_token(done)
        assert r.select(PROMPT).hit_tokens == 96
        assert r.load("a")["queued_prefill_tokens"] == queued


def test_a_removed_instance_has_nothing_in_flight_when_it_comes_back():
    r = router("a")
    r.route(PROMPT, request_id=1)
    r.remove_instance("a")
    r.add_instance("a", cache_blocks=100)
    assert r.select(PROMPT).hit_tokens == 0
    r.route(PROMPT, request_id=1)
    assert r.load("a")["queued_prefill_tokens"] == 100


def test_what_is_in_flight_stays_when_events_replace_the_predictions():
    r = router("a")
    r.route(PROMPT, request_id=1)
    r.apply(CacheCleared("a"))
    assert r.select(PROMPT).hit_tokens == 96
    r.first_token(1)
    assert r.select(PROMPT).hit_tokens == 0  # until an event tells


def test_who_counted_on_a_cancelled_prefix_is_booked_for_it():
    r = router("a")
    r.route(PROMPT, request_id=1)
    r.route([*PROMPT[:40], 5, 5, 5, 5], request_id=2)
    r.route(PROMPT, request_id=3)
    r.cancel(1)
    assert r.load("a")["queued_prefill_tokens"] == 44 + 60
    r.first_token(2)
    assert r.load("a")["queued_prefill_tokens"] == 60


def test_nobody_is_booked_for_what_a_cancelled_request_left_cached():
    r = router("a", cache_blocks=None)
    r.route(PROMPT, request_id=1)
    r.apply(stored(tokens=PROMPT[:80]))
    r.route(PROMPT, request_id=2)
    r.cancel(1)
    assert r.load("a")["queued_prefill_tokens"] == 100 - 80


def test_expired_requests_leave_their_prefill_to_who_counted_on_it():
    r = router("a")
    r.route(PROMPT, request_id=1, now=0.0)
    r.route(PROMPT, request_id=2, now=9.0)
    assert r.expire(now=11.0, older_than_s=10.0) == [1]
    assert r.load("a")["queued_prefill_tokens"] == 100


def test_nobody_is_booked_for_what_an_earlier_request_brings_though_the_cancelled_one_had_to_compute_it():
    r = router("a", cache_blocks=None)
    whole_blocks = PROMPT[:80]  # its last block is computed again, wherever it is cached
    for i, prompt in enumerate((whole_blocks, whole_blocks, PROMPT)):
        r.route(prompt, request_id=i)
    r.cancel(1)
    assert r.load("a")["queued_prefill_tokens"] == 80 + 20


@given(st.data())
def test_after_cancellations_the_rest_is_booked_as_if_it_had_come_alone(data):
    prompts = data.draw(
        st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=10), min_size=1, max_size=8)
    )
    cancelled = data.draw(st.lists(st.sampled_from(range(len(prompts))), unique=True))
    r, alone = Router(block_size=2), Router(block_size=2)
    for each in (r, alone):
        each.add_instance("a")
    for i, prompt in enumerate(prompts):
        r.route(prompt, request_id=i)
    for i in cancelled:
        r.cancel(i)
    rest = sorted(set(range(len(prompts))) - set(cancelled))
    for i in rest:
        alone.route(prompts[i], request_id=i)
    for i in reversed(rest):
        assert r.load("a") | {"last_chosen": 0} == alone.load("a") | {"last_chosen": 0}
        r.first_token(i)
        alone.first_token(i)


# -- engine events ------------------------------------------------------------------------------------------------


def stored(instance="a", tokens=PROMPT, first=0, parent=None, **changes):
    n = len(tokens) // 4
    event = {"block_hashes": list(range(first, first + n)), "parent_hash": parent, "block_size": 4}
    return BlockStored(instance, **(event | {"token_ids": tokens} | changes))


def test_stored_blocks_are_known_and_removed_ones_are_not():
    r = router("a", "b", cache_blocks=None)
    assert r.apply(stored()) == []
    assert r.select(PROMPT).instance == "a"
    assert r.select(PROMPT).hit_tokens == 96
    r.apply(BlockRemoved("a", [10]))
    assert r.select(PROMPT, candidates=["a"]).hit_tokens == 40
    r.apply(stored(tokens=PROMPT[40:44], first=10, parent=9))
    assert r.select(PROMPT).hit_tokens == 96
    r.apply(CacheCleared("a"))
    assert r.select(PROMPT).hit_tokens == 0


def test_keys_may_come_instead_of_tokens():
    r = router("a", cache_blocks=None)
    r.apply(stored(token_ids=None, block_keys=block_keys(PROMPT, 4)))
    assert r.select(PROMPT).hit_tokens == 96


def test_an_event_of_a_namespace_matches_only_there():
    r = router("a", cache_blocks=None)
    r.apply(stored(namespace=Namespace(lora="x")))
    assert r.select(PROMPT).hit_tokens == 0
    assert r.select(PROMPT, namespace=Namespace(lora="x")).hit_tokens == 96


def test_the_first_event_turns_a_predicted_cache_into_an_observed_one():
    r = router("a")
    serve(r, PROMPT, 1)
    assert r.select(PROMPT).hit_tokens == 96
    r.apply(stored(tokens=PROMPT[:40]))
    assert r.select(PROMPT).hit_tokens == 40
    serve(r, PROMPT, 2)
    assert r.select(PROMPT).hit_tokens == 40  # no longer predicted


def test_a_predicted_cache_keeps_to_its_size():
    r = router("a", cache_blocks=10)
    serve(r, PROMPT, 1)
    assert r.index.blocks("a") == 10
    assert r.select(PROMPT).hit_tokens == 40


def test_a_removal_event_of_an_instance_returns_its_requests():
    r = router("a", "b")
    r.route(PROMPT, request_id=7, candidates=["a"])
    assert r.apply(InstanceRemoved("a")) == [7]
    assert r.instances == ("b",)


@pytest.mark.parametrize(
    ("event", "error", "message"),
    [
        (stored("x"), UnknownInstance, "unknown instance 'x'"),
        (BlockRemoved("x", [1]), UnknownInstance, "unknown instance 'x'"),
        (CacheCleared("x"), UnknownInstance, "unknown instance 'x'"),
        (InstanceRemoved("x"), UnknownInstance, "unknown instance 'x'"),
        (stored(parent=77), UnknownBlock, "holds no block with engine hash 77"),
        (stored(block_size=8), BlockSizeMismatch, "stores blocks of 8 tokens, the router's are 4"),
        (
            stored(tokens=PROMPT[:6], block_hashes=[1, 2]),
            InvalidArgument,
            "2 blocks of 4 need 8 token_ids, got 6",
        ),
        (stored(token_ids=None), InvalidArgument, "either token_ids or block_keys"),
        (stored(block_keys=block_keys(PROMPT, 4)), InvalidArgument, "either token_ids or block_keys"),
        (stored(token_ids=None, block_keys=[1]), InvalidArgument, "25 block_hashes need as many keys, got 1"),
        (stored(tokens=[1, 2, 3, -4], block_hashes=[1]), InvalidTokens, "got -4 at position 3"),
        (stored(tokens=PROMPT[:4], block_hashes=["x"]), InvalidType, "int or bytes, got str"),
        (BlockRemoved("a", ["x"]), InvalidType, "int or bytes, got str"),
        (stored(block_hashes=None), InvalidType, "sequence of int or bytes, got NoneType"),
        (BlockRemoved("a", None), InvalidType, "sequence of int or bytes, got NoneType"),
        (stored(token_ids=5), InvalidType, "list, tuple, array or buffer of integers, got int"),
        (stored(token_ids=None, block_keys=5), InvalidType, "sequence of 64-bit integers, got int"),
        (stored(extra_keys=5), InvalidType, "extra_keys must be a sequence of bytes or None, got int"),
        (stored(parent=1.5), InvalidType, "int or bytes, got float"),
        (stored(block_size="4"), BlockSizeMismatch, "stores blocks of '4' tokens"),
        (stored([]), UnknownInstance, r"unknown instance \[\]"),
        (BlockRemoved([], [1]), UnknownInstance, r"unknown instance \[\]"),
        (CacheCleared([]), UnknownInstance, r"unknown instance \[\]"),
        ("stored", InvalidType, "an engine event expected, got str"),
    ],
)
@pytest.mark.parametrize("cache_blocks", [None, 1000])
def test_a_bad_event_raises_and_changes_nothing(cache_blocks, event, error, message):
    r = router("a", cache_blocks=cache_blocks)
    if cache_blocks is None:
        r.apply(stored(tokens=PROMPT[:8], first=500))
    else:
        serve(r, PROMPT[:8], 1)
    before = state(r)
    with pytest.raises(error, match=message):
        r.apply(event)
    assert state(r) == before


# -- bad input ----------------------------------------------------------------------------------------------------

NAN = float("nan")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"block_size": 0}, InvalidArgument, "block_size must be at least 1, got 0"),
        ({"block_size": 16.0}, InvalidType, "block_size must be an int, got float"),
        ({"block_size": True}, InvalidType, "block_size must be an int, got bool"),
        ({"policy": "best"}, UnknownPolicy, "unknown policy 'best'"),
        ({"policy": 5}, InvalidType, "policy must be a name, a Policy or a callable on columns, got 5"),
        ({"policy": policies.linear}, InvalidType, "got the factory of one: call it"),
        ({"ties": "coin"}, InvalidArgument, "ties must be 'least_recent', 'random' or 'first', got 'coin'"),
        ({"seed": "1"}, InvalidType, "seed must be an int, got str"),
        ({"in_flight": "maybe"}, InvalidArgument, "in_flight must be 'ignore' or 'cached', got 'maybe'"),
        ({"key_seed": -1}, InvalidArgument, "seed must lie in"),
    ],
)
def test_a_router_refuses_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        Router(**options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda r: r.add_instance("a"), DuplicateInstance, "'a' is there already"),
        (lambda r: r.add_instance(7), InvalidType, "instance must be a str, got int"),
        (
            lambda r: r.add_instance("x", cache_blocks=0),
            InvalidArgument,
            "^cache_blocks must be at least 1, got 0",
        ),
        (
            lambda r: r.add_instance("x", cache_blocks=NAN),
            InvalidType,
            "^cache_blocks must be an int, got float nan",
        ),
        (lambda r: r.remove_instance("x"), UnknownInstance, "unknown instance 'x'"),
        (lambda r: r.load("x"), UnknownInstance, "unknown instance 'x'"),
        (
            lambda r: r.route([], request_id=9),
            InvalidTokens,
            "a prompt must have at least one token, got none",
        ),
        (lambda r: r.route_text("", request_id=9), InvalidTokens, "at least one character, got none"),
        (
            lambda r: r.route([1, "x"], request_id=9),
            InvalidType,
            "tokens must be integers, got str at position 1",
        ),
        (lambda r: r.route([1, -1], request_id=9), InvalidTokens, "got -1 at position 1"),
        (lambda r: r.route("text", request_id=9), InvalidType, "got str"),
        (lambda r: r.route_text(b"text", request_id=9), InvalidType, "text must be a str, got bytes"),
        (lambda r: r.route(None, request_id=9), InvalidType, "got NoneType"),
        (lambda r: r.route(PROMPT, request_id=9, now=NAN), InvalidArgument, "now must be finite, got nan"),
        (lambda r: r.route(PROMPT, request_id=9, now="1"), InvalidType, "now must be a number of seconds"),
        (lambda r: r.route(PROMPT, request_id=9, candidates=["x"]), UnknownInstance, "unknown instance 'x'"),
        (lambda r: r.route(PROMPT, request_id=9, candidates=[]), NoEligibleInstance, "candidates is empty"),
        (
            lambda r: r.route(PROMPT, request_id=9, candidates="a"),
            InvalidType,
            "iterable of instances, got str",
        ),
        (
            lambda r: r.route(PROMPT, request_id=9, candidates=3),
            InvalidType,
            "iterable of instances, got int",
        ),
        (lambda r: r.route(PROMPT, request_id=9, namespace="x"), InvalidType, "must be a Namespace or None"),
        (lambda r: r.route(PROMPT, request_id=9, session=7), InvalidType, "session must be a str or None"),
        (
            lambda r: r.route_keys([1], prompt_tokens=100, request_id=9),
            InvalidArgument,
            "25 whole blocks of 4, got 1",
        ),
        (lambda r: r.route_keys([], prompt_tokens=0, request_id=9), InvalidArgument, "at least 1, got 0"),
        (
            lambda r: r.route_keys([], prompt_tokens=2**40, request_id=9),
            InvalidArgument,
            r"prompt_tokens must be below 2\*\*40",
        ),
        (
            lambda r: r.route_keys([], prompt_tokens=1.5, request_id=9),
            InvalidType,
            "must be an int, got float",
        ),
        (lambda r: r.route_keys("k", prompt_tokens=4, request_id=9), InvalidType, "64-bit integers, got str"),
        (
            lambda r: r.dispatch(r.select(PROMPT), request_id=9, now=NAN),
            InvalidArgument,
            "now must be finite",
        ),
        (lambda r: r.dispatch("a", request_id=9), InvalidType, "decision must be a Decision, got str"),
        (lambda r: r.expire(now=NAN, older_than_s=1), InvalidArgument, "must be finite, got nan"),
        (lambda r: r.expire(now=1, older_than_s=-1), InvalidArgument, "at least 0, got -1"),
        (lambda r: r.report_load("x", running=1, waiting=1), UnknownInstance, "unknown instance 'x'"),
        (lambda r: r.report_load("a", running=1), InvalidArgument, "reported together"),
        (lambda r: r.report_load("a", running=-1, waiting=1), InvalidArgument, "at least 0, got -1"),
        (lambda r: r.report_load("a", running=1, waiting=1, now=NAN), InvalidArgument, "now must be finite"),
    ],
)
def test_a_bad_call_raises_and_changes_nothing(call, error, message):
    r = router("a", "b")
    serve(r, PROMPT[:8], 1)
    r.route(PROMPT[:12], request_id=2, now=0.0)
    before = state(r)
    with pytest.raises(error, match=message):
        call(r)
    assert state(r) == before


def test_without_instances_there_is_nobody_to_choose():
    with pytest.raises(NoEligibleInstance, match="there are no instances: add one"):
        Router().select(PROMPT)


# -- threads ------------------------------------------------------------------------------------------------------


def test_concurrent_routes_do_not_herd_and_lose_nothing():
    r = router(*(f"i{i}" for i in range(4)))

    def work(start):
        for i in range(start, start + 100):
            r.route([i, i + 1, i + 2], request_id=i)

    threads = [threading.Thread(target=work, args=(1000 * t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [r.load(f"i{i}")["waiting"] for i in range(4)] == [100] * 4
