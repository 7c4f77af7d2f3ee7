"""Readers of trace files. A bad line raises TraceError that names file and line.

===============  ============================================================================  ===========
format           a line                                                                        block
===============  ============================================================================  ===========
mulsched         our own, see docs/trace-format.md                                             any
router_log       a live router's, see docs/record-format.md                                    any
mooncake         JSON: timestamp (ms), input_length, output_length, hash_ids                   512 tokens
bailian          JSON: chat_id, parent_chat_id, timestamp (s), input_length, output_length,    16 tokens
                 hash_ids
agentic          JSON: sid, t (s from the session's start), in, out, think_time, rle           64 tokens
azure            CSV: TIMESTAMP, ContextTokens, GeneratedTokens                                no prefixes
vllm_bench       JSON: a result of vllm bench serve, see benchmark_results.py for this and     no prefixes
                 the next three
vllm_timestamps  JSON: input_toks, output_toks, arrival_time (s)                               no prefixes
guidellm         JSON: a report of GuideLLM                                                    no prefixes
aiperf           JSON: a record of aiperf's profile export                                     no prefixes
===============  ============================================================================  ===========

Sources: mooncake FAST'25 traces (kvcache-ai/Mooncake), the format that aiperf and GuideLLM take too; Bailian
(alibaba-edu/qwen-bailian-usagetraces-anon); agentic coding sessions (callanjfox/kv-cache-tester); Azure LLM
inference traces 2023.
"""

import dataclasses
import math
from collections.abc import Callable
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from mulsched.errors import InvalidArgument, TraceError
from mulsched.replay._lines import (
    LIMIT,
    NO_PREFIXES,
    BadLineError,
    Rows,
    Source,
    as_runs,
    json_object,
    number,
    numbered,
    read_text,
)
from mulsched.replay.benchmark_results import (
    read_aiperf,
    read_guidellm,
    read_vllm_bench,
    read_vllm_timestamps,
)
from mulsched.replay.router_log import FORMAT as ROUTER_LOG
from mulsched.replay.router_log import read_router_log
from mulsched.replay.trace import Trace
from mulsched.replay.trace_file import FORMAT, read_mulsched

__all__ = ["FORMATS", "read_trace"]

_AZURE_HEADER = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]


def read_trace(
    path: str | Path,
    *,
    format: str | None = None,
    seed: int = 0,
    spread_ticks: bool = True,
    spread_s: float = 3600.0,
    hash_block_tokens: int = 512,
    max_prompt_tokens: int | None = None,
    bad_lines: list[str] | None = None,
) -> Trace:
    """Read a trace file, plain or gzip.

    ``format``: one of :data:`FORMATS`; None tells it from the first line. ``seed`` places the arrivals that a
    file does not. ``spread_ticks`` (mooncake): requests with one timestamp, a tick of about 3 s, arrive
    uniformly between it and the next. ``spread_s`` (agentic): sessions start uniformly over so many seconds,
    which is a Poisson process given their number; the default is arbitrary, about the length of the other
    traces. ``hash_block_tokens`` (mooncake): tokens per hash id; the default is that of the published traces.
    ``max_prompt_tokens`` ends a session before its first longer request, and leaves out longer requests
    without session; how many is in the trace's notes. ``bad_lines``: None, so that the first bad line raises,
    or a list, to which what is wrong with each is appended (file, line), and the line is left out; how many
    is in the notes.

    A request recorded without output replays with one token, since an engine that ran the prompt made one;
    how many is in the notes. In a closed loop a follow-up waits the recorded think time (mulsched, agentic,
    aiperf), or the gap between the two arrivals, because ends are not recorded (bailian); requests that
    overlapped within an agentic session come one after another.

    Raises TraceError (file and line), InvalidArgument (unknown format, ``spread_s`` not finite and at least
    0, ``hash_block_tokens`` not in 1..2**14), FileNotFoundError. O(file).
    """
    if not (math.isfinite(spread_s) and spread_s >= 0):
        raise InvalidArgument(f"spread_s must be finite and at least 0, got {spread_s}")
    if not 1 <= hash_block_tokens <= 2**14:
        raise InvalidArgument(f"hash_block_tokens must lie in 1..{2**14}, got {hash_block_tokens}")
    file = Path(path)
    if format is not None and format not in FORMATS:
        raise InvalidArgument(f"unknown trace format {format!r}, expected one of {', '.join(FORMATS)}")
    lines = numbered(read_text(file))
    first = next(lines, None)
    if first is None:
        raise TraceError(f"{file.name}: the file is empty")
    reader = FORMATS[format or _guess(file.name, *first)]
    source = Source(
        name=file.name,
        lines=chain([first], lines),
        bad_lines=bad_lines,
        rng=np.random.default_rng(seed),
        spread_s=spread_s,
        spread_ticks=spread_ticks,
        hash_block_tokens=hash_block_tokens,
    )
    trace = reader(source)
    trace = dataclasses.replace(trace, notes=trace.notes + source.left_out())
    return trace if max_prompt_tokens is None else _limit(trace, max_prompt_tokens)


_SIGNS = {  # fields of a first line that tell its format; the first that has one of its own decides
    "bailian": ("chat_id",),
    "agentic": ("rle",),
    "mooncake": ("hash_ids", "input_length"),
    "vllm_timestamps": ("input_toks",),
    "vllm_bench": ("input_lens", "request_throughput"),
    "guidellm": ("benchmarks",),
}


def _guess(name: str, number: int, line: str) -> str:
    if line.strip().split(",") == _AZURE_HEADER:
        return "azure"
    try:
        fields = json_object(line)
    except BadLineError:
        fields = {}
    if fields.get("format") == FORMAT:
        return "mulsched"
    if fields.get("format") == ROUTER_LOG:
        return "router_log"
    for kind, signs in _SIGNS.items():
        if any(sign in fields for sign in signs):
            return kind
    if isinstance(fields.get("metadata"), dict) and "request_start_ns" in fields["metadata"]:
        return "aiperf"
    hint = (
        "; a log of requests with text is converted by mulsched trace convert --from openai" if fields else ""
    )
    raise TraceError(f"{name}:{number}: not a line of any known format ({', '.join(FORMATS)}){hint}")


def _runs_of_ids(fields: dict[str, Any], prompt: int, block_size: int) -> list[int]:
    ids = fields.get("hash_ids")
    if not isinstance(ids, list):
        raise BadLineError(f"hash_ids must be a list, got {ids!r}")
    most = -(-prompt // block_size)
    if not prompt // block_size <= len(ids) <= most:
        raise BadLineError(f"{prompt} tokens have {most} blocks of {block_size}, got {len(ids)} hash_ids")
    for block in ids:
        if type(block) is not int or not 0 <= block <= LIMIT:
            raise BadLineError(f"hash_ids must be integers in 0..2**48-1, got {block!r}")
    return as_runs(ids)


def _runs_of_rle(fields: dict[str, Any], prompt: int) -> list[int]:
    runs = fields.get("rle")
    if not isinstance(runs, list) or len(runs) % 2:
        raise BadLineError(f"rle must be a list of start, length pairs, got {runs!r}")
    if any(type(x) is not int or not 0 <= x <= LIMIT // 2 for x in runs):
        raise BadLineError(f"rle must hold integers in 0..2**47-1, got {runs!r}")
    blocks, most = sum(runs[1::2]), -(-prompt // 64)
    if not prompt // 64 <= blocks <= most:
        raise BadLineError(f"{prompt} tokens have {most} blocks of 64, rle has {blocks}")
    return runs


def _read_mooncake(source: Source) -> Trace:
    rows = Rows()
    block_size = source.hash_block_tokens
    without_ids = 0

    def add(fields: dict[str, Any]) -> None:
        nonlocal without_ids
        if "session_id" in fields:
            raise BadLineError(
                "session_id: the input_length of an aiperf session's row leaves out what came before"
            )
        arrival = number(fields, "timestamp", float, 0) / 1000
        if rows.arrival_s and arrival < rows.arrival_s[-1]:
            raise BadLineError(
                f"timestamp goes back from {rows.arrival_s[-1] * 1000:g} to {arrival * 1000:g}"
            )
        prompt = number(fields, "input_length", int, 1)
        output = number(fields, "output_length", int, 0)
        rows.add(
            arrival,
            prompt,
            output,
            _runs_of_ids(fields, prompt, block_size) if "hash_ids" in fields else [],
        )
        without_ids += "hash_ids" not in fields

    source.each_object(add)
    notes = (f"{without_ids} requests without hash_ids: their prompts are their own",) if without_ids else ()
    if not source.spread_ticks or not rows.arrival_s:
        return rows.trace(source.name, block_size, notes=notes)
    ticks, tick_of = np.unique(np.array(rows.arrival_s), return_inverse=True)
    widths = np.diff(ticks, append=ticks[-1] + (ticks[-1] - ticks[-2] if len(ticks) > 1 else 0.0))
    # sorted, so that the order of the file is kept within a tick
    arrival = np.sort(ticks[tick_of] + source.rng.random(len(tick_of)) * widths[tick_of])
    notes = ("arrivals spread within timestamp ticks, seeded", *notes)
    return rows.trace(source.name, block_size, arrival_s=arrival, notes=notes)


def _read_bailian(source: Source) -> Trace:
    rows = Rows()
    place: dict[int, int] = {}

    def add(fields: dict[str, Any]) -> None:
        chat = number(fields, "chat_id", int, 0)
        parent = number(fields, "parent_chat_id", int, -1)
        arrival = number(fields, "timestamp", float, 0)
        prompt = number(fields, "input_length", int, 1)
        output = number(fields, "output_length", int, 0)
        if chat in place:
            raise BadLineError(f"chat_id {chat} occurs twice")
        # the trace is an excerpt: a parent may lie before it, and then stands for the session
        previous = place.get(parent, -1)
        gap = arrival - rows.arrival_s[previous] if previous >= 0 else 0.0
        if gap < 0:
            raise BadLineError(f"chat {chat} arrives {-gap:g} s before its parent {parent}")
        runs = _runs_of_ids(fields, prompt, 16)
        place[chat] = len(rows.arrival_s)
        root = parent if parent >= 0 else chat
        session = rows.session[previous] if previous >= 0 else root
        rows.add(arrival, prompt, output, runs, session=session, previous=previous, think_s=gap)

    source.each_object(add)
    return rows.trace(
        source.name, 16, notes=("think time: gap between arrivals, since ends are not recorded",)
    )


def _read_agentic(source: Source) -> Trace:
    rows = Rows()
    start: dict[str, float] = {}
    last: dict[str, int] = {}

    def add(fields: dict[str, Any]) -> None:
        sid = fields.get("sid")
        if not isinstance(sid, str):
            raise BadLineError(f"sid must be a string, got {sid!r}")
        since = number(fields, "t", float, 0)
        prompt = number(fields, "in", int, 1)
        output = number(fields, "out", int, 0)
        think = float(number(fields, "think_time", float, 0))
        runs = _runs_of_rle(fields, prompt)
        if sid not in start:
            start[sid] = float(source.rng.uniform(0, source.spread_s))
        previous = last.get(sid, -1)
        arrival = start[sid] + since
        if previous >= 0 and arrival < rows.arrival_s[previous]:
            raise BadLineError(f"t goes back within session {sid}")
        session = rows.session[previous] if previous >= 0 else len(start) - 1
        last[sid] = len(rows.arrival_s)
        rows.add(arrival, prompt, output, runs, session=session, previous=previous, think_s=think)

    source.each_object(add)
    return rows.trace(
        source.name, 64, notes=(f"session starts synthesised over {source.spread_s:g} s, seeded",)
    )


def _read_azure(source: Source) -> Trace:
    rows = Rows()
    for line_number, line in source.lines:
        cells = line.strip().split(",")
        if line_number == 1 and cells == _AZURE_HEADER:
            continue
        with source.at(str(line_number)):
            if len(cells) != 3:
                raise BadLineError(f"3 cells expected, got {len(cells)}")
            arrival = _azure_time(cells[0])
            prompt = _azure_count(cells[1], "ContextTokens", 1)
            rows.add(arrival, prompt, _azure_count(cells[2], "GeneratedTokens", 0), [])
    return rows.trace(source.name, 16, notes=(NO_PREFIXES,))


def _azure_time(cell: str) -> float:
    """Seconds; the file has seven digits after the point, one more than datetime takes."""
    whole, point, fraction = cell.partition(".")
    try:
        since = datetime.strptime(whole, "%Y-%m-%d %H:%M:%S") - datetime(2023, 1, 1)
    except ValueError:
        since = None
    if since is None or (point and not (fraction.isascii() and fraction.isdigit())):
        raise BadLineError(f"TIMESTAMP must be a date and time, got {cell!r}")
    return since.total_seconds() + float(f"0.{fraction or 0}")


def _azure_count(cell: str, name: str, least: int) -> int:
    # more than 15 digits are beyond the limit anyway, and int() takes no more than 4,300
    if not (cell.isascii() and cell.isdigit() and len(cell) <= 15 and least <= int(cell) <= LIMIT):
        raise BadLineError(f"{name} must be an integer in {least}..2**48-1, got {cell!r}")
    return int(cell)


FORMATS: dict[str, Callable[[Source], Trace]] = {
    "mooncake": _read_mooncake,
    "bailian": _read_bailian,
    "agentic": _read_agentic,
    "azure": _read_azure,
    "mulsched": read_mulsched,
    "router_log": read_router_log,
    "vllm_bench": read_vllm_bench,
    "vllm_timestamps": read_vllm_timestamps,
    "guidellm": read_guidellm,
    "aiperf": read_aiperf,
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
