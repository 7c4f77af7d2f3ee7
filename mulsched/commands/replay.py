"""``mulsched replay``: a trace through policies, with sweeps, tuning and repeats."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from mulsched._backend import BACKEND
from mulsched.commands._progress import progress_bar
from mulsched.commands._workload import add_trace_options, profile_of, rate_scale_of, trace_at
from mulsched.errors import InvalidArgument
from mulsched.policies import parse_spec
from mulsched.replay.experiment import OBJECTIVES, Experiment, run_experiment
from mulsched.replay.grid import Grid, parse_grid, parse_tune
from mulsched.replay.profile import BUILTIN_PROFILES, Profile, StepTable
from mulsched.replay.report import print_report
from mulsched.replay.results import RequestWriter, Results, check_new
from mulsched.replay.saturation import rates_to_saturation
from mulsched.replay.simulator import CacheSource, Disaggregation, Loop
from mulsched.replay.slo import parse_slo
from mulsched.replay.synthetic import WORKLOADS, format_calibration
from mulsched.replay.trace import Trace
from mulsched.router import InFlight

__all__ = ["add_parser"]

DEFAULT_POLICIES = ("lmetric", "vllm", "round_robin", "most_hits", "linear")
DEFAULT_INSTANCES = 4  # without a trace


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "replay",
        help="replay a trace through policies and compare them",
        description="Replay a trace through one or more policies on modelled engines and print TTFT, TPOT, "
        "throughput, hit ratio and load spread. Without TRACE a synthetic workload is replayed.",
    )
    add_trace_options(parser)
    parser.add_argument(
        "--policy",
        action="append",
        metavar="SPEC",
        help="a policy, NAME or NAME:PARAMETER=VALUE,...; repeat for more (see mulsched info)",
    )
    _add_engine_options(parser)
    _add_experiment_options(parser)
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="default: one per core"
    )
    parser.add_argument("--json", metavar="FILE", help="write results as JSON (-: standard output, no table)")
    parser.add_argument("--csv", metavar="FILE", help="write results as CSV (-: standard output, no table)")
    parser.add_argument(
        "--out", metavar="DIR", help="keep results.json and requests.parquet there, for mulsched report"
    )
    parser.set_defaults(run=_run)


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--instances", type=int, metavar="N", help="default: 16, without TRACE 4")
    parser.add_argument(
        "--profile",
        default=BUILTIN_PROFILES[0],
        metavar="NAME|FILE",
        help=f"a step table, CSV, or one of {', '.join(BUILTIN_PROFILES)} (default: the first)",
    )
    parser.add_argument("--kv-blocks", type=int, metavar="N", help="KV blocks per instance")
    parser.add_argument(
        "--schedules-ahead",
        action="store_true",
        help="engines plan a step while the one before runs, as vLLM does with --async-scheduling",
    )
    parser.add_argument(
        "--loop", choices=get_args(Loop), default="open", help="arrivals by time, or by think time"
    )
    parser.add_argument(
        "--cache-source",
        choices=get_args(CacheSource),
        default="events",
        help="the router learns of caches from events, or predicts them",
    )
    parser.add_argument(
        "--state-delay",
        type=float,
        default=0.0,
        metavar="S",
        help="the router hears of engines S seconds late",
    )
    parser.add_argument(
        "--event-loss",
        type=float,
        default=0.0,
        metavar="X",
        help="share of cache events that get lost, 0 to 1",
    )
    parser.add_argument(
        "--in-flight",
        choices=get_args(InFlight),
        default="cached",
        help="whether prefixes count as cached from their dispatch on, or only once they are prefilled",
    )
    parser.add_argument(
        "--prefill-instances",
        type=int,
        metavar="N",
        help="N of the instances prefill, the others decode (default: each does both)",
    )


def _add_experiment_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("experiments")
    group.add_argument(
        "--sweep",
        action="append",
        metavar="NAME[=V,V,..]",
        help="rate: scales of the request rate (default: up to saturation of the first policy); "
        "or a parameter, such as weight, of every policy that has it",
    )
    group.add_argument(
        "--tune",
        action="append",
        default=[],
        metavar="POLICY[:NAME[=V,V,..]]",
        help="add a row with the best value of a parameter, found on this trace; repeat for more",
    )
    group.add_argument(
        "--objective",
        choices=list(OBJECTIVES),
        help="what --tune makes best (default: mean TTFT x mean TPOT)",
    )
    group.add_argument(
        "--repeat",
        type=int,
        default=1,
        metavar="N",
        help="N runs each, shifted ties and seeds: mean, interval",
    )
    group.add_argument(
        "--slo",
        metavar="ttft=S,tpot=S",
        help="objectives in seconds; adds the goodput, requests/s that meet them",
    )
    group.add_argument(
        "--no-noise-floor", action="store_true", help="do not repeat the first policy with other ties"
    )


def _check(options: argparse.Namespace) -> None:
    """Raise InvalidArgument for options that do not go together, before anything is read or run."""
    if options.processes < 1:
        raise InvalidArgument(f"--processes must be at least 1, got {options.processes}")
    if options.sweep and len(options.sweep) > 1:
        raise InvalidArgument(f"one --sweep at a time, got {' and '.join(options.sweep)}")
    if options.objective is not None and not options.tune:
        raise InvalidArgument("--objective goes with --tune")
    if options.no_noise_floor and options.repeat > 1:
        raise InvalidArgument("--repeat measures the noise: leave out --no-noise-floor")
    if options.json == "-" and options.csv == "-":
        raise InvalidArgument("--json - and --csv - both write to standard output")
    if _sweeps_rate(options) and options.rate_scale is not None:
        raise InvalidArgument("--rate-scale and --sweep rate both set the rate")


def _sweeps_rate(options: argparse.Namespace) -> bool:
    return bool(options.sweep) and options.sweep[0].partition("=")[0].strip() == "rate"


def _asks_for_rates(options: argparse.Namespace) -> bool:
    return _sweeps_rate(options) and "=" not in options.sweep[0]


def _run(options: argparse.Namespace) -> int:
    _check(options)
    experiment = _experiment(options)
    traces = trace_at(options)
    with ExitStack() as stack:
        keep = None
        if options.out is not None:
            directory = check_new(Path(options.out))
            keep = stack.enter_context(closing(RequestWriter(directory))).write
        progress = stack.enter_context(progress_bar())
        if _asks_for_rates(options):
            rates = rates_to_saturation(
                experiment.policies[0], traces, experiment.options, seed=options.seed, progress=progress
            )
            experiment = dataclasses.replace(experiment, rates=rates)
        trace = traces(experiment.rates[0])
        results = run_experiment(
            experiment,
            traces,
            settings=_settings(options, trace, experiment.options["profile"]),
            processes=options.processes,
            progress=progress,
            keep=keep,
        )
    if options.out is not None:
        results.save(directory)
    _write(options, trace, experiment.options["profile"], results)
    return 0


def _experiment(options: argparse.Namespace) -> Experiment:
    sweep: Grid | None = None
    rates: Sequence[float] = (rate_scale_of(options),)
    if options.sweep and not _sweeps_rate(options):
        sweep = parse_grid(options.sweep[0])
    elif options.sweep and not _asks_for_rates(options):
        rates = parse_grid(options.sweep[0]).values
    instances = options.instances
    if instances is None:
        instances = DEFAULT_INSTANCES if options.trace is None else 16
    prefill = options.prefill_instances
    return Experiment(
        policies=[parse_spec(text) for text in dict.fromkeys(options.policy or DEFAULT_POLICIES)],
        options={
            "profile": _profile(options),
            "instances": instances,
            "kv_blocks": options.kv_blocks,
            "cache_source": options.cache_source,
            "loop": options.loop,
            "state_delay_s": options.state_delay,
            "event_loss_ratio": options.event_loss,
            "in_flight": options.in_flight,
            "disaggregation": prefill if prefill is None else Disaggregation(prefill),
        },
        rates=rates,
        sweep=sweep,
        tunes=[parse_tune(text) for text in options.tune],
        objective=options.objective or next(iter(OBJECTIVES)),
        repeat=options.repeat,
        noise=not options.no_noise_floor,
        slo=None if options.slo is None else parse_slo(options.slo),
        seed=options.seed,
    )


def _profile(options: argparse.Namespace) -> Profile:
    profile = profile_of(options)
    if not options.schedules_ahead:
        return profile
    return dataclasses.replace(profile, name=f"{profile.name} scheduling ahead", schedules_ahead=True)


def _settings(options: argparse.Namespace, trace: Trace, profile: Profile) -> Mapping[str, Any]:
    # of the blocks, those that were replayed are with the other settings
    limits = {f.name: getattr(profile, f.name) for f in dataclasses.fields(profile) if f.name != "kv_blocks"}
    return {
        "mulsched": version("mulsched"),
        "backend": BACKEND,
        "command": options.command_line,
        "notes": list(trace.notes),
        "engine": {name: value for name, value in limits.items() if isinstance(value, str | int | float)},
    }


def _write(options: argparse.Namespace, trace: Trace, profile: Profile, results: Results) -> None:
    for target, write in ((options.json, results.to_json), (options.csv, results.to_csv)):
        if target == "-":
            sys.stdout.write(write())
        elif target is not None:
            Path(target).write_text(write())
    if "-" in (options.json, options.csv):
        return
    if trace.name.removeprefix("synthetic:") in WORKLOADS:  # not every synthetic trace has targets
        print(format_calibration(trace), end="\n\n")
    for note in trace.notes:
        print(f"Note: {note}")
    if isinstance(profile.step_time, StepTable):
        print(f"Note: mixed steps of {profile.name} off by {profile.step_time.mixed_error:.1%} (median)")
    print_report(results, sys.stdout)
    if options.out is not None:
        print(f"Results are in {options.out}; a page of plots: mulsched report {options.out}")
