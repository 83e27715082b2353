"""Checks memory, disks, shared memory, limits and programs of this machine."""

import os
import platform
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from ascendspeed.commands.doctor_checks.check import Check

GIB = 2**30
LEAST_DISK_GIB = 20
"""Free space below which a 7B model (15 GB) does not fit."""
LEAST_SHARED_GIB = 1
LEAST_OPEN_FILES = 4096
PROGRAMS = {
    "git": ("the commit in the logs", "apt-get install git"),
    "g++": ("DeepSpeed's optimizer for --zero-offload", "apt-get install g++"),
    "ssh": ("several nodes with a HOSTFILE", "apt-get install openssh-client"),
}
VARIABLES = ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HOME", "OMP_NUM_THREADS", "LD_PRELOAD", "NCCL_DEBUG")


def check_machine() -> Iterator[Check]:
    """Yields checks of the machine."""
    memory = psutil.virtual_memory()
    system = f"{platform.system()} {platform.release()}, glibc {platform.libc_ver()[1] or 'unknown'}"
    yield Check("system", "ok", system)
    yield Check("CPU", "ok", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores for this process")
    yield Check("memory", "ok", f"{memory.total / GIB:.0f} GiB, {memory.available / GIB:.0f} GiB free")
    for name, folder in disks().items():
        yield check_disk(name, folder)
    yield check_shared_memory(Path("/dev/shm"))
    yield check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    for program, (purpose, remedy) in PROGRAMS.items():
        path = shutil.which(program)
        yield Check(program, "ok" if path else "info", path or f"missing: {purpose}", "" if path else remedy)
    for name in VARIABLES:
        if name in os.environ:
            yield Check(name, "info", os.environ[name])


def disks() -> dict[str, Path]:
    """Folders that receive large files."""
    cache = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    return {
        "disk here": Path.cwd(),
        "disk of the hub's cache": cache,
        "disk of temporary files": Path(tempfile.gettempdir()),
    }


def check_disk(name: str, folder: Path) -> Check:
    """Compares the free space of a folder's disk with the size of a model."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free / GIB
    if not os.access(existing, os.W_OK):
        return Check(name, "warning", f"{existing} is not writable", f"chmod u+w {existing}")
    if free < LEAST_DISK_GIB:
        remedy = "free some space, or give --save and --output on a larger disk"
        return Check(name, "warning", f"{existing}: {free:.1f} GiB free", remedy)
    return Check(name, "ok", f"{existing}: {free:.0f} GiB free")


def check_shared_memory(folder: Path) -> Check:
    """Compares the size of /dev/shm with what ranks exchange through it."""
    if not folder.is_dir():
        return Check("shared memory", "error", f"{folder} is missing", f"mount -t tmpfs tmpfs {folder}")
    size = shutil.disk_usage(folder).total / GIB
    if size < LEAST_SHARED_GIB:
        remedy = f"mount -o remount,size=8G {folder}; a container: docker run --ipc host"
        return Check("shared memory", "warning", f"{size:.2f} GiB", remedy)
    return Check("shared memory", "ok", f"{size:.1f} GiB")


def check_open_files(limit: int) -> Check:
    """Compares the limit of open files with those of data sets and checkpoints."""
    if 0 <= limit < LEAST_OPEN_FILES:
        return Check("open files", "warning", f"at most {limit}", f"ulimit -n {LEAST_OPEN_FILES * 16}")
    return Check("open files", "ok", "unlimited" if limit < 0 else f"at most {limit}")
