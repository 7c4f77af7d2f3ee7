"""The replay's Python loop on engines with a tier, whose events reach the router with their medium."""

from dataclasses import dataclass
from typing import Any

from mulsched import BlockRemoved, BlockStored, Router
from mulsched.replay import Profile, Trace
from mulsched.replay._replay_py import _STEP_END, _Pool, _Replay
from mulsched.replay.records import Records, ReplayOptions
from tiers.engine import TieredEngineModel
from tiers.host_memory import HostChange


@dataclass(frozen=True, slots=True)
class Tier:
    """The tier of every engine: ``host_ratio`` times as many blocks as its GPU holds.

    ``cost_ratio``: the time to load a token over the time to compute it at the engine's best prefill rate.
    """

    host_ratio: float
    cost_ratio: float
    overlaps: bool = True


class TieredReplay(_Replay):
    """A replay of one pool. ``told_ratio``: the router's for the host, None for one that ignores it."""

    def __init__(
        self, trace: Trace, options: ReplayOptions, records: Records, tier: Tier, told_ratio: float | None
    ) -> None:
        self.tier = tier
        self.told_ratio = told_ratio
        super().__init__(trace, options, records)

    def router(self, p: int) -> Router:
        options = self.options
        return Router(
            block_size=options.profile.block_size,
            policy=options.policies[p],
            ties=options.ties[p],
            seed=options.seed,
            in_flight=options.in_flight,
            tier_cost_ratio=None if self.told_ratio is None else {"CPU": self.told_ratio},
        )

    def pool(self, p: int, n: int) -> _Pool:
        made, options, tier = super().pool(p, n), self.options, self.tier
        made.engines = [
            TieredEngineModel(
                options.profile,
                kv_blocks=options.kv_blocks,
                host_blocks=int(tier.host_ratio * options.kv_blocks),
                load_s_per_token=tier.cost_ratio / prefill_tokens_per_s(options.profile),
                overlaps=tier.overlaps,
            )
            for _ in range(n)
        ]
        return made

    def start_step(self, p: int, at: int, now: float) -> None:
        super().start_step(p, at, now)
        engine = self.pools[p].engines[at]
        if not engine.stepping and engine.next_load_s is not None:
            self.plan(engine.next_load_s, _STEP_END, at, p)  # to wake it, unless an arrival does before

    def end_step(self, p: int, at: int, now: float) -> None:
        engine = self.pools[p].engines[at]
        if engine.step_ends_s == now:
            super().end_step(p, at, now)
        elif not engine.stepping:
            self.start_step(p, at, now)

    def hear_change(self, p: int, at: int, change: Any) -> None:
        if not isinstance(change, HostChange):
            super().hear_change(p, at, change)
            return
        name, router, size = self.pools[p].names[at], self.pools[p].router, self.options.profile.block_size
        if change.stored:
            router.apply(
                BlockStored(name, change.keys, change.parent, size, block_keys=change.keys, medium="CPU")
            )
        else:
            router.apply(BlockRemoved(name, change.keys, "CPU"))


def prefill_tokens_per_s(profile: Profile) -> float:
    """Return the rate at which the profile's engine prefills when it has nothing else to do."""
    tokens = profile.max_batched_tokens
    return tokens / profile.step_time(tokens, 0.0, 0, 0.0)
