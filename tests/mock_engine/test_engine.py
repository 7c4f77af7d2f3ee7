"""The engine that the mock serves: which request gets which token when."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mulsched import BlockRemoved, BlockStored, CacheCleared, Router
from mulsched.errors import DuplicateRequest, InvalidArgument
from mulsched.mock_engine.engine import MockEngine
from mulsched.replay.engine import EngineModel
from mulsched.replay.profile import Profile

# a second a step, blocks of four tokens
PROFILE = Profile(
    "second", lambda *load: 1.0, block_size=4, max_batched_tokens=16, max_num_seqs=4, kv_blocks=32
)


def engine(**options):
    return MockEngine("gpu-0", PROFILE, **options)


def tokens(n, start=0):
    return np.arange(start, start + n, dtype=np.uint32)


def run(e, now=0.0):
    """Steps until there is nothing to do, each as soon as it is due."""
    steps = [e.advance(now)]
    while e.next_s is not None:
        steps.append(e.advance(e.next_s))
        e.check()
    return [step for step in steps if step is not None]


def test_a_request_gains_a_token_a_step_after_its_prompt():
    e = engine()
    e.submit(7, tokens(20), tokens(3))  # 20 tokens are two steps of 16
    steps = run(e)
    assert [(step.end_s, step.tokens, step.finished) for step in steps] == [
        (1.0, [], []),
        (2.0, [7], []),
        (3.0, [7], []),
        (4.0, [7], [7]),
    ]


def test_requests_share_a_step():
    e = engine()
    e.submit(1, tokens(4), tokens(2))
    e.submit(2, tokens(4, 100), tokens(1))
    assert [step.tokens for step in run(e)] == [[1, 2], [1]]


def test_a_late_call_does_not_delay_the_steps_after():
    e = engine()
    e.submit(1, tokens(4), tokens(3))
    e.advance(0.0)
    assert [e.advance(2.9).end_s, e.advance(2.9).end_s, e.advance(2.9), e.next_s] == [1.0, 2.0, None, 3.0]


def test_an_idle_engine_starts_when_it_is_called():
    e = engine()
    e.submit(1, tokens(4), tokens(1))
    assert [step.end_s for step in run(e, now=10.0)] == [11.0]


def test_a_follow_up_finds_the_prompt_and_the_answer_cached():
    e = engine()
    prompt, answer = tokens(8), tokens(5, 50)  # of the answer the last token has no KV
    e.submit(1, prompt, answer)
    run(e)
    e.submit(2, np.concatenate([prompt, answer, tokens(4, 90)]), tokens(1))
    assert [step.cached_tokens for step in run(e)] == [{2: 12}]
    assert (e.counts["prompt_tokens"], e.counts["cached_tokens"]) == (8 + 17, 12)


def test_a_salt_keeps_prefixes_apart():
    e = engine()
    e.submit(1, tokens(8), tokens(1), cache_salt="a")
    run(e)
    e.submit(2, tokens(8), tokens(1), cache_salt="b")
    e.submit(3, tokens(8), tokens(1), cache_salt="a")
    assert run(e)[0].cached_tokens == {2: 0, 3: 4}


def test_a_router_learns_from_the_events_what_is_cached():
    e = engine()
    router = Router(block_size=4)
    router.add_instance("gpu-0")
    e.submit(1, tokens(10), tokens(3, 50))
    for step in run(e):
        for event in step.events:
            router.apply(event)
    assert router.select(tokens(10)).hit_tokens == 8


def test_hashes_differ_between_engines():
    one, other = engine(hash_seed=0), engine(hash_seed=1)
    for e in (one, other):
        e.submit(1, tokens(8), tokens(1))
        run(e)
    assert one.cached_keys().isdisjoint(other.cached_keys())


def test_an_aborted_request_in_the_queue_leaves_it():
    e = engine()
    e.submit(1, tokens(4), tokens(1))
    e.abort(1)
    assert (e.waiting, run(e)) == (0, [])


def test_a_request_aborted_in_a_step_frees_its_blocks_when_that_ends():
    e = engine()
    e.submit(1, tokens(8), tokens(9))
    e.submit(2, tokens(4, 100), tokens(2))
    e.advance(0.0)
    e.abort(1)
    assert e.running == 2
    step = e.advance(1.0)
    assert (step.tokens, step.cached_tokens, e.running) == ([2], {2: 0}, 1)
    assert e.kv_usage_ratio == 2 / 32
    e.check()


def test_the_blocks_of_an_aborted_request_stay_cached():
    e = engine()
    e.submit(1, tokens(8), tokens(9))
    e.advance(0.0)
    e.abort(1)
    run(e)
    e.submit(2, tokens(9), tokens(1))
    assert run(e)[0].cached_tokens == {2: 8}


def test_a_half_computed_prompt_can_be_aborted():
    e = engine()
    e.submit(1, tokens(40), tokens(2))
    e.submit(2, tokens(4, 100), tokens(1))
    e.advance(0.0)
    e.abort(1)
    assert [step.tokens for step in run(e)] == [[], [2]]
    assert e.kv_usage_ratio == 0


def test_aborting_what_is_not_there_does_nothing():
    e = engine()
    e.submit(1, tokens(4), tokens(1))
    run(e)
    e.abort(1)
    e.abort(2)
    e.check()


def test_a_reset_clears_the_cache():
    e = engine()
    e.submit(1, tokens(8), tokens(1))
    run(e)
    assert e.reset_prefix_cache() == CacheCleared("gpu-0")
    assert e.cached_keys() == set()


def test_a_reset_does_nothing_while_a_request_is_under_way():
    e = engine()
    e.submit(1, tokens(8), tokens(1))
    e.advance(0.0)
    assert e.reset_prefix_cache() is None
    assert e.cached_keys()


@pytest.mark.parametrize(("prompt", "answer"), [(0, 1), (1, 0), (100, 29)])
def test_what_does_not_fit_is_refused_and_changes_nothing(prompt, answer):
    e = engine()
    with pytest.raises(InvalidArgument):
        e.submit(1, tokens(prompt), tokens(answer))
    assert e.waiting == 0
    e.check()


def test_an_engine_that_schedules_ahead_is_refused():
    with pytest.raises(InvalidArgument, match="the mock engine does not schedule ahead"):
        MockEngine("e", replace(PROFILE, schedules_ahead=True))


def test_a_number_in_use_is_refused():
    e = engine()
    e.submit(1, tokens(4), tokens(1))
    with pytest.raises(DuplicateRequest):
        e.submit(1, tokens(4), tokens(1))


# prompts of few contents, so that they share prefixes; the cache holds three or four of them
requests = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=12
)


@settings(max_examples=50)
@given(requests, st.data())
def test_events_tell_what_is_cached_whatever_is_aborted(given_requests, data):
    e = engine()
    copies = Counter()

    def hear(step):
        for event in step.events if step else ():
            keys = event.block_hashes.tolist()
            if isinstance(event, BlockStored):
                assert event.parent_hash is None or copies[event.parent_hash] > 0
                assert len(event.token_ids) == 4 * len(keys)
                copies.update(keys)
            else:
                assert isinstance(event, BlockRemoved)
                copies.subtract(keys)

    for number, (content, prompt, answer) in enumerate(given_requests):
        e.submit(number, tokens(prompt, 1000 * content), tokens(answer, 5000))
        hear(e.advance(e.next_s or 0.0))
        if data.draw(st.booleans()):
            e.abort(data.draw(st.integers(0, number)))
        e.check()
    for step in run(e, e.next_s or 0.0):
        hear(step)
    assert {key for key, n in copies.items() if n > 0} == e.cached_keys()
    assert e.kv_usage_ratio == 0


@settings(max_examples=50)
@given(requests)
def test_it_does_what_the_model_of_replay_does(given_requests):
    e, model = engine(), EngineModel(PROFILE)
    for number, (content, prompt, answer) in enumerate(given_requests):
        e.submit(number, tokens(prompt, 1000 * content), tokens(answer, 5000))
        keys = np.array(e._requests[number].keys, dtype=np.uint64)
        model.submit(number, keys, prompt, answer)
    for step in run(e):
        assert model.start_step(0.0) is not None
        result = model.end_step()
        assert (step.cached_tokens, step.finished) == (dict(result.first_tokens), result.finished)
    assert model.start_step(0.0) is None
    assert (e.preemptions, e.cached_keys()) == (model.preemptions, model.cached_keys())


@settings(max_examples=50)
@given(requests)
def test_each_request_gains_every_token_of_its_answer_once(given_requests):
    e = engine()
    for number, (content, prompt, answer) in enumerate(given_requests):
        e.submit(number, tokens(prompt, 1000 * content), tokens(answer, 5000))
    gained = Counter(number for step in run(e) for number in step.tokens)
    assert gained == {number: answer for number, (_, _, answer) in enumerate(given_requests)}
