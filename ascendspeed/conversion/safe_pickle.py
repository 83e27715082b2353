"""What training programs save beside the tensors (arguments, random states, enums): opened without being what it was.

`torch.load(weights_only=True)` refuses every class that it does not know, and with it the whole file. Here the names of plain
data and of the training programs' own classes are answered with `Stub`, which takes anything and does nothing: no module is
imported, no code of the file or of the program runs. Any other name stays refused.
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
"""Names of classes (and of what pickle rebuilds them with) that a training checkpoint may hold beside its tensors."""


class Stub:
    """Stands for an object that nobody needs."""

    def __init__(self, *args: Any) -> None:
        pass

    def __new__(cls, *args: Any) -> "Stub":
        """Takes what the object's own class would."""
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def safe_globals(path: Path, known: Mapping[str, type]) -> list[tuple[type, str]]:
    """What `torch.serialization.safe_globals` needs to open a file of `torch.save`; the file's names are read, nothing is run.

    `known`: names that are answered with something of use. Raises `ValueError` that names what is in the file and is no plain data.
    """
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    hostile = sorted(name for name in names if name not in known and not PLAIN.fullmatch(name))
    if hostile:
        raise ValueError(f"{', '.join(hostile)} is no plain data")
    return [(known.get(name, Stub), name) for name in names]
