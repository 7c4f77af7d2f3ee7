"""Plots of the results page."""

import io
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # before pyplot: no display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from PIL import Image
from results import SWEPT, Table

MEANS = (("ttft_mean_s", "mean TTFT"), ("tpot_mean_s", "mean TPOT"))
COLOURS = dict(zip(("lmetric", *SWEPT), ("black", *(f"C{i}" for i in range(5))), strict=True))


def draw(tables: Mapping[str, Table], images: Path) -> list[str]:
    """Draw what there are results for, and return the names of the plots."""
    cells = list(tables.values())
    drawn = []
    for name, plot in (("overview", overview), ("weights", weights), ("rates", rates), ("stale", stale)):
        figure = plot(cells)
        if figure is not None:
            _save(figure, images / f"paper-{name}.png")
            plt.close(figure)
            drawn.append(name)
    return drawn


def _save(figure: plt.Figure, path: Path) -> None:
    """Write a PNG of few colours, a third of the size."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=80, bbox_inches="tight")
    Image.open(drawn).convert("RGB").quantize(256).save(path, optimize=True)


def overview(cells: list[Table]) -> plt.Figure | None:
    """A map of policies and cases: mean TTFT and mean TPOT over LMetric's."""
    shown = [t for t in cells if t.stage == "main"]
    if not shown:
        return None
    names = sorted({name for t in shown for name in t.others})
    figure, axes = plt.subplots(1, 2, figsize=(13, 7), sharey=True, layout="constrained")
    for ax, (key, title) in zip(axes, MEANS, strict=True):
        values = np.array([[t.change(n, key) + 1 if n in t.others else np.nan for t in shown] for n in names])
        image = ax.imshow(np.log2(values), cmap="RdBu_r", vmin=-1.5, vmax=1.5, aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            text = f"{value:.2f}" if value < 9.95 else f"{value:.0f}"
            colour = "white" if abs(np.log2(value)) > 1 else "black"
            ax.text(x, y, text, ha="center", va="center", fontsize=8, color=colour)
        labels = [t.title.replace(", ", "\n") for t in shown]
        ax.set_xticks(range(len(shown)), labels, fontsize=7, rotation=90)
        ax.set_yticks(range(len(names)), names)
        ax.set_title(f"{title} over LMetric's (blue: better)", fontsize=9)
    figure.colorbar(image, ax=axes, label="log2 of the ratio", shrink=0.6)
    return figure


def weights(cells: list[Table]) -> plt.Figure | None:
    """The linear score's sweep, LMetric at 1 with its noise floor."""
    shown = [t for t in cells if t.stage == "main"]
    if not shown:
        return None
    columns = 4
    lines = -(-len(shown) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(13, 2.6 * lines), layout="constrained", squeeze=False
    )
    for ax in axes.flat[len(shown) :]:
        ax.axis("off")
    for ax, table in zip(axes.flat, shown, strict=False):
        trials = table.trials("linear")
        at = [t["parameters"]["weight"] for t in trials]
        for (key, title), colour in zip(MEANS, ("C0", "C3"), strict=True):
            ax.plot(
                at, [t[key] / table.reference(key) for t in trials], "o-", color=colour, label=title, ms=3
            )
            floor = table.floor(key)
            ax.axhspan(1 - floor, 1 + floor, color=colour, alpha=0.12)
        ax.axhline(1, color="black", lw=1, label="LMetric")
        _log_scale(ax)
        ax.set_title(table.title, fontsize=8)
    axes[0, 0].legend(fontsize=7)
    figure.supxlabel("weight of the miss ratio", fontsize=9)
    figure.supylabel("over LMetric's", fontsize=9)
    return figure


def rates(cells: list[Table]) -> plt.Figure | None:
    """Mean TTFT and TPOT against the share of the maximum rate."""
    titles = list(dict.fromkeys(t.title for t in cells if t.stage == "sweep"))
    if not titles:
        return None
    width = min(len(titles), 5)
    lines = -(-len(titles) // width)
    figure, grid = plt.subplots(
        2 * lines, width, figsize=(2.9 * width, 5.6 * lines), layout="constrained", squeeze=False, sharex=True
    )
    for ax in grid.flat[2 * width * (lines - 1) :]:
        ax.axis("off")  # until it is drawn on
    for place, title in enumerate(titles):
        line, column = divmod(place, width)
        points = sorted(
            (t for t in cells if t.title == title and t.stage in ("sweep", "main")), key=lambda t: t.load
        )
        for ax, (key, name) in zip(grid[2 * line : 2 * line + 2, column], MEANS, strict=True):
            ax.axis("on")
            ax.plot(
                [t.load for t in points],
                [1e3 * t.reference(key) for t in points],
                "k.-",
                label="lmetric",
                lw=2,
            )
            for policy in SWEPT:
                having = [t for t in points if policy in t.others]
                values = [1e3 * t.others[policy][key] for t in having]
                ax.plot([t.load for t in having], values, ".-", color=COLOURS[policy], label=policy, lw=1)
            _log_scale(ax)
            if column == 0:
                ax.set_ylabel(f"{name}, ms")
        grid[2 * line, column].set_title(title, fontsize=8)
    grid[0, 0].legend(fontsize=7)
    figure.supxlabel("share of the maximum rate", fontsize=9)
    return figure


def stale(cells: list[Table]) -> plt.Figure | None:
    """Mean TTFT against the delay of state, a line per policy and loss."""
    shown = [t for t in cells if t.stage == "stale"]
    if not shown:
        return None
    figure, axes = plt.subplots(
        2, len(shown), figsize=(5 * len(shown), 6), layout="constrained", squeeze=False
    )
    for column, table in enumerate(shown):
        policies = list(dict.fromkeys(row["policy"] for row in table.rows))
        for ax, (key, name) in zip(axes[:, column], MEANS, strict=True):
            for policy, loss in dict.fromkeys((row["policy"], row["loss"]) for row in table.rows):
                runs = [r for r in table.rows if r["policy"] == policy and r["loss"] == loss]
                ax.plot(
                    [1e3 * r["delay_s"] for r in runs],
                    [1e3 * r[key] for r in runs],
                    marker=".",
                    color=f"C{policies.index(policy)}",
                    alpha=1 - 7 * loss,
                    label=f"{policy}, {100 * loss:g} % lost",
                )
            ax.set_ylabel(f"{name}, ms")
        axes[0, column].set_title(table.title, fontsize=9)
        axes[1, column].set_xlabel("state late by, ms")
    axes[0, 0].legend(fontsize=7)
    return figure


def _log_scale(ax: plt.Axes) -> None:
    """Use a logarithmic axis with plain numbers; the default has none between powers of ten."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(MaxNLocator(5) if high < 8 * low else LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.tick_params(labelsize=7, which="both")
