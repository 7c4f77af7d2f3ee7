"""A model of one serving engine: continuous batching over a paged prefix cache.

It follows vLLM v1 in outline: a FCFS waiting queue; each step gives one token to every decoding request
first and spends the rest of the token budget on prefill chunks; full prompt blocks are cached under their
keys; blocks of requests that are done wait in a free queue, a request's tail before its head, and the front
of the queue is evicted; when a decoding request finds no block, the last admitted request is preempted and
computed again later. Blocks become visible to other requests at the end of the step that computes them.
Output tokens occupy blocks but are not cached under a key, since a trace does not say what they are.

The engine knows neither routers nor a clock: the caller starts a step at a time and ends it at the time that
``start_step`` returns.
"""

from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np

from mulsched.errors import InvalidArgument
from mulsched.replay.profile import Profile
from mulsched.types import Keys

__all__ = ["CacheChange", "EngineModel", "StepResult"]


@dataclass(frozen=True, slots=True)
class CacheChange:
    """Keys that were cached after ``parent`` (None: at a prompt's start), or that were evicted."""

    keys: Keys
    parent: int | None
    stored: bool


@dataclass(slots=True)
class StepResult:
    """What a step brought. ``first_tokens`` pairs a request with the prompt tokens it found cached."""

    first_tokens: list[tuple[Hashable, int]] = field(default_factory=list)
    finished: list[Hashable] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Sequence:
    """A request inside the engine."""

    request_id: Hashable
    keys: list[int]
    prompt_tokens: int
    output_tokens: int
    computed: int = 0  # tokens with KV, as of the last step that was not decode
    target: int = 0  # tokens to prefill: the prompt, and after a preemption what was generated too
    generated: int = 0
    cached_tokens: int = -1  # found at the first admission
    blocks: list[int] = field(default_factory=list)
    registered: int = 0  # leading blocks that are cached under their keys
    joined: int = -1  # tick at which decoding began, -1 while not decoding


class EngineModel:
    """One engine. O(1) a decode step, plus a block in ``block_size`` steps for each decoding request."""

    def __init__(self, profile: Profile, *, kv_blocks: int | None = None) -> None:
        self._profile = profile
        self._block_size = profile.block_size
        self._kv_blocks = profile.kv_blocks if kv_blocks is None else kv_blocks
        self._waiting: deque[_Sequence] = deque()
        self._running: dict[int, _Sequence] = {}  # in the order of admission, by id()
        self._prefilling: list[_Sequence] = []
        # decode is accounted lazily: all decoding requests gain one token per tick
        self._tick = 0
        self._decoding = 0
        self._decode_context = 0
        self._done: list[tuple[int, int, _Sequence]] = []
        self._boundary: list[dict[int, _Sequence]] = [{} for _ in range(self._block_size)]
        self._order = 0
        # paged cache; the front of the free queue is evicted next
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(self._kv_blocks))
        self._key_of: dict[int, int] = {}
        self._block_of: dict[int, int] = {}
        self._references: dict[int, int] = {}
        self._chunks: list[tuple[_Sequence, int]] = []
        self._decoded = False
        self._stepping = False
        self._changes: list[CacheChange] = []
        self._evicted: list[int] = []
        self.preemptions = 0

    def submit(self, request_id: Hashable, keys: Keys, prompt_tokens: int, output_tokens: int) -> None:
        """Put a request into the waiting queue.

        Raises InvalidArgument if the cache could not hold it even alone.
        """
        needed = -(-(prompt_tokens + output_tokens) // self._block_size)
        if needed > self._kv_blocks:
            raise InvalidArgument(
                f"request {request_id!r} needs {needed} blocks, the engine has {self._kv_blocks}"
            )
        self._waiting.append(
            _Sequence(request_id, keys.tolist(), prompt_tokens, output_tokens, target=prompt_tokens)
        )

    @property
    def stepping(self) -> bool:
        """Whether a step has been started and not ended."""
        return self._stepping

    def take_changes(self) -> list[CacheChange]:
        """Return what changed in the cache since the last call, in order."""
        self._flush_evicted()
        changes, self._changes = self._changes, []
        return changes

    # -- a step ------------------------------------------------------------------------------------

    def start_step(self, now: float) -> float | None:
        """Schedule a step that starts at ``now``; return when it ends, or None if there is nothing to do."""
        budget = self._schedule_decode()
        context = self._decode_context / self._decoding if self._decoding else 0.0
        batch = self._decoding
        new_tokens, prefix_sum = self._schedule_prefill(budget - batch)
        if not batch and not new_tokens:
            return None
        self._decoded = batch > 0
        self._stepping = True
        prefix = prefix_sum / new_tokens if new_tokens else 0.0
        return now + self._profile.step_time(new_tokens, prefix, batch, context)

    def end_step(self) -> StepResult:
        """End the step: count tokens, cache what was computed, release what is done."""
        result = StepResult()
        if self._decoded:
            self._tick += 1
            self._decode_context += self._decoding
            while self._done and self._done[0][0] <= self._tick:
                tick, _, sequence = heappop(self._done)
                # entries of sequences that were preempted meanwhile are out of date
                if sequence.joined >= 0 and self._finish_tick(sequence) == tick:
                    self._leave_decode(sequence)
                    self._finish(sequence, result)
        for sequence, chunk in self._chunks:
            sequence.computed += chunk
            self._register(sequence)
            if sequence.computed < sequence.target:
                continue
            self._prefilling.remove(sequence)
            if sequence.generated == 0:
                result.first_tokens.append((sequence.request_id, sequence.cached_tokens))
            sequence.generated += 1
            if sequence.generated >= sequence.output_tokens:
                self._finish(sequence, result)
            else:
                self._join_decode(sequence)
        self._chunks = []
        self._stepping = self._decoded = False
        return result

    def _schedule_decode(self) -> int:
        """Give a block to every decoding request that needs one, preempting from the back."""
        for sequence in list(self._boundary[self._tick % self._block_size].values()):
            if sequence.joined < 0:
                continue  # preempted for the sake of an earlier one
            while not self._free:
                victim = next(reversed(self._running.values()))
                self._preempt(victim)
                if victim is sequence:
                    break
            if sequence.joined >= 0:
                sequence.blocks.append(self._take_block())
        return self._profile.max_batched_tokens

    def _schedule_prefill(self, budget: int) -> tuple[int, int]:
        """Fill the budget with prefill chunks; return their tokens and the sum of token * prefix."""
        total = prefix_sum = 0
        for sequence in list(self._prefilling):
            if budget <= 0:
                break
            chunk = self._allocate(sequence, min(budget, sequence.target - sequence.computed))
            if chunk == 0:
                return total, prefix_sum  # no room for those that run: admit nobody
            total, prefix_sum = total + chunk, prefix_sum + chunk * sequence.computed
            budget -= chunk
        while budget > 0 and self._waiting and len(self._running) < self._profile.max_num_seqs:
            sequence = self._waiting[0]
            chunk = self._admit(sequence, budget)
            if chunk == 0:
                break
            total, prefix_sum = total + chunk, prefix_sum + chunk * sequence.computed
            budget -= chunk
        return total, prefix_sum

    def _admit(self, sequence: _Sequence, budget: int) -> int:
        """Admit the head of the waiting queue with its cached prefix; return its first chunk, 0 for no."""
        hits: list[int] = []
        # the last token is always computed, so a full hit leaves its last block out
        for key in sequence.keys[: (sequence.target - 1) // self._block_size]:
            block = self._block_of.get(key)
            if block is None:
                break
            hits.append(block)
        cached = len(hits) * self._block_size
        chunk = min(budget, sequence.target - cached)
        idle_hits = sum(1 for block in hits if block in self._free)
        needed = -(-(cached + chunk) // self._block_size) - len(hits)
        if needed > len(self._free) - idle_hits:
            return 0
        for block in hits:
            self._references[block] = self._references.get(block, 0) + 1
            self._free.pop(block, None)
        self._waiting.popleft()
        sequence.blocks = hits
        sequence.registered = len(hits)
        sequence.computed = cached
        if sequence.cached_tokens < 0:
            sequence.cached_tokens = cached
        self._running[id(sequence)] = sequence
        self._prefilling.append(sequence)
        return self._allocate(sequence, chunk)

    def _allocate(self, sequence: _Sequence, chunk: int) -> int:
        """Give blocks for the next chunk; return the tokens there is room for."""
        needed = -(-(sequence.computed + chunk) // self._block_size) - len(sequence.blocks)
        if needed > len(self._free):
            needed = len(self._free)
            chunk = (len(sequence.blocks) + needed) * self._block_size - sequence.computed
            if chunk <= 0:
                return self._make_room(sequence)
        for _ in range(needed):
            sequence.blocks.append(self._take_block())
        self._chunks.append((sequence, chunk))
        return chunk

    def _make_room(self, sequence: _Sequence) -> int:
        """Nothing is free: when nobody decodes, requests that only prefill would wait for each other."""
        last = next(reversed(self._running.values()))
        if self._decoding == 0 and not self._chunks and last is not sequence:
            self._preempt(last)
            return self._allocate(sequence, min(self._block_size, sequence.target - sequence.computed))
        return 0

    # -- sequences ---------------------------------------------------------------------------------

    def _finish_tick(self, sequence: _Sequence) -> int:
        return sequence.joined + sequence.output_tokens - sequence.generated

    def _join_decode(self, sequence: _Sequence) -> None:
        sequence.joined = self._tick
        self._decoding += 1
        self._decode_context += sequence.computed
        self._order += 1
        heappush(self._done, (self._finish_tick(sequence), self._order, sequence))
        self._boundary[self._phase(sequence)][id(sequence)] = sequence

    def _leave_decode(self, sequence: _Sequence) -> None:
        gained = self._tick - sequence.joined
        del self._boundary[self._phase(sequence)][id(sequence)]
        self._decoding -= 1
        self._decode_context -= sequence.computed + gained
        sequence.computed += gained
        sequence.generated += gained
        sequence.joined = -1

    def _phase(self, sequence: _Sequence) -> int:
        """The ticks, modulo block size, before which the sequence needs its next block."""
        return (sequence.joined - sequence.computed) % self._block_size

    def _finish(self, sequence: _Sequence, result: StepResult) -> None:
        result.finished.append(sequence.request_id)
        del self._running[id(sequence)]
        self._release(sequence)

    def _preempt(self, sequence: _Sequence) -> None:
        """Take everything from a running request and put it at the head of the queue."""
        self.preemptions += 1
        if sequence.joined >= 0:
            self._leave_decode(sequence)
        else:
            self._prefilling.remove(sequence)
            self._chunks = [(s, chunk) for s, chunk in self._chunks if s is not sequence]
        del self._running[id(sequence)]
        self._release(sequence)
        sequence.target = sequence.prompt_tokens + sequence.generated
        sequence.computed = sequence.registered = 0
        self._waiting.appendleft(sequence)

    # -- blocks ------------------------------------------------------------------------------------

    def _take_block(self) -> int:
        block, _ = self._free.popitem(last=False)
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
            self._evicted.append(key)
        self._references[block] = 1
        return block

    def _release(self, sequence: _Sequence) -> None:
        for block in reversed(sequence.blocks):
            left = self._references[block] - 1
            if left:
                self._references[block] = left
            else:
                del self._references[block]
                self._free[block] = None
        sequence.blocks = []

    def _register(self, sequence: _Sequence) -> None:
        """Cache the prompt blocks that are full now; of those cached already, keep the cached copy."""
        full = min(sequence.computed // self._block_size, len(sequence.keys))
        fresh: list[int] = []
        start = sequence.registered
        for position in range(start, full):
            key = sequence.keys[position]
            if key in self._block_of:
                self._share(sequence, position, self._block_of[key])
                self._stored(sequence, start, fresh)
                fresh, start = [], position + 1
                continue
            self._block_of[key] = sequence.blocks[position]
            self._key_of[sequence.blocks[position]] = key
            fresh.append(key)
        self._stored(sequence, start, fresh)
        sequence.registered = max(sequence.registered, full)

    def _share(self, sequence: _Sequence, position: int, block: int) -> None:
        """Drop the sequence's copy of a block that another request cached while both computed it."""
        copy = sequence.blocks[position]
        del self._references[copy]
        self._free[copy] = None
        self._references[block] = self._references.get(block, 0) + 1
        self._free.pop(block, None)
        sequence.blocks[position] = block

    def _stored(self, sequence: _Sequence, start: int, keys: list[int]) -> None:
        if not keys:
            return
        self._flush_evicted()
        parent = sequence.keys[start - 1] if start else None
        self._changes.append(CacheChange(np.array(keys, dtype=np.uint64), parent, stored=True))

    def _flush_evicted(self) -> None:
        if self._evicted:
            self._changes.append(CacheChange(np.array(self._evicted, dtype=np.uint64), None, stored=False))
            self._evicted = []

    def cached_keys(self) -> set[int]:
        """Return every key that is cached now."""
        return set(self._block_of)

    def check(self) -> None:
        """Verify that no block is lost, shared wrongly or evicted in use; AssertionError says which."""
        held: dict[int, int] = {}
        for sequence in self._running.values():
            for block in sequence.blocks:
                held[block] = held.get(block, 0) + 1
        assert held == self._references, "references differ from what running requests hold"
        assert not held.keys() & self._free.keys(), "a block is free and in use"
        assert len(held) + len(self._free) == self._kv_blocks, "blocks are lost"
        assert {key: block for block, key in self._key_of.items()} == self._block_of, "keys and blocks differ"
        decoding = [s for s in self._running.values() if s.joined >= 0]
        assert len(decoding) == self._decoding, "decoding requests are miscounted"
        context = sum(s.computed + self._tick - s.joined for s in decoding)
        assert context == self._decode_context, "context is miscounted"
        for sequence in decoding:
            tokens = sequence.computed + self._tick - sequence.joined
            assert len(sequence.blocks) * self._block_size >= tokens, "a decoding request lacks a block"
