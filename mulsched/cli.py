"""The command line: ``mulsched COMMAND``."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from mulsched.commands import check, demo, endpoint_picker, info, mock_engine, replay, report, serve, trace
from mulsched.errors import MulschedError

__all__ = ["main"]

COMMANDS = (
    replay,
    check,
    report,
    trace,
    serve,
    demo,
    mock_engine,
    endpoint_picker,
    info,
)


class _Parser(argparse.ArgumentParser):
    """Takes options by their whole names: a shortened one would mean another when a longer one comes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status: 0, or 2 for bad input (with one line that says why)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _Parser(prog="mulsched", description="LLM request scheduling by one product.")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    options = parser.parse_args(given, argparse.Namespace(command_line=shlex.join(["mulsched", *given])))
    try:
        status: int = options.run(options)
    except (MulschedError, OSError) as error:
        print(f"mulsched: {error}", file=sys.stderr)
        return 2
    return status
