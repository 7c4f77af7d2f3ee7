"""What a router's view is worth: ``cd benchmarks && python -m router_view.run [--cases NAME ...]``.

LMetric under other views of the same traffic, by the replay's Python loop on the production router: prefixes
in flight not counted, counted as cached, or at a discount; first tokens never heard of and the queue released
at the end of a request, or by an estimate at several rates. Rows that are in the file are not run again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from failure.cases import CASES, INSTANCES, PROFILE, Case

from mulsched import Router, policies
from mulsched.replay import Trace, builtin_profile, replay
from router_view.views import (
    DiscountingRouter,
    SilentRouter,
    options_for,
    prefill_tokens_per_s,
    replay_with,
)

HERE = Path(__file__).parent
LOAD = 0.8
SEEDS = (0, 1)
RUN_CASES = ("chat", "coder", "one-class", "several-classes", "identical")
NATIVE_CASES = ("api", "mooncake", "agentic", "thinking", "growing", "long-output-small")
"""Replayed natively where the native replay knows the view; only the discounted one takes the Python loop."""
RATES = (0.25, 0.5, 1.0, 2.0, 4.0)
VIEWS = (
    "told",
    "noise",
    "in flight cached",
    "in flight discounted",
    "never",
    *(f"estimate x {r:g}" for r in RATES),
)
NATIVE_VIEWS = ("told", "noise", "in flight cached")
FIGURES = ("ttft_mean_s", "ttft_p99_s", "tpot_mean_s", "tpot_p99_s", "hit_ratio")


def router_of(view: str, rate: float, options: dict[str, Any]) -> Any:
    """Return the router with a view's name; ``rate``: prefill tokens per second of the engines."""
    if view in ("told", "noise"):
        return Router(in_flight="ignore", **options)
    if view == "in flight cached":
        return Router(in_flight="cached", **options)
    if view == "in flight discounted":
        return DiscountingRouter(**options)
    if view == "never":
        return SilentRouter(None, **options)
    return SilentRouter(rate * float(view.removeprefix("estimate x ")), **options)


def run(case: Case, view: str, seed: int, data: Path) -> dict[str, Any]:
    """Return the row of one replay."""
    if case.name in NATIVE_CASES and view in NATIVE_VIEWS:
        return run_native(case, view, seed, data)
    profile = builtin_profile(PROFILE)
    trace = trace_of(case, seed, data)
    policy = policies.get("lmetric")
    options = options_for(
        policy,
        profile,
        kv_blocks=case.kv_blocks or profile.kv_blocks,
        instances=INSTANCES,
        seed=seed,
        ties="random" if view == "noise" else None,
        closed=case.loop == "closed",
    )
    rate = prefill_tokens_per_s(profile)
    records, _ = replay_with(lambda **given: router_of(view, rate, given), trace, options)
    ttft = records.first_token_s - records.arrival_s
    several = trace.output_tokens > 1
    tpot = (records.finish_s - records.first_token_s)[several] / (trace.output_tokens[several] - 1)
    values = (ttft.mean(), np.percentile(ttft, 99), tpot.mean(), np.percentile(tpot, 99))
    hit = records.cached_tokens.sum() / trace.prompt_tokens.sum()
    figures = dict(zip(FIGURES, map(float, (*values, hit)), strict=True))
    return {"case": case.name, "view": view, "seed": seed, "requests": len(trace), **figures}


def trace_of(case: Case, seed: int, data: Path) -> Trace:
    """Return the case's trace at the load."""
    path = HERE.parent / "failure" / "results" / f"saturation-{case.name}.json"
    load = LOAD if LOAD in case.loads else max(case.loads)
    return case.trace(load * json.loads(path.read_text())["scale"], seed=seed, data=data)


def run_native(case: Case, view: str, seed: int, data: Path) -> dict[str, Any]:
    """Return the row of one native replay."""
    result = replay(
        trace_of(case, seed, data),
        "lmetric",
        profile=builtin_profile(PROFILE),
        instances=INSTANCES,
        kv_blocks=case.kv_blocks,
        loop=case.loop,
        seed=seed,
        ties="random" if view == "noise" else None,
        in_flight="cached" if view == "in flight cached" else "ignore",
    )
    figures = {name: result.summary()[name] for name in FIGURES}
    return {"case": case.name, "view": view, "seed": seed, "requests": len(result.arrival_s), **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    parser.add_argument("--cases", nargs="+", default=(*RUN_CASES, *NATIVE_CASES), metavar="NAME")
    parser.add_argument("--data", type=Path, default=Path("traces"), help="folder of the real traces")
    options = parser.parse_args()
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    there = {(row["case"], row["view"], row["seed"]) for row in rows}
    by_name = {case.name: case for case in CASES}
    for name in options.cases:
        for seed in SEEDS:
            for view in (*NATIVE_VIEWS, "in flight discounted") if name in NATIVE_CASES else VIEWS:
                if (name, view, seed) in there:
                    continue
                rows.append(run(by_name[name], view, seed, options.data))
                options.out.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table: each view over being told, the geometric mean over the seeds."""
    told = {(row["case"], row["seed"]): row for row in rows if row["view"] == "told"}
    lines = ["| case | view | mean TTFT | p99 TTFT | mean TPOT | p99 TPOT | hit ratio |", "| --- " * 7 + "|"]
    for case in dict.fromkeys(row["case"] for row in rows):
        for view in VIEWS[1:]:
            mine = [row for row in rows if (row["case"], row["view"]) == (case, view)]
            if not mine:
                continue
            cells = []
            for figure in FIGURES[:-1]:
                ratios = [row[figure] / told[case, row["seed"]][figure] for row in mine]
                cells.append(f"{100 * (np.exp(np.mean(np.log(ratios))) - 1):+.1f} %")
            change = np.mean([row["hit_ratio"] - told[case, row["seed"]]["hit_ratio"] for row in mine])
            lines.append(f"| {case} | {view} | " + " | ".join(cells) + f" | {change:+.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
