"""Batches of events onto a router: whatever an engine says, the router goes on."""

from collections import Counter
from dataclasses import replace

import numpy as np

from mulsched.errors import BlockSizeMismatch, MulschedError, UnknownInstance
from mulsched.events.batch import EventBatch, KvEvent
from mulsched.router import Router
from mulsched.types import REMOVED, BlockStored, CacheCleared, EventRun

__all__ = ["apply_batch"]


def apply_batch(router: Router, batch: EventBatch, counts: Counter[str]) -> None:
    """Apply a batch's events in order and add to ``counts`` what became of them.

    A store that the router refuses is dropped and counted under the name of its error: ``UnknownBlock`` where
    what came before it was not seen, ``BlockSizeMismatch``, ``InvalidTokens``. What the index holds is then
    less than what the engine has, and never more. O(blocks).
    """
    for part in batch.parts:
        if not isinstance(part, EventRun):
            _apply_one(router, part, counts)
        elif part.instance in router.instances and part.medium not in router.media:
            counts["events_of_other_media"] += len(part)
        elif part.medium != "GPU" or not _apply_run(router, part, counts):
            for event in part:
                _apply_one(router, event, counts)
    counts["unknown_events"] += batch.unknown
    counts["ignored_events"] += batch.ignored
    counts["malformed_events"] += batch.malformed


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
        return _apply_run(router, removals, counts)
    except MulschedError:
        return False
    counts["blocks_stored"] += applied.blocks_stored
    counts["blocks_removed"] += applied.blocks_removed
    counts["UnknownBlock"] += applied.stores_refused
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
