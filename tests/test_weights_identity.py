"""Hashes of weights: the values that adapters, checkpoints and reports store must not change."""

import math
from pathlib import Path

import pytest
import torch

from ascendspeed.conversion import weights_identity
from ascendspeed.conversion.checkpoint_reader import CheckpointReader, from_factory
from ascendspeed.models import param_mapping
from ascendspeed.models.families import PRESETS

STORED = {
    "internlm2-tiny": (
        "b22b47fae05a49c95e1880982c534e2f771324661ce42980e57ed84ddcbc9e95",
        "5ca5cf32f0a028e36f3db67abdf4422729841cd32a7d0af619fff6c576d389d7",
        "87911d4504385e24644171d2100b1e143f4a97df79d72eab4964d9c8688157aa",
    ),
    "gemma-tiny": (
        "b3acfdf489820c3e61af1e539d4d5f9bf723978d341865915581d8018c6de2e1",
        "6193981a9e08b406cfd6620e5231c9725187ecaf6e9c31dad80836e6ff0b1e9b",
        "ccf085abe4af81c88ec74598a03a7fa9b1c0bd66a22244379c14a2e02da954dd",
    ),
}
"""Preset -> sampled, full_values and full_bytes, computed before the three were one module."""


def reader_of(preset: str, dtype: torch.dtype, change: str | None = None) -> CheckpointReader:
    """Weights of small integers, exact in every type; `change`: a parameter whose last value differs."""
    config = PRESETS[preset]
    shapes = {p.name: p.shape for p in param_mapping.parameters(config)}

    def make(name: str) -> torch.Tensor:
        shape = shapes[name]
        values = (torch.arange(math.prod(shape)) * 37 + sum(shape)) % 251
        if name == change:
            values[-1] += 1
        return values.reshape(shape).to(dtype)

    return CheckpointReader(
        "test", Path("/x"), config, {}, dict.fromkeys(shapes, dtype), from_factory(make), None
    )


@pytest.mark.parametrize("preset", STORED)
def test_the_stored_values_stay(preset):
    reader = reader_of(preset, torch.bfloat16)
    hashes = (
        weights_identity.sampled(reader),
        weights_identity.full_values(reader),
        weights_identity.full_bytes(reader),
    )
    assert hashes == STORED[preset]


def test_only_full_bytes_depends_on_the_type():
    preset = "internlm2-tiny"
    reader = reader_of(preset, torch.float32)
    sampled, full_values, full_bytes = STORED[preset]
    assert weights_identity.sampled(reader) == sampled
    assert weights_identity.full_values(reader) == full_values
    assert weights_identity.full_bytes(reader) != full_bytes


def test_control_one_value_changes_every_level():
    preset = "internlm2-tiny"
    reader = reader_of(preset, torch.bfloat16, change="decoder.layers.2.mlp.linear_fc2.weight")
    sampled, full_values, full_bytes = STORED[preset]
    assert weights_identity.sampled(reader) != sampled  # the last row of a matrix is among the sampled ones
    assert weights_identity.full_values(reader) != full_values
    assert weights_identity.full_bytes(reader) != full_bytes
