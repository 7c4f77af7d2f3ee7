"""The readable twin of the core's readers of msgpack."""

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = ["split_kv_events", "unpack_uint32", "unpack_uint64"]

_decode = msgspec.msgpack.Decoder(list[int]).decode


def _unpack(data: Any) -> list[int] | None:
    try:
        return _decode(data)
    except (msgspec.DecodeError, RecursionError):
        return None


def unpack_uint32(data: Any) -> NDArray[np.uint32] | None:
    """Return a msgpack array of integers in 0..2**32-1; None if data is anything else."""
    numbers = _unpack(data)
    if numbers is None or not all(0 <= n < 2**32 for n in numbers):
        return None
    return np.array(numbers, dtype=np.uint32)


def unpack_uint64(data: Any) -> NDArray[np.uint64] | None:
    """Return a msgpack array of integers as 64-bit words, also negative ones; None if data is not one."""
    numbers = _unpack(data)
    return None if numbers is None else np.array([n % 2**64 for n in numbers], dtype=np.uint64)


def split_kv_events(data: bytes, group_idx: int, max_parts: int) -> None:
    """Leave every batch to the decoder of single events."""
