"""Execution of generated code in a child process without network, with limits on time, memory and files.

The child limits itself before it runs the code, and cannot lift the limits. This confines mistakes of
generated code. It is no protection against code that attacks the machine: use a container for that.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from ascendspeed.utils.errors import UserError

SECONDS = 10
MEMORY = 512 << 20
"""Limits of a program: wall-clock time, and bytes of address space."""
FILE_SIZE = 16 << 20
"""Largest file in bytes that a program may write."""
NO_ISOLATION = 97
"""Exit code of a child that could not leave the network."""
_CHILD = f"""
import ctypes, resource, runpy, sys
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
libc = ctypes.CDLL(None)
if libc.unshare(CLONE_NEWNET) and libc.unshare(CLONE_NEWUSER | CLONE_NEWNET):
    sys.exit({NO_ISOLATION})
for limit, value in (("AS", {MEMORY}), ("CPU", {SECONDS}), ("FSIZE", {FILE_SIZE}), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (value, value))
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def passes(program: str, seconds: float = SECONDS) -> bool:
    """Runs a Python program; returns whether it ends in time and without an exception.

    Raises `UserError` if the machine cannot start a process without network.
    """
    with tempfile.TemporaryDirectory(prefix="generated-code-") as folder:
        script = Path(folder, "program.py")
        script.write_text(program, encoding="utf-8", errors="surrogatepass")
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", _CHILD, str(script)],
            cwd=folder,
            env={"HOME": folder, "PATH": os.defpath},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end_group(child)
    if code == NO_ISOLATION:
        raise UserError(
            "--allow-code-execution: this machine cannot start a process without network (unshare); allow "
            "user namespaces, or run the evaluation as root in a container"
        )
    return code == 0


def _end_group(child: subprocess.Popen) -> None:
    """Kills a child and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
