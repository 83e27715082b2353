"""Fragments of a training checkpoint: flat ranges of parameters, addressed within a tensor-parallel part.

Padding (rows beyond the vocabulary) is at the end of a part; it is never stored and reads as zero.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ascendspeed.models.param_mapping import ShardSpec

KINDS = ("master", "exp_avg", "exp_avg_sq")
EMA = "ema"
"""Kind of the average of --ema-decay, which a checkpoint may also hold."""


@dataclass(frozen=True)
class TrainState:
    """Position of a run."""

    step: int
    """Finished iterations, including skipped ones."""
    samples: int
    tokens: int
    engine: dict[str, Any] = field(default_factory=dict)
    """Scalars of the engine (Adam's step count, loss scale, ...); JSON values, no tensors."""
    skipped_samples: int = 0
    """Samples of iterations without an update: a schedule that counts samples leaves them out."""
    rollbacks: int = 0
    """Times that the run went back to a checkpoint at a loss spike."""
    left_out: tuple[int, ...] = ()
    """Iterations, counted from 0, that these rollbacks leave out."""
    loss: float | None = None
    """Training loss of the last iteration; None: not finite, or not recorded."""


@dataclass(frozen=True)
class Fragment:
    """A flat fp32 range of one parameter's state on this rank."""

    name: str
    """Megatron name, with the layer's number in the whole model."""
    kind: str
    """One of KINDS, or EMA."""
    spec: ShardSpec
    """Tensor-parallel shards of the parameter in this layout."""
    part: int
    """Tensor-parallel rank whose part contains the range; 0 if replicated."""
    start: int
    """First element, counted from the start of the flattened part."""
    tensor: Tensor
    """Live flat view: copying into it restores the state."""
    holder: tuple[int, int] = (0, 1)
    """(i, n): this rank is the i-th of n that hold and write this range. i = -1: restored, never written."""
    write_back: Callable[[], None] | None = None
    """Writes a restored `tensor` into the state, if it is a copy and no view."""


class FragmentAddress(NamedTuple):
    """Start of a fragment; its text form is the tensor's name in a shard file."""

    name: str
    kind: str
    part: int
    start: int

    def __str__(self) -> str:
        return "|".join(map(str, self))

    @classmethod
    def parse(cls, key: str) -> "FragmentAddress":
        """Parses the text form. Raises `ValueError`."""
        name, kind, part, start = key.split("|")
        return cls(name, kind, int(part), int(start))


def owned_slice(fragment: Fragment) -> tuple[FragmentAddress, Tensor] | None:
    """The slice that this rank writes of a fragment, without padding; None if it writes nothing."""
    f = fragment
    i, n = fragment.holder
    if f.tensor.dtype != torch.float32 or f.kind not in (*KINDS, EMA):
        raise ValueError(
            f"{f.kind} of {f.name} in {f.tensor.dtype}: a checkpoint holds {', '.join(KINDS)} in fp32"
        )
    size = min(f.tensor.numel(), max(0, stored_numel(f.spec, f.part) - f.start))
    begin = size * i // n
    end = size * (i + 1) // n
    if i < 0 or begin == end:
        return None
    return FragmentAddress(f.name, f.kind, f.part, f.start + begin), f.tensor.detach().view(-1)[begin:end]


def spec_to_json(spec: ShardSpec) -> dict[str, Any]:
    """A `ShardSpec` under the keys that shard files have, which do not follow the names of the class."""
    return {
        "shape": list(spec.shape),
        "dim": spec.dim,
        "stride": spec.stride,
        "parts": spec.num_shards,
        "padded_rows": spec.padded_rows,
    }


def spec_from_json(table: dict[str, Any]) -> ShardSpec:
    """Inverse of `spec_to_json`. Raises `KeyError`, `TypeError` or `ValueError` for another table."""
    spec = ShardSpec(
        tuple(table["shape"]), table["dim"], table["stride"], table["parts"], table["padded_rows"]
    )
    if not _is_consistent(spec):
        raise ValueError(f"{str(table)[:100]} is not a partition")
    return spec


def _is_consistent(spec: ShardSpec) -> bool:
    """True if the numbers of a partition are sizes that divide each other, whoever wrote them."""
    numbers = (*spec.shape, spec.stride, spec.num_shards, spec.padded_rows, spec.dim or 0)
    if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
        return False
    if not spec.stride or not spec.num_shards:
        return False
    if spec.padded_rows and not (spec.shape and spec.dim in (None, 0) and spec.padded_rows >= spec.shape[0]):
        return False
    if spec.dim is None:
        return True
    if spec.dim >= len(spec.shape):
        return False
    return (spec.padded_rows or spec.shape[spec.dim]) % (spec.num_shards * spec.stride) == 0


def part_count(spec: ShardSpec) -> int:
    """Number of different parts: 1 for a replicated parameter."""
    return 1 if spec.dim is None else spec.num_shards


def stored_numel(spec: ShardSpec, part: int) -> int:
    """Number of elements of a part, without padding."""
    rows, *other = spec.shard_shape or (1,)
    if spec.padded_rows:
        rows = min(rows, max(0, spec.shape[0] - part * rows))
    return rows * prod(other)


def column_count(shape: tuple[int, ...]) -> int:
    """Number of columns of a tensor seen as a matrix [first dimension, others]."""
    return prod(shape[1:])
