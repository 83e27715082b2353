"""Sorts the tensors of a peft directory by what they are: LoRA matrices, DoRA magnitudes, whole tensors, and
trained rows of an embedding."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ascendspeed.conversion.output_files import SAFETENSORS_TYPES
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.name_check import check_names
from ascendspeed.utils.text import shorten_list

PREFIX = "base_model.model."
DEFAULT = r"(?:\.default)?"
"""Name of the adapter, which some programs leave in the keys."""
KINDS = {
    "matrix": re.compile(rf"(.+)\.lora_([AB]){DEFAULT}\.weight"),
    "embedding": re.compile(rf"(.+)\.lora_embedding_([AB]){DEFAULT}"),
    "magnitude": re.compile(rf"(.+)\.lora_magnitude_vector{DEFAULT}(?:\.weight)?"),
    "rows": re.compile(rf"(.+?)(?:\.token_adapter)?\.trainable_tokens_delta{DEFAULT}"),
    "whole": re.compile(
        rf"(.+?)(?:\.modules_to_save{DEFAULT})?(?:\.token_adapter)?(?:\.base_layer)?\.(weight|bias)"
    ),
}
"""Kind of tensor -> pattern of its key without `PREFIX`; the first that matches counts."""
DIMENSIONS = {"matrix": 2, "embedding": 2, "magnitude": 1, "rows": 2}


@dataclass(frozen=True)
class AdapterTensors:
    """Tensors of a peft directory; modules and names are those of the Hugging Face model."""

    a: dict[str, Tensor] = field(default_factory=dict)
    b: dict[str, Tensor] = field(default_factory=dict)
    """Module -> matrix."""
    embeddings: set[str] = field(default_factory=set)
    """Modules whose matrices belong to an embedding."""
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    """Name of a tensor -> the tensor that replaces it."""


def sort_tensors(folder: Path, tensors: Mapping[str, Any]) -> AdapterTensors:
    """Sorts the tensors by their keys. Raises `UserError` for what is none of them, and for an A without its
    B."""
    found = AdapterTensors()
    unknown = [key for key, tensor in tensors.items() if not _sort(found, key, tensor)]
    if unknown:
        raise UserError(
            f"{folder} holds what is no matrix of a LoRA adapter: {shorten_list(sorted(unknown))}"
        )
    check_names(folder, found.a, found.b, of="an A and a B of every adapter")
    return found


def _sort(found: AdapterTensors, key: str, tensor: Any) -> bool:
    """Adds a tensor where it belongs; returns False if there is no such place."""
    if not key.startswith(PREFIX) or not isinstance(tensor, Tensor) or tensor.dtype not in SAFETENSORS_TYPES:
        return False
    for kind, pattern in KINDS.items():
        match = pattern.fullmatch(key.removeprefix(PREFIX))
        if not match:
            continue
        if tensor.dim() != DIMENSIONS.get(kind, tensor.dim()) or ".lora_" in match[1]:
            return False
        name = match[1]
        if kind in ("matrix", "embedding"):
            group = found.a if match[2] == "A" else found.b
        elif kind == "whole":
            group, name = found.whole, f"{name}.{match[2]}"
        else:
            group = found.magnitudes if kind == "magnitude" else found.rows
        if name in group:  # under two keys
            return False
        group[name] = tensor
        if kind == "embedding":
            found.embeddings.add(name)
        return True
    return False
