"""Run the benchmarks and print a Markdown table of medians, targets and ratios.

python benchmarks/summary.py [pytest arguments]
"""

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent

# What the native core is held to, by benchmark: microseconds at most,
TARGETS_US = {
    "bench_array[native]": 5,
    "bench_match[native-hit]": 3,
    "bench_match[native-partial]": 3,
    "bench_match[native-miss]": 3,
    "bench_route[fused]": 15,
    "bench_select[numpy score]": 40,
}
# million blocks a second at least,
TARGETS_RATE = {"bench_store_events[native]": 5}
# and bytes a block and instance at most.
TARGETS_BYTES = {"bench_memory[native-named]": 40}


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pytest", str(FOLDER), "-q", f"--benchmark-json={report}"]
        done = subprocess.run([*command, *sys.argv[1:]], cwd=FOLDER.parent, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(done.stdout, file=sys.stderr)
            return done.returncode
        benchmarks = json.loads(report.read_text())["benchmarks"]
    print(f"Python {platform.python_version()}, {platform.machine()}, medians of one thread\n")
    print("| benchmark | case | median us | to the first of its kind | target | also |")
    print("| --- | --- | ---: | ---: | ---: | --- |")
    first: dict[str, float] = {}
    for benchmark in benchmarks:
        print(row(benchmark, first))
    return 0


def row(benchmark: dict[str, Any], first: dict[str, float]) -> str:
    """Return the table's line; ``first`` keeps the first cost of each kind, which is the native one."""
    name, group, extra = benchmark["name"], benchmark["group"], benchmark["extra_info"]
    case = name.partition("[")[2].rstrip("]") or name.removeprefix("bench_")
    if "resident_bytes_per_block" in extra:
        counted, grown = extra["accounted_bytes_per_block"], extra["resident_bytes_per_block"]
        target = ""
        if name in TARGETS_BYTES:
            target = verdict(f"<= {TARGETS_BYTES[name]} B", max(counted, grown) <= TARGETS_BYTES[name])
        also = f"{extra['blocks']:,} blocks, {counted} B each by its own account, {grown} B resident"
        return f"| {group} | {case} | | | {target} | {also} |"
    median = extra.get("median_us", 1e6 * benchmark["stats"]["median"])
    target, notes = "", []
    if name in TARGETS_US:
        target = verdict(f"<= {TARGETS_US[name]}", median <= TARGETS_US[name])
    work = extra.get("blocks_per_round")
    if work:
        notes.append(f"{work / median:.2f} M blocks/s")
        if name in TARGETS_RATE:
            target = verdict(f">= {TARGETS_RATE[name]} M blocks/s", work / median >= TARGETS_RATE[name])
    if "unique_blocks" in extra:
        notes.append(f"{extra['unique_blocks']:,} blocks, {extra['bytes_per_block_and_instance']} B each")
    # hit, partial and miss are compared each with their own; rounds of unequal work by their blocks
    kind, cost = f"{group} {case.partition('-')[2]}", median / (work or 1)
    ratio = cost / first.setdefault(kind, cost)
    return f"| {group} | {case} | {median:.2f} | {ratio:.1f} x | {target} | {', '.join(notes)} |"


def verdict(target: str, met: bool) -> str:
    return f"{target}: {'met' if met else 'MISSED'}"


if __name__ == "__main__":
    sys.exit(main())
