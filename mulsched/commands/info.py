"""``mulsched info``: version, backend, policies."""

import argparse
from importlib.metadata import version
from typing import Any

from mulsched import policies
from mulsched._backend import BACKEND

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("info", help="print version, backend and policies with their parameters")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    digest = ""
    if BACKEND == "native":
        from mulsched._native import SOURCE_DIGEST

        digest = f" (sources {SOURCE_DIGEST})"
    print(f"mulsched {version('mulsched')}, backend {BACKEND}{digest}")
    print("policies, with the defaults of their parameters:")
    for name in policies.names():
        given = ",".join(f"{parameter}={value}" for parameter, value in policies.parameters(name).items())
        print(f"  {name}:{given}" if given else f"  {name}")
    return 0
