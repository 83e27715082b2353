"""LaunchPlan: environment variables -> command line of the launcher."""

import pytest

from ascendspeed.cli import launch
from ascendspeed.cli.command import world_size
from ascendspeed.cli.launch import LaunchPlan
from ascendspeed.utils.errors import UserError

DEEPSPEED = "deepspeed --no_local_rank --master_port 29500 --log_level critical"
SCRIPT = ("script.py", "--prompt", "two words")
NODES = {"NNODES": "4", "NODE_RANK": "1", "MASTER_ADDR": "node0", "NPROC": "8"}


@pytest.fixture(autouse=True)
def hosts(tmp_path, monkeypatch):
    """A folder with a HOSTFILE of two nodes."""
    (tmp_path / "hosts").write_text("# the nodes\n\nnode0 slots=8\nnode1  slots=8 # the second\n")
    monkeypatch.chdir(tmp_path)


def command(quiet: bool = False, **environment: str) -> str:
    """The words before the script, which follows as it is."""
    plan = LaunchPlan.from_environment(environment, SCRIPT, quiet)
    assert plan.command[-len(SCRIPT) :] == SCRIPT
    return " ".join(plan.command[: -len(SCRIPT)])


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, DEEPSPEED),
        (
            {"NPROC": "4", "MASTER_PORT": "1234"},
            "deepspeed --no_local_rank --master_port 1234 --log_level critical --num_accelerators 4",
        ),
        (
            {"NPROC": "", "NNODES": "", "HOSTFILE": "", "MASTER_PORT": ""},
            DEEPSPEED,
        ),
        ({"NNODES": "1"}, f"{DEEPSPEED} --num_nodes 1"),
        (
            {"HOSTFILE": "hosts"},
            f"{DEEPSPEED} --hostfile hosts",
        ),
        (
            NODES,
            "torchrun --nnodes 4 --node-rank 1 --nproc-per-node 8 --master-addr node0 --master-port 29500 --",
        ),
        (
            NODES | {"HOSTFILE": "hosts"},  # a hostfile decides
            f"{DEEPSPEED} --hostfile hosts --num_nodes 4 --num_accelerators 8",
        ),
    ],
)
def test_launchers(environment, words):
    assert command(**environment) == words


def accelerator(*flags: str, devices: tuple[str, ...] = (), **environment: str) -> dict[str, str]:
    """Variables of the launcher on a machine with these files in /dev."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "DEVICE_FILES", devices)
        return dict(LaunchPlan.from_environment(environment, (*SCRIPT, *flags)).variables)


def test_the_launcher_is_told_of_the_cpu():
    """Its warnings that it found no accelerator would stand between the lines of the log."""
    assert accelerator() == accelerator("--device", "cpu", devices=("null",)) == {"DS_ACCELERATOR": "cpu"}
    assert accelerator("--device=cpu", devices=("null",)) == {"DS_ACCELERATOR": "cpu"}
    assert accelerator(devices=("null",)) == accelerator("--device", "auto", devices=("null",)) == {}
    assert accelerator(DS_ACCELERATOR="xpu") == accelerator(HOSTFILE="hosts") == {}  # the user's; other nodes


def test_answers_and_training_have_the_same_launchers():
    assert command(quiet=True, NPROC="2") == command(NPROC="2")
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
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999 is not a whole number from 1 to 65535"),
        ({"NPROC": "9" * 30}, "NPROC=9+ is not a whole number"),
        (
            {"HOSTFILE": "hosst"},
            "HOSTFILE=hosst: No such file or directory; it needs lines of `name slots=8`",
        ),
        ({"HOSTFILE": "."}, "HOSTFILE=.: Is a directory"),
    ],
)
def test_mistakes(environment, message):
    with pytest.raises(UserError, match=message):
        LaunchPlan.from_environment(environment, SCRIPT)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "HOSTFILE=hosts names no host; it needs lines"),
        ("# node0 slots=8\n\n", "HOSTFILE=hosts names no host"),
        ("node0 slots=8\nnode1\n", "HOSTFILE=hosts, line 2: 'node1' is not `name slots=8`"),
        ("node0 slots=eight\n", "line 1: 'node0 slots=eight' is not"),
        ("node0 slots=0\n", "line 1: 'node0 slots=0' is not"),
        ("node0 slots=8 gpu\n", "line 1: 'node0 slots=8 gpu' is not"),
        ("node0 slots=8\nnode0 slots=8\n", "line 2: node0 is in line 1 already"),
        (b"\xff\xfen\x00", "HOSTFILE=hosts: it is not text"),
    ],
)
def test_hostfiles(tmp_path, text, message):
    (tmp_path / "hosts").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        LaunchPlan.from_environment({"HOSTFILE": "hosts"}, SCRIPT)


SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("environment", "variable"),
    [
        (SRUN, "SLURM_NTASKS=4"),
        (BATCH | {"SLURM_PROCID": "3"}, "SLURM_NTASKS=4"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "SLURM_NTASKS=2"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2"),
        ({"PMI_SIZE": "8"}, "PMI_SIZE=8"),
        ({"MV2_COMM_WORLD_SIZE": "8"}, "MV2_COMM_WORLD_SIZE=8"),
    ],
)
def test_processes_that_srun_or_mpirun_started_do_not_run_alone(environment, variable, monkeypatch):
    """Neither the recipes nor the scripts themselves."""
    with pytest.raises(UserError, match=f"{variable}.*would start a run of its own"):
        LaunchPlan.from_environment(environment, SCRIPT)
    assert command(**environment, **NODES)  # one launcher on each node
    assert command(**environment, HOSTFILE="hosts")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{variable}.*each of them would run alone: start torchrun"):
        world_size()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert world_size() == 1


@pytest.mark.parametrize(
    "environment", [{}, BATCH, SRUN | {"SLURM_NTASKS": "1"}, {"PMI_SIZE": "1"}, {"SLURM_NTASKS": "x"}]
)
def test_control_one_process_and_a_batch_script(environment, monkeypatch):
    assert command(**environment)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert world_size() == 1


@pytest.mark.parametrize(
    ("environment", "world"),
    [({}, None), ({"NPROC": "4"}, 4), (NODES, 32), ({"NPROC": "4", "HOSTFILE": "hosts"}, None)],
)
def test_the_number_of_processes(environment, world):
    assert LaunchPlan.from_environment(environment, SCRIPT).world == world
