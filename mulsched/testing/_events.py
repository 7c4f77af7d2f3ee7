"""Sequences of events that an engine may send."""

from typing import Literal

import numpy as np
from hypothesis import strategies as st

from mulsched.types import BlockRemoved, BlockStored, CacheCleared, EngineHash, Event, InstanceRemoved

__all__ = ["event_lists"]

Path = tuple[int, ...]


class _Engine:
    """The blocks that one instance has announced: paths of branches, and how many copies of each."""

    def __init__(self, instance: str) -> None:
        self.instance = instance
        self.held: dict[Path, int] = {}

    def store(self, parent: Path, branches: list[int]) -> list[Path]:
        paths = [(*parent, *branches[: n + 1]) for n in range(len(branches))]
        for path in paths:
            self.held[path] = self.held.get(path, 0) + 1
        return paths

    def remove(self, paths: list[Path]) -> None:
        for path in paths:
            self.held[path] -= 1
            if not self.held[path]:
                del self.held[path]

    def tails(self) -> list[Path]:
        """Blocks that no other held block continues."""
        continued = {path[:-1] for path in self.held}
        return [path for path in self.held if path not in continued]


@st.composite
def event_lists(
    draw: st.DrawFn,
    *,
    instances: tuple[str, ...] = ("i0", "i1"),
    block_size: int = 16,
    branches: int = 2,
    removal: Literal["tail_first", "any"] = "any",
    max_size: int = 12,
) -> list[Event]:
    """What engines may send, in order: applied to a router with these instances, nothing raises.

    A block is stored after its parent, which is held; a block that is stored again is a copy, and is
    removed as often. A removal names held blocks: ``"tail_first"`` those that no held block continues, as
    engines evict, ``"any"`` any. After ``InstanceRemoved`` that instance is silent. Equal content has one
    hash everywhere; hashes are all ints or all bytes, and content comes as tokens or as block keys.
    """
    engines = [_Engine(instance) for instance in instances]
    as_bytes, as_keys = draw(st.booleans()), draw(st.booleans())
    numbers: dict[Path, int] = {}

    def name(path: Path) -> EngineHash:
        number = numbers.setdefault(path, len(numbers))
        return number.to_bytes(32, "big") if as_bytes else number

    events: list[Event] = []
    for _ in range(draw(st.integers(0, max_size))):
        if not engines:
            break
        engine = draw(st.sampled_from(engines))
        kinds = ["stored", "stored", "removed", "removed"] if engine.held else ["stored", "stored"]
        kind = draw(st.sampled_from([*kinds, "cleared", "gone"]))
        if kind == "stored":
            parent = draw(st.sampled_from([(), *engine.held]))
            new = draw(st.lists(st.integers(0, branches - 1), min_size=1, max_size=3))
            events.append(
                BlockStored(
                    engine.instance,
                    block_hashes=[name(path) for path in engine.store(parent, new)],
                    parent_hash=name(parent) if parent else None,
                    block_size=block_size,
                    token_ids=None if as_keys else [branch for branch in new for _ in range(block_size)],
                    block_keys=np.array(new, dtype=np.uint64) if as_keys else None,
                )
            )
        elif kind == "removed":
            removed = []
            for _ in range(draw(st.integers(1, 3))):
                removable = engine.tails() if removal == "tail_first" else list(engine.held)
                if removable:
                    removed.append(draw(st.sampled_from(removable)))
                    engine.remove(removed[-1:])
            events.append(BlockRemoved(engine.instance, [name(path) for path in removed]))
        elif kind == "cleared":
            engine.held.clear()
            events.append(CacheCleared(engine.instance))
        else:
            engines.remove(engine)
            events.append(InstanceRemoved(engine.instance))
    return events
