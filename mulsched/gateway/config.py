"""What a gateway is told at its start."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from mulsched.errors import InvalidArgument, InvalidType
from mulsched.events import KV_DECODERS
from mulsched.lower_tiers import check_cost_ratios

__all__ = ["EngineConfig", "GatewayConfig"]

_HEADER_NAME = re.compile(r"[A-Za-z0-9-]+")
_ENDPOINT = re.compile(r"tcp://\S+:[0-9]{1,5}|ipc://\S+")
# Of one connection, or made anew for the body that is sent: never taken over from a client.
_OWN_HEADERS = frozenset((
    "accept-encoding", "connection", "content-encoding", "content-length", "content-type", "cookie", "expect",
    "host", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade", "x-request-id",
))  # fmt: skip


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """An engine: ``url`` such as ``http://10.0.0.7:8000``, and where its KV events come from, if they do.

    ``kv_events``: an endpoint, or ``"auto"`` to ask the engine, whose cache is predicted if it does not tell.
    ``rank``: of several data-parallel ranks at that URL, each an engine here, the one that this is; requests
    name it in vLLM's header. Raises InvalidArgument.
    """

    url: str
    kv_events: str | None = None
    kv_replay: str | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            sound = False
        # of the URL's text, nothing that its reader would drop in silence
        sound = sound and self.url.isprintable() and " " not in self.url
        if not sound or parts.query or parts.fragment or parts.username is not None:
            raise InvalidArgument(f"an engine must be a URL such as http://10.0.0.7:8000, got {self.url!r}")
        if self.kv_events is None and self.kv_replay is not None:
            raise InvalidArgument(f"kv_replay goes with kv_events, got {self.kv_replay!r} alone")
        if self.kv_events == "auto" and self.kv_replay is not None:
            raise InvalidArgument(
                f"an engine that is asked for its endpoints has no kv_replay, got {self.kv_replay!r}"
            )
        for endpoint in (None if self.kv_events == "auto" else self.kv_events, self.kv_replay):
            if endpoint is not None and not _is_endpoint(endpoint):
                raise InvalidArgument(f"an endpoint such as tcp://10.0.0.7:5557 expected, got {endpoint!r}")

    @property
    def address(self) -> str:
        """The URL without its scheme, which all ranks there have."""
        return self.url.partition("://")[2].rstrip("/")

    @property
    def name(self) -> str:
        """The name of the instance: the address, and ``/RANK`` if it is one."""
        return self.address if self.rank is None else f"{self.address}/{self.rank}"

    def ranks(self, count: int) -> "list[EngineConfig]":
        """Return an engine for each data-parallel rank; their ports of KV events count up, as vLLM's do."""
        return [
            EngineConfig(self.url, _offset(self.kv_events, rank), _offset(self.kv_replay, rank), rank)
            for rank in range(count)
        ]


def _is_endpoint(text: str) -> bool:
    return _ENDPOINT.fullmatch(text) is not None and (
        text.startswith("ipc:") or 0 < int(text.rpartition(":")[2]) < 2**16
    )


def _offset(endpoint: str | None, rank: int) -> str | None:
    if endpoint is None or endpoint == "auto" or rank == 0:
        return endpoint
    host, _, port = endpoint.rpartition(":")
    if not (port.isascii() and port.isdecimal()):
        raise InvalidArgument(
            f"an endpoint with a port expected, since ranks count up from it, got {endpoint!r}"
        )
    return f"{host}:{int(port) + rank}"


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """All settings of a gateway. Defaults are arbitrary where no other source is named.

    ``engines``: those that there are at the start, each rank one of its own. ``engines_file``: names more,
    and is read again when told to. ``admin_keys``: whoever sends one may add and remove engines while the
    gateway runs; none: nobody may. Without engines at least one of the two is needed. Of engines that come
    either way, ``data_parallel_size`` is how many ranks each URL has, and ``kv_events_auto`` whether those
    that come without endpoints are asked for them.

    ``policy``: as of :class:`~mulsched.Router`. ``kv_format``: of KV events, ``vllm`` or ``sglang``.
    ``block_size``: tokens in a block of the engines; 16 as in vLLM. ``kv_tokens``: the size of each engine's
    KV cache, for the prediction of what it holds; None asks the engine's metrics for it, and takes 100,000
    where they do not tell. ``prefill_tokens_per_s``: what an engine computes of prompts, for answers that are
    not streamed, whose first token is not seen; None keeps their prompts in the queue term until they end.
    ``poll_load_s``: how often engines' metrics are asked for their load, to count requests that come from
    elsewhere; None does not.
    ``tier_cost_ratio``: as of :class:`~mulsched.Router`.
    ``load_headers``: engines are asked to tell their load with each answer, in ORCA's header.

    ``api_keys``: clients must send one of them, or an admin key; none: everyone may. ``engine_api_key``:
    sent to engines.
    ``forward_headers``: headers of clients that go on to engines besides those that always do.
    ``max_in_flight``: requests at a time. ``read_timeout_s``: an engine that sends nothing for so long has
    failed; 600 as OpenAI's client waits. ``request_timeout_s``: for a request as a whole.
    ``idle_timeout_s``: a connection without a request, or with a head that is not complete, is closed.
    ``linger_s``: how long the rest of a refused body is read.
    ``max_attempts``: instances a request is tried on. ``eject_after``: so many failures in a row and an
    engine gets no more requests; ``readmit_after``: so many good checks in a row and it does.

    Raises InvalidArgument, InvalidType.
    """

    engines: tuple[EngineConfig, ...] = ()
    engines_file: str | None = None
    data_parallel_size: int = 1
    kv_events_auto: bool = False
    policy: str = "lmetric"
    kv_format: str = "vllm"
    seed: int = 0
    block_size: int = 16
    kv_tokens: int | None = None
    prefill_tokens_per_s: float | None = None
    tier_cost_ratio: Mapping[str, float] | None = None
    poll_load_s: float | None = None
    load_headers: bool = False
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    admin_keys: tuple[str, ...] = field(default=(), repr=False)
    engine_api_key: str | None = field(default=None, repr=False)
    forward_headers: tuple[str, ...] = ()
    max_body_bytes: int = 32 * 2**20
    max_in_flight: int = 1000
    body_timeout_s: float = 30.0
    idle_timeout_s: float = 75.0
    connect_timeout_s: float = 2.0
    read_timeout_s: float = 600.0
    request_timeout_s: float = 3600.0
    linger_s: float = 1.0
    drain_timeout_s: float = 60.0
    max_attempts: int = 3
    health_path: str = "/health"
    health_period_s: float = 2.0
    health_timeout_s: float = 2.0
    eject_after: int = 3
    readmit_after: int = 2

    def __post_init__(self) -> None:
        if not all(isinstance(engine, EngineConfig) for engine in self.engines):
            raise InvalidType(f"each engine must be an EngineConfig, got {self.engines!r}")
        if not self.engines and self.engines_file is None and not self.admin_keys:
            raise InvalidArgument(
                "a gateway needs an engine, a file of engines, or an admin key to add some with, got none"
            )
        names = [engine.name for engine in self.engines]
        if len(set(names)) < len(names):
            raise InvalidArgument(f"each engine may be given once, got {', '.join(names)}")
        if self.kv_format not in KV_DECODERS:
            raise InvalidArgument(
                f"kv_format must be one of {', '.join(KV_DECODERS)}, got {self.kv_format!r}"
            )
        check_cost_ratios(self.tier_cost_ratio)
        for name in ("block_size", "data_parallel_size", "max_body_bytes", "max_in_flight", "max_attempts"):
            self._check(name, int)
        for name in ("eject_after", "readmit_after"):
            self._check(name, int)
        if self.kv_tokens is not None:
            self._check("kv_tokens", int)
        for name in self.__dataclass_fields__:
            if name.endswith("_s") and getattr(self, name) is not None:
                self._check(name, float)
        if any(not key or not key.isascii() or not key.isprintable() for key in self._keys()):
            raise InvalidArgument("an API key must be printable ASCII and not empty")
        if set(self.admin_keys) & {*self.api_keys, self.engine_api_key}:
            raise InvalidArgument(
                "an admin key must be another than the API keys, which clients have, and the engines' key"
            )
        if not self.health_path.startswith("/"):
            raise InvalidArgument(f"health_path must start with a slash, got {self.health_path!r}")
        for name in self.forward_headers:
            if _HEADER_NAME.fullmatch(name) is None or name.lower() in _OWN_HEADERS:
                raise InvalidArgument(f"a header that may be forwarded expected, got {name!r}")

    def _keys(self) -> tuple[str, ...]:
        keys = (*self.api_keys, *self.admin_keys)
        return keys if self.engine_api_key is None else (*keys, self.engine_api_key)

    def _check(self, name: str, kind: type) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
            raise InvalidType(f"{name} must be a number, got {type(value).__name__}")
        if not 0 < value < float("inf"):
            raise InvalidArgument(f"{name} must be above 0 and finite, got {value}")
