"""The Megatron engine, and its checkpoints, against a plain torch loop over Hugging Face's model.

A few steps in one start of two ranks, and in one of four; test_engine_megatron_layouts.py has every layout.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.engines import FEW_STEPS, Curve
from helpers.layouts import PP, SHARDS, VPP
from helpers.megatron_themes import (
    CONTROL_STEPS,
    CONTROLS,
    ENGINES,
    LAYOUTS,
    SHALLOW,
    STAGES_CONTROL,
    TIED,
    Check,
    Theme,
    architecture,
    experts,
    half,
    losses,
    moved,
    poisoned,
    recomputed,
    resumed,
    run,
    run_and_check,
)

FSDP = {"use_torch_fsdp2": True}
THEMES: dict[str, Callable[[Path], Theme]] = {
    "losses": lambda folder: losses(
        {name: LAYOUTS[2][name] for name in ("dp2", "tp2 sp", "cp2, shards")} | {"fsdp": FSDP},
        FEW_STEPS,
        mistakes=CONTROLS,
        model=SHALLOW,
    ),
    "stages": lambda folder: losses({"pp2 vpp2": PP | VPP}, CONTROL_STEPS, mistakes=STAGES_CONTROL),
    "tied": lambda folder: architecture(TIED, ["pp2 vpp2"], CONTROL_STEPS),
    "experts": lambda folder: experts(2, folder, fresh=2, stop=1, names=("ep2", "pp2")),
    "half": lambda folder: half(["dp2, shards"], 3, SHALLOW),
    "poisoned": lambda folder: poisoned(["pp2, fp32"], SHALLOW),
    "resumed": lambda folder: resumed({"dp2, shards": SHARDS}, folder, ["bf16"], 1, SHALLOW),
    "moved": lambda folder: moved(
        [("dp2, 2 copies", "cp2 a2a"), ("zero 3", "tp2 sp")],
        LAYOUTS[2] | ENGINES,
        folder,
        steps=4,
        model=SHALLOW,
    ),
    "moved stages": lambda folder: moved(
        [("pp2 vpp2", "zero 2")],
        LAYOUTS[2] | ENGINES,
        folder,
        steps=4,
        mistakes=(),
    ),
    "recomputed": lambda folder: recomputed(["cp2"], ("none", "full", "selective"), SHALLOW),
}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict[str, tuple[Check, dict[str, Curve]]]:
    """Theme -> what is asked, and the curves."""
    folder = tmp_path_factory.mktemp("two")
    themes = {}
    for name, make in THEMES.items():
        (folder / name).mkdir()
        themes[name] = make(folder / name)
    curves = run(2, themes, folder / "run")
    return {name: (theme.check, curves[name]) for name, theme in themes.items()}


@pytest.mark.parametrize("theme", THEMES)
def test_two_ranks(theme, two_ranks):
    check, curves = two_ranks[theme]
    check(curves)


@pytest.mark.slow
def test_experts_on_two_ranks(tmp_path):
    """Every layout of two ranks, each from the weights and from another's checkpoint."""
    run_and_check(2, experts(2, tmp_path), tmp_path / "run")


@pytest.mark.slow
def test_losses_on_four_ranks(tmp_path):
    """Three layouts, a few steps; tests/test_engine_megatron_layouts.py has them all."""
    layouts = {name: LAYOUTS[4][name] for name in list(LAYOUTS[4])[:3]}
    run_and_check(4, losses(layouts, CONTROL_STEPS), tmp_path)
