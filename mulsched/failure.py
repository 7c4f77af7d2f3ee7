"""Where a cache-aware score herds: detect it, and say which instances to leave out.

Requests that share a prefix are a class; the instances that have it cached, its holders M, attract it. With
share x of the load and N instances the holders are overloaded once x > |M| / N (arXiv 2603.15202, section
5.2). :class:`FailureDetector` watches for it, raises an :class:`Alarm`, and sends single requests of the
class elsewhere, so that others become holders. What it costs, what it is worth and how the constants were
chosen: docs/failure.md.

Ours, ``mode="occupancy"``: the share of a class is its part of what is in flight, so it weighs by residence
(Little's law), needs no window and no clock, and forgets by itself. Weight: prompt tokens, or requests.
Classes are prefixes of 1, 2, 3, 4, 6, 8, 12, ... blocks, as far as somebody holds them, all at once; M is
read from the columns of the decision. With k a class's load in flight, L all load in flight, and q the sum
of squares of the class's weights, it is over its share where

    k - L |M| / N > c sqrt(q)                        alone: more than its holders' part, beyond chance
    k > c sqrt(q) and H - T |M| / N > c sqrt(Q H / T)    together: its holders carry more than their part

with H the load on the holders, T on all candidates, Q the sum of squares of everything in flight and c the
confidence. An alarm is raised, and candidates are left out, only where a copy of the prefix pays, by
LMetric's own score P BS and for the r requests of the class in flight:

    h r / (|M| + 1) min over M of P BS > min over the others of P BS

On |M| + 1 holders the new one has r / (|M| + 1) requests in flight; in h, the horizon, residence times it
serves h times as many. While a copy is on its way, from the decision to the first token, no other is made of
the class or of a prefix of it. An alarm ends when a request of the class is dispatched and neither excess
is above 0, with M as of then; when one ends and the class is no more than M's part, k <= L |M| / N, with M as
of the last dispatch, and no evidence, k <= c sqrt(q) (H and T are not known there); or with its last request.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mulsched._backend import BACKEND
from mulsched._failure_paper import PaperDetector
from mulsched._failure_py import Ended, Found
from mulsched.errors import InvalidArgument, InvalidType
from mulsched.indicators import COLUMNS, Columns

if BACKEND == "native":
    from mulsched._native import Occupancy
else:
    from mulsched._failure_py import OccupancyPy as Occupancy  # type: ignore[assignment]

__all__ = ["Alarm", "FailureDetector", "Mitigation", "Mode"]

Mode = Literal["occupancy", "paper"]
Mitigation = Literal["spread", "exclude", "load_only"]
"""What a request that is to make a copy may not choose: ``spread`` holders with more requests than the mean,
``exclude`` any holder, ``load_only`` all but the candidates with the fewest requests."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """A class over its share.

    ``class_hash`` and ``class_blocks`` name the prefix; ``share_ratio`` is its part of the load in flight
    (mode paper: of the arrivals in the window) when the alarm was raised, ``holders`` how many of
    ``instances`` had it then. ``since_decision`` counts dispatches, ``since_s`` is the caller's ``now`` or
    None. ``evidence`` says in words what was exceeded.
    """

    class_hash: int
    class_blocks: int
    share_ratio: float
    holders: int
    instances: int
    since_decision: int
    since_s: float | None
    mitigation: str
    evidence: str

    def __str__(self) -> str:
        return (
            f"prefix of {self.class_blocks} blocks in alarm since decision {self.since_decision}: "
            f"{self.evidence}; mitigation {self.mitigation}"
        )


class FailureDetector:
    """Raises alarms for prefix classes over their share, and masks candidates for them.

    ``mode``: ``occupancy`` (ours) or ``paper`` (two phases, see ``_failure_paper``). ``mitigation``: see
    :data:`Mitigation`; None takes ``spread``, in mode paper ``exclude``. ``weight``: what a request counts,
    ``tokens`` of its prompt (the KV cache that it holds) or 1 (``requests``). ``confidence``: standard
    deviations that an excess must have, 3 by default. ``horizon``: for how many residence times of its
    requests a class is expected to stay, 2 by default. ``docs/failure-results.md`` shows what others do.
    ``window_s`` is mode paper's. ``on_alarm`` and ``on_release`` are called with an alarm when it starts and
    ends, inside the router's lock: they must not call the router.

    One detector belongs to one router. Its state is exact: O(requests in flight * log(blocks)) entries.
    Not thread-safe by itself. Raises InvalidArgument, InvalidType.
    """

    def __init__(
        self,
        *,
        mode: Mode = "occupancy",
        mitigation: Mitigation | None = None,
        weight: Literal["tokens", "requests"] = "tokens",
        confidence: float = 3.0,
        horizon: float = 2.0,
        window_s: float = 60.0,
        on_alarm: Callable[[Alarm], None] | None = None,
        on_release: Callable[[Alarm], None] | None = None,
    ) -> None:
        if mode not in get_args(Mode):
            raise InvalidArgument(f"mode must be 'occupancy' or 'paper', got {mode!r}")
        if mitigation is not None and mitigation not in get_args(Mitigation):
            raise InvalidArgument(
                f"mitigation must be 'spread', 'exclude' or 'load_only', got {mitigation!r}"
            )
        if weight not in ("tokens", "requests"):
            raise InvalidArgument(f"weight must be 'tokens' or 'requests', got {weight!r}")
        for name, value in (("confidence", confidence), ("horizon", horizon), ("window_s", window_s)):
            if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
                raise InvalidType(f"{name} must be a number, got {type(value).__name__}")
            if not 0 < value < float("inf"):
                raise InvalidArgument(f"{name} must be finite and above 0, got {value}")
        self.mode: Mode = mode
        self.mitigation: Mitigation = mitigation or ("exclude" if mode == "paper" else "spread")
        self._constants = float(confidence), float(horizon)
        self._by_tokens = weight == "tokens"
        # batch sizes count the request to come on every candidate, which weighs nothing in a comparison
        self._loads = COLUMNS.index("context_tokens" if self._by_tokens else "batch_size")
        self._on_alarm, self._on_release = on_alarm, on_release
        self._paper = PaperDetector(float(window_s)) if mode == "paper" else None
        self.occupancy = Occupancy(*self._constants)
        """The account of what is in flight, which the router's fused path hands its buffers to."""
        self._alarms: dict[int, Alarm] = {}
        self._raised = 0

    @property
    def alarms_raised(self) -> int:
        """How many alarms there have been."""
        return self._raised

    @property
    def classes(self) -> int:
        """How many classes have a request in flight: entries of the state."""
        return self.occupancy.nodes()

    def alarms(self) -> Iterator[Alarm]:
        """Iterate over the alarms in force, the oldest first."""
        return iter(tuple(self._alarms.values()))

    def judge(self, columns: Columns) -> "tuple[NDArray[np.bool_], Alarm] | None":
        """Return the mask of candidates to keep and the alarm that asks for it, None without one.

        Changes nothing. At least one candidate is kept. O(blocks + log(blocks) * instances).
        """
        if self._paper is not None:
            found = self._paper.examine(columns)
        else:
            found = self.occupancy.examine(columns.request.keys, columns.table, self._loads)
        if found is None:
            return None
        alarm = self._alarms.get(found[1]) or self._alarm(columns, found)
        return self._mask(columns, columns.matched_blocks >= found[0]), alarm

    def dispatch(self, columns: Columns, request_id: Hashable, position: int) -> None:
        """Count a request in that goes to the candidate at ``position`` of ``columns``; start and end alarms.

        Raises DuplicateRequest: it is in flight already.
        """
        if self._paper is not None:
            self._tell(columns, self._paper.dispatch(columns))
            return
        request = columns.request
        weight = float(request.prompt_tokens) if self._by_tokens else 1.0
        told = self.occupancy.dispatch(request_id, request.keys, columns.table, self._loads, weight, position)
        if told is not None:
            self._tell(columns, told)

    def first_token(self, request_id: Hashable) -> None:
        """Hear that a request's prefix is computed."""
        self.occupancy.first_token(request_id)

    def end(self, request_id: Hashable) -> None:
        """Count a request out. One that was never counted in is ignored."""
        ended = self.occupancy.end(request_id)
        if ended:
            self._release(ended)

    def _tell(self, columns: Columns, told: tuple[Found | None, Ended]) -> None:
        found, ended = told
        self._release(ended)
        if found is not None and found[1] not in self._alarms:
            alarm = self._alarm(columns, found)
            self._alarms[alarm.class_hash] = alarm
            self._raised += 1
            if self._on_alarm is not None:
                self._on_alarm(alarm)

    def native_form(self) -> tuple[float, float, str, bool] | None:
        """Return what a replay needs to keep the account itself: constants, mitigation, whether tokens weigh.

        None if only this object can: mode paper, callbacks, or requests in flight.
        """
        if self._paper is not None or self._on_alarm or self._on_release or self.occupancy.load > 0:
            return None
        return *self._constants, self.mitigation, self._by_tokens

    def count_alarms(self, raised: int) -> None:
        """Add alarms of an account that a replay has kept for this detector."""
        self._raised += raised

    def _release(self, hashes: Ended) -> None:
        for key in hashes:
            alarm = self._alarms.pop(key)
            if self._on_release is not None:
                self._on_release(alarm)

    def _alarm(self, columns: Columns, found: Found) -> Alarm:
        depth, key, load, holders = found
        total = 1.0 if self._paper is not None else self.occupancy.load
        share = load / total
        of = "arrivals in the window" if self._paper is not None else "load in flight"
        return Alarm(
            class_hash=key,
            class_blocks=depth,
            share_ratio=share,
            holders=holders,
            instances=len(columns),
            since_decision=columns.decision,
            since_s=columns.now,
            mitigation=self.mitigation,
            evidence=f"{share:.1%} of {of}, held by {holders} of {len(columns)} instances",
        )

    def _mask(self, columns: Columns, held: NDArray[np.bool_]) -> NDArray[np.bool_]:
        batch = columns.batch_size
        if self.mitigation == "exclude":
            return ~held
        if self.mitigation == "load_only":
            fewest: NDArray[np.bool_] = batch == batch.min()
            return fewest
        # a holder at the mean or below stays: replicas appear only as fast as holders are overloaded
        crowded: NDArray[np.bool_] = batch * len(columns) > batch.sum()
        return ~(held & crowded)
