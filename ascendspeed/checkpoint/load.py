"""Reads training checkpoints: any range of a parameter, under any tensor-parallel layout."""

import bisect
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ascendspeed.checkpoint import safetensors_io
from ascendspeed.checkpoint.fragment import (
    Fragment,
    FragmentAddress,
    TrainState,
    column_count,
    part_count,
    spec_from_json,
    stored_numel,
)
from ascendspeed.checkpoint.paths import SHARD_PREFIX
from ascendspeed.config import schema
from ascendspeed.config.schema import ModelConfig, Run
from ascendspeed.models.param_mapping import ShardSpec, Slice2D
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import parse_json

RNG = "rng"


def shard_name(rank: int, world: int) -> str:
    """File name of one rank's shard."""
    return f"{SHARD_PREFIX}{rank:05}-of-{world:05}.safetensors"


class _StoredRange(NamedTuple):
    """Elements `start` to `start + numel` of a part, at byte `offset` of `file`."""

    start: int
    numel: int
    file: Path
    offset: int


class ShardIndex:
    """Locations of all tensors in the shards of one save.

    Raises `UserError` if elements are missing or stored twice.
    """

    def __init__(self, folder: Path, step: int, world: int) -> None:
        self.specs: dict[str, ShardSpec] = {}
        self.kinds: dict[str, None] = {}
        self.rng: dict[int, dict[str, tuple[Path, safetensors_io.TensorEntry]]] = defaultdict(dict)
        self._ranges: dict[tuple[str, str, int], list[_StoredRange]] = defaultdict(list)
        for rank in range(world):
            expected = {"step": str(step), "world": str(world), "rank": str(rank)}
            self._add(folder / shard_name(rank, world), rank, expected)
        for ranges in self._ranges.values():
            ranges.sort()
        self._check(folder)

    def _add(self, file: Path, rank: int, expected: dict[str, str]) -> None:
        """Adds the tensors of one shard file; `expected`: metadata that it must have."""
        metadata, entries = safetensors_io.read_header(file)
        wrong = [
            f"{k} {str(metadata.get(k))[:20]}, not {v}" for k, v in expected.items() if metadata.get(k) != v
        ]
        if wrong:
            raise UserError(f"{file}: belongs to another save ({'; '.join(wrong)})")
        try:
            cuts = parse_json(metadata["cuts"].encode())
            specs = {name: spec_from_json(table) for name, table in cuts.items()}
            for key, entry in entries.items():
                if key.startswith(RNG + "|"):
                    self.rng[rank][key.partition("|")[2]] = file, entry
                else:
                    name, kind, part, start = FragmentAddress.parse(key)
                    if entry.dtype != torch.float32 or len(entry.shape) != 1 or part < 0 or start < 0:
                        raise ValueError(f"{key} is not a range of fp32 elements")
                    stored = _StoredRange(start, entry.shape[0], file, entry.offset)
                    self._ranges[name, kind, part].append(stored)
                    self.kinds[kind] = None
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise UserError(f"{file}: not a shard of a training checkpoint ({repr(error)[:200]})") from error
        for name, spec in specs.items():
            if self.specs.setdefault(name, spec) != spec:
                raise UserError(f"{file}: {name} is cut as {spec}, elsewhere as {self.specs[name]}")

    def _check(self, folder: Path) -> None:
        for name, kind, part in self._ranges:
            if name not in self.specs or part >= part_count(self.specs[name]):
                raise UserError(
                    f"{folder}: has elements of part {part} of {kind} of {name}, which does not exist"
                )
        for name, spec in self.specs.items():
            for kind in self.kinds:
                for part in range(part_count(spec)):
                    self._check_part(folder, name, kind, part)

    def _check_part(self, folder: Path, name: str, kind: str, part: int) -> None:
        """Raises `UserError` unless the ranges of a part adjoin and end at its last element."""
        spec = self.specs[name]
        end = 0
        after_last = _StoredRange(stored_numel(spec, part), 0, folder, 0)
        for stored in (*self._ranges.get((name, kind, part), ()), after_last):
            if stored.start != end:
                problem = "missing" if stored.start > end else "doubled"
                raise UserError(
                    f"{folder}: {kind} of {name}, part {part} of {part_count(spec)}: "
                    f"{problem} from element {min(end, stored.start)} on"
                )
            end += stored.numel

    def fill(self, out: Tensor, name: str, kind: str, part: int, start: int) -> None:
        """Reads elements from `start` of a part into the flat `out`; elements of padding keep their value."""
        ranges = self._ranges.get((name, kind, part), [])
        end = start + out.numel()
        first = max(0, bisect.bisect_right(ranges, start, key=lambda stored: stored.start) - 1)
        for stored in ranges[first:]:
            if stored.start >= end:
                break
            lower = max(start, stored.start)
            upper = min(end, stored.start + stored.numel)
            if lower < upper:
                offset = stored.offset + 4 * (lower - stored.start)
                safetensors_io.read_into(out[lower - start : upper - start], stored.file, offset)


def _read_json(path: Path) -> Any:
    """Content of a JSON file, which may hold infinity. Raises `OSError` or `ValueError`."""
    return parse_json(path.read_bytes(), finite=False)


class Checkpoint:
    """An opened training checkpoint: `run`, `state`, and tensors by name, kind and tensor-parallel part."""

    def __init__(self, path: Path) -> None:
        """Reads headers only; `discovery.open_checkpoint` verifies the bytes first.

        Raises `UserError` if it is not complete.
        """
        self.path = path
        try:
            self.run: Run = schema.from_dict(_read_json(path / "run.json"))
            saved = _read_json(path / "train_state.json")
            self.world: int = saved.pop("world")
            self.state = TrainState(**saved | {"left_out": tuple(saved.get("left_out", ()))})
            numbers = {"world": self.world, "step": self.state.step, "samples": self.state.samples}
            numbers["tokens"] = self.state.tokens
            wrong = [name for name, number in numbers.items() if type(number) is not int or number < 0]
            if wrong or not self.world or not isinstance(self.state.engine, dict):
                raise ValueError(f"{(wrong or ['world or engine'])[0]} is not a number of a run")
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path}: run.json or train_state.json is not one of this version ({repr(error)[:200]})"
            ) from error
        self._index = ShardIndex(path, self.state.step, self.world)

    @property
    def config(self) -> ModelConfig:
        """Architecture of the model."""
        return self.run.model

    def rng(self, rank: int) -> dict[str, Tensor]:
        """Random-number states of a rank of the saving run; empty if the run had no such rank."""
        states = {}
        for name, (file, entry) in self._index.rng.get(rank, {}).items():
            states[name] = torch.empty(entry.shape, dtype=entry.dtype)
            safetensors_io.read_into(states[name], file, entry.offset)
        return states

    def names(self, kind: str = "master") -> list[str]:
        """Names of all parameters that are stored with this kind."""
        return list(self._index.specs) if kind in self._index.kinds else []

    def has_kind(self, kind: str) -> bool:
        """True if every parameter is stored with this kind."""
        return kind in self._index.kinds

    def tensors(self, kind: str = "master") -> Iterator[tuple[str, Tensor]]:
        """Every full, unpadded fp32 tensor, one at a time."""
        for name in self.names(kind):
            full = ShardSpec(self._index.specs[name].shape)
            yield name, self.read(name, kind, full, 0, 0, stored_numel(full, 0)).view(full.shape)

    def read(self, name: str, kind: str, spec: ShardSpec, part: int, start: int, numel: int) -> Tensor:
        """Flat fp32 elements `start` to `start + numel` of a part under any `spec`; rows of padding are zero.

        Raises `UserError` if the checkpoint does not have the parameter, or has it in another shape.
        """
        self._check_stored(name, kind, spec)
        if self._index.specs[name] != spec:
            return self._read_other_layout(name, kind, spec, part, start, numel)
        out = torch.empty(numel)
        self._fill(out, name, kind, part, start)
        return out

    def read_fragment(self, fragment: Fragment) -> None:
        """Copies the stored elements into a live fragment, without a copy between if the layout is the stored
        one and the fragment is in the CPU's memory.

        Raises `UserError` as `read` does.
        """
        f, flat = fragment, fragment.tensor.detach().view(-1)
        self._check_stored(f.name, f.kind, f.spec)
        if self._index.specs[f.name] == f.spec and flat.is_cpu and flat.dtype == torch.float32:
            self._fill(flat, f.name, f.kind, f.part, f.start)
        else:
            flat.copy_(self.read(f.name, f.kind, f.spec, f.part, f.start, flat.numel()))

    def _check_stored(self, name: str, kind: str, spec: ShardSpec) -> None:
        if kind not in self._index.kinds or name not in self._index.specs:
            raise UserError(f"{self.path}: has no {kind} of {name}")
        stored_spec = self._index.specs[name]
        if stored_spec.shape != spec.shape:
            raise UserError(
                f"{self.path}: {name} is {list(stored_spec.shape)} there, but {list(spec.shape)} in this run"
            )

    def _fill(self, out: Tensor, name: str, kind: str, part: int, start: int) -> None:
        """Reads elements of a part in the stored layout into `out`, with zeros for padding."""
        spec = self._index.specs[name]
        if part >= part_count(spec):
            raise ValueError(f"part {part} of {name}, which has {part_count(spec)}")
        out[max(0, stored_numel(spec, part) - start) :].zero_()
        self._index.fill(out, name, kind, part, start)

    def _read_other_layout(
        self, name: str, kind: str, spec: ShardSpec, part: int, start: int, numel: int
    ) -> Tensor:
        stored_spec = self._index.specs[name]
        columns = column_count(spec.shard_shape)
        first_row = start // columns
        end_row = -(-(start + numel) // columns)
        out = torch.zeros(end_row - first_row, columns)
        for target in spec.slices(part):
            if (rows := target.within_local_rows(first_row, end_row)) is None:
                continue
            for stored_part in range(part_count(stored_spec)):
                for stored in stored_spec.slices(stored_part):
                    self._copy_overlap(out, rows, stored, name, kind, stored_part)
        return out.view(-1)[start - first_row * columns :][:numel]

    def _copy_overlap(
        self, out: Tensor, target: Slice2D, stored: Slice2D, name: str, kind: str, part: int
    ) -> None:
        """Copies the rectangle that both slices hold from a stored part into `out`, addressed by `target`."""
        destination, source = target.intersection(stored), stored.intersection(target)
        if destination is None or source is None:
            return
        columns = column_count(self._index.specs[name].shard_shape)
        rows = torch.empty(source.rows, columns)
        self._index.fill(rows.view(-1), name, kind, part, source.local_row * columns)
        row, column = destination.local_row, destination.local_column
        out[row : row + source.rows, column : column + source.columns] = rows[
            :, source.local_column : source.local_column + source.columns
        ]


def load_fragments(checkpoint: Checkpoint, fragments: Iterable[Fragment]) -> None:
    """Copies the checkpoint into live fragments; their layout may differ from that of the saving run."""
    with torch.no_grad():
        for fragment in fragments:
            checkpoint.read_fragment(fragment)
            if fragment.write_back:
                fragment.write_back()
