"""Invariants of scores: what is asked of the numbers, and of one decision taken again."""

from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from mulsched.indicators import Columns
from mulsched.testing._columns import reordered, scale_requests, scale_tokens
from mulsched.testing._subject import Draw, Subject, Trial
from mulsched.testing.report import CounterExample, Shown

__all__ = [
    "deterministic",
    "finite",
    "non_negative",
    "permutation_equivariant",
    "pure",
    "scale_invariant_requests",
    "scale_invariant_tokens",
]

# powers of two scale floats without rounding, so equal scores stay equal
FACTORS = st.sampled_from([2, 4, 1024])


def finite(subject: Subject, draw: Draw) -> CounterExample | None:
    """Every candidate that no filter left out has one finite score, and someone is chosen.

    Domain: all columns; one candidate alone, idle fleets and numbers up to a million among them.
    Gives: the router decides, whatever comes; it raises ``NonFiniteScore`` or ``NoEligibleInstance``
    otherwise, and the request is not served.
    Breaks in: normalisations without a guard (0/0 where all are equal), ``1 / running``, logarithms of
    counts, filters that leave nobody.
    """
    trial, columns = subject.trial(draw), draw(subject.columns())
    try:
        trial.answer("asked", columns)
    except Exception as error:
        reason = f"raises {type(error).__name__}: {error}"
        return CounterExample(reason, (Shown("asked", columns),), trial.history)
    return None


def non_negative(subject: Subject, draw: Draw) -> CounterExample | None:
    """No score is below 0.

    Domain: all columns.
    Gives: scores can be multiplied and compared with thresholds; the choice alone does not need it.
    Breaks in: scores where higher was better and the sign was turned, such as ``load - hits``; draws in
    logarithms (``bailian``); sentinels such as ``last_chosen`` -1 (``round_robin``).
    """
    trial = subject.trial(draw)
    asked = trial.ask("asked", draw(subject.columns()))
    scores = asked.scores
    if not np.nanmin(scores) < 0:
        return None
    at = int(np.nanargmin(scores))
    reason = f"{asked.columns.instances[at]} has score {scores[at]:g}, below 0"
    return CounterExample(reason, (asked,), trial.history)


def deterministic(subject: Subject, draw: Draw) -> CounterExample | None:
    """Equal columns have equal scores, to the bit, and one choice.

    The question is asked twice, the second time of another policy with the same history if the factory
    makes one.
    Domain: all columns.
    Gives: a decision can be explained, replayed and tested. Randomness comes from ``columns.uniform``.
    Breaks in: scores that call ``random``, iterate over sets or ask the clock; counters such as those of
    most round robins.
    """
    trial, columns = subject.trial(draw), draw(subject.columns())
    first = trial.ask("first", columns)
    return _moved(trial, first, subject.again(trial).ask("again", columns), "asked again")


def pure(subject: Subject, draw: Draw) -> CounterExample | None:
    """A question leaves no trace: columns stay as they were, and other questions in between change nothing.

    Domain: all columns, of any two requests.
    Gives: ``select`` is a what-if, and two requests that are decided at once do not disturb one another.
    State belongs in ``on_dispatch``.
    Breaks in: ``column *= weight`` on a column itself (a router's columns are read-only and raise),
    caches of the last request, counters in the score.
    """
    trial = subject.trial(draw)
    columns, other = draw(subject.columns()), draw(subject.columns())
    first = trial.ask("first", columns)
    spoilt = trial.spoilt(columns)
    if spoilt is not None:
        return CounterExample("the score changes columns", (first, Shown("after", spoilt)), trial.history)
    trial.ask("between", other)
    return _moved(trial, first, trial.ask("again", columns), "asked again after another request")


def permutation_equivariant(subject: Subject, draw: Draw) -> CounterExample | None:
    """Candidates in another order have the same scores (to 1e-9 of the largest), and the same one is chosen.

    Each keeps its name, its row and with it its draws.
    Domain: two candidates or more, of which no two were chosen last at the same time, so that the default
    tie rule has an answer.
    Gives: the order in which instances were registered does not matter.
    Breaks in: "the first of equals" (``ties="first"``), ``argmin`` in the score, position as a tie-breaker;
    Dynamo, SGLang and Infera each had a report of all idle workers tying and the first taking everything.
    """
    trial = subject.trial(draw)
    columns = draw(subject.columns(min_size=2))
    order = draw(st.permutations(range(len(columns))))
    before, after = trial.ask("before", columns), trial.ask("after", reordered(columns, order))
    expected, scores = before.scores[order], after.scores
    if before.instance != after.instance:
        reason = f"reordered, the choice moves from {before.instance} to {after.instance}"
    elif not np.allclose(expected, scores, rtol=0, atol=1e-9 * np.nanmax(abs(expected)), equal_nan=True):
        reason = "reordered, the scores change"
    else:
        return None
    return CounterExample(reason, (before, after), trial.history)


def scale_invariant_tokens(subject: Subject, draw: Draw) -> CounterExample | None:
    """If a token were ``k`` tokens, the same instance would be chosen.

    Prompt, block size, hits, queue and context are multiplied by ``k``, in what the policy was told too.
    Domain: two candidates or more; ``k`` a power of two, so that nothing rounds.
    Gives: no weight depends on the tokenizer, the length of prompts or the speed of the model, and
    characters will do for tokens (``select_text``).
    Breaks in: sums of tokens and requests (``p_tokens + 20 * batch_size``), thresholds in tokens or seconds.
    """
    return _scaled(subject, draw, scale_tokens, "tokens")


def scale_invariant_requests(subject: Subject, draw: Draw) -> CounterExample | None:
    """If every request were ``k`` requests, the same instance would be chosen.

    ``waiting`` and ``batch_size`` are multiplied by ``k``, in what the policy was told too.
    Domain: two candidates or more; ``k`` a power of two.
    Gives: no weight depends on how many requests an instance takes at a time.
    Breaks in: sums of tokens and requests, thresholds in requests: the balance gates of SGLang (32 apart)
    and AIBrix (8 apart).
    """
    return _scaled(subject, draw, scale_requests, "requests")


def _scaled(
    subject: Subject, draw: Draw, scale: Callable[[Columns, int], Columns], unit: str
) -> CounterExample | None:
    trial, factor = subject.trial(draw), draw(FACTORS)
    asked = trial.ask("before", draw(subject.columns(min_size=2)))
    scaled = Trial(subject.factory())
    for at, before in enumerate((*trial.history, asked)):
        after = scaled.ask("after", scale(before.columns, factor))
        if before.instance != after.instance:
            reason = f"with {unit} times {factor} the choice moves from {before.instance} to {after.instance}"
            return CounterExample(reason, (before, after), trial.history[:at])
        if before is not asked:
            scaled = scaled.told(after, times=before.times)
    return None


def _moved(trial: Trial, first: Shown, again: Shown, how: str) -> CounterExample | None:
    """Return a counter-example if two answers to one question differ in anything."""
    if first.position != again.position:
        reason = f"{how}, the choice moves from {first.instance} to {again.instance}"
    elif not np.array_equal(first.scores, again.scores, equal_nan=True):
        reason = f"{how}, the scores change"
    else:
        return None
    return CounterExample(reason, (first, again), trial.history)
