"""The engine model: batching, chunks, the paged cache, preemption. Both twins."""

from collections import Counter

import numpy as np
import pytest
from backends import BACKENDS
from hypothesis import given
from hypothesis import strategies as st

import mulsched.replay.engine
from mulsched.errors import InvalidArgument
from mulsched.replay import EngineModel, Profile
from mulsched.replay._engine_py import EnginePy

A, B, C = 1, 2, 3


def step_time(new, prefix, batch, context):
    """10 ms a step, 1 ms a new token, 0.1 ms a decoding request: numbers one can follow by hand."""
    return 0.010 + 0.001 * new + 0.0001 * batch


def new_engine(backend, step_time=step_time, **limits):
    if backend == "python":
        twin = EnginePy
    else:
        from mulsched.replay._native import EngineNative

        twin = EngineNative
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mulsched.replay.engine, "_Engine", twin)
        usual = {
            "block_size": 4,
            "kv_blocks": 100,
            "max_num_seqs": min(256, limits.get("max_batched_tokens", 256)),
        }
        return EngineModel(Profile("test", step_time, **(usual | limits)))


@pytest.fixture(params=BACKENDS)
def engine(request):
    return lambda **limits: new_engine(request.param, **limits)


def keys(*values):
    return np.array(values, dtype=np.uint64)


def run(model, submissions=(), check=True):
    """Run until idle; submissions are (time, id, keys, prompt, output). Returns first tokens, ends, changes."""
    now, first, ends, changes = 0.0, {}, {}, []
    pending = sorted(submissions, key=lambda s: s[0])
    while True:
        while pending and pending[0][0] <= now:
            model.submit(*pending.pop(0)[1:])
        end = model.start_step(now)
        if check:
            model.check()
        if end is None:
            if not pending:
                return first, ends, changes
            now = pending[0][0]
            continue
        now = end
        result = model.end_step()
        if check:
            model.check()
        changes += model.take_changes()
        first |= {request: (now, cached) for request, cached in result.first_tokens}
        ends |= dict.fromkeys(result.finished, now)


def test_a_request_alone_prefills_then_decodes(engine):
    first, ends, _ = run(engine(), [(0.0, A, keys(1, 2), 10, 3)])
    assert first == {A: (pytest.approx(0.020), 0)}
    assert ends == {A: pytest.approx(0.020 + 2 * 0.0101)}


def test_one_output_token_ends_with_the_prefill(engine):
    first, ends, _ = run(engine(), [(0.0, A, keys(1), 4, 1)])
    assert ends[A] == first[A][0]


def test_a_long_prompt_is_cut_into_chunks_of_the_budget(engine):
    first, _, _ = run(engine(max_batched_tokens=8), [(0.0, A, keys(1, 2, 3, 4, 5), 20, 1)])
    assert first[A][0] == pytest.approx(3 * 0.010 + 0.020)


def test_decodes_go_first_and_prefill_takes_the_rest_of_the_budget(engine):
    model = engine(max_batched_tokens=5)
    first, ends, _ = run(model, [(0.0, A, keys(1), 4, 9), (0.014, B, keys(2, 3), 8, 1)])
    # b has 4 tokens a step beside a's decode
    assert first[B][0] == pytest.approx(0.014 + 2 * (0.010 + 0.004 + 0.0001))
    assert ends[A] > first[B][0]


def test_no_more_run_than_max_num_seqs(engine):
    first, ends, _ = run(engine(max_num_seqs=1), [(0.0, A, keys(1), 4, 5), (0.0, B, keys(2), 4, 1)])
    assert first[B][0] > ends[A]


def test_a_cached_prefix_is_not_computed_again(engine):
    first, _, _ = run(engine(), [(0.0, A, keys(1, 2), 8, 1), (1.0, B, keys(1, 2, 3), 12, 1)])
    assert first[B] == (pytest.approx(1.0 + 0.014), 8)


def test_of_a_full_hit_the_last_block_is_computed_again(engine):
    first, _, _ = run(engine(), [(0.0, A, keys(1, 2), 8, 1), (1.0, B, keys(1, 2), 8, 1)])
    assert first[B][1] == 4


def test_blocks_are_announced_in_chunks_after_their_parent(engine):
    _, _, changes = run(engine(max_batched_tokens=8), [(0.0, A, keys(1, 2, 3, 4), 17, 1)])
    assert [(c.keys.tolist(), c.parent, c.stored) for c in changes] == [
        ([1, 2], None, True),
        ([3, 4], 2, True),
    ]


def test_the_tail_of_what_was_used_the_longest_ago_is_evicted_first(engine):
    model = engine(kv_blocks=6)
    _, _, changes = run(
        model,
        [(0.0, A, keys(1, 2, 3), 12, 1), (1.0, B, keys(4, 5), 8, 1), (2.0, C, keys(6, 7, 8), 12, 1)],
    )
    evicted = [k for c in changes if not c.stored for k in c.keys.tolist()]
    # 6 - 3 - 2 leaves one block for c, which needs three
    assert evicted == [3, 2]
    assert model.cached_keys() == {1, 4, 5, 6, 7, 8}


def test_a_shared_prefix_in_use_is_not_evicted(engine):
    model = engine(kv_blocks=8)
    run(
        model,
        [(0.0, A, keys(1, 2), 8, 20)] + [(0.1 * i, i, keys(1, 10 + i), 8, 1) for i in range(1, 6)],
    )
    assert 1 in model.cached_keys()


def test_when_memory_runs_out_the_last_admitted_is_preempted_and_still_finishes(engine):
    model = engine(kv_blocks=6)
    first, ends, _ = run(model, [(0.0, A, keys(1, 2), 8, 12), (0.0, B, keys(3, 4), 8, 12)])
    assert model.preemptions > 0
    assert ends[A] < ends[B]
    assert set(ends) == {A, B}
    assert first[B][1] == 0  # what it found at its first admission


def test_an_engine_that_schedules_ahead_takes_an_arrival_a_step_later(engine):
    submissions = [(0.0, A, keys(1), 4, 9), (0.001, B, keys(2), 4, 1)]
    at_once, _, _ = run(engine(), submissions)
    later, _, _ = run(engine(schedules_ahead=True), submissions)
    assert at_once[A] == later[A] == (pytest.approx(0.014), 0)  # it was idle
    assert later[B][0] == pytest.approx(at_once[B][0] + 0.0101)  # a step of a alone


def test_what_was_not_planned_ahead_starts_when_the_step_before_ends(engine):
    first, _, _ = run(engine(schedules_ahead=True), [(0.0, A, keys(1), 4, 1), (0.001, B, keys(2), 4, 1)])
    assert first[B][0] == pytest.approx(2 * 0.014)


def test_scheduling_ahead_changes_nothing_for_a_request_alone(engine):
    alone = [(0.0, A, keys(1, 2), 10, 7)]
    assert (
        run(engine(max_batched_tokens=4), alone)[:2]
        == run(engine(max_batched_tokens=4, schedules_ahead=True), alone)[:2]
    )


@pytest.mark.parametrize("limit", [{"max_num_seqs": 2}, {"kv_blocks": 4}])
def test_scheduling_ahead_a_place_or_blocks_come_free_for_the_step_after_the_next(engine, limit):
    # a and b fill the engine, b ends with the third step, and c has waited since before
    submissions = [(0.0, A, keys(1), 4, 9), (0.0, B, keys(2), 6, 3), (0.001, C, keys(3), 4, 1)]
    starts = {}
    for ahead in (False, True):
        first, ends, _ = run(engine(schedules_ahead=ahead, **limit), submissions)
        starts[ahead] = first[C][0] - ends[B]
    assert starts[False] == pytest.approx(0.0141)
    assert starts[True] == pytest.approx(0.0101 + 0.0141)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((keys(1), 0, 1), "at least one prompt and one output token, got 0 and 1"),
        ((keys(1), 4, 0), "at least one prompt and one output token, got 4 and 0"),
        ((keys(1, 2), 4, 3), "7 tokens have 1 full blocks, got 2 keys"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(engine, arguments, message):
    model = engine()
    with pytest.raises(InvalidArgument, match=message):
        model.submit(A, *arguments)
    assert model.start_step(0.0) is None


def test_steps_are_started_and_ended_in_turn(engine):
    model = engine()
    with pytest.raises(InvalidArgument, match="no step is under way"):
        model.end_step()
    model.submit(A, keys(1), 4, 1)
    model.start_step(0.0)
    with pytest.raises(InvalidArgument, match="a step is under way"):
        model.start_step(0.0)


def test_what_is_scheduled_first_is_cached_for_the_next_in_the_same_step(engine):
    first, _, changes = run(engine(), [(0.0, A, keys(1, 2), 9, 3), (0.0, B, keys(1, 2), 9, 3)])
    assert first[B] == (first[A][0], 8)
    assert [c.keys.tolist() for c in changes if c.stored] == [[1, 2]]


def test_a_block_computed_again_is_a_second_copy_that_is_stored_and_evicted_by_itself(engine):
    model = engine(kv_blocks=4)
    _, _, changes = run(
        model, [(0.0, A, keys(1, 2), 8, 1), (1.0, B, keys(1, 2), 8, 1), (2.0, C, keys(5, 6, 7), 12, 1)]
    )
    assert [(c.keys.tolist(), c.stored) for c in changes] == [
        ([1, 2], True),
        ([2], True),
        # the older copy left first; of the three that C needs, one was never used
        ([2, 2], False),
        ([5, 6, 7], True),
    ]
    assert model.cached_keys() == {1, 5, 6, 7}


def test_an_answer_is_cached_block_by_block_under_the_keys_it_was_given(engine):
    model = engine()
    _, _, changes = run(model, [(0.0, A, keys(1, 2, 3), 6, 7)])
    assert [(c.keys.tolist(), c.parent) for c in changes] == [([1], None), ([2], 1), ([3], 2)]
    first, _, _ = run(model, [(1.0, B, keys(1, 2, 3), 14, 1)])
    assert first[B][1] == 12


def test_the_last_token_of_an_answer_is_never_cached(engine):
    model = engine()
    run(model, [(0.0, A, keys(1, 2), 4, 4)])
    assert model.cached_keys() == {1}


def test_a_request_waits_until_its_whole_prompt_has_room(engine):
    model = engine(kv_blocks=6, max_batched_tokens=8)
    first, ends, _ = run(model, [(0.0, A, keys(1, 2, 3), 12, 9), (0.0, B, keys(4, 5, 6), 12, 1)])
    # one block is left beside A, then none: B's first chunk would fit only after A's end
    assert first[B][0] > ends[A]


def test_a_watermark_keeps_blocks_free_beside_others_but_not_for_one_alone(engine):
    model = engine(kv_blocks=6, watermark_ratio=0.5)
    first, ends, _ = run(model, [(0.0, A, keys(1, 2), 8, 4), (0.0, B, keys(4, 5), 8, 1)])
    assert first[B][0] > ends[A]
    assert first[A][0] == pytest.approx(0.018)


def test_transferred_tokens_need_blocks_and_no_computation(engine):
    first, _, _ = run(engine(), [(0.0, A, keys(1, 2), 10, 1)])
    model = engine()
    model.submit(A, keys(1, 2), 10, 1, transferred_tokens=10)
    assert model.start_step(0.0) == pytest.approx(0.011)
    assert model.end_step().finished == [A]
    assert model.cached_keys() == {1, 2}
    assert first[A][0] == pytest.approx(0.020)


def test_a_request_that_can_never_fit_is_refused(engine):
    model = engine(kv_blocks=3)
    with pytest.raises(InvalidArgument, match="request 1 needs 4 blocks, the engine has 3"):
        model.submit(A, keys(1, 2, 3), 12, 1)
    assert model.start_step(0.0) is None


class NaiveEngine:
    """The same rules, one request and one token at a time, for engines that never run out of memory."""

    def __init__(self, budget, seqs, block_size):
        self.budget, self.seqs, self.block_size = budget, seqs, block_size
        self.waiting, self.running, self.cached = [], [], set()

    def run(self, submissions):
        now, first, ends = 0.0, {}, {}
        pending = sorted(submissions, key=lambda s: s[0])
        while True:
            while pending and pending[0][0] <= now:
                _, name, path, prompt, output = pending.pop(0)
                self.waiting.append(
                    {"id": name, "keys": path.tolist(), "p": prompt, "o": output, "g": 0, "c": 0}
                )
            left, batch, work = self.budget, [r for r in self.running if r["g"]], []
            left -= len(batch)
            for r in [r for r in self.running if not r["g"]]:
                work.append((r, min(left, r["p"] - r["c"])))
                left -= work[-1][1]
                self.cached |= set(r["keys"][: (r["c"] + work[-1][1]) // self.block_size])
            while left > 0 and self.waiting and len(self.running) < self.seqs:
                r = self.waiting.pop(0)
                for key in r["keys"][: (r["p"] - 1) // self.block_size]:
                    if key not in self.cached:
                        break
                    r["c"] += self.block_size
                r["hit"] = r["c"]
                self.running.append(r)
                work.append((r, min(left, r["p"] - r["c"])))
                left -= work[-1][1]
                self.cached |= set(r["keys"][: (r["c"] + work[-1][1]) // self.block_size])
            new = sum(chunk for _, chunk in work)
            if not batch and not new:
                if not pending:
                    return first, ends
                now = pending[0][0]
                continue
            now += step_time(new, 0, len(batch), 0)
            for r in batch:
                r["g"] += 1
            for r, chunk in work:
                r["c"] += chunk
                if r["c"] == r["p"]:
                    r["g"] = 1
                    first[r["id"]] = (now, r["hit"])
            for r in [r for r in self.running if r["g"] == r["o"]]:
                ends[r["id"]] = now
                self.running.remove(r)


REQUESTS = st.lists(
    st.tuples(
        st.floats(0, 0.3),
        st.lists(st.integers(0, 1), min_size=0, max_size=4),
        st.integers(0, 3),
        st.integers(1, 9),
    ),
    min_size=1,
    max_size=8,
)


def submissions(drawn):
    """Chained keys from small alphabets, so that prefixes are shared."""
    result = []
    for i, (time, path, rest, output) in enumerate(drawn):
        chained = [int("1" + "".join(map(str, path[: n + 1])), 2) + 100 * (n + 1) for n in range(len(path))]
        prompt = max(1, 4 * len(path) + rest)
        result.append((time, i, keys(*chained[: prompt // 4]), prompt, output))
    return result


@pytest.mark.parametrize("backend", BACKENDS)
@given(drawn=REQUESTS, budget=st.integers(5, 30), seqs=st.integers(1, 5))
def test_with_room_for_all_it_agrees_with_a_naive_engine(backend, drawn, budget, seqs):
    model = new_engine(backend, max_batched_tokens=budget + seqs, max_num_seqs=seqs, kv_blocks=1000)
    first, ends, _ = run(model, submissions(drawn))
    naive_first, naive_ends = NaiveEngine(budget + seqs, seqs, 4).run(submissions(drawn))
    assert {i: (pytest.approx(t), c) for i, (t, c) in naive_first.items()} == first
    assert {i: pytest.approx(t) for i, t in naive_ends.items()} == ends


@pytest.mark.parametrize("backend", BACKENDS)
@given(drawn=REQUESTS, budget=st.integers(5, 30), seqs=st.integers(1, 5), blocks=st.integers(8, 20))
def test_in_little_memory_everyone_finishes_once_and_events_tell_the_cache(
    backend, drawn, budget, seqs, blocks
):
    model = new_engine(backend, max_batched_tokens=budget + seqs, max_num_seqs=seqs, kv_blocks=blocks)
    first, ends, changes = run(model, submissions(drawn))
    assert set(first) == set(ends) == set(range(len(drawn)))
    assert all(first[i][0] <= ends[i] for i in ends)
    copies = Counter()
    for change in changes:
        if change.stored:
            assert change.parent is None or change.parent in copies
            copies.update(change.keys.tolist())
        else:
            copies.subtract(change.keys.tolist())
            assert min(copies.values()) >= 0
            copies = +copies
    assert set(copies) == model.cached_keys()


def test_a_step_of_several_prompts_attends_to_the_pairs_of_each(engine):
    asked = []

    class Pairs:
        counts_pairs = True

        def __call__(self, new, prefix, batch, context):
            asked.append(new * (prefix + new / 2))
            return 1.0

    model = engine(step_time=Pairs(), max_batched_tokens=40, max_num_seqs=4)
    for request, prompt in enumerate((12, 12, 30)):
        model.submit(request, np.zeros(0, dtype=np.uint64), prompt, 1)
    model.start_step(0.0)
    model.end_step()
    model.start_step(1.0)
    assert asked == [72 + 72 + 128, 14 * (16 + 7)]


def test_other_step_times_are_told_the_mean_prefix(engine):
    asked = []

    def step_time(new, prefix, batch, context):
        asked.append(prefix)
        return 1.0

    model = engine(step_time=step_time)
    for request in range(2):
        model.submit(request, np.zeros(0, dtype=np.uint64), 12, 1)
    model.start_step(0.0)
    assert asked == [0.0]


@given(
    drawn=REQUESTS,
    budget=st.integers(0, 30),
    seqs=st.integers(1, 5),
    blocks=st.integers(8, 20),
    block_size=st.sampled_from([1, 4]),
    watermark=st.sampled_from([0.0, 0.2]),
)
def test_the_twins_take_the_same_steps(drawn, budget, seqs, blocks, block_size, watermark):
    """Every time, hit and change, also of answers under keys, in engines that run out of memory."""
    limits = {
        "block_size": block_size,
        "max_batched_tokens": budget + seqs,
        "max_num_seqs": seqs,
        "kv_blocks": blocks * 4 // block_size + 4,
        "watermark_ratio": watermark,
    }
    seen = []
    for backend in BACKENDS:
        model = new_engine(backend, **limits)
        with_answers = []
        for time, i, _, prompt, output in submissions(drawn):
            shared = drawn[i][1]
            n = (prompt + output - 1) // block_size
            names = [
                hash((block_size, *shared[: b + 1], *([i] if b >= len(shared) else []), b)) for b in range(n)
            ]
            with_answers.append((time, i, keys(*(name % 2**64 for name in names)), prompt, output))
        first, ends, changes = run(model, with_answers)
        told = [(c.keys.tolist(), c.parent, c.stored) for c in changes]
        seen.append((first, ends, told, model.preemptions))
    assert seen[0] == seen[-1]
