"""The engines behind a gateway: who is healthy, who is draining, and what each has done."""

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import Iterable
from typing import Literal

from mulsched.errors import MissingExtra, UnknownInstance
from mulsched.events import KvEventSubscriber
from mulsched.gateway.config import EngineConfig, GatewayConfig
from mulsched.gateway.logs import Log
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
        self.counts: Counter[str] = Counter()
        """``requests`` sent, ``retries`` of them that came from another engine, ``failures``, ``ejections``;
        ``prompt_tokens`` and ``hit_tokens`` as decisions expected them, ``reported_prompt_tokens`` and
        ``reported_cached_tokens`` as answers told."""
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
        self._tasks: list[asyncio.Task[None]] = []
        self._admitting: set[str] = set()
        self.subscribers: dict[str, KvEventSubscriber] = {}
        """Of the engines that publish KV events and were healthy once."""

    # -- who may be chosen -------------------------------------------------------------------------

    def eligible(self, without: Iterable[str] = ()) -> tuple[str, ...]:
        """Return the names of the engines that may get a request, ``without`` some if others are left."""
        left = tuple(name for name in self._eligible if name not in without) if without else self._eligible
        return left or self._eligible

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
        await self._judge(engine, reason == "ok", f"health check: {reason}")

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
        if engine.config.kv_events is None and engine.name in self._lifecycle.router.instances:
            self._lifecycle.remove_instance(engine.name)
        self._refresh()

    async def _admit(self, engine: Engine) -> None:
        if engine.name in self._admitting:
            return
        self._admitting.add(engine.name)
        try:
            cache_blocks = None if engine.config.kv_events else await self._cache_blocks(engine)
            if engine.state == "healthy":  # it may have been ejected meanwhile
                self._lifecycle.router.add_instance(engine.name, cache_blocks=cache_blocks)
                self._subscribe(engine)
        finally:
            self._admitting.discard(engine.name)
        self._refresh()

    def _subscribe(self, engine: Engine) -> None:
        endpoint = engine.config.kv_events
        if endpoint is None:
            return
        subscriber = KvEventSubscriber(
            self._lifecycle.router, engine.name, endpoint, replay_endpoint=engine.config.kv_replay
        )
        self.subscribers[engine.name] = subscriber
        self._tasks.append(asyncio.create_task(subscriber.run(), name=f"KV events of {engine.name}"))

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
