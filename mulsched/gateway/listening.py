"""What engines tell of their caches and their load, and who listens to it."""

import asyncio
import contextlib
import re
from dataclasses import dataclass

from mulsched.errors import MissingExtra
from mulsched.events import KV_DECODERS, KvEventSource, KvEventSubscriber, LoadPoller, discover_kv_events
from mulsched.events._http import FAILURES
from mulsched.gateway.config import GatewayConfig
from mulsched.gateway.engine import Engine
from mulsched.gateway.logs import Log
from mulsched.gateway.tasks import end_task
from mulsched.lifecycle import Lifecycle
from mulsched.types import CacheCleared

try:
    import aiohttp
except ImportError as error:
    raise MissingExtra("the gateway needs aiohttp: pip install 'mulsched[gateway]'") from error

__all__ = ["Listeners"]

_DEFAULT_KV_TOKENS = 100_000
_BLOCKS = re.compile(rb'^vllm:cache_config_info\{[^}\n]*?\bnum_gpu_blocks="(\d{1,9})"', re.MULTILINE)
_BLOCK_SIZE = re.compile(rb'^vllm:cache_config_info\{[^}\n]*?\bblock_size="(\d{1,6})"', re.MULTILINE)
_MAX_PAGE_BYTES = 4 * 2**20
# Good checks from one question to the next, at most: a minute at the default period. Arbitrary.
_MAX_PAUSE_CHECKS = 32


@dataclass(slots=True)
class _Asking:
    """An engine that is asked where it publishes: what was odd last, and when to ask again."""

    reason: str | None = None
    pause_checks: int = 1
    left_checks: int = 1

    def due(self) -> bool:
        """Count a good check; return whether the engine is to be asked now: after 1, 2, 4, ... checks."""
        self.left_checks -= 1
        if self.left_checks > 0:
            return False
        self.left_checks = self.pause_checks = min(2 * self.pause_checks, _MAX_PAUSE_CHECKS)
        return True

    def settle(self) -> None:
        """Ask at the next check that gives reason to."""
        self.pause_checks = self.left_checks = 1


class Listeners:
    """Follows the KV events and the load of the engines that are in the router.

    An engine of ``kv_events="auto"`` is asked where it publishes when it is taken in, and again: each time
    that it returns from an ejection, since it may have restarted otherwise; and after 1, 2, 4, ... and at
    last every 32 good checks while it has not told or its publisher is not connected. A question that
    fails changes nothing.
    """

    def __init__(
        self, config: GatewayConfig, lifecycle: Lifecycle, session: aiohttp.ClientSession, log: Log
    ) -> None:
        self._config = config
        self._lifecycle = lifecycle
        self._session = session
        self._log = log
        self.subscribers: dict[str, KvEventSubscriber] = {}
        """Of the engines that publish KV events and were healthy once."""
        self.pollers: dict[str, LoadPoller] = {}
        """Of the engines that were healthy once, if they are asked for their load."""
        self._sources: dict[str, KvEventSource] = {}
        self._asking: dict[str, _Asking] = {}
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}

    async def admit(self, engine: Engine) -> None:
        """Add an engine to the router, if it is still healthy when it has told, and listen to it."""
        try:
            source = await self._source(engine)
        except FAILURES as error:
            self._unknown(engine, type(error).__name__)
            source = None
        cache_blocks = None if source else await self._cache_blocks(engine)
        if engine.state != "healthy" or engine.gone:  # it may have been ejected or removed meanwhile
            return
        name, period_s = engine.name, self._config.poll_load_s
        self._lifecycle.router.add_instance(name, cache_blocks=cache_blocks)
        if source is not None:
            self._subscribe(engine, source)
        if period_s is not None and name not in self.pollers:
            poller = LoadPoller(
                self._lifecycle.router,
                name,
                str(engine.url("/metrics")),
                rank=engine.config.rank,
                period_s=period_s,
                session=self._session,
            )
            self.pollers[name] = poller
            self._tasks[name, "load"] = asyncio.create_task(poller.run(), name=f"load of {name}")

    async def ask_again(self, engine: Engine, *, returned: bool) -> None:
        """Ask an engine that passed its check where it publishes now, if there is reason to.

        ``returned``: it was ejected before.
        """
        if engine.config.kv_events != "auto":
            return
        asking, subscriber = self._asking[engine.name], self.subscribers.get(engine.name)
        if subscriber is not None and _connected(subscriber) and not returned:
            asking.settle()
            return
        if not asking.due() and not returned:
            return
        try:
            source = await self._source(engine)
        except FAILURES as error:
            self._unknown(engine, type(error).__name__)
            return
        if source == self._sources.get(engine.name):
            return
        cache_blocks = None if source else await self._cache_blocks(engine)
        await self._unsubscribe(engine.name)
        if engine.gone or engine.name not in self._lifecycle.router.instances:
            return
        if source is not None:
            # also of a cache that was predicted: from here on it is observed
            self._lifecycle.router.apply(CacheCleared(engine.name))
            self._subscribe(engine, source)
        else:
            self._lifecycle.remove_instance(engine.name)
            self._lifecycle.router.add_instance(engine.name, cache_blocks=cache_blocks)

    async def forget(self, name: str) -> None:
        """Listen to an engine no more."""
        await self._unsubscribe(name)
        self.pollers.pop(name, None)
        self._asking.pop(name, None)
        await self._end(name, "load")

    async def stop(self) -> None:
        """Listen to nobody any more."""
        await asyncio.gather(*map(end_task, self._tasks.values()))

    # -- KV events ---------------------------------------------------------------------------------

    async def _source(self, engine: Engine) -> KvEventSource | None:
        """Return where an engine publishes its KV events; None if its cache is to be predicted.

        Raises one of ``FAILURES`` where it is asked and does not answer.
        """
        config = engine.config
        if config.kv_events is None:
            return None
        if config.kv_events != "auto":
            return KvEventSource(config.rank or 0, config.kv_events, config.kv_replay, "")
        asking = self._asking.setdefault(engine.name, _Asking())
        sources = await discover_kv_events(
            config.url, timeout_s=self._config.health_timeout_s, session=self._session
        )
        own = [source for source in sources if config.rank in (None, source.rank)]
        if len(own) != 1:
            self._unknown(engine, f"{len(own)} publishers")
            return None
        asking.reason = None
        return own[0]

    def _unknown(self, engine: Engine, reason: str) -> None:
        """Log why it is not known where an engine publishes, once for each reason in a row."""
        asking = self._asking.setdefault(engine.name, _Asking())
        if asking.reason != reason:
            asking.reason = reason
            self._log("kv_events_unknown", instance=engine.name, reason=reason)

    def _subscribe(self, engine: Engine, source: KvEventSource) -> None:
        """Begin to hear of an engine's cache; this goes on while it is ejected."""
        name = engine.name
        if engine.config.kv_events == "auto":
            self._log("kv_events", instance=name, endpoint=source.endpoint, replay=source.replay_endpoint)
        subscriber = KvEventSubscriber(
            self._lifecycle.router,
            name,
            source.endpoint,
            replay_endpoint=source.replay_endpoint,
            topic=source.topic,
            decode=KV_DECODERS[self._config.kv_format],
        )
        self.subscribers[name], self._sources[name] = subscriber, source
        task = asyncio.create_task(subscriber.run(), name=f"KV events of {name}")
        task.add_done_callback(self._report)
        self._tasks[name, "events"] = task

    def _report(self, task: asyncio.Task[None]) -> None:
        """Log what ended a subscriber: an address that ZeroMQ refuses."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log("kv_events_failed", task=task.get_name(), error=str(error))

    async def _unsubscribe(self, name: str) -> None:
        self.subscribers.pop(name, None)
        self._sources.pop(name, None)
        await self._end(name, "events")

    async def _end(self, name: str, kind: str) -> None:
        task = self._tasks.pop((name, kind), None)
        if task is not None:
            await end_task(task)

    # -- the size of a cache -----------------------------------------------------------------------

    async def _cache_blocks(self, engine: Engine) -> int:
        """Return how many of the gateway's blocks an engine's cache holds."""
        tokens = self._config.kv_tokens
        if tokens is None:
            tokens = await self._told_kv_tokens(engine)
            self._log("kv_tokens", instance=engine.name, kv_tokens=tokens, told=tokens is not None)
        return max(1, (tokens or _DEFAULT_KV_TOKENS) // self._config.block_size)

    async def _told_kv_tokens(self, engine: Engine) -> int | None:
        page = b""
        timeout = aiohttp.ClientTimeout(total=self._config.health_timeout_s)
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
            async with self._session.get(
                engine.url("/metrics"), timeout=timeout, allow_redirects=False
            ) as response:
                async for piece in response.content.iter_any():
                    page += piece
                    if len(page) > _MAX_PAGE_BYTES:
                        return None
        blocks, size = _BLOCKS.search(page), _BLOCK_SIZE.search(page)
        if blocks is None or size is None:
            return None
        return int(blocks[1]) * int(size[1]) or None


def _connected(subscriber: KvEventSubscriber) -> bool:
    return subscriber.counts["connections"] > subscriber.counts["disconnections"]
