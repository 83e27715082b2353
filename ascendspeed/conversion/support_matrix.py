"""Which families each format can hold, to read and to write; every other pair is refused. No torch."""

from dataclasses import dataclass
from typing import Literal

from ascendspeed.models.families import FAMILIES, REFERENCE
from ascendspeed.utils.errors import UserError

ALL = tuple(FAMILIES)
DENSE = tuple(name for name in ALL if not FAMILIES[name].has_experts)
INTERNEVO = tuple(name for name in ALL if FAMILIES[name].internevo_types)


@dataclass(frozen=True)
class Holds:
    """Families that a format can hold."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]


def _listing(form: str) -> tuple[str, ...]:
    """Families whose entries name a format that not every family supports."""
    return tuple(name for name in ALL if form in FAMILIES[name].extra_formats)


FORMATS = {
    "hf": Holds(ALL, ALL),
    "hf-llama": Holds((REFERENCE.name,), _listing("hf-llama")),
    "megatron": Holds(ALL, ALL),
    "deepspeed": Holds(ALL, ALL),
    "ascendspeed": Holds(DENSE, ()),  # rank files under older module names
    "mindformers": Holds(_listing("mindformers"), ()),
    "internevo": Holds(INTERNEVO, INTERNEVO),
    "training": Holds(ALL, ()),  # training writes it
}


def check(form: str, direction: Literal["reads", "writes"], family: str) -> None:
    """Raises `UserError` when the table has no such pair."""
    can = getattr(FORMATS[form], direction)
    if family not in can:
        what = "read from" if direction == "reads" else "written as"
        raise UserError(f"a model of family {family} cannot be {what} {form}, only {', '.join(can)}")
