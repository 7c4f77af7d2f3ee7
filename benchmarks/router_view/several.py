"""What several routers lose to one: ``cd benchmarks && PYTHONPATH=.:paper python -m router_view.several``.

LMetric on one router, and on several that take requests by turns, by the replay's Python loop: all hear every
KV event at once, and poll the load (``--poll``, 1 s). Prints a Markdown table over one router.
"""

import argparse
from pathlib import Path

import numpy as np
from failure.cases import CASES, INSTANCES, PROFILE, Case

from mulsched import policies
from mulsched.replay import builtin_profile
from router_view.run import SEEDS, trace_of
from router_view.views import SeveralRouters, options_for, replay_with

FIGURES = ("mean TTFT", "p99 TTFT", "mean TPOT", "p99 TPOT", "hit ratio")


def figures(
    case: Case, routers: int, seed: int, *, duration_s: float, poll_s: float, ties: str | None = None
) -> list[float]:
    """Return the figures of one replay, in the order of ``FIGURES``."""
    profile = builtin_profile(PROFILE)
    trace = trace_of(case, seed, Path()).slice(0.0, duration_s)
    options = options_for(
        policies.get("lmetric"),
        profile,
        kv_blocks=case.kv_blocks or profile.kv_blocks,
        instances=INSTANCES,
        seed=seed,
        ties=ties,
        closed=case.loop == "closed",
    )
    records, _ = replay_with(lambda **given: SeveralRouters(routers, poll_s=poll_s, **given), trace, options)
    ttft = records.first_token_s - records.arrival_s
    several = trace.output_tokens > 1
    tpot = (records.finish_s - records.first_token_s)[several] / (trace.output_tokens[several] - 1)
    values = (ttft.mean(), np.percentile(ttft, 99), tpot.mean(), np.percentile(tpot, 99))
    return [*map(float, values), float(records.cached_tokens.sum() / trace.prompt_tokens.sum())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=("chat", "coder"), metavar="NAME")
    parser.add_argument("--routers", nargs="+", type=int, default=(2, 4), metavar="N")
    parser.add_argument("--duration", type=float, default=60.0, metavar="S")
    parser.add_argument("--poll", type=float, default=1.0, metavar="S")
    options = parser.parse_args()
    times = {"duration_s": options.duration, "poll_s": options.poll}
    by_name = {case.name: case for case in CASES}
    print("| case | routers | " + " | ".join(FIGURES) + " |\n" + "| --- " * (2 + len(FIGURES)) + "|")
    for name in options.cases:
        case = by_name[name]
        one = np.array([figures(case, 1, seed, **times) for seed in SEEDS])
        for view in ("noise", *options.routers):
            n, ties = (1, "random") if view == "noise" else (view, None)
            rows = np.array([figures(case, n, seed, ties=ties, **times) for seed in SEEDS])
            changes = np.exp(np.log(rows[:, :4] / one[:, :4]).mean(axis=0)) - 1
            cells = [f"{100 * change:+.1f} %" for change in changes]
            cells.append(f"{(rows[:, 4] - one[:, 4]).mean():+.3f}")
            print(f"| {name} | {view} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
