"""The production-stack adapter against a stand-in of vllm_router's interface, which pip cannot install.

The stand-in does what the real router's request loop does with a routing logic: it awaits ``route_request``
with the body if the logic is a ``PrefixAwareRouter``, and asks again without the endpoints that failed.
"""

import asyncio
import json
import runpy
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from mulsched.errors import MissingExtra

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "production_stack.py"
URLS = ["http://a", "http://b", "http://c"]


@dataclass
class Endpoint:
    url: str


class PrefixAwareRouter:
    async def route_request(self, endpoints, engine_stats, request_stats, request, request_json):
        raise NotImplementedError


class Stack:
    """The application around a routing logic."""

    def __init__(self, adapter, **options):
        self.layers = []
        self.urls, self.failing, self.tried = list(URLS), set(), []
        self.gate = asyncio.Event()
        self.gate.set()
        self.router = adapter.install(self, clock=lambda: 0.0, **options)

    @property
    def lifecycle(self):
        return self.router.bodies.lifecycle

    def add_middleware(self, layer, **options):
        self.layers.append((layer, options))

    async def respond(self, scope, receive, send):
        body = json.loads((await receive())["body"])
        request = SimpleNamespace(scope=scope)
        assert isinstance(self.router, PrefixAwareRouter)
        left = [Endpoint(url) for url in self.urls]
        while left:
            url = await self.router.route_request(left, {}, {}, request, body)
            self.tried.append(url)
            await self.gate.wait()
            if url not in self.failing:
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": b"{}"})
                return
            left = [endpoint for endpoint in left if endpoint.url != url]
        await send({"type": "http.response.start", "status": 503, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def post(self, text):
        app = self.respond
        for layer, options in self.layers:
            app = layer(app, **options)

        async def receive():
            return {"type": "http.request", "body": json.dumps({"model": "m", "prompt": text}).encode()}

        async def send(message):
            pass

        await app({"type": "http", "method": "POST", "path": "/v1/completions"}, receive, send)


@pytest.fixture
def adapter(monkeypatch):
    logic = ModuleType("vllm_router.routers.routing_logic")
    logic.PrefixAwareRouter = PrefixAwareRouter
    for name in ("vllm_router", "vllm_router.routers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, logic.__name__, logic)
    monkeypatch.delitem(sys.modules, "mulsched.adapters.production_stack", raising=False)
    import mulsched.adapters.production_stack as module

    yield module
    del sys.modules["mulsched.adapters.production_stack"]


def test_a_prefix_stays_with_the_endpoint_that_holds_it(adapter):
    stack = Stack(adapter)
    for topic in "abc":
        for turn in range(3):
            asyncio.run(stack.post(topic * 1000 + "!" * turn))
    assert [len(set(stack.tried[i : i + 3])) for i in (0, 3, 6)] == [1, 1, 1]
    assert set(stack.tried) == set(URLS)


def test_concurrent_requests_do_not_herd(adapter):
    async def run():
        stack = Stack(adapter)
        stack.gate.clear()
        tasks = [asyncio.ensure_future(stack.post(f"{i} " * 300)) for i in range(12)]
        while len(stack.tried) < 12:
            await asyncio.sleep(0)
        stack.gate.set()
        await asyncio.gather(*tasks)
        return Counter(stack.tried), len(stack.lifecycle)

    assert asyncio.run(run()) == (Counter(dict.fromkeys(URLS, 4)), 0)


def test_a_failover_moves_the_booking(adapter):
    stack = Stack(adapter)
    stack.failing = {"http://a", "http://b"}
    asyncio.run(stack.post("hello" * 100))
    assert stack.tried[-1] == "http://c"
    assert (len(stack.lifecycle), stack.lifecycle.counts.retried) == (0, len(stack.tried) - 1)


def test_a_request_that_fails_everywhere_leaves_nothing_booked_and_nothing_cached(adapter):
    stack = Stack(adapter)
    stack.failing = set(URLS)
    asyncio.run(stack.post("hello" * 100))
    index = stack.lifecycle.router.index
    assert (len(stack.lifecycle), [index.blocks(url) for url in URLS]) == (0, [0, 0, 0])


def test_an_endpoint_that_went_away_is_not_chosen(adapter):
    stack = Stack(adapter)
    asyncio.run(stack.post("hello" * 100))
    stack.urls.remove(stack.tried[0])
    asyncio.run(stack.post("hello" * 100))
    assert stack.tried[1] != stack.tried[0]


def test_the_example_serves_with_our_router_in_place_of_theirs(adapter, monkeypatch):
    served = []
    app = SimpleNamespace(state=SimpleNamespace(), layers=[])
    app.add_middleware = lambda layer, **options: app.layers.append(options["router"])

    def initialize_all(app, args):
        app.state.router = "theirs"

    def run(app, **where):
        served.append((app.state.router, where))

    for name, contents in {
        "uvicorn": {"run": run},
        "vllm_router.app": {"app": app, "initialize_all": initialize_all},
        "vllm_router.parsers": {},
        "vllm_router.parsers.parser": {"parse_args": lambda: SimpleNamespace(host="127.0.0.1", port=9000)},
    }.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert served == [(app.layers[0], {"host": "127.0.0.1", "port": 9000})]
    assert isinstance(app.layers[0], PrefixAwareRouter)


def test_without_vllm_router_the_error_says_where_it_is_from(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm_router", None)
    monkeypatch.delitem(sys.modules, "mulsched.adapters.production_stack", raising=False)
    with pytest.raises(MissingExtra, match="vllm-project/production-stack"):
        import mulsched.adapters.production_stack  # noqa: F401
