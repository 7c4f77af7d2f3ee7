"""Replay: a trace through a router into modelled engines.

The twins: ``_replay_py`` drives the production :class:`~mulsched.Router`; ``_native`` runs the same loop in
C++ on the router's own index, columns and pick. Their results are equal to the last bit.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mulsched._backend import BACKEND
from mulsched.errors import InvalidArgument
from mulsched.policies import Policy, Ties, get
from mulsched.replay.profile import Profile
from mulsched.replay.records import Records, ReplayOptions
from mulsched.replay.trace import Trace
from mulsched.router import InFlight

if BACKEND == "native":
    from mulsched.replay._native import run_replay
else:
    from mulsched.replay._replay_py import run_replay

__all__ = ["CacheSource", "Disaggregation", "Loop", "ReplayResult", "replay"]

CacheSource = Literal["events", "predicted"]
Loop = Literal["open", "closed"]
Progress = Callable[[int, int], None]

_PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class Disaggregation:
    """Prefill and decode on instances of their own, the KV cache sent from one to the other.

    The first ``prefill_instances`` compute prompts and make one token, which nobody sees. After
    ``transfer_s_per_token`` for each prompt token the request arrives at a decode instance, which
    ``decode_policy`` chooses; it computes the last prompt token again, as vLLM's connectors do, and with that
    its first token. Default: 131,072 bytes a token (an 8B model in bf16) over 400 Gbit/s.
    Raises InvalidArgument.
    """

    prefill_instances: int
    decode_policy: str = "least_loaded"
    transfer_s_per_token: float = 131_072 / 50e9

    def __post_init__(self) -> None:
        if self.prefill_instances < 1:
            raise InvalidArgument(f"prefill_instances must be at least 1, got {self.prefill_instances}")
        _check_seconds("transfer_s_per_token", self.transfer_s_per_token)


def _check_seconds(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise InvalidArgument(f"{name} must be finite and at least 0, got {value}")


@dataclass(frozen=True, slots=True, eq=False)
class ReplayResult:
    """What happened to each of n requests, and under what.

    ``arrival_s``, ``first_token_s``, ``finish_s``: (n,) seconds from the start. ``instance`` (n,): where it
    went, ``decode_instance`` (n,): where it went to decode, the same without disaggregation.
    ``cached_tokens`` (n,): prompt tokens that the engine found in its cache; ``hit_tokens`` (n,): what the
    router thought it would. ``prompt_tokens``, ``output_tokens`` (n,) as in the trace. ``lost_messages``: of
    KV events, on the way to the router; ``orphans``: stored blocks whose parent it did not know.
    """

    trace: str
    synthetic: bool
    policy: str
    parameters: Mapping[str, Any]
    profile: str
    seed: int
    ties: str
    instances: int
    kv_blocks: int
    loop: str
    cache_source: str
    state_delay_s: float
    event_loss_ratio: float
    in_flight: str
    disaggregation: Disaggregation | None
    arrival_s: NDArray[np.float64]
    first_token_s: NDArray[np.float64]
    finish_s: NDArray[np.float64]
    instance: NDArray[np.int64]
    decode_instance: NDArray[np.int64]
    cached_tokens: NDArray[np.int64]
    hit_tokens: NDArray[np.int64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    preemptions: int
    lost_messages: int
    orphans: int

    @property
    def label(self) -> str:
        """The policy and the parameters it was given, as in ``linear(weight=0.5)``."""
        given = ", ".join(f"{name}={value}" for name, value in self.parameters.items())
        return f"{self.policy}({given})" if given else self.policy

    @property
    def ttft_s(self) -> NDArray[np.float64]:
        """Time to first token, (n,) seconds."""
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> NDArray[np.float64]:
        """Time per output token after the first, seconds; without requests of one token."""
        several = self.output_tokens > 1
        tpot: NDArray[np.float64] = (self.finish_s - self.first_token_s)[several] / (
            self.output_tokens[several] - 1
        )
        return tpot

    def summary(self) -> dict[str, float]:
        """Return the figures of a report by name; times in seconds, ratios of prompt tokens.

        ``request_spread`` and ``prefill_spread`` are the busiest instance's share over the mean one's.
        """
        figures = {}
        for name, values in (("ttft", self.ttft_s), ("tpot", self.tpot_s)):
            figures[f"{name}_mean_s"] = float(values.mean()) if len(values) else math.nan
            for q in _PERCENTILES:
                figures[f"{name}_p{q}_s"] = float(np.percentile(values, q)) if len(values) else math.nan
        span = float(self.finish_s.max() - self.arrival_s.min())
        new_tokens = self.prompt_tokens - self.cached_tokens
        requests = np.bincount(self.instance, minlength=self.instances)
        prefill = np.bincount(self.instance, weights=new_tokens, minlength=self.instances)
        return figures | {
            "requests_per_s": len(self.arrival_s) / span,
            "output_tokens_per_s": float(self.output_tokens.sum()) / span,
            "hit_ratio": float(self.cached_tokens.sum() / self.prompt_tokens.sum()),
            "predicted_hit_ratio": float(self.hit_tokens.sum() / self.prompt_tokens.sum()),
            "request_spread": float(requests.max() / requests.mean()),
            "prefill_spread": float(prefill.max() / prefill.mean()),
            "preemptions": float(self.preemptions),
            "lost_messages": float(self.lost_messages),
            "orphans": float(self.orphans),
        }


def replay(
    trace: Trace,
    policy: str | Policy,
    *,
    parameters: Mapping[str, Any] | None = None,
    profile: Profile,
    instances: int = 16,
    kv_blocks: int | None = None,
    cache_source: CacheSource = "events",
    loop: Loop = "open",
    state_delay_s: float = 0.0,
    event_loss_ratio: float = 0.0,
    in_flight: InFlight = "cached",
    disaggregation: Disaggregation | None = None,
    seed: int = 0,
    ties: Ties | None = None,
    progress: Progress | None = None,
) -> ReplayResult:
    """Replay a trace under one policy and return what happened to each request.

    ``parameters`` are keywords of the factory of a policy given by name. ``kv_blocks`` replaces the
    profile's. ``cache_source``: the router learns of caches from the engines'
    events, or predicts them. ``loop``: requests arrive by the trace's times, or (closed) a follow-up arrives
    its think time after the end of the request before it. ``state_delay_s``: how much later the router hears
    what an engine tells, KV events, first tokens and ends alike. ``event_loss_ratio``: the share of messages
    of KV events, one a step, that never arrive. ``in_flight``: as of a :class:`~mulsched.Router`.
    ``disaggregation``: ``policy`` then chooses among the prefill instances. ``progress(done, all)`` is called
    now and then.
    Deterministic: the same arguments give the same result.

    Raises UnknownPolicy, InvalidArgument (among others: a request that no engine can hold).
    """
    given = dict(parameters or {})
    if given and not isinstance(policy, str):
        raise InvalidArgument(f"parameters {given} go with a policy's name, got a Policy")
    blocks = profile.kv_blocks if kv_blocks is None else kv_blocks
    if instances < 1 or blocks < 1:
        raise InvalidArgument(f"instances and kv_blocks must be at least 1, got {instances} and {blocks}")
    if cache_source not in get_args(CacheSource) or loop not in get_args(Loop):
        raise InvalidArgument(
            f"cache_source must be events or predicted and loop open or closed, got {cache_source}, {loop}"
        )
    # unsigned, or the sum could wrap
    longest = int((trace.prompt_tokens.astype(np.uint64) + trace.output_tokens.astype(np.uint64)).max())
    if longest > blocks * profile.block_size:
        raise InvalidArgument(
            f"{trace.name} has a request of {longest} tokens, an engine holds {blocks * profile.block_size}: "
            "raise kv_blocks or limit prompts"
        )
    _check_seconds("state_delay_s", state_delay_s)
    if in_flight not in get_args(InFlight):
        raise InvalidArgument(f"in_flight must be 'ignore' or 'cached', got {in_flight!r}")
    if not 0 <= event_loss_ratio <= 1:
        raise InvalidArgument(f"event_loss_ratio must lie in 0..1, got {event_loss_ratio}")
    if profile.block_size > trace.block_size or trace.block_size % profile.block_size:
        raise InvalidArgument(
            f"the engine's blocks of {profile.block_size} tokens must divide the trace's {trace.block_size}"
        )
    prefill = 0 if disaggregation is None else disaggregation.prefill_instances
    if prefill >= instances:
        raise InvalidArgument(f"{prefill} prefill instances leave none of {instances} to decode")
    chosen = get(policy, **given) if isinstance(policy, str) else policy
    pools = (chosen,) if disaggregation is None else (chosen, get(disaggregation.decode_policy))
    options = ReplayOptions(
        profile=profile,
        kv_blocks=blocks,
        policies=pools,
        ties=tuple(ties or pool.ties for pool in pools),
        prefill_instances=prefill,
        decode_instances=instances - prefill,
        closed=loop == "closed",
        predicted=cache_source == "predicted",
        seed=seed,
        state_delay_s=state_delay_s,
        event_loss_ratio=event_loss_ratio,
        in_flight=in_flight,
        transfer_s_per_token=0.0 if disaggregation is None else disaggregation.transfer_s_per_token,
    )
    records = Records.empty(len(trace))
    counts = run_replay(trace, options, records, progress)
    return ReplayResult(
        trace=trace.name,
        synthetic=trace.synthetic,
        policy=chosen.name,
        parameters=given,
        profile=profile.name,
        seed=seed,
        ties=ties or chosen.ties,
        instances=instances,
        kv_blocks=blocks,
        loop=loop,
        cache_source=cache_source,
        state_delay_s=state_delay_s,
        event_loss_ratio=event_loss_ratio,
        in_flight=in_flight,
        disaggregation=disaggregation,
        arrival_s=records.arrival_s,
        first_token_s=records.first_token_s,
        finish_s=records.finish_s,
        instance=records.instance,
        decode_instance=records.decode_instance,
        cached_tokens=records.cached_tokens,
        hit_tokens=records.hit_tokens,
        prompt_tokens=trace.prompt_tokens,
        output_tokens=trace.output_tokens,
        preemptions=counts.preemptions,
        lost_messages=counts.lost_messages,
        orphans=counts.orphans,
    )
