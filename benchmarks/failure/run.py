"""Replay the cases in which LMetric may herd; a result file per cell, rows that are there are not run again.

cd benchmarks && python -m failure.run [--cases NAME ...] [--policies SPEC ...] [--jobs 2] [--out DIR]
"""

import argparse
import fnmatch
import json
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from failure.cases import (
    CASES,
    DETECTORS,
    INSTANCES,
    LOAD_ONLY,
    POLICIES,
    PROFILE,
    REFERENCE,
    SEEDS,
    Case,
    Run,
    runs,
)
from failure.measures import BURST_FIGURES, FIGURES, burst_figures, in_flight
from mulsched.policies import PolicySpec, parse_spec
from mulsched.replay import builtin_profile, replay
from mulsched.replay.saturation import SATURATION_FRACTIONS, rates_to_saturation

HERE = Path(__file__).parent
KEY = ("spec", "seed", "ties", "tie_seed", "delay_s")
COLUMNS = (*KEY, *FIGURES, *BURST_FIGURES)
DRAWN = (REFERENCE, LOAD_ONLY[-1], *DETECTORS)
SERIES = ("long-output-small-0.5", "thinking-class-0.5")
"""Cells whose load by instance is kept for the policies that are drawn."""
SERIES_STEP_S = 2.0


def main() -> None:
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = [case for case in CASES if any(fnmatch.fnmatch(case.name, p) for p in options.cases)]
    absent = [case for case in wanted if case.real and not case_is_here(case, options.data)]
    for case in absent:
        print(f"{case.name}: left out, no trace in {options.data}", flush=True)
    cells = [case for case in wanted if case not in absent]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run_case, c, options.policies, options.data, options.out) for c in cells]
        for future in as_completed(futures):
            print(future.result(), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("traces"), help="folder of the real traces")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--cases", nargs="+", default=["*"], metavar="PATTERN", help="names, with * and ?")
    parser.add_argument("--policies", nargs="+", default=POLICIES, metavar="SPEC")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes")
    return parser.parse_args()


def case_is_here(case: Case, data: Path) -> bool:
    """Whether the real trace of a case can be read."""
    try:
        case.trace(1.0, seed=0, data=data)
    except FileNotFoundError:
        return False
    return True


def run_case(case: Case, policies: Sequence[str], data: Path, out: Path) -> str:
    """Run what is missing of a case's cells, write their files, and return a line that says so."""
    cpu = time.process_time()
    scale = saturating_scale(case, data, out)
    done = 0
    for load in case.loads:
        path = out / f"{case.name}-{load:g}.json"
        body = json.loads(path.read_text()) if path.exists() else _head(case, load, load * scale)
        there = {tuple(row[: len(KEY)]) for row in body["rows"]}
        left = [run for run in runs(case, policies) if run.key not in there]
        if left:
            started = time.process_time()
            _run(case, left, body, data)
            body["cpu_s"] = round(body["cpu_s"] + time.process_time() - started, 1)
            path.write_text(_compact(body))
            done += len(left)
    return f"{case.name}: {done} replays, {time.process_time() - cpu:.0f} s CPU"


def saturating_scale(case: Case, data: Path, out: Path) -> float:
    """Return the scale of the rate that saturates LMetric with hot classes all along; kept in a file.

    Of agents, whose requests wait for answers, that of an open loop.
    """
    path = out / f"saturation-{case.name}.json"
    if not path.exists():
        rates = rates_to_saturation(
            PolicySpec(REFERENCE),
            lambda scale: case.trace(scale, seed=0, data=data, steady=True),
            {"profile": builtin_profile(PROFILE), "instances": INSTANCES, "kv_blocks": case.kv_blocks},
        )
        path.write_text(json.dumps({"scale": rates[SATURATION_FRACTIONS.index(1.0)]}) + "\n")
    return float(json.loads(path.read_text())["scale"])


def _head(case: Case, load: float, scale: float) -> dict[str, Any]:
    return {
        "case": case.name,
        "part": case.part,
        "workload": case.workload,
        "loop": case.loop,
        "kv_blocks": case.kv_blocks or builtin_profile(PROFILE).kv_blocks,
        "window": case.window,
        "load": load,
        "scale": _short(scale),
        "mulsched": version("mulsched"),
        "cpu_s": 0.0,
        "requests": 0,
        "offered_per_s": 0.0,
        "hit_ratio": 0.0,
        "series": {},
        "columns": COLUMNS,
        "rows": [],
    }


def _run(case: Case, left: Sequence[Run], body: dict[str, Any], data: Path) -> None:
    """Add a row for each run; a trace is made once for each seed."""
    for seed in sorted({run.seed for run in left}):
        trace = case.trace(body["scale"], seed=seed, data=data)
        if not body["requests"]:
            stats = trace.stats()
            body["requests"] = stats.requests
            body["offered_per_s"], body["hit_ratio"] = _short(stats.rate_per_s), _short(stats.hit_ratio)
        background = trace.session >= 0
        for run in left:
            if run.seed != seed:
                continue
            spec = parse_spec(run.spec)
            result = replay(
                trace,
                spec.name,
                parameters=spec.parameters,
                profile=builtin_profile(PROFILE),
                instances=INSTANCES,
                kv_blocks=case.kv_blocks,
                loop=case.loop,
                in_flight="cached",
                seed=run.tie_seed,
                ties=run.ties,
                state_delay_s=run.state_delay_s,
            )
            figures = result.summary() | burst_figures(result, background, case.window)
            body["rows"].append([*run.key, *(_short(figures[name]) for name in COLUMNS[len(KEY) :])])
            if f"{case.name}-{body['load']:g}" in SERIES and run in [Run(spec, SEEDS[0]) for spec in DRAWN]:
                times = np.arange(0.0, trace.arrival_s[-1], SERIES_STEP_S)
                body["series"][run.spec] = in_flight(result, times).T.tolist()


def _short(value: float) -> float | None:
    """Return a value with five digits, None for NaN: files stay small, and nothing here is known better."""
    if math.isnan(value):
        return None
    return value if value == 0 else float(f"{value:.5g}")


def _compact(body: Mapping[str, Any]) -> str:
    """Return JSON with a line for each field, and one for each row and series."""
    lines = [f' "{name}": {json.dumps(v)}' for name, v in body.items() if name not in ("series", "rows")]
    series = ",\n".join(
        f"  {json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in body["series"].items()
    )
    rows = ",\n".join("  " + json.dumps(row) for row in body["rows"])
    return "{\n" + ",\n".join(lines) + f',\n "series": {{\n{series}\n }},\n "rows": [\n{rows}\n ]\n}}\n'


if __name__ == "__main__":
    main()
