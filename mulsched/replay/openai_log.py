"""Logs of OpenAI-style requests with their text, to traces without it; see docs/trace-format.md.

A trace needs to know which prompts begin alike, not what they say. Each block of a prompt is hashed together
with the hash of what precedes it, under a secret key, and the hashes are numbered in the order in which they
first arrive. The numbers are all that is left: they, and so the trace, are the same for every key.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mulsched.errors import InvalidArgument, TraceError
from mulsched.replay._lines import BadLineError, Rows, Source, as_runs, json_object, stream
from mulsched.replay._logged import Logged, parse
from mulsched.replay._prompts import Prompt
from mulsched.replay.trace import Ints, Trace
from mulsched.tokenizer import Tokenizer

__all__ = ["read_openai_log"]

ASSUMED_CHARS_PER_TOKEN = 4.0
"""Where no line has a usage: OpenAI's rule of thumb for English."""


@dataclass(slots=True)
class _Blocks:
    """Chained keyed hashes of blocks, numbered; the chance that two of 2**40 blocks hash alike is 2**-49."""

    salt: bytes
    block_size: int
    tokenizer: Tokenizer | None
    chars: int = 1  # of a block, where there is no tokenizer
    numbers: dict[bytes, int] = field(default_factory=dict)

    def digest(self, use: bytes, *parts: bytes) -> bytes:
        hashed = hashlib.blake2b(key=self.salt, person=use, digest_size=16)
        for part in parts:
            hashed.update(part)
        return hashed.digest()

    def stand_in(self, content: str) -> str:
        return f"<{self.digest(b'part', _bytes(content)).hex()}>"

    def units(self, content: str | list[int]) -> tuple[str | list[int], int]:
        """Return what the blocks of a prompt are cut from, and how much of it makes one."""
        if isinstance(content, str) and self.tokenizer is not None:
            content = list(self.tokenizer.encode(content, add_special_tokens=False).ids)
        return content, self.chars if isinstance(content, str) else self.block_size

    def ids(self, namespace: str, units: str | list[int], width: int, most: int) -> Ints:
        """Return the numbers of the first whole blocks, ``most`` at most. O(units)."""
        chained = self.digest(b"root", b"text" if isinstance(units, str) else b"ids ", _bytes(namespace))
        ids = np.empty(min(len(units) // width, most), dtype=np.int64)
        for i in range(len(ids)):
            chained = self.digest(b"block", chained, _bytes(units[i * width : (i + 1) * width]))
            ids[i] = self.numbers.setdefault(chained, len(self.numbers))
        return ids


def _bytes(content: str | list[int]) -> bytes:
    if isinstance(content, str):
        return content.encode("utf-8", "surrogatepass")  # JSON may hold lone surrogates
    return np.array(content, dtype="<u4").tobytes()


@dataclass(frozen=True, slots=True)
class _Request:
    """What is kept of a line: no text."""

    arrival_s: float
    end_s: float | None
    prompt_tokens: int
    output_tokens: int
    ids: Ints
    session: bytes | None = None
    whole: bytes | None = None  # digest of the whole conversation
    answer: bytes | None = None
    turns: tuple[tuple[bytes, bytes], ...] = ()  # digests of it up to an answer in it, and of that answer


@dataclass(slots=True)
class _Reading:
    """The requests read so far, and what there is to say about them."""

    blocks: _Blocks
    chars_per_token: float
    by_field: bool  # sessions
    requests: list[_Request] = field(default_factory=list)
    unanswered: int = 0
    continued: int = 0

    def add(self, logged: Logged | None) -> None:
        if logged is None:
            self.unanswered += 1
            return
        prompt = logged.prompt
        units, width = self.blocks.units(prompt.content)
        prompt_tokens = logged.prompt_tokens or self._tokens(units)
        output_tokens = logged.output_tokens
        if output_tokens is None:
            if logged.answer is None:
                raise BadLineError("neither a usage nor an answer tells the output tokens")
            output_tokens = self._tokens(self.blocks.units(logged.answer)[0])
        # what the server puts in front is not known, so neither is where the blocks begin
        most = 0 if prompt.continued else prompt_tokens // self.blocks.block_size
        ids = self.blocks.ids(prompt.namespace, units, width, most)
        links: dict[str, Any] = {}
        if self.by_field and logged.session is not None:
            links["session"] = self._digest(logged.session)
        elif not self.by_field and prompt.conversation and not prompt.continued:
            links["whole"], links["turns"] = self._turns(prompt)
            links["answer"] = None if logged.answer is None else self._digest(logged.answer)
        self.continued += prompt.continued
        self.requests.append(
            _Request(logged.arrival_s, logged.end_s, prompt_tokens, output_tokens, ids, **links)
        )

    def _tokens(self, units: str | list[int]) -> int:
        return max(1, math.ceil(len(units) / (self.chars_per_token if isinstance(units, str) else 1)))

    def _digest(self, text: str) -> bytes:
        return self.blocks.digest(b"said", _bytes(text))

    def _turns(self, prompt: Prompt) -> tuple[bytes, tuple[tuple[bytes, bytes], ...]]:
        assert isinstance(prompt.content, str)
        hashed = hashlib.blake2b(
            _bytes(prompt.namespace), key=self.blocks.salt, person=b"turn", digest_size=16
        )
        turns, at = [], 0
        for begin, answer in prompt.answers:
            hashed.update(_bytes(prompt.content[at:begin]))
            turns.append((hashed.digest(), self._digest(answer)))
            at = begin
        hashed.update(_bytes(prompt.content[at:]))
        return hashed.digest(), tuple(turns)


def read_openai_log(
    path: str | Path,
    *,
    salt: bytes,
    block_size: int = 16,
    chars_per_token: float | None = None,
    tokenizer: Tokenizer | None = None,
    session_field: str | None = None,
    time_field: str | None = None,
    name: str = "openai log",
    bad_lines: list[str] | None = None,
) -> Trace:
    """Read a log of OpenAI-style requests, JSON Lines, plain or gzip; nothing of their text is in the trace.

    ``salt``: 16 to 64 secret bytes that key the hashes. ``block_size``: tokens per block; the default is
    vLLM's. Blocks are cut from the tokens that ``tokenizer`` finds, else from the text, as many characters
    as ``block_size`` tokens have at ``chars_per_token``; by default that is what the log's own usage says on
    average, or 4 without any. A prompt's length is its usage, else an estimate. ``session_field``: where a
    line names its session (``metadata.session_id``); by default sessions are inferred: a request follows the
    latest whose whole prompt is its own up to an assistant's message. ``time_field``: where a line has
    its arrival, a number of s, ms, us or ns since 1970 or an ISO 8601 text; by default the usual names.
    ``bad_lines``: as for :func:`read_trace`.

    Which shapes of lines are understood, and what the trace still tells, is in docs/trace-format.md. Reads
    the file once, or twice to measure ``chars_per_token``; memory O(blocks).

    Raises TraceError (file and line), InvalidArgument, OSError.
    """
    if not isinstance(salt, bytes) or not 16 <= len(salt) <= 64:
        raise InvalidArgument("salt must be 16 to 64 bytes")  # not quoted: it is secret
    if not 1 <= block_size <= 2**14:
        raise InvalidArgument(f"block_size must lie in 1..{2**14}, got {block_size}")
    if chars_per_token is not None and not (math.isfinite(chars_per_token) and chars_per_token > 0):
        raise InvalidArgument(f"chars_per_token must be finite and above 0, got {chars_per_token}")
    file, source = Path(path), Source(Path(path).name, iter(()), bad_lines)
    blocks = _Blocks(salt, block_size, tokenizer)

    def parsed(line: bytes) -> Logged | None:
        return parse(json_object(line), blocks.stand_in, session_field, time_field)

    origin = "given"
    if chars_per_token is None:
        measured = None if tokenizer is not None else _measure(file, parsed)
        origin = "assumed" if measured is None else "measured"
        chars_per_token = measured or ASSUMED_CHARS_PER_TOKEN
    blocks.chars = max(1, round(block_size * chars_per_token))
    reading = _Reading(blocks, chars_per_token, session_field is not None)
    for line_number, line in stream(file):
        with source.at(str(line_number)):
            reading.add(parsed(line))
    if not reading.requests:
        raise TraceError(f"{file.name}: the file has no requests")
    if session_field is not None and all(request.session is None for request in reading.requests):
        raise TraceError(f"{file.name}: no line has a session at {session_field}")
    cut = f"{blocks.chars} characters ({chars_per_token:.3g} per token, {origin})"
    cut = cut if tokenizer is None else f"{block_size} tokens of the given tokenizer"
    return _trace(reading, name, (*_notes(reading, cut), *source.left_out()))


def _measure(file: Path, parsed: Callable[[bytes], Logged | None]) -> float | None:
    """Return the characters per prompt token of all lines with a usage; the next pass tells of bad lines."""
    unheard = Source(file.name, iter(()), [])
    chars = tokens = 0
    for line_number, line in stream(file):
        with unheard.at(str(line_number)):
            logged = parsed(line)
            if logged is None or logged.prompt_tokens is None or logged.prompt.continued:
                continue
            if isinstance(logged.prompt.content, str):
                chars += len(logged.prompt.content)
                tokens += logged.prompt_tokens
    return chars / tokens if chars else None


def _trace(reading: _Reading, name: str, notes: tuple[str, ...]) -> Trace:
    """Return the trace, its block ids and sessions numbered in the order in which they arrive."""
    requests = sorted(reading.requests, key=lambda request: request.arrival_s)
    previous, session = _by_field(requests) if reading.by_field else _inferred(requests)
    block_size = reading.blocks.block_size
    rows, first_s = Rows(), requests[0].arrival_s
    for request, ids, before, number in zip(requests, _renumbered(requests), previous, session, strict=True):
        think_s = 0.0
        if before >= 0:
            end_s = requests[before].end_s
            think_s = max(0.0, request.arrival_s - (requests[before].arrival_s if end_s is None else end_s))
        lengths = request.prompt_tokens, request.output_tokens
        runs = as_runs(ids.tolist())
        # seconds since 1970 are no finer than a microsecond as floats
        arrival_s, think_s = round(request.arrival_s - first_s, 6), round(think_s, 6)
        rows.add(arrival_s, *lengths, runs, session=number, previous=before, think_s=think_s)
    return rows.trace(name, block_size, notes=notes)


def _notes(reading: _Reading, cut: str) -> Iterator[str]:
    """Yield what was decided; nothing in it comes from the log but counts."""
    yield f"block ids: numbers of chained keyed hashes of blocks of {cut}"
    how = "as logged" if reading.by_field else "inferred from prompts that go on after an answer"
    yield f"sessions {how}"
    ends = sum(request.end_s is not None for request in reading.requests)
    yield f"think time from the {'end' if ends else 'arrival'} of the request before"
    wanted = sum(request.prompt_tokens // reading.blocks.block_size for request in reading.requests)
    missing = wanted - sum(len(request.ids) for request in reading.requests)
    if missing:
        yield f"{missing / wanted:.1%} of the blocks have no text in the log, and so no id"
    if reading.continued:
        yield f"{reading.continued} requests go on with what the server kept: their prompts have no ids"
    if reading.unanswered:
        yield f"{reading.unanswered} requests that failed, were cached, or asked for no tokens left out"


def _renumbered(requests: list[_Request]) -> list[Ints]:
    flat = np.concatenate([request.ids for request in requests])
    unique, first, place = np.unique(flat, return_index=True, return_inverse=True)
    number = np.empty(len(unique), dtype=np.int64)
    number[np.argsort(first)] = np.arange(len(unique))
    return np.split(number[place], np.cumsum([len(request.ids) for request in requests])[:-1])


def _by_field(requests: list[_Request]) -> tuple[list[int], list[int]]:
    """Return what each request follows, the latest of its session, and its session's number."""
    last: dict[bytes, int] = {}
    numbers: dict[bytes, int] = {}
    previous, session = [], []
    for place, request in enumerate(requests):
        previous.append(-1 if request.session is None else last.get(request.session, -1))
        session.append(-1 if request.session is None else numbers.setdefault(request.session, len(numbers)))
        if request.session is not None:
            last[request.session] = place
    return previous, session


def _inferred(requests: list[_Request]) -> tuple[list[int], list[int]]:
    """Return what each request follows, and its session's number.

    A request follows the latest before it whose whole conversation is its own up to one of its answers, the
    last such; among those, one that was given that answer is preferred.
    """
    latest: dict[tuple[bytes, bytes | None], int] = {}
    previous, session = [], []
    sessions = 0
    for place, request in enumerate(requests):
        found = (latest.get((turn, said), latest.get((turn, None))) for turn, said in reversed(request.turns))
        before = next((p for p in found if p is not None), -1)
        previous.append(before)
        if request.whole is None:
            session.append(-1)
            continue
        session.append(session[before] if before >= 0 else sessions)
        sessions += before < 0
        latest[request.whole, None] = place
        if request.answer is not None:
            latest[request.whole, request.answer] = place
    return previous, session
