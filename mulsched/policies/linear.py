"""Weighted sums of cache and load: what has a weight to tune."""

import numpy as np
from numpy.typing import NDArray

from mulsched.indicators import Columns
from mulsched.policies._parameters import at_least, weighted_race
from mulsched.policies._policy import Policy, register
from mulsched.scorers import Linear, min_max

__all__ = ["bailian", "dynamo", "linear"]


def linear(*, weight: float = 0.7) -> Policy:
    """The linear score that LMetric's paper argues against.

    What it does: the smallest ``weight * (1 - hit_tokens / prompt_tokens) + (1 - weight) * batch_size /
    max batch_size``.
    Intent: affinity, balance.
    Inputs: matched blocks, running, waiting.
    Parameters: ``weight`` .7, the best on the paper's ChatBot trace; .55 on its API trace (section 4.3). It
    is tuned per trace: a fair comparison sweeps it on the trace at hand.
    Known losses: the best weight moves with load and over time; the normalisation makes a score depend on
    candidates that cannot win. Dividing by the largest is our reading of the paper's normalised batch size.
    """
    share = at_least(weight, "weight", 0, most=1)
    score = Linear(
        {"new_prefill_tokens": share, "batch_size": 1 - share},
        normalise={"new_prefill_tokens": "prompt", "batch_size": "max"},
    )
    return Policy(name="linear", score=score, source="arXiv 2603.15202 v1, section 4.3")


def dynamo(*, overlap_weight: float = 1.0, temperature: float = 0.0) -> Policy:
    """Dynamo's KV router.

    What it does: the smallest ``overlap_weight * prefill_blocks + decode_blocks``, where prefill blocks are
    queued and new prefill tokens over the block size, decode blocks those of the requests there and of this
    one. With a temperature, a draw by softmax over the min-max normalised cost.
    Intent: affinity, balance.
    Inputs: matched blocks, queued prefill tokens, context tokens, uniform.
    Parameters: ``overlap_weight`` 1 and ``temperature`` 0, Dynamo's defaults.
    Known losses: weight to be tuned. A block that several active requests share counts once in its decode
    blocks, and for each of them in ours: 5 to 34 decisions in 100 fall otherwise (docs/dynamo-crosscheck.md).
    It leaves out partial blocks, and takes a wholly cached prompt to cost no prefill. Its credits for host
    and disk are a router's ``tier_cost_ratio={"CPU": 0.25, "DISK": 0.75}``; shared cache is not tracked. Its
    equal costs are drawn among; ours among the smallest batches of these.
    """
    weight = at_least(overlap_weight, "overlap_weight", 0)
    heat = at_least(temperature, "temperature", 0)

    def score(columns: Columns) -> NDArray[np.float64]:
        prefill = columns.p_tokens / columns.block_size
        decode = (columns.context_tokens + columns.request.prompt_tokens) / columns.block_size
        cost: NDArray[np.float64] = weight * prefill + decode
        return cost if heat == 0 else weighted_race(columns, -min_max(cost) / heat)

    return Policy(
        name="dynamo",
        score=score,
        ties="random",
        source="ai-dynamo/dynamo, lib/kv-router/src/scheduling/selector/default.rs, 1.6",
    )


def bailian(*, hit_weight: float = 0.7, batch_weight: float = 0.15, token_weight: float = 0.15) -> Policy:
    """The production scheduler that LMetric's paper compares with.

    What it does: draws a candidate with probability in proportion to ``hit_weight * hit + batch_weight *
    (1 - batch) + token_weight * (1 - tokens)``, each min-max normalised over the candidates. An indicator
    that is equal everywhere counts for nothing, as in the authors' router; if all are, any candidate is
    drawn (theirs takes the first).
    Intent: affinity, balance.
    Inputs: matched blocks, running, waiting, context tokens, uniform.
    Parameters: .7, .15, .15 (the defaults of the authors' router, tuned for ChatBot).
    Known losses: random even where one candidate is best; min-max depends on candidates that cannot win.
    Tokens are those of prompts: outputs are not known.
    """
    weights = (
        at_least(hit_weight, "hit_weight", 0),
        at_least(batch_weight, "batch_weight", 0),
        at_least(token_weight, "token_weight", 0),
    )
    # a candidate that is worst in everything has weight 0 and is drawn only when all are
    least = np.finfo(np.float64).tiny

    def score(columns: Columns) -> NDArray[np.float64]:
        # min_max of the negative is 1 - min_max, but 0 where all are equal
        desirability = (
            weights[0] * min_max(columns.matched_blocks.astype(np.float64))
            + weights[1] * min_max(-columns.batch_size.astype(np.float64))
            + weights[2] * min_max(-columns.context_tokens.astype(np.float64))
        )
        return weighted_race(columns, np.log(np.maximum(desirability, least)))

    return Policy(
        name="bailian",
        score=score,
        source="arXiv 2603.15202 v1, baseline Bailian; blitz-serving/blitz-router, policies/bailian.rs",
    )


register("linear", linear)
register("dynamo", dynamo)
register("bailian", bailian)
