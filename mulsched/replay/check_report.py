"""What a check of a trace shows: a table for the terminal, sentences, and a plot of the margin over time."""

import math
from typing import IO, Any

import numpy as np

from mulsched.errors import MissingExtra
from mulsched.replay.check import TraceCheck, Window, WindowClass
from mulsched.replay.plots import COLOURS, STYLE, Plot, new_figure

__all__ = ["plot_check", "print_check", "sentences"]

_GREY: dict[str, Any] = {"color": "#bbbbbb"}
_HATCHED: dict[str, Any] = {"facecolor": "none", "edgecolor": COLOURS[3], "hatch": "///"}
_HEADS = (
    "start s",
    "requests",
    "prefix\ntokens",
    "class\nrequests",
    "x",
    "x by\nwork",
    "|M|/N",
    "margin",
    "margin\nby work",
    "condition",
    "TTFT ratio\n± noise",
    "TPOT ratio\n± noise",
    "LMetric loses",
)


def print_check(check: TraceCheck, out: IO[str], *, classes: int = 1) -> None:
    """Print a line per window and what follows from all; below each, lines of its next worst classes.

    ``classes``: the most of a window that are shown, at least 1.
    Raises MissingExtra without the extra ``mulsched[replay]``.
    """
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError as error:
        raise MissingExtra("tables need rich: pip install 'mulsched[replay]'") from error
    title = (
        f"{check.trace}{' (synthetic)' if check.synthetic else ''}: {check.requests:,} requests, "
        f"{check.instances} instances x {check.kv_blocks} blocks, {check.profile}, "
        f"windows of {check.window_s:g} s"
    )
    table = Table(title=title, title_justify="left", title_style="", padding=(0, 1, 0, 0))
    for head in _HEADS:
        left = head in ("condition", "LMetric loses")
        table.add_column(head, justify="left" if left else "right", no_wrap=True)
    for window in check.windows:
        table.add_row(*_cells(window, check.instances))
        for other in window.classes[1:classes]:
            own = f"{other.margin:+.3f}", f"{other.work_margin:+.3f}", other.verdict
            table.add_row("", "", *_of_class(other, check.instances), *own)
    Console(file=out, width=200).print(table)
    for sentence in sentences(check):
        print(sentence, file=out)


def _cells(window: Window, instances: int) -> list[str]:
    return [
        f"{window.start_s:,.0f}",
        f"{window.requests:,}",
        *(_of_class(window.classes[0], instances) if window.classes else ["-"] * 5),
        f"{window.margin:+.3f}",
        f"{window.work_margin:+.3f}",
        window.verdict,
        _ratio(window.ttft_ratio, window.ttft_noise),
        _ratio(window.tpot_ratio, window.tpot_noise),
        " ".join(name.upper() for name in window.lost),
    ]


def _of_class(shown: WindowClass, instances: int) -> list[str]:
    return [
        f"{shown.prefix_tokens:,}",
        f"{shown.requests:,}",
        f"{shown.share_ratio:.3f}",
        f"{shown.work_share_ratio:.3f}",
        f"{shown.holders}/{instances}",
    ]


def _ratio(ratio: float, noise: float) -> str:
    return "-" if math.isnan(ratio) else f"{ratio:.2f} ±{noise:.2f}"


def sentences(check: TraceCheck) -> list[str]:
    """Return what the windows say together: the condition, then what the replays say of it."""
    n = len(check.windows)
    failing = [window for window in check.windows if window.verdict == "fails"]
    chance = sum(window.verdict == "chance" for window in check.windows)
    lost = sum(bool(window.lost) for window in check.windows)
    both = sum(bool(window.lost) for window in failing)
    fails = f"The condition fails in {len(failing)} of {n} windows"
    if chance:
        fails += f", and by no more than chance in {chance}"
    return [
        f"{fails}: {'at risk' if failing else 'safe'}.",
        f"By replay LMetric loses to load-only, by more than ties move it, in {lost} of {n} windows, "
        f"{both} of them where the condition fails.",
    ]


def plot_check(check: TraceCheck) -> Plot:
    """Return the plot of both margins over time, failing windows shaded, lost ones marked.

    Raises MissingExtra without the extra ``mulsched[report]``.
    """
    new_figure(1, 1)  # raises before matplotlib is needed
    import matplotlib as mpl

    middle = np.array([(window.start_s + window.end_s) / 2 for window in check.windows])
    with mpl.rc_context(STYLE):
        figure = new_figure(8, 3.4)
        axes = figure.add_subplot()
        for name, colour, marker, values in (
            ("by requests", COLOURS[0], "o", [window.margin for window in check.windows]),
            ("by work", COLOURS[1], "s", [window.work_margin for window in check.windows]),
        ):
            axes.plot(middle, values, color=colour, marker=marker, markersize=4, label=name)
        axes.axhline(0, color="black", linewidth=1)
        for label, windows, style in (
            ("condition fails", [w for w in check.windows if w.verdict == "fails"], _GREY),
            ("LMetric loses by replay", [w for w in check.windows if w.lost], _HATCHED),
        ):
            for i, window in enumerate(windows):
                named = label if i == 0 else None
                axes.axvspan(window.start_s, window.end_s, alpha=0.5, zorder=0, label=named, **style)
        axes.set_xlabel("arrival s")
        axes.set_ylabel("margin, parts of the load")
        figure.legend(loc="outside upper right", ncols=4, frameon=False)
    return Plot(
        name="margin",
        title="Margin of the condition",
        caption=f"|M|/N less the share of the worst classes, {check.trace}.",
        alt=" ".join(sentences(check)),
        figure=figure,
    )
