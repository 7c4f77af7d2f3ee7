"""``mulsched serve``: OpenAI's API in front of many engines."""

import argparse
import asyncio
import contextlib
import gc
import itertools
import signal
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mulsched.commands._prompt_options import add_prompt_options, prompt_reader
from mulsched.commands._tiers import add_tier_option, tier_cost_ratio
from mulsched.errors import InvalidArgument

if TYPE_CHECKING:
    from mulsched.gateway.config import GatewayConfig
    from mulsched.gateway.gateway import Gateway

__all__ = ["add_parser"]

_SECONDS = {
    "read-timeout": "an engine that sends nothing for so long has failed",
    "request-timeout": "for a request as a whole",
    "connect-timeout": "to connect to an engine",
    "drain-timeout": "for requests under way when the gateway stops, or at an engine that is removed",
    "health-period": "from one health check to the next",
    "health-timeout": "for a health check",
}
_COUNTS = {
    "block-size": "tokens in a block of the engines",
    "kv-tokens": "tokens in each engine's cache (default: what its metrics say)",
    "max-body-bytes": "a longer body is refused",
    "max-in-flight": "more requests at a time are refused",
    "max-attempts": "instances that a request is tried on",
    "eject-after": "failures in a row, and an engine gets no requests",
    "readmit-after": "good checks in a row, and it does again",
}


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "serve",
        help="a gateway: OpenAI's API in front of many engines",
        description="Serve OpenAI's API from many engines, each request by the one that a policy chooses. "
        "See docs/gateway.md.",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080, metavar="N")
    parser.add_argument(
        "--engine", action="append", default=[], metavar="URL", help="http://HOST:PORT; once for each"
    )
    parser.add_argument(
        "--engines-file",
        metavar="FILE",
        help="more engines, one a line: URL, and KV event and replay endpoints if any; read again on SIGHUP",
    )
    parser.add_argument(
        "--kv-events",
        action="append",
        default=[],
        metavar="ENDPOINT",
        help="where an engine publishes its KV events, tcp://HOST:PORT; once for each, in their order; "
        "or auto, to ask each engine",
    )
    parser.add_argument(
        "--kv-replay",
        action="append",
        default=[],
        metavar="ENDPOINT",
        help="where it sends them again",
    )
    parser.add_argument(
        "--kv-format", default="vllm", choices=("vllm", "sglang"), help="whose KV events (default: vllm)"
    )
    parser.add_argument(
        "--data-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="ranks behind each engine's URL, each an instance; their ports of KV events count up",
    )
    parser.add_argument(
        "--policy", default="lmetric", metavar="NAME", help="which engine gets a request (default: lmetric)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of a policy that draws")
    add_prompt_options(parser)
    parser.add_argument(
        "--prefill-tokens-per-s", type=float, metavar="X", help="of an engine, for answers not streamed"
    )
    add_tier_option(parser)
    parser.add_argument(
        "--poll-load",
        dest="poll_load_s",
        type=float,
        metavar="S",
        help="ask engines for their load so often, if others send them requests too",
    )
    parser.add_argument(
        "--load-headers",
        action="store_true",
        help="ask engines to tell their load with each answer, in ORCA's header",
    )
    parser.add_argument(
        "--record", metavar="FILE", help="a log of decisions that replays; see docs/record-format.md"
    )
    parser.add_argument(
        "--api-key",
        dest="api_keys",
        action="append",
        default=[],
        metavar="KEY",
        help="clients need one; @FILE reads it",
    )
    parser.add_argument(
        "--admin-key",
        dest="admin_keys",
        action="append",
        default=[],
        metavar="KEY",
        help="whoever has it may add and remove engines; @FILE reads it (default: nobody may)",
    )
    parser.add_argument("--engine-api-key", metavar="KEY", help="sent to engines; @FILE reads it")
    parser.add_argument(
        "--forward-header",
        dest="forward_headers",
        action="append",
        default=[],
        metavar="NAME",
        help="goes on to engines too",
    )
    parser.add_argument("--health-path", default="/health", metavar="PATH")
    for name, text in _SECONDS.items():
        parser.add_argument(
            f"--{name}", dest=f"{name.replace('-', '_')}_s", type=float, metavar="S", help=text,
            default=argparse.SUPPRESS,
        )  # fmt: skip
    for name, text in _COUNTS.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", help=text, default=argparse.SUPPRESS)
    parser.add_argument("--no-log", action="store_true", help="no lines of JSON on standard error")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from mulsched.gateway.gateway import Gateway
    from mulsched.gateway.logs import JsonLog, no_log
    from mulsched.record import Recorder

    config = _config(options)
    if config.api_keys == () and options.host not in ("127.0.0.1", "::1", "localhost"):
        print(f"mulsched: whoever reaches {options.host} may use the engines: no --api-key", file=sys.stderr)
    prompts = prompt_reader(options, config.block_size)
    # standard error without Python's buffers, a system call a line
    errors = open(2, "wb", buffering=0, closefd=False)  # noqa: SIM115
    log = no_log if options.no_log else JsonLog(errors.write, time.time)
    with contextlib.ExitStack() as stack:
        recorder = None
        if options.record is not None:
            units = {"block_size": prompts.router_block_size, "units_per_token": prompts.units_per_token}
            recorder = stack.enter_context(Recorder(options.record, **units))
        runner = stack.enter_context(asyncio.Runner(loop_factory=_loop_factory()))
        # of this run and no other, at a tenth of what a UUID for each takes
        ids = map(f"{uuid.uuid4().hex[:16]}-{{}}".format, itertools.count())
        gateway = Gateway(config, new_id=ids.__next__, prompts=prompts, log=log, recorder=recorder)
        runner.run(_serve(gateway, options))
    return 0


def _config(options: argparse.Namespace) -> "GatewayConfig":
    """Return the configuration that the options give. Raises InvalidArgument, InvalidType, OSError."""
    from mulsched.gateway.config import EngineConfig, GatewayConfig

    nothing = [None] * len(options.engine)
    kv_events = options.kv_events
    kv_events_auto = kv_events == ["auto"]
    if kv_events_auto:
        kv_events = kv_events * len(options.engine)
    for name, sockets in (("--kv-events", kv_events), ("--kv-replay", options.kv_replay)):
        if len(sockets) not in (0, len(options.engine)):
            raise InvalidArgument(f"{name} goes with each --engine or with none, got {len(sockets)}")
    if options.kv_replay and not options.kv_events:
        raise InvalidArgument("--kv-replay goes with --kv-events")
    if options.kv_events and options.tokenizer == "none":
        raise InvalidArgument("--kv-events needs --tokenizer, since events speak of tokens")
    fields = GatewayConfig.__dataclass_fields__
    given = {name: value for name, value in vars(options).items() if name in fields}
    engines = tuple(map(EngineConfig, options.engine, kv_events or nothing, options.kv_replay or nothing))
    ranks = options.data_parallel_size
    if ranks < 1:
        raise InvalidArgument(f"--data-parallel-size must be at least 1, got {ranks}")
    if ranks > 1:
        engines = tuple(rank for engine in engines for rank in engine.ranks(ranks))
    given["engines"] = engines
    given["kv_events_auto"] = kv_events_auto
    events = options.tokenizer != "none" and bool(
        options.kv_events or options.engines_file or options.admin_keys
    )
    given["tier_cost_ratio"] = tier_cost_ratio(options, events=events)
    given["api_keys"] = tuple(map(_secret, options.api_keys))
    given["admin_keys"] = tuple(map(_secret, options.admin_keys))
    given["engine_api_key"] = _secret(options.engine_api_key)
    given["forward_headers"] = tuple(options.forward_headers)
    return GatewayConfig(**given)


def _secret(value: str | None) -> str | None:
    """Return a key, read from a file if it is @FILE: arguments can be seen by every user of a machine."""
    return Path(value[1:]).read_text().strip() if value is not None and value.startswith("@") else value


def _loop_factory() -> "Callable[[], asyncio.AbstractEventLoop] | None":
    """Return uvloop's, which takes a good part less of a core, where it is installed."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


async def _serve(gateway: "Gateway", options: argparse.Namespace) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    if options.engines_file is not None:
        # before the first checks, which take their time: the signal ends a process that does not handle it
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, gateway.reread_engines)
    try:
        port = await gateway.start(options.host, options.port)
        # modules and classes stay; looking through them holds requests up for 40 ms each time
        gc.freeze()
        addresses = {engine.config.address for engine in gateway.fleet.engines.values()}
        print(f"http://{options.host}:{port}/v1 over {len(addresses)} engines, page at /", flush=True)
        await stopped.wait()
    finally:
        await gateway.stop()
