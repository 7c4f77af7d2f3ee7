"""How far step tables and calibrated engine models are from what was measured; prints Markdown tables.

``python benchmarks/validation/run.py --data DIR``: DIR holds ``step_tables/*.csv`` and
``vllm_request_timestamps/GPU_MODEL.jsonl``. Deterministic.
"""

import argparse
import csv
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from mulsched.replay.capacity import GPUS, MODELS, Gpu, ModelShape, kv_blocks
from mulsched.replay.fit import Fit, Simulation, fit_profile, simulate
from mulsched.replay.profile import Profile, roofline
from mulsched.replay.request_times import RequestTimes, read_request_times, time_per_token
from mulsched.replay.step_table import StepTable, read_step_table
from mulsched.replay.step_time import FittedStep

GPU_OF = {"RTX4090": "RTX-4090-24GB", "RTXPRO6000": "RTX-PRO-6000-96GB"}
MODEL_OF = {"Qwen3-30B-A3B-Instruct-2507": "Qwen3-30B-A3B"}
# of the GPU's memory, the highest first: candidates for the capacity
UTILISATIONS = np.arange(0.95, 0.8599, -0.0025).tolist()
ONLY_STEP = dict.fromkeys(
    ("decode_s", "context_s", "prefill_s", "new_token_s", "attention_s", "mixed_decode_s"), 0.0
)
FIGURES = ("TTFT p50", "TTFT p95", "TPOT p50", "TPOT p95", "makespan")


def rows_of(file: Path) -> list[dict[str, float | str]]:
    with file.open(newline="") as lines:
        return [{k: v if k == "kind" else float(v) for k, v in row.items()} for row in csv.DictReader(lines)]


def former_errors(file: Path, table: StepTable) -> list[float]:
    """Errors on mixed rows of the former rule: prefill at the row's prefix plus decode less the shortest."""
    rows = rows_of(file)
    shared = min(row["latency_ms"] for row in rows if row["kind"] == "decode")
    errors = []
    for row in rows:
        if row["kind"] == "mixed":
            prefill = table(int(row["new_tokens"]), row["prefix_tokens"], 0, 0.0)
            decode = table(0, 0.0, int(row["decode_batch"]), row["decode_ctx"])
            errors.append(abs((1000 * (prefill + decode) - shared) / row["latency_ms"] - 1))
    return errors


def falling_cells(file: Path) -> tuple[int, int, float]:
    """Return prefill and decode cells that cost less than one with less work beside them, and the most."""
    counts, most = [], 0.0
    for kind, x, y in (
        ("prefill", "new_tokens", "prefix_tokens"),
        ("decode", "decode_batch", "decode_ctx"),
    ):
        cells = {(row[x], row[y]): row["latency_ms"] for row in rows_of(file) if row["kind"] == kind}
        xs, ys = (sorted({cell[axis] for cell in cells}) for axis in (0, 1))
        pairs = [((a, y), (b, y)) for a, b in pairwise(xs) for y in ys]
        pairs += [((x, a), (x, b)) for a, b in pairwise(ys) for x in xs]
        falls = [1 - cells[b] / cells[a] for a, b in pairs if a in cells and b in cells]
        falls = [fall for fall in falls if fall > 0]
        counts.append(len(falls))
        most = max([most, *falls])
    return counts[0], counts[1], most


def roofline_error(file: Path) -> float | None:
    """Median error of the data-sheet formula on prefill and decode rows, for single GPUs it knows."""
    model, gpu, _, parallel, _ = file.stem.removeprefix("Meta-").split("_")
    if (gpu, parallel) != ("h100", "tp1"):
        return None
    step = roofline(MODELS[model], GPUS["H100-80GB"])
    errors = [
        abs(
            1000
            * step(int(row["new_tokens"]), row["prefix_tokens"], int(row["decode_batch"]), row["decode_ctx"])
            / row["latency_ms"]
            - 1
        )
        for row in rows_of(file)
        if row["kind"] != "mixed"
    ]
    return float(np.median(errors))


def print_step_tables(directory: Path) -> None:
    print("| table | former rule: median, p90, max | now, left out: median, p90, max | ", end="")
    print("falling cells: prefill, decode, most | data-sheet roofline: median |")
    print("| --- | --- | --- | --- | --- |")
    for file in sorted(directory.glob("*.csv")):
        table = read_step_table(file)
        spreads = [
            ", ".join(f"{np.quantile(errors, q):.1%}" for q in (0.5, 0.9, 1.0))
            for errors in (former_errors(file, table), table.mixed_errors)
        ]
        prefill, decode, most = falling_cells(file)
        formula = roofline_error(file)
        print(
            f"| {file.stem} | {spreads[0]} | {spreads[1]} | {prefill}, {decode}, {most:.1%} | "
            f"{'' if formula is None else format(formula, '.0%')} |"
        )


def figures(requests: RequestTimes, first_token_s, finish_s, scored) -> list[float]:
    ttft = (first_token_s - requests.arrival_s)[scored]
    tpot = time_per_token(first_token_s, finish_s, requests.output_tokens)[scored]
    makespan = finish_s[scored].max() - requests.arrival_s[scored].min()
    return [*np.percentile(ttft, (50, 95)), *np.nanpercentile(tpot, (50, 95)), makespan]


def models_of(
    requests: RequestTimes, shape: ModelShape, gpu: Gpu, first: np.ndarray
) -> Iterator[tuple[str, Fit]]:
    """Yield engines to compare, by name: calibrated ones and two that are not."""
    candidates = list(
        dict.fromkeys(kv_blocks(shape, gpu.memory_bytes, utilisation_ratio=u) for u in UTILISATIONS)
    )
    known = {"context_s": shape.kv_bytes() / gpu.bytes_per_s}
    fit = fit_profile(requests, kv_blocks=candidates, scored=first, known=known)
    yield "fitted", fit
    blocks = fit.profile.kv_blocks
    yield "fitted, context_s too", fit_profile(requests, kv_blocks=blocks, scored=first)
    in_turn = fit_profile(requests, kv_blocks=blocks, scored=first, known=known, schedule_ahead=False)
    yield "fitted, scheduling not ahead", in_turn
    yield "data-sheet roofline", replace(fit, profile=replace(fit.profile, step_time=roofline(shape, gpu)))
    yield "constant step, fitted", fit_profile(requests, kv_blocks=blocks, scored=first, known=ONLY_STEP)


def describe(profile: Profile) -> str:
    step = profile.step_time
    assert isinstance(step, FittedStep)
    coefficients = ", ".join(f"{name} {getattr(step, name):.3g}" for name in step.__slots__)
    return (
        f"{profile.kv_blocks} blocks, {profile.max_batched_tokens} tokens, {profile.max_num_seqs} requests; "
        f"{coefficients}"
    )


def print_recordings(directory: Path, share: float) -> None:
    notes = []
    print(f"| recording | model | {' | '.join(FIGURES)} |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for file in sorted(directory.glob("*.jsonl")):
        gpu, model = file.stem.split("_", 1)
        requests = read_request_times(file)
        first = np.arange(len(requests.arrival_s)) < share * len(requests.arrival_s)
        measured = figures(requests, requests.first_token_s, requests.finish_s, ~first)
        print(f"| {file.stem} | measured, s | {' | '.join(f'{value:.4g}' for value in measured)} |")
        for name, fit in models_of(requests, MODELS[MODEL_OF.get(model, model)], GPUS[GPU_OF[gpu]], first):
            run: Simulation = simulate(requests, fit.profile)
            predicted = figures(requests, run.first_token_s, run.finish_s, ~first)
            errors = [p / m - 1 for p, m in zip(predicted, measured, strict=True)]
            print(f"| | {name} | {' | '.join(f'{error:+.1%}' for error in errors)} |", flush=True)
            if name == "fitted":
                notes.append(f"{file.stem}: {describe(fit.profile)}, {run.preemptions} preemptions")
    print("\n" + "\n".join(f"- {note}" for note in notes))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.5, help="of each recording, to fit on")
    options = parser.parse_args(arguments)
    print_step_tables(options.data / "step_tables")
    print()
    print_recordings(options.data / "vllm_request_timestamps", options.share)


if __name__ == "__main__":
    main()
