"""Filling the columns with numpy: the twin of the native ``fill_columns`` and ``charge_tiers``."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mulsched.types import Keys

if TYPE_CHECKING:
    from mulsched.prefix_index import Backend

__all__ = ["charge_tiers", "fill_columns"]


def fill_columns(
    index: "Backend",
    in_flight: "Backend | None",
    keys: Keys,
    prompt_tokens: int,
    block_size: int,
    rows: NDArray[np.int64],
    load: NDArray[np.int64],
    out: NDArray[np.int64],
) -> None:
    """Fill ``out``, shape (columns, candidates), for the candidate rows; see ``mulsched.indicators``."""
    matched = np.empty(load.shape[1], dtype=np.int64)
    index.match(keys, matched)
    if in_flight is not None:
        coming = np.empty_like(matched)
        in_flight.match(keys, coming)
        matched = np.maximum(matched, coming)
    most = (prompt_tokens - 1) // block_size * block_size
    queued, running, waiting, context, last_chosen = load[:, rows]
    out[0] = matched[rows]
    out[1] = np.minimum(out[0] * block_size, most)
    out[2] = prompt_tokens - out[1]
    out[3] = queued
    out[4] = queued + out[2]
    out[5] = running
    out[6] = waiting
    out[7] = running + waiting + 1
    out[8] = context
    out[9] = [index.blocks(row) for row in rows.tolist()]
    out[10] = last_chosen
    out[11] = 0


def charge_tiers(
    tiers: "Sequence[tuple[Backend, float]]",
    keys: Keys,
    prompt_tokens: int,
    block_size: int,
    rows: NDArray[np.int64],
    out: NDArray[np.int64],
) -> None:
    """Count in filled ``out`` what ``tiers``, pairs of index and cost ratio, hold; ``rows`` ascend.

    The formulas are in ``mulsched.lower_tiers``.
    """
    matched, hit, queued = out[0], out[1], out[3]
    most = (prompt_tokens - 1) // block_size * block_size
    reached = np.zeros(int(rows[-1]) + 1, dtype=np.int64)
    reached[rows] = matched
    end, cost = hit, np.zeros(len(rows))
    for index, ratio in tiers:
        index.match_from(keys, reached)
        start, end = end, np.minimum(reached[rows] * block_size, most)
        cost += ratio * (end - start)
    out[11] = end - hit
    out[2] = prompt_tokens - end + np.ceil(cost).astype(np.int64)
    out[4] = queued + out[2]
