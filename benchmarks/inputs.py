"""Sizes and inputs that the benchmarks share."""

import numpy as np

BLOCK_SIZE = 16
PROMPT_TOKENS = 8192
PROMPT_BLOCKS = PROMPT_TOKENS // BLOCK_SIZE
INSTANCES = 64


def shared_prefix_paths(blocks, seed=1):
    """Paths of 512 blocks: 32 that all share, 224 shared by 16 at a time, the rest private.

    Yields (holders, path) until the unique blocks reach ``blocks``: a group trunk is on 8 instances, a tail
    on one.
    """
    rng = np.random.default_rng(seed)
    words = lambda n: rng.integers(0, 2**64, n, dtype=np.uint64)  # noqa: E731
    system, unique = words(32), 32
    while unique < blocks:
        trunk = words(224)
        holders = rng.choice(INSTANCES, 8, replace=False)
        unique += 224
        for tail in range(16):
            unique += 256
            yield (holders[tail % 8 : tail % 8 + 1], np.concatenate([system, trunk, words(256)]))
        for holder in holders:
            yield ([holder], np.concatenate([system, trunk]))
