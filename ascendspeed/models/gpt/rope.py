"""Rotary position embedding: plain, linearly scaled, dynamic NTK, or scaled as in Llama 3.1."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ascendspeed.config.schema import ModelConfig
from ascendspeed.models.gpt.sequence_shard import WHOLE_SEQUENCE, SequenceShard

KEPT_TABLES = 8


def rope_base(model: ModelConfig, length: int) -> float:
    """Rotary base for texts of `length` tokens.

    Dynamic NTK, for a length L above the trained P, takes base · ((f·L/P) - (f - 1))^(d/(d-2)), as the
    original InternLM code and Hugging Face do.
    """
    d, base = model.head_dim, model.rotary_base
    if model.rope_scaling_type == "dynamic" and length > model.max_position_embeddings:
        factor = model.rope_scaling_factor
        base *= (factor * length / model.max_position_embeddings - (factor - 1)) ** (d / (d - 2))
    return base


def scale_low_frequencies(model: ModelConfig, frequencies: Tensor) -> Tensor:
    """Frequencies of Llama 3.1: those that turn less than `rope_low_freq_factor` times over the original
    length are divided by the factor, those that turn more than `rope_high_freq_factor` times stay, and those
    between are interpolated."""
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    turns = model.rope_original_max_position_embeddings / (2 * math.pi / frequencies)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / model.rope_scaling_factor + kept * frequencies


@dataclass(eq=False)
class Rope:
    """Tables of cos and sin, shared by all layers; the tables of the last few lengths are cached."""

    model: ModelConfig
    _tables: dict[tuple, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def inverse_frequencies(self, length: int) -> Tensor:
        """1 / base^(2i/d), fp32 [d/2]; `base`: see `rope_base`."""
        model, d, base = self.model, self.model.head_dim, rope_base(self.model, length)
        frequencies = 1.0 / base ** (torch.arange(0, d, 2, dtype=torch.int64, device="cpu").float() / d)
        if model.rope_scaling_type == "llama3":
            return scale_low_frequencies(model, frequencies)
        return frequencies / model.rope_scaling_factor if model.rope_scaling_type == "linear" else frequencies

    def tables(
        self, length: int, dtype: torch.dtype, device: torch.device, share: SequenceShard = WHOLE_SEQUENCE
    ) -> tuple[Tensor, Tensor]:
        """cos and sin, each [positions, 1, 1, d], for the positions 0 ... length - 1 in `share`; computed in
        fp32."""
        key = (length, dtype, device, share)
        if key not in self._tables:
            if len(self._tables) >= KEPT_TABLES:
                self._tables.pop(next(iter(self._tables)))
            positions = share.take(torch.arange(length, dtype=torch.float32, device="cpu"), 0)
            cos, sin = self.cos_sin(positions[:, None], self.inverse_frequencies(length)[None], dtype)
            self._tables[key] = cos.to(device), sin.to(device)
        return self._tables[key]

    @staticmethod
    def cos_sin(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [s, b, 1, d] for fp32 positions [s, b] and frequencies [b, d/2]; either b may be 1."""
        angles = positions[..., None] * frequencies
        angles = torch.cat((angles, angles), -1)[:, :, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)
