"""The engine model against the naive engine, also where requests arrive while others run."""

import importlib

import numpy as np
import pytest
from backends import BACKENDS
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_vllm import NaiveAsyncVllm, NaiveVllm

from mulsched.replay._engine_py import EnginePy

BLOCK_SIZE, KV_BLOCKS = 4, 12
REQUEST = st.tuples(
    st.integers(0, 12),  # the step before which it arrives
    st.integers(0, 2),  # which prefix it starts with
    st.integers(0, 5),  # blocks of it
    st.integers(1, 24),  # prompt tokens
    st.integers(1, 20),  # output tokens
)


def keys(number, prefix, shared_blocks, tokens):
    """Return keys of whole prefixes: the shared ones, then the request's own."""
    return [
        1000 * prefix + i if i < shared_blocks else 10_000 * (number + 1) + i
        for i in range(tokens // BLOCK_SIZE)
    ]


def flat(changes):
    """Return changes block by block; the parent is told once a change."""
    return [
        entry
        for kind, *blocks in changes
        for entry in ([(kind, *blocks)] if kind == "stored" else [(kind, block) for block in blocks])
    ]


@pytest.fixture(scope="module", params=BACKENDS)
def twin(request):
    if request.param == "python":
        return EnginePy
    return importlib.import_module("mulsched.replay._native").EngineNative


@given(
    requests=st.lists(REQUEST, min_size=1, max_size=10),
    max_num_seqs=st.integers(1, 5),
    spare_tokens=st.integers(0, 20),
    schedules_ahead=st.booleans(),
)
@settings(max_examples=300)
def test_every_step_is_that_of_the_naive_engine(twin, requests, max_num_seqs, spare_tokens, schedules_ahead):
    budget = max_num_seqs + spare_tokens
    model = twin(BLOCK_SIZE, KV_BLOCKS, budget, max_num_seqs, 0, schedules_ahead)
    naive = (NaiveAsyncVllm if schedules_ahead else NaiveVllm)(
        block_size=BLOCK_SIZE, kv_blocks=KV_BLOCKS, max_batched_tokens=budget, max_num_seqs=max_num_seqs
    )
    pending = sorted(enumerate(requests), key=lambda request: request[1][0])
    at = preemptions = 0
    while pending or naive.running or naive.waiting:
        while pending and pending[0][1][0] <= at:
            number, (_, prefix, shared_blocks, prompt_tokens, output_tokens) = pending.pop(0)
            path = keys(number, prefix, shared_blocks, prompt_tokens + output_tokens)
            naive.submit(number, path, prompt_tokens, output_tokens)
            model.submit(number, np.array(path, dtype=np.uint64), prompt_tokens, output_tokens, 0)
        at += 1
        scheduled = naive.start()
        load = model.start_step()
        assert bool(scheduled) == (load is not None)
        if load is None:
            continue
        assert sum(tokens for _, _, tokens in scheduled) == load.new_tokens + load.decode_batch
        model.check()
        expected, result = naive.end(), model.end_step()
        preemptions += len(expected.preempted)
        assert preemptions == model.preemptions
        assert expected.first_tokens == result.first_tokens
        assert expected.finished == result.finished
        changes = [
            ("stored", c.parent, *c.keys.tolist()) if c.stored else ("removed", *c.keys.tolist())
            for c in model.take_changes()
        ]
        assert flat(expected.changes) == flat(changes)
        model.check()
