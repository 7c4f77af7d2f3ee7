"""The code of the pages on invariants runs as it stands, and prints what they show."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def run(page, capsys):
    """What the page shows beside what its code printed, in order."""
    names, shown, printed = {"__name__": page}, [], []
    for language, text in re.findall(r"```(python|text)\n(.*?)```", (DOCS / page).read_text(), re.DOTALL):
        if language == "python":
            exec(compile(text, page, "exec"), names)
            printed.append(capsys.readouterr().out)
        else:
            shown.append((text, printed[-1]))
    return shown


if (DOCS / "writing-a-score.md").exists():

    def test_the_page_on_writing_a_score_shows_what_its_code_prints(capsys):
        shown = run("writing-a-score.md", capsys)
        assert len(shown) == 4
        for text, printed in shown:
            assert text == printed

    @pytest.mark.parametrize("page", ["invariants.md"])
    def test_the_code_of_the_page_of_invariants_runs(page, capsys):
        run(page, capsys)
