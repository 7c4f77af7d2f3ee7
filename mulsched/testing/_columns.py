"""Columns made by hand instead of by a router, and the changes that invariants make to them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mulsched.errors import InvalidArgument
from mulsched.indicators import COLUMNS, Columns
from mulsched.types import Keys, Request

__all__ = [
    "BETTER_LOW",
    "copied",
    "make_columns",
    "reordered",
    "scale_requests",
    "scale_tokens",
    "with_values",
]

BETTER_LOW = ("queued_prefill_tokens", "running", "waiting", "context_tokens")
"""The indicators of load; the other indicator, ``matched_blocks``, is better high."""

Integers = Sequence[int] | NDArray[np.integer[Any]]

_AT = {name: row for row, name in enumerate(COLUMNS)}


def make_columns(
    *,
    prompt_tokens: int = 1000,
    block_size: int = 16,
    matched_blocks: Integers | None = None,
    queued_prefill_tokens: Integers | None = None,
    running: Integers | None = None,
    waiting: Integers | None = None,
    context_tokens: Integers | None = None,
    cached_blocks: Integers | None = None,
    last_chosen: Integers | None = None,
    instances: Sequence[str] | None = None,
    keys: Keys | None = None,
    session: str | None = None,
    decision: int = 0,
    seed: int = 0,
    now: float | None = None,
) -> Columns:
    """Return the columns of as many candidates as the lists are long, to try a score on without a router.

    What is not given is 0, ``last_chosen`` -1; no tier below the GPU counts, and the other columns follow by
    the formulas of :mod:`mulsched.indicators`. Instances are named ``i0``, ``i1``, ... and block keys count
    from 0 unless given. The table is writable, unlike a router's.

    Raises InvalidArgument (no list, lists of different lengths, a negative value, more blocks matched than
    the prompt has).
    """
    given = {
        "matched_blocks": matched_blocks,
        "queued_prefill_tokens": queued_prefill_tokens,
        "running": running,
        "waiting": waiting,
        "context_tokens": context_tokens,
        "cached_blocks": cached_blocks,
        "last_chosen": last_chosen,
    }
    lengths = {name: len(values) for name, values in given.items() if values is not None}
    if instances is not None:
        lengths["instances"] = len(instances)
    if len(set(lengths.values())) != 1:
        raise InvalidArgument(f"columns need lists of one length, got {lengths or 'none'}")
    n = next(iter(lengths.values()))
    table = np.zeros((len(COLUMNS), n), dtype=np.int64)
    table[_AT["last_chosen"]] = -1
    for name, values in given.items():
        if values is not None:
            table[_AT[name]] = values
            least = -1 if name == "last_chosen" else 0
            if n and table[_AT[name]].min() < least:
                raise InvalidArgument(f"{name} must be at least {least}, got {table[_AT[name]].min()}")
    blocks = prompt_tokens // block_size
    if n and table[0].max() > blocks:
        raise InvalidArgument(f"{prompt_tokens} tokens have {blocks} blocks, got {table[0].max()} matched")
    columns = Columns(
        request=Request(
            prompt_tokens, np.arange(blocks, dtype=np.uint64) if keys is None else keys, "r", session
        ),
        instances=tuple(f"i{row}" for row in range(n)) if instances is None else tuple(instances),
        rows=np.arange(n, dtype=np.int64),
        table=table,
        decision=decision,
        block_size=block_size,
        seed=seed,
        now=now,
    )
    _derive(columns)
    return columns


def _derive(columns: Columns) -> None:
    """Fill the columns that follow from others."""
    table, prompt, size = columns.table, columns.request.prompt_tokens, columns.block_size
    table[_AT["hit_tokens"]] = np.minimum(columns.matched_blocks * size, (prompt - 1) // size * size)
    table[_AT["new_prefill_tokens"]] = prompt - columns.hit_tokens
    table[_AT["p_tokens"]] = columns.queued_prefill_tokens + columns.new_prefill_tokens
    table[_AT["batch_size"]] = columns.running + columns.waiting + 1


def _with_table(columns: Columns, table: NDArray[np.int64], *, token: int = 1) -> Columns:
    """Return a copy with another table, and ``token`` tokens for each."""
    request = columns.request
    return Columns(
        request=Request(
            request.prompt_tokens * token, request.keys.copy(), request.request_id, request.session
        ),
        instances=columns.instances,
        rows=columns.rows.copy(),
        table=table,
        decision=columns.decision,
        block_size=columns.block_size * token,
        seed=columns.seed,
        now=columns.now,
    )


def copied(columns: Columns) -> Columns:
    """Return columns of the same values, which a policy may spoil without spoiling these."""
    return _with_table(columns, columns.table.copy())


def with_values(columns: Columns, position: int, **values: int) -> Columns:
    """Return a copy in which one candidate has other values; what follows from them is computed anew."""
    copy = copied(columns)
    for name, value in values.items():
        copy.table[_AT[name], position] = value
    _derive(copy)
    return copy


def reordered(columns: Columns, order: Sequence[int]) -> Columns:
    """Return a copy with the candidates in another order; each keeps its row, hence its draws."""
    copy = _with_table(columns, columns.table[:, list(order)])
    copy.instances = tuple(columns.instances[at] for at in order)
    copy.rows = columns.rows[list(order)]
    return copy


def scale_tokens(columns: Columns, factor: int) -> Columns:
    """Return a copy in which a token is ``factor`` tokens: prompt, block, queue and context alike."""
    copy = _with_table(columns, columns.table.copy(), token=factor)
    copy.table[[_AT["queued_prefill_tokens"], _AT["context_tokens"]]] *= factor
    _derive(copy)
    return copy


def scale_requests(columns: Columns, factor: int) -> Columns:
    """Return a copy in which every ``batch_size`` is ``factor`` times as large, ``waiting`` too."""
    copy = copied(columns)
    copy.table[_AT["waiting"]] *= factor
    copy.table[_AT["running"]] = (copy.table[_AT["running"]] + 1) * factor - 1
    _derive(copy)
    return copy
