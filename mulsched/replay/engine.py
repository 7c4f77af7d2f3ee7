"""A model of one serving engine: continuous batching over a paged prefix cache, as in vLLM v1.

The twins ``_native`` and ``_engine_py`` behave the same; the rules are in the docstring of the latter.
What the model leaves out: speculative decoding, sliding windows, and stop strings: a request makes
``output_tokens`` tokens.

The engine knows neither routers nor a clock: the caller starts a step at a time and ends it at the time that
``start_step`` returns.
"""

from typing import TYPE_CHECKING

from mulsched._backend import BACKEND
from mulsched.errors import InvalidArgument
from mulsched.prefix_index import as_keys
from mulsched.replay.profile import Profile
from mulsched.replay.step import CacheChange, StepResult
from mulsched.types import Keys

if TYPE_CHECKING or BACKEND == "python":
    from mulsched.replay._engine_py import EnginePy as _Engine
else:
    from mulsched.replay._native import EngineNative as _Engine

__all__ = ["EngineModel"]


class EngineModel:
    """One engine. O(1) a step of the native twin, plus O(blocks) a request.

    ``kv_blocks`` replaces the profile's. Raises InvalidArgument unless the token budget of a step covers a
    token for each of ``max_num_seqs`` requests, which vLLM demands too.
    """

    def __init__(self, profile: Profile, *, kv_blocks: int | None = None) -> None:
        self._profile = profile
        self._kv_blocks = profile.kv_blocks if kv_blocks is None else kv_blocks
        self._engine = _Engine(*profile.limits(self._kv_blocks))
        self._stepping = False

    def submit(
        self,
        request: int,
        keys: Keys,
        prompt_tokens: int,
        output_tokens: int,
        *,
        transferred_tokens: int = 0,
    ) -> None:
        """Put a request into the waiting queue.

        ``keys`` name its full blocks, those of the prompt and then of the answer; blocks beyond them are not
        cached. Each must stand for its block and all before it, as an engine's hashes do: keys that
        ``mulsched.block_keys`` made of single blocks would match at any depth. ``transferred_tokens`` of the
        prompt have their KV from another engine.
        Raises InvalidArgument (counts below 1, too many keys, more than the cache could hold).
        """
        path = as_keys(keys)
        if prompt_tokens < 1 or output_tokens < 1:
            raise InvalidArgument(
                f"request {request} needs at least one prompt and one output token, "
                f"got {prompt_tokens} and {output_tokens}"
            )
        if not 0 <= transferred_tokens <= prompt_tokens:
            raise InvalidArgument(
                f"transferred_tokens must lie in 0..{prompt_tokens}, got {transferred_tokens}"
            )
        total, size = prompt_tokens + output_tokens, self._profile.block_size
        if len(path) > total // size:
            raise InvalidArgument(f"{total} tokens have {total // size} full blocks, got {len(path)} keys")
        needed = -(-total // size)
        if needed > self._kv_blocks:
            raise InvalidArgument(
                f"request {request} needs {needed} blocks, the engine has {self._kv_blocks}"
            )
        self._engine.submit(request, path, prompt_tokens, output_tokens, transferred_tokens)

    @property
    def stepping(self) -> bool:
        """Whether a step has been started and not ended."""
        return self._stepping

    @property
    def preemptions(self) -> int:
        """How often a request was taken off for want of blocks."""
        return self._engine.preemptions

    def start_step(self, now: float) -> float | None:
        """Start a step at ``now``; return when it ends, or None if there is nothing to do.

        Raises InvalidArgument while a step is under way.
        """
        if self._stepping:
            raise InvalidArgument("a step is under way: end it first")
        load = self._engine.start_step()
        self._stepping = load is not None
        return None if load is None else now + load.seconds(self._profile.step_time)

    def end_step(self) -> StepResult:
        """End the step. Raises InvalidArgument if none is under way."""
        if not self._stepping:
            raise InvalidArgument("no step is under way: start one first")
        self._stepping = False
        return self._engine.end_step()

    def take_changes(self) -> list[CacheChange]:
        """Return what changed in the cache since the last call, in order."""
        return self._engine.take_changes()

    def cached_keys(self) -> set[int]:
        """Return every key that is cached now."""
        return self._engine.cached_keys()

    def check(self) -> None:
        """Verify that no block is lost or shared wrongly; AssertionError says what is wrong."""
        self._engine.check()
