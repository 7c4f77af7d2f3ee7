"""Alarms of the detectors: ``cd benchmarks && python -m failure.alarms [--data DIR]`` prints a table.

One seed a cell. Without a hot class every alarm is a false one.
"""

import argparse
from pathlib import Path

from failure.cases import CASES, DETECTORS, INSTANCES, PROFILE
from failure.run import HERE, case_is_here, saturating_scale
from mulsched import policies
from mulsched.replay import builtin_profile, replay

PARTS = ("calm", "burst", "thinking")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("traces"), help="folder of the real traces")
    data = parser.parse_args().data
    print("| cell | requests | " + " | ".join(f"`{name}`" for name in DETECTORS) + " |")
    print("| --- | ---: |" + " ---: |" * len(DETECTORS))
    for case in CASES:
        if case.part not in PARTS or (case.real and not case_is_here(case, data)):
            continue
        load = max(case.loads)
        scale = saturating_scale(case, data, HERE / "results")
        trace = case.trace(load * scale, seed=0, data=data)
        cells = []
        for name in DETECTORS:
            policy = policies.get(name)
            replay(
                trace,
                policy,
                profile=builtin_profile(PROFILE),
                instances=INSTANCES,
                kv_blocks=case.kv_blocks,
                loop=case.loop,
                in_flight="cached",
            )
            raised = policy.detector.alarms_raised
            cells.append(f"{raised} ({10_000 * raised / len(trace):.1f})")
        print(f"| {case.name}-{load:g} | {len(trace):,} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
