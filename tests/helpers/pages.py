"""Pages of the documentation, their names and their fenced blocks."""

import re
from pathlib import Path

from helpers.launch import ROOT

SOURCES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES += [ROOT / "examples/intern/README.md", ROOT / "benchmarks/README.md"]
PAGES = [path for path in SOURCES if not path.stem.endswith("_zh")]
"""English pages; each has a Chinese one, NAME_zh.md."""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()
