"""Policies that switch between cache and load by a threshold."""

from collections import deque

import numpy as np
from numpy.typing import NDArray

from mulsched.errors import InvalidArgument
from mulsched.indicators import Columns
from mulsched.policies._parameters import at_least
from mulsched.policies._policy import Policy, register
from mulsched.scorers import lexicographic

__all__ = ["aibrix", "llm_d", "preble", "sglang_cache_aware"]


def aibrix(*, imbalance: float = 8, deviations: float = 1) -> Policy:
    """AIBrix's prefix-cache router.

    What it does: if the request counts differ by more than ``imbalance``, only instances with the fewest
    requests stay; otherwise those with at most mean + ``deviations`` standard deviations. Among them the
    most hits win, then the fewest requests.
    Intent: affinity within a balance gate.
    Inputs: matched blocks, running, waiting.
    Parameters: 8 and 1, AIBrix's defaults.
    Known losses: one overloaded instance anywhere turns affinity off for everyone.
    """
    gap = at_least(imbalance, "imbalance", 0)
    spread = at_least(deviations, "deviations", 0)

    def gate(columns: Columns) -> NDArray[np.bool_]:
        batch = columns.batch_size
        least = batch.min()
        # compared with a tolerance of rounding: where all are equal, all stay
        limit = least if batch.max() - least > gap else batch.mean() + spread * batch.std() + 1e-9
        stays: NDArray[np.bool_] = batch <= limit
        return stays

    return Policy(
        name="aibrix",
        score=lambda columns: lexicographic(-columns.hit_tokens, columns.batch_size),
        filters=(gate,),
        source="vllm-project/aibrix, pkg/plugins/gateway/algorithms/prefix_cache.go; arXiv 2603.15202",
    )


def sglang_cache_aware(
    *, cache_threshold: float = 0.5, balance_abs: float = 32, balance_rel: float = 1.1
) -> Policy:
    """SGLang's cache-aware gateway policy.

    What it does: if the largest and smallest request counts differ by more than ``balance_abs`` and by more
    than the factor ``balance_rel``, the fewest requests win. Otherwise the longest match wins if it covers
    more than ``cache_threshold`` of the prompt, else the smallest cache.
    Intent: affinity, balance by a gate.
    Inputs: matched blocks, cached blocks, running, waiting.
    Parameters: .5, 32, 1.1 as in smg and older SGLang; newer SGLang has 64 and 1.5.
    Known losses: one overloaded instance turns affinity off for everyone. The source matches characters
    against its own tree; ours matches blocks.
    """
    threshold = at_least(cache_threshold, "cache_threshold", 0, most=1)
    absolute = at_least(balance_abs, "balance_abs", 0)
    relative = at_least(balance_rel, "balance_rel", 1)

    def score(columns: Columns) -> NDArray[np.float64]:
        load = columns.batch_size - 1
        matched = columns.matched_blocks * columns.block_size
        if load.max() - load.min() > absolute and load.max() > relative * load.min():
            cost = load
        elif matched.max() > threshold * columns.request.prompt_tokens:
            cost = matched.max() - matched
        else:
            cost = columns.cached_blocks
        return cost.astype(np.float64)

    return Policy(
        name="sglang_cache_aware",
        score=score,
        source="sgl-project/sglang, sgl-model-gateway/src/policies/cache_aware.rs; lightseekorg/smg",
    )


def llm_d(
    *,
    affinity_threshold: float = 0.8,
    max_ttft_penalty_s: float = 18.0,
    peak_prefill_tokens_per_s: float = 15_928.0,
    full_load_tokens: float = 4_194_304.0,
) -> Policy:
    """llm-d's optimized baseline: prefix-affinity filter, then token load.

    What it does: keeps the instances that have cached at least ``affinity_threshold`` of the prompt, unless
    there are none or the best of them has an estimated TTFT more than ``max_ttft_penalty_s`` above the best
    of all. Among those left the fewest tokens in flight win, counted up to ``full_load_tokens``.
    Estimated TTFT = tokens in flight / ``peak_prefill_tokens_per_s``.
    Intent: affinity within a latency gate, balance.
    Inputs: matched blocks, queued prefill tokens.
    Parameters: .8, 18 s, 15,928 and 4,194,304, llm-d's defaults; exploration is 0 there and left out.
    Known losses: below the threshold the cache counts for nothing.
    """
    threshold = at_least(affinity_threshold, "affinity_threshold", 0, most=1)
    penalty = at_least(max_ttft_penalty_s, "max_ttft_penalty_s", 0)
    rate = at_least(peak_prefill_tokens_per_s, "peak_prefill_tokens_per_s", 1)
    full = at_least(full_load_tokens, "full_load_tokens", 1)

    def warm(columns: Columns) -> NDArray[np.bool_]:
        matched = columns.matched_blocks * columns.block_size
        near: NDArray[np.bool_] = matched >= threshold * columns.request.prompt_tokens
        ttft = columns.queued_prefill_tokens / rate
        if not near.any() or ttft[near].min() - ttft.min() > penalty:
            return np.ones(len(columns), dtype=np.bool_)
        return near

    def score(columns: Columns) -> NDArray[np.float64]:
        load: NDArray[np.float64] = np.minimum(1.0, columns.queued_prefill_tokens / full)
        return load

    return Policy(
        name="llm_d",
        score=score,
        filters=(warm,),
        source="llm-d/llm-d-router, prefix-cache-affinity-filter and token-load-scorer",
    )


class _Window:
    """Seconds of work dispatched to each instance within the last ``window_s``."""

    def __init__(self, window_s: float, prefill_tokens_per_s: float, decode_s: float) -> None:
        self._window_s = window_s
        self._rate = prefill_tokens_per_s
        self._decode_s = decode_s
        self._entries: deque[tuple[float, str, float]] = deque()

    def add(self, columns: Columns, position: int) -> None:
        now = self._now(columns)
        cost = self._cost(columns)[position]
        self._entries.append((now, columns.instances[position], float(cost)))
        while self._entries and self._entries[0][0] < now - self._window_s:
            self._entries.popleft()

    def load(self, columns: Columns) -> NDArray[np.float64]:
        now = self._now(columns)
        sums = dict.fromkeys(columns.instances, 0.0)
        for then, instance, cost in self._entries:
            if then >= now - self._window_s and instance in sums:
                sums[instance] += cost
        return np.array([sums[name] for name in columns.instances])

    def explore(self, columns: Columns) -> NDArray[np.float64]:
        return self.load(columns) + self._cost(columns)

    def _cost(self, columns: Columns) -> NDArray[np.float64]:
        cost: NDArray[np.float64] = columns.new_prefill_tokens / self._rate + self._decode_s
        return cost

    @staticmethod
    def _now(columns: Columns) -> float:
        if columns.now is None:
            raise InvalidArgument("policy 'preble' sums load over a time window: pass now, got None")
        return columns.now


def preble(
    *,
    hit_threshold: float = 0.5,
    window_s: float = 180.0,
    prefill_tokens_per_s: float = 15_928.0,
    decode_s: float = 3.0,
) -> Policy:
    """Preble's E2: exploit a long match, else explore by cost.

    What it does: if some instance has cached more than ``hit_threshold`` of the prompt, the longest match
    wins, ties by the least work of the last ``window_s``; otherwise the least of that work and this
    request's. Work of a request = new prefill tokens / ``prefill_tokens_per_s`` + ``decode_s``.
    Intent: affinity, else balance.
    Inputs: matched blocks, ``now`` (required: InvalidArgument without), what was dispatched.
    Parameters: .5 and 180 s as in the paper's baseline; the speed is llm-d's peak figure and 3 s of decoding
    about 300 tokens at 10 ms: both arbitrary, to be set for the hardware.
    Known losses: a match just above the threshold wins at any load. O(requests in the window) a decision.
    """
    threshold = at_least(hit_threshold, "hit_threshold", 0, most=1)
    window = _Window(
        at_least(window_s, "window_s", 0),
        at_least(prefill_tokens_per_s, "prefill_tokens_per_s", 1),
        at_least(decode_s, "decode_s", 0),
    )

    def score(columns: Columns) -> NDArray[np.float64]:
        if columns.hit_tokens.max() > threshold * columns.request.prompt_tokens:
            return lexicographic(-columns.hit_tokens, window.load(columns))
        return window.explore(columns)

    return Policy(
        name="preble",
        score=score,
        on_dispatch=window.add,
        source="WukLab/preble, global_scheduler_with_time.py; arXiv 2603.15202, baseline Preble",
    )


register("aibrix", aibrix)
register("sglang_cache_aware", sglang_cache_aware)
register("llm_d", llm_d)
register("preble", preble)
