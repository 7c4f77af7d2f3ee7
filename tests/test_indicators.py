"""Columns: names, draws, subsets, and both twins that fill them."""

import numpy as np
import pytest
from backends import BACKENDS, new_backend
from columns import columns, make_columns
from hypothesis import given, settings
from hypothesis import strategies as st

from mulsched import _columns_py
from mulsched.errors import InvalidArgument
from mulsched.indicators import COLUMNS, uniform_draws


def test_columns_are_found_by_name_and_by_attribute():
    c = make_columns(prompt=100, matched=[5, 0], running=[1, 3], queued=[7, 0], waiting=[2, 0])
    for name in COLUMNS:
        assert (c[name] == getattr(c, name)).all()
    assert c.p_tokens.tolist() == [27, 100]
    assert c.batch_size.tolist() == [4, 4]
    with pytest.raises(InvalidArgument, match="unknown indicator 'speed'"):
        c["speed"]


def test_draws_are_a_function_of_seed_decision_and_row():
    rows = np.arange(1000)
    draws = uniform_draws(1, 2, rows)
    assert (draws == uniform_draws(1, 2, rows)).all()
    assert (draws[::7] == uniform_draws(1, 2, rows[::7])).all()
    assert not (draws == uniform_draws(2, 2, rows)).any()
    assert not (draws == uniform_draws(1, 3, rows)).any()
    assert ((draws >= 0) & (draws < 1)).all()
    assert abs(draws.mean() - 0.5) < 0.05


@given(columns(min_size=2), st.data())
def test_a_subset_keeps_every_column_of_who_is_left(c, data):
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(c), max_size=len(c))))
    part = c.take(mask)
    assert len(part) == mask.sum()
    assert list(part.instances) == [n for n, keep in zip(c.instances, mask, strict=True) if keep]
    assert (part.uniform == c.uniform[mask]).all()
    for name in COLUMNS:
        assert (part[name] == c[name][mask]).all()


@pytest.mark.parametrize("name", BACKENDS)
@settings(deadline=None)
@given(
    paths=st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 2), max_size=5)), max_size=6),
    flying=st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 2), max_size=5)), max_size=3),
    keys=st.lists(st.integers(0, 2), max_size=6),
    rest=st.integers(0, 3),
    load=st.lists(st.integers(0, 50), min_size=20, max_size=20),
    rows=st.sets(st.integers(0, 3), min_size=1),
)
def test_filled_columns_follow_their_formulas(name, paths, flying, keys, rest, load, rows):
    if name == "native":
        from mulsched._native import fill_columns
    else:
        fill_columns = _columns_py.fill_columns
    index, in_flight = new_backend(name), new_backend(name)
    for backend, content in ((index, paths), (in_flight, flying)):
        for row in range(4):
            backend.add_row(row, -1, False)
        for row, path in content:
            backend.store(row, np.array(path, dtype=np.uint64))
    prompt = max(1, 4 * len(keys) + rest)
    path = np.array(keys, dtype=np.uint64)[: prompt // 4]
    table = np.array(load, dtype=np.int64).reshape(5, 4)
    chosen = np.array(sorted(rows), dtype=np.int64)
    out = np.full((len(COLUMNS), len(chosen)), -7, dtype=np.int64)
    fill_columns(index, in_flight, path, prompt, 4, chosen, table, out)
    for i, row in enumerate(chosen):
        matched = [np.zeros(4, dtype=np.int64) for _ in range(2)]
        index.match(path, matched[0])
        in_flight.match(path, matched[1])
        best = max(int(m[row]) for m in matched)
        hit = min(4 * best, (prompt - 1) // 4 * 4)
        queued, running, waiting, context, last = table[:, row].tolist()
        assert out[:, i].tolist() == [
            best, hit, prompt - hit, queued, queued + prompt - hit, running, waiting,
            running + waiting + 1, context, index.blocks(row), last,
        ]  # fmt: skip
        assert out[2, i] >= 1
