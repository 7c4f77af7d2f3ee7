"""Result files as tables: rows by policy, LMetric's repeats as the reference with its noise floor."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import rules

Row = Mapping[str, Any]
SWEPT = ("vllm", "linear, tuned", "dynamo", "sticky", "least_p_tokens")
"""Policies that are shown up to saturation."""


@dataclass(frozen=True)
class Table:
    """A cell's result file."""

    body: Mapping[str, Any]
    rows: list[Row] = field(repr=False)

    @property
    def stage(self) -> str:
        return str(self.body["stage"])

    @property
    def trace(self) -> str:
        return str(self.body["setup"]["trace"])

    @property
    def load(self) -> float:
        return float(self.body["load"])

    @property
    def title(self) -> str:
        """Trace, model and what is not as usual."""
        setup = self.body["setup"]
        model = {"qwen2": "Qwen2-7B", "qwen3": "Qwen3-30B-A3B"}[setup["profile"]]
        parts = [setup["trace"], model]
        if setup["instances"] != 16:
            parts.append(f"{setup['instances']} instances")
        if setup["kv_blocks"] == 8_000:
            parts.append("small caches")
        return ", ".join(parts)

    @cached_property
    def repeats(self) -> list[Row]:
        """LMetric's runs as it is by default, on state that is neither late nor lossy."""
        return [row for row in self.rows if row["label"] == "lmetric" and not row["delay_s"] + row["loss"]]

    def reference(self, figure: str) -> float:
        """LMetric's mean over its repeats."""
        return rules.mean([row[figure] for row in self.repeats])

    def floor(self, figure: str) -> float:
        """Noise floor, as a share of the reference."""
        return rules.noise_floor([row[figure] for row in self.repeats])

    def interval(self, figure: str) -> float:
        """Half the width of the reference's 95 % interval."""
        return rules.interval([row[figure] for row in self.repeats])

    @cached_property
    def others(self) -> dict[str, Row]:
        """A row for each policy but LMetric, and one for the best of each grid, which is called tuned."""
        entries = {
            row["label"]: row for row in self.rows if row["role"] == "result" and row["label"] != "lmetric"
        }
        for policy in dict.fromkeys(row["policy"] for row in self.rows if row["role"] == "trial"):
            entries[f"{policy}, tuned"] = self.best_trial(policy)
        return entries

    @property
    def swept(self) -> list[str]:
        """Those of SWEPT that the table has."""
        return [name for name in SWEPT if name in self.others]

    def trials(self, policy: str) -> list[Row]:
        """The runs of a policy's grid."""
        return [row for row in self.rows if row["role"] == "trial" and row["policy"] == policy]

    def best_trial(self, policy: str) -> Row:
        """The run of the grid with the smallest objective."""
        return min(self.trials(policy), key=rules.objective)

    def compare(self, name: str, figure: str) -> str:
        """Whether a policy is better, worse or the same as LMetric in a figure."""
        return rules.compare(self.others[name][figure], self.reference(figure), self.floor(figure))

    def change(self, name: str, figure: str) -> float:
        """By how much a policy's figure is above LMetric's."""
        return rules.change(self.others[name][figure], self.reference(figure))

    def gain(self, name: str, figure: str) -> float:
        """By how much LMetric's figure is above a policy's: negative where LMetric is better."""
        return rules.change(self.reference(figure), self.others[name][figure])


def read(folder: Path) -> tuple[dict[str, Mapping[str, Any]], dict[str, Table]]:
    """Return the maximum rates and the tables in a folder, by the name of the cell."""
    rates, tables = {}, {}
    for path in sorted(folder.glob("*.json")):
        body = json.loads(path.read_text())
        if body["stage"] == "max":
            rates[path.stem] = body
        else:
            rows = [dict(zip(body["columns"], row, strict=True)) for row in body["rows"]]
            tables[path.stem] = Table(body, rows)
    return rates, tables
