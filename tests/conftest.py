"""Fixtures for tests that run the model inside the pytest process: one rank, on the CPU."""

import os
import signal
import sys
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


SEVERAL_RANKS = (
    "test_engine_megatron",
    "test_engine_deepspeed",
    "test_lora",
    "test_segments",
    "test_moe",
    "test_family_training",
)
"""Files whose tests start several ranks. They share one process of a parallel run: two groups of ranks on two
cores would wait for each other in every collective."""
LONGEST_FILES = ("test_chain", "test_generate", "test_family_models", "test_lora_start", "test_faults")
"""Begun next, so that the processes of a parallel run end at about the same time."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keeps the tests of a file in one process of a parallel run, and SEVERAL_RANKS in the same one."""
    from xdist.scheduler import LoadFileScheduling

    class FileGroups(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "several ranks" if Path(file).stem in SEVERAL_RANKS else file

    return FileGroups(config, log)


def pytest_collection_modifyitems(items):
    """Puts the longest groups first and keeps the order of the others."""
    position = {name: number for number, name in enumerate(SEVERAL_RANKS + LONGEST_FILES)}
    items.sort(key=lambda item: position.get(item.path.stem, len(position)))


@pytest.fixture(autouse=True)
def console():
    """Log lines go to the console as in a command, and what a test configures does not reach the next one."""
    from ascendspeed.utils import logging as logs

    logs.configure(rank=0)
    yield
    logs.configure(rank=0)


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
