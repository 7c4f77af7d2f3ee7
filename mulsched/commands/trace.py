"""``mulsched trace``: look at trace files, check them, convert them to our format, make synthetic ones."""

import argparse
import dataclasses
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mulsched.commands._workload import GENERATED, generate
from mulsched.errors import InvalidArgument
from mulsched.replay.openai_log import read_openai_log
from mulsched.replay.readers import FORMATS, read_trace
from mulsched.replay.synthetic import WORKLOADS, format_calibration
from mulsched.replay.trace import Trace
from mulsched.replay.trace_file import write_trace
from mulsched.replay.validation import validate_trace
from mulsched.tokenizer import load_tokenizer

__all__ = ["add_parser"]

OPENAI = "openai"
SHOWN = 20  # bad lines
_OF_OPENAI = ("salt_file", "tokenizer", "block_size", "chars_per_token", "session_field", "time_field")


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("trace", help="check, convert and generate trace files")
    actions = parser.add_subparsers(dest="action", required=True)
    for name, run, text in (
        ("info", _info, "print what a trace is like"),
        ("validate", _validate, "print everything that is wrong with a trace; status 0 if nothing, else 2"),
    ):
        action = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        action.add_argument("trace", metavar="FILE", help="trace file, plain or gzip")
        action.add_argument("--format", choices=sorted(FORMATS), help="default: by its first line")
        action.set_defaults(run=run)
    action.add_argument(
        "--limit", type=int, default=SHOWN, metavar="N", help=f"problems to print (default: {SHOWN})"
    )
    _add_convert(actions)
    action = actions.add_parser("generate", help="write a synthetic trace")
    action.add_argument("output", metavar="OUT", help="trace file; .gz packs it")
    # the names of mulsched replay, which makes the same trace from the same values
    action.add_argument(
        "--workload", choices=GENERATED, default="chat", help="synthetic workload (default: chat)"
    )
    action.add_argument(
        "--rate-scale", type=float, default=1.0, metavar="X", help="X times its request rate (default: 1)"
    )
    action.add_argument(
        "--duration", type=float, metavar="S", help="default: 7200, as calibrated; a burst's own"
    )
    action.add_argument("--seed", type=int, default=0, metavar="N")
    action.set_defaults(run=_generate)


def _add_convert(actions: Any) -> None:
    convert = actions.add_parser(
        "convert",
        help="write a trace, or a log of requests with text, in our format",
        description="Write IN in mulsched's trace format. From a log of requests with text (--from openai) "
        "nothing of the text gets into OUT; what does is in docs/trace-format.md.",
    )
    convert.add_argument("input", metavar="IN", help="file, plain or gzip")
    convert.add_argument("output", metavar="OUT", help="trace file; .gz packs it")
    convert.add_argument(
        "--from",
        dest="format",
        choices=[*sorted(FORMATS), OPENAI],
        help="format of IN (default: by its first line)",
    )
    convert.add_argument("--name", help="name of the trace (default: that of IN, or 'openai log')")
    convert.add_argument("--skip-bad", action="store_true", help="leave out bad lines and count them")
    convert.add_argument(
        "--seed", type=int, metavar="N", help="places arrivals that IN does not (default: 0)"
    )
    convert.add_argument(
        "--hash-block-tokens",
        type=int,
        metavar="N",
        help="tokens per hash id of a mooncake file (default: 512)",
    )
    group = convert.add_argument_group("logs of requests with text (--from openai)")
    group.add_argument(
        "--salt-file",
        metavar="FILE",
        help="secret key of the hashes, made if not there (default: a new one, forgotten)",
    )
    group.add_argument("--tokenizer", metavar="NAME|FILE", help="cut blocks by its tokens, not by characters")
    group.add_argument("--block-size", type=int, metavar="N", help="tokens per block (default: 16)")
    group.add_argument("--chars-per-token", type=float, metavar="X", help="default: measured on the log")
    group.add_argument(
        "--session-field", metavar="PATH", help="as metadata.session_id (default: inferred from prompts)"
    )
    group.add_argument("--time-field", metavar="PATH", help="the arrival (default: the usual names)")
    convert.set_defaults(run=_convert)


def _info(options: argparse.Namespace) -> int:
    print(_figures(read_trace(options.trace, format=options.format)))
    return 0


def _validate(options: argparse.Namespace) -> int:
    if options.limit < 0:
        raise InvalidArgument(f"--limit must be at least 0, got {options.limit}")
    problems, trace = validate_trace(options.trace, format=options.format)
    _print_bad(problems, options.limit)
    if trace is not None:
        print(_figures(trace))
    print(f"{options.trace}: {f'{len(problems)} problems' if problems else 'valid'}")
    return 2 if problems else 0


def _convert(options: argparse.Namespace) -> int:
    bad: list[str] | None = [] if options.skip_bad else None
    trace = _read_openai(options, bad) if options.format == OPENAI else _read(options, bad)
    if options.name is not None:
        trace = dataclasses.replace(trace, name=options.name)
    write_trace(trace, options.output)
    _print_bad(bad or [], SHOWN)
    print(_figures(trace))
    return 0


def _read(options: argparse.Namespace, bad: list[str] | None) -> Trace:
    for name in _OF_OPENAI:
        if getattr(options, name) is not None:
            raise InvalidArgument(f"--{name.replace('_', '-')} goes with --from {OPENAI} only")
    given = {"seed": options.seed, "hash_block_tokens": options.hash_block_tokens}
    wanted = {name: value for name, value in given.items() if value is not None}
    return read_trace(options.input, format=options.format, bad_lines=bad, **wanted)


def _read_openai(options: argparse.Namespace, bad: list[str] | None) -> Trace:
    for name in ("seed", "hash_block_tokens"):
        if getattr(options, name) is not None:
            raise InvalidArgument(f"--{name.replace('_', '-')} does not go with --from {OPENAI}")
    return read_openai_log(
        options.input,
        salt=secrets.token_bytes(32) if options.salt_file is None else _salt(Path(options.salt_file)),
        block_size=16 if options.block_size is None else options.block_size,
        chars_per_token=options.chars_per_token,
        tokenizer=None if options.tokenizer is None else load_tokenizer(options.tokenizer),
        session_field=options.session_field,
        time_field=options.time_field,
        bad_lines=bad,
    )


def _salt(file: Path) -> bytes:
    """Return the salt in a file; a new one, readable by its owner only, if there is no file."""
    try:
        with os.fdopen(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as new:
            new.write(secrets.token_hex(32) + "\n")
    except FileExistsError:
        pass
    try:
        return bytes.fromhex(file.read_text())
    except ValueError:
        raise InvalidArgument(f"{file}: 32 to 128 hexadecimal digits expected") from None


def _generate(options: argparse.Namespace) -> int:
    trace = generate(
        options.workload,
        duration_s=options.duration,
        seed=options.seed,
        rate_scale=options.rate_scale,
    )
    write_trace(trace, options.output)
    print(format_calibration(trace) if options.workload in WORKLOADS else _figures(trace))
    return 0


def _print_bad(lines: Sequence[str], limit: int) -> None:
    for line in lines[:limit]:
        print(line, file=sys.stderr)
    if len(lines) > limit:
        print(f"... and {len(lines) - limit} more", file=sys.stderr)


def _figures(trace: Trace) -> str:
    """Return a trace's figures, a line each."""
    stats = trace.stats()

    def spread(side: str) -> str:
        figures = (getattr(stats, f"{side}_{q}") for q in ("mean", "p50", "p99"))
        return "mean {:,.0f}, p50 {:,.0f}, p99 {:,.0f}".format(*figures)

    rows = [
        ("trace", f"{trace.name}{' (synthetic)' if trace.synthetic else ''}"),
        ("requests", f"{stats.requests:,} in {stats.duration_s:,.0f} s, {stats.rate_per_s:.2f}/s"),
        ("prompt tokens", spread("input")),
        ("output tokens", spread("output")),
        ("blocks", f"{stats.unique_blocks:,} different ones of {trace.block_size} tokens"),
        ("ideal hit ratio", f"{stats.hit_ratio:.3f} of prompt tokens, in a cache that never evicts"),
    ]
    sessions, follow_ups = len(set(trace.session.tolist()) - {-1}), int((trace.previous >= 0).sum())
    if sessions:
        rows.append(("sessions", f"{sessions:,}, {stats.single_session_ratio:.1%} with one request"))
        if stats.hit_ratio:
            rows.append(("", f"{stats.same_session_share:.1%} of the hits from the own session"))
    if follow_ups:
        gaps = f"p50 {stats.gap_p50_s:.1f} s, p90 {stats.gap_p90_s:.1f} s after the request before"
        rows.append(("follow-ups", f"{follow_ups:,}, {gaps}"))
    return "\n".join(
        f"{name:<17}{value}" for name, value in [*rows, *(("note", note) for note in trace.notes)]
    )
