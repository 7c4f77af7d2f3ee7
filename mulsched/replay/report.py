"""The report that a terminal shows: a table, what was tuned, the noise floor and the verdict."""

import math
from typing import IO

from mulsched.errors import MissingExtra
from mulsched.replay.results import Results, Row
from mulsched.replay.slo import Slo
from mulsched.replay.verdict import noise_text, setting, verdict, verdict_by_rate

__all__ = ["COLUMNS", "cells", "columns_of", "print_report", "slo_text", "tuned_text"]

COLUMNS: dict[str, tuple[str, float, int]] = {
    "offered_per_s": ("offered\nreq/s", 1, 2),
    **{f"ttft_{q}_s": (f"TTFT ms\n{q}", 1000, 0) for q in ("mean", "p50", "p95", "p99")},
    **{f"tpot_{q}_s": (f"TPOT ms\n{q}", 1000, 1) for q in ("mean", "p50", "p95", "p99")},
    "goodput_per_s": ("goodput\nreq/s", 1, 2),
    "slo_met_ratio": ("SLO met\nratio", 1, 3),
    "requests_per_s": ("done\nreq/s", 1, 2),
    "output_tokens_per_s": ("output\ntok/s", 1, 0),
    "hit_ratio": ("hit\nratio", 1, 3),
    "request_spread": ("requests\nmax/mean", 1, 2),
    "prefill_spread": ("prefill\nmax/mean", 1, 2),
}
"""Columns of the table: heading of two lines, factor, decimals."""


def columns_of(results: Results) -> list[str]:
    """Return the columns of these results: the rate only where it is swept, goodput only with an SLO."""
    figures = results.rows[0].figures
    return [
        name for name in COLUMNS if name in figures or (name == "offered_per_s" and len(results.rates) > 1)
    ]


def cells(row: Row, columns: list[str]) -> list[str]:
    """Return a row's figures as text; after ± half the width of the 95 % confidence interval."""
    texts = []
    for name in columns:
        _, factor, decimals = COLUMNS[name]
        value = row.offered_per_s if name == "offered_per_s" else row.figures[name]
        if factor * value < 100 and decimals == 0:
            decimals = 1
        text = "-" if math.isnan(value) else f"{factor * value:,.{decimals}f}"
        if name in row.half_widths and text != "-":
            text += f" ±{factor * row.half_widths[name]:,.{decimals}f}"
        texts.append(text)
    return texts


def slo_text(results: Results) -> str | None:
    """Return what the goodput counts as a sentence, if there is an SLO."""
    slo = results.settings["slo"]
    return None if slo is None else f"Goodput counts requests with {Slo(**slo)}."


def tuned_text(results: Results) -> list[str]:
    """Return a sentence for each policy that was tuned: the best value, at each rate."""
    sentences = []
    for tune in results.settings["tune"]:
        name, tried = tune["grid"]["parameter"], len(tune["grid"]["values"])
        rows = [
            r for rate in results.rates for r in results.at(rate) if r.tuned and r.policy == tune["policy"]
        ]
        best = [f"{row.parameters[name]:g}" for row in rows]
        if len(rows) > 1:
            best = [f"{v} at {row.offered_per_s:.3g} requests/s" for v, row in zip(best, rows, strict=True)]
        sentences.append(
            f"Tuned {name} of {tune['policy']}: {', '.join(best)}; the best of {tried} values by the "
            f"objective {results.settings['objective']}, chosen with hindsight on this trace."
        )
    return sentences


def print_report(results: Results, out: IO[str]) -> None:
    """Print what was replayed, a line per row, what was tuned, the noise floor and the verdict.

    Raises MissingExtra without the extra ``mulsched[replay]``.
    """
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError as error:
        raise MissingExtra("tables need rich: pip install 'mulsched[replay]'") from error
    table = Table(title=setting(results), title_justify="left", title_style="", padding=(0, 1, 0, 0))
    columns = columns_of(results)
    table.add_column("policy", no_wrap=True)
    for name in columns:
        table.add_column(COLUMNS[name][0], justify="right", no_wrap=True)
    for rate in results.rates:
        for row in results.at(rate):
            table.add_row(row.label, *cells(row, columns))
        table.add_section()
    # wide enough for every column, so that a redirected table is not cut to 80
    Console(file=out, width=260).print(table)
    repeat, rate = results.settings["repeat"], results.reference_rate
    if repeat > 1:
        print(
            f"Means of {repeat} runs with other ties and seeds; ± is the 95 % interval by Student's t.",
            file=out,
        )
    for sentence in (slo_text(results), *tuned_text(results)):
        if sentence is not None:
            print(sentence, file=out)
    for sentence in verdict_by_rate(results):
        print(sentence, file=out)
    if len(results.rates) > 1:
        print(f"In detail at {results.at(rate)[0].offered_per_s:.3g} requests/s:", file=out)
    print(noise_text(results, rate), file=out)
    for sentence in verdict(results, rate):
        print(sentence, file=out)
