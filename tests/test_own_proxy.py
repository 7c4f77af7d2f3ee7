"""docs/your-proxy.md: its example in front of mock engines and of engines that fail, and its snippets."""

import asyncio
import contextlib
import importlib.util
import json
import re
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from fake_engine import FakeEngine, answers, dies, streams, waits_for_the_end

from mulsched.mock_engine.engine import MockEngine
from mulsched.mock_engine.kv_events import KvEventPublisher
from mulsched.mock_engine.server import MockServer
from mulsched.mock_engine.tokenizer import ByteTokenizer
from mulsched.replay import read_trace
from mulsched.replay.profile import Profile

DOCS = Path(__file__).parent.parent / "docs"
CHAT = "/v1/chat/completions"


@contextlib.asynccontextmanager
async def mock_engine(name, step_s=1e-4):
    anywhere = "tcp://127.0.0.1:*"
    engine = MockEngine(name, Profile("even", lambda *load: step_s, block_size=16, kv_blocks=1000))
    publisher = KvEventPublisher(anywhere, anywhere, clock=lambda: 0.0)
    server = MockServer(engine, ByteTokenizer(), model="mock", clock=lambda: 0.0, publisher=publisher)
    server.url = f"http://127.0.0.1:{await server.start('127.0.0.1', 0)}"
    try:
        yield server
    finally:
        await server.stop()


async def until(holds):
    while not holds():
        await asyncio.sleep(0)


class Front:
    """The example, served as its last lines say, and a client of it."""

    def __init__(self, example, engines):
        self.example, self.engines = example, engines
        self.proxy = example.Proxy(cache_blocks=1000)

    async def __aenter__(self):
        app = self.example.application(self.proxy, [engine.url for engine in self.engines])
        self.runner = web.AppRunner(app, handler_cancellation=True)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]
        self.http = aiohttp.ClientSession(f"http://127.0.0.1:{port}")
        return self

    async def __aexit__(self, *error):
        await self.http.close()
        await self.runner.cleanup()

    def ask(self, text="once", **options):
        messages = [{"role": "user", "content": text}]
        return self.http.post(CHAT, json={"model": "mock", "messages": messages, "max_tokens": 3} | options)

    async def answered(self, text="once", **options):
        async with self.ask(text, **options) as answer:
            return answer.status, await answer.read()


def run(scenario, *engines):
    """Run ``scenario(front)`` before engines: mock ones, or scripts of what an engine answers."""
    source = DOCS / "examples" / "own_proxy.py"
    spec = importlib.util.spec_from_file_location("own_proxy", source)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)

    async def guarded():
        async with asyncio.timeout(60), contextlib.AsyncExitStack() as stack:
            started = [await stack.enter_async_context(engine) for engine in engines]
            async with Front(example, started) as front:
                await scenario(front)
                assert len(front.proxy.lives) == 0

    asyncio.run(guarded())


def user(text):
    return {"role": "user", "content": text}


def test_a_stream_comes_back_as_the_engine_sends_it():
    async def scenario(front):
        status, streamed = await front.answered(stream=True)
        assert (status, streamed.count(b"data: ")) == (200, 5)
        assert streamed.endswith(b"data: [DONE]\n\n")

    run(scenario, mock_engine("a"), mock_engine("b"))


def test_a_follow_up_goes_to_its_prefix_and_the_engine_has_cached_what_was_expected():
    async def scenario(front):
        turns = [user("words " * 100)]
        _, first = await front.answered(messages=turns, max_tokens=40)
        (known,) = [each for each in front.engines if each.engine.counts["prompt_tokens"]]
        prompt = len(front.example.tokens_of(json.dumps({"messages": turns})))
        # only events tell of the blocks of an answer; its last token is not computed
        await until(lambda: front.proxy.router.index.blocks(known.url) == (prompt + 39) // 16)
        turns += [json.loads(first)["choices"][0]["message"], user("more")]
        await front.answered(messages=turns)
        async with front.http.get("/hits") as shown:
            expected = (await shown.json())["tokens"]
        counts = {engine.url: engine.engine.counts for engine in front.engines}
        assert expected == {
            url: {"hit": count["cached_tokens"], "prompt": count["prompt_tokens"]}
            for url, count in counts.items()
        }
        assert expected[known.url]["hit"] == (prompt + 39) // 16 * 16

    run(scenario, mock_engine("a"), mock_engine("b"))


def test_an_engine_that_dies_before_its_first_byte_is_replaced_and_left_out():
    async def scenario(front):
        dead, _ = front.engines
        assert [(await front.answered(text))[0] for text in ("one", "two", "three")] == [200, 200, 200]
        assert (len(dead.asked), front.proxy.lives.counts.retried) == (1, 1)

    run(scenario, FakeEngine(dies), mock_engine("a"))


def test_an_engine_that_is_not_up_to_it_is_replaced():
    async def scenario(front):
        assert await front.answered() == (200, b'{"ok": true}')

    run(scenario, FakeEngine(answers(status=503)), FakeEngine(answers()))


def test_without_an_engine_that_answers_the_client_is_told():
    async def scenario(front):
        assert (await front.answered())[0] == 502
        front.proxy.remove(front.engines[0].url)
        assert (await front.answered())[0] == 503

    run(scenario, FakeEngine(dies))


def test_an_answer_that_breaks_off_is_not_sent_again_and_does_not_look_whole():
    async def scenario(front):
        with pytest.raises(aiohttp.ClientPayloadError):
            await front.answered(stream=True)
        assert [len(engine.asked) for engine in front.engines] == [1, 0]

    run(scenario, FakeEngine(streams(b"data: 1\n\n", ends=False)), FakeEngine(answers()))


def test_a_client_that_leaves_during_the_prefill_takes_its_request_along():
    async def scenario(front):
        (engine,) = front.engines
        asking = asyncio.ensure_future(front.answered())
        await engine.arrived.wait()
        asking.cancel()
        await engine.asked[0].gone.wait()
        await until(lambda: len(front.proxy.lives) == 0)

    run(scenario, FakeEngine(waits_for_the_end()))


def test_a_client_that_leaves_a_stream_takes_its_request_along():
    async def scenario(front):
        (server,) = front.engines
        async with front.ask(stream=True, max_tokens=10_000, ignore_eos=True) as answer:
            await answer.content.readany()
            assert server.engine.running == 1
        await until(lambda: server.engine.running == len(front.proxy.lives) == 0)

    run(scenario, mock_engine("a", step_s=0.01))


def test_an_engine_that_is_removed_finishes_what_it_has():
    async def scenario(front):
        old, new = front.engines
        async with front.ask("a " * 500, stream=True) as answer:
            front.proxy.remove(old.url)
            held.set()
            assert await answer.read() == b"data: 1\n\ndata: 2\n\n"
        assert await front.answered("a " * 500) == (200, b'{"ok": true}')
        assert (len(old.asked), len(new.asked)) == (1, 1)

    held = asyncio.Event()
    run(scenario, FakeEngine(streams(b"data: 1\n\n", held, b"data: 2\n\n")), FakeEngine(answers()))


def test_a_body_that_cannot_be_read_is_for_the_engine_to_refuse():
    async def scenario(front):
        async with front.http.post(CHAT, data=b"{") as answer:
            assert answer.status == 400
            assert "not JSON" in (await answer.json())["error"]["message"]

    run(scenario, mock_engine("a"))


def names_of_the_page():
    """Run the page's snippets, one after another; return what they define."""
    page, names = (DOCS / "your-proxy.md").read_text(), {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(code, "your-proxy.md", "exec"), names)
    return names


def test_the_code_of_the_page_runs_and_leaves_nothing_booked():
    names = names_of_the_page()
    assert (len(names["lives"]), len(names["texts"])) == (0, 0)
    assert read_trace(names["log"]).output_tokens.tolist() == [40]


def test_the_code_of_the_page_follows_an_engine():
    async def scenario(router, follow):
        async with asyncio.timeout(60), mock_engine("a") as engine, aiohttp.ClientSession(engine.url) as http:
            router.add_instance(engine.url, cache_blocks=1000)
            following = asyncio.ensure_future(follow(engine.url))
            async with http.post("/v1/completions", json={"prompt": "words " * 100, "max_tokens": 40}):
                await until(lambda: router.index.blocks(engine.url) == (150 + 39) // 16)
            following.cancel()

    names = names_of_the_page()
    asyncio.run(scenario(names["router"], names["follow"]))
