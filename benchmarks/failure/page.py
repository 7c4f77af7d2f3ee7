"""Write the results page and its plot from result files.

cd benchmarks && python -m failure.page [failure/results ../docs/failure-results.md]
"""

import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from failure.cases import CASES, CONSTANTS, DETECTORS, LOAD_ONLY, MITIGATIONS, REFERENCE
from failure.measures import JUDGED
from failure.tables import ALLOWED, Table, label, read

HERE = Path(__file__).parent
PARTS = ("calm", "burst", "thinking", "ties")
SHOWN = (
    ("TTFT mean", "ttft_mean_s", 1e3),
    ("p50", "ttft_p50_s", 1e3),
    ("p95", "ttft_p95_s", 1e3),
    ("p99", "ttft_p99_s", 1e3),
    ("TPOT mean", "tpot_mean_s", 1e3),
    ("p50", "tpot_p50_s", 1e3),
    ("p95", "tpot_p95_s", 1e3),
    ("p99", "tpot_p99_s", 1e3),
    ("req/s", "requests_per_s", 1.0),
    ("hit %", "hit_ratio", 100.0),
    ("requests max/mean", "spread", 1.0),
    ("back s, TTFT", "ttft_recovery_s", 1.0),
    ("back s, batch", "batch_recovery_s", 1.0),
)
JUDGED_NAMES = ("mean TTFT", "p99 TTFT", "mean TPOT", "p99 TPOT")


def main() -> None:
    from failure import plots  # needs matplotlib, the text does not

    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results"
    page = Path(sys.argv[2]) if len(sys.argv) > 2 else HERE.parents[1] / "docs" / "failure-results.md"
    tables = read(folder)
    plots.draw(tables, page.parent / "images")
    page.write_text(write(tables, readings()))


def readings() -> dict[str, str]:
    """Return the hand-written paragraphs by the heading they stand under."""
    parts = (HERE / "readings.md").read_text().split("\n## ")[1:]
    return {part.split("\n", 1)[0].strip(): part.split("\n", 1)[1].strip() for part in parts}


def write(tables: Sequence[Table], texts: dict[str, str]) -> str:
    """Return the page."""
    order = {case.name: place for place, case in enumerate(CASES)}
    cells = sorted(tables, key=lambda table: (order[table.case], table.load))
    by_part = {part: [table for table in cells if table.part == part] for part in PARTS}
    start = texts["Start"].format(
        replays=sum(len(table.rows) for table in cells),
        minutes=round(sum(table.body["cpu_s"] for table in cells) / 60),
        allowed=f"{100 * ALLOWED:g} %",
    )
    hot = [*by_part["burst"], *by_part["thinking"]]
    drawn = "\n\n".join(
        f"![Requests in flight on each instance, {table.name}](images/failure-{table.name}.png)"
        for table in cells
        if table.body["series"]
    )
    sections = [
        ("", start),
        ("What was replayed", texts["Set-up"] + "\n\n" + setups(cells)),
        ("Does LMetric lose?", texts["Losses"] + "\n\n" + losses(hot) + "\n\n" + drawn),
        ("Within 5 %?", texts["Verdicts"] + "\n\n" + verdicts(hot)),
        ("Where nothing is", texts["Frontier"] + "\n\n" + frontier(hot)),
        ("After the burst", texts["Recovery"] + "\n\n" + recoveries(hot)),
        ("Mitigations", texts["Mitigations"] + "\n\n" + variants(hot, MITIGATIONS)),
        ("Constants", texts["Constants"] + "\n\n" + variants([*hot, *by_part["calm"]], CONSTANTS)),
        ("No burst", texts["Calm"] + "\n\n" + losses(by_part["calm"])),
        ("Ties, zeros, late state", texts["Ties"] + "\n\n" + ties(by_part["ties"])),
        ("All figures", texts["Tables"] + "\n\n" + "\n\n".join(full(t) for t in cells if t.part != "ties")),
    ]
    body = "\n\n".join((f"## {title}\n\n" if title else "") + text.strip() for title, text in sections)
    return "# Hot prefixes: when LMetric herds\n\n" + body + "\n"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


def number(value: float) -> str:
    """Return a number with three digits; a dash for NaN."""
    if math.isnan(value):
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def percent(share: float) -> str:
    """Return a change in percent."""
    return f"{100 * share:+.0f} %" if abs(share) >= 0.0995 else f"{100 * share:+.1f} %"


def setups(cells: Sequence[Table]) -> str:
    rows = []
    for table in cells:
        body = table.body
        window = "-" if body["window"] is None else "{:g}-{:g}".format(*body["window"])
        rows.append(
            [
                table.name,
                f"`{body['workload']}`",
                str(body["kv_blocks"]),
                body["loop"],
                window,
                str(body["requests"]),
                number(body["offered_per_s"]),
                number(100 * body["hit_ratio"]),
            ]
        )
    header = ["cell", "workload", "KV blocks", "loop", "burst s", "requests", "req/s", "ideal hit %"]
    return markdown(header, rows)


def losses(cells: Sequence[Table]) -> str:
    """Return a row for each cell: load-only, and each detector, relative to LMetric, and the noise floor."""
    rows = []
    for table in cells:
        compared = [*table.load_only, *(spec for spec in DETECTORS if spec in table.policies)]
        for spec in compared:
            changes = [_change(table, spec, figure) for figure in JUDGED]
            rows.append([table.name, f"`{label(spec)}`", *changes])
        rows.append([table.name, "noise", *(f"± {100 * table.floor(f):.1f} %" for f in JUDGED)])
    return markdown(["cell", "policy", *JUDGED_NAMES], rows)


def _change(table: Table, spec: str, figure: str) -> str:
    """Return a policy's change relative to LMetric, bold where it is better by more than noise."""
    ratio = table.ratio(spec, figure)
    text = percent(ratio - 1)
    return f"**{text}**" if ratio < 1 / (1 + table.floor(figure)) else text


def verdicts(cells: Sequence[Table]) -> str:
    """Return a row for each cell: how far behind the better of LMetric and load-only the policies are."""
    rows = []
    for table in cells:
        fixed = [spec for spec in table.policies if spec not in DETECTORS]
        oracle, closest = table.oracle(fixed), table.closest(fixed)
        shown = [REFERENCE, *(spec for spec in DETECTORS if spec in table.policies)]
        rows.append(
            [
                table.name,
                *(f"{percent(table.worst(spec))} ({table.verdict(spec)})" for spec in shown),
                f"{label(oracle)}: {percent(table.worst(oracle))} ({table.verdict(oracle)})",
                f"{label(closest)}: {percent(table.worst(closest))} ({table.verdict(closest)})",
            ]
        )
    shown = [REFERENCE, *DETECTORS]
    return markdown(["cell", *(label(spec) for spec in shown), "oracle", "least behind of the fixed"], rows)


def frontier(cells: Sequence[Table]) -> str:
    """Return, for each cell in which no policy is within ``ALLOWED``, those that no other beats in all."""
    rows = []
    for table in cells:
        if any(table.verdict(spec) == "yes" for spec in table.policies):
            continue
        for spec in table.undominated():
            gaps = (percent(table.behind(spec, figure)) for figure in JUDGED)
            rows.append([table.name, f"`{label(spec)}`", *gaps])
    return markdown(["cell", "policy", *JUDGED_NAMES], rows)


def recoveries(cells: Sequence[Table]) -> str:
    """Return a row for each cell with a burst: each policy's recovery of TTFT and of the fullest batch."""
    shown = [REFERENCE, *LOAD_ONLY, *DETECTORS]
    rows = [
        [
            table.name,
            *(
                " / ".join(
                    _mean(table, spec, figure, 1.0) for figure in ("ttft_recovery_s", "batch_recovery_s")
                )
                for spec in shown
            ),
        ]
        for table in cells
        if table.body["window"]
    ]
    return markdown(["cell", *(f"`{label(spec)}`" for spec in shown)], rows)


def variants(cells: Sequence[Table], specs: Sequence[str]) -> str:
    """Return a row for each cell, and one for all: ours as it is, and other ones, relative to LMetric."""
    shown = [DETECTORS[0], *specs]
    rows = [
        [
            table.name,
            *(" / ".join(f"{100 * (table.ratio(s, f) - 1):+.0f}" for f in JUDGED) for s in shown),
        ]
        for table in cells
    ]
    for name, counted in (
        ("within 5 %", lambda table, spec: table.verdict(spec) == "yes"),
        ("or noise", lambda table, spec: table.verdict(spec) != "no"),
        ("mean TTFT at most +5 %", lambda table, spec: table.ratio(spec, JUDGED[0]) <= 1 + ALLOWED),
    ):
        rows.append([name, *(f"{sum(counted(table, spec) for table in cells)}" for spec in shown)])
    means = [math.fsum(math.log(table.objective(spec)) for table in cells) / len(cells) for spec in shown]
    rows.append(["mean of all", *(percent(math.exp(mean) - 1) for mean in means)])
    return markdown([f"of {len(cells)} cells", *(f"`{label(spec)}`" for spec in shown)], rows)


def ties(cells: Sequence[Table]) -> str:
    """Return a table for each cell: policies, tie rules and delays, means over the seeds."""
    return "\n\n".join(f"### {table.name}\n\n{_ties(table)}" for table in cells)


def _ties(table: Table) -> str:
    rows = []
    for spec, rule, delay in dict.fromkeys((r["spec"], r["ties"], r["delay_s"]) for r in table.rows):
        runs = [r for r in table.rows if (r["spec"], r["ties"], r["delay_s"]) == (spec, rule, delay)]
        name = f"`{label(spec)}`" + (f", ties {rule}" if rule else "")
        means = [number(1e3 * math.fsum(r[figure] for r in runs) / len(runs)) for figure in JUDGED]
        spread = number(math.fsum(r["request_spread"] for r in runs) / len(runs))
        rows.append([name, f"{1e3 * delay:g}", *means, spread])
    return markdown(["policy", "state late by ms", *JUDGED_NAMES, "requests max/mean"], rows)


def full(table: Table) -> str:
    """Return every policy's figures in a cell, means over the seeds."""
    columns = [column for column in SHOWN if table.body["window"] or "recovery" not in column[1]]
    rows = [
        [f"`{label(spec)}`", *(_mean(table, spec, _figure(table, f), unit) for _, f, unit in columns)]
        for spec in table.policies
    ]
    return f"### {table.name}\n\n" + markdown(["policy", *(name for name, _, _ in columns)], rows)


def _mean(table: Table, spec: str, figure: str, unit: float) -> str:
    """Return a figure's mean over the seeds, and of how many where not all have it."""
    runs = table.runs(spec)
    having = sum(row[figure] is not None for row in runs)
    text = number(unit * table.mean(spec, figure))
    return text if having in (0, len(runs)) else f"{text} ({having} of {len(runs)})"


def _figure(table: Table, figure: str) -> str:
    """Return the figure's name in rows: the spread is that of the burst where there is one."""
    if figure != "spread":
        return figure
    return "burst_spread" if table.body["window"] else "request_spread"


if __name__ == "__main__":
    main()
