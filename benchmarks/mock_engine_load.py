"""How many streamed requests a second ``mulsched mock-engine`` sustains: many connections, tiny answers.

``python benchmarks/mock_engine_load.py URL [--requests N] [--connections N] [--tokens N]``
"""

import argparse
import asyncio
import json
import time

import aiohttp


async def ask(session, path, body):
    async with session.post(path, data=body, headers={"Content-Type": "application/json"}) as response:
        data = await response.read()
    assert response.status == 200, data
    assert data.endswith(b"data: [DONE]\n\n"), data


async def worker(session, path, numbers, tokens):
    for number in numbers:
        body = {
            "messages": [{"role": "user", "content": f"{number:08d} how are you?"}],
            "max_tokens": tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        await ask(session, path, json.dumps(body))


async def load(options):
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(options.url, connector=connector) as session:
        numbers = iter(range(options.requests))
        path = "/v1/chat/completions"
        started = time.perf_counter()
        await asyncio.gather(
            *(worker(session, path, numbers, options.tokens) for _ in range(options.connections))
        )
        return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2)
    options = parser.parse_args()
    elapsed_s = asyncio.run(load(options))
    rate, client_s = options.requests / elapsed_s, time.process_time()
    print(f"{rate:.0f} requests/s over {elapsed_s:.1f} s; the client itself used {client_s:.1f} s of CPU")


if __name__ == "__main__":
    main()
