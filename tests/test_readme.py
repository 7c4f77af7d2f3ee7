"""The code of README and docs runs as it stands, where they are."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"

if README.exists():

    def test_the_ten_lines_of_use_run(capsys):
        (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
        exec(compile(code, "README.md", "exec"), {})
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "gpu-0 0 1000"
        assert lines[1] == "lmetric: 1000 prompt tokens to gpu-0, score 8 of 2 candidates"

    def test_its_events_apply():
        import mulsched

        router = mulsched.Router()
        router.add_instance("gpu-0")
        names = vars(mulsched) | {"mulsched": mulsched, "prompt_token_ids": list(range(1000))}
        line = next(line for line in README.read_text().splitlines() if "router.apply(event)" in line)
        for event, blocks in zip(re.findall(r"`([\w.]+\(\"gpu-0\".*?\))`", line), (1, 0, 0), strict=True):
            router.apply(eval(event, names))
            assert router.index.blocks("gpu-0") == blocks

    def test_the_code_of_the_policies_page_runs(monkeypatch):
        from mulsched import policies

        monkeypatch.setattr(policies._policy, "_REGISTRY", dict(policies._policy._REGISTRY))
        page = (README.parent / "docs" / "policies.md").read_text()
        names = {}
        for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
            exec(compile(code, "policies.md", "exec"), names)
        router = names["mulsched"].Router(policy="guarded")
        router.add_instance("a")
        assert router.select([1, 2, 3]).policy == "guarded"

    def test_the_code_of_the_experiments_page_runs(capsys):
        (code,) = re.findall(
            r"```python\n(.*?)```", (README.parent / "docs" / "experiments.md").read_text(), re.DOTALL
        )
        exec(compile(code, "experiments.md", "exec"), {})
        lines = capsys.readouterr().out.splitlines()
        assert [line.rpartition(" ")[0].rpartition(" ")[0].partition("(")[0] for line in lines[:3]] == [
            "lmetric",
            "linear",
            "linear",
        ]
        assert lines[4].startswith("Mean TTFT is lowest under ")

    def test_the_code_of_the_recording_page_runs():
        page = (README.parent / "docs" / "record-format.md").read_text()
        (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        exec(compile(code, "record-format.md", "exec"), {})

    def test_its_policies_are_those_there_are():
        from mulsched import policies

        section = README.read_text().partition("## Policies")[2].partition("\n## ")[0]
        named = set(re.findall(r"`([a-z0-9_]+)`", section))
        assert named == set(policies.names())

    def test_ci_runs_its_test_command():
        command = next(line for line in README.read_text().splitlines() if "'.[test]'" in line)
        assert command in (README.parent / ".ci" / "run").read_text()
