"""The benchmark of a router's view: its page shows its results, and its routers see what they say."""

import json
from pathlib import Path

import pytest

from mulsched import Router

HERE = Path(__file__).parent.parent
RESULTS = HERE / "benchmarks" / "router_view" / "results.json"


def test_the_page_shows_every_row_of_the_results():
    from router_view.run import table

    rows = table(json.loads(RESULTS.read_text())).splitlines()
    page = (HERE / "docs" / "lifecycle-results.md").read_text()
    assert len(rows) == 2 + 5 * 9 + 6 * 3
    assert [row for row in rows if row not in page] == []


def test_a_discount_lies_between_counting_and_not_counting():
    from router_view.views import DiscountingRouter

    prompt = list(range(1600))
    made = [Router(in_flight="ignore"), DiscountingRouter(), Router(in_flight="cached")]
    for router in made:
        router.add_instance("a")
        router.route(prompt, request_id=1)
    new = [int(router.select(prompt).columns.new_prefill_tokens[0]) for router in made]
    # 1,584 tokens in flight, 1,600 queued
    assert new == [1600, 1600 - 1584**2 // (1584 + 1600), 16]


@pytest.mark.parametrize(("rate", "waiting"), [(None, 1), (100.0, 0)])
def test_a_silent_router_hears_no_first_token(rate, waiting):
    from router_view.views import SilentRouter

    router = SilentRouter(rate)
    router.add_instance("a")
    router.route_keys([1, 2], prompt_tokens=32, request_id=1, now=0.0)
    router.first_token(1)
    router.lives.advance(1.0)
    assert router.router.load("a")["waiting"] == waiting
    router.now = 2.0
    router.finish(1)
    assert router.router.load("a")["running"] == 0


def test_several_routers_know_their_own_requests_at_once_and_those_of_others_after_a_poll():
    from router_view.views import SeveralRouters

    both = SeveralRouters(2, poll_s=1.0)
    both.add_instance("a")
    for i, now in enumerate((0.0, 0.1, 1.0)):
        both.route_keys([1, 2], prompt_tokens=32, request_id=i, now=now)
        waiting = [router.load("a")["waiting"] for router in both.routers]
        assert waiting == [[1, 0], [1, 1], [3, 2]][i]
    for i in range(3):
        both.first_token(i)
        both.finish(i)
    assert (both.running["a"], both.waiting["a"]) == (0, 0)
