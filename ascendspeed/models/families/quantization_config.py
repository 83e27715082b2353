"""Entry `quantization_config` of config.json: int8 weights of compressed-tensors with a scale per channel."""

from collections.abc import Mapping
from typing import Any

KEY = "quantization_config"
GROUP = "group_0"
WEIGHTS = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "channel",
    "dynamic": False,
    "group_size": None,
    "actorder": None,
}
W8A16 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "global_compression_ratio": None,
    "kv_cache_scheme": None,
    "ignore": ["lm_head"],
    "config_groups": {
        GROUP: {
            "targets": ["Linear"],
            "weights": WEIGHTS,
            "input_activations": None,
            "output_activations": None,
        }
    },
}
"""All linears but the output layer in int8."""
REQUIRED = ("quant_method", "format", "kv_cache_scheme", "ignore")
REQUIRED_OF_WEIGHTS = ("num_bits", "type", "symmetric", "strategy")


def is_w8a16(value: Any) -> bool:
    """True if an entry means what `W8A16` means; other programs may write more."""
    if not isinstance(value, Mapping) or any(value.get(name) != W8A16[name] for name in REQUIRED):
        return False
    groups = value.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        return False
    (group,) = groups.values()
    weights = group.get("weights") if isinstance(group, Mapping) else None
    return (
        isinstance(weights, Mapping)
        and group.get("targets") == ["Linear"]
        and group.get("input_activations") is None
        and group.get("output_activations") is None
        and all(weights.get(name) == WEIGHTS[name] for name in REQUIRED_OF_WEIGHTS)
    )
