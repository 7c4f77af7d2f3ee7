"""``mulsched endpoint-picker``: which endpoint a request goes to, for Envoy and Kubernetes gateways."""

import argparse
import asyncio
import contextlib
import signal
import time
from typing import TYPE_CHECKING, Any

from mulsched.commands._port import port
from mulsched.commands._prompt_options import add_prompt_options, prompt_reader
from mulsched.commands._tiers import add_tier_option, tier_cost_ratio
from mulsched.errors import InvalidArgument
from mulsched.lifecycle import Lifecycle
from mulsched.prompt_reader import PromptReader
from mulsched.router import Router

if TYPE_CHECKING:
    from mulsched.adapters.envoy import Fleet

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "endpoint-picker",
        help="pick endpoints for Envoy and for Kubernetes' Inference Extension",
        description="An external processor for Envoy by gRPC that speaks the endpoint picker protocol of "
        "Kubernetes' Gateway API Inference Extension. See docs/envoy.md.",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=port, default=9002, metavar="N", help="default: 9002")
    parser.add_argument(
        "--engine", action="append", default=[], metavar="IP:PORT", help="an endpoint; once for each"
    )
    parser.add_argument(
        "--service", metavar="NAME:PORT", help="endpoints are the addresses that NAME has in DNS, followed"
    )
    parser.add_argument("--policy", default="lmetric", metavar="NAME", help="default: lmetric")
    add_prompt_options(parser)
    parser.add_argument(
        "--block-size", type=int, default=16, metavar="TOKENS", help="the engines' (default: 16)"
    )
    parser.add_argument(
        "--kv-tokens", type=int, default=262_144, metavar="N", help="in each engine's cache (default: 262144)"
    )
    parser.add_argument(
        "--metrics-poll", type=float, metavar="S", help="ask endpoints for their load every S seconds"
    )
    parser.add_argument(
        "--kv-events", action="store_true", help="follow endpoints' KV events; goes with --tokenizer"
    )
    parser.add_argument(
        "--kv-format", default="vllm", choices=("vllm", "sglang"), help="whose KV events (default: vllm)"
    )
    add_tier_option(parser)
    parser.add_argument(
        "--prefill-tokens-per-s", type=float, metavar="X", help="of an engine, for answers not streamed"
    )
    parser.add_argument(
        "--fallbacks", type=int, default=0, metavar="N", help="more endpoints to name (default: 0)"
    )
    parser.add_argument(
        "--max-in-flight", type=int, metavar="N", help="per endpoint, on average; more are refused with 429"
    )
    parser.add_argument("--max-body-bytes", type=int, default=16 * 2**20, metavar="N", help="default: 16 MiB")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if bool(options.engine) == bool(options.service):
        raise InvalidArgument("give either --engine, once for each endpoint, or --service")
    if options.kv_events and options.tokenizer == "none":
        raise InvalidArgument("--kv-events goes with --tokenizer: events tell of tokens")
    for name in ("block-size", "kv-tokens", "max-body-bytes"):
        value = getattr(options, name.replace("-", "_"))
        if value < 1:
            raise InvalidArgument(f"--{name} must be at least 1, got {value}")
    asyncio.run(_serve(options))
    return 0


async def _serve(options: argparse.Namespace) -> None:
    from mulsched.adapters.envoy import EndpointPicker, Fleet, PickerServer

    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    prompts = prompt_reader(options, options.block_size)
    lifecycle = _lifecycle(options, prompts)
    cache_blocks = max(1, options.kv_tokens // options.block_size)
    fleet = Fleet(lifecycle, cache_blocks=cache_blocks, watches=_watches(options, lifecycle.router))
    picker = EndpointPicker(
        lifecycle,
        prompts=prompts,
        clock=time.monotonic,
        fallbacks=options.fallbacks,
        max_in_flight=options.max_in_flight,
    )
    server = PickerServer(picker, max_body_bytes=options.max_body_bytes)
    with contextlib.closing(fleet):
        following = _populate(fleet, options)
        port = await server.start(f"{options.host}:{options.port}")
        print(f"endpoint picker: {options.host}:{port}, policy {options.policy}", flush=True)
        try:
            await stopped.wait()
        finally:
            if following is not None:
                following.cancel()
            await server.stop(1.0)
    print("requests: " + ", ".join(f"{name} {n}" for name, n in sorted(picker.counts.items())), flush=True)


def _lifecycle(options: argparse.Namespace, prompts: PromptReader) -> Lifecycle:
    tiers = tier_cost_ratio(options, events=options.kv_events)
    router = Router(block_size=prompts.router_block_size, policy=options.policy, tier_cost_ratio=tiers)
    rate = options.prefill_tokens_per_s
    return Lifecycle(router, prefill_tokens_per_s=None if rate is None else rate * prompts.units_per_token)


def _watches(options: argparse.Namespace, router: Router) -> list[Any]:
    from mulsched.adapters.envoy.watches import kv_events_of, metrics_of

    watches = []
    if options.metrics_poll is not None:
        watches.append(metrics_of(router, period_s=options.metrics_poll))
    if options.kv_events:
        watches.append(kv_events_of(router, kv_format=options.kv_format))
    return watches


def _populate(fleet: "Fleet", options: argparse.Namespace) -> "asyncio.Task[None] | None":
    """Add the endpoints; return what follows their name, if they have one."""
    for endpoint in options.engine:
        fleet.add(endpoint)
    if options.service is None:
        return None
    name, _, port = options.service.rpartition(":")
    if not name or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 2**16:
        raise InvalidArgument(f"--service must be NAME:PORT, got {options.service!r}")
    return asyncio.ensure_future(fleet.follow(name, int(port)))
