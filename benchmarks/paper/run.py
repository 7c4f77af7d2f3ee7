"""Replay the comparison of the LMetric paper; a result file per cell, cells that have one are skipped.

python benchmarks/paper/run.py [--data DIR] [--cells NAME ...] [--out DIR] [--trace NAME=FILE] [--quick]
"""

import argparse
import fnmatch
import json
import math
import os
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import plan
import rules
from setups import DURATIONS_S, FILES, Setup, Source, build_trace

from mulsched.replay import Trace, replay

HERE = Path(__file__).parent


def main() -> None:
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    source = Source(options.data, tuple(options.trace), options.quick)
    wanted = [cell for cell in plan.cells() if any(fnmatch.fnmatch(cell.name, p) for p in options.cells)]
    # what a cell needs comes before it
    cells = dict.fromkeys(each for cell in wanted for each in (*plan.needs(cell), cell))
    left = [cell for cell in cells if not _path(options.out, cell).exists()]
    print(f"{len(left)} of {len(cells)} cells to do", flush=True)
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        running: dict[Future[str], plan.Cell] = {}
        while left or running:
            waits = {*left, *running.values()}
            ready = [cell for cell in left if not waits & set(plan.needs(cell))]
            for cell in ready[: options.processes - len(running)]:
                left.remove(cell)
                running[pool.submit(run_cell, cell, source, options.out)] = cell
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                print(f"{future.result()}; {len(left) + len(running)} cells left", flush=True)


def _path(out: Path, cell: plan.Cell) -> Path:
    return out / f"{cell.name}.json"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=Path("traces"), help="folder of " + ", ".join(FILES.values())
    )
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--cells", nargs="+", default=["*"], metavar="PATTERN", help="names, with * and ?")
    parser.add_argument(
        "--trace",
        action="append",
        default=[],
        type=lambda text: tuple(text.split("=", 1)),
        metavar="NAME=FILE",
        help=f"the original of a synthetic trace ({', '.join(DURATIONS_S)})",
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a few hundred requests a trace")
    options = parser.parse_args()
    unknown = [name for name, *_ in options.trace if name not in (*DURATIONS_S, *FILES)]
    if unknown:
        parser.error(f"--trace takes {', '.join((*DURATIONS_S, *FILES))}, got {', '.join(unknown)}")
    return options


def run_cell(cell: plan.Cell, source: Source, out: Path) -> str:
    """Run a cell, write its file, and return a line that says so."""
    plan.register_ablations()
    started, cpu = time.monotonic(), time.process_time()
    trace = build_trace(cell.setup, source)
    body = _max_rate(cell.setup, trace) if cell.stage == "max" else _runs(cell, trace, out)
    spent = time.process_time() - cpu
    result = {
        "cell": cell.name,
        "stage": cell.stage,
        "setup": asdict(cell.setup) | {"kv_blocks": cell.setup.blocks(), "loop": cell.setup.loop},
        "mulsched": version("mulsched"),
        "quick": source.quick,
        "cpu_s": round(spent, 1),
        **body,
    }
    path = _path(out, cell)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(_compact(result))
    part.replace(path)
    return f"{cell.name}: {spent:.0f} s CPU, {time.monotonic() - started:.0f} s"


def _max_rate(setup: Setup, trace: Trace) -> dict[str, Any]:
    trials: dict[float, float] = {}

    def served(scale: float) -> float:
        if scale not in trials:
            scaled = trace.scale_rate(scale)
            result = replay(
                scaled, "vllm", profile=setup.engine(), instances=setup.instances, kv_blocks=setup.blocks()
            )
            trials[scale] = float((result.first_token_s <= result.arrival_s.max()).mean())
        return trials[scale]

    start = 0.25 if setup.trace == "agentic" else 4.0
    scale = rules.largest_rate(served, start=start)
    stats = trace.stats()
    return {
        "scale": scale,
        "offered_per_s": stats.rate_per_s * scale,
        "trials": [[_short(s), _short(share)] for s, share in sorted(trials.items())],
        "trace": {
            "name": trace.name,
            "synthetic": trace.synthetic,
            "notes": list(trace.notes),
            "requests": stats.requests,
            "duration_s": _short(stats.duration_s),
            "input_mean": _short(stats.input_mean),
            "output_mean": _short(stats.output_mean),
            "hit_ratio": _short(stats.hit_ratio),
        },
    }


def _runs(cell: plan.Cell, trace: Trace, out: Path) -> dict[str, Any]:
    setup = cell.setup
    scale = cell.load * json.loads(_path(out, plan.Cell("max", setup)).read_text())["scale"]
    scaled = trace.scale_rate(scale)
    columns = ["label", "policy", "parameters", "role", "seed", "ties", "delay_s", "loss", *rules.FIGURES]
    rows = []
    known: dict[str, list[float]] = {}  # a default that is on its grid too runs once
    for run in plan.runs(cell, _tuned(setup, out)):
        key = repr(run).replace(f"role='{run.role}', ", "")
        if key not in known:
            result = replay(
                scaled,
                run.policy,
                parameters=run.parameters,
                profile=setup.engine(),
                instances=setup.instances,
                kv_blocks=setup.blocks(),
                loop=setup.loop,
                seed=run.seed,
                ties=run.ties,
                state_delay_s=run.state_delay_s,
                event_loss_ratio=run.event_loss_ratio,
                in_flight=run.in_flight,
            )
            figures = result.summary()
            known[key] = [result.ties, *(_short(figures[name]) for name in rules.FIGURES)]
        ties, *figures = known[key]
        own = [run.label, run.policy, dict(run.parameters), run.role, run.seed, ties]
        rows.append([*own, run.state_delay_s, run.event_loss_ratio, *figures])
    return {
        "load": cell.load,
        "scale": _short(scale),
        "offered_per_s": _short(trace.stats().rate_per_s * scale),
        "requests": len(trace),
        "columns": columns,
        "rows": rows,
    }


def _tuned(setup: Setup, out: Path) -> dict[str, Any] | None:
    """Return the parameters of the linear score that did best in the main table, None without one."""
    path = _path(out, plan.Cell("main", setup))
    if not path.exists():
        return None
    main = json.loads(path.read_text())
    rows = [dict(zip(main["columns"], row, strict=True)) for row in main["rows"]]
    trials = [row for row in rows if row["policy"] == "linear" and row["role"] == "trial"]
    return dict(min(trials, key=rules.objective)["parameters"])


def _short(value: float) -> float:
    """Return a value with five digits: files stay small, and nothing here is known better."""
    return value if value == 0 or not math.isfinite(value) else float(f"{value:.5g}")


def _compact(result: dict[str, Any]) -> str:
    """Return JSON with one line per row."""
    rows = result.pop("rows", None)
    text = json.dumps(result, indent=1)
    if rows is None:
        return text + "\n"
    return text[:-2] + ',\n "rows": [\n' + ",\n".join("  " + json.dumps(row) for row in rows) + "\n ]\n}\n"


if __name__ == "__main__":
    main()
