"""The invariants by name: what a score or a policy may be expected to satisfy, each with its exact statement.

``help(invariants.monotone)`` says what the property is, on which inputs, what it gives a router, and where
it is known to be broken. None is a law: a policy may break one on purpose, and then its users should know.

*All columns* are those of :func:`mulsched.testing.strategies.columns`. A policy that keeps state has been
told of a few decisions before. Where ``finite``, ``deterministic`` or ``pure`` is broken, the others wait
until it is mended.
"""

from mulsched.errors import InvalidArgument
from mulsched.testing._of_choices import (
    best_wins,
    dominance,
    independent_of_irrelevant,
    monotone,
    no_zero_veto,
    ties_do_not_herd,
    work_conserving,
)
from mulsched.testing._of_scores import (
    deterministic,
    finite,
    non_negative,
    permutation_equivariant,
    pure,
    scale_invariant_requests,
    scale_invariant_tokens,
)
from mulsched.testing._subject import Invariant

__all__ = [
    "best_wins",
    "deterministic",
    "dominance",
    "finite",
    "get",
    "independent_of_irrelevant",
    "monotone",
    "names",
    "no_zero_veto",
    "non_negative",
    "permutation_equivariant",
    "pure",
    "scale_invariant_requests",
    "scale_invariant_tokens",
    "ties_do_not_herd",
    "work_conserving",
]

_ALL: dict[str, Invariant] = {
    invariant.__name__: invariant
    for invariant in (
        finite,
        deterministic,
        pure,
        non_negative,
        permutation_equivariant,
        monotone,
        dominance,
        best_wins,
        work_conserving,
        independent_of_irrelevant,
        no_zero_veto,
        ties_do_not_herd,
        scale_invariant_tokens,
        scale_invariant_requests,
    )
}


def names() -> tuple[str, ...]:
    """Return the names of all invariants, in the order in which they are checked."""
    return tuple(_ALL)


def get(name: str) -> Invariant:
    """Return an invariant by name. Raises InvalidArgument for one that there is not."""
    try:
        return _ALL[name]
    except (KeyError, TypeError):
        raise InvalidArgument(f"unknown invariant {name!r}, expected one of {', '.join(_ALL)}") from None
