"""What is replayed: traces, tiers, and what the router knows of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from paper.setups import AGENTIC_SPREAD_S, FILES, first_turns

from mulsched.replay import Trace, burst_trace, read_trace, synthetic_trace
from tiers.replay import Tier

PROFILE = "qwen2-7b-h20"
INSTANCES = 4
KV_TOKENS = 256_000
"""On a GPU: a fifth of what the profile has, so that a few minutes of traffic outgrow it."""
SEEDS = (0, 1, 2)

BASE = Tier(4.0, 0.1)
SIZES = (1.0, 16.0)
"""Other sizes of the host's memory, over the GPU's."""

VIEWS = ("no tier", "ignored", "noise", "x 1", "x 0", "vllm")
FACTORS = ("ignored", "x 0", "x 0.5", "x 1", "x 2")


@dataclass(frozen=True, slots=True)
class Case:
    """A workload at a rate that loads the engines, without a tier, to some 0.6 to 0.8 of what they can do.

    ``scan``: also with other tiers. ``closed``: follow-ups wait for the answer. ``block_size``: of the
    engines, no larger than the trace's; larger blocks replay faster.
    """

    name: str
    scan: bool = False
    closed: bool = False
    block_size: int = 16

    def trace(self, seed: int, data: Path) -> Trace:
        """Return the trace, without requests that no GPU can hold."""
        made = self._trace(seed, data)
        return made.take(made.prompt_tokens + made.output_tokens <= KV_TOKENS)

    def _trace(self, seed: int, data: Path) -> Trace:
        if self.name == "tool_agent":
            return synthetic_trace("tool_agent", duration_s=480.0, seed=seed, rate_per_s=2.2)
        if self.name == "chat":
            return synthetic_trace("chat", duration_s=240.0, seed=seed, rate_per_s=8.0)
        if self.name == "coder":
            return synthetic_trace("coder", duration_s=180.0, seed=seed, rate_per_s=6.0)
        if self.name == "api":
            return synthetic_trace("api", duration_s=60.0, seed=seed, rate_per_s=30.0)
        if self.name == "hot_class":
            return burst_trace("hot_class", seed=seed, rate_per_s=4.0)
        path = data / FILES[self.name]
        if self.name == "mooncake":
            return read_trace(path, seed=seed).slice(0.0, 240.0).scale_rate(0.3)
        whole = read_trace(path, seed=seed, max_prompt_tokens=100_000, spread_s=AGENTIC_SPREAD_S)
        return first_turns(whole, sessions=32, turns=10).scale_rate(2.0)


CASES = {
    case.name: case
    for case in (
        Case("agentic", scan=True, closed=True, block_size=64),
        Case("mooncake", scan=True, block_size=128),
        Case("tool_agent"),
        Case("chat"),
        Case("coder"),
        Case("api"),
        Case("hot_class"),
    )
}


def plan(case: Case) -> Iterator[tuple[Tier, str]]:
    """Yield the tiers and views of a case, what matters most first."""
    for view in VIEWS:
        yield BASE, view
    if not case.scan:
        return
    for tier in (
        Tier(BASE.host_ratio, 0.5),
        BASE,
        Tier(BASE.host_ratio, 0.5, overlaps=False),
        Tier(BASE.host_ratio, 0.1, overlaps=False),
        Tier(BASE.host_ratio, 0.015),
    ):
        for view in FACTORS:
            # told once already, or a ratio of 1, which ignores
            if not (tier == BASE and view in VIEWS) and not (tier.cost_ratio == 0.5 and view == "x 2"):
                yield tier, view
    for size in SIZES:
        for view in ("ignored", "x 1"):
            yield Tier(size, BASE.cost_ratio), view
