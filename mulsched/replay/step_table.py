"""Step times interpolated from a table of measured steps."""

import csv
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

from mulsched.errors import ProfileError

__all__ = ["StepTable", "read_step_table"]

_FIELDS = ("kind", "new_tokens", "prefix_tokens", "decode_batch", "decode_ctx", "latency_ms")

Pair = tuple[float, float]
Triple = tuple[float, float, float]
Row = tuple[float, float, float, float]


class _Mixed(NamedTuple):
    """A mixed row over the rule, and the longer of its two kinds alone over the rule."""

    ratio: float
    alone: float


class StepTable:
    """Step time interpolated from prefill, decode and mixed rows.

    Interpolation is linear in the plain quantities: prefill P over (new tokens, prefix), decode D over
    (batch, context). Below a table's edge a step costs what its first row or column says; above, the last
    slope goes on, or 0 if it falls.

    A mixed step is one prefill of all its tokens plus what its decodes read:
    ``ratio * (P(new + batch, prefix) + D(batch, context) - D(batch, 0))``, and never less than either kind
    alone. ``ratio``, linear over (new tokens, batch, context) and constant beyond the edges, is what the
    table's mixed rows show over that rule; without mixed rows it is 1. ``D(batch, 0)`` goes on to context 0
    in the straight line of the first two columns.

    ``mixed_errors`` are the relative errors on the mixed rows, each predicted from the others.
    ``mixed_prompts``: whether a mixed row's prefill is taken as the row says ("rows"), or as
    prompts of ``decode_ctx`` tokens at their mean attended context of half of that ("decode_ctx", what tables
    made with AIConfigurator contain, whose prefix column says 0): what leaves the smaller error.

    Attributes for another language: ``new_grid, prefix_grid, prefill_s`` (row-major: new, prefix),
    ``batch_grid, context_grid, decode_s`` (batch, context), ``decode_floor_s`` (batch),
    ``mixed_new_grid, mixed_batch_grid, mixed_context_grid, mixed_ratio`` (new, batch, context).
    Raises ProfileError for fewer than 2 x 2 prefill or decode points, or a missing one.
    """

    __slots__ = (
        "batch_grid",
        "context_grid",
        "decode_floor_s",
        "decode_s",
        "mixed_batch_grid",
        "mixed_context_grid",
        "mixed_errors",
        "mixed_new_grid",
        "mixed_prompts",
        "mixed_ratio",
        "new_grid",
        "prefill_s",
        "prefix_grid",
    )

    def __init__(
        self, prefill: Mapping[Pair, float], decode: Mapping[Pair, float], mixed: Mapping[Row, float]
    ) -> None:
        self.new_grid, self.prefix_grid, self.prefill_s = _grid(prefill, "prefill")
        self.batch_grid, self.context_grid, self.decode_s = _grid(decode, "decode")
        first, second = self.context_grid[:2]
        width = len(self.context_grid)
        self.decode_floor_s = [
            low - first * (high - low) / (second - first)
            for low, high in zip(self.decode_s[::width], self.decode_s[1::width], strict=True)
        ]
        readings = {prompts: self._read_mixed(mixed, prompts) for prompts in ("rows", "decode_ctx")}
        self.mixed_prompts = min(readings, key=lambda prompts: _median_error(readings[prompts]))
        points = readings[self.mixed_prompts]
        axes = [sorted({point[axis] for point in points}) for axis in range(3)] if points else [[0.0]] * 3
        self.mixed_new_grid, self.mixed_batch_grid, self.mixed_context_grid = axes
        usual = _Mixed(median(p.ratio for p in points.values()) if points else 1.0, 0.0)
        self.mixed_ratio = [points.get((n, b, c), usual).ratio for n, b, c in product(*axes)]
        self.mixed_errors = _left_out_errors(points, axes)

    @property
    def mixed_error(self) -> float:
        """The median of ``mixed_errors``, NaN without mixed rows."""
        return median(self.mixed_errors) if self.mixed_errors else math.nan

    # The twin in another language repeats __call__, _prefill, _decode, _marginal and _ratio, with
    # _place, _between and _clipped.

    def __call__(
        self, new_tokens: int, prefix_tokens: float, decode_batch: int, decode_context: float
    ) -> float:
        """Return the seconds of a step."""
        if new_tokens == 0:
            return self._decode(decode_batch, decode_context)
        if decode_batch == 0:
            return self._prefill(new_tokens, prefix_tokens)
        together = self._prefill(new_tokens + decode_batch, prefix_tokens)
        both = together + self._marginal(decode_batch, decode_context)
        seconds = self._ratio(new_tokens, decode_batch, decode_context) * both
        alone = max(self._prefill(new_tokens, prefix_tokens), self._decode(decode_batch, decode_context))
        return max(seconds, alone)

    def _prefill(self, new: float, prefix: float) -> float:
        return _bilinear(self.new_grid, self.prefix_grid, self.prefill_s, new, prefix)

    def _decode(self, batch: float, context: float) -> float:
        return _bilinear(self.batch_grid, self.context_grid, self.decode_s, batch, context)

    def _marginal(self, batch: float, context: float) -> float:
        """What reading the context adds to a step."""
        i, u = _place(self.batch_grid, batch)
        return self._decode(batch, context) - _between(self.decode_floor_s[i], self.decode_floor_s[i + 1], u)

    def _ratio(self, new: float, batch: float, context: float) -> float:
        news, batches, contexts = self.mixed_new_grid, self.mixed_batch_grid, self.mixed_context_grid
        i0, i1, u = _clipped(news, new)
        j0, j1, v = _clipped(batches, batch)
        k0, k1, w = _clipped(contexts, context)
        ratio, columns, depth = self.mixed_ratio, len(batches), len(contexts)

        def line(i: int, j: int) -> float:
            row = (i * columns + j) * depth
            return ratio[row + k0] + w * (ratio[row + k1] - ratio[row + k0])

        low = line(i0, j0) + v * (line(i0, j1) - line(i0, j0))
        high = line(i1, j0) + v * (line(i1, j1) - line(i1, j0))
        return low + u * (high - low)

    def _read_mixed(self, mixed: Mapping[Row, float], prompts: str) -> dict[Triple, _Mixed]:
        """Return what the mixed rows show over the rule, by (new tokens, batch, context)."""
        points = {}
        for (new, prefix, batch, context), seconds in mixed.items():
            # a token of a prompt of c tokens attends to c / 2 of them on average, be it cut or joined
            before = prefix if prompts == "rows" else (context - new) / 2
            rule = self._prefill_from(new + batch, before) + self._marginal(batch, context)
            alone = max(self._prefill_from(new, before), self._decode(batch, context))
            points[new, batch, context] = _Mixed(seconds / rule, alone / rule)
        return points

    def _prefill_from(self, new: float, prefix: float) -> float:
        """Prefill after ``prefix`` tokens, which is negative where several short prompts are joined."""
        first, second = self.prefix_grid[:2]
        low, high = self._prefill(new, first), self._prefill(new, second)
        if prefix >= first:
            return self._prefill(new, prefix)
        # half is arbitrary: a steep first slope must not turn it negative
        return max(0.5 * low, low - (first - prefix) * (high - low) / (second - first))


def _place(grid: Sequence[float], x: float) -> tuple[int, float]:
    """Return the cell of a grid and where in it x lies: 0 at its lower end or below, 1 at its upper end."""
    i = min(max(bisect_right(grid, x) - 1, 0), len(grid) - 2)
    return i, max(0.0, (x - grid[i]) / (grid[i + 1] - grid[i]))


def _between(low: float, high: float, u: float) -> float:
    """Interpolate; beyond 1 go on in a straight line that does not fall."""
    if u <= 1.0:
        return low + u * (high - low)
    return high + (u - 1.0) * max(0.0, high - low)


def _clipped(grid: Sequence[float], x: float) -> tuple[int, int, float]:
    """Return the points around x and its place between them, the outermost point beyond the edges."""
    if x <= grid[0]:
        return 0, 0, 0.0
    if x >= grid[-1]:
        return len(grid) - 1, len(grid) - 1, 0.0
    i = bisect_right(grid, x) - 1
    return i, i + 1, (x - grid[i]) / (grid[i + 1] - grid[i])


def _bilinear(xs: Sequence[float], ys: Sequence[float], values: Sequence[float], x: float, y: float) -> float:
    i, u = _place(xs, x)
    j, v = _place(ys, y)
    low = i * len(ys) + j
    high = low + len(ys)
    return _between(_between(values[low], values[low + 1], v), _between(values[high], values[high + 1], v), u)


def _grid(cells: Mapping[Pair, float], kind: str) -> tuple[list[float], list[float], list[float]]:
    """Return both axes and the values, row by row."""
    xs, ys = (sorted({cell[axis] for cell in cells}) for axis in (0, 1))
    if len(xs) < 2 or len(ys) < 2:
        raise ProfileError(f"{kind} rows must span at least 2 x 2 points, got {len(xs)} x {len(ys)}")
    values: list[float] = []
    for x in xs:
        row: list[float] = []
        for j, y in enumerate(ys):
            if (x, y) in cells:
                row.append(cells[x, y])
            elif len(row) >= 2:  # tables leave out what no memory holds
                row.append(_between(row[-2], row[-1], (y - ys[j - 2]) / (ys[j - 1] - ys[j - 2])))
            else:
                raise ProfileError(f"{kind} row for {x:g}, {y:g} is missing")
        values += row
    return xs, ys, values


def _moved(point: Triple, axis: int, x: float) -> Triple:
    a, b, c = (x if i == axis else own for i, own in enumerate(point))
    return a, b, c


def _median_error(points: Mapping[Triple, _Mixed]) -> float:
    return median(abs(1 / point.ratio - 1) for point in points.values()) if points else 0.0


def _left_out_errors(points: Mapping[Triple, _Mixed], axes: Sequence[Sequence[float]]) -> list[float]:
    """Return each row's relative error when its ratio comes from its neighbours along the three axes."""
    errors = []
    for point, row in points.items():
        guesses = []
        for axis, grid in enumerate(axes):
            own = point[axis]
            at = grid.index(own)
            near = [
                (1 / abs(x - own), points[other].ratio)
                for x in grid[max(at - 1, 0) : at + 2]
                if x != own and (other := _moved(point, axis, x)) in points
            ]
            if near:  # weighted by the inverse distance, that is on the line between two neighbours
                guesses.append(sum(w * ratio for w, ratio in near) / sum(w for w, _ in near))
        guess = fmean(guesses) if guesses else 1.0
        errors.append(abs(max(guess, row.alone) / row.ratio - 1))
    return errors


def read_step_table(path: str | Path) -> StepTable:
    """Read a table: CSV with kind (prefill, decode, mixed), new_tokens, prefix_tokens, decode_batch,
    decode_ctx, latency_ms.

    Raises ProfileError (file and line), FileNotFoundError.
    """
    file = Path(path)
    prefill: dict[Pair, float] = {}
    decode: dict[Pair, float] = {}
    mixed: dict[Row, float] = {}
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
            if not all(map(math.isfinite, (new, prefix, batch, context))):
                raise ProfileError(f"{where}: finite numbers expected, got {list(row.values())}")
            if not (math.isfinite(latency) and latency > 0):
                raise ProfileError(f"{where}: latency_ms must be finite and above 0, got {row['latency_ms']}")
            seconds = latency / 1000
            match row["kind"]:
                case "prefill":
                    prefill[new, prefix] = seconds
                case "decode":
                    decode[batch, context] = seconds
                case "mixed":
                    mixed[new, prefix, batch, context] = seconds
                case kind:
                    raise ProfileError(f"{where}: kind must be prefill, decode or mixed, got {kind!r}")
    try:
        return StepTable(prefill, decode, mixed)
    except ProfileError as error:
        raise ProfileError(f"{file.name}: {error}") from None
