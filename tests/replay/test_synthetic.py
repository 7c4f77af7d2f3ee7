"""Synthetic workloads: seeded, chained, and close to the figures they are calibrated to."""

import numpy as np
import pytest

from mulsched.errors import InvalidArgument, InvalidType
from mulsched.replay import WORKLOADS, format_calibration, synthetic_trace, targets

KINDS = sorted(WORKLOADS)

# what the search that fitted the constants left beyond 15 %; docs/replay.md says so
MISSES = {("chat", "input_p50"): 1.4, ("thinking", "gap_p50_s"): 1.25, ("thinking", "gap_p90_s"): 1.25}


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_everything(kind):
    one, same, other = (synthetic_trace(kind, duration_s=60, seed=seed) for seed in (1, 1, 2))
    assert one.prompt_tokens.tolist() == same.prompt_tokens.tolist()
    assert one.run_start.tolist() == same.run_start.tolist()
    assert one.prompt_tokens.tolist() != other.prompt_tokens.tolist()
    assert one.synthetic
    assert one.name == f"synthetic:{kind}"


@pytest.mark.parametrize("kind", KINDS)
def test_ids_cover_every_whole_block(kind):
    trace = synthetic_trace(kind, duration_s=60, seed=1)
    for i in range(len(trace)):
        assert len(trace.block_ids(i)) == trace.prompt_tokens[i] // 16


def test_a_follow_up_continues_the_prompt_before_it():
    trace = synthetic_trace("chat", duration_s=600, seed=1)
    follow_ups = np.flatnonzero(trace.previous >= 0)
    assert len(follow_ups) > 100
    for i in follow_ups:
        before = trace.previous[i]
        assert trace.session[i] == trace.session[before]
        assert trace.prompt_tokens[i] > trace.prompt_tokens[before] + trace.output_tokens[before] - 1
        ids = trace.block_ids(before)
        assert (trace.block_ids(i)[: len(ids)] == ids).all()


@pytest.mark.parametrize("kind", KINDS)
def test_two_hours_are_close_to_their_targets(kind):
    stats = synthetic_trace(kind, seed=1).stats()
    for field, target in targets(kind).items():
        if target > 0:  # neither unknown nor zero
            ratio = getattr(stats, field) / target
            most = MISSES.get((kind, field), 1.15)
            assert 1 / most < ratio < most, (field, ratio)


def test_the_calibration_is_printed_beside_the_targets():
    text = format_calibration(synthetic_trace("api", duration_s=60, seed=1))
    assert "synthetic:api" in text
    row = next(line for line in text.splitlines() if line.startswith("input_mean"))
    assert row.split()[2] == "915"
    assert len(text.splitlines()) == 2 + len(targets("api"))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"duration_s": 0}, InvalidArgument),
        ({"duration_s": float("nan")}, InvalidArgument),
        ({"duration_s": "60"}, InvalidType),
        ({"rate_per_s": -1}, InvalidArgument),
        ({"rate_per_s": True}, InvalidType),
    ],
)
def test_bad_durations_and_rates_are_refused(arguments, error):
    with pytest.raises(error):
        synthetic_trace("chat", **arguments)


@pytest.mark.parametrize("call", [synthetic_trace, targets])
def test_an_unknown_workload_is_refused(call):
    with pytest.raises(InvalidArgument, match="unknown workload 'video', expected one of chat"):
        call("video")
