"""Service level objectives, and how many requests meet them."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mulsched.errors import InvalidArgument
from mulsched.replay.simulator import ReplayResult

__all__ = ["Slo", "goodput", "parse_slo"]


@dataclass(frozen=True, slots=True)
class Slo:
    """The longest TTFT and TPOT, in seconds, that a request may have; None asks for nothing.

    Raises InvalidArgument unless one is given and those given are finite and above 0.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None

    def __post_init__(self) -> None:
        given = [limit for limit in (self.ttft_s, self.tpot_s) if limit is not None]
        if not given or not all(math.isfinite(limit) and limit > 0 for limit in given):
            raise InvalidArgument(
                f"an SLO needs a TTFT or a TPOT, finite and above 0 s, got {self.ttft_s} and {self.tpot_s}"
            )

    def __str__(self) -> str:
        limits = {"TTFT": self.ttft_s, "TPOT": self.tpot_s}
        return " and ".join(f"{name} <= {limit:g} s" for name, limit in limits.items() if limit is not None)

    def met(self, result: ReplayResult) -> NDArray[np.bool_]:
        """Return which requests meet all that is asked for, shape (n,); one of a single token has no TPOT."""
        met = np.ones(len(result.arrival_s), dtype=np.bool_)
        if self.ttft_s is not None:
            met &= result.ttft_s <= self.ttft_s
        if self.tpot_s is not None:
            gaps = result.output_tokens - 1
            met &= result.finish_s - result.first_token_s <= self.tpot_s * gaps
        return met


def goodput(result: ReplayResult, slo: Slo) -> dict[str, float]:
    """Return ``goodput_per_s``, requests that meet the SLO over the replay's span, and their share of all."""
    met = slo.met(result)
    span = float(result.finish_s.max() - result.arrival_s.min())
    return {"goodput_per_s": float(met.sum()) / span, "slo_met_ratio": float(met.mean())}


def parse_slo(text: str) -> Slo:
    """Read ``ttft=0.5,tpot=0.05``, in seconds; either may be left out. Raises InvalidArgument."""
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        try:
            limit = float(value)
        except ValueError:
            limit = math.nan
        if name not in ("ttft", "tpot") or name in limits or math.isnan(limit):
            raise InvalidArgument(f"expected an SLO like ttft=0.5,tpot=0.05 (seconds), got {text!r}")
        limits[name] = limit
    return Slo(ttft_s=limits.get("ttft"), tpot_s=limits.get("tpot"))
