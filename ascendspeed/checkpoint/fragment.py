"""What a training checkpoint is made of: flat pieces of named parameters, each addressed in its tensor-parallel part.

A part's padding (rows beyond the vocabulary) comes last in it, is never stored, and reads as zero.
"""

from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ascendspeed.models.param_mapping import ShardSpec

KINDS = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainState:
    """How far the run is."""

    step: int
    """Iterations done, skipped ones included."""
    samples: int
    tokens: int
    engine: dict[str, Any] = field(default_factory=dict)
    """Scalars of the engine (Adam's own step count, loss scale, ...); JSON, no tensors."""


@dataclass(frozen=True)
class Fragment:
    """A flat fp32 piece of one parameter's state that this rank holds."""

    name: str
    """Ours, with the layer's number in the whole model."""
    kind: str
    """One of KINDS."""
    cut: ShardSpec
    """How tensor parallel cuts the parameter in this layout."""
    part: int
    """Tensor-parallel rank whose part this lies in; 0 if replicated."""
    start: int
    """Elements from the start of that part, flattened."""
    tensor: Tensor
    """Live flat view: copying into it restores."""
    holder: tuple[int, int] = (0, 1)
    """(i, n): the i-th of n ranks that hold this very piece. They share the writing; i = -1 reads and never writes."""


class FragmentAddress(NamedTuple):
    """Where a piece begins; its text is the key in a shard."""

    name: str
    kind: str
    part: int
    start: int

    def __str__(self) -> str:
        return "|".join(map(str, self))

    @classmethod
    def of(cls, key: str) -> "FragmentAddress":
        """Raises ValueError for a key that is no address."""
        name, kind, part, start = key.split("|")
        return cls(name, kind, int(part), int(start))


def owned_slice(fragment: Fragment) -> tuple[FragmentAddress, Tensor] | None:
    """What this rank writes of a fragment: its slice among the holders, without padding. None: nothing."""
    f, (i, n) = fragment, fragment.holder
    if f.tensor.dtype != torch.float32 or f.kind not in KINDS:
        raise ValueError(
            f"{f.kind} of {f.name} in {f.tensor.dtype}: a checkpoint holds {', '.join(KINDS)} in fp32"
        )
    size = min(f.tensor.numel(), max(0, stored_numel(f.cut, f.part) - f.start))
    a, b = size * i // n, size * (i + 1) // n
    if i < 0 or a == b:
        return None
    return FragmentAddress(f.name, f.kind, f.part, f.start + a), f.tensor.detach().view(-1)[a:b]


def part_count(cut: ShardSpec) -> int:
    """Parts that differ: 1 for a replicated parameter."""
    return 1 if cut.dim is None else cut.num_shards


def stored_numel(cut: ShardSpec, part: int) -> int:
    """Elements of a part, without padding."""
    rows, *rest = cut.shard_shape or (1,)
    if cut.padded_rows:
        rows = min(rows, max(0, cut.shape[0] - part * rows))
    return rows * prod(rest)


def column_count(shape: tuple[int, ...]) -> int:
    """Columns of a tensor seen as a matrix."""
    return prod(shape[1:])
