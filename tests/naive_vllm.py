"""vLLM v1's scheduler and prefix cache, written as plainly as possible: the oracle of the engine model.

Read from vLLM 0.32.0 (``v1/core``: ``sched/scheduler.py``, ``kv_cache_manager.py``, ``block_pool.py``) with its
defaults, and with synchronous scheduling held against recordings of the real engine. Lists and dicts, no
clock, no step times; every step costs O(blocks).
"""

from dataclasses import dataclass, field


@dataclass(eq=False)
class _Request:
    request_id: object
    keys: list
    prompt_tokens: int
    output_tokens: int
    generated: int = 0
    computed: int = 0
    placeholders: int = 0  # tokens that are being made
    cached_tokens: int | None = None
    blocks: list = field(default_factory=list)
    registered: int = 0

    @property
    def tokens(self):
        return self.prompt_tokens + self.generated


@dataclass
class Step:
    """What a step did, each list in the order in which vLLM does it."""

    preempted: list = field(default_factory=list)  # request ids
    scheduled: list = field(default_factory=list)  # (request id, tokens it had, tokens it got)
    first_tokens: list = field(default_factory=list)  # (request id, cached tokens)
    finished: list = field(default_factory=list)  # request ids
    changes: list = field(default_factory=list)  # ("stored", parent, *keys), ("removed", key) for every copy


class NaiveVllm:
    """``kv_blocks``: usable ones, one less than vLLM's ``num_gpu_blocks``. Keys name whole prefixes."""

    def __init__(self, *, block_size, kv_blocks, max_batched_tokens, max_num_seqs):
        self.block_size, self.budget, self.seats = block_size, max_batched_tokens, max_num_seqs
        self.waiting, self.running = [], []
        self.free = list(range(kv_blocks))  # the front is taken next
        self.references = [0] * kv_blocks
        self.key_of = [None] * kv_blocks
        self.copies = {}  # key: blocks in the order in which they were cached

    def submit(self, request_id, keys, prompt_tokens, output_tokens):
        self.waiting.append(_Request(request_id, list(keys), prompt_tokens, output_tokens))

    def step(self):
        self.start()
        return self.end()

    def start(self):
        """Schedule a step and return its (request id, tokens it had, tokens it got)."""
        self._step = Step()
        self._scheduled = self._schedule()
        for request, tokens in self._scheduled:
            self._step.scheduled.append((request.request_id, request.computed, tokens))
            request.computed += tokens
        return self._step.scheduled

    def end(self):
        for request, _ in self._scheduled:
            if request.computed == request.tokens:
                self._sample(request)
        return self._step

    def _schedule(self):
        budget, scheduled = self.budget, []
        for request in list(self.running):  # in the order of admission, be it decode or prefill
            if request.placeholders and self._ends(request):
                continue
            tokens = min(request.tokens + request.placeholders - request.computed, budget)
            while request in self.running and tokens and not self._allocate(request, tokens):
                self._preempt()  # the last admitted, perhaps this one
            if request not in self.running or not tokens:
                break
            scheduled.append((request, tokens))
            budget -= tokens
        while not self._step.preempted and budget and self.waiting and len(self.running) < self.seats:
            request = self.waiting[0]
            hits = self._hits(request)
            tokens = min(request.tokens - len(hits) * self.block_size, budget)
            if not self._admit(request, hits, tokens):
                break  # nobody overtakes
            scheduled.append((request, tokens))
            budget -= tokens
        return scheduled

    def _ends(self, request):
        computed = request.computed + 2 - request.placeholders
        return computed >= request.prompt_tokens + request.output_tokens

    def _sample(self, request):
        if request.generated == 0:
            self._step.first_tokens.append((request.request_id, request.cached_tokens))
        request.generated += 1
        if request.generated == request.output_tokens:
            self._step.finished.append(request.request_id)
            (self.running if request in self.running else self.waiting).remove(request)
            self._release(request)

    def _hits(self, request):
        hits = []
        for key in request.keys[: (request.tokens - 1) // self.block_size]:  # the last token is computed
            if key not in self.copies:
                break
            hits.append(self.copies[key][0])
        return hits

    def _admit(self, request, hits, tokens):
        # the whole prompt must fit now, though only the first chunk takes blocks
        idle_hits = sum(self.references[block] == 0 for block in hits)
        if self._blocks(request.tokens) - len(hits) + idle_hits > len(self.free):
            return False
        for block in hits:
            if self.references[block] == 0:
                self.free.remove(block)
            self.references[block] += 1
        request.blocks, request.registered = hits, len(hits)
        request.computed = len(hits) * self.block_size
        if request.cached_tokens is None:
            request.cached_tokens = request.computed
        assert self._allocate(request, tokens)
        self.running.append(self.waiting.pop(0))
        return True

    def _allocate(self, request, tokens):
        needed = self._blocks(request.computed + tokens) - len(request.blocks)
        if needed > len(self.free):
            return False
        for _ in range(needed):
            block = self.free.pop(0)
            key, self.key_of[block] = self.key_of[block], None
            if key is not None:
                self.copies[key].remove(block)
                if not self.copies[key]:
                    del self.copies[key]
                self._step.changes.append(("removed", key))
            self.references[block] = 1
            request.blocks.append(block)
        # of tokens that are being made nobody knows what they are
        self._register(request, min(request.computed + tokens, request.tokens) // self.block_size)
        return True

    def _register(self, request, full):
        """Cache the blocks that will be full after this step, copies or not."""
        full = min(full, len(request.keys))
        if full <= request.registered:
            return
        for position in range(request.registered, full):
            block, key = request.blocks[position], request.keys[position]
            self.key_of[block] = key
            self.copies.setdefault(key, []).append(block)
        parent = request.keys[request.registered - 1] if request.registered else None
        self._step.changes.append(("stored", parent, *request.keys[request.registered : full]))
        request.registered = full

    def _preempt(self):
        request = self.running.pop()
        self._release(request)
        request.computed = request.registered = request.placeholders = 0
        self.waiting.insert(0, request)
        self._step.preempted.append(request.request_id)

    def _release(self, request):
        front, back = [], []
        for block in reversed(request.blocks):
            self.references[block] -= 1
            if self.references[block] == 0:
                (front if self.key_of[block] is None else back).append(block)
        self.free = front + self.free + back  # blocks without a key are used again first
        request.blocks = []

    def _blocks(self, tokens):
        return -(-tokens // self.block_size)


class NaiveAsyncVllm(NaiveVllm):
    """The same with asynchronous scheduling: ``sched/async_scheduler.py`` and, in ``engine/core.py``, a queue
    of two scheduled steps of which the first runs. What a step did is told up to its end, the scheduling of the
    next one included.
    """

    def __init__(self, **limits):
        super().__init__(**limits)
        self._queue, self._step = [], Step()

    def start(self):
        if not self._queue:
            self._put()
        if self._queue:
            self._step.scheduled = [(r.request_id, had, got) for r, had, got, _ in self._queue[0]]
            self._put()
        return self._step.scheduled

    def end(self):
        for request, _, _, makes_token in self._queue.pop(0):
            if not makes_token:
                continue
            if request in self.running:  # else it has been preempted, and keeps the token
                request.placeholders -= 1
                self._register(request, (request.computed - request.placeholders) // self.block_size)
            self._sample(request)
        done, self._step = self._step, Step()
        return done

    def _put(self):
        step = []
        for request, tokens in self._schedule():
            had = request.computed
            request.computed += tokens
            makes_token = request.computed == request.tokens + request.placeholders
            request.placeholders += makes_token
            step.append((request, had, tokens, makes_token))
        if step:
            self._queue.append(step)
