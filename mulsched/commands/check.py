"""``mulsched check``: would LMetric herd on this trace?"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, get_args

from mulsched.commands._progress import progress_bar
from mulsched.commands._workload import add_trace_options, profile_of, rate_scale_of, trace_at
from mulsched.errors import InvalidArgument
from mulsched.failure_condition import MAX_CLASSES
from mulsched.replay.check import check_trace
from mulsched.replay.check_report import plot_check, print_check
from mulsched.replay.plots import render
from mulsched.replay.profile import BUILTIN_PROFILES
from mulsched.replay.simulator import Loop

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "check",
        help="say where in a trace a shared prefix would overload the instances that hold it",
        description="Per window of TRACE, or of a live router's log: the prefix class closest to overloading "
        "its holders, its share of requests and of work, the condition's verdict, and by replay whether "
        "LMetric loses to load-only there. Status 0: the condition holds everywhere, 1: it fails, "
        "2: bad input.",
    )
    add_trace_options(parser)
    parser.add_argument("--instances", type=int, default=16, metavar="N", help="default: 16")
    parser.add_argument(
        "--cache-blocks", type=int, metavar="C", help="KV blocks per instance (default: the profile's)"
    )
    parser.add_argument(
        "--profile",
        default=BUILTIN_PROFILES[0],
        metavar="NAME|FILE",
        help=f"a step table, CSV, or one of {', '.join(BUILTIN_PROFILES)} (default: the first)",
    )
    parser.add_argument(
        "--loop", choices=get_args(Loop), default="open", help="arrivals by time, or by think time"
    )
    parser.add_argument("--window", type=float, default=60.0, metavar="S", help="seconds (default: 60)")
    parser.add_argument(
        "--confidence",
        type=float,
        default=3.0,
        metavar="C",
        help="standard deviations that an excess must have to be no chance (default: 3)",
    )
    parser.add_argument(
        "--classes", type=int, default=1, metavar="K", help="show up to K classes of each window (default: 1)"
    )
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="default: one per core"
    )
    parser.add_argument("--plot", metavar="FILE", help="plot the margin over time, FILE.svg or FILE.png")
    parser.add_argument("--json", metavar="FILE", help="write all as JSON (-: standard output, no table)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    form = None if options.plot is None else Path(options.plot).suffix
    if form not in (None, ".svg", ".png"):
        raise InvalidArgument(f"--plot must name a file that ends in .svg or .png, got {options.plot}")
    if options.processes < 1:
        raise InvalidArgument(f"--processes must be at least 1, got {options.processes}")
    if not 1 <= options.classes <= MAX_CLASSES:
        raise InvalidArgument(f"--classes must be in 1..{MAX_CLASSES}, got {options.classes}")
    trace = trace_at(options)(rate_scale_of(options))
    with progress_bar() as progress:
        check = check_trace(
            trace,
            profile=profile_of(options),
            instances=options.instances,
            kv_blocks=options.cache_blocks,
            window_s=options.window,
            confidence=options.confidence,
            loop=options.loop,
            seed=options.seed,
            processes=options.processes,
            progress=progress,
        )
    if form is not None:
        Path(options.plot).write_bytes(render(plot_check(check), "svg" if form == ".svg" else "png"))
    if options.json is not None:
        text = json.dumps(check.as_dict(), indent=1, allow_nan=False) + "\n"
        if options.json == "-":
            sys.stdout.write(text)
        else:
            Path(options.json).write_text(text)
    if options.json != "-":
        for note in trace.notes:
            print(f"Note: {note}")
        print_check(check, sys.stdout, classes=options.classes)
    return int(check.at_risk)
