"""The engines behind a gateway: who is there, who is healthy, and who may be chosen."""

import asyncio
from collections.abc import Iterable
from typing import Any

from mulsched.errors import DuplicateInstance, MissingExtra
from mulsched.gateway.config import EngineConfig, GatewayConfig
from mulsched.gateway.engine import Engine, State
from mulsched.gateway.listening import Listeners
from mulsched.gateway.logs import Log
from mulsched.gateway.models import Models, fetch_models
from mulsched.gateway.tasks import end_task
from mulsched.lifecycle import Lifecycle

try:
    import aiohttp
except ImportError as error:
    raise MissingExtra("the gateway needs aiohttp: pip install 'mulsched[gateway]'") from error

__all__ = ["Fleet"]


class Fleet:
    """Checks the engines' health, and keeps in the router those that may be chosen.

    An engine that is ejected may have lost its cache. Where that is predicted, it is forgotten with the
    bookings; where KV events tell, they will, and the instance stays, not to be chosen.

    Each check also asks for the models, so that a request goes to an engine that serves its model.
    """

    def __init__(
        self, config: GatewayConfig, lifecycle: Lifecycle, session: aiohttp.ClientSession, log: Log
    ) -> None:
        self.engines: dict[str, Engine] = {}
        self._config = config
        self._lifecycle = lifecycle
        self._session = session
        self._log = log
        self._timeout = aiohttp.ClientTimeout(total=config.health_timeout_s)
        self._eligible: tuple[str, ...] = ()
        self._serving: dict[str, tuple[str, ...]] = {}  # who is eligible for a model, of those listed
        self._others: tuple[str, ...] = ()  # and for a model that nobody lists
        self._adapters: frozenset[str] = frozenset()
        self._watching: dict[str, asyncio.Task[None]] = {}
        self._started = False
        self._admitting: set[str] = set()
        self.listeners = Listeners(config, lifecycle, session, log)
        self.add(config.engines)

    # -- who is there ------------------------------------------------------------------------------

    def add(self, engines: Iterable[EngineConfig]) -> None:
        """Add engines, all or none, which get requests once they pass a check.

        Raises DuplicateInstance, InvalidArgument.
        """
        added: dict[str, Engine] = {}
        for config in engines:
            name = config.name
            if name in self.engines or name in added:
                removed = name in self.engines and self.engines[name].leaving
                raise DuplicateInstance(
                    f"an engine {name!r} is there already" + (", and being removed" if removed else "")
                )
            added[name] = Engine(config)
        self.engines |= added
        if self._started:
            for engine in added.values():
                self._watch(engine, at_once=True)

    def leave(self, engine: Engine) -> None:
        """Send an engine no further requests, since it is to be forgotten."""
        engine.leaving = engine.draining = True
        self._refresh()

    async def forget(self, engine: Engine) -> None:
        """Forget an engine with all that is known of it; what is still under way there is not booked."""
        engine.gone = True
        watching = self._watching.pop(engine.name, None)
        if watching is not None:
            await end_task(watching)
        await self.listeners.forget(engine.name)
        if engine.name in self._lifecycle.router.instances:
            self._lifecycle.remove_instance(engine.name)
        del self.engines[engine.name]
        self._refresh()

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

    def drain(self, engine: Engine, draining: bool) -> None:
        """Send an engine no further requests, or again."""
        if engine.draining != draining:
            engine.draining = draining
            self._log("draining" if draining else "undrained", instance=engine.name)
            self._refresh()

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
            for model in {model for engine in told for model in engine.models}  # each once, whoever has it
        }
        self._adapters = frozenset(
            name for engine in told for name, model in engine.models.items() if model.get("parent")
        )

    # -- health ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Check every engine once, then go on in the background."""
        await self.check()
        self._started = True
        for engine in self.engines.values():
            if not engine.gone:  # else it is about to be forgotten, and nobody would end its checks
                self._watch(engine, at_once=False)

    async def stop(self) -> None:
        """End the checks."""
        await asyncio.gather(*map(end_task, self._watching.values()))
        await self.listeners.stop()

    async def check(self) -> None:
        """Check every engine once, all at the same time."""
        await asyncio.gather(*(self._check(engine) for engine in self.engines.values()))

    def _watch(self, engine: Engine, *, at_once: bool) -> None:
        async def watch() -> None:
            if at_once:
                await self._check(engine)
            while True:
                await asyncio.sleep(self._config.health_period_s)
                await self._check(engine)

        self._watching[engine.name] = asyncio.create_task(watch(), name=f"health of {engine.name}")

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
        if engine.gone:  # another one may have its name
            return
        if self._change(engine, False, reason) == "ejected":
            self._eject(engine)

    def answered(self, engine: Engine) -> None:
        """Take note that an engine answered a request."""
        if engine.state == "healthy":
            engine.judge(True, self._config.eject_after, self._config.readmit_after)

    async def _judge(self, engine: Engine, ok: bool, reason: str) -> None:
        if engine.gone:
            return
        state = self._change(engine, ok, reason)
        if state == "ejected":
            self._eject(engine)
        elif ok and engine.state == "healthy":
            if engine.name not in self._lifecycle.router.instances:
                await self._admit(engine)
            else:
                await self.listeners.ask_again(engine, returned=state == "healthy")
            self._refresh()

    def _change(self, engine: Engine, ok: bool, reason: str) -> State | None:
        state = engine.judge(ok, self._config.eject_after, self._config.readmit_after)
        if state is not None:
            self._log("engine_state", instance=engine.name, state=state, reason=reason)
        return state

    def _eject(self, engine: Engine) -> None:
        engine.counts["ejections"] += 1
        listened_to = engine.name in self.listeners.subscribers
        if not listened_to and engine.name in self._lifecycle.router.instances:
            self._lifecycle.remove_instance(engine.name)
        self._refresh()

    async def _admit(self, engine: Engine) -> None:
        if engine.name in self._admitting:
            return
        self._admitting.add(engine.name)
        try:
            await self.listeners.admit(engine)
        finally:
            self._admitting.discard(engine.name)
