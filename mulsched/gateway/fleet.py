"""The engines behind a gateway: who is healthy, who is draining, and what each has done."""

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

from mulsched.errors import MissingExtra, UnknownInstance
from mulsched.events import KV_DECODERS, KvEventSource, KvEventSubscriber, LoadPoller, discover_kv_events
from mulsched.events._http import FAILURES
from mulsched.gateway.config import EngineConfig, GatewayConfig
from mulsched.gateway.logs import Log
from mulsched.gateway.models import Models, fetch_models
from mulsched.lifecycle import Lifecycle

try:
    import aiohttp
    from yarl import URL
except ImportError as error:
    raise MissingExtra("the gateway needs aiohttp: pip install 'mulsched[gateway]'") from error

__all__ = ["Engine", "Fleet", "State"]

State = Literal["starting", "healthy", "ejected"]

_DEFAULT_KV_TOKENS = 100_000
_BLOCKS = re.compile(rb'^vllm:cache_config_info\{[^}\n]*?\bnum_gpu_blocks="(\d{1,9})"', re.MULTILINE)
_BLOCK_SIZE = re.compile(rb'^vllm:cache_config_info\{[^}\n]*?\bblock_size="(\d{1,6})"', re.MULTILINE)
_MAX_PAGE_BYTES = 4 * 2**20


class Engine:
    """One engine: its address, its state, and counts since the start."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.name = config.name
        self.state: State = "starting"
        self.draining = False
        self.in_flight = 0
        self.models: Models = {}
        """What it serves, as it told last; empty until it does, and then it may serve anything."""
        self.counts: Counter[str] = Counter()
        """``requests`` sent, ``retries`` of them that came from another engine, ``failures``, ``ejections``;
        ``prompt_tokens`` and ``hit_tokens`` as decisions expected them, ``reported_prompt_tokens`` and
        ``reported_cached_tokens`` as answers told; ``load_headers``, ``malformed_load_headers``."""
        self.statuses: Counter[int] = Counter()
        self._failures = 0
        self._successes = 0
        self._urls: dict[str, URL] = {}

    def url(self, path: str) -> URL:
        """Return the address of one of the gateway's paths, of which there are few."""
        if path not in self._urls:
            self._urls[path] = URL(self.config.url.rstrip("/") + path)
        return self._urls[path]

    def judge(self, ok: bool, eject_after: int, readmit_after: int) -> State | None:
        """Take the outcome of a check or a connection; return the new state if it changed."""
        self._failures, self._successes = (0, self._successes + 1) if ok else (self._failures + 1, 0)
        before = self.state
        if ok and (before == "starting" or (before == "ejected" and self._successes >= readmit_after)):
            self.state = "healthy"
        elif not ok and before == "healthy" and self._failures >= eject_after:
            self.state = "ejected"
        return None if self.state == before else self.state


class Fleet:
    """Checks the engines' health, and keeps in the router those that may be chosen.

    An engine that is ejected may have lost its cache. Where that is predicted, it is forgotten with the
    bookings; where KV events tell, they will, and the instance stays, not to be chosen.

    Each check also asks for the models, so that a request goes to an engine that serves its model.
    """

    def __init__(
        self, config: GatewayConfig, lifecycle: Lifecycle, session: aiohttp.ClientSession, log: Log
    ) -> None:
        self.engines = {engine.name: Engine(engine) for engine in config.engines}
        self._config = config
        self._lifecycle = lifecycle
        self._session = session
        self._log = log
        self._timeout = aiohttp.ClientTimeout(total=config.health_timeout_s)
        self._eligible: tuple[str, ...] = ()
        self._serving: dict[str, tuple[str, ...]] = {}  # who is eligible for a model, of those listed
        self._others: tuple[str, ...] = ()  # and for a model that nobody lists
        self._adapters: frozenset[str] = frozenset()
        self._tasks: list[asyncio.Task[None]] = []
        self._admitting: set[str] = set()
        self.subscribers: dict[str, KvEventSubscriber] = {}
        """Of the engines that publish KV events and were healthy once."""
        self.pollers: dict[str, LoadPoller] = {}
        """Of the engines that were healthy once, if they are asked for their load."""

    # -- who may be chosen -------------------------------------------------------------------------

    def eligible(self, without: Iterable[str] = (), *, model: str | None = None) -> tuple[str, ...]:
        """Return the names of the engines that may get a request, ``without`` some if others are left.

        ``model``: only those that serve it; None for any. O(1) but for ``without``.
        """
        names = self._eligible if model is None else self._serving.get(model, self._others)
        left = tuple(name for name in names if name not in without) if without else names
        return left or names

    def lists(self, model: str | None) -> bool:
        """Return whether an engine, eligible or not, says that it serves the model."""
        return model in self._serving

    def is_adapter(self, model: str | None) -> bool:
        """Return whether an engine lists the model as an adapter, such as LoRA, of another."""
        return model in self._adapters

    def list_models(self) -> dict[str, Any]:
        """Return OpenAI's list: each model once, as the first eligible engine that has it describes it."""
        found: Models = {}
        for engine in map(self.engines.__getitem__, self._eligible):
            for name, model in engine.models.items():
                found.setdefault(name, model)
        return {"object": "list", "data": list(found.values())}

    def drain(self, name: str, draining: bool) -> Engine:
        """Send an engine no further requests, or again. Raises UnknownInstance."""
        engine = self.engines.get(name)
        if engine is None:
            raise UnknownInstance(f"no engine {name!r}")
        if engine.draining != draining:
            engine.draining = draining
            self._log("draining" if draining else "undrained", instance=name)
            self._refresh()
        return engine

    def _refresh(self) -> None:
        known = set(self._lifecycle.router.instances)
        self._eligible = tuple(
            engine.name
            for engine in self.engines.values()
            if engine.state == "healthy" and not engine.draining and engine.name in known
        )
        told = [engine for engine in self.engines.values() if engine.models]
        self._others = tuple(name for name in self._eligible if not self.engines[name].models)
        self._serving = {
            model: tuple(
                name
                for name in self._eligible
                if not (models := self.engines[name].models) or model in models
            )
            for engine in told
            for model in engine.models
        }
        self._adapters = frozenset(
            name for engine in told for name, model in engine.models.items() if model.get("parent")
        )

    # -- health ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Check every engine once, then go on in the background."""
        await self.check()
        self._tasks += [
            asyncio.create_task(self._watch(engine), name=f"health of {engine.name}")
            for engine in self.engines.values()
        ]

    async def stop(self) -> None:
        """End the checks."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def check(self) -> None:
        """Check every engine once, all at the same time."""
        await asyncio.gather(*(self._check(engine) for engine in self.engines.values()))

    async def _watch(self, engine: Engine) -> None:
        while True:
            await asyncio.sleep(self._config.health_period_s)
            await self._check(engine)

    async def _check(self, engine: Engine) -> None:
        reason = "ok"
        try:
            async with self._session.get(
                engine.url(self._config.health_path), timeout=self._timeout, allow_redirects=False
            ) as response:
                if response.status != 200:
                    reason = f"status {response.status}"
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            reason = type(error).__name__
        if reason == "ok":
            engine.models = await self._models(engine) or engine.models
            self._refresh()
        await self._judge(engine, reason == "ok", f"health check: {reason}")

    async def _models(self, engine: Engine) -> Models:
        url, key = engine.url("/v1/models"), self._config.engine_api_key
        return await fetch_models(self._session, url, key=key, timeout=self._timeout)

    def failed(self, engine: Engine, reason: str) -> None:
        """Take note that an engine did not answer a request."""
        engine.counts["failures"] += 1
        self._log("engine_failure", instance=engine.name, reason=reason)
        if self._change(engine, False, reason) == "ejected":
            self._eject(engine)

    def answered(self, engine: Engine) -> None:
        """Take note that an engine answered a request."""
        if engine.state == "healthy":
            engine.judge(True, self._config.eject_after, self._config.readmit_after)

    async def _judge(self, engine: Engine, ok: bool, reason: str) -> None:
        state = self._change(engine, ok, reason)
        if state == "ejected":
            self._eject(engine)
        elif engine.state == "healthy" and engine.name not in self._lifecycle.router.instances:
            await self._admit(engine)
        elif state == "healthy":
            self._refresh()

    def _change(self, engine: Engine, ok: bool, reason: str) -> State | None:
        state = engine.judge(ok, self._config.eject_after, self._config.readmit_after)
        if state is not None:
            self._log("engine_state", instance=engine.name, state=state, reason=reason)
        return state

    def _eject(self, engine: Engine) -> None:
        engine.counts["ejections"] += 1
        if engine.name not in self.subscribers and engine.name in self._lifecycle.router.instances:
            self._lifecycle.remove_instance(engine.name)
        self._refresh()

    async def _admit(self, engine: Engine) -> None:
        if engine.name in self._admitting:
            return
        self._admitting.add(engine.name)
        try:
            source = await self._kv_source(engine)
            cache_blocks = None if source else await self._cache_blocks(engine)
            if engine.state == "healthy":  # it may have been ejected meanwhile
                self._lifecycle.router.add_instance(engine.name, cache_blocks=cache_blocks)
                self._follow(engine, source)
        finally:
            self._admitting.discard(engine.name)
        self._refresh()

    async def _kv_source(self, engine: Engine) -> KvEventSource | None:
        """Return where an engine publishes its KV events; None if its cache is to be predicted."""
        config = engine.config
        if config.kv_events is None:
            return None
        if config.kv_events != "auto":
            return KvEventSource(config.rank or 0, config.kv_events, config.kv_replay, "")
        try:
            sources = await discover_kv_events(
                config.url, timeout_s=self._config.health_timeout_s, session=self._session
            )
        except FAILURES as error:
            self._log("kv_events_unknown", instance=engine.name, reason=type(error).__name__)
            return None
        own = [source for source in sources if config.rank in (None, source.rank)]
        if len(own) != 1:
            self._log("kv_events_unknown", instance=engine.name, reason=f"{len(own)} publishers")
            return None
        self._log("kv_events", instance=engine.name, endpoint=own[0].endpoint, replay=own[0].replay_endpoint)
        return own[0]

    def _follow(self, engine: Engine, source: KvEventSource | None) -> None:
        """Begin to hear of an engine's cache and load, once; both go on while it is ejected."""
        router, name, config = self._lifecycle.router, engine.name, engine.config
        if source is not None and name not in self.subscribers:
            subscriber = KvEventSubscriber(
                router,
                name,
                source.endpoint,
                replay_endpoint=source.replay_endpoint,
                topic=source.topic,
                decode=KV_DECODERS[self._config.kv_format],
            )
            self.subscribers[name] = subscriber
            self._tasks.append(asyncio.create_task(subscriber.run(), name=f"KV events of {name}"))
        period_s = self._config.poll_load_s
        if period_s is not None and name not in self.pollers:
            url = str(engine.url("/metrics"))
            poller = LoadPoller(router, name, url, rank=config.rank, period_s=period_s, session=self._session)
            self.pollers[name] = poller
            self._tasks.append(asyncio.create_task(poller.run(), name=f"load of {name}"))

    async def _cache_blocks(self, engine: Engine) -> int:
        """Return how many of the gateway's blocks an engine's cache holds."""
        tokens = self._config.kv_tokens
        if tokens is None:
            tokens = await self._told_kv_tokens(engine)
            self._log("kv_tokens", instance=engine.name, kv_tokens=tokens, told=tokens is not None)
        return max(1, (tokens or _DEFAULT_KV_TOKENS) // self._config.block_size)

    async def _told_kv_tokens(self, engine: Engine) -> int | None:
        page = b""
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
            async with self._session.get(
                engine.url("/metrics"), timeout=self._timeout, allow_redirects=False
            ) as response:
                async for piece in response.content.iter_any():
                    page += piece
                    if len(page) > _MAX_PAGE_BYTES:
                        return None
        blocks, size = _BLOCKS.search(page), _BLOCK_SIZE.search(page)
        if blocks is None or size is None:
            return None
        return int(blocks[1]) * int(size[1]) or None
