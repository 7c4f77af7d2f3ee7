"""The page of Prometheus, under vLLM's names; figures as of the moment it is asked for."""

from collections.abc import Iterator

from mulsched.errors import MissingExtra
from mulsched.mock_engine.engine import MockEngine

try:
    from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
except ImportError as error:
    raise MissingExtra("the mock engine needs prometheus-client: pip install 'mulsched[gateway]'") from error

__all__ = ["EngineMetrics"]

# the bounds of vLLM 0.32
_FIRST_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_TOKEN_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_WHOLE_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
)  # fmt: skip


class EngineMetrics:
    """One engine's metrics. Times are those that a client meets, on the wall."""

    def __init__(self, engine: MockEngine, model: str) -> None:
        self._engine = engine
        self._labels = ["model_name", "engine"]
        self._values = [model, "0"]
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._first = self._histogram("vllm:time_to_first_token_seconds", "Time to first token.", _FIRST_S)
        self._token = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time of a token after the first.", _TOKEN_S
        )
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "Time of a request.", _WHOLE_S)
        generated = Counter(
            "vllm:generation_tokens", "Tokens generated.", self._labels, registry=self._registry
        )
        self._generated = generated.labels(*self._values)
        self._ended = Counter(
            "vllm:request_success",
            "Requests that ended.",
            [*self._labels, "finished_reason"],
            registry=self._registry,
        )

    def page(self) -> bytes:
        """Return the page."""
        return generate_latest(self._registry)

    def generated(self, tokens: int) -> None:
        """Count the tokens of a step."""
        self._generated.inc(tokens)

    def ended(self, reason: str, first_s: float | None, whole_s: float, tokens: int) -> None:
        """Count a request that ended, for ``length``, ``stop`` or ``abort``; ``first_s`` None: no token."""
        self._ended.labels(*self._values, reason).inc()
        if first_s is None or reason == "abort":
            return
        self._first.observe(first_s)
        self._whole.observe(whole_s)
        if tokens > 1:
            self._token.observe((whole_s - first_s) / (tokens - 1))

    def collect(self) -> Iterator[Metric]:
        """Return what the engine says of itself; prometheus-client calls this."""
        engine = self._engine
        for name, text, value in (
            ("vllm:num_requests_running", "Requests in the batch.", engine.running),
            ("vllm:num_requests_waiting", "Requests in the queue.", engine.waiting),
            ("vllm:kv_cache_usage_perc", "Share of the blocks in use, 1 is all.", engine.kv_usage_ratio),
        ):
            gauge = GaugeMetricFamily(name, text, labels=self._labels)
            gauge.add_metric(self._values, value)
            yield gauge
        for name, text, value in (
            ("vllm:prefix_cache_queries", "Prompt tokens looked up.", engine.counts["prompt_tokens"]),
            ("vllm:prefix_cache_hits", "Of these, found.", engine.counts["cached_tokens"]),
            ("vllm:prompt_tokens", "Prompt tokens.", engine.counts["prompt_tokens"]),
            ("vllm:num_preemptions", "Preemptions.", engine.preemptions),
        ):
            counter = CounterMetricFamily(name, text, labels=self._labels)
            counter.add_metric(self._values, value)
            yield counter
        size = engine.profile.block_size
        info = {
            "block_size": str(size),
            "enable_prefix_caching": "True",
            "kv_cache_size_tokens": str(size * engine.kv_blocks),
            "num_gpu_blocks": str(engine.kv_blocks),
        }
        config = GaugeMetricFamily("vllm:cache_config_info", "The cache.", labels=[*info, "engine"])
        config.add_metric([*info.values(), "0"], 1.0)
        yield config

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
        histogram = Histogram(name, text, self._labels, buckets=bounds, registry=self._registry)
        return histogram.labels(*self._values)
