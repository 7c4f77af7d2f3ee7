"""Engines that come and go while the gateway runs, by an operator's word or by a file's."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from mulsched.errors import DuplicateInstance, InvalidArgument, UnknownInstance
from mulsched.gateway.config import EngineConfig, GatewayConfig
from mulsched.gateway.engine import Engine
from mulsched.gateway.engines_file import read_engines_file
from mulsched.gateway.fleet import Fleet
from mulsched.gateway.logs import Log
from mulsched.gateway.tasks import end_task

__all__ = ["Membership"]


class Membership:
    """Adds engines, and removes them once they are idle; an address comes and goes with all its ranks.

    The file's engines are those that it names and nothing else: one that it names no more is removed, one
    with other endpoints is removed and added again. Engines that came otherwise are none of its business.
    ``tokenizes``: whether prompts are read as tokens, without which KV events tell nothing.
    """

    def __init__(self, config: GatewayConfig, fleet: Fleet, log: Log, *, tokenizes: bool) -> None:
        self._config = config
        self._fleet = fleet
        self._log = log
        self._tokenizes = tokenizes
        self._named: dict[str, EngineConfig] = {}  # by the file, by address
        self._from_file: dict[str, EngineConfig] = {}  # of these, those that were added for it
        self._removals: dict[str, asyncio.Task[None]] = {}

    def add(self, given: EngineConfig) -> list[str]:
        """Add an engine, to get requests once it passes a check; return its instances' names.

        Raises InvalidArgument, DuplicateInstance (also while one of that name is being removed).
        """
        engines = self._ranks(given)
        self._fleet.add(engines)
        names = [engine.name for engine in engines]
        self._log("engine_added", instances=names)
        return names

    def remove(self, address: str) -> list[Engine]:
        """Send the engine at an address no further requests, and forget it when it is idle.

        It is forgotten after the drain time-out at the latest; what still runs there then may end, and is not
        booked any more. If it is being removed already, that goes on. Raises UnknownInstance.
        """
        engines = self._at(address)
        if not engines:
            raise UnknownInstance(f"no engine {address!r}, as HOST:PORT without a rank")
        self._named.pop(address, None)
        self._remove(address, engines)
        return engines

    def read_file(self) -> None:
        """Make the file's engines those that it names now.

        Raises OSError, InvalidArgument; nothing is changed then.
        """
        assert self._config.engines_file is not None
        named = read_engines_file(self._config.engines_file)
        for given in named.values():
            for engine in self._ranks(given):
                Engine(engine)  # all are sound before any is taken in
        self._named = named
        self._reconcile()

    async def stop(self) -> None:
        """Leave removals under way where they are."""
        await asyncio.gather(*map(end_task, self._removals.values()))

    def _ranks(self, given: EngineConfig) -> Sequence[EngineConfig]:
        if given.kv_events is None and self._config.kv_events_auto:
            given = replace(given, kv_events="auto")
        if given.kv_events is not None and not self._tokenizes:
            raise InvalidArgument("kv_events needs a tokenizer, since events speak of tokens")
        ranks = self._config.data_parallel_size
        return [given] if ranks == 1 else given.ranks(ranks)

    def _at(self, address: str) -> list[Engine]:
        return [engine for engine in self._fleet.engines.values() if engine.config.address == address]

    def _reconcile(self) -> None:
        for address, given in tuple(self._from_file.items()):
            if self._named.get(address) != given:
                self._remove(address, self._at(address))
        for address, given in self._named.items():
            if address not in self._from_file and not self._at(address):
                try:
                    self.add(given)
                    self._from_file[address] = given
                except DuplicateInstance as error:  # a rank elsewhere has the name
                    self._log("engine_not_added", instance=address, reason=str(error))

    def _remove(self, address: str, engines: list[Engine]) -> None:
        if address in self._removals:
            return
        for engine in engines:
            self._fleet.leave(engine)
        self._log("engine_leaving", instances=[engine.name for engine in engines])
        self._removals[address] = asyncio.create_task(
            self._forget_when_idle(address, engines), name=f"removal of {address}"
        )

    async def _forget_when_idle(self, address: str, engines: list[Engine]) -> None:
        try:
            async with asyncio.timeout(self._config.drain_timeout_s):
                for engine in engines:
                    await engine.idle()
        except TimeoutError:
            in_flight = sum(engine.in_flight for engine in engines)
            self._log("drain_timeout", instance=address, in_flight=in_flight)
        for engine in engines:
            await self._fleet.forget(engine)
        del self._removals[address]
        self._from_file.pop(address, None)
        self._log("engine_removed", instances=[engine.name for engine in engines])
        self._reconcile()  # what the file names may have had to wait for the name
