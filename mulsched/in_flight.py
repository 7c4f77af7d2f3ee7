"""Prefixes on their way: of requests that were sent to an instance and have no first token yet.

Kept apart from what is cached, in a tree of their own with the index's rows: they come with a booking and
leave with its first token, whatever the cache does. A row holds a block while any booking there brings it.
"""

from collections.abc import Iterator

from mulsched._backend import BACKEND
from mulsched.load import Booking
from mulsched.prefix_index import UNBOUNDED, PrefixIndex

if BACKEND == "native":
    from mulsched._native import common_blocks
else:
    from mulsched._prefix_index_py import common_blocks

__all__ = ["PrefixesInFlight"]


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

        O(D * S), O(D + S) unless they share ever more of it.
        """
        keys = booking.keys
        if not len(keys):
            return
        coming, first = self._coming[booking.row], keys.item(0)
        others = coming[first]
        others.remove(booking)
        if not others:
            del coming[first]
        shared = common_blocks(keys, [other.keys for other in others])
        if shared < len(keys):
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
        position = waiting.index(booking)
        # the last token of a prompt is computed anyway, so it may be booked for less than these bring
        for earlier in waiting[:position]:
            there = max(there, common_blocks(booking.keys, [earlier.keys]) * block_size)
        for heir in waiting[position + 1 :]:
            shared = common_blocks(booking.keys, [heir.keys]) * block_size
            counted_on = min(shared, heir.prompt_tokens - heir.new_prefill_tokens)
            if counted_on > there:
                yield heir, counted_on - there
            there = max(there, shared)  # it brings all of it, the last block too, which it computes anyway
