"""LaunchPlan: environment variables -> command line of the launcher."""

import pytest

from ascendspeed.cli.launch import LaunchPlan
from ascendspeed.utils.errors import UserError

SCRIPT = ("script.py", "--prompt", "two words")
NODES = {"NNODES": "4", "NODE_RANK": "1", "MASTER_ADDR": "node0", "NPROC": "8"}


def command(quiet: bool = False, **environment: str) -> str:
    """The words before the script, which follows as it is."""
    plan = LaunchPlan.from_environment(environment, SCRIPT, quiet)
    assert plan.command[-len(SCRIPT) :] == SCRIPT
    return " ".join(plan.command[: -len(SCRIPT)])


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "deepspeed --no_local_rank --master_port 29500"),
        (
            {"NPROC": "4", "MASTER_PORT": "1234"},
            "deepspeed --no_local_rank --master_port 1234 --num_accelerators 4",
        ),
        (
            {"NPROC": "", "NNODES": "", "HOSTFILE": "", "MASTER_PORT": ""},
            "deepspeed --no_local_rank --master_port 29500",
        ),
        ({"NNODES": "1"}, "deepspeed --no_local_rank --master_port 29500 --num_nodes 1"),
        ({"HOSTFILE": "hosts"}, "deepspeed --no_local_rank --master_port 29500 --hostfile hosts"),
        (
            NODES,
            "torchrun --nnodes 4 --node-rank 1 --nproc-per-node 8 --master-addr node0 --master-port 29500 --",
        ),
        (
            NODES | {"HOSTFILE": "hosts"},  # a hostfile decides
            "deepspeed --no_local_rank --master_port 29500 --hostfile hosts --num_nodes 4 --num_accelerators "
            "8",
        ),
    ],
)
def test_launchers(environment, words):
    assert command(**environment) == words


def test_quiet_mode_silences_deepspeed():
    assert command(quiet=True, NPROC="2") == (
        "deepspeed --no_local_rank --master_port 29500 --log_level critical --num_accelerators 2"
    )
    assert command(quiet=True, **NODES).startswith("torchrun ")


@pytest.mark.parametrize(
    ("quiet", "environment", "launcher"),
    [
        (True, {"NPROC": "1"}, "python"),
        (True, {"NPROC": "1", "NNODES": "1"}, "python"),
        (True, {}, "deepspeed"),  # one process per device
        (True, {"NPROC": "1", "HOSTFILE": "hosts"}, "deepspeed"),
        (True, NODES | {"NPROC": "1"}, "torchrun"),
        (False, {"NPROC": "1"}, "deepspeed"),  # its engine wants a process group
    ],
)
def test_one_quiet_process_needs_no_launcher(quiet, environment, launcher):
    plan = LaunchPlan.from_environment(environment, SCRIPT, quiet)
    assert plan.command[0] == launcher
    assert plan.supervised == (launcher != "python")


def test_supervision():
    plan = LaunchPlan.from_environment({"RESTARTS": "3", "HOSTFILE": "hosts"}, SCRIPT)
    assert (plan.restarts, plan.quiet, plan.remote_ranks) == (3, False, True)
    plan = LaunchPlan.from_environment({"RESTARTS": "3"}, SCRIPT, quiet=True)  # an answer is not given twice
    assert (plan.restarts, plan.quiet, plan.remote_ranks) == (0, True, False)
    assert LaunchPlan.from_environment({"RESTARTS": ""}, SCRIPT).restarts == 0


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NNODES": "two"}, "NNODES=two is not a whole number of at least 1"),
        ({"NNODES": "0"}, "NNODES=0 is not a whole number of at least 1"),
        ({"NPROC": "-1"}, "NPROC=-1 is not"),
        ({"MASTER_PORT": "port"}, "MASTER_PORT=port is not"),
        ({"RESTARTS": "often"}, "RESTARTS=often is not a whole number of at least 0"),
        ({"NNODES": "2"}, r"NNODES=2 needs NODE_RANK \(0, 1, \.\.\.\) on every node, or a HOSTFILE"),
        (NODES | {"MASTER_ADDR": ""}, "NNODES=4 needs MASTER_ADDR"),
        (NODES | {"NPROC": ""}, "NNODES=4 needs NPROC"),
        (NODES | {"NODE_RANK": "4"}, r"NODE_RANK=4 is not one of 0 \.\.\. 3"),
    ],
)
def test_mistakes(environment, message):
    with pytest.raises(UserError, match=message):
        LaunchPlan.from_environment(environment, SCRIPT)
