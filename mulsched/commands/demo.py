"""``mulsched demo``: four mock engines, a gateway and a load, under two policies in turn."""

import argparse
import asyncio
import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mulsched.commands._port import port
from mulsched.errors import InvalidArgument, MissingExtra

if TYPE_CHECKING:
    import aiohttp

    from mulsched.mock_engine.server import MockServer

__all__ = ["add_parser"]

_ENGINES = 4
# An engine's cache holds three prefixes and some: where each has its own, all hit; where all have all, few.
_GROUPS = 12
_PREFIX_CHARACTERS = 16_000
_KV_BLOCKS = 1_000
_ANSWER_TOKENS = 24


@dataclass(frozen=True, slots=True)
class _Ask:
    at_s: float
    body: bytes


@dataclass(slots=True)
class _Seen:
    first_s: float
    token_s: float
    prompt_tokens: int
    cached_tokens: int


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "demo",
        help="a gateway over four mock engines against round robin, in a minute",
        description="Four mock engines and a gateway get the same load under each policy, for comparison. "
        "The times are those of a GPU model, see docs/mock-engine.md.",
    )
    parser.add_argument(
        "--policy", action="append", metavar="NAME", help="once for each (default: round_robin and lmetric)"
    )
    parser.add_argument("--duration", type=float, default=15.0, metavar="S")
    parser.add_argument(
        "--rate", type=float, default=10.0, metavar="X", help="requests a second (default: 10)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the load")
    parser.add_argument(
        "--port", type=port, default=0, metavar="N", help="of the gateway (default: a free one)"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    for name in ("duration", "rate"):
        if not 0 < getattr(options, name) < float("inf"):
            raise InvalidArgument(f"--{name} must be above 0, got {getattr(options, name)}")
    load = _load(np.random.default_rng(options.seed), options.rate, options.duration)
    if not load:
        raise InvalidArgument("no request in that time: raise --rate or --duration")
    policies = options.policy or ["round_robin", "lmetric"]
    rows = [asyncio.run(_measure(policy, load, options.port)) for policy in policies]
    print(f"\n{len(load)} streamed requests to {_ENGINES} engines, {_GROUPS} prefixes, times in ms\n")
    print("\n".join(_table(["policy", *_FIGURES], rows)))
    return 0


def _load(rng: np.random.Generator, rate: float, duration_s: float) -> list[_Ask]:
    """Return requests at random times, each a shared prefix and a question of its own."""
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz "))
    prefixes = ["".join(rng.choice(letters, _PREFIX_CHARACTERS)) for _ in range(_GROUPS)]
    times = np.cumsum(rng.exponential(1 / rate, size=int(2 * rate * duration_s) + 20))
    asks = []
    for at_s in times[times < duration_s].tolist():
        question = "".join(rng.choice(letters, 200))
        messages = [
            {"role": "system", "content": prefixes[rng.integers(_GROUPS)]},
            {"role": "user", "content": question},
        ]
        body = {"model": "mock", "messages": messages, "max_tokens": _ANSWER_TOKENS, "stream": True}
        asks.append(_Ask(at_s, json.dumps(body | {"stream_options": {"include_usage": True}}).encode()))
    return asks


async def _measure(policy: str, load: list[_Ask], port: int) -> list[str]:
    """Return the row of a policy, on engines and a gateway of its own."""
    try:
        import aiohttp

        from mulsched.gateway import EngineConfig, Gateway, GatewayConfig
        from mulsched.mock_engine.server import MockServer  # noqa: F401  (says what is missing)
    except ImportError as error:
        raise MissingExtra("the demo needs the gateway: pip install 'mulsched[gateway]'") from error
    servers = [_server(i) for i in range(_ENGINES)]
    urls = [f"http://127.0.0.1:{await server.start('127.0.0.1', 0)}" for server in servers]
    ids = itertools.count(1)
    gateway = Gateway(
        GatewayConfig(tuple(map(EngineConfig, urls)), policy=policy), new_id=lambda: f"demo-{next(ids)}"
    )
    try:
        address = f"http://127.0.0.1:{await gateway.start('127.0.0.1', port)}"
        print(f"{policy}: {address} (live page)", file=sys.stderr, flush=True)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            clock = asyncio.get_running_loop().time
            start_s = clock()
            url = f"{address}/v1/chat/completions"
            seen = await asyncio.gather(*(_ask(session, url, ask, start_s, clock) for ask in load))
    finally:
        await gateway.stop()
        for server in servers:
            await server.stop()
    return _row(policy, seen)


def _server(i: int) -> "MockServer":
    from mulsched.mock_engine.engine import MockEngine
    from mulsched.mock_engine.server import MockServer
    from mulsched.mock_engine.tokenizer import ByteTokenizer
    from mulsched.replay.profile import builtin_profile

    engine = MockEngine(f"mock-{i}", builtin_profile("builtin-8b"), kv_blocks=_KV_BLOCKS, hash_seed=i)
    return MockServer(engine, ByteTokenizer(), model="mock", clock=time.time)


async def _ask(
    session: "aiohttp.ClientSession", url: str, ask: _Ask, start_s: float, clock: Callable[[], float]
) -> _Seen:
    await asyncio.sleep(max(0.0, start_s + ask.at_s - clock()))
    sent_s, first_s, data = clock(), 0.0, b""
    async with session.post(url, data=ask.body) as response:
        response.raise_for_status()
        async for piece in response.content.iter_any():
            first_s = first_s or clock()
            data += piece
    usage = json.loads(data.rsplit(b"data: ", 2)[1])["usage"]
    return _Seen(
        first_s - sent_s,
        (clock() - first_s) / (_ANSWER_TOKENS - 1),
        usage["prompt_tokens"],
        usage["prompt_tokens_details"]["cached_tokens"],
    )


_FIGURES = ("TTFT p50", "TTFT p95", "TPOT p50", "TPOT p95", "hit ratio")


def _row(policy: str, seen: list[_Seen]) -> list[str]:
    times = [
        1000 * float(np.quantile([getattr(each, field) for each in seen], share))
        for field in ("first_s", "token_s")
        for share in (0.5, 0.95)
    ]
    hits = sum(each.cached_tokens for each in seen) / sum(each.prompt_tokens for each in seen)
    return [policy, *(f"{value:.1f}" for value in times), f"{hits:.3f}"]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in (head, *rows)
    ]
