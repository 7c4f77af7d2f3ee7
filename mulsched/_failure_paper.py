"""The two phases of the LMetric paper's detector, and choices where it leaves something open.

Phase 1 (arXiv 2603.15202, section 5.2): in a window, x is the share of arrivals in a class and M its
holders; alarm if x > |M| / N. Phase 2: after the alarm, if more than 2 |M| consecutive requests of the class
have a smaller score on a holder than on the rest, P_t BS_t <= P_o BS_o, M is filtered out for the class.

Open in the paper, and chosen here:

- A class is all requests with the same first ``CLASS_BLOCKS`` blocks; shorter prompts have none.
- Its holders are the candidates that have cached all of these blocks.
- Watched are the ``WATCHED`` classes with the most requests in the window that some instance held; one that
  equals the last of them is, too. A class that falls behind them is a suspect no longer.
- The score on a hotspot is the best of M's, that on the rest the best of the others: where a tie goes to M.
- Consecutive are requests of the class, whatever comes between; one that fails (4) starts the count anew.
- The filter is for the class, and ends when (2) holds again or no request of it is left in the window; the
  first is checked when a request of the class comes, the second when any does.
- Without ``now`` the window is the last ``WINDOW_REQUESTS`` requests.
"""

from collections import Counter, deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mulsched._failure_py import Found, prefix_hashes
from mulsched.indicators import Columns

__all__ = ["CLASS_BLOCKS", "WATCHED", "WINDOW_REQUESTS", "PaperDetector"]

CLASS_BLOCKS = 16  # 256 tokens: arbitrary, the length of a short system prompt
WATCHED = 8  # arbitrary
WINDOW_REQUESTS = 1000  # a minute at 17 requests/s: arbitrary


@dataclass(slots=True)
class _Suspect:
    """A class for which (2) fails: how many requests in a row satisfied (4), and whether M is filtered."""

    in_a_row: int = 0
    filtered: bool = False


class PaperDetector:
    """Counts arrivals by class in a sliding window of W requests.

    Memory: O(W). Time: amortised O(blocks of a class + instances + sqrt(W)) an arrival, since at most
    sqrt(2 W) counts of hits differ.
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._arrivals: deque[tuple[float | None, int | None, bool]] = deque()
        self._counts: Counter[int] = Counter()
        self._hits: Counter[int] = Counter()
        self._classes: Counter[int] = Counter()  # how many have so many hits, of those with any
        self._suspects: dict[int, _Suspect] = {}

    def examine(self, columns: Columns) -> Found | None:
        """Return blocks, hash, share and holders of the request's class if M is to be filtered out."""
        key, held = self._class(columns)
        if key is None:
            return None
        suspect = self._suspects.get(key)
        if suspect is None or not suspect.filtered or not self._violates(key, held):
            return None
        return self._found(key, held)

    def dispatch(self, columns: Columns) -> tuple[Found | None, list[int]]:
        """Count an arrival; return what is to be filtered from now on, and the classes that left alarm."""
        key, held = self._class(columns)
        ended = self._count(columns.now, key, bool(held.any()))
        if key is None:
            return None, ended
        if not self._is_watched(key) or not self._violates(key, held):
            return None, ended + self._drop(key)
        suspect = self._suspects.setdefault(key, _Suspect())
        score = columns.p_tokens.astype(np.float64) * columns.batch_size
        suspect.in_a_row = suspect.in_a_row + 1 if score[held].min() <= score[~held].min() else 0
        if suspect.in_a_row > 2 * int(held.sum()):
            suspect.filtered = True
        return (self._found(key, held) if suspect.filtered else None), ended

    def _class(self, columns: Columns) -> tuple[int | None, NDArray[np.bool_]]:
        keys = columns.request.keys
        held: NDArray[np.bool_] = columns.matched_blocks >= CLASS_BLOCKS
        if len(keys) < CLASS_BLOCKS:
            return None, held
        return prefix_hashes(keys, [CLASS_BLOCKS])[0], held

    def _count(self, now: float | None, key: int | None, hit: bool) -> list[int]:
        """Move the window on; return the classes in alarm that are no longer in it."""
        self._arrivals.append((now, key, hit))
        if key is not None:
            self._counts[key] += 1
            self._add_hits(key, int(hit))
        ended: list[int] = []
        while self._is_old(self._arrivals[0][0], now):
            _, old, old_hit = self._arrivals.popleft()
            if old is None:
                continue
            self._counts[old] -= 1
            self._add_hits(old, -int(old_hit))
            if not self._counts[old]:
                del self._counts[old], self._hits[old]
                ended += self._drop(old)
        return ended

    def _drop(self, key: int) -> list[int]:
        """Suspect a class no longer; return it if it was in alarm."""
        suspect = self._suspects.pop(key, None)
        return [key] if suspect is not None and suspect.filtered else []

    def _is_old(self, then: float | None, now: float | None) -> bool:
        if now is None or then is None:
            return len(self._arrivals) > WINDOW_REQUESTS
        return then <= now - self._window_s

    def _add_hits(self, key: int, change: int) -> None:
        hits = self._hits[key]
        self._hits[key] = hits + change
        for count, by in ((hits, -1), (hits + change, 1)):
            if count:
                self._classes[count] += by
                if not self._classes[count]:
                    del self._classes[count]

    def _is_watched(self, key: int) -> bool:
        hits = self._hits[key]
        return hits > 0 and sum(n for count, n in self._classes.items() if count > hits) < WATCHED

    def _violates(self, key: int, held: NDArray[np.bool_]) -> bool:
        holders, n = int(held.sum()), len(held)
        if holders in (0, n):
            return False
        return self._counts[key] * n > holders * len(self._arrivals)

    def _found(self, key: int, held: NDArray[np.bool_]) -> Found:
        return CLASS_BLOCKS, key, self._counts[key] / len(self._arrivals), int(held.sum())
