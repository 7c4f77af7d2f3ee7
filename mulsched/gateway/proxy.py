"""The path of a request: read, decide, send, relay; on to another instance if one fails before it answers."""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mulsched.decision import Decision
from mulsched.errors import InvalidEvents, MissingExtra, UnknownInstance
from mulsched.events.load_header import LOAD_FORMAT_HEADER, LOAD_HEADER, read_load_header
from mulsched.gateway.answers import AnswerWatch
from mulsched.gateway.config import GatewayConfig
from mulsched.gateway.engine import Engine
from mulsched.gateway.fleet import Fleet
from mulsched.gateway.records import Records
from mulsched.gateway.replies import Refused, error_body, refusal
from mulsched.lifecycle import Lifecycle
from mulsched.prompt_reader import PromptReader
from mulsched.prompt_routing import PromptKeys

try:
    import aiohttp
    import msgspec
    from aiohttp import web
    from aiohttp.http import HttpVersion11
    from multidict import CIMultiDict
except ImportError as error:
    raise MissingExtra("the gateway needs aiohttp and msgspec: pip install 'mulsched[gateway]'") from error

__all__ = ["Proxy"]

_RESPONSES = "/v1/responses"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# Of clients these go on to engines, and no others but those the configuration names: what is not taken over
# cannot smuggle. The rest of a request to an engine is made anew, its length included.
_FORWARDED = ("Accept", "User-Agent", "traceparent", "tracestate")
# Of engines all headers come back but those that belong to the connection, and what the gateway says itself.
_HOP_BY_HOP = frozenset((
    "connection", "content-length", "date", "keep-alive", "proxy-authenticate", "proxy-connection", "server",
    "set-cookie", "te", "trailer", "trailers", "transfer-encoding", "upgrade", "x-request-id",
))  # fmt: skip
# The engine is not up to it now; another one may be.
_ELSEWHERE = frozenset((502, 503, 504))
_FAILURES = (aiohttp.ClientError, TimeoutError, OSError)

_decode = msgspec.json.Decoder(dict[str, Any]).decode


class _Failed(Exception):
    """An attempt that failed before the first byte; ``elsewhere``: another instance may do better."""

    def __init__(self, reason: str, *, elsewhere: bool = True, status: int = 502) -> None:
        super().__init__(reason)
        self.elsewhere = elsewhere
        self.status = status


class _Reply(web.StreamResponse):
    """Sends its head with the first piece, which is there already: one system call instead of two."""

    _send_headers_immediately = False


@dataclass(slots=True)
class _Exchange:
    """One request on its way."""

    request: web.BaseRequest
    path: str
    request_id: str  # of the booking, never a client's
    shown_id: str
    arrived_s: float
    body: bytes = b""
    model: str | None = None
    decision: Decision | None = None
    tried: list[str] = field(default_factory=list)
    status: int = 0
    first_s: float | None = None
    outcome: str = "finished"
    usage: tuple[int, int] | None = None
    output_tokens: int | None = None


class Proxy:
    """Answers POSTs to the paths of generation and of embeddings."""

    def __init__(
        self,
        config: GatewayConfig,
        lifecycle: Lifecycle,
        fleet: Fleet,
        prompts: PromptReader,
        session: aiohttp.ClientSession,
        records: Records,
    ) -> None:
        self._config = config
        self._lifecycle = lifecycle
        self._fleet = fleet
        self._prompts = prompts
        self._session = session
        self._records = records
        self._clock = asyncio.get_running_loop().time
        self._forwarded = (*_FORWARDED, *config.forward_headers)
        self._authorization = None if config.engine_api_key is None else f"Bearer {config.engine_api_key}"
        self.in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def idle(self) -> None:
        """Wait until no request is under way."""
        await self._idle.wait()

    async def answer(self, request: web.BaseRequest, path: str, request_id: str) -> web.StreamResponse:
        """Answer a request. Raises Refused, ConnectionError (the client is gone, or gets no proper end)."""
        if self.in_flight >= self._config.max_in_flight:
            raise Refused(429, "too_many_requests", "too many requests are under way")
        given = request.headers.get("X-Request-Id", "")
        shown = given if _REQUEST_ID.fullmatch(given) else request_id
        exchange = _Exchange(request, path, request_id, shown, self._clock())
        self.in_flight += 1
        self._idle.clear()
        try:
            async with asyncio.timeout(self._config.request_timeout_s):
                return await self._answer(exchange)
        except Refused as refused:
            exchange.outcome, exchange.status = refused.code, refused.status
            refused.headers["X-Request-Id"] = shown
            raise
        except TimeoutError:
            exchange.outcome = "request_timeout"
            return self._cut_off(exchange, 504, "the request took too long")
        except (asyncio.CancelledError, ConnectionError):
            if exchange.outcome == "finished":
                exchange.outcome = "client_gone"
            raise
        except Exception:
            exchange.outcome = "internal_error"
            if exchange.status:
                return self._cut_off(exchange, 500, "the gateway failed")
            raise
        finally:
            self._end(exchange)
            self.in_flight -= 1
            if not self.in_flight:
                self._idle.set()

    def _end(self, exchange: _Exchange) -> None:
        now = self._clock()
        if exchange.decision is not None:
            if exchange.outcome == "finished" and exchange.status < 400:
                self._lifecycle.finish(exchange.request_id, now=now)
                self._records.finished(exchange.request_id, exchange.output_tokens, now)
            else:
                self._lifecycle.cancel(exchange.request_id, now=now)
                self._records.cancelled(exchange.request_id, exchange.output_tokens, now)
        self._records.ended(
            path=exchange.path,
            request_id=exchange.shown_id,
            decision=exchange.decision,
            attempts=len(exchange.tried),
            status=exchange.status,
            outcome=exchange.outcome,
            usage=exchange.usage,
            first_s=None if exchange.first_s is None else exchange.first_s - exchange.arrived_s,
            whole_s=now - exchange.arrived_s,
        )

    # -- the way in --------------------------------------------------------------------------------

    async def _answer(self, exchange: _Exchange) -> web.StreamResponse:
        exchange.body = await self._read(exchange.request)
        try:
            body = _decode(exchange.body)
        except (msgspec.DecodeError, RecursionError):
            raise Refused(400, "invalid_json", "the body must be a JSON object") from None
        model = body.get("model")
        exchange.model = model if isinstance(model, str) else None
        prompt = await self._prompts.read(body, adapter=self._fleet.is_adapter(exchange.model))
        while True:
            engine = self._choose(exchange, prompt)
            try:
                return await self._attempt(exchange, engine)
            except _Failed as failed:
                if not failed.elsewhere or len(exchange.tried) >= self._config.max_attempts:
                    raise Refused(failed.status, "engine_failed", f"no engine answered: {failed}") from None

    async def _read(self, request: web.BaseRequest) -> bytes:
        """Return the body. What is too large is refused before it is read, or as soon as that shows."""
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise Refused(415, "unsupported_encoding", "the body must not be compressed")
        limit = self._config.max_body_bytes
        too_large = Refused(413, "body_too_large", f"the body must not be longer than {limit} bytes")
        if (request.content_length or 0) > limit:
            raise too_large
        expected = request.headers.get("Expect")
        if expected is not None:
            if expected.lower() != "100-continue":
                raise Refused(417, "unknown_expectation", "only 100-continue may be expected")
            if request.version >= HttpVersion11:
                await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                request.writer.output_size = 0
        try:
            if request.content.is_eof():  # all of it came with the head, as most do: no timer
                return await request.read()
            async with asyncio.timeout(self._config.body_timeout_s):
                return await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise too_large from None
        except TimeoutError:
            raise Refused(408, "body_timeout", "the body took too long", Connection="close") from None
        except web.RequestPayloadError:
            raise Refused(400, "broken_body", "the body is broken", Connection="close") from None

    def _choose(self, exchange: _Exchange, prompt: PromptKeys) -> Engine:
        names = self._fleet.eligible(without=exchange.tried, model=exchange.model)
        if not names:
            if self._fleet.eligible() and not self._fleet.lists(exchange.model):
                raise Refused(
                    404,
                    "model_not_found",
                    f"no engine has the model {exchange.model!r}; GET /v1/models lists those there are",
                )
            raise Refused(503, "no_engine", "no engine is ready")
        everyone = len(names) == len(self._lifecycle.router.instances)
        now = self._clock()
        # while a failed attempt still counts as load where it was; then it is taken off
        exchange.decision = self._lifecycle.route_keys(
            prompt.keys,
            prompt_tokens=prompt.length,
            request_id=exchange.request_id,
            candidates=None if everyone else names,
            now=now,
        )
        if exchange.tried:
            self._records.cancelled(exchange.request_id, None, now)
        self._records.decided(exchange.request_id, exchange.shown_id, exchange.decision, now)
        engine = self._fleet.engines[exchange.decision.instance]
        if exchange.tried:
            engine.counts["retries"] += 1
        exchange.tried.append(engine.name)
        return engine

    def _headers(self, exchange: _Exchange, engine: Engine) -> CIMultiDict[str]:
        given = exchange.request.headers
        headers = CIMultiDict((name, given[name]) for name in self._forwarded if name in given)
        headers["Content-Type"] = "application/json"
        headers["Accept-Encoding"] = "identity"  # what is compressed shows no first token
        headers["X-Request-Id"] = exchange.shown_id
        if self._authorization is not None:
            headers["Authorization"] = self._authorization
        if self._config.load_headers:
            headers[LOAD_FORMAT_HEADER] = "TEXT"
        if engine.config.rank is not None:
            headers["X-data-parallel-rank"] = str(engine.config.rank)
        return headers

    # -- the way back ------------------------------------------------------------------------------

    async def _attempt(self, exchange: _Exchange, engine: Engine) -> web.StreamResponse:
        engine.begin()
        answer: aiohttp.ClientResponse | None = None
        try:
            try:
                answer = await self._session.post(
                    engine.url(exchange.path),
                    data=exchange.body,
                    headers=self._headers(exchange, engine),
                    allow_redirects=False,
                )
                # nothing goes to the client before this, so that until here another instance can take over
                first = await answer.content.readany()
            except _FAILURES as error:
                raise self._failure(engine, error) from None
            self._heed(exchange, engine, answer)
            if self._config.load_headers:
                self._heed_load(engine, answer.headers.getall(LOAD_HEADER, ()))
            return await self._relay(exchange, engine, answer, first)
        finally:
            engine.end()
            if answer is not None:
                answer.close()  # and the connection, unless all was read: the engine then aborts

    def _failure(self, engine: Engine, error: BaseException) -> _Failed:
        reason = type(error).__name__
        self._fleet.failed(engine, reason)
        # a client that has waited so long would wait as long again
        waited = isinstance(error, aiohttp.SocketTimeoutError)
        return _Failed(reason, elsewhere=not waited, status=504 if waited else 502)

    def _heed(self, exchange: _Exchange, engine: Engine, answer: aiohttp.ClientResponse) -> None:
        """Take note of the status. Raises _Failed if another instance should be asked."""
        engine.statuses[answer.status] += 1
        if answer.status in _ELSEWHERE:
            self._fleet.failed(engine, f"status {answer.status}")
            others = self._fleet.eligible(model=exchange.model)
            if others not in ((), (engine.name,)) and len(exchange.tried) < self._config.max_attempts:
                raise _Failed(f"status {answer.status}", status=answer.status)
        elif answer.status < 300 or answer.status >= 400:
            self._fleet.answered(engine)
        else:  # engines do not redirect, and where to is nothing to follow or to pass on
            raise _Failed(f"status {answer.status}", elsewhere=False)

    def _heed_load(self, engine: Engine, told: Sequence[str]) -> None:
        """Report the load that an answer tells of its engine; what is odd is counted and changes nothing."""
        if not told or engine.gone:
            return
        router = self._lifecycle.router
        try:
            load = read_load_header(", ".join(told))
            if load.waiting is not None:
                running = router.load(engine.name)["running"] if load.running is None else load.running
                router.report_load(engine.name, running=running, waiting=load.waiting, now=self._clock())
            engine.counts["load_headers"] += 1
        except InvalidEvents:
            engine.counts["malformed_load_headers"] += 1
        except UnknownInstance:  # it was ejected meanwhile
            pass

    async def _relay(
        self, exchange: _Exchange, engine: Engine, answer: aiohttp.ClientResponse, piece: bytes
    ) -> web.StreamResponse:
        streamed = answer.content_type == "text/event-stream"
        watch = AnswerWatch(streamed=streamed, responses=exchange.path == _RESPONSES)
        exchange.status = answer.status
        headers = _returned(answer)
        headers["X-Request-Id"] = exchange.shown_id
        if self._config.load_headers:
            headers.popall(LOAD_HEADER, None)  # the client has not asked for it
        if streamed:
            headers.setdefault("X-Accel-Buffering", "no")  # tells an nginx in front not to hold it back
        reply = _Reply(status=answer.status, headers=headers)
        if answer.content_length is not None and not streamed:
            reply.content_length = answer.content_length
        await reply.prepare(exchange.request)
        while piece:
            if watch.feed(piece):
                exchange.first_s = self._clock()
                self._lifecycle.first_token(exchange.request_id, now=exchange.first_s)
                self._records.first_token(exchange.request_id, exchange.first_s)
            if answer.content.at_eof():
                break  # the last piece and the end go out as one
            await reply.write(piece)
            try:
                piece = await answer.content.readany()
            except _FAILURES as error:
                self._fleet.failed(engine, type(error).__name__)
                exchange.outcome = "engine_broke_off"
                return await self._break_off(exchange, reply, streamed)
        exchange.usage, exchange.output_tokens = watch.usage(), watch.output_tokens()
        if exchange.usage is not None:
            engine.counts["reported_prompt_tokens"] += exchange.usage[0]
            engine.counts["reported_cached_tokens"] += exchange.usage[1]
        await reply.write_eof(piece)
        return reply

    async def _break_off(
        self, exchange: _Exchange, reply: web.StreamResponse, streamed: bool
    ) -> web.StreamResponse:
        """End an answer so that nobody takes it for whole: an error event in a stream, and no proper end."""
        if streamed:
            event = error_body(502, "engine_failed", "the engine broke off")
            await reply.write(b"\n\ndata: " + event + b"\n\n")
            await exchange.request.writer.drain()
        if exchange.request.transport is not None:
            exchange.request.transport.close()  # once it is written
        raise ConnectionResetError("the engine broke off")

    def _cut_off(self, exchange: _Exchange, status: int, message: str) -> web.StreamResponse:
        if not exchange.status:
            exchange.status = status
            return refusal(Refused(status, exchange.outcome, message))
        if exchange.request.transport is not None:
            exchange.request.transport.abort()
        raise ConnectionResetError(message)


def _returned(answer: aiohttp.ClientResponse) -> CIMultiDict[str]:
    """Return the headers of an answer that go back to the client."""
    given = answer.headers
    dropped: frozenset[str] | set[str] = _HOP_BY_HOP
    if "Connection" in given:  # what it names belongs to the connection too
        named = ",".join(given.getall("Connection")).lower().split(",")
        dropped = _HOP_BY_HOP | {name.strip() for name in named}
    return CIMultiDict((name, value) for name, value in given.items() if name.lower() not in dropped)
