"""The engine model: batching, chunks, the paged cache, preemption."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mulsched.errors import InvalidArgument
from mulsched.replay import EngineModel, Profile


def step_time(new, prefix, batch, context):
    """10 ms a step, 1 ms a new token, 0.1 ms a decoding request: numbers one can follow by hand."""
    return 0.010 + 0.001 * new + 0.0001 * batch


def engine(**limits):
    return EngineModel(Profile("test", step_time, **({"block_size": 4, "kv_blocks": 100} | limits)))


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


def test_a_request_alone_prefills_then_decodes():
    first, ends, _ = run(engine(), [(0.0, "a", keys(1, 2), 10, 3)])
    assert first == {"a": (pytest.approx(0.020), 0)}
    assert ends == {"a": pytest.approx(0.020 + 2 * 0.0101)}


def test_one_output_token_ends_with_the_prefill():
    first, ends, _ = run(engine(), [(0.0, "a", keys(1), 4, 1)])
    assert ends["a"] == first["a"][0]


def test_a_long_prompt_is_cut_into_chunks_of_the_budget():
    first, _, _ = run(engine(max_batched_tokens=8), [(0.0, "a", keys(1, 2, 3, 4, 5), 20, 1)])
    assert first["a"][0] == pytest.approx(3 * 0.010 + 0.020)


def test_decodes_go_first_and_prefill_takes_the_rest_of_the_budget():
    model = engine(max_batched_tokens=5)
    first, ends, _ = run(model, [(0.0, "a", keys(1), 4, 9), (0.014, "b", keys(2, 3), 8, 1)])
    # b has 4 tokens a step beside a's decode
    assert first["b"][0] == pytest.approx(0.014 + 2 * (0.010 + 0.004 + 0.0001))
    assert ends["a"] > first["b"][0]


def test_no_more_run_than_max_num_seqs():
    first, ends, _ = run(engine(max_num_seqs=1), [(0.0, "a", keys(1), 4, 5), (0.0, "b", keys(2), 4, 1)])
    assert first["b"][0] > ends["a"]


def test_a_cached_prefix_is_not_computed_again():
    first, _, _ = run(engine(), [(0.0, "a", keys(1, 2), 8, 1), (1.0, "b", keys(1, 2, 3), 12, 1)])
    assert first["b"] == (pytest.approx(1.0 + 0.014), 8)


def test_of_a_full_hit_the_last_block_is_computed_again():
    first, _, _ = run(engine(), [(0.0, "a", keys(1, 2), 8, 1), (1.0, "b", keys(1, 2), 8, 1)])
    assert first["b"][1] == 4


def test_blocks_are_announced_in_chunks_after_their_parent():
    _, _, changes = run(engine(max_batched_tokens=8), [(0.0, "a", keys(1, 2, 3, 4), 17, 1)])
    assert [(c.keys.tolist(), c.parent, c.stored) for c in changes] == [
        ([1, 2], None, True),
        ([3, 4], 2, True),
    ]


def test_the_tail_of_what_was_used_the_longest_ago_is_evicted_first():
    model = engine(kv_blocks=6)
    _, _, changes = run(
        model,
        [(0.0, "a", keys(1, 2, 3), 12, 1), (1.0, "b", keys(4, 5), 8, 1), (2.0, "c", keys(6, 7, 8), 12, 1)],
    )
    evicted = [k for c in changes if not c.stored for k in c.keys.tolist()]
    # 6 - 3 - 2 leaves one block for c, which needs three
    assert evicted == [3, 2]
    assert model.cached_keys() == {1, 4, 5, 6, 7, 8}


def test_a_shared_prefix_in_use_is_not_evicted():
    model = engine(kv_blocks=8)
    run(
        model,
        [(0.0, "a", keys(1, 2), 8, 20)] + [(0.1 * i, i, keys(1, 10 + i), 8, 1) for i in range(1, 6)],
    )
    assert 1 in model.cached_keys()


def test_when_memory_runs_out_the_last_admitted_is_preempted_and_still_finishes():
    model = engine(kv_blocks=6)
    first, ends, _ = run(model, [(0.0, "a", keys(1, 2), 8, 12), (0.0, "b", keys(3, 4), 8, 12)])
    assert model.preemptions > 0
    assert ends["a"] < ends["b"]
    assert set(ends) == {"a", "b"}
    assert first["b"][1] == 0  # what it found at its first admission


def test_two_that_compute_the_same_block_keep_one_copy():
    model = engine()
    _, _, changes = run(model, [(0.0, "a", keys(1, 2), 9, 3), (0.0, "b", keys(1, 2), 9, 3)])
    assert [c.keys.tolist() for c in changes if c.stored] == [[1, 2]]


def test_a_request_that_can_never_fit_is_refused():
    model = engine(kv_blocks=3)
    with pytest.raises(InvalidArgument, match="'a' needs 4 blocks, the engine has 3"):
        model.submit("a", keys(1, 2, 3), 12, 1)
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
                self.cached |= set(r["keys"][: r["c"] // self.block_size])
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


@settings(deadline=None)
@given(REQUESTS, st.integers(5, 30), st.integers(1, 5))
def test_with_room_for_all_it_agrees_with_a_naive_engine(drawn, budget, seqs):
    model = engine(max_batched_tokens=budget + seqs, max_num_seqs=seqs, kv_blocks=1000)
    first, ends, _ = run(model, submissions(drawn))
    naive_first, naive_ends = NaiveEngine(budget + seqs, seqs, 4).run(submissions(drawn))
    assert {i: (pytest.approx(t), c) for i, (t, c) in naive_first.items()} == first
    assert {i: pytest.approx(t) for i, t in naive_ends.items()} == ends


@settings(deadline=None)
@given(REQUESTS, st.integers(5, 30), st.integers(1, 5), st.integers(8, 20))
def test_in_little_memory_everyone_finishes_once_and_events_tell_the_cache(drawn, budget, seqs, blocks):
    model = engine(max_batched_tokens=budget + seqs, max_num_seqs=seqs, kv_blocks=blocks)
    first, ends, changes = run(model, submissions(drawn))
    assert set(first) == set(ends) == set(range(len(drawn)))
    assert all(first[i][0] <= ends[i] for i in ends)
    cached = set()
    for change in changes:
        if change.stored:
            assert change.parent is None or change.parent in cached
            assert not cached & set(change.keys.tolist())
            cached |= set(change.keys.tolist())
        else:
            assert set(change.keys.tolist()) <= cached
            cached -= set(change.keys.tolist())
    assert cached == model.cached_keys()
