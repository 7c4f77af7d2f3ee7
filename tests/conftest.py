"""Fixtures that every part of the suite may use."""

import gc

import pytest
from backends import BACKENDS, new_backend
from hypothesis import settings

import mulsched.prefix_index

# a deadline is a claim about the clock of a machine that others use too
settings.register_profile("mulsched", deadline=None)
settings.load_profile("mulsched")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Return 0, none but this process, where files or tests are named: a debugger then has the terminal.

    None leaves the whole suite to xdist, which starts a process for every core.
    """
    return None if config.args_source is pytest.Config.ArgsSource.TESTPATHS else 0


def pytest_collection_finish() -> None:
    """Keep the modules and tests that are there now out of garbage collection.

    Hypothesis collects all garbage in each new thread, and mulsched.testing checks a score in one: with the
    whole suite in memory that took longer than most checks.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Every PrefixIndex made in the test stands on this twin."""
    monkeypatch.setattr(mulsched.prefix_index, "_new_backend", lambda: new_backend(request.param))
    return request.param


@pytest.fixture
def index(backend):
    return mulsched.prefix_index.PrefixIndex()
