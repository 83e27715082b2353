"""Style and tables that the pages of runs and of comparisons share."""

from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
STYLE = FOLDER / "style.css"


def environment(folder: Path) -> Any:
    """Returns the Jinja environment of the templates in `folder`, with `tables.html`."""
    from jinja2 import Environment, FileSystemLoader

    loader = FileSystemLoader([folder, FOLDER])
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=loader)
