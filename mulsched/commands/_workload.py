"""Options that say which trace is replayed and on which engines; shared by commands."""

import argparse
from functools import lru_cache

from mulsched.errors import InvalidArgument
from mulsched.replay.bursts import BURSTS, burst_trace
from mulsched.replay.experiment import TraceAt
from mulsched.replay.profile import BUILTIN_PROFILES, Profile, builtin_profile, load_profile
from mulsched.replay.readers import FORMATS, read_trace
from mulsched.replay.synthetic import CALIBRATED_S, WORKLOADS, synthetic_trace
from mulsched.replay.trace import Trace

__all__ = ["GENERATED", "add_trace_options", "generate", "profile_of", "rate_scale_of", "trace_at"]

GENERATED = tuple(sorted((*WORKLOADS, *BURSTS)))
"""Names of the traces that :func:`generate` makes."""

# Without a trace: about two thirds of what four built-in engines can take, done in some seconds.
DEFAULT_DURATION_S = 300.0
DEFAULT_RATE_SCALE = 3.0


def add_trace_options(parser: argparse.ArgumentParser) -> None:
    """Add TRACE and what changes it. The options of a parser with these fit :func:`trace_at`."""
    parser.add_argument("trace", nargs="?", metavar="TRACE", help="trace file, plain or gzip")
    parser.add_argument(
        "--format", choices=sorted(FORMATS), help="format of TRACE (default: by its first line)"
    )
    parser.add_argument(
        "--workload",
        choices=GENERATED,
        help="synthetic workload when TRACE is not given (default: chat)",
    )
    parser.add_argument(
        "--rate-scale", type=float, metavar="X", help="X times the request rate (default: 1, without TRACE 3)"
    )
    parser.add_argument("--duration", type=float, metavar="S", help="only the first S seconds of the trace")
    parser.add_argument(
        "--max-prompt-tokens", type=int, metavar="N", help="leave out longer requests of TRACE"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N")


def rate_scale_of(options: argparse.Namespace) -> float:
    """Return the scale of the rate that the options ask for."""
    if options.rate_scale is not None:
        return float(options.rate_scale)
    return DEFAULT_RATE_SCALE if options.trace is None else 1.0


def trace_at(options: argparse.Namespace) -> TraceAt:
    """Return the function from a scale of the rate to the trace of the options at that rate.

    A file is read once. Raises InvalidArgument (options that do not go together), TraceError.
    """
    if options.trace is None:
        for name in ("format", "max_prompt_tokens"):
            if getattr(options, name) is not None:
                raise InvalidArgument(f"--{name.replace('_', '-')} goes with a TRACE file only")
        return lru_cache(maxsize=1)(lambda scale: _synthetic(options, scale))
    if options.workload is not None:
        raise InvalidArgument(f"give a TRACE or a --workload, got {options.trace} and {options.workload}")
    trace = read_trace(
        options.trace,
        format=options.format,
        seed=options.seed,
        max_prompt_tokens=options.max_prompt_tokens,
    )
    if options.duration is not None:
        trace = trace.slice(0.0, options.duration)
    return lambda scale: trace if scale == 1 else trace.scale_rate(scale)


def _synthetic(options: argparse.Namespace, scale: float) -> Trace:
    workload = options.workload or "chat"
    duration = options.duration
    if duration is None and workload in WORKLOADS:
        duration = DEFAULT_DURATION_S
    return generate(workload, duration_s=duration, seed=options.seed, rate_scale=scale)


def generate(
    workload: str,
    *,
    duration_s: float | None = None,
    seed: int = 0,
    rate_scale: float = 1.0,
) -> Trace:
    """Return a synthetic trace by name, by default of its own length; a burst's rate is its background's.

    Raises as :func:`~mulsched.replay.synthetic_trace` and :func:`~mulsched.replay.burst_trace`.
    """
    is_burst = workload in BURSTS
    background = BURSTS[workload].background if is_burst else workload
    rate = rate_scale * WORKLOADS[background].rate_per_s
    if is_burst:
        return burst_trace(workload, duration_s=duration_s, seed=seed, rate_per_s=rate)
    duration = CALIBRATED_S if duration_s is None else duration_s
    return synthetic_trace(workload, duration_s=duration, seed=seed, rate_per_s=rate)


def profile_of(options: argparse.Namespace) -> Profile:
    """Return the profile that ``--profile`` names: a built-in one or a file's. Raises ProfileError."""
    if options.profile in BUILTIN_PROFILES:
        return builtin_profile(options.profile)
    return load_profile(options.profile)
