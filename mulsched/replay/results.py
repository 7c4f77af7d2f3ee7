"""Results of an experiment in memory and on disk: ``results.json`` and ``requests.parquet``."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mulsched.errors import MissingExtra, ResultsError
from mulsched.replay.simulator import ReplayResult

__all__ = ["REQUEST_COLUMNS", "RequestReader", "RequestWriter", "Results", "Role", "Row", "Run", "check_new"]

FORMAT = "mulsched-results"
VERSION = 1
RESULTS, REQUESTS = "results.json", "requests.parquet"

_NEEDED = (
    *("command", "mulsched", "notes", "trace", "synthetic", "profile", "instances", "kv_blocks"),
    *("loop", "cache_source", "seed", "repeat", "sweep", "tune", "objective", "slo"),
)  # settings that reports show

Role = Literal["result", "sweep", "trial", "noise"]
"""What a row is for: asked for by name or tuned; a point of a sweep; a trial of tuning; the noise floor."""

REQUEST_COLUMNS = {
    "arrival_s": np.float64,
    "first_token_s": np.float64,
    "finish_s": np.float64,
    "instance": np.int32,
    "decode_instance": np.int32,
    "prompt_tokens": np.int32,
    "output_tokens": np.int32,
    "cached_tokens": np.int32,
    "hit_tokens": np.int32,
}
"""Columns of a request as in ReplayResult; ``run`` and ``request`` (its index in the trace) come before."""


@dataclass(frozen=True, slots=True)
class Run:
    """One replay: ``number`` is its place in the experiment, ``figures`` those of ``ReplayResult.summary``.

    ``rate_scale``: how many times the trace's own rate; ``offered_per_s``: requests a second that come to.
    """

    number: int
    label: str
    policy: str
    parameters: Mapping[str, Any]
    rate_scale: float
    offered_per_s: float
    requests: int
    seed: int
    ties: str
    figures: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: the mean of its runs, which differ in seed and ties only.

    ``series`` is the label without what was swept or tuned: a line in a plot. ``half_widths``: of the 95 %
    confidence intervals of the figures; empty for a single run.
    """

    label: str
    series: str
    policy: str
    parameters: Mapping[str, Any]
    role: Role
    tuned: bool
    rate_scale: float
    offered_per_s: float
    runs: Sequence[int]
    figures: Mapping[str, float]
    half_widths: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Results:
    """All of an experiment but its requests.

    ``settings``: under which everything ran, JSON values by name. The first row of role ``result`` is the
    reference of noise floors.
    """

    settings: Mapping[str, Any]
    rows: Sequence[Row]
    runs: Sequence[Run]

    @property
    def rates(self) -> list[float]:
        """The scales of the rate, ascending."""
        return sorted({row.rate_scale for row in self.rows})

    @property
    def reference_rate(self) -> float:
        """The rate that plots of a single rate show: the one nearest to half of the largest."""
        half = self.rates[-1] / 2
        return min(self.rates, key=lambda rate: abs(rate - half))

    def at(self, rate_scale: float, *roles: Role) -> list[Row]:
        """Return the rows of these roles at a rate, by default those of the table: results and sweeps."""
        wanted = roles or ("result", "sweep")
        return [row for row in self.rows if row.rate_scale == rate_scale and row.role in wanted]

    def values(self, row: Row, figure: str) -> list[float]:
        """Return a figure of each run of a row."""
        return [self.runs[number].figures[figure] for number in row.runs]

    def to_json(self) -> str:
        """Return the content of ``results.json``; a figure that does not exist is null."""
        document = {
            "format": FORMAT,
            "version": VERSION,
            "settings": self.settings,
            "results": [dataclasses.asdict(row) for row in self.rows],
            "runs": [dataclasses.asdict(run) for run in self.runs],
        }
        return json.dumps(_null_for_nan(document), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, name: str = RESULTS) -> "Results":
        """Read what :meth:`to_json` wrote. Raises ResultsError, which calls the file ``name``."""
        try:
            document = json.loads(text)
            found = document["format"], document["version"]
            if found != (FORMAT, VERSION):
                raise ResultsError(f"{name}: expected {FORMAT} version {VERSION}, got {found[0]} {found[1]}")
            rows = [Row(**_nan_for_null(row, "figures", "half_widths")) for row in document["results"]]
            runs = [Run(**_nan_for_null(run, "figures")) for run in document["runs"]]
            numbers = [run.number for run in runs]
            known = all(
                row.role in get_args(Role) and row.runs and set(row.runs) <= set(numbers) for row in rows
            )
            if not rows or not known or numbers != list(range(len(runs))):
                raise ResultsError(f"{name}: its rows and runs do not fit together")
            missing = [setting for setting in _NEEDED if setting not in document["settings"]]
            if missing:
                raise ResultsError(f"{name}: settings lack {', '.join(missing)}")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, ResultsError):
                raise
            raise ResultsError(f"{name}: not written by mulsched replay --out: {error!r}") from error
        return cls(document["settings"], rows, runs)

    def save(self, directory: Path) -> None:
        """Write ``results.json``. It is the last file of an experiment: where it is, the others are whole."""
        (directory / RESULTS).write_text(self.to_json())

    @classmethod
    def load(cls, directory: Path) -> "Results":
        """Read ``results.json`` of a directory. Raises ResultsError."""
        path = directory / RESULTS
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ResultsError(f"{directory} holds no results of mulsched replay --out: {error}") from error
        return cls.from_json(text, name=str(path))

    def to_csv(self) -> str:
        """Return a line per row, trials and repeats of the noise floor included, with a header."""
        lines = [self._flat(row) for row in self.rows]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return text.getvalue()

    def _flat(self, row: Row) -> dict[str, Any]:
        first = self.runs[row.runs[0]]
        common = ("trace", "synthetic", "profile", "instances", "kv_blocks", "loop", "cache_source")
        line = {name: self.settings[name] for name in common}
        line |= {"policy": row.label, "role": row.role, "tuned": row.tuned, "rate_scale": row.rate_scale}
        line |= {"offered_per_s": row.offered_per_s, "requests": first.requests, "runs": len(row.runs)}
        line |= {"seed": first.seed, "ties": first.ties, **row.figures}
        if any(other.half_widths for other in self.rows):
            line |= {f"{name}_half_width": row.half_widths.get(name, "") for name in row.figures}
        return line


def check_new(directory: Path) -> Path:
    """Make a directory for results and return it. Raises ResultsError if it holds some already."""
    if (directory / RESULTS).exists():
        raise ResultsError(f"{directory} holds {RESULTS} already: choose another directory or remove it")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _null_for_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _null_for_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_null_for_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _nan_for_null(record: dict[str, Any], *mappings: str) -> dict[str, Any]:
    for name in mappings:
        record[name] = {k: math.nan if v is None else float(v) for k, v in record[name].items()}
    return record


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise MissingExtra("requests.parquet needs pyarrow: pip install 'mulsched[report]'") from error
    return pyarrow


class RequestWriter:
    """Writes ``requests.parquet``, one row group a run, so that a run can be read alone.

    Raises MissingExtra without the extra ``mulsched[report]``.
    """

    def __init__(self, directory: Path) -> None:
        self._pa = _parquet()
        columns = {"run": np.int32, "request": np.int32, **REQUEST_COLUMNS}
        schema = self._pa.schema(
            [(name, self._pa.from_numpy_dtype(np.dtype(dtype))) for name, dtype in columns.items()]
        )
        self._writer = self._pa.parquet.ParquetWriter(directory / REQUESTS, schema, compression="zstd")

    def write(self, run: int, result: ReplayResult) -> None:
        """Add the requests of a run. Runs come in the order of their numbers."""
        n = len(result.arrival_s)
        columns = [np.full(n, run, dtype=np.int32), np.arange(n, dtype=np.int32)]
        columns += [getattr(result, name).astype(dtype) for name, dtype in REQUEST_COLUMNS.items()]
        arrays = [self._pa.array(column) for column in columns]
        table = self._pa.Table.from_arrays(arrays, schema=self._writer.schema)
        self._writer.write_table(table, row_group_size=n)

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()


class RequestReader:
    """Reads ``requests.parquet`` run by run. Raises ResultsError, MissingExtra."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / REQUESTS
        pyarrow = _parquet()
        try:
            self._file = pyarrow.parquet.ParquetFile(self._path)
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise ResultsError(f"{self._path}: {error}") from error

    def read(self, run: Run) -> dict[str, NDArray[Any]]:
        """Return the columns of a run's requests, each of shape (n,). Raises ResultsError."""
        groups = self._file.num_row_groups
        if run.number >= groups:
            raise ResultsError(f"{self._path}: has {groups} runs, expected one of number {run.number}")
        table = self._file.read_row_group(run.number, columns=list(REQUEST_COLUMNS))
        if table.num_rows != run.requests:
            raise ResultsError(
                f"{self._path}: run {run.number} has {table.num_rows} requests, expected {run.requests}"
            )
        return {name: table[name].to_numpy() for name in REQUEST_COLUMNS}

    def close(self) -> None:
        """Close the file."""
        self._file.close()
