"""Launches a script on every device of one or more nodes, by DeepSpeed's launcher or torchrun.

    python -m ascendspeed.cli.launch [--quiet] SCRIPT FLAGS...

`examples/intern/launch.sh`, which calls it, documents the environment variables.
"""

import argparse
import importlib
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ascendspeed.cli.foreign_launchers import foreign_world
from ascendspeed.cli.supervisor import Supervisor
from ascendspeed.utils import errors
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.run_record import RunRecord

DEFAULT_PORT = 29500
MAX_PORT = 65535
HOST = re.compile(r"(\S+)\s+slots=([1-9]\d*)\s*(#.*)?")
"""Line of a HOSTFILE."""
ACCELERATOR = "DS_ACCELERATOR"
"""Variable with DeepSpeed's accelerator. Ranks on another device than the CPU remove the value `cpu`."""
DEVICE_FILES = ("nvidia[0-9]*", "davinci[0-9]*", "kfd", "dxg", "accel*")
"""Files in /dev of GPUs and NPUs, also of AMD's, of Windows' and others."""
TRAINING = "pretrain_intern.py"
TRAINING_PROGRAMS = (TRAINING, "ascendspeed.commands.train")
INFERENCE_PROGRAMS = {
    "tasks/inference/generate.py": "ascendspeed.commands.generate",
    "tasks/inference/serve.py": "ascendspeed.commands.serve",
    "tasks/evaluation/evaluation.py": "ascendspeed.commands.evaluate",
    "tasks/evaluation/needle.py": "ascendspeed.evaluation.needle",
    "tasks/inference/benchmark.py": "tasks.inference.benchmark",
}
"""Script -> module with its function `resolve(flags, processes)`. Inputs of these programs and of those of
training are checked before any process is started."""


@dataclass(frozen=True)
class LaunchPlan:
    """Command to start, and how to supervise it."""

    command: tuple[str, ...]
    supervised: bool = True
    """False: one process without a launcher, which replaces this one."""
    restarts: int = 0
    """Restarts after a process or a node is lost."""
    quiet: bool = False
    """stdout is the answer of the script; Ctrl-C is for the ranks alone."""
    remote_ranks: bool = False
    """The ranks run on other nodes, where signals of this machine do not reach them."""
    world: int | None = None
    """Number of processes on all nodes; None: one per device that the launcher finds."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the launcher."""

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str], script: Sequence[str], quiet: bool = False
    ) -> "LaunchPlan":
        """Plans the launch of `script` (a path, or the name of a module, and its flags). An empty variable
        counts as unset.

        Raises UserError if a number or the HOSTFILE is malformed, if several nodes lack a variable that
        torchrun needs, or if srun or mpirun has started several of these launchers for one node each.
        """
        hostfile = environment.get("HOSTFILE") or None
        nodes = _number(environment, "NNODES", at_least=1)
        processes = _number(environment, "NPROC", at_least=1)
        if hostfile:
            check_hostfile(hostfile)
        elif (nodes or 1) == 1 and (world := foreign_world(environment)):
            raise UserError(
                f"{world}, and each of them would start a run of its own: start one per node with NNODES, "
                "NODE_RANK, MASTER_ADDR and NPROC, as examples/intern/pretrain_internlm_65b.sbatch does"
            )
        world_size = None if hostfile or not processes else processes * (nodes or 1)
        if quiet and processes == 1 and (nodes or 1) == 1 and not hostfile:
            module = ("-m",) if is_module(script) else ()
            return cls(("python", *module, *script), supervised=False, quiet=True, world=1)
        port = _number(environment, "MASTER_PORT", at_least=1, at_most=MAX_PORT) or DEFAULT_PORT
        if (nodes or 1) > 1 and not hostfile:
            launcher = _torchrun(environment, nodes, processes, port, is_module(script))
        else:
            launcher = _deepspeed(nodes, processes, port, hostfile, is_module(script))
        restarts = 0 if quiet else _number(environment, "RESTARTS", at_least=0) or 0
        return cls(
            (*launcher, *script),
            restarts=restarts,
            quiet=quiet,
            remote_ranks=hostfile is not None,
            world=world_size,
            variables={} if hostfile else _accelerator(environment, script),
        )


def is_module(script: Sequence[str]) -> bool:
    """True if the first word of `script` is the name of a module, not the path of a file."""
    return not script[0].endswith(".py")


def default_environment(flags: Sequence[str]) -> dict[str, str]:
    """Returns the variables that launch.sh sets for every process unless they are set already."""
    variables = {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"),
        "PYTHONUNBUFFERED": "1",
    }
    if any(word.replace("_", "-").startswith(("--tensor-model-parallel-size", "--tp")) for word in flags):
        variables["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # overlaps the communication of tensor parallelism
    return variables


def check_hostfile(path: str) -> dict[str, int]:
    """Returns the slots of every host of a HOSTFILE.

    Raises UserError for one that cannot be read, names no host, or has a malformed line.

    DeepSpeed's launcher would train on this node alone without a file, and fail with a traceback otherwise.
    """
    hosts: dict[str, int] = {}
    slots: dict[str, int] = {}
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise UserError(f"HOSTFILE={path}: {reason}; it needs lines of `name slots=8`") from None
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = HOST.fullmatch(line.strip())
        if not match:
            raise UserError(f"HOSTFILE={path}, line {number}: {line.strip()!r} is not `name slots=8`")
        if match[1] in hosts:
            raise UserError(
                f"HOSTFILE={path}, line {number}: {match[1]} is in line {hosts[match[1]]} already"
            )
        hosts[match[1]] = number
        slots[match[1]] = int(match[2])
    if not hosts:
        raise UserError(f"HOSTFILE={path} names no host; it needs lines of `name slots=8`")
    return slots


def _accelerator(environment: Mapping[str, str], script: Sequence[str]) -> dict[str, str]:
    """Returns the variable that tells DeepSpeed's launcher to use the CPU, if the ranks certainly will.

    Without it, the launcher and its process for the node each warn on stderr that they found no accelerator.
    """
    is_chosen = ("--device", "cpu") in itertools.pairwise(script) or "--device=cpu" in script
    has_device = any(next(Path("/dev").glob(pattern), None) for pattern in DEVICE_FILES)
    if ACCELERATOR in environment or (has_device and not is_chosen):
        return {}
    return {ACCELERATOR: "cpu"}


def _torchrun(
    environment: Mapping[str, str], nodes: int, processes: int | None, port: int, module: bool
) -> list[str]:
    """Returns the command of torchrun, which is started once on each of several nodes."""
    needed = {
        "NODE_RANK": "(0, 1, ...) on every node, or a HOSTFILE",
        "MASTER_ADDR": "(the host name of node 0)",
        "NPROC": "(the number of processes on each node)",
    }
    for name, description in needed.items():
        if not environment.get(name):
            raise UserError(f"NNODES={nodes} needs {name} {description}")
    node_rank = _number(environment, "NODE_RANK", at_least=0)
    if node_rank >= nodes:
        raise UserError(f"NODE_RANK={node_rank} is not one of 0 ... {nodes - 1} (NNODES={nodes})")
    words = ["torchrun", "--nnodes", nodes, "--node-rank", node_rank, "--nproc-per-node", processes]
    words += ["--master-addr", environment["MASTER_ADDR"], "--master-port", port]
    words += ["--module", "--"] if module else ["--"]
    return [str(word) for word in words]


def _deepspeed(
    nodes: int | None, processes: int | None, port: int, hostfile: str | None, module: bool
) -> list[str]:
    """Returns the command of DeepSpeed's launcher: on this node, or over ssh on the nodes of a hostfile.

    Its own log lines are off: they repeat the command line of every process around the one line of an error.
    """
    words = ["deepspeed", "--no_local_rank", "--master_port", str(port), "--log_level", "critical"]
    if hostfile:
        words += ["--hostfile", hostfile]
    if nodes:
        words += ["--num_nodes", str(nodes)]
    if processes:
        words += ["--num_accelerators", str(processes)]
    if module:
        words.append("--module")
    return words


def _number(
    environment: Mapping[str, str], name: str, at_least: int, at_most: int | None = None
) -> int | None:
    """Returns the value of a variable, None if it is unset or empty. Raises UserError if it is malformed."""
    text = environment.get(name)
    if not text:
        return None
    is_number = text.isascii() and text.isdigit() and len(text) <= 9
    if not is_number or int(text) < at_least or (at_most is not None and int(text) > at_most):
        limits = f"of at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"
        raise UserError(f"{name}={text} is not a whole number {limits}")
    return int(text)


def _check_training(flags: Sequence[str], plan: LaunchPlan) -> bool:
    """Raises UserError for flags that contradict each other and for missing inputs; records it in the log.

    Returns true for a dry run.

    Inputs of the nodes of a HOSTFILE are not checked here: this node may have none of them.
    """
    from ascendspeed.cli import train_args  # here, so that answers do not wait for it

    try:
        line = train_args.parse(flags)
        is_dry = line.options.rehearsal.dry_run
        run, _ = train_args.resolve_line(line, plan.world)
        if is_dry or not plan.remote_ranks:
            train_args.check_inputs(run)
            if run.train.eval_tasks:
                importlib.import_module("ascendspeed.evaluation.training_scores").resolve(run)
    except UserError as error:
        RunRecord([TRAINING, *flags]).write_error(f"error: {error}")
        raise
    return is_dry


def _rehearse(script: str, flags: Sequence[str], environment: Mapping[str, str], world: int | None) -> None:
    """Replaces this process by the dry run of a training script for the processes that would be started."""
    hostfile = environment.get("HOSTFILE")
    if world is None and hostfile:
        nodes = _number(environment, "NNODES", at_least=1)
        most = _number(environment, "NPROC", at_least=1)
        slots = list(check_hostfile(hostfile).values())[:nodes]
        world = sum(min(count, most or count) for count in slots)
    elif world is None:
        import torch

        world = max(1, torch.accelerator.device_count())
    os.environ["WORLD_SIZE"] = str(world)
    os.execvp("python", ("python", *(("-m",) if is_module((script,)) else ()), script, *flags))


def _check_inference(script: str, flags: Sequence[str], plan: LaunchPlan) -> None:
    """Raises UserError for flags and inputs that every rank of an inference command would refuse.

    Not if the number of processes is unknown here, or if they run on the nodes of a HOSTFILE, whose files are
    not these.
    """
    name = INFERENCE_PROGRAMS.get(script, script)
    if plan.world is not None and name in INFERENCE_PROGRAMS.values():
        job, _ = importlib.import_module(name).resolve(flags, plan.world)
        check_folders = importlib.import_module("ascendspeed.inference.input_checks").check_folders
        # The benchmark reads no tokenizer.
        check_folders(job.spec.args.load, None if name.endswith("benchmark") else job.spec.tokenizer)


def main() -> int:
    """Launches the script of the command line; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m ascendspeed.cli.launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but the output of the script")
    parser.add_argument("script", help="Python script, or the name of a module, that every process runs")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="flags of the script")
    arguments = parser.parse_args()
    return start(arguments.script, arguments.flags, arguments.quiet)


def start(script: str, flags: Sequence[str], quiet: bool) -> int:
    """Launches `script`, a path or the name of a module, as the environment says; returns its exit code."""
    plan = LaunchPlan.from_environment(os.environ, (script, *flags), quiet)
    if not {"--help", "-h", "--version"} & set(flags):
        if script in TRAINING_PROGRAMS:
            if _check_training(flags, plan):
                _rehearse(script, flags, os.environ, plan.world)
        elif plan.supervised:
            _check_inference(script, flags, plan)
    if not plan.supervised:
        os.execvp(plan.command[0], plan.command)
    os.environ.update(plan.variables)
    return Supervisor(plan.command, plan.restarts, plan.quiet, plan.remote_ranks).run()


if __name__ == "__main__":
    errors.run(main)
