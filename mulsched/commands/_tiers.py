"""The option that says what loading from storage tiers costs."""

import argparse

from mulsched.errors import InvalidArgument
from mulsched.lower_tiers import check_cost_ratios

__all__ = ["add_tier_option", "tier_cost_ratio"]


def add_tier_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--tier-cost-ratio``."""
    parser.add_argument(
        "--tier-cost-ratio",
        dest="tiers",
        action="append",
        default=[],
        metavar="MEDIUM=RATIO",
        help="count copies that KV events report on a medium below the GPU, such as CPU=0.015: the time to "
        "load a token from there over the time to compute it; once for each medium",
    )


def tier_cost_ratio(options: argparse.Namespace, *, events: bool) -> dict[str, float] | None:
    """Return the ratios by medium, None if there are none; ``events``: there may be KV events.

    Raises InvalidArgument.
    """
    ratios: dict[str, float] = {}
    for given in options.tiers:
        medium, _, text = given.partition("=")
        try:
            ratio = float(text)
        except ValueError:
            raise InvalidArgument(f"--tier-cost-ratio must be MEDIUM=RATIO, got {given!r}") from None
        if medium in ratios:
            raise InvalidArgument(f"--tier-cost-ratio goes once with each medium, got {medium} twice")
        ratios[medium] = ratio
    checked = check_cost_ratios(ratios) or None
    if checked and not events:
        raise InvalidArgument("--tier-cost-ratio goes with --kv-events, which tell what tiers hold")
    return checked
