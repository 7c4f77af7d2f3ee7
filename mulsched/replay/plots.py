"""Plots of an experiment, for the page and as PNG files."""

import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mulsched.errors import MissingExtra
from mulsched.replay.report import COLUMNS
from mulsched.replay.results import Results, Row
from mulsched.replay.shown import PROBABILITIES, Shown
from mulsched.replay.verdict import noise_floor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "STYLE", "Plot", "new_figure", "plots_of", "render"]

# Okabe and Ito's palette, told apart by the colour-blind, without its yellow, which white paper swallows;
# lines differ in dashes and markers too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))
_MARKERS = "osD^vPX*<>"
_MANY = 8  # policies that a legend inside a plot, or two columns of panels, have room for

STYLE: Any = {
    "font.size": 10,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "mulsched",  # ids that do not differ from run to run
}


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture: ``name`` is its file's stem, ``caption`` says what it shows, ``alt`` what one would see."""

    name: str
    title: str
    caption: str
    alt: str
    figure: "Figure"


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure, sizes in inches. Raises MissingExtra without ``mulsched[report]``."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingExtra("plots need matplotlib: pip install 'mulsched[report]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def render(plot: Plot, form: Literal["svg", "png"], *, dpi: int = 130) -> bytes:
    """Return a plot's file. The same plot gives the same bytes."""
    import matplotlib as mpl

    buffer = io.BytesIO()
    metadata = {"Date": None} if form == "svg" else {"Software": None}
    with mpl.rc_context(STYLE):
        plot.figure.savefig(buffer, format=form, dpi=dpi, metadata=metadata)
    return buffer.getvalue()


def plots_of(results: Results, shown: Sequence[Shown], *, footer: str = "") -> list[Plot]:
    """Return the plots that these results have, in reading order; ``footer`` is written below each.

    Raises MissingExtra without the extra ``mulsched[report]``.
    """
    new_figure(1, 1)  # raises before matplotlib is needed
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        plots = [_cdf(results, shown, "ttft")]
        if all(s.tpot_s is not None for s in shown):
            plots.append(_cdf(results, shown, "tpot"))
        plots.append(_hit_ratio(results, shown))
        if len(plots) == 3:
            plots.append(_trade_off(results, shown))
        plots.append(_load(results, shown))
        if len(results.rates) > 1:
            plots.append(_rate_sweep(results))
        plots += [_parameter_sweep(results, points) for points in _swept(results)]
        for plot in plots if footer else ():
            width = int(plot.figure.get_figwidth() * 17)
            plot.figure.supxlabel(textwrap.fill(footer, width), fontsize=7, color="#555555")
    return plots


def _styles(results: Results) -> dict[str, dict[str, Any]]:
    """Return the look of each series, the same in every plot."""
    series = dict.fromkeys(row.series for row in results.rows if row.role in ("result", "sweep"))
    return {
        name: {
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": _DASHES[i // len(COLOURS) % len(_DASHES)],
            "marker": _MARKERS[i % len(_MARKERS)],
        }
        for i, name in enumerate(series)
    }


def _line(styles: dict[str, dict[str, Any]], series: str) -> dict[str, Any]:
    """Return the look of a line without markers."""
    return {name: value for name, value in styles[series].items() if name != "marker"}


def _legend(figure: "Figure", axes: "Axes", entries: int, *, loc: Literal["best", "lower right"]) -> None:
    """Name the lines: in the plot, or beside it where they are many."""
    if entries <= _MANY:
        axes.legend(fontsize=8, loc=loc)
    else:
        figure.legend(fontsize=7, loc="outside right upper")


def _cdf(results: Results, shown: Sequence[Shown], metric: Literal["ttft", "tpot"]) -> Plot:
    name = metric.upper()
    figure, styles = new_figure(6.4, 4.2), _styles(results)
    axes = figure.subplots()
    curves = [s.ttft_s if metric == "ttft" else s.tpot_s for s in shown]
    for s, quantiles in zip(shown, curves, strict=True):
        assert quantiles is not None
        axes.plot(quantiles * 1000, PROBABILITIES, label=s.row.label, lw=1.6, **_line(styles, s.row.series))
    last = int(np.searchsorted(PROBABILITIES, 0.999))
    least = min(float(c[0]) for c in curves if c is not None)
    most = max(float(c[last]) for c in curves if c is not None)
    logarithmic = least > 0 and (metric == "ttft" or most > 10 * least)
    if logarithmic:
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis)
    axes.set(
        xlabel=f"{name}, ms{' (log scale)' if logarithmic else ''}",
        ylabel="share of requests",
        ylim=(0, 1.01),
    )
    axes.set_xlim(right=1000 * most)
    _legend(figure, axes, len(shown), loc="lower right")
    medians = ", ".join(f"{s.row.label} {1000 * s.row.figures[f'{metric}_p50_s']:,.1f}" for s in shown)
    return Plot(
        name=f"{metric}_cdf",
        title=_LONG[metric],
        caption=f"Share of requests whose {name} is at most so long, a line per policy, one run each; "
        "the axis ends at the largest 99.9th percentile.",
        alt=f"Cumulative distribution of {name}. Medians in ms: {medians}.",
        figure=figure,
    )


_LONG = {"ttft": "Time to first token (TTFT)", "tpot": "Time per output token (TPOT)"}


def _plain_ticks(axis: Any) -> None:
    """Write 1000 where a logarithmic axis would write a power of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.set_minor_formatter(NullFormatter())


def _hit_ratio(results: Results, shown: Sequence[Shown]) -> Plot:
    figure, styles = new_figure(6.4, 1.2 + 0.3 * len(shown)), _styles(results)
    axes = figure.subplots()
    rows = [s.row for s in shown]
    ratios = [row.figures["hit_ratio"] for row in rows]
    error = [row.half_widths.get("hit_ratio", 0.0) for row in rows] if rows[0].half_widths else None
    bars = axes.barh(
        range(len(rows)), ratios, xerr=error, height=0.65, color=[styles[row.series]["color"] for row in rows]
    )
    axes.bar_label(bars, [f"{ratio:.3f}" for ratio in ratios], padding=4, fontsize=8)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="prompt tokens found in the cache, ratio", xlim=(0, 1.12 * max(*ratios, 0.01)))
    axes.grid(visible=False, axis="y")
    return Plot(
        name="hit_ratio",
        title="Cache hits",
        caption="Share of all prompt tokens that the engine found in its prefix cache"
        + (", with 95 % confidence intervals." if error else "."),
        alt="Hit ratios: " + ", ".join(f"{r.label} {v:.3f}" for r, v in zip(rows, ratios, strict=True)) + ".",
        figure=figure,
    )


def _trade_off(results: Results, shown: Sequence[Shown]) -> Plot:
    figure, styles = new_figure(6.4, 4.2), _styles(results)
    axes = figure.subplots()
    rows = [s.row for s in shown]
    x, y = ([1000 * row.figures[name] for row in rows] for name in ("ttft_mean_s", "tpot_mean_s"))
    for row, ttft, tpot in zip(rows, x, y, strict=True):
        look = styles[row.series] | {"linestyle": "none", "markersize": 8, "capsize": 2}
        if row.half_widths:
            look |= {
                "xerr": 1000 * row.half_widths["ttft_mean_s"],
                "yerr": 1000 * row.half_widths["tpot_mean_s"],
            }
        axes.errorbar(ttft, tpot, label=row.label, **look)
    for values, scale, axis in ((x, axes.set_xscale, axes.xaxis), (y, axes.set_yscale, axes.yaxis)):
        if max(values) > 10 * min(values):
            scale("log")
            _plain_ticks(axis)
    axes.margins(0.12)
    axes.set(xlabel="mean TTFT, ms", ylabel="mean TPOT, ms")
    _legend(figure, axes, len(shown), loc="best")
    return Plot(
        name="trade_off",
        title="Trade-off",
        caption="Mean TTFT and mean TPOT of each policy; towards the lower left is better"
        + (", with 95 % confidence intervals." if rows[0].half_widths else "."),
        alt="Mean TTFT and mean TPOT in ms: "
        + ", ".join(f"{r.label} {a:,.0f} and {b:,.1f}" for r, a, b in zip(rows, x, y, strict=True))
        + ".",
        figure=figure,
    )


def _load(results: Results, shown: Sequence[Shown]) -> Plot:
    from matplotlib.colors import PowerNorm

    columns = 1 if len(shown) == 1 else 2 if len(shown) <= _MANY else 3
    lines = math.ceil(len(shown) / columns)
    instances = len(shown[0].batch)
    height = min(2.6, max(1.2, 0.6 + 0.12 * instances))
    figure = new_figure(6.4 if columns == 1 else 12.8, 0.9 + height * lines)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    peaks = [max(float(s.batch.max()), 1.0) for s in shown]
    # square roots keep an even panel readable beside one that is overloaded
    gamma = 0.5 if max(peaks) > 3 * min(peaks) else 1.0
    norm = PowerNorm(gamma, vmin=0, vmax=max(peaks))
    for axes in panels.flat[len(shown) :]:
        axes.set_axis_off()
    for axes, s in zip(panels.flat, shown, strict=False):
        extent = (0, s.until_s, instances - 0.5, -0.5)
        image = axes.imshow(
            s.batch, aspect="auto", extent=extent, norm=norm, cmap="cividis", interpolation="nearest"
        )
        axes.set_title(s.row.label, fontsize=10)
        axes.grid(visible=False)
        axes.yaxis.get_major_locator().set_params(integer=True)
    panels[0][0].set_xlim(0, max(s.until_s for s in shown))
    for axes in panels[:, 0]:
        axes.set_ylabel("instance")
    for axes in panels.flat[max(0, len(shown) - columns) : len(shown)]:
        axes.set_xlabel("time, s")
        axes.tick_params(labelbottom=True)
    figure.colorbar(
        image,
        ax=panels,
        label="requests there" + (" (square-root colours)" if gamma < 1 else ""),
        fraction=0.03,
        aspect=30,
    )
    return Plot(
        name="load",
        title="Load of each instance over time",
        caption="Requests waiting or running at each instance, mean of each of "
        f"{shown[0].batch.shape[1]} parts of the time, one run each; one scale of colours for all panels. "
        "A panel ends with its run, at the latest a quarter longer than requests arrive.",
        alt="Heat map of batch size by instance and time, a panel per policy. Largest values: "
        + ", ".join(f"{s.row.label} {s.batch.max():.0f}" for s in shown)
        + ".",
        figure=figure,
    )


def _panels(results: Results, last: tuple[str, str]) -> list[str]:
    """Return the figures that a sweep plots, in two lines of three."""
    third = last[0] if last[0] in results.rows[0].figures else last[1]
    return ["ttft_mean_s", "ttft_p99_s", third, "tpot_mean_s", "tpot_p99_s", "hit_ratio"]


_AXIS = {
    "ttft_mean_s": "mean TTFT, ms",
    "ttft_p99_s": "p99 TTFT, ms",
    "tpot_mean_s": "mean TPOT, ms",
    "tpot_p99_s": "p99 TPOT, ms",
    "goodput_per_s": "goodput, requests/s",
    "requests_per_s": "finished, requests/s",
    "prefill_spread": "prefilled tokens, max/mean",
    "hit_ratio": "hit ratio",
}


def _draw(axes: "Axes", figure: str, x: Sequence[float], rows: Sequence[Row], **style: Any) -> None:
    factor = COLUMNS[figure][1]
    y = [factor * row.figures[figure] for row in rows]
    error = [factor * row.half_widths[figure] for row in rows] if rows[0].half_widths else None
    axes.errorbar(x, y, yerr=error, capsize=2, lw=1.5, ms=4.5, **style)
    axes.set_ylabel(_AXIS[figure])


def _log_if_wide(axes: "Axes", values: Sequence[float]) -> None:
    """Make the axis logarithmic where its values span more than a decade."""
    finite = [value for value in values if value > 0]
    if len(finite) == len(values) and max(finite) > 10 * min(finite):
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)


def _rate_sweep(results: Results) -> Plot:
    figure, styles = new_figure(12.8, 7.0), _styles(results)
    panels = figure.subplots(2, 3, sharex=True)
    lines: dict[str, list[Row]] = {}
    for rate in results.rates:
        for row in results.at(rate):
            name = row.label if row.role == "sweep" else row.series
            lines.setdefault(name, []).append(row)
    for axes, name in zip(panels.flat, _panels(results, ("goodput_per_s", "requests_per_s")), strict=True):
        for label, rows in lines.items():
            offered = [row.offered_per_s for row in rows]
            _draw(axes, name, offered, rows, label=label, **styles[rows[0].series])
        if name.endswith("_per_s"):
            ends = [results.at(rate)[0].offered_per_s for rate in results.rates]
            axes.plot(ends, ends, color="#888888", lw=1, zorder=0, label="all that is offered")
        if name.startswith(("ttft", "tpot")):
            _log_if_wide(axes, [row.figures[name] for rows in lines.values() for row in rows])
    for axes in panels[1]:
        axes.set_xlabel("offered, requests/s")
    handles, labels = panels[0][2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(6, len(labels)), fontsize=9)
    slo = "goodput" if "goodput_per_s" in results.rows[0].figures else "throughput"
    return Plot(
        name="rate_sweep",
        title="Sweep of the rate",
        caption=f"Latency, {slo} and hit ratio against the rate that is offered, a line per policy.",
        alt=f"Six panels of figures against the offered rate, at {len(results.rates)} rates: "
        f"{', '.join(lines)}. The figures are in the table.",
        figure=figure,
    )


def _swept(results: Results) -> list[list[Row]]:
    """Return the points of each parameter's sweep or tuning at the reference rate."""
    points: dict[str, list[Row]] = {}
    for row in results.at(results.reference_rate, "sweep", "trial"):
        points.setdefault(row.series, []).append(row)
    return list(points.values())


def _parameter_sweep(results: Results, points: Sequence[Row]) -> Plot:
    settings = results.settings
    grids = (
        [settings["sweep"]]
        if points[0].role == "sweep"
        else [tune["grid"] for tune in settings["tune"] if tune["policy"] == points[0].policy]
    )
    parameter, policy = str(grids[0]["parameter"]), points[0].policy
    figure, styles = new_figure(12.8, 7.0), _styles(results)
    panels = figure.subplots(2, 3, sharex=True)
    rows = results.at(results.reference_rate, "result")
    chosen = next((row for row in rows if row.tuned and row.series == points[0].series), None)
    across = next(
        (row for row in rows if row.policy == "lmetric"), next((r for r in rows if not r.tuned), None)
    )
    floor = noise_floor(results, results.reference_rate)
    values = [float(row.parameters[parameter]) for row in points]
    for axes, name in zip(panels.flat, _panels(results, ("goodput_per_s", "prefill_spread")), strict=True):
        _draw(axes, name, values, points, label=points[0].series, **styles[points[0].series])
        heights = [COLUMNS[name][1] * row.figures[name] for row in points]
        if across is not None:
            level = COLUMNS[name][1] * across.figures[name]
            axes.axhline(level, label=across.label, lw=1.6, **_line(styles, across.series))
            noise = floor.get(name, math.nan)
            if math.isfinite(noise):
                band = (level * (1 - noise), level * (1 + noise))
                axes.axhspan(
                    *band, color=styles[across.series]["color"], alpha=0.15, lw=0, label="noise floor"
                )
            heights.append(level)
        if chosen is not None:
            best = float(chosen.parameters[parameter])
            axes.axvline(best, color="#666666", lw=1, ls=":", label=f"chosen: {best:g}")
        if name.startswith(("ttft", "tpot")):
            _log_if_wide(axes, heights)
    for axes in panels[1]:
        axes.set_xlabel(f"{parameter} of {policy}")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=9)
    line = "" if across is None else f"; the line across is {across.label}, with its noise floor"
    return Plot(
        name=f"{parameter}_sweep_{policy}",
        title=f"{'Sweep' if points[0].role == 'sweep' else 'Tuning'} of {parameter} of {policy}",
        caption=f"The same trace under {policy} with each {parameter}{line}.",
        alt=f"Six panels of figures against {parameter}, {len(points)} values from {values[0]:g} to "
        f"{values[-1]:g}{line}.",
        figure=figure,
    )
