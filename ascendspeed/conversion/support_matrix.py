"""Which families each format can hold, to read and to write; every other pair is refused. No torch."""

from dataclasses import dataclass
from typing import Literal

from ascendspeed.models.families import FAMILIES
from ascendspeed.models.families.internevo_names import TRAINS
from ascendspeed.utils.errors import UserError

ALL = tuple(FAMILIES)
DENSE = tuple(name for name in ALL if name not in ("mixtral", "qwen2_moe"))


@dataclass(frozen=True)
class Holds:
    """Families that a format can hold."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]


FORMATS = {
    "hf": Holds(ALL, ALL),
    "hf-llama": Holds(("llama",), ("internlm", "internlm2", "internlm3", "llama")),
    "megatron": Holds(ALL, ALL),
    "deepspeed": Holds(ALL, ALL),
    "ascendspeed": Holds(DENSE, ()),  # rank files under older module names
    "mindformers": Holds(("internlm", "internlm2", "llama"), ()),
    "internevo": Holds(tuple(TRAINS), tuple(TRAINS)),
    "training": Holds(ALL, ()),  # training writes it
}


def check(form: str, direction: Literal["reads", "writes"], family: str) -> None:
    """Raises `UserError` when the table has no such pair."""
    can = getattr(FORMATS[form], direction)
    if family not in can:
        what = "read from" if direction == "reads" else "written as"
        raise UserError(f"a model of family {family} cannot be {what} {form}, only {', '.join(can)}")
