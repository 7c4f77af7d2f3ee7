"""Which messages of one publisher to apply, and what to ask it for again. No sockets, no clock.

Publishers number their messages from 0 and keep the latest for replay. An event may be applied only once
and only after all before it, so the tracker delivers an unbroken run of the messages of one life of the
engine, and says ``Clear`` before it begins another run. What the run began with decides whether the
cache is known:

- *known*: the run began with message 0, or the engine has cleared its cache since. The index then equals
  the cache.
- *unknown*: messages before the run were lost. What the index then holds is cached, and more may be.

An engine that restarts counts from 0 again and may have come past the expected number before the first
message arrives, so a number says nothing by itself. With a replay socket every gap, every doubtful number
and every new connection is settled by asking for the last applied message again: if it differs or is gone,
the engine is another. Without one, a lower number is taken for a restart, and a restart that happens to go
on with the expected number cannot be seen.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import xxhash

from mulsched.errors import LifecycleError

__all__ = ["Action", "Clear", "Deliver", "Replay", "SequenceTracker", "State"]

State = Literal["attaching", "replaying", "known", "unknown"]

# Signed, so that no number is the end mark of a replay, -1.
_MAX_SEQUENCE = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Deliver:
    """Apply this message, the next of its run."""

    sequence: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Clear:
    """Forget what is known of the cache: another run begins, or one is broken."""

    reason: Literal["attached", "gap", "restart", "unverified", "unreadable"]


@dataclass(frozen=True, slots=True)
class Replay:
    """Ask the replay socket for all messages from ``start`` on, and give up a replay that is going on."""

    start: int


Action = Clear | Deliver | Replay


class SequenceTracker:
    """Follows one publisher.

    Each call returns what to do, in order: at most one ``Deliver``, which then is the last. After a
    ``Replay``, only ``replayed``, ``replay_ended`` and ``replay_failed`` may be called until it is over.
    ``can_replay``: whether there is a replay socket. ``window``: how many of the latest messages of the run
    are remembered, to tell duplicates from another life of the engine; twice what vLLM and SGLang keep for
    replay by default. O(1) per call, O(window) memory.

    ``counts`` has ``duplicates``, ``gaps``, ``lost_messages`` (never seen, at least), ``restarts``,
    ``replays``, ``replays_failed``, ``clears``, ``invalid_sequences``.
    """

    def __init__(self, *, can_replay: bool, window: int = 20_000) -> None:
        self.counts: Counter[str] = Counter()
        self._can_replay = can_replay
        self._window = window
        self._expected: int | None = None  # the number to apply next; None: whatever comes
        self._complete = False
        self._behind = False  # a replay failed, and nothing has shown since that no message is missing
        self._seen_alive = False
        self._recent: dict[int, int] = {}  # digests of the run's latest messages, oldest first
        self._replaying = False
        self._anchor: int | None = None  # of the replay: the applied message that it must begin with
        self._pending: tuple[int, bytes] | None = None  # the message that showed the gap
        self._progress = False  # of the replay: it has brought something new

    @property
    def state(self) -> State:
        """What is known of the cache: see the module."""
        if self._replaying:
            return "replaying"
        if not self._seen_alive:
            return "attaching"
        return "known" if self._complete and not self._behind else "unknown"

    @property
    def next_sequence(self) -> int | None:
        """The number of the message to apply next, one above the last; None if it may be any."""
        return self._expected

    @property
    def wants_replay(self) -> bool:
        """Whether a replay failed and no message has made up for it since: call ``connected`` again."""
        return self._can_replay and not self._replaying and (self._expected is None or self._behind)

    def connected(self) -> list[Action]:
        """A connection was made, for the first time or again."""
        self._check(replaying=False)
        if not self._can_replay:
            return []
        return self._ask()

    def live(self, sequence: int, payload: bytes) -> list[Action]:
        """A message came that the publisher sent to all."""
        self._check(replaying=False)
        if not self._valid(sequence):
            return []
        self._seen_alive = True
        if self._expected is None:
            self._behind = False
            return self._begin(sequence, "attached", payload)
        if sequence == self._expected:
            self._behind = False
            return [self._deliver(sequence, payload)]
        if sequence < self._expected:
            return self._live_again(sequence, payload)
        self.counts["gaps"] += 1
        if self._can_replay:
            return self._ask(pending=(sequence, payload))
        return self._lose_up_to(sequence, payload)

    def replayed(self, sequence: int, payload: bytes) -> list[Action]:
        """A message came in answer to a ``Replay``."""
        self._check(replaying=True)
        if not self._valid(sequence):
            return []
        self._seen_alive = True
        if self._anchor is not None:
            if sequence < self._anchor:
                return []
            anchor, self._anchor = self._anchor, None
            if sequence == anchor:
                return [] if self._recent[anchor] == _digest(payload) else self._restart()
            # too old to be kept: nothing shows that these follow what was applied
            return self._lose_up_to(sequence, payload)
        if self._expected is None:
            return self._begin(sequence, "attached", payload)
        if sequence < self._expected:
            return []
        if sequence > self._expected:
            # a ROUTER drops what it cannot send fast enough: as long as it gets on, ask for the rest
            return self._ask(self._pending) if self._progress else self._lose_up_to(sequence, payload)
        return [self._deliver(sequence, payload)]

    def replay_ended(self) -> list[Action]:
        """The publisher said that a replay is complete."""
        self._check(replaying=True)
        self._replaying = self._behind = False
        self._seen_alive = True
        if self._anchor is not None:  # it has nothing as late as what was applied
            return self._restart()
        if self._expected is None:  # it has published nothing
            return self._begin(0, "attached")
        return self._resume()

    def replay_failed(self) -> list[Action]:
        """A replay came to no end in time, or could not be read."""
        self._check(replaying=True)
        self.counts["replays_failed"] += 1
        self._replaying, self._behind = False, True
        if self._progress:
            return self._ask(self._pending)
        if self._anchor is None and self._recent:
            return self._resume()
        # nothing shows whose messages were applied, or none were
        verified, self._anchor, self._expected, self._complete = self._anchor is None, None, None, False
        self._recent.clear()
        if self._pending is not None:
            return self._resume()
        if verified:
            return []
        self.counts["clears"] += 1
        return [Clear("unverified")]

    def emptied(self) -> None:
        """The message delivered last said that the engine's cache is empty: it is known again."""
        self._complete = True

    def unreadable(self) -> list[Action]:
        """The message delivered last could not be read, so that blocks may be gone that it removed."""
        self._complete = False
        self.counts["clears"] += 1
        return [Clear("unreadable")]

    # -- parts -------------------------------------------------------------------------------------

    def _check(self, *, replaying: bool) -> None:
        if self._replaying != replaying:
            raise LifecycleError(f"a replay is {'not ' if replaying else ''}going on")

    def _valid(self, sequence: int) -> bool:
        if 0 <= sequence <= _MAX_SEQUENCE:
            return True
        self.counts["invalid_sequences"] += 1
        return False

    def _deliver(self, sequence: int, payload: bytes) -> Deliver:
        self._recent[sequence] = _digest(payload)
        if len(self._recent) > self._window:
            del self._recent[next(iter(self._recent))]
        self._expected = sequence + 1
        self._progress = True
        return Deliver(sequence, payload)

    def _begin(
        self,
        sequence: int,
        reason: Literal["attached", "gap", "restart"],
        payload: bytes | None = None,
    ) -> list[Action]:
        """Begin a run with this message, or, without one, before it."""
        self._recent.clear()
        self._expected = sequence
        self._complete = sequence == 0
        self.counts["clears"] += 1
        return [Clear(reason)] if payload is None else [Clear(reason), self._deliver(sequence, payload)]

    def _lose_up_to(self, sequence: int, payload: bytes) -> list[Action]:
        assert self._expected is not None
        self.counts["lost_messages"] += sequence - self._expected
        return self._begin(sequence, "gap", payload)

    def _live_again(self, sequence: int, payload: bytes) -> list[Action]:
        """A live message has a number below the expected."""
        applied = self._recent.get(sequence)
        if applied == _digest(payload):
            self.counts["duplicates"] += 1
            return []
        if not self._can_replay:
            self.counts["restarts"] += 1
            return self._begin(sequence, "restart", payload)
        # another message under an applied number, or one too old to remember
        return self._ask() if applied is None else self._restart()

    def _ask(self, pending: tuple[int, bytes] | None = None) -> list[Action]:
        self.counts["replays"] += 1
        self._replaying, self._pending, self._progress = True, pending, False
        if self._recent:
            assert self._expected is not None
            self._anchor = self._expected - 1
            return [Replay(self._anchor)]
        return [Replay(self._expected or 0)]

    def _restart(self) -> list[Action]:
        """The engine is another: take what it has published from its beginning."""
        self.counts["restarts"] += 1
        self._anchor = None
        return [*self._begin(0, "restart"), *self._ask(self._pending)]

    def _resume(self) -> list[Action]:
        """After a replay, go on with the message that made it necessary."""
        pending, self._pending = self._pending, None
        if pending is None:
            return []
        sequence, payload = pending
        self._behind = False  # nothing is later than what came live
        if self._expected is None:
            return self._begin(sequence, "gap", payload)
        if sequence > self._expected:
            return self._lose_up_to(sequence, payload)
        if self._recent.get(sequence) == _digest(payload):
            return []  # the replay had it
        return self.live(sequence, payload)


def _digest(payload: bytes) -> int:
    return xxhash.xxh3_64_intdigest(payload)
