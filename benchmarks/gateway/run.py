"""What a gateway adds to a streamed request, and how many it sustains on one core, beside others and none.

``python benchmarks/gateway/run.py [--peer PYTHON] [--turns N] [--requests N] [--connections N]``

Engines that answer at once from memory (five pieces of a stream) and the load share core 1; the front has
core 0. ``--peer``: a Python that has sglang-router, vllm-router or both, which then take their turns too.
Each turn measures latency with one connection, and the rate with many; the CPU time is the front's own, from
/proc. It does so with a client as clients are, and with one that acknowledges every packet at once
(TCP_QUICKACK): a front whose sockets hold small packets back until an acknowledgement waits for the first,
40 ms on Linux, and not for the second.
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

CHUNK = b'{"id":"c","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":" word"}}]}'
PIECE = b"data: " + CHUNK + b"\n\n"
PIECES = [PIECE, PIECE, PIECE, PIECE, b"data: [DONE]\n\n"]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
ANSWER = HEAD + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in PIECES) + b"0\r\n\r\n"
PORT, N_ENGINES = 18_200, 4
FIRST = {"delayed": 500, "at once": 400_000}  # prompt for a client that acknowledges so


class Engine(asyncio.Protocol):
    """Answers every POST with the stream, and every GET with something a router is content with."""

    def connection_made(self, transport):
        self.transport, self.data = transport, b""

    def data_received(self, data):
        self.data += data
        while b"\r\n\r\n" in self.data and not self.transport.is_closing():
            head, _, rest = self.data.partition(b"\r\n\r\n")
            _, found, length = head.lower().partition(b"content-length:")
            size = int(length.split(b"\r\n")[0]) if found else 0
            if len(rest) < size:
                break
            self.data = rest[size:]
            if not head.startswith((b"POST ", b"GET ")):  # sglang-router asks whether HTTP/2 is spoken
                self.transport.close()
                break
            self.transport.write(ANSWER if head.startswith(b"POST") else self.page(head))

    def page(self, head):
        path = head.split(b" ")[1]
        body = b'{"object":"list","data":[{"id":"m"}]}' if path == b"/v1/models" else b'{"model_path":"m"}'
        return (
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
            + body
        )


async def engines():
    loop = asyncio.get_running_loop()
    for i in range(N_ENGINES):
        await loop.create_server(Engine, "127.0.0.1", PORT + i, backlog=1024)
    await asyncio.Event().wait()


def message(number):
    content = f"{number:08d} " + "how are you today? " * 50
    body = {"model": "m", "messages": [{"role": "user", "content": content}], "stream": True, "max_tokens": 4}
    data = json.dumps(body).encode()
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: h", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Content-Length: {len(data)}"])
    return f"{head}\r\n\r\n".encode() + data


async def worker(port, numbers, latencies, acks):
    loop = asyncio.get_running_loop()
    with socket.socket() as connection:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await loop.sock_connect(connection, ("127.0.0.1", port))
        for number in numbers:
            started = time.perf_counter()
            await loop.sock_sendall(connection, message(number))
            answer = b""
            while not answer.endswith(b"\r\n0\r\n\r\n"):
                if acks == "at once":  # it does not last: Linux falls back by itself
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
                piece = await loop.sock_recv(connection, 65_536)
                assert piece, answer[:300]
                answer += piece
            latencies.append(time.perf_counter() - started)
            assert answer.startswith(b"HTTP/1.1 200"), answer[:300]
            assert b"[DONE]" in answer


async def load(port, first, n_requests, n_connections, acks):
    latencies, numbers = [], iter(range(first, first + n_requests))
    started = time.perf_counter()
    await asyncio.gather(*(worker(port, numbers, latencies, acks) for _ in range(n_connections)))
    return latencies, n_requests / (time.perf_counter() - started)


def cpu_s(process):
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def commands(peer):
    urls = [f"http://127.0.0.1:{PORT + i}" for i in range(N_ENGINES)]
    given = [part for url in urls for part in ("--engine", url)]
    ours = [sys.executable, "-m", "mulsched", "serve", *given, "--port"]
    fronts = {
        "none": None,
        "mulsched": ours,
        "mulsched, round_robin": [*ours[:-1], "--policy", "round_robin", "--port"],
    }
    for package in ("sglang_router", "vllm_router"):
        if (
            not peer
            or subprocess.run([peer, "-c", f"import {package}"], stderr=subprocess.DEVNULL).returncode
        ):
            continue
        for policy in ("cache_aware", "round_robin"):
            fronts[f"{package.replace('_', '-')}, {policy}"] = [
                *(peer, "-m", f"{package}.launch_router", "--policy", policy, "--log-level", "error"),
                *("--prometheus-port", "18299", "--worker-urls", *urls, "--port"),
            ]  # fmt: skip
    return fronts


def wait_for(url):
    for _ in range(600):
        try:
            with urllib.request.urlopen(url, timeout=1) as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        time.sleep(0.1)
    raise SystemExit(f"{url} does not answer")


def turn(name, command, port, first, options):
    front = None
    if command is not None:
        core = ["taskset", "-c", "0", *command, str(port)]
        front = subprocess.Popen(core, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        if front is not None:
            wait_for(f"http://127.0.0.1:{port}/{'healthz' if name.startswith('mulsched') else 'health'}")
            time.sleep(1)
        asyncio.run(load(port, first, 500, 8, "delayed"))  # connections are made, code is warm
        return {acks: measure(front, port, first + at, acks, options) for acks, at in FIRST.items()}
    finally:
        if front is not None:
            front.terminate()
            front.wait()


def measure(front, port, first, acks, options):
    latencies, _ = asyncio.run(load(port, first, 1000, 1, acks))
    before = cpu_s(front) if front else 0.0
    _, rate = asyncio.run(load(port, first + 1000, options.requests, options.connections, acks))
    used = (cpu_s(front) - before) / options.requests if front else 0.0
    cut = statistics.quantiles(latencies, n=100)
    return {"p50_ms": 1e3 * cut[49], "p99_ms": 1e3 * cut[98], "rate_per_s": rate, "cpu_ms": 1e3 * used}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--peer", metavar="PYTHON")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--connections", type=int, default=32)
    options = parser.parse_args()
    import uvloop

    uvloop.install()
    if options.engines:
        asyncio.run(engines())
    os.sched_setaffinity(0, {1})
    behind = subprocess.Popen([sys.executable, __file__, "--engines"])
    results = {}
    try:
        wait_for(f"http://127.0.0.1:{PORT}/health")
        for number in range(options.turns):
            for at, (name, command) in enumerate(commands(options.peer).items()):
                port = PORT if command is None else PORT + 10 + at
                for acks, found in turn(name, command, port, number * 1_000_000, options).items():
                    results.setdefault((name, acks), []).append(found)
                    print(number, name, acks, {key: round(found[key], 2) for key in found}, flush=True)
    finally:
        behind.terminate()
        behind.wait()
    print("| front | ACKs | p50 ms | p99 ms | requests/s | CPU ms a request |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for (name, acks), found in results.items():
        medians = {key: statistics.median(each[key] for each in found) for key in found[0]}
        row = "{p50_ms:.2f} | {p99_ms:.2f} | {rate_per_s:,.0f} | {cpu_ms:.2f}".format(**medians)
        print(f"| {name} | {acks} | {row} |")


if __name__ == "__main__":
    main()
