"""The tracker against publishers that lose, repeat, reorder, forget and restart."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mulsched import LifecycleError
from mulsched.events.sequence import Clear, Deliver, Replay, SequenceTracker


def message(number, life="a"):
    return f"{life}{number}".encode()


def attached(*numbers, can_replay=False, life="a"):
    """A tracker that has applied these messages."""
    tracker = SequenceTracker(can_replay=can_replay)
    if can_replay:
        tracker.connected()
        for number in numbers:
            tracker.replayed(number, message(number, life))
        tracker.replay_ended()
    else:
        for number in numbers:
            tracker.live(number, message(number, life))
    return tracker


# -- attaching ------------------------------------------------------------------------------------------------


def test_a_new_tracker_asks_for_all_that_was_published():
    tracker = SequenceTracker(can_replay=True)
    assert tracker.state == "attaching"
    assert tracker.connected() == [Replay(0)]
    assert tracker.state == "replaying"


def test_a_replay_from_the_first_message_makes_the_cache_known():
    tracker = SequenceTracker(can_replay=True)
    tracker.connected()
    assert tracker.replayed(0, b"x") == [Clear("attached"), Deliver(0, b"x")]
    assert tracker.replayed(1, b"y") == [Deliver(1, b"y")]
    assert tracker.replay_ended() == []
    assert tracker.state == "known"


def test_a_replay_whose_beginning_is_gone_leaves_the_cache_unknown():
    tracker = attached(7, 8, can_replay=True)
    assert tracker.state == "unknown"
    assert tracker.live(9, b"z") == [Deliver(9, b"z")]


def test_an_engine_that_has_published_nothing_has_a_known_and_empty_cache():
    tracker = SequenceTracker(can_replay=True)
    tracker.connected()
    assert tracker.replay_ended() == [Clear("attached")]
    assert tracker.state == "known"
    assert tracker.live(0, b"x") == [Deliver(0, b"x")]


@pytest.mark.parametrize(("first", "state"), [(0, "known"), (5, "unknown")])
def test_without_replay_the_first_message_decides_what_is_known(first, state):
    tracker = SequenceTracker(can_replay=False)
    assert tracker.connected() == []
    assert tracker.live(first, b"x") == [Clear("attached"), Deliver(first, b"x")]
    assert tracker.state == state


def test_nothing_is_forgotten_before_the_publisher_has_answered():
    tracker = SequenceTracker(can_replay=True)
    tracker.connected()
    assert tracker.replay_failed() == []
    assert tracker.state == "attaching"
    assert tracker.live(3, b"x") == [Clear("attached"), Deliver(3, b"x")]


def test_a_replay_that_failed_is_wanted_again_until_messages_come():
    tracker = SequenceTracker(can_replay=True)
    tracker.connected()
    tracker.replay_failed()
    assert tracker.wants_replay
    tracker.live(0, b"x")
    assert not tracker.wants_replay
    assert not SequenceTracker(can_replay=False).wants_replay


# -- gaps -----------------------------------------------------------------------------------------------------


def test_a_gap_is_filled_by_replay_from_the_last_applied_message():
    tracker = attached(0, 1, can_replay=True)
    assert tracker.live(4, message(4)) == [Replay(1)]
    assert tracker.replayed(1, message(1)) == []
    assert [tracker.replayed(n, message(n)) for n in (2, 3, 4)] == [
        [Deliver(n, message(n))] for n in (2, 3, 4)
    ]
    assert tracker.replay_ended() == []
    assert tracker.state == "known"
    assert tracker.counts["clears"] == 1  # the one of attaching
    assert tracker.counts["duplicates"] == 0  # the message that showed the gap came twice, but not live


def test_the_message_that_showed_the_gap_is_not_lost_if_the_replay_stops_before_it():
    tracker = attached(0, 1, can_replay=True)
    tracker.live(3, message(3))
    tracker.replayed(1, message(1))
    tracker.replayed(2, message(2))
    assert tracker.replay_ended() == [Deliver(3, message(3))]


def test_a_gap_too_old_for_replay_clears_and_carries_on():
    tracker = attached(0, 1, can_replay=True)
    tracker.live(9, message(9))
    assert tracker.replayed(6, message(6)) == [Clear("gap"), Deliver(6, message(6))]
    assert tracker.counts["lost_messages"] == 4
    tracker.replay_ended()
    assert tracker.state == "unknown"


def test_a_gap_without_replay_clears_and_carries_on():
    tracker = attached(0, 1)
    assert tracker.live(4, b"x") == [Clear("gap"), Deliver(4, b"x")]
    assert (tracker.state, tracker.counts["gaps"], tracker.counts["lost_messages"]) == ("unknown", 1, 2)


def test_a_replay_that_fails_before_it_says_anything_clears():
    tracker = attached(0, 1, can_replay=True)
    tracker.live(4, b"x")
    assert tracker.replay_failed() == [Clear("gap"), Deliver(4, b"x")]
    assert tracker.state == "unknown"


def test_a_replay_that_breaks_off_is_asked_to_go_on_as_long_as_it_gets_on():
    tracker = attached(0, 1, can_replay=True)
    tracker.live(5, message(5))
    tracker.replayed(1, message(1))
    tracker.replayed(2, message(2))
    assert tracker.replay_failed() == [Replay(2)]
    tracker.replayed(2, message(2))
    assert tracker.replay_failed() == [Clear("gap"), Deliver(5, message(5))]
    assert tracker.counts["lost_messages"] == 2


def test_a_replay_with_a_hole_is_asked_for_the_rest_once_more():
    tracker = attached(0, 1, can_replay=True)
    tracker.live(5, message(5))
    tracker.replayed(1, message(1))
    tracker.replayed(2, message(2))
    assert tracker.replayed(4, message(4)) == [Replay(2)]
    tracker.replayed(2, message(2))
    assert tracker.replayed(4, message(4)) == [Clear("gap"), Deliver(4, message(4))]


def test_an_engine_that_clears_its_cache_is_known_again():
    tracker = attached(7)
    tracker.emptied()
    assert tracker.state == "known"


def test_a_message_that_cannot_be_read_clears():
    tracker = attached(0)
    assert tracker.unreadable() == [Clear("unreadable")]
    assert tracker.state == "unknown"
    assert tracker.live(1, b"x") == [Deliver(1, b"x")]


# -- duplicates and restarts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("can_replay", [False, True])
def test_a_duplicate_is_dropped(can_replay):
    tracker = attached(0, 1, 2, can_replay=can_replay)
    assert tracker.live(1, message(1)) == []
    assert tracker.counts["duplicates"] == 1
    assert tracker.live(3, b"x") == [Deliver(3, b"x")]


def test_another_message_under_an_applied_number_is_a_restart():
    tracker = attached(0, 1, 2, can_replay=True)
    assert tracker.live(1, message(1, "b")) == [Clear("restart"), Replay(0)]
    assert tracker.replayed(0, message(0, "b")) == [Deliver(0, message(0, "b"))]
    assert tracker.counts["restarts"] == 1


def test_a_lower_number_without_replay_is_a_restart():
    tracker = attached(0, 1, 2)
    assert tracker.live(0, message(0, "b")) == [Clear("restart"), Deliver(0, message(0, "b"))]
    assert tracker.state == "known"


def test_a_restarted_engine_that_has_come_past_the_expected_number_is_found_out():
    tracker = attached(0, 1, can_replay=True)
    assert tracker.live(7, message(7, "b")) == [Replay(1)]
    assert tracker.replayed(1, message(1, "b")) == [Clear("restart"), Replay(0)]
    for number in range(8):
        assert tracker.replayed(number, message(number, "b")) == [Deliver(number, message(number, "b"))]
    assert tracker.replay_ended() == []
    assert tracker.state == "known"


def test_a_restarted_engine_that_has_said_nothing_yet_is_found_out_when_the_connection_is_new():
    tracker = attached(0, 1, can_replay=True)
    assert tracker.connected() == [Replay(1)]
    assert tracker.replay_ended() == [Clear("restart"), Replay(0)]
    assert tracker.replay_ended() == []
    assert tracker.state == "known"


def test_a_new_connection_to_the_same_engine_changes_nothing():
    tracker = attached(0, 1, can_replay=True)
    tracker.connected()
    assert tracker.replayed(1, message(1)) == []
    assert tracker.replay_ended() == []
    assert (tracker.state, tracker.counts["clears"]) == ("known", 1)


def test_a_duplicate_too_old_to_remember_is_told_from_a_restart_by_replay():
    tracker = SequenceTracker(can_replay=True, window=2)
    tracker.connected()
    for number in range(5):
        tracker.replayed(number, message(number))
    tracker.replay_ended()
    assert tracker.live(0, message(0)) == [Replay(4)]
    assert tracker.replayed(4, message(4)) == []
    assert tracker.replay_ended() == []
    assert tracker.state == "known"


@pytest.mark.parametrize("sequence", [-1, 2**63, 2**64 - 1])
def test_a_number_outside_63_bits_is_dropped_and_counted(sequence):
    tracker = attached(0)
    assert tracker.live(sequence, b"x") == []
    assert tracker.counts["invalid_sequences"] == 1


def test_a_leap_to_the_highest_number_is_recovered_from():
    tracker = attached(0, 1, can_replay=True)
    tracker.live(2**63 - 1, b"bad")
    tracker.replayed(1, message(1))
    assert tracker.replay_ended()[0] == Clear("gap")
    assert tracker.live(2, message(2)) == [Replay(2**63 - 1)]
    assert tracker.replay_ended() == [Clear("restart"), Replay(0)]
    for number in range(3):
        tracker.replayed(number, message(number))
    tracker.replay_ended()
    assert tracker.state == "known"


def test_calls_out_of_order_are_refused():
    tracker = SequenceTracker(can_replay=True)
    with pytest.raises(LifecycleError, match="a replay is not going on"):
        tracker.replay_ended()
    tracker.connected()
    with pytest.raises(LifecycleError, match="a replay is going on"):
        tracker.live(0, b"x")


# -- any history ------------------------------------------------------------------------------------------------


@dataclass
class Publisher:
    """An engine that numbers its messages from 0 and keeps the latest few."""

    kept: int
    life: int = 0
    published: list = field(default_factory=list)

    def publish(self):
        self.published.append(message(len(self.published), f"life {self.life} no "))
        return len(self.published) - 1, self.published[-1]

    def restart(self):
        self.life += 1
        self.published = []

    def replay(self, start):
        first = max(start, len(self.published) - self.kept, 0)
        return list(enumerate(self.published))[first:]


class Subscriber:
    """Carries out what a tracker says, and notes the run since the last Clear."""

    def __init__(self, publisher, can_replay):
        self.publisher = publisher
        self.tracker = SequenceTracker(can_replay=can_replay)
        self.run = []
        self.breaks = iter(())  # after how many answers replays break off

    def do(self, actions):
        for action in actions:
            if isinstance(action, Clear):
                self.run = []
            elif isinstance(action, Deliver):
                self.run.append((action.sequence, action.payload))
        if actions and isinstance(actions[-1], Replay):
            self.replay(actions[-1].start)

    def replay(self, start):
        limit = next(self.breaks, None)
        for number, (sequence, payload) in enumerate(self.publisher.replay(start)):
            if number == limit:
                return self.do(self.tracker.replay_failed())
            actions = self.tracker.replayed(sequence, payload)
            self.do(actions)
            if actions and isinstance(actions[-1], Replay):
                return None
        return self.do(self.tracker.replay_ended())


STEPS = st.sampled_from(["publish"] * 4 + ["lose"] * 2 + ["repeat", "restart", "reconnect"])


@settings(max_examples=200)
@given(
    st.lists(STEPS, max_size=40),
    st.integers(1, 8),
    st.lists(st.none() | st.integers(0, 3), max_size=6),
    st.randoms(use_true_random=False),
)
def test_the_run_is_always_an_unbroken_part_of_one_life_of_the_engine(steps, kept, breaks, rng):
    publisher = Publisher(kept)
    subscriber = Subscriber(publisher, can_replay=True)
    subscriber.breaks = iter(breaks)
    sent = []
    subscriber.do(subscriber.tracker.connected())
    for step in steps:
        if step == "restart":
            publisher.restart()
            sent = []
        if step in ("restart", "reconnect"):
            subscriber.do(subscriber.tracker.connected())
        elif step == "repeat" and sent:
            subscriber.do(subscriber.tracker.live(*rng.choice(sent)))
        elif step in ("publish", "lose"):
            sent.append(publisher.publish())
            if step == "publish":
                subscriber.do(subscriber.tracker.live(*sent[-1]))
        numbers = [sequence for sequence, _ in subscriber.run]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True
        assert len({payload.split()[1] for _, payload in subscriber.run}) <= 1
        if step == "publish":
            assert subscriber.run[-1] == sent[-1]
        if subscriber.tracker.state == "known" and step in ("publish", "reconnect"):
            assert subscriber.run == list(enumerate(publisher.published))


@given(st.lists(STEPS, max_size=40))
def test_a_publisher_that_keeps_enough_is_always_known(steps):
    publisher = Publisher(kept=100)
    subscriber = Subscriber(publisher, can_replay=True)
    subscriber.do(subscriber.tracker.connected())
    for step in steps:
        if step == "restart":
            publisher.restart()
            subscriber.do(subscriber.tracker.connected())
        elif step != "reconnect":
            number, payload = publisher.publish()
            if step != "lose":
                subscriber.do(subscriber.tracker.live(number, payload))
        assert subscriber.tracker.state == "known"
    subscriber.do(subscriber.tracker.live(*publisher.publish()))
    assert subscriber.run == list(enumerate(publisher.published))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12), st.integers(0, 3)), max_size=40))
def test_without_replay_a_run_is_unbroken_whatever_comes(messages):
    tracker = SequenceTracker(can_replay=False)
    expected = None
    for clear, sequence, life in messages:
        if clear:
            tracker.unreadable()
        for action in tracker.live(sequence, message(sequence, f"{life} ")):
            if isinstance(action, Clear):
                expected = None
            else:
                assert expected in (None, action.sequence)
                expected = action.sequence + 1
