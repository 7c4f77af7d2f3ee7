"""The engine that the mock serves: the model of replay, one token at a time, with aborts. No clock.

The model's readable twin is used, since the native one accounts for decoding lazily and cannot say which
requests a step gives a token to. It does the same, to the last bit (tests/replay/test_engine.py).
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from mulsched.block_keys import namespace_seed
from mulsched.errors import DuplicateRequest, InvalidArgument
from mulsched.replay._engine_py import EnginePy
from mulsched.replay.profile import Profile
from mulsched.replay.step import CacheChange
from mulsched.types import BlockRemoved, BlockStored, CacheCleared, Keys, Namespace

__all__ = ["MockEngine", "MockEvent", "Step", "Tokens"]

Tokens = NDArray[np.uint32]
"""Token ids, shape ``(n_tokens,)``."""

MockEvent = BlockStored | BlockRemoved | CacheCleared


@dataclass(frozen=True, slots=True)
class Step:
    """What a step brought when it ended, at ``end_s``.

    ``tokens``: the requests that gained one, in the order of admission. ``cached_tokens``: of those that
    gained their first, how many tokens of the prompt were found cached. ``finished``: those that are done.
    """

    end_s: float
    tokens: list[int]
    cached_tokens: dict[int, int]
    finished: list[int]
    events: list[MockEvent]


class _Scheduler(EnginePy):
    """The twin, with what only a server asks of it."""

    def due(self) -> list[int]:
        """Return the requests that gain a token when the step under way ends."""
        return [s.request for s, tokens in self.planned if s.computed + tokens >= s.known]

    def abort(self, request: int) -> None:
        """Forget a request between steps, as vLLM does: what it filled stays cached. O(requests)."""
        for sequence in self.waiting:
            if sequence.request == request:
                self.waiting.remove(sequence)
                return
        for sequence in self.running:
            if sequence.request == request:
                self.running.remove(sequence)
                if self.partial is sequence:
                    self.partial = None
                self._release(sequence)
                return


@dataclass(slots=True)
class _Block:
    """A block's content, as long as a request that has it lives: what events tell of it."""

    tokens: Tokens
    cache_salt: str | None
    users: int = 0


@dataclass(frozen=True, slots=True)
class _Request:
    keys: list[int]
    prompt_tokens: int


class MockEngine:
    """One engine, driven by whoever has a clock: ``advance(now)`` until ``next_s``.

    ``name`` is the instance in its events. ``hash_seed``: engines with different seeds give the same block
    different hashes, as vLLM's do. Times are in seconds, on any clock. Not thread-safe.
    """

    def __init__(
        self, name: str, profile: Profile, *, kv_blocks: int | None = None, hash_seed: int = 0
    ) -> None:
        self.name = name
        self.profile = profile
        self.kv_blocks = profile.kv_blocks if kv_blocks is None else kv_blocks
        if self.kv_blocks < 1:
            raise InvalidArgument(f"kv_blocks must be at least 1, got {kv_blocks}")
        if profile.schedules_ahead:
            raise InvalidArgument(f"the mock engine does not schedule ahead, but {profile.name} does")
        self.next_s: float | None = None
        """When the step under way ends; None if there is none."""
        self.counts: Counter[str] = Counter()
        """``prompt_tokens`` and, of these, ``cached_tokens`` of requests that have their first token."""
        self._hash_seed = hash_seed
        self._requests: dict[int, _Request] = {}
        self._aborted: list[int] = []
        self._blocks: dict[int, _Block] = {}
        self._scheduler = _Scheduler(*profile.limits(self.kv_blocks))

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest request, prompt and answer together: what the cache holds."""
        return self.kv_blocks * self.profile.block_size

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._scheduler.waiting)

    @property
    def kv_usage_ratio(self) -> float:
        """Share of the blocks that requests hold; cached blocks that nobody uses are free."""
        return 1 - self._scheduler.pool.n_free() / self.kv_blocks

    @property
    def preemptions(self) -> int:
        """How often a request was taken off for want of blocks."""
        return self._scheduler.preemptions

    def submit(self, request: int, prompt: Tokens, answer: Tokens, *, cache_salt: str | None = None) -> None:
        """Queue a request that will be answered by ``answer``. O(tokens).

        Raises DuplicateRequest, InvalidArgument (no prompt, no answer, more than :attr:`max_model_len`).
        """
        if request in self._requests:
            raise DuplicateRequest(f"request {request} is under way")
        if len(prompt) == 0 or len(answer) == 0:
            raise InvalidArgument(
                f"request {request} needs a prompt and an answer, got {len(prompt)} and {len(answer)} tokens"
            )
        total = len(prompt) + len(answer)
        if total > self.max_model_len:
            raise InvalidArgument(
                f"request {request} needs {total} tokens, the cache holds {self.max_model_len}"
            )
        keys = self._track(np.concatenate([prompt, answer]).astype(np.uint32, copy=False), cache_salt)
        self._requests[request] = _Request(keys, len(prompt))
        self._scheduler.submit(request, np.array(keys, dtype=np.uint64), len(prompt), len(answer), 0)

    def abort(self, request: int) -> None:
        """Drop a request: at once, or when the step under way ends. Nothing if it is not there."""
        if request not in self._requests or request in self._aborted:
            return
        self._aborted.append(request)
        if self.next_s is None:
            self._drop_aborted()

    def reset_prefix_cache(self) -> CacheCleared | None:
        """Drop the cache; None, and nothing done, while a request is under way, as in vLLM."""
        if self._requests:
            return None
        preemptions = self._scheduler.preemptions
        self._scheduler = _Scheduler(*self.profile.limits(self.kv_blocks))
        self._scheduler.preemptions = preemptions
        return CacheCleared(self.name)

    def advance(self, now: float) -> Step | None:
        """End the step under way if it is due, and start the next; return the step that ended.

        A step that follows another starts when that ended, however late this is called, so that delays do
        not add up: call again until it returns None. O(running).
        """
        step = None
        start = now
        if self.next_s is not None:
            if self.next_s > now:
                return None
            start = self.next_s
            step = self._end_step(start)
        load = self._scheduler.start_step()
        self.next_s = None if load is None else start + load.seconds(self.profile.step_time)
        return step

    def check(self) -> None:
        """Verify the blocks; AssertionError says what is wrong."""
        self._scheduler.check()
        users = Counter(key for request in self._requests.values() for key in set(request.keys))
        assert users == {key: block.users for key, block in self._blocks.items()}, "users are miscounted"

    def cached_keys(self) -> set[int]:
        """Return the hashes of all cached blocks."""
        return self._scheduler.cached_keys()

    def _end_step(self, end_s: float) -> Step:
        aborted = set(self._aborted)
        tokens = [request for request in self._scheduler.due() if request not in aborted]
        result = self._scheduler.end_step()
        cached = {request: hit for request, hit in result.first_tokens if request not in aborted}
        for request, hit in cached.items():
            self.counts["prompt_tokens"] += self._requests[request].prompt_tokens
            self.counts["cached_tokens"] += hit
        events: list[MockEvent] = [self._event(change) for change in self._scheduler.take_changes()]
        self._drop_aborted()
        finished = [request for request in result.finished if request not in aborted]
        for request in finished:
            self._forget(request)
        return Step(end_s, tokens, cached, finished, events)

    def _drop_aborted(self) -> None:
        for request in self._aborted:
            self._scheduler.abort(request)
            self._forget(request)
        self._aborted = []

    def _forget(self, request: int) -> None:
        for key in self._requests.pop(request).keys:
            block = self._blocks[key]
            block.users -= 1
            if block.users == 0:
                del self._blocks[key]

    def _track(self, tokens: Tokens, cache_salt: str | None) -> list[int]:
        """Return the hashes of full blocks, each of its tokens with the hash before it as seed."""
        size = self.profile.block_size
        data = memoryview(tokens.astype("<u4", copy=False).tobytes())
        digest = xxhash.xxh3_64_intdigest
        key = namespace_seed(Namespace(cache_salt=cache_salt), self._hash_seed)
        keys = []
        for start in range(0, len(tokens) - size + 1, size):
            key = digest(data[4 * start : 4 * (start + size)], key)
            keys.append(key)
            block = self._blocks.get(key)
            if block is None:
                block = self._blocks[key] = _Block(tokens[start : start + size], cache_salt)
            block.users += 1
        return keys

    def _event(self, change: CacheChange) -> BlockStored | BlockRemoved:
        keys: Keys = change.keys
        if not change.stored:
            return BlockRemoved(self.name, keys)
        blocks = [self._blocks[key] for key in keys.tolist()]
        salt = blocks[0].cache_salt
        return BlockStored(
            self.name,
            keys,
            change.parent,
            self.profile.block_size,
            token_ids=np.concatenate([block.tokens for block in blocks]),
            namespace=None if salt is None else Namespace(cache_salt=salt),
        )
