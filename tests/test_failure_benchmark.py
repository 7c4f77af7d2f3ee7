"""The pure parts of benchmarks/failure: cases, measures, verdicts, and that the page follows from its files."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from failure import cases, measures, page, run
from failure.cases import CASES, REFERENCE, Run
from failure.measures import BURST_FIGURES, FIGURES, JUDGED
from failure.tables import Table, read

from mulsched.policies import parse_spec
from mulsched.replay import BURSTS

ROOT = Path(__file__).parents[1]
NOWHERE = Path("nowhere")


def row(spec, seed=0, ties=None, tie_seed=0, delay_s=0.0, **figures):
    return (
        dict.fromkeys((*FIGURES, *BURST_FIGURES), 1.0)
        | {"spec": spec, "seed": seed, "ties": ties, "tie_seed": tie_seed, "delay_s": delay_s}
        | figures
    )


def table(*rows):
    body = {"case": "one-class", "part": "burst", "load": 0.5, "window": [1, 2], "series": {}}
    return Table(body, [row(REFERENCE), row(REFERENCE, ties="random", tie_seed=1), *rows])


def result(arrival, finish, instance, *, ttft=None, instances=2):
    arrival = np.array(arrival, dtype=float)
    ttft = np.zeros(len(arrival)) if ttft is None else np.array(ttft, dtype=float)
    return SimpleNamespace(
        arrival_s=arrival,
        finish_s=np.array(finish, dtype=float),
        instance=np.array(instance),
        instances=instances,
        ttft_s=ttft,
    )


def test_every_cell_has_a_file_of_its_own():
    names = [f"{case.name}-{load:g}" for case in CASES for load in case.loads]
    assert len(set(names)) == len(names)


def test_every_burst_is_a_case():
    assert {case.workload for case in CASES} >= set(BURSTS)


def test_every_policy_exists():
    for spec in cases.POLICIES:
        parse_spec(spec)


def test_a_cell_s_runs_differ_in_their_keys():
    for case in CASES:
        keys = [one.key for one in cases.runs(case)]
        assert len(set(keys)) == len(keys)


def test_lmetric_is_repeated_with_other_ties():
    burst = next(case for case in CASES if case.part == "burst")
    ties = [one.ties for one in cases.runs(burst, [REFERENCE]) if one.seed == 0]
    assert ties == [None, "random", "random"]


def test_a_case_without_its_background_is_the_hot_classes_alone():
    alone = next(case for case in CASES if case.alone)
    assert (alone.trace(1.0, seed=0, data=NOWHERE).session < 0).all()


def test_small_caches_hold_every_request():
    small = next(case for case in CASES if case.name == "thinking-class")
    trace = small.trace(0.5, seed=0, data=NOWHERE)
    assert (trace.prompt_tokens + trace.output_tokens).max() <= small.kv_blocks * 16


def test_a_real_trace_that_is_not_there_is_known_to_be_absent():
    mooncake = next(case for case in CASES if case.name == "mooncake")
    assert not run.case_is_here(mooncake, NOWHERE)


def test_requests_in_flight_are_counted_from_arrival_to_finish():
    counts = measures.in_flight(result([0, 1, 1], [2, 3, 5], [0, 0, 1]), np.array([0.0, 1.0, 2.0, 4.0]))
    assert counts.tolist() == [[1, 0], [2, 1], [1, 1], [0, 1]]


def test_the_spread_is_of_what_arrives_in_the_window():
    one = result([0, 1, 2, 3, 9], [9] * 5, [1, 0, 0, 0, 1])
    assert measures.burst_spread(one, (1, 4)) == 2.0


STARTS = np.arange(0.0, 100.0)


def levels(**at):
    values = np.ones(100)
    values[41:80] = 3.0
    for second, value in at.items():
        values[int(second[1:])] = value
    return values


def test_recovery_is_the_first_window_as_low_as_before():
    assert measures.recovery_s(STARTS, levels(), (50.0, 70.0)) == 10.0


def test_the_highest_calm_level_is_the_bound():
    assert measures.recovery_s(STARTS, levels(s30=3.0), (50.0, 70.0)) == 0.0


def test_the_warm_up_is_not_calm():
    assert measures.recovery_s(STARTS, levels(s5=3.0), (50.0, 70.0)) == 10.0


def test_a_level_that_stays_high_never_recovers():
    assert math.isnan(measures.recovery_s(STARTS, np.where(STARTS <= 40, 1.0, 2.0), (50.0, 70.0)))


def test_a_window_without_requests_is_no_recovery():
    assert measures.recovery_s(STARTS, levels(s70=math.nan), (50.0, 70.0)) == 10.0


def test_ttft_levels_are_means_over_the_background():
    one = result([0, 1, 2, 15, 21], [30] * 5, [0] * 5, ttft=[1, 9, 3, 5, 7])
    _, values = measures.ttft_levels(one, np.array([True, False, True, True, True]))
    assert values[0] == 2.0
    assert math.isnan(values[3])
    assert values[10] == 5.0


def test_batch_levels_are_means_of_the_fullest_instance():
    one = result([0, 0, 0, 30], [5, 5, 30, 31], [0, 0, 1, 1])
    _, values = measures.batch_levels(one)
    assert values[0] == 1.5
    assert values[5] == 1.0


def test_the_gap_is_to_the_better_of_lmetric_and_load_only():
    one = table(row("vllm", ttft_mean_s=0.5, tpot_mean_s=2.0), row("linear", ttft_mean_s=0.6))
    assert one.behind("linear", "ttft_mean_s") == pytest.approx(0.2)
    assert one.behind("linear", "tpot_mean_s") == pytest.approx(0.0)
    assert one.worst("vllm") == pytest.approx(1.0)


def test_a_gap_below_5_percent_is_within():
    one = table(row("vllm"), row("linear", tpot_p99_s=1.049))
    assert one.verdict("linear") == "yes"


def test_a_gap_beyond_5_percent_is_not_within():
    one = table(row("vllm"), row("linear", tpot_p99_s=1.06))
    assert one.verdict("linear") == "no"


def test_a_gap_that_noise_can_make_is_called_so():
    noisy = table(row(REFERENCE, ties="random", tie_seed=2, tpot_p99_s=1.01), row("vllm"))
    assert noisy.floor("tpot_p99_s") > 0.01
    assert (
        Table(noisy.body, [*noisy.rows, row("linear", tpot_p99_s=1.06)]).verdict("linear") == "within noise"
    )


def test_ratios_pair_the_seeds():
    one = table(
        row(REFERENCE, seed=1, ttft_mean_s=4.0),
        row("vllm", ttft_mean_s=2.0),
        row("vllm", seed=1, ttft_mean_s=2.0),
    )
    assert one.ratio("vllm", "ttft_mean_s") == pytest.approx(1.0)


def test_equal_repeats_leave_no_noise():
    assert table().floor("ttft_mean_s") == 0


def test_the_oracle_has_the_smallest_mean_of_the_judged_figures():
    one = table(row("vllm", ttft_mean_s=0.1), row("linear", tpot_mean_s=0.5))
    assert one.oracle(["vllm", "linear"]) == "vllm"


def test_the_least_behind_is_judged_by_its_worst_figure():
    one = table(row("vllm", ttft_mean_s=0.1, tpot_mean_s=3.0), row("linear", tpot_mean_s=0.99))
    assert one.closest([REFERENCE, "vllm"]) == "vllm"
    assert one.worst("linear") == pytest.approx(9.0)


def test_a_policy_that_another_beats_in_all_is_dominated():
    one = table(row("vllm", ttft_mean_s=0.5), row("linear", ttft_mean_s=0.6), row("random", tpot_p99_s=0.9))
    assert one.undominated() == ["vllm", "random"]


def test_a_better_figure_is_bold_beyond_the_noise():
    assert "| **-50 %** |" in page.losses([table(row("vllm", tpot_p99_s=0.5))]) + " |"


def test_a_cell_is_run_once_and_then_only_what_is_new(tmp_path):
    tiny = replace(next(case for case in CASES if case.name == "identical"), loads=(0.5,))
    (tmp_path / "saturation-identical.json").write_text('{"scale": 0.2}')
    assert "identical: 3 replays" in run.run_case(tiny, ["least_loaded"], NOWHERE, tmp_path)
    assert "identical: 0 replays" in run.run_case(tiny, ["least_loaded"], NOWHERE, tmp_path)
    assert "identical: 3 replays" in run.run_case(tiny, ["vllm"], NOWHERE, tmp_path)
    (one,) = read(tmp_path)
    assert one.policies == [REFERENCE, "least_loaded", "vllm"]
    assert all(value is not None for name in JUDGED for value in (one.rows[0][name],))


def test_a_run_s_key_begins_its_row():
    assert len(Run("lmetric", 0).key) == len(run.KEY)


def test_the_page_follows_from_its_files():
    written = (ROOT / "docs" / "failure-results.md").read_text()
    assert page.write(read(ROOT / "benchmarks" / "failure" / "results"), page.readings()) == written
