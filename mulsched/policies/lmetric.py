"""LMetric: the product of new prefill tokens and batch size."""

from mulsched.policies._policy import Policy, register
from mulsched.scorers import Multiplicative

__all__ = ["lmetric"]


def lmetric() -> Policy:
    """LMetric.

    What it does: the smallest ``p_tokens * batch_size``, both counted with the request on board.
    Intent: affinity (through new tokens), balance (through queue and batch size).
    Inputs: matched blocks, queued prefill tokens, running, waiting.
    Parameters: none.
    Known losses: cold instances win over warm ones with longer queues, so agentic coding loses reuse;
    a prefix class above its holders' share of the cluster herds (docs/concepts.md).
    """
    return Policy(
        name="lmetric",
        score=Multiplicative("p_tokens", "batch_size"),
        source="Zhang et al., arXiv 2603.15202 v1, sections 5 and 5.1; blitz-serving/blitz-router",
    )


register("lmetric", lmetric)
