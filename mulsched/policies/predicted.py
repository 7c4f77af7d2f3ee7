"""Policies that predict a request's latency on every instance."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mulsched.indicators import Columns
from mulsched.policies._parameters import at_least
from mulsched.policies._policy import Policy, register

__all__ = ["least_ttft", "polyserve"]


@dataclass(frozen=True, slots=True)
class _LatencyModel:
    """Predicted latencies of a request, a function of its columns only.

    A step that makes a token for every request there, this one included, takes

        step_s = step_overhead_s + batch_size * decode_request_s
                 + (context_tokens + prompt_tokens) * decode_context_token_s
        TPOT = step_s
        TTFT = p_tokens / prefill_tokens_per_s + ceil(p_tokens / chunk_tokens) * step_s
    """

    prefill_tokens_per_s: float
    chunk_tokens: float
    step_overhead_s: float
    decode_request_s: float
    decode_context_token_s: float

    @classmethod
    def checked(cls, **parameters: float) -> "_LatencyModel":
        positive = ("prefill_tokens_per_s", "chunk_tokens")
        return cls(**{name: at_least(value, name, name in positive) for name, value in parameters.items()})

    def tpot_s(self, columns: Columns) -> NDArray[np.float64]:
        context = columns.context_tokens + columns.request.prompt_tokens
        step: NDArray[np.float64] = (
            self.step_overhead_s
            + columns.batch_size * self.decode_request_s
            + context * self.decode_context_token_s
        )
        return step

    def ttft_s(self, columns: Columns) -> NDArray[np.float64]:
        steps = np.ceil(columns.p_tokens / self.chunk_tokens)
        ttft: NDArray[np.float64] = columns.p_tokens / self.prefill_tokens_per_s + steps * self.tpot_s(
            columns
        )
        return ttft


def polyserve(
    *,
    ttft_target_s: float = 3.0,
    tpot_target_s: float = 0.040,
    prefill_tokens_per_s: float = 43_000.0,
    chunk_tokens: float = 4096.0,
    step_overhead_s: float = 0.0074,
    decode_request_s: float = 23e-6,
    decode_context_token_s: float = 52e-9,
) -> Policy:
    """PolyServe's routing within a pool, as LMetric's authors compare with it.

    What it does: of the instances where predicted TTFT and TPOT are within their targets, the largest
    predicted TPOT wins; if there are none, a draw among all. A step takes ``step_overhead_s`` +
    ``decode_request_s`` * batch size + ``decode_context_token_s`` * prompt tokens of all requests there, this
    one included. Predicted TPOT = one step; predicted TTFT = queued and new prefill tokens /
    ``prefill_tokens_per_s`` + a step for every ``chunk_tokens`` of them or part of it.
    Intent: to fill busy instances up to the targets and leave others free, against balance.
    Inputs: matched blocks, queued prefill tokens, running, waiting, context tokens.
    Parameters: 3 s and 40 ms are blitz-router's defaults. Those of latency are what
    :class:`~mulsched.replay.Roofline` assumes of an 8B model on an H100: 16 GFLOP a token at 692 TFLOP/s;
    1 ms, and 16 GB of weights at 2.5 TB/s, a step; 131,072 bytes of KV cache a token. 4,096 tokens a step
    as in LMetric's set-up. All are to be set for the model, the machine and the users.
    Known losses: uses as few instances as the targets allow, so latency is near the targets at any load; one
    draw where none is within them, however far the best is ahead. The source simulates the engine's next
    steps by profiled times; this formula sees neither outputs nor who ends soon, and counts a chunk and a
    step of decoding one after the other. Of PolyServe itself: pools by TPOT tier, scaling, the time that a
    request has waited, and chunks that adapt.
    """
    ttft_target = at_least(ttft_target_s, "ttft_target_s", 0)
    tpot_target = at_least(tpot_target_s, "tpot_target_s", 0)
    model = _LatencyModel.checked(
        prefill_tokens_per_s=prefill_tokens_per_s,
        chunk_tokens=chunk_tokens,
        step_overhead_s=step_overhead_s,
        decode_request_s=decode_request_s,
        decode_context_token_s=decode_context_token_s,
    )

    def within(columns: Columns) -> NDArray[np.bool_]:
        meets: NDArray[np.bool_] = (model.ttft_s(columns) <= ttft_target) & (
            model.tpot_s(columns) <= tpot_target
        )
        return meets

    def attainable(columns: Columns) -> NDArray[np.bool_]:
        meets = within(columns)
        return meets if meets.any() else np.ones(len(columns), dtype=np.bool_)

    def score(columns: Columns) -> NDArray[np.float64]:
        # the filter left those within the targets or, if there are none, everyone
        return -model.tpot_s(columns) if within(columns).all() else columns.uniform

    return Policy(
        name="polyserve",
        score=score,
        filters=(attainable,),
        source="arXiv 2507.17769; blitz-serving/blitz-router, policies/polyserve.rs; arXiv 2603.15202",
    )


def least_ttft(
    *,
    prefill_tokens_per_s: float = 43_000.0,
    chunk_tokens: float = 4096.0,
    step_overhead_s: float = 0.0074,
    decode_request_s: float = 23e-6,
    decode_context_token_s: float = 52e-9,
) -> Policy:
    """llm-d with a latency simulator, as LMetric's authors compare with it.

    What it does: min predicted TTFT, predicted as in :func:`polyserve`.
    Intent: affinity, prefill balance, a little decode balance.
    Inputs: matched blocks, queued prefill tokens, running, waiting, context tokens.
    Parameters: those of :func:`polyserve`, to be set for the model and the machine.
    Known losses: TPOT counts only as far as it delays the first token, so decoding load piles up where the
    cache is. The source simulates the engine's next steps by profiled times. llm-d's own predictor is a model
    trained on live traffic.
    """
    model = _LatencyModel.checked(
        prefill_tokens_per_s=prefill_tokens_per_s,
        chunk_tokens=chunk_tokens,
        step_overhead_s=step_overhead_s,
        decode_request_s=decode_request_s,
        decode_context_token_s=decode_context_token_s,
    )
    return Policy(
        name="least_ttft",
        score=model.ttft_s,
        source="blitz-serving/blitz-router, policies/least_ttft.rs; arXiv 2603.15202",
    )


register("polyserve", polyserve)
register("least_ttft", least_ttft)
