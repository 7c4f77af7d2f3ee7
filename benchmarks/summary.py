"""Run the benchmarks and print a Markdown table of medians, targets and ratios.

python benchmarks/summary.py [pytest arguments]
"""

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent

# What issue and docs promise, in microseconds, by benchmark.
TARGETS_US = {
    "bench_array[native]": 5,
    "bench_match[native-hit]": 3,
    "bench_route[fused]": 15,
    "bench_select[numpy score]": 40,
}
MIN_BLOCKS_PER_S = 5e6
MAX_BYTES = 40


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            str(FOLDER),
            "-q",
            f"--benchmark-json={report}",
            *sys.argv[1:],
        ]
        done = subprocess.run(command, stdout=subprocess.DEVNULL)
        if done.returncode:
            return done.returncode
        benchmarks = json.loads(report.read_text())["benchmarks"]
    print(f"Python {platform.python_version()}, {platform.machine()}, medians of one thread\n")
    print("| benchmark | case | median us | to the twin or first | target | also |")
    print("| --- | --- | ---: | ---: | ---: | --- |")
    first: dict[str, float] = {}
    for benchmark in benchmarks:
        print(row(benchmark, first))
    return 0


def row(benchmark: dict, first: dict[str, float]) -> str:
    name, group, extra = benchmark["name"], benchmark["group"], benchmark["extra_info"]
    median = extra.pop("median_us", 1e6 * benchmark["stats"]["median"])
    # hit, partial and miss are compared each with their own
    case = name.partition("[")[2].rstrip("]") or name.removeprefix("bench_")
    kind = f"{group} {case.partition('-')[2]}"
    ratio = median / first.setdefault(kind, median)
    target = f"<= {TARGETS_US[name]}" if name in TARGETS_US else ""
    notes = []
    if "blocks_per_round" in extra:
        notes.append(f"{extra['blocks_per_round'] / median:.1f} M blocks/s")
        target = f">= {MIN_BLOCKS_PER_S / 1e6:g} M/s, <= {MAX_BYTES} B" if "native" in name else ""
    if "unique_blocks" in extra:
        notes.append(f"{extra['unique_blocks']:,} blocks, {extra['bytes_per_block_and_instance']} B each")
    return f"| {group} | {case} | {median:.2f} | {ratio:.1f} x | {target} | {', '.join(notes)} |"


if __name__ == "__main__":
    sys.exit(main())
