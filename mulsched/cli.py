"""The command line: ``mulsched replay`` and ``mulsched info``."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, get_args

from mulsched import policies
from mulsched._backend import BACKEND
from mulsched.commands import trace as trace_command
from mulsched.errors import InvalidArgument, MissingExtra, MulschedError
from mulsched.replay.profile import Profile, StepTable, builtin_profile, load_profile
from mulsched.replay.readers import FORMATS, read_trace
from mulsched.replay.report import noise_floor, print_table, to_csv, to_json
from mulsched.replay.simulator import CacheSource, Loop, ReplayResult, replay_many
from mulsched.replay.synthetic import WORKLOADS, format_calibration, synthetic_trace
from mulsched.replay.trace import Trace

__all__ = ["main"]

DEFAULT_POLICIES = ("lmetric", "vllm", "round_robin", "most_hits", "linear")
# Without a trace: about two thirds of what the built-in engines can take, done in some seconds.
DEFAULT_DURATION_S = 300.0
DEFAULT_INSTANCES = 4
DEFAULT_RATE_SCALE = 3.0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mulsched", description="LLM request scheduling by one product.")
    commands = parser.add_subparsers(dest="command", required=True)
    replay = commands.add_parser(
        "replay",
        help="replay a trace through policies and compare them",
        description="Replay a trace through one or more policies on modelled engines and print TTFT, TPOT, "
        "throughput, hit ratio and load spread. Without TRACE a synthetic workload is replayed.",
    )
    replay.add_argument("trace", nargs="?", metavar="TRACE", help="trace file, plain or gzip")
    replay.add_argument(
        "--format", choices=sorted(FORMATS), help="format of TRACE (default: by its first line)"
    )
    replay.add_argument(
        "--workload",
        choices=sorted(WORKLOADS),
        default="chat",
        help="synthetic workload when TRACE is not given",
    )
    replay.add_argument(
        "--policy", action="append", metavar="NAME", help="a policy; repeat for more (see mulsched info)"
    )
    replay.add_argument("--instances", type=int, metavar="N", help="default: 16, without TRACE 4")
    replay.add_argument("--profile", metavar="FILE", help="step table, CSV (default: a built-in 8B model)")
    replay.add_argument("--kv-blocks", type=int, metavar="N", help="KV blocks per instance")
    replay.add_argument(
        "--rate-scale", type=float, metavar="X", help="X times the request rate (default: 1, without TRACE 3)"
    )
    replay.add_argument("--duration", type=float, metavar="S", help="only the first S seconds of the trace")
    replay.add_argument(
        "--max-prompt-tokens", type=int, metavar="N", help="leave out longer requests of TRACE"
    )
    replay.add_argument(
        "--loop", choices=get_args(Loop), default="open", help="arrivals by time, or by think time"
    )
    replay.add_argument(
        "--cache-source",
        choices=get_args(CacheSource),
        default="events",
        help="the router learns of caches from events, or predicts them",
    )
    replay.add_argument("--seed", type=int, default=0, metavar="N")
    replay.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="default: one per core"
    )
    replay.add_argument(
        "--no-noise-floor", action="store_true", help="do not repeat the first policy with other ties"
    )
    replay.add_argument("--json", metavar="FILE", help="write results as JSON (-: standard output, no table)")
    replay.add_argument("--csv", metavar="FILE", help="write results as CSV (-: standard output, no table)")
    replay.set_defaults(run=_replay)
    info = commands.add_parser("info", help="print version, backend and policies")
    info.set_defaults(run=_info)
    trace_command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status: 0, or 2 for bad input (with one line that says why)."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except (MulschedError, OSError) as error:
        print(f"mulsched: {error}", file=sys.stderr)
        return 2
    return status


def _trace(options: argparse.Namespace) -> Trace:
    if options.trace is None:
        scale = DEFAULT_RATE_SCALE if options.rate_scale is None else options.rate_scale
        return synthetic_trace(
            options.workload,
            duration_s=DEFAULT_DURATION_S if options.duration is None else options.duration,
            seed=options.seed,
            rate_per_s=scale * WORKLOADS[options.workload].rate_per_s,
        )
    trace = read_trace(
        options.trace,
        format=options.format,
        seed=options.seed,
        max_prompt_tokens=options.max_prompt_tokens,
    )
    if options.duration is not None:
        trace = trace.slice(0.0, options.duration)
    return trace if options.rate_scale is None else trace.scale_rate(options.rate_scale)


def _profile(options: argparse.Namespace) -> Profile:
    return builtin_profile() if options.profile is None else load_profile(options.profile)


def _replay(options: argparse.Namespace) -> int:
    names = list(dict.fromkeys(options.policy or DEFAULT_POLICIES))
    for name in names:
        policies.get(name)  # an unknown one is told before anything runs
    if options.processes < 1:
        raise InvalidArgument(f"--processes must be at least 1, got {options.processes}")
    trace, profile = _trace(options), _profile(options)
    instances = options.instances
    if instances is None:
        instances = DEFAULT_INSTANCES if options.trace is None else 16
    common: dict[str, Any] = {
        "profile": profile,
        "instances": instances,
        "kv_blocks": options.kv_blocks,
        "cache_source": options.cache_source,
        "loop": options.loop,
        "seed": options.seed,
    }
    jobs = [common | {"policy": name} for name in names]
    if not options.no_noise_floor:
        jobs.append(jobs[0] | {"ties": "random", "seed": options.seed + 1})
    with _progress([str(job["policy"]) + (" (noise)" if "ties" in job else "") for job in jobs]) as tell:
        results = replay_many(trace, jobs, processes=options.processes, progress=tell)
    noise = None if options.no_noise_floor else noise_floor(results[0], results.pop())
    _write(options, trace, profile, results, noise)
    return 0


def _write(
    options: argparse.Namespace,
    trace: Trace,
    profile: Profile,
    results: list[ReplayResult],
    noise: dict[str, float] | None,
) -> None:
    for target, text in ((options.json, to_json(results, noise)), (options.csv, to_csv(results))):
        if target == "-":
            sys.stdout.write(text if text.endswith("\n") else text + "\n")
        elif target is not None:
            Path(target).write_text(text)
    if "-" in (options.json, options.csv):
        return
    if trace.synthetic:
        print(format_calibration(trace), end="\n\n")
    for note in trace.notes:
        print(f"Note: {note}")
    if isinstance(profile.step_time, StepTable):
        print(f"Note: mixed steps of {profile.name} off by {profile.step_time.mixed_error:.1%} (median)")
    print_table(results, noise, sys.stdout)


@contextmanager
def _progress(names: Sequence[str], out: IO[str] | None = None) -> Any:
    """Give a callback that moves one bar per job on standard error."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ModuleNotFoundError as error:
        raise MissingExtra("the progress bar needs rich: pip install 'mulsched[replay]'") from error
    columns = (TextColumn("{task.description:>24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=out or sys.stderr)) as bars:
        tasks = [bars.add_task(name, total=None) for name in names]

        def tell(job: int, done: int, total: int) -> None:
            bars.update(tasks[job], completed=done, total=total)

        callback: Callable[[int, int, int], None] = tell
        yield callback


def _info(options: argparse.Namespace) -> int:
    digest = ""
    if BACKEND == "native":
        from mulsched._native import SOURCE_DIGEST

        digest = f" (sources {SOURCE_DIGEST})"
    print(f"mulsched {version('mulsched')}, backend {BACKEND}{digest}")
    print(f"policies: {', '.join(policies.names())}")
    return 0
