"""Block keys in Python, on the xxhash package: the twin of the native hashing."""

import operator
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from mulsched.errors import InvalidArgument, InvalidTokens, InvalidType
from mulsched.types import Keys

__all__ = ["hash_blocks", "hash_text_blocks"]

_MAX_TOKEN = 2**32 - 1


def _as_uint32(tokens: Any) -> NDArray[np.uint32]:
    if isinstance(tokens, list | tuple):
        words = []
        for position, token in enumerate(tokens):
            if isinstance(token, bool) or not hasattr(token, "__index__"):
                raise InvalidType(
                    f"tokens must be integers, got {type(token).__name__} at position {position}"
                )
            word = operator.index(token)
            if not 0 <= word <= _MAX_TOKEN:
                raise InvalidTokens(f"tokens must lie in 0..2**32-1, got {word} at position {position}")
            words.append(word)
        return np.array(words, dtype=np.uint32)
    try:
        view = memoryview(tokens)
    except TypeError:
        raise InvalidType(
            f"tokens must be a list, tuple, array or buffer of integers, got {type(tokens).__name__}"
        ) from None
    if view.ndim != 1:
        raise InvalidArgument(f"tokens must have one dimension, got {view.ndim}")
    array = np.asarray(view)
    if array.dtype.kind not in "iu" or array.dtype.itemsize not in (4, 8) or not array.dtype.isnative:
        raise InvalidType(
            f"tokens must be 32-bit or 64-bit native integers, got buffer format {view.format!r}"
        )
    bad = (array < 0) | (array > _MAX_TOKEN)
    if bad.any():
        position = int(np.argmax(bad))
        raise InvalidTokens(f"tokens must lie in 0..2**32-1, got {array[position]} at position {position}")
    return np.ascontiguousarray(array, dtype=np.uint32)


def hash_blocks(tokens: Any, block_size: int, seed: int) -> Keys:
    """Return the key of each whole block; see ``block_keys``."""
    array = _as_uint32(tokens).astype("<u4", copy=False)
    raw = array.tobytes()
    width = 4 * block_size
    n_blocks = len(array) // block_size
    digests = (xxhash.xxh3_64_intdigest(raw[i * width : (i + 1) * width], seed=seed) for i in range(n_blocks))
    return np.fromiter(digests, dtype=np.uint64, count=n_blocks)


def hash_text_blocks(text: str, block_chars: int, seed: int) -> Keys:
    """Return the key of each whole block of characters; see ``text_block_keys``."""
    text.encode()  # so that a lone surrogate is reported at its place in the text
    n_blocks = len(text) // block_chars
    digests = (
        xxhash.xxh3_64_intdigest(text[i * block_chars : (i + 1) * block_chars].encode(), seed=seed)
        for i in range(n_blocks)
    )
    return np.fromiter(digests, dtype=np.uint64, count=n_blocks)
