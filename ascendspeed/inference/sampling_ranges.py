"""Ranges of the settings of generation, which are checked before torch is imported."""

import math
from typing import Any

from ascendspeed.utils.errors import UserError


def check_sampling_ranges(settings: Any) -> None:
    """Raises `UserError` for a value out of range; `settings` has the fields of `SamplingParams`."""
    valid = {
        "max_new_tokens": (settings.max_new_tokens >= 1, "must be at least 1"),
        "num_beams": (settings.num_beams >= 1, "must be at least 1"),
        "num_return_sequences": (settings.num_return_sequences >= 1, "must be at least 1"),
        "repetition_penalty": (0 < settings.repetition_penalty < math.inf, "must be above 0"),
        "temperature": (
            settings.temperature == 0 or 1e-4 <= settings.temperature < math.inf,
            "must be 0 (always the most likely token) or at least 0.0001",
        ),
        "top_p": (0 <= settings.top_p <= 1, "must be between 0 (always the most likely token) and 1"),
        "top_k": (settings.top_k >= -1, "must be above 0, or 0 or -1 for all tokens"),
        "length_penalty": (-32 <= settings.length_penalty <= 32, "must be between -32 and 32"),
    }
    for name, (is_valid, rule) in valid.items():
        if not is_valid:
            raise UserError(f"--{name.replace('_', '-')} {getattr(settings, name)}: {rule}")
