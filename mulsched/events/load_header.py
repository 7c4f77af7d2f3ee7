"""The load that an engine reports with an answer, in ORCA's response header.

ORCA (Open Request Cost Aggregation, of xDS) names the header and two ways to write it, which vLLM 0.32 sends
with answers that are not streamed if the request asks so::

    endpoint-load-metrics: TEXT named_metrics.kv_cache_usage_perc=0.4, named_metrics.num_requests_waiting=3.0
    endpoint-load-metrics: JSON {"named_metrics": {"num_requests_waiting": 3.0}}

vLLM tells the requests that wait, and not those that run.
"""

from dataclasses import dataclass

from mulsched.errors import InvalidEvents, MissingExtra

try:
    import msgspec
except ImportError as error:
    raise MissingExtra("load headers need msgspec: pip install 'mulsched[events]'") from error

__all__ = ["LOAD_FORMAT_HEADER", "LOAD_HEADER", "HeaderLoad", "read_load_header"]

LOAD_HEADER = "endpoint-load-metrics"
LOAD_FORMAT_HEADER = "endpoint-load-metrics-format"
"""Of a request: ``TEXT`` or ``JSON``."""

_NAMES = {"num_requests_running": "running", "num_requests_waiting": "waiting"}
_PREFIX = "named_metrics."


class _Report(msgspec.Struct):
    named_metrics: dict[str, float] = {}


_decode = msgspec.json.Decoder(_Report).decode


@dataclass(frozen=True, slots=True)
class HeaderLoad:
    """Requests on an engine, each None where the header does not say."""

    running: int | None = None
    waiting: int | None = None


def read_load_header(value: str) -> HeaderLoad:
    """Return the load that a header's value tells; metrics that are not known are passed over.

    O(characters). Raises InvalidEvents (another format, or a number of requests that is none).
    """
    form, _, report = value.strip().partition(" ")
    metrics: dict[str, float] = {}
    try:
        if form.upper() == "JSON":
            metrics = _decode(report.encode("utf-8", "surrogateescape")).named_metrics
        elif form.upper() == "TEXT":
            for entry in report.split(","):
                name, _, number = entry.strip().partition("=")
                if name.startswith(_PREFIX):
                    metrics[name.removeprefix(_PREFIX)] = float(number)
        else:
            raise InvalidEvents(f"TEXT or JSON expected, got {form[:20]!r}")
    except (ValueError, RecursionError) as error:
        raise InvalidEvents(f"not a report of load: {error}") from None
    told = {field: metrics[name] for name, field in _NAMES.items() if name in metrics}
    for field, count in told.items():
        if not 0 <= count < 2**40:
            raise InvalidEvents(f"{field} must be a number of at least 0, got {count}")
    return HeaderLoad(**{field: int(count) for field, count in told.items()})
