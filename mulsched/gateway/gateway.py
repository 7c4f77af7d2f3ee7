"""The gateway as a server: routes, keys, start and stop."""

import asyncio
import logging
import traceback
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from mulsched.errors import InvalidArgument, MissingExtra
from mulsched.gateway.config import GatewayConfig
from mulsched.gateway.fleet import Fleet
from mulsched.gateway.instances import INSTANCES, Instances
from mulsched.gateway.keys import Keys
from mulsched.gateway.logs import Log, no_log
from mulsched.gateway.membership import Membership
from mulsched.gateway.metrics import GatewayMetrics
from mulsched.gateway.page import PAGE, PAGE_HEADERS
from mulsched.gateway.proxy import Proxy
from mulsched.gateway.records import Records
from mulsched.gateway.replies import Refused, json_reply, refusal
from mulsched.lifecycle import Lifecycle
from mulsched.prompt_reader import PromptReader
from mulsched.record import Recorder
from mulsched.router import Router

try:
    import aiohttp
    from aiohttp import web
    from prometheus_client import CollectorRegistry
except ImportError as error:
    raise MissingExtra("the gateway needs aiohttp and others: pip install 'mulsched[gateway]'") from error

__all__ = ["Gateway"]

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

_PROXIED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")
# aiohttp's own messages quote the request.
_SILENT = logging.Logger("mulsched.gateway", level=logging.CRITICAL + 1)
# Connections to engines are kept for the next request, but not so long that engines close them: uvicorn,
# which vLLM and SGLang run on, does so after five seconds, and a request that comes just then fails.
_KEEP_S = 4.0


class Gateway:
    """Serves OpenAI's API from many engines; see docs/gateway.md.

    ``new_id`` returns another id each time. ``prompts``: as of the configuration's block size, for routing by
    text, if None. ``recorder``: told of decisions, first tokens and ends; its block size and
    ``units_per_token`` are the prompts' (``router_block_size``), and whoever made it closes it.
    """

    def __init__(
        self,
        config: GatewayConfig,
        *,
        new_id: Callable[[], str],
        prompts: PromptReader | None = None,
        log: Log = no_log,
        recorder: Recorder | None = None,
    ) -> None:
        self.config = config
        self.log = log
        self._new_id = new_id
        self._recorder = recorder
        self._prompts = prompts or PromptReader(config.block_size)
        rate = config.prefill_tokens_per_s
        self.lifecycle = Lifecycle(
            Router(
                block_size=self._prompts.router_block_size,
                policy=config.policy,
                seed=config.seed,
                tier_cost_ratio=config.tier_cost_ratio,
            ),
            prefill_tokens_per_s=None if rate is None else rate * self._prompts.units_per_token,
            expire_after_s=config.request_timeout_s + 60,
        )
        self._keys = Keys((*config.api_keys, *config.admin_keys) if config.api_keys else ())
        self._routes: dict[str, dict[str, Handler]] = {
            **{path: {"POST": self._proxied(path)} for path in _PROXIED},
            "/v1/models": {"GET": self._models},
            "/healthz": {"GET": self._healthz},
            "/metrics": {"GET": self._metrics_page},
            "/": {"GET": self._page},
        }
        self._below_instances: dict[str, Handler] = {}
        # a health check says nothing, and the page asks for the key itself
        self._open = {"/healthz", "/"}
        self._stack = AsyncExitStack()
        self._runner: web.ServerRunner | None = None
        self.stopping = False

    # -- start and stop ----------------------------------------------------------------------------

    async def start(self, host: str, port: int) -> int:
        """Check the engines and listen; return the port, a free one for 0.

        Raises OSError, and InvalidArgument for the file of engines.
        """
        config = self.config
        session = await self._stack.enter_async_context(
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=config.connect_timeout_s, sock_read=config.read_timeout_s
                ),
            )
        )
        registry = CollectorRegistry()
        self.fleet = Fleet(config, self.lifecycle, session, self.log)
        self.records = Records(self.fleet.engines, registry, self.log, self._recorder)
        self._metrics = GatewayMetrics(self.fleet, self.lifecycle, self.records, registry)
        self.proxy = Proxy(config, self.lifecycle, self.fleet, self._prompts, session, self.records)
        tokenizes = self._prompts.units_per_token == 1
        self.membership = Membership(config, self.fleet, self.log, tokenizes=tokenizes)
        instances = Instances(config, self.fleet, self.membership, self.lifecycle, self.records)
        self._routes[INSTANCES] = {"GET": instances.show, "POST": instances.add}
        self._below_instances = {"PUT": instances.drain, "DELETE": instances.remove}
        if config.engines_file is not None:
            self.membership.read_file()
        await self.fleet.start()
        self._stack.push_async_callback(self.fleet.stop)
        self._stack.push_async_callback(self.membership.stop)
        server = web.Server(
            self._handle,
            request_factory=self._request,
            handler_cancellation=True,  # a client that goes away ends its request
            access_log=None,
            auto_decompress=False,
            logger=_SILENT,
            keepalive_timeout=config.idle_timeout_s,
            lingering_time=config.linger_s,
        )
        self._runner = web.ServerRunner(server, shutdown_timeout=1.0)
        await self._runner.setup()
        self._site = web.TCPSite(self._runner, host, port, backlog=1024)
        await self._site.start()
        bound = int(self._runner.addresses[0][1])
        self.log("listening", host=host, port=bound, engines=list(self.fleet.engines), policy=config.policy)
        return bound

    async def stop(self) -> None:
        """Take no new connections, let requests under way end, up to the limit, and close."""
        self.stopping = True
        runner, self._runner = self._runner, None
        if runner is not None:
            await self._site.stop()
            try:
                async with asyncio.timeout(self.config.drain_timeout_s):
                    await self.proxy.idle()
            except TimeoutError:
                self.log("drain_timeout", in_flight=self.proxy.in_flight)
            await runner.cleanup()
        await self._stack.aclose()
        self.log("stopped")

    def reread_engines(self) -> None:
        """Read the file of engines again unless the gateway stops; if that fails, log it, change nothing."""
        if self.stopping:
            return
        try:
            self.membership.read_file()
        except (OSError, InvalidArgument) as error:
            self.log("engines_file_failed", error=str(error))

    def _request(
        self, message: object, payload: object, protocol: object, writer: object, task: object
    ) -> web.BaseRequest:
        return web.BaseRequest(
            message,  # type: ignore[arg-type]
            payload,  # type: ignore[arg-type]
            protocol,  # type: ignore[arg-type]
            writer,  # type: ignore[arg-type]
            task,  # type: ignore[arg-type]
            asyncio.get_running_loop(),
            client_max_size=self.config.max_body_bytes,
        )

    # -- requests ----------------------------------------------------------------------------------

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.rel_url.raw_path
        try:
            if path.startswith(INSTANCES + "/"):
                handlers = self._below_instances
            elif path in self._routes:
                handlers = self._routes[path]
            else:
                raise Refused(404, "unknown_path", "there is no such path")
            if path not in self._open:
                self._check_key(request)
            handler = handlers.get("GET" if request.method == "HEAD" else request.method)
            if handler is None:
                methods = ", ".join(handlers)
                raise Refused(405, "wrong_method", f"this path takes {methods}", Allow=methods)
            return await handler(request)
        except Refused as refused:
            if refused.status in (401, 429):
                self.records.refused(path if path in self._routes else "other", refused.code, refused.status)
            return refusal(refused)
        except web.HTTPException as error:
            return refusal(Refused(error.status, "refused", error.reason))
        except ConnectionError:
            raise
        except Exception as error:
            # where, but not what it says: that may quote the request
            place = traceback.extract_tb(error.__traceback__)[-1]
            at = f"{place.name}, line {place.lineno} of {place.filename}"
            self.log("internal_error", error=type(error).__name__, at=at)
            return refusal(Refused(500, "internal_error", "the gateway failed"))

    def _check_key(self, request: web.BaseRequest) -> None:
        if self._keys and not self._keys.opened_by(request):
            raise Refused(401, "invalid_api_key", "a valid API key is needed", WWW_Authenticate="Bearer")

    def _proxied(self, path: str) -> Handler:
        async def handler(request: web.BaseRequest) -> web.StreamResponse:
            return await self.proxy.answer(request, path, self._new_id())

        return handler

    async def _models(self, request: web.BaseRequest) -> web.StreamResponse:
        if not self.fleet.eligible():
            raise Refused(503, "no_engine", "no engine is ready")
        return json_reply(self.fleet.list_models())

    async def _healthz(self, request: web.BaseRequest) -> web.StreamResponse:
        if self.stopping or not self.fleet.eligible():
            raise Refused(503, "not_ready", "the gateway stops" if self.stopping else "no engine is ready")
        return json_reply({"status": "ok"})

    async def _metrics_page(self, request: web.BaseRequest) -> web.StreamResponse:
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return web.Response(body=self._metrics.page(), headers={"Content-Type": kind})

    async def _page(self, request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=PAGE, headers=PAGE_HEADERS)
