"""Documentation: both languages correspond; links, paths and flags exist."""

import ast
import contextlib
import inspect
import io
import re
import runpy
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from helpers.launch import ROOT
from helpers.pages import FENCE, PAGES, named

from ascendspeed.cli.compat import TABLES
from ascendspeed.conversion.formats.base import CheckpointFormat
from ascendspeed.models.families import base as family_base

SINGLE = [ROOT / "CHANGELOG.md"]
"""Pages in English only."""

FOREIGN_FLAGS = {
    "AscendSpeed, Megatron-LM and MindSpeed-LLM": {
        "--ckpt-format",
        "--ckpt-convert-format",
        "--ckpt-convert-save",
        "--num-layer-list",
    },
    "InternEvo": {"--launcher", "--config"},
    "MindFormers": {
        "--input-glob",
        "--output-file",
        "--model-file",
        "--train-dataset",
        "--load-checkpoint",
        "--run-mode",
        "--use-parallel",
        "--qkv-concat",
        "--pre-ckpt-path",
        "--model",
    },
    "launchers": {"--no-local-rank", "--signal", "--dependency", "--nnodes", "--nproc-per-node"},
    "tests/run.sh": {"--full"},
    "intern": {"--nproc", "--completion", "--build-arg", "--config", "--dump-config", "--json", "--against"},
}
"""Flags of other programs that the pages name."""
FOREIGN_PATHS: set[str] = set()

SPAN = re.compile(r"`[^`\n]+`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FLAG = re.compile(r"(?<![\w-])--[A-Za-z][\w-]*")
PATH = re.compile(
    r"(?<![\w/.])((?:ascendspeed|benchmarks|docs|examples|tasks|tests|tools)/[\w./-]*\w|pretrain_intern\.py)"
)
IMPORT = re.compile(r"^from (ascendspeed[\w.]*) import ([\w, ]+)$", re.MULTILINE)
MODULE = re.compile(r"python -m (benchmarks\.\w+)")


def chinese(page: Path) -> Path:
    return page.with_name(f"{page.stem}_zh.md")


def prose(text: str) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", text)


def headings(text: str) -> list[tuple[int, str]]:
    return [(len(marks), title) for marks, title in re.findall(r"^(#+) +(.+)$", prose(text), re.MULTILINE)]


def anchors(text: str) -> list[str]:
    """The anchor of each heading, as GitHub derives it."""
    slugs: list[str] = []
    seen: Counter[str] = Counter()
    for _, title in headings(text):
        slug = re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-")
        slugs.append(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return slugs


def links(text: str) -> list[str]:
    return LINK.findall(SPAN.sub("``", prose(text)))


def commands(text: str) -> list[str]:
    """Lines of bash blocks without comments; other blocks may be translated, so only bash is compared."""
    lines = [
        line for language, block in FENCE.findall(text) if language == "bash" for line in block.splitlines()
    ]
    return [line for line in (re.sub(r"(^|\s+)#\s.*$", "", line).rstrip() for line in lines) if line]


def table_shapes(text: str) -> list[int]:
    """The number of cells of each table row."""
    rows = [line for line in prose(text).splitlines() if line.startswith("|")]
    return [len(re.split(r"(?<!\\)\|", row)) for row in rows]


def code_spans(text: str) -> set[str]:
    return set(SPAN.findall(prose(text).replace("_zh.md", ".md")))


def target(page: Path, link: str) -> tuple[str, int | None]:
    """Target of a link, equal for both languages: the file (or address) and the number of the heading."""
    if "://" in link:
        return link, None
    name, _, anchor = link.partition("#")
    path = (page.parent / name).resolve() if name else page
    english = path.with_name(path.name.replace("_zh.md", ".md"))
    slugs = anchors(path.read_text()) if anchor else []
    return str(english.relative_to(ROOT)), slugs.index(anchor) if anchor else None


def differences(page: Path, other: Path, texts: tuple[str, str] | None = None) -> list[str]:
    """Lists the differences between the English `page` and the Chinese `other`."""
    ours, theirs = texts or (page.read_text(), other.read_text())
    differing = []
    if [level for level, _ in headings(ours)] != [level for level, _ in headings(theirs)]:
        differing.append("headings")
    if commands(ours) != commands(theirs):
        differing += [f"command: {line}" for line in sorted(set(commands(ours)) ^ set(commands(theirs)))] or [
            "order of commands"
        ]
    if Counter(target(page, link) for link in links(ours)) != Counter(
        target(other, link) for link in links(theirs)
    ):
        differing.append("links")
    if table_shapes(ours) != table_shapes(theirs):
        differing.append("tables")
    differing += [f"code: {span}" for span in sorted(code_spans(ours) ^ code_spans(theirs))]
    return differing


def broken_links(page: Path, text: str) -> list[str]:
    """Links without a target, and links of a Chinese page to an English one that has a Chinese version."""
    problems = []
    for link in links(text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        path = page.parent / name
        if name and not path.exists():
            problems.append(link)
            continue
        if anchor and anchor not in anchors(path.read_text() if name else text):
            problems.append(link)
        is_language_switch = link == page.name.replace("_zh.md", ".md")
        to_english = path.suffix == ".md" and not path.stem.endswith("_zh") and chinese(path).exists()
        if page.stem.endswith("_zh") and to_english and not is_language_switch:
            problems.append(f"{link} (there is {chinese(path).name})")
    return problems


def runnable_module(name: str) -> bool:
    """True for a module, and for a package with a `__main__`."""
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__main__.py").exists()


def missing_paths(text: str) -> list[str]:
    """Paths, imported modules and `python -m` modules that a page names and that do not exist here."""
    missing = [
        name for name in PATH.findall(text) if not (ROOT / name).exists() and name not in FOREIGN_PATHS
    ]
    for package, names in IMPORT.findall(text):
        folder = ROOT / package.replace(".", "/")
        if folder.is_dir():
            exported = re.findall(r'^    "(\w+)",$', (folder / "__init__.py").read_text(), re.MULTILINE)
            missing += [
                f"{package}.{x}"
                for x in names.split(", ")
                if not (x in exported or (folder / x).is_dir() or (folder / f"{x}.py").exists())
            ]
        elif not folder.with_suffix(".py").exists():
            missing.append(package)
    missing += [name for name in MODULE.findall(text) if not runnable_module(name)]
    return missing


def hyphens(flag: str) -> str:
    return flag.replace("_", "-")


@cache
def accepted(script: str) -> frozenset[str]:
    """The flags in the `--help` of a script, which needs neither torch nor another process."""
    out, argv, path = io.StringIO(), sys.argv, list(sys.path)
    sys.argv, sys.path[:0] = [script, "--help"], [str((ROOT / script).parent)]
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(out),
            contextlib.suppress(SystemExit),
        ):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = argv, path
    return frozenset(FLAG.findall(out.getvalue()))


@pytest.fixture(autouse=True, scope="module")
def wide_help() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "240")
        yield


SCRIPTS = [
    path.relative_to(ROOT).as_posix()
    for folder in ("tools", "tasks", "examples", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "__main__" in path.read_text()
]


@cache
def flags_of(script: str) -> frozenset[str] | None:
    """The flags of a Python script, or of the program that a shell recipe starts; None if it is neither."""
    if script == "pretrain_intern.py":
        return frozenset((ROOT / "tests/flags.txt").read_text().split())
    if script in SCRIPTS:
        return accepted(script) | frozenset(TABLES.get(script, ()))
    if not script.endswith(".sh") or not (ROOT / script).exists():
        return None
    code = "\n".join(line for line in (ROOT / script).read_text().splitlines() if not line.startswith("#"))
    if re.search(r"^train\b", code, re.MULTILINE):
        return flags_of("pretrain_intern.py")
    program = re.search(r"(pretrain_intern\.py|tasks/\w+/\w+\.py|examples/intern/generate\w+\.sh)", code)
    return flags_of(program[1]) if program else None


@cache
def known_flags() -> frozenset[str]:
    training = (ROOT / "tests/flags.txt").read_text().split()
    return frozenset(training).union(*map(accepted, SCRIPTS), *TABLES.values(), *FOREIGN_FLAGS.values())


def unknown_flags(text: str) -> list[str]:
    """Flags that no command has, and flags of a documented command that its script does not have."""
    unknown = sorted({flag for flag in FLAG.findall(text) if hyphens(flag) not in known_flags()})
    for line in "\n".join(commands(text)).replace("\\\n", " ").splitlines():
        with contextlib.suppress(ValueError):  # an unbalanced quote: a line of a heredoc
            words = shlex.split(line)
            words = words[next((i for i, word in enumerate(words) if "=" not in word), 0) :]
            flags = flags_of(words[1]) if len(words) > 1 and words[0] in ("python", "bash") else None
            if flags is not None:
                named = {hyphens(word.partition("=")[0]) for word in words[2:] if word.startswith("--")}
                unknown += [f"{flag} of {words[1]}" for flag in sorted(named - flags)]
    return unknown


ALL = [*PAGES, *map(chinese, PAGES), *SINGLE]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_languages_correspond(page):
    assert differences(page, chinese(page)) == []


@pytest.mark.parametrize("page", ALL, ids=named)
def test_links_exist(page):
    assert broken_links(page, page.read_text()) == []


@pytest.mark.parametrize("page", ALL, ids=named)
def test_paths_exist(page):
    assert missing_paths(page.read_text()) == []


@pytest.mark.parametrize("page", ALL, ids=named)
def test_flags_exist(page):
    assert unknown_flags(page.read_text()) == []


def unknown_members(text: str) -> list[str]:
    """Members in the table of "Add a checkpoint format" that `CheckpointFormat` does not have."""
    section = text[text.index("`CheckpointFormat`**") :]
    rows = re.findall(r"^\| (`[^|]+) \|", section[: section.index("**2.")], re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)", row)]
    members = {*dir(CheckpointFormat), *CheckpointFormat.__annotations__}
    return [name for name in names if name not in members] if names else ["no table"]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CONTRIBUTING_zh.md"])
def test_the_contract_of_a_format_has_the_names_of_the_code(page):
    text = (ROOT / page).read_text()
    assert unknown_members(text) == []
    assert unknown_members(text.replace("`detect(folder)`", "`is_one(folder)`")) == ["is_one"]  # control


@cache
def sources() -> dict[str, str]:
    folders = ("ascendspeed", "tests", "tools", "tasks")
    return {named(path): path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py")}


@cache
def messages() -> str:
    """The string literals of the library, adjacent ones joined and values replaced by an ellipsis."""
    code = " ".join(text for name, text in sources().items() if name.startswith("ascendspeed/"))
    joined = re.sub(r'"\s*f?"', "", code)
    return re.sub(r"\s+", " ", re.sub(r"\{[^{}]*\}", "…", joined))


def unknown_messages(text: str) -> list[str]:
    """Error messages of the first column of which no three consecutive words are in the code."""
    problems = []
    for row in re.findall(r"^\| (`.*?) \| ", text, re.MULTILINE):
        if "DeepSpeed" in row or "import torch" in row:
            continue
        for message in re.findall(r"`([^`]+)`", row):
            words = message.split()
            windows = [" ".join(words[i : i + 3]) for i in range(len(words) - 2)]
            if not any(window in messages() for window in windows):
                problems.append(message)
    return problems


@pytest.mark.parametrize("page", ["docs/troubleshooting.md", "docs/troubleshooting_zh.md"])
def test_error_messages_are_those_of_the_code(page):
    text = (ROOT / page).read_text()
    assert unknown_messages(text) == []
    assert unknown_messages(text.replace("another run saves in …", "someone else saves here")) == [
        "someone else saves here"
    ]


def undefined(text: str) -> list[str]:
    """Classes and constants in code spans that no Python file of the library or the tests defines."""
    python = [
        path.read_text() for folder in ("ascendspeed", "tests") for path in (ROOT / folder).rglob("*.py")
    ]
    names = sorted(set(re.findall(r"`([A-Z]\w*[a-z]\w*[A-Z]\w*|[A-Z][A-Z_]{3,})`", text)))
    definition = r"^(?:class {0}\b|{0}\b[^\n]*=)"
    return [
        name
        for name in names
        if not any(re.search(definition.format(name), code, re.MULTILINE) for code in python)
    ]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CONTRIBUTING_zh.md"])
def test_classes_and_constants_exist(page):
    text = (ROOT / page).read_text()
    assert undefined(text) == []
    assert undefined(text.replace("`CheckpointReader`", "`CheckpointSource`")) == [
        "CheckpointSource"
    ]  # control


def unknown_names(text: str) -> list[str]:
    """Calls and keyword arguments of a family's entry in a page that `models.families.base` does not have."""
    problems = []
    for language, block in FENCE.findall(text):
        tree = ast.parse(block) if language == "python" else ast.Module([], [])
        calls = [
            node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        ]
        if not any(call.func.id == "Family" for call in calls):
            continue
        for call in calls:
            function = getattr(family_base, call.func.id, None)
            if function is None:
                problems.append(call.func.id)
            elif call.func.id in ("Family", "ParamMapping", "ConfigMapping"):
                parameters = inspect.signature(function).parameters
                problems += [k.arg for k in call.keywords if k.arg not in parameters]
    return problems


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CONTRIBUTING_zh.md"])
def test_the_example_of_a_family_has_the_names_of_the_code(page):
    text = (ROOT / page).read_text()
    assert "Family(" in text
    assert unknown_names(text) == []
    mistake = (
        text.replace("hidden_act", "x")
        .replace("required_values=", "fixed=")
        .replace("ConfigMapping(", "Key(")
    )
    assert sorted(unknown_names(mistake)) == ["Key", "fixed"]  # control


def test_index_lists_every_page():
    index = ROOT / "docs/README.md"
    listed = {(index.parent / link).resolve() for link in links(index.read_text()) if "://" not in link}
    assert set(PAGES) - {index, ROOT / "README.md"} <= listed


ENGLISH = """# Title

See [memory](memory.md#if-it-does-not-fit) and `--tp`.

| a | b |
|---|---|
| 1 | 2 |

```bash
python tools/preprocess_data.py --input a    # text
```
"""
CHINESE = (
    ENGLISH.replace("Title", "标题")
    .replace("# text", "# 文本")
    .replace("memory.md#if-it-does-not-fit", "memory_zh.md#显存不足时")
)


def compare(changed: str) -> list[str]:
    return differences(ROOT / "docs/x.md", ROOT / "docs/x_zh.md", (ENGLISH, changed))


def test_control_the_same_page_in_two_languages():
    assert compare(CHINESE) == []


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        ("# 标题", "## 标题", "headings"),
        ("--input a", "--input b", "command: python tools/preprocess_data.py --input a"),
        ("#显存不足时", "#其他模型或布局", "links"),
        ("[memory](memory_zh.md#显存不足时)", "memory", "links"),
        ("| 1 | 2 |", "| 1 |", "tables"),
        ("`--tp`", "`--pp`", "code: `--pp`"),
    ],
)
def test_controls_differences_are_seen(old, new, difference):
    assert difference in compare(CHINESE.replace(old, new))


@pytest.mark.parametrize("link", ["absent.md", "memory.md#absent", "#absent", "../benchmarks/absent.md"])
def test_controls_broken_links_are_seen(link):
    assert broken_links(ROOT / "docs/x.md", f"# Title\n[text]({link})") == [link]
    assert (
        broken_links(ROOT / "docs/x.md", "# Title\n[text](memory.md#if-it-does-not-fit) [here](#title)") == []
    )


def test_control_an_english_link_of_a_chinese_page_is_seen():
    assert broken_links(ROOT / "docs/x_zh.md", "# 标题\n[显存](memory.md)") == [
        "memory.md (there is memory_zh.md)"
    ]
    assert broken_links(ROOT / "docs/x_zh.md", "# 标题\n[显存](memory_zh.md)") == []


@pytest.mark.parametrize(
    "text",
    [
        "`tools/absent.py`",
        "`ascendspeed/absent/`",
        "from ascendspeed.absent import x",
        "from ascendspeed.config.schema import AbsentConfig",
        "python -m benchmarks.absent",
    ],
)
def test_controls_missing_paths_are_seen(text):
    assert len(missing_paths(text)) == 1
    assert missing_paths("`tools/random_model.py` from ascendspeed.data import dataset") == []


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("`--sequence-parallel-size`", ["--sequence-parallel-size"]),
        ("```bash\npython tools/compare_loss.py A B --bf16\n```\n", ["--bf16 of tools/compare_loss.py"]),
        (
            "```bash\nX=1 python benchmarks/convert.py \\\n    --layers 6\n```\n",
            ["--layers of benchmarks/convert.py"],
        ),
        (
            "```bash\nTP=2 bash examples/intern/finetune_internlm2_lora.sh --task chat\n```\n",
            ["--task of examples/intern/finetune_internlm2_lora.sh"],
        ),
        (
            "```bash\nbash tasks/inference/run_pa.sh DIR --lora-rank 8\n```\n",
            ["--lora-rank of tasks/inference/run_pa.sh"],
        ),
        ("`--micro_batch_size` ```bash\npython tools/compare_loss.py A B --out DIR\n```\n", []),
    ],
)
def test_controls_unknown_flags_are_seen(text, flags):
    assert unknown_flags(text) == flags
