"""When requests that share a prefix must overload the instances that hold it: pure functions on numbers.

Symbols, as in section 5.2 of LMetric (arXiv 2603.15202) and ``docs/theory.md``: N instances; a class is the
requests that share a prefix; its share x is the part of all load that it brings; its holders M are the
instances that have the prefix cached.

The paper's condition counts requests. What holders must carry is load, so :func:`load_shares` turns rates
into shares of whatever load is asked about, and every other function takes shares of any kind:

    requests    work per request 1: the paper's condition
    prefill     new prefill tokens per request, counted where the class runs: ``new_prefill_tokens`` of a hit
    residence   seconds from dispatch to finish: by Little's law a class with rate r and residence s has r * s
                requests in the fleet on average, so this is its share of running and waiting requests

Instances are taken to be alike. A margin is in parts of the fleet's load, and negative where it must fail.
"""

import math
from collections.abc import Collection, Hashable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mulsched.errors import InvalidArgument, InvalidType
from mulsched.load import check_count

__all__ = [
    "count_margin",
    "kept_share",
    "least_peak",
    "least_spill",
    "load_shares",
    "tolerated_batch_ratio",
    "worst_set",
]

MAX_CLASSES = 16
"""Most holder sets that differ: unions grow as 2^k, and 2^16 take 0.2 s (measured, one core)."""

_ROUNDING = 1e-9  # shares that are quotients of floats may sum to a little over 1


def count_margin(share: float, holders: int, instances: int) -> float:
    """Return ``holders / instances - share``: the paper's condition (2) holds where it is at least 0.

    ``share``: the class's part of all load, in 0..1; ``holders``: how many instances hold its prefix.
    The paper writes x / (1 - x) <= |M| / (N - |M|), which is x <= |M| / N wherever both sides are finite.
    The difference is finite everywhere and has a unit: the part of all load that has to leave the holders.
    Rounding is monotone, so shares k / n that satisfy the condition exactly never get a negative margin.

    Edges: holders = N is never negative, x = 0 neither. A class that nobody holds attracts nobody, and
    its margin is that of a class which everybody holds, 1 - x; the paper's quotient would be 0.
    Raises InvalidType, InvalidArgument.
    """
    instances = check_count(instances, "instances", least=1)
    holders = _check_holders(holders, instances)
    return (holders or instances) / instances - _check_share(share, "share")


def load_shares(arrivals_per_s: ArrayLike, load_per_request: ArrayLike) -> NDArray[np.float64]:
    """Return each class's share of the load, rate times load per request, shape ``(n_classes,)``.

    Give all traffic, the unshared rest as a class of its own, or the shares are of the classes alone.
    ``load_per_request`` is in any unit, one for all: 1, new prefill tokens, seconds of residence (Little
    1961). Without any load all shares are 0. Raises InvalidArgument (shapes differ; negative, not finite).
    """
    rates = _check_loads(arrivals_per_s, "arrivals_per_s")
    work = _check_loads(load_per_request, "load_per_request")
    if rates.shape != work.shape:
        raise InvalidArgument(
            f"arrivals_per_s and load_per_request must have one shape (n_classes,), "
            f"got {rates.shape} and {work.shape}"
        )
    loads: NDArray[np.float64] = rates * work
    total = loads.sum()
    return loads / total if total > 0 else loads


def worst_set(
    shares: Sequence[float], holders: Sequence[Collection[Hashable]], instances: int
) -> tuple[float, frozenset[Hashable]]:
    """Return the smallest margin over sets T of instances, and the smallest T that has it.

    The margin of T is |T| / instances less the shares of the classes whose holders all lie in T: those have
    nowhere else to be a hit. Each class can be served by holders alone, with no instance above the mean,
    exactly where no T has a negative margin: Hall's theorem for fractional transport (Gale 1957). With
    one class it is :func:`count_margin`.

    ``holders``: per class the instances, by name or row, that hold its prefix. A class without holders
    binds nobody; if none has any, T is empty and the margin 1 less all shares.
    Only unions of holder sets can be worst: O(k * 2^k) for k sets that differ, O(k^2) if they are nested.
    Sums of shares round, so an exact tie may have a margin of -1e-16.
    Raises InvalidType, InvalidArgument (lengths, shares that sum to over 1, over 16 sets that differ, more
    holders than instances).
    """
    instances = check_count(instances, "instances", least=1)
    classes, names = _bound_classes(shares, holders, instances)
    if not classes:
        return 1 - min(1.0, math.fsum(shares)), frozenset()
    margin, _, worst = min((size / instances - share, size, union) for union, size, share in _unions(classes))
    return margin, frozenset(name for name, bit in names.items() if worst & bit)


def least_peak(shares: Sequence[float], holders: Sequence[Collection[Hashable]], instances: int) -> float:
    """Return the load of the busiest instance, in multiples of the mean, under the best of all routings.

    Best among those that serve every class on its holders only, in any proportions, and the rest of the
    load anywhere: the largest x(T) * instances / |T| over sets T as in :func:`worst_set`, and at least
    1. It is 1 exactly where no margin is negative. Arguments, cost and errors as there.
    """
    instances = check_count(instances, "instances", least=1)
    classes, _ = _bound_classes(shares, holders, instances)
    return max([1.0, *(share * instances / size for _, size, share in _unions(classes))])


def least_spill(
    *, holder_load: float, other_load: float, rest_load: float, holders: int, instances: int
) -> float:
    """Return the part of a class that must leave its holders to make the busiest instance least busy.

    Loads are rates times load per request, in one unit: the class's if all of it runs on holders, the
    class's if none does, and that of all other traffic, which may go anywhere. The part is 0 where the
    share ``holder_load / (holder_load + rest_load)`` has no negative margin; beyond, every instance carries
    the same at

        (h * (N - |M|) - |M| * e) / (h * (N - |M|) + |M| * o)        h, o, e: these loads; |M| holders of N

    A miss is paid each time, as where caches are too small to keep the prefix; where they keep it, the
    instance becomes a holder, and m grows. Without holders all of it is elsewhere, and the part is 1.
    Raises InvalidType, InvalidArgument (also ``other_load < holder_load``: a miss is not cheaper than a hit).
    """
    instances = check_count(instances, "instances", least=1)
    holders = _check_holders(holders, instances)
    holder_load = _check_number(holder_load, "holder_load")
    other_load = _check_number(other_load, "other_load")
    rest_load = _check_number(rest_load, "rest_load")
    if other_load < holder_load:
        raise InvalidArgument(f"other_load must be at least holder_load, got {other_load} and {holder_load}")
    if holders == 0:
        return 1.0
    excess = holder_load * (instances - holders) - holders * rest_load
    if excess <= 0:
        return 0.0
    return excess / (holder_load * (instances - holders) + holders * other_load)


def tolerated_batch_ratio(holder_p_tokens: int, other_p_tokens: int) -> float:
    """Return how many times another instance's batch size a holder's may be and still not lose.

    The paper's condition (4), P_t * BS_t <= P_o * BS_o, solved for BS_t / BS_o: the product prefers the
    holder up to P_o / P_t, ties included. P counts this request and what is queued. Raises InvalidType,
    InvalidArgument (below 1: engines compute at least the last token).
    """
    other = check_count(other_p_tokens, "other_p_tokens", least=1)
    return other / check_count(holder_p_tokens, "holder_p_tokens", least=1)


def kept_share(holders: int, instances: int, batch_ratio: float) -> float:
    """Return the share of resident requests up to which the product keeps a class on its holders.

    The x where x / (1 - x) = R * |M| / (N - |M|), R the ``batch_ratio`` of :func:`tolerated_batch_ratio`: the
    class alone on its holders at R times the batch of the rest on the others. With R = 1 it is the share of
    the paper's condition, |M| / N; between the two the condition fails and the product does not act.
    Edges: 1 if all hold, 0 if nobody does. Raises InvalidType, InvalidArgument.
    """
    instances = check_count(instances, "instances", least=1)
    holders = _check_holders(holders, instances)
    ratio = _check_number(batch_ratio, "batch_ratio")
    if ratio == 0:
        raise InvalidArgument(f"batch_ratio must be above 0, got {batch_ratio}")
    on_holders = ratio * holders
    return on_holders / (on_holders + instances - holders)


def _check_number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise InvalidType(f"{name} must be a number, got {type(value).__name__}")
    if not (math.isfinite(value) and value >= 0):
        raise InvalidArgument(f"{name} must be finite and at least 0, got {value}")
    return float(value)


def _check_share(value: Any, name: str) -> float:
    share = _check_number(value, name)
    if share > 1:
        raise InvalidArgument(f"{name} must be in 0..1, got {value}")
    return share


def _check_holders(holders: Any, instances: int) -> int:
    count = check_count(holders, "holders")
    if count > instances:
        raise InvalidArgument(f"holders must be in 0..{instances}, the number of instances, got {count}")
    return count


def _check_loads(values: ArrayLike, name: str) -> NDArray[np.float64]:
    try:
        loads = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InvalidType(f"{name} must be numbers of shape (n_classes,), got {values!r}") from None
    if loads.ndim != 1:
        raise InvalidArgument(f"{name} must have shape (n_classes,), got {loads.shape}")
    bad = ~(np.isfinite(loads) & (loads >= 0))
    if bad.any():
        raise InvalidArgument(f"{name} must be finite and at least 0, got {loads[bad.argmax()]}")
    return loads


def _bound_classes(
    shares: Sequence[float], holders: Sequence[Collection[Hashable]], instances: int
) -> tuple[dict[int, float], dict[Hashable, int]]:
    """Return the share by holder set, as bits, of the classes that have holders, and the bit of each name."""
    if len(shares) != len(holders):
        raise InvalidArgument(f"{len(shares)} shares need as many holder sets, got {len(holders)}")
    names: dict[Hashable, int] = {}
    by_set: dict[int, list[float]] = {}
    for position, (share, held) in enumerate(zip(shares, holders, strict=True)):
        if isinstance(held, str | bytes):
            raise InvalidType(f"holders[{position}] must be a collection of instances, got {held!r}")
        mask = 0
        for name in held:
            mask |= names.setdefault(name, 1 << len(names))
        by_set.setdefault(mask, []).append(_check_share(share, f"shares[{position}]"))
    if len(names) > instances:
        raise InvalidArgument(f"{instances} instances cannot be {len(names)} holders")
    total = math.fsum(shares)
    if total > 1 + _ROUNDING:
        raise InvalidArgument(f"shares must sum to at most 1, got {total}")
    by_set.pop(0, None)
    if len(by_set) > MAX_CLASSES:
        raise InvalidArgument(f"at most {MAX_CLASSES} holder sets that differ, got {len(by_set)}")
    return {mask: math.fsum(parts) for mask, parts in by_set.items()}, names


def _unions(classes: dict[int, float]) -> Iterator[tuple[int, int, float]]:
    """Yield every union of holder sets, as bits, with its size and the share of the classes inside it.

    A worst set is a union: instances that no class inside it needs only add to its size.
    """
    unions = {0}
    for mask in classes:
        unions |= {union | mask for union in unions}
    for union in sorted(unions - {0}):
        share = math.fsum(share for mask, share in classes.items() if mask & ~union == 0)
        # rounding alone lifts a sum of shares above 1
        yield union, union.bit_count(), min(1.0, share)
