"""The router: instance state in, decisions out."""

import threading
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mulsched import policies
from mulsched._backend import BACKEND
from mulsched.block_keys import (
    DEFAULT_SEED,
    Tokens,
    block_keys,
    engine_hash,
    hash_blocks,
    namespace_seed,
    text_block_keys,
)
from mulsched.decision import Decision
from mulsched.errors import (
    BlockSizeMismatch,
    InvalidArgument,
    InvalidTokens,
    InvalidType,
    NoEligibleInstance,
    UnknownBlock,
)
from mulsched.failure import FailureDetector
from mulsched.in_flight import PrefixesInFlight
from mulsched.indicators import COLUMNS, Columns, fill_columns
from mulsched.load import Booking, LoadTable, check_count, check_now
from mulsched.lower_tiers import LowerTiers, check_cost_ratios
from mulsched.policies import Policy, Ties
from mulsched.policies._policy import is_factory
from mulsched.policies._policy import select as select_composed
from mulsched.prefix_index import PrefixIndex, as_capacity, as_hashes, as_keys
from mulsched.scorers import Custom, Linear, Multiplicative, native_form
from mulsched.types import (
    AFTER_PARENT,
    BlockRemoved,
    BlockStored,
    CacheCleared,
    Event,
    EventRun,
    InstanceRemoved,
    Keys,
    Namespace,
    Request,
    RunApplied,
)

if BACKEND == "native":
    from mulsched._native import FusedScore
    from mulsched._native import pick as pick_fused
    from mulsched._native import select as select_fused

if TYPE_CHECKING:
    from mulsched._native import KvMessage

__all__ = ["InFlight", "Router"]

InFlight = Literal["ignore", "cached"]
"""How prefixes of requests without a first token count: as not cached, or as cached."""

PolicyLike = str | Policy | Callable[[Columns], Any]


def _policy(policy: PolicyLike) -> Policy:
    if isinstance(policy, str):
        return policies.get(policy)
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, Multiplicative | Linear | Custom):
        return Policy(name=repr(policy), score=policy)
    if is_factory(policy):
        raise InvalidType(f"policy must be a Policy, got the factory of one: call it ({policy!r})")
    if callable(policy):
        score = Custom(policy)
        return Policy(name=score.name, score=score)
    raise InvalidType(f"policy must be a name, a Policy or a callable on columns, got {policy!r}")


def _fused(policy: Policy, ties: Ties, seed: int) -> "FusedScore | None":
    """The native form of the policy, if the core can compute it whole."""
    form = native_form(policy.score)
    if BACKEND != "native" or policy.filters or form is None:
        return None
    return FusedScore(*form, ties, seed)


class Router:
    """Decides which instance a request goes to, and keeps the state that decisions are made from.

    ``policy``: a name (see ``mulsched.policies.names()``), a :class:`~mulsched.policies.Policy`, or any
    callable on :class:`~mulsched.indicators.Columns` that returns one float per candidate, lower is better.
    ``ties``: ``"least_recent"``, ``"random"`` (seeded by ``seed``) or ``"first"``; None takes the policy's.
    ``in_flight``: whether prefixes of requests that wait for their first token count as cached where they
    were sent (``"cached"``, which measured best, docs/lifecycle.md) or not (``"ignore"``, as in the authors'
    router, and right for engines without a prefix cache). ``key_seed`` seeds the block keys; one
    that is kept secret keeps tenants from guessing what is cached. ``tier_cost_ratio``: what loading a token
    from a storage tier below the GPU costs relative to computing it, 0 to 1, by medium, such as ``{"CPU":
    0.1}``; tiers that it does not name do not count, by default none, and how to measure it is in
    docs/events.md. ``detector``: leaves instances out while a
    class of requests overloads the holders of its prefix; None takes the policy's, which has none as a rule.

    ``select`` changes nothing; ``route`` selects and books in one atomic step, without which concurrent
    requests choose from the same stale state and herd. Each call takes one lock, so a router may be shared
    between threads.

    Raises InvalidType, InvalidArgument, UnknownPolicy.
    """

    def __init__(
        self,
        *,
        block_size: int = 16,
        policy: PolicyLike = "lmetric",
        ties: Ties | None = None,
        seed: int = 0,
        in_flight: InFlight = "cached",
        key_seed: int = DEFAULT_SEED,
        tier_cost_ratio: Mapping[str, float] | None = None,
        detector: FailureDetector | None = None,
    ) -> None:
        if isinstance(block_size, bool) or not isinstance(block_size, int | np.integer):
            raise InvalidType(f"block_size must be an int, got {type(block_size).__name__}")
        if not 1 <= block_size < 2**63:
            wanted = "at least 1" if block_size < 1 else "below 2**63"
            raise InvalidArgument(f"block_size must be {wanted}, got {block_size}")
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
            raise InvalidType(f"seed must be an int, got {type(seed).__name__}")
        if ties not in (None, "least_recent", "random", "first"):
            raise InvalidArgument(f"ties must be 'least_recent', 'random' or 'first', got {ties!r}")
        if in_flight not in get_args(InFlight):
            raise InvalidArgument(f"in_flight must be 'ignore' or 'cached', got {in_flight!r}")
        namespace_seed(None, key_seed)
        self._block_size = int(block_size)
        self._policy = _policy(policy)
        self._ties: Ties = ties or self._policy.ties
        self._seed = int(seed)
        cost_ratios = check_cost_ratios(tier_cost_ratio)
        # in the order of rows like the index of what is in flight
        self._tiers = LowerTiers(cost_ratios) if cost_ratios else None
        self._media = ("GPU", *cost_ratios)
        self._fused = _fused(self._policy, self._ties, self._seed)
        self._key_seed = int(key_seed)
        if detector is not None and not isinstance(detector, FailureDetector):
            raise InvalidType(f"detector must be a FailureDetector or None, got {detector!r}")
        self._detector = detector if detector is not None else self._policy.detector
        self._occupancy = None if self._detector is None else self._detector.occupancy
        self._index = PrefixIndex()
        self._tree = self._index.backend
        self._in_flight = PrefixesInFlight() if in_flight == "cached" else None
        self._load = LoadTable()
        self._predicted: set[int] = set()  # rows
        self._last_report: dict[str, float] = {}
        self._decision = 0
        self._lock = threading.RLock()
        self._refresh_candidates()

    # -- instances ---------------------------------------------------------------------------------

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self._block_size

    @property
    def policy(self) -> Policy:
        """The policy in use."""
        return self._policy

    @property
    def detector(self) -> FailureDetector | None:
        """The failure detector in use."""
        return self._detector

    @property
    def index(self) -> PrefixIndex:
        """What is known to be cached: for looking, not for changing."""
        return self._index

    @property
    def media(self) -> tuple[str, ...]:
        """The media whose events count: the GPU, and the tiers of ``tier_cost_ratio``, the cheapest first."""
        return self._media

    @property
    def lower_tiers(self) -> dict[str, PrefixIndex]:
        """What is known to be held below the GPU, by medium, the cheapest first: for looking."""
        return {} if self._tiers is None else dict(self._tiers.indexes)

    @property
    def instances(self) -> tuple[str, ...]:
        """All instances, in the order of their rows."""
        return self._names

    def add_instance(self, instance: str, *, cache_blocks: int | None = None) -> None:
        """Add an instance with an empty cache and no load.

        ``cache_blocks``: the size of its KV cache in blocks. With it the cache is *predicted* from what is
        dispatched, in an LRU of that size, until the first engine event from this instance arrives; from
        then on it is *observed* and the predictions are dropped. Without it only events tell.

        Raises DuplicateInstance, InvalidType, InvalidArgument (cache_blocks below 1).
        """
        if cache_blocks is not None:
            cache_blocks = as_capacity(cache_blocks, "cache_blocks")
        with self._lock:
            row = self._index.add_instance(
                instance, capacity_blocks=cache_blocks, engine_hashes=cache_blocks is None
            )
            if cache_blocks is not None:
                self._predicted.add(row)
            if self._in_flight is not None:
                self._in_flight.add_row(row)
            if self._tiers is not None:
                self._tiers.add_instance(instance)
            self._load.add_row(row)
            self._refresh_candidates()

    def remove_instance(self, instance: str) -> list[Hashable]:
        """Forget an instance; return the ids of the requests that were booked on it.

        Their bookings are gone: ``finish`` of one raises UnknownRequest. Raises UnknownInstance.
        """
        with self._lock:
            row = self._index.row(instance)
            lost = self._load.remove_row(row)
            if self._detector is not None:
                for request_id in lost:
                    self._detector.end(request_id)
            self._index.remove_instance(instance)
            if self._in_flight is not None:
                self._in_flight.remove_row(row)
            if self._tiers is not None:
                self._tiers.remove_instance(instance)
            self._predicted.discard(row)
            self._last_report.pop(instance, None)
            self._refresh_candidates()
            return lost

    def _refresh_candidates(self) -> None:
        self._names = self._index.instances
        self._rows = np.array([self._index.row(name) for name in self._names], dtype=np.int64)
        self._rows.setflags(write=False)  # every decision's columns have them

    # -- decisions ---------------------------------------------------------------------------------

    def select(
        self,
        tokens: Tokens,
        *,
        candidates: Iterable[str] | None = None,
        session: str | None = None,
        namespace: Namespace | None = None,
        now: float | None = None,
    ) -> Decision:
        """Return the decision for a prompt of token ids without changing any state.

        ``candidates``: only these instances; None for all. ``session``: for policies that keep sessions
        together. ``now``: seconds on the caller's clock, for policies with a time window.
        O(tokens + W * nodes on the path), W instances.

        Raises InvalidTokens, InvalidType, UnknownInstance, NoEligibleInstance, NonFiniteScore, and
        InvalidArgument or InvalidType where a score is not one number for each candidate.
        """
        keys, prompt_tokens = self._token_keys(tokens, namespace)
        with self._lock:
            return self._decide(keys, prompt_tokens, candidates, session, None, now)

    def select_text(
        self,
        text: str,
        *,
        candidates: Iterable[str] | None = None,
        session: str | None = None,
        namespace: Namespace | None = None,
        now: float | None = None,
    ) -> Decision:
        """Do what ``select`` does for a prompt of text, for routers without a tokenizer.

        Blocks are ``block_size`` characters and all token counts are then characters: a product does not
        mind the unit. Give one router either only tokens or only text.
        """
        keys, prompt_chars = self._text_keys(text, namespace)
        with self._lock:
            return self._decide(keys, prompt_chars, candidates, session, None, now)

    def select_keys(
        self,
        keys: Keys,
        *,
        prompt_tokens: int,
        candidates: Iterable[str] | None = None,
        session: str | None = None,
        now: float | None = None,
    ) -> Decision:
        """Do what ``select`` does for a prompt whose block keys are known, ``prompt_tokens`` long."""
        path = self._check_path(keys, prompt_tokens)
        with self._lock:
            return self._decide(path, int(prompt_tokens), candidates, session, None, now)

    def route(
        self,
        tokens: Tokens,
        *,
        request_id: Hashable,
        candidates: Iterable[str] | None = None,
        session: str | None = None,
        namespace: Namespace | None = None,
        now: float | None = None,
    ) -> Decision:
        """Select an instance for a prompt of token ids and book the request on it, in one atomic step.

        Arguments and errors as ``select``; also DuplicateRequest. ``now`` is kept for ``expire``.
        """
        keys, prompt_tokens = self._token_keys(tokens, namespace)
        with self._lock:
            return self._route(keys, prompt_tokens, candidates, session, request_id, now)

    def route_text(
        self,
        text: str,
        *,
        request_id: Hashable,
        candidates: Iterable[str] | None = None,
        session: str | None = None,
        namespace: Namespace | None = None,
        now: float | None = None,
    ) -> Decision:
        """Do what ``route`` does for a prompt of text; see ``select_text``."""
        keys, prompt_chars = self._text_keys(text, namespace)
        with self._lock:
            return self._route(keys, prompt_chars, candidates, session, request_id, now)

    def route_keys(
        self,
        keys: Keys,
        *,
        prompt_tokens: int,
        request_id: Hashable,
        candidates: Iterable[str] | None = None,
        session: str | None = None,
        now: float | None = None,
    ) -> Decision:
        """Do what ``route`` does for a prompt whose block keys are known; see ``select_keys``."""
        path = self._check_path(keys, prompt_tokens)
        with self._lock:
            return self._route(path, int(prompt_tokens), candidates, session, request_id, now)

    def dispatch(self, decision: Decision, *, request_id: Hashable, now: float | None = None) -> None:
        """Book a request on the instance of a decision that ``select`` made.

        Prefer ``route``: between ``select`` and ``dispatch`` other requests may choose the same instance.
        Raises DuplicateRequest, UnknownInstance (removed meanwhile), InvalidType, InvalidArgument.
        """
        check_now(now)
        if not isinstance(decision, Decision):
            raise InvalidType(f"decision must be a Decision, got {type(decision).__name__}")
        with self._lock:
            row = self._index.row(decision.instance)
            self._load.check_new(request_id)
            self._book(decision, row, request_id, now)

    def _token_keys(self, tokens: Tokens, namespace: Namespace | None) -> tuple[Keys, int]:
        if namespace is None:  # as block_keys, whose other arguments were checked once
            keys = hash_blocks(tokens, self._block_size, self._key_seed)
        else:
            keys = block_keys(tokens, self._block_size, namespace=namespace, seed=self._key_seed)
        return keys, self._check_prompt(len(tokens), "token")

    def _text_keys(self, text: str, namespace: Namespace | None) -> tuple[Keys, int]:
        keys = text_block_keys(text, self._block_size, namespace=namespace, seed=self._key_seed)
        return keys, self._check_prompt(len(text), "character")

    @staticmethod
    def _check_prompt(length: int, unit: str) -> int:
        if length == 0:
            raise InvalidTokens(f"a prompt must have at least one {unit}, got none")
        return length

    def _check_path(self, keys: Keys, prompt_tokens: int) -> Keys:
        path = as_keys(keys).copy()  # a booking keeps them; the caller may use the array again
        check_count(prompt_tokens, "prompt_tokens", least=1)
        if len(path) != prompt_tokens // self._block_size:
            raise InvalidArgument(
                f"{prompt_tokens} prompt tokens have {prompt_tokens // self._block_size} whole blocks of "
                f"{self._block_size}, got {len(path)} keys"
            )
        return path

    def _candidates(self, candidates: Iterable[str] | None) -> tuple[tuple[str, ...], NDArray[np.int64]]:
        if candidates is None:
            if not self._names:
                raise NoEligibleInstance("there are no instances: add one with add_instance()")
            return self._names, self._rows
        if isinstance(candidates, str | bytes) or not isinstance(candidates, Iterable):
            raise InvalidType(f"candidates must be an iterable of instances, got {type(candidates).__name__}")
        rows = {self._index.row(name): name for name in candidates}
        if not rows:
            raise NoEligibleInstance("candidates is empty")
        ordered = sorted(rows)
        return tuple(rows[row] for row in ordered), np.array(ordered, dtype=np.int64)

    def _decide(
        self,
        keys: Keys,
        prompt_tokens: int,
        candidates: Iterable[str] | None,
        session: str | None,
        request_id: Hashable,
        now: float | None,
    ) -> Decision:
        check_now(now)
        if session is not None and not isinstance(session, str):
            raise InvalidType(f"session must be a str or None, got {type(session).__name__}")
        names, rows = self._candidates(candidates)
        columns = Columns(
            Request(prompt_tokens, keys, request_id, session),
            names,
            rows,
            np.empty((len(COLUMNS), len(names)), dtype=np.int64),
            self._decision,
            self._block_size,
            seed=self._seed,
            now=now,
        )
        position, scores = self._pick(columns)
        judged = None if self._detector is None else self._detector.judge(columns)
        alarm = None
        if judged is not None:
            keep, alarm = judged
            position, scores = select_composed(self._policy, columns, self._ties, keep=keep)
        return Decision(
            names[position], position, columns, scores, self._policy.name, self._ties, request_id, alarm
        )

    def _pick(self, columns: Columns) -> tuple[int, NDArray[np.float64]]:
        coming = None if self._in_flight is None else self._in_flight.tree
        request, load = columns.request, self._load.table
        if self._fused is not None and self._tiers is None:
            scores = np.empty(len(columns.instances))
            position = select_fused(
                self._tree, coming, request.keys, request.prompt_tokens, self._block_size, columns.rows, load,
                columns.table, scores, self._fused, self._decision, self._occupancy,
            )  # fmt: skip
            if position >= 0:
                columns.table.setflags(write=False)
                return position, scores
            # a score that is not finite: the composed path says which
        fill_columns(
            self._tree, coming, request.keys, request.prompt_tokens, self._block_size, columns.rows, load,
            columns.table,
        )  # fmt: skip
        if self._tiers is not None:
            self._tiers.charge(columns)
        # a score that computes in place would change what is booked
        columns.table.setflags(write=False)
        if self._fused is not None:
            scores = np.empty(len(columns.instances))
            position = pick_fused(
                request.prompt_tokens, columns.rows, columns.table, scores, self._fused, self._decision
            )
            if position >= 0:
                return position, scores
        return select_composed(self._policy, columns, self._ties)

    def _route(
        self,
        keys: Keys,
        prompt_tokens: int,
        candidates: Iterable[str] | None,
        session: str | None,
        request_id: Hashable,
        now: float | None,
    ) -> Decision:
        self._load.check_new(request_id)
        decision = self._decide(keys, prompt_tokens, candidates, session, request_id, now)
        self._book(decision, decision.columns.rows.item(decision.position), request_id, now)
        return decision

    def _book(self, decision: Decision, row: int, request_id: Hashable, now: float | None) -> None:
        request = decision.columns.request
        booking = Booking(row, decision.new_prefill_tokens, request.prompt_tokens, request.keys, now)
        if self._policy.on_dispatch is not None:  # first: if it raises, nothing is booked
            self._policy.on_dispatch(decision.columns, decision.position)
        self._load.dispatch(request_id, booking, decision=self._decision)
        self._decision += 1
        if self._in_flight is not None:
            self._in_flight.dispatch(booking)
        if self._detector is not None:  # last: if a callback raises, the request is booked
            self._detector.dispatch(decision.columns, request_id, decision.position)

    # -- the life of a request ---------------------------------------------------------------------

    def first_token(self, request_id: Hashable) -> None:
        """Record that a request's prefill is done: its new tokens leave the queue, its prefix is cached.

        Raises UnknownRequest (never dispatched, or ended), LifecycleError (second time).
        """
        with self._lock:
            booking = self._load.first_token(request_id)
            self._arrive(booking)
            self._predict(booking)
            if self._detector is not None:
                self._detector.first_token(request_id)

    def finish(self, request_id: Hashable) -> None:
        """Record that a request is done. Without a ``first_token`` before, that is implied.

        A predicted cache counts the prefix as used once more: engines order eviction by the release of
        blocks. Raises UnknownRequest (never dispatched, or ended).
        """
        with self._lock:
            booking = self._end(request_id)
            if booking.waiting:
                self._arrive(booking)
            self._predict(booking)

    def cancel(self, request_id: Hashable) -> None:
        """Take a request off at any stage. One that still waited leaves nothing cached.

        Requests that wait there and counted on its prefix are booked for computing it, the earliest first.
        Raises UnknownRequest (never dispatched, or ended).
        """
        with self._lock:
            booking = self._end(request_id)
            if booking.waiting:
                self._bequeath(booking)
                self._arrive(booking)
            else:
                self._predict(booking)

    def expire(self, *, now: float, older_than_s: float) -> list[Hashable]:
        """Cancel every request dispatched more than ``older_than_s`` before ``now``; return their ids.

        Requests dispatched without a time never expire. O(requests booked).
        Raises InvalidType, InvalidArgument.
        """
        with self._lock:
            old = self._load.older_than(now=now, older_than_s=older_than_s)
            for request_id in old:
                self.cancel(request_id)
            return old

    def _end(self, request_id: Hashable) -> Booking:
        booking = self._load.end(request_id)
        if self._detector is not None:
            self._detector.end(request_id)
        return booking

    def _predict(self, booking: Booking) -> None:
        if booking.row in self._predicted:
            self._tree.store(booking.row, booking.keys)

    def _arrive(self, booking: Booking) -> None:
        if self._in_flight is not None:
            self._in_flight.arrive(booking)

    def _bequeath(self, booking: Booking) -> None:
        """Book what a cancelled request will not compute on those that counted on it."""
        if self._in_flight is not None:
            cached = int(self._index.match(booking.keys)[booking.row])
            for heir, tokens in self._in_flight.heirs(booking, cached, self._block_size):
                self._load.add_prefill(heir, tokens)

    # -- state from outside ------------------------------------------------------------------------

    def report_load(
        self,
        instance: str,
        *,
        running: int | None = None,
        waiting: int | None = None,
        queued_prefill_tokens: int | None = None,
        now: float | None = None,
    ) -> bool:
        """Reconcile an instance's bookings with its own metrics; the rule is in :mod:`mulsched.load`.

        Returns whether the report was used: one with an earlier ``now`` than the last is not.
        Raises UnknownInstance, InvalidType, InvalidArgument.
        """
        check_now(now)
        with self._lock:
            row = self._index.row(instance)
            last = self._last_report.get(instance)
            if now is not None and last is not None and now < last:
                return False
            self._load.report(
                row, running=running, waiting=waiting, queued_prefill_tokens=queued_prefill_tokens
            )
            if now is not None:
                self._last_report[instance] = now
            return True

    def load(self, instance: str) -> dict[str, int]:
        """Return an instance's load by column, bookings and foreign load together. Raises UnknownInstance."""
        with self._lock:
            return self._load.load(self._index.row(instance))

    def apply(self, event: Event) -> list[Hashable]:
        """Apply an engine's event; return the ids of requests lost with an instance, else nothing.

        The first event of the GPU from an instance with a predicted cache makes that cache observed. Events
        of media that do not count (see ``media``) change nothing.

        Raises UnknownInstance, UnknownBlock (parent not held there; nothing is stored),
        BlockSizeMismatch, InvalidTokens, InvalidArgument, InvalidType.
        """
        with self._lock:
            if isinstance(event, BlockStored | BlockRemoved) and event.medium not in self._media:
                self._index.row(event.instance)
            elif isinstance(event, BlockStored):
                self._apply_stored(event)
            elif isinstance(event, BlockRemoved):
                hashes = as_hashes(event.block_hashes)
                if event.medium == "GPU":
                    self._observe(event.instance)
                    self._index.remove(event.instance, hashes)
                else:
                    assert self._tiers is not None
                    self._tiers.remove(event.medium, event.instance, hashes)
            elif isinstance(event, CacheCleared):
                self._observe(event.instance)
                self._index.clear(event.instance)
                if self._tiers is not None:
                    self._tiers.clear(event.instance)
            elif isinstance(event, InstanceRemoved):
                return self.remove_instance(event.instance)
            else:
                raise InvalidType(f"an engine event expected, got {type(event).__name__}")
            return []

    def apply_run(self, run: EventRun) -> RunApplied:
        """Apply a run's events in order, as ``apply`` would; return what became of them.

        A store whose parent is not held there is counted and not raised, and those after it are applied.
        Raises UnknownInstance, BlockSizeMismatch, InvalidArgument (a medium other than the GPU, a cache salt,
        arrays that do not fit each other), InvalidType; nothing is changed then.
        """
        with self._lock:
            row = self._index.row(run.instance)
            if run.medium != "GPU" or (run.namespace is not None and run.namespace.cache_salt is not None):
                raise InvalidArgument(
                    f"a run on the GPU without a cache salt expected, got {run.medium!r}, {run.namespace!r}"
                )
            n_tokens, size = len(run.token_ids), self._block_size
            if n_tokens > 0 and run.block_size != size:
                raise self._block_size_mismatch(run)
            if n_tokens % size != 0:
                raise InvalidArgument(f"whole blocks of {size} token_ids expected, got {n_tokens}")
            keys = block_keys(run.token_ids, size, namespace=run.namespace, seed=self._key_seed)
            if row in self._predicted:
                if (run.table[:, 0] == AFTER_PARENT).all():  # such stores alone say nothing of the cache
                    return RunApplied(0, len(run), 0, 0)
                self._observe(run.instance)
            return self._index.apply_run(
                run.instance, run.table, run.block_hashes, keys, counts_copies=run.counts_copies
            )

    def apply_message(
        self, instance: str, message: "KvMessage", *, begin: int, counts_copies: bool
    ) -> tuple[int, tuple[int, int, int, int]]:
        """Apply a message's runs from ``begin`` on, each as ``apply_run`` would, and make no arrays of them.

        Stops at a run that the core leaves to ``apply_run``: on another medium than the GPU, of blocks of
        another size, or of an instance that is not there or whose cache is predicted. Returns where it
        stopped, and what became of the runs before, as a ``RunApplied``.
        """
        with self._lock:
            return self._index.apply_message(
                instance, message, begin, self._block_size, self._key_seed, counts_copies
            )

    def _block_size_mismatch(self, event: BlockStored | EventRun) -> BlockSizeMismatch:
        return BlockSizeMismatch(
            f"instance {event.instance!r} stores blocks of {event.block_size!r} tokens, "
            f"the router's are {self._block_size}"
        )

    def _apply_stored(self, event: BlockStored) -> None:
        row = self._index.row(event.instance)
        if event.block_size != self._block_size:
            raise self._block_size_mismatch(event)
        hashes = as_hashes(event.block_hashes)
        keys = self._event_keys(event, len(hashes))
        if event.parent_hash is not None:
            engine_hash(event.parent_hash)
            if row in self._predicted and event.medium == "GPU":
                raise UnknownBlock(
                    f"instance {event.instance!r} holds no block with engine hash {event.parent_hash!r}"
                )
        if event.medium != "GPU":
            assert self._tiers is not None
            self._tiers.store(
                event.medium,
                event.instance,
                keys,
                parent=event.parent_hash,
                engine_hashes=hashes,
                counts_copies=event.counts_copies,
                gpu=self._index,
            )
            return
        self._observe(event.instance)
        self._index.store(
            event.instance,
            keys,
            parent=event.parent_hash,
            engine_hashes=hashes,
            counts_copies=event.counts_copies,
        )

    def _event_keys(self, event: BlockStored, n_blocks: int) -> Keys:
        if (event.token_ids is None) == (event.block_keys is None):
            raise InvalidArgument("a BlockStored event needs either token_ids or block_keys")
        if event.token_ids is None:
            keys = as_keys(event.block_keys, "block_keys")
            if len(keys) != n_blocks:
                raise InvalidArgument(f"{n_blocks} block_hashes need as many keys, got {len(keys)}")
            return keys
        namespace = event.namespace
        if event.parent_hash is not None and namespace is not None and namespace.cache_salt is not None:
            namespace = replace(namespace, cache_salt=None)  # it is in the key of the prompt's first block
        keys = block_keys(
            event.token_ids,
            self._block_size,
            namespace=namespace,
            seed=self._key_seed,
            extra_keys=event.extra_keys,
        )
        if len(event.token_ids) != n_blocks * self._block_size:
            raise InvalidArgument(
                f"{n_blocks} blocks of {self._block_size} need {n_blocks * self._block_size} token_ids, "
                f"got {len(event.token_ids)}"
            )
        return keys

    def _observe(self, instance: str) -> None:
        """Switch an instance from predicted to observed, once."""
        row = self._index.row(instance)
        if row in self._predicted:
            self._index.reset(instance, engine_hashes=True)
            self._predicted.discard(row)
