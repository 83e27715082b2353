"""Reads a training checkpoint: any range of any part under any tensor-parallel cut, by the bytes that it needs."""

import bisect
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ascendspeed.checkpoint import safetensors_io
from ascendspeed.checkpoint.fragment import (
    Fragment,
    FragmentAddress,
    TrainState,
    column_count,
    part_count,
    stored_numel,
)
from ascendspeed.config import schema
from ascendspeed.config.schema import ModelConfig, Run
from ascendspeed.models.param_mapping import ShardSpec, Slice2D
from ascendspeed.utils.errors import UserError

RNG = "rng"


def shard_name(rank: int, world: int) -> str:
    """File of one rank."""
    return f"shard-{rank:05}-of-{world:05}.safetensors"


class _Stored(NamedTuple):
    start: int
    size: int
    file: Path
    offset: int


class ShardIndex:
    """Where everything lies in the shards of one save. Raises `UserError` unless they are one whole: no gap, no overlap."""

    def __init__(self, folder: Path, step: int, world: int) -> None:
        self.cuts: dict[str, ShardSpec] = {}
        self.kinds: dict[str, None] = {}
        self.rng: dict[int, dict[str, tuple[Path, safetensors_io.TensorEntry]]] = defaultdict(dict)
        self._at: dict[tuple[str, str, int], list[_Stored]] = defaultdict(list)
        for rank in range(world):
            self._add(
                folder / shard_name(rank, world),
                rank,
                {"step": str(step), "world": str(world), "rank": str(rank)},
            )
        for stored in self._at.values():
            stored.sort()
        self._check(folder)

    def _add(self, file: Path, rank: int, expected: dict[str, str]) -> None:
        metadata, entries = safetensors_io.read_header(file)
        if wrong := [f"{k} {metadata.get(k)}, not {v}" for k, v in expected.items() if metadata.get(k) != v]:
            raise UserError(f"{file}: belongs to another save ({'; '.join(wrong)})")
        try:
            cuts = {
                name: ShardSpec(**c | {"shape": tuple(c["shape"])})
                for name, c in json.loads(metadata["cuts"]).items()
            }
            for key, entry in entries.items():
                if key.startswith(RNG + "|"):
                    self.rng[rank][key.partition("|")[2]] = file, entry
                else:
                    name, kind, part, start = FragmentAddress.of(key)
                    self._at[name, kind, part].append(_Stored(start, entry.shape[0], file, entry.offset))
                    self.kinds[kind] = None
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"{file}: not a shard of a training checkpoint ({error!r})") from error
        for name, cut in cuts.items():
            if self.cuts.setdefault(name, cut) != cut:
                raise UserError(f"{file}: {name} is cut as {cut}, elsewhere as {self.cuts[name]}")

    def _check(self, folder: Path) -> None:
        for name, kind, part in self._at:
            if name not in self.cuts or part >= part_count(self.cuts[name]):
                raise UserError(f"{folder}: a piece of part {part} of {kind} of {name}, which does not exist")
        for name, cut in self.cuts.items():
            for kind in self.kinds:
                for part in range(part_count(cut)):
                    end = 0
                    for stored in (
                        *self._at.get((name, kind, part), ()),
                        _Stored(stored_numel(cut, part), 0, folder, 0),
                    ):
                        if stored.start != end:
                            what = f"{'missing' if stored.start > end else 'doubled'} from element {min(end, stored.start)}"
                            raise UserError(
                                f"{folder}: {kind} of {name}, part {part} of {part_count(cut)}: {what} on"
                            )
                        end += stored.size

    def fill(self, out: Tensor, name: str, kind: str, part: int, start: int) -> None:
        """Reads elements from `start` of a part into the flat `out`; what lies beyond the stored extent is left as it is."""
        stored, end = self._at.get((name, kind, part), []), start + out.numel()
        for piece in stored[max(0, bisect.bisect_right(stored, start, key=lambda s: s.start) - 1) :]:
            if piece.start >= end:
                break
            a, b = max(start, piece.start), min(end, piece.start + piece.size)
            if a < b:
                safetensors_io.read_into(
                    out[a - start : b - start], piece.file, piece.offset + 4 * (a - piece.start)
                )


class Checkpoint:
    """One training checkpoint, opened: `run`, `state`, and its tensors by name, kind and place."""

    def __init__(self, path: Path) -> None:
        """Reads the headers only. Raises `UserError` when it is not whole; `find` and `open_checkpoint` verify the bytes first."""
        self.path = path
        try:
            self.run: Run = schema.from_dict(json.loads((path / "run.json").read_text()))
            saved = json.loads((path / "train_state.json").read_text())
            self.world: int = saved.pop("world")
            self.state = TrainState(**saved)
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path}: run.json or train_state.json is not one of this version ({error!r})"
            ) from error
        self._index = ShardIndex(path, self.state.step, self.world)

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return self.run.model

    def rng(self, rank: int) -> dict[str, Tensor]:
        """Random-number states of a rank of the saving run; empty for a rank that it did not have."""
        found = {}
        for name, (file, entry) in self._index.rng.get(rank, {}).items():
            safetensors_io.read_into(out := torch.empty(entry.shape, dtype=entry.dtype), file, entry.offset)
            found[name] = out
        return found

    def names(self, kind: str = "master") -> list[str]:
        """Names of all parameters stored with this kind."""
        return list(self._index.cuts) if kind in self._index.kinds else []

    def tensors(self, kind: str = "master") -> Iterator[tuple[str, Tensor]]:
        """Every full, unpadded fp32 tensor, one at a time."""
        for name in self.names(kind):
            whole = ShardSpec(self._index.cuts[name].shape)
            yield name, self.read(name, kind, whole, 0, 0, stored_numel(whole, 0)).view(whole.shape)

    def read(self, name: str, kind: str, cut: ShardSpec, part: int, start: int, numel: int) -> Tensor:
        """Flat fp32 elements `start` to `start + numel` of a part under any `cut`; rows of padding are zero.

        Raises `UserError` when the checkpoint has no such parameter, or has it in another shape.
        """
        if kind not in self._index.kinds or name not in self._index.cuts:
            raise UserError(f"{self.path}: has no {kind} of {name}")
        old = self._index.cuts[name]
        if old.shape != cut.shape:
            raise UserError(
                f"{self.path}: {name} is {list(old.shape)} there, but {list(cut.shape)} in this run"
            )
        if old == cut:
            self._index.fill(out := torch.zeros(numel), name, kind, part, start)
            return out
        columns = column_count(cut.shard_shape)
        first, last = start // columns, -(-(start + numel) // columns)  # whole rows
        out = torch.zeros(last - first, columns)
        for new in cut.slices(part):
            for there in range(part_count(old)):
                for tile in old.slices(there):
                    self._copy(out, first, new, tile, name, kind, there)
        return out.view(-1)[start - first * columns :][:numel]

    def _copy(
        self, out: Tensor, first: int, new: Slice2D, old: Slice2D, name: str, kind: str, part: int
    ) -> None:
        """What an old and a new tile share, into `out`, whose rows are the new part's from `first` on."""
        shift = new.row - new.local_row  # from rows of the new part to rows of the full tensor
        top = max(new.row, old.row, first + shift)
        bottom = min(new.row + new.rows, old.row + old.rows, first + len(out) + shift)
        left, right = max(new.column, old.column), min(new.column + new.columns, old.column + old.columns)
        if top >= bottom or left >= right:
            return
        columns = column_count(self._index.cuts[name].shard_shape)
        source = torch.empty(bottom - top, columns)
        self._index.fill(source.view(-1), name, kind, part, (top - old.row + old.local_row) * columns)
        taken = source[:, left - old.column + old.local_column :][:, : right - left]
        out[top - shift - first : bottom - shift - first, left - new.column + new.local_column :][
            :, : right - left
        ] = taken


def load_fragments(checkpoint: Checkpoint, fragments: Iterable[Fragment]) -> None:
    """Copies the checkpoint into every live fragment of a layout that need not be the one that saved it."""
    with torch.no_grad():
        for f in fragments:
            f.tensor.view(-1).copy_(checkpoint.read(f.name, f.kind, f.cut, f.part, f.start, f.tensor.numel()))
