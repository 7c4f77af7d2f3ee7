"""An engine as a script: raw HTTP on a loopback socket, so that it can die, stall and lie at any byte."""

import asyncio
import contextlib
import json
from dataclasses import dataclass, field


@dataclass
class Asked:
    """A request as it came: its head in lines, its body in bytes."""

    line: str
    headers: list[tuple[str, str]]
    body: bytes
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    def header(self, name):
        return [value for key, value in self.headers if key.lower() == name.lower()]


class FakeEngine:
    """``answer(asked, reader, writer)`` writes what a POST gets; a connection is closed after it."""

    def __init__(self, answer):
        self.answer = answer
        self.asked: list[Asked] = []
        self.healthy = True
        self.arrived = asyncio.Event()
        self.models = ["m"]
        self.metrics = b""
        self.kv_event_sources = None  # there is no such page
        self.sources_asked = 0

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self.name = self.url.removeprefix("http://")
        return self

    async def __aexit__(self, *error):
        self._server.close()

    async def _serve(self, reader, writer):
        try:
            asked = await read_request(reader)
            if asked is not None:
                await self._reply(asked, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _reply(self, asked, reader, writer):
        path = asked.line.split(" ")[1]
        if path == "/health":
            return write_whole(writer, b"", status=200 if self.healthy else 500)
        if path == "/v1/models":
            models = [{"id": name, "object": "model"} for name in self.models]
            return write_whole(writer, json.dumps({"object": "list", "data": models}).encode())
        if path == "/metrics":
            return write_whole(writer, self.metrics)
        if path == "/kv_event_sources":
            self.sources_asked += 1
            told = self.kv_event_sources
            if told == b"fails":
                return write_whole(writer, b"", status=500)
            return write_whole(writer, told or b"", status=404 if told is None else 200)
        self.asked.append(asked)
        self.arrived.set()
        return await self.answer(asked, reader, writer)


async def read_request(reader):
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    except asyncio.IncompleteReadError:
        return None
    headers = [tuple(part.strip() for part in line.split(":", 1)) for line in head[1:] if line]
    asked = Asked(head[0], headers, b"")
    assert asked.header("Transfer-Encoding") == []
    asked.body = await reader.readexactly(int((asked.header("Content-Length") or ["0"])[0]))
    return asked


def write_whole(writer, body, status=200, kind="application/json", extra=()):
    lines = [f"HTTP/1.1 {status} X", f"Content-Type: {kind}", f"Content-Length: {len(body)}", *extra]
    writer.write("\r\n".join([*lines, "Connection: close", "", ""]).encode() + body)


def write_stream_head(writer, extra=()):
    lines = ["HTTP/1.1 200 OK", "Content-Type: text/event-stream", "Transfer-Encoding: chunked", *extra]
    writer.write("\r\n".join([*lines, "", ""]).encode())


def write_chunk(writer, data):
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


def answers(body=b'{"ok": true}', **options):
    async def answer(asked, reader, writer):
        write_whole(writer, body, **options)

    return answer


def streams(*pieces, ends=True):
    """Send pieces; an Event among them is waited for, and what is not ended breaks off."""

    async def answer(asked, reader, writer):
        write_stream_head(writer)
        for piece in pieces:
            if isinstance(piece, asyncio.Event):
                await writer.drain()
                await piece.wait()
            else:
                write_chunk(writer, piece)
        if ends:
            writer.write(b"0\r\n\r\n")

    return answer


def waits_for_the_end(*pieces):
    """Send pieces, and then nothing until the other side closes."""

    async def answer(asked, reader, writer):
        if pieces:
            write_stream_head(writer)
        for piece in pieces:
            write_chunk(writer, piece)
        await writer.drain()
        with contextlib.suppress(ConnectionError):
            await reader.read(1)
        asked.gone.set()

    return answer


async def dies(asked, reader, writer):
    """Close without a byte."""
