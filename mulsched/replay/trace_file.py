"""Our own trace file: JSON Lines, a header and then a line per request; see docs/trace-format.md."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

from mulsched.errors import InvalidArgument
from mulsched.replay._lines import LIMIT, BadLineError, Source, json_object, number, read_header
from mulsched.replay.trace import Trace

__all__ = ["FORMAT", "VERSION", "read_mulsched", "write_trace"]

FORMAT = "mulsched-trace"
VERSION = 1
"""The version that is written; every version up to it is read."""

_HEADER = {"format", "version", "block_size", "name", "synthetic", "notes", "requests"}
_REQUEST = {"arrival_s", "prompt_tokens", "output_tokens", "runs", "session", "previous", "think_s"}


def write_trace(trace: Trace, path: str | Path) -> None:
    """Write a trace so that :func:`read_trace` returns an equal one; gzip if the name ends in .gz.

    The bytes depend on nothing but the trace. A file that is there is replaced. O(runs).

    Raises InvalidArgument for what the format cannot hold (a number beyond 2**48-1, more block ids than a
    prompt has blocks), OSError.
    """
    _check(trace)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "name": trace.name,
        "block_size": trace.block_size,
        "synthetic": trace.synthetic,
        "notes": trace.notes,
        "requests": len(trace),
    }
    lines = [json.dumps(header), *(json.dumps(row, separators=(",", ":")) for row in _rows(trace))]
    content = ("\n".join(lines) + "\n").encode()
    # no time and no file name in the gzip header: they would make equal traces differ, and the name may tell
    Path(path).write_bytes(gzip.compress(content, mtime=0) if Path(path).suffix == ".gz" else content)


def _check(trace: Trace) -> None:
    for column in ("arrival_s", "prompt_tokens", "output_tokens", "session", "think_s"):
        values = getattr(trace, column)
        if np.abs(values).max() > LIMIT:
            raise InvalidArgument(f"{trace.name}: {column} goes up to 2**48-1, got {np.abs(values).max()}")
    owner = np.repeat(np.arange(len(trace)), np.diff(trace.run_offset))
    blocks = np.bincount(owner, trace.run_length, len(trace)).astype(np.int64)
    too_many = blocks > -(-trace.prompt_tokens // trace.block_size)
    if too_many.any():
        i = int(too_many.argmax())
        raise InvalidArgument(
            f"{trace.name}: request {i} has {trace.prompt_tokens[i]} tokens and {blocks[i]} blocks of "
            f"{trace.block_size}"
        )


def _rows(trace: Trace) -> Any:
    """Yield a dict per request; what has its default is left out."""
    runs = np.column_stack([trace.run_start, trace.run_length]).tolist()
    offset = trace.run_offset.tolist()
    columns = (trace.arrival_s, trace.prompt_tokens, trace.output_tokens)
    links = (trace.session, trace.previous, trace.think_s)
    rows = zip(*(column.tolist() for column in columns + links), strict=True)
    for i, (arrival_s, prompt, output, session, previous, think_s) in enumerate(rows):
        row: dict[str, Any] = {"arrival_s": arrival_s, "prompt_tokens": prompt, "output_tokens": output}
        if offset[i] < offset[i + 1]:
            row["runs"] = [x for run in runs[offset[i] : offset[i + 1]] for x in run]
        if session >= 0:
            row["session"] = session
        if previous >= 0:
            row["previous"] = previous
        if think_s:
            row["think_s"] = think_s
        yield row


def read_mulsched(source: Source) -> Trace:
    """Read a file of this format. What follows a bad line, when those are left out, follows none."""
    header = read_header(source, FORMAT, VERSION, _check_header)
    rows: list[dict[str, Any]] = []
    place: list[int] = []  # of each request line among the good ones, -1 for a bad one
    for line_number, line in source.lines:
        place.append(-1)
        with source.at(str(line_number)):
            row = _request(json_object(line), header["block_size"], len(place) - 1)
            if rows and row["arrival_s"] < rows[-1]["arrival_s"]:
                raise BadLineError(
                    f"arrival_s goes back from {rows[-1]['arrival_s']!r} to {row['arrival_s']!r}"
                )
            if row["previous"] >= 0:
                row["previous"] = place[row["previous"]]
            place[-1] = len(rows)
            rows.append(row)
    with source.at("1"):
        if "requests" in header and len(place) != header["requests"]:
            raise BadLineError(
                f"the header promises {header['requests']} requests, the file has {len(place)}"
            )

    def column(field: str, dtype: type) -> Any:
        return np.array([row[field] for row in rows], dtype=dtype)

    flat = np.array([x for row in rows for x in row["runs"]], dtype=np.int64).reshape(-1, 2)
    return Trace(
        name=header.get("name", source.name),
        block_size=header["block_size"],
        arrival_s=column("arrival_s", np.float64),
        prompt_tokens=column("prompt_tokens", np.int64),
        output_tokens=column("output_tokens", np.int64),
        run_start=flat[:, 0].copy(),
        run_length=flat[:, 1].copy(),
        run_offset=np.cumsum([0, *(len(row["runs"]) // 2 for row in rows)], dtype=np.int64),
        session=column("session", np.int64),
        previous=column("previous", np.int64),
        think_s=column("think_s", np.float64),
        synthetic=header.get("synthetic", False),
        notes=tuple(header.get("notes", ())),
    )


def _check_header(header: dict[str, Any]) -> None:
    _only(header, _HEADER)
    if "requests" in header:
        number(header, "requests", int, 1)
    notes = header.get("notes", [])
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise BadLineError(f"notes must be a list of strings, got {notes!r}")
    for field, kind in (("name", str), ("synthetic", bool)):
        if not isinstance(header.get(field, kind()), kind):
            raise BadLineError(f"{field} must be a {kind.__name__}, got {header[field]!r}")


def _only(fields: dict[str, Any], known: set[str]) -> None:
    """Refuse unknown fields: a misspelt one would be lost, and one with text would be shared unseen."""
    unknown = sorted(fields.keys() - known)
    if unknown:
        raise BadLineError(f"unknown field {unknown[0]!r}, expected {', '.join(sorted(known))}")


def _request(fields: dict[str, Any], block_size: int, position: int) -> dict[str, Any]:
    """Return the checked fields of a request line, those left out with their defaults."""
    _only(fields, _REQUEST)
    row = {"runs": [], "session": -1, "previous": -1, "think_s": 0.0} | fields
    number(row, "arrival_s", float, -LIMIT)
    prompt = number(row, "prompt_tokens", int, 1)
    number(row, "output_tokens", int, 1)
    number(row, "session", int, -1)
    if number(row, "previous", int, -1) >= position:
        raise BadLineError(f"previous of request {position} must be an earlier one, got {row['previous']}")
    number(row, "think_s", float, 0)
    _check_runs(row["runs"], prompt, block_size)
    return row


def _check_runs(runs: Any, prompt: int, block_size: int) -> None:
    if not isinstance(runs, list) or len(runs) % 2:
        raise BadLineError(f"runs must be a list of start, length pairs, got {runs!r}")
    if any(type(x) is not int or not 0 <= x <= LIMIT for x in runs):
        raise BadLineError(f"runs must hold integers in 0..2**48-1, got {runs!r}")
    if any(start + length > LIMIT + 1 for start, length in zip(runs[::2], runs[1::2], strict=True)):
        raise BadLineError(f"block ids must lie in 0..2**48-1, got runs {runs!r}")
    blocks, most = sum(runs[1::2]), -(-prompt // block_size)
    if blocks > most:
        raise BadLineError(f"{prompt} tokens have {most} blocks of {block_size}, runs have {blocks}")
