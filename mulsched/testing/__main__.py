"""``python -m mulsched.testing WHAT``: check a policy by name or spec, or ``MODULE:NAME``, a score."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from mulsched.errors import MulschedError
from mulsched.testing._check import check_score

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; return 0 if all that applies holds, 1 if something is broken, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m mulsched.testing", description="Check a score.")
    parser.add_argument(
        "what", help="a policy (lmetric, linear:weight=0.5), or module:name of a score or a Policy"
    )
    parser.add_argument("--examples", type=int, default=100, help="per invariant (default 100)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    module, colon, name = options.what.partition(":")
    try:
        score = options.what
        if colon and "=" not in name:
            score = getattr(importlib.import_module(module), name)
        report = check_score(score, examples=options.examples, seed=options.seed)
    except (MulschedError, ImportError, AttributeError) as error:
        print(f"mulsched.testing: {error}", file=sys.stderr)
        return 2
    print(report)
    return 1 if report.broken else 0


if __name__ == "__main__":
    sys.exit(main())
