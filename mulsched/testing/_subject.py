"""A policy under test: built anew, told a history, asked."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from hypothesis import reject
from hypothesis.strategies import SearchStrategy
from numpy.typing import NDArray

from mulsched.indicators import Columns
from mulsched.policies import Policy
from mulsched.policies._policy import select
from mulsched.testing import strategies
from mulsched.testing._columns import copied
from mulsched.testing.report import CounterExample, Shown

__all__ = ["Draw", "Invariant", "Subject", "Trial"]

T = TypeVar("T")


class Draw(Protocol):
    """Draws a value from a strategy, as ``st.data().draw`` does."""

    def __call__(self, strategy: SearchStrategy[T], /) -> T:
        """Return the value."""


class Subject:
    """What a check is about: the factory of a policy.

    ``renewable``: whether each call gives a policy of its own. If not, nothing is dispatched to it, so that
    no example sees what another did.
    """

    def __init__(self, factory: Callable[[], Policy], *, renewable: bool) -> None:
        self.factory = factory
        self.renewable = renewable
        policy = factory()
        self.name = policy.name
        self.stateful = policy.on_dispatch is not None

    def trial(self, draw: Draw) -> "Trial":
        """Return a policy that has been told of a few decisions of its own, if it wants to hear."""
        trial = Trial(self.factory())
        if self.stateful and self.renewable:
            for columns in draw(strategies.histories()):
                trial = trial.told(trial.ask("told", columns))
        return trial

    def again(self, trial: "Trial") -> "Trial":
        """Return another policy that has been told the same."""
        if not self.renewable:
            return trial
        copy = Trial(self.factory())
        for shown in trial.history:
            copy = copy.told(shown)
        return copy


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """A policy and what it was told."""

    policy: Policy
    history: tuple[Shown, ...] = ()

    def told(self, shown: Shown) -> "Trial":
        """Tell the policy of a decision, with columns that no one else has."""
        if self.policy.on_dispatch is not None:
            self.policy.on_dispatch(copied(shown.columns), shown.position)
        return Trial(self.policy, (*self.history, shown))

    def ask(self, label: str, columns: Columns) -> Shown:
        """Return the policy's decision; an example on which it raises proves nothing and is left out."""
        try:
            return self.answer(label, columns)
        except Exception:  # whatever a score may raise; ``finite`` is the check that reports it
            reject()

    def answer(self, label: str, columns: Columns) -> Shown:
        """Return the policy's decision. Raises what the policy raises."""
        position, scores = self._select(copied(columns))
        return Shown(label, columns, scores.copy(), position)

    def spoilt(self, columns: Columns) -> Columns | None:
        """Return what the policy made of its copy of the columns, None if it left them as they were."""
        own = copied(columns)
        self._select(own)
        same = (own.table == columns.table).all() and (own.request.keys == columns.request.keys).all()
        return None if same else own

    def _select(self, columns: Columns) -> tuple[int, NDArray[np.float64]]:
        # a division by zero shows as a score that is not finite, whatever the caller does with warnings
        with np.errstate(all="ignore"):
            return select(self.policy, columns, self.policy.ties)


class Invariant(Protocol):
    """A named property: draws one example and returns how it is broken, or None if it holds there."""

    __name__: str

    def __call__(self, subject: Subject, draw: Draw) -> CounterExample | None:
        """Try one example."""
