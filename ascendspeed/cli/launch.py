"""Launches a script on every device of one or more nodes, by DeepSpeed's launcher or torchrun.

    python -m ascendspeed.cli.launch [--quiet] SCRIPT FLAGS...

`examples/intern/launch.sh`, which calls it, documents the environment variables.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ascendspeed.cli.supervisor import Supervisor
from ascendspeed.utils import errors
from ascendspeed.utils.errors import UserError

DEFAULT_PORT = 29500


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

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str], script: Sequence[str], quiet: bool = False
    ) -> "LaunchPlan":
        """Plans the launch of `script` (a path and its flags). An empty variable counts as unset.

        Raises UserError if a number is malformed, or if several nodes lack a variable that torchrun needs.
        """
        hostfile = environment.get("HOSTFILE") or None
        nodes = _number(environment, "NNODES", at_least=1)
        processes = _number(environment, "NPROC", at_least=1)
        if quiet and processes == 1 and (nodes or 1) == 1 and not hostfile:
            return cls(("python", *script), supervised=False, quiet=True)
        port = _number(environment, "MASTER_PORT", at_least=1) or DEFAULT_PORT
        if (nodes or 1) > 1 and not hostfile:
            launcher = _torchrun(environment, nodes, processes, port)
        else:
            launcher = _deepspeed(nodes, processes, port, hostfile, quiet)
        restarts = 0 if quiet else _number(environment, "RESTARTS", at_least=0) or 0
        return cls((*launcher, *script), restarts=restarts, quiet=quiet, remote_ranks=hostfile is not None)


def _torchrun(environment: Mapping[str, str], nodes: int, processes: int | None, port: int) -> list[str]:
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
    words += ["--master-addr", environment["MASTER_ADDR"], "--master-port", port, "--"]
    return [str(word) for word in words]


def _deepspeed(
    nodes: int | None, processes: int | None, port: int, hostfile: str | None, quiet: bool
) -> list[str]:
    """Returns the command of DeepSpeed's launcher: on this node, or over ssh on the nodes of a hostfile."""
    words = ["deepspeed", "--no_local_rank", "--master_port", str(port)]
    if quiet:
        words += ["--log_level", "critical"]
    if hostfile:
        words += ["--hostfile", hostfile]
    if nodes:
        words += ["--num_nodes", str(nodes)]
    if processes:
        words += ["--num_accelerators", str(processes)]
    return words


def _number(environment: Mapping[str, str], name: str, at_least: int) -> int | None:
    """Returns the value of a variable, None if it is unset or empty. Raises UserError if it is malformed."""
    text = environment.get(name)
    if not text:
        return None
    if not (text.isascii() and text.isdigit()) or int(text) < at_least:
        raise UserError(f"{name}={text} is not a whole number of at least {at_least}")
    return int(text)


def main() -> int:
    """Launches the script of the command line; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m ascendspeed.cli.launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but the output of the script")
    parser.add_argument("script", help="Python script that every process runs")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="flags of the script")
    arguments = parser.parse_args()
    plan = LaunchPlan.from_environment(os.environ, (arguments.script, *arguments.flags), arguments.quiet)
    if not plan.supervised:
        os.execvp(plan.command[0], plan.command)
    return Supervisor(plan.command, plan.restarts, plan.quiet, plan.remote_ranks).run()


if __name__ == "__main__":
    errors.run(main)
