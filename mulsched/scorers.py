"""Scores: from columns to one float64 per candidate, lower is better.

A score is any callable ``(Columns) -> (n,) float64``. Those here also say what they are made of, so that
the native core can compute them without numpy; the result is the same to the last bit.
"""

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from mulsched.errors import InvalidArgument, InvalidType
from mulsched.indicators import COLUMNS, Columns

__all__ = [
    "Custom",
    "Linear",
    "Multiplicative",
    "Score",
    "as_scores",
    "lexicographic",
    "min_max",
    "native_form",
]

Normalise = Literal["max", "min_max", "prompt"]


class Score(Protocol):
    """Anything that turns columns into scores, shape ``(n,)``, lower is better."""

    def __call__(self, columns: Columns, /) -> NDArray[np.float64]:
        """Return a finite score per candidate."""


def _check_indicators(names: tuple[str, ...]) -> None:
    for name in names:
        if name not in COLUMNS:
            raise InvalidArgument(f"unknown indicator {name!r}, expected one of {', '.join(COLUMNS)}")


class Multiplicative:
    """The product of indicators; ``p_tokens * batch_size`` is LMetric (arXiv 2603.15202, section 5).

    Scaling an indicator by a positive constant scales all scores alike, so units and weights cancel.
    A factor that can be 0 vetoes all others; ``p_tokens`` and ``batch_size`` are at least 1.
    """

    __slots__ = ("indicators",)

    def __init__(self, *indicators: str) -> None:
        self.indicators = indicators or ("p_tokens", "batch_size")
        _check_indicators(self.indicators)

    def __call__(self, columns: Columns, /) -> NDArray[np.float64]:
        """Return the product, shape ``(n,)``."""
        score = columns[self.indicators[0]].astype(np.float64)
        for name in self.indicators[1:]:
            score *= columns[name]
        return score

    def __repr__(self) -> str:
        return f"Multiplicative({', '.join(map(repr, self.indicators))})"


class Linear:
    """The weighted sum of indicators, each first normalised over the candidates if asked.

    ``normalise``, of all or by indicator: ``"max"`` divides by the largest value, ``"min_max"`` maps to
    [0, 1]; both map a column of equal zeros, and min_max any column of equal values, to 0, and make a score
    depend on candidates that cannot win. ``"prompt"`` divides by the prompt's tokens.

    Raises InvalidArgument for no weights, an unknown indicator, a weight that is not finite, an unknown
    normalisation or one of an indicator without weight; InvalidType for a weight that is not a number.
    """

    __slots__ = ("normalise", "weights")

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        normalise: Normalise | Mapping[str, Normalise | None] | None = None,
    ) -> None:
        if not isinstance(weights, Mapping):
            raise InvalidType(f"weights must map indicators to numbers, got {type(weights).__name__}")
        if not weights:
            raise InvalidArgument("weights must name at least one indicator, got none")
        _check_indicators(tuple(weights))
        for name, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float | np.integer | np.floating):
                raise InvalidType(f"weight of {name!r} must be a number, got {type(weight).__name__}")
            if not math.isfinite(weight):
                raise InvalidArgument(f"weight of {name!r} must be finite, got {weight}")
        by_name = normalise if isinstance(normalise, Mapping) else dict.fromkeys(weights, normalise)
        for name, how in by_name.items():
            if how is not None and how not in get_args(Normalise):
                raise InvalidArgument(f"normalise must be None, 'max', 'min_max' or 'prompt', got {how!r}")
            if name not in weights:
                raise InvalidArgument(f"normalise names {name!r}, which has no weight")
        self.weights = {name: float(weight) for name, weight in weights.items()}
        self.normalise = {name: by_name.get(name) for name in weights}

    def __call__(self, columns: Columns, /) -> NDArray[np.float64]:
        """Return the weighted sum, shape ``(n,)``."""
        score = np.zeros(len(columns), dtype=np.float64)
        for name, weight in self.weights.items():
            column = columns[name].astype(np.float64)
            how = self.normalise[name]
            if how == "max":
                largest = column.max()
                column = column / largest if largest > 0 else np.zeros_like(column)
            elif how == "min_max":
                column = min_max(column)
            elif how == "prompt":
                column = column / columns.request.prompt_tokens
            score += weight * column
        return score

    def __repr__(self) -> str:
        kinds = set(self.normalise.values())
        normalise = kinds.pop() if len(kinds) == 1 else self.normalise
        return f"Linear({self.weights!r}, normalise={normalise!r})"


class Custom:
    """A callable on columns, with a name for tables and messages. Raises InvalidType if not callable."""

    __slots__ = ("function", "name")

    def __init__(self, function: Callable[[Columns], Any], *, name: str | None = None) -> None:
        if not callable(function):
            raise InvalidType(f"a score must be callable, got {type(function).__name__}")
        self.function = function
        self.name: str = name or str(getattr(function, "__name__", type(function).__name__))

    def __call__(self, columns: Columns, /) -> NDArray[np.float64]:
        """Return what the callable returns, as float64. Raises as ``as_scores``, and what it raises."""
        return as_scores(self.function(columns), columns, "score", self.name)

    def __repr__(self) -> str:
        return f"Custom({self.name})"


def as_scores(returned: Any, columns: Columns, kind: str, name: str) -> NDArray[np.float64]:
    """Return what a score gave as float64, shape ``(n,)``; ``kind`` and ``name`` begin the message.

    Raises InvalidArgument (not one for each candidate), InvalidType (anything but real numbers: booleans,
    texts and objects would convert, to something that nobody meant). O(n).
    """
    try:
        scores = np.asarray(returned)
    except ValueError:  # lists of different lengths
        scores = np.array(None)
    if scores.shape != (len(columns),):
        if isinstance(returned, np.ndarray):
            given = f"shape {scores.shape}"
        else:
            given = f"shape {scores.shape}: {reprlib.repr(returned)}"
        raise InvalidArgument(
            f"{kind} {name!r} must return one score per candidate, shape ({len(columns)},), got {given}"
        )
    if scores.dtype.kind not in "fiu":
        first = reprlib.repr(scores.tolist()[0])
        raise InvalidType(
            f"{kind} {name!r} must return numbers, got dtype {scores.dtype}, the first is {first}"
        )
    return scores.astype(np.float64, copy=False)


def native_form(score: Score) -> tuple[list[int], list[float], list[str | None]] | None:
    """Return what the core needs to compute a score, None if it cannot.

    Positions in COLUMNS; of a weighted sum the weights and normalisations, of a product none.
    """
    # exact types: a subclass may compute something else
    if type(score) is Multiplicative:
        return [COLUMNS.index(name) for name in score.indicators], [], []
    if type(score) is Linear and "min_max" not in score.normalise.values():
        return (
            [COLUMNS.index(name) for name in score.weights],
            list(score.weights.values()),
            list(score.normalise.values()),
        )
    return None


def min_max(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Map values to [0, 1], all equal to 0."""
    low = values.min()
    span = values.max() - low
    if span == 0:
        return np.zeros_like(values)
    scaled: NDArray[np.float64] = (values - low) / span
    return scaled


def lexicographic(*keys: NDArray[Any]) -> NDArray[np.float64]:
    """Return dense ranks by the first key, then the second, ...: equal rows share a rank, lowest is 0."""
    order = np.lexsort(keys[::-1])
    changed = np.zeros(len(order), dtype=bool)
    for key in keys:
        ordered = key[order]
        changed[1:] |= ordered[1:] != ordered[:-1]
    ranks = np.empty(len(order), dtype=np.float64)
    ranks[order] = np.cumsum(changed)
    return ranks
