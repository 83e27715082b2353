"""Rotary position embedding: plain, linearly scaled, dynamic NTK, or scaled as in Llama 3.1 or by YaRN."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ascendspeed.config.schema import ModelConfig
from ascendspeed.models.families.rope_config import yarn_attention_factor
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


def yarn_frequencies(model: ModelConfig, powers: Tensor) -> Tensor:
    """Frequencies of YaRN (arXiv 2309.00071): those that turn more than `rope_beta_fast` times over the
    original length stay, those that turn less than `rope_beta_slow` times are divided by the factor, and a
    ramp over the dimensions lies between. `powers`: the inverse of the plain frequencies, fp32 [d/2]."""
    d, log_base = model.head_dim, math.log(model.rotary_base)

    def dimension(turns: float) -> float:
        length = model.rope_original_max_position_embeddings
        assert length is not None
        return d * math.log(length / (turns * 2 * math.pi)) / (2 * log_base)

    low = max(math.floor(dimension(model.rope_beta_fast)), 0)
    high = float(min(math.ceil(dimension(model.rope_beta_slow)), d - 1))
    if low == high:
        high += 0.001  # as in transformers; the ramp would have no length
    kept = 1 - ((torch.arange(d // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    # In the order of transformers, so that the bits are equal.
    return 1.0 / (model.rope_scaling_factor * powers) * (1 - kept) + 1.0 / powers * kept


@dataclass(eq=False)
class Rope:
    """Tables of cos and sin, shared by all layers; the tables of the last few lengths are cached."""

    model: ModelConfig
    _tables: dict[tuple, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def inverse_frequencies(self, length: int) -> Tensor:
        """1 / base^(2i/d), fp32 [d/2]; `base`: see `rope_base`."""
        model, d, base = self.model, self.model.head_dim, rope_base(self.model, length)
        powers = base ** (torch.arange(0, d, 2, dtype=torch.int64, device="cpu").float() / d)
        if model.rope_scaling_type == "yarn":
            return yarn_frequencies(model, powers)
        frequencies = 1.0 / powers
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

    @property
    def attention_factor(self) -> float:
        """Factor of cos and sin; 1 but for YaRN."""
        if self.model.rope_scaling_type != "yarn":
            return 1.0
        given = self.model.rope_attention_factor
        return yarn_attention_factor(self.model.rope_scaling_factor) if given is None else given

    def cos_sin(self, positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [s, b, 1, d] for fp32 positions [s, b] and frequencies [b, d/2]; either b may be 1."""
        angles = positions[..., None] * frequencies
        angles = torch.cat((angles, angles), -1)[:, :, None]
        cos, sin, factor = angles.cos(), angles.sin(), self.attention_factor
        if factor != 1:
            cos, sin = cos * factor, sin * factor
        return cos.to(dtype), sin.to(dtype)
