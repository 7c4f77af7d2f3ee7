"""Policies that do not look at the cache: the baselines that any router has."""

import numpy as np
from numpy.typing import NDArray

from mulsched.indicators import Columns
from mulsched.policies._policy import Policy, register
from mulsched.scorers import Linear, Multiplicative

__all__ = ["least_loaded", "power_of_two", "random", "round_robin", "vllm"]


def round_robin() -> Policy:
    """Each in turn.

    What it does: chooses the candidate that was chosen the longest ago; with changing candidates this
    stays fair, where a counter modulo their number does not.
    Intent: distribution.
    Inputs: last_chosen.
    Parameters: none.
    Known losses: blind to load and cache.
    """
    return Policy(
        name="round_robin",
        score=Multiplicative("last_chosen"),
        ties="first",
        source="folklore",
    )


def random() -> Policy:
    """Any, uniformly.

    What it does: one seeded draw per candidate, the smallest wins.
    Intent: distribution.
    Inputs: uniform.
    Parameters: none; the router's seed.
    Known losses: blind to load and cache; uneven by chance.
    """
    return Policy(name="random", score=lambda columns: columns.uniform, source="folklore")


def least_loaded() -> Policy:
    """The fewest requests.

    What it does: the smallest ``running + waiting``.
    Intent: balance.
    Inputs: running, waiting.
    Parameters: none.
    Known losses: blind to the cache and to the size of requests.
    """
    return Policy(name="least_loaded", score=Multiplicative("batch_size"), source="folklore")


def vllm() -> Policy:
    """vLLM's own balance between data-parallel ranks.

    What it does: the smallest ``4 * waiting + running``.
    Intent: balance.
    Inputs: running, waiting.
    Parameters: none; the 4 is vLLM's.
    Known losses: blind to the cache and to the size of requests. Newer versions also weigh KV usage, which
    mulsched does not know; vLLM reads counts every 100 ms where ours are current. Among equals vLLM takes the
    first from a start that rotates, ours the least recently chosen.
    """
    return Policy(
        name="vllm",
        score=Linear({"waiting": 4, "running": 1}),
        source="vLLM v1 core_client.py, DPLBAsyncMPClient; baseline vLLM-v1 of arXiv 2603.15202",
    )


def power_of_two() -> Policy:
    """The less loaded of two drawn at random.

    What it does: draws two candidates without replacement and takes the one with fewer requests.
    Intent: balance that does not herd on stale load.
    Inputs: uniform, running, waiting.
    Parameters: none; the router's seed.
    Known losses: blind to the cache.
    """
    return Policy(
        name="power_of_two",
        score=Multiplicative("batch_size"),
        filters=(_two_drawn,),
        source="Mitzenmacher, The Power of Two Choices in Randomized Load Balancing, TPDS 2001",
    )


def _two_drawn(columns: Columns) -> NDArray[np.bool_]:
    mask = np.zeros(len(columns), dtype=np.bool_)
    mask[np.argsort(columns.uniform)[:2]] = True
    return mask


register("round_robin", round_robin)
register("random", random)
register("least_loaded", least_loaded)
register("vllm", vllm)
register("power_of_two", power_of_two)
