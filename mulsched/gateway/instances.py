"""What operators see of the engines and do to them: ``/instances``."""

import asyncio
from urllib.parse import unquote

from mulsched.errors import DuplicateInstance, InvalidArgument, MissingExtra, UnknownInstance
from mulsched.gateway.config import EngineConfig, GatewayConfig
from mulsched.gateway.fleet import Fleet
from mulsched.gateway.keys import Keys
from mulsched.gateway.membership import Membership
from mulsched.gateway.page import overview
from mulsched.gateway.records import Records
from mulsched.gateway.replies import Refused, json_reply
from mulsched.lifecycle import Lifecycle

try:
    import msgspec
    from aiohttp import web
except ImportError as error:
    raise MissingExtra("the gateway needs aiohttp and msgspec: pip install 'mulsched[gateway]'") from error

__all__ = ["INSTANCES", "Instances"]

INSTANCES = "/instances"


class _Given(msgspec.Struct, forbid_unknown_fields=True):
    url: str
    kv_events: str | None = None
    kv_replay: str | None = None


class Instances:
    """Answers the requests to ``/instances`` and below. Each raises Refused.

    Adding an engine makes the gateway send requests, and the engines' key, where the client says; so that
    takes an admin key, and so does removing one. A page of another origin cannot send one, nor a PUT or a
    DELETE, without asking first, which nobody here answers.
    """

    def __init__(
        self,
        config: GatewayConfig,
        fleet: Fleet,
        membership: Membership,
        lifecycle: Lifecycle,
        records: Records,
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._membership = membership
        self._lifecycle = lifecycle
        self._records = records
        self._admins = Keys(config.admin_keys)

    async def show(self, request: web.BaseRequest) -> web.StreamResponse:
        """Show instances, the latest decisions, and alarms."""
        now = asyncio.get_running_loop().time()
        self._lifecycle.advance(now)
        return json_reply(overview(self._config, self._fleet, self._lifecycle, self._records, now))

    async def add(self, request: web.BaseRequest) -> web.StreamResponse:
        """Add an engine: ``{"url": ..., "kv_events": ..., "kv_replay": ...}``, the last two as they apply."""
        self._check_admin(request)
        try:
            given = msgspec.json.decode(await request.read(), type=_Given)
        except (msgspec.DecodeError, RecursionError) as error:
            message = f'a body such as {{"url": "http://10.0.0.7:8000"}} expected: {error}'
            raise Refused(400, "invalid_json", message) from None
        try:
            names = self._membership.add(EngineConfig(given.url, given.kv_events, given.kv_replay))
        except InvalidArgument as error:
            raise Refused(400, "invalid_engine", str(error)) from None
        except DuplicateInstance as error:
            raise Refused(409, "duplicate_instance", str(error)) from None
        return json_reply({"instances": names}, status=201)

    async def remove(self, request: web.BaseRequest) -> web.StreamResponse:
        """Begin to remove the engine at an address."""
        self._check_admin(request)
        try:
            engines = self._membership.remove(_name(request))
        except UnknownInstance as error:
            raise Refused(404, "unknown_instance", str(error)) from None
        in_flight = sum(engine.in_flight for engine in engines)
        return json_reply(
            {"instances": [engine.name for engine in engines], "in_flight": in_flight}, status=202
        )

    async def drain(self, request: web.BaseRequest) -> web.StreamResponse:
        """Drain an engine or take it back: ``{"draining": true}``; with an admin key where there is one."""
        if self._admins:
            self._check_admin(request)
        try:
            draining = msgspec.json.decode(await request.read(), type=dict[str, bool])["draining"]
        except (msgspec.DecodeError, KeyError):
            raise Refused(400, "invalid_json", 'a body such as {"draining": true} expected') from None
        engine = self._fleet.engines.get(_name(request))
        if engine is None:
            raise Refused(404, "unknown_instance", "there is no such instance")
        if engine.leaving:
            raise Refused(409, "being_removed", "the instance is being removed")
        self._fleet.drain(engine, draining)
        return json_reply({"instance": engine.name, "draining": engine.draining})

    def _check_admin(self, request: web.BaseRequest) -> None:
        if not self._admins:
            message = "engines can be added and removed only where the gateway has an admin key"
            raise Refused(403, "no_admin_key", message)
        if not self._admins.opened_by(request):
            raise Refused(403, "admin_key_needed", "an admin key is needed")


def _name(request: web.BaseRequest) -> str:
    return unquote(request.rel_url.raw_path.removeprefix(INSTANCES + "/"))
