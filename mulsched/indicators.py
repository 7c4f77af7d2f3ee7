"""Indicators: one raw column per quantity, one row per candidate instance.

:class:`Columns` is what filters and scores see. Formulas (paper-notes: LMetric, arXiv 2603.15202,
sections 5 and 5.1), for a request of L prompt tokens on an instance:

    hit_tokens         = min(matched_blocks * block_size, floor((L - 1) / block_size) * block_size)
    new_prefill_tokens = L - hit_tokens                  (>= 1: engines recompute the last token)
    p_tokens           = queued_prefill_tokens + new_prefill_tokens
    batch_size         = running + waiting + 1           (this request included)

Where a router counts storage tiers below the GPU, new_prefill_tokens follows :mod:`mulsched.lower_tiers`.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mulsched._backend import BACKEND
from mulsched.errors import InvalidArgument
from mulsched.types import Request

if BACKEND == "native":
    from mulsched._native import charge_tiers, fill_columns
else:
    from mulsched._columns_py import charge_tiers, fill_columns

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["COLUMNS", "Columns", "charge_tiers", "fill_columns", "uniform_draws"]

COLUMNS = (
    "matched_blocks",
    "hit_tokens",
    "new_prefill_tokens",
    "queued_prefill_tokens",
    "p_tokens",
    "running",
    "waiting",
    "batch_size",
    "context_tokens",
    "cached_blocks",
    "last_chosen",
    "lower_tier_tokens",
)
"""Names of the columns, in the order of the rows of ``Columns.table``."""

_INDEX = {name: index for index, name in enumerate(COLUMNS)}
_GAMMA = 0x9E3779B97F4A7C15


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finalizer of SplitMix64 (Steele, Lea, Flood 2014), elementwise."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform_draws(seed: int, decision: int, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return one number in [0, 1) per row: a pure function of seed, decision number and row."""
    start = _mix(np.array([(seed + _GAMMA * (decision + 1)) % 2**64], dtype=np.uint64))
    bits = _mix(_mix(start + np.uint64(_GAMMA) * (rows.astype(np.uint64) + np.uint64(1))))
    draws: NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return draws


class Columns:
    """The rows a decision is made from: candidates only, int64 columns of shape ``(n,)``.

    Columns are read-only views; units are in their names. ``last_chosen`` is the number of the decision
    that chose the instance last, -1 if none has. ``context_tokens`` sums the prompt tokens of the requests
    on the instance; ``cached_blocks`` is the size of its known cache.

    Other attributes: ``request``, ``instances`` (names), ``rows`` (index rows, ``(n,)`` int64),
    ``decision`` (how many requests were dispatched before), ``block_size`` (tokens), ``now`` (seconds, or
    None if the caller gave no time), ``seed``.
    """

    __slots__ = ("block_size", "decision", "instances", "now", "request", "rows", "seed", "table")

    def __init__(
        self,
        request: Request,
        instances: "Sequence[str]",
        rows: NDArray[np.int64],
        table: NDArray[np.int64],
        decision: int,
        block_size: int,
        *,
        seed: int = 0,
        now: float | None = None,
    ) -> None:
        self.request = request
        self.instances = instances
        self.rows = rows
        self.table = table
        self.decision = decision
        self.block_size = block_size
        self.seed = seed
        self.now = now

    def __len__(self) -> int:
        """Return the number of candidates."""
        return len(self.rows)

    def __getitem__(self, name: str) -> NDArray[np.int64]:
        """Return a column by name. Raises InvalidArgument for a name that is not in ``COLUMNS``."""
        try:
            return self._column(_INDEX[name])
        except KeyError:
            raise InvalidArgument(
                f"unknown indicator {name!r}, expected one of {', '.join(COLUMNS)}"
            ) from None

    def _column(self, position: int) -> NDArray[np.int64]:
        column: NDArray[np.int64] = self.table[position]
        return column

    @property
    def matched_blocks(self) -> NDArray[np.int64]:
        """Leading blocks of the prompt that the instance holds."""
        return self._column(0)

    @property
    def hit_tokens(self) -> NDArray[np.int64]:
        """Prompt tokens that lie on the instance's GPU, and that it will not compute again."""
        return self._column(1)

    @property
    def new_prefill_tokens(self) -> NDArray[np.int64]:
        """Prompt tokens that the instance has to compute, and the price of those that it loads."""
        return self._column(2)

    @property
    def queued_prefill_tokens(self) -> NDArray[np.int64]:
        """New tokens of requests that were sent there and have no first token yet."""
        return self._column(3)

    @property
    def p_tokens(self) -> NDArray[np.int64]:
        """Queued and new prefill tokens together."""
        return self._column(4)

    @property
    def running(self) -> NDArray[np.int64]:
        """Requests past their first token."""
        return self._column(5)

    @property
    def waiting(self) -> NDArray[np.int64]:
        """Requests before their first token."""
        return self._column(6)

    @property
    def batch_size(self) -> NDArray[np.int64]:
        """Requests there, this one included."""
        return self._column(7)

    @property
    def context_tokens(self) -> NDArray[np.int64]:
        """Prompt tokens of the requests there, this one not included."""
        return self._column(8)

    @property
    def cached_blocks(self) -> NDArray[np.int64]:
        """Blocks the index knows to be cached there."""
        return self._column(9)

    @property
    def last_chosen(self) -> NDArray[np.int64]:
        """Number of the decision that chose this instance last; -1: none."""
        return self._column(10)

    @property
    def lower_tier_tokens(self) -> NDArray[np.int64]:
        """Prompt tokens that the instance loads from below its GPU, after the hit; 0 in tiers not counted."""
        return self._column(11)

    @property
    def uniform(self) -> NDArray[np.float64]:
        """One seeded draw in [0, 1) per candidate; the same for the same decision, however often asked."""
        return uniform_draws(self.seed, self.decision, self.rows)

    def take(self, mask: NDArray[np.bool_]) -> "Columns":
        """Return the candidates where ``mask`` (``(n,)`` bool) is true."""
        table = self.table[:, mask]
        table.setflags(write=False)
        return Columns(
            request=self.request,
            instances=[name for name, keep in zip(self.instances, mask.tolist(), strict=True) if keep],
            rows=self.rows[mask],
            table=table,
            decision=self.decision,
            block_size=self.block_size,
            seed=self.seed,
            now=self.now,
        )
