"""A real Envoy between clients and mock engines, with the picker beside it. Opt in with ``-m envoy``."""

import asyncio
import io
import json
import socket
import subprocess
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from envoys import DESTINATION, Envoy, binary, config, engines_by_header, engines_by_metadata
from test_envoy_exchange import new_picker

from mulsched import Namespace
from mulsched.adapters.envoy import PickerServer
from mulsched.mock_engine.engine import MockEngine
from mulsched.mock_engine.server import MockServer
from mulsched.mock_engine.tokenizer import ByteTokenizer
from mulsched.replay.profile import Profile

pytestmark = pytest.mark.envoy
PROFILE = Profile("fast", lambda *load: 1e-4, block_size=4, kv_blocks=1000)
FULL = "FULL_DUPLEX_STREAMED"


class Setup:
    """Two mock engines, a picker that knows them, an Envoy that asks it, and a client."""

    def __init__(self, directory, request=FULL, response=FULL, *, by_metadata=False, engines=2, **options):
        self.directory, self.modes = directory, {"request": request, "response": response}
        self.by_metadata, self.n_engines, self.options = by_metadata, engines, options

    async def __aenter__(self):
        self.stack = []
        ports = [await self._engine(i) for i in range(self.n_engines)]
        ports += self.options.pop("more_ports", [])
        self.endpoints = [f"127.0.0.1:{port}" for port in ports]
        subset = self.options.pop("subset", None)
        subset = subset if subset is None else [self.endpoints[i] for i in subset]
        self.picker = new_picker(*self.endpoints, **self.options)
        server = PickerServer(self.picker, max_body_bytes=10**6)
        self.stack.append(server.stop)
        port = await server.start("127.0.0.1:0")
        cluster = engines_by_metadata(*ports) if self.by_metadata else engines_by_header()
        self.envoy = Envoy(self.directory, config(port, **self.modes, engines=cluster, subset=subset))
        await self.envoy.__aenter__()
        self.http = aiohttp.ClientSession(self.envoy.url)
        return self

    async def _engine(self, i):
        engine = MockEngine(f"gpu-{i}", PROFILE)
        server = MockServer(engine, ByteTokenizer(), model="mock", clock=lambda: 0.0)
        self.stack.append(server.stop)
        return await server.start("127.0.0.1", 0)

    async def __aexit__(self, *error):
        await self.http.close()
        await self.envoy.__aexit__(*error)
        for stop in reversed(self.stack):
            await stop()

    async def chat(self, text, headers=None, **more):
        """Ask; return the status, the answer's bytes, and how many prompt tokens the engine had cached."""
        messages = [{"role": "user", "content": text}]
        body = {"model": "mock", "max_tokens": 4, "messages": messages} | more
        data = io.BytesIO(json.dumps(body).encode())
        async with self.http.post("/v1/chat/completions", data=data, headers=headers) as response:
            data = await response.read()
            if response.status != 200 or more.get("stream"):
                return response.status, data, 0
            usage = (await response.json())["usage"]
            return response.status, data, usage["prompt_tokens_details"]["cached_tokens"]


def run(scenario, *arguments, **options):
    async def guarded():
        async with Setup(*arguments, **options) as setup:
            await scenario(setup)
            while len(setup.picker.lifecycle):
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(guarded(), 60))


async def until(condition):
    while not condition():
        await asyncio.sleep(0.005)


def closed_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize(
    ("request_mode", "response_mode", "by_metadata"),
    [
        (FULL, FULL, False),
        (FULL, FULL, True),
        ("BUFFERED", "STREAMED", False),
        ("BUFFERED", "BUFFERED", True),
        ("BUFFERED_PARTIAL", "NONE", False),
    ],
)
def test_prompts_return_to_the_engine_that_cached_them(tmp_path, request_mode, response_mode, by_metadata):
    async def scenario(setup):
        texts = [word * 100 for word in ("sea ", "sky ", "sun ", "fog ")]
        for text in texts:
            status, _, cached = await setup.chat(text)
            assert (status, cached) == (200, 0)
        for text in texts * 2:
            status, _, cached = await setup.chat(text)
            assert status == 200
            assert cached >= 96
        await until(lambda: setup.picker.counts["finished"] == 12)
        assert dict(setup.picker.counts) == {"picked": 12, "finished": 12}

    run(scenario, tmp_path, request_mode, response_mode, by_metadata=by_metadata)


@pytest.mark.parametrize("response_mode", [FULL, "STREAMED"])
def test_a_stream_passes_unchanged(tmp_path, response_mode):
    async def scenario(setup):
        status, data, _ = await setup.chat("sea " * 10, stream=True)
        assert status == 200
        assert data.count(b'"content":" ') == 4
        assert data.endswith(b"data: [DONE]\n\n")

    run(scenario, tmp_path, FULL if response_mode == FULL else "BUFFERED", response_mode)


@pytest.mark.parametrize(("request_mode", "response_mode"), [("NONE", "BUFFERED"), ("STREAMED", FULL)])
def test_without_the_body_the_load_decides(tmp_path, request_mode, response_mode):
    async def scenario(setup):
        assert (await setup.chat("sea"))[0] == 200
        await until(lambda: setup.picker.counts["finished"])
        assert dict(setup.picker.counts) == {"picked": 1, "without_prompt": 1, "finished": 1}

    run(scenario, tmp_path, request_mode, response_mode)


def test_a_long_body_passes_unchanged(tmp_path):
    async def scenario(setup):
        status, _, _ = await setup.chat("sea " * 3_000, max_tokens=1)
        assert status == 200
        status, data, _ = await setup.chat("sea " * 10**6)
        assert (status, b"exceeds" in data) == (413, True)

    run(scenario, tmp_path)


def test_the_load_decides_for_requests_without_a_prompt(tmp_path):
    async def scenario(setup):
        async with setup.http.get("/v1/models") as response:
            assert (await response.json())["data"][0]["id"] == "mock"
        async with setup.http.post("/v1/chat/completions", data=b"{") as response:
            assert response.status == 400
        assert dict(setup.picker.counts) == {"picked": 1, "without_prompt": 1, "cancelled": 1}

    run(scenario, tmp_path)


def test_a_client_cannot_choose(tmp_path):
    async def scenario(setup):
        status, _, _ = await setup.chat("sea", headers={DESTINATION: f"127.0.0.1:{closed_port()}"})
        assert status == 200

    run(scenario, tmp_path)


def test_only_the_subset_is_asked(tmp_path):
    async def scenario(setup):
        for text in ("sea ", "sky ", "sun "):
            assert (await setup.chat(text * 100))[0] == 200
        await until(lambda: setup.picker.counts["finished"] == 3)
        select, model = setup.picker.lifecycle.router.select_text, Namespace(model="mock")
        text = "<user>\n" + "sea " * 100
        hits = [select(text, candidates=[each], namespace=model).hit_tokens for each in setup.endpoints]
        assert [hit > 0 for hit in hits] == [False, True]

    run(scenario, tmp_path, subset=[1])


@pytest.mark.parametrize(("subset", "status"), [([], 503), (None, 200)])
def test_an_empty_subset_is_answered_with_503(tmp_path, subset, status):
    async def scenario(setup):
        assert (await setup.chat("sea"))[0] == status

    run(scenario, tmp_path, subset=subset)


def test_a_dead_engine_is_an_error_and_leaves_nothing_booked(tmp_path):
    async def scenario(setup):
        assert (await setup.chat("sea"))[0] == 503
        assert setup.picker.counts["cancelled"] == 1

    run(scenario, tmp_path, engines=0, more_ports=[closed_port()])


def test_a_fallback_answers_for_a_dead_engine_and_has_the_booking(tmp_path):
    async def scenario(setup):
        for text in ("sea ", "sky ", "sun ", "fog "):
            assert (await setup.chat(text * 50))[0] == 200
        assert setup.picker.counts["moved"] >= 1
        assert setup.picker.counts["finished"] == 4

    run(scenario, tmp_path, by_metadata=True, engines=1, more_ports=[closed_port()], fallbacks=1)


@pytest.mark.parametrize(("request_mode", "response_mode"), [(FULL, FULL), ("BUFFERED", "STREAMED")])
def test_a_client_that_goes_away_cancels(tmp_path, request_mode, response_mode):
    async def scenario(setup):
        started, released = asyncio.Event(), asyncio.Event()

        async def endless(request):
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(b"data: x\n\n")
            started.set()
            await released.wait()
            return response

        app = web.Application()
        app.router.add_post("/v1/completions", endless)
        runner = web.AppRunner(app, shutdown_timeout=0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        endpoint = f"127.0.0.1:{runner.addresses[0][1]}"
        router = setup.picker.lifecycle.router
        for other in router.instances:
            setup.picker.lifecycle.remove_instance(other)
        router.add_instance(endpoint)
        async with setup.http.post("/v1/completions", json={"prompt": "sea"}) as response:
            await response.content.readany()
            await started.wait()
            while router.load(endpoint)["running"] == 0:
                await asyncio.sleep(0.01)
            response.close()
        while not setup.picker.counts["cancelled"]:
            await asyncio.sleep(0.01)
        released.set()
        await runner.cleanup()

    run(scenario, tmp_path, request_mode, response_mode)


def test_the_example_is_valid():
    example = Path(__file__).parents[2] / "docs" / "examples" / "envoy.yaml"
    checked = subprocess.run([binary(), "--mode", "validate", "-c", example], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
