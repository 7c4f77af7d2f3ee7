"""Policies that follow the cache or the session."""

import math
from collections import OrderedDict
from functools import lru_cache

import numpy as np
import xxhash
from numpy.typing import NDArray

from mulsched.indicators import Columns
from mulsched.policies._parameters import at_least, whole_at_least
from mulsched.policies._policy import Policy, register
from mulsched.scorers import Multiplicative, lexicographic

__all__ = ["consistent_hash_bounded", "least_p_tokens", "most_hits", "sticky"]


def most_hits() -> Policy:
    """The longest cached prefix.

    What it does: the smallest ``new_prefill_tokens``, which is the largest ``hit_tokens``.
    Intent: affinity.
    Inputs: matched blocks.
    Parameters: none.
    Known losses: no load term, so a prefix that all requests share sends them all to one instance. The
    source breaks ties at random; ours go to the smallest batch, which favours it.
    """
    return Policy(
        name="most_hits",
        score=Multiplicative("new_prefill_tokens"),
        source="vLLM production-stack, routing_logic.py, PrefixAwareRouter",
    )


def least_p_tokens() -> Policy:
    """The shortest prefill queue, this request's new tokens included.

    What it does: the smallest ``p_tokens``: LMetric without the batch size.
    Intent: affinity, balance of prefill only.
    Inputs: matched blocks, queued prefill tokens.
    Parameters: none.
    Known losses: blind to decoding load; a prefix that starts on one instance stays there.
    """
    return Policy(
        name="least_p_tokens",
        score=Multiplicative("p_tokens"),
        source="mulsched: LMetric without the batch size",
    )


class _Sessions:
    """Where each session went last; bounded, the least recently used leaves."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._instance: OrderedDict[str, str] = OrderedDict()

    def home(self, columns: Columns) -> NDArray[np.bool_]:
        home = self._instance.get(columns.request.session) if columns.request.session else None
        if home is None or home not in columns.instances:
            return np.ones(len(columns), dtype=np.bool_)
        return np.array([name == home for name in columns.instances], dtype=np.bool_)

    def remember(self, columns: Columns, position: int) -> None:
        session = columns.request.session
        if not session:
            return
        self._instance[session] = columns.instances[position]
        self._instance.move_to_end(session)
        if len(self._instance) > self._limit:
            self._instance.popitem(last=False)


def sticky(*, max_sessions: int = 100_000) -> Policy:
    """Every request of a session on one instance.

    What it does: a session returns to the instance of its last request if that is a candidate; otherwise,
    and without a session, the fewest requests win.
    Intent: affinity.
    Inputs: session, running, waiting.
    Parameters: ``max_sessions`` remembered (arbitrary; about 20 MB).
    Known losses: no sharing between sessions; a heavy session is not moved.
    """
    sessions = _Sessions(whole_at_least(max_sessions, "max_sessions", 1))
    return Policy(
        name="sticky",
        score=Multiplicative("batch_size"),
        filters=(sessions.home,),
        on_dispatch=sessions.remember,
        source="session affinity as in Ray Serve, production-stack and smg routers",
    )


class _Ring:
    """A ring of 2**64 places on which instances and requests hash to points, with a bound on load."""

    def __init__(self, balance: float, virtual_nodes: int, prefix_blocks: int) -> None:
        self._balance = balance
        self._virtual_nodes = virtual_nodes
        self._prefix_blocks = prefix_blocks
        # a name's points never change, so keeping them decides nothing; the bound is for names that come
        # and go (pods): 4,096 of them are 4 MB
        self._points = lru_cache(maxsize=4096)(self._hash_points)

    def score(self, columns: Columns) -> NDArray[np.float64]:
        # the order in which instances are met from the key on is that of their nearest points ahead of it;
        # uint64 wraps around as the ring does
        points = np.stack([self._points(name) for name in columns.instances])
        ahead = (points - np.uint64(self._key(columns))).min(axis=1)
        load = columns.batch_size - 1
        bound = math.ceil(self._balance * (int(load.sum()) + 1) / len(columns))
        return lexicographic(load >= bound, ahead)

    def _key(self, columns: Columns) -> int:
        request = columns.request
        if request.session:
            # any str names a session, a lone surrogate from a client's JSON included
            return xxhash.xxh3_64_intdigest(request.session.encode(errors="surrogatepass"))
        return xxhash.xxh3_64_intdigest(request.keys[: self._prefix_blocks].tobytes())

    def _hash_points(self, name: str) -> NDArray[np.uint64]:
        points = [
            xxhash.xxh3_64_intdigest(f"{name}#{i}".encode(errors="surrogatepass"))
            for i in range(self._virtual_nodes)
        ]
        return np.array(points, dtype=np.uint64)


def consistent_hash_bounded(
    *, balance: float = 1.25, virtual_nodes: int = 100, prefix_blocks: int = 8
) -> Policy:
    """Consistent hashing with bounded loads.

    What it does: hashes the session, or else the first ``prefix_blocks`` block keys, to a point on a ring
    of virtual nodes, and takes the first instance from there on with fewer than
    ``ceil(balance * (requests + 1) / instances)`` requests; there always is one.
    Intent: affinity, distribution.
    Inputs: session or block keys, names of the candidates, running, waiting.
    Parameters: ``balance`` 1.25 (the least that HAProxy's manual calls reasonable), ``virtual_nodes`` 100
    (160 in vllm-project/router; arbitrary), ``prefix_blocks`` 8 (arbitrary: 128 tokens at block size 16).
    Known losses: does not know what is cached, only where it should be; moves nobody back when the load
    falls. Prompts shorter than a block and without a session share one place. O(candidates * virtual nodes).
    """
    ring = _Ring(
        at_least(balance, "balance", 1),
        whole_at_least(virtual_nodes, "virtual_nodes", 1),
        whole_at_least(prefix_blocks, "prefix_blocks", 1),
    )
    return Policy(
        name="consistent_hash_bounded",
        score=ring.score,
        source="Mirrokni, Thorup, Zadimoghaddam, Consistent Hashing with Bounded Loads, SODA 2018",
    )


register("most_hits", most_hits)
register("least_p_tokens", least_p_tokens)
register("sticky", sticky)
register("consistent_hash_bounded", consistent_hash_bounded)
