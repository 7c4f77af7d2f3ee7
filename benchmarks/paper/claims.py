"""What the paper claims, and by which rule our figures judge it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import rules
from results import Table

PAPER_TRACES = ("chat", "api", "coder", "tool_agent")
ABLATED_TRACES = ("chat", "api", "coder", "mooncake")
SIMILAR = 0.1  # what "similar" is taken to mean


@dataclass(frozen=True, slots=True)
class Claim:
    """LMetric's figure is a share ``paper`` above (negative: below) that of a baseline."""

    source: str
    baseline: str
    figure: str
    paper: float
    stage: str = "main"
    traces: Sequence[str] = PAPER_TRACES


CLAIMS = (
    Claim("abstract, v1", "vllm", "ttft_mean_s", -0.92),
    Claim("abstract, v1", "bailian", "ttft_mean_s", -0.52),
    Claim("abstract, v1", "vllm", "tpot_mean_s", -0.21),
    Claim("abstract, v1", "bailian", "tpot_mean_s", -0.20),
    Claim("OSDI '26", "vllm", "ttft_mean_s", -0.92),
    Claim("OSDI '26", "bailian", "ttft_mean_s", -0.39),
    Claim("OSDI '26", "vllm", "tpot_mean_s", -0.24),
    Claim("OSDI '26", "bailian", "tpot_mean_s", -0.51),
    Claim("P-token, not hit ratio", "no_queue", "ttft_p50_s", -0.144, "ablation", ABLATED_TRACES),
    Claim("P-token, not hit ratio", "no_queue", "ttft_p95_s", -0.428, "ablation", ABLATED_TRACES),
    Claim("llm-d, ChatBot", "least_ttft", "ttft_mean_s", 0.0, traces=("chat",)),
    Claim("llm-d, ChatBot", "least_ttft", "tpot_p99_s", -0.13, traces=("chat",)),
    Claim("llm-d, ToolAgent", "least_ttft", "ttft_mean_s", 0.10, traces=("tool_agent",)),
    Claim("llm-d, ToolAgent", "least_ttft", "tpot_mean_s", -0.30, traces=("tool_agent",)),
)


def evidence(claim: Claim, tables: Iterable[Table]) -> list[tuple[Table, float]]:
    """Return the tables that bear on a claim, at half of the maximum rate, with LMetric's change on each."""
    return [
        (table, table.gain(claim.baseline, claim.figure))
        for table in tables
        if table.stage == claim.stage and table.load == 0.5 and table.trace in claim.traces
    ]


def judge(claim: Claim, changes: Sequence[float]) -> str:
    """Return the verdict; a claimed similarity holds if no change exceeds SIMILAR."""
    if not changes:
        return "not run"
    if claim.paper == 0:
        return "reproduced" if max(map(abs, changes)) <= SIMILAR else "not reproduced"
    return rules.verdict(claim.paper, changes)


def losses(table: Table) -> Mapping[str, list[tuple[float, str]]]:
    """Return, by figure, the policies that beat LMetric by more than the noise floor, best first."""
    return {
        figure: sorted(
            (table.change(name, figure), name)
            for name in table.others
            if table.compare(name, figure) == "better"
        )
        for figure in rules.JUDGED
    }


def better_in_both(table: Table) -> list[str]:
    """Return the policies that beat LMetric in mean TTFT and in mean TPOT, each by more than the floor."""
    return [
        name
        for name in table.others
        if all(table.compare(name, figure) == "better" for figure in ("ttft_mean_s", "tpot_mean_s"))
    ]
