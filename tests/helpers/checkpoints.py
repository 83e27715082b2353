"""Training checkpoints for tests."""

import dataclasses
import itertools
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch

from ascendspeed.checkpoint.fragment import KINDS, Fragment, TrainState
from ascendspeed.checkpoint.load import load_fragments
from ascendspeed.checkpoint.save import save_checkpoint
from ascendspeed.config.schema import DataConfig, ModelConfig, OptimConfig, ParallelConfig, Run, TrainConfig
from ascendspeed.models.param_mapping import ShardSpec
from ascendspeed.utils.errors import UserError


def in_child(work) -> int:
    """Runs work() in a forked process; returns its wait status."""
    if (pid := os.fork()) == 0:
        try:
            work()
            os._exit(0)
        except UserError:
            os._exit(2)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def die_at(count: int, monkeypatch) -> None:
    """SIGKILL at the `count`-th operation that changes files."""
    left = itertools.count(count, -1)

    def deadly(real):
        def call(*args, **kwargs):
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for owner, name in [(os, n) for n in ("rename", "replace", "unlink", "rmdir", "fsync")] + [
        (Path, n) for n in ("mkdir", "unlink")
    ]:
        monkeypatch.setattr(owner, name, deadly(getattr(owner, name)))


RUN = Run(
    ModelConfig(num_layers=2),
    ParallelConfig(),
    OptimConfig(lr=3e-4),
    DataConfig(data_path=("a", "b")),
    TrainConfig(),
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Ranks of a run: rank = data-parallel rank * tp + tensor-parallel rank."""

    tp: int = 1
    dp: int = 1
    zero: bool = True
    """Data-parallel ranks own pieces (ZeRO); else all hold the same and share the writing."""
    padding: int = 0
    """Vocabulary rows beyond the next multiple of tp."""

    @property
    def world(self) -> int:
        return self.tp * self.dp


@dataclasses.dataclass(frozen=True)
class Model:
    """Shapes of a small model: [h, f, vocabulary]."""

    h: int = 4
    f: int = 12
    vocab: int = 125

    def full(self, step: int = 0) -> dict[tuple[str, str], torch.Tensor]:
        """Every full tensor of every kind, different for every step."""
        g = torch.Generator().manual_seed(step)
        return {
            (n, k): torch.randn(c.shape, generator=g) for n, c in self.cuts(Layout()).items() for k in KINDS
        }

    def cuts(self, layout: Layout) -> dict[str, ShardSpec]:
        tp, h, f = layout.tp, self.h, self.f
        rows = -(-self.vocab // tp) * tp + layout.padding * tp
        return {
            "embedding": ShardSpec((self.vocab, h), 0, 1, tp, rows),
            "qkv": ShardSpec((3 * f, h), 0, 1, tp),
            "qkv.bias": ShardSpec((3 * f,), 0, 1, tp),
            "fc1": ShardSpec((2 * f, h), 0, 2, tp),
            "fc2": ShardSpec((h, f), 1, 1, tp),
            "proj.bias": ShardSpec((h,)),
            "scale": ShardSpec(()),
        }

    def fragments(
        self, layout: Layout, rank: int, full: dict[tuple[str, str], torch.Tensor]
    ) -> list[Fragment]:
        """Fragments of a rank in a layout, as copies of slices of the full tensors."""
        data, tensor = divmod(rank, layout.tp)
        found = []
        for (name, kind), whole in full.items():
            cut = self.cuts(layout)[name]
            flat = cut.shard(whole, tensor).reshape(-1)
            a, b = (
                flat.numel() * (data + i) // layout.dp if layout.zero else i * flat.numel() for i in (0, 1)
            )
            alone = cut.dim is not None
            held = (0, 1) if alone else (tensor, layout.tp)
            if not layout.zero:
                held = (data, layout.dp) if alone else (rank, layout.world)
            found.append(Fragment(name, kind, cut, tensor if alone else 0, a, flat[a:b].clone(), held))
        return found


def run_at(step: int) -> Run:
    """A run that differs from step to step, so that a stale run.json is seen."""
    return dataclasses.replace(RUN, train=TrainConfig(seed=step))


def every_rank(world: int, work) -> list:
    """Runs work(rank) on one thread per rank; raises the first error."""
    results: list = [None] * world

    def one(rank):
        try:
            results[rank] = work(rank)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    [t.start() for t in threads]
    [t.join(60) for t in threads]
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def save(folder, step=10, layout=Layout(), model=Model(), **more) -> Path:
    barrier = threading.Barrier(layout.world)
    full, state = (
        model.full(step),
        TrainState(step, step * 8, step * 64, {"adam_step": step - 1, "loss_scale": 2.0**16}),
    )

    def one(rank):
        rng = {"torch": torch.full((5,), rank, dtype=torch.uint8), "counter": torch.tensor(rank)}
        fragments = model.fragments(layout, rank, full)
        return save_checkpoint(
            folder, state, run_at(step), fragments, rng, rank, layout.world, barrier.wait, **more
        )

    return every_rank(layout.world, one)[0]


def check(opened, step=10, layout=Layout(), model=Model()) -> None:
    """Restoring into any layout gives exactly what that layout would hold."""
    assert opened.state.step == step
    for rank in range(layout.world):
        expected = model.fragments(layout, rank, model.full(step))
        blank = [dataclasses.replace(f, tensor=torch.full_like(f.tensor, 7.0)) for f in expected]
        load_fragments(opened, blank)
        for mine, right in zip(blank, expected, strict=True):
            assert torch.equal(mine.tensor, right.tensor), (mine.name, mine.kind, rank)


TWO = Layout(tp=2)


SHARDS = [f"shard-{rank:05}-of-00002.safetensors" for rank in range(2)]


NAMES = [*SHARDS, "run.json", "train_state.json", "manifest.json"]


@pytest.fixture(scope="session")
def two_steps(tmp_path_factory):
    """A folder with two checkpoints of two ranks."""
    folder = tmp_path_factory.mktemp("good")
    save(folder, 10, TWO)
    save(folder, 20, TWO)
    return folder


@pytest.fixture
def ckpt(two_steps, tmp_path):
    """A copy of `two_steps`, to damage."""
    return Path(shutil.copytree(two_steps, tmp_path / "ckpt"))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << (at % 8)
    path.write_bytes(data)
