"""LMetric with a detector of its failure condition."""

from mulsched.failure import FailureDetector, Mitigation
from mulsched.policies._policy import Policy, register
from mulsched.scorers import Multiplicative

__all__ = ["lmetric_guarded", "lmetric_paper_detector"]


def lmetric_guarded(
    *,
    mitigation: Mitigation = "spread",
    weight: str = "tokens",
    confidence: float = 3.0,
    horizon: float = 2.0,
) -> Policy:
    """LMetric, and where a class of requests overloads the holders of its prefix, one copy more at a time.

    What it does: LMetric; where a prefix has more of the load in flight than its holders have of the
    instances, and a copy pays for the requests in flight, a request does not go to a holder with more
    requests than the mean, so that another becomes one.
    Intent: affinity, balance; growth of a hot prefix where affinity alone would herd.
    Inputs: LMetric's; the prompts in flight.
    Parameters: those of :class:`~mulsched.failure.FailureDetector`.
    Known losses: docs/failure.md.
    """
    detector = FailureDetector(
        mitigation=mitigation,
        weight=weight,  # type: ignore[arg-type]
        confidence=confidence,
        horizon=horizon,
    )
    return Policy(
        name="lmetric_guarded",
        score=Multiplicative("p_tokens", "batch_size"),
        detector=detector,
        source="mulsched; condition (2) of arXiv 2603.15202, section 5.2, on load in flight",
    )


def lmetric_paper_detector(*, mitigation: Mitigation = "exclude", window_s: float = 60.0) -> Policy:
    """LMetric with the detector of its paper.

    What it does: LMetric; holders of a class for which both phases of the detector have failed are left out.
    Intent: LMetric's, without its herds.
    Inputs: LMetric's; ``now``, or the window counts requests.
    Parameters: ``window_s`` a minute as in the paper; what it leaves open is fixed in ``_failure_paper``.
    Known losses: counts requests, not load; a fixed class length; several classes each below their share.
    """
    return Policy(
        name="lmetric_paper_detector",
        score=Multiplicative("p_tokens", "batch_size"),
        detector=FailureDetector(mode="paper", mitigation=mitigation, window_s=window_s),
        source="arXiv 2603.15202 v1, section 5.2",
    )


register("lmetric_guarded", lmetric_guarded)
register("lmetric_paper_detector", lmetric_paper_detector)
