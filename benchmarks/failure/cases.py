"""What is replayed: traces, clusters, loads, policies; a result file for each cell."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paper.setups import (
    AGENTIC_SPREAD_S,
    DURATIONS_S,
    FILES,
    MAX_PROMPT_TOKENS,
    MOONCAKE_S,
    SMALL_KV_BLOCKS,
    first_turns,
)

from mulsched.policies import parse_spec
from mulsched.replay import (
    BURSTS,
    WORKLOADS,
    Trace,
    burst_trace,
    read_trace,
    steady_burst,
    synthetic_trace,
)

PROFILE = "qwen2-7b-h20"
INSTANCES = 16
SEEDS = (0, 1, 2)

REFERENCE = "lmetric"
LOAD_ONLY = ("least_loaded", "vllm")
DETECTORS = ("lmetric_guarded", "lmetric_paper_detector")
"""Policies that detect a herd, as they are given to ``mulsched replay``; the first is ours."""
OTHERS = ("least_p_tokens", "linear:weight=0.3", "linear:weight=0.7")
MITIGATIONS = ("lmetric_guarded:mitigation=exclude", "lmetric_guarded:mitigation=load_only")
CONSTANTS = (
    "lmetric_guarded:confidence=0.3",
    "lmetric_guarded:confidence=1",
    "lmetric_guarded:confidence=10",
    "lmetric_guarded:horizon=0.6",
    "lmetric_guarded:horizon=6",
)
"""Ours with other constants, a decade of each."""
VARIANTS = (*MITIGATIONS, *CONSTANTS)
POLICIES = (REFERENCE, *LOAD_ONLY, *DETECTORS, *OTHERS, *VARIANTS)

TWINS = (1, 2)
"""Seeds of LMetric's own repeats, with random ties: what these move is noise."""
TIE_RULES = ("least_recent", "random", "first")
DELAYS_S = (0.0, 0.05, 0.2, 0.5)


@dataclass(frozen=True, slots=True)
class Case:
    """A workload and its cluster. ``part``: calm, burst, thinking or ties."""

    name: str
    part: str
    workload: str
    loads: Sequence[float]
    kv_blocks: int | None = None
    alone: bool = False  # hot classes without their background

    @property
    def real(self) -> bool:
        """Whether it needs a trace that is not shipped."""
        return self.workload in FILES

    @property
    def loop(self) -> str:
        """Agents wait for an answer before they ask again."""
        return "closed" if self.workload == "agentic" else "open"

    @property
    def window(self) -> tuple[float, float] | None:
        """From when to when hot classes come, None where they do so all along or never."""
        if self.workload not in BURSTS:
            return None
        hot = BURSTS[self.workload].hot
        start, end = min(h.start_s for h in hot), max(h.end_s for h in hot)
        return (start, end) if end < BURSTS[self.workload].duration_s else None

    def trace(self, scale: float, *, seed: int, data: Path, steady: bool = False) -> Trace:
        """Return the trace at ``scale`` times its own rate; ``steady``: with hot classes all along."""
        trace = self._trace(scale, seed, data, steady)
        if self.alone:
            trace = trace.take(trace.session < 0, note="without the background")
        if self.kv_blocks is None:
            return trace
        fits = trace.prompt_tokens + trace.output_tokens <= self.kv_blocks * 16
        return (
            trace
            if fits.all()
            else trace.take(fits, note=f"{int((~fits).sum())} requests left out: too long")
        )

    def _trace(self, scale: float, seed: int, data: Path, steady: bool) -> Trace:
        if self.workload in BURSTS:
            burst = BURSTS[self.workload]
            rate = scale * WORKLOADS[burst.background].rate_per_s
            return burst_trace(steady_burst(burst) if steady else self.workload, seed=seed, rate_per_s=rate)
        if self.workload in DURATIONS_S:
            made = synthetic_trace(self.workload, duration_s=DURATIONS_S[self.workload], seed=seed)
            return made.scale_rate(scale)
        path = data / FILES[self.workload]
        if self.workload == "mooncake":
            return read_trace(path, seed=seed).slice(0, MOONCAKE_S).scale_rate(scale)
        whole = read_trace(path, seed=seed, max_prompt_tokens=MAX_PROMPT_TOKENS, spread_s=AGENTIC_SPREAD_S)
        return first_turns(whole).scale_rate(scale)


CASES = (
    Case("chat", "calm", "chat", (0.5, 0.8)),
    Case("api", "calm", "api", (0.5, 0.8)),
    Case("coder", "calm", "coder", (0.5, 0.8)),
    Case("mooncake", "calm", "mooncake", (0.5, 0.8)),
    Case("agentic", "calm", "agentic", (0.5,)),
    Case("one-class", "burst", "hot_class", (0.5, 0.8)),
    Case("several-classes", "burst", "hot_classes", (0.5, 0.8)),
    Case("long-output", "burst", "hot_long_output", (0.5, 0.8)),
    Case("long-output-small", "burst", "hot_long_output", (0.5, 0.8), kv_blocks=SMALL_KV_BLOCKS),
    Case("growing", "burst", "hot_growing", (0.5, 0.8)),
    Case("common-trunk", "burst", "hot_common_trunk", (0.5, 0.8)),
    Case("short-trunk", "burst", "hot_short_trunk", (0.5, 0.8)),
    Case("identical", "burst", "hot_identical", (0.5, 0.8)),
    Case("everywhere", "burst", "hot_everywhere", (0.5, 0.8)),
    Case("thinking", "thinking", "thinking", (0.5, 0.7), kv_blocks=SMALL_KV_BLOCKS),
    Case("thinking-class", "thinking", "hot_thinking", (0.5, 0.7), kv_blocks=SMALL_KV_BLOCKS),
    Case("thinking-pair", "thinking", "hot_thinking_pair", (0.5, 0.7), kv_blocks=SMALL_KV_BLOCKS),
    Case("identical-alone", "ties", "hot_identical", (0.5,), alone=True),
    Case("everywhere-late", "ties", "hot_everywhere", (0.5,)),
)


@dataclass(frozen=True, slots=True)
class Run:
    """A replay of a cell; ``ties`` None: the policy's own."""

    spec: str
    seed: int
    ties: str | None = None
    tie_seed: int = 0
    state_delay_s: float = 0.0

    @property
    def key(self) -> tuple[str, int, str | None, int, float]:
        """What tells it from the cell's other rows."""
        return self.spec, self.seed, self.ties, self.tie_seed, self.state_delay_s


def runs(case: Case, policies: Sequence[str] = POLICIES) -> list[Run]:
    """Return the runs of a cell of the case, for these policies; LMetric's bring its repeats along."""
    found = []
    for seed in SEEDS:
        for spec in dict.fromkeys(policies):
            parse_spec(spec)
            if case.part == "ties" and spec in VARIANTS:
                continue
            if case.part == "ties":
                rules = TIE_RULES if spec == REFERENCE else (None,)
                found += [Run(spec, seed, ties, state_delay_s=d) for ties in rules for d in DELAYS_S]
                continue
            found.append(Run(spec, seed))
            if spec == REFERENCE:
                found += [Run(spec, seed, "random", twin) for twin in TWINS]
    return found
