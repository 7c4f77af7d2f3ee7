"""Occupancy of prefix classes: the twin of ``csrc/failure.hpp``; what it computes is in ``mulsched.failure``.

Invariants:

1. A node is there exactly while a request in flight passes through it.
2. A node's load is the sum of the weights of those requests, and its squares the sum of their squares.
3. Only nodes that are there are in alarm.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mulsched.types import Keys

__all__ = ["Found", "OccupancyPy", "class_depths", "prefix_hashes"]

Found = tuple[int, int, float, int]
"""A class in alarm: depth in blocks, hash, load in flight, holders."""

_FACTOR = 0x9E3779B97F4A7C15  # odd, so that its powers never vanish modulo 2**64


def class_depths(n_blocks: int) -> list[int]:
    """Return the depths at which prefixes of a prompt are classes: 1, 2, 3, 4, 6, 8, 12, ..., in blocks."""
    depths = []
    power = 1
    while power <= n_blocks:
        depths.append(power)
        if power > 1 and power + power // 2 <= n_blocks:
            depths.append(power + power // 2)
        power *= 2
    return depths


def prefix_hashes(keys: Keys, depths: list[int]) -> list[int]:
    """Return a 64-bit hash of the first ``depth`` keys for each depth: a polynomial in the keys.

    The keys are hashes already, so a sum in which each position has its own odd factor keeps paths apart.
    """
    if not depths:
        return []
    powers = np.full(depths[-1], _FACTOR, dtype=np.uint64).cumprod(dtype=np.uint64)
    sums = (keys[: depths[-1]] * powers).cumsum(dtype=np.uint64)
    return [int(sums[depth - 1] ^ np.uint64(depth)) for depth in depths]


@dataclass(slots=True)
class _Node:
    requests: int = 0
    load: float = 0.0
    squares: float = 0.0
    alarm: bool = False


class OccupancyPy:
    """Load in flight by class, and the classes in alarm."""

    def __init__(self, confidence: float) -> None:
        self._confidence = confidence
        self._nodes: dict[int, _Node] = {}
        self._slots: list[tuple[list[int], float]] = []
        self._free: list[int] = []
        self._load = 0.0
        self._squares = 0.0

    @property
    def load(self) -> float:
        """The weight of all requests in flight."""
        return self._load

    def nodes(self) -> int:
        """Return how many classes have a request in flight."""
        return len(self._nodes)

    def examine(self, keys: Keys, table: NDArray[np.int64], loads: int) -> Found | None:
        """Return the class in alarm on this path, None without one. Changes nothing.

        ``table``: the columns of a decision; ``loads``: which of them is the load of an instance.
        """
        return self._examine(keys, table, loads)[0]

    def _examine(
        self, keys: Keys, table: NDArray[np.int64], loads: int
    ) -> tuple[Found | None, list[int], list[int]]:
        """Return the class with the widest excess, all hashes of the path and those in excess."""
        matched, load = table[0], table[loads]
        depths = class_depths(len(keys))
        hashes = prefix_hashes(keys, depths)
        n, everywhere = len(matched), float(load.sum())
        best: Found | None = None
        widest = 0.0
        in_excess: list[int] = []
        for depth, key in zip(depths, hashes, strict=True):
            node = self._nodes.get(key)
            held = matched >= depth
            holders = int(held.sum())
            if node is None or holders == 0:  # a class that nobody holds cannot herd, nor can a deeper one
                break
            excess = self._excess(node, holders, n, float(load[held].sum()), everywhere)
            if excess > 0:
                in_excess.append(key)
                if excess >= widest:
                    widest, best = excess, (depth, key, node.load, holders)
        return best, hashes, in_excess

    def _excess(self, node: _Node, holders: int, n: int, on_holders: float, everywhere: float) -> float:
        """Return by how much the holders carry more than their share, 0 if that may be chance."""
        if holders == n:
            return 0.0
        part = holders / n
        alone = node.load - part * self._load
        together = on_holders - part * everywhere
        if node.alarm:
            return max(alone, together, 0.0)
        spread = self._confidence * math.sqrt(node.squares)
        if node.load <= spread:
            return 0.0
        if alone > spread:
            return alone
        if everywhere > 0 and together > self._confidence * math.sqrt(
            self._squares * (on_holders / everywhere)
        ):
            return together
        return 0.0

    def dispatch(
        self, keys: Keys, table: NDArray[np.int64], loads: int, weight: float
    ) -> tuple[int, Found | None, list[int]]:
        """Count a request in; return its slot, what ``examine`` finds and the classes that left alarm.

        The class that is found is in alarm from now on. O(blocks + log(blocks) * instances).
        """
        found, hashes, in_excess = self._examine(keys, table, loads)
        released = []
        for key in hashes:
            node = self._nodes.get(key)
            if node is not None and node.alarm and key not in in_excess:
                node.alarm = False
                released.append(key)
        if found is not None:
            self._nodes[found[1]].alarm = True
        for key in hashes:
            node = self._nodes.setdefault(key, _Node())
            node.requests += 1
            node.load += weight
            node.squares += weight * weight
        self._load += weight
        self._squares += weight * weight
        if self._free:
            slot = self._free.pop()
            self._slots[slot] = hashes, weight
        else:
            slot = len(self._slots)
            self._slots.append((hashes, weight))
        return slot, found, released

    def end(self, slot: int) -> list[int]:
        """Count a request out; return the classes that left alarm, having nobody in flight. O(log blocks)."""
        hashes, weight = self._slots[slot]
        self._slots[slot] = [], 0.0
        self._free.append(slot)
        self._load -= weight
        self._squares -= weight * weight
        released = []
        for key in hashes:
            node = self._nodes[key]
            node.requests -= 1
            node.load -= weight
            node.squares -= weight * weight
            if node.requests == 0:
                del self._nodes[key]
                if node.alarm:
                    released.append(key)
        return released
