"""The part of production-stack's router that the adapter meets, for want of a package of it.

Written after app.py, routing_logic.py and request.py of vllm-project/production-stack at 03953e36: the request
loop reads the number of failovers from the routing logic, awaits it and shows it the body if it is of a class
that it knows, asks it for the session, leaves out the engines that could not be reached, and raises the last
error; of each class of routing logic a process has one object. The application is Starlette's; theirs,
FastAPI's, is a subclass.
"""

import abc
import asyncio
import json
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import httpx
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

URLS = ["http://a", "http://b", "http://c"]
MODEL = "m"


class OneOfEach(abc.ABCMeta):
    """A class whose calls all return its first object."""

    made = {}  # noqa: RUF012 - shared by all classes, which is the point

    def __call__(cls, *arguments, **options):
        if cls not in OneOfEach.made:
            OneOfEach.made[cls] = super().__call__(*arguments, **options)
        return OneOfEach.made[cls]


class RoutingInterface(metaclass=OneOfEach):
    @abc.abstractmethod
    def route_request(self, endpoints, engine_stats, request_stats, request):
        raise NotImplementedError

    def extract_session_id(self, request, request_json):
        key = getattr(self, "session_key", None)
        return key and request.headers.get(key, request_json.get(key))


class RoundRobinRouter(RoutingInterface):
    def route_request(self, endpoints, engine_stats, request_stats, request):
        raise AssertionError("the routing logic that was named must be replaced")


class PrefixAwareRouter(RoutingInterface):
    async def route_request(self, endpoints, engine_stats, request_stats, request, request_json):
        raise AssertionError("the parent's routing must not be asked")


@dataclass
class Endpoint:
    url: str
    model_names: list[str] = field(default_factory=lambda: [MODEL])


class Stack:
    """The application, the engines behind it, and whom it tried."""

    def __init__(self, failovers=0):
        self.urls, self.failing, self.tried = list(URLS), set(), []
        self.gate = asyncio.Event()
        self.gate.set()
        self.args = SimpleNamespace(
            host="127.0.0.1", port=9000, max_instance_failover_reroute_attempts=failovers
        )
        self.app = Starlette(routes=[Route("/v1/completions", self.respond, methods=["POST"])])

    def initialize_all(self, app, args):
        app.state.router = RoundRobinRouter()
        app.state.router.max_instance_failover_reroute_attempts = args.max_instance_failover_reroute_attempts

    async def respond(self, request):
        body, router = await request.json(), request.app.state.router
        unreachable, error = set(), None
        for _ in range(router.max_instance_failover_reroute_attempts + 1):
            endpoints = [
                endpoint
                for endpoint in map(Endpoint, self.urls)
                if body["model"] in endpoint.model_names and endpoint.url not in unreachable
            ]
            if not endpoints:
                if unreachable:
                    break
                return JSONResponse({"error": "no such model"}, 404)
            if isinstance(router, PrefixAwareRouter):
                url = await router.route_request(endpoints, {}, {}, request, body)
            else:
                url = router.route_request(endpoints, {}, {}, request)
            router.extract_session_id(request, body)
            self.tried.append(url)
            await self.gate.wait()
            if url not in self.failing:
                return StreamingResponse(iter([b"one", b"two"]), media_type="text/event-stream")
            unreachable.add(url)
            error = ConnectionError(url)
        raise error

    async def post(self, text, app=None):
        transport = httpx.ASGITransport(app or self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
            content = json.dumps({"model": MODEL, "prompt": text})
            return (await client.post("/v1/completions", content=content)).status_code

    def modules(self):
        """Return the modules that the adapter and its example import, by name."""
        contents = {
            "vllm_router": {},
            "vllm_router.app": {"app": self.app, "initialize_all": self.initialize_all},
            "vllm_router.parsers": {},
            "vllm_router.parsers.parser": {"parse_args": lambda: self.args},
            "vllm_router.routers": {},
            "vllm_router.routers.routing_logic": {"PrefixAwareRouter": PrefixAwareRouter},
        }
        modules = {name: ModuleType(name) for name in contents}
        for name, module in modules.items():
            vars(module).update(contents[name])
        return modules
