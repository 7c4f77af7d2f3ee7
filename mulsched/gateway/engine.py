"""One engine behind a gateway: where it is, how it fares, and what it has done."""

import asyncio
from collections import Counter
from typing import Literal

from mulsched.errors import InvalidArgument, MissingExtra
from mulsched.gateway.config import EngineConfig
from mulsched.gateway.models import Models

try:
    from yarl import URL
except ImportError as error:
    raise MissingExtra("the gateway needs aiohttp: pip install 'mulsched[gateway]'") from error

__all__ = ["Engine", "State"]

State = Literal["starting", "healthy", "ejected"]


class Engine:
    """One engine: its address, its state, and counts since it was added. Raises InvalidArgument."""

    def __init__(self, config: EngineConfig) -> None:
        try:
            # both refuse more than the configuration does: at a request it would be too late
            (URL(config.url).host or "").encode("idna")
        except ValueError as error:
            raise InvalidArgument(f"an engine's URL expected, got {config.url!r}: {error}") from None
        self.config = config
        self.name = config.name
        self.state: State = "starting"
        self.draining = False
        self.leaving = False
        """Whether it is being removed: it drains and will be forgotten."""
        self.gone = False
        """Whether it was forgotten; another engine may have its name by now."""
        self.unready: str | None = None
        """Why it has not passed a check yet, as of the last one."""
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
        self._idle = asyncio.Event()
        self._idle.set()

    def url(self, path: str) -> URL:
        """Return the address of one of the gateway's paths, of which there are few."""
        if path not in self._urls:
            self._urls[path] = URL(self.config.url.rstrip("/") + path)
        return self._urls[path]

    def begin(self) -> None:
        """Count a request that is sent to it."""
        self.in_flight += 1
        self.counts["requests"] += 1
        self._idle.clear()

    def end(self) -> None:
        """Count a request that ended there."""
        self.in_flight -= 1
        if not self.in_flight:
            self._idle.set()

    async def idle(self) -> None:
        """Wait until no request is under way there."""
        await self._idle.wait()

    def judge(self, ok: bool, eject_after: int, readmit_after: int) -> State | None:
        """Take the outcome of a check or a connection; return the new state if it changed."""
        self._failures, self._successes = (0, self._successes + 1) if ok else (self._failures + 1, 0)
        before = self.state
        if ok and (before == "starting" or (before == "ejected" and self._successes >= readmit_after)):
            self.state = "healthy"
        elif not ok and before == "healthy" and self._failures >= eject_after:
            self.state = "ejected"
        return None if self.state == before else self.state
