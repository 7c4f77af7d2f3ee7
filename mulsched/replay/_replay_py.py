"""One replay in Python: the readable twin of ``csrc/replay.hpp``, which drives the production Router.

Events happen in the order of their times; at the same time ends of steps come before arrivals, and those
before hand-overs from a prefill to a decode instance, each kind in the order in which it was planned. A step
that ends tells the router of changes in the cache, of first tokens and of ends, as an engine's KV events and
response stream would: at once, or ``state_delay_s`` later, and each message of KV events is lost with
probability ``event_loss_ratio``.
"""

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush

import numpy as np

from mulsched.errors import UnknownBlock
from mulsched.indicators import uniform_draws
from mulsched.replay.engine import EngineModel
from mulsched.replay.records import Counts, Records, ReplayOptions
from mulsched.replay.step import CacheChange
from mulsched.replay.trace import Trace
from mulsched.router import Router
from mulsched.types import BlockRemoved, BlockStored

__all__ = ["run_replay"]

_STEP_END, _ARRIVAL, _HAND_OVER = 0, 1, 2
_LOSS_SALT = 0x6C6F7373  # "loss"

Progress = Callable[[int, int], None]
_News = tuple[float, Callable[..., None], tuple[object, ...]]


class _Pool:
    """Instances of one kind and their router."""

    def __init__(self, router: Router, engines: list[EngineModel], first: int) -> None:
        self.router = router
        self.engines = engines
        self.names = router.instances
        self.first = first
        self.messages = [0] * len(engines)


class _Replay:
    """The state of one replay."""

    def __init__(self, trace: Trace, options: ReplayOptions, records: Records) -> None:
        self.trace = trace
        self.options = options
        self.records = records
        self.counts = Counts()
        sizes = [options.prefill_instances] if options.prefill_instances else []
        self.pools = [self.pool(p, n) for p, n in enumerate([*sizes, options.decode_instances])]
        self.events: list[tuple[float, int, int, int, int]] = []  # time, kind, number, subject, pool
        self.planned = len(trace)
        self.news: deque[_News] = deque()
        self.follow_ups: dict[int, list[int]] = {}
        self.finished = 0

    def pool(self, p: int, n: int) -> _Pool:
        options = self.options
        router = self.router(p)
        first = options.prefill_instances if p else 0
        for i in range(n):
            router.add_instance(
                f"instance-{first + i}", cache_blocks=options.kv_blocks if options.predicted else None
            )
        engines = [EngineModel(options.profile, kv_blocks=options.kv_blocks) for _ in range(n)]
        return _Pool(router, engines, first)

    def router(self, p: int) -> Router:
        options = self.options
        return Router(
            block_size=options.profile.block_size,
            policy=options.policies[p],
            ties=options.ties[p],
            seed=options.seed,
            in_flight=options.in_flight,
        )

    def run(self, progress: Progress | None) -> None:
        for i, previous in enumerate(self.trace.previous.tolist()):
            if self.options.closed and previous >= 0:
                self.follow_ups.setdefault(previous, []).append(i)
            else:
                heappush(self.events, (float(self.trace.arrival_s[i]), _ARRIVAL, i, i, 0))
        every = max(1, len(self.trace) // 100)
        told = 0
        while self.events:
            now, kind, _, subject, p = heappop(self.events)
            if kind == _STEP_END:
                self.end_step(p, subject, now)
            else:
                self.hear(now)
                if kind == _ARRIVAL:
                    self.records.arrival_s[subject] = now
                self.route(p, subject, now)
            if progress is not None and self.finished >= told + every:
                told = self.finished
                progress(told, len(self.trace))
        if progress is not None:
            progress(self.finished, len(self.trace))
        for pool in self.pools:
            self.counts.preemptions += sum(engine.preemptions for engine in pool.engines)

    def plan(self, time: float, kind: int, subject: int, p: int) -> None:
        heappush(self.events, (time, kind, self.planned, subject, p))
        self.planned += 1

    def route(self, p: int, i: int, now: float) -> None:
        trace, pool, block_size = self.trace, self.pools[p], self.options.profile.block_size
        keys, prompt, session = trace.keys(i, block_size), int(trace.prompt_tokens[i]), int(trace.session[i])
        decision = pool.router.route_keys(
            keys,
            prompt_tokens=prompt,
            request_id=i,
            session=str(session) if session >= 0 else None,
            now=now,
        )
        at = int(decision.columns.rows[decision.position])
        last = p + 1 == len(self.pools)
        if p == 0:
            self.records.instance[i], self.records.hit_tokens[i] = pool.first + at, decision.hit_tokens
        if last:
            self.records.decode_instance[i] = pool.first + at
        engine = pool.engines[at]
        engine.submit(
            i,
            trace.engine_keys(i, block_size) if last else keys,
            prompt,
            int(trace.output_tokens[i]) if last else 1,  # the prefill side makes one token
            transferred_tokens=prompt if p else 0,
        )
        if not engine.stepping:
            self.start_step(p, at, now)

    def start_step(self, p: int, at: int, now: float) -> None:
        ends = self.pools[p].engines[at].start_step(now)
        if ends is not None:
            self.plan(ends, _STEP_END, at, p)

    def end_step(self, p: int, at: int, now: float) -> None:
        engine, records = self.pools[p].engines[at], self.records
        last = p + 1 == len(self.pools)
        result = engine.end_step()
        changes = engine.take_changes()
        if changes and not self.options.predicted and not self.is_lost(p, at):
            for change in changes:
                self.tell(now, self.hear_change, p, at, change)
        for i, cached in result.first_tokens:
            if p == 0:
                records.cached_tokens[i] = cached
            if last:
                records.first_token_s[i] = now
            self.tell(now, self.pools[p].router.first_token, i)
        for i in result.finished:
            self.tell(now, self.pools[p].router.finish, i)
            if not last:
                transfer_s = float(self.trace.prompt_tokens[i]) * self.options.transfer_s_per_token
                self.plan(now + transfer_s, _HAND_OVER, i, p + 1)
                continue
            records.finish_s[i] = now
            self.finished += 1
            for follow_up in self.follow_ups.get(i, ()):
                self.plan(now + float(self.trace.think_s[follow_up]), _ARRIVAL, follow_up, 0)
        self.start_step(p, at, now)

    def is_lost(self, p: int, at: int) -> bool:
        """Whether the instance's next message of KV events, which holds those of one step, gets lost."""
        if self.options.event_loss_ratio == 0:
            return False
        pool = self.pools[p]
        instance = np.array([pool.first + at])
        draw = uniform_draws(self.options.seed ^ _LOSS_SALT, pool.messages[at], instance)[0]
        pool.messages[at] += 1
        lost = bool(draw < self.options.event_loss_ratio)
        self.counts.lost_messages += lost
        return lost

    def tell(self, now: float, hear: Callable[..., None], *news: object) -> None:
        if self.options.state_delay_s == 0:
            hear(*news)
        else:
            self.news.append((now, hear, news))

    def hear(self, now: float) -> None:
        """Let the routers hear what is old enough."""
        while self.news and self.news[0][0] + self.options.state_delay_s <= now:
            _, hear, news = self.news.popleft()
            hear(*news)

    def hear_change(self, p: int, at: int, change: CacheChange) -> None:
        name, router = self.pools[p].names[at], self.pools[p].router
        if not change.stored:
            router.apply(BlockRemoved(name, change.keys))
            return
        size = self.options.profile.block_size
        try:
            router.apply(BlockStored(name, change.keys, change.parent, size, block_keys=change.keys))
        except UnknownBlock:
            # an event of its parent was lost
            self.counts.orphans += 1


def run_replay(trace: Trace, options: ReplayOptions, records: Records, progress: Progress | None) -> Counts:
    """Replay the trace, fill the records and return what was counted."""
    replay = _Replay(trace, options, records)
    replay.run(progress)
    return replay.counts
