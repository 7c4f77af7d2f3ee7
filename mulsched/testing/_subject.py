"""A policy under test: built anew, told a history, asked.

A policy with a detector is asked as a router asks it, while a class is in alarm: it has been told of
``HOT_REQUESTS`` requests of one class, all prefilled and in flight, and every question is about the next.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
from hypothesis import reject
from hypothesis.strategies import SearchStrategy
from numpy.typing import NDArray

from mulsched.indicators import Columns
from mulsched.policies import Policy
from mulsched.policies._policy import select
from mulsched.testing import strategies
from mulsched.testing._columns import copied, make_columns
from mulsched.testing.report import CounterExample, Shown
from mulsched.types import Request

__all__ = ["HOT_REQUESTS", "Draw", "Invariant", "Subject", "Trial"]

T = TypeVar("T")

HOT_REQUESTS = 50  # beyond chance (3 standard deviations) for holders that are up to half of the candidates
_HOT_KEYS = np.arange(1000, 1200, dtype=np.uint64)  # as long as the longest prompt, in blocks of one token


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
        self.has_detector = policy.detector is not None
        self.stateful = policy.on_dispatch is not None or self.has_detector

    def columns(self, *, min_size: int = 1, max_size: int = 5) -> SearchStrategy[Columns]:
        """Return what to ask: all columns, of a policy with a detector those of a request of the hot class.

        An alarm is in force where the columns have holders of it that are over their share. Blocks have one
        token each, so that prompts are long enough to be of a class (16 blocks in mode paper).
        """
        if not self.has_detector:
            return strategies.columns(min_size=min_size, max_size=max_size)
        columns = strategies.columns(min_size=min_size, max_size=max_size, block_size=1)
        return columns.map(_of_the_hot_class)

    def trial(self, draw: Draw) -> "Trial":
        """Return a policy that has been told of a few decisions of its own, if it wants to hear."""
        trial = Trial(self.factory())
        if self.stateful and self.renewable:
            for columns in draw(strategies.histories()):
                trial = trial.told(trial.ask("told", columns))
            if self.has_detector:
                trial = trial.told(trial.ask("told", _overload()), times=HOT_REQUESTS)
        return trial

    def again(self, trial: "Trial") -> "Trial":
        """Return another policy that has been told the same."""
        if not self.renewable:
            return trial
        copy = Trial(self.factory())
        for shown in trial.history:
            copy = copy.told(shown, times=shown.times)
        return copy


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """A policy and what it was told."""

    policy: Policy
    history: tuple[Shown, ...] = ()

    def told(self, shown: Shown, *, times: int = 1) -> "Trial":
        """Tell the policy of a decision, with columns that no one else has; ``times`` requests had it."""
        columns = copied(shown.columns)
        for number in range(times):
            if self.policy.on_dispatch is not None:
                self.policy.on_dispatch(columns, shown.position)
            if self.policy.detector is not None:
                request_id = (len(self.history), number)
                self.policy.detector.dispatch(columns, request_id, shown.position)
                self.policy.detector.first_token(request_id)
        return Trial(self.policy, (*self.history, replace(shown, times=times)))

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
            return select(self.policy, columns, self.policy.ties, keep=self.kept(columns))

    def kept(self, columns: Columns) -> NDArray[np.bool_] | None:
        """Return which candidates an alarm leaves, None without an alarm in force for the request."""
        judged = None if self.policy.detector is None else self.policy.detector.judge(columns)
        return None if judged is None else judged[0]


def _overload() -> Columns:
    """Return the columns of a request of the hot class, which one of three idle instances holds."""
    prompt = len(_HOT_KEYS)
    return make_columns(
        prompt_tokens=prompt, block_size=1, matched_blocks=[prompt, 0, 0], keys=_HOT_KEYS.copy(), now=9.0
    )


def _of_the_hot_class(columns: Columns) -> Columns:
    old = columns.request
    keys = _HOT_KEYS[: len(old.keys)].copy()
    columns.request = Request(old.prompt_tokens, keys, old.request_id, old.session)
    return columns


class Invariant(Protocol):
    """A named property: draws one example and returns how it is broken, or None if it holds there."""

    __name__: str

    def __call__(self, subject: Subject, draw: Draw) -> CounterExample | None:
        """Try one example."""
