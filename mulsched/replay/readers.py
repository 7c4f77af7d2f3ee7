"""Readers of trace files. A bad line raises TraceError that names file and line.

=========  ==================================================================================  ===========
format     a line                                                                              block
=========  ==================================================================================  ===========
mooncake   JSON: timestamp (ms), input_length, output_length, hash_ids                         512 tokens
bailian    JSON: chat_id, parent_chat_id, timestamp (s), input_length, output_length,          16 tokens
           hash_ids
agentic    JSON: sid, t (s from the session's start), in, out, think_time, rle                 64 tokens
azure      CSV: TIMESTAMP, ContextTokens, GeneratedTokens                                      no prefixes
=========  ==================================================================================  ===========

Sources: mooncake FAST'25 traces (kvcache-ai/Mooncake); Bailian (alibaba-edu/qwen-bailian-usagetraces-anon);
agentic coding sessions (callanjfox/kv-cache-tester); Azure LLM inference traces 2023.
"""

import gzip
import io
import json
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from mulsched.errors import InvalidArgument, TraceError
from mulsched.replay.trace import Floats, Trace

__all__ = ["FORMATS", "read_trace"]

Lines = Iterator[tuple[int, str]]
"""Numbers and texts of the lines that are not blank."""

_AZURE_HEADER = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
_LIMIT = 2**48 - 1  # of every number in a file: the largest block id; far beyond any length or time


class _BadLineError(Exception):
    """What is wrong with the line at hand; the file and line are added where it is caught."""


@dataclass(frozen=True, slots=True)
class _Options:
    """What a reader has to make up, and how."""

    rng: np.random.Generator
    spread_s: float
    spread_ticks: bool


@dataclass(slots=True)
class _Rows:
    """Requests as they are read, before they are sorted by arrival."""

    arrival_s: list[float] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    output_tokens: list[int] = field(default_factory=list)
    runs: list[list[int]] = field(default_factory=list)  # start, length, start, length, ...
    session: list[int] = field(default_factory=list)
    previous: list[int] = field(default_factory=list)  # position in these lists
    think_s: list[float] = field(default_factory=list)
    without_output: int = 0

    def add(
        self,
        arrival_s: float,
        prompt: int,
        output: int,
        runs: list[int],
        *,
        session: int = -1,
        previous: int = -1,
        think_s: float = 0.0,
    ) -> None:
        self.arrival_s.append(arrival_s)
        self.prompt_tokens.append(prompt)
        # an engine that ran the prompt has made a token, so one is the least that can be replayed
        self.without_output += output == 0
        self.output_tokens.append(max(1, output))
        self.runs.append(runs)
        self.session.append(session)
        self.previous.append(previous)
        self.think_s.append(think_s)

    def trace(
        self, name: str, block_size: int, *, arrival_s: Floats | None = None, notes: tuple[str, ...]
    ) -> Trace:
        arrival = np.array(self.arrival_s) if arrival_s is None else arrival_s
        order = np.argsort(arrival, kind="stable")
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        runs = [self.runs[i] for i in order]
        flat = np.array([x for run in runs for x in run], dtype=np.int64).reshape(-1, 2)
        previous = np.array(self.previous, dtype=np.int64)[order]
        if self.without_output:
            notes = (*notes, f"{self.without_output} requests recorded without output replay with one token")
        return Trace(
            name=name,
            block_size=block_size,
            arrival_s=arrival[order] - arrival.min(),
            prompt_tokens=np.array(self.prompt_tokens, dtype=np.int64)[order],
            output_tokens=np.array(self.output_tokens, dtype=np.int64)[order],
            run_start=flat[:, 0].copy(),
            run_length=flat[:, 1].copy(),
            run_offset=np.concatenate([[0], np.cumsum([len(run) // 2 for run in runs])]),
            session=np.array(self.session, dtype=np.int64)[order],
            previous=np.where(previous >= 0, place[previous], -1),
            think_s=np.array(self.think_s)[order],
            notes=notes,
        )


def read_trace(
    path: str | Path,
    *,
    format: str | None = None,
    seed: int = 0,
    spread_ticks: bool = True,
    spread_s: float = 3600.0,
    max_prompt_tokens: int | None = None,
) -> Trace:
    """Read a trace file, plain or gzip.

    ``format``: one of :data:`FORMATS`; None tells it from the first line. ``seed`` places the arrivals that a
    file does not. ``spread_ticks`` (mooncake): requests with one timestamp, a tick of about 3 s, arrive
    uniformly between it and the next. ``spread_s`` (agentic): sessions start uniformly over so many seconds,
    which is a Poisson process given their number; the default is arbitrary, about the length of the other
    traces. ``max_prompt_tokens`` ends a session before its first longer request, and leaves out longer
    requests without session; how many is in the trace's notes.

    A request recorded without output replays with one token, since an engine that ran the prompt made one;
    how many is in the notes. In a closed loop a follow-up waits the recorded think time (agentic), or the
    gap between the two arrivals, because ends are not recorded (bailian); requests that overlapped within an
    agentic session come one after another.

    Raises TraceError (file and line), InvalidArgument (unknown format, ``spread_s`` not finite and at least
    0), FileNotFoundError. O(file).
    """
    if not (math.isfinite(spread_s) and spread_s >= 0):
        raise InvalidArgument(f"spread_s must be finite and at least 0, got {spread_s}")
    file = Path(path)
    if format is not None and format not in FORMATS:
        raise InvalidArgument(f"unknown trace format {format!r}, expected one of {', '.join(FORMATS)}")
    raw = file.read_bytes()
    try:
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise TraceError(f"{file.name}: neither text nor gzip: {error}") from None
    lines = ((n, line) for n, line in enumerate(io.StringIO(text, newline=None), 1) if line.strip())
    first = next(lines, None)
    if first is None:
        raise TraceError(f"{file.name}: the file is empty")
    kind = format or _guess(file.name, *first)
    reader = FORMATS[kind]
    options = _Options(np.random.default_rng(seed), spread_s, spread_ticks)
    trace = reader(file.name, _chain(first, lines), options)
    return trace if max_prompt_tokens is None else _limit(trace, max_prompt_tokens)


def _chain(first: tuple[int, str], rest: Lines) -> Lines:
    yield first
    yield from rest


def _guess(name: str, number: int, line: str) -> str:
    if line.strip().split(",") == _AZURE_HEADER:
        return "azure"
    try:
        fields = json.loads(line)
    except ValueError:
        fields = None
    if isinstance(fields, dict):
        for kind, needed in (("bailian", "chat_id"), ("agentic", "rle"), ("mooncake", "hash_ids")):
            if needed in fields:
                return kind
    raise TraceError(f"{name}:{number}: not a line of any known format ({', '.join(FORMATS)})")


def _objects(name: str, lines: Lines, add: Callable[[dict[str, Any]], None]) -> None:
    """Give each JSON line to ``add``; what is wrong with one becomes a TraceError."""
    for number, line in lines:
        try:
            try:
                fields = json.loads(line)
            except ValueError as error:
                raise _BadLineError(f"not JSON: {error}") from None
            if not isinstance(fields, dict):
                raise _BadLineError(f"a JSON object expected, got {type(fields).__name__}")
            add(fields)
        except _BadLineError as error:
            raise TraceError(f"{name}:{number}: {error}") from None


def _number(fields: dict[str, Any], name: str, kind: type, least: float) -> Any:
    if name not in fields:
        raise _BadLineError(f"field {name!r} is missing")
    value = fields[name]
    wanted = int | float if kind is float else int
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise _BadLineError(f"{name} must be {'a number' if kind is float else 'an integer'}, got {value!r}")
    if not least <= value <= _LIMIT:  # NaN is not either
        raise _BadLineError(f"{name} must lie in {least:g}..2**48-1, got {value!r}")
    return value


def _runs_of_ids(fields: dict[str, Any], prompt: int, block_size: int) -> list[int]:
    ids = fields.get("hash_ids")
    if not isinstance(ids, list):
        raise _BadLineError(f"hash_ids must be a list, got {ids!r}")
    most = -(-prompt // block_size)
    if not prompt // block_size <= len(ids) <= most:
        raise _BadLineError(f"{prompt} tokens have {most} blocks of {block_size}, got {len(ids)} hash_ids")
    runs: list[int] = []
    for block in ids:
        if type(block) is not int or not 0 <= block <= _LIMIT:
            raise _BadLineError(f"hash_ids must be integers in 0..2**48-1, got {block!r}")
        if runs and block == runs[-2] + runs[-1]:
            runs[-1] += 1
        else:
            runs += [block, 1]
    return runs


def _runs_of_rle(fields: dict[str, Any], prompt: int) -> list[int]:
    runs = fields.get("rle")
    if not isinstance(runs, list) or len(runs) % 2:
        raise _BadLineError(f"rle must be a list of start, length pairs, got {runs!r}")
    if any(type(x) is not int or not 0 <= x <= _LIMIT // 2 for x in runs):
        raise _BadLineError(f"rle must hold integers in 0..2**47-1, got {runs!r}")
    blocks, most = sum(runs[1::2]), -(-prompt // 64)
    if not prompt // 64 <= blocks <= most:
        raise _BadLineError(f"{prompt} tokens have {most} blocks of 64, rle has {blocks}")
    return runs


def _read_mooncake(name: str, lines: Lines, options: _Options) -> Trace:
    rows = _Rows()

    def add(fields: dict[str, Any]) -> None:
        arrival = _number(fields, "timestamp", float, 0) / 1000
        if rows.arrival_s and arrival < rows.arrival_s[-1]:
            raise _BadLineError(
                f"timestamp goes back from {rows.arrival_s[-1] * 1000:g} to {arrival * 1000:g}"
            )
        prompt = _number(fields, "input_length", int, 1)
        output = _number(fields, "output_length", int, 0)
        rows.add(arrival, prompt, output, _runs_of_ids(fields, prompt, 512))

    _objects(name, lines, add)
    ticks, tick_of = np.unique(np.array(rows.arrival_s), return_inverse=True)
    if not options.spread_ticks:
        return rows.trace(name, 512, notes=())
    widths = np.diff(ticks, append=ticks[-1] + (ticks[-1] - ticks[-2] if len(ticks) > 1 else 0.0))
    # sorted, so that the order of the file is kept within a tick
    arrival = np.sort(ticks[tick_of] + options.rng.random(len(tick_of)) * widths[tick_of])
    return rows.trace(name, 512, arrival_s=arrival, notes=("arrivals spread within timestamp ticks, seeded",))


def _read_bailian(name: str, lines: Lines, options: _Options) -> Trace:
    rows = _Rows()
    place: dict[int, int] = {}

    def add(fields: dict[str, Any]) -> None:
        chat = _number(fields, "chat_id", int, 0)
        parent = _number(fields, "parent_chat_id", int, -1)
        arrival = _number(fields, "timestamp", float, 0)
        prompt = _number(fields, "input_length", int, 1)
        output = _number(fields, "output_length", int, 0)
        if chat in place:
            raise _BadLineError(f"chat_id {chat} occurs twice")
        # the trace is an excerpt: a parent may lie before it, and then stands for the session
        previous = place.get(parent, -1)
        gap = arrival - rows.arrival_s[previous] if previous >= 0 else 0.0
        if gap < 0:
            raise _BadLineError(f"chat {chat} arrives {-gap:g} s before its parent {parent}")
        place[chat] = len(rows.arrival_s)
        root = parent if parent >= 0 else chat
        session = rows.session[previous] if previous >= 0 else root
        runs = _runs_of_ids(fields, prompt, 16)
        rows.add(arrival, prompt, output, runs, session=session, previous=previous, think_s=gap)

    _objects(name, lines, add)
    return rows.trace(name, 16, notes=("think time: gap between arrivals, since ends are not recorded",))


def _read_agentic(name: str, lines: Lines, options: _Options) -> Trace:
    rows = _Rows()
    start: dict[str, float] = {}
    last: dict[str, int] = {}

    def add(fields: dict[str, Any]) -> None:
        sid = fields.get("sid")
        if not isinstance(sid, str):
            raise _BadLineError(f"sid must be a string, got {sid!r}")
        since = _number(fields, "t", float, 0)
        prompt = _number(fields, "in", int, 1)
        output = _number(fields, "out", int, 0)
        think = float(_number(fields, "think_time", float, 0))
        runs = _runs_of_rle(fields, prompt)
        if sid not in start:
            start[sid] = float(options.rng.uniform(0, options.spread_s))
        previous = last.get(sid, -1)
        arrival = start[sid] + since
        if previous >= 0 and arrival < rows.arrival_s[previous]:
            raise _BadLineError(f"t goes back within session {sid}")
        session = rows.session[previous] if previous >= 0 else len(start) - 1
        last[sid] = len(rows.arrival_s)
        rows.add(arrival, prompt, output, runs, session=session, previous=previous, think_s=think)

    _objects(name, lines, add)
    return rows.trace(name, 64, notes=(f"session starts synthesised over {options.spread_s:g} s, seeded",))


def _read_azure(name: str, lines: Lines, options: _Options) -> Trace:
    rows = _Rows()
    for number, line in lines:
        cells = line.strip().split(",")
        if number == 1 and cells == _AZURE_HEADER:
            continue
        try:
            if len(cells) != 3:
                raise _BadLineError(f"3 cells expected, got {len(cells)}")
            arrival = _azure_time(cells[0])
            prompt = _azure_count(cells[1], "ContextTokens", 1)
            output = _azure_count(cells[2], "GeneratedTokens", 0)
        except _BadLineError as error:
            raise TraceError(f"{name}:{number}: {error}") from None
        rows.add(arrival, prompt, output, [])
    if not rows.arrival_s:
        raise TraceError(f"{name}: the file has no requests")
    return rows.trace(name, 16, notes=("the trace has no prefixes: every prompt is its own",))


def _azure_time(cell: str) -> float:
    """Seconds; the file has seven digits after the point, one more than datetime takes."""
    whole, point, fraction = cell.partition(".")
    try:
        since = datetime.strptime(whole, "%Y-%m-%d %H:%M:%S") - datetime(2023, 1, 1)
    except ValueError:
        since = None
    if since is None or (point and not (fraction.isascii() and fraction.isdigit())):
        raise _BadLineError(f"TIMESTAMP must be a date and time, got {cell!r}")
    return since.total_seconds() + float(f"0.{fraction or 0}")


def _azure_count(cell: str, name: str, least: int) -> int:
    # more than 15 digits are beyond the limit anyway, and int() takes no more than 4,300
    if not (cell.isascii() and cell.isdigit() and len(cell) <= 15 and least <= int(cell) <= _LIMIT):
        raise _BadLineError(f"{name} must be an integer in {least}..2**48-1, got {cell!r}")
    return int(cell)


FORMATS: dict[str, Callable[[str, Lines, _Options], Trace]] = {
    "mooncake": _read_mooncake,
    "bailian": _read_bailian,
    "agentic": _read_agentic,
    "azure": _read_azure,
}
"""Readers by the name of their format."""


def _limit(trace: Trace, max_prompt_tokens: int) -> Trace:
    """Leave out requests with a longer prompt, and what comes after them in their session."""
    too_long = trace.prompt_tokens > max_prompt_tokens
    gone: set[int] = set()
    keep = np.zeros(len(trace), dtype=np.bool_)
    for i, session in enumerate(trace.session.tolist()):
        if too_long[i] and session >= 0:
            gone.add(session)
        keep[i] = not too_long[i] and session not in gone
    left_out = int((~keep).sum())
    return trace.take(keep, note=f"{left_out} requests left out by max_prompt_tokens={max_prompt_tokens}")
