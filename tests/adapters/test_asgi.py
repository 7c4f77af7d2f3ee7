"""The ASGI middleware by its messages, and in front of a Starlette proxy."""

import asyncio
import json

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route

from mulsched.adapters.asgi import INSTANCE, LMetricMiddleware

INSTANCES = ["http://a", "http://b", "http://c"]


def chat(text):
    return json.dumps({"messages": [{"role": "user", "content": text}]}).encode()


async def post(app, body, sent=None, *, parts=1):
    size = -(-len(body) // parts)
    messages = [
        {"type": "http.request", "body": body[i * size : (i + 1) * size], "more_body": i + 1 < parts}
        for i in range(parts)
    ]

    async def receive():
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message):
        if sent is not None:
            sent.append(message)

    await app({"type": "http", "method": "POST", "path": "/", "state": {"own": 1}}, receive, send)


class Proxy:
    """Answers in two parts; keeps what it was given, and the load that it met before and between."""

    def __init__(self, status=200, parts=(b"one", b"two"), error=None, instances=INSTANCES):
        self.app = LMetricMiddleware(self, instances=instances, clock=lambda: 0.0)
        self.status, self.parts, self.error = status, parts, error
        self.chosen, self.bodies, self.loads = [], [], []

    @property
    def lifecycle(self):
        return self.app.bodies.lifecycle

    def look(self):
        self.loads.append(self.lifecycle.router.load(self.chosen[-1]))

    async def __call__(self, scope, receive, send):
        assert scope["state"]["own"] == 1
        self.chosen.append(scope["state"][INSTANCE])
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        self.bodies.append(body)
        self.look()
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        for i, part in enumerate(self.parts):
            await send({"type": "http.response.body", "body": part, "more_body": i + 1 < len(self.parts)})
            self.look()
        if self.error is not None:
            raise self.error


def test_the_application_gets_the_body_that_was_read_for_it():
    proxy = Proxy()
    asyncio.run(post(proxy.app, chat("hello"), parts=3))
    assert proxy.bodies == [chat("hello")]


def test_the_first_part_of_an_answer_is_the_first_token_and_the_last_its_end():
    proxy = Proxy()
    asyncio.run(post(proxy.app, chat("hello" * 100)))
    queued = [load["queued_prefill_tokens"] > 0 for load in proxy.loads]
    assert (queued, len(proxy.lifecycle)) == ([True, False, False], 0)


def test_a_conversation_stays_with_the_instance_that_holds_its_prefix():
    proxy = Proxy()
    for topic in "abc":
        for turn in range(3):
            asyncio.run(post(proxy.app, chat(topic * 1000 + "!" * turn)))
    assert [len(set(proxy.chosen[i : i + 3])) for i in (0, 3, 6)] == [1, 1, 1]
    assert set(proxy.chosen) == set(INSTANCES)


def test_concurrent_requests_do_not_herd():
    async def run():
        proxy = Proxy()
        gate, inner = asyncio.Event(), []

        async def held(scope, receive, send):
            inner.append(scope["state"][INSTANCE])
            await gate.wait()

        app = LMetricMiddleware(held, instances=INSTANCES)
        tasks = [asyncio.ensure_future(post(app, chat(f"{i} " * 300))) for i in range(12)]
        while len(inner) < 12:
            await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(*tasks)
        return sorted(inner.count(each) for each in INSTANCES), len(proxy.lifecycle)

    assert asyncio.run(run()) == ([4, 4, 4], 0)


@pytest.mark.parametrize("proxy", [Proxy(status=500), Proxy(parts=())], ids=["error", "nothing sent"])
def test_a_request_that_failed_leaves_nothing_booked_and_nothing_cached(proxy):
    asyncio.run(post(proxy.app, chat("hello" * 100)))
    index = proxy.lifecycle.router.index
    assert (len(proxy.lifecycle), [index.blocks(each) for each in INSTANCES]) == (0, [0, 0, 0])


def test_an_exception_of_the_application_passes_and_ends_the_request():
    proxy = Proxy(parts=(), error=RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(post(proxy.app, chat("hello")))
    assert len(proxy.lifecycle) == 0


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'{"prompt": []}', b"[" * 100_000])
def test_a_body_without_a_prompt_is_placed_by_load(body):
    proxy = Proxy()
    asyncio.run(post(proxy.app, body))
    assert proxy.bodies == [body]
    assert proxy.chosen[0] in INSTANCES


def test_without_instances_a_request_is_refused():
    sent = []
    asyncio.run(post(Proxy(instances=[]).app, chat("hello"), sent))
    assert sent[0]["status"] == 503


def test_an_instance_that_is_taken_away_under_a_request_gets_no_more():
    proxy = Proxy()
    proxy.look = lambda: proxy.app.set_instances(["http://new"])
    for _ in range(2):
        asyncio.run(post(proxy.app, chat("hello" * 100)))
    assert proxy.chosen[1] == "http://new"
    assert len(proxy.lifecycle) == 0


def test_other_connections_are_passed_on_unchanged():
    async def inner(scope, receive, send):
        seen.append((scope, receive, send))

    seen, scope = [], {"type": "lifespan"}
    asyncio.run(LMetricMiddleware(inner)(scope, post, chat))
    assert seen == [(scope, post, chat)]


def test_a_starlette_proxy_streams_from_the_instance_that_holds_the_prefix():
    async def engine(scope, receive, send):
        body = json.dumps({"engine": scope["server"][0]}).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    async def forward(request):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(engine)) as client:
            answer = await client.post(getattr(request.state, INSTANCE), content=await request.body())
        return StreamingResponse(iter([answer.content]))

    async def run():
        app = LMetricMiddleware(
            Starlette(routes=[Route("/", forward, methods=["POST"])]), instances=INSTANCES
        )
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
            answers = [(await client.post("/", content=chat(t * 1000))).json()["engine"] for t in "aabbcc"]
        return answers, len(app.bodies.lifecycle)

    answers, booked = asyncio.run(run())
    assert answers[::2] == answers[1::2]
    assert (len(set(answers)), booked) == (3, 0)
