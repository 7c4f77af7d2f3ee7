"""What crosses the edge of the engine model: a step's load, its results, and changes of the cache."""

from dataclasses import dataclass, field
from typing import NamedTuple

from mulsched.types import Keys

__all__ = ["CacheChange", "StepLoad", "StepResult"]


@dataclass(frozen=True, slots=True)
class CacheChange:
    """Keys that were cached after ``parent`` (None: at a prompt's start), or that were evicted.

    As vLLM's events do, it tells of copies: a key that is cached twice is stored twice and evicted twice.
    """

    keys: Keys
    parent: int | None
    stored: bool


class StepLoad(NamedTuple):
    """What a step computes: the arguments of :class:`~mulsched.replay.profile.StepTime`."""

    new_tokens: int
    prefix_tokens: float
    decode_batch: int
    decode_context: float


@dataclass(slots=True)
class StepResult:
    """What a step brought. ``first_tokens`` pairs a request with the prompt tokens it found cached."""

    first_tokens: list[tuple[int, int]] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)
