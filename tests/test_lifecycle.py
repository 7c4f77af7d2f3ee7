"""Lives as hosts deliver them: whatever comes, and in whatever order, the bookings are right."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mulsched import Lifecycle, Router
from mulsched.errors import InvalidArgument, InvalidType, NoEligibleInstance, UnknownInstance

PROMPT = list(range(100))
IDLE = {"queued_prefill_tokens": 0, "running": 0, "waiting": 0, "context_tokens": 0}


def lifecycle(*instances, **options):
    router = Router(block_size=4)
    for instance in instances or ("a", "b"):
        router.add_instance(instance, cache_blocks=1000)
    return Lifecycle(router, **options)


def load(lives, instance):
    table = lives.router.load(instance)
    del table["last_chosen"]
    return table


def total(lives, column):
    return sum(load(lives, name)[column] for name in lives.router.instances)


def test_a_life_in_order_books_as_the_router_does():
    lives = lifecycle("a")
    decision = lives.route(PROMPT, request_id="r", now=0.0)
    assert (decision.instance, lives.instance("r"), len(lives)) == ("a", "a", 1)
    assert load(lives, "a") == IDLE | {"queued_prefill_tokens": 100, "waiting": 1, "context_tokens": 100}
    assert lives.first_token("r", now=1.0)
    assert load(lives, "a") == IDLE | {"running": 1, "context_tokens": 100}
    assert lives.finish("r", now=2.0)
    assert load(lives, "a") == IDLE
    assert lives.instance("r") is None
    assert lives.router.index.blocks("a") == 25


def test_text_and_keys_are_routed_alike():
    lives = lifecycle("a")
    assert lives.route_text("x" * 100, request_id=1, now=0.0).new_prefill_tokens == 100
    assert lives.route_keys([1, 2], prompt_tokens=8, request_id=2, now=0.0).new_prefill_tokens == 8
    # and are retried alike
    assert lives.route_text("x" * 100, request_id=1, now=0.0).instance == "a"
    assert lives.route_keys([1, 2], prompt_tokens=8, request_id=2, now=0.0).instance == "a"
    assert lives.counts.retried == 2
    assert load(lives, "a")["queued_prefill_tokens"] == 108


@pytest.mark.parametrize("signals", [("finish",), ("first_token", "finish"), ("cancel",)])
def test_an_end_that_beats_its_reservation_ends_it(signals):
    lives = lifecycle("a")
    for signal in signals:
        assert not getattr(lives, signal)("r", now=0.0)
    lives.route(PROMPT, request_id="r", now=1.0)
    assert load(lives, "a") == IDLE
    assert lives.counts.early == len(signals)
    assert lives.router.index.blocks("a") == (0 if signals == ("cancel",) else 25)


def test_a_first_token_that_beats_its_reservation_is_applied_to_it():
    lives = lifecycle("a")
    lives.first_token("r", now=0.0)
    lives.route(PROMPT, request_id="r", now=1.0)
    assert load(lives, "a")["running"] == 1


def test_a_signal_that_comes_twice_changes_nothing():
    lives = lifecycle("a")
    lives.route(PROMPT, request_id="r", now=0.0)
    assert lives.first_token("r", now=1.0)
    assert not lives.first_token("r", now=1.0)
    assert lives.finish("r", now=2.0)
    assert not lives.finish("r", now=2.0)
    assert not lives.first_token("r", now=3.0)
    assert lives.counts.repeated == 3
    assert load(lives, "a") == IDLE


def test_an_end_without_first_token_implies_it():
    lives = lifecycle("a")
    lives.route(PROMPT, request_id="r", now=0.0)
    assert lives.finish("r", now=2.0)
    assert load(lives, "a") == IDLE
    assert lives.router.index.blocks("a") == 25


def test_an_ended_id_may_be_used_again():
    lives = lifecycle("a")
    for at in (0.0, 10.0):
        lives.route(PROMPT, request_id="r", now=at)
        assert lives.finish("r", now=at + 1)
    assert lives.counts.early == 0


def test_a_retry_goes_elsewhere_and_frees_the_first_attempt():
    lives = lifecycle("a", "b")
    first = lives.route(PROMPT, request_id="r", now=0.0).instance
    second = lives.route(PROMPT, request_id="r", now=1.0).instance
    assert second != first
    assert load(lives, first) == IDLE
    assert load(lives, second)["waiting"] == 1
    assert lives.counts.retried == 1


def test_a_retry_does_not_count_on_the_prefix_of_its_own_first_attempt():
    lives = lifecycle("a")
    lives.route(PROMPT, request_id="r", now=0.0)
    decision = lives.route(PROMPT, request_id="r", now=1.0)
    assert decision.hit_tokens == 0
    assert load(lives, "a")["queued_prefill_tokens"] == len(PROMPT)


def test_a_late_signal_of_an_earlier_attempt_is_told_apart_by_its_instance():
    lives = lifecycle("a", "b")
    first = lives.route(PROMPT, request_id="r", now=0.0).instance
    second = lives.route(PROMPT, request_id="r", now=1.0).instance
    assert not lives.finish("r", now=2.0, instance=first)
    assert lives.counts.stale == 1
    assert load(lives, second)["waiting"] == 1
    assert lives.finish("r", now=3.0, instance=second)


def test_a_retry_that_finds_no_instance_leaves_the_first_attempt():
    lives = lifecycle("a")
    lives.route(PROMPT, request_id="r", now=0.0)
    with pytest.raises(NoEligibleInstance):
        lives.route(PROMPT, request_id="r", now=1.0, candidates=[])
    assert lives.instance("r") == "a"
    assert load(lives, "a")["waiting"] == 1


def test_an_end_that_never_comes_expires():
    lives = lifecycle("a", expire_after_s=60.0)
    lives.route(PROMPT, request_id="old", now=0.0)
    lives.route(PROMPT, request_id="new", now=30.0)
    lives.advance(60.0)
    assert len(lives) == 2
    lives.advance(60.5)
    assert (len(lives), lives.counts.expired) == (1, 1)
    assert lives.instance("new") == "a"
    assert not lives.finish("old", now=61.0)


def test_early_signals_are_forgotten_in_time():
    lives = lifecycle("a", remember_s=5.0)
    lives.finish("r", now=0.0)
    lives.route(PROMPT, request_id="r", now=6.0)
    assert lives.instance("r") == "a"
    assert (lives.counts.early, lives.counts.repeated) == (0, 1)


def test_what_is_remembered_is_bounded_by_time():
    lives = lifecycle("a", remember_s=5.0)
    for i in range(200):
        lives.finish(("unknown", i), now=float(i))
        lives.route(PROMPT, request_id=i, now=float(i))
        lives.finish(i, now=float(i))
    assert len(lives._early) <= 6
    assert len(lives._ended) <= 6


def test_time_does_not_go_back():
    lives = lifecycle("a", expire_after_s=10.0)
    lives.advance(100.0)
    lives.route(PROMPT, request_id="r", now=0.0)
    lives.advance(105.0)
    assert lives.instance("r") == "a"


def test_removal_of_an_instance_ends_what_was_there():
    lives = lifecycle("a", "b", prefill_tokens_per_s=100.0)
    for i in range(4):
        lives.route([1000 * i + t for t in range(100)], request_id=i, now=0.0)
    lost = lives.remove_instance("a")
    assert len(lost) == 2
    assert len(lives) == 2
    assert not any(lives.finish(i, now=0.5) for i in lost)
    lives.advance(10.0)
    assert load(lives, "b")["running"] == 2
    with pytest.raises(UnknownInstance):
        lives.remove_instance("a")


def test_removal_behind_its_back_does_no_harm():
    lives = lifecycle("a", "b")
    instance = lives.route(PROMPT, request_id="r", now=0.0).instance
    lives.router.remove_instance(instance)
    assert not lives.first_token("r", now=1.0)
    assert not lives.finish("r", now=1.0)
    assert len(lives) == 0


# -- first tokens by estimate --------------------------------------------------------------------


def distinct(i):
    return list(range(1000 * i, 1000 * i + 100))


def test_prefills_are_presumed_done_one_after_another():
    lives = lifecycle("a", prefill_tokens_per_s=100.0)
    for i in range(3):
        lives.route(distinct(i), request_id=i, now=0.0)
    for now, waiting in [(0.99, 3), (1.0, 2), (1.99, 2), (2.0, 1), (3.0, 0)]:
        lives.advance(now)
        assert load(lives, "a")["waiting"] == waiting
    assert lives.counts.presumed == 3
    assert load(lives, "a")["running"] == 3


def test_an_idle_instance_starts_at_the_dispatch():
    lives = lifecycle("a", prefill_tokens_per_s=100.0)
    lives.route(distinct(0), request_id=0, now=0.0)
    lives.route(distinct(1), request_id=1, now=10.0)
    lives.advance(10.9)
    assert load(lives, "a")["waiting"] == 1
    lives.advance(11.0)
    assert load(lives, "a")["waiting"] == 0


def test_an_end_before_the_estimate_proves_the_prefills_before_it():
    lives = lifecycle("a", prefill_tokens_per_s=10.0)
    for i in range(4):
        lives.route(distinct(i), request_id=i, now=0.0)
    assert lives.finish(2, now=1.0)
    assert (lives.counts.implied, load(lives, "a")["waiting"], load(lives, "a")["running"]) == (2, 1, 2)
    # the next one is presumed to have started then
    lives.advance(10.9)
    assert load(lives, "a")["waiting"] == 1
    lives.advance(11.0)
    assert load(lives, "a")["waiting"] == 0


def test_a_cancelled_first_prefill_lets_the_next_one_start():
    lives = lifecycle("a", prefill_tokens_per_s=100.0)
    for i in range(2):
        lives.route(distinct(i), request_id=i, now=0.0)
    lives.cancel(0, now=0.5)
    lives.advance(1.4)
    assert load(lives, "a")["waiting"] == 1
    lives.advance(1.5)
    assert load(lives, "a")["waiting"] == 0


def test_a_cancelled_later_prefill_is_left_out():
    lives = lifecycle("a", prefill_tokens_per_s=100.0)
    for i in range(3):
        lives.route(distinct(i), request_id=i, now=0.0)
    lives.cancel(1, now=0.5)
    lives.advance(2.0)
    assert load(lives, "a") == IDLE | {"running": 2, "context_tokens": 200}


def test_plans_do_not_pile_up():
    lives = lifecycle("a", prefill_tokens_per_s=10.0, expire_after_s=1e6)
    for i in range(300):
        lives.route(distinct(i), request_id=i, now=i * 0.01)
    for i in range(299):
        lives.finish(i, now=3.0 + i * 20)
    assert len(lives._due) <= 2
    assert load(lives, "a")["waiting"] + load(lives, "a")["running"] == 1


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"prefill_tokens_per_s": 0}, InvalidArgument, "at least 1, got 0"),
        ({"prefill_tokens_per_s": "fast"}, InvalidType, "must be a number, got str"),
        ({"expire_after_s": -1.0}, InvalidArgument, "at least 0, got -1"),
        ({"remember_s": float("nan")}, InvalidArgument, "finite"),
    ],
)
def test_bad_options_are_refused(options, error, says):
    with pytest.raises(error, match=says):
        lifecycle(**options)


def test_only_a_router_is_taken():
    with pytest.raises(InvalidType, match="must be a Router, got dict"):
        Lifecycle({})


@pytest.mark.parametrize("now", [None, "soon", float("inf")])
def test_a_bad_time_changes_nothing(now):
    lives = lifecycle("a")
    with pytest.raises((InvalidType, InvalidArgument), match="now must be"):
        lives.route(PROMPT, request_id="r", now=now)
    assert len(lives) == 0
    assert load(lives, "a") == IDLE


def test_an_id_that_is_not_hashable_is_refused():
    lives = lifecycle("a")
    for call in (lambda: lives.route(PROMPT, request_id=[], now=0.0), lambda: lives.finish([], now=0.0)):
        with pytest.raises(InvalidType, match="must be hashable, got list"):
            call()


# -- properties --------------------------------------------------------------------------------------

CALLS = st.lists(
    st.tuples(
        st.sampled_from(["route", "first_token", "finish", "cancel", "advance"]),
        st.integers(0, 4),
        st.floats(0.0, 3.0),
        st.sampled_from([None, "a", "b"]),
    ),
    max_size=40,
)


@settings(max_examples=150)
@given(calls=CALLS, rate=st.sampled_from([None, 5.0, 50.0]), remember_s=st.sampled_from([0.0, 2.0, 100.0]))
def test_whatever_comes_the_load_is_that_of_the_reserved_requests(calls, rate, remember_s):
    lives = lifecycle("a", "b", prefill_tokens_per_s=rate, expire_after_s=20.0, remember_s=remember_s)
    now = 0.0
    for call, request_id, elapsed, instance in calls:
        now += elapsed
        if call == "route":
            lives.route(distinct(request_id), request_id=request_id, now=now)
        elif call == "advance":
            lives.advance(now)
        else:
            getattr(lives, call)(request_id, now=now, instance=instance)
        assert total(lives, "running") + total(lives, "waiting") == len(lives)
        assert total(lives, "context_tokens") == 100 * len(lives)
        if not total(lives, "waiting"):
            assert total(lives, "queued_prefill_tokens") == 0
    lives.advance(now + 21.0)
    assert len(lives) == 0
    assert load(lives, "a") == load(lives, "b") == IDLE


@settings(max_examples=50)
@given(order=st.permutations(["route", "first_token", "finish"]), again=st.integers(0, 2))
def test_a_life_in_any_order_leaves_nothing_but_the_cached_prompt(order, again):
    lives = lifecycle("a")
    for call in [*order, *order[: again + 1]]:
        if call == "route" and lives.instance("r") is None and "r" in lives._ended:
            continue  # another life
        if call == "route":
            lives.route(PROMPT, request_id="r", now=0.0)
        else:
            getattr(lives, call)("r", now=0.0)
    assert load(lives, "a") == IDLE
    assert lives.router.index.blocks("a") == 25


def test_threads_that_retry_and_end_at_once_keep_the_bookings_right():
    lives = lifecycle("a", "b", prefill_tokens_per_s=1000.0)
    start = threading.Barrier(4)

    def work(thread):
        start.wait()
        for i in range(100):
            lives.route(distinct(thread), request_id=i % 7, now=float(i))
            lives.finish((i + thread) % 7, now=float(i))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert total(lives, "running") + total(lives, "waiting") == len(lives)
    for i in range(7):
        lives.cancel(i, now=100.0)
    assert load(lives, "a") == load(lives, "b") == IDLE
