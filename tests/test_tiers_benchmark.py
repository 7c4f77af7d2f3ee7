"""The engine with a tier in the host's memory, its replay, and that the page follows from the results."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import page
from tiers.cases import BASE, CASES, INSTANCES, PROFILE, plan
from tiers.engine import TieredEngineModel
from tiers.host_memory import HostChange, HostMemory
from tiers.replay import Tier, TieredReplay
from tiers.run import KEY, load, options_for, run

from mulsched.replay import EngineModel, Profile, builtin_profile, replay, synthetic_trace
from mulsched.replay.records import Records

ROOT = Path(__file__).parents[1]
A, B, C, D = 1, 2, 3, 4
LOAD_S_PER_TOKEN = 0.0005  # half of computing one


def step_time(new, prefix, batch, context):
    """10 ms a step, 1 ms a new token, 0.1 ms a decoding request: numbers one can follow by hand."""
    return 0.010 + 0.001 * new + 0.0001 * batch


def profile(**limits):
    usual = {"block_size": 4, "kv_blocks": 100, "max_batched_tokens": 256, "max_num_seqs": 256}
    return Profile("test", step_time, **(usual | limits))


def engine(host_blocks=100, overlaps=True, **limits):
    return TieredEngineModel(
        profile(**limits), host_blocks=host_blocks, load_s_per_token=LOAD_S_PER_TOKEN, overlaps=overlaps
    )


def run_engine(model, submissions):
    """Run until idle, checking all the way; return when first tokens and ends came, and what they found."""
    now, first, ends, pending = 0.0, {}, {}, sorted(submissions, key=lambda s: s[0])
    while True:
        while pending and pending[0][0] <= now:
            _, request, path, prompt, output = pending.pop(0)
            model.submit(request, np.array(path, dtype=np.uint64), prompt, output)
        end = model.start_step(now)
        model.check()
        if end is None:
            wakes = [t for t in (model.next_load_s, pending[0][0] if pending else None) if t is not None]
            if not wakes:
                return first, ends
            now = min(wakes)
            continue
        now = end
        result = model.end_step()
        model.check()
        first |= {request: (now, cached) for request, cached in result.first_tokens}
        ends |= dict.fromkeys(result.finished, now)


def pushed_out(model, *later):
    """Have A's three blocks computed and pushed off the GPU of six, then run what comes later."""
    early = [(0.0, A, [1, 2, 3], 13, 1), (1.0, B, [11, 12, 13, 14, 15], 21, 1)]
    return run_engine(model, [*early, *later])


def test_what_was_pushed_off_the_gpu_is_loaded():
    model = engine(kv_blocks=6)
    first, _ = pushed_out(model, (2.0, C, [1, 2, 3], 13, 1))
    assert model.tiered.loaded_tokens[C] == 12
    assert first[C] == (pytest.approx(2.0 + 12 * LOAD_S_PER_TOKEN + 0.010 + 0.001), 0)


def test_the_gpu_is_asked_first():
    model = engine()
    first, _ = run_engine(model, [(0.0, A, [1, 2, 3], 13, 1), (1.0, B, [1, 2, 3], 13, 1)])
    assert (first[B][1], model.tiered.loaded_tokens[B]) == (12, 0)


def test_the_block_of_the_last_token_is_computed_though_the_host_has_it():
    model = engine(kv_blocks=6)
    pushed_out(model, (2.0, C, [1, 2, 3], 12, 1))
    assert model.tiered.loaded_tokens[C] == 8


def test_an_overlapping_load_holds_up_nobody_else():
    model = engine(kv_blocks=13)
    early = [(0.0, A, [1, 2, 3], 13, 1), (1.0, B, [*range(11, 23)], 49, 1)]
    first, _ = run_engine(model, [*early, (2.0, C, [1, 2, 3], 13, 1), (2.0, D, [31], 4, 1)])
    assert first[D][0] == pytest.approx(2.0 + 0.014)
    assert first[C][0] == pytest.approx(2.0 + 0.014 + 0.011)  # loaded within d's step


def test_a_load_that_does_not_overlap_holds_up_its_step():
    model = engine(kv_blocks=13, overlaps=False)
    early = [(0.0, A, [1, 2, 3], 13, 1), (1.0, B, [*range(11, 23)], 49, 1)]
    first, _ = run_engine(model, [*early, (2.0, C, [1, 2, 3], 13, 1), (2.0, D, [31], 4, 1)])
    assert first[C][0] == first[D][0] == pytest.approx(2.0 + 12 * LOAD_S_PER_TOKEN + 0.010 + 0.005)


def test_loads_go_one_after_the_other():
    model = engine(kv_blocks=21)
    early = [(0.0, A, [1, 2, 3], 13, 1), (0.5, B, [4, 5, 6], 13, 1), (1.0, 9, [*range(11, 31)], 81, 1)]
    first, _ = run_engine(model, [*early, (2.0, C, [1, 2, 3], 13, 1), (2.0, D, [4, 5, 6], 13, 1)])
    # c computes while d's blocks still come, and d joins the step after
    assert first[C][0] == pytest.approx(2.0 + 12 * LOAD_S_PER_TOKEN + 0.011)
    assert first[D][0] == pytest.approx(2.0 + 12 * LOAD_S_PER_TOKEN + 2 * 0.011)


def test_blocks_on_their_way_are_waited_for_and_not_loaded_twice():
    model = engine(kv_blocks=13)
    early = [(0.0, A, [1, 2, 3], 13, 1), (1.0, B, [*range(11, 23)], 49, 1)]
    first, _ = run_engine(model, [*early, (2.0, C, [1, 2, 3], 13, 1), (2.0, D, [1, 2, 3], 13, 1)])
    assert (model.tiered.loaded_tokens[C], model.tiered.loaded_tokens[D]) == (12, 0)
    assert first[D][1] == 12


def test_answers_are_not_copied():
    model = engine()
    run_engine(model, [(0.0, A, [1, 2, 3], 4, 9)])
    assert list(model.tiered.host.blocks) == [1]


def test_the_host_forgets_the_tail_of_what_was_used_the_longest_ago():
    host = HostMemory(5)
    host.store([1, 2, 3], 0)
    host.store([4, 5], 0)
    host.store([6], 0)
    assert set(host.blocks) == {1, 2, 4, 5, 6}
    host.touch([1, 2])
    host.store([7, 8], 0)
    assert set(host.blocks) == {1, 2, 6, 7, 8}


def test_more_than_the_host_has_room_for_is_not_stored():
    host = HostMemory(2)
    host.store([1], 0)
    host.store([2, 3, 4], 0)
    assert list(host.blocks) == [1]


def test_the_host_tells_of_the_gaps_that_it_fills():
    host = HostMemory(4)
    host.store([1, 2, 3], 0)
    del host.blocks[1], host.blocks[3]
    host.changes = []
    host.store([1, 2, 3, 4], 0)
    assert [(c.keys.tolist(), c.parent, c.stored) for c in host.changes] == [
        ([1], None, True),
        ([3, 4], 2, True),
    ]


REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 40).map(lambda tick: tick / 100),
        st.integers(0, 2),  # which prefix it starts with
        st.integers(0, 5),  # blocks of it
        st.integers(1, 24),  # prompt tokens
        st.integers(1, 20),  # output tokens
    ),
    min_size=1,
    max_size=12,
)


def submissions(requests):
    for number, (time, prefix, shared, prompt, output) in enumerate(requests):
        path = [
            1000 * prefix + i if i < shared else 10_000 * (number + 1) + i
            for i in range((prompt + output) // 4)
        ]
        yield time, number, path, prompt, output


LIMITS = {"kv_blocks": 12, "max_batched_tokens": 16, "max_num_seqs": 5}


@given(requests=REQUESTS, host_blocks=st.integers(0, 30), overlaps=st.booleans())
@settings(max_examples=150)
def test_no_block_is_lost_and_every_request_ends(requests, host_blocks, overlaps):
    model = engine(host_blocks, overlaps, **LIMITS)
    first, ends = run_engine(model, submissions(requests))
    assert set(first) == set(ends) == set(range(len(requests)))
    assert not model.tiered.loads
    assert model.tiered.pool.n_free() == 12


@given(requests=REQUESTS, overlaps=st.booleans())
@settings(max_examples=100)
def test_without_blocks_in_the_host_it_is_the_plain_engine(requests, overlaps):
    tiered, plain = engine(0, overlaps, **LIMITS), EngineModel(profile(**LIMITS))
    now, pending = 0.0, sorted(submissions(requests), key=lambda s: s[0])
    while True:
        while pending and pending[0][0] <= now:
            _, request, path, prompt, output = pending.pop(0)
            for model in (tiered, plain):
                model.submit(request, np.array(path, dtype=np.uint64), prompt, output)
        end = plain.start_step(now)
        assert tiered.start_step(now) == end
        if end is None:
            if not pending:
                return
            now = pending[0][0]
            continue
        now = end
        assert tiered.end_step() == plain.end_step()
        changes = [
            [(c.keys.tolist(), c.parent, c.stored) for c in model.take_changes()] for model in (tiered, plain)
        ]
        assert changes[0] == changes[1]
        assert tiered.cached_keys() == plain.cached_keys()


@pytest.fixture(scope="module")
def sessions():
    made = synthetic_trace("tool_agent", duration_s=60, seed=3, rate_per_s=2.0)
    return made.take(made.prompt_tokens + made.output_tokens <= 16_000)


class Watched(TieredReplay):
    """Compares the router with an engine whenever the engine has nothing left to tell."""

    steps = compared = 0

    def start_step(self, p, at, now):
        engine, router, row = self.pools[p].engines[at], self.pools[p].router, at
        tiered = engine.tiered
        self.steps += 1
        if self.steps % 50 == 0 and not (tiered.changes or tiered.evicted or tiered.host.changes):
            self.compared += 1
            assert held(router.index, row) == engine.cached_keys()
            if self.told_ratio is not None:
                assert held(router.lower_tiers["CPU"], row) == set(tiered.host.blocks)
        super().start_step(p, at, now)


def held(index, row):
    return {key for _, keys, rows in index.backend.edges() if row in rows for key in keys}


def replayed(trace, tier, told, *, kv_blocks=1000, of=TieredReplay):
    records = Records.empty(len(trace))
    options = dataclasses.replace(options_for("lmetric"), kv_blocks=kv_blocks)
    made = of(trace, options, records, tier, told)
    made.run(None)
    return made, records


@pytest.mark.parametrize("overlaps", [True, False])
def test_the_router_knows_what_the_engines_hold_on_both_media(sessions, overlaps):
    watched, _ = replayed(sessions, Tier(1.5, 0.1, overlaps), 0.1, of=Watched)
    assert watched.compared > 10
    assert watched.counts.orphans == 0
    assert any(sum(engine.tiered.loaded_tokens.values()) for engine in watched.pools[0].engines)


def test_without_a_tier_it_is_the_replay_of_the_library(sessions):
    _, records = replayed(sessions, Tier(0.0, 0.1), None)
    result = replay(
        sessions, "lmetric", profile=builtin_profile(PROFILE), instances=INSTANCES, kv_blocks=1000
    )
    assert np.array_equal(records.finish_s, result.finish_s)
    assert np.array_equal(records.first_token_s, result.first_token_s)


def test_a_ratio_of_1_decides_as_a_router_that_ignores_the_tier(sessions):
    ignored, told = (replayed(sessions, Tier(2.0, 0.1), ratio)[1] for ratio in (None, 1.0))
    assert np.array_equal(ignored.finish_s, told.finish_s)


def test_a_row_has_finite_figures_and_the_share_that_was_loaded(sessions):
    row = run(sessions, BASE, "x 1", 0)
    assert set(KEY) < set(row)
    assert all(np.isfinite(value) for name, value in row.items() if name.endswith(("_s", "_ratio")))


def test_no_replay_is_planned_twice():
    for case in CASES.values():
        planned = list(plan(case))
        assert len(set(planned)) == len(planned)


def test_host_changes_are_no_changes_of_the_gpu():
    model = engine()
    model.submit(A, np.array([1], dtype=np.uint64), 4, 1)
    model.start_step(0.0)
    model.end_step()
    gpu, host = model.take_changes()
    assert not isinstance(gpu, HostChange)
    assert (host.keys.tolist(), host.parent, host.stored) == ([1], None, True)


def test_the_page_shows_every_table_of_the_results():
    shown = (ROOT / "docs" / "tiers.md").read_text()
    assert [line for table in page.tables(load()) for line in table if line not in shown] == []
