"""Policies that switch between cache and load by a threshold."""

from collections import Counter, deque

import numpy as np
from numpy.typing import NDArray

from mulsched.errors import InvalidArgument
from mulsched.indicators import Columns
from mulsched.policies._parameters import at_least
from mulsched.policies._policy import Policy, register
from mulsched.scorers import lexicographic

__all__ = ["aibrix", "llm_d", "preble", "sglang_cache_aware"]


def _match_ratio(columns: Columns) -> NDArray[np.float64]:
    """Return the cached part of the prompt: 1 for a full match, as all sources here count it."""
    ratio: NDArray[np.float64] = columns.matched_blocks * columns.block_size / columns.request.prompt_tokens
    return ratio


def aibrix(*, imbalance: float = 8, deviations: float = 1) -> Policy:
    """AIBrix's prefix-cache router.

    What it does: if the request counts differ by more than ``imbalance``, only instances with the fewest
    requests stay; otherwise those with at most mean + ``deviations`` sample standard deviations (divisor
    n - 1). Among them the most hits win, then the fewest requests, then a draw.
    Intent: affinity within a balance gate.
    Inputs: matched blocks, running, waiting.
    Parameters: 8 and 1, AIBrix's defaults and the authors' of LMetric.
    Known losses: one overloaded instance anywhere turns affinity off for everyone. Newer AIBrix lets counts
    differ if the largest is at most 2 * (mean + 1), and otherwise by less than 8.
    """
    gap = at_least(imbalance, "imbalance", 0)
    spread = at_least(deviations, "deviations", 0)

    def gate(columns: Columns) -> NDArray[np.bool_]:
        batch = columns.batch_size
        least = batch.min()
        if batch.max() - least > gap:
            limit = float(least)
        else:
            deviation = batch.std(ddof=1) if len(batch) > 1 else 0.0
            # whoever is at the limit stays: rounding depends on the order of the candidates
            limit = batch.mean() + spread * deviation + 1e-9
        stays: NDArray[np.bool_] = batch <= limit
        return stays

    return Policy(
        name="aibrix",
        score=lambda columns: lexicographic(-columns.matched_blocks, columns.batch_size),
        filters=(gate,),
        ties="random",
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
    against its own tree, and the size of that tree is its cache; ours matches blocks, and counts those known
    to be cached. Below the threshold newer SGLang takes the fewest requests instead of the smallest cache.
    """
    threshold = at_least(cache_threshold, "cache_threshold", 0, most=1)
    absolute = at_least(balance_abs, "balance_abs", 0)
    relative = at_least(balance_rel, "balance_rel", 1)

    def score(columns: Columns) -> NDArray[np.float64]:
        load = columns.batch_size - 1
        matched = columns.matched_blocks
        if load.max() - load.min() > absolute and load.max() > relative * load.min():
            cost = load
        elif _match_ratio(columns).max() > threshold:
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
    of the others (0: never mind the TTFT). Among those left the fewest uncached tokens win, those in flight
    and this request's own, counted up to ``full_load_tokens``.
    Estimated TTFT = uncached tokens in flight / ``peak_prefill_tokens_per_s``.
    Intent: affinity within a latency gate, balance.
    Inputs: matched blocks, queued prefill tokens.
    Parameters: .8, 18 s, 15,928 (measured by llm-d for Qwen 32B on two H100) and 4,194,304, llm-d's defaults;
    exploration is 0 there and left out.
    Known losses: the gate's speed belongs to one model and machine; blind to decoding load. The source
    matches a prompt's last partial block too, ours whole blocks.
    """
    threshold = at_least(affinity_threshold, "affinity_threshold", 0, most=1)
    penalty = at_least(max_ttft_penalty_s, "max_ttft_penalty_s", 0)
    rate = at_least(peak_prefill_tokens_per_s, "peak_prefill_tokens_per_s", 1)
    full = at_least(full_load_tokens, "full_load_tokens", 1)

    def warm(columns: Columns) -> NDArray[np.bool_]:
        near: NDArray[np.bool_] = _match_ratio(columns) >= threshold
        ttft = columns.queued_prefill_tokens / rate
        # the best of all instead of the best of the others: no penalty where it is a warm one
        if not near.any() or (penalty > 0 and ttft[near].min() - ttft.min() > penalty):
            return np.ones(len(columns), dtype=np.bool_)
        return near

    def score(columns: Columns) -> NDArray[np.float64]:
        load: NDArray[np.float64] = np.minimum(1.0, columns.p_tokens / full)
        return load

    return Policy(
        name="llm_d",
        score=score,
        filters=(warm,),
        source="llm-d/llm-d-router, prefix-cache-affinity-filter and token-load-scorer",
    )


class _Window:
    """Requests and new prefill tokens dispatched to each instance less than ``window_s`` ago.

    Entries are in the order of dispatch, which is that of time if ``now`` does not go back. Sums are of
    integers, so that taking an entry out leaves no rounding behind.
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._entries: deque[tuple[float, str, int]] = deque()
        self._requests: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()

    def add(self, columns: Columns, position: int) -> None:
        now = self._now(columns)
        entry = (now, columns.instances[position], int(columns.new_prefill_tokens[position]))
        self._entries.append(entry)
        self._requests[entry[1]] += 1
        self._tokens[entry[1]] += entry[2]
        while self._entries and self._entries[0][0] <= now - self._window_s:
            _, instance, tokens = self._entries.popleft()
            self._requests[instance] -= 1
            self._tokens[instance] -= tokens
            if not self._requests[instance]:
                del self._requests[instance], self._tokens[instance]

    def sums(self, columns: Columns) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return requests and tokens per candidate, each ``(n,)``. O(n + entries gone since the last add)."""
        start = self._now(columns) - self._window_s
        requests, tokens = Counter(self._requests), Counter(self._tokens)
        for then, instance, new in self._entries:
            if then > start:
                break
            requests[instance] -= 1
            tokens[instance] -= new
        return (
            np.array([requests[name] for name in columns.instances], dtype=np.int64),
            np.array([tokens[name] for name in columns.instances], dtype=np.int64),
        )

    @staticmethod
    def _now(columns: Columns) -> float:
        if columns.now is None:
            raise InvalidArgument("policy 'preble' sums load over a time window: pass now, got None")
        return columns.now


def preble(
    *,
    hit_threshold: float = 0.5,
    window_s: float = 180.0,
    prefill_tokens_per_s: float = 8_300.0,
    decode_s: float = 6.75,
) -> Policy:
    """Preble, as LMetric's authors compare with it.

    What it does: if some instance has cached more than ``hit_threshold`` of the prompt, the longest match
    wins, ties by the fewest requests sent there in the last ``window_s``; otherwise the least work sent
    there in that time. Work of a request = new prefill tokens / ``prefill_tokens_per_s`` + ``decode_s``.
    Intent: affinity, else balance.
    Inputs: matched blocks, ``now`` (required, and not to go back: InvalidArgument without), what was
    dispatched.
    Parameters: .5 and 180 s as in AIBrix's and the authors' ports; ``prefill_tokens_per_s`` 8,300 is the
    slope of their linear time (Mistral 7B, 0.1084 ms a token at efficiency .9) and ``decode_s`` 6.75 their
    45 tokens of .15 s: both to be set for the hardware.
    Known losses: a match just above the threshold wins at any load. Work is neither taken back at a
    request's end nor known before: outputs count alike, and the ports' constant, attention and miss-rate
    terms of prefill are left out. Of Preble itself: eviction cost, rebalancing and measured decode times.
    """
    threshold = at_least(hit_threshold, "hit_threshold", 0, most=1)
    window = _Window(at_least(window_s, "window_s", 0))
    rate = at_least(prefill_tokens_per_s, "prefill_tokens_per_s", 1)
    decode = at_least(decode_s, "decode_s", 0)

    def score(columns: Columns) -> NDArray[np.float64]:
        requests, tokens = window.sums(columns)
        if _match_ratio(columns).max() > threshold:
            return lexicographic(-columns.matched_blocks, requests)
        work: NDArray[np.float64] = tokens / rate + requests * decode
        return work

    return Policy(
        name="preble",
        score=score,
        on_dispatch=window.add,
        source="arXiv 2407.00023; blitz-serving/blitz-router, policies/preble; arXiv 2603.15202",
    )


register("aibrix", aibrix)
register("sglang_cache_aware", sglang_cache_aware)
register("llm_d", llm_d)
register("preble", preble)
