"""One rank of a run with injected faults: `fault_worker.py FLAGS...`; the environment has faults and program.

FAULTS: a JSON list of {"what": one of FAULTS below, "rank": rank, "step": iteration of the whole run};
with "operation" n, the fault happens at the n-th change of a file in it. A fault happens once in a FAULT_DIR.
Rank 0 writes the curve there: iteration, loss and gradient norm in hexadecimal, over all restarts.
FAULT_ENGINE=toy trains a small numeric engine instead of the real one; everything else is real.
"""

import errno
import itertools
import json
import math
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

from ascendspeed.distributed import device
from ascendspeed.utils import errors
from helpers import toy

RANK = int(os.environ.get("RANK", "0"))
CHANGES = [(os, name) for name in ("rename", "replace", "unlink", "rmdir", "fsync")] + [
    (Path, name) for name in ("mkdir", "unlink")
]


def send(number: int):
    return lambda: os.kill(os.getpid(), number)


def no_space():
    raise OSError(errno.ENOSPC, "No space left on device", "a shard")


def small_files():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))


def wrong():
    raise ZeroDivisionError("a mistake in the program")


FAULTS = {
    "kill": send(signal.SIGKILL),
    "stop": send(signal.SIGSTOP),
    "term": send(signal.SIGTERM),
    "usr1": send(signal.SIGUSR1),
    "no space": no_space,
    "small files": small_files,
    "wrong": wrong,
}


def wait_for_checkpoint(name: str) -> None:
    """Returns once a checkpoint is published: a background save may still run when the next step begins."""
    latest = Path(os.environ["FAULT_DIR"], "ckpt", "latest")
    while not (latest.exists() and latest.read_text().strip() == name):
        time.sleep(0.01)


def happen(fault: dict) -> None:
    """Now, or at the n-th change of a file from now on."""
    mark = Path(os.environ["FAULT_DIR"], "happened " + json.dumps(fault).replace("/", " "))
    if mark.exists():
        return
    if "after" in fault:
        wait_for_checkpoint(fault["after"])
    act = FAULTS[fault["what"]]

    def now() -> None:
        mark.touch()
        act()

    if "operation" not in fault:
        now()
        return
    left = itertools.count(fault["operation"], -1)

    def at_last(real):
        def call(*args, **kwargs):
            if next(left) == 0:
                now()
            return real(*args, **kwargs)

        return call

    for owner, name in CHANGES:
        setattr(owner, name, at_last(getattr(owner, name)))


def install() -> None:
    """Adds faults and the exact curve to every engine's `step`; after `device.prepare`."""
    from ascendspeed.training import loop

    faults = [fault for fault in json.loads(os.environ.get("FAULTS", "[]")) if fault["rank"] == RANK]
    curve, real = Path(os.environ["FAULT_DIR"], "curve"), loop.train

    def wrapped(run, grid, here, engine, batches, log, start, *more):
        step, number = engine.step, itertools.count(start.state.step + 1)

        def exact(batch, lr):
            iteration = next(number)
            for fault in faults:
                if fault["step"] == iteration:
                    happen(fault)
            result = step(batch, lr)
            if RANK == 0:
                norm = math.nan if result.grad_norm is None else result.grad_norm
                with open(curve, "a") as file:
                    file.write(f"{iteration} {result.loss.hex()} {norm.hex()}\n")
            return result

        engine.step = exact
        return real(run, grid, here, engine, batches, log, start, *more)

    loop.train = wrapped


def main() -> int:
    """The entry's own `main`, or the toy's, with faults."""
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("signals are for the main thread")
    prepare = device.prepare

    def prepared(*args):
        here = prepare(*args)
        install()
        return here

    device.prepare = prepared
    if os.environ.get("FAULT_ENGINE") == "toy":
        return toy.main(sys.argv[1:])
    import pretrain_intern

    return pretrain_intern.main()


if __name__ == "__main__":
    errors.run(main)
