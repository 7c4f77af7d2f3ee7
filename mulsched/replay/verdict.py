"""What the figures say in words: which differences are more than noise."""

import math
from collections.abc import Mapping

from mulsched.replay.confidence import PUBLISHED_NOISE, welch_half_width
from mulsched.replay.results import Results, Row

__all__ = ["COMPARED", "noise_floor", "noise_text", "setting", "verdict", "verdict_by_rate"]

COMPARED: Mapping[str, str] = {
    "ttft_mean_s": "mean TTFT",
    "ttft_p99_s": "p99 TTFT",
    "tpot_mean_s": "mean TPOT",
    "tpot_p99_s": "p99 TPOT",
    "goodput_per_s": "goodput",
}
"""Figures that a verdict compares, by their names in prose; the goodput only where there is an SLO."""


def _reference(results: Results, rate_scale: float) -> tuple[Row, Row | None]:
    """Return the row whose noise is known, and the row that repeats it."""
    rows = results.at(rate_scale)
    repeat = next(iter(results.at(rate_scale, "noise")), None)
    if repeat is not None:
        return next(row for row in rows if row.label == repeat.label), repeat
    return next((row for row in rows if row.role == "result"), rows[0]), None


def noise_floor(results: Results, rate_scale: float) -> dict[str, float]:
    """Return by how much, as a ratio, the first policy's figures move by chance alone; {} if not measured.

    With repeats: half the width of the 95 % confidence interval of a difference between two means of that
    many runs with its spread. With a second run only: the difference between the two.
    """
    row, repeat = _reference(results, rate_scale)
    if repeat is not None:
        moved = {name: repeat.figures[name] - row.figures[name] for name in row.figures}
    elif len(row.runs) > 1:
        values = {name: results.values(row, name) for name in row.figures}
        moved = {name: welch_half_width(v, v) for name, v in values.items()}
    else:
        return {}
    return {name: abs(moved[name] / v) if v else math.nan for name, v in row.figures.items()}


def noise_text(results: Results, rate_scale: float) -> str:
    """Return the noise floor as a sentence."""
    floor = noise_floor(results, rate_scale)
    if not floor:
        mean, p99 = PUBLISHED_NOISE["mean"], PUBLISHED_NOISE["p99"]
        return f"Noise floor not measured; taken as published for tie order: means {mean:.1%}, p99 {p99:.1%}."
    row, repeat = _reference(results, rate_scale)
    how = (
        "with other ties and seed moves"
        if repeat is not None
        else f"differs between two sets of {len(row.runs)} runs (95 %) by up to"
    )
    moved = ", ".join(f"{text} {floor[name]:.1%}" for name, text in COMPARED.items() if name in floor)
    return f"Noise floor: {row.label} {how} {moved}."


def _is_noise(results: Results, one: Row, other: Row, figure: str) -> bool:
    """Whether a difference between two rows of the same rate may be chance."""
    apart = abs(one.figures[figure] - other.figures[figure])
    if len(one.runs) > 1 and len(other.runs) > 1:
        return apart <= welch_half_width(results.values(one, figure), results.values(other, figure))
    measured = noise_floor(results, one.rate_scale).get(figure, 0.0)
    published = PUBLISHED_NOISE["p99" if "p99" in figure else "mean"]
    # one difference says little of how large they get, so the published one is the least
    return apart <= max(published, 0.0 if math.isnan(measured) else measured) * abs(one.figures[figure])


def _ranked(results: Results, rate_scale: float, figure: str) -> list[Row]:
    """Return the rows that have the figure, the best first."""
    rows = [r for r in results.at(rate_scale) if not math.isnan(r.figures.get(figure, math.nan))]
    return sorted(rows, key=lambda row: row.figures[figure], reverse=figure == "goodput_per_s")


def _figure_text(name: str, value: float) -> str:
    """Return a figure with its unit, as in prose."""
    if math.isnan(value):
        return "-"
    if name.endswith("_s") and not name.endswith("_per_s"):
        return f"{1000 * value:,.{0 if name.startswith('ttft') else 1}f} ms"
    return f"{value:.2f} requests/s" if name.endswith("_per_s") else f"{value:.3f}"


def verdict(results: Results, rate_scale: float) -> list[str]:
    """Return what the rows of a rate say in plain sentences: a summary, then one for each figure.

    With repeats, two rows differ where the 95 % confidence interval of the difference of their means
    (Welch's t) leaves out zero. Without, where the difference is more than the noise floor, of which
    published figures are the least. No correction is made for comparing many rows.
    """
    rows = results.at(rate_scale)
    if len(rows) < 2:
        return [f"Only {rows[0].label} was replayed: there is nothing to compare it with."]
    sentences: list[str] = []
    behind: dict[str, list[float]] = {row.label: [] for row in rows}
    for figure, text in COMPARED.items():
        ranked = _ranked(results, rate_scale, figure)
        if len(ranked) < 2:
            continue
        best, *others = ranked
        near = [row for row in others if _is_noise(results, best, row, figure)]
        far = [row for row in others if row not in near]
        sentences.append(_sentence(figure, text, best, near, far))
        for row in rows:
            behind[row.label].append(_apart(best, row, figure) if row in far else 0.0)
    if not sentences:
        return ["No figure exists for two policies: there is nothing to compare."]
    return [_summary(behind, len(sentences)), *sentences]


def verdict_by_rate(results: Results) -> list[str]:
    """Return the summary of each rate's verdict, if there are several rates."""
    if len(results.rates) == 1:
        return []
    return [
        f"At {results.at(rate)[0].offered_per_s:.3g} requests/s: {verdict(results, rate)[0]}"
        for rate in results.rates
    ]


def _apart(best: Row, row: Row, figure: str) -> float:
    """Return how far a row is behind the best, as a ratio of the best."""
    value = best.figures[figure]
    return abs(row.figures[figure] / value - 1) if value else math.inf


def _percent(ratio: float) -> str:
    return f"{ratio:.1%}" if math.isfinite(ratio) else "without bound"


def _sentence(figure: str, text: str, best: Row, near: list[Row], far: list[Row]) -> str:
    more_is_better = figure == "goodput_per_s"
    word, value = "highest" if more_is_better else "lowest", _figure_text(figure, best.figures[figure])
    sentence = f"{text[0].upper()}{text[1:]} is {word} under {best.label}, {value}"
    if near:
        sentence += "; within noise of it: " + ", ".join(row.label for row in near)
    if far:
        size = _percent(_apart(best, far[0], figure))
        sentence += f"; the next, {far[0].label}, is {size} {'below' if more_is_better else 'above'}"
    return sentence + "."


def _summary(behind: dict[str, list[float]], n: int) -> str:
    """Say who leads; ``behind``: by how much each label is behind the best in each of n figures."""
    always = [label for label, gaps in behind.items() if not any(gaps)]
    if len(always) == len(behind):
        return f"Nothing separates these policies: all differences in all {n} figures are within noise."
    if len(always) == 1:
        return f"{always[0]} is best or within noise of the best in all {n} figures; no other policy is."
    if always:
        names = f"{', '.join(always[:-1])} and {always[-1]}"
        return f"{names} are each best or within noise of the best in all {n} figures."
    most = max(gaps.count(0.0) for gaps in behind.values())
    leaders = [
        f"{label} ({_percent(max(gaps))} behind at worst)"
        for label, gaps in behind.items()
        if gaps.count(0.0) == most
    ]
    return (
        f"No policy is best in all {n} figures. Best or within noise of the best in {most} of them: "
        f"{', '.join(leaders)}."
    )


def setting(results: Results) -> str:
    """Return in one line what was replayed, and on what."""
    s = results.settings
    counts = sorted({run.requests for run in results.runs})
    requests = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    return (
        f"{s['trace']}{' (synthetic)' if s['synthetic'] else ''}: {requests} requests, "
        f"{s['instances']} instances x {s['kv_blocks']} blocks, {s['profile']}, "
        f"{s['loop']} loop, cache {s['cache_source']}, seed {s['seed']}"
    )
