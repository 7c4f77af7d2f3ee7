"""What crosses the edge of the engine model: a step's load, its results, and changes of the cache."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from mulsched.types import Keys

if TYPE_CHECKING:
    from mulsched.replay.step_time import StepTime

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
    """What a step computes: the arguments of :class:`~mulsched.replay.profile.StepTime`.

    ``pair_prefix_tokens``: the prefix with which one prompt of ``new_tokens`` would attend to as many pairs
    of tokens as the step's prompts do, ``new * (prefix + new / 2)``. Below 0 where several begin in one step.
    """

    new_tokens: int
    prefix_tokens: float
    decode_batch: int
    decode_context: float
    pair_prefix_tokens: float

    def seconds(self, step_time: "StepTime") -> float:
        """Return how long the step takes."""
        pairs = getattr(step_time, "counts_pairs", False)
        prefix = self.pair_prefix_tokens if pairs else self.prefix_tokens
        return step_time(self.new_tokens, prefix, self.decode_batch, self.decode_context)


@dataclass(slots=True)
class StepResult:
    """What a step brought. ``first_tokens`` pairs a request with the prompt tokens it found cached."""

    first_tokens: list[tuple[int, int]] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)
