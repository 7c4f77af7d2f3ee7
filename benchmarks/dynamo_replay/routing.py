"""Dynamo's router and our ``dynamo`` policy: one follows the other's decisions and says what it thinks.

Each decision of one Dynamo run is put to our router, which is then made to book Dynamo's choice, and to a
model of Dynamo's rule. So both are asked in the very state that Dynamo was in, and drawn ties do not matter.
"""

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np

from dynamo_replay.simulators import Outcome
from mulsched import Router, policies
from mulsched.replay import Trace
from mulsched.types import Keys


@dataclass
class DynamoRule:
    """Dynamo 1.6.1's cost of one worker, in blocks; smallest wins.

    ``prefill_load_scale * max(0, (active_prefill_tokens + prompt) / block_size - overlap) + decode_blocks``.
    Active prefill: prompt less overlap of the requests that wait for their first token. Decode blocks: full
    prompt blocks of the requests there and of this one, each counted once (``assume_kv_reuse``) or once for
    each request. Outputs count only with router_track_output_blocks, which is off. Source:
    ai-dynamo/dynamo, lib/kv-router/src/scheduling/selector/default.rs and sequences/block_tracker.rs.
    """

    block_size: int
    prefill_load_scale: float
    assume_kv_reuse: bool
    known: set[int] = field(default_factory=set)
    active: Counter[int] = field(default_factory=Counter)
    active_prefill_tokens: int = 0

    def overlap(self, keys: list[int]) -> int:
        return next((n for n, key in enumerate(keys) if key not in self.known), len(keys))

    def cost(self, keys: list[int], prompt_tokens: int) -> float:
        raw = (self.active_prefill_tokens + prompt_tokens) / self.block_size
        if self.assume_kv_reuse:
            decode = len(self.active) + sum(key not in self.active for key in keys)
        else:
            decode = self.active.total() + len(keys)
        return self.prefill_load_scale * max(0.0, raw - self.overlap(keys)) + decode

    def first_token(self, keys: list[int], booked_tokens: int) -> None:
        self.active_prefill_tokens -= booked_tokens
        self.known.update(keys)

    def finish(self, keys: list[int]) -> None:
        self.active.subtract(keys)
        self.active = +self.active


@dataclass(frozen=True)
class Followed:
    """Shares of Dynamo's decisions that are a smallest score by its rule as modelled, and by our policy."""

    rule: float
    ours: float


def follow(
    trace: Trace,
    run: Outcome,
    *,
    instances: int,
    block_size: int = 16,
    prefill_load_scale: float = 1.0,
    assume_kv_reuse: bool = True,
) -> Followed:
    """Put every decision of a Dynamo run to the rule and to our policy.

    The run needs a cache that never evicts and prompts that fit into one step: then the workers' caches
    follow from the report, and change where first tokens come.
    """
    policy = policies.get("dynamo", overlap_weight=prefill_load_scale)
    router = Router(block_size=block_size, policy=policy, in_flight="ignore")  # as Dynamo's
    rules = [DynamoRule(block_size, prefill_load_scale, assume_kv_reuse) for _ in range(instances)]
    for worker in range(instances):
        router.add_instance(str(worker), cache_blocks=int(trace.prompt_tokens.sum()) // block_size + 1)
    keys: list[Keys] = [trace.keys(i, block_size) for i in range(len(trace))]
    booked = np.zeros(len(trace), dtype=np.int64)
    by_rule = by_ours = 0
    for kind, i in _moments(run):
        path, prompt, chosen = keys[i].tolist(), int(trace.prompt_tokens[i]), int(run.instance[i])
        rule = rules[chosen]
        if kind == "first_token":
            router.first_token(i)
            rule.first_token(path, int(booked[i]))
        elif kind == "finish":
            router.finish(i)
            rule.finish(path)
        else:
            scores = router.select_keys(keys[i], prompt_tokens=prompt).scores
            by_ours += bool(scores[chosen] == scores.min())
            by_rule += rule.cost(path, prompt) == min(r.cost(path, prompt) for r in rules)
            forced = router.select_keys(keys[i], prompt_tokens=prompt, candidates=[str(chosen)])
            router.dispatch(forced, request_id=i)
            booked[i] = max(0, prompt - rule.overlap(path) * block_size)
            rule.active_prefill_tokens += int(booked[i])
            rule.active.update(path)
    return Followed(rule=by_rule / len(trace), ours=by_ours / len(trace))


def alike(one: Outcome, other: Outcome) -> int:
    """Return how many requests from the first on went the same way, whatever the workers are called."""
    name: dict[int, int] = {}
    for i, (here, there) in enumerate(zip(one.instance.tolist(), other.instance.tolist(), strict=True)):
        if name.setdefault(here, there) != there or len(set(name.values())) < len(name):
            return i
    return len(one.instance)


def _moments(run: Outcome) -> list[tuple[str, int]]:
    """What the router hears, in order: at one time ends come before arrivals."""
    moments = [
        (time_s, rank, i, kind)
        for rank, kind, times in (
            (0, "first_token", run.first_token_s),
            (1, "finish", run.finish_s),
            (2, "arrival", run.arrival_s),
        )
        for i, time_s in enumerate(times.tolist())
    ]
    return [(kind, i) for _, _, i, kind in sorted(moments)]


def whole_blocks(trace: Trace, block_size: int) -> Trace:
    """Prompts grow to whole blocks: no partial block, and no full hit, since only blocks with ids are shared.

    For synthetic traces, which give ids to full blocks only.
    """
    return replace(trace, prompt_tokens=(trace.prompt_tokens // block_size + 1) * block_size)
