"""Profiles: how long an engine's step takes, and how much the engine holds."""

import csv
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mulsched.errors import InvalidArgument, ProfileError

__all__ = ["Profile", "Roofline", "StepTable", "StepTime", "builtin_profile", "load_profile"]

_FIELDS = ("kind", "new_tokens", "prefix_tokens", "decode_batch", "decode_ctx", "latency_ms")


class StepTime(Protocol):
    """The time of one engine step, in seconds."""

    def __call__(
        self, new_tokens: int, prefix_tokens: float, decode_batch: int, decode_context: float
    ) -> float:
        """Return the seconds of a step.

        ``new_tokens`` are prefilled after ``prefix_tokens`` of context (their mean, weighted by tokens), and
        ``decode_batch`` requests make a token each with a mean context of ``decode_context`` tokens.
        """


@dataclass(frozen=True, slots=True)
class Profile:
    """An engine: its step time and its limits.

    ``max_batched_tokens``: tokens per step, 4,096 as in the LMetric paper's set-up. ``max_num_seqs``:
    requests running at a time, 256, vLLM's default. ``kv_blocks``: blocks of ``block_size`` tokens in the KV
    cache; 26,000 is what 0.9 of 80 GB leaves beside an 8B model in bf16 at 131,072 bytes a token.
    ``watermark_ratio`` of the blocks stays free when a request is admitted beside others, 0 as in vLLM.
    Raises InvalidArgument for a limit below 1, a watermark not in [0, 1), and a token budget that does not
    cover a token for each of ``max_num_seqs`` requests, which vLLM refuses too.
    """

    name: str
    step_time: StepTime
    block_size: int = 16
    max_batched_tokens: int = 4096
    max_num_seqs: int = 256
    kv_blocks: int = 26_000
    watermark_ratio: float = 0.0

    def __post_init__(self) -> None:
        for limit in ("block_size", "max_batched_tokens", "max_num_seqs", "kv_blocks"):
            if getattr(self, limit) < 1:
                raise InvalidArgument(f"{limit} must be at least 1, got {getattr(self, limit)}")
        if self.max_batched_tokens < self.max_num_seqs:
            raise InvalidArgument(
                f"max_batched_tokens must be at least max_num_seqs, got {self.max_batched_tokens} and "
                f"{self.max_num_seqs}"
            )
        if not 0 <= self.watermark_ratio < 1:
            raise InvalidArgument(f"watermark_ratio must lie in [0, 1), got {self.watermark_ratio}")

    def limits(self, kv_blocks: int) -> tuple[int, int, int, int, int]:
        """Return block size, ``kv_blocks``, token budget, sequences and watermark in blocks."""
        watermark = int(self.watermark_ratio * kv_blocks)
        return self.block_size, kv_blocks, self.max_batched_tokens, self.max_num_seqs, watermark


@dataclass(frozen=True, slots=True)
class Roofline:
    """Step time from first principles, for a dense decoder in bf16.

    ``seconds = overhead + max(weight_bytes / bandwidth, 2 * parameters * tokens / compute)
    + decode_batch * decode_context * kv_bytes / bandwidth
    + attention_flops * new_tokens * (prefix_tokens + new_tokens / 2) / compute``

    ``tokens`` counts prefilled and decoded ones. ``attention_flops`` = 4 * layers * hidden size. Defaults:
    an 8B model (32 layers, hidden size 4,096, 8 KV heads of 128) on one H100 SXM, 989 TFLOP/s and 3.35 TB/s
    by its data sheet, of which 70 % and 75 % are reached and 1 ms a step is overhead (assumed).
    """

    parameters: float = 8e9
    kv_bytes: float = 131_072
    attention_flops: float = 4 * 32 * 4096
    compute: float = 0.70 * 989e12
    bandwidth: float = 0.75 * 3.35e12
    overhead_s: float = 0.001

    def __call__(
        self, new_tokens: int, prefix_tokens: float, decode_batch: int, decode_context: float
    ) -> float:
        """Return the seconds of a step."""
        tokens = new_tokens + decode_batch
        dense = max(
            2 * self.parameters / self.bandwidth,  # bf16: two bytes a parameter
            2 * self.parameters * tokens / self.compute,
        )
        decode = decode_batch * decode_context * self.kv_bytes / self.bandwidth
        prefill = self.attention_flops * new_tokens * (prefix_tokens + new_tokens / 2) / self.compute
        return self.overhead_s + dense + decode + prefill


def builtin_profile() -> Profile:
    """Return the profile that replay uses when it is given none: :class:`Roofline` with its defaults."""
    return Profile("builtin-8b", Roofline())


class _Grid:
    """Bilinear interpolation on a full grid, extrapolated linearly beyond its upper edges."""

    __slots__ = ("_values", "_x", "_y")

    def __init__(self, x: Sequence[float], y: Sequence[float], values: Sequence[Sequence[float]]) -> None:
        self._x, self._y, self._values = list(x), list(y), [list(row) for row in values]

    def __call__(self, x: float, y: float) -> float:
        xs, ys = self._x, self._y
        i = min(max(bisect_right(xs, x) - 1, 0), len(xs) - 2)
        j = min(max(bisect_right(ys, y) - 1, 0), len(ys) - 2)
        u = max(0.0, (x - xs[i]) / (xs[i + 1] - xs[i]))
        v = max(0.0, (y - ys[j]) / (ys[j + 1] - ys[j]))
        low, high = self._values[i], self._values[i + 1]
        at_low = low[j] + v * (low[j + 1] - low[j])
        at_high = high[j] + v * (high[j + 1] - high[j])
        return at_low + u * (at_high - at_low)


class StepTable:
    """Step time interpolated from a table of measured steps.

    Prefill over (new tokens, prefix tokens), decode over (batch, context), each bilinear in the plain
    quantities. A mixed step takes the sum of both less the shortest decode step, since the weights are read
    once; :attr:`mixed_error` is the median relative error of that rule on the table's own mixed rows.
    """

    __slots__ = ("_decode", "_prefill", "_shared_s", "mixed_error")

    def __init__(
        self,
        prefill: dict[tuple[float, float], float],
        decode: dict[tuple[float, float], float],
        mixed: dict[tuple[float, float, float, float], float],
    ) -> None:
        self._prefill = _grid(prefill, "prefill")
        self._decode = _grid(decode, "decode")
        self._shared_s = min(decode.values())
        errors = sorted(
            abs(self(int(n), p, int(b), c) / seconds - 1) for (n, p, b, c), seconds in mixed.items()
        )
        self.mixed_error = errors[len(errors) // 2] if errors else math.nan

    def __call__(
        self, new_tokens: int, prefix_tokens: float, decode_batch: int, decode_context: float
    ) -> float:
        """Return the seconds of a step."""
        if new_tokens == 0:
            return self._decode(decode_batch, decode_context)
        prefill = self._prefill(new_tokens, prefix_tokens)
        if decode_batch == 0:
            return prefill
        return prefill + self._decode(decode_batch, decode_context) - self._shared_s


def _grid(cells: dict[tuple[float, float], float], kind: str) -> _Grid:
    xs, ys = (sorted({cell[axis] for cell in cells}) for axis in (0, 1))
    if len(xs) < 2 or len(ys) < 2:
        raise ProfileError(f"{kind} rows must span at least 2 x 2 points, got {len(xs)} x {len(ys)}")
    rows = []
    for x in xs:
        row: list[float] = []
        for j, y in enumerate(ys):
            if (x, y) in cells:
                row.append(cells[x, y])
            elif len(row) >= 2:  # tables leave out what no memory holds: go on in a straight line
                slope = (row[-1] - row[-2]) / (ys[j - 1] - ys[j - 2])
                row.append(row[-1] + slope * (y - ys[j - 1]))
            else:
                raise ProfileError(f"{kind} row for {x:g}, {y:g} is missing")
        rows.append(row)
    return _Grid(xs, ys, rows)


def load_profile(path: str | Path, *, kv_blocks: int = 26_000) -> Profile:
    """Read a step table: CSV with kind (prefill, decode, mixed), new_tokens, prefix_tokens, decode_batch,
    decode_ctx, latency_ms.

    Raises ProfileError (file and line), FileNotFoundError.
    """
    file = Path(path)
    cells: dict[str, dict[tuple[float, ...], float]] = {"prefill": {}, "decode": {}, "mixed": {}}
    with file.open(newline="") as lines:
        reader = csv.DictReader(lines)
        if reader.fieldnames is None or not set(_FIELDS) <= set(reader.fieldnames):
            raise ProfileError(
                f"{file.name}:1: columns {', '.join(_FIELDS)} expected, got {reader.fieldnames}"
            )
        for row in reader:
            where = f"{file.name}:{reader.line_num}"
            try:
                new, prefix, batch, context, latency = (float(row[name]) for name in _FIELDS[1:])
            except (TypeError, ValueError):
                raise ProfileError(f"{where}: numbers expected, got {list(row.values())}") from None
            if not (math.isfinite(latency) and latency > 0):
                raise ProfileError(f"{where}: latency_ms must be finite and above 0, got {row['latency_ms']}")
            if row["kind"] not in cells:
                raise ProfileError(f"{where}: kind must be prefill, decode or mixed, got {row['kind']!r}")
            key = {"prefill": (new, prefix), "decode": (batch, context)}.get(
                row["kind"], (new, prefix, batch, context)
            )
            cells[row["kind"]][key] = latency / 1000
    try:
        table = StepTable(cells["prefill"], cells["decode"], cells["mixed"])  # type: ignore[arg-type]
    except ProfileError as error:
        raise ProfileError(f"{file.name}: {error}") from None
    return Profile(file.stem, table, kv_blocks=kv_blocks)
