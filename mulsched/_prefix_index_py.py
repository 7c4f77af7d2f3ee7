"""The prefix index in Python: the readable twin of csrc/prefix_tree.hpp and csrc/prefix_index.hpp.

It builds the same nodes for the same content. Invariants, checked by ``check()`` under these numbers:

1. Every node but the root has a non-empty edge, its first key is its key in the parent's child map, and it
   starts where its parent ends.
2. Every block of an edge has exactly the node's holders. A node is split wherever holdings differ.
3. A node without holders has children (it is kept only while some descendant is held).
4. No node could be merged with its parent: see ``_mergeable``.
5. Each row lists exactly the nodes that it holds; its block count is the sum of their edges and does not
   exceed its capacity.
6. In a bounded row's list a node stands before every ancestor, so the tail leaves before its prefix.
7. A block leads back to its node and depth.
8. A named row holds exactly the blocks that its names name; copies beyond the first are counted of bound
   names only, at least one each.
9. ``unique_blocks`` is the number of blocks with a holder.
"""

import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from mulsched.types import AFTER_PARENT, REMOVED, Keys

__all__ = ["PrefixIndexPy", "common_blocks"]

UNKNOWN_PARENT = -1

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class _Block:
    """A block that some named row knows: where it is, however its edge is cut."""

    __slots__ = ("depth", "node")

    def __init__(self, node: "_Node", depth: int) -> None:
        self.node = node
        self.depth = depth

    @property
    def offset(self) -> int:
        return self.depth - self.node.start


class _Node:
    __slots__ = ("blocks", "children", "holders", "keys", "parent", "start")

    def __init__(self, parent: "_Node | None", start: int, keys: list[int]) -> None:
        self.parent = parent
        self.start = start
        self.keys = keys
        self.blocks: list[_Block] = []  # empty until a named row holds a block of the node
        self.children: dict[int, _Node] = {}
        self.holders: dict[int, list[_Node | None]] = {}  # row -> [previous, next] in the row's list

    @property
    def end(self) -> int:
        return self.start + len(self.keys)


class _Row:
    __slots__ = ("blocks", "capacity", "extra_copies", "extra_names", "head", "named", "names", "tail")

    def __init__(self, capacity: int, named: bool) -> None:
        self.capacity = capacity
        self.named = named
        self.blocks = 0
        self.head: _Node | None = None  # leaves next
        self.tail: _Node | None = None
        self.names: dict[int, _Block] = {}
        self.extra_names: dict[_Block, int] = {}  # names beyond the first
        self.extra_copies: dict[int, int] = {}  # name -> copies beyond the first

    @property
    def bounded(self) -> bool:
        return self.capacity >= 0


class _Tree:
    """Nodes, holders and the canonical form; see csrc/prefix_tree.hpp."""

    def __init__(self) -> None:
        self.root = _Node(None, 0, [])
        self.rows: dict[int, _Row] = {}
        self.n_nodes = 0
        self.unique_blocks = 0
        self._touched: list[_Node] = []

    def give_blocks(self, node: _Node) -> None:
        if not node.blocks:
            node.blocks = [_Block(node, node.start + i) for i in range(len(node.keys))]

    def add_leaf(self, parent: _Node, keys: list[int]) -> _Node:
        leaf = _Node(parent, parent.end, keys)
        parent.children[keys[0]] = leaf
        self.n_nodes += 1
        self._touched.append(leaf)
        return leaf

    def split(self, upper: _Node, at: int) -> _Node:
        """Cut the edge after ``at`` blocks; return the lower part, right before the upper in every list."""
        lower = _Node(upper, upper.start + at, upper.keys[at:])
        del upper.keys[at:]
        lower.blocks = upper.blocks[at:]
        del upper.blocks[at:]
        for block in lower.blocks:
            block.node = lower
        lower.children = upper.children
        for child in lower.children.values():
            child.parent = lower
        upper.children = {lower.keys[0]: lower}
        for row, links in upper.holders.items():
            previous = links[0]
            lower.holders[row] = [previous, upper]
            if previous is None:
                self.rows[row].head = lower
            else:
                previous.holders[row][1] = lower
            links[0] = lower
        self.n_nodes += 1
        self._touched.append(lower)
        return lower

    def add_holder(self, node: _Node, row: int) -> None:
        if not node.holders:
            self.unique_blocks += len(node.keys)
        node.holders[row] = [None, None]
        self._link_last(node, row)
        self.rows[row].blocks += len(node.keys)
        self._touched.append(node)

    def drop_holder(self, node: _Node, row: int) -> None:
        self._unlink(node, row)
        del node.holders[row]
        if not node.holders:
            self.unique_blocks -= len(node.keys)
        self.rows[row].blocks -= len(node.keys)
        self._touched.append(node)

    def move_to_newest(self, node: _Node, row: int) -> None:
        if node.holders[row][1] is None:
            return
        self._unlink(node, row)
        self._link_last(node, row)
        self._touched.append(node)

    def settle(self) -> None:
        """Bring the touched part of the tree back into canonical form (invariants 3 and 4)."""
        # from the root down: a long chain of single blocks then grows at its end, in linear time
        self._touched.sort(key=lambda node: node.start)
        for node in self._touched:  # grows meanwhile
            parent = node.parent
            if parent is None:  # the root, or a node that is gone
                continue
            if not node.holders and not node.children:
                del parent.children[node.keys[0]]
                self._forget(node)
                self._touched.append(parent)
            elif self._mergeable(parent, node):
                self._merge(parent, node)
            elif len(node.children) == 1:
                (only,) = node.children.values()
                if self._mergeable(node, only):
                    self._merge(node, only)
        self._touched.clear()

    def _mergeable(self, parent: _Node, child: _Node) -> bool:
        """Whether a node's only child can be joined to it.

        It can with the same holders and, for each bounded one, nothing between the two in its order of
        eviction: so the nodes are a function of the content.
        """
        if parent is self.root or len(parent.children) != 1 or parent.holders.keys() != child.holders.keys():
            return False
        return all(links[1] is parent or not self.rows[row].bounded for row, links in child.holders.items())

    def _merge(self, upper: _Node, lower: _Node) -> None:
        if upper.blocks or lower.blocks:
            self.give_blocks(upper)
            self.give_blocks(lower)
            for block in lower.blocks:
                block.node = upper
            upper.blocks += lower.blocks
        upper.keys += lower.keys
        for row in lower.holders:
            self._unlink(lower, row)
        upper.children = lower.children
        for child in upper.children.values():
            child.parent = upper
        self._forget(lower)
        self._touched.append(upper)

    def _forget(self, node: _Node) -> None:
        node.parent = None
        self.n_nodes -= 1

    def _link_last(self, node: _Node, row: int) -> None:
        state = self.rows[row]
        node.holders[row][:] = state.tail, None
        if state.tail is None:
            state.head = node
        else:
            state.tail.holders[row][1] = node
        state.tail = node

    def _unlink(self, node: _Node, row: int) -> None:
        state = self.rows[row]
        previous, following = node.holders[row]
        if previous is None:
            state.head = following
        else:
            previous.holders[row][1] = following
            self._touched.append(previous)  # it may have become the neighbour of its parent
        if following is None:
            state.tail = previous
        else:
            following.holders[row][0] = previous

    def held(self, row: int) -> Iterator[_Node]:
        """Yield the nodes a row holds, in the order of its list."""
        node = self.rows[row].head
        while node is not None:
            yield node
            node = node.holders[row][1]

    def walk(self) -> Iterator[_Node]:
        """Yield every node but the root, depth first, children in the order of their first keys."""
        stack = [self.root]
        while stack:
            node = stack.pop()
            if node is not self.root:
                yield node
            stack += [node.children[key] for key in sorted(node.children, reverse=True)]

    def check(self) -> None:
        count = unique = 0
        blocks: set[_Block] = set()
        held_nodes = dict.fromkeys(self.rows, 0)
        held_blocks = dict.fromkeys(self.rows, 0)
        for node in self.walk():
            parent = node.parent
            where = f"the node at depth {node.start} with keys {node.keys}"
            assert parent is not None, f"invariant 1: {where}"
            assert node.keys, f"invariant 1: {where}"
            assert parent.children.get(node.keys[0]) is node, f"invariant 1: {where}"
            assert node.start == parent.end, f"invariant 1: {where}"
            assert node.holders.keys() <= self.rows.keys(), f"invariant 2: {where}"
            assert node.holders or node.children, f"invariant 3: {where}"
            assert not self._mergeable(parent, node), f"invariant 4: {where}"
            if node.blocks:
                assert len(node.blocks) == len(node.keys), f"invariant 7: {where}"
                for offset, block in enumerate(node.blocks):
                    assert block.node is node, f"invariant 7: {where}"
                    assert block.offset == offset, f"invariant 7: {where}"
            blocks.update(node.blocks)
            for row in node.holders:
                held_nodes[row] += 1
                held_blocks[row] += len(node.keys)
            count += 1
            unique += len(node.keys) if node.holders else 0
        assert count == self.n_nodes, "invariant 1: nodes out of reach"
        assert unique == self.unique_blocks, "invariant 9: count of unique blocks"
        for row in self.rows:
            self._check_row(row, held_nodes[row], held_blocks[row], blocks)

    def _check_row(self, row: int, held_nodes: int, held_blocks: int, blocks: set[_Block]) -> None:
        state = self.rows[row]
        seen: set[_Node] = set()
        previous = None
        for node in self.held(row):
            assert node.holders[row][0] is previous, f"invariant 5: row {row}"
            assert node not in seen, f"invariant 5: row {row}"
            if state.bounded:
                up = node.parent
                while up is not None:
                    assert up not in seen, f"invariant 6: row {row}"
                    up = up.parent
            seen.add(node)
            previous = node
        assert state.tail is previous, f"invariant 5: row {row}"
        assert len(seen) == held_nodes, f"invariant 5: row {row}"
        assert state.blocks == held_blocks, f"invariant 5: row {row}"
        assert not state.bounded or state.blocks <= state.capacity, f"invariant 5: row {row}"
        names = Counter(state.names.values())
        assert names.keys() <= blocks, f"invariant 7: row {row}"
        assert all(row in block.node.holders for block in names), f"invariant 8: row {row}"
        assert not state.named or len(names) == state.blocks, f"invariant 8: row {row}"
        assert {block: n - 1 for block, n in names.items() if n > 1} == state.extra_names, (
            f"invariant 8: row {row}"
        )
        assert state.extra_copies.keys() <= state.names.keys(), f"invariant 8: row {row}"
        assert all(more > 0 for more in state.extra_copies.values()), f"invariant 8: row {row}"


def _exclusive(
    operation: Callable[Concatenate["PrefixIndexPy", P], R],
) -> Callable[Concatenate["PrefixIndexPy", P], R]:
    """Keep other threads out meanwhile: between two bytecodes the GIL lets them in, tree half changed."""

    @functools.wraps(operation)
    def alone(self: "PrefixIndexPy", /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._lock:
            return operation(self, *args, **kwargs)

    return alone


class PrefixIndexPy:
    """The index; the interface and its meaning are ``mulsched.prefix_index.Backend``.

    Thread-safe like its twin, but readers exclude each other too.
    """

    def __init__(self) -> None:
        self._tree = _Tree()
        self._lock = threading.RLock()  # remove_row clears

    @_exclusive
    def add_row(self, row: int, capacity: int, named: bool) -> None:
        """Start an empty row."""
        self._tree.rows[row] = _Row(capacity, named)

    @_exclusive
    def remove_row(self, row: int) -> None:
        """Forget the row and everything it holds."""
        self.clear(row)
        del self._tree.rows[row]

    @_exclusive
    def resize(self, row: int, capacity: int) -> None:
        """Change the capacity of a bounded row and evict down to it."""
        self._tree.rows[row].capacity = capacity
        self._evict(row)
        self._tree.settle()

    @_exclusive
    def store(self, row: int, keys: Keys) -> int:
        """Hold the whole path on an unnamed row; return the blocks not held before."""
        newly, segments = self._hold(row, self._tree.root, 0, keys.tolist())
        if self._tree.rows[row].bounded:
            # deepest first, so that the tail of the path leaves before its head
            for node, _, _, _ in reversed(segments):
                self._tree.move_to_newest(node, row)
            self._evict(row)
        self._tree.settle()
        return newly

    @_exclusive
    def store_named(
        self, row: int, parent: int | None, hashes: Keys, keys: Keys, counts_copies: bool = True
    ) -> int:
        """Append blocks after the one that parent names; return blocks newly held, -1: unknown parent."""
        node, offset = self._tree.root, 0
        if parent is not None:
            block = self._tree.rows[row].names.get(parent)
            if block is None:
                return UNKNOWN_PARENT
            node, offset = block.node, block.offset + 1
        newly = self._append_named(row, node, offset, hashes, keys, counts_copies)
        self._tree.settle()
        return newly

    @_exclusive
    def store_named_after(
        self, row: int, path: Keys, hashes: Keys, keys: Keys, counts_copies: bool = True
    ) -> int:
        """Append blocks after a path of which the row need not hold anything; return blocks newly held."""
        node, offset = self._tree.root, 0
        borrowed: list[_Block] = []  # held until the blocks below them keep their place in the tree
        for holder, first, count, held_before in self._hold(row, node, offset, path.tolist())[1]:
            self._tree.give_blocks(holder)
            if not held_before:
                borrowed += holder.blocks[first : first + count]
            node, offset = holder, first + count
        newly = self._append_named(row, node, offset, hashes, keys, counts_copies)
        self._drop_blocks(row, borrowed)
        self._tree.settle()
        return newly

    @_exclusive
    def path(self, row: int, name: int) -> Keys | None:
        """Return the keys up to the block that the row knows by this name; None if it knows none."""
        block = self._tree.rows[row].names.get(name)
        if block is None:
            return None
        keys: list[int] = []
        up: _Node | None = block.node
        while up is not None:
            keys = up.keys + keys
            up = up.parent
        return np.array(keys[: block.depth + 1], dtype=np.uint64)

    @_exclusive
    def remove_named(self, row: int, hashes: Keys) -> int:
        """Take a copy of each name, and with its last copy the name; return how many were known."""
        state = self._tree.rows[row]
        known, dropped = 0, []
        for name in hashes.tolist():
            if _take_one(state.extra_copies, name):
                known += 1
            elif (block := state.names.pop(name, None)) is not None:
                known += 1
                if self._drop_name(state, block):
                    dropped.append(block)
        self._drop_blocks(row, dropped)
        self._tree.settle()
        return known

    @_exclusive
    def apply_run(
        self, row: int, table: NDArray[np.uint64], hashes: Keys, keys: Keys, counts_copies: bool = True
    ) -> tuple[int, int, int, int]:
        """Store and remove in turn; return blocks stored, stores refused, blocks removed and known."""
        _check_run(table, len(hashes), len(keys))
        stored = refused = removed = known = n_hashes = n_keys = 0
        for kind, n_blocks, parent in table.tolist():
            named = hashes[n_hashes : n_hashes + n_blocks]
            n_hashes += n_blocks
            if kind == REMOVED:
                removed += n_blocks
                known += self.remove_named(row, named)
                continue
            path = keys[n_keys : n_keys + n_blocks]
            n_keys += n_blocks
            after = parent if kind == AFTER_PARENT else None
            if self.store_named(row, after, named, path, counts_copies) == UNKNOWN_PARENT:
                refused += 1
            else:
                stored += n_blocks
        return stored, refused, removed, known

    @_exclusive
    def discard(self, row: int, keys: Keys, start: int) -> int:
        """Stop holding blocks start and later of the path on an unnamed row; return how many were held."""
        tree = self._tree
        before = tree.rows[row].blocks
        node, at, path = tree.root, 0, keys.tolist()
        while at < len(path) and path[at] in node.children:
            node = node.children[path[at]]
            length = len(node.keys)
            matched = _common_prefix(node.keys, 0, path, at)
            if at + matched > start and row in node.holders:
                if matched < length:
                    tree.split(node, matched)
                if at < start:
                    node = tree.split(node, start - at)
                tree.drop_holder(node, row)
            if matched < length:
                break
            at += matched
        tree.settle()
        return before - tree.rows[row].blocks

    @_exclusive
    def clear(self, row: int) -> None:
        """Hold nothing on this row."""
        state = self._tree.rows[row]
        while state.head is not None:
            self._tree.drop_holder(state.head, row)
        state.names.clear()
        state.extra_names.clear()
        state.extra_copies.clear()
        self._tree.settle()

    @_exclusive
    def match(self, keys: Keys, out: NDArray[np.int64]) -> None:
        """Write per row how many leading blocks of keys it holds."""
        out[:] = 0
        node, at, path = self._tree.root, 0, keys.tolist()
        rows: set[int] | None = None  # that hold everything so far
        while at < len(path) and path[at] in node.children:
            node = node.children[path[at]]
            held = node.holders.keys()
            # a row that was added after out was made has no place in it
            rows = {row for row in held if row < len(out)} if rows is None else rows & held
            matched = _common_prefix(node.keys, 0, path, at)
            at += matched
            out[list(rows)] = at
            if not rows or matched < len(node.keys):
                break

    @_exclusive
    def match_from(self, keys: Keys, out: NDArray[np.int64]) -> None:
        """Move each row's entry on over the blocks of keys that it holds from there."""
        node, at, path = self._tree.root, 0, keys.tolist()
        furthest = int(out.max(initial=0))
        while at < len(path) and path[at] in node.children:
            node = node.children[path[at]]
            matched = _common_prefix(node.keys, 0, path, at)
            moved = [row for row in node.holders if row < len(out) and at <= out[row] < at + matched]
            at += matched
            out[moved] = at
            if matched < len(node.keys) or not (moved or furthest >= at):
                break

    @_exclusive
    def blocks(self, row: int) -> int:
        """Return how many blocks the row holds."""
        return self._tree.rows[row].blocks

    @_exclusive
    def unique_blocks(self) -> int:
        """Return how many blocks are held by at least one row."""
        return self._tree.unique_blocks

    @_exclusive
    def nodes(self) -> int:
        """Return how many nodes the tree has, the root not counted."""
        return self._tree.n_nodes

    @_exclusive
    def memory(self) -> dict[str, int]:
        """Return bytes by part, as far as sys.getsizeof sees them."""
        size = sys.getsizeof
        parts = dict.fromkeys(("nodes", "edges", "holders", "blocks", "names"), 0)
        for node in self._tree.walk():
            parts["nodes"] += size(node)
            parts["edges"] += size(node.keys) + sum(map(size, node.keys)) + size(node.children)
            parts["holders"] += size(node.holders) + sum(map(size, node.holders.values()))
            parts["blocks"] += size(node.blocks) + sum(map(size, node.blocks))
        for row in self._tree.rows.values():
            parts["names"] += size(row.names) + sum(map(size, row.names)) + size(row.extra_names)
            parts["names"] += size(row.extra_copies) + sum(map(size, row.extra_copies))
        return parts | {"total": sum(parts.values())}

    @_exclusive
    def check(self) -> None:
        """Raise AssertionError with the number of an invariant that does not hold."""
        self._tree.check()

    @_exclusive
    def edges(self) -> list[tuple[int, list[int], list[int]]]:
        """Return every node in depth-first order: (start depth, keys, holder rows)."""
        return [(node.start, list(node.keys), sorted(node.holders)) for node in self._tree.walk()]

    @_exclusive
    def lru(self, row: int) -> list[list[int]]:
        """Return the key paths of the row's nodes, next to be evicted first."""
        paths = []
        for node in self._tree.held(row):
            path: list[int] = []
            up: _Node | None = node
            while up is not None:
                path = up.keys + path
                up = up.parent
            paths.append(path)
        return paths if self._tree.rows[row].bounded else sorted(paths)

    def _hold(
        self, row: int, node: _Node, offset: int, keys: list[int]
    ) -> tuple[int, list[tuple[_Node, int, int, bool]]]:
        """Make the row hold the path that goes on after ``offset`` blocks of ``node``.

        Returns the number of blocks new to the row, and the path as (node, from, count, held before).
        Splits where holdings, or for a bounded row recency, come to differ.
        """
        tree, bounded = self._tree, self._tree.rows[row].bounded
        newly, at, segments = 0, 0, []
        while at < len(keys):
            if offset == len(node.keys):
                child = node.children.get(keys[at])
                if child is None:
                    leaf = tree.add_leaf(node, keys[at:])
                    tree.add_holder(leaf, row)
                    segments.append((leaf, 0, len(leaf.keys), False))
                    return newly + len(leaf.keys), segments
                node, offset = child, 0
            length = len(node.keys)
            matched = _common_prefix(node.keys, offset, keys, at)
            if matched == 0:  # only inside an edge: the path leaves it right here
                tree.split(node, offset)
                continue
            held = row in node.holders
            leaves_edge = offset + matched < length and at + matched < len(keys)
            if offset + matched < length and (not held or bounded or leaves_edge):
                tree.split(node, offset + matched)
            if not held:
                if offset > 0:
                    node, offset = tree.split(node, offset), 0
                tree.add_holder(node, row)
                newly += matched
            segments.append((node, offset, matched, held))
            at += matched
            offset += matched
        return newly, segments

    def _append_named(
        self, row: int, node: _Node, offset: int, hashes: Keys, keys: Keys, counts_copies: bool
    ) -> int:
        """Store named blocks after ``offset`` blocks of ``node``; return blocks newly held."""
        state = self._tree.rows[row]
        newly, segments = self._hold(row, node, offset, keys.tolist())
        blocks: list[tuple[_Block, bool]] = []
        for holder, first, count, held_before in segments:
            self._tree.give_blocks(holder)
            blocks += [(block, held_before) for block in holder.blocks[first : first + count]]
        nameless: dict[_Block, None] = {}  # held, and let go together at the end
        for name, (block, held_before) in zip(hashes.tolist(), blocks, strict=True):
            old = state.names.get(name)
            if old is block:
                if counts_copies:
                    _add_one(state.extra_copies, name)
                continue
            # the name may move here from another block, even one of this path
            state.names[name] = block
            if block in nameless:
                del nameless[block]
            elif held_before:
                _add_one(state.extra_names, block)
            if old is not None:
                state.extra_copies.pop(name, None)
                if self._drop_name(state, old):
                    nameless[old] = None
        self._drop_blocks(row, list(nameless))
        return newly

    def _evict(self, row: int) -> None:
        state = self._tree.rows[row]
        while state.blocks > state.capacity:
            oldest = state.head
            assert oldest is not None
            excess = state.blocks - state.capacity
            if excess < len(oldest.keys):
                oldest = self._tree.split(oldest, len(oldest.keys) - excess)
            self._tree.drop_holder(oldest, row)

    @staticmethod
    def _drop_name(state: _Row, block: _Block) -> bool:
        """Forget that a block is named once more than another; True if that was its last name."""
        return not _take_one(state.extra_names, block)

    def _drop_blocks(self, row: int, blocks: list[_Block]) -> None:
        """Make the row stop holding these blocks, the deepest first: what a cut moves is then short."""
        for block in sorted(blocks, key=lambda block: block.depth, reverse=True):
            node, offset = block.node, block.offset
            if offset + 1 < len(node.keys):
                self._tree.split(node, offset + 1)
            if offset > 0:
                node = self._tree.split(node, offset)
            self._tree.drop_holder(node, row)


def _check_run(table: NDArray[np.uint64], n_hashes: int, n_keys: int) -> None:
    """Raise ValueError unless the table speaks of as many blocks."""
    if table.shape[1] != 3:
        raise ValueError(f"a table of 3 columns expected, got {table.shape[1]}")
    events = table.tolist()
    for kind, _, _ in events:
        if kind > REMOVED:
            raise ValueError(f"a kind of event in 0..2 expected, got {kind}")
    stored = sum(n_blocks for kind, n_blocks, _ in events if kind != REMOVED)
    if sum(n_blocks for _, n_blocks, _ in events) != n_hashes or stored != n_keys:
        raise ValueError(
            "as many hashes as the events have blocks and as many keys as they store expected, "
            f"got {n_hashes} and {n_keys}"
        )


def _add_one(counts: dict[T, int], key: T) -> None:
    counts[key] = counts.get(key, 0) + 1


def _take_one(counts: dict[T, int], key: T) -> bool:
    """Count one down, and out at 0; False if it was not counted."""
    count = counts.get(key, 0)
    if count > 1:
        counts[key] = count - 1
    else:
        counts.pop(key, None)
    return count > 0


def common_blocks(keys: Keys, others: Iterable[Keys]) -> int:
    """Return how many leading blocks of ``keys`` the one of ``others`` has that has most of them."""
    shared = 0
    for other in others:
        n = min(len(keys), len(other))
        if n > shared and keys[shared] == other[shared]:
            # keys are not chained: one may be equal further on, after a difference
            differs = np.flatnonzero(keys[:n] != other[:n])
            shared = max(shared, int(differs[0]) if len(differs) else n)
    return shared


def _common_prefix(edge: list[int], offset: int, path: list[int], at: int) -> int:
    """Return how many keys of ``edge[offset:]`` and ``path[at:]`` agree."""
    n = min(len(edge) - offset, len(path) - at)
    if edge[offset : offset + n] == path[at : at + n]:
        return n
    return next(i for i in range(n) if edge[offset + i] != path[at + i])
