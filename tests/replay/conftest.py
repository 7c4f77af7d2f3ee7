"""A short workload for all tests of replays."""

import pytest

from mulsched.replay import synthetic_trace


@pytest.fixture(scope="session")
def chat():
    return synthetic_trace("chat", duration_s=60, seed=4, rate_per_s=8)
