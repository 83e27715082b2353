"""Supervisor: exit codes, signals and the guard, with bash scripts in place of `deepspeed` and its ranks."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

import psutil
import pytest
from helpers import launch, recipes

from ascendspeed.cli import supervisor

LAUNCH = [sys.executable, "-m", "ascendspeed.cli.launch"]
SECONDS = 120
"""Longest wait for a process. A supervisor that leaves ranks behind, which hold its pipes, fails the test."""
VARIABLES = ("HOSTFILE", "NNODES", "NPROC", "RESTARTS", "MASTER_PORT", "EXIT_CODE_FILE")


class Bounded(subprocess.Popen):
    """A process that is waited for with a limit, by any method of `subprocess`."""

    def communicate(self, text=None, timeout=SECONDS):
        return super().communicate(text, timeout)

    def wait(self, timeout=SECONDS):
        return super().wait(timeout)


def read_line(stream) -> str:
    assert select.select([stream], [], [], SECONDS)[0], "no line came"
    return stream.readline()


def end(process: subprocess.Popen, log) -> None:
    """Ends a process that a failed test left, and everything that it started."""
    if process.poll() is None:
        process.kill()
    for other in psutil.process_iter():
        if f"LOG={log}" in _environment(other):
            with contextlib.suppress(psutil.Error):
                other.kill()
    with contextlib.suppress(ValueError, subprocess.TimeoutExpired):  # the pipes may be closed already
        process.communicate(timeout=10)


def wait_until(condition) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path):
    """Starts the launcher over a `deepspeed` of these bash lines; LOG is a file for it and its ranks."""
    log, temporary = tmp_path / "log", tmp_path / "temporary"
    temporary.mkdir()
    started: list[subprocess.Popen] = []

    def go(lines: str, *options: str, before=None, **env: str) -> subprocess.Popen:
        log.unlink(missing_ok=True)
        recipes.program(tmp_path / "bin", "deepspeed", f"#!/usr/bin/env bash\n{lines}\n")
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        inherited = {name: value for name, value in launch.environment().items() if name not in VARIABLES}
        env = inherited | {"PATH": path, "LOG": str(log), "TMPDIR": str(temporary)} | env
        pipe = subprocess.PIPE
        process = Bounded(
            [*LAUNCH, *options, "script.py"],
            env=env,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
            preexec_fn=before,
        )
        started.append(process)
        return process

    def wait_for(word: str) -> None:
        wait_until(lambda: log.exists() and word in log.read_text())

    go.log, go.wait_for, go.temporary = log, wait_for, temporary
    yield go
    for process in started:
        end(process, log)


def rank(traps: str, then: str = "wait $!; exit $?") -> str:
    """A rank that handles signals by these bash traps, below a launcher that then does this."""
    return f"""
RANK=0 bash -c '{traps}; echo ready >> "$LOG"; for i in {{1..600}}; do sleep 0.05; done' &
{then}"""


# --- exit codes


@pytest.mark.parametrize(
    ("lines", "code", "options"),
    [
        ("exit 0", 0, ()),
        ("exit 69", 69, ("--quiet",)),
        ('echo 69 > "$EXIT_CODE_FILE"; exit 1', 69, ()),  # torchrun
        ('echo 69 > "$EXIT_CODE_FILE"; exit 1', 69, ("--quiet",)),
        ('echo 69 > "$EXIT_CODE_FILE"; exit 3', 3, ()),  # control: a launcher's own code stands
        ("exit 1", 1, ()),
        ("exit 241", 241, ("--quiet",)),  # of a killed rank, without Ctrl-C
    ],
)
def test_exit_codes(start, lines, code, options):
    process = start(lines, *options)
    assert process.communicate() == ("", "")
    assert process.returncode == code
    assert not list(start.temporary.iterdir())  # the file of the exit code is gone


def test_a_killed_process_is_reported(start):
    process = start("kill -KILL $$")
    assert process.communicate()[1] == (
        "exit code 137: a process was killed (SIGKILL); the kernel does that when memory runs out "
        "(dmesg tells)\n"
    )
    assert process.returncode == 137


CUT_OFF = {
    "no word": 'RANK=0 bash -c \'trap "" TERM HUP; echo ready >> "$LOG"; exec sleep 600\' & '
    'until grep -q ready "$LOG"; do sleep 0.02; done; exit 0',
    "a rank was running": 'echo running > "$EXIT_CODE_FILE"; exit 0',
}


@pytest.mark.parametrize(
    "lines", [CUT_OFF["a rank was running"], pytest.param(CUT_OFF["no word"], marks=pytest.mark.slow)]
)
def test_success_without_the_ranks_is_a_lost_rank(start, lines):
    """DeepSpeed's runner ends with 0 when the launcher of the node was killed; no rank is left behind."""
    process = start(f'touch "$LOG"; {lines}', RESTARTS="0")
    _, errors = process.communicate()
    assert process.returncode == 69
    assert errors.startswith("the launcher ended before its ranks")
    marked = [p for p in psutil.process_iter() if f"LOG={start.log}" in _environment(p)]
    assert not marked


def test_a_restart_does_not_meet_older_ranks(start):
    """A killed launcher leaves ranks, which hold the port."""
    lines = """
n=$(grep -c start "$LOG" 2> /dev/null)
echo start >> "$LOG"
[ "$n" = 1 ] && { echo 0 > "$EXIT_CODE_FILE"; pgrep -f "sleep 98765" > "$LOG.left"; exit 0; }
RANK=0 sleep 98765 &
kill -KILL $$"""
    process = start(lines, RESTARTS="1")
    _, errors = process.communicate()
    assert process.returncode == 0
    assert "exit code 137; starting again" in errors
    assert start.log.with_name("log.left").read_text() == ""


def test_a_missing_launcher_is_one_line_without_restarts(start):
    process = start("", PATH="/nowhere", RESTARTS="3")
    _, errors = process.communicate()
    assert (process.returncode, errors.count("\n")) == (2, 1)
    assert errors.startswith("error: cannot start deepspeed: No such file or directory")


def test_stdin_stdout_and_flags_pass_through(start):
    process = start('echo "$@"; cat', "--quiet")
    output, _ = process.communicate("a question\n")
    assert output.endswith("script.py\na question\n")


def test_an_older_exit_code_is_not_that_of_a_restart(start):
    """The first start leaves 69; the second ends with the launcher's 1."""
    lines = 'echo start >> "$LOG"; [ "$(wc -l < "$LOG")" = 2 ] || echo 69 > "$EXIT_CODE_FILE"; exit 1'
    process = start(lines, RESTARTS="1")
    _, errors = process.communicate()
    assert process.returncode == 1
    assert errors == "exit code 69; starting again with --auto-resume (restarts left: 1)\n"


def test_an_answer_is_never_started_again(start):
    process = start('echo start >> "$LOG"; exit 69', "--quiet", RESTARTS="3")
    assert process.wait() == 69
    assert start.log.read_text() == "start\n"


def _environment(process: psutil.Process) -> list[str]:
    try:
        return [f"{name}={value}" for name, value in process.environ().items()]
    except psutil.Error:
        return []


# --- signals


@pytest.mark.parametrize(
    ("options", "sent", "received"),
    [
        ((), "TERM", "TERM"),
        ((), "INT", "TERM"),
        ((), "USR1", "USR1"),
        (("--quiet",), "TERM", "TERM"),
        (("--quiet",), "HUP", "TERM"),
        (("--quiet",), "INT", "TERM"),  # bash cannot catch a SIGINT that it inherited as ignored
    ],
)
def test_signals_go_to_the_ranks(start, options, sent, received):
    traps = "; ".join(f'trap "echo {name} >> $LOG; exit 75" {name}' for name in ("TERM", "USR1", "INT"))
    process = start(rank(traps), *options, RESTARTS="1")
    start.wait_for("ready")
    process.send_signal(getattr(signal, f"SIG{sent}"))
    interrupted = options and sent == "INT"
    assert process.wait() == (130 if interrupted else 75)
    assert start.log.read_text().split() == ["ready", received]


PYTHON_RANK = f"""
RANK=0 {sys.executable} -c '
import os, signal, time
def interrupt(number, frame):
    print("INT", file=open(os.environ["LOG"], "a"), flush=True)
    if os.environ["STAY"] != "yes":
        os._exit(130)
signal.signal(signal.SIGINT, interrupt)
print("ready", file=open(os.environ["LOG"], "a"), flush=True)
for _ in range(600): time.sleep(0.05)' &
wait $!
exit ${{CODE:-$?}}"""


@pytest.mark.parametrize("code", ["241", "130"])
def test_ctrl_c_that_a_rank_catches(start, code):
    """A rank that leaves may take the others down with it: DeepSpeed's code for that is Ctrl-C's too."""
    process = start(PYTHON_RANK, "--quiet", CODE=code, STAY="no")
    start.wait_for("ready")
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == ""  # the rank says it
    assert process.returncode == 130


def test_ctrl_c_ends_an_answer_and_the_ranks_stay(start):
    process = start(PYTHON_RANK, "--quiet", STAY="yes")
    start.wait_for("ready")
    process.send_signal(signal.SIGINT)
    start.wait_for("INT")
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM


def test_sigusr1_does_not_reach_the_ranks_of_a_hostfile(start):
    """It is reported, and nothing was stopped: restarts go on."""
    lines = (
        'echo start >> "$LOG"; [ "$(wc -l < "$LOG")" = 1 ] || exit 0; '
        'until [ -e "$LOG.go" ]; do sleep 0.05; done; exit 69'
    )
    hosts = start.log.with_name("hosts")
    hosts.write_text("node0 slots=1\n")
    process = start(lines, HOSTFILE=str(hosts), RESTARTS="1")
    start.wait_for("start")
    process.send_signal(signal.SIGUSR1)
    assert read_line(process.stderr) == (
        "signals do not reach the ranks of a HOSTFILE: send SIGUSR1 to one of them, on its node\n"
    )
    start.log.with_name("log.go").touch()
    assert process.wait() == 0
    assert start.log.read_text().split() == ["start", "start"]


def test_a_signal_that_is_ignored_at_the_start_stays_ignored(start):
    """As under nohup."""
    process = start(rank("true"), "--quiet", before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    start.wait_for("ready")
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGTERM)  # control
    assert process.wait() == 128 + signal.SIGTERM


# --- processes


@pytest.fixture
def tree():
    """A process with a child (rank 0, catches SIGINT) and a grandchild (rank 1, does not)."""
    catching = (
        "import signal, time; signal.signal(signal.SIGINT, lambda *_: None); "
        "print(0, flush=True); time.sleep(60)"
    )
    script = f"""
RANK=0 {sys.executable} -c '{catching}' &
bash -c 'RANK=1 bash -c "trap \\"\\" INT; echo 1; sleep 60" & wait' &
wait"""
    process = subprocess.Popen(
        ["bash", "-c", script], env=recipes.clean(), stdout=subprocess.PIPE, text=True, process_group=0
    )
    assert sorted(process.stdout.readline() for _ in range(2)) == ["0\n", "1\n"]
    yield process.pid
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_ranks_are_found_at_any_depth(tree):
    ranks = {}
    for number in (signal.SIGUSR1, signal.SIGINT):
        for process, rank_signal in supervisor.rank_signals(tree, number):
            ranks[number, process.environ()["RANK"]] = rank_signal
    assert ranks == {
        (signal.SIGUSR1, "0"): signal.SIGUSR1,
        (signal.SIGUSR1, "1"): signal.SIGUSR1,
        (signal.SIGINT, "0"): signal.SIGINT,
        (signal.SIGINT, "1"): signal.SIGTERM,
    }


def test_a_process_that_ended_has_no_ranks():
    process = subprocess.Popen(["true"])
    process.wait()
    assert supervisor.rank_signals(process.pid, signal.SIGTERM) == []
    assert not supervisor.catches_sigint(process.pid)


def test_marked_processes_end_even_if_they_ignore_sigterm(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "TERM_ATTEMPTS", 3)
    environment = launch.environment(EXIT_CODE_FILE=str(tmp_path / "marked"))
    other = launch.environment(EXIT_CODE_FILE=str(tmp_path / "marked2"))
    command = ["bash", "-c", 'trap "" TERM; echo ready; exec sleep 60']
    processes = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE) for env in (environment, other)]
    for process in processes:
        process.stdout.readline()
    try:
        supervisor.end_marked_processes(tmp_path / "marked")
        assert processes[0].wait(10) == -signal.SIGKILL
        assert processes[1].poll() is None  # control: another run
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_killed_supervisor_ends_its_session_and_leaves_no_file(start):
    process = start(rank('trap "" HUP'), "--quiet")
    start.wait_for("ready")
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 3  # the launcher, its rank, and the guard
    process.kill()
    process.communicate()
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.wait_procs(children, timeout=SECONDS)
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    wait_until(lambda: not list(start.temporary.iterdir()))
