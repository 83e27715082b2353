"""Rules that can be read off the source: imports go down only, and some words stand in one file only."""

import ast
import json
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from helpers.imports import imported, inner

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ascendspeed"

# Packages, bottom up: a package imports only those above it in this list. CONTRIBUTING.md has the same table.
LAYERS = [
    "utils",
    "tokenization",
    "config",
    "data",
    "distributed",
    "models",
    "checkpoint",
    "cli",
    "conversion",
    "training",
    "planning",
    "inference",
    "loss_compare",
    "run_report",
    "evaluation",
    "commands",
]
TORCH_FREE = [
    "utils.errors",
    "models.lora.targets",
    "utils.safe_io",
    "config.schema",
    "training.metrics_log",
    "training.metric_lines",
    "checkpoint.paths",
    "models.families",
    "models.estimates",
    "cli.parser",
    "config.lr_schedule",
    "cli.validation",
    "cli.engine_checks",
    "cli.layout_checks",
    "cli.model_checks",
    "cli.command",
    "cli.compat",
    "cli.train_args",
]
TORCH_FREE += [
    "cli.launch",
    "planning.command",
    "planning.report",
    "inference.args",
    "inference.benchmark_report",
    "inference.stdin",
]
MEGATRON = {
    "models.gpt",
    "models.lora.layers",
    "inference.engine",
    "distributed.process_groups",
    "training.engines.megatron",
    "training.engines.megatron_optimizer",
    "planning.balanced_experts",
    "planning.fake_world",
    "data",
}
DEVICE_WORDS = {
    "distributed.device": "whatever depends on the kind of device",
    "distributed.training_kernels": "its kernels of the layers",
    "distributed.inference_kernels": "its kernels of inference",
    "distributed.cuda_graphs": "torch's graphs, which no other device has under this interface",
    "config.schema.choices": "the choices of --device",
    "commands.doctor_checks.devices": "their drivers and libraries in `intern doctor`",
}

SOURCES = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("*.py"))}
SCRIPTS = [
    p
    for p in [
        *ROOT.glob("*.py"),
        *(
            p
            for folder in ("tools", "tasks", "benchmarks", "examples")
            for p in (ROOT / folder).rglob("*.py")
        ),
    ]
    if "__main__" in p.read_text()
]


def package_of(module: str) -> str:
    return module.split(".")[0]


def says(tree: ast.AST, words: str) -> set[str]:
    """Matches of `words` (a regular expression of whole words) outside comments and docstrings."""
    bare = {
        id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)
    }
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            texts.append(node.value)
        texts += [
            getattr(node, field)
            for field in ("id", "attr", "arg", "module")
            if isinstance(getattr(node, field, None), str)
        ]
        texts += [alias.name for alias in getattr(node, "names", ()) if isinstance(alias, ast.alias)]
    return {match for text in texts for match in re.findall(rf"\b(?:{words})\b", text)}


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    """Module -> its syntax tree."""
    return {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}


def test_imports_go_down(trees):
    assert not inner(trees["__init__"])
    upwards = [
        f"{name} imports {other}, a layer above"
        for name, tree in trees.items()
        if name != "__init__"
        for other in inner(tree)
        if LAYERS.index(other) > LAYERS.index(package_of(name))
    ]
    assert upwards == []


def documented_layers(page: str) -> list[tuple[int, str]]:
    return [
        (int(number), package)
        for number, package in re.findall(r"^\| (\d+) \| `(\w+)` \|", page, re.MULTILINE)
    ]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CONTRIBUTING_zh.md"])
def test_contributing_has_the_same_layers(page):
    text = (ROOT / page).read_text()
    assert documented_layers(text) == list(enumerate(LAYERS))
    assert documented_layers(text.replace("`data`", "`models`", 1)) != list(enumerate(LAYERS))  # control


def test_packages_do_not_import_each_other(trees):
    graph: dict[str, set[str]] = {}
    for name, tree in trees.items():
        graph.setdefault(package_of(name), set()).update(inner(tree) - {package_of(name)})
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"packages import each other: {' -> '.join(error.args[1])}")


def test_who_imports_whom(trees):
    for name, tree in trees.items():
        outer = {module.split(".")[0] for module in imported(tree)}
        uses_megatron = any(f"{name}.".startswith(f"{allowed}.") for allowed in MEGATRON)
        assert "megatron" not in outer or uses_megatron, name
        assert "deepspeed" not in outer or name == "training.engines.deepspeed", name
        assert "torch_npu" not in outer or name == "distributed.device", name


def test_only_device_names_a_device(trees):
    kinds = "cuda|npu|hccl|nccl"
    words = {
        name: says(tree, kinds)
        for name, tree in trees.items()
        if name not in DEVICE_WORDS and re.search(rf"\b(?:{kinds})\b", SOURCES[name].read_text())
    }
    assert {name: found for name, found in words.items() if found} == {}


def test_no_test_file_imports_another():
    """Shared code of tests is in `tests/helpers`."""
    statement = re.compile(r"^\s*(from|import) test_", re.M)
    files = (ROOT / "tests").glob("test_*.py")
    assert [path.name for path in files if statement.search(path.read_text())] == []
    assert statement.search("    from test_layers import ROOT")


def test_controls():
    """The helpers of the rules detect violations."""
    source = (
        "def f():\n    from ascendspeed.models import families\n"
        "    import ascendspeed.training.engines.deepspeed"
    )
    assert inner(ast.parse(source)) == {"models", "training"}
    assert inner(ast.parse("from ascendspeed import data")) == {"data"}
    assert says(ast.parse('x.to("cuda:0")'), "cuda|npu") == {"cuda"}
    assert says(ast.parse("torch.npu.synchronize()"), "cuda|npu") == {"npu"}
    assert says(ast.parse("import torch.cuda"), "cuda|npu") == {"cuda"}
    assert says(ast.parse("f(cuda=1)"), "cuda|npu") == {"cuda"}
    assert not says(ast.parse('"""cuda"""\ninput = get_cuda_rng_tracker()  # npu'), "cuda|npu")


def test_nothing_happens_on_import():
    """The torch-free modules bring no torch, print nothing and leave the environment alone."""
    code = f"""
import json, os, sys
before = dict(os.environ)
for name in {TORCH_FREE}:
    __import__("ascendspeed." + name)
print(json.dumps([before == dict(os.environ), sorted({{m.split(".")[0] for m in sys.modules}})]))
from pathlib import Path
from ascendspeed.conversion.formats import registry
registry.detect_formats(Path("."))  # by the launcher, before anything starts
print(json.dumps("torch" in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (same, modules), needs_torch = map(json.loads, done.stdout.splitlines())
    assert same
    assert not needs_torch
    assert not {"torch", "megatron", "deepspeed", "transformers", "numpy", "rich.progress"} & set(modules)
    assert not done.stderr


HELP = """
import argparse, contextlib, io, json, os, runpy, sys
from ascendspeed.cli import command, train_args
for script in sys.argv[1:]:
    if not os.fork():
        output = io.StringIO()
        sys.argv, sys.path[0] = [script, "--help"], os.path.dirname(script)
        try:
            with contextlib.redirect_stdout(output):
                runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            print(json.dumps([script, end.code, output.getvalue(), sorted(sys.modules)]), flush=True)
        finally:
            os._exit(0)
    os.wait()
"""
"""Runs `SCRIPT --help` in one fork for each script; prints [script, exit code, stdout, imported modules]."""


@pytest.fixture(scope="module")
def helps(request) -> dict[str, tuple[int, str, set[str]]]:
    """Script -> exit code, stdout and imported packages of `--help`, for the scripts that are selected."""
    selected = {
        item.callspec.params["script"]
        for item in request.session.items
        if item.path == request.path and item.originalname == "test_help_is_instant"
    }
    words = [sys.executable, "-c", HELP, *map(str, sorted(selected))]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.stderr == ""
    return {
        script: (code, text, {module.split(".")[0] for module in modules})
        for script, code, text, modules in lines
    }


@pytest.mark.breadth
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_help_is_instant(script, helps):
    code, text, packages = helps[str(script)]
    assert not code
    assert "--help" in text
    assert "argparse" in packages
    assert not {"torch", "megatron", "deepspeed", "transformers"} & packages
