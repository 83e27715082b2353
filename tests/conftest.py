"""Fixtures for tests that run the model inside the pytest process: one rank, on the CPU."""

import gc
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples every time, on a slow machine too.
settings.register_profile("repository", deadline=None, derandomize=True)
settings.load_profile("repository")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell starts background jobs so, and programs under test would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Recipes start `python`, `deepspeed` and `torchrun` of this environment, also where it is not activated.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "fixtures"


LONGEST_FILES = (
    "test_engine_deepspeed",
    "test_engine_megatron",
    "test_chain",
    "test_faults",
    "test_segments",
    "test_lora",
    "test_generate",
    "test_onednn",
    "test_docs_commands",
    "test_family_models",
    "test_convert",
    "test_generate_trained",
    "test_generate_processes",
    "test_checkpoint_save",
    "test_lora_start",
)
"""Begun first, so that the processes of a parallel run end at about the same time."""


def pytest_configure():
    """Gives each process of a parallel run its share of the CPUs, and so the ranks that it starts.

    Ranks that exchange small messages over gloo take half the CPU time on one core, and do not wait for the
    ranks of another test.
    """
    gc.disable()  # until all is collected: nearly nothing of it is garbage
    worker, count = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if worker and hasattr(os, "sched_setaffinity"):
        cpus = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cpus[int(worker.removeprefix("gw")) % len(cpus) :: count])


def pytest_collection():
    """Imports Megatron-core in the processes of a parallel run as a command does, before tests import it.

    Else it loads torch's compiler.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        from ascendspeed.distributed import device

        device.prepare("cpu")


def pytest_collection_finish():
    """Leaves the millions of objects of modules and tests out of garbage collections."""
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(50_000, 20, 20)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Puts the longest files first, keeps the order of the others, and makes breadth slow."""
    mark_breadth(items)
    position = {name: number for number, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: position.get(item.path.stem, len(position)))


def mark_breadth(items):
    """Makes two of three parameter sets of each test of `breadth` slow."""
    numbers = Counter()
    for item in items:
        if item.get_closest_marker("breadth"):
            if numbers[item.path, item.originalname] % 3:
                item.add_marker(pytest.mark.slow)
            numbers[item.path, item.originalname] += 1


@pytest.fixture(autouse=True)
def console():
    """Log lines go to the console as in a command, and what a test configures does not reach the next one."""
    from ascendspeed.utils import logging as logs

    logs.configure(rank=0)
    yield
    logs.configure(rank=0)


@pytest.fixture(autouse=True)
def handlers():
    """Restores the signal handlers that commands in this process replace, which children would inherit."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def cpu():
    """The CPU as the device, prepared before Megatron-core is imported, in a world of one."""
    from ascendspeed.distributed import device

    here = device.prepare("cpu")
    from ascendspeed.config.schema import ParallelConfig
    from ascendspeed.distributed import process_groups

    process_groups.initialize(here, ParallelConfig(), seed=1)
    return here


@pytest.fixture(scope="session")
def reference() -> Path:
    """Tiny InternLM checkpoints with logits of the original modeling code; not available on every machine."""
    if not (SHARED / "internlm").is_dir():
        pytest.skip("no reference fixtures beside the repository; Hugging Face is the oracle here")
    return SHARED
