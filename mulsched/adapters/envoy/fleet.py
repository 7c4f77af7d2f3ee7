"""The endpoints that there are: given once, or followed as a name in DNS says."""

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import Callable, Coroutine, Iterable

from mulsched.errors import InvalidArgument
from mulsched.lifecycle import Lifecycle

__all__ = ["Fleet", "check_endpoint"]

_log = logging.getLogger(__name__)

Watch = Callable[[str], Coroutine[None, None, None]]


def check_endpoint(endpoint: str) -> str:
    """Return ``ip:port``, or ``[ip]:port`` of IPv6; the protocol knows no names. Raises InvalidArgument."""
    host, _, port = endpoint.rpartition(":")
    try:
        address = ipaddress.ip_address(host[1:-1] if host.startswith("[") and host.endswith("]") else host)
        # of the port's digits, none that only Unicode takes for one
        valid = (address.version == 6) == host.startswith("[") and port.isascii() and port.isdecimal()
    except ValueError:
        valid = False
    if not valid or not 0 < int(port) < 2**16:
        raise InvalidArgument(f"an endpoint must be ip:port, such as 10.0.0.7:8000, got {endpoint!r}")
    return endpoint


class Fleet:
    """Adds endpoints to a router and removes them.

    ``cache_blocks``: of each, for the prediction of its cache; None where events tell.
    ``watches``: what to run for an endpoint as long as it is there, such as a poll of its metrics.
    """

    def __init__(
        self, lifecycle: Lifecycle, *, cache_blocks: int | None = None, watches: Iterable[Watch] = ()
    ) -> None:
        self._lifecycle = lifecycle
        self._cache_blocks = cache_blocks
        self._watches = tuple(watches)
        self._tasks: dict[str, list[asyncio.Task[None]]] = {}

    def add(self, endpoint: str) -> None:
        """Add an endpoint. Raises InvalidArgument, DuplicateInstance."""
        self._lifecycle.router.add_instance(check_endpoint(endpoint), cache_blocks=self._cache_blocks)
        tasks = [asyncio.ensure_future(watch(endpoint)) for watch in self._watches]
        for task in tasks:
            task.add_done_callback(_report)
        self._tasks[endpoint] = tasks

    def remove(self, endpoint: str) -> None:
        """Remove an endpoint with what is known of it. Raises UnknownInstance."""
        self._lifecycle.remove_instance(endpoint)
        for task in self._tasks.pop(endpoint):
            task.cancel()

    def set(self, endpoints: Iterable[str]) -> None:
        """Make these the endpoints: add the new ones, remove those that are gone."""
        wanted, known = dict.fromkeys(endpoints), self._lifecycle.router.instances
        for endpoint in known:
            if endpoint not in wanted:
                self.remove(endpoint)
        for endpoint in wanted:
            if endpoint not in known:
                self.add(endpoint)

    async def follow(self, name: str, port: int, *, period_s: float = 5.0) -> None:
        """Keep to the addresses that a name has in DNS, until cancelled.

        The name of a headless Kubernetes service has one for each ready pod. A name that cannot be resolved
        changes nothing: DNS may be down. The period is arbitrary.
        """
        while True:
            with contextlib.suppress(OSError):
                self.set(await _addresses(name, port))
            await asyncio.sleep(period_s)

    def close(self) -> None:
        """End what runs for the endpoints."""
        for tasks in self._tasks.values():
            for task in tasks:
                task.cancel()
        self._tasks.clear()


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (failure := task.exception()) is not None:
        _log.error("a watch of an endpoint failed", exc_info=failure)


async def _addresses(name: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(name, port, type=socket.SOCK_STREAM)
    hosts = [info[4][0] for info in found]
    return [f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}" for host in hosts]
