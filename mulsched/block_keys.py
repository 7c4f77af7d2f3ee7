"""Block keys: a 64-bit content hash of each block of a prompt.

A key is XXH3-64 of the block's tokens as little-endian uint32, with a seed; keys are not chained, since
the tree gives the chain. With the default seed they equal Dynamo's and smg's local block hashes.

A namespace changes the seed, so equal tokens in different namespaces have different keys. A LoRA adapter
alone seeds with ``seed + xxh3_64(name)``, the convention of Dynamo and smg; other namespaces seed with the
hash of all their fields. A cache salt goes into the first key of a prompt alone, as in vLLM, whose events
name it there only: what follows is reached through the first block. A block with multimodal content hashes
that content's identifier with the key as seed, so that placeholder tokens alone never match.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from mulsched._backend import BACKEND
from mulsched.errors import InvalidArgument, InvalidType
from mulsched.types import EngineHash, Keys, Namespace

if BACKEND == "native":
    from mulsched._native import hash_blocks, hash_text_blocks
else:
    from mulsched._block_keys_py import hash_blocks, hash_text_blocks

__all__ = [
    "DEFAULT_SEED",
    "block_keys",
    "engine_hash",
    "hash_blocks",
    "namespace_seed",
    "path_hashes",
    "text_block_keys",
]

DEFAULT_SEED = 1337
"""The seed that Dynamo and smg use for local block hashes."""

_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that its powers never vanish modulo 2**64

Tokens = Sequence[int] | NDArray[np.integer] | memoryview


def _check_positive(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InvalidType(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise InvalidArgument(f"{name} must be at least 1, got {value}")
    if value >= 2**63:
        raise InvalidArgument(f"{name} must be below 2**63, got {value}")
    return int(value)


def namespace_seed(namespace: Namespace | None, seed: int = DEFAULT_SEED) -> int:
    """Return the seed of a namespace's first key, in 0..2**64-1; without a cache salt, of all its keys.

    Raises InvalidType (not a Namespace, not an int), InvalidArgument (seed outside 64 bits,
    a lone surrogate).
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise InvalidType(f"seed must be an int, got {type(seed).__name__}")
    if not 0 <= seed < 2**64:
        raise InvalidArgument(f"seed must lie in 0..2**64-1, got {seed}")
    if namespace is None:
        return int(seed)
    if not isinstance(namespace, Namespace):
        raise InvalidType(f"namespace must be a Namespace or None, got {type(namespace).__name__}")
    lora, model, cache_salt = (
        _encode_field(name, getattr(namespace, name)) for name in ("lora", "model", "cache_salt")
    )
    if model is None and cache_salt is None:
        return int(seed) if lora is None else (int(seed) + xxhash.xxh3_64_intdigest(lora)) % 2**64
    # Each field is preceded by its length, so that no two different namespaces encode alike.
    encoded = b"".join(
        b"\xff" if field is None else len(field).to_bytes(8, "little") + field
        for field in (lora, model, cache_salt)
    )
    return xxhash.xxh3_64_intdigest(encoded, seed=int(seed))


def _seeds(namespace: Namespace | None, seed: int) -> tuple[int, int]:
    """Return the seed of a prompt's first block and that of the others."""
    first = namespace_seed(namespace, seed)
    if namespace is None or namespace.cache_salt is None:
        return first, first
    return first, namespace_seed(replace(namespace, cache_salt=None), seed)


def _encode_field(name: str, value: Any) -> bytes | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise InvalidType(f"{name} of a namespace must be a str or None, got {type(value).__name__}")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(
            f"{name} of a namespace must be valid Unicode, got a lone surrogate at {error.start}"
        ) from None


def block_keys(
    tokens: Tokens,
    block_size: int,
    *,
    namespace: Namespace | None = None,
    seed: int = DEFAULT_SEED,
    extra_keys: Sequence[bytes | None] | None = None,
) -> Keys:
    """Return one key per whole block of ``tokens``, shape ``(len(tokens) // block_size,)`` uint64.

    ``tokens``: list, tuple, numpy (u)int32 or (u)int64 array, ``array`` or any buffer of these, one
    dimension, each in 0..2**32-1. A partial block at the end has no key: engines cache whole blocks only.
    ``extra_keys``: per block the identifier of the multimodal content in it, or None. O(tokens).

    Raises InvalidTokens (with the position), InvalidType, InvalidArgument (block_size below 1, as many
    extra_keys as blocks wanted).
    """
    size = _check_positive(block_size, "block_size")
    first_seed, rest_seed = _seeds(namespace, seed)
    keys = hash_blocks(tokens, size, rest_seed)
    if first_seed != rest_seed and len(keys) > 0:
        start = tokens[:size] if isinstance(tokens, list | tuple) else np.asarray(tokens)[:size]
        keys[:1] = hash_blocks(start, size, first_seed)
    if extra_keys is not None:
        if not isinstance(extra_keys, Sequence):
            raise InvalidType(
                f"extra_keys must be a sequence of bytes or None, got {type(extra_keys).__name__}"
            )
        if len(extra_keys) != len(keys):
            raise InvalidArgument(f"{len(keys)} blocks need as many extra_keys, got {len(extra_keys)}")
        for position, extra in enumerate(extra_keys):
            if extra is None:
                continue
            if not isinstance(extra, bytes):
                raise InvalidType(
                    f"extra_keys must be bytes or None, got {type(extra).__name__} at position {position}"
                )
            keys[position] = xxhash.xxh3_64_intdigest(extra, seed=int(keys[position]))
    return keys


def text_block_keys(
    text: str, block_chars: int, *, namespace: Namespace | None = None, seed: int = DEFAULT_SEED
) -> Keys:
    """Return one key per whole block of ``block_chars`` characters, for routers without a tokenizer.

    A key is XXH3-64 of the block's UTF-8 bytes, seeded like token keys. Shape
    ``(len(text) // block_chars,)`` uint64; O(text).

    Raises InvalidType, InvalidArgument (block_chars below 1, a lone surrogate in the text).
    """
    if not isinstance(text, str):
        raise InvalidType(f"text must be a str, got {type(text).__name__}")
    size = _check_positive(block_chars, "block_chars")
    try:
        # the exact str of a subclass, whatever the subclass does
        exact = str.__str__(text)
        first_seed, rest_seed = _seeds(namespace, seed)
        keys = hash_text_blocks(exact, size, rest_seed)
        if first_seed != rest_seed:
            keys[:1] = hash_text_blocks(exact[:size], size, first_seed)
        return keys
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"text must be valid Unicode, got a lone surrogate at {error.start}") from None


def engine_hash(value: EngineHash) -> int:
    """Return an engine's block hash as a number in 0..2**64-1.

    An int within 64 bits, signed or not, keeps its bits; bytes are hashed with XXH3-64.
    Raises InvalidType, InvalidArgument (an int outside -2**63..2**64-1).
    """
    if isinstance(value, bytes):
        return xxhash.xxh3_64_intdigest(value)
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InvalidType(f"an engine hash must be an int or bytes, got {type(value).__name__}")
    number = int(value)  # first: a numpy scalar compares with large ints ten times slower
    if not -(2**63) <= number < 2**64:
        raise InvalidArgument(f"an engine hash must fit into 64 bits, got {value}")
    return number % 2**64


def path_hashes(keys: Keys) -> Keys:
    """Return for each block a 64-bit hash of it and all before it: a polynomial in the keys. O(blocks).

    The keys are hashes already, so a sum in which each position has its own odd factor keeps paths apart.
    """
    n = len(keys)
    powers = np.full(n, _FACTOR).cumprod(dtype=np.uint64)
    hashes: Keys = (keys * powers).cumsum(dtype=np.uint64) ^ np.arange(1, n + 1, dtype=np.uint64)
    return hashes
