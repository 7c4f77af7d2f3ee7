"""What runs beside the picker for an endpoint: its metrics and its KV events."""

import asyncio
import logging

from mulsched.adapters.envoy.fleet import Watch
from mulsched.errors import InvalidArgument
from mulsched.events import KV_DECODERS, KvEventSubscriber, LoadPoller, discover_kv_events
from mulsched.events._http import FAILURES
from mulsched.router import Router

__all__ = ["kv_events_of", "metrics_of"]

_log = logging.getLogger(__name__)
_RETRY_S = 5.0  # arbitrary


def metrics_of(router: Router, *, period_s: float) -> Watch:
    """Return what polls ``http://ENDPOINT/metrics``. Raises InvalidArgument."""
    if not period_s > 0:
        raise InvalidArgument(f"the period of polls must be above 0, got {period_s}")

    async def watch(endpoint: str) -> None:
        await LoadPoller(router, endpoint, f"http://{endpoint}/metrics", period_s=period_s).run()

    return watch


def kv_events_of(router: Router, *, kv_format: str = "vllm") -> Watch:
    """Return what finds an endpoint's publisher of KV events, as vLLM 0.32 tells it, and follows it.

    ``kv_format``: whose events they are, a key of ``mulsched.events.KV_DECODERS``. An endpoint without a
    publisher, or with several (data-parallel ranks behind one address), is left to prediction.
    """

    async def watch(endpoint: str) -> None:
        while True:
            try:
                sources = await discover_kv_events(f"http://{endpoint}")
                break
            except FAILURES:  # it may be about to start
                await asyncio.sleep(_RETRY_S)
        if len(sources) != 1:
            _log.warning("%s has %d publishers of KV events: its cache is predicted", endpoint, len(sources))
            return
        source = sources[0]
        await KvEventSubscriber(
            router,
            endpoint,
            source.endpoint,
            replay_endpoint=source.replay_endpoint,
            topic=source.topic,
            decode=KV_DECODERS[kv_format],
        ).run()

    return watch
