"""What a replay runs under and what it brings: the seam between its twins."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mulsched.policies import Policy, Ties
from mulsched.replay.profile import Profile
from mulsched.router import InFlight

__all__ = ["Counts", "Records", "ReplayOptions"]


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """Checked arguments of :func:`mulsched.replay.replay`.

    ``policies`` and ``ties`` have one entry per pool: the only one, or prefill and decode.
    ``prefill_instances`` is 0 where every instance does both.
    """

    profile: Profile
    kv_blocks: int
    policies: tuple[Policy, ...]
    ties: tuple[Ties, ...]
    prefill_instances: int
    decode_instances: int
    closed: bool
    predicted: bool
    in_flight: InFlight
    seed: int
    state_delay_s: float
    event_loss_ratio: float
    transfer_s_per_token: float


@dataclass(frozen=True, slots=True, eq=False)
class Records:
    """Columns that a replay fills, one entry per request."""

    arrival_s: NDArray[np.float64]
    first_token_s: NDArray[np.float64]
    finish_s: NDArray[np.float64]
    instance: NDArray[np.int64]
    decode_instance: NDArray[np.int64]
    cached_tokens: NDArray[np.int64]
    hit_tokens: NDArray[np.int64]

    @classmethod
    def empty(cls, n: int) -> "Records":
        """Return records of n requests, all zero."""
        return cls(
            arrival_s=np.zeros(n),
            first_token_s=np.zeros(n),
            finish_s=np.zeros(n),
            instance=np.zeros(n, dtype=np.int64),
            decode_instance=np.zeros(n, dtype=np.int64),
            cached_tokens=np.zeros(n, dtype=np.int64),
            hit_tokens=np.zeros(n, dtype=np.int64),
        )


@dataclass(slots=True)
class Counts:
    """What happened in a replay beside its requests.

    ``preemptions``: requests taken off for want of blocks. ``lost_messages``: messages of KV events that
    were lost. ``orphans``: stored blocks that the router could not place, their parent being unknown to it.
    """

    preemptions: int = 0
    lost_messages: int = 0
    orphans: int = 0
