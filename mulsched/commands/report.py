"""``mulsched report``: a page of plots from kept results, without replaying."""

import argparse
from pathlib import Path
from typing import Any

from mulsched.replay.html_report import write_page, write_pngs

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "report",
        help="make a page of plots from the results of mulsched replay --out",
        description="Make one self-contained HTML page from the results in DIR, without replaying anything.",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="what mulsched replay --out was given")
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path, help="the page (default: report.html in DIR)"
    )
    parser.add_argument("--png", metavar="DIR", type=Path, help="also write the plots there, as PNG files")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    page = options.output or options.directory / "report.html"
    write_page(options.directory, page)
    print(page)
    if options.png is not None:
        for path in write_pngs(options.directory, options.png):
            print(path)
    return 0
