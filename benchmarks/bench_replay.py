"""A whole replay on both twins: synthetic chat, 4 instances."""

import pytest
from backends import BACKENDS

from mulsched.replay import builtin_profile, replay, simulator, synthetic_trace
from mulsched.replay._replay_py import run_replay as run_python

PROFILE = builtin_profile()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", ["lmetric", "linear"])
def bench_replay(benchmark, monkeypatch, backend, policy):
    """``lmetric`` is computed in the core, ``linear`` by a call of Python for each request."""
    if backend == "python":
        monkeypatch.setattr(simulator, "run_replay", run_python)
    trace = synthetic_trace("chat", duration_s=30, seed=0, rate_per_s=7)
    benchmark.group = f"replay, {policy}"
    benchmark.extra_info["requests"] = len(trace)
    result = benchmark(replay, trace, policy, profile=PROFILE, instances=4)
    assert len(result.arrival_s) == len(trace)
