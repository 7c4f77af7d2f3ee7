"""Checks of the parameters of policies, and weighted random choice."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mulsched.errors import InvalidArgument, InvalidType
from mulsched.indicators import Columns

__all__ = ["at_least", "weighted_race", "whole_at_least"]


def at_least(value: Any, name: str, least: float, *, most: float = math.inf) -> float:
    """Return a parameter as float. Raises InvalidType, InvalidArgument (not finite, out of range)."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise InvalidType(f"{name} must be a number, got {type(value).__name__}")
    if not (math.isfinite(value) and least <= value <= most):
        wanted = f"at least {least:g}" if most == math.inf else f"in {least:g}..{most:g}"
        raise InvalidArgument(f"{name} must be finite and {wanted}, got {value}")
    return float(value)


def whole_at_least(value: Any, name: str, least: int) -> int:
    """Return a count as int; 1.5 is refused, not cut. Raises InvalidType, InvalidArgument (out of range)."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InvalidType(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise InvalidArgument(f"{name} must be at least {least}, got {value}")
    return int(value)


def weighted_race(columns: Columns, log_weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return scores whose minimum falls on each candidate with probability in proportion to its weight.

    The first of independent exponential clocks with those rates rings (Efraimidis and Spirakis 2006); in
    logarithms, so that no weight under- or overflows. Scores may be negative.
    """
    clocks = np.maximum(-np.log1p(-columns.uniform), np.finfo(np.float64).tiny)
    scores: NDArray[np.float64] = np.log(clocks) - log_weights
    return scores
