"""Restricted unpickling: unknown objects of a training program become stubs, so that no code of the file
runs.

`torch.load(weights_only=True)` refuses every class that it does not know, and with it the whole file,
although training programs save arguments, random states and enums beside the tensors. Here the names of plain
data and of the training programs' own classes resolve to `Stub`, which accepts any arguments and does
nothing: no module is imported. Any other name stays refused.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

PLAIN = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|pathlib\.\w*Path|_io\.BytesIO|signal\.Signals|builtins\.getattr|torch\._C\.Generator"
    r"|numpy\.[\w.]+"
    r"|(megatron|modellink|mindspeed|mindspeed_llm|ascendspeed|deepspeed|deepspeed_npu|transformer_engine)\.[\w.]+"
)
"""Names of classes, and of the functions that pickle rebuilds them with, that a training checkpoint may hold
beside its tensors.
"""


class Stub:
    """Takes the place of an object that is not needed."""

    def __init__(self, *args: Any) -> None:
        pass

    def __new__(cls, *args: Any) -> "Stub":
        """Accepts the arguments of the object's own class."""
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def safe_globals(path: Path, known: Mapping[str, type]) -> list[tuple[type, str]]:
    """Returns the argument of `torch.serialization.safe_globals` for a file of `torch.save`; reads names,
    runs nothing.

    `known`: names that resolve to a useful class. Raises `ValueError` naming what is not plain data.
    """
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    unsafe = sorted(name for name in names if name not in known and not PLAIN.fullmatch(name))
    if unsafe:
        raise ValueError(f"{', '.join(unsafe)} is not plain data")
    return [(known.get(name, Stub), name) for name in names]
