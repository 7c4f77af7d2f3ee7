"""Our replay against the offline simulator of ai-dynamo-runtime 1.6.1 (benchmarks/dynamo_replay).

Opt in: pip install '.[dynamo]', then pytest -m dynamo.
"""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from dynamo_replay.experiments import AMPLE, Agreement, experiments, twice, without_sharing
from dynamo_replay.routing import follow, whole_blocks
from dynamo_replay.simulators import DynamoMockerStep, Setup, run_dynamo, run_mulsched

from mulsched.replay import synthetic_trace

pytestmark = pytest.mark.dynamo

FIXED = Setup(kv_blocks=AMPLE, fixed_timing=True)
FORMULA = Setup(kv_blocks=AMPLE)
ROUTING = replace(FORMULA, max_batched_tokens=1_000_000)

EXPERIMENTS = 11
ROUNDED = 9
"""The one whose step times differ by what Dynamo rounds."""


@cache
def outcomes(position):
    return list(experiments(duration_s=100))[position].run()


@pytest.fixture(scope="module")
def chat():
    return synthetic_trace("chat", duration_s=60, seed=1)


def test_a_lone_request_takes_what_the_formula_says(chat):
    lone = without_sharing(chat.take(np.arange(len(chat)) == 0))
    prompt, output = int(lone.prompt_tokens[0]), int(lone.output_tokens[0])
    step = DynamoMockerStep(FORMULA.kv_blocks * FORMULA.block_size)
    prefill_s = step(prompt, 0, 0, 0)
    decode_s = sum(step(0, 0, 1, context) for context in range(prompt, prompt + output - 1))
    run = run_dynamo(lone, FORMULA)
    assert (run.ttft_s[0], run.finish_s[0]) == pytest.approx((prefill_s, prefill_s + decode_s), abs=1e-6)


def test_these_are_all_the_experiments():
    assert len(list(experiments(duration_s=100))) == EXPERIMENTS


@pytest.mark.parametrize("position", range(EXPERIMENTS))
def test_under_round_robin_every_request_finds_the_same_tokens_cached(position):
    theirs, ours, agree = outcomes(position)
    assert (agree.instance, agree.cached, ours.preemptions) == (1, 1, theirs.preemptions)


@pytest.mark.parametrize("position", sorted({*range(EXPERIMENTS)} - {ROUNDED}))
def test_under_round_robin_every_request_has_the_same_times(position):
    _, _, agree = outcomes(position)
    assert (agree.ttft, agree.finish) == (1, 1)


def test_the_experiments_evict_and_preempt():
    ample, evicting, preempting = (outcomes(position)[0] for position in (2, 6, 7))
    assert evicting.reused < ample.reused
    assert preempting.preemptions > 0


@pytest.mark.parametrize("times", ["ttft_s", "tpot_s"])
def test_what_dynamo_rounds_moves_percentiles_by_less_than_a_thousandth(times):
    theirs, ours = (np.percentile(getattr(run, times), (50, 95, 99)) for run in outcomes(ROUNDED)[:2])
    assert ours.tolist() == pytest.approx(theirs.tolist(), rel=1e-3)


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("again", [False, True])
def test_its_router_takes_the_smallest_cost_by_the_rule(chat, again, reuse, scale):
    trace = twice(replace(chat, prompt_tokens=chat.prompt_tokens // 16 * 16), 0.25) if again else chat
    router = {"router_assume_kv_reuse": reuse, "prefill_load_scale": scale}
    run = run_dynamo(trace, ROUTING, "kv_router", router=router)
    seen = follow(trace, run, instances=4, prefill_load_scale=scale, assume_kv_reuse=reuse)
    assert seen.rule == 1


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_our_dynamo_policy_is_its_rule_but_for_shared_and_partial_blocks_and_full_hits(chat, scale):
    trace = whole_blocks(chat, 16)
    router = {"router_assume_kv_reuse": False, "prefill_load_scale": scale}
    run = run_dynamo(trace, ROUTING, "kv_router", router=router)
    seen = follow(trace, run, instances=4, prefill_load_scale=scale, assume_kv_reuse=False)
    assert seen.ours == 1


def test_our_dynamo_policy_agrees_with_its_defaults_in_nine_decisions_of_ten(chat):
    run = run_dynamo(chat, ROUTING, "kv_router")
    assert follow(chat, run, instances=4).ours > 0.9


def test_a_wrong_rule_is_noticed(chat):
    run = run_dynamo(chat, ROUTING, "kv_router")
    assert follow(chat, run, instances=4, assume_kv_reuse=False).rule < 1


def test_another_engine_is_noticed(chat):
    slower = run_mulsched(chat, replace(FIXED, max_num_seqs=1))
    agree = Agreement.between(run_dynamo(chat, FIXED), slower)
    assert agree.ttft < 0.5
