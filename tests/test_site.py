"""Site of the documents: builds without warnings and network, links that hold, no remote assets."""

import json
import os
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from helpers.launch import ROOT

LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "object": "data"}
"""Tags whose address a browser loads, and the attribute that has it."""
NETWORK_GUARD = (
    "import socket\n"
    "def refuse(*_, **__):\n    raise OSError('the build of the site needs no network')\n"
    "socket.socket.connect = socket.getaddrinfo = refuse\n"
    "from mkdocs.__main__ import cli\n"
    "cli()\n"
)


class Page(HTMLParser):
    """Addresses that a page loads, those that it links to, its anchors and its classes."""

    def __init__(self, text: str):
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.anchors: set[str] = set()
        self.classes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if address := values.get(LOADED.get(tag, "")):
            self.loaded.append(address)
        if tag == "a" and values.get("href"):
            self.linked.append(values["href"])
        self.anchors.add(values.get("id") or "")
        self.classes |= set((values.get("class") or "").split())


def remote(page: Page) -> list[str]:
    return [address for address in page.loaded if urlsplit(address).netloc]


def remote_styles(text: str) -> list[str]:
    return re.findall(r"(?:@import\s*|url\()[\"']?(?:https?:)?//[^\"')]+", text)


def broken(pages: dict[Path, Page]) -> list[str]:
    """Links and assets within the site that have no file or no anchor."""
    problems = []
    for path, page in pages.items():
        for address in (*page.loaded, *page.linked):
            parts = urlsplit(address)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue  # 404.html is shown at any address: its links begin at the root
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            missing = not target.is_file() or (
                anchor and target in pages and anchor not in pages[target].anchors
            )
            problems += [f"{path}: {address}"] if missing else []
    return problems


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    for name in ("mkdocs", "material", "mkdocs_static_i18n", "jieba"):
        pytest.importorskip(name, reason="mkdocs is not installed: pip install -r requirements-docs.txt")
    folder = tmp_path_factory.mktemp("site") / "html"
    done = subprocess.run(
        [sys.executable, "-c", NETWORK_GUARD, "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def built(site) -> dict[Path, Page]:
    return {path.resolve(): Page(path.read_text()) for path in site.rglob("*.html")}


@pytest.mark.slow
def test_every_page_is_there_in_both_languages(site, built):
    names = [path for path in ROOT.glob("docs/*.md") if not path.stem.endswith("_zh")]
    for name in names:
        page = "" if name.stem == "README" else f"{name.stem}/"
        for language in ("", "zh/"):
            assert (site / f"{language}docs/{page}index.html").resolve() in built
    english, chinese = (site / f"{language}docs/flags/index.html" for language in ("", "zh/"))
    assert "Flag reference" in english.read_text()
    assert "参数大全" in chinese.read_text()


@pytest.mark.slow
def test_links_hold(built):
    assert broken(built) == []
    path = next(path for path in built if path.name == "index.html")
    page = Page('<a href="absent/">x</a><a href="#absent">y</a><a href="https://x.org/">z</a>')
    assert len(broken({path: page})) == 2  # control


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site, built):
    assert {str(path): found for path, page in built.items() if (found := remote(page))} == {}
    styles = {str(path): remote_styles(path.read_text()) for path in site.rglob("*.css")}
    assert styles
    assert not any(styles.values())
    assert not any("mermaid" in page.classes for page in built.values())  # its script would be fetched
    control = Page('<script src="//cdn.x.org/a.js"></script><a href="https://x.org">x</a>')
    assert remote(control) == ["//cdn.x.org/a.js"]
    assert remote_styles("@import 'https://x.org/a.css'; a { b: url(//x.org/c) }")


@pytest.mark.slow
def test_tables_of_measurements_are_those_of_their_files(built, site):
    text = re.sub(r"<[^>]+>", " ", (site / "benchmarks/results/parity-matrix/index.html").read_text())
    rows = [
        line
        for line in (ROOT / "benchmarks/results/parity-matrix.md").read_text().splitlines()
        if "|" in line
    ]
    numbers = re.findall(r"\d\.\de-\d\d", "\n".join(rows))
    assert len(numbers) > 100
    assert sorted(numbers) == sorted(re.findall(r"\d\.\de-\d\d", text[text.index("max") :]))


@pytest.mark.slow
def test_search_finds_both_languages(site):
    for folder, word in ((site, "checkpoint"), (site, "检查点")):
        index = json.loads((folder / "search/search_index.json").read_text())
        texts = [entry["text"].replace("\u200b", "") for entry in index["docs"]]
        assert sum(word in text for text in texts) > 10
        assert {"en", "zh"} <= set(index["config"]["lang"])


def test_pictures_have_every_layer():
    picture = (ROOT / "docs/images/architecture-layers.svg").read_text()
    shown = re.findall(r">(\d+) (\w+)<", picture)
    table = (ROOT / "CONTRIBUTING.md").read_text()
    assert shown == re.findall(r"^\| (\d+) \| `(\w+)` \|", table, re.MULTILINE)


def test_control_hooks_keep_links():
    """Renames the Chinese pages in links, and leaves addresses elsewhere."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install -r requirements-docs.txt")
    link = runpy.run_path(str(ROOT / "docs/site/hooks.py"))["_site_link"]
    page = ROOT / "docs/data_zh.md"
    assert link("memory_zh.md", page) == "memory.zh.md"
    assert link("../benchmarks/results", page) == "../benchmarks/results/README.zh.md"
    assert link("https://x.org/a_zh.md", page) == "https://x.org/a_zh.md"
