"""``mulsched mock-engine``: engines that speak as vLLM does, without a GPU."""

import argparse
import asyncio
import dataclasses
import re
import signal
import time
from typing import TYPE_CHECKING, Any

from mulsched.commands._port import port
from mulsched.commands._workload import profile_of
from mulsched.errors import InvalidArgument
from mulsched.replay.profile import BUILTIN_PROFILES

if TYPE_CHECKING:
    from mulsched.mock_engine.server import MockServer

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "mock-engine",
        help="serve OpenAI's API from the engine model, as vLLM would",
        description="Serve OpenAI's API, KV events and metrics as vLLM does, from the engine model of "
        "replay: the times are a GPU's, the text is made up. See docs/mock-engine.md.",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument(
        "--port", type=port, default=8000, metavar="N", help="of the first engine (default: 8000)"
    )
    parser.add_argument("--count", type=int, default=1, metavar="N", help="engines, on consecutive ports")
    parser.add_argument("--model", default="mock", metavar="NAME", help="its name (default: mock)")
    parser.add_argument(
        "--tokenizer",
        default="none",
        metavar="FILE",
        help="a tokenizer.json (default: none, four bytes a token)",
    )
    parser.add_argument(
        "--answer-tokens", type=int, default=64, metavar="N", help="of an answer without a limit"
    )
    parser.add_argument(
        "--profile",
        default="builtin-8b",
        metavar="NAME",
        help=f"step times: {', '.join(BUILTIN_PROFILES)} or a CSV step table (default: builtin-8b)",
    )
    parser.add_argument("--block-size", type=int, metavar="TOKENS", help="default: the profile's")
    parser.add_argument(
        "--kv-blocks", type=int, metavar="N", help="blocks in the cache (default: the profile's)"
    )
    parser.add_argument(
        "--speed", type=float, default=1.0, metavar="X", help="X times as fast as the profile says"
    )
    parser.add_argument(
        "--kv-events", metavar="ENDPOINT", help="publish KV events at tcp://HOST:PORT, one port each"
    )
    parser.add_argument("--kv-replay", metavar="ENDPOINT", help="send missed ones again at tcp://HOST:PORT")
    parser.add_argument(
        "--kv-topic", default="", metavar="TEXT", help="topic of the messages (default: empty)"
    )
    parser.add_argument(
        "--event-format", choices=("map", "array"), default="map", help="array: before June 2026"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if options.count < 1:
        raise InvalidArgument(f"--count must be at least 1, got {options.count}")
    if options.kv_replay is not None and options.kv_events is None:
        raise InvalidArgument("--kv-replay goes with --kv-events")
    asyncio.run(_serve(options))
    return 0


async def _serve(options: argparse.Namespace) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    servers: list[MockServer] = []
    try:
        for i in range(options.count):
            servers.append(_server(options, i))
            await _start(servers[i], options, i)
        waits = [
            asyncio.ensure_future(wait) for wait in (stopped.wait(), *(server.failed() for server in servers))
        ]
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        done.pop().result()
    finally:
        for server in servers:
            await server.stop()


def _server(options: argparse.Namespace, i: int) -> "MockServer":
    from mulsched.mock_engine.engine import MockEngine
    from mulsched.mock_engine.kv_events import KvEventPublisher
    from mulsched.mock_engine.server import MockServer
    from mulsched.mock_engine.tokenizer import ByteTokenizer, FileTokenizer

    profile = profile_of(options)
    if options.block_size is not None:
        profile = dataclasses.replace(profile, block_size=options.block_size)
    publisher = None
    if options.kv_events is not None:
        publisher = KvEventPublisher(
            _offset(options.kv_events, i),
            None if options.kv_replay is None else _offset(options.kv_replay, i),
            clock=time.time,
            topic=options.kv_topic,
            event_format=options.event_format,
        )
    return MockServer(
        MockEngine(f"mock-{i}", profile, kv_blocks=options.kv_blocks, hash_seed=i),
        ByteTokenizer() if options.tokenizer == "none" else FileTokenizer(options.tokenizer),
        model=options.model,
        clock=time.time,
        speed=options.speed,
        answer_tokens=options.answer_tokens,
        publisher=publisher,
    )


async def _start(server: "MockServer", options: argparse.Namespace, i: int) -> None:
    port = await server.start(options.host, options.port + i if options.port else 0)
    sources = "" if server.publisher is None else f", KV events {server.publisher.endpoint}"
    print(
        f"{server.engine.name}: http://{options.host}:{port}/v1, model {options.model}{sources}", flush=True
    )


def _offset(endpoint: str, i: int) -> str:
    """Return the endpoint of engine ``i``: its port is that much higher, as of vLLM's ranks."""
    parts = re.fullmatch(r"(tcp://.+:)(\d+|\*)", endpoint)
    if parts is None:
        raise InvalidArgument(f"expected an endpoint like tcp://127.0.0.1:5557, got {endpoint}")
    host, port = parts.groups()
    return endpoint if port == "*" else f"{host}{int(port) + i}"
