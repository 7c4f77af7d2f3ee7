"""The log of a live router, as ``mulsched.record`` writes it, read as a trace; see docs/record-format.md."""

import binascii
from base64 import b64decode
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mulsched.record import FORMAT, VERSION
from mulsched.replay._lines import (
    LIMIT,
    BadLineError,
    Rows,
    Source,
    as_runs,
    is_json,
    json_object,
    number,
    read_header,
)
from mulsched.replay.trace import Trace

__all__ = ["FORMAT", "read_router_log"]


@dataclass(slots=True)
class _Log:
    """What was read so far, in the router's unit; requests in the order of the file."""

    block_size: int
    arrival_s: list[float] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    output_tokens: list[int] = field(default_factory=list)  # 0 until the end is read
    answered: list[bool] = field(default_factory=list)  # whether the first token came
    wanted: list[bool] = field(default_factory=list)  # False once cancelled without one
    runs: list[list[int]] = field(default_factory=list)  # start, length, start, length, ...
    row_of: dict[int, int] = field(default_factory=dict)  # by the number of the decision
    request_of: dict[str | int, int] = field(default_factory=dict)  # the latest of each id
    # ids by the id of the block before (-1 for none) and the key, in the order of appearance
    block_of: dict[tuple[int, int], int] = field(default_factory=dict)
    strays: int = 0  # first tokens and ends of requests that were dispatched before the log

    def add(self, fields: dict[str, Any]) -> None:
        event, now = fields.get("event"), number(fields, "t", float, -LIMIT)
        name = fields.get("id")
        if not isinstance(name, str | int) or isinstance(name, bool):
            raise BadLineError(f"id must be a string or an integer, got {name!r}")
        if event == "dispatched":
            self.dispatch(fields, now, name)
        elif event not in ("first_token", "finished", "cancelled"):
            raise BadLineError(f"event must be dispatched, first_token, finished or cancelled, got {event!r}")
        elif name not in self.request_of:
            self.strays += 1
        elif event == "first_token":
            self.answered[self.request_of[name]] = True
        else:
            request = self.request_of[name]
            output = number(fields, "output_tokens", int, 0) if "output_tokens" in fields else 0
            self.output_tokens[request] = output
            self.wanted[request] = event == "finished" or self.answered[request]

    def dispatch(self, fields: dict[str, Any], now: float, name: str | int) -> None:
        prompt = number(fields, "prompt_tokens", int, 1)
        decision = number(fields, "decision", int, 0)
        runs, keys = self.shared(fields), _keys(fields)
        blocks = sum(runs[1::2]) + len(keys)
        if blocks != prompt // self.block_size:
            raise BadLineError(
                f"{prompt} tokens have {prompt // self.block_size} whole blocks of {self.block_size}, "
                f"got {blocks}"
            )
        new = self.ids(keys, runs[-2] + runs[-1] - 1 if runs else -1)
        self.row_of[decision] = len(self.arrival_s)
        self.request_of[name] = len(self.arrival_s)
        self.arrival_s.append(now)
        self.prompt_tokens.append(prompt)
        self.output_tokens.append(0)
        self.answered.append(False)
        self.wanted.append(True)
        self.runs.append(runs + as_runs(new))

    def ids(self, keys: list[int], before: int) -> list[int]:
        """Return the ids of blocks that follow the block ``before``: an id stands for all before it too."""
        ids = []
        for key in keys:
            before = self.block_of.setdefault((before, key), len(self.block_of))
            ids.append(before)
        return ids

    def shared(self, fields: dict[str, Any]) -> list[int]:
        if "shared" not in fields:
            return []
        shared = fields["shared"]
        if not isinstance(shared, list) or len(shared) != 2 or any(type(x) is not int for x in shared):
            raise BadLineError(f"shared must be a decision and its leading blocks, got {shared!r}")
        decision, blocks = shared
        if decision not in self.row_of:
            raise BadLineError(f"shares blocks with decision {decision}, which was not read")
        runs = self.runs[self.row_of[decision]]
        if not 0 <= blocks <= sum(runs[1::2]):
            raise BadLineError(
                f"shares {blocks} blocks with decision {decision}, which has {sum(runs[1::2])}"
            )
        return _leading(runs, blocks)


def _leading(runs: list[int], blocks: int) -> list[int]:
    """Return the runs of the first blocks."""
    leading: list[int] = []
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        if blocks:
            leading += [start, min(length, blocks)]
            blocks -= leading[-1]
    return leading


def _keys(fields: dict[str, Any]) -> list[int]:
    text = fields.get("keys", "")
    try:
        return np.frombuffer(b64decode(text, validate=True), dtype="<u8").tolist()  # type: ignore[no-any-return]
    except (TypeError, ValueError, binascii.Error):
        raise BadLineError(f"keys must be 64-bit numbers in base64, got {str(text)[:40]!r}") from None


def _check_units(header: dict[str, Any]) -> None:
    if "units_per_token" in header and header["block_size"] % number(header, "units_per_token", int, 1):
        raise BadLineError(
            f"block_size must be a multiple of units_per_token, got {header['block_size']} and "
            f"{header['units_per_token']}"
        )


def read_router_log(source: Source) -> Trace:
    """Read a log. A last line that a crash tore is left out, and the notes say so.

    Lengths become tokens by the header's ``units_per_token``, rounded down: so a prompt keeps its blocks.
    """
    header = read_header(source, FORMAT, VERSION, _check_units)
    units = header.get("units_per_token", 1)
    log = _Log(header["block_size"])
    torn = False
    for line_number, line in source.lines:
        if not line.endswith("\n") and not is_json(line):
            torn = True
            continue
        with source.at(str(line_number)):
            log.add(json_object(line))
    rows = Rows()
    for now, prompt, output, runs, wanted in zip(
        log.arrival_s, log.prompt_tokens, log.output_tokens, log.runs, log.wanted, strict=True
    ):
        if wanted:
            rows.add(now, max(1, prompt // units), output, runs)
    notes = [] if "units_per_token" in header else ["the log does not say its unit: read as tokens"]
    notes += [f"prompts are text, {units} characters taken for a token"] if units > 1 else []
    notes += ["the last line is torn, as by a crash, and left out"] if torn else []
    if unwanted := log.wanted.count(False):
        notes.append(f"{unwanted} requests that were cancelled before their first token left out")
    if log.strays:
        notes.append(f"{log.strays} signals of requests that the log does not have left out")
    return rows.trace(source.name, log.block_size // units, notes=tuple(notes))
