"""Lines of a trace file: decoded, numbered, checked, and gathered to the columns of a trace."""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mulsched.errors import TraceError
from mulsched.replay.trace import Floats, Trace

Lines = Iterator[tuple[int, str]]
"""Numbers and texts of the lines that are not blank."""

LIMIT = 2**48 - 1  # of every number in a file: the largest block id; far beyond any length or time
NO_PREFIXES = "the trace has no prefixes: every prompt is its own"


class BadLineError(Exception):
    """What is wrong with the line at hand; the file and line are added where it is caught."""


@dataclass(slots=True)
class Source:
    """A file being read, and what its reader has to make up.

    ``bad_lines``: None, so that a bad line raises, or the list that takes what is wrong with it instead.
    """

    name: str
    lines: Lines
    bad_lines: list[str] | None
    bad: int = 0  # lines left out of this file
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    spread_s: float = 3600.0
    spread_ticks: bool = True
    hash_block_tokens: int = 512

    @contextmanager
    def at(self, where: str) -> Iterator[None]:
        """Turn what is wrong in the block into a TraceError, or keep it and go on."""
        try:
            yield
        except BadLineError as error:
            message = f"{self.name}:{where}: {error}"
            if self.bad_lines is None:
                raise TraceError(message) from None
            self.bad_lines.append(message)
            self.bad += 1

    def left_out(self) -> tuple[str, ...]:
        """Return the note on lines that were left out, if any were."""
        return (f"{self.bad} bad lines left out",) if self.bad else ()

    def each_object(self, add: Callable[[dict[str, Any]], None]) -> None:
        """Give each line's JSON object to ``add``."""
        for number, line in self.lines:
            with self.at(str(number)):
                add(json_object(line))


@dataclass(slots=True)
class Rows:
    """Requests as they are read, before they are sorted by arrival."""

    arrival_s: list[float] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    output_tokens: list[int] = field(default_factory=list)
    runs: list[Sequence[int]] = field(default_factory=list)  # start, length, start, length, ...
    session: list[int] = field(default_factory=list)
    previous: list[int] = field(default_factory=list)  # position in these lists
    think_s: list[float] = field(default_factory=list)
    without_output: int = 0

    def add(
        self,
        arrival_s: float,
        prompt: int,
        output: int,
        runs: Sequence[int],
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
        """Return the trace of these requests, its first arrival at 0. Raises TraceError without requests."""
        if not self.arrival_s:
            raise TraceError(f"{name}: the file has no requests")
        arrival = np.array(self.arrival_s, dtype=np.float64) if arrival_s is None else arrival_s
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
            think_s=np.array(self.think_s, dtype=np.float64)[order],
            notes=notes,
        )


def read_text(path: Path) -> str:
    """Return the text of a file, plain or gzip. Raises TraceError, OSError."""
    raw = path.read_bytes()
    try:
        return (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise TraceError(f"{path.name}: neither text nor gzip: {error}") from None


def stream(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the numbers and bytes of a file's lines that are not blank, plain or gzip, in O(line) memory.

    Raises TraceError, OSError.
    """
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if packed else path.open("rb") as lines:
            yield from ((n, line) for n, line in enumerate(lines, 1) if line.strip())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TraceError(f"{path.name}: not gzip to its end: {error}") from None


def numbered(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank; a JSON object over several lines is one line."""
    lines = ((n, line) for n, line in enumerate(io.StringIO(text, newline=None), 1) if line.strip())
    first = next(lines, None)
    if first is None:
        return
    if first[1].lstrip().startswith("{") and not is_json(first[1]) and is_json(text):
        yield first[0], text
        return
    yield first
    yield from lines


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def json_object(line: str | bytes) -> dict[str, Any]:
    """Return a line's JSON object. Raises BadLineError."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadLineError(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise BadLineError(f"a JSON object expected, got {type(fields).__name__}")
    return fields


def read_header(
    source: Source, wanted: str, newest: int, check: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Return the first line of a format of the project's own; ``check`` looks at its other fields.

    A bad one raises TraceError always, since nothing after it can be read.
    """
    ((line_number, line),) = islice(source.lines, 1)
    try:
        header = json_object(line)
        if header.get("format") != wanted:
            raise BadLineError(f'a header with "format": "{wanted}" expected, got {header.get("format")!r}')
        version = number(header, "version", int, 1)
        if version > newest:
            raise BadLineError(
                f"version {version} is newer than {newest}, the newest that this mulsched reads"
            )
        if number(header, "block_size", int, 1) > 2**14:
            raise BadLineError(f"block_size must lie in 1..{2**14}, got {header['block_size']}")
        if check is not None:
            check(header)
    except BadLineError as error:
        raise TraceError(f"{source.name}:{line_number}: {error}") from None
    return header


def number(fields: dict[str, Any], name: str, kind: type, least: float) -> Any:
    """Return a field that must be a number of ``kind`` in least..LIMIT. Raises BadLineError."""
    if name not in fields:
        raise BadLineError(f"field {name!r} is missing")
    value = fields[name]
    wanted = int | float if kind is float else int
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise BadLineError(f"{name} must be {'a number' if kind is float else 'an integer'}, got {value!r}")
    if not least <= value <= LIMIT:  # NaN is not either
        raise BadLineError(f"{name} must lie in {_bound(least)}..2**48-1, got {value!r}")
    return value


def _bound(least: float) -> str:
    """Return a lower bound as people write it."""
    return "-(2**48-1)" if least == -LIMIT else f"{least:g}"


def as_runs(ids: Sequence[int]) -> list[int]:
    """Return block ids as start, length, start, length, ..."""
    runs: list[int] = []
    for block in ids:
        if runs and block == runs[-2] + runs[-1]:
            runs[-1] += 1
        else:
            runs += [block, 1]
    return runs
