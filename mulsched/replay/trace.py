"""A trace: requests as columns, prompts as runs of chained block ids."""

import dataclasses
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mulsched.errors import InvalidArgument, TraceError
from mulsched.types import Keys

__all__ = ["Trace", "TraceStats", "dense_ids", "lru_hit_ratio"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_ID_LIMIT = 2**48  # times the parts of a block (at most 2**14) below 2**62, out of the way of private keys
_PRIVATE = 1 << 63  # key space of blocks that the trace gives no id
_ANSWER = 3 << 62  # and of blocks that answers fill
_COLUMNS = {
    "arrival_s": np.float64,
    "prompt_tokens": np.int64,
    "output_tokens": np.int64,
    "run_start": np.int64,
    "run_length": np.int64,
    "run_offset": np.int64,
    "session": np.int64,
    "previous": np.int64,
    "think_s": np.float64,
}


@dataclass(frozen=True, slots=True)
class TraceStats:
    """Figures of a trace; ratios are NaN where the trace has nothing to tell them from.

    ``hit_ratio``: of prompt tokens, in a cache that never evicts, by whole blocks of the trace.
    ``same_session_share``: of those hits, what an earlier request of the same session had brought.
    """

    requests: int
    duration_s: float
    rate_per_s: float
    input_mean: float
    input_p50: float
    input_p99: float
    output_mean: float
    output_p50: float
    output_p99: float
    unique_blocks: int
    hit_ratio: float
    same_session_share: float
    single_session_ratio: float
    gap_p50_s: float
    gap_p90_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Requests in the order of their arrival, n of them.

    ``block_size``: tokens per block id. ``arrival_s`` (n,) seconds from the start, not decreasing.
    ``prompt_tokens``, ``output_tokens`` (n,) at least 1. The block ids of request i are the runs
    ``run_offset[i]:run_offset[i + 1]``, each ``run_length`` ids from ``run_start`` on. Ids are chained: an
    id stands for a block and all before it, so equal ids mean equal prefixes. ``session`` (n,): -1 for none.
    ``previous`` (n,): the request that this one follows in a closed loop, -1 for none; ``think_s`` (n,): the
    time between that one's end and this arrival then.

    Raises TraceError if the columns do not fit together.
    """

    name: str
    block_size: int
    arrival_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    run_start: Ints
    run_length: Ints
    run_offset: Ints
    session: Ints
    previous: Ints
    think_s: Floats
    synthetic: bool = False
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for column, dtype in _COLUMNS.items():
            values = getattr(self, column)
            if not isinstance(values, np.ndarray) or values.ndim != 1 or values.dtype != dtype:
                got = (
                    f"{values.dtype} {values.shape}"
                    if isinstance(values, np.ndarray)
                    else type(values).__name__
                )
                raise TraceError(
                    f"{self.name}: {column} must be {np.dtype(dtype)} in one dimension, got {got}"
                )
        if not 1 <= self.block_size <= 2**14:
            raise TraceError(f"{self.name}: block_size must lie in 1..{2**14}, got {self.block_size}")
        n = len(self.arrival_s)
        if n == 0:
            raise TraceError(f"{self.name}: the trace has no requests")
        for column in ("prompt_tokens", "output_tokens", "session", "previous", "think_s"):
            if len(getattr(self, column)) != n:
                raise TraceError(f"{self.name}: {column} has {len(getattr(self, column))} rows, expected {n}")
        if not np.isfinite(self.arrival_s).all() or (np.diff(self.arrival_s) < 0).any():
            raise TraceError(f"{self.name}: arrivals must be finite and in order")
        for column, least in (("prompt_tokens", 1), ("output_tokens", 1), ("session", -1)):
            if getattr(self, column).min() < least:
                at = int(getattr(self, column).argmin())
                raise TraceError(f"{self.name}: {column} of request {at} must be at least {least}")
        if not np.isfinite(self.think_s).all() or self.think_s.min() < 0:
            raise TraceError(f"{self.name}: think_s must be finite and at least 0")
        if (self.previous >= np.arange(n)).any() or self.previous.min() < -1:
            raise TraceError(f"{self.name}: previous must be an earlier request or -1")
        self._check_runs()

    def _check_runs(self) -> None:
        n, n_runs = len(self.arrival_s), len(self.run_start)
        if len(self.run_length) != n_runs:
            raise TraceError(f"{self.name}: run_length has {len(self.run_length)} rows, expected {n_runs}")
        offset = self.run_offset
        if len(offset) != n + 1 or offset[0] != 0 or offset[-1] != n_runs or (np.diff(offset) < 0).any():
            raise TraceError(f"{self.name}: run_offset does not fit {n} requests and {n_runs} runs")
        if n_runs and (self.run_length.min() < 0 or self.run_length.max() > _ID_LIMIT):
            raise TraceError(f"{self.name}: run lengths must not be negative")
        # not start + length, which could wrap
        if n_runs and (self.run_start.min() < 0 or (self.run_start > _ID_LIMIT - self.run_length).any()):
            raise TraceError(f"{self.name}: block ids must lie in 0..2**48-1")

    def __len__(self) -> int:
        """Return the number of requests."""
        return len(self.arrival_s)

    def block_ids(self, i: int) -> Ints:
        """Return request i's block ids, shape ``(its blocks,)``. O(blocks).

        Raises InvalidArgument without a request i.
        """
        return self._expand(i, 1)

    def _expand(self, i: int, parts: int) -> Ints:
        """Return the ids of request i's blocks when each is cut into ``parts``, in order."""
        if not 0 <= i < len(self.arrival_s):
            raise InvalidArgument(f"{self.name} has requests 0..{len(self) - 1}, got {i}")
        runs = slice(self.run_offset[i], self.run_offset[i + 1])
        # the parts of neighbouring blocks are neighbours, so a run of blocks is a run of parts
        starts, lengths = self.run_start[runs] * parts, self.run_length[runs] * parts
        if len(starts) == 1:
            return np.arange(starts[0], starts[0] + lengths[0], dtype=np.int64)
        ends = np.cumsum(lengths)
        ids = np.arange(ends[-1] if len(ends) else 0, dtype=np.int64)
        ids += np.repeat(starts - ends + lengths, lengths)
        return ids

    def keys(self, i: int, block_size: int = 16) -> Keys:
        """Return request i's keys for blocks of ``block_size`` tokens, ``(prompt_tokens // block_size,)``.

        Each block of the trace is cut into equal parts with keys of their own. Blocks beyond the ids that
        the trace gives are private to the request. Being chained, a key also serves as the engine's hash.
        O(blocks). Raises InvalidArgument without a request i, and unless ``block_size`` divides the trace's.
        """
        if block_size < 1 or self.block_size % block_size:
            raise InvalidArgument(
                f"{self.name}: block_size must divide the trace's {self.block_size}, got {block_size}"
            )
        keys: Keys = self._expand(i, self.block_size // block_size).view(np.uint64)
        n_blocks = int(self.prompt_tokens[i]) // block_size
        keys = keys[:n_blocks]
        if len(keys) < n_blocks:
            private = np.arange(n_blocks - len(keys), dtype=np.uint64)
            private |= np.uint64(_PRIVATE | i << 24)
            keys = np.concatenate([keys, private])
        return _mix(keys)

    def engine_keys(self, i: int, block_size: int = 16) -> Keys:
        """Return request i's keys, then those of the blocks that its answer fills.

        The latter are private to the request: a trace does not say what an answer was. The last token of an
        answer is never computed, so ``((prompt_tokens + output_tokens - 1) // block_size,)`` keys or, if the
        prompt alone has more, as many as ``keys``. O(blocks). Raises as ``keys``.
        """
        keys = self.keys(i, block_size)
        total = (int(self.prompt_tokens[i]) + int(self.output_tokens[i]) - 1) // block_size
        answer = np.arange(len(keys), max(total, len(keys)), dtype=np.uint64)
        answer |= np.uint64(_ANSWER | i << 24)
        return np.concatenate([keys, _mix(answer)])

    def slice(self, start_s: float, end_s: float) -> "Trace":
        """Return the requests that arrive in ``[start_s, end_s)``, times counted from ``start_s``.

        A request whose ``previous`` is cut off follows none. Raises TraceError if none is left.
        """
        keep = (self.arrival_s >= start_s) & (self.arrival_s < end_s)
        cut = self.take(keep)
        return dataclasses.replace(cut, arrival_s=cut.arrival_s - start_s)

    def take(self, keep: NDArray[np.bool_], *, note: str | None = None) -> "Trace":
        """Return the requests where ``keep`` (n,) is true; ``previous`` is -1 where it is not kept.

        ``note`` is added to the notes. Raises TraceError if none is left.
        """
        if not keep.any():
            raise TraceError(f"{self.name}: no request is left of {len(self)}")
        renumbered = np.where(keep, np.cumsum(keep) - 1, -1)
        previous = self.previous[keep]
        lengths = np.diff(self.run_offset)
        runs = np.repeat(keep, lengths)
        return dataclasses.replace(
            self,
            arrival_s=self.arrival_s[keep],
            prompt_tokens=self.prompt_tokens[keep],
            output_tokens=self.output_tokens[keep],
            run_start=self.run_start[runs],
            run_length=self.run_length[runs],
            run_offset=np.concatenate([[0], np.cumsum(lengths[keep])]),
            session=self.session[keep],
            previous=np.where(previous >= 0, renumbered[previous], -1),
            think_s=self.think_s[keep],
            notes=self.notes if note is None else (*self.notes, note),
        )

    def scale_rate(self, factor: float) -> "Trace":
        """Return the trace with arrivals ``factor`` times as dense; think times stay as they are.

        In an open loop all requests come faster. In a closed loop sessions start faster, while people and
        tools within one take as long as before. Raises InvalidArgument.
        """
        if not (np.isfinite(factor) and factor > 0):
            raise InvalidArgument(f"the rate must be scaled by a finite number above 0, got {factor}")
        return dataclasses.replace(self, arrival_s=self.arrival_s / factor)

    def stats(self) -> TraceStats:
        """Return the trace's figures. O(blocks)."""
        hit_blocks, same_blocks, unique = _ideal_hits(self)
        hit_tokens = int(hit_blocks.sum()) * self.block_size
        duration = float(self.arrival_s[-1] - self.arrival_s[0])
        follows = self.previous >= 0
        gaps = self.arrival_s[follows] - self.arrival_s[self.previous[follows]]
        _, turns = np.unique(self.session[self.session >= 0], return_counts=True)
        return TraceStats(
            requests=len(self),
            duration_s=duration,
            rate_per_s=len(self) / duration if duration > 0 else float("nan"),
            input_mean=float(self.prompt_tokens.mean()),
            input_p50=float(np.percentile(self.prompt_tokens, 50)),
            input_p99=float(np.percentile(self.prompt_tokens, 99)),
            output_mean=float(self.output_tokens.mean()),
            output_p50=float(np.percentile(self.output_tokens, 50)),
            output_p99=float(np.percentile(self.output_tokens, 99)),
            unique_blocks=unique,
            hit_ratio=hit_tokens / int(self.prompt_tokens.sum()),
            same_session_share=float(same_blocks.sum() / hit_blocks.sum()) if hit_tokens else float("nan"),
            single_session_ratio=float((turns == 1).mean()) if len(turns) else float("nan"),
            gap_p50_s=float(np.percentile(gaps, 50)) if len(gaps) else float("nan"),
            gap_p90_s=float(np.percentile(gaps, 90)) if len(gaps) else float("nan"),
        )


def _mix(x: Keys) -> Keys:
    """Finalizer of SplitMix64, in place: ids are counters, keys should look like hashes."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def dense_ids(trace: Trace, *, whole: bool = True) -> tuple[list[Ints], int, int]:
    """Return every request's blocks as ids below a bound, the bound, and how many are in use.

    ``whole``: without the partial block at the end of a prompt.
    """
    blocks = (trace.prompt_tokens // trace.block_size).tolist()
    ids = [trace.block_ids(i)[: blocks[i] if whole else None] for i in range(len(trace))]
    flat = np.concatenate(ids)
    bound = int(flat.max()) + 1 if len(flat) else 0
    if bound <= 2 * len(flat):  # ids are counters in most traces; sorting them would take most of the time
        used = np.zeros(bound, dtype=np.bool_)
        used[flat] = True
        return ids, bound, int(used.sum())
    unique, dense = np.unique(flat, return_inverse=True)
    return np.split(dense, np.cumsum([len(x) for x in ids])[:-1]), len(unique), len(unique)


def _ideal_hits(trace: Trace) -> tuple[Ints, Ints, int]:
    """Return per request the blocks that a cache without eviction has, those from its own session, and the
    number of unique blocks.
    """
    requests, bound, count = dense_ids(trace)
    seen = np.zeros(bound, dtype=np.bool_)
    hits = np.zeros(len(trace), dtype=np.int64)
    same = np.zeros(len(trace), dtype=np.int64)
    last: dict[int, Ints] = {}
    for i, ids in enumerate(requests):
        hits[i] = _leading(seen[ids])
        seen[ids] = True
        session = int(trace.session[i])
        if session < 0:
            continue
        if session in last:
            before = last[session]
            n = min(len(before), len(ids))
            same[i] = min(hits[i], _leading(before[:n] == ids[:n]))
        last[session] = ids
    return hits, same, count


def _leading(flags: NDArray[np.bool_]) -> int:
    """Return how many flags are true before the first that is not."""
    return int(np.argmin(flags)) if len(flags) and not flags.all() else len(flags)


def lru_hit_ratio(trace: Trace, fraction: float) -> float:
    """Return the hit ratio, of prompt tokens, in one LRU cache of a fraction of the unique blocks.

    The tail of a prompt leaves before its head. O(blocks). Raises InvalidArgument (not in 0..1).
    """
    if not 0 < fraction <= 1:
        raise InvalidArgument(f"fraction must lie in 0..1, got {fraction}")
    requests, _, count = dense_ids(trace)
    capacity = max(1, int(fraction * count))
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for ids in requests:
        path = ids.tolist()
        missed = next((i for i, block in enumerate(path) if block not in cache), len(path))
        hits += missed
        for block in reversed(path):
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > capacity:
            cache.popitem(last=False)
    return hits * trace.block_size / int(trace.prompt_tokens.sum())
