"""Result files as tables: every policy beside LMetric and the better of LMetric and load-only."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from failure.cases import LOAD_ONLY, REFERENCE, VARIANTS
from failure.measures import JUDGED
from mulsched.policies import parse_spec
from mulsched.replay.confidence import student_t

Row = Mapping[str, Any]

ALLOWED = 0.05
"""How far a policy may be behind the better of LMetric and load-only."""


@dataclass(frozen=True)
class Table:
    """A cell's result file: rows by policy and seed."""

    body: Mapping[str, Any]
    rows: list[Row] = field(repr=False)

    @property
    def case(self) -> str:
        return str(self.body["case"])

    @property
    def part(self) -> str:
        return str(self.body["part"])

    @property
    def load(self) -> float:
        return float(self.body["load"])

    @property
    def name(self) -> str:
        return f"{self.case}-{self.load:g}"

    @cached_property
    def policies(self) -> list[str]:
        """The policies that were replayed, LMetric first, as in the file otherwise; no variants of ours."""
        specs = dict.fromkeys([REFERENCE, *(row["spec"] for row in self.rows)])
        return [spec for spec in specs if spec not in VARIANTS]

    def runs(self, spec: str) -> list[Row]:
        """A policy's own runs by seed, without LMetric's repeats."""
        return sorted(
            (r for r in self.rows if r["spec"] == spec and r["ties"] is None), key=lambda r: r["seed"]
        )

    def mean(self, spec: str, figure: str) -> float:
        """Mean over the seeds, of those that have the figure; NaN where none has."""
        values = [row[figure] for row in self.runs(spec) if row[figure] is not None]
        return math.fsum(values) / len(values) if values else math.nan

    def ratio(self, spec: str, figure: str) -> float:
        """Geometric mean, over the seeds, of a policy's figure over LMetric's on the same trace."""
        theirs = {row["seed"]: row[figure] for row in self.runs(REFERENCE)}
        logs = [math.log(row[figure] / theirs[row["seed"]]) for row in self.runs(spec)]
        return math.exp(math.fsum(logs) / len(logs))

    def floor(self, figure: str) -> float:
        """Return by how much such a ratio of LMetric to itself moves by ties alone, 95 %.

        The logarithms of a repeat's figure over that of LMetric's own ties have mean 0: from their root mean
        square, Student's t with as many degrees of freedom, for a mean over the seeds.
        """
        own = {row["seed"]: row[figure] for row in self.runs(REFERENCE)}
        logs = [
            math.log(row[figure] / own[row["seed"]])
            for row in self.rows
            if row["spec"] == REFERENCE and row["ties"] is not None
        ]
        deviation = math.sqrt(math.fsum(x * x for x in logs) / len(logs))
        return math.exp(student_t(len(logs)) * deviation / math.sqrt(len(own))) - 1

    @property
    def load_only(self) -> list[str]:
        return [spec for spec in LOAD_ONLY if spec in self.policies]

    def best(self, figure: str) -> float:
        """The smallest ratio to LMetric among it and load-only: 1 where LMetric is the better."""
        return min(1.0, *(self.ratio(spec, figure) for spec in self.load_only))

    def behind(self, spec: str, figure: str) -> float:
        """By how much a policy is behind the better of LMetric and load-only; negative where ahead."""
        return self.ratio(spec, figure) / self.best(figure) - 1

    def worst(self, spec: str) -> float:
        """The largest ``behind`` of the judged figures."""
        return max(self.behind(spec, figure) for figure in JUDGED)

    def verdict(self, spec: str) -> str:
        """Whether a policy is within ``ALLOWED`` in all judged figures: yes, within noise, or no."""
        gaps = {figure: self.behind(spec, figure) for figure in JUDGED}
        if max(gaps.values()) <= ALLOWED:
            return "yes"
        near = all(gap <= (1 + ALLOWED) * (1 + self.floor(figure)) - 1 for figure, gap in gaps.items())
        return "within noise" if near else "no"

    def objective(self, spec: str) -> float:
        """Geometric mean of the judged figures' ratios to LMetric."""
        return math.exp(math.fsum(math.log(self.ratio(spec, f)) for f in JUDGED) / len(JUDGED))

    def oracle(self, among: Sequence[str]) -> str:
        """The policy of the smallest objective."""
        return min(among, key=self.objective)

    def closest(self, among: Sequence[str]) -> str:
        """The policy that is least behind in its worst figure."""
        return min(among, key=self.worst)

    def undominated(self) -> list[str]:
        """The policies that no other is at least as good as in all judged figures."""
        ratios = {spec: [self.ratio(spec, figure) for figure in JUDGED] for spec in self.policies}
        return [
            spec
            for spec, own in ratios.items()
            if not any(
                other != own and all(a <= b for a, b in zip(other, own, strict=True))
                for other in ratios.values()
            )
        ]


def label(spec: str) -> str:
    """Return a policy's name as in tables, ``linear(weight=0.3)``."""
    return parse_spec(spec).label


def read(folder: Path) -> list[Table]:
    """Return the tables in a folder, in the order of their names."""
    tables = []
    for path in sorted(folder.glob("*.json")):
        body = json.loads(path.read_text())
        if "rows" in body:
            tables.append(Table(body, [dict(zip(body["columns"], row, strict=True)) for row in body["rows"]]))
    return tables
