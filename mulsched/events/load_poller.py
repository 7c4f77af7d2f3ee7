"""An instance's own count of its requests, asked for again and again."""

import asyncio
from collections import Counter

from mulsched.errors import InvalidArgument, InvalidEvents, MulschedError
from mulsched.events._http import FAILURES, Session, get, session_or_new
from mulsched.events.prometheus_text import EngineLoad, read_engine_load
from mulsched.router import Router

__all__ = ["LoadPoller"]


class LoadPoller:
    """Reports what an engine's Prometheus page says of its load to a router.

    ``url``: the page, such as ``http://HOST:8000/metrics``. ``rank``: the data-parallel rank that the
    instance is; None for all. ``period_s``: from one request to the next. ``timeout_s``: for one request.
    ``stale_after_s``: after so long without an answer the last one no longer counts, and the router goes by
    its own bookings alone; None for five periods. All defaults are arbitrary.

    A page is a state that is past when it arrives, so it is reported with the time at which it was asked for,
    and only load that the router has not booked itself is added; see :mod:`mulsched.load`.

    Raises InvalidArgument, UnknownInstance.
    """

    def __init__(
        self,
        router: Router,
        instance: str,
        url: str,
        *,
        rank: int | None = None,
        period_s: float = 1.0,
        timeout_s: float = 2.0,
        stale_after_s: float | None = None,
        session: Session | None = None,
    ) -> None:
        stale_after_s = 5 * period_s if stale_after_s is None else stale_after_s
        if not period_s > 0 or not timeout_s > 0 or not stale_after_s > 0:
            raise InvalidArgument(
                "period_s, timeout_s and stale_after_s must be above 0, got "
                f"{period_s}, {timeout_s}, {stale_after_s}"
            )
        router.index.row(instance)
        self.instance = instance
        self.url = url
        self.counts: Counter[str] = Counter()
        """``polls``, ``failures``, and ``stale``: how often the last answer became too old."""
        self.load: EngineLoad | None = None
        """The last answer, None while there is none that is fresh."""
        self._router = router
        self._rank = rank
        self._period_s = period_s
        self._timeout_s = timeout_s
        self._stale_after_s = stale_after_s
        self._session = session
        self._answered_s: float | None = None

    async def run(self) -> None:
        """Poll until cancelled. Nothing that the engine does or fails to do ends it."""
        clock = asyncio.get_running_loop().time
        async with session_or_new(self._session) as session:
            while True:
                started_s = clock()
                await self.poll(session)
                await asyncio.sleep(max(0.0, started_s + self._period_s - clock()))

    async def poll(self, session: Session) -> bool:
        """Ask once and report; return whether there was an answer."""
        clock = asyncio.get_running_loop().time
        self.counts["polls"] += 1
        asked_s = clock()
        try:
            page = await get(session, self.url, self._timeout_s)
            if page is None:
                raise InvalidEvents(f"{self.url} is not there")
            load = read_engine_load(page, rank=self._rank)
        except FAILURES:
            self.counts["failures"] += 1
            if self._answered_s is not None and clock() - self._answered_s >= self._stale_after_s:
                self.counts["stale"] += 1
                self.load = self._answered_s = None
                self._report(0, 0, clock())  # so that nothing is added to what is booked
            return False
        self.load, self._answered_s = load, asked_s
        self._report(load.running, load.waiting, asked_s)
        return True

    def _report(self, running: int, waiting: int, now: float) -> None:
        try:
            self._router.report_load(self.instance, running=running, waiting=waiting, now=now)
        except MulschedError as error:  # the instance was removed
            self.counts[type(error).__name__] += 1
