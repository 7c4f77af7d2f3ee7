"""The tables of docs/tiers.md: ``cd benchmarks && python -m tiers.page``."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tiers.cases import BASE, CASES, FACTORS, SEEDS, VIEWS, Tier, plan
from tiers.run import load

Rows = Sequence[Mapping[str, Any]]
TIMES = tuple(f"{time}_{figure}_s" for time in ("ttft", "tpot") for figure in ("mean", "p50", "p95", "p99"))
CHANGES = ("ttft_mean_s", "ttft_p50_s", "ttft_p95_s", "ttft_p99_s", "tpot_mean_s", "tpot_p99_s")
SHOWN = {
    "no tier": "no tier",
    "ignored": "ignored (ratio 1)",
    "noise": "ignored, other ties",
    "x 1": "the true ratio",
    "x 0": "ratio 0",
    "x 0.5": "half",
    "x 2": "double",
    "vllm": "`vllm`",
}


def heading(names: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]


def at(rows: Rows, tier: Tier, view: str) -> list[Mapping[str, Any]]:
    """Return the rows of a tier and a view in the order of the seeds; none if a seed is missing."""
    wanted = tier.host_ratio, tier.cost_ratio, tier.overlaps, view
    found = [r for r in rows if (r["host_ratio"], r["cost_ratio"], r["overlaps"], r["view"]) == wanted]
    return sorted(found, key=lambda row: row["seed"]) if len(found) == len(SEEDS) else []


def absolute(results: Mapping[str, Rows]) -> list[str]:
    """Return a line for each case and view: means over the seeds, times in ms."""
    names = ("TTFT mean", "p50", "p95", "p99", "TPOT mean", "p50", "p95", "p99", "GPU hits", "host hits")
    lines = heading(("workload", "router", *names))
    for case, rows in results.items():
        for view in VIEWS:
            mine = at(rows, BASE, view)
            if mine:
                cells = [f"{1000 * mean(mine, name):,.{0 if 'ttft' in name else 1}f}" for name in TIMES]
                cells += [f"{mean(mine, name):.3f}" for name in ("gpu_hit_ratio", "cpu_hit_ratio")]
                lines.append(f"| {case} | {SHOWN[view]} | " + " | ".join(cells) + " |")
    return lines


def mean(rows: Rows, name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def change(mine: Rows, reference: Rows, name: str) -> str:
    """Return the geometric mean of the seeds' changes in per cent, and the least and the largest."""
    by_seed = {row["seed"]: row[name] for row in reference}
    ratios = np.log([row[name] / by_seed[row["seed"]] for row in mine])
    middle, low, high = (100 * np.expm1(value) for value in (ratios.mean(), ratios.min(), ratios.max()))
    return f"{middle:+.1f} ({low:+.0f} to {high:+.0f})"


def changes(results: Mapping[str, Rows]) -> list[str]:
    """Return a line for each case and view: changes against a router that ignores the tier."""
    names = ("TTFT mean", "p50", "p95", "p99", "TPOT mean", "p99")
    lines = heading(("workload", "router", *names))
    for case, rows in results.items():
        reference = at(rows, BASE, "ignored")
        for view in ("no tier", "noise", "x 1", "x 0"):
            mine = at(rows, BASE, view)
            if mine and reference:
                cells = [change(mine, reference, name) for name in CHANGES]
                lines.append(f"| {case} | {SHOWN[view]} | " + " | ".join(cells) + " |")
    return lines


def scan(rows: Rows, case: str) -> list[str]:
    """Return a line for each tier of a case: changes of mean TTFT by what the router is told."""
    tiers = list(dict.fromkeys(tier for tier, _ in plan(CASES[case])))
    views = [view for view in FACTORS[1:] if any(at(rows, tier, view) for tier in tiers)]
    told = [SHOWN[view] for view in views]
    lines = heading(
        (f"{case}: host / GPU", "true ratio", "loads", "TTFT mean, ms", "host hits", *told, "host hits")
    )
    for tier in tiers:
        reference, exact = at(rows, tier, "ignored"), at(rows, tier, "x 1")
        if not reference or not exact:
            continue
        cells = [f"{tier.host_ratio:g}", f"{tier.cost_ratio:g}"]
        cells += ["overlap" if tier.overlaps else "hold up the step"]
        cells += [f"{1000 * mean(reference, 'ttft_mean_s'):,.0f}", f"{mean(reference, 'cpu_hit_ratio'):.3f}"]
        for view in views:
            mine = at(rows, tier, view)
            cells.append(change(mine, reference, "ttft_mean_s") if mine else "")
        lines.append("| " + " | ".join([*cells, f"{mean(exact, 'cpu_hit_ratio'):.3f}"]) + " |")
    return lines


def tables(results: Mapping[str, Rows]) -> list[list[str]]:
    """Return the page's tables, each a list of lines."""
    scans = [scan(rows, case) for case, rows in results.items() if CASES[case].scan]
    return [absolute(results), changes(results), *scans]


def main() -> None:
    print("\n\n".join("\n".join(table) for table in tables(load())))


if __name__ == "__main__":
    main()
