"""Console script `intern`: one command with a subcommand for each task."""

import contextlib
import importlib
import importlib.util
import io
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import ascendspeed
from ascendspeed.utils import errors
from ascendspeed.utils.errors import UserError

PACKAGE = "ascendspeed.commands"
SHELLS = ("bash", "zsh")
NPROC_FLAGS = ("--nproc", "--nproc-per-node")
LAUNCH_VARIABLES = ("NPROC", "NNODES", "HOSTFILE", "RESTARTS")
"""Variables of examples/intern/launch.sh that ask for a launcher."""


@dataclass(frozen=True)
class Subcommand:
    """A subcommand of `intern`."""

    name: str
    summary: str
    module: str
    """Module of `ascendspeed.commands` with `run_command`."""
    options: str
    """Dataclass of the flags: `module:Class`, or the name of a class in `module`."""
    preset: tuple[str, ...] = ()
    """Flags that come before those of the command line."""
    ranks: bool = False
    """The command can run on several processes."""
    quiet: bool = True
    """stdout of several processes is the answer."""

    @property
    def exists(self) -> bool:
        """True if this installation has the command."""
        return importlib.util.find_spec(f"{PACKAGE}.{self.module}") is not None


COMMANDS = (
    Subcommand(
        "train",
        "pre-train or fine-tune a model",
        "train",
        "ascendspeed.cli.train_args:TrainCommand",
        ranks=True,
        quiet=False,
    ),
    Subcommand("data", "tokenize text or conversations", "data", "DataCommand"),
    Subcommand("convert", "convert a checkpoint to another format", "convert", "ConvertCommand"),
    Subcommand(
        "generate",
        "complete prompts",
        "generate",
        "ascendspeed.inference.args:GenerateCommand",
        ranks=True,
    ),
    Subcommand(
        "chat",
        "chat with a model at the terminal",
        "generate",
        "ascendspeed.inference.args:GenerateCommand",
        ("--task", "chat"),
        ranks=True,
    ),
    Subcommand(
        "serve",
        "serve a model over HTTP with OpenAI's API",
        "serve",
        "ascendspeed.inference.serving.args:ServeCommand",
        ranks=True,
    ),
    Subcommand(
        "eval",
        "score a model on benchmark files",
        "evaluate",
        "ascendspeed.evaluation.args:EvaluateCommand",
        ranks=True,
    ),
    Subcommand("plan", "estimate memory and time of a run before its start", "plan", "PlanCommand"),
    Subcommand("report", "write the page of a run, or of two that are compared", "report", "ReportCommand"),
    Subcommand("compare", "compare the losses of two runs", "compare", "CompareCommand"),
    Subcommand("doctor", "check the installation and the machine", "doctor", "DoctorCommand"),
    Subcommand("quickstart", "run the whole chain with a tiny model", "quickstart", "QuickstartCommand"),
)


def available() -> list[Subcommand]:
    """Returns the commands of this installation."""
    return [command for command in COMMANDS if command.exists]


def usage() -> str:
    """Text of `intern --help`."""
    rows = [f"  {command.name:<12}{command.summary}" for command in available()]
    return "\n".join(
        [
            "usage: intern COMMAND [FLAGS]",
            "",
            "Trains, converts, serves and evaluates InternLM on CPU, CUDA and Ascend NPU.",
            "",
            "commands:",
            *rows,
            "",
            "options:",
            "  --help      show this text; `intern COMMAND --help` shows the flags of a command",
            "  --version   show the version",
            f"  --completion {{{','.join(SHELLS)}}}",
            "              print the completion script of a shell",
            "",
            "train, generate, chat, serve and eval run on several processes of this node with --nproc N,",
            "or with the variables of examples/intern/launch.sh (NPROC, NNODES, HOSTFILE, RESTARTS).",
        ]
    )


def completion(shell: str) -> str:
    """Returns the completion script of a shell. Raises UserError for an unknown shell."""
    if shell not in SHELLS:
        raise UserError(f"--completion {shell!r}: choose {', '.join(SHELLS)}")
    import tyro

    classes = {command.name: options_class(command) for command in available()}
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        tyro.extras.subcommand_cli_from_dict(
            classes,
            prog="intern",
            args=["--tyro-print-completion", shell],
            config=(tyro.conf.OmitArgPrefixes,),
        )
    return "\n".join(_one_line_helps(line) for line in output.getvalue().splitlines())


def _one_line_helps(line: str) -> str:
    """Removes line breaks from the helps of a completion script: each would begin another candidate."""
    return line.replace(r"\n", " ") if line.startswith("COMPLETION_SPEC") else line


def options_class(command: Subcommand) -> Any:
    """Returns the dataclass of a command's flags."""
    module, _, name = command.options.rpartition(":")
    return getattr(importlib.import_module(module or f"{PACKAGE}.{command.module}"), name)


def find_command(name: str) -> Subcommand:
    """Returns the command of a name. Raises UserError if there is none."""
    commands = {command.name: command for command in available()}
    if name in commands:
        return commands[name]
    near = get_close_matches(name, commands, 1)
    hint = f" (perhaps {near[0]})" if near else ""
    raise UserError(f"intern has no command {name!r}{hint}; choose {', '.join(commands)}")


def take_nproc(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Returns the value of --nproc, None without it, and the other words. Raises UserError without value."""
    rest: list[str] = []
    nproc = None
    queue = list(words)
    while queue:
        word = queue.pop(0)
        flag, equals, value = word.partition("=")
        if flag.replace("_", "-") not in NPROC_FLAGS:
            rest.append(word)
            continue
        if not equals:
            value = queue.pop(0) if queue else ""
        if not value.isdigit() or int(value) < 1:
            raise UserError(
                f"{f'{flag} {value}'.rstrip()}: give the number of processes on this node, at least 1"
            )
        nproc = value
    return nproc, rest


def _launch(command: Subcommand, words: Sequence[str], nproc: str | None) -> int:
    """Starts the processes of a command by the launcher; returns its exit code."""
    from ascendspeed.cli import launch

    defaults = {"RECIPE": shlex.join(["intern", *sys.argv[1:]]), **launch.default_environment(words)}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if nproc:
        os.environ["NPROC"] = nproc
    programs = str(Path(sys.executable).parent)  # torchrun and deepspeed of this environment
    os.environ["PATH"] = os.pathsep.join([programs, os.environ.get("PATH", "")])
    return launch.start(f"{PACKAGE}.{command.module}", words, command.quiet)


def _wants_launcher(command: Subcommand, nproc: str | None, words: Sequence[str]) -> bool:
    """True if the command line or the environment asks for a launcher, and none has started this process."""
    if not command.ranks or "WORLD_SIZE" in os.environ or {"-h", "--help", "--version"} & set(words):
        return False
    if nproc is not None:
        return nproc != "1" or bool(os.environ.get("RESTARTS"))
    return any(os.environ.get(name) for name in LAUNCH_VARIABLES)


def main() -> int:
    """Runs `intern`."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else errors.EXIT_USER_ERROR
    if words[0] == "--version":
        print(f"ascendspeed {ascendspeed.__version__}")
        return 0
    if words[0].partition("=")[0] == "--completion":
        shell = words[0].partition("=")[2] or "".join(words[1:2])
        print(completion(shell))
        return 0
    return run_subcommand(find_command(words[0]), words[1:])


def run_subcommand(command: Subcommand, flags: Sequence[str]) -> int:
    """Runs a command with its flags, in this process or by the launcher; returns its exit code."""
    nproc, flags = take_nproc(flags) if command.ranks else (None, list(flags))
    flags = [*command.preset, *flags]
    if _wants_launcher(command, nproc, flags):
        return _launch(command, flags, nproc)
    sys.argv = [f"intern {command.name}", *flags]
    importlib.import_module(f"{PACKAGE}.{command.module}").run_command()
    return 0


def run_command() -> None:
    """Runs the command as a program."""
    errors.run(main)


if __name__ == "__main__":
    run_command()
