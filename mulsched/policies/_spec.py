"""Policies as text: ``linear:weight=0.5``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mulsched.errors import InvalidArgument
from mulsched.policies._policy import get, parameters

__all__ = ["PolicySpec", "parse_spec"]


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """A policy's name and the parameters it is given; the others keep their defaults."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name and what it is given, as in ``linear(weight=0.5)``."""
        given = ", ".join(f"{name}={value}" for name, value in self.parameters.items())
        return f"{self.name}({given})" if given else self.name

    def check(self) -> "PolicySpec":
        """Return the spec itself if a policy can be built from it.

        Raises UnknownPolicy, InvalidArgument (no such parameter), and what the policy's factory raises.
        """
        known = parameters(self.name)
        unknown = [name for name in self.parameters if name not in known]
        if unknown:
            expected = ", ".join(known) or "none: it has no parameters"
            raise InvalidArgument(
                f"policy {self.name!r} has no parameter {unknown[0]!r}, expected {expected}"
            )
        get(self.name, **self.parameters)
        return self

    def given(self, **more: Any) -> "PolicySpec":
        """Return the spec with these parameters added or replaced."""
        return PolicySpec(self.name, {**self.parameters, **more})


def parse_spec(text: str) -> PolicySpec:
    """Read ``NAME`` or ``NAME:PARAMETER=VALUE,PARAMETER=VALUE`` and check that there is such a policy.

    A value that reads as a number is one. Raises as :meth:`PolicySpec.check`, InvalidArgument (syntax).
    """
    name, colon, rest = text.partition(":")
    given: dict[str, Any] = {}
    for part in rest.split(",") if colon else ():
        parameter, equals, value = (piece.strip() for piece in part.partition("="))
        if not (parameter and equals and value):
            raise InvalidArgument(f"expected NAME:PARAMETER=VALUE,..., as in linear:weight=0.5, got {text!r}")
        if parameter in given:
            raise InvalidArgument(f"{text!r} gives {parameter!r} twice")
        given[parameter] = _value(value)
    return PolicySpec(name.strip(), given).check()


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
