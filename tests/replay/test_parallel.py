"""Replays in parallel processes."""

import pytest

from mulsched.errors import InvalidArgument
from mulsched.replay import builtin_profile, synthetic_trace
from mulsched.replay.parallel import replay_each

OPTIONS = {"policy": "lmetric", "profile": builtin_profile(), "instances": 2}


@pytest.fixture(scope="module")
def jobs():
    trace = synthetic_trace("chat", duration_s=5, seed=2, rate_per_s=6)
    return [(trace, OPTIONS), (trace.scale_rate(2), OPTIONS), (trace, OPTIONS | {"policy": "vllm"})]


def test_each_job_has_its_trace_and_policy_and_processes_do_not_change_it(jobs):
    alone = list(replay_each(jobs))
    pooled = list(replay_each(jobs, processes=2))
    assert [r.policy for r in alone] == ["lmetric", "lmetric", "vllm"]
    assert alone[1].arrival_s[-1] == alone[0].arrival_s[-1] / 2
    assert [r.finish_s.tolist() for r in pooled] == [r.finish_s.tolist() for r in alone]


def test_results_come_one_at_a_time(jobs):
    results = replay_each(jobs)
    assert next(results).policy == "lmetric"
    results.close()


@pytest.mark.parametrize("processes", [1, 2])
def test_progress_of_every_job_is_told_to_its_end_before_its_result(jobs, processes):
    seen = []
    results = replay_each(jobs, processes=processes, progress=lambda *message: seen.append(message))
    for job, result in enumerate(results):
        requests = len(result.arrival_s)
        assert (job, requests, requests) in seen
    assert {job for job, _, _ in seen} == {0, 1, 2}


@pytest.mark.parametrize("processes", [1, 2])
def test_the_first_error_ends_it(jobs, processes):
    trace = jobs[0][0]
    bad = [(trace, OPTIONS), (trace, OPTIONS | {"instances": 0}), (trace, OPTIONS), (trace, OPTIONS)]
    results = replay_each(bad, processes=processes)
    assert next(results).policy == "lmetric"
    with pytest.raises(InvalidArgument, match="at least 1, got 0"):
        next(results)


def test_no_jobs_give_nothing():
    assert list(replay_each([], processes=2)) == []
