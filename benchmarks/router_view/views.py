"""Routers that see less, or otherwise, than the production router does, for the replay's Python loop."""

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
