"""Fixtures that every part of the suite may use."""

import pytest
from backends import BACKENDS, new_backend

import mulsched.prefix_index


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Every PrefixIndex made in the test stands on this twin."""
    monkeypatch.setattr(mulsched.prefix_index, "_new_backend", lambda: new_backend(request.param))
    return request.param


@pytest.fixture
def index(backend):
    return mulsched.prefix_index.PrefixIndex()
