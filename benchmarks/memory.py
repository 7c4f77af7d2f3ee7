"""Bytes a block: what the index says, and what the operating system says that the process grew by.

python benchmarks/memory.py {named,bounded} BLOCKS

One instance is filled with BLOCKS blocks in sequences of 512. A process of its own, since a heap that
others have used takes new blocks without growing. MULSCHED_BACKEND chooses the twin. Linux only.
"""

import gc
import json
import resource
import sys
from pathlib import Path

import numpy as np

from mulsched import PrefixIndex

EVENT = 64
SEQUENCE = 512


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def filled(kind: str, blocks: int) -> PrefixIndex:
    index, rng = PrefixIndex(), np.random.default_rng(8)
    named = kind == "named"
    index.add_instance("a", engine_hashes=named, capacity_blocks=None if named else blocks)
    for _ in range(blocks // SEQUENCE):
        keys = rng.integers(0, 2**64, SEQUENCE, dtype=np.uint64)
        if not named:
            index.store("a", keys)
            continue
        for start in range(0, SEQUENCE, EVENT):
            event = keys[start : start + EVENT]
            index.store("a", event, parent=int(keys[start - 1]) if start else None, engine_hashes=event)
    return index


def main(kind: str, blocks: int) -> None:
    filled(kind, SEQUENCE)  # what is allocated once, whatever the size
    gc.collect()
    before = resident_bytes()
    index = filled(kind, blocks)
    grown = resident_bytes() - before
    held = index.blocks("a")
    report = {
        "blocks": held,
        "accounted_bytes_per_block": round(index.memory()["total"] / held, 1),
        "resident_bytes_per_block": round(grown / held, 1),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
