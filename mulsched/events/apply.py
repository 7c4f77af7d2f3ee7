"""Batches of events onto a router: whatever an engine says, the router goes on."""

from collections import Counter
from dataclasses import replace

import numpy as np

from mulsched.errors import BlockSizeMismatch, MulschedError, UnknownInstance
from mulsched.events.batch import EventBatch, KvEvent, SplitRuns
from mulsched.router import Router
from mulsched.types import REMOVED, BlockStored, CacheCleared, EventRun

__all__ = ["apply_batch"]


def apply_batch(router: Router, batch: EventBatch, counts: Counter[str]) -> None:
    """Apply a batch's events in order and add to ``counts`` what became of them.

    A store that the router refuses is dropped and counted under the name of its error: ``UnknownBlock`` where
    what came before it was not seen, ``BlockSizeMismatch``, ``InvalidTokens``. What the index holds is then
    less than what the engine has, and never more. O(blocks).
    """
    parts = batch.parts
    if isinstance(parts, SplitRuns):
        _apply_split(router, parts, counts)
    else:
        for part in parts:
            _apply_part(router, part, counts)
    if batch.unknown:
        counts["unknown_events"] += batch.unknown
    if batch.ignored:
        counts["ignored_events"] += batch.ignored
    if batch.malformed:
        counts["malformed_events"] += batch.malformed


def _apply_split(router: Router, runs: SplitRuns, counts: Counter[str]) -> None:
    """Let the core apply what it can, and the rest as if it had come otherwise."""
    at, n_runs = 0, len(runs)
    while True:
        at, applied = router.apply_message(
            runs.instance, runs.message, begin=at, counts_copies=runs.counts_copies
        )
        _count(applied, counts)
        if at == n_runs:
            return
        _apply_part(router, runs[at], counts)
        at += 1


def _apply_part(router: Router, part: KvEvent | EventRun, counts: Counter[str]) -> None:
    if not isinstance(part, EventRun):
        _apply_one(router, part, counts)
    elif part.instance in router.instances and part.medium not in router.media:
        counts["events_of_other_media"] += len(part)
    elif part.medium != "GPU" or not _apply_run(router, part, counts):
        for event in part:
            _apply_one(router, event, counts)


def _count(applied: tuple[int, int, int, int], counts: Counter[str]) -> None:
    """Count a ``RunApplied``; what is 0 costs nothing, since most messages say little."""
    stored, refused, removed, _ = applied
    if stored:
        counts["blocks_stored"] += stored
    if removed:
        counts["blocks_removed"] += removed
    if refused:
        counts["UnknownBlock"] += refused


def _apply_run(router: Router, run: EventRun, counts: Counter[str]) -> bool:
    """Apply a run at once; False, and nothing done, where some event of it must be refused by itself."""
    try:
        applied = router.apply_run(run)
    except UnknownInstance:
        counts["UnknownInstance"] += len(run)
        return True
    except BlockSizeMismatch:  # all stores of a run have one size
        removals = _removals(run)
        counts["BlockSizeMismatch"] += len(run) - len(removals)
        return len(removals) == 0 or _apply_run(router, removals, counts)
    except MulschedError:
        return False
    _count(applied, counts)
    return True


def _removals(run: EventRun) -> EventRun:
    removed = run.table[:, 0] == REMOVED
    hashes = run.block_hashes[np.repeat(removed, run.table[:, 1].astype(np.intp))]
    return replace(run, table=run.table[removed], block_hashes=hashes, token_ids=run.token_ids[:0])


def _apply_one(router: Router, event: KvEvent, counts: Counter[str]) -> None:
    try:
        router.apply(event)
    except MulschedError as error:
        counts[type(error).__name__] += 1
        return
    if isinstance(event, CacheCleared):
        counts["caches_cleared"] += 1
    elif event.medium not in router.media:
        counts["events_of_other_media"] += 1
    else:
        change = "blocks_stored" if isinstance(event, BlockStored) else "blocks_removed"
        counts[change if event.medium == "GPU" else f"lower_tier_{change}"] += len(event.block_hashes)
