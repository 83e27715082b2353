"""Fixtures for tests that run the model inside the pytest process: one rank, on the CPU."""

import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile(
    "repository", deadline=None, derandomize=True
)  # the same examples every time, on a slow machine too
settings.load_profile("repository")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # a shell starts background jobs so; programs under test inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Recipes start `python`, `deepspeed` and `torchrun` of this environment, also where it is not activated.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "fixtures"


LONGEST_FILES = (
    "test_engine_megatron",
    "test_engine_deepspeed",
    "test_chain",
    "test_lora",
    "test_segments",
    "test_moe",
    "test_generate",
    "test_family_models",
)
"""Begun first, so that the processes of a parallel run end at about the same time."""


def pytest_collection_modifyitems(items):
    """Puts the longest files first and keeps the order of the others."""
    rank = {name: position for position, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


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
