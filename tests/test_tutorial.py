"""The tutorial's commands run as they stand, in their order, and do what the page says."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from mulsched.cli import main

PAGE = Path(__file__).parent.parent / "docs" / "tutorial.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def page_tables():
    """Per table of the page: a dict of figures by policy and column."""
    tables = re.findall(r"^\| policy .*\n\|.*\n((?:\|.*\n)+)", PAGE.read_text(), re.MULTILINE)
    (heads,) = {
        tuple(line.strip(" |").split(" | ")) for line in re.findall(r"^\| policy .*", PAGE.read_text(), re.M)
    }
    return [
        {
            (cells[0].strip("`"), head): float(cell)
            for cells in (row.strip(" |").split(" | ") for row in table.splitlines())
            for head, cell in zip(heads[1:], cells[1:], strict=True)
        }
        for table in tables
    ]


def printed_figures(out):
    """The same of what ``mulsched replay`` printed."""
    first, second, *_ = (
        [cell.strip() for cell in line.split("┃")[1:-1]] for line in out.splitlines() if "┃" in line
    )
    heads = [f"{a} {b}".strip() for a, b in zip(first, second, strict=True)]
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")
    ]
    return {
        (row[0], head): float(cell.partition(" ")[0].replace(",", ""))
        for row in rows
        for head, cell in zip(heads[1:], row[1:], strict=True)
    }


def run(command):
    name, *arguments = shlex.split(command.replace("\\\n", " "))
    assert name == "mulsched"
    if arguments[0] == "replay":
        arguments += ["--processes", "1"]  # starting others would take most of the time
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        assert main(arguments) == 0
    return out.getvalue()


if PAGE.exists():

    @pytest.fixture(scope="module")
    def outputs(tmp_path_factory):
        """What each command of the page printed, in order."""
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("tutorial"))
            (script,) = blocks("python")
            exec(compile(script, PAGE.name, "exec"), {})
            return [run(command) for command in blocks("sh")]

    def test_the_conversion_prints_what_the_page_shows(outputs):
        (shown,) = blocks("text")
        assert outputs[0] == shown

    def test_the_converted_trace_is_valid(outputs):
        assert outputs[1].endswith("chat.jsonl.gz: valid\n")

    @pytest.mark.parametrize("table", [0, 1])
    def test_the_page_shows_the_figures_of_the_run(outputs, table):
        shown, printed = page_tables()[table], printed_figures(outputs[2 + table])
        # to a tenth: the engine model may move a little without changing what the page says
        assert {key: printed[key] for key in shown} == pytest.approx(shown, rel=0.1)

    def test_the_decision_follows_from_the_figures(outputs):
        low, high = (printed_figures(out) for out in outputs[2:])
        assert low["lmetric", "TTFT ms mean"] < 0.9 * low["vllm", "TTFT ms mean"]
        assert high["lmetric", "TTFT ms mean"] < 0.9 * high["vllm", "TTFT ms mean"]
        assert high["most_hits", "TTFT ms mean"] == max(
            v for (_, head), v in high.items() if head == "TTFT ms mean"
        )
        weights = [next(name for name, _ in figures if name.startswith("linear")) for figures in (low, high)]
        assert weights == ["linear(weight=0.75, tuned)", "linear(weight=0.25, tuned)"]
