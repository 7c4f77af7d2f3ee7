"""The router that stands in the actor of several processes, without Ray."""

import numpy as np
import pytest

from mulsched.adapters._shared_router import SharedRouter

KEYS = np.arange(1, 9, dtype=np.uint64)
PROMPT = (KEYS, len(KEYS) * 64)
NAMES = ["r0", "r1", "r2", "r3"]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def emptied():
    return []


@pytest.fixture
def shared(clock, emptied):
    return SharedRouter(
        clock,
        lambda: emptied.append(clock.now),
        expire_after_s=100,
        cache_tokens=10_000,
        prefill_tokens_per_s=1e9,
    )


def loads(shared):
    router = shared.bodies.lifecycle.router
    return {name: sum(router.load(name)[key] for key in ("running", "waiting")) for name in router.instances}


def test_replicas_that_a_process_offers_are_known_from_then_on(shared):
    shared.reserve(PROMPT, "a1", NAMES[:2])
    shared.reserve(PROMPT, "b1", NAMES[1:])
    assert sorted(loads(shared)) == NAMES


def test_requests_of_different_processes_spread_over_the_replicas(shared):
    chosen = [shared.reserve(PROMPT, f"{process}{turn}", NAMES) for turn in range(2) for process in "ab"]
    assert sorted(chosen) == NAMES


def test_ends_that_come_with_a_reservation_count_before_it(shared):
    holder = shared.reserve(PROMPT, "a1", NAMES)
    assert shared.reserve(PROMPT, "b1", NAMES, [("finish", "a1", holder)]) == holder
    assert sum(loads(shared).values()) == 1


def test_a_request_that_went_elsewhere_moves_there(shared):
    chosen = shared.reserve(PROMPT, "a1", NAMES)
    other = next(name for name in NAMES if name != chosen)
    shared.reserve(PROMPT, "a1", [other])
    assert {name: load for name, load in loads(shared).items() if load} == {other: 1}


def test_a_replica_that_one_process_saw_die_is_gone_with_the_bookings_of_all(shared):
    chosen = shared.reserve(PROMPT, "a1", NAMES)
    shared.reserve(PROMPT, "b1", [chosen])
    shared.forget([chosen])
    assert chosen not in loads(shared)
    assert sum(loads(shared).values()) == 0


def test_a_replica_that_is_offered_again_is_back_without_its_cache(shared):
    chosen = shared.reserve(PROMPT, "a1", NAMES)
    shared.end([("finish", "a1", chosen)])
    shared.forget([chosen])
    shared.reserve((KEYS + np.uint64(100), PROMPT[1]), "b1", NAMES)
    assert sorted(loads(shared)) == NAMES
    assert (
        shared.bodies.lifecycle.router.select_keys(
            KEYS, prompt_tokens=PROMPT[1], candidates=[chosen]
        ).hit_tokens
        == 0
    )


def test_bookings_of_a_process_that_died_expire(shared, clock):
    shared.reserve(PROMPT, "dead", NAMES)
    clock.now = 101.0
    shared.reserve(PROMPT, "b1", NAMES)
    assert sum(loads(shared).values()) == 1


def test_replicas_that_no_process_offers_any_more_expire(shared, clock):
    shared.reserve(PROMPT, "a1", NAMES)
    clock.now = 101.0
    shared.reserve(PROMPT, "b1", NAMES[:1])
    assert list(loads(shared)) == NAMES[:1]


def test_the_owner_is_told_when_the_last_replica_is_gone(shared, clock, emptied):
    shared.reserve(PROMPT, "a1", NAMES)
    shared.forget(NAMES[1:])
    assert emptied == []
    shared.forget(NAMES[:1])
    assert emptied == [clock.now]
