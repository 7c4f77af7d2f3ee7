"""Hypothesis strategies for what a router sees: prompts, clusters, columns, engine events, request lives.

Numbers are small where nothing else is said, so that ties, zeros, full hits and shared prefixes are common,
and everything shrinks to fewer and smaller.
"""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from mulsched.indicators import Columns
from mulsched.router import PolicyLike, Router
from mulsched.testing._columns import make_columns
from mulsched.testing._events import event_lists
from mulsched.testing._lives import request_lives
from mulsched.testing._prompts import prefixes, prompts

__all__ = [
    "Cluster",
    "clusters",
    "columns",
    "event_lists",
    "histories",
    "loads",
    "prefixes",
    "prompts",
    "request_lives",
]

BLOCK_SIZES = (16, 1)
"""vLLM's default and the smallest, of which the first is the simpler."""


def columns(
    *, min_size: int = 1, max_size: int = 5, now: float | None = 10.0, block_size: int | None = None
) -> st.SearchStrategy[Columns]:
    """Columns that a router can come to, of ``min_size`` to ``max_size`` candidates.

    Prompts have up to 200 tokens, in blocks of 16 or 1 or as given. Half the time instances have up to 40
    requests running, 5 waiting, and a queue of up to 300 tokens or, less often, a million; half the time
    only up to 3, 1 and 31, and half of that time all are alike. Context is on instances with requests only,
    at least as many blocks are cached as match, and no two candidates were chosen last at the same time:
    nothing is left to the order of rows.
    """
    # One draw instead of some thirty, each of which costs as much as a decision. Shrinking drops instances
    # and lowers bytes, and every byte means more as it grows.
    return st.binary(min_size=_HEAD + _ROW * min_size, max_size=_HEAD + _ROW * max_size).map(
        lambda drawn: _columns(drawn, now, block_size)
    )


def _steps(*parts: tuple[int, int, int]) -> NDArray[np.int64]:
    """Return 256 values that do not fall: ``(how many, first, last)`` of each part, evenly."""
    return np.concatenate([np.linspace(first, last, n).astype(np.int64) for n, first, last in parts])


_HEAD, _ROW = 7, 7
_SHARE = _steps((80, 0, 0), (136, 0, 99), (40, 100, 100))  # percent
_PROMPT = _steps((256, 1, 200))
_QUEUE = _steps((64, 0, 0), (128, 1, 300), (64, 300, 1_000_000))
_RUNNING = _steps((64, 0, 0), (96, 1, 10), (96, 10, 40))
_WAITING = _steps((112, 0, 0), (144, 1, 5))
_CONTEXT = _steps((64, 0, 0), (192, 1, 4000))
_CACHED = _steps((64, 0, 0), (192, 1, 100))


def _columns(drawn: bytes, now: float | None, block_size: int | None) -> Columns:
    head = drawn[:_HEAD]
    prompt = int(_PROMPT[head[0]])
    size = BLOCK_SIZES[head[1] // 192] if block_size is None else block_size
    # whole rows; what is left over of a row is not used
    n = (len(drawn) - _HEAD) // _ROW
    rows = (
        np.frombuffer(drawn, dtype=np.uint8, offset=_HEAD, count=n * _ROW).reshape(n, _ROW).T.astype(np.int64)
    )
    if head[6] < 64:  # all alike, except in who was chosen last
        rows[:-1] = rows[:-1, :1]
    matched = prompt // size * _SHARE[rows[0]] // 100
    few = head[6] < 128
    queued = rows[1] // 8 if few else _QUEUE[rows[1]]
    running = rows[2] // 64 if few else _RUNNING[rows[2]]
    waiting = rows[3] // 128 if few else _WAITING[rows[3]]
    turns = np.empty(n, dtype=np.int64)
    turns[np.argsort(rows[6], kind="stable")] = np.arange(-1, n - 1)
    return make_columns(
        prompt_tokens=prompt,
        block_size=size,
        matched_blocks=matched,
        queued_prefill_tokens=queued,
        running=running,
        waiting=waiting,
        context_tokens=np.where(running + waiting > 0, _CONTEXT[rows[4]], 0),
        cached_blocks=matched + _CACHED[rows[5]],
        last_chosen=turns,
        keys=np.arange(prompt // size, dtype=np.uint64) + np.uint64(head[2] // 64),
        session=(None, "s", "t")[head[3] // 86],
        decision=n + 4 * head[4],
        seed=head[5] // 43,
        now=now,
    )


def histories(*, max_size: int = 6, now: float = 9.0) -> st.SearchStrategy[list[Columns]]:
    """Columns that a policy with state may have decided on before, oldest first, one second before."""
    return st.lists(columns(min_size=2, now=now), max_size=max_size)


def loads() -> st.SearchStrategy[dict[str, int]]:
    """What an instance reports: arguments of ``Router.report_load``.

    An idle instance has an empty queue.
    """
    return st.builds(
        lambda running, waiting, queued: {
            "running": running,
            "waiting": waiting,
            "queued_prefill_tokens": queued if waiting else 0,
        },
        st.integers(0, 40),
        st.integers(0, 5),
        st.integers(0, 300),
    )


@dataclass(frozen=True, slots=True)
class Cluster:
    """Instances by name with the size of their cache in blocks, None: observed; and what they report."""

    block_size: int
    cache_blocks: dict[str, int | None]
    loads: dict[str, dict[str, int]]

    def router(self, policy: PolicyLike = "lmetric", *, seed: int = 0) -> Router:
        """Return a router over these instances, which has their reports."""
        router = Router(block_size=self.block_size, policy=policy, seed=seed)
        for instance, cache_blocks in self.cache_blocks.items():
            router.add_instance(instance, cache_blocks=cache_blocks)
            router.report_load(instance, **self.loads[instance])
        return router


@st.composite
def clusters(
    draw: st.DrawFn, *, min_size: int = 1, max_size: int = 4, block_size: int | None = None
) -> Cluster:
    """Clusters of a few instances, each with an observed cache or a predicted one, and a load."""
    n = draw(st.integers(min_size, max_size))
    names = [f"i{row}" for row in range(n)]
    return Cluster(
        block_size=draw(st.sampled_from(BLOCK_SIZES)) if block_size is None else block_size,
        cache_blocks={name: draw(st.none() | st.integers(1, 20)) for name in names},
        loads={name: draw(loads()) for name in names},
    )
