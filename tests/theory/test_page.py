"""Every claim of docs/theory.md names tests, and they exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "theory.md"

if PAGE.exists():
    TEXT = PAGE.read_text()
    CLAIMS = re.split(r"^\*\*(?=\d+\.\d)|^## ", TEXT, flags=re.MULTILINE)
    CLAIMS = {claim.split()[0]: claim for claim in CLAIMS if re.match(r"\d+\.\d", claim)}
    LINK = re.compile(r"\[`(test_\w+)`\]\(\.\./(tests/[\w/]+\.py)\)")

    def tests_in(path):
        return {
            node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)
        }

    @pytest.mark.parametrize("number", CLAIMS)
    def test_a_claim_names_tests_that_exist(number):
        links = LINK.findall(CLAIMS[number])
        assert links
        for name, path in links:
            assert name in tests_in(ROOT / path)

    def test_every_symbol_has_one_row_of_the_table():
        table, _, text = TEXT.partition("The score is P * B")
        cells = re.findall(r"^\| (?!symbol|---)((?:\\\||[^|])*) \|", table, re.MULTILINE)
        symbols = [symbol.strip() for cell in cells for symbol in re.split("[,;]", cell)]
        assert len(symbols) == len(set(symbols))
        prose = re.sub(r"`[^`]*`|\(\.\.?/[^)]*\)|'s\b", "", text)
        letters = set(re.findall(r"(?<![\w\"-])[A-Za-z](?!\w)", prose)) - {"A", "a"}  # articles; a has a row
        assert letters <= set(symbols)

    def test_every_theory_test_backs_a_claim():
        linked = {name for name, _ in LINK.findall(TEXT)}
        here = [p for p in Path(__file__).parent.glob("test_*.py") if p.name != Path(__file__).name]
        written = {name for path in here for name in tests_in(path) if name.startswith("test_")}
        assert written - linked == set()
