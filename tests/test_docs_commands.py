"""Documented commands, typed in the order of their page in one shell, with stand-ins for the programs.

The shell code (recipes, launch.sh) is real; flags are parsed by the real parser of each script. Stand-ins
refuse what a reader would meet: a file that nothing fetches, an output that an earlier command has filled,
a variable that is still exported.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import recipes
from helpers.conversion import load_script
from helpers.launch import ROOT
from helpers.pages import FENCE, PAGES, named

from ascendspeed.cli import command, train_args
from ascendspeed.cli.compat import TABLES
from ascendspeed.evaluation.args import EvaluateCommand
from ascendspeed.evaluation.needle import NeedleCommand
from ascendspeed.inference.args import GenerateCommand
from ascendspeed.inference.serving.args import ServeCommand
from ascendspeed.models.families import FAMILIES, PRESETS
from ascendspeed.utils.errors import UserError

OTHER_MACHINES = ("ascend-toolkit",)
"""Blocks with one of these words are for a machine with an NPU, instead of the block before them."""
FRESH = {"README.md", "examples/intern/README.md", "benchmarks/README.md", "CONTRIBUTING.md"}
"""Pages that begin in a new clone; the others begin where README ends."""
OWN_FILES = {
    "docs/coming-from.md": [
        *["THEIRS/", "internlm-7b/", "internlm2-7b/", "llama-7b/", "checkpoints/run/iter_0005000/"],
        *["internlm2-mindformers/", "internlm2-tp8-pp1/", "ckpt-chat/", "llm_ckpts/5000/", "internlm2.model"],
    ],
    "docs/optimizer.md": ["ckpt/step_0020000/"],
    "docs/hand-over.md": ["internlm2-chat-7b/"],
    "docs/loss-parity.md": ["LOG", ".parity/cand/origin.json"],
    "examples/intern/README.md": ["logs_ref/train.log", "logs_cand/train.log", "text_200K.jsonl"],
}
"""Files that stand for the reader's own, by the words of the page."""
PROGRAMS = ("python", "deepspeed", "intern", "pip", "git", "wget", "sbatch")
COMMANDS = {
    "tasks/inference/generate.py": GenerateCommand,
    "tasks/inference/serve.py": ServeCommand,
    "tasks/evaluation/evaluation.py": EvaluateCommand,
    "tasks/evaluation/needle.py": NeedleCommand,
}
QUICKSTART = """
mkdir -p .quickstart/data/tokenizer
touch .quickstart/alpaca_text_document.idx .quickstart/data/tokenizer/tokenizer.model
"""


def blocks(text: str) -> list[str]:
    """Bash blocks for this machine."""
    found = [block for language, block in FENCE.findall(text) if language == "bash"]
    return [block for block in found if not any(word in block for word in OTHER_MACHINES)]


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    """A folder of stand-ins, and in `configs` the config.json of every preset."""
    folder = tmp_path_factory.mktemp("programs")
    text = (ROOT / "tests/helpers/standin.py").read_text()
    for name in PROGRAMS:
        recipes.program(folder, name, f"#!{sys.executable} -SE\n{text}")
    (folder / "configs").mkdir()
    for name, config in PRESETS.items():
        config_json = FAMILIES[config.family].write_config(config)
        (folder / "configs" / f"{name}.json").write_text(json.dumps(config_json))
    for chat, base in (("internlm2-chat-7b", "internlm2-7b"),):
        shutil.copyfile(folder / f"configs/{base}.json", folder / f"configs/{chat}.json")
    return folder


def new_clone(folder: Path) -> Path:
    """A folder with the shell code of the repository."""
    for name in ("examples", "tasks", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in (("tools/setup.sh", ""), ("tests/run.sh", "")):
        recipes.program((folder / name).parent, Path(name).name, text)
    recipes.program(folder / "examples/intern", "quickstart.sh", QUICKSTART)
    return folder


def run_page(folder: Path, programs: Path, shell: str) -> list[tuple[str, list[str], dict[str, str]]]:
    """Types `shell` in `folder`; returns (script, flags, variables) of what it starts. Every command must end
    with 0.
    """
    log = folder / "standin.jsonl"
    log.write_text("")
    env = recipes.clean(
        PATH=f"{programs}{os.pathsep}{os.environ['PATH']}",
        STANDIN_LOG=str(log),
        STANDIN_CONFIGS=str(programs / "configs"),
        STANDIN_PYTHON=sys.executable,
    )
    typed = f"set -eu -o pipefail\n{shell}"
    done = subprocess.run(["bash", "-c", typed], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
    return [tuple(json.loads(line)) for line in log.read_text().splitlines()]


def devices(variables: dict[str, str], folder: Path) -> int:
    """Number of processes of a launch; 8 where the page gives no number."""
    if variables["HOSTFILE"]:
        hosts = (folder / variables["HOSTFILE"]).read_text().splitlines()
        return sum(int(line.rpartition("slots=")[2]) for line in hosts)
    return int(variables["NNODES"] or 1) * int(variables["NPROC"] or 8)


def parse(script: str, flags: list[str], world: int) -> None:
    """Parses a command by the script's own parser; training is checked for `world` processes too."""
    if script == "pretrain_intern.py":
        train_args.resolve(flags, world)
    elif script in COMMANDS:
        command.parse(COMMANDS[script], flags, TABLES.get(script))
    elif not script.startswith("benchmarks"):  # their flags are compared with --help by test_docs.py
        module = load_script(ROOT / script)
        options = module.BenchmarkCommand if script.endswith("benchmark.py") else module.Options
        command.parse(options, flags, TABLES.get(script))


def check(page: str, folder: Path, programs: Path, monkeypatch, shell: str) -> None:
    for name in OWN_FILES.get(page, []):
        if name.endswith("/"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        else:
            recipes.program((folder / name).parent, Path(name).name, "")
    started = run_page(folder, programs, shell)
    monkeypatch.chdir(folder)
    for script, flags, variables in started:
        try:
            parse(script, flags, devices(variables, folder))
        except UserError as error:
            raise AssertionError(f"{script} {' '.join(flags)}: {error}") from error


@pytest.fixture(scope="module")
def after_readme(tmp_path_factory, programs) -> Path:
    """The repository after all commands of README."""
    folder = new_clone(tmp_path_factory.mktemp("readme") / "clone")
    run_page(folder, programs, "\n".join(blocks((ROOT / "README.md").read_text())))
    return folder


@pytest.mark.parametrize("page", [path for path in PAGES if blocks(path.read_text())], ids=named)
def test_commands_work_as_typed(page, tmp_path, programs, request, monkeypatch):
    folder = tmp_path / "clone"
    if named(page) in FRESH:
        new_clone(folder)
    else:
        shutil.copytree(request.getfixturevalue("after_readme"), folder)
    check(named(page), folder, programs, monkeypatch, "\n".join(blocks(page.read_text())))


def test_a_command_of_internevo_names_its_replacement():
    module = load_script(ROOT / "tools/alpaca_tokenizer.py")
    words = ["my data.json", "out", "dir/tokenizer.model"]
    line = module.replacement(command.parse(module.Options, words).options)
    first, second = line.split(" && ")
    script, *flags = shlex.split(first)[1:]
    options = command.parse(load_script(ROOT / script).Options, flags, TABLES.get(script)).options
    assert (list(options.input), str(options.tokenizer_name_or_path)) == (["my data.json"], "dir")
    assert second == "DATA=out bash examples/intern/finetune_internlm_7b_alpaca.sh"


CONTROLS = {
    "a file that nothing fetches": (
        "CHECKPOINT=ckpt bash examples/intern/pretrain_internlm_7b_zero.sh",
        "no data ./dataset/alpaca_text_document",
    ),
    "an output that is filled": (
        "touch x.parquet d.idx\nmkdir -p dataset/internlm\ntouch dataset/internlm/tokenizer.model\n"
        + "DATA=d CHECKPOINT= bash examples/intern/pretrain_internlm_7b_zero.sh\n" * 2,
        "already holds checkpoints",
    ),
    "an exported variable that is still set": (
        "git clone https://huggingface.co/internlm/internlm-7b\nexport CHECKPOINT=internlm-7b\n"
        "touch d.idx\nmkdir -p dataset/internlm2\ntouch dataset/internlm2/tokenizer.model\n"
        "DATA=d bash examples/intern/finetune_internlm2_7b_alpaca.sh",
        "--model internlm2-7b sets family = internlm2, but --load internlm-7b",
    ),
    "processes that are still exported": (
        "mkdir c\nexport NPROC=2\nintern generate --load c --prompt x",
        "2 processes were started, but TP 1 x PP 1 are 1",
    ),
    "a clone twice": ("git clone https://x.org/a/b\n" * 2, "b exists and is not empty"),
    "an unknown flag": (
        "touch a b\npython tools/compare_loss.py a b --bf16",
        "unknown flag --bf16",
    ),
    "a layout that does not split": (
        "touch d.idx\nmkdir -p dataset/internlm\ntouch dataset/internlm/tokenizer.model\n"
        "NPROC=3 TP=2 DATA=d CHECKPOINT= bash examples/intern/pretrain_internlm_7b_zero.sh",
        "3 processes do not split into groups of 2 for TP 2",
    ),
}


@pytest.mark.parametrize(("shell", "message"), CONTROLS.values(), ids=CONTROLS.keys())
def test_control_what_a_reader_would_meet_is_found(shell, message, tmp_path, programs, monkeypatch):
    with pytest.raises(AssertionError) as error:
        check("", new_clone(tmp_path / "clone"), programs, monkeypatch, shell)
    assert message in str(error.value)
