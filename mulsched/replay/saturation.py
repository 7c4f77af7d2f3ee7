"""How much traffic is too much: where the default grid of a rate sweep ends."""

from collections.abc import Callable, Mapping
from typing import Any

from mulsched.errors import InvalidArgument
from mulsched.policies import PolicySpec
from mulsched.replay.experiment import Progress, TraceAt
from mulsched.replay.simulator import ReplayResult, replay

__all__ = ["SATURATION_FRACTIONS", "is_saturated", "rates_to_saturation"]

SATURATION_FRACTIONS = (0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1)
"""Of the saturating rate. Arbitrary but for half of it, where the LMetric paper runs: dense where queues
grow,
and one beyond."""

_UNSERVED = 0.05
_DOUBLINGS = 12
_BISECTIONS = 3


def is_saturated(result: ReplayResult) -> bool:
    """Whether more than one request in twenty still has no first token when the last one arrives, that apart.

    In a cluster that keeps up, these are a TTFT's worth of arrivals. One that can serve 19 in 20 or less of
    what comes to it ends with more. The bound is arbitrary; a trace must be longer than 20 times its TTFT.
    """
    late = int((result.first_token_s > result.arrival_s.max()).sum())
    return late - 1 > _UNSERVED * len(result.arrival_s)


def rates_to_saturation(
    policy: PolicySpec,
    trace_at: TraceAt,
    options: Mapping[str, Any],
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[float, ...]:
    """Return ``SATURATION_FRACTIONS`` of the rate that saturates ``policy``, as scales to three digits.

    Doubles or halves the rate until one is saturated and one is not, then bisects their ratio to 9 %.
    Raises InvalidArgument (a closed loop, where who waits does not send; none found within 2**12).
    """
    if options.get("loop") == "closed":
        raise InvalidArgument(
            "in a closed loop users wait, so no rate saturates: give the rates, as in rate=0.5,1"
        )

    def saturated(rate: float) -> bool:
        told = _telling(progress, f"does rate {rate:g} saturate?")
        own = {"policy": policy.name, "parameters": policy.parameters, "seed": seed}
        return is_saturated(replay(trace_at(rate), **{**options, **own}, progress=told))

    served = refused = 1.0
    first = saturated(1.0)
    for _ in range(_DOUBLINGS):
        if first:
            served /= 2
            if not saturated(served):
                break
            refused = served
        else:
            refused *= 2
            if saturated(refused):
                break
            served = refused
    else:
        raise InvalidArgument(
            f"no saturating rate lies between {min(served, refused):g} and {max(served, refused):g} times "
            "the trace's: give the rates, as in rate=0.5,1"
        )
    for _ in range(_BISECTIONS):
        middle = (served * refused) ** 0.5
        if saturated(middle):
            refused = middle
        else:
            served = middle
    return tuple(float(f"{fraction * served:.3g}") for fraction in SATURATION_FRACTIONS)


def _telling(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(what, done, total)
