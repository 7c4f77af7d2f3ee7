"""A proxy with mulsched in it: docs/your-proxy.md. It needs the extra ``gateway``.

mulsched mock-engine --count 3 --kv-events tcp://127.0.0.1:5557 --kv-replay tcp://127.0.0.1:5657
python own_proxy.py 8080 http://127.0.0.1:8000 http://127.0.0.1:8001 http://127.0.0.1:8002
"""

import asyncio
import json
import sys
import uuid
from collections import Counter
from time import monotonic

import aiohttp
from aiohttp import web

from mulsched import Lifecycle, Router
from mulsched.events import KvEventSubscriber, LoadPoller, discover_kv_events
from mulsched.mock_engine.tokenizer import ByteTokenizer

ATTEMPTS = 3
ELSEWHERE = (502, 503, 504)  # statuses after which another engine may do better
JSON = {"Content-Type": "application/json"}
REST_S = 5.0  # how long an engine that failed is left out, unless there is no other
TIMEOUT = aiohttp.ClientTimeout(
    total=None, sock_connect=5, sock_read=300
)  # the default cuts streams at 300 s


def tokens_of(body):
    """Return what the mock engine makes of a chat; of a model, ``mulsched.prompt_reader`` knows it."""
    try:
        return ByteTokenizer().chat(
            [(each["role"], each["content"]) for each in json.loads(body)["messages"]]
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return [0]  # no whole block, so placed by load: the engine will say what is wrong


class Proxy:
    """Chats to engines, which go by their URLs here and in the router."""

    def __init__(self, *, block_size=16, cache_blocks=60_000):
        self.router = Router(block_size=block_size)
        self.lives = Lifecycle(self.router, expire_after_s=900)
        self.cache_blocks = cache_blocks
        self.tasks, self.resting = {}, {}
        self.expected, self.prompts = Counter(), Counter()  # tokens by engine

    async def add(self, url):
        """Take an engine in. Raises aiohttp.ClientError, TimeoutError if it does not answer."""
        sources = await discover_kv_events(url)
        self.router.add_instance(url, cache_blocks=self.cache_blocks)  # predicted, until its first event
        runs = [LoadPoller(self.router, url, f"{url}/metrics").run()]
        if len(sources) == 1:  # none: the prediction stays; several: its ranks, each an instance of its own
            (of,) = sources
            more = {"replay_endpoint": of.replay_endpoint, "topic": of.topic}
            runs.append(KvEventSubscriber(self.router, url, of.endpoint, **more).run())
        self.tasks[url] = [asyncio.create_task(run) for run in runs]

    def remove(self, url):
        """Forget an engine. Requests that it has go on, and their ends change nothing."""
        for task in self.tasks.pop(url):
            task.cancel()
        self.lives.remove_instance(url)

    def candidates(self, tried):
        """Return the engines that may be asked: health checks of your own belong here."""
        left = [each for each in self.router.instances if each not in tried]
        return [each for each in left if self.resting.get(each, 0.0) <= monotonic()] or left

    async def answer(self, request):
        """Send a request where it costs least, and elsewhere if that fails before the first byte."""
        body = await request.read()
        tokens, request_id, tried = tokens_of(body), uuid.uuid4().hex, []
        reply, end = web.StreamResponse(), self.lives.cancel
        try:
            while len(tried) < ATTEMPTS and (left := self.candidates(tried)):
                # under the same id again it is a retry, and the booking moves
                decision = self.lives.route(tokens, request_id=request_id, candidates=left, now=monotonic())
                tried.append(url := decision.instance)
                try:
                    async with self.http.post(url + request.path, data=body, headers=JSON) as engine:
                        piece = await engine.content.readany()
                        if engine.status not in ELSEWHERE:
                            await self.relay(request, reply, engine, piece, decision)
                            end = self.lives.finish if engine.status < 400 else end
                            return reply
                except (aiohttp.ClientError, TimeoutError):
                    if request.transport is None:  # not the engine failed: the client is gone
                        return reply
                    if reply.prepared:  # too late for another engine: the answer breaks off
                        raise
                self.resting[url] = monotonic() + REST_S
            raise web.HTTPBadGateway() if tried else web.HTTPServiceUnavailable()
        finally:  # here too when a client goes away, which cancels this task
            if tried:
                end(request_id, now=monotonic())

    async def relay(self, request, reply, engine, piece, decision):
        """Send an answer back as it comes; its first piece is the first token."""
        reply.set_status(engine.status)
        reply.content_type = engine.content_type
        await reply.prepare(request)
        if engine.status < 400:
            self.lives.first_token(decision.request_id, now=monotonic())
            self.expected[decision.instance] += decision.hit_tokens
            self.prompts[decision.instance] += decision.columns.request.prompt_tokens
        while piece:
            await reply.write(piece)
            piece = await engine.content.readany()
        await reply.write_eof()

    async def hits(self, request):
        """Show what was expected to be cached, to be compared with what the engines say."""
        tokens = {url: {"hit": self.expected[url], "prompt": self.prompts[url]} for url in self.tasks}
        return web.json_response({"tokens": tokens, "under_way": len(self.lives)})


def application(proxy, urls):
    """Return the web application."""

    async def run(app):
        async with aiohttp.ClientSession(timeout=TIMEOUT) as proxy.http:
            for url in urls:
                await proxy.add(url)
            yield
            for url in list(proxy.tasks):
                proxy.remove(url)

    app = web.Application(client_max_size=32 * 2**20)
    app.cleanup_ctx.append(run)
    app.router.add_post("/v1/chat/completions", proxy.answer)
    app.router.add_get("/hits", proxy.hits)
    return app


if __name__ == "__main__":
    port, *urls = sys.argv[1:]
    # handler_cancellation: else a client's leaving shows at the next write only, and never during a prefill;
    # reuse_port: several processes may serve one port, at the cost of several routers
    web.run_app(application(Proxy(), urls), port=int(port), handler_cancellation=True, reuse_port=True)
