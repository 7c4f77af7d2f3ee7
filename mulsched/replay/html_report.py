"""A page of an experiment: one HTML file that needs nothing else."""

import base64
from importlib.resources import files
from pathlib import Path
from typing import Any

from mulsched.errors import MissingExtra
from mulsched.replay.plots import Plot, plots_of, render
from mulsched.replay.report import COLUMNS, cells, columns_of, slo_text, tuned_text
from mulsched.replay.results import RequestReader, Results, Row
from mulsched.replay.shown import load_shown
from mulsched.replay.verdict import noise_text, setting, verdict, verdict_by_rate

__all__ = ["write_page", "write_pngs"]


def write_page(directory: Path, page: Path) -> None:
    """Write the page of the results in a directory; the same results give the same bytes.

    Raises ResultsError, MissingExtra without the extra ``mulsched[report]``.
    """
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise MissingExtra("the page needs jinja2: pip install 'mulsched[report]'") from error
    results = Results.load(directory)
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        files("mulsched.replay").joinpath("report.html").read_text()
    )
    plots = [_figure(plot) for plot in _plots(results, directory)]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(template.render(_content(results), plots=plots))


def write_pngs(directory: Path, target: Path) -> list[Path]:
    """Write the plots of the results in a directory as PNG files and return their paths.

    Raises as :func:`write_page`.
    """
    results = Results.load(directory)
    target.mkdir(parents=True, exist_ok=True)
    paths = []
    for plot in _plots(results, directory, footer=_context(results)):
        paths.append(target / f"{plot.name}.png")
        paths[-1].write_bytes(render(plot, "png"))
    return paths


def _plots(results: Results, directory: Path, *, footer: str = "") -> list[Plot]:
    requests = RequestReader(directory)
    try:
        shown = load_shown(results, requests)
    finally:
        requests.close()
    return plots_of(results, shown, footer=footer)


def _figure(plot: Plot) -> dict[str, str]:
    svg = base64.b64encode(render(plot, "svg")).decode()
    width = "wide" if plot.figure.get_figwidth() > 7 else "half"
    return {
        "id": plot.name,
        "title": plot.title,
        "caption": plot.caption,
        "alt": plot.alt,
        "source": f"data:image/svg+xml;base64,{svg}",
        "width": width,
    }


def _context(results: Results) -> str:
    """Return what a plot must say to be understood alone."""
    s = results.settings
    where = f" at {_offered(results)}" if len(results.rates) > 1 else ""
    return (
        f"{setting(results)}; modelled engines, mulsched {s['mulsched']}. "
        f"{noise_text(results, results.reference_rate).rstrip('.')}{where}."
    )


def _offered(results: Results) -> str:
    return f"{results.at(results.reference_rate)[0].offered_per_s:.3g} requests/s"


def _content(results: Results) -> dict[str, Any]:
    columns = columns_of(results)
    others = [row for row in results.rows if row.role in ("trial", "noise")]
    s = results.settings
    return {
        "title": f"Replay of {s['trace']}",
        "setting": setting(results),
        "context": _context(results),
        "verdict": verdict(results, results.reference_rate),
        "by_rate": verdict_by_rate(results),
        "at": _offered(results) if len(results.rates) > 1 else None,
        "noise": noise_text(results, results.reference_rate),
        "tuned": tuned_text(results),
        "heads": [COLUMNS[name][0].split("\n") for name in columns],
        "groups": [[_table_row(row, columns) for row in results.at(rate)] for rate in results.rates],
        "others": [_table_row(row, columns) for row in others],
        "settings": _settings(results),
        "notes": s["notes"],
        "repeat": s["repeat"],
        "slo": slo_text(results),
        "command": s["command"],
        "version": s["mulsched"],
    }


def _table_row(row: Row, columns: list[str]) -> dict[str, Any]:
    kind = {"trial": "trial", "noise": "noise floor"}.get(row.role, "")
    return {"label": row.label, "kind": kind, "cells": [text.split(" ") for text in cells(row, columns)]}


def _settings(results: Results) -> dict[str, str]:
    """Return every setting of results.json as text, but those that the page shows elsewhere."""
    shown: dict[str, str] = {}
    for name, value in results.settings.items():
        if name in ("notes", "command", "mulsched"):
            continue
        shown[name] = _text(value) or "none"
    return shown


def _text(value: Any) -> str:
    """Return a JSON value as prose."""
    if isinstance(value, dict):
        return "; ".join(f"{name} {_text(v)}" for name, v in value.items() if v is not None)
    if isinstance(value, list):
        return ", ".join(_text(v) for v in value)
    return "" if value is None else str(value)
