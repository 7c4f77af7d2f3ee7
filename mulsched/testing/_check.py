"""Running the invariants on a policy."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky, Unsatisfiable

from mulsched import policies
from mulsched.errors import InvalidArgument, InvalidType
from mulsched.indicators import Columns
from mulsched.policies import Policy, PolicySpec, parse_spec
from mulsched.router import PolicyLike, Router
from mulsched.testing import invariants
from mulsched.testing._subject import Subject
from mulsched.testing.report import CounterExample, Finding, Report

__all__ = ["check_policy", "check_score"]

# Without these, an example says little, or nothing about the next.
_FIRST = ("finite", "deterministic", "pure")


def check_score(
    score: PolicyLike | PolicySpec,
    *,
    examples: int = 100,
    seed: int = 0,
    only: Iterable[str] | None = None,
    shrink: bool = True,
) -> Report:
    """Check a score or a whole policy against the invariants that apply to it.

    ``score``: what ``Router(policy=...)`` takes, a spec such as ``"linear:weight=0.5"`` too. ``examples``
    are tried for each invariant, the same ones for the same ``seed``; 100 take about five seconds in all.
    ``only``: the names of the invariants to check; None for all. ``shrink``: whether to look for the
    smallest counter-example, which takes longer than to find one.

    A ``Policy`` object with state, or a detector, is never told of a decision, since it cannot be made anew;
    give its name or its factory to :func:`check_policy` for that. What runs is ordinary Hypothesis, whatever
    the settings and even inside another test: nothing is written to disk, and nothing is left of it
    afterwards.

    Raises InvalidType, InvalidArgument, UnknownPolicy.
    """
    if isinstance(score, str):
        score = parse_spec(score)
    if isinstance(score, PolicySpec):
        spec = score.check()
        return _report(
            Subject(lambda: policies.get(spec.name, **spec.parameters), renewable=True),
            spec.label,
            examples,
            seed,
            only,
            shrink,
        )
    policy = Router(policy=score).policy
    subject = Subject(lambda: policy, renewable=policy.on_dispatch is None and policy.detector is None)
    return _report(subject, policy.name, examples, seed, only, shrink)


def check_policy(
    factory: Callable[[], Policy | Callable[[Columns], Any]],
    *,
    examples: int = 100,
    seed: int = 0,
    only: Iterable[str] | None = None,
    shrink: bool = True,
) -> Report:
    """Check the policies that a factory makes, a new one for every example.

    It is for policies that keep state: each is told of a few decisions, then asked. One with a detector is
    told of fifty requests of one class too, more than its holder's part, and asked about the next of them,
    so what a report says of it is said of alarms. Arguments, errors and the rest as
    :func:`check_score`.
    """
    if not callable(factory):
        raise InvalidType(f"factory must be callable, got {type(factory).__name__}")

    def policy() -> Policy:
        return Router(policy=factory()).policy

    subject = Subject(policy, renewable=True)
    return _report(subject, subject.name, examples, seed, only, shrink)


def _report(
    subject: Subject, label: str, examples: int, seed: int, only: Iterable[str] | None, shrink: bool
) -> Report:
    if isinstance(examples, bool) or not isinstance(examples, int):
        raise InvalidType(f"examples must be an int, got {type(examples).__name__}")
    if examples < 1:
        raise InvalidArgument(f"examples must be at least 1, got {examples}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InvalidType(f"seed must be an int, got {type(seed).__name__}")
    if isinstance(only, str):
        raise InvalidType(f"only must be an iterable of names, got the str {only!r}")
    wanted = None if only is None else {name for name in only if invariants.get(name)}
    names = [name for name in invariants.names() if wanted is None or name in wanted]
    findings: list[Finding] = []
    # Hypothesis forbids a test in a test, by thread; ours shares nothing with one that may run around it
    with ThreadPoolExecutor(max_workers=1) as thread:
        for name in names:
            gone = [f.invariant for f in findings if f.invariant in _FIRST and f.counter_example is not None]
            if gone and name not in _FIRST:
                findings.append(Finding(name, 0, not_applicable=f"it is not {gone[0]}: mend that first"))
            else:
                findings.append(thread.submit(_find, name, subject, examples, seed, shrink).result())
    return Report(label, tuple(findings))


class _Broken(Exception):
    """Carries a counter-example out of Hypothesis."""

    def __init__(self, counter_example: CounterExample) -> None:
        self.counter_example = counter_example


def _find(name: str, subject: Subject, examples: int, seed: int, shrink: bool) -> Finding:
    if name == "ties_do_not_herd" and not subject.renewable:
        return Finding(name, 0, not_applicable="it keeps state: give its factory to check_policy")
    check, last = invariants.get(name), None

    @hypothesis.seed(seed)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        derandomize=False,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )
    @given(st.data())
    def examine(data: st.DataObject) -> None:
        nonlocal last
        found = check(subject, data.draw)
        if found is not None:
            last = found
            raise _Broken(found)

    try:
        examine()
    except _Broken as broken:
        return Finding(name, examples, broken.counter_example)
    except Unsatisfiable:
        return Finding(name, 0, not_applicable="the policy decided in no example")
    except Flaky:
        if last is None:
            return Finding(name, 0, not_applicable="the policy does not decide alike twice")
        return Finding(name, examples, last)
    return Finding(name, examples)
