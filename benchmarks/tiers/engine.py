"""The engine model with a tier below the GPU: the Python twin, and copies in the host's memory.

The rules of ``mulsched.replay._engine_py`` hold, and beside them those of vLLM's OffloadingConnector:

1. Each full block of a prompt is copied to the host when the step that computes it ends (write-through;
   blocks of answers are not, as by vLLM's ``offload_prompt_only``). A copy that is written costs nothing: it
   goes the other way over the bus.
2. A request that is admitted matches on the GPU first. The host is asked for the blocks that follow, up to
   the one with the last token, and what it holds without a gap is loaded, never computed.
3. Loads go over the bus one after the other, at ``load_s_per_token``.
4. Loads overlap with computing: the request takes the blocks of its whole prompt, leaves the queue, and comes
   first at the first step after its load. Others are admitted meanwhile, but for those that would load a
   block that is under way: they wait until it is on the GPU.
5. Or, with ``overlaps`` false, loads hold up the step that admits the request, and everybody in it.
6. Loaded blocks are cached on the GPU when they are there, or in 5 with the rest of the chunk.

vLLM takes a loading request's blocks beyond the loaded ones later, and pins what is being read.
"""

import copy
from collections import deque

from mulsched.replay import EngineModel, Profile
from mulsched.replay._engine_py import EnginePy, _Sequence
from mulsched.replay.step import CacheChange, StepLoad, StepResult
from tiers.host_memory import HostChange, HostMemory


class TieredEngine(EnginePy):
    """One engine; see the module's docstring."""

    def __init__(
        self, profile: Profile, kv_blocks: int, host_blocks: int, load_s_per_token: float, overlaps: bool
    ) -> None:
        assert not profile.schedules_ahead, "steps are planned when they start, since loads end by the clock"
        super().__init__(*profile.limits(kv_blocks))
        self.host = HostMemory(host_blocks)
        self.load_s_per_token = load_s_per_token
        self.overlaps = overlaps
        self.now = 0.0
        self.bus_free_s = 0.0
        self.stall_s = 0.0  # of the step under way, for what it loads
        self.loads: deque[tuple[float, int, _Sequence]] = (
            deque()
        )  # when each ends, and how many blocks it has
        self.loading: set[int] = set()  # keys on their way
        self.delayed: list[_Sequence] = []
        self.computed_paths: list[tuple[list[int], int]] = []  # by the step under way, and from which block
        self.loaded_tokens: dict[int, int] = {}  # by request, at its first admission

    def start_step_at(self, now: float) -> StepLoad | None:
        """Start a step at ``now``; return what it computes, or None if there is nothing to compute."""
        self.now = now
        self.stall_s = 0.0
        arrived = []
        while self.loads and self.loads[0][0] <= now:
            _, n_blocks, sequence = self.loads.popleft()
            self.loading.difference_update(_keys_to_load(sequence, n_blocks))
            sequence.computed += n_blocks * self.block_size
            self._register(sequence, sequence.computed)
            arrived.append(sequence)
        self.waiting.extendleft(reversed(arrived))
        preemptions = self.preemptions
        load = self.start_step()
        if load is None and self.preemptions > preemptions:
            load = self.start_step()  # all that ran were preempted, and in such a step nobody is admitted
        return load

    @property
    def next_load_s(self) -> float | None:
        """When the next load ends, None if nothing is loading."""
        return self.loads[0][0] if self.loads else None

    def end_step(self) -> StepResult:
        """End the step, and copy to the host what it has computed."""
        for path, start in self.computed_paths:
            self.host.store(path, start)
        self.computed_paths = []
        return super().end_step()

    def take_host_changes(self) -> list[HostChange]:
        """Return what changed in the host's memory since the last call, in order."""
        changes, self.host.changes = self.host.changes, []
        return changes

    def check(self) -> None:
        """Raise AssertionError if a block is lost or shared wrongly, or the host holds too many."""
        whole = copy.copy(self)
        loading = [sequence for _, _, sequence in self.loads]
        whole.running = [*self.running, *loading, *(s for s in self.waiting if s.blocks)]
        super(TieredEngine, whole).check()
        assert len(self.host.blocks) <= self.host.n_blocks, "the host holds more than it has room for"
        under_way = [key for _, n, sequence in self.loads for key in _keys_to_load(sequence, n)]
        assert sorted(under_way) == sorted(self.loading), "keys on their way differ from the loads"

    def _plan(self) -> StepLoad | None:
        load = super()._plan()
        self.waiting.extendleft(reversed(self.delayed))
        self.delayed = []
        return load

    def _admit(self, sequence: _Sequence, budget: int) -> int:
        """Admit the first request that can compute; return its first chunk, 0 if there is none.

        Requests before it that have something to load begin to, or are set aside for the rest of this step.
        """
        while self.waiting:
            sequence = self.waiting[0]
            if sequence.blocks:
                return self._resume(budget)
            path = sequence.keys[: (sequence.known - 1) // self.block_size]
            hits = self._hits(path)
            n_blocks = self.host.match(path[len(hits) :])
            if not self.loading.isdisjoint(path[len(hits) : len(hits) + n_blocks]):
                self.delayed.append(self.waiting.popleft())
                continue
            if n_blocks == 0 or not self.overlaps:
                return self._admit_now(sequence, budget, path, len(hits), n_blocks)
            if not self._load(sequence, hits, n_blocks):
                return 0
            self.host.touch(path)
        return 0

    def _hits(self, path: list[int]) -> list[int]:
        """Return the blocks of the leading keys that are on the GPU."""
        hits = []
        for key in path:
            block = self.pool.find(key)
            if block is None:
                break
            hits.append(block)
        return hits

    def _admit_now(
        self, sequence: _Sequence, budget: int, path: list[int], n_hits: int, n_blocks: int
    ) -> int:
        """Admit the head of the queue as an engine without a tier does, but for what this step loads."""
        sequence.transferred = (n_hits + n_blocks) * self.block_size
        tokens = super()._admit(sequence, budget)
        if tokens:
            self.host.touch(path)
            self.stall_s += n_blocks * self.block_size * self.load_s_per_token
            self.loaded_tokens.setdefault(sequence.request, n_blocks * self.block_size)
        return tokens

    def _load(self, sequence: _Sequence, hits: list[int], n_blocks: int) -> bool:
        """Begin to load for the head of the queue; return False, and change nothing, for no room."""
        idle = sum(self.pool.uses[block] == 0 for block in hits)
        spared = self.watermark_blocks if self.running else 0
        needed = self._blocks_for(sequence.known) - len(hits)
        if needed + idle + spared > self.pool.n_free():
            return False
        for block in hits:
            self.pool.use(block)
        self.waiting.popleft()
        sequence.blocks = hits + [self.pool.take(self.evicted) for _ in range(needed)]
        sequence.registered = len(hits)
        sequence.computed = len(hits) * self.block_size
        if sequence.cached < 0:
            sequence.cached = sequence.computed
        self.loaded_tokens.setdefault(sequence.request, n_blocks * self.block_size)
        self.loading.update(_keys_to_load(sequence, n_blocks))
        self.bus_free_s = max(self.bus_free_s, self.now) + n_blocks * self.block_size * self.load_s_per_token
        self.loads.append((self.bus_free_s, n_blocks, sequence))
        return True

    def _resume(self, budget: int) -> int:
        """Admit the head of the queue, which has its blocks and what it loaded; return its first chunk."""
        sequence = self.waiting.popleft()
        self.running.append(sequence)
        tokens = min(budget, sequence.known - sequence.computed)
        if sequence.computed + tokens < sequence.known:
            self.partial = sequence
        self._extend(sequence, tokens)
        return tokens

    def _preempt(self) -> None:
        super()._preempt()
        if any(sequence.blocks for sequence in self.waiting):
            # what has loaded keeps its blocks: behind one that waits for blocks both would wait for ever
            self.waiting = deque(sorted(self.waiting, key=lambda sequence: not sequence.blocks))

    def _extend(self, sequence: _Sequence, tokens: int, unknown: int = 0) -> bool:
        if tokens == 1 and 0 < sequence.computed % self.block_size < self.block_size - 1:
            # neither takes a block nor fills one: nearly all of a replay's time without this
            self.planned.append((sequence, 1))
            return True
        return super()._extend(sequence, tokens, unknown)

    def _register(self, sequence: _Sequence, tokens: int) -> None:
        start = sequence.registered
        super()._register(sequence, tokens)
        end = min(sequence.registered, sequence.prompt // self.block_size)
        if end > start:
            self.computed_paths.append((sequence.keys[:end], start))


def _keys_to_load(sequence: _Sequence, n_blocks: int) -> list[int]:
    """Return the keys that a request loads, those after its blocks on the GPU."""
    return sequence.keys[sequence.registered : sequence.registered + n_blocks]


class TieredEngineModel(EngineModel):
    """:class:`~mulsched.replay.EngineModel` with ``host_blocks`` in the host's memory."""

    def __init__(
        self,
        profile: Profile,
        *,
        kv_blocks: int | None = None,
        host_blocks: int,
        load_s_per_token: float,
        overlaps: bool = True,
    ) -> None:
        super().__init__(profile, kv_blocks=kv_blocks)
        self.tiered = TieredEngine(profile, self._kv_blocks, host_blocks, load_s_per_token, overlaps)
        self._engine = self.tiered
        self.step_ends_s: float | None = None

    @property
    def next_load_s(self) -> float | None:
        """When the next load ends, None if nothing is loading."""
        return self.tiered.next_load_s

    def start_step(self, now: float) -> float | None:
        """Start a step at ``now``; return when it ends, or None if there is nothing to compute.

        Then something may still be loading: see ``next_load_s``.
        """
        assert not self._stepping
        load = self.tiered.start_step_at(now)
        self._stepping = load is not None
        compute_s = 0.0 if load is None else load.seconds(self._profile.step_time)
        self.step_ends_s = None if load is None else now + compute_s + self.tiered.stall_s
        return self.step_ends_s

    def take_changes(self) -> list[CacheChange | HostChange]:
        """Return what changed on the GPU and then in the host's memory since the last call, each in order."""
        return [*self.tiered.take_changes(), *self.tiered.take_host_changes()]
