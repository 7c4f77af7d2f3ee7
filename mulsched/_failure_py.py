"""Occupancy of prefix classes: the twin of ``csrc/failure.hpp``; what it computes is in ``mulsched.failure``.

Invariants:

1. A node is there exactly while a request in flight passes through it, and its prefixes' nodes are then too.
2. A node's load is the sum of the weights of those requests, and its squares the sum of their squares.
3. Only nodes that are there are in alarm.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mulsched.block_keys import path_hashes
from mulsched.errors import DuplicateRequest
from mulsched.indicators import COLUMNS
from mulsched.types import Keys

__all__ = ["Ended", "Found", "OccupancyPy", "class_depths", "prefix_hashes"]

Found = tuple[int, int, float, int]
"""A class in alarm: depth in blocks, hash, load in flight, holders."""

_P_TOKENS, _BATCH_SIZE = COLUMNS.index("p_tokens"), COLUMNS.index("batch_size")


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
    """Return a 64-bit hash of the first ``depth`` keys for each depth."""
    if not depths:
        return []
    hashes = path_hashes(keys[: depths[-1]])
    return [int(hashes[depth - 1]) for depth in depths]


@dataclass(slots=True)
class _Node:
    requests: int = 0
    copies: int = 0  # on their way
    load: float = 0.0
    squares: float = 0.0
    alarm: bool = False
    part: float = 0.0  # of the instances, its holders when it was last seen in excess; of classes in alarm


Ended = Sequence[int]
"""Hashes of classes that left alarm."""


class OccupancyPy:
    """Load in flight by class, and the classes in alarm.

    ``table``: the columns of a decision; ``loads``: which of them is the load of an instance.
    """

    def __init__(self, confidence: float, horizon: float) -> None:
        self._confidence = confidence
        self._horizon = horizon
        self._nodes: dict[int, _Node] = {}
        self._requests: dict[Hashable, tuple[list[int], float]] = {}
        self._copied: dict[Hashable, list[int]] = {}  # the classes that a request makes a copy of
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
        """Return the class on this path of which a copy is wanted, None without one. Changes nothing."""
        return self._examine(keys, table, loads)[0]

    def _examine(
        self, keys: Keys, table: NDArray[np.int64], loads: int
    ) -> tuple[Found | None, list[int], dict[int, float]]:
        """Return the class with the widest excess, all that somebody holds, those in excess with |M| / N."""
        matched, load = table[0], table[loads]
        depths = class_depths(min(len(keys), int(matched.max())))
        hashes = prefix_hashes(keys, depths)
        n, everywhere = len(matched), float(load.sum())
        best: Found | None = None
        widest = 0.0
        in_excess: dict[int, float] = {}
        for depth, key in zip(depths, hashes, strict=True):
            node = self._nodes.get(key)
            if node is None:
                break
            held = matched >= depth
            holders = int(held.sum())
            excess = self._excess(node, holders, n, float(load[held].sum()), everywhere)
            if excess > 0:
                in_excess[key] = holders / n
                if excess >= widest and node.copies == 0 and self._copy_pays(node, held, table):
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
        if not self._is_evidence(node):
            return 0.0
        if alone > self._confidence * math.sqrt(node.squares):
            return alone
        if everywhere > 0 and together > self._confidence * math.sqrt(
            self._squares * (on_holders / everywhere)
        ):
            return together
        return 0.0

    def _is_evidence(self, node: _Node) -> bool:
        """Return whether the class has more in flight than chance makes of a few requests."""
        return node.load > self._confidence * math.sqrt(node.squares)

    def _copy_pays(self, node: _Node, held: NDArray[np.bool_], table: NDArray[np.int64]) -> bool:
        """Return whether a copy somewhere else is worth its prefill by LMetric's score.

        On one holder more, each has holders / (holders + 1) of the requests in flight, and all the others
        come there.
        """
        score = table[_P_TOKENS].astype(np.float64) * table[_BATCH_SIZE]
        stay, move = float(score[held].min()), float(score[~held].min())
        return self._horizon * node.requests * stay > (int(held.sum()) + 1) * move

    def dispatch(
        self,
        request_id: Hashable,
        keys: Keys,
        table: NDArray[np.int64],
        loads: int,
        weight: float,
        chosen: int,
    ) -> tuple[Found | None, Ended] | None:
        """Count a request in; return what ``examine`` finds and what left alarm, None for neither.

        ``chosen``: the position of the candidate that it goes to. The class that is found is in alarm from
        now on. O(blocks + log(blocks) * instances). Raises DuplicateRequest.
        """
        if request_id in self._requests:
            raise DuplicateRequest(f"request {request_id!r} is in flight already")
        found, hashes, in_excess = self._examine(keys, table, loads)
        ended = []
        for key in hashes:
            node = self._nodes.get(key)
            if node is None or not (node.alarm or (found is not None and key == found[1])):
                continue
            node.alarm = key in in_excess
            if node.alarm:
                node.part = in_excess[key]
            else:
                ended.append(key)
        if found is not None and table[0, chosen] < found[0]:  # of its prefixes, too
            self._copied[request_id] = hashes[: hashes.index(found[1]) + 1]
            for key in self._copied[request_id]:
                self._nodes[key].copies += 1
        for key in hashes:
            node = self._nodes.setdefault(key, _Node())
            node.requests += 1
            node.load += weight
            node.squares += weight * weight
        self._load += weight
        self._squares += weight * weight
        self._requests[request_id] = hashes, weight
        return (found, ended) if found is not None or ended else None

    def first_token(self, request_id: Hashable) -> None:
        """Count a copy of a prefix as made, if the request was sent for one."""
        for key in self._copied.pop(request_id, ()):
            self._nodes[key].copies -= 1

    def end(self, request_id: Hashable) -> Ended:
        """Count a request out; return the classes that left alarm. O(log blocks).

        Those are the ones that nobody in flight has, and those that are within the part of their last
        holders and too few to be evidence; what is on the holders in all is not known here. A request that
        was never counted in is ignored.
        """
        if request_id not in self._requests:
            return []
        self.first_token(request_id)
        hashes, weight = self._requests.pop(request_id)
        self._load -= weight
        self._squares -= weight * weight
        ended = []
        for key in hashes:
            node = self._nodes[key]
            node.requests -= 1
            node.load -= weight
            node.squares -= weight * weight
            gone = node.requests == 0
            within = node.load <= node.part * self._load and not self._is_evidence(node)
            if node.alarm and (gone or within):
                node.alarm = False
                ended.append(key)
            if gone:
                del self._nodes[key]
        return ended
