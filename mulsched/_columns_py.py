"""Filling the columns with numpy: the twin of the native ``fill_columns``."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mulsched.types import Keys

if TYPE_CHECKING:
    from mulsched.prefix_index import Backend

__all__ = ["fill_columns"]


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
