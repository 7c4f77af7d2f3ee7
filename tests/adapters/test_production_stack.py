"""The production-stack adapter and its example, in the stand-in of ``production_stacks``."""

import asyncio
import runpy
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from production_stacks import URLS, OneOfEach, Stack

from mulsched.errors import LifecycleError, MissingExtra

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "production_stack.py"
ADAPTER = "mulsched.adapters.production_stack"


@pytest.fixture
def stack(monkeypatch):
    """A stack whose modules can be imported, by the adapter too."""
    monkeypatch.setattr(OneOfEach, "made", {})
    stack = Stack()
    for name, module in stack.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, ADAPTER, raising=False)
    yield stack
    sys.modules.pop(ADAPTER, None)


def with_ours(stack, **options):
    """Put our router into the stack as the documentation says."""
    from mulsched.adapters.production_stack import install

    router = install(stack.app, clock=lambda: 0.0, **options)
    stack.initialize_all(stack.app, stack.args)
    router.take_over(stack.app)
    return router.bodies.lifecycle


def test_a_prefix_stays_with_the_endpoint_that_holds_it(stack):
    with_ours(stack)
    for topic in "abc":
        for turn in range(3):
            asyncio.run(stack.post(topic * 1000 + "!" * turn))
    assert [len(set(stack.tried[i : i + 3])) for i in (0, 3, 6)] == [1, 1, 1]
    assert set(stack.tried) == set(URLS)


def test_concurrent_requests_do_not_herd(stack):
    async def run():
        lifecycle = with_ours(stack)
        stack.gate.clear()
        tasks = [asyncio.ensure_future(stack.post(f"{i} " * 300)) for i in range(12)]
        while len(stack.tried) < 12:
            await asyncio.sleep(0)
        stack.gate.set()
        await asyncio.gather(*tasks)
        return Counter(stack.tried), len(lifecycle)

    assert asyncio.run(run()) == (Counter(dict.fromkeys(URLS, 4)), 0)


def test_a_failover_moves_the_booking(stack):
    stack.args.max_instance_failover_reroute_attempts = 2
    stack.failing = {"http://a", "http://b"}
    lifecycle = with_ours(stack)
    assert asyncio.run(stack.post("hello" * 100)) == 200
    assert stack.tried[-1] == "http://c"
    assert (len(lifecycle), lifecycle.counts.retried) == (0, len(stack.tried) - 1)


def test_a_request_fails_over_as_often_as_the_stack_was_told(stack):
    stack.args.max_instance_failover_reroute_attempts = 1
    stack.failing = set(URLS)
    with_ours(stack)
    with pytest.raises(ConnectionError):
        asyncio.run(stack.post("hello" * 100))
    assert len(stack.tried) == 2


def test_a_stack_without_failovers_is_taken_over_too(stack):
    stack.initialize_all = lambda app, args: setattr(app.state, "router", object())
    with_ours(stack)
    assert asyncio.run(stack.post("hello" * 100)) == 200


def test_a_request_that_fails_everywhere_leaves_nothing_booked_and_nothing_cached(stack):
    stack.args.max_instance_failover_reroute_attempts = 5
    stack.failing = set(URLS)
    lifecycle = with_ours(stack)
    with pytest.raises(ConnectionError):
        asyncio.run(stack.post("hello" * 100))
    index = lifecycle.router.index
    assert (len(lifecycle), [index.blocks(url) for url in URLS]) == (0, [0, 0, 0])


def test_an_endpoint_that_went_away_is_not_chosen(stack):
    with_ours(stack)
    asyncio.run(stack.post("hello" * 100))
    stack.urls.remove(stack.tried[0])
    asyncio.run(stack.post("hello" * 100))
    assert stack.tried[1] != stack.tried[0]


def test_a_second_install_in_a_process_is_refused(stack):
    with_ours(stack)
    with pytest.raises(LifecycleError, match="one router of a class in a process"):
        with_ours(stack, cache_tokens=100_000)


def test_the_example_serves_with_our_router_in_place_of_theirs(stack, monkeypatch):
    places = []

    def run(app, **place):
        places.append(place)
        for text in ("a" * 1000, "a" * 1000, "b" * 1000, "b" * 1000):
            assert asyncio.run(stack.post(text, app)) == 200

    uvicorn = ModuleType("uvicorn")
    uvicorn.run = run
    monkeypatch.setitem(sys.modules, "uvicorn", uvicorn)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    first, again, other, once_more = stack.tried
    assert first == again != other == once_more
    assert places == [{"host": "127.0.0.1", "port": 9000}]


def test_without_vllm_router_the_error_says_where_it_is_from(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm_router", None)
    monkeypatch.delitem(sys.modules, ADAPTER, raising=False)
    with pytest.raises(MissingExtra, match="vllm-project/production-stack"):
        import mulsched.adapters.production_stack  # noqa: F401
