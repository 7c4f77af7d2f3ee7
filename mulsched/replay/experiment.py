"""Experiments: many replays that differ in one thing at a time, and what they say together."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mulsched.errors import InvalidArgument
from mulsched.policies import PolicySpec, Ties, get, parameters
from mulsched.replay.confidence import half_width
from mulsched.replay.grid import Grid, Tune
from mulsched.replay.parallel import Job, replay_each
from mulsched.replay.results import Results, Role, Row, Run
from mulsched.replay.simulator import Disaggregation, ReplayResult
from mulsched.replay.slo import Slo, goodput
from mulsched.replay.trace import Trace

__all__ = ["OBJECTIVES", "Experiment", "Progress", "TraceAt", "run_experiment"]

TraceAt = Callable[[float], Trace]
"""From a scale of the rate to the trace to replay; 1 is the trace's own rate."""

Progress = Callable[[str, int, int], None]
"""``progress(what, done, all)``: requests replayed of those of all runs under way."""

OBJECTIVES: dict[str, Callable[[Mapping[str, float]], float]] = {
    # a product, so that neither unit nor size of the two matters; equal to their geometric mean as a ranking
    "balanced": lambda figures: figures["ttft_mean_s"] * figures["tpot_mean_s"],
    "ttft_mean": lambda figures: figures["ttft_mean_s"],
    "ttft_p99": lambda figures: figures["ttft_p99_s"],
    "tpot_mean": lambda figures: figures["tpot_mean_s"],
    "tpot_p99": lambda figures: figures["tpot_p99_s"],
    "goodput": lambda figures: -figures["goodput_per_s"],
}
"""What tuning makes smallest, by name; the first is the default."""


@dataclass(frozen=True, slots=True)
class Experiment:
    """What to replay.

    ``policies``: a row each. ``options``: arguments of :func:`~mulsched.replay.replay` that all runs share,
    ``profile`` among them. ``rates``: scales of the trace's rate. ``sweep``: a parameter, tried on every
    policy that has it. ``tunes``: policies with a parameter of which the best value, by ``objective``, makes
    a row. ``repeat``: runs per row; the first has ``seed`` and the policy's own ties, those after it random
    ties and the next seeds. ``noise``: without repeats, run the first policy once more so.

    Raises InvalidArgument for combinations that make no sense, UnknownPolicy.
    """

    policies: Sequence[PolicySpec]
    options: Mapping[str, Any]
    rates: Sequence[float] = (1.0,)
    sweep: Grid | None = None
    tunes: Sequence[Tune] = ()
    objective: str = "balanced"
    repeat: int = 1
    noise: bool = True
    slo: Slo | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.policies or not self.rates:
            raise InvalidArgument("an experiment needs a policy and a rate")
        if len(set(self.rates)) < len(self.rates):
            raise InvalidArgument(f"each rate may be given once, got {list(self.rates)}")
        labels = [spec.check().label for spec in self.policies]
        if len(set(labels)) < len(labels):
            raise InvalidArgument(f"each policy may be given once, got {', '.join(labels)}")
        if self.repeat < 1:
            raise InvalidArgument(f"repeat must be at least 1, got {self.repeat}")
        if self.objective not in OBJECTIVES:
            raise InvalidArgument(f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        if self.objective == "goodput" and self.slo is None:
            raise InvalidArgument("the objective goodput needs an SLO")
        tuned = [tune.policy for tune in self.tunes]
        if len(set(tuned)) < len(tuned):
            raise InvalidArgument(f"each policy may be tuned once, got {', '.join(tuned)}")
        if self.sweep is not None:
            self._check_sweep(self.sweep)

    def _check_sweep(self, sweep: Grid) -> None:
        name = sweep.parameter
        swept = [spec for spec in self.policies if name in parameters(spec.name)]
        if not swept:
            raise InvalidArgument(
                f"none of {', '.join(spec.name for spec in self.policies)} has a parameter {name!r} to sweep"
            )
        for spec in swept:
            if name in spec.parameters:
                raise InvalidArgument(f"{spec.label} fixes {name}, which is to be swept")
            for value in sweep.values:
                spec.given(**{name: value}).check()
        if any(tune.grid.parameter == name for tune in self.tunes):
            raise InvalidArgument(f"sweep {name} or tune it: tuning sweeps it too, and keeps every trial")


@dataclass(slots=True)
class _Cell:
    """A row in the making: ``shifts`` are the repeats that it runs, 0 the one with the policy's own ties."""

    spec: PolicySpec
    series: str
    role: Role
    rate: float
    shifts: range
    tune: Tune | None = None
    runs: list[int] = field(default_factory=list)


def run_experiment(
    experiment: Experiment,
    trace_at: TraceAt,
    *,
    settings: Mapping[str, Any] | None = None,
    processes: int = 1,
    progress: Progress | None = None,
    keep: Callable[[int, ReplayResult], None] | None = None,
) -> Results:
    """Replay everything and return the table.

    ``settings`` are added to those of the results. ``keep(number, result)`` is given each run, in the order
    of their numbers; nothing but its figures stays in memory after that. The results do not depend on
    ``processes``. Raises as :func:`~mulsched.replay.replay`, InvalidArgument (an objective that is not
    defined on this trace).
    """
    runner = _Runner(experiment, trace_at, processes, progress, keep)
    cells = [cell for rate in experiment.rates for cell in _cells(experiment, rate)]
    runner.run("replays", cells)
    tuned = [
        _best([cell for cell in cells if cell.tune is tune and cell.rate == rate], runner.runs, experiment)
        for rate in experiment.rates
        for tune in experiment.tunes
    ]
    runner.run("replays of what was tuned", tuned)
    order = {"result": 0, "sweep": 0, "trial": 1, "noise": 2}
    cells = sorted(cells + tuned, key=lambda cell: (cell.rate, order[cell.role]))
    return Results(
        settings=_settings(experiment) | runner.shared | dict(settings or {}),
        rows=[_row(cell, runner.runs) for cell in cells],
        runs=runner.runs,
    )


def _cells(experiment: Experiment, rate: float) -> list[_Cell]:
    """Return what can be planned at a rate; what was tuned follows from its trials."""
    cells = []
    repeats, once = range(experiment.repeat), range(1)
    for spec in experiment.policies:
        sweep = experiment.sweep
        if sweep is None or sweep.parameter not in parameters(spec.name):
            cells.append(_Cell(spec, spec.label, "result", rate, repeats))
            continue
        points = [spec.given(**{sweep.parameter: value}) for value in sweep.values]
        cells += [_Cell(point, spec.label, "sweep", rate, repeats) for point in points]
    if experiment.noise and experiment.repeat == 1:
        first = next((cell for cell in cells if cell.role == "result"), cells[0])
        cells.append(_Cell(first.spec, first.series, "noise", rate, range(1, 2)))
    for tune in experiment.tunes:
        cells += [_Cell(spec, f"{spec.name}(tuned)", "trial", rate, once, tune) for spec in tune.specs]
    return cells


def _best(trials: list[_Cell], runs: Sequence[Run], experiment: Experiment) -> _Cell:
    """Return the cell of the best trial, which has that trial's run already; the smallest of equal values."""
    objective = OBJECTIVES[experiment.objective]
    losses = [objective(runs[cell.runs[0]].figures) for cell in trials]
    if any(math.isnan(loss) for loss in losses):
        raise InvalidArgument(
            f"objective {experiment.objective} is not defined on this trace: no request has it"
        )
    best = trials[int(np.argmin(losses))]
    return dataclasses.replace(best, role="result", shifts=range(1, experiment.repeat), runs=list(best.runs))


class _Runner:
    """Runs cells and collects their runs."""

    def __init__(
        self,
        experiment: Experiment,
        trace_at: TraceAt,
        processes: int,
        progress: Progress | None,
        keep: Callable[[int, ReplayResult], None] | None,
    ) -> None:
        self.experiment = experiment
        self.traces = {rate: trace_at(rate) for rate in experiment.rates}
        self.processes = processes
        self.progress = progress
        self.keep = keep
        self.runs: list[Run] = []
        self.shared: dict[str, Any] = {}

    def run(self, what: str, cells: Iterable[_Cell]) -> None:
        """Run each cell's shifts and add the runs' numbers to it."""
        planned = [(cell, shift) for cell in cells for shift in cell.shifts]
        jobs = [self._job(cell, shift) for cell, shift in planned]
        done = [0] * len(jobs)
        total = sum(len(trace) for trace, _ in jobs)

        def tell(job: int, requests: int, of: int) -> None:
            done[job] = requests
            if self.progress is not None:
                finished = sum(d == len(trace) for d, (trace, _) in zip(done, jobs, strict=True))
                self.progress(f"{finished} of {len(jobs)} {what}", sum(done), total)

        results = replay_each(jobs, processes=self.processes, progress=tell)
        for (cell, _), result in zip(planned, results, strict=True):
            number = len(self.runs)
            cell.runs.append(number)
            self.runs.append(_run(number, cell.rate, result, self.experiment.slo))
            self.shared = self.shared or _shared(result)
            if self.keep is not None:
                self.keep(number, result)

    def _job(self, cell: _Cell, shift: int) -> Job:
        spec = cell.spec
        ties: Ties | None = None
        # "first" is part of a policy's rule; with equal instances it is also the same in any order of them
        if shift and get(spec.name, **spec.parameters).ties != "first":
            ties = "random"
        own = {"policy": spec.name, "parameters": spec.parameters, "ties": ties}
        return self.traces[cell.rate], {
            **self.experiment.options,
            **own,
            "seed": self.experiment.seed + shift,
        }


def _run(number: int, rate: float, result: ReplayResult, slo: Slo | None) -> Run:
    span = float(np.ptp(result.arrival_s))
    figures = result.summary()
    if slo is not None:
        figures = figures | goodput(result, slo)
    return Run(
        number=number,
        label=result.label,
        policy=result.policy,
        parameters=dict(result.parameters),
        rate_scale=rate,
        offered_per_s=len(result.arrival_s) / span if span > 0 else math.nan,
        requests=len(result.arrival_s),
        seed=result.seed,
        ties=result.ties,
        figures=figures,
    )


def _row(cell: _Cell, runs: Sequence[Run]) -> Row:
    first = runs[cell.runs[0]]
    values = {name: [runs[number].figures[name] for number in cell.runs] for name in first.figures}
    tuned = cell.tune is not None and cell.role == "result"
    return Row(
        label=f"{first.label[:-1]}, tuned)" if tuned else first.label,
        series=cell.series,
        policy=first.policy,
        parameters=first.parameters,
        role=cell.role,
        tuned=tuned,
        rate_scale=cell.rate,
        offered_per_s=first.offered_per_s,
        runs=cell.runs,
        figures={name: math.fsum(numbers) / len(numbers) for name, numbers in values.items()},
        half_widths={name: half_width(v) for name, v in values.items()} if len(cell.runs) > 1 else {},
    )


def _shared(result: ReplayResult) -> dict[str, Any]:
    """Return what a result says that all runs of an experiment have in common."""
    own = {"policy", "parameters", "seed", "ties", *result.summary()}
    shared = {f.name: getattr(result, f.name) for f in dataclasses.fields(result) if f.name not in own}
    return {
        name: dataclasses.asdict(value) if isinstance(value, Disaggregation) else value
        for name, value in shared.items()
        if not isinstance(value, np.ndarray)
    }


def _settings(experiment: Experiment) -> dict[str, Any]:
    slo, sweep = experiment.slo, experiment.sweep
    return {
        "seed": experiment.seed,
        "repeat": experiment.repeat,
        "rate_scales": list(experiment.rates),
        "sweep": None if sweep is None else dataclasses.asdict(sweep),
        "tune": [dataclasses.asdict(tune) for tune in experiment.tunes],
        "objective": experiment.objective if experiment.tunes else None,
        "slo": None if slo is None else dataclasses.asdict(slo),
    }
