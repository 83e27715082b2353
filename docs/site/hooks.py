"""Hooks of mkdocs: the pages of the repository as the source of the site, without a change to the files.

A page keeps its path, so that links between pages hold; NAME_zh.md becomes NAME.zh.md, the name that
mkdocs-static-i18n knows. Files that are linked and are no pages are copied.
"""

import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from pymdownx.slugs import slugify

ROOT = Path(__file__).parents[2]
PAGES = (
    *("README*.md", "CONTRIBUTING*.md", "CHANGELOG.md", "docs/*.md"),
    *("examples/intern/*.md", "benchmarks/*.md", "benchmarks/results/*.md"),
)
FILES = ("docs/images/*", "docs/site/*.css")
RESULTS = {"README.md": "Measurements", "README_zh.md": "测量结果"}
"""Index of benchmarks/results, by its file: its title."""
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()([^)\s#]+)")
ANCHOR = re.compile(r"(?<=\]\(#)(\S+)-(\d+)(?=\))")
FOREIGN_ANCHOR = re.compile(r"(?<=\]\()([^)\s#:]+\.md)#[^)\s]+")
SWITCH = re.compile(
    r"^(\[简体中文\]\(\S+\) \| \*\*English\*\*|\*\*简体中文\*\* \| \[English\]\(\S+\))\n\n?", re.MULTILINE
)
"""Line with the other language, for which the site has a menu."""


@event_priority(100)
def on_config(config: Any) -> Any:
    """Fills a folder beside that of the site with the pages, and makes it the source."""
    source = Path(config.site_dir).with_name(f"{Path(config.site_dir).name}-source")
    collect(source)
    config.docs_dir = str(source)
    return config


@event_priority(-200)
def on_page_context(context: Any, page: Any, config: Any, nav: Any) -> Any:
    """Makes the links to the other language relative, so that the site may be in any folder of a host."""
    if page.file.name != "404":
        for other in config.extra.alternate:  # the attribute that i18n sets for this page
            other["link"] = other["link"].lstrip("/") or "./"
    return context


def collect(source: Path) -> None:
    """Writes all pages into the new folder `source`, and what they link to."""
    shutil.rmtree(source, ignore_errors=True)
    for pattern in FILES:
        for path in ROOT.glob(pattern):
            _copy(path, source)
    for pattern in PAGES:
        for path in ROOT.glob(pattern):
            name, text = str(path.relative_to(ROOT)), page(path, source)
            _write(source / renamed(name), text)
            if not path.stem.endswith("_zh") and not path.with_name(f"{path.stem}_zh.md").exists():
                # an English page among Chinese ones, whose headings have other anchors
                _write(source / name.replace(".md", ".zh.md"), FOREIGN_ANCHOR.sub(r"\1", text))
    for name, title in RESULTS.items():
        _write(source / renamed(f"benchmarks/results/{name}"), results_index(title))


def page(path: Path, source: Path) -> str:
    """Returns the Markdown of a page for the site, and copies the files that it links to."""
    text = path.read_text(encoding="utf-8")
    slug = slugify(case="lower")
    headings = re.findall(r"^#+ +(.+)$", FENCE.sub("", text), re.MULTILINE)
    slugs = Counter(slug(heading, "-") for heading in headings)

    def anchor(match: re.Match[str]) -> str:
        """Returns the anchor of a repeated heading, `a-1` on GitHub and `a_1` in the site."""
        return f"{match[1]}_{match[2]}" if slugs[match[1]] > int(match[2]) else match[0]

    parts = FENCE.split(SWITCH.sub("", text, count=1))
    for i in range(0, len(parts), 2):
        for link in LINK.findall(parts[i]):
            target = (path.parent / link).resolve()
            if target.is_file() and target.suffix != ".md" and target.is_relative_to(ROOT):
                _copy(target, source)
        parts[i] = ANCHOR.sub(anchor, LINK.sub(lambda match: _site_link(match[1], path), parts[i]))
    return "".join(parts)


def _site_link(link: str, path: Path) -> str:
    """Returns the target of a link of a page in the site."""
    if "://" in link:
        return link
    if (path.parent / link).is_dir():
        link = f"{link.rstrip('/')}/README{'_zh' if path.stem.endswith('_zh') else ''}.md"
    return renamed(link)


def renamed(name: str) -> str:
    """Returns `docs/data.zh.md` for `docs/data_zh.md`, and any other name unchanged."""
    return re.sub(r"_zh\.md$", ".zh.md", name)


def results_index(title: str) -> str:
    """Returns a page with a link to every file of measurements."""
    lines = [f"# {title}", ""]
    for path in sorted((ROOT / "benchmarks/results").glob("*.md")):
        heading = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        lines.append(f"- [{heading}]({path.name}) (`{path.name}`)")
    return "\n".join(lines) + "\n"


def _copy(path: Path, source: Path) -> None:
    target = source / path.relative_to(ROOT)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
