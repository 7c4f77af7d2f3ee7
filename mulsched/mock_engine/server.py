"""The mock behind HTTP: one task drives the engine in time, and each request waits for its tokens."""

import asyncio
import base64
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import numpy as np
import xxhash

from mulsched.errors import InvalidArgument, MissingExtra
from mulsched.mock_engine.engine import MockEngine, Step, Tokens
from mulsched.mock_engine.kv_events import KvEventPublisher
from mulsched.mock_engine.metrics import EngineMetrics
from mulsched.mock_engine.protocol import (
    CHAT,
    COMPLETION,
    RESPONSES,
    Api,
    Ask,
    Done,
    Limits,
    Refused,
    body_of,
    embedding_inputs,
    encode,
    error_body,
    messages_of,
)
from mulsched.mock_engine.tokenizer import Tokenizer, made_answer

try:
    from aiohttp import web
except ImportError as error:
    raise MissingExtra("the mock engine needs aiohttp: pip install 'mulsched[gateway]'") from error

__all__ = ["MockServer"]

_EMBEDDING_SIZE = 8
_MAX_BODY_BYTES = 64 * 2**20
_EVENT_STREAM = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}


class _Generation:
    """One request under way: how many of its tokens are there, and who waits for more."""

    __slots__ = (
        "_awaited",
        "_waiter",
        "arrival_s",
        "cached_tokens",
        "first_s",
        "n_ready",
        "n_tokens",
        "number",
    )

    def __init__(self, number: int, n_tokens: int, arrival_s: float) -> None:
        self.number = number
        self.n_tokens = n_tokens
        self.n_ready = 0
        self.cached_tokens = 0
        self.arrival_s = arrival_s
        self.first_s: float | None = None
        self._awaited = 0
        self._waiter: asyncio.Future[None] | None = None

    def add_token(self) -> None:
        self.n_ready += 1
        if self._waiter is not None and self.n_ready >= self._awaited and not self._waiter.done():
            self._waiter.set_result(None)

    async def reach(self, n_tokens: int) -> None:
        """Wait until there are that many tokens."""
        if self.n_ready >= n_tokens:
            return
        self._awaited = n_tokens
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter
        self._waiter = None


class MockServer:
    """Serves one engine. ``speed``: seconds of the model in a second of the wall.

    ``clock`` returns the time of day in seconds, for the dates in answers; the model's own time is the event
    loop's. ``answer_tokens``: the length of an answer that neither a limit nor ``ignore_eos`` decides;
    64, arbitrary. The server closes ``publisher`` when it stops.
    Raises InvalidArgument (``speed`` not above 0, ``answer_tokens`` below 1).
    """

    def __init__(
        self,
        engine: MockEngine,
        tokenizer: Tokenizer,
        *,
        model: str,
        clock: Callable[[], float],
        speed: float = 1.0,
        answer_tokens: int = 64,
        publisher: KvEventPublisher | None = None,
    ) -> None:
        if not 0 < speed < float("inf"):
            raise InvalidArgument(f"speed must be above 0 and finite, got {speed}")
        if answer_tokens < 1:
            raise InvalidArgument(f"answer_tokens must be at least 1, got {answer_tokens}")
        self.engine = engine
        self._tokenizer = tokenizer
        self._limits = Limits(model, engine.max_model_len, answer_tokens)
        self._clock = clock
        self._speed = speed
        self.publisher = publisher
        self._metrics = EngineMetrics(engine, model)
        self._generations: dict[int, _Generation] = {}
        self._submitted = 0
        self._wake = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self._driver: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen and drive the engine; return the port, a free one for 0. Raises OSError."""
        # a client that goes away cancels its handler, which aborts its request
        runner = web.AppRunner(self._application(), access_log=None, handler_cancellation=True)
        await runner.setup()
        self._runner = runner
        await web.TCPSite(runner, host, port, backlog=1024).start()
        self._driver = asyncio.create_task(self._drive(), name=f"engine {self.engine.name}")
        return int(runner.addresses[0][1])

    async def stop(self) -> None:
        """Stop listening; requests under way are broken off."""
        if self._driver is not None:
            self._driver.cancel()
            await asyncio.wait([self._driver])
        if self._runner is not None:
            await self._runner.cleanup()
        if self.publisher is not None:
            await self.publisher.close()

    async def failed(self) -> None:
        """Wait until the engine fails, and raise why; without an end while it does not."""
        assert self._driver is not None
        await asyncio.shield(self._driver)

    def _application(self) -> web.Application:
        application = web.Application(client_max_size=_MAX_BODY_BYTES)
        application.add_routes(
            [
                web.post(
                    "/v1/chat/completions", self._refusing(lambda request: self._generate(request, CHAT))
                ),
                web.post(
                    "/v1/completions", self._refusing(lambda request: self._generate(request, COMPLETION))
                ),
                web.post("/v1/responses", self._refusing(lambda request: self._generate(request, RESPONSES))),
                web.post("/v1/embeddings", self._refusing(self._embed)),
                web.post("/tokenize", self._refusing(self._tokenize)),
                web.post("/detokenize", self._refusing(self._detokenize)),
                web.post("/reset_prefix_cache", self._reset_prefix_cache),
                web.get("/v1/models", self._models),
                web.get("/health", self._health),
                web.get("/metrics", self._metrics_page),
                web.get("/kv_event_sources", self._kv_event_sources),
            ]
        )
        return application

    # The engine in time

    def _now(self) -> float:
        return asyncio.get_running_loop().time() * self._speed

    async def _drive(self) -> None:
        while True:
            # a step at a time, so that many late ones do not keep others from the loop
            step = self.engine.advance(self._now())
            if step is not None:
                self._deliver(step)
            if self.engine.next_s is None:
                self._wake.clear()
                await self._wake.wait()
            else:
                await asyncio.sleep(max(0.0, (self.engine.next_s - self._now()) / self._speed))

    def _deliver(self, step: Step) -> None:
        if step.events and self.publisher is not None:
            self.publisher.publish(step.events)
        for number in step.tokens:
            generation = self._generations[number]
            if generation.n_ready == 0:
                generation.first_s = self._now()
                generation.cached_tokens = step.cached_tokens[number]
            generation.add_token()
        self._metrics.generated(len(step.tokens))

    def _submit(self, prompt: Tokens, answer: Tokens, cache_salt: str | None) -> _Generation:
        self._submitted += 1
        generation = _Generation(self._submitted, len(answer), self._now())
        self.engine.submit(generation.number, prompt, answer, cache_salt=cache_salt)
        self._generations[generation.number] = generation
        self._wake.set()
        return generation

    def _close(self, generation: _Generation, finish_reason: str) -> None:
        """Forget a request, and abort it if it is not done."""
        del self._generations[generation.number]
        if generation.n_ready < generation.n_tokens:
            self.engine.abort(generation.number)
            finish_reason = "abort"
        arrival, first = generation.arrival_s, generation.first_s
        self._metrics.ended(
            finish_reason,
            None if first is None else (first - arrival) / self._speed,
            (self._now() - arrival) / self._speed,
            generation.n_ready,
        )

    # Handlers

    def _refusing(
        self, handle: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """Answer a Refused as an error."""

        async def handler(request: web.Request) -> web.StreamResponse:
            try:
                return await handle(request)
            except Refused as refused:
                return _json(error_body(str(refused), refused.parameter, refused.status), refused.status)

        return handler

    async def _generate(self, request: web.Request, api: Api) -> web.StreamResponse:
        ask = api.read(body_of(await request.read(), self._limits), self._tokenizer, self._limits)
        answer = made_answer(ask.prompt, ask.n_tokens, self._tokenizer.vocabulary)
        pieces = self._tokenizer.pieces(answer)
        generation = self._submit(ask.prompt, answer, ask.cache_salt)
        try:
            name = api.prefix + request.headers.get("X-Request-Id", f"{self.engine.name}-{generation.number}")
            created = int(self._clock())
            if ask.stream:
                return await self._stream(request, api, name, created, ask, generation, pieces)
            await generation.reach(len(answer))
            return _json(api.whole(name, created, self._limits.model, _done(ask, generation, pieces)))
        finally:
            self._close(generation, ask.finish_reason)

    async def _stream(
        self,
        request: web.Request,
        api: Api,
        name: str,
        created: int,
        ask: Ask,
        generation: _Generation,
        pieces: list[str],
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers=_EVENT_STREAM)
        await response.prepare(request)
        stream = api.stream(name, created, self._limits.model, ask.include_usage)
        sent = 0
        while sent < len(pieces):
            await generation.reach(sent + 1)
            # what came while the last was written goes out as one piece, as in vLLM
            ready = generation.n_ready
            last = ready == len(pieces)
            data = stream.first() if sent == 0 else b""
            data += stream.text("".join(pieces[sent:ready]), ask.finish_reason if last else None)
            if last:
                await response.write_eof(data + stream.end(_done(ask, generation, pieces)))
            else:
                await response.write(data)
            sent = ready
        return response

    async def _embed(self, request: web.Request) -> web.StreamResponse:
        body = body_of(await request.read(), self._limits)
        inputs = embedding_inputs(body, self._tokenizer)
        longest = max(len(tokens) for tokens in inputs)
        if longest >= self._limits.max_model_len:
            raise Refused(
                f"This model's maximum context length is {self._limits.max_model_len} tokens, got {longest}.",
                parameter="input",
            )
        generations = [self._submit(tokens, self._tokenizer.vocabulary[:1], None) for tokens in inputs]
        try:
            for generation in generations:
                await generation.reach(1)
        finally:
            for generation in generations:
                self._close(generation, "stop")
        as_text = body.get("encoding_format") == "base64"
        data = [
            {"object": "embedding", "index": i, "embedding": _embedding(tokens, as_text)}
            for i, tokens in enumerate(inputs)
        ]
        n_tokens = sum(len(tokens) for tokens in inputs)
        usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        return _json(encode({"object": "list", "data": data, "model": self._limits.model, "usage": usage}))

    async def _tokenize(self, request: web.Request) -> web.StreamResponse:
        body = body_of(await request.read(), self._limits)
        if "messages" in body:
            tokens = self._tokenizer.chat(messages_of(body))
        elif isinstance(body.get("prompt"), str):
            tokens = self._tokenizer.encode(body["prompt"])
        else:
            raise Refused("give a prompt or messages", parameter="prompt")
        length = {"count": len(tokens), "max_model_len": self._limits.max_model_len}
        return _json(encode({**length, "tokens": tokens.tolist(), "token_strs": None}))

    async def _detokenize(self, request: web.Request) -> web.StreamResponse:
        tokens = _token_ids(body_of(await request.read(), self._limits))
        return _json(encode({"prompt": self._tokenizer.decode(tokens)}))

    async def _reset_prefix_cache(self, request: web.Request) -> web.StreamResponse:
        cleared = self.engine.reset_prefix_cache()
        if cleared is not None and self.publisher is not None:
            self.publisher.publish([cleared])
        return _json(encode({"success": cleared is not None}))

    async def _models(self, request: web.Request) -> web.StreamResponse:
        model = {
            "id": self._limits.model,
            "object": "model",
            "created": int(self._clock()),
            "owned_by": "mulsched",
            "root": self._limits.model,
            "parent": None,
            "max_model_len": self._limits.max_model_len,
        }
        return _json(encode({"object": "list", "data": [model]}))

    async def _health(self, request: web.Request) -> web.StreamResponse:
        return web.Response()

    async def _metrics_page(self, request: web.Request) -> web.StreamResponse:
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return web.Response(body=self._metrics.page(), headers={"Content-Type": kind})

    async def _kv_event_sources(self, request: web.Request) -> web.StreamResponse:
        publisher = self.publisher
        if publisher is None:
            return _json(b"{}")
        config = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": publisher.endpoint,
            "replay_endpoint": publisher.replay_endpoint,
            "topic": publisher.topic,
        }
        return _json(encode({"0": config}))  # by data-parallel rank


def _done(ask: Ask, generation: _Generation, pieces: list[str]) -> Done:
    return Done("".join(pieces), len(ask.prompt), len(pieces), generation.cached_tokens, ask.finish_reason)


def _json(data: bytes, status: int = 200) -> web.Response:
    return web.Response(body=data, status=status, content_type="application/json")


def _token_ids(body: Mapping[str, Any]) -> Tokens:
    tokens = body.get("tokens")
    if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < 2**32 for token in tokens):
        raise Refused("tokens must be a list of token ids in 0..2**32-1", parameter="tokens")
    return np.array(tokens, dtype=np.uint32)


def _embedding(tokens: Tokens, as_text: bool) -> list[float] | str:
    """Return a vector of length 1 that depends on the tokens alone."""
    seed = xxhash.xxh3_64_intdigest(tokens.astype("<u4", copy=False).tobytes())
    vector = np.random.default_rng(seed).standard_normal(_EMBEDDING_SIZE).astype(np.float32)
    vector /= np.linalg.norm(vector)
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_text else vector.tolist()
