"""Rules of language and naming: retired words, opening words of docstrings, one type for one name."""

import ast
import re
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from helpers.launch import ROOT

RETIRED = re.compile(
    r"(?<!math\.)(?<!np\.)(?<!torch\.)"
    r"\b(rooms?|floors?|doors?|house|nasty|inert|couples?|making"
    r"|dialects?|sidecars?|learnt)\b",
    re.IGNORECASE,
)
"""Words of the project's first vocabulary; CONTRIBUTING.md and docs/glossary.md have their successors."""
OPENING = re.compile(r"(What|Which|How|Who|Whom|Whose|Where|Whether|When|Why|Of|The same)\b")
"""First words of a docstring that is a clause or a fragment instead of a statement."""
EXEMPT = {"tests/test_language.py"}
ON_DISK = ('SUPERVISED_FACT = "learnt"', 'stream_note = "documents share a sample while there is room')
"""Lines whose text is a key in files on disk, and therefore stays."""
PACKAGE = ROOT / "ascendspeed"
CLUMSY = """
is told by what|that there is not|of whose answers|goes away; where it holds|infinity is said|word alone
and come with that|A log that goes back|do not say a thing|it began with|are said and counted
weighs tokens otherwise|does not go with itself|that other work shared|behind the following iterations
while it is trained on|see the error.|choose among the above
"""
"""Sentences that a reader of the documents and the help could not follow."""
TRANSLATED = """
以打包的行|一行 token|脚本里只有取值|留出文本|替身|会被指名|背后写盘|只是一条警告|只说一次
真正跑过|在哪里跑过|什么也不懂|家族|放到设备之外|勘误版|原版 transformers|慢得像爬|分词器|阶段 0
"""
"""Wordings of a literal translation; the glossary has the usual terms."""


def tracked(*endings: str) -> list[Path]:
    """Files of the project with one of these endings, without results of benchmarks.

    Outside a git checkout: every such file.
    """
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if listed.returncode:
        paths = [path for ending in endings for path in ROOT.rglob(f"*{ending}") if ".venv" not in path.parts]
    else:
        paths = [ROOT / name for name in listed.stdout.splitlines() if name.endswith(endings)]
    return [path for path in paths if path.exists() and "results" not in path.parts]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def docstrings(tree: ast.Module) -> list[tuple[int, str]]:
    """(line, text) of the docstrings of a module, its classes and its functions."""
    texts, nodes = [], [tree]
    while nodes:  # statements only: expressions, most of a tree, have none
        node = nodes.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node)
        ):
            texts.append((node.body[0].lineno, text))
        for block in ("body", "orelse", "finalbody", "handlers"):
            nodes += [child for child in getattr(node, block, None) or () if isinstance(child, ast.AST)]
    return sorted(texts)


def retired_words(text: str) -> list[str]:
    return [
        f"{number}: {match[0]!r}"
        for number, line in enumerate(text.splitlines(), 1)
        if not any(key in line for key in ON_DISK)
        for match in RETIRED.finditer(line.replace("_", " "))
    ]


def wrong_openings(tree: ast.Module) -> list[str]:
    return [f"{line}: {text.splitlines()[0]!r}" for line, text in docstrings(tree) if OPENING.match(text)]


def violations(paths: Iterable[Path], rule: Callable[[Path], list[str]]) -> dict[str, list[str]]:
    """File -> what breaks the rule there, without files that keep it."""
    return {name_of(path): broken for path in paths if (broken := rule(path))}


SOURCES = tracked(".py")


def test_no_retired_words():
    paths = tracked(".py", ".sh", ".md", ".toml", ".sbatch", ".html")
    checked = [path for path in paths if name_of(path) not in EXEMPT]
    assert len(checked) > 500
    assert violations(checked, lambda path: retired_words(path.read_text())) == {}


def test_no_clumsy_sentences():
    phrases = re.split(r"[|\n]+", (CLUMSY + TRANSLATED).strip())

    def clumsy(path: Path) -> list[str]:
        text = " ".join(path.read_text().split())
        return [phrase for phrase in phrases if phrase in text]

    assert violations(tracked(".md"), clumsy) == {}


def test_docstrings_are_statements():
    assert violations(SOURCES, lambda path: wrong_openings(parsed(path))) == {}


def test_modules_have_a_docstring():
    assert [name_of(p) for p in SOURCES if PACKAGE in p.parents and not ast.get_docstring(parsed(p))] == []


def test_one_class_for_one_name():
    places = defaultdict(list)
    for path in SOURCES:
        if PACKAGE in path.parents:
            for node in ast.walk(parsed(path)):
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    places[node.name].append(name_of(path))
    assert not {name: paths for name, paths in places.items() if len(paths) > 1}


def test_only_packages_at_the_top():
    names = {path.name for path in PACKAGE.iterdir() if not path.name.startswith("__pycache__")}
    assert {name for name in names if (PACKAGE / name).is_file()} == {"__init__.py", "py.typed"}


def test_controls():
    """The rules see what they are meant to see, and nothing else."""
    assert retired_words("a door\nnothing_inert = 1") == ["1: 'door'", "2: 'inert'"]
    assert not retired_words("indoors, mushroom, household")
    assert wrong_openings(ast.parse('"""What rows become."""')) == ["1: 'What rows become.'"]
    assert wrong_openings(ast.parse('def f():\n    """Whether it holds."""')) == ["2: 'Whether it holds.'"]
    assert not wrong_openings(ast.parse('"""Reads rows."""\ndef f():\n    """Whole rows."""'))
    assert violations([PACKAGE], lambda path: ["1: x"]) == {"ascendspeed": ["1: x"]}
