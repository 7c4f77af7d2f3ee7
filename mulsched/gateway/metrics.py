"""The page of Prometheus.

Labels are instances, the gateway's own paths, outcomes and statuses: nothing that a client can choose.
"""

from collections.abc import Iterator

from mulsched.errors import MissingExtra
from mulsched.gateway.fleet import Fleet
from mulsched.gateway.records import Records
from mulsched.lifecycle import Lifecycle

try:
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
except ImportError as error:
    raise MissingExtra("the gateway needs prometheus-client: pip install 'mulsched[gateway]'") from error

__all__ = ["GatewayMetrics"]

_PER_ENGINE = (
    ("requests", "Requests sent, retries included."),
    ("retries", "Requests that another instance had failed."),
    ("failures", "Requests that the instance failed."),
    ("ejections", "Times that it was taken out for failures."),
    ("prompt_tokens", "Of prompts sent, in the router's unit."),
    ("hit_tokens", "Of these, expected to be cached."),
    ("reported_prompt_tokens", "Of prompts, as usage in answers says."),
    ("reported_cached_tokens", "Of these, cached."),
    ("load_headers", "Answers that told the instance's load."),
    ("malformed_load_headers", "Answers that told it in a way that cannot be read."),
)


class GatewayMetrics:
    """Reads the gateway's own counts when asked, so that counting costs a request next to nothing."""

    def __init__(
        self, fleet: Fleet, lifecycle: Lifecycle, records: Records, registry: CollectorRegistry
    ) -> None:
        self._fleet = fleet
        self._lifecycle = lifecycle
        self._records = records
        self._registry = registry
        registry.register(self)

    def page(self) -> bytes:
        """Return the page."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Return what the gateway counts; prometheus-client calls this."""
        requests = CounterMetricFamily(
            "mulsched_requests", "Requests that ended.", labels=["path", "outcome", "status"]
        )
        for (path, outcome, status), count in self._records.requests.items():
            requests.add_metric([path, outcome, str(status)], count)
        yield requests
        engines = self._fleet.engines.values()
        for name, text in _PER_ENGINE:
            counter = CounterMetricFamily(f"mulsched_instance_{name}", text, labels=["instance"])
            for engine in engines:
                counter.add_metric([engine.name], engine.counts[name])
            yield counter
        statuses = CounterMetricFamily(
            "mulsched_instance_responses", "Answers by status.", labels=["instance", "status"]
        )
        up = GaugeMetricFamily("mulsched_instance_eligible", "1 if it gets requests.", labels=["instance"])
        in_flight = GaugeMetricFamily("mulsched_instance_in_flight", "Requests there.", labels=["instance"])
        eligible = self._fleet.eligible()
        for engine in engines:
            for status, count in engine.statuses.items():
                statuses.add_metric([engine.name, str(status)], count)
            up.add_metric([engine.name], float(engine.name in eligible))
            in_flight.add_metric([engine.name], engine.in_flight)
        yield from (statuses, up, in_flight)
        events = CounterMetricFamily(
            "mulsched_kv_events", "What KV events told, and what was odd.", labels=["instance", "kind"]
        )
        for name, subscriber in self._fleet.listeners.subscribers.items():
            for kind, count in (subscriber.counts + subscriber.tracker.counts).items():
                events.add_metric([name, kind], count)
        yield events
        detector = self._lifecycle.router.detector
        if detector is not None:
            yield CounterMetricFamily("mulsched_alarms", "Alarms of prefixes raised.", detector.alarms_raised)
        odd = CounterMetricFamily("mulsched_lifecycle_signals", "Signals that were odd.", labels=["kind"])
        counts = self._lifecycle.counts
        for kind in counts.__slots__:
            odd.add_metric([kind], getattr(counts, kind))
        yield odd
