"""What a sweep or a tuning varies: ``rate``, ``weight=0,0.5,1``, ``linear:weight``."""

import math
from dataclasses import dataclass

from mulsched.errors import InvalidArgument
from mulsched.policies import PolicySpec, parameters

__all__ = ["DEFAULT_GRIDS", "Grid", "Tune", "parse_grid", "parse_tune"]

DEFAULT_GRIDS: dict[str, tuple[int | float, ...]] = {
    # twentieths: the paper's best weights, .7 and .55, are known no finer
    "weight": tuple(round(0.05 * i, 2) for i in range(21)),
    # powers of two about Dynamo's default of 1, and none
    "overlap_weight": (0, 0.25, 0.5, 1, 2, 4, 8),
}
"""Values of a parameter when none are given."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A parameter, or ``rate``, and the values to try, ascending. Raises InvalidArgument."""

    parameter: str
    values: tuple[int | float, ...]

    def __post_init__(self) -> None:
        if not self.values or not all(math.isfinite(value) for value in self.values):
            raise InvalidArgument(f"values of {self.parameter} must be finite, got {list(self.values)}")
        if any(a >= b for a, b in zip(self.values, self.values[1:], strict=False)):
            raise InvalidArgument(
                f"values of {self.parameter} must differ and ascend, got {list(self.values)}"
            )


@dataclass(frozen=True, slots=True)
class Tune:
    """A policy and the parameter of it that is tuned.

    Raises UnknownPolicy, InvalidArgument (no such parameter), and what the policy raises for a value.
    """

    policy: str
    grid: Grid

    def __post_init__(self) -> None:
        for spec in self.specs:
            spec.check()

    @property
    def specs(self) -> list[PolicySpec]:
        """The policy with each of the values."""
        return [PolicySpec(self.policy, {self.grid.parameter: value}) for value in self.grid.values]


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def parse_grid(text: str) -> Grid:
    """Read ``NAME=V,V,..``, or ``NAME`` of an entry of ``DEFAULT_GRIDS``. Raises InvalidArgument."""
    name, equals, listed = (piece.strip() for piece in text.partition("="))
    if not equals:
        values = DEFAULT_GRIDS.get(name)
        if values is None:
            raise InvalidArgument(f"{name!r} has no default values, write {name}=VALUE,VALUE,...")
        return Grid(name, values)
    try:
        return Grid(name, tuple(_number(value) for value in listed.split(",")))
    except ValueError as error:
        if isinstance(error, InvalidArgument):
            raise
        raise InvalidArgument(f"expected numbers, as in {name}=0.25,0.5, got {text!r}") from error


def parse_tune(text: str) -> Tune:
    """Read ``POLICY``, ``POLICY:PARAMETER`` or ``POLICY:PARAMETER=V,V,..``. Raises as Tune and parse_grid."""
    policy, _, grid = (piece.strip() for piece in text.partition(":"))
    if not grid:
        grid = next((name for name in parameters(policy) if name in DEFAULT_GRIDS), "")
    if not grid:
        raise InvalidArgument(
            f"say which parameter of {policy!r} to tune, as in {policy}:NAME=VALUE,VALUE,...; "
            f"it has {', '.join(parameters(policy)) or 'none'}"
        )
    return Tune(policy, parse_grid(grid))
