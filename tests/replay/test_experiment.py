"""Experiments: sweeps, tuning, repeats, and the figures they make."""

import dataclasses
import math

import numpy as np
import pytest

from mulsched import policies
from mulsched.errors import InvalidArgument, UnknownPolicy
from mulsched.policies import Policy, PolicySpec, parse_spec
from mulsched.replay import builtin_profile, replay, synthetic_trace
from mulsched.replay.experiment import OBJECTIVES, Experiment, run_experiment
from mulsched.replay.grid import Grid, parse_grid, parse_tune
from mulsched.replay.slo import Slo, goodput

OPTIONS = {"profile": builtin_profile(), "instances": 2}


@pytest.fixture(scope="module")
def trace():
    return synthetic_trace("chat", duration_s=8, seed=4, rate_per_s=6)


@pytest.fixture(scope="module")
def at(trace):
    return lambda scale: trace.scale_rate(scale)


def experiment(*specs, **options):
    return Experiment([parse_spec(spec) for spec in specs or ("lmetric", "vllm")], OPTIONS, **options)


def labels(results, *roles):
    return [row.label for row in results.rows if row.role in (roles or ("result", "sweep"))]


def test_a_row_per_policy_with_the_figures_of_its_replay(trace, at):
    results = run_experiment(experiment("lmetric", "linear:weight=0.5"), at)
    assert labels(results) == ["lmetric", "linear(weight=0.5)"]
    alone = replay(trace, "linear", parameters={"weight": 0.5}, **OPTIONS)
    assert results.rows[1].figures == pytest.approx(alone.summary(), nan_ok=True)
    assert results.rows[1].half_widths == {}


def test_the_first_policy_runs_again_for_the_noise_floor(at):
    results = run_experiment(experiment(), at)
    (noise,) = [row for row in results.rows if row.role == "noise"]
    (run,) = (results.runs[number] for number in noise.runs)
    assert (run.label, run.seed, run.ties) == ("lmetric", 1, "random")
    assert "noise" not in {row.role for row in run_experiment(experiment(noise=False), at).rows}


def test_repeats_shift_ties_and_seeds_and_make_means(trace, at):
    results = run_experiment(experiment(repeat=3, seed=5), at)
    assert [(run.label, run.seed, run.ties) for run in results.runs] == [
        (label, seed, ties)
        for label in ("lmetric", "vllm")
        for seed, ties in ((5, "least_recent"), (6, "random"), (7, "random"))
    ]
    row = results.rows[0]
    values = results.values(row, "ttft_mean_s")
    assert row.figures["ttft_mean_s"] == pytest.approx(sum(values) / 3)
    assert row.half_widths["ttft_mean_s"] > 0
    assert values[2] == replay(trace, "lmetric", seed=7, ties="random", **OPTIONS).summary()["ttft_mean_s"]


def test_ties_that_are_part_of_a_policy_stay(at):
    results = run_experiment(experiment("round_robin", repeat=2), at)
    assert [run.ties for run in results.runs] == ["first", "first"]


def test_a_sweep_of_the_rate_replays_each_policy_at_each(at):
    results = run_experiment(experiment(rates=(0.5, 1, 2)), at)
    assert results.rates == [0.5, 1, 2]
    assert [[row.label for row in results.at(rate)] for rate in results.rates] == [["lmetric", "vllm"]] * 3
    offered = [results.at(rate)[0].offered_per_s for rate in results.rates]
    assert offered == pytest.approx([offered[1] / 2, offered[1], offered[1] * 2])
    assert results.reference_rate == 1


def test_a_sweep_of_a_parameter_leaves_policies_without_it_alone(at):
    results = run_experiment(experiment("lmetric", "linear", sweep=parse_grid("weight=0,0.5,1")), at)
    assert labels(results) == ["lmetric", "linear(weight=0)", "linear(weight=0.5)", "linear(weight=1)"]
    assert {row.series for row in results.rows if row.role == "sweep"} == {"linear"}


@pytest.mark.parametrize("objective", ["balanced", "ttft_mean", "ttft_p99", "tpot_mean", "tpot_p99"])
def test_tuning_adds_the_best_trial_and_keeps_all(at, objective):
    tuned = experiment("lmetric", tunes=[parse_tune("linear:weight=0,0.5,1")], objective=objective)
    results = run_experiment(tuned, at)
    trials = [row for row in results.rows if row.role == "trial"]
    assert [row.label for row in trials] == ["linear(weight=0)", "linear(weight=0.5)", "linear(weight=1)"]
    (row,) = [row for row in results.rows if row.tuned]
    best = min(trials, key=lambda trial: OBJECTIVES[objective](trial.figures))
    assert row.parameters == best.parameters
    assert row.figures == pytest.approx(best.figures)
    assert row.label == f"linear(weight={best.parameters['weight']}, tuned)"


def test_tuning_for_goodput_takes_the_largest(at):
    tuned = experiment(
        "lmetric", tunes=[parse_tune("linear:weight=0,0.5,1")], objective="goodput", slo=Slo(0.05, 0.011)
    )
    results = run_experiment(tuned, at)
    (row,) = [row for row in results.rows if row.tuned]
    trials = [row.figures["goodput_per_s"] for row in results.rows if row.role == "trial"]
    assert row.figures["goodput_per_s"] == max(trials)


def test_what_was_tuned_is_repeated_like_the_others(at):
    results = run_experiment(experiment(tunes=[parse_tune("linear:weight=0,1")], repeat=3), at)
    (row,) = [row for row in results.rows if row.tuned]
    assert len(row.runs) == 3
    assert [results.runs[number].seed for number in row.runs] == [0, 1, 2]
    assert all(len(trial.runs) == 1 for trial in results.rows if trial.role == "trial")


def test_tuning_is_done_at_each_rate(at):
    results = run_experiment(experiment(tunes=[parse_tune("linear:weight=0,1")], rates=(1, 20)), at)
    for rate in (1, 20):
        (row,) = [row for row in results.at(rate) if row.tuned]
        assert {row.parameters["weight"]} <= {0, 1}
        assert len(results.at(rate, "trial")) == 2


def test_an_slo_adds_the_goodput(trace, at):
    slo = Slo(0.05, 0.02)
    results = run_experiment(experiment(slo=slo), at)
    expected = goodput(replay(trace, "lmetric", **OPTIONS), slo)
    assert {name: results.rows[0].figures[name] for name in expected} == expected


def test_each_run_is_handed_on_in_order(at):
    kept = []
    results = run_experiment(
        experiment(repeat=2), at, keep=lambda number, result: kept.append((number, result.seed))
    )
    assert kept == [(run.number, run.seed) for run in results.runs]


def test_processes_do_not_change_the_results(at):
    plan = experiment(tunes=[parse_tune("linear:weight=0,1")], repeat=2)
    assert run_experiment(plan, at, processes=2).to_json() == run_experiment(plan, at).to_json()


def test_progress_counts_the_requests_of_all_runs(trace, at):
    told = []
    run_experiment(experiment(), at, progress=lambda *message: told.append(message))
    assert told[-1] == ("3 of 3 replays", 3 * len(trace), 3 * len(trace))
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_settings_say_what_all_runs_share(at):
    plan = experiment(seed=3)
    settings = run_experiment(plan, at, settings={"command": "mulsched replay"}).settings
    assert settings["command"] == "mulsched replay"
    assert (settings["trace"], settings["instances"], settings["seed"]) == ("synthetic:chat", 2, 3)
    assert settings["kv_blocks"] == 26_000
    assert "policy" not in settings
    assert "preemptions" not in settings


def test_the_noise_floor_of_a_policy_that_is_swept_is_its_first_points(at):
    results = run_experiment(experiment("linear", sweep=parse_grid("weight=0,1")), at)
    assert labels(results, "noise") == ["linear(weight=0)"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeat": 0}, "repeat must be at least 1, got 0"),
        ({"rates": ()}, "needs a policy and a rate"),
        ({"rates": (1, 2, 1)}, r"each rate may be given once, got \[1, 2, 1\]"),
        ({"objective": "cost"}, "objective must be one of balanced, .*, got 'cost'"),
        ({"objective": "goodput"}, "the objective goodput needs an SLO"),
        ({"tunes": [parse_tune("linear"), parse_tune("linear:weight=0")]}, "each policy may be tuned once"),
        ({"sweep": Grid("weight", (0,))}, "none of lmetric, vllm has a parameter 'weight' to sweep"),
    ],
)
def test_experiments_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InvalidArgument, match=message):
        experiment(**options)


def test_a_sweep_of_what_is_fixed_tuned_or_out_of_range_is_refused():
    with pytest.raises(InvalidArgument, match=r"linear\(weight=0.5\) fixes weight, which is to be swept"):
        experiment("linear:weight=0.5", sweep=parse_grid("weight"))
    with pytest.raises(InvalidArgument, match="sweep weight or tune it"):
        experiment("linear", sweep=parse_grid("weight"), tunes=[parse_tune("linear")])
    with pytest.raises(InvalidArgument, match="weight must be finite and in 0..1, got 2"):
        experiment("linear", sweep=parse_grid("weight=1,2"))


def test_policies_must_exist_and_differ():
    with pytest.raises(UnknownPolicy, match="best"):
        Experiment([PolicySpec("best")], OPTIONS)
    with pytest.raises(InvalidArgument, match="each policy may be given once, got vllm, vllm"):
        experiment("vllm", "vllm")
    with pytest.raises(InvalidArgument, match="needs a policy"):
        Experiment([], OPTIONS)


def test_an_objective_that_no_request_has_is_refused(trace):
    single = dataclasses.replace(trace, output_tokens=np.ones(len(trace), dtype=np.int64))
    plan = experiment("lmetric", tunes=[parse_tune("linear:weight=0,1")], objective="tpot_mean")
    with pytest.raises(InvalidArgument, match="objective tpot_mean is not defined on this trace"):
        run_experiment(plan, lambda scale: single)
    assert math.isnan(
        run_experiment(experiment("lmetric"), lambda scale: single).rows[0].figures["tpot_mean_s"]
    )


def test_a_policy_of_ones_own_is_swept_by_its_parameter(at, monkeypatch):
    monkeypatch.setattr(policies._policy, "_REGISTRY", dict(policies._policy._REGISTRY))

    def pinned(*, row=0):
        return Policy(name="pinned", score=lambda columns: (columns.rows != row).astype(float))

    policies.register("pinned", pinned)
    results = run_experiment(experiment("pinned", sweep=parse_grid("row=0,1"), noise=False), at)
    assert labels(results) == ["pinned(row=0)", "pinned(row=1)"]
    assert [row.figures["request_spread"] for row in results.rows] == [2, 2]
