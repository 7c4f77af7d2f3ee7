"""Print the whole comparison as Markdown: ``cd benchmarks && python -m dynamo_replay [FILE]``."""

import argparse
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

import mulsched
from dynamo_replay.experiments import AMPLE, experiments, twice
from dynamo_replay.routing import alike, follow, whole_blocks
from dynamo_replay.simulators import Outcome, Setup, run_dynamo, run_mulsched
from dynamo_replay.speed import ROUTERS, first_requests, jobs, measure
from mulsched.replay import Trace, read_trace, synthetic_trace

FIGURES = (
    ("reused", ".4f"),
    ("TTFT mean", ".1f"),
    ("TTFT p50", ".1f"),
    ("TTFT p95", ".1f"),
    ("TTFT p99", ".1f"),
    ("TPOT mean", ".2f"),
    ("TPOT p50", ".2f"),
    ("TPOT p95", ".2f"),
    ("TPOT p99", ".2f"),
    ("makespan s", ".1f"),
    ("tok/s", ".0f"),
    ("requests max/mean", ".3f"),
    ("prefill max/mean", ".3f"),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="dynamo_replay", description=__doc__)
    parser.add_argument("trace", nargs="?", type=Path, help="a trace file, for its first --minutes")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--repeats", type=int, default=5, help="runs of what draws among ties (default 5)")
    parser.add_argument("--requests", type=int, default=3_200, help="of the synthetic chat (default 3,200)")
    parser.add_argument("--timings", type=int, default=3, help="runs of which a median is taken; 0: no times")
    given = parser.parse_args()
    print_header(sys.argv[1:])
    print_engines()
    print_router(given.repeats)
    chat = synthetic_trace("chat", duration_s=given.requests / 5, seed=1)
    traces = [
        first_requests(chat, given.requests),
        synthetic_trace("tool_agent", duration_s=given.requests / 10, seed=1),
    ]
    if given.trace is not None:
        # ticks are spread, and both get the spread arrivals; block ids and lengths are the file's
        traces.append(read_trace(given.trace).slice(0, 60 * given.minutes))
    print("## Same trace, same policy\n")
    for trace in traces:
        print_results(trace, given.repeats)
    if given.timings:
        print_speed(given.requests, given.timings)


def print_header(arguments: Sequence[str]) -> None:
    print(
        f"`{' '.join(['python -m dynamo_replay', *(Path(a).name for a in arguments)])}`: "
        f"mulsched {version('mulsched')} ({mulsched.BACKEND}), "
        f"ai-dynamo-runtime {version('ai-dynamo-runtime')}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores, {processor()}.\n"
    )


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def print_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    head = list(head)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines), end="\n\n")


def print_engines() -> None:
    print("## Same engine? Request by request, one thing changed at a time (round robin)\n")
    rows = []
    for experiment in experiments():
        theirs, ours, agree = experiment.run()
        shares = (agree.instance, agree.cached, agree.ttft, agree.finish)
        rows.append(
            [
                experiment.changed,
                f"{len(experiment.trace):,}",
                *(f"{100 * share:.2f}" for share in shares),
                f"{agree.worst_ttft_ms:.3f}",
                f"{theirs.reused:.4f}",
                f"{ours.reused:.4f}",
                f"{theirs.preemptions} / {ours.preemptions}",
            ]
        )
    head = ("what is changed", "requests", "same worker %", "same hits %", "same TTFT %", "same end %")
    print_table(
        (*head, "largest TTFT gap ms", "reused, Dynamo", "reused, mulsched", "preempted, Dynamo / mulsched"),
        rows,
    )


def print_router(repeats: int) -> None:
    print("## Same router? Dynamo's decisions, put to its rule as modelled and to our `dynamo` policy\n")
    setup = Setup(kv_blocks=AMPLE, max_batched_tokens=1_000_000)
    chat = synthetic_trace("chat", duration_s=240, seed=1)
    rows = []
    for name, trace, reuse, scale in (
        ("defaults", chat, True, 1.0),
        ("defaults, every prompt again after 0.25 s", twice(chat, 0.25), True, 1.0),
        ("prefill_load_scale 2, overlap_weight 2", chat, True, 2.0),
        ("router_assume_kv_reuse=False", chat, False, 1.0),
        ("the same, prompts of whole blocks, no full hits", whole_blocks(chat, 16), False, 1.0),
    ):
        router = {"router_assume_kv_reuse": reuse, "prefill_load_scale": scale}
        seen = [
            follow(
                trace,
                run_dynamo(trace, setup, "kv_router", router=router),
                instances=setup.instances,
                prefill_load_scale=scale,
                assume_kv_reuse=reuse,
            )
            for _ in range(repeats)
        ]
        shares = (np.mean([s.rule for s in seen]), np.mean([s.ours for s in seen]))
        rows.append([name, f"{repeats * len(trace):,}", *(f"{100 * share:.2f}" for share in shares)])
    print_table(("Dynamo's router", "decisions", "smallest by its rule %", "smallest by our policy %"), rows)


def print_results(trace: Trace, repeats: int) -> None:
    setup = Setup()
    print(
        f"### {trace.name}: {len(trace):,} requests, {setup.instances} workers of {setup.kv_blocks:,} "
        f"blocks of {setup.block_size}\n"
    )
    counted_apart = {"router_assume_kv_reuse": False}
    apart = [run_dynamo(trace, setup, "kv_router", router=counted_apart) for _ in range(repeats)]
    ours = [run_mulsched(trace, setup, "dynamo", seed=seed) for seed in range(repeats)]
    rows = [
        results_row("Dynamo round_robin", [run_dynamo(trace, setup)], setup),
        results_row("mulsched round_robin", [run_mulsched(trace, setup)], setup),
        results_row(
            "Dynamo kv_router", [run_dynamo(trace, setup, "kv_router") for _ in range(repeats)], setup
        ),
        results_row("Dynamo kv_router, shared blocks counted for each request", apart, setup),
        results_row("mulsched dynamo", ours, setup),
        results_row("mulsched lmetric", [run_mulsched(trace, setup, "lmetric")], setup),
    ]
    heads = [name.replace("TTFT ", "TTFT ms ").replace("TPOT ", "TPOT ms ") for name, _ in FIGURES]
    print_table(("simulator, policy", *heads, "runs", "TTFT mean, low to high"), rows)
    longest = max(alike(theirs, run) for theirs in apart for run in ours)
    print(
        "The fourth row and the fifth go the same way, but for the names of workers, for the first "
        f"{longest:,} requests in the runs that agree longest; then comes a tie or a difference.\n"
    )


def results_row(name: str, runs: list[Outcome], setup: Setup) -> list[str]:
    """Means over the runs; the last cell is how far the mean TTFT moves between them."""
    figures = [run.figures(setup.instances) for run in runs]
    ttft = [f["TTFT mean"] for f in figures]
    return [
        name,
        *(f"{np.mean([f[figure] for f in figures]):{spec}}" for figure, spec in FIGURES),
        str(len(runs)),
        f"{min(ttft):.1f} to {max(ttft):.1f}" if len(runs) > 1 else "",
    ]


def print_speed(requests: int, timings: int) -> None:
    print(f"## Seconds for the same job, median of {timings}\n")
    rows = []
    for job in jobs(requests, longer_s=600):
        for router_mode, policy in ROUTERS:
            for pinned in (True, False):
                theirs, ours, roofline = measure(job, router_mode, policy, pinned=pinned, repeats=timings)
                size = f"{len(job.trace):,} requests, {job.trace.output_tokens.sum():,} tokens out"
                rows.append(
                    [
                        f"{job.name}: {size}",
                        f"{router_mode}, {policy}",
                        "one" if pinned else "free",
                        *(f"{s:.3f}" for s in (theirs.call_s, theirs.own_clock_s, theirs.cpu_s)),
                        *(f"{s:.3f}" for s in (ours.call_s, ours.cpu_s, roofline.call_s, roofline.cpu_s)),
                        f"{theirs.own_clock_s / ours.call_s:.2f}",
                        f"{theirs.cpu_s / ours.cpu_s:.2f}",
                    ]
                )
    times = ("Dynamo, call", "own clock", "CPU", "mulsched", "CPU", "mulsched, built-in step times", "CPU")
    print_table(
        ("job", "router, policy", "cores", *times, "own clock / mulsched", "CPU / CPU"),
        rows,
    )


if __name__ == "__main__":
    main()
