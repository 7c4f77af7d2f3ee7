"""Reports of replays: a table for people, JSON and CSV for programs."""

import csv
import io
import json
import math
from collections.abc import Sequence
from typing import IO

from mulsched.errors import MissingExtra
from mulsched.replay.simulator import ReplayResult

__all__ = ["PUBLISHED_NOISE", "noise_floor", "print_table", "records", "to_csv", "to_json"]

PUBLISHED_NOISE = (
    "Independent tests of LMetric saw tie order alone move mean TTFT by 1.3-2.3 % and p99 by 2.4-6.2 %: "
    "read nothing into less."
)

_LABELS = (
    ("trace", "trace"),
    ("synthetic", "synthetic"),
    ("policy", "policy"),
    ("profile", "profile"),
    ("seed", "seed"),
    ("ties", "ties"),
    ("instances", "instances"),
    ("kv_blocks", "kv_blocks"),
    ("loop", "loop"),
    ("cache_source", "cache_source"),
)


def records(results: Sequence[ReplayResult]) -> list[dict[str, object]]:
    """Return one flat record per result: what was replayed, and the figures of ``summary()``."""
    return [
        {name: getattr(result, attribute) for name, attribute in _LABELS}
        | {"policy": result.label, "requests": len(result.arrival_s)}
        | result.summary()
        for result in results
    ]


def noise_floor(result: ReplayResult, repeated: ReplayResult) -> dict[str, float]:
    """Return how far the same policy moves when ties fall otherwise: relative differences by figure."""
    first, second = result.summary(), repeated.summary()
    return {
        name: abs(second[name] / first[name] - 1) if first[name] else math.nan
        for name in ("ttft_mean_s", "ttft_p99_s", "tpot_mean_s", "tpot_p99_s")
    }


def to_json(results: Sequence[ReplayResult], noise: dict[str, float] | None) -> str:
    """Return the records as JSON; a figure that does not exist is null."""
    cleaned = [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        for record in records(results)
    ]
    return json.dumps({"results": cleaned, "noise_floor": noise}, indent=2)


def to_csv(results: Sequence[ReplayResult]) -> str:
    """Return the records as CSV with a header."""
    rows = records(results)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def print_table(results: Sequence[ReplayResult], noise: dict[str, float] | None, out: IO[str]) -> None:
    """Print what was replayed, a row per policy, and the noise floor.

    Raises MissingExtra without the extra ``mulsched[replay]``.
    """
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError as error:
        raise MissingExtra("tables need rich: pip install 'mulsched[replay]'") from error
    first = results[0]
    title = (
        f"{first.trace}{' (synthetic)' if first.synthetic else ''}: {len(first.arrival_s)} requests, "
        f"{first.instances} instances x {first.kv_blocks} blocks, {first.profile}, "
        f"{first.loop} loop, cache {first.cache_source}, seed {first.seed}"
    )
    table = Table(title=title, title_justify="left", title_style="", padding=(0, 1, 0, 0))
    heads = ["policy", *(f"{m}\n{q}" for m in ("TTFT ms", "TPOT ms") for q in ("mean", "p50", "p95", "p99"))]
    for head in (*heads, "req/s", "tok/s", "hit\nratio", "requests\nmax/mean", "prefill\nmax/mean"):
        table.add_column(head, justify="left" if head == "policy" else "right", no_wrap=True)
    for result in results:
        figures = result.summary()
        times = [
            f"{1000 * figures[f'{metric}_{q}_s']:.{digits}f}"
            for metric, digits in (("ttft", 0), ("tpot", 1))
            for q in ("mean", "p50", "p95", "p99")
        ]
        table.add_row(
            result.label,
            *times,
            f"{figures['requests_per_s']:.2f}",
            f"{figures['output_tokens_per_s']:.0f}",
            f"{figures['hit_ratio']:.3f}",
            f"{figures['request_spread']:.2f}",
            f"{figures['prefill_spread']:.2f}",
        )
    # wide enough for every column, so that a redirected table is not cut to 80
    Console(file=out, width=200).print(table)
    if noise is not None:
        moved = ", ".join(f"{name.removesuffix('_s')} {value:.1%}" for name, value in noise.items())
        print(f"Noise floor: {first.label} with other ties and seed moves {moved}.", file=out)
    print(PUBLISHED_NOISE, file=out)
