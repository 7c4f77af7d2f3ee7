"""Write the results page and its plots from result files.

python benchmarks/paper/page.py DIR docs/results.md
"""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import claims
import rules
from results import SWEPT, Table, read

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
    ("requests max/mean", "request_spread", 1.0),
    ("prefill max/mean", "prefill_spread", 1.0),
)
NAMES = {
    "ttft_mean_s": "mean TTFT",
    "ttft_p50_s": "p50 TTFT",
    "ttft_p95_s": "p95 TTFT",
    "ttft_p99_s": "p99 TTFT",
    "tpot_mean_s": "mean TPOT",
    "tpot_p99_s": "p99 TPOT",
}
STALE_FIGURES = ("ttft_mean_s", "tpot_mean_s")


def main() -> None:
    import plots  # needs matplotlib, the text does not

    folder, page = Path(sys.argv[1]), Path(sys.argv[2])
    rates, tables = read(folder)
    images = page.parent / "images"
    images.mkdir(exist_ok=True)
    drawn = plots.draw(tables, images)
    page.write_text(write(rates, tables, drawn, readings(Path(__file__).with_name("readings.md"))))


def readings(path: Path) -> Mapping[str, str]:
    """Return the hand-written paragraphs by the heading they stand under."""
    parts = path.read_text().split("\n## ")[1:]
    return {part.split("\n", 1)[0].strip(): part.split("\n", 1)[1].strip() for part in parts}


def write(
    rates: Mapping[str, Any], tables: Mapping[str, Table], drawn: Iterable[str], texts: Mapping[str, str]
) -> str:
    """Return the page."""
    cells = list(tables.values())
    pictures = set(drawn)
    bodies = [*rates.values(), *(table.body for table in cells)]
    # a default that is on its grid too has two rows and one run
    once = sum(len({(r["label"], r["seed"], r["delay_s"], r["loss"]) for r in t.rows}) for t in cells)
    start = texts["Start"].format(
        replays=once + sum(len(body["trials"]) for body in rates.values()),
        minutes=round(sum(body["cpu_s"] for body in bodies) / 60),
    )
    sections = [
        ("", start),
        ("The paper's figures", texts["Headline"] + "\n\n" + headline(cells) + "\n\n" + texts["Reasons"]),
        ("Where LMetric loses", losing(cells) + "\n\n" + texts["Losing"] + picture(pictures, "overview")),
        ("What was replayed", texts["Set-up"] + "\n\n" + setups(rates)),
        ("Half of the maximum rate", texts["Tables"] + "\n\n" + full(cells, "main")),
        ("Weights", tuning(cells) + "\n\n" + texts["Weights"] + picture(pictures, "weights")),
        ("Up to saturation", sweep(cells) + "\n\n" + texts["Sweep"] + picture(pictures, "rates")),
        ("Cases meant to hurt", texts["Cases"] + "\n\n" + full(cells, "losing")),
        ("What each part is worth", ablation(cells) + "\n\n" + texts["Ablation"]),
        ("Late and lost state", stale(cells) + "\n\n" + texts["Stale"] + picture(pictures, "stale")),
    ]
    head = "# Results: the LMetric paper's comparison, replayed\n\n"
    body = "\n\n".join((f"## {title}\n\n" if title else "") + text.strip() for title, text in sections)
    return head + body + "\n"


def picture(drawn: set[str], name: str) -> str:
    captions = {
        "overview": "Mean TTFT and TPOT of every policy relative to LMetric",
        "weights": "The linear score's weight, with LMetric's line across",
        "rates": "Mean TTFT and TPOT against the rate",
        "stale": "TTFT and TPOT against the delay of state",
    }
    return f"\n\n![{captions[name]}](images/paper-{name}.png)" if name in drawn else ""


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """Return a number with three digits."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"


def percent(share: float) -> str:
    return f"{100 * share:+.0f} %" if abs(share) >= 0.0995 else f"{100 * share:+.1f} %"


def setups(rates: Mapping[str, Any]) -> str:
    rows = []
    for body in rates.values():
        setup, trace = body["setup"], body["trace"]
        rows.append(
            [
                setup["trace"] + ("" if trace["synthetic"] else " (real)"),
                {"qwen2": "Qwen2-7B", "qwen3": "Qwen3-30B-A3B"}[setup["profile"]],
                str(setup["instances"]),
                str(setup["kv_blocks"]),
                setup["loop"],
                str(trace["requests"]),
                f"{trace['duration_s']:.0f}",
                f"{trace['input_mean']:.0f}",
                f"{trace['output_mean']:.0f}",
                f"{100 * trace['hit_ratio']:.0f}",
                number(body["scale"]),
                number(body["offered_per_s"]),
            ]
        )
    header = ["trace", "model", "instances", "KV blocks", "loop", "requests", "span s", "input mean"]
    header += ["output mean", "ideal hit %", "max scale", "max req/s"]
    notes = dict.fromkeys(
        f"- {b['setup']['trace']}: {n}" for b in rates.values() for n in b["trace"]["notes"]
    )
    return markdown(header, rows) + "\n\nNotes of the traces:\n\n" + "\n".join(notes)


def headline(cells: Sequence[Table]) -> str:
    """Return a row for each of the paper's figures with the verdict."""
    rows = []
    for claim in claims.CLAIMS:
        found = claims.evidence(claim, cells)
        changes = [change for _, change in found]
        each = "; ".join(
            f"{trace} " + " / ".join(percent(change) for table, change in found if table.trace == trace)
            for trace in dict.fromkeys(table.trace for table, _ in found)
        )
        swept = [
            (table.gain(claim.baseline, claim.figure), table)
            for table in cells
            if table.stage == "sweep" and claim.baseline in table.others and table.trace in claim.traces
        ]
        lowest = min(swept, key=lambda pair: pair[0], default=None) if claim.paper < 0 else None
        furthest = f"{percent(lowest[0])} ({lowest[1].trace} at {lowest[1].load:g})" if lowest else "-"
        rows.append(
            [
                claim.source,
                f"{NAMES[claim.figure]} against `{claim.baseline}`",
                "similar" if claim.paper == 0 else percent(claim.paper),
                each or "-",
                furthest,
                f"**{claims.judge(claim, changes)}**",
            ]
        )
    header = [
        "source",
        "figure",
        "paper",
        "at half of the maximum, Qwen2 / Qwen3",
        "largest in the sweep",
        "verdict",
    ]
    return markdown(header, rows)


def losing(cells: Sequence[Table]) -> str:
    """Return the rule's verdict: who beats LMetric where, by more than the noise floor."""
    judged = [table for table in cells if table.stage in ("main", "losing", "sweep")]
    rows = []
    unbeaten = 0
    for table in judged:
        found = claims.losses(table)
        unbeaten += sum(not beaten for beaten in found.values())
        best = [_most(found[figure], len(table.others)) for figure in rules.JUDGED]
        both = claims.better_in_both(table)
        rows.append([f"{table.title}, load {table.load:g}", *best, ", ".join(both) or "-"])
    pairs = len(judged) * len(rules.JUDGED)
    counts = (
        f"In {pairs - unbeaten} of {pairs} pairs of a case and a figure some policy beats LMetric by more "
        f"than the noise floor; in {unbeaten} none does.\n"
        f"In {sum(row[-1] != '-' for row in rows)} of {len(judged)} cases a policy beats it in mean TTFT and "
        "mean TPOT together.\n"
        "In each cell: the policy that beats LMetric by most, its change relative to LMetric, and how many "
        "policies beat it."
    )
    header = ["case", *(NAMES[f] for f in rules.JUDGED), "better in both means"]
    return f"{counts}\n\n{markdown(header, rows)}\n\n{_by_policy(judged)}"


def _most(beaten: Sequence[tuple[float, str]], policies: int) -> str:
    if not beaten:
        return f"none of {policies}"
    share, name = beaten[0]
    return f"**{name} {percent(share)}** ({len(beaten)} of {policies})"


def _by_policy(judged: Sequence[Table]) -> str:
    """Return how often each policy is better and worse than LMetric, and as good, by figure."""
    rows = []
    for name in sorted({name for table in judged for name in table.others}):
        having = [table for table in judged if name in table.others]
        row = [name, str(len(having))]
        for figure in rules.JUDGED:
            outcomes = Counter(table.compare(name, figure) for table in having)
            row.append(f"{outcomes['better']} / {outcomes['same']} / {outcomes['worse']}")
        rows.append(row)
    text = "How often each policy is better / within the noise / worse, over the same cases:"
    return text + "\n\n" + markdown(["policy", "cases", *(NAMES[f] for f in rules.JUDGED)], rows)


def full(cells: Sequence[Table], stage: str) -> str:
    """Return a table for each cell of a stage: every policy, every figure."""
    return "\n\n".join(_full(table) for table in cells if table.stage == stage)


def _full(table: Table) -> str:
    body = table.body
    rate = f"{number(body['offered_per_s'])} a second, scale {number(body['scale'])}, open loop"
    if body["setup"]["loop"] == "closed":
        rate = f"closed loop, sessions start {number(body['scale'])} times as fast as in the trace"
    head = (
        f"### {table.title}, load {table.load:g}\n\n"
        f"{body['requests']} requests; {rate}; {body['setup']['kv_blocks']} KV blocks, seed 0; times in ms."
    )
    reference = [number(table.reference(f) * unit) for _, f, unit in SHOWN]
    interval = [f"± {number(table.interval(f) * unit)}" for _, f, unit in SHOWN]
    floor = [f"{100 * table.floor(f):.1f} %" for _, f, _ in SHOWN]
    rows = [
        [f"**lmetric**, mean of {len(table.repeats)}", *reference],
        ["its 95 % interval", *interval],
        ["noise floor", *floor],
    ]
    for name in sorted(table.others, key=lambda name: rules.objective(table.others[name])):
        row = table.others[name]
        label = f"{name}: {row['label'].split('(', 1)[1][:-1]}" if name.endswith("tuned") else name
        rows.append([label, *(_mark(table, name, f, unit) for _, f, unit in SHOWN)])
    return head + "\n\n" + markdown(["policy", *(name for name, _, _ in SHOWN)], rows)


def _mark(table: Table, name: str, figure: str, unit: float) -> str:
    """Return a figure; bold if it is better than LMetric's, with ≈ if it is within the noise floor."""
    text = number(table.others[name][figure] * unit)
    if not figure.startswith(("ttft", "tpot")):
        return text
    return {"better": f"**{text}**", "same": f"≈ {text}", "worse": text}[table.compare(name, figure)]


def tuning(cells: Sequence[Table]) -> str:
    rows = []
    for table in cells:
        for policy in dict.fromkeys(row["policy"] for row in table.rows if row["role"] == "trial"):
            trials = table.trials(policy)
            if len(trials) < 2:
                continue
            ours = rules.objective({f: table.reference(f) for f in STALE_FIGURES})
            values = [(next(iter(t["parameters"].values())), rules.objective(t) / ours) for t in trials]
            best = min(values, key=lambda pair: pair[1])
            floor = max(table.floor(f) for f in STALE_FIGURES)
            rows.append(
                [
                    f"{table.title}, load {table.load:g}",
                    f"{policy} ({next(iter(trials[0]['parameters']))})",
                    "; ".join(f"{weight:g}: {value:.2f}" for weight, value in values),
                    f"{best[0]:g}",
                    f"{best[1]:.2f}" + (" ≈" if abs(best[1] - 1) <= floor else ""),
                    f"{max(v for _, v in values):.2f}",
                ]
            )
    header = ["case", "policy", "weight: objective over LMetric's", "best weight", "best", "worst"]
    return markdown(header, rows)


def sweep(cells: Sequence[Table]) -> str:
    """Return LMetric's figures at each load, and those of the others relative to them."""
    rows = []
    swept = {table.title for table in cells if table.stage == "sweep"}
    chosen = [t for t in cells if t.title in swept and t.stage in ("sweep", "main")]
    for table in sorted(chosen, key=lambda t: (t.title, t.load)):
        for figure in rules.JUDGED:
            cells_ = [_relative(table, name, figure) for name in table.swept]
            rows.append(
                [
                    f"{table.title}, load {table.load:g}",
                    NAMES[figure],
                    number(table.reference(figure) * 1e3),
                    f"{100 * table.floor(figure):.1f} %",
                    *cells_,
                ]
            )
    return markdown(["case", "figure", "lmetric, ms", "noise floor", *SWEPT], rows)


def _relative(table: Table, name: str, figure: str) -> str:
    text = percent(table.change(name, figure))
    return {"better": f"**{text}**", "same": f"≈ {text}", "worse": text}[table.compare(name, figure)]


def ablation(cells: Sequence[Table]) -> str:
    rows = []
    figures = ("ttft_mean_s", "ttft_p50_s", "ttft_p95_s", "ttft_p99_s", "tpot_mean_s", "tpot_p99_s")
    for table in cells:
        if table.stage != "ablation":
            continue
        floors = [f"{100 * table.floor(f):.1f} %" for f in figures]
        rows.append([f"{table.title}, load {table.load:g}", "noise floor", *floors, ""])
        rows.append(["", "`lmetric`, ms and %", *(number(table.reference(f) * 1e3) for f in figures)])
        rows[-1].append(f"{100 * table.reference('hit_ratio'):.1f}")
        for name, row in table.others.items():
            hit = f"{100 * row['hit_ratio']:.1f}"
            rows.append(["", f"`{name}`", *(_relative(table, name, f) for f in figures), hit])
    return markdown(["case", "score", *(NAMES[f] for f in figures), "hit %"], rows)


def stale(cells: Sequence[Table]) -> str:
    """Return mean TTFT and TPOT against delay and loss, relative to LMetric on fresh state."""
    parts = []
    for table in cells:
        if table.stage != "stale":
            continue
        rows = []
        delays = sorted({row["delay_s"] for row in table.rows})
        fresh = table.repeats[0]
        for label, loss in dict.fromkeys((row["label"], row["loss"]) for row in table.rows):
            runs = [r for r in table.rows if r["label"] == label and r["loss"] == loss]
            cells_ = [
                " / ".join(f"{r[f] / fresh[f]:.2f}" for f in ("ttft_mean_s", "ttft_p99_s", "tpot_mean_s"))
                + f" / {100 * r['hit_ratio']:.0f}"
                for r in sorted(runs, key=lambda r: r["delay_s"])
            ]
            rows.append([label, f"{100 * loss:g} %", *cells_])
        at = ", ".join(number(fresh[f] * 1e3) for f in ("ttft_mean_s", "ttft_p99_s", "tpot_mean_s"))
        head = (
            f"### {table.title}, load {table.load:g}\n\n"
            f"Mean TTFT / p99 TTFT / mean TPOT, each over LMetric's on fresh state ({at} ms), "
            "and hit ratio in %; seed 0, one run each."
        )
        head += noise_of(cells, table)
        header = ["policy", "events lost", *(f"{1e3 * d:.0f} ms late" for d in delays)]
        parts.append(head + "\n\n" + markdown(header, rows))
    return "\n\n".join(parts)


def noise_of(cells: Sequence[Table], table: Table) -> str:
    """Return the noise floors of the main table of the same setup, which one run has not."""
    for other in cells:
        if other.stage == "main" and other.title == table.title and other.load == table.load:
            floors = ", ".join(
                f"{100 * other.floor(f):.1f} %" for f in ("ttft_mean_s", "ttft_p99_s", "tpot_mean_s")
            )
            return f" Noise floor (main table): {floors}."
    return ""


if __name__ == "__main__":
    main()
