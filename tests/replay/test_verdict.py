"""What figures say in words, and what they do not."""

import math

import pytest
from made_results import FIGURES, MadeResults

from mulsched.replay.verdict import noise_floor, noise_text, setting, verdict, verdict_by_rate


def two(other, **first):
    """lmetric with FIGURES, and another policy with some that differ; no noise run."""
    return MadeResults().add("lmetric", **first).add("vllm", **other).results()


def sentence(results, word):
    return next(s for s in verdict(results, 1.0) if s.startswith(word))


def test_the_best_is_named_with_its_figure_and_the_next_with_its_distance():
    results = two({"ttft_mean_s": 0.12})
    assert sentence(results, "Mean TTFT") == (
        "Mean TTFT is lowest under lmetric, 100 ms; the next, vllm, is 20.0% above."
    )


def test_without_a_measure_a_difference_must_exceed_what_was_published():
    near, far = two({"ttft_mean_s": 0.1022}), two({"ttft_mean_s": 0.1024})
    assert "within noise of it: vllm" in sentence(near, "Mean TTFT")
    assert "vllm, is 2.4% above" in sentence(far, "Mean TTFT")
    assert "within noise of it: vllm" in sentence(two({"ttft_p99_s": 0.106}), "P99 TTFT")


def test_a_larger_noise_that_was_measured_counts():
    made = MadeResults().add("lmetric").add("vllm", ttft_mean_s=0.12)
    made.add("lmetric", role="noise", ttft_mean_s=0.13)
    assert "within noise of it: vllm" in sentence(made.results(), "Mean TTFT")


def test_a_smaller_noise_that_was_measured_does_not():
    made = MadeResults().add("lmetric").add("vllm", ttft_mean_s=0.101).add("lmetric", role="noise")
    assert "within noise of it: vllm" in sentence(made.results(), "Mean TTFT")


def test_with_repeats_the_interval_of_the_difference_decides():
    def results(other):
        made = MadeResults(repeat=3).add("lmetric", ttft_mean_s=[0.1009, 0.101, 0.1011])
        return made.add("vllm", ttft_mean_s=other).results()

    assert "vllm, is 2.0% above" in sentence(results([0.1029, 0.103, 0.1031]), "Mean TTFT")
    assert "within noise of it: vllm" in sentence(results([0.09, 0.103, 0.116]), "Mean TTFT")


def test_goodput_is_better_when_it_is_higher():
    results = two({"goodput_per_s": 4.0}, goodput_per_s=5.0)
    assert sentence(results, "Goodput") == (
        "Goodput is highest under lmetric, 5.00 requests/s; the next, vllm, is 20.0% below."
    )


def test_the_summary_names_the_only_leader():
    assert verdict(two({"ttft_mean_s": 0.2}), 1.0)[0] == (
        "lmetric is best or within noise of the best in all 4 figures; no other policy is."
    )


def test_the_summary_says_when_nothing_separates_them():
    assert verdict(two({}), 1.0)[0] == (
        "Nothing separates these policies: all differences in all 4 figures are within noise."
    )


def test_the_summary_says_when_there_is_no_leader_and_how_far_the_nearest_is():
    results = two({"ttft_mean_s": 0.2, "tpot_mean_s": 0.005})
    assert verdict(results, 1.0)[0] == (
        "No policy is best in all 4 figures. Best or within noise of the best in 3 of them: "
        "lmetric (100.0% behind at worst), vllm (100.0% behind at worst)."
    )


def test_the_summary_names_several_leaders():
    made = MadeResults().add("lmetric").add("linear").add("vllm", ttft_mean_s=0.2)
    assert verdict(made.results(), 1.0)[0] == (
        "lmetric and linear are each best or within noise of the best in all 4 figures."
    )


def test_one_policy_is_not_compared():
    assert verdict(MadeResults().add("lmetric").results(), 1.0) == [
        "Only lmetric was replayed: there is nothing to compare it with."
    ]


def test_trials_and_the_noise_run_are_not_compared():
    made = MadeResults().add("lmetric").add("vllm").add("linear(weight=0)", role="trial", ttft_mean_s=0.01)
    made.add("lmetric", role="noise", ttft_mean_s=0.1)
    assert not any("linear" in s for s in verdict(made.results(), 1.0))


def test_a_figure_that_does_not_exist_is_left_out():
    results = two(
        {"tpot_mean_s": math.nan, "tpot_p99_s": math.nan}, tpot_mean_s=math.nan, tpot_p99_s=math.nan
    )
    assert [s.partition(" is ")[0] for s in verdict(results, 1.0)[1:]] == ["Mean TTFT", "P99 TTFT"]


def test_the_noise_floor_of_a_second_run_is_how_far_it_is_from_the_first():
    made = MadeResults().add("lmetric").add("lmetric", role="noise", ttft_mean_s=0.097, hit_ratio=0.0)
    floor = noise_floor(made.results(), 1.0)
    assert floor["ttft_mean_s"] == pytest.approx(0.03)
    assert floor["hit_ratio"] == 1.0
    assert floor["tpot_p99_s"] == 0


def test_the_noise_floor_of_repeats_is_the_interval_between_two_such_means():
    made = MadeResults(repeat=3).add("lmetric", ttft_mean_s=[0.09, 0.10, 0.11])
    # t of 4 degrees, twice the variance of a mean of three
    assert noise_floor(made.results(), 1.0)["ttft_mean_s"] == pytest.approx(
        2.776445 * (2 / 3) ** 0.5 / 10, rel=1e-5
    )


def test_the_noise_floor_of_a_figure_that_is_zero_does_not_exist():
    made = MadeResults().add("lmetric", hit_ratio=0.0).add("lmetric", role="noise", hit_ratio=0.1)
    assert math.isnan(noise_floor(made.results(), 1.0)["hit_ratio"])


def test_noise_is_told_in_words():
    made = MadeResults().add("lmetric")
    assert noise_text(made.results(), 1.0) == (
        "Noise floor not measured; taken as published for tie order: means 2.3%, p99 6.2%."
    )
    made.add("lmetric", role="noise", ttft_mean_s=0.101)
    assert noise_text(made.results(), 1.0) == (
        "Noise floor: lmetric with other ties and seed moves mean TTFT 1.0%, p99 TTFT 0.0%, mean TPOT 0.0%, "
        "p99 TPOT 0.0%."
    )
    repeated = MadeResults(repeat=2).add("lmetric", ttft_mean_s=[0.1, 0.1])
    assert noise_text(repeated.results(), 1.0).startswith(
        "Noise floor: lmetric differs between two sets of 2 runs (95 %) by up to mean TTFT 0.0%"
    )


def test_each_rate_has_its_summary():
    made = MadeResults(rate_scales=[1, 2])
    for rate in (1.0, 2.0):
        made.add("lmetric", rate=rate).add("vllm", rate=rate, ttft_mean_s=0.1 + 0.1 * (rate - 1))
    first, second = verdict_by_rate(made.results())
    assert first.startswith("At 10 requests/s: Nothing separates")
    assert second.startswith("At 20 requests/s: lmetric is best")
    assert verdict_by_rate(MadeResults().add("lmetric").results()) == []


def test_the_setting_names_trace_engines_and_seed():
    assert setting(MadeResults(synthetic=True).add("lmetric", **FIGURES).results()) == (
        "made (synthetic): 20 requests, 2 instances x 100 blocks, builtin-8b, open loop, cache events, seed 0"
    )
