"""Modules that commands do not load when they start: each takes a part of a second or more."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import launch

from benchmarks.startup import commands, prepare

ROOT = Path(__file__).parents[1]
UNUSED = (
    "datasets",
    "deepspeed",
    "lm_eval",
    "matplotlib",
    "networkx",
    "pandas",
    "torch._dynamo",
    "torch._inductor",
    "transformers",
)
"""Modules that neither generation nor training with the Megatron engine needs."""


def loaded(*arguments: str) -> set[str]:
    """Returns the modules that a fresh interpreter imports."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        cwd=ROOT,
        env=launch.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    lines = (line for line in result.stderr.splitlines() if line.startswith("import time:"))
    return {line.rsplit("|", 1)[1].strip() for line in lines}


@pytest.mark.slow
def test_compilers_and_other_frameworks_are_not_imported():
    """Everything that generation and training with the Megatron engine import."""
    script = """
from ascendspeed.distributed import device
device.prepare("cpu")
import ascendspeed.inference.runner
import ascendspeed.training.engines.megatron
from ascendspeed.training import data_setup, fault_tolerance, input_record, loop, metrics_log, setup
"""
    modules = loaded("-c", script)
    assert {"torch", "megatron.core.models.gpt"} <= modules
    assert modules.isdisjoint(UNUSED)


def test_fused_functions_are_compiled_when_they_are_called(cpu, monkeypatch):
    import torch

    from ascendspeed.distributed.device import _compile_on_first_call, _leave_uncompiled

    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **settings: compiled.append(settings) or f)

    @_compile_on_first_call
    def double(x):
        """Doubles."""
        return 2 * x

    halve = _compile_on_first_call(dynamic=True)(lambda x: x / 2)
    assert (compiled, double.__doc__) == ([], "Doubles.")
    assert (double(2), double(3), halve(4)) == (4, 6, 2)
    assert compiled == [{}, {"dynamic": True}]
    assert _leave_uncompiled(double) is _leave_uncompiled(dynamic=True)(double) is double


@pytest.mark.slow
def test_commands_do_not_import_them_either(tmp_path):
    prepare(tmp_path)
    for name, arguments in commands(tmp_path).items():
        if "Megatron engine" in name or "generation" in name:
            assert loaded(*arguments).isdisjoint(UNUSED), name
