"""The load table: bookings, their life cycle, and the reconciliation with reports."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulsched.errors import (
    DuplicateRequest,
    InvalidArgument,
    InvalidType,
    LifecycleError,
    UnknownRequest,
)
from mulsched.load import LOAD_COLUMNS, Booking, LoadTable

NO_KEYS = np.empty(0, dtype=np.uint64)


def booking(*, row=0, new=100, prompt=150, now=None):
    return Booking(row, new, prompt, NO_KEYS, now)


def table(n_rows=2):
    load = LoadTable()
    for row in range(n_rows):
        load.add_row(row)
    return load


def values(load, row=0):
    return load.load(row)


def test_a_dispatched_request_waits_and_queues_its_new_tokens():
    load = table()
    load.dispatch("a", booking(), decision=7)
    assert values(load) == {
        "queued_prefill_tokens": 100,
        "running": 0,
        "waiting": 1,
        "context_tokens": 150,
        "last_chosen": 7,
    }
    assert values(load, 1)["waiting"] == 0


def test_the_first_token_moves_it_to_running_and_empties_the_queue():
    load = table()
    load.dispatch("a", booking(), decision=0)
    load.first_token("a")
    assert (values(load)["queued_prefill_tokens"], values(load)["waiting"], values(load)["running"]) == (
        0,
        0,
        1,
    )
    assert values(load)["context_tokens"] == 150


@pytest.mark.parametrize("had_first_token", [False, True])
def test_an_ended_request_leaves_no_load(had_first_token):
    load = table()
    load.dispatch("a", booking(), decision=3)
    if had_first_token:
        load.first_token("a")
    load.end("a")
    assert values(load) == {
        "queued_prefill_tokens": 0,
        "running": 0,
        "waiting": 0,
        "context_tokens": 0,
        "last_chosen": 3,
    }
    assert len(load) == 0


def test_the_queue_releases_what_was_booked_at_dispatch():
    load = table()
    load.dispatch("a", booking(new=100), decision=0)
    load.dispatch("b", booking(new=30), decision=1)
    load.first_token("a")
    assert values(load)["queued_prefill_tokens"] == 30


def test_a_second_first_token_raises_and_changes_nothing():
    load = table()
    load.dispatch("a", booking(), decision=0)
    load.first_token("a")
    before = values(load)
    with pytest.raises(LifecycleError, match="'a' has had its first token"):
        load.first_token("a")
    assert values(load) == before


@pytest.mark.parametrize("call", ["first_token", "end", "booking"])
@pytest.mark.parametrize("request_id", ["never", [], None])
def test_an_unknown_request_raises(call, request_id):
    with pytest.raises(UnknownRequest, match="unknown request"):
        getattr(table(), call)(request_id)


def test_a_duplicate_or_unhashable_id_is_refused():
    load = table()
    load.dispatch("a", booking(), decision=0)
    with pytest.raises(DuplicateRequest, match="'a' is booked already"):
        load.check_new("a")
    with pytest.raises(InvalidType, match="request_id must be hashable, got list"):
        load.check_new([1])


def test_removing_a_row_reports_its_requests_in_order_and_empties_it():
    load = table()
    for name, row in (("a", 0), ("b", 1), ("c", 0)):
        load.dispatch(name, booking(row=row), decision=0)
    assert load.remove_row(0) == ["a", "c"]
    assert "b" in load
    assert set(values(load).values()) == {0}


def test_the_table_grows_and_keeps_what_is_in_it():
    load = table(1)
    load.dispatch("a", booking(), decision=5)
    load.report(0, running=3, waiting=1)
    load.add_row(100)
    assert values(load)["last_chosen"] == 5
    assert values(load)["running"] == 3
    load.report(0, running=0, waiting=0)
    assert (values(load)["running"], values(load)["waiting"]) == (0, 1)


def test_only_bookings_with_a_time_grow_old():
    load = table()
    load.dispatch("early", booking(now=0.0), decision=0)
    load.dispatch("late", booking(now=9.0), decision=1)
    load.dispatch("timeless", booking(), decision=2)
    assert load.older_than(now=10.0, older_than_s=5) == ["early"]
    assert load.older_than(now=10.0, older_than_s=10.0) == []


@pytest.mark.parametrize(
    ("now", "age", "error"),
    [
        (float("nan"), 1, InvalidArgument),
        (1, float("inf"), InvalidArgument),
        (1, -1, InvalidArgument),
        ("1", 1, InvalidType),
        (None, 1, InvalidType),
        (1, None, InvalidType),
        (True, 1, InvalidType),
    ],
)
def test_expiry_wants_finite_times(now, age, error):
    with pytest.raises(error):
        table().older_than(now=now, older_than_s=age)


def test_a_report_that_the_bookings_explain_changes_nothing():
    load = table()
    load.dispatch("a", booking(), decision=0)
    before = values(load)
    load.report(0, running=0, waiting=1, queued_prefill_tokens=100)
    assert values(load) == before


def test_a_request_that_already_runs_there_is_not_counted_twice():
    load = table()
    load.dispatch("a", booking(), decision=0)
    load.report(0, running=1, waiting=0)  # its first token is on the way to us
    assert (values(load)["running"], values(load)["waiting"]) == (0, 1)


def test_load_of_other_routers_is_added():
    load = table()
    load.dispatch("a", booking(), decision=0)
    load.report(0, running=5, waiting=3, queued_prefill_tokens=1000)
    assert values(load)["running"] + values(load)["waiting"] == 8
    assert (values(load)["waiting"], values(load)["queued_prefill_tokens"]) == (3, 1000)


def test_a_request_dispatched_after_the_report_adds_to_it():
    load = table()
    load.report(0, running=5, waiting=0)
    load.dispatch("a", booking(), decision=0)
    assert (values(load)["running"], values(load)["waiting"]) == (5, 1)


def test_a_later_report_replaces_the_foreign_load():
    load = table()
    load.report(0, running=5, waiting=2, queued_prefill_tokens=50)
    load.report(0, running=1, waiting=0)
    assert values(load)["running"] == 1
    assert values(load)["queued_prefill_tokens"] == 50  # not in this report
    load.report(0, queued_prefill_tokens=0)
    assert values(load)["queued_prefill_tokens"] == 0


@pytest.mark.parametrize(
    ("report", "error", "message"),
    [
        ({"running": -1, "waiting": 0}, InvalidArgument, "running must be at least 0, got -1"),
        ({"running": 1}, InvalidArgument, "reported together, got running=1, waiting=None"),
        ({"running": 1.5, "waiting": 0}, InvalidType, "running must be an int, got float"),
        ({"running": True, "waiting": 0}, InvalidType, "running must be an int, got bool"),
        (
            {"running": 1, "waiting": 2**40},
            InvalidArgument,
            r"waiting must be below 2\*\*40, got 1099511627776",
        ),
        ({"queued_prefill_tokens": 2**70}, InvalidArgument, r"queued_prefill_tokens must be below 2\*\*40"),
        ({"queued_prefill_tokens": -5}, InvalidArgument, "queued_prefill_tokens must be at least 0, got -5"),
        (
            {"running": 4, "waiting": 4, "queued_prefill_tokens": float("nan")},
            InvalidType,
            "queued_prefill_tokens must be an int, got float",
        ),
    ],
)
def test_a_bad_report_raises_and_changes_nothing(report, error, message):
    load = table()
    load.dispatch("a", booking(), decision=0)
    load.report(0, running=2, waiting=2)
    before = values(load)
    with pytest.raises(error, match=message):
        load.report(0, **report)
    assert values(load) == before


CALLS = st.lists(
    st.tuples(
        st.sampled_from(["dispatch", "first_token", "end", "report"]),
        st.integers(0, 4),
        st.integers(0, 1),
        st.integers(0, 5),
        st.integers(0, 5),
    ),
    max_size=40,
)


@given(CALLS)
def test_effective_load_is_bookings_plus_foreign_and_never_negative(calls):
    load, booked, foreign = table(), {}, np.zeros((2, 3), dtype=int)
    for call, request, row, x, y in calls:
        if call == "dispatch" and request not in booked:
            booked[request] = [row, x, True]
            load.dispatch(request, booking(row=row, new=x), decision=0)
        elif call == "first_token" and request in booked and booked[request][2]:
            booked[request][2] = False
            load.first_token(request)
        elif call == "end" and request in booked:
            del booked[request]
            load.end(request)
        elif call == "report":
            load.report(row, running=x, waiting=y, queued_prefill_tokens=3 * x)
            here = [b for b in booked.values() if b[0] == row]
            total = max(0, x + y - len(here))
            waiting = min(total, max(0, y - sum(b[2] for b in here)))
            foreign[row] = max(0, 3 * x - sum(b[1] for b in here if b[2])), total - waiting, waiting
        for at in (0, 1):
            here = [b for b in booked.values() if b[0] == at]
            expected = (
                sum(b[1] for b in here if b[2]) + foreign[at][0],
                sum(not b[2] for b in here) + foreign[at][1],
                sum(b[2] for b in here) + foreign[at][2],
            )
            assert tuple(values(load, at)[name] for name in LOAD_COLUMNS[:3]) == expected
            assert min(expected) >= 0
