"""One trace through either simulator, with the same outcome to compare."""

import importlib
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mulsched.replay import Profile, StepTime, Trace, replay

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FIXED_PREFILL_S, FIXED_DECODE_S = 0.020011, 0.0070013
"""Arbitrary, and odd enough that steps of one engine do not end when requests arrive."""


@dataclass(frozen=True)
class Setup:
    """Engines, the same in both. The limits are the defaults of Dynamo's mocker, except 16-token blocks.

    ``fixed_timing``: every prefill takes as long as any other, and every decode step; else Dynamo's formula.
    """

    instances: int = 4
    kv_blocks: int = 16_384
    block_size: int = 16
    max_batched_tokens: int = 8_192
    max_num_seqs: int = 256
    fixed_timing: bool = False


@dataclass(frozen=True)
class DynamoMockerStep:
    """The step time of Dynamo's mocker, ``timing_model`` polynomial.

    Milliseconds: ``4.209989e-7 n^2 + 1.518344e-2 n + 16.50142`` for n new prompt tokens, if there are any,
    plus ``max(1, -25.74 u^2 + 54.01 u + 5.74)`` if anything decodes, u being the contexts of the decoding
    requests, the token at hand included, over the tokens that the KV cache holds, at most 1.
    Source: ai-dynamo/dynamo, aisimulate/crates/engine/src/common/perf_model.rs; read off single requests of
    1.6.1 too. Dynamo rounds the mean prompt and the mean prefix of a batch down to whole tokens first: up to
    a token of difference per request, 15 us.
    """

    kv_tokens: int

    def __call__(
        self, new_tokens: int, prefix_tokens: float, decode_batch: int, decode_context: float
    ) -> float:
        ms = 0.0
        if new_tokens:
            ms += 4.209989e-07 * new_tokens**2 + 1.518344e-02 * new_tokens + 16.50142
        if decode_batch:
            used = min(1.0, decode_batch * (decode_context + 1) / self.kv_tokens)
            ms += max(1.0, -25.74 * used**2 + 54.01 * used + 5.74)
        return ms / 1000


@dataclass(frozen=True)
class FixedStep:
    """``timing_model`` fixed: leaves nothing to differ but scheduling, cache and routing."""

    def __call__(
        self, new_tokens: int, prefix_tokens: float, decode_batch: int, decode_context: float
    ) -> float:
        return FIXED_PREFILL_S * (new_tokens > 0) + FIXED_DECODE_S * (decode_batch > 0)


@dataclass(frozen=True)
class Outcome:
    """Per request, in the order of the trace; times in seconds from the first arrival.

    ``cached_tokens``: found in the engine's cache at the first admission. ``call_s``: wall time of the call;
    ``cpu_s``: processor time of all threads meanwhile; ``own_clock_s``: wall time without reading the trace,
    as the simulator tells it.
    """

    arrival_s: Floats
    first_token_s: Floats
    finish_s: Floats
    instance: Ints
    cached_tokens: Ints
    prompt_tokens: Ints
    output_tokens: Ints
    preemptions: int
    call_s: float
    cpu_s: float
    own_clock_s: float

    @property
    def ttft_s(self) -> Floats:
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> Floats:
        several = self.output_tokens > 1
        return (self.finish_s - self.first_token_s)[several] / (self.output_tokens[several] - 1)

    @property
    def reused(self) -> float:
        return float(self.cached_tokens.sum() / self.prompt_tokens.sum())

    def figures(self, instances: int) -> dict[str, float]:
        """Times in ms; spreads are the busiest instance over the mean one."""
        figures = {"reused": self.reused}
        for name, values in (("TTFT", self.ttft_s), ("TPOT", self.tpot_s)):
            figures[f"{name} mean"] = 1e3 * float(values.mean())
            figures |= {f"{name} p{q}": 1e3 * float(np.percentile(values, q)) for q in (50, 95, 99)}
        span = float(self.finish_s.max())
        new = np.bincount(self.instance, self.prompt_tokens - self.cached_tokens, instances)
        requests = np.bincount(self.instance, minlength=instances)
        return figures | {
            "makespan s": span,
            "tok/s": float(self.output_tokens.sum()) / span,
            "requests max/mean": float(requests.max() / requests.mean()),
            "prefill max/mean": float(new.max() / new.mean()),
        }


class Clock:
    """Wall and processor time since it was made."""

    def __init__(self) -> None:
        self.started = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        wall, cpu = self.started
        return time.perf_counter() - wall, time.process_time() - cpu


def step_time(setup: Setup) -> StepTime:
    return FixedStep() if setup.fixed_timing else DynamoMockerStep(setup.kv_blocks * setup.block_size)


def run_mulsched(
    trace: Trace,
    setup: Setup,
    policy: str = "round_robin",
    *,
    seed: int = 0,
    profile_step: StepTime | None = None,
) -> Outcome:
    profile = Profile(
        "dynamo-mocker",
        step_time(setup) if profile_step is None else profile_step,
        block_size=setup.block_size,
        max_batched_tokens=setup.max_batched_tokens,
        max_num_seqs=setup.max_num_seqs,
        kv_blocks=setup.kv_blocks,
    )
    clock = Clock()
    result = replay(trace, policy, profile=profile, instances=setup.instances, seed=seed, in_flight="ignore")
    call_s, cpu_s = clock.read()
    first = trace.arrival_s[0]
    return Outcome(
        arrival_s=result.arrival_s - first,
        first_token_s=result.first_token_s - first,
        finish_s=result.finish_s - first,
        instance=result.instance,
        cached_tokens=result.cached_tokens,
        prompt_tokens=result.prompt_tokens,
        output_tokens=result.output_tokens,
        preemptions=result.preemptions,
        call_s=call_s,
        cpu_s=cpu_s,
        own_clock_s=call_s,
    )


def dynamo_core() -> Any:
    # it logs every decision, which would be most of the time measured
    os.environ.setdefault("DYN_LOG", "error")
    return importlib.import_module("dynamo._core")


def run_dynamo(
    trace: Trace,
    setup: Setup,
    router_mode: str = "round_robin",
    *,
    router: dict[str, Any] | None = None,
    details: bool = True,
) -> Outcome:
    """Replay a trace in Dynamo's simulator; ``router``: arguments of its KvRouterConfig.

    Without ``details`` only the wall times are told. Raises ValueError if two requests arrive at once (the
    report has no order among them) or if a request was rejected.
    """
    if details and (np.diff(trace.arrival_s) <= 0).any():
        raise ValueError(f"{trace.name}: arrivals must differ")
    core = dynamo_core()
    engine: dict[str, Any] = {
        "num_gpu_blocks": setup.kv_blocks,
        "block_size": setup.block_size,
        "max_num_batched_tokens": setup.max_batched_tokens,
        "max_num_seqs": setup.max_num_seqs,
    }
    if setup.fixed_timing:
        engine["timing_model"] = {
            "type": "fixed",
            "prefill_ms": 1e3 * FIXED_PREFILL_S,
            "decode_ms": 1e3 * FIXED_DECODE_S,
        }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.jsonl")
        write_mooncake(trace, path)
        clock = Clock()
        result = core.run_mocker_trace_replay(
            [path],
            extra_engine_args={"engine": engine},
            router_config=core.KvRouterConfig(**router) if router else None,
            num_workers=setup.instances,
            router_mode=router_mode,
            trace_format="mooncake",
            trace_block_size=trace.block_size,
            capture_per_request=details,
            capture_planner_details=False,
        )
        call_s, cpu_s = clock.read()
    return _outcome(trace, result, call_s, cpu_s)


def _outcome(trace: Trace, result: Any, call_s: float, cpu_s: float) -> Outcome:
    rows = sorted(result.per_request or (), key=lambda row: row["arrival_time_ms"])
    rejected = [row for row in rows if row["terminal_status"] != "completed"]
    if rejected or result.summary["completed_requests"] != len(trace):
        raise ValueError(f"{trace.name}: Dynamo completed {result.summary['completed_requests']}")

    def seconds(name: str) -> Floats:
        return np.array([row[name] for row in rows], dtype=np.float64) / 1e3

    def integers(values: list[int]) -> Ints:
        return np.array(values, dtype=np.int64)

    # a request that was preempted has several admissions, and the later ones find what it computed itself
    first_admission = [row["admission_history"][0]["reused_input_tokens"] for row in rows]
    return Outcome(
        arrival_s=seconds("arrival_time_ms"),
        first_token_s=seconds("first_token_ms"),
        finish_s=seconds("last_token_ms"),
        instance=integers([row["decode_worker_idx"] for row in rows]),
        cached_tokens=integers(first_admission),
        prompt_tokens=integers([row["input_length"] for row in rows]),
        output_tokens=integers([row["output_length"] for row in rows]),
        preemptions=sum(row["readmission_count"] for row in rows),
        call_s=call_s,
        cpu_s=cpu_s,
        own_clock_s=result.summary["wall_time_ms"] / 1e3,
    )


def write_mooncake(trace: Trace, path: Path) -> None:
    """Write a trace as Mooncake JSON lines, blocks as long as the trace's.

    Mooncake wants an id for every block, the last partial one too: blocks that the trace gives no id get one
    of their own.
    """
    private = int(trace.run_start.max(initial=0)) + int(trace.run_length.max(initial=0)) + 1
    with path.open("w") as lines:
        for i in range(len(trace)):
            prompt = int(trace.prompt_tokens[i])
            n_blocks = -(-prompt // trace.block_size)
            ids = trace.block_ids(i)[:n_blocks].tolist()
            fresh = n_blocks - len(ids)
            ids += range(private, private + fresh)
            private += fresh
            row = {
                "timestamp": 1e3 * float(trace.arrival_s[i] - trace.arrival_s[0]),
                "input_length": prompt,
                "output_length": int(trace.output_tokens[i]),
                "hash_ids": ids,
            }
            lines.write(json.dumps(row) + "\n")
