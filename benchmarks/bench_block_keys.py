"""Block keys of a prompt of 8,192 tokens."""

import numpy as np
import pytest
import xxhash
from inputs import BLOCK_SIZE, PROMPT_TOKENS

from mulsched import _block_keys_py, _native

TOKENS = np.random.default_rng(0).integers(0, 100_000, PROMPT_TOKENS, dtype=np.uint32)
TEXT = "".join(chr(97 + t % 26) for t in TOKENS.tolist()) * 4


def xxhash_package(tokens):
    raw, width = tokens.tobytes(), 4 * BLOCK_SIZE
    return [xxhash.xxh3_64_intdigest(raw[i : i + width], seed=1337) for i in range(0, len(raw), width)]


def describe(benchmark, keys, **sizes):
    benchmark.extra_info |= sizes | {"blocks": len(keys)}


HASHERS = {
    "native": lambda tokens: _native.hash_blocks(tokens, BLOCK_SIZE, 1337),
    "python": lambda tokens: _block_keys_py.hash_blocks(tokens, BLOCK_SIZE, 1337),
}


@pytest.mark.benchmark(group="block keys, 8,192 tokens, uint32 array")
@pytest.mark.parametrize("name", [*HASHERS, "xxhash"])
def bench_array(benchmark, name):
    keys = benchmark({**HASHERS, "xxhash": xxhash_package}[name], TOKENS)
    assert len(keys) == PROMPT_TOKENS // BLOCK_SIZE
    describe(benchmark, keys, tokens=PROMPT_TOKENS)


@pytest.mark.benchmark(group="block keys, 8,192 tokens, list")
@pytest.mark.parametrize("name", HASHERS)
def bench_list(benchmark, name):
    keys = benchmark(HASHERS[name], TOKENS.tolist())
    assert len(keys) == PROMPT_TOKENS // BLOCK_SIZE
    describe(benchmark, keys, tokens=PROMPT_TOKENS)


@pytest.mark.benchmark(group="block keys, 32,768 characters")
@pytest.mark.parametrize("module", [_native, _block_keys_py], ids=["native", "python"])
def bench_text(benchmark, module):
    keys = benchmark(module.hash_text_blocks, TEXT, 64, 1337)
    assert len(keys) == 512
    describe(benchmark, keys, characters=len(TEXT))
