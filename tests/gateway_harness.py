"""A gateway in front of engines, and clients of it."""

import asyncio
import itertools
import json

import aiohttp
from fake_engine import FakeEngine

from mulsched.gateway import EngineConfig, Gateway, GatewayConfig

CHAT = "/v1/chat/completions"
ASK = {"model": "m", "messages": [{"role": "user", "content": "the secret of the prompt"}]}


class Front:
    """The gateway, its engines in order, and an HTTP client of it."""

    def __init__(self, answers, *, engines=(), prompts=None, before=None, recorder=None, **config):
        self._answers, self._others, self._prompts, self._config = answers, engines, prompts, config
        self._before, self._recorder = before, recorder
        self.logged = []

    async def __aenter__(self):
        self.engines = [await FakeEngine(answer).__aenter__() for answer in self._answers]
        if self._before is not None:
            self._before(self)
        # engines are checked when a test says so
        config = {"health_period_s": 3600.0, "drain_timeout_s": 30.0, "linger_s": 0.01} | self._config
        self.gateway = Gateway(
            GatewayConfig((*(EngineConfig(engine.url) for engine in self.engines), *self._others), **config),
            new_id=map("id-{}".format, itertools.count(1)).__next__,
            prompts=self._prompts,
            recorder=self._recorder,
            log=lambda event, **fields: self.logged.append({"event": event, **fields}),
        )
        self.port = await self.gateway.start("127.0.0.1", 0)
        self.http = aiohttp.ClientSession(f"http://127.0.0.1:{self.port}")
        return self

    async def __aexit__(self, *error):
        await self.http.close()
        await self.gateway.stop()
        for engine in self.engines:
            await engine.__aexit__()

    async def post(self, path=CHAT, body=ASK, **headers):
        """Return status, JSON and headers."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.http.post(path, data=data, headers=headers) as response:
            return response.status, json.loads(await response.read()), response.headers

    async def get(self, path, **headers):
        async with self.http.get(path, headers=headers) as response:
            return response.status, await response.text()

    async def raw(self, data, *, half_close=False):
        """Send bytes; return all that comes back until the gateway closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        if half_close:
            writer.write_eof()
        answer = await reader.read()
        writer.close()
        return answer

    async def idle(self):
        """Wait until no request is under way."""
        await self.gateway.proxy.idle()

    def router_is_empty(self):
        """Whether nothing is booked any more."""
        return len(self.gateway.lifecycle) == 0

    def requests_logged(self):
        return [line for line in self.logged if line["event"] == "request"]


def run(scenario, *answers, **options):
    """Run ``scenario(front)`` over an engine for each answer; ``before(front)`` comes before the gateway."""

    async def guarded():
        async with asyncio.timeout(60), Front(answers, **options) as front:
            return await scenario(front)

    return asyncio.run(guarded())
