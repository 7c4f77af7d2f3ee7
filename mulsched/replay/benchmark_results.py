"""Readers of what benchmarks of real servers record: lengths and times, and no prefixes.

===============  =======================================================================================
vllm_bench       ``vllm bench serve --save-result --save-detailed``: one JSON object a run (more, a line
                 each, with ``--append-result``), per request in lists: ``input_lens``, ``output_lens``,
                 ``start_times`` (s of a clock without epoch), ``errors``
vllm_timestamps  vLLM's request time stamps, a line each: ``input_toks``, ``output_toks``, ``arrival_time``
guidellm         GuideLLM's JSON report: ``benchmarks[].requests.successful[]`` with ``prompt_tokens``,
                 ``output_tokens``, ``request_start_time`` (older: ``start_time``)
aiperf           aiperf's ``profile_export.jsonl``, a line each: ``metadata.request_start_ns``,
                 ``metrics.input_sequence_length``, ``metrics.output_sequence_length``
===============  =======================================================================================

They tell how the server answered as well; a trace holds what it was asked, so that is left aside. Failed
requests are left out, and counted in the notes. Sources: vllm/benchmarks/serve.py, GuideLLM's
GenerativeRequestStats, aiperf's "Working with Profile Export Files".
"""

from typing import Any

from mulsched.replay._lines import LIMIT, NO_PREFIXES, BadLineError, Rows, Source, json_object, number
from mulsched.replay.trace import Trace

__all__ = ["read_aiperf", "read_guidellm", "read_vllm_bench", "read_vllm_timestamps"]

BLOCK_SIZE = 16  # nothing depends on it without prefixes; vLLM's default


def _trace(source: Source, rows: Rows, failed: int, *notes: str) -> Trace:
    if failed:
        notes = (*notes, f"{failed} failed requests left out")
    return rows.trace(source.name, BLOCK_SIZE, notes=(*notes, NO_PREFIXES))


def read_vllm_bench(source: Source) -> Trace:
    """Read results of ``vllm bench serve``; runs of one file come one after another."""
    rows = Rows()
    failed = runs = 0
    begin_s = 0.0
    for line_number, line in source.lines:
        with source.at(str(line_number)):
            run = json_object(line)
            lists = _vllm_lists(run)
            duration_s = number(run, "duration", float, 0)
            requests = [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
            good: list[tuple[float, int, int]] = []
            for i, request in enumerate(requests):
                if request["errors"]:
                    failed += 1
                    continue
                with source.at(f"{line_number}: request {i}"):
                    start_s = float(number(request, "start_times", float, -LIMIT))
                    prompt = number(request, "input_lens", int, 1)
                    good.append((start_s, prompt, number(request, "output_lens", int, 0)))
            first_s = min(good)[0] if good else 0.0
            for start_s, prompt, output in good:
                rows.add(begin_s + start_s - first_s, prompt, output, [])
            runs += 1
            begin_s += duration_s
    notes = [f"{runs} runs, one after another"] if runs > 1 else []
    return _trace(source, rows, failed, *notes)


def _vllm_lists(run: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the lists with an item per request."""
    lists: dict[str, list[Any]] = {}
    for field in ("input_lens", "output_lens", "start_times"):
        if not isinstance(run.get(field), list):
            raise BadLineError(f"no list {field}: vllm bench serve writes it with --save-detailed")
        lists[field] = run[field]
    n = len(lists["input_lens"])
    lists["errors"] = run.get("errors") or [""] * n
    for field, values in lists.items():
        if not isinstance(values, list) or len(values) != n:
            raise BadLineError(f"{field} must be a list of {n} items like input_lens")
    return lists


def read_vllm_timestamps(source: Source) -> Trace:
    """Read time stamps of vLLM requests."""
    rows = Rows()

    def add(fields: dict[str, Any]) -> None:
        arrival_s = number(fields, "arrival_time", float, 0)
        rows.add(arrival_s, number(fields, "input_toks", int, 1), number(fields, "output_toks", int, 0), [])

    source.each_object(add)
    return _trace(source, rows, 0)


def read_guidellm(source: Source) -> Trace:
    """Read a GuideLLM report; its benchmarks keep their times, so they come as they were run."""
    rows = Rows()
    failed = benchmarks = 0
    for line_number, line in source.lines:
        with source.at(str(line_number)):
            report = json_object(line)
            if not isinstance(report.get("benchmarks"), list):
                raise BadLineError(
                    f"benchmarks must be a list, got {type(report.get('benchmarks')).__name__}"
                )
            for b, benchmark in enumerate(report["benchmarks"]):
                requests = _dict(
                    _dict(benchmark, f"benchmark {b}").get("requests"), f"requests of benchmark {b}"
                )
                benchmarks += 1
                failed += sum(len(requests.get(kind) or ()) for kind in ("errored", "incomplete"))
                for i, request in enumerate(requests.get("successful") or ()):
                    with source.at(f"{line_number}: benchmark {b}: request {i}"):
                        _dict(request, "the request")
                        start = "request_start_time" if "request_start_time" in request else "start_time"
                        arrival_s = number(request, start, float, 0)
                        prompt = number(request, "prompt_tokens", int, 1)
                        rows.add(arrival_s, prompt, number(request, "output_tokens", int, 0), [])
    notes = [f"{benchmarks} benchmarks, at the times they ran"] if benchmarks > 1 else []
    return _trace(source, rows, failed, *notes)


def read_aiperf(source: Source) -> Trace:
    """Read aiperf's records; turns of a session follow each other, with the time between them to think."""
    records: list[tuple[float, float, int, int, str | None]] = []
    failed = 0

    def add(fields: dict[str, Any]) -> None:
        nonlocal failed
        metadata, metrics = _dict(fields.get("metadata"), "metadata"), _dict(fields.get("metrics"), "metrics")
        if fields.get("error") or metadata.get("was_cancelled"):
            failed += 1
            return
        start_s, end_s = _seconds(metadata, "request_start_ns"), _seconds(metadata, "request_end_ns")
        prompt, output = _metric(metrics, "input_sequence_length"), _metric(metrics, "output_sequence_length")
        name = metadata.get("x_correlation_id")
        if not isinstance(name, str | None):
            raise BadLineError(f"x_correlation_id must be a string, got {name!r}")
        records.append((start_s, end_s, prompt, output, name))

    source.each_object(add)
    rows = Rows()
    last: dict[str, tuple[int, float]] = {}  # request of a session: its place and end
    numbers: dict[str, int] = {}
    records.sort(key=lambda record: record[0])  # they come in the order of their ends
    for place, (start_s, end_s, prompt, output, name) in enumerate(records):
        if name is None:
            rows.add(start_s, prompt, output, [])
            continue
        previous, before_s = last.get(name, (-1, start_s))
        last[name] = place, end_s
        session = numbers.setdefault(name, len(numbers))
        think_s = max(0.0, start_s - before_s)
        rows.add(start_s, prompt, output, [], session=session, previous=previous, think_s=think_s)
    return _trace(source, rows, failed)


def _dict(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadLineError(f"{name} must be an object, got {type(value).__name__}")
    return value


def _seconds(metadata: dict[str, Any], field: str) -> float:
    nanoseconds = metadata.get(field)
    if type(nanoseconds) is not int or not 0 <= nanoseconds <= LIMIT * 10**9:
        raise BadLineError(f"{field} must be an integer in 0..(2**48-1)*10**9, got {nanoseconds!r}")
    return nanoseconds / 1e9


def _metric(metrics: dict[str, Any], field: str) -> int:
    """Return a metric that counts tokens; some versions write it as a float."""
    value = _dict(metrics.get(field), field).get("value")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    count: int = number({field: value}, field, int, 1 if field.startswith("input") else 0)
    return count
