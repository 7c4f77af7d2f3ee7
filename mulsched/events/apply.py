"""Batches of events onto a router: whatever an engine says, the router goes on."""

from collections import Counter

from mulsched.errors import MulschedError
from mulsched.events.batch import EventBatch
from mulsched.router import Router
from mulsched.types import BlockStored, CacheCleared

__all__ = ["apply_batch"]


def apply_batch(router: Router, batch: EventBatch, counts: Counter[str]) -> None:
    """Apply a batch's events in order and add to ``counts`` what became of them.

    A store that the router refuses is dropped and counted under the name of its error: ``UnknownBlock`` where
    what came before it was not seen, ``BlockSizeMismatch``, ``InvalidTokens``. What the index holds is then
    less than what the engine has, and never more. O(blocks).
    """
    for event in batch.events:
        try:
            router.apply(event)
        except MulschedError as error:
            counts[type(error).__name__] += 1
            continue
        if isinstance(event, CacheCleared):
            counts["caches_cleared"] += 1
            continue
        if event.medium not in router.media:
            counts["events_of_other_media"] += 1
            continue
        change = "blocks_stored" if isinstance(event, BlockStored) else "blocks_removed"
        counts[change if event.medium == "GPU" else f"lower_tier_{change}"] += len(event.block_hashes)
    counts["unknown_events"] += batch.unknown
    counts["ignored_events"] += batch.ignored
    counts["malformed_events"] += batch.malformed
