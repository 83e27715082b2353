"""README's table of the speed on a plain CPU: its figures are those of the result files that it links."""

import re

import pytest
from helpers.launch import ROOT

ROW = re.compile(r"^\|.*\[[^\]]+\]\((benchmarks/results/[^)]+)\).*\|$", re.MULTILINE)


def unsupported(text: str) -> list[str]:
    """Figures in bold of rows that link a result file, which does not have them in bold."""
    wrong = []
    for row in ROW.finditer(text):
        result = (ROOT / row[1]).read_text()
        figures = re.findall(r"\*\*([\d.]+)\*\*", row[0])
        wrong += [figure for figure in figures if not re.search(rf"\*\*{re.escape(figure)}(?![\d.])", result)]
    return wrong


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_figures_are_measured(page):
    text = (ROOT / page).read_text()
    rows = [row[0] for row in ROW.finditer(text)]
    assert len(rows) >= 4
    assert all("**" in row for row in rows)
    assert unsupported(text) == []


def test_control_another_figure_is_seen():
    row = next(ROW.finditer((ROOT / "README.md").read_text()))[0]
    assert "99.99" in unsupported(re.sub(r"\*\*[\d.]+\*\*", "**99.99**", row))
