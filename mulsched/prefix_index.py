"""The prefix index: which instance holds which prefix, answered for all instances in one walk.

A path-compressed radix tree over block keys. This module is the facade: it checks arguments, maps
instance names to rows, converts hashes to 64 bits, and words the errors. The trees are the twins
:mod:`mulsched._native` (C++) and :mod:`mulsched._prefix_index_py` (readable); both implement the
row-based interface that :class:`Backend` states, and both produce the same nodes for the same content.

Complexity: D is the number of blocks in the argument, W the number of instances that hold some of the
path, N the number of tree nodes.
"""

import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mulsched._backend import BACKEND
from mulsched.block_keys import engine_hash
from mulsched.errors import (
    DuplicateInstance,
    InvalidArgument,
    InvalidType,
    UnknownBlock,
    UnknownInstance,
)
from mulsched.types import EngineHash, Keys, RunApplied

if TYPE_CHECKING:
    from mulsched._native import KvMessage

__all__ = ["Backend", "PrefixIndex", "as_hashes", "as_keys"]

UNBOUNDED = -1
UNKNOWN_PARENT = -1


class Backend(Protocol):
    """What a tree offers the facade. Rows are small integers given by the facade; arguments are valid.

    A row is *bounded* (``capacity >= 0``: an LRU over blocks), *unbounded*, or *named* (its blocks are
    also known by engine hashes, and it holds exactly the blocks that its live hashes name).
    """

    def add_row(self, row: int, capacity: int, named: bool) -> None:
        """Start an empty row. ``capacity`` is in blocks, or -1 for none."""

    def remove_row(self, row: int) -> None:
        """Forget the row and everything it holds."""

    def resize(self, row: int, capacity: int) -> None:
        """Change the capacity of a bounded row and evict down to it."""

    def store(self, row: int, keys: Keys) -> int:
        """Hold the whole path on an unnamed row, newest in LRU order; blocks that were not held before."""

    def store_named(
        self, row: int, parent: int | None, hashes: Keys, keys: Keys, counts_copies: bool = True
    ) -> int:
        """Append blocks after the block that ``parent`` names; blocks newly held, or -1: unknown parent.

        A hash that names the very block already names one copy more, unless ``counts_copies`` is false; one
        that names another block moves.
        """

    def store_named_after(
        self, row: int, path: Keys, hashes: Keys, keys: Keys, counts_copies: bool = True
    ) -> int:
        """Append blocks after a path of which the row need not hold anything; blocks newly held."""

    def path(self, row: int, name: int) -> Keys | None:
        """Return the keys up to the block that a named row knows by ``name``; None if it knows none."""

    def remove_named(self, row: int, hashes: Keys) -> int:
        """Take a copy of each name, and with its last copy the name; how many were known."""

    def apply_run(
        self, row: int, table: NDArray[np.uint64], hashes: Keys, keys: Keys, counts_copies: bool = True
    ) -> tuple[int, int, int, int]:
        """Do ``store_named`` and ``remove_named`` event by event; the numbers of a ``RunApplied``.

        ``table`` is that of ``mulsched.types.EventRun``. ValueError, and nothing done, if it does not fit the
        hashes (of all events) and keys (of the stores).
        """

    def discard(self, row: int, keys: Keys, start: int) -> int:
        """Stop holding the blocks ``keys[start:]`` of the path on an unnamed row; how many were held."""

    def clear(self, row: int) -> None:
        """Hold nothing on this row."""

    def match(self, keys: Keys, out: NDArray[np.int64]) -> None:
        """Write per row how many leading blocks of ``keys`` it holds. ``out``: ``(>= n_rows,)``."""

    def match_from(self, keys: Keys, out: NDArray[np.int64]) -> None:
        """Move ``out[row]``, at least 0, on over the blocks of ``keys`` that the row holds from there."""

    def blocks(self, row: int) -> int:
        """How many blocks the row holds."""

    def unique_blocks(self) -> int:
        """How many blocks are held by at least one row."""

    def nodes(self) -> int:
        """How many nodes the tree has, the root not counted."""

    def memory(self) -> dict[str, int]:
        """Bytes by part."""

    def check(self) -> None:
        """Raise AssertionError with the number of the invariant that does not hold."""

    def edges(self) -> list[tuple[int, list[int], list[int]]]:
        """Every node in depth-first order, children by first key: (start depth, keys, holder rows)."""

    def lru(self, row: int) -> list[list[int]]:
        """Paths of keys of the row's nodes, next to be evicted first; for tests and dumps. O(N * depth)."""


def _new_backend() -> Backend:
    if BACKEND == "native":
        from mulsched._native import PrefixIndex as NativeIndex

        return NativeIndex()
    from mulsched._prefix_index_py import PrefixIndexPy

    return PrefixIndexPy()


def as_keys(keys: Any, name: str = "keys") -> Keys:
    """Return ``keys`` as a C-contiguous uint64 array, shape ``(n,)``, without a copy where it is one.

    Raises InvalidType for anything but integers, InvalidArgument for another shape or out of 64 bits.
    """
    if type(keys) is np.ndarray and keys.dtype == np.uint64 and keys.ndim == 1:
        flags = keys.flags
        return keys if flags.c_contiguous and flags.aligned else np.require(keys, requirements=("C", "A"))
    if isinstance(keys, str | bytes) or not isinstance(keys, Iterable):
        raise InvalidType(f"{name} must be a sequence of 64-bit integers, got {type(keys).__name__}")
    array = keys if isinstance(keys, np.ndarray) else np.array(list(keys), dtype=object)
    if array.ndim != 1:
        raise InvalidArgument(f"{name} must have one dimension, got shape {array.shape}")
    if array.dtype == object:
        for position, key in enumerate(array):
            if isinstance(key, bool) or not isinstance(key, int | np.integer):
                raise InvalidType(
                    f"{name} must be 64-bit integers, got {type(key).__name__} at position {position}"
                )
            if not 0 <= key < 2**64:
                raise InvalidArgument(f"{name} must lie in 0..2**64-1, got {key} at position {position}")
    elif array.dtype.kind not in "iu":
        raise InvalidType(f"{name} must be 64-bit integers, got dtype {array.dtype}")
    elif array.dtype.kind == "i" and array.size and array.min() < 0:
        position = int(np.argmax(array < 0))
        raise InvalidArgument(f"{name} must lie in 0..2**64-1, got {array[position]} at position {position}")
    return np.require(array, np.uint64, ("C", "A"))


def as_hashes(hashes: Sequence[EngineHash] | NDArray[np.uint64]) -> Keys:
    """Return engine hashes as 64-bit words, shape ``(n,)``. Raises InvalidType, InvalidArgument."""
    if isinstance(hashes, np.ndarray):
        return as_keys(hashes, "engine_hashes")
    if isinstance(hashes, str | bytes) or not isinstance(hashes, Iterable):
        raise InvalidType(f"engine_hashes must be a sequence of int or bytes, got {type(hashes).__name__}")
    return np.array([engine_hash(h) for h in hashes], dtype=np.uint64)


def as_capacity(capacity_blocks: Any, name: str = "capacity_blocks") -> int:
    """Return a number of blocks as an int. Raises InvalidType, InvalidArgument."""
    if isinstance(capacity_blocks, bool) or not isinstance(capacity_blocks, int | np.integer):
        raise InvalidType(f"{name} must be an int, got {type(capacity_blocks).__name__} {capacity_blocks!r}")
    if not 1 <= capacity_blocks < 2**63:
        wanted = "at least 1" if capacity_blocks < 1 else "below 2**63"
        raise InvalidArgument(f"{name} must be {wanted}, got {capacity_blocks}")
    return int(capacity_blocks)


def _capacity(instance: str, capacity_blocks: int | None, engine_hashes: bool) -> int:
    if capacity_blocks is None:
        return UNBOUNDED
    if engine_hashes:
        raise InvalidArgument(
            f"instance {instance!r}: capacity_blocks={capacity_blocks} and engine_hashes=True exclude each "
            "other, since the engine's events say what leaves"
        )
    return as_capacity(capacity_blocks)


def _kind(capacity: int, engine_hashes: bool) -> str:
    return "named" if engine_hashes else "bounded" if capacity >= 0 else "unbounded"


class PrefixIndex:
    """Which instance holds which prefix.

    There are three kinds of instance, fixed when it is added:

    - *named* (``engine_hashes=True``): content comes from engine events. The instance holds exactly the
      blocks that its live engine hashes name; removing a block in the middle does not remove what
      follows, and puts it out of reach until the block is stored again. A block stored several times
      under one hash has as many copies, and is held until each was removed; so no event may be applied
      twice.
    - *bounded* (``capacity_blocks=C``): content is predicted. Storing a path makes its blocks the newest;
      above C blocks the oldest leave, the tail of a path before its head. A path longer than C keeps its
      first C blocks.
    - *unbounded* (neither): content is what was stored and not discarded.

    Thread-safe: readers run together, a writer excludes them.
    """

    __slots__ = ("_free", "_kind", "_lock", "_names", "_rows", "_tree", "removed_unknown")

    def __init__(self) -> None:
        self._tree = _new_backend()
        # Names and tree change together: one writer at a time. Readers need only the tree's own lock.
        self._lock = threading.RLock()  # a finalizer that runs meanwhile may come back
        self._rows: dict[str, int] = {}
        self._names: list[str | None] = []
        self._kind: dict[str, str] = {}
        self._free: list[int] = []
        self.removed_unknown = 0
        """How many engine hashes ``remove`` was given that the instance did not hold."""

    # -- instances ---------------------------------------------------------------------------------

    def add_instance(
        self, instance: str, *, capacity_blocks: int | None = None, engine_hashes: bool = False
    ) -> int:
        """Add an empty instance and return its row. O(1).

        Rows of removed instances are used again, the lowest first. Raises DuplicateInstance, InvalidType,
        InvalidArgument (capacity below 1, or capacity together with engine hashes: the engine evicts).
        """
        if not isinstance(instance, str):
            raise InvalidType(f"instance must be a str, got {type(instance).__name__}")
        with self._lock:
            if instance in self._rows:
                raise DuplicateInstance(f"instance {instance!r} is there already")
            capacity = _capacity(instance, capacity_blocks, engine_hashes)
            row = self._free.pop() if self._free else len(self._names)
            self._tree.add_row(row, capacity, engine_hashes)
            if row == len(self._names):
                self._names.append(instance)
            else:
                self._names[row] = instance
            self._rows[instance] = row
            self._kind[instance] = _kind(capacity, engine_hashes)
            return row

    def reset(
        self, instance: str, *, capacity_blocks: int | None = None, engine_hashes: bool = False
    ) -> None:
        """Empty the instance and choose its kind anew; it keeps its row. O(its nodes).

        Raises as ``add_instance``, and UnknownInstance.
        """
        with self._lock:
            row = self.row(instance)
            capacity = _capacity(instance, capacity_blocks, engine_hashes)
            self._tree.remove_row(row)
            self._tree.add_row(row, capacity, engine_hashes)
            self._kind[instance] = _kind(capacity, engine_hashes)

    def remove_instance(self, instance: str) -> None:
        """Forget the instance and give back its memory. O(its nodes). Raises UnknownInstance."""
        with self._lock:
            row = self.row(instance)
            self._tree.remove_row(row)
            del self._rows[instance], self._kind[instance]
            self._names[row] = None
            self._free.append(row)
            self._free.sort(reverse=True)

    def resize(self, instance: str, capacity_blocks: int) -> None:
        """Change a bounded instance's capacity and evict down to it. Raises as ``add_instance``."""
        with self._lock:
            row = self._row_of(instance, "bounded")
            self._tree.resize(row, as_capacity(capacity_blocks))

    def row(self, instance: str) -> int:
        """Return the instance's row: its place in the result of ``match``. Raises UnknownInstance."""
        try:
            return self._rows[instance]
        except (KeyError, TypeError):
            raise UnknownInstance(
                f"unknown instance {instance!r}; there are {len(self._rows)} instances"
            ) from None

    @property
    def backend(self) -> Backend:
        """The tree itself, for code that fills columns from it."""
        return self._tree

    @property
    def instances(self) -> tuple[str, ...]:
        """Instances in the order of their rows."""
        return tuple(name for name in self._names if name is not None)

    @property
    def n_rows(self) -> int:
        """Rows ever used at the same time: the length of a result of ``match``."""
        return len(self._names)

    # -- content -----------------------------------------------------------------------------------

    def store(
        self,
        instance: str,
        keys: Keys,
        *,
        parent: EngineHash | None = None,
        after: Keys | None = None,
        engine_hashes: Sequence[EngineHash] | NDArray[np.uint64] | None = None,
        counts_copies: bool = True,
    ) -> int:
        """Record that the instance holds ``keys``; return how many blocks it did not hold before.

        For a named instance ``keys`` follow the block that ``parent`` names, or the path ``after`` from the
        prompt's start, of which the instance need not hold anything (neither: they start the prompt), and
        ``engine_hashes`` names them one by one; a name that is in use for the same block counts one copy
        more, unless ``counts_copies`` is false, and one in use for another block moves here, as one copy.
        For the other kinds ``keys`` is the path from the prompt's start. O(D + W) amortised.

        Raises UnknownInstance, UnknownBlock (the instance holds no block named ``parent``), InvalidType,
        InvalidArgument (hashes missing, superfluous, or not as many as keys; both parent and after).
        """
        # the caller's iterables run before the lock is taken: they may use this index themselves
        path = as_keys(keys)
        hashes = None if engine_hashes is None else as_hashes(engine_hashes)
        name = None if parent is None else engine_hash(parent)
        above = None if after is None else as_keys(after, "after")
        if name is not None and above is not None:
            raise InvalidArgument("blocks follow either parent or after, got both")
        with self._lock:
            row = self.row(instance)
            if self._kind[instance] != "named":
                if hashes is not None or name is not None or above is not None:
                    raise InvalidArgument(f"instance {instance!r} was added without engine_hashes=True")
                return self._tree.store(row, path)
            if hashes is None:
                raise InvalidArgument(f"instance {instance!r} needs engine_hashes, one for each of the keys")
            if len(hashes) != len(path):
                raise InvalidArgument(f"{len(path)} keys need as many engine_hashes, got {len(hashes)}")
            if above is not None:
                return self._tree.store_named_after(row, above, hashes, path, counts_copies)
            stored = self._tree.store_named(row, name, hashes, path, counts_copies)
            if stored == UNKNOWN_PARENT:
                raise UnknownBlock(f"instance {instance!r} holds no block with engine hash {parent!r}")
            return stored

    def remove(self, instance: str, engine_hashes: Sequence[EngineHash] | NDArray[np.uint64]) -> int:
        """Forget a copy of each of a named instance's blocks; return how many hashes it knew.

        The last copy under a hash takes the name with it, and the last name takes the block.
        Unknown hashes are counted in ``removed_unknown`` and otherwise ignored: engines report blocks that
        the index never learned of. Does not cascade. O(1) per block, plus the split that it causes.
        Raises UnknownInstance, InvalidType, InvalidArgument.
        """
        hashes = as_hashes(engine_hashes)
        with self._lock:
            row = self._row_of(instance, "named")
            known = self._tree.remove_named(row, hashes)
            self.removed_unknown += len(hashes) - known
            return known

    def apply_run(
        self,
        instance: str,
        table: NDArray[np.uint64],
        engine_hashes: NDArray[np.uint64],
        keys: Keys,
        *,
        counts_copies: bool = True,
    ) -> RunApplied:
        """Store and remove on a named instance as the events in ``table`` say; see ``EventRun``.

        The same as ``store`` and ``remove`` for one event after the other, except that a store whose parent
        is unknown is counted instead of raised. ``engine_hashes`` are of all events, ``keys`` of the stores.
        O(D + W) amortised. Raises UnknownInstance, InvalidType, InvalidArgument (also for a table that does
        not fit); nothing is changed then.
        """
        path, hashes = as_keys(keys), as_keys(engine_hashes, "engine_hashes")
        if not isinstance(table, np.ndarray) or table.dtype != np.uint64 or table.ndim != 2:
            raise InvalidType(f"table must be an array of uint64 with 2 dimensions, got {table!r}")
        events = table if table.flags.carray else np.require(table, requirements=("C", "A"))
        with self._lock:
            row = self._row_of(instance, "named")
            try:
                counted = self._tree.apply_run(row, events, hashes, path, counts_copies)
            except ValueError as error:
                raise InvalidArgument(str(error)) from None
            applied = RunApplied._make(counted)
            self.removed_unknown += applied.blocks_removed - applied.blocks_known
            return applied

    def apply_message(
        self,
        instance: str,
        message: "KvMessage",
        begin: int,
        block_size: int,
        seed: int,
        counts_copies: bool,
    ) -> tuple[int, tuple[int, int, int, int]]:
        """Apply the runs of a message that the core has split, from ``begin`` on.

        Each as ``apply_run``, with block keys seeded by ``seed`` and the run's adapter, up to the first run
        on another medium than the GPU or of blocks of another size; none where the instance is not there or
        not named. Returns where that is, and what became of those before, as a ``RunApplied``. O(D + W)
        amortised.
        """
        with self._lock:
            row = self._rows.get(instance)
            if row is None or self._kind[instance] != "named":
                return begin, (0, 0, 0, 0)
            done = message.apply(self._tree, row, begin, block_size, seed, counts_copies)
            _, _, removed, known = done[1]
            self.removed_unknown += removed - known
            return done

    def discard(self, instance: str, keys: Keys, *, start: int = 0) -> int:
        """Stop holding blocks ``start`` and later of the path ``keys``; return how many were held.

        For instances without engine hashes. Does not cascade to blocks beyond ``keys``. O(D + W).
        Raises UnknownInstance, InvalidType, InvalidArgument.
        """
        path = as_keys(keys)
        if isinstance(start, bool) or not isinstance(start, int | np.integer):
            raise InvalidType(f"start must be an int, got {type(start).__name__}")
        if start < 0:
            raise InvalidArgument(f"start must be at least 0, got {start}")
        with self._lock:
            row = self.row(instance)
            if self._kind[instance] == "named":
                raise InvalidArgument(f"instance {instance!r} is named: use remove() with engine hashes")
            return self._tree.discard(row, path, min(int(start), len(path)))

    def clear(self, instance: str) -> None:
        """Drop everything the instance holds. O(its nodes). Raises UnknownInstance."""
        with self._lock:
            self._tree.clear(self.row(instance))

    # -- questions ---------------------------------------------------------------------------------

    def match(self, keys: Keys) -> NDArray[np.int64]:
        """Return how many leading blocks of ``keys`` each row holds, shape ``(n_rows,)``; free rows hold 0.

        Changes nothing, not even recency. O(D + W * nodes on the path).
        Raises InvalidType, InvalidArgument.
        """
        matched = np.empty(len(self._names), dtype=np.int64)
        self._tree.match(as_keys(keys), matched)
        return matched

    def path(self, instance: str, name: EngineHash) -> Keys | None:
        """Return the keys from the prompt's start to the block that an instance knows as ``name``.

        None if it knows no such block, or is not a named one. O(D). Raises UnknownInstance, InvalidType,
        InvalidArgument.
        """
        word = engine_hash(name)
        with self._lock:
            row = self.row(instance)
            return self._tree.path(row, word) if self._kind[instance] == "named" else None

    def match_by_instance(self, keys: Keys) -> dict[str, int]:
        """Return ``match`` as a dict from instance to matched blocks."""
        path = as_keys(keys)
        with self._lock:
            matched = self.match(path)
            return {instance: int(matched[row]) for instance, row in self._rows.items()}

    def blocks(self, instance: str) -> int:
        """Return how many blocks the instance holds. O(1). Raises UnknownInstance."""
        with self._lock:
            return self._tree.blocks(self.row(instance))

    def __len__(self) -> int:
        """Return how many distinct blocks are held by at least one instance. O(1)."""
        return self._tree.unique_blocks()

    def __contains__(self, instance: object) -> bool:
        """Return whether there is such an instance."""
        return instance in self._rows

    @property
    def n_nodes(self) -> int:
        """Nodes of the tree; a function of the content, so it shrinks when the content does."""
        return self._tree.nodes()

    def memory(self) -> dict[str, int]:
        """Return bytes by part, allocated size, with their sum under ``"total"``."""
        return self._tree.memory()

    def check(self) -> None:
        """Verify every invariant of the tree; AssertionError names the broken one. O(everything)."""
        self._tree.check()

    def dump(self) -> str:
        """Return the tree as text: a line per node with depth, blocks, keys and holders."""
        lines = [f"{len(self)} blocks in {self.n_nodes} nodes, {len(self._rows)} instances"]
        for depth, keys, rows, start in self._walk():
            names = ", ".join(str(self._names[row]) for row in rows) or "(no holder)"
            shown = " ".join(f"{key:016x}" for key in keys[:3]) + (" ..." if len(keys) > 3 else "")
            lines.append(f"{'  ' * depth}[{start}:{start + len(keys)}] {shown} | {names}")
        return "\n".join(lines)

    def _walk(self) -> Iterable[tuple[int, list[int], list[int], int]]:
        """Yield (depth in nodes, keys, holder rows, start in blocks) of every node, depth first."""
        ends: list[int] = []
        for start, keys, rows in self._tree.edges():
            while ends and ends[-1] > start:
                ends.pop()
            yield len(ends), keys, rows, start
            ends.append(start + len(keys))

    def _row_of(self, instance: str, kind: str) -> int:
        row = self.row(instance)
        if self._kind[instance] != kind:
            raise InvalidArgument(f"instance {instance!r} is {self._kind[instance]}; this needs a {kind} one")
        return row
