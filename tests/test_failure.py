"""The failure detector: shares of what is in flight, alarms, masks, the paper's phases, parity of the twins."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from backends import BACKENDS
from columns import make_columns
from hypothesis import given
from hypothesis import strategies as st

from mulsched import Router, failure
from mulsched._failure_paper import CLASS_BLOCKS, WATCHED, PaperDetector
from mulsched._failure_py import OccupancyPy, class_depths, prefix_hashes
from mulsched.errors import DuplicateRequest, InvalidArgument, InvalidType
from mulsched.failure import FailureDetector
from mulsched.indicators import COLUMNS
from mulsched.policies import Policy, get
from mulsched.scorers import Multiplicative

HOT = list(range(100, 120))
(HOT_HASH,) = prefix_hashes(np.array(HOT, dtype=np.uint64), [CLASS_BLOCKS])
LOADS = COLUMNS.index("context_tokens")


def native(confidence, horizon):
    from mulsched._native import Occupancy

    return Occupancy(confidence, horizon)


CORES = {"native": native, "python": OccupancyPy}


@pytest.fixture(params=BACKENDS, autouse=True)
def core(request, monkeypatch):
    monkeypatch.setattr(failure, "Occupancy", CORES[request.param])
    return request.param


def columns(keys=HOT, *, holders=1, n=4, running=None, **more):
    """Columns of n candidates of which the first ``holders`` have the whole prompt cached, and are busy."""
    matched = [len(keys) if i < holders else 0 for i in range(n)]
    running = running or [50 if i < holders else 0 for i in range(n)]
    return make_columns(prompt=16 * len(keys) + 1, keys=keys, matched=matched, running=running, **more)


def fill(detector, count, keys=HOT, **more):
    """Count so many requests of one class in."""
    for i in range(count):
        detector.dispatch(columns(keys, **more), (keys[0], i), 0)


def others(detector, count):
    """Count requests in that share no block with any other."""
    for i in range(count):
        detector.dispatch(columns([10_000 + 20 * i + d for d in range(20)], holders=0), ("other", i), 0)


# -- examples -------------------------------------------------------------------------------------------


def test_a_class_over_its_holders_share_is_in_alarm():
    detector = FailureDetector()
    fill(detector, 40)
    (alarm,) = detector.alarms()
    assert (alarm.holders, alarm.instances, alarm.class_blocks) == (1, 4, 16)


def test_a_class_within_its_holders_share_is_not():
    detector = FailureDetector()
    others(detector, 120)
    fill(detector, 40, holders=2)
    assert list(detector.alarms()) == []


def test_few_requests_are_no_evidence():
    detector = FailureDetector()
    fill(detector, 10)
    assert detector.alarms_raised == 0


def test_a_class_that_all_hold_is_never_in_alarm():
    detector = FailureDetector()
    fill(detector, 100, holders=4)
    assert detector.alarms_raised == 0


def test_a_class_that_none_holds_is_never_in_alarm():
    detector = FailureDetector()
    fill(detector, 100, holders=0)
    assert detector.alarms_raised == 0


def test_load_counts_prompt_tokens():
    detector = FailureDetector()
    for i in range(100):
        detector.dispatch(make_columns(prompt=1, matched=[0] * 4), i, 0)
    fill(detector, 30)
    (alarm,) = detector.alarms()
    assert alarm.share_ratio > 0.9


def test_weight_requests_counts_requests():
    detector = FailureDetector(weight="requests")
    for i in range(300):
        detector.dispatch(make_columns(prompt=1, matched=[0] * 4), i, 0)
    fill(detector, 30)
    assert detector.alarms_raised == 0


def test_classes_that_share_holders_are_in_alarm_together():
    detector = FailureDetector(weight="requests")
    others(detector, 60)
    for i in range(3):  # each a sixth of the load, together half of it, on one instance of four
        keys = [1000 * i + d for d in range(16)]
        fill(detector, 20, keys, running=[70, 2, 2, 2])
    assert [alarm.share_ratio < 1 / 4 for alarm in detector.alarms()] == [True] * 3


def test_an_alarm_ends_when_there_are_holders_enough():
    detector = FailureDetector()
    fill(detector, 40)
    detector.dispatch(columns(holders=4), "last", 0)
    assert list(detector.alarms()) == []


def test_an_alarm_ends_with_the_last_request_of_its_class():
    detector = FailureDetector()
    fill(detector, 40)
    for i in range(40):
        detector.end((HOT[0], i))
    assert list(detector.alarms()) == []


@pytest.mark.parametrize("others_in_flight", [0, 400])
def test_of_a_few_requests_left_those_within_their_share_are_in_alarm_no_longer(others_in_flight):
    released = []
    detector = FailureDetector(on_release=released.append)
    fill(detector, 40)
    others(detector, others_in_flight)
    for i in range(39):
        detector.end((HOT[0], i))
    assert len(released) == (others_in_flight > 0)


def test_an_alarm_of_many_requests_is_not_ended_by_the_end_of_one():
    detector = FailureDetector()
    fill(detector, 40)
    others(detector, 400)
    detector.end((HOT[0], 0))
    assert len(list(detector.alarms())) == 1


def test_a_class_whose_copy_would_cost_more_than_it_saves_is_not_in_alarm():
    detector = FailureDetector()
    fill(detector, 40, running=[1, 0, 0, 0])
    assert detector.alarms_raised == 0


def test_a_longer_horizon_finds_a_copy_worth_more():
    detector = FailureDetector(horizon=200.0)
    fill(detector, 40, running=[1, 0, 0, 0])
    assert detector.alarms_raised == 1


def copying():
    """A detector with a class in alarm, one request of which is on its way to make a copy."""
    detector = FailureDetector()
    fill(detector, 40)
    detector.dispatch(columns(), "copy", 3)
    return detector


def test_while_a_copy_is_on_its_way_no_other_is_made():
    detector = copying()
    assert detector.judge(columns()) is None
    assert len(list(detector.alarms())) == 1


@pytest.mark.parametrize("made", ["first_token", "end"])
def test_when_a_copy_is_made_the_next_may_be(made):
    detector = copying()
    getattr(detector, made)("copy")
    assert detector.judge(columns()) is not None


def test_callbacks_hear_of_start_and_end():
    heard = []
    detector = FailureDetector(
        on_alarm=lambda alarm: heard.append(("on", alarm)), on_release=lambda a: heard.append(("off", a))
    )
    fill(detector, 40)
    detector.dispatch(columns(holders=4), "last", 0)
    (on, raised), (off, released) = heard
    assert (on, off) == ("on", "off")
    assert raised is released


def test_spread_leaves_out_holders_above_the_mean():
    detector = FailureDetector()
    fill(detector, 400)
    mask, _ = detector.judge(columns(holders=2, running=[99, 60, 200, 30]))
    assert mask.tolist() == [False, True, True, True]


def test_exclude_leaves_out_all_holders():
    detector = FailureDetector(mitigation="exclude")
    fill(detector, 40)
    mask, _ = detector.judge(columns(holders=2))
    assert mask.tolist() == [False, False, True, True]


def test_load_only_keeps_the_least_loaded():
    detector = FailureDetector(mitigation="load_only")
    fill(detector, 40)
    mask, _ = detector.judge(columns(running=[50, 0, 1, 0]))
    assert mask.tolist() == [False, True, False, True]


# -- the paper's detector -------------------------------------------------------------------------------


def test_phase_1_alone_filters_nothing():
    detector = FailureDetector(mode="paper")
    fill(detector, 2, holders=1)
    assert detector.judge(columns()) is None


def test_phase_2_filters_after_more_than_two_per_holder_in_a_row():
    detector = FailureDetector(mode="paper")
    fill(detector, 3)
    mask, alarm = detector.judge(columns())
    assert mask.tolist() == [False, True, True, True]
    assert alarm.class_blocks == CLASS_BLOCKS


def test_a_request_that_scores_better_elsewhere_starts_the_count_anew():
    detector = FailureDetector(mode="paper")
    fill(detector, 2)
    detector.dispatch(columns(running=[1000, 0, 0, 0]), "elsewhere", 1)
    fill(detector, 2)
    assert detector.judge(columns()) is None


def test_the_papers_filter_ends_when_the_condition_holds_again():
    detector = FailureDetector(mode="paper")
    fill(detector, 3)
    others(detector, 12)
    detector.dispatch(columns(), "last", 0)
    assert list(detector.alarms()) == []


def test_the_papers_window_is_a_minute():
    detector = FailureDetector(mode="paper")
    fill(detector, 3, now=0.0)
    for i in range(9):
        detector.dispatch(columns([50_000 + 20 * i + d for d in range(20)], holders=0, now=59.0), ("o", i), 0)
    detector.dispatch(columns(now=61.0), "last", 0)
    assert list(detector.alarms()) == []


def vanishing_classes(**options):
    """A detector in mode paper that saw five hot classes, each a window after the last."""
    detector = FailureDetector(mode="paper", **options)
    for i in range(5):
        fill(detector, 3, [1000 * i + d for d in range(20)], now=100.0 * i)
    return detector


def test_the_papers_filter_ends_with_the_last_request_of_its_class_in_the_window():
    released = []
    detector = vanishing_classes(on_release=released.append)
    assert (len(list(detector.alarms())), len(released)) == (1, 4)


def test_a_class_that_eight_others_overtake_is_released():
    detector = FailureDetector(mode="paper")
    fill(detector, 3, n=20)
    for i in range(1, 9):
        fill(detector, 5, [1000 * i + d for d in range(20)], n=20)
    detector.dispatch(columns(n=20), "last", 0)
    assert HOT_HASH not in {alarm.class_hash for alarm in detector.alarms()}


def test_mode_paper_keeps_nothing_of_classes_that_left_the_window():
    assert len(vanishing_classes()._paper._suspects) == 1


# -- in a router ----------------------------------------------------------------------------------------


def herding_router(**options):
    """Four instances, of which one has a prefix that 40 requests have been sent for."""
    router = Router(block_size=4, detector=FailureDetector(**options))
    for i in range(4):
        router.add_instance(f"i{i}", cache_blocks=1000)
    router.route(list(range(400)), request_id="first", candidates=["i0"])
    router.first_token("first")
    for i in range(40):
        router.route(list(range(400)), request_id=i, candidates=["i0"])
    return router


def test_a_router_spreads_a_class_in_alarm():
    assert herding_router().route(list(range(400)), request_id="all").instance != "i0"


def test_a_router_tells_of_first_tokens():
    router = herding_router()
    router.route(list(range(400)), request_id="copy")
    assert router.select(list(range(400))).alarm is None
    router.first_token("copy")
    router.dispatch(router.select(list(range(400)), candidates=["i0"]), request_id="more")
    assert router.select(list(range(400))).instance != "i0"


def test_a_decision_says_which_alarm_is_in_force():
    assert "in alarm since decision" in herding_router().select(list(range(400))).explain()


def test_selecting_changes_nothing():
    router = herding_router()
    before = list(router.detector.alarms())
    router.select(list(range(400)))
    assert list(router.detector.alarms()) == before


def test_an_instances_removal_takes_its_requests_out():
    router = herding_router()
    router.remove_instance("i0")
    assert router.detector.classes == 0


@pytest.mark.parametrize("end", ["finish", "cancel"])
def test_ends_are_heard(end):
    router = herding_router()
    for request in ["first", *range(40)]:
        getattr(router, end)(request)
    assert router.detector.classes == 0


def test_a_policy_may_bring_its_detector():
    assert Router(policy="lmetric_guarded").detector is not None


def test_a_router_has_none_by_default():
    assert Router().detector is None


# -- edges ----------------------------------------------------------------------------------------------


def test_a_request_that_was_never_counted_in_ends_unheard():
    detector = FailureDetector()
    detector.end("nobody")
    assert detector.classes == 0


def test_a_first_token_of_a_request_that_was_never_counted_in_is_ignored():
    detector = copying()
    detector.first_token("nobody")
    assert detector.judge(columns()) is None


def test_a_request_in_flight_is_not_counted_in_twice():
    detector = FailureDetector()
    fill(detector, 1)
    with pytest.raises(DuplicateRequest, match=r"request \(100, 0\) is in flight already"):
        fill(detector, 1)
    detector.end((HOT[0], 0))
    assert detector.classes == 0


def test_a_prompt_shorter_than_a_block_has_no_class():
    detector = FailureDetector()
    for i in range(50):
        detector.dispatch(make_columns(prompt=3, matched=[0, 0]), i, 0)
    assert detector.classes == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "both"}, InvalidArgument, "mode must be 'occupancy' or 'paper', got 'both'"),
        ({"mitigation": "pray"}, InvalidArgument, "got 'pray'"),
        ({"weight": "gold"}, InvalidArgument, "got 'gold'"),
        ({"confidence": 0}, InvalidArgument, "confidence must be finite and above 0, got 0"),
        ({"horizon": -1}, InvalidArgument, "horizon must be finite and above 0, got -1"),
        ({"confidence": "3"}, InvalidType, "confidence must be a number, got str"),
        ({"window_s": float("inf")}, InvalidArgument, "window_s must be finite and above 0, got inf"),
    ],
)
def test_a_wrong_option_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        FailureDetector(**options)


def test_a_router_refuses_what_is_no_detector():
    with pytest.raises(InvalidType, match="FailureDetector or None"):
        Router(detector="yes")


def test_a_policy_refuses_what_is_no_detector():
    with pytest.raises(InvalidType, match="FailureDetector or None"):
        Policy(name="p", score=Multiplicative(), detector="yes")


# -- properties -----------------------------------------------------------------------------------------

PATHS = st.lists(st.integers(0, 1), max_size=9)


def test_depths_grow_by_half_an_octave_at_most():
    depths = class_depths(10_000)
    assert all(b <= max(a + 1, 1.5 * a) for a, b in pairwise(depths))


@given(n=st.integers(0, 300), more=st.integers(0, 50))
def test_a_hash_depends_on_its_prefix_only(n, more):
    keys = np.arange(n + more, dtype=np.uint64) * np.uint64(77)
    depths = class_depths(n)
    assert prefix_hashes(keys, depths) == prefix_hashes(keys[:n], depths)


def table_of(matched, loads):
    table = np.zeros((len(COLUMNS), len(matched)), dtype=np.int64)
    table[0], table[LOADS] = matched, loads
    table[COLUMNS.index("p_tokens")], table[COLUMNS.index("batch_size")] = 10 - np.array(matched), 1
    return table


def keys_of(path):
    return np.array([7 + bit for bit in path], dtype=np.uint64)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["dispatch", "dispatch", "first_token", "end"]),
        PATHS,
        st.lists(st.integers(0, 9), min_size=3, max_size=3),
        st.lists(st.integers(0, 90), min_size=3, max_size=3),
        st.integers(1, 30),
        st.integers(0, 2),
    ),
    max_size=60,
)


@given(arrivals=st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=100))
def test_the_paper_watches_classes_of_which_few_have_more_hits(arrivals):
    detector = PaperDetector(30.0)
    for now, (key, hit) in enumerate(arrivals):
        keys = [1000 * key + d for d in range(20)]
        detector.dispatch(columns(keys, holders=int(hit), now=float(now)))
    hits = Counter(key for key, hit in arrivals[-30:] if hit)
    for key in range(21):
        (class_hash,) = prefix_hashes(np.arange(1000 * key, 1000 * key + 16, dtype=np.uint64), [16])
        more = sum(count > hits[key] for count in hits.values())
        assert detector._is_watched(class_hash) == (hits[key] > 0 and more < WATCHED)


@pytest.mark.parametrize("name", BACKENDS)
@given(steps=STEPS)
def test_counts_are_those_of_a_naive_model(name, steps):
    occupancy, flight = CORES[name](3.0, 2.0), {}
    for i, (what, path, matched, loads, weight, chosen) in enumerate(steps):
        if what == "dispatch":
            occupancy.dispatch(i, keys_of(path), table_of(matched, loads), LOADS, weight, chosen)
            flight[i] = (tuple(path[: max(matched)]), weight)  # what somebody holds
        elif flight:
            getattr(occupancy, what)(min(flight))
            if what == "end":
                del flight[min(flight)]
    classes = {path[:d] for path, _ in flight.values() for d in class_depths(len(path))}
    assert (occupancy.nodes(), occupancy.load) == (len(classes), sum(w for _, w in flight.values()))


@pytest.mark.parametrize("name", BACKENDS)
def test_what_was_examined_in_memory_since_freed_is_not_taken_for_what_is_dispatched(name):
    occupancy, table = CORES[name](3.0, 2.0), table_of([1, 0, 0], [0, 0, 0])
    for i in range(20):  # numpy gives the keys that are dispatched the memory of those examined
        occupancy.examine(np.array([7], dtype=np.uint64), table, LOADS)
        occupancy.dispatch(i, np.array([8 + i], dtype=np.uint64), table, LOADS, 1.0, 0)
    assert occupancy.nodes() == 20


@pytest.mark.parametrize("name", BACKENDS)
@given(steps=STEPS, order=st.permutations(range(3)))
def test_the_order_of_candidates_does_not_matter(name, steps, order):
    one, other = CORES[name](0.5, 2.0), CORES[name](0.5, 2.0)
    for i, (_, path, matched, loads, weight, chosen) in enumerate(steps):
        told = one.dispatch(i, keys_of(path), table_of(matched, loads), LOADS, weight, chosen)
        moved = table_of(np.array(matched)[order], np.array(loads)[order])
        assert told == other.dispatch(i, keys_of(path), moved, LOADS, weight, order.index(chosen))


@given(steps=STEPS, confidence=st.sampled_from([0.1, 1.0, 3.0]), horizon=st.sampled_from([0.5, 2.0, 9.0]))
def test_the_twins_agree(steps, confidence, horizon):
    cores = [CORES[name](confidence, horizon) for name in BACKENDS]
    flight = []
    for i, (what, path, matched, loads, weight, chosen) in enumerate(steps):
        if what == "dispatch":
            keys, table = keys_of(path), table_of(matched, loads)
            told = [core.examine(keys, table, LOADS) for core in cores]
            assert told[0] == told[-1]
            told = [core.dispatch(i, keys, table, LOADS, weight, chosen) for core in cores]
            flight.append(i)
        elif what == "first_token" and flight:
            told = [core.first_token(flight[-1]) for core in cores]
        else:
            ended = flight.pop(0) if flight else "nobody"
            told = [tuple(core.end(ended)) for core in cores]
        assert told[0] == told[-1]


def test_the_guarded_policy_is_lmetric_while_nothing_is_in_alarm():
    assert get("lmetric_guarded").score.indicators == get("lmetric").score.indicators
