"""What a policy is, and the registry of named ones."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mulsched.errors import InvalidArgument, InvalidType, NoEligibleInstance, NonFiniteScore, UnknownPolicy
from mulsched.failure import FailureDetector
from mulsched.indicators import Columns, uniform_draws
from mulsched.scorers import Score, as_scores

__all__ = [
    "Filter",
    "Policy",
    "Ties",
    "get",
    "is_factory",
    "names",
    "parameters",
    "pick",
    "register",
    "select",
]

Filter = Callable[[Columns], NDArray[np.bool_]]
"""From columns to a mask of the candidates that stay, shape ``(n,)``."""

Ties = Literal["least_recent", "random", "first"]

_TIE_SALT = 0x7469_6573  # "ties": tie draws must not repeat the draws that a random score has used


@dataclass(frozen=True, slots=True)
class Policy:
    """A whole policy: filters, then a score, then the pick of the smallest.

    Each filter sees the candidates the filters before it left; the score sees those that all left.
    ``ties`` says who wins among equal scores, always after the lowest batch size: ``"least_recent"`` the
    least recently chosen, then the lowest row; ``"random"`` a seeded draw; ``"first"`` is the exception
    and takes the lowest row at once, as many routers do.

    ``on_dispatch(columns, position)`` is told of every booked decision, with all the candidates'
    columns and the position of the chosen one in them. A policy that keeps state keeps it there; scores
    and filters only read. ``detector`` masks candidates before the filters while an alarm is in force for
    the request; the router tells it of dispatches and ends. ``source`` says where the rule is from.
    Raises InvalidType, InvalidArgument.
    """

    name: str
    score: Score
    filters: tuple[Filter, ...] = ()
    ties: Ties = "least_recent"
    on_dispatch: Callable[[Columns, int], None] | None = None
    detector: FailureDetector | None = None
    source: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise InvalidType(f"the name of a policy must be a str, got {type(self.name).__name__}")
        if not callable(self.score):
            raise InvalidType(f"score of policy {self.name!r} must be callable, got {self.score!r}")
        if not isinstance(self.filters, tuple) or not all(map(callable, self.filters)):
            raise InvalidType(
                f"filters of policy {self.name!r} must be a tuple of callables, got {self.filters!r}"
            )
        if self.on_dispatch is not None and not callable(self.on_dispatch):
            raise InvalidType(
                f"on_dispatch of policy {self.name!r} must be callable or None, got {self.on_dispatch!r}"
            )
        if self.detector is not None and not isinstance(self.detector, FailureDetector):
            raise InvalidType(
                f"detector of policy {self.name!r} must be a FailureDetector or None, got {self.detector!r}"
            )
        if self.ties not in get_args(Ties):
            raise InvalidArgument(f"ties must be 'least_recent', 'random' or 'first', got {self.ties!r}")


def _scores(policy: Policy, columns: Columns) -> NDArray[np.float64]:
    scores = as_scores(policy.score(columns), columns, "policy", policy.name)
    finite = np.isfinite(scores)
    if not finite.all():
        worst = int(np.argmin(finite))
        raise NonFiniteScore(
            f"policy {policy.name!r} gave {scores[worst]} for instance {columns.instances[worst]!r}; "
            "scores must be finite"
        )
    return scores


def pick(columns: Columns, scores: NDArray[np.float64], ties: Ties) -> int:
    """Return the position of the smallest score, ties broken as ``ties`` says. O(n)."""
    best = np.flatnonzero(scores == scores.min())
    if len(best) == 1 or ties == "first":
        return int(best[0])
    batch = columns.batch_size[best]
    best = best[batch == batch.min()]
    if ties == "random":
        draws = uniform_draws(columns.seed ^ _TIE_SALT, columns.decision, columns.rows[best])
        return int(best[np.argmin(draws)])
    # argmin takes the first of equals, and candidates come in the order of their rows
    return int(best[np.argmin(columns.last_chosen[best])])


def select(
    policy: Policy, columns: Columns, ties: Ties, *, keep: NDArray[np.bool_] | None = None
) -> tuple[int, NDArray[np.float64]]:
    """Run filters, score and pick; return the position and all scores, NaN where filtered out.

    ``keep``: only these candidates, at least one, ``(n,)`` bool.

    Raises NoEligibleInstance, NonFiniteScore, InvalidArgument (scores or a filter's mask of the wrong shape),
    InvalidType (scores that are no numbers).
    """
    left = columns if keep is None else columns.take(keep)
    keep = None if keep is None else keep.copy()
    for position, accept in enumerate(policy.filters):
        mask = np.asarray(accept(left))
        if mask.shape != (len(left),) or mask.dtype != np.bool_:
            raise InvalidArgument(
                f"filter {position} of policy {policy.name!r} must return a bool mask of shape "
                f"({len(left)},), got {mask.dtype} of shape {mask.shape}"
            )
        if mask.all():
            continue
        if not mask.any():
            raise NoEligibleInstance(
                f"filter {position} of policy {policy.name!r} left none of {len(left)} candidates"
            )
        if keep is None:
            keep = mask.copy()
        else:
            keep[np.flatnonzero(keep)] = mask
        left = left.take(mask)
    scores = _scores(policy, left)
    chosen = pick(left, scores, ties)
    if keep is None:
        return chosen, scores
    everywhere = np.full(len(columns), np.nan)
    everywhere[keep] = scores
    return int(np.flatnonzero(keep)[chosen]), everywhere


_REGISTRY: dict[str, Callable[..., Policy]] = {}


def register(name: str, factory: Callable[..., Policy], *, replace: bool = False) -> None:
    """Make ``Router(policy=name)`` build its policy with ``factory(**parameters)``.

    The factory is called once per router, so state that it creates is that router's own.
    Raises InvalidType, InvalidArgument (the name is taken and ``replace`` is false).
    """
    if not isinstance(name, str):
        raise InvalidType(f"the name of a policy must be a str, got {type(name).__name__}")
    if not callable(factory):
        raise InvalidType(f"the factory of policy {name!r} must be callable, got {type(factory).__name__}")
    if name in _REGISTRY and not replace:
        raise InvalidArgument(f"policy {name!r} is registered already; pass replace=True to replace it")
    _REGISTRY[name] = factory


def _factory(name: str) -> Callable[..., Policy]:
    try:
        return _REGISTRY[name]
    except (KeyError, TypeError):
        raise UnknownPolicy(f"unknown policy {name!r}, expected one of {', '.join(names())}") from None


def get(name: str, **parameters: Any) -> Policy:
    """Build a new policy by name. Raises UnknownPolicy, and what the factory raises."""
    return _factory(name)(**parameters)


def parameters(name: str) -> dict[str, Any]:
    """Return the named parameters of a policy and their defaults. Raises UnknownPolicy."""
    signature = inspect.signature(_factory(name))
    return {
        parameter.name: parameter.default
        for parameter in signature.parameters.values()
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    }


def is_factory(value: object) -> bool:
    """Return whether ``value`` is a registered factory, which makes a policy and is none itself."""
    return any(value is factory for factory in _REGISTRY.values())


def names() -> tuple[str, ...]:
    """Return the names of all registered policies, sorted."""
    return tuple(sorted(_REGISTRY))
