"""What a router's knowledge of tiers is worth: ``cd benchmarks && python -m tiers.run [--cases NAME ...]``.

Each row is a replay of a trace on engines with copies in the host's memory, under what the router knows of
these. Rows that are in the file of a case and a seed are not run again. ``--quick`` replays seconds of one
case, and writes nothing.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from mulsched import policies
from mulsched.policies import Ties
from mulsched.replay import Trace, builtin_profile, synthetic_trace
from mulsched.replay.records import Records, ReplayOptions
from tiers.cases import BASE, CASES, INSTANCES, KV_TOKENS, PROFILE, SEEDS, VIEWS, Case, plan
from tiers.replay import Tier, TieredReplay

RESULTS = Path(__file__).parent / "results"
KEY = ("host_ratio", "cost_ratio", "overlaps", "view", "seed")


def options_for(
    policy: str, *, ties: Ties | None = None, seed: int = 0, case: Case = CASES["tool_agent"]
) -> ReplayOptions:
    """Return the options of a case's replays."""
    chosen = policies.get(policy)
    return ReplayOptions(
        profile=dataclasses.replace(builtin_profile(PROFILE), block_size=case.block_size),
        kv_blocks=KV_TOKENS // case.block_size,
        policies=(chosen,),
        ties=(ties or chosen.ties,),
        prefill_instances=0,
        decode_instances=INSTANCES,
        closed=case.closed,
        predicted=False,
        in_flight="cached",
        seed=seed,
        state_delay_s=0.0,
        event_loss_ratio=0.0,
        transfer_s_per_token=0.0,
    )


def run(
    trace: Trace, tier: Tier, view: str, seed: int, *, case: Case = CASES["tool_agent"]
) -> dict[str, Any]:
    """Return the row of one replay; times in seconds."""
    policy, ties = "vllm" if view == "vllm" else "lmetric", "random" if view == "noise" else None
    options = options_for(policy, ties=ties, seed=seed, case=case)
    told = min(1.0, float(view[2:]) * tier.cost_ratio) if view.startswith("x ") else None
    engines = dataclasses.replace(tier, host_ratio=0.0) if view == "no tier" else tier
    records = Records.empty(len(trace))
    replay = TieredReplay(trace, options, records, engines, told)
    replay.run(None)
    loaded = sum(sum(engine.tiered.loaded_tokens.values()) for engine in replay.pools[0].engines)
    prompts = int(trace.prompt_tokens.sum())
    row = {**dataclasses.asdict(tier), "view": view, "seed": seed, "requests": len(trace)}
    several = trace.output_tokens > 1
    ttft = records.first_token_s - records.arrival_s
    tpot = (records.finish_s - records.first_token_s)[several] / (trace.output_tokens[several] - 1)
    for name, values in (("ttft", ttft), ("tpot", tpot)):
        row[f"{name}_mean_s"] = values.mean()
        row |= {f"{name}_p{q}_s": np.percentile(values, q) for q in (50, 95, 99)}
    row |= {"gpu_hit_ratio": records.cached_tokens.sum() / prompts, "cpu_hit_ratio": loaded / prompts}
    return {
        name: float(f"{value:.6g}") if name.endswith(("_s", "_ratio")) else value
        for name, value in row.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES, metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, metavar="N")
    parser.add_argument("--data", type=Path, default=Path("traces"), help="folder of the real traces")
    parser.add_argument("--quick", action="store_true", help="a few seconds of tool_agent, nothing written")
    options = parser.parse_args()
    if options.quick:
        trace = synthetic_trace("tool_agent", duration_s=20.0, rate_per_s=2.0)
        for view in VIEWS:
            print(json.dumps(run(trace, BASE, view, 0)))
        return
    options.out.mkdir(exist_ok=True)
    for name in options.cases:
        case = CASES[name]
        for seed in options.seeds:
            path = options.out / f"{name}-{seed}.json"
            rows = json.loads(path.read_text()) if path.exists() else []
            there = {tuple(row[field] for field in KEY) for row in rows}
            trace = case.trace(seed, options.data)
            for tier, view in plan(case):
                if (*dataclasses.astuple(tier), view, seed) in there:
                    continue
                rows.append(run(trace, tier, view, seed, case=case))
                path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def load() -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every case that has some."""
    found = {case: sorted(RESULTS.glob(f"{case}-?.json")) for case in CASES}
    return {
        case: [row for path in paths for row in json.loads(path.read_text())]
        for case, paths in found.items()
        if paths
    }


if __name__ == "__main__":
    main()
