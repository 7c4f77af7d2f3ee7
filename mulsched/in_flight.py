"""Prefixes on their way: of requests that were sent to an instance and have no first token yet.

Kept apart from what is cached, in a tree of their own with the index's rows: they come with a booking and
leave with its first token, whatever the cache does. A row holds a block while any booking there brings it.
"""

from collections.abc import Iterator

import numpy as np

from mulsched.load import Booking
from mulsched.prefix_index import UNBOUNDED, PrefixIndex
from mulsched.types import Keys

__all__ = ["PrefixesInFlight"]


def _common_blocks(a: Keys, b: Keys) -> int:
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


class PrefixesInFlight:
    """Which rows some request in flight brings which prefixes to; rows are the caller's.

    D: blocks of the booking's prompt, S: requests in flight to its row with the same first block.
    """

    __slots__ = ("_coming", "tree")

    def __init__(self) -> None:
        self.tree = PrefixIndex().backend
        # by row, by first block, in the order of dispatch
        self._coming: dict[int, dict[int, list[Booking]]] = {}

    def add_row(self, row: int) -> None:
        """Start an empty row."""
        self.tree.add_row(row, UNBOUNDED, False)
        self._coming[row] = {}

    def remove_row(self, row: int) -> None:
        """Forget a row and what is in flight to it."""
        self.tree.remove_row(row)
        del self._coming[row]

    def dispatch(self, booking: Booking) -> None:
        """Send a prompt's prefix to the booking's row. O(D) amortised."""
        if len(booking.keys):
            self.tree.store(booking.row, booking.keys)
            self._coming[booking.row].setdefault(booking.keys.item(0), []).append(booking)

    def arrive(self, booking: Booking) -> None:
        """Take a prefix out of flight, except what others in flight share with it.

        O(D + S), unless they share ever more of it.
        """
        keys = booking.keys
        if not len(keys):
            return
        coming, first = self._coming[booking.row], keys.item(0)
        others = [other for other in coming[first] if other is not booking]
        if others:
            coming[first] = others
        else:
            del coming[first]
        shared = 0
        for other in others:
            if shared == len(keys):
                return
            if len(other.keys) > shared and other.keys[shared] == keys[shared]:
                # keys are not chained: one may be equal further on, after a difference
                shared = max(shared, _common_blocks(other.keys, keys))
        self.tree.discard(booking.row, keys, shared)

    def heirs(self, booking: Booking, cached_blocks: int, block_size: int) -> Iterator[tuple[Booking, int]]:
        """Yield who has to compute what, in tokens, if a booking in flight does not: who counted on it.

        ``cached_blocks``: leading blocks of its prompt that are cached there by now. The earliest heir
        brings to the later ones what it shares with them. O(D * S).
        """
        if not len(booking.keys):
            return
        there = max(cached_blocks * block_size, booking.prompt_tokens - booking.new_prefill_tokens)
        waiting = self._coming[booking.row][booking.keys.item(0)]
        position = next(i for i, other in enumerate(waiting) if other is booking)
        # the last token of a prompt is computed anyway, so it may be booked for less than these bring
        for earlier in waiting[:position]:
            there = max(there, _common_blocks(earlier.keys, booking.keys) * block_size)
        for heir in waiting[position + 1 :]:
            shared = _common_blocks(heir.keys, booking.keys) * block_size
            counted_on = min(shared, heir.prompt_tokens - heir.new_prefill_tokens)
            if counted_on > there:
                yield heir, counted_on - there
            there = max(there, shared)  # it brings all of it, the last block too, which it computes anyway
