"""Routers that see less, or otherwise, than the production router does, for the replay's Python loop."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mulsched import Lifecycle, Router
from mulsched.indicators import Columns, fill_columns
from mulsched.policies._policy import select as select_composed
from mulsched.replay import Profile
from mulsched.replay._replay_py import _Replay
from mulsched.replay.records import Counts, Records, ReplayOptions
from mulsched.replay.trace import Trace

MakeRouter = Callable[..., Router]

MATCHED, HIT, NEW, QUEUED, P_TOKENS = range(5)


class DiscountingRouter(Router):
    """Counts a prefix in flight as cached by the share of the wait for it that the request would not have.

    Of the d tokens that are in flight and not cached, with q tokens queued, d / (d + q) of them count.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, in_flight="cached")

    def _pick(self, columns: Columns) -> tuple[int, NDArray[np.float64]]:
        request, table = columns.request, columns.table
        rest = request.keys, request.prompt_tokens, self._block_size, columns.rows, self._load.table
        fill_columns(self._index.backend, self._in_flight.tree, *rest, table)
        coming = table[HIT].copy()
        fill_columns(self._index.backend, None, *rest, table)
        d, q = coming - table[HIT], table[QUEUED]
        hit = table[HIT] + np.where(d > 0, d * d // np.maximum(d + q, 1), 0)
        table[HIT], table[NEW] = hit, request.prompt_tokens - hit
        table[P_TOKENS] = q + table[NEW]
        table.setflags(write=False)
        return select_composed(self._policy, columns, self._ties)


class SilentRouter:
    """Hears no first token: releases the queue by an estimate, or with ``rate`` None at the end only."""

    def __init__(self, rate: float | None, **options: Any) -> None:
        self.router = Router(in_flight="ignore", **options)
        self.lives = Lifecycle(self.router, prefill_tokens_per_s=rate, expire_after_s=1e9)
        self.now = 0.0
        self.add_instance, self.apply = self.router.add_instance, self.router.apply

    @property
    def instances(self) -> tuple[str, ...]:
        return self.router.instances

    def route_keys(self, keys: Any, **options: Any) -> Any:
        return self.lives.route_keys(keys, **options)

    def first_token(self, request_id: int) -> None:
        pass

    def finish(self, request_id: int) -> None:
        self.lives.finish(request_id, now=self.now)


class SeveralRouters:
    """Requests by turns to ``n`` routers that each hear all KV events, and poll the load.

    A router books what it sends itself. Of the others' requests it learns every ``poll_s`` how many run and
    wait on each engine, as from Prometheus pages; not how many tokens they wait with.
    """

    def __init__(self, n: int, *, poll_s: float = 1.0, **options: Any) -> None:
        self.routers = [Router(in_flight="cached", **options) for _ in range(n)]
        self.poll_s = poll_s
        self.next_s = poll_s
        self.now = 0.0
        self.instance_of: dict[int, str] = {}
        self.waiting: Counter[str] = Counter()
        self.running: Counter[str] = Counter()

    @property
    def instances(self) -> tuple[str, ...]:
        return self.routers[0].instances

    def add_instance(self, instance: str, **options: Any) -> None:
        for router in self.routers:
            router.add_instance(instance, **options)

    def apply(self, event: Any) -> None:
        for router in self.routers:
            router.apply(event)

    def route_keys(self, keys: Any, *, request_id: int, now: float, **options: Any) -> Any:
        if len(self.routers) > 1 and now >= self.next_s:
            self.poll(now)
        decision = self._of(request_id).route_keys(keys, request_id=request_id, now=now, **options)
        self.instance_of[request_id] = decision.instance
        self.waiting[decision.instance] += 1
        return decision

    def poll(self, now: float) -> None:
        self.next_s = now + self.poll_s
        for name in self.instances:
            for router in self.routers:
                router.report_load(name, running=self.running[name], waiting=self.waiting[name], now=now)

    def first_token(self, request_id: int) -> None:
        self._of(request_id).first_token(request_id)
        self.waiting[self.instance_of[request_id]] -= 1
        self.running[self.instance_of[request_id]] += 1

    def finish(self, request_id: int) -> None:
        self._of(request_id).finish(request_id)
        self.running[self.instance_of.pop(request_id)] -= 1

    def _of(self, request_id: int) -> Router:
        return self.routers[request_id % len(self.routers)]


class _Viewed(_Replay):
    """The replay's Python loop with a router of one's own."""

    def __init__(self, make_router: MakeRouter, *replayed: Any) -> None:
        self.make_router = make_router
        super().__init__(*replayed)

    def router(self, p: int) -> Router:
        options = self.options
        return self.make_router(
            block_size=options.profile.block_size,
            policy=options.policies[p],
            ties=options.ties[p],
            seed=options.seed,
        )

    def end_step(self, p: int, at: int, now: float) -> None:
        self.pools[p].router.now = now
        super().end_step(p, at, now)


def replay_with(make_router: MakeRouter, trace: Trace, options: ReplayOptions) -> tuple[Records, Counts]:
    """Replay a trace with the router that ``make_router(block_size=, policy=, ties=, seed=)`` makes."""
    records = Records.empty(len(trace))
    replay = _Viewed(make_router, trace, options, records)
    replay.run(None)
    return records, replay.counts


def prefill_tokens_per_s(profile: Profile) -> float:
    """Return the rate at which the profile's engine prefills when it has nothing else to do."""
    tokens = profile.max_batched_tokens
    return tokens / profile.step_time(tokens, 0.0, 0, 0.0)


def options_for(
    policy: Any,
    profile: Profile,
    *,
    kv_blocks: int,
    instances: int,
    seed: int,
    ties: Any,
    closed: bool = False,
) -> ReplayOptions:
    return ReplayOptions(
        profile=profile,
        kv_blocks=kv_blocks,
        policies=(policy,),
        ties=(ties or policy.ties,),
        prefill_instances=0,
        decode_instances=instances,
        closed=closed,
        predicted=False,
        seed=seed,
        state_delay_s=0.0,
        event_loss_ratio=0.0,
        in_flight="ignore",
        transfer_s_per_token=0.0,
    )
