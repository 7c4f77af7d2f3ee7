"""Each invariant catches a score that breaks it; reports, determinism and bad input."""

import random
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mulsched import Policy
from mulsched.errors import InvalidArgument, InvalidType, MissingExtra, UnknownPolicy
from mulsched.testing import check_policy, check_score, invariants
from mulsched.testing.__main__ import main


def ratio(c):
    return (c.new_prefill_tokens - c.new_prefill_tokens.min()) / (c.batch_size.max() - c.batch_size.min())


def in_place(c):
    c.running[:] *= 2
    return c.running


BROKEN_SCORES = {
    "finite": ratio,
    "deterministic": lambda c: [random.random() for _ in c.instances],
    "pure": in_place,
    "non_negative": lambda c: -c.hit_tokens,
    "permutation_equivariant": lambda c: c.batch_size + np.arange(len(c)),
    "monotone": lambda c: c.p_tokens / c.batch_size,
    "dominance": lambda c: c.hit_tokens,
    "best_wins": lambda c: c.uniform,
    "work_conserving": Policy(name="cache", score=lambda c: c.new_prefill_tokens, ties="first"),
    "independent_of_irrelevant": lambda c: (
        c.new_prefill_tokens / c.request.prompt_tokens + c.batch_size / c.batch_size.max()
    ),
    "no_zero_veto": lambda c: c.queued_prefill_tokens * c.batch_size,
    "ties_do_not_herd": Policy(name="running", score=lambda c: c.running, ties="first"),
    "scale_invariant_tokens": lambda c: c.p_tokens + 20 * c.batch_size,
    "scale_invariant_requests": lambda c: c.p_tokens + 20 * c.batch_size,
}


def counts():
    """A policy with state: the least often chosen."""
    sent = Counter()
    return Policy(
        name="counts",
        score=lambda c: [sent[name] for name in c.instances],
        on_dispatch=lambda c, at: sent.update([c.instances[at]]),
    )


def test_every_invariant_has_a_score_that_breaks_it():
    assert set(BROKEN_SCORES) == set(invariants.names())


@pytest.mark.parametrize("name", invariants.names())
def test_a_broken_score_is_caught(name):
    report = check_score(BROKEN_SCORES[name], only=[name])
    finding = report[name]
    assert not finding.holds
    assert finding.counter_example is not None
    assert len(finding.counter_example.decisions[0].columns) <= 3
    with pytest.raises(AssertionError, match=f"{name}: BROKEN"):
        report.assert_holds(name)


def test_the_same_seed_finds_the_same():
    reports = [str(check_score("linear", examples=30, only=["independent_of_irrelevant"])) for _ in range(2)]
    assert reports[0] == reports[1]


def test_others_wait_until_a_score_is_finite():
    report = check_score(ratio, shrink=False)
    assert report.broken == ("finite",)
    assert report["monotone"].not_applicable == "it is not finite: mend that first"
    with pytest.raises(AssertionError, match="not applicable"):
        report.assert_holds("monotone")


def test_a_typo_shows_as_itself():
    finding = check_score(lambda c: c.batchsize, only=["finite"])["finite"]
    assert (
        finding.counter_example.reason
        == "raises AttributeError: 'Columns' object has no attribute 'batchsize'"
    )


def test_a_policy_with_state_needs_its_factory_to_be_told():
    report = check_score(counts(), examples=5, only=["ties_do_not_herd", "finite"])
    assert "give its factory to check_policy" in report["ties_do_not_herd"].not_applicable
    report.assert_holds()
    report = check_policy(counts, examples=30, only=["ties_do_not_herd", "dominance"])
    report.assert_holds("ties_do_not_herd")
    assert report["dominance"].counter_example.history


@settings(max_examples=2, database=None)
@given(st.integers(0, 3))
def test_it_runs_inside_another_hypothesis_test(seed):
    check_score("lmetric", examples=5, seed=seed, only=["monotone"]).assert_holds()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: check_score("best"), UnknownPolicy, "unknown policy 'best'"),
        (lambda: check_score(5), InvalidType, "policy must be a name"),
        (lambda: check_score("lmetric", examples=0), InvalidArgument, "at least 1, got 0"),
        (lambda: check_score("lmetric", examples="9"), InvalidType, "examples must be an int, got str"),
        (lambda: check_score("lmetric", seed=None), InvalidType, "seed must be an int, got NoneType"),
        (lambda: check_score("lmetric", only="finite"), InvalidType, "iterable of names"),
        (lambda: check_score("lmetric", only=["fine"]), InvalidArgument, "unknown invariant 'fine'"),
        (lambda: check_policy("lmetric"), InvalidType, "factory must be callable, got str"),
        (lambda: check_score("lmetric", only=["finite"], examples=1)["pure"], InvalidArgument, "not checked"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_command_prints_the_report_and_exits_by_it(capsys):
    assert main(["linear:weight=0.5", "--examples", "40"]) == 1
    assert "independent_of_irrelevant  BROKEN" in capsys.readouterr().out
    assert main(["mulsched.scorers:nothing"]) == 2
    assert "nothing" in capsys.readouterr().err


def test_without_hypothesis_the_extra_is_named(monkeypatch):
    for module in [name for name in sys.modules if name.startswith("mulsched.testing")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(MissingExtra, match=r"pip install 'mulsched\[testing\]'"):
        import mulsched.testing  # noqa: F401
