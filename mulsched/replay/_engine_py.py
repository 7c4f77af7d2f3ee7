"""The engine model in Python: the readable twin of ``csrc/engine.hpp``.

The rules are those of vLLM v1's scheduler and block pool, read from vLLM 0.32 and checked against recordings
of it (tests/replay/test_vllm_reference.py):

1. A step gives a token to every decoding request, in the order of admission, then goes on with the prompt
   that is partly computed, then admits waiting requests, first come first served, until
   ``max_batched_tokens`` are spent or ``max_num_seqs`` run.
2. A request is admitted if the blocks of its whole prompt are free now; only those of its first chunk are
   taken. Nobody overtakes the head of the queue.
3. A running request that finds no block preempts the last admitted one, again and again, at last itself.
   The victim's blocks are released; it waits at the head of the queue and is computed again, what it had
   generated included. In such a step nobody is admitted.
4. A full block is cached under its key when the step that fills it is scheduled, so a request admitted later
   in the same step may use it. Blocks that an answer fills are cached too. The last token is never computed,
   and of a prompt that is wholly cached the last block is computed again, as a second copy under its key.
5. Free blocks wait in a queue, still under their keys: blocks without a key at its front, others at its end,
   the tail of a request before its head. The front is taken next.

An engine that schedules ahead, as vLLM's asynchronous scheduling does (checked by
benchmarks/vllm_reference/ahead.py), plans a step when the one before starts, as if that had ended:

6. A request that arrives while a step runs joins the second step after it. A step that could not be planned,
   since there was nothing to do or no room, is planned when the one before ends.
7. A request that ends with the step under way is not planned again, since its length is known as by
   ``max_tokens``. Until that step has ended it counts as running and keeps its blocks, which are free for the
   step after the next.
8. It may be preempted meanwhile: its blocks are released earlier, and it still ends with its step. A request
   that is preempted while it makes a token keeps the token.
9. A block that an answer fills is cached a step later than in 4, when its last token is known.
"""

from collections import OrderedDict, deque
from dataclasses import dataclass, field

import numpy as np

from mulsched.replay.step import CacheChange, StepLoad, StepResult
from mulsched.types import Keys

__all__ = ["EnginePy"]


class _BlockPool:
    """Blocks by number, the keys they are cached under, and the free queue."""

    def __init__(self, n_blocks: int) -> None:
        # without a key they are all alike; popped from the end
        self.blank = list(range(n_blocks - 1, -1, -1))
        self.queue: OrderedDict[int, None] = OrderedDict()
        self.key: dict[int, int] = {}
        self.copies: dict[int, dict[int, None]] = {}  # by key, the oldest first
        self.uses = [0] * n_blocks

    def n_free(self) -> int:
        return len(self.blank) + len(self.queue)

    def find(self, key: int) -> int | None:
        copies = self.copies.get(key)
        return None if copies is None else next(iter(copies))

    def use(self, block: int) -> None:
        if self.uses[block] == 0:
            del self.queue[block]
        self.uses[block] += 1

    def take(self, evicted: list[int]) -> int:
        if self.blank:
            block = self.blank.pop()
        else:
            block, _ = self.queue.popitem(last=False)
            key = self.key.pop(block)
            del self.copies[key][block]
            if not self.copies[key]:
                del self.copies[key]
            evicted.append(key)
        self.uses[block] = 1
        return block

    def release(self, block: int) -> None:
        self.uses[block] -= 1
        if self.uses[block] > 0:
            return
        if block in self.key:
            self.queue[block] = None
        else:
            self.blank.append(block)

    def cache(self, block: int, key: int) -> None:
        self.key[block] = key
        self.copies.setdefault(key, {})[block] = None


@dataclass(slots=True, eq=False)
class _Sequence:
    """A request inside the engine."""

    request: int
    keys: list[int]
    prompt: int
    output: int
    transferred: int  # tokens whose KV comes from elsewhere
    computed: int = 0  # tokens with KV
    generated: int = 0
    cached: int = -1  # tokens found at the first admission
    registered: int = 0  # leading blocks that are cached under their keys
    blocks: list[int] = field(default_factory=list)

    @property
    def known(self) -> int:
        """Tokens to compute before the next one is made."""
        return self.prompt + self.generated

    @property
    def ends(self) -> bool:
        """Whether all its tokens are made, or will be when the step under way ends."""
        return self.generated >= self.output


class EnginePy:
    """One engine; see the module's docstring. O(running) a step."""

    def __init__(
        self,
        block_size: int,
        kv_blocks: int,
        max_batched_tokens: int,
        max_num_seqs: int,
        watermark_blocks: int,
        schedules_ahead: bool = False,
    ) -> None:
        self.block_size = block_size
        self.max_batched_tokens = max_batched_tokens
        self.max_num_seqs = max_num_seqs
        self.watermark_blocks = watermark_blocks
        self.schedules_ahead = schedules_ahead
        self.pool = _BlockPool(kv_blocks)
        self.waiting: deque[_Sequence] = deque()
        self.running: list[_Sequence] = []  # in the order of admission
        self.partial: _Sequence | None = None  # whose prompt is not computed yet: at most one, the last
        self.planned: list[tuple[_Sequence, int]] = []
        self.next: StepLoad | None = None  # planned while another step runs
        self.made = StepResult()  # by the step under way
        self.ending: list[_Sequence] = []  # with it
        self.changes: list[CacheChange] = []
        self.evicted: list[int] = []
        self.preemptions = 0

    def submit(
        self, request: int, keys: Keys, prompt_tokens: int, output_tokens: int, transferred_tokens: int
    ) -> None:
        """Put a request into the waiting queue."""
        self.waiting.append(
            _Sequence(request, keys.tolist(), prompt_tokens, output_tokens, transferred_tokens)
        )

    def start_step(self) -> StepLoad | None:
        """Start a step; return what it computes, or None if there is nothing to do."""
        if not self.schedules_ahead:
            return self._plan()
        load = self._plan() if self.next is None else self.next
        if load is not None:
            self._advance()
            self.next = self._plan()
        return load

    def end_step(self) -> StepResult:
        """End the step: tell first tokens, release what is done."""
        if not self.schedules_ahead:
            self._advance()
        result, self.made = self.made, StepResult()
        for sequence in self.ending:
            result.finished.append(sequence.request)
            if sequence.blocks:  # not preempted since
                self._register(sequence, sequence.computed)
                self.running.remove(sequence)
                self._release(sequence)
        self.ending = []
        return result

    def take_changes(self) -> list[CacheChange]:
        """Return what changed in the cache since the last call, in order."""
        self._flush_evicted()
        changes, self.changes = self.changes, []
        return changes

    def cached_keys(self) -> set[int]:
        """Return every key that is cached now."""
        return set(self.pool.copies)

    def check(self) -> None:
        """Raise AssertionError if a block is lost or shared wrongly."""
        uses = [0] * len(self.pool.uses)
        for sequence in self.running:
            for block in sequence.blocks:
                uses[block] += 1
        assert uses == self.pool.uses, "uses differ from what running requests hold"
        free = [*self.pool.blank, *self.pool.queue]
        assert sorted(free) == [b for b, n in enumerate(uses) if n == 0], "free blocks are miscounted"
        assert all(block in self.pool.key for block in self.pool.queue), "the free queue is out of order"
        copies = {block: key for key, blocks in self.pool.copies.items() for block in blocks}
        assert copies == self.pool.key, "keys and blocks differ"

    def _plan(self) -> StepLoad | None:
        """Plan a step; return what it computes, or None if there is nothing to do."""
        budget, preempted = self._schedule_running(self.max_batched_tokens)
        batch = [sequence.computed for sequence, _ in self.planned if sequence is not self.partial]
        while not preempted and budget > 0 and self.waiting and len(self.running) < self.max_num_seqs:
            tokens = self._admit(self.waiting[0], budget)
            if tokens == 0:
                break
            budget -= tokens
        if not self.planned:
            return None
        chunks = self.planned[len(batch) :]
        new_tokens = sum(tokens for _, tokens in chunks)
        prefix = sum(tokens * sequence.computed for sequence, tokens in chunks)
        twice_pairs = sum(tokens * (2 * sequence.computed + tokens) for sequence, tokens in chunks)
        return StepLoad(
            new_tokens,
            prefix / new_tokens if chunks else 0.0,
            len(batch),
            sum(batch) / len(batch) if batch else 0.0,
            twice_pairs / (2 * new_tokens) - new_tokens / 2 if chunks else 0.0,
        )

    def _advance(self) -> None:
        """Count what the planned step computes. What ends with it keeps its blocks until it has ended."""
        for sequence, tokens in self.planned:
            sequence.computed += tokens
            if sequence.computed < sequence.known:
                continue
            if self.partial is sequence:
                self.partial = None
            if sequence.generated == 0:
                self.made.first_tokens.append((sequence.request, sequence.cached))
            sequence.generated += 1
            if sequence.ends:
                self.ending.append(sequence)
        self.planned = []

    def _schedule_running(self, budget: int) -> tuple[int, bool]:
        """Plan a token for each that decodes and a chunk of the partial prompt; return what is left of the
        budget, and whether anyone was preempted.
        """
        preempted = False
        position = 0
        while position < len(self.running):
            sequence = self.running[position]
            if sequence.ends:
                position += 1
                continue
            tokens = min(budget, sequence.known - sequence.computed)
            # the token that it starts from is not known yet
            unknown = int(self.schedules_ahead and sequence is not self.partial)
            while not self._extend(sequence, tokens, unknown):
                self._preempt()
                preempted = True
                if position == len(self.running):
                    return budget, preempted  # it was the last one itself
            budget -= tokens
            position += 1
        return budget, preempted

    def _admit(self, sequence: _Sequence, budget: int) -> int:
        """Admit the head of the queue with its cached prefix; return its first chunk, 0 for no room."""
        hits: list[int] = []
        for key in sequence.keys[: (sequence.known - 1) // self.block_size]:
            block = self.pool.find(key)
            if block is None:
                break
            hits.append(block)
        cached = len(hits) * self.block_size
        idle = sum(self.pool.uses[block] == 0 for block in hits)
        spared = self.watermark_blocks if self.running else 0
        if self._blocks_for(sequence.known) - len(hits) + idle + spared > self.pool.n_free():
            return 0
        for block in hits:
            self.pool.use(block)
        self.running.append(self.waiting.popleft())
        sequence.blocks = hits
        sequence.registered = len(hits)
        sequence.computed = max(cached, min(sequence.transferred, sequence.known - 1))
        if sequence.cached < 0:
            sequence.cached = cached
        tokens = min(budget, sequence.known - sequence.computed)
        if sequence.computed + tokens < sequence.known:
            self.partial = sequence
        self._extend(sequence, tokens)
        return tokens

    def _extend(self, sequence: _Sequence, tokens: int, unknown: int = 0) -> bool:
        """Plan tokens, the last of them ``unknown``, and give them blocks; return False, and change nothing,
        if there are too few.
        """
        needed = self._blocks_for(sequence.computed + tokens) - len(sequence.blocks)
        if needed > self.pool.n_free():
            return False
        sequence.blocks += [self.pool.take(self.evicted) for _ in range(needed)]
        self._register(sequence, sequence.computed + tokens - unknown)
        self.planned.append((sequence, tokens))
        return True

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _preempt(self) -> None:
        """Put the last admitted request back at the head of the queue."""
        sequence = self.running.pop()
        self.preemptions += 1
        if self.partial is sequence:
            self.partial = None
        self._release(sequence)
        sequence.computed = sequence.transferred = sequence.registered = 0
        if not sequence.ends:
            self.waiting.appendleft(sequence)

    def _release(self, sequence: _Sequence) -> None:
        for block in reversed(sequence.blocks):
            self.pool.release(block)
        sequence.blocks = []

    def _register(self, sequence: _Sequence, tokens: int) -> None:
        """Cache the blocks that the first tokens fill under their keys."""
        start, full = sequence.registered, min(tokens // self.block_size, len(sequence.keys))
        if full <= start:
            return
        for position in range(start, full):
            self.pool.cache(sequence.blocks[position], sequence.keys[position])
        self._flush_evicted()
        keys = np.array(sequence.keys[start:full], dtype=np.uint64)
        self.changes.append(CacheChange(keys, sequence.keys[start - 1] if start else None, stored=True))
        sequence.registered = full

    def _flush_evicted(self) -> None:
        if self.evicted:
            self.changes.append(CacheChange(np.array(self.evicted, dtype=np.uint64), None, stored=False))
            self.evicted = []
