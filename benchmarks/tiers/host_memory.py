"""The part of a host's memory in which one engine keeps copies of KV blocks.

The rules are those of vLLM's CPU offloading with its default policy, LRU:

1. It takes every block that it does not hold. If there is no room, what was used the longest ago leaves.
2. What leaves is never among the blocks that are just stored; if more would have to leave, nothing is stored.
3. Each use of a path makes its blocks the most recent, its head the most recent of all.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from mulsched.types import Keys


@dataclass(frozen=True, slots=True)
class HostChange:
    """Keys that were copied to the host after ``parent`` (None: at a prompt's start), or that left it."""

    keys: Keys
    parent: int | None
    stored: bool


class HostMemory:
    """An LRU of ``n_blocks`` blocks by key, and what has changed in it."""

    def __init__(self, n_blocks: int) -> None:
        self.n_blocks = n_blocks
        self.blocks: OrderedDict[int, None] = OrderedDict()  # next to leave first
        self.changes: list[HostChange] = []

    def match(self, keys: Sequence[int]) -> int:
        """Return how many leading keys are held."""
        for position, key in enumerate(keys):
            if key not in self.blocks:
                return position
        return len(keys)

    def touch(self, path: Sequence[int]) -> None:
        """Make what is held of a path the most recent, its head last."""
        for key in reversed(path):
            if key in self.blocks:
                self.blocks.move_to_end(key)

    def store(self, path: Sequence[int], start: int) -> None:
        """Hold ``path[start:]`` too."""
        held = [key in self.blocks for key in path]
        missing = held[start:].count(False)
        if missing == 0 or len(path) - start > self.n_blocks:
            return
        self.touch(path[start:])  # so that none of them leaves
        self._evict(len(self.blocks) + missing - self.n_blocks)
        for there, run in groupby(range(start, len(path)), key=held.__getitem__):
            if there:
                continue
            positions = list(run)
            keys = [path[position] for position in positions]
            self.blocks.update(dict.fromkeys(keys))
            parent = path[positions[0] - 1] if positions[0] else None
            self.changes.append(HostChange(np.array(keys, dtype=np.uint64), parent, stored=True))
        self.touch(path)

    def _evict(self, n: int) -> None:
        if n > 0:
            keys = [self.blocks.popitem(last=False)[0] for _ in range(n)]
            self.changes.append(HostChange(np.array(keys, dtype=np.uint64), None, stored=False))
