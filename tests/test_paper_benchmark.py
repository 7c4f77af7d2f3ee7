"""The pure parts of benchmarks/paper: rules, plan, cuts of traces, and that the page follows from its files."""

import math
from pathlib import Path

import claims
import numpy as np
import page
import plan
import pytest
import rules
from results import Table, read
from setups import first_turns

from mulsched import policies
from mulsched.indicators import COLUMNS, Columns
from mulsched.replay import Trace
from mulsched.types import Request

ROOT = Path(__file__).parents[1]
BENCHMARK = ROOT / "benchmarks" / "paper"


def table(rows, **body):
    columns = ["label", "policy", "role", "parameters", "delay_s", "loss", *rules.FIGURES]
    filled = [
        dict.fromkeys(rules.FIGURES, 1.0)
        | {"label": row["policy"], "role": "result", "parameters": {}, "delay_s": 0, "loss": 0}
        | row
        for row in rows
    ]
    assert set(columns) == {key for row in filled for key in row}
    setup = {"trace": "chat", "profile": "qwen2", "instances": 16, "kv_blocks": 100, "loop": "open"}
    return Table({"stage": "main", "load": 0.5, "setup": setup, **body}, filled)


@pytest.mark.parametrize("edge", [0.07, 0.9, 1.0, 3.3, 50])
def test_the_largest_rate_serves_enough_and_a_little_more_does_not(edge):
    scale = rules.largest_rate(lambda scale: 1.0 if scale <= edge else 0.5)
    assert scale <= edge < scale * rules.RATE_TOLERANCE * (1 + 1e-12)


def test_a_share_of_exactly_95_percent_is_served():
    assert rules.largest_rate(lambda scale: 0.95 if scale <= 2 else 0.9) == 2


def test_the_noise_floor_is_the_prediction_interval_of_one_more_run():
    # mean 2, deviation 1, three runs: 4.303 * 1 * sqrt(4 / 3) / 2
    assert rules.noise_floor([1, 2, 3]) == pytest.approx(4.303 * math.sqrt(4 / 3) / 2)


def test_equal_repeats_leave_no_noise():
    assert rules.noise_floor([3.0, 3.0, 3.0]) == 0


def test_a_difference_within_the_noise_floor_is_none():
    assert [rules.compare(x, 100, 0.05) for x in (94, 96, 104, 106)] == ["better", "same", "same", "worse"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([-0.5, -0.4, -0.9], "reproduced"),
        ([-0.1, -0.3, -0.2], "not reproduced"),
        ([-0.1, -0.3, -0.2, -0.45], "in part"),
        ([-0.26, -0.3, -0.2], "in part"),
        ([0.5, 0.4, 0.9], "not reproduced"),
    ],
)
def test_the_verdict_goes_by_the_median_trace_and_the_best(changes, expected):
    assert rules.verdict(-0.5, changes) == expected


def test_a_policy_that_beats_lmetric_beyond_the_noise_is_reported_as_such():
    repeats = [{"policy": "lmetric", "ttft_mean_s": x} for x in (0.99, 1.0, 1.01)]
    one = table([*repeats, {"policy": "vllm", "ttft_mean_s": 0.9}, {"policy": "random", "ttft_mean_s": 0.99}])
    assert claims.losses(one)["ttft_mean_s"] == [(pytest.approx(-0.1), "vllm")]


def test_a_losing_case_is_in_the_page_s_table():
    repeats = [{"policy": "lmetric", "ttft_mean_s": x} for x in (0.99, 1.0, 1.01)]
    text = page.losing([table([*repeats, {"policy": "vllm", "ttft_mean_s": 0.5}])])
    assert "**vllm -50 %** (1 of 1)" in text


def test_the_tuned_row_is_the_trial_with_the_smallest_objective():
    trials = [
        {"policy": "linear", "label": f"linear(weight={w})", "role": "trial", "parameters": {"weight": w}}
        | {"ttft_mean_s": t}
        for w, t in ((0.1, 3.0), (0.5, 1.0), (0.9, 2.0))
    ]
    one = table([{"policy": "lmetric"}, {"policy": "lmetric"}, *trials])
    assert one.others["linear, tuned"]["parameters"] == {"weight": 0.5}


def test_late_runs_of_lmetric_are_no_repeats():
    one = table([{"policy": "lmetric"}, {"policy": "lmetric", "delay_s": 0.1}])
    assert len(one.repeats) == 1


def test_the_main_table_has_every_policy():
    cell = next(cell for cell in plan.cells() if cell.stage == "main")
    detectors = {"lmetric_guarded", "lmetric_paper_detector"}  # measured in benchmarks/failure
    wanted = set(policies.names()) - set(plan.ABLATIONS) - detectors
    assert {run.policy for run in plan.runs(cell, None)} >= wanted


def test_policies_that_predict_are_given_the_engine_s_speed_and_go_by_their_name():
    cells = {cell.setup.profile: cell for cell in plan.cells() if cell.stage == "main"}
    runs = {
        name: [r for r in plan.runs(cell, None) if r.policy == "polyserve"] for name, cell in cells.items()
    }
    assert [run.label for each in runs.values() for run in each] == ["polyserve"] * 2
    dense, experts = (runs[name][0].parameters for name in ("qwen2", "qwen3"))
    # 7.6e9 parameters of Qwen2-7B and 3.3e9 active ones of Qwen3-30B-A3B, at .7 of 148 TFLOP/s
    assert 5_000 < dense["prefill_tokens_per_s"] < 148e12 * 0.7 / 2 / 7.6e9
    assert dense["prefill_tokens_per_s"] < experts["prefill_tokens_per_s"] < 148e12 * 0.7 / 2 / 3.3e9
    assert all(policies.get(name, **dense) for name in plan.PREDICTING_POLICIES)


def test_every_cell_has_a_file_of_its_own():
    names = [cell.name for cell in plan.cells()]
    assert len(set(names)) == len(names)


def test_every_grid_holds_the_policy_s_default():
    for name, grid in plan.GRIDS.items():
        default = policies.get(name).score
        scores = [policies.get(name, **given).score for given in grid]
        columns = random_columns(np.random.default_rng(3))
        assert any((score(columns) == default(columns)).all() for score in scores)


def random_columns(rng, n=8):
    values = {name: rng.integers(0, 50, n) for name in COLUMNS}
    values["new_prefill_tokens"] = rng.integers(1, 1000, n)
    values["hit_tokens"] = 1000 - values["new_prefill_tokens"]
    values["batch_size"] = values["running"] + values["waiting"] + 1
    values["p_tokens"] = values["queued_prefill_tokens"] + values["new_prefill_tokens"]
    return Columns(
        request=Request(keys=np.zeros(62, dtype=np.uint64), prompt_tokens=1000),
        instances=[f"i{i}" for i in range(n)],
        rows=np.arange(n),
        table=np.stack([values[name] for name in COLUMNS]).astype(np.int64),
        decision=0,
        block_size=16,
    )


def test_lmetric_without_its_queue_decides_as_the_hit_ratio_times_batch_size():
    for seed in range(50):
        columns = random_columns(np.random.default_rng(seed))
        by_ratio = (1 - columns.hit_tokens / 1000) * columns.batch_size
        assert plan.no_queue().score(columns) / 1000 == pytest.approx(by_ratio)


def sessions(session, think_s):
    n = len(session)
    last, previous = {}, []
    for i, name in enumerate(session):
        previous.append(last.get(name, -1))
        last[name] = i
    return Trace(
        name="t",
        block_size=16,
        arrival_s=np.arange(n, dtype=np.float64),
        prompt_tokens=np.full(n, 16),
        output_tokens=np.ones(n, dtype=np.int64),
        run_start=np.arange(n),
        run_length=np.ones(n, dtype=np.int64),
        run_offset=np.arange(n + 1),
        session=np.array(session),
        previous=np.array(previous),
        think_s=np.array(think_s),
    )


def test_a_session_ends_at_its_first_long_pause_and_at_its_last_turn():
    trace = sessions([0, 0, 1, 0, 1, 1, 0], [0.0, 5.0, 0.0, 700.0, 1.0, 1.0, 1.0])
    cut = first_turns(trace, sessions=2, turns=2, pause_s=600)
    assert (cut.arrival_s.tolist(), cut.previous.tolist()) == ([0.0, 1.0, 2.0, 4.0], [-1, 0, -1, 2])


def test_a_session_too_many_does_not_end_those_before_it():
    trace = sessions([0, 1, 2, 0, 2, 1], [0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    assert first_turns(trace, sessions=2).session.tolist() == [0, 1, 0, 1]


def test_the_page_is_what_its_result_files_give():
    rates, tables = read(BENCHMARK / "results")
    drawn = [path.stem.removeprefix("paper-") for path in (ROOT / "docs" / "images").glob("paper-*.png")]
    text = page.write(rates, tables, drawn, page.readings(BENCHMARK / "readings.md"))
    assert text == (ROOT / "docs" / "results.md").read_text()
