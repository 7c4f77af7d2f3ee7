"""Columns for tests of scores and policies, without a router."""

import numpy as np
from hypothesis import strategies as st

from mulsched import policies, testing
from mulsched.indicators import COLUMNS, Columns
from mulsched.policies._policy import select


def make_columns(
    *,
    prompt=1000,
    matched=None,
    queued=None,
    running=None,
    waiting=None,
    context=None,
    cached=None,
    last_chosen=None,
    block_size=16,
    decision=0,
    seed=0,
    now=None,
    session=None,
    names=None,
    keys=(),
):
    """``mulsched.testing.make_columns`` by short names, and without block keys."""
    return testing.make_columns(
        prompt_tokens=prompt,
        block_size=block_size,
        matched_blocks=matched,
        queued_prefill_tokens=queued,
        running=running,
        waiting=waiting,
        context_tokens=context,
        cached_blocks=cached,
        last_chosen=last_chosen,
        instances=names,
        keys=np.array(keys, dtype=np.uint64),
        session=session,
        decision=decision,
        seed=seed,
        now=now,
    )


def choose(policy, c):
    """The position that a policy, or a named one as its factory builds it, takes."""
    if isinstance(policy, str):
        policy = policies.get(policy)
    return select(policy, c, policy.ties)[0]


def rows(c):
    """Columns as a list of dicts, for definitions that loop; ``i`` is the position, ``u`` the draw."""
    return [
        {name: int(c[name][i]) for name in COLUMNS} | {"i": i, "u": float(c.uniform[i])}
        for i in range(len(c))
    ]


def reorder(c, order):
    """The same candidates in another order."""
    return Columns(
        request=c.request,
        instances=tuple(c.instances[i] for i in order),
        rows=c.rows[order],
        table=c.table[:, order],
        decision=c.decision,
        block_size=c.block_size,
        seed=c.seed,
        now=c.now,
    )


@st.composite
def columns(draw, *, min_size=1, max_size=6, now=None):
    """Random columns with small numbers, so that ties, zeros and full hits are common."""
    n = draw(st.integers(min_size, max_size))
    prompt = draw(st.integers(1, 200))

    def counts(most):
        return draw(st.lists(st.integers(0, most), min_size=n, max_size=n))

    return make_columns(
        prompt=prompt,
        matched=counts(prompt // 16),
        queued=counts(300),
        running=counts(40),
        waiting=counts(5),
        context=counts(4000),
        cached=counts(100),
        last_chosen=draw(st.permutations(range(-1, n - 1))),
        decision=draw(st.integers(0, 1000)),
        seed=draw(st.integers(0, 5)),
        session=draw(st.none() | st.sampled_from(["s", "t"])),
        keys=draw(st.lists(st.integers(0, 2), min_size=prompt // 16, max_size=prompt // 16)),
        now=now,
    )
