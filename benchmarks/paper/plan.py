"""Cells of the comparison, a result file each, and the runs that a cell makes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from setups import SMALL_KV_BLOCKS, Setup

from mulsched import Policy, policies
from mulsched.indicators import Columns
from mulsched.router import InFlight
from mulsched.scorers import Multiplicative

SYNTHETIC = ("chat", "api", "coder", "tool_agent", "thinking")
REPEATS = 4  # of lmetric: its own ties, then random ties and other seeds

PAPER_POLICIES = ("vllm", "bailian", "dynamo", "aibrix", "llm_d", "preble")
PREDICTING_POLICIES = ("polyserve", "least_ttft")  # of the paper too; they know the engine's step times
WANTED_POLICIES = (
    "linear",
    "sticky",
    "consistent_hash_bounded",
    "sglang_cache_aware",
    "least_p_tokens",
    "power_of_two",
    "round_robin",
    "most_hits",
    "random",
    "least_loaded",
)
LOSING_POLICIES = ("vllm", "dynamo", "aibrix", "llm_d", "sticky", "least_p_tokens", "most_hits")

Spec = tuple[str, Mapping[str, Any]]


def _bailian(hit: float) -> dict[str, float]:
    rest = round((1 - hit) / 2, 4)
    return {"hit_weight": hit, "batch_weight": rest, "token_weight": rest}


GRIDS: dict[str, tuple[Mapping[str, Any], ...]] = {
    "linear": tuple({"weight": w} for w in (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9)),
    "dynamo": tuple(
        {"overlap_weight": w} for w in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 256.0, 1024.0)
    ),
    "bailian": tuple(_bailian(w) for w in (0.2, 0.4, 0.7, 0.9, 0.98)),
}

STATE_DELAYS_S = (0.0, 0.05, 0.1, 0.2, 0.5)
EVENT_LOSSES = (0.0, 0.01, 0.05, 0.1)
SWEEP_LOADS = (0.25, 0.75, 1.0)  # the main table has .5


def _product(name: str, first: str, second: Callable[[Columns], np.ndarray]) -> Callable[[], Policy]:
    return lambda: Policy(name=name, score=lambda columns: columns[first] * second(columns))


def no_queue() -> Policy:
    """(1 - hit ratio) * BS: that times the prompt's length, which is the same for all, is new tokens * BS."""
    return Policy(name="no_queue", score=Multiplicative("new_prefill_tokens", "batch_size"))


ABLATIONS: dict[str, Callable[..., Policy]] = {
    "no_queue": no_queue,
    "p_x_context": _product(
        "p_x_context", "p_tokens", lambda columns: columns.context_tokens + columns.request.prompt_tokens
    ),
    "no_plus_one": _product("no_plus_one", "p_tokens", lambda columns: columns.batch_size - 1),
}
ABLATION_POLICIES = ("no_queue", "p_x_context", "no_plus_one", "least_p_tokens", "least_loaded")


def register_ablations() -> None:
    """Make the ablations known by name, in this process."""
    for name, factory in ABLATIONS.items():
        policies.register(name, factory, replace=True)


@dataclass(frozen=True, slots=True)
class Run:
    """A replay: ``role`` is result, repeat (of lmetric) or trial (of tuning)."""

    policy: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    role: str = "result"
    seed: int = 0
    ties: str | None = None
    state_delay_s: float = 0.0
    event_loss_ratio: float = 0.0
    in_flight: InFlight = "cached"

    @property
    def label(self) -> str:
        """The policy with its parameters, as in ``linear(weight=0.5)``, unless they are the engine's."""
        if self.policy in PREDICTING_POLICIES:
            return self.policy
        if self.in_flight != "cached":
            return f"{self.policy}, prefixes in flight not cached"
        given = ", ".join(f"{name}={value:g}" for name, value in self.parameters.items())
        return f"{self.policy}({given})" if given else self.policy


@dataclass(frozen=True, slots=True)
class Cell:
    """Runs of one setup at one load, a share of its maximum rate."""

    stage: str
    setup: Setup
    load: float = 0.5

    @property
    def name(self) -> str:
        """Name of the cell and of its file."""
        return self.stage + "-" + self.setup.name + ("" if self.stage == "max" else f"-{self.load:g}")


def needs(cell: Cell) -> list[Cell]:
    """Return the cells that come before: the maximum rate, and the main table for the tuned weight."""
    if cell.stage == "max":
        return []
    rate = Cell("max", cell.setup)
    return [rate, Cell("main", cell.setup)] if cell.stage in ("sweep", "stale") else [rate]


def repeats(n: int = REPEATS) -> list[Run]:
    """Return lmetric's runs: the first with its own ties, the others with random ties and other seeds."""
    return [Run("lmetric")] + [
        Run("lmetric", role="repeat", seed=seed, ties="random") for seed in range(1, n)
    ]


def step_times(setup: Setup) -> dict[str, float]:
    """Return what PREDICTING_POLICIES need to know of an engine's steps."""
    engine = setup.engine()
    chunk, step = engine.max_batched_tokens, engine.step_time
    one, many, long = step(0, 0.0, 1, 0.0), step(0, 0.0, 256, 0.0), step(0, 0.0, 256, 1000.0)
    return {
        "prefill_tokens_per_s": chunk / step(chunk, 0.0, 0, 0.0),
        "chunk_tokens": chunk,
        "step_overhead_s": one,
        "decode_request_s": (many - one) / 255,
        "decode_context_token_s": (long - many) / 256_000,
    }


def _trials(*names: str) -> list[Run]:
    return [Run(name, given, role="trial") for name in names for given in GRIDS[name]]


def runs(cell: Cell, tuned: Mapping[str, Any] | None) -> list[Run]:
    """Return the runs of a cell; ``tuned`` are the parameters of the tuned linear score, if known."""
    if cell.stage == "main":
        defaults = [Run(name) for name in (*PAPER_POLICIES, *WANTED_POLICIES)]
        predicting = [Run(name, step_times(cell.setup)) for name in PREDICTING_POLICIES]
        return repeats() + defaults + predicting + _trials("linear", "dynamo", "bailian")
    if cell.stage == "losing":
        some = {"linear": (0.3, 0.6, 0.9), "dynamo": (4.0, 16.0)}
        trials = [run for run in _trials(*some) if next(iter(run.parameters.values())) in some[run.policy]]
        return repeats() + [Run(name) for name in LOSING_POLICIES] + trials
    if cell.stage == "sweep":
        best = Run("linear", tuned or {}, role="trial")
        return [*repeats(3), *(Run(name) for name in ("vllm", "dynamo", "sticky", "least_p_tokens")), best]
    if cell.stage == "ablation":
        paper = Run("lmetric", in_flight="ignore")
        return [*repeats(3), paper, *(Run(name) for name in ABLATION_POLICIES)]
    assert cell.stage == "stale"
    return [
        Run(name, given, state_delay_s=delay, event_loss_ratio=loss)
        for name, given, losses in (
            ("lmetric", {}, EVENT_LOSSES),
            ("linear", tuned or {}, (EVENT_LOSSES[0], EVENT_LOSSES[-1])),
            ("vllm", {}, EVENT_LOSSES[:1]),  # it reads no events
        )
        for delay in STATE_DELAYS_S
        for loss in losses
    ]


def cells() -> list[Cell]:
    """Return all cells but the maximum rates, what matters most first; a sweep comes after its main table."""
    tables = [Setup(trace, "qwen2") for trace in (*SYNTHETIC, "mooncake")]
    moe = [Setup(trace, "qwen3") for trace in (*SYNTHETIC, "mooncake")]
    swept = [Setup(trace, "qwen2") for trace in ("chat", "api", "coder", "mooncake")]
    moe_swept = [moe[0], moe[1], moe[2], moe[5], moe[3]]
    small = [Setup(trace, "qwen2", kv_blocks=SMALL_KV_BLOCKS) for trace in ("thinking", "chat", "coder")]
    agents = Setup("agentic", "qwen2", instances=8)
    order = [
        *(Cell("main", setup) for setup in tables[:4]),
        Cell("losing", small[0], 0.5),
        *(Cell("ablation", setup, 0.5) for setup in swept[:3]),
        *(Cell("sweep", swept[0], load) for load in SWEEP_LOADS),
        Cell("losing", agents, 0.5),
        Cell("stale", swept[0], 0.5),
        Cell("main", moe[0]),
        Cell("losing", small[0], 0.7),
        Cell("main", tables[5]),
        Cell("losing", small[1], 0.5),
        *(Cell("sweep", swept[2], load) for load in SWEEP_LOADS),
        Cell("main", moe[1]),
        Cell("main", moe[3]),
        Cell("stale", swept[2], 0.5),
        Cell("ablation", swept[3], 0.5),
        Cell("main", moe[2]),
    ]
    rest = [
        *(Cell("sweep", setup, load) for setup in (*swept, tables[3]) for load in SWEEP_LOADS),
        *(Cell("losing", setup, load) for setup in small[1:] for load in (0.5, 0.7)),
        *(Cell("ablation", setup, 0.85) for setup in swept),
        Cell("main", tables[4]),
        Cell("losing", agents, 0.8),
        Cell("main", moe[5]),
        Cell("main", moe[4]),
        Cell("main", Setup("agentic", "qwen2")),
        *(Cell("sweep", setup, load) for setup in moe_swept for load in SWEEP_LOADS),
        *(Cell("ablation", setup, 0.5) for setup in moe_swept[:4]),
    ]
    return list(dict.fromkeys(order + rest))
