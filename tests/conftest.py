"""Fixtures that every part of the suite may use."""

import os

import pytest

import mulsched.prefix_index
from mulsched._prefix_index_py import PrefixIndexPy

# Both twins, unless the environment asks for the pure package. An absent extension is then an error.
BACKENDS = ("python",) if os.environ.get("MULSCHED_BACKEND") == "python" else ("native", "python")


def new_backend(name):
    if name == "python":
        return PrefixIndexPy()
    from mulsched._native import PrefixIndex as NativeIndex

    return NativeIndex()


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Every PrefixIndex made in the test stands on this twin."""
    monkeypatch.setattr(mulsched.prefix_index, "_new_backend", lambda: new_backend(request.param))
    return request.param


@pytest.fixture
def index(backend):
    return mulsched.prefix_index.PrefixIndex()
