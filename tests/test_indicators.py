"""Columns: names, draws, subsets, and both twins that fill them."""

from math import ceil

import numpy as np
import pytest
from backends import BACKENDS, new_backend
from columns import columns, make_columns
from hypothesis import given
from hypothesis import strategies as st

from mulsched import _columns_py
from mulsched.errors import InvalidArgument
from mulsched.indicators import COLUMNS, uniform_draws


def mix(x):
    """SplitMix64's finalizer on Python's integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def one_draw(seed, decision, row):
    gamma = 0x9E3779B97F4A7C15
    start = mix((seed + gamma * (decision + 1)) % 2**64)
    return (mix(mix((start + gamma * (row + 1)) % 2**64)) >> 11) / 2**53


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


def test_the_mixer_is_splitmix64():
    # the first outputs of SplitMix64 from state 1234567, as published with the generator's test vectors
    gamma = 0x9E3779B97F4A7C15
    outputs = [mix((1234567 + gamma * k) % 2**64) for k in (1, 2, 3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(
    st.integers(-(2**70), 2**70),
    st.integers(0, 2**62),
    st.lists(st.integers(0, 2**40), min_size=1, max_size=5),
)
def test_draws_agree_with_the_formula_in_plain_integers(seed, decision, rows):
    draws = uniform_draws(seed, decision, np.array(rows, dtype=np.int64))
    assert draws.tolist() == [one_draw(seed, decision, row) for row in rows]
    assert ((draws >= 0) & (draws < 1)).all()


def test_draws_are_uniform_over_rows_and_over_decisions():
    over_rows = uniform_draws(1, 0, np.arange(10_000))
    over_decisions = np.array([uniform_draws(1, d, np.array([3]))[0] for d in range(10_000)])
    for draws in (over_rows, over_decisions):
        # 1000 expected in each tenth, standard deviation 30
        assert (abs(np.histogram(draws, bins=10, range=(0, 1))[0] - 1000) < 150).all()
        assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.05


def test_a_draw_does_not_depend_on_the_other_candidates():
    c = make_columns(running=[0] * 6, decision=4, seed=9)
    for i, draw in enumerate(c.uniform.tolist()):
        alone = c.take(np.arange(6) == i)
        assert alone.uniform.tolist() == [draw]


def test_columns_have_the_length_of_their_candidates():
    c = make_columns(running=[1, 3, 2])
    assert len(c) == 3
    assert all(c[name].shape == (3,) for name in COLUMNS)
    assert all(c[name].dtype == np.int64 for name in COLUMNS)


@given(columns(min_size=2, now=2.5), st.data())
def test_a_subset_keeps_every_column_of_who_is_left(c, data):
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(c), max_size=len(c))))
    part = c.take(mask)
    assert len(part) == mask.sum()
    assert list(part.instances) == [n for n, keep in zip(c.instances, mask, strict=True) if keep]
    assert (part.uniform == c.uniform[mask]).all()
    assert (part.rows == c.rows[mask]).all()
    for attribute in ("request", "decision", "block_size", "seed", "now"):
        assert getattr(part, attribute) == getattr(c, attribute)
    for name in COLUMNS:
        assert (part[name] == c[name][mask]).all()


@pytest.mark.parametrize("name", BACKENDS)
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
            running + waiting + 1, context, index.blocks(row), last, 0,
        ]  # fmt: skip
        assert out[2, i] >= 1


@pytest.mark.parametrize("name", BACKENDS)
@given(
    paths=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 5), st.integers(0, 5)), max_size=8
    ),
    ratios=st.lists(st.sampled_from([0.0, 0.1, 0.3, 1.0]), min_size=2, max_size=2),
    blocks=st.integers(0, 6),
    rest=st.integers(0, 3),
    rows=st.sets(st.integers(0, 3), min_size=1),
)
def test_tiers_are_charged_by_their_formulas(name, paths, ratios, blocks, rest, rows):
    if name == "native":
        from mulsched._native import charge_tiers, fill_columns
    else:
        charge_tiers, fill_columns = _columns_py.charge_tiers, _columns_py.fill_columns
    index, *tiers = [new_backend(name) for _ in range(3)]
    held = set()
    for backend in (index, *tiers):
        for row in range(4):
            backend.add_row(row, -1, True)
    for at, row, first, n in paths:  # block 10 + i is named 10 + i, and follows those before it
        path = np.arange(10, 10 + first + n, dtype=np.uint64)
        (index, *tiers)[at].store_named_after(row, path[:first], path[first:], path[first:])
        held |= {(at, row, block) for block in range(first, first + n)}
    prompt = max(1, 4 * blocks + rest)
    path, chosen = np.arange(10, 10 + prompt // 4, dtype=np.uint64), np.array(sorted(rows), dtype=np.int64)
    table = np.arange(20, dtype=np.int64).reshape(5, 4)
    out = np.full((len(COLUMNS), len(chosen)), -7, dtype=np.int64)
    fill_columns(index, None, path, prompt, 4, chosen, table, out)
    before = out.copy()
    charge_tiers(list(zip(tiers, ratios, strict=True)), path, prompt, 4, chosen, out)
    for i, row in enumerate(chosen.tolist()):
        at, ends, cost = 0, [], 0.0
        for tier in range(3):
            while at < len(path) and (tier, row, at) in held:
                at += 1
            ends.append(min(4 * at, (prompt - 1) // 4 * 4))
            cost += ratios[tier - 1] * (ends[-1] - ends[-2]) if tier else 0.0
        expected = before[:, i].tolist()
        new = prompt - ends[2] + ceil(cost)
        expected[2], expected[4], expected[11] = new, before[3, i] + new, ends[2] - ends[0]
        assert out[:, i].tolist() == expected
        assert new >= 1
