"""Fixtures of evaluation: the tiny model in both formats, and a benchmark of each kind."""

from pathlib import Path

import pytest

from helpers.evaluating import MAKERS, exported, model_dir

SUBJECTS, QUESTIONS, NEW = 2, 2, 24
LIMIT = 1e-5
"""Tolerance of log-likelihoods down to -64: lm-eval sums in fp32, whose last digit is worth 4e-6 there."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The model as InternLM and as Llama, and a benchmark of each kind."""
    home = tmp_path_factory.mktemp("evaluation")
    folders = {"ours": model_dir(home / "hf")}
    folders["theirs"] = exported(home / "llama", folders["ours"])
    return folders | {task: make(home / task) for task, make in MAKERS.items()}


@pytest.fixture(scope="module")
def model(folders, cpu):
    """The project's."""
    from ascendspeed.inference import engine

    return engine.load(folders["ours"], dtype="fp32", device=cpu)
