"""The validation script runs on data made here."""

import json
from dataclasses import replace

import numpy as np
from validation import run

from mulsched.replay.capacity import GPUS, MODELS
from mulsched.replay.fit import simulate
from mulsched.replay.profile import Profile, roofline
from mulsched.replay.request_times import RequestTimes


def write_table(file):
    step = roofline(MODELS["Qwen3-8B"], GPUS["H100-80GB"])
    kinds = {
        "prefill": [(n, p, 0, 0) for n in (1, 4096) for p in (0, 8192)],
        "decode": [(0, 0, b, c) for b in (1, 256) for c in (128, 8192)],
        "mixed": [(n, 0, b, c) for n in (256, 4096) for b in (8, 256) for c in (1024, 4096)],
    }
    lines = ["kind,new_tokens,prefix_tokens,decode_batch,decode_ctx,latency_ms"]
    lines += [
        f"{kind},{','.join(map(str, load))},{1000 * step(*load)}"
        for kind, loads in kinds.items()
        for load in loads
    ]
    file.write_text("\n".join(lines))


def write_recording(file):
    rng = np.random.default_rng(1)
    arrival = np.arange(24) * 0.5
    asked = RequestTimes(
        "made",
        *(arrival, arrival, arrival + 1, arrival + 2),
        prompt_tokens=rng.integers(50, 2000, 24),
        output_tokens=rng.integers(20, 80, 24),
    )
    step = roofline(MODELS["Llama-3.1-8B"], GPUS["RTX-4090-24GB"])
    run = simulate(asked, Profile("made", step, max_batched_tokens=2048, kv_blocks=2600))
    made = replace(asked, scheduled_s=run.joined_s, first_token_s=run.first_token_s, finish_s=run.finish_s)
    columns = {
        "input_toks": made.prompt_tokens,
        "output_toks": made.output_tokens,
        "arrival_time": made.arrival_s,
        "queued_ts": made.scheduled_s,
        "scheduled_ts": made.scheduled_s,
        "first_token_ts": made.first_token_s,
        "last_token_ts": made.finish_s,
    }
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    file.write_text("\n".join(json.dumps(dict(zip(columns, row, strict=True))) for row in rows))


def test_it_prints_a_table_of_each_kind(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "UTILISATIONS", [0.9])
    for folder in ("step_tables", "vllm_request_timestamps"):
        (tmp_path / folder).mkdir()
    write_table(tmp_path / "step_tables/Qwen3-8B_h100_sxm_tp1_made.csv")
    write_recording(tmp_path / "vllm_request_timestamps/RTX4090_Llama-3.1-8B.jsonl")
    run.main(["--data", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    table = next(line for line in lines if line.startswith("| Qwen3-8B_h100_sxm_tp1_made |"))
    assert table.endswith("| 0, 0, 0.0% | 0% |")
    # the engine that made the recording is known exactly, so its row has no error
    known = next(line for line in lines if line.startswith("| | data-sheet roofline |"))
    assert known.replace("+", "").replace("-0", "0").count(" 0.0% ") == 5
    assert sum(line.startswith("| | ") for line in lines) == 5
