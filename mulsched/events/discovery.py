"""Which publishers of KV events an engine has."""

from dataclasses import dataclass
from urllib.parse import urlsplit

from mulsched.errors import InvalidArgument, InvalidEvents, MissingExtra
from mulsched.events._http import Session, get, session_or_new

try:
    import msgspec
except ImportError as error:
    raise MissingExtra("KV events need msgspec: pip install 'mulsched[events]'") from error

__all__ = ["KvEventSource", "discover_kv_events"]


@dataclass(frozen=True, slots=True)
class KvEventSource:
    """A publisher: the arguments of a :class:`~mulsched.events.KvEventSubscriber`, and its rank."""

    rank: int
    endpoint: str
    replay_endpoint: str | None
    topic: str


class _Config(msgspec.Struct):
    endpoint: str
    replay_endpoint: str | None = None
    topic: str = ""
    publisher: str | None = "zmq"
    enable_kv_cache_events: bool = True


_decode = msgspec.json.Decoder(dict[int, _Config]).decode


async def discover_kv_events(
    url: str, *, timeout_s: float = 5.0, session: Session | None = None
) -> tuple[KvEventSource, ...]:
    """Return the publishers of the engine at ``url`` by rank, from ``GET /kv_event_sources`` (vLLM 0.32).

    An address that names every interface of the engine's host gets the host of ``url`` instead. Empty if the
    engine has no publisher over ZeroMQ or does not know the page: older engines must be told of by hand.
    Raises InvalidArgument (not a URL), InvalidEvents (an answer of another form), aiohttp.ClientError,
    TimeoutError.
    """
    host = urlsplit(url).hostname
    if host is None:
        raise InvalidArgument(f"a URL such as http://HOST:8000 expected, got {url!r}")
    async with session_or_new(session) as opened:
        page = await get(opened, url.rstrip("/") + "/kv_event_sources", timeout_s)
    if page is None:
        return ()
    try:
        configs = _decode(page)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidEvents(f"{url}/kv_event_sources is not a map from rank to publisher: {error}") from None
    return tuple(
        KvEventSource(
            rank,
            _reachable(config.endpoint, host),
            None if config.replay_endpoint is None else _reachable(config.replay_endpoint, host),
            config.topic,
        )
        for rank, config in sorted(configs.items())
        if config.publisher == "zmq" and config.enable_kv_cache_events
    )


def _reachable(endpoint: str, host: str) -> str:
    """Put ``host`` in place of an address that means every interface."""
    scheme, _, address = endpoint.partition("://")
    interface, _, port = address.rpartition(":")
    if scheme != "tcp" or interface not in ("*", "0.0.0.0", "::", "[::]"):
        return endpoint
    return f"tcp://{f'[{host}]' if ':' in host else host}:{port}"
