"""Inputs of the benchmarks, and both twins side by side.

With ``--benchmark-disable`` (CI) every benchmark runs once on small inputs; sizes are in ``extra_info``.
"""

import pytest
from inputs import INSTANCES, PROMPT_BLOCKS, shared_prefix_paths

import mulsched.prefix_index
from mulsched import PrefixIndex
from mulsched._native import PrefixIndex as NativeIndex
from mulsched._prefix_index_py import PrefixIndexPy


def pytest_xdist_auto_num_workers() -> int:
    """Return 0: what is timed must have the machine to itself."""
    return 0


@pytest.fixture(scope="session")
def quick(request):
    return request.config.getoption("benchmark_disable")


@pytest.fixture(params=["native", "python"])
def backend(request, monkeypatch):
    """Every PrefixIndex made in the benchmark stands on this twin."""
    factory = {"native": NativeIndex, "python": PrefixIndexPy}[request.param]
    monkeypatch.setattr(mulsched.prefix_index, "_new_backend", factory)
    return request.param


_indexes = {}


@pytest.fixture
def big_index(backend, quick):
    """An index of shared prefixes on 64 instances, and some of its paths; built once per twin.

    1,000,000 unique blocks natively; the Python twin holds 100,000, since it takes minutes to fill.
    """
    blocks = 20_000 if quick else {"native": 1_000_000, "python": 100_000}[backend]
    if backend not in _indexes:
        index = PrefixIndex()
        for i in range(INSTANCES):
            index.add_instance(f"i{i}")
        paths = []
        for holders, path in shared_prefix_paths(blocks):
            for holder in holders:
                index.store(f"i{holder}", path)
            if len(path) == PROMPT_BLOCKS:
                paths.append(path)
        _indexes[backend] = index, paths
    return _indexes[backend]
