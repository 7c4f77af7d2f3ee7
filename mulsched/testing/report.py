"""What checks found: a verdict for each invariant, and a counter-example for each that is broken."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mulsched.errors import InvalidArgument
from mulsched.indicators import COLUMNS, Columns

__all__ = ["CounterExample", "Finding", "Report", "Shown"]


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """One decision of a counter-example: ``scores``, shape ``(n,)``, NaN where filtered out or in alarm.

    ``times``: so many requests had this decision and are in flight; 1 except in the history of a detector.
    Where the policy did not decide, ``scores`` is empty and ``position`` is -1.
    """

    label: str
    columns: Columns
    scores: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    position: int = -1
    times: int = 1

    @property
    def instance(self) -> str:
        """The chosen instance."""
        return self.columns.instances[self.position]


@dataclass(frozen=True, slots=True, eq=False)
class CounterExample:
    """Decisions that together break an invariant, and in one sentence how.

    ``history``: decisions that a policy with state had been told of before, in order.
    """

    reason: str
    decisions: tuple[Shown, ...]
    history: tuple[Shown, ...] = ()

    def __str__(self) -> str:
        """Return the reason and a table of each decision, of those columns in which anything differs."""
        decisions = (*self.history, *self.decisions)
        names = _differing(decisions)
        return "\n".join([self.reason, *(line for shown in decisions for line in _table(shown, names))])


@dataclass(frozen=True, slots=True, eq=False)
class Finding:
    """The verdict on one invariant: it holds on all ``examples`` tried, is broken, or does not apply."""

    invariant: str
    examples: int
    counter_example: CounterExample | None = None
    not_applicable: str | None = None

    @property
    def holds(self) -> bool:
        """Whether the invariant was tried and never broken."""
        return self.counter_example is None and self.not_applicable is None

    def __str__(self) -> str:
        """Return one line, and the counter-example below it."""
        if self.not_applicable is not None:
            return f"{self.invariant}: not applicable, {self.not_applicable}"
        if self.counter_example is None:
            return f"{self.invariant}: holds in {self.examples} examples"
        return f"{self.invariant}: BROKEN, {self.counter_example}"


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """The findings on one policy, in the order of the invariants."""

    policy: str
    findings: tuple[Finding, ...]

    def __getitem__(self, invariant: str) -> Finding:
        """Return the finding on an invariant. Raises InvalidArgument for one that was not checked."""
        for finding in self.findings:
            if finding.invariant == invariant:
                return finding
        checked = ", ".join(finding.invariant for finding in self.findings)
        raise InvalidArgument(f"invariant {invariant!r} was not checked, expected one of {checked}")

    @property
    def broken(self) -> tuple[str, ...]:
        """Names of the invariants that are broken."""
        return tuple(finding.invariant for finding in self.findings if finding.counter_example is not None)

    def assert_holds(self, *invariants: str) -> None:
        """Raise AssertionError, with the counter-examples, unless these hold; without names, all that apply.

        An invariant that is named and does not apply fails too. Raises InvalidArgument for one that was not
        checked.
        """
        named = [self[invariant] for invariant in invariants]
        failed = [
            finding
            for finding in named or self.findings
            if not finding.holds and (named or finding.counter_example is not None)
        ]
        if failed:
            raise AssertionError("\n\n".join([f"policy {self.policy!r}", *map(str, failed)]))

    def __str__(self) -> str:
        """Return a line for each invariant, and below each that is broken its counter-example."""
        width = max((len(finding.invariant) for finding in self.findings), default=0)
        lines = [self.policy]
        for finding in self.findings:
            found = str(finding).removeprefix(f"{finding.invariant}: ").splitlines()
            lines.append(f"  {finding.invariant.ljust(width)}  {found[0]}")
            lines += [f"      {line}" for line in found[1:]]
        return "\n".join(lines)


def _differing(decisions: tuple[Shown, ...]) -> list[str]:
    """Return the columns that are not one value throughout, without ``hit_tokens``, which new tokens say."""
    names = []
    for row, name in enumerate(COLUMNS):
        values = np.concatenate([shown.columns.table[row] for shown in decisions])
        if name != "hit_tokens" and (values != values[0]).any():
            names.append(name)
    return names


def _table(shown: Shown, names: list[str]) -> list[str]:
    columns = shown.columns
    request = columns.request
    often = f" {shown.times} times" if shown.times > 1 else ""
    head = f"{shown.label}{often}: prompt_tokens {request.prompt_tokens}, block_size {columns.block_size}"
    if request.session is not None:
        head += f", session {request.session!r}"
    rows = [("", "instance", "score", *names)]
    for at, instance in enumerate(columns.instances):
        score = "?" if not len(shown.scores) else f"{shown.scores[at]:.17g}"
        chosen = "*" if at == shown.position else ""
        values = (str(columns[name][at]) for name in names)
        rows.append((chosen, instance, "filtered" if score == "nan" else score, *values))
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    aligned = (
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in rows
    )
    return [head, *(f"  {line}" for line in aligned)]
