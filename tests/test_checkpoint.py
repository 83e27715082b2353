"""The training checkpoint: every layout reads every other; damaged checkpoints are never accepted."""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import die_at, in_child
from helpers.log_lines import log_lines
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ascendspeed.checkpoint import manifest, safetensors_io
from ascendspeed.checkpoint import save as saving
from ascendspeed.checkpoint.async_saver import CheckpointSaver
from ascendspeed.checkpoint.discovery import find_checkpoint, open_checkpoint
from ascendspeed.checkpoint.fragment import KINDS, Fragment, TrainState
from ascendspeed.checkpoint.load import Checkpoint, load_fragments
from ascendspeed.checkpoint.ownership import claim_folder
from ascendspeed.checkpoint.paths import looks_like_checkpoint
from ascendspeed.checkpoint.save import save_checkpoint
from ascendspeed.config.schema import DataConfig, ModelConfig, OptimConfig, ParallelConfig, Run, TrainConfig
from ascendspeed.models.param_mapping import ShardSpec
from ascendspeed.utils.errors import UserError

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


# -- layouts -------------------------------------------------------------------------------------------------

LAYOUTS = [
    Layout(),
    Layout(tp=2),
    Layout(dp=2),
    Layout(dp=3, zero=False),
    Layout(2, 2, padding=3),
    Layout(4, 2, zero=False),
]


@pytest.mark.parametrize("old", LAYOUTS, ids=str)
def test_every_layout_reads_every_other(tmp_path, old):
    path = save(tmp_path, layout=old)
    assert path == tmp_path / "step_0000010"
    assert (tmp_path / "latest").read_text() == "step_0000010\n"
    opened = find_checkpoint(tmp_path)
    for new in LAYOUTS:
        check(opened, layout=new)
    for kind in KINDS:
        assert {n: t.tolist() for n, t in opened.tensors(kind)} == {
            n: t.tolist() for (n, k), t in Model().full(10).items() if k == kind
        }
    assert opened.world == old.world
    assert (opened.run, opened.config) == (run_at(10), RUN.model)
    assert opened.state == TrainState(10, 80, 640, {"adam_step": 9, "loss_scale": 65536.0})
    for rank in range(old.world):
        rng = opened.rng(rank)
        assert rng["torch"].tolist() == [rank] * 5
        assert rng["torch"].dtype == torch.uint8
        assert rng["counter"].item() == rank
    assert opened.rng(old.world) == {}


layouts = st.builds(
    Layout, st.sampled_from([1, 2, 3, 4]), st.integers(1, 3), st.booleans(), st.integers(0, 40)
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    model=st.builds(Model, st.integers(1, 5), st.sampled_from([12, 24]), st.integers(1, 40)),
    old=layouts,
    new=layouts,
    data=st.data(),
)
def test_any_range_under_any_layout(tmp_path, model, old, new, data):
    opened = Checkpoint(save(tmp_path, 1, old, model))
    check(opened, 1, new, model)
    name, cut = data.draw(st.sampled_from(sorted(model.cuts(new).items(), key=str)))
    part = data.draw(st.integers(0, (cut.num_shards if cut.dim is not None else 1) - 1))
    whole = cut.shard(model.full(1)[name, "exp_avg"], part).reshape(-1)
    a = data.draw(st.integers(0, whole.numel()))
    b = data.draw(st.integers(a, whole.numel()))
    assert torch.equal(opened.read(name, "exp_avg", cut, part, a, b - a), whole[a:b])


def test_gate_and_up_are_cut_one_by_one(tmp_path):
    """By hand, without `ShardSpec.shard`; control: the bytes read as one block are another tensor."""
    gate, up = torch.randn(6, 3), torch.randn(6, 3)
    right, wrong = ShardSpec((12, 3), 0, 2, 2), ShardSpec((12, 3), 0, 1, 2)
    for cut, folder in ((right, tmp_path / "right"), (wrong, tmp_path / "wrong")):
        for rank in (1, 0):
            local = torch.cat([gate[3 * rank : 3 * rank + 3], up[3 * rank : 3 * rank + 3]])
            fragments = [Fragment("fc1", "master", cut, rank, 0, local.view(-1))]
            save_checkpoint(folder, TrainState(1, 1, 1), RUN, fragments, {}, rank, 2, lambda: None)
    whole = torch.cat([gate, up])
    assert torch.equal(dict(find_checkpoint(tmp_path / "right").tensors())["fc1"], whole)
    assert not torch.equal(dict(find_checkpoint(tmp_path / "wrong").tensors())["fc1"], whole)


def test_padding_is_never_written(tmp_path):
    save(tmp_path, layout=Layout(4, 1, padding=100))  # ranks 1 to 3 hold little or nothing but padding
    stored = [
        k
        for s in (tmp_path / "step_0000010").glob("*.safetensors")
        for k, t in load_file(s).items()
        if "embedding" in k
    ]
    sizes = sum(
        t.numel()
        for s in (tmp_path / "step_0000010").glob("*.safetensors")
        for k, t in load_file(s).items()
        if k in stored
    )
    assert sizes == 125 * 4 * len(KINDS)


def test_shards_are_plain_safetensors(tmp_path):
    """Read by the library itself, every element lies in exactly one shard."""
    path, model = save(tmp_path, layout=Layout(tp=2, dp=2)), Model()
    total = 0
    for rank in range(4):
        shard = load_file(path / f"shard-{rank:05}-of-00004.safetensors")
        assert shard.pop("rng|torch").tolist() == [rank] * 5
        assert shard.pop("rng|counter").item() == rank
        for key, tensor in shard.items():
            name, kind, part, start = key.split("|")
            flat = model.cuts(Layout(tp=2))[name].shard(model.full(10)[name, kind], int(part)).reshape(-1)
            assert torch.equal(tensor, flat[int(start) : int(start) + len(tensor)])
            total += tensor.numel()
    assert total == sum(t.numel() for t in model.full().values())


def test_reads_no_more_than_it_needs(tmp_path, monkeypatch):
    save(tmp_path, layout=Layout(tp=2, dp=2))
    opened, read = find_checkpoint(tmp_path), []
    real = safetensors_io.read_into
    monkeypatch.setattr(
        safetensors_io, "read_into", lambda out, *where: (read.append(out.numel()), real(out, *where))
    )
    cut = Model().cuts(Layout(tp=2))["fc1"]
    opened.read("fc1", "master", cut, 1, 10, 7)
    assert sum(read) == 7
    read.clear()
    opened.read("fc1", "master", Model().cuts(Layout())["fc1"], 0, 8, 12)  # 3 rows of 24
    assert sum(read) == 12
    read.clear()
    opened.read(
        "fc2", "master", Model().cuts(Layout(tp=4))["fc2"], 3, 0, 12
    )  # columns of the second part only
    assert sum(read) == 24


def test_wrong_questions_are_refused(tmp_path):
    save(tmp_path)
    opened = find_checkpoint(tmp_path)
    with pytest.raises(UserError, match="no master of lm_head"):
        opened.read("lm_head", "master", ShardSpec((4,)), 0, 0, 4)
    with pytest.raises(UserError, match=r"fc1 is \[24, 4\] there, but \[24, 5\]"):
        opened.read("fc1", "master", ShardSpec((24, 5)), 0, 0, 4)
    fragment = Fragment("a", "master", ShardSpec((4,)), 0, 0, torch.zeros(4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="fp32"):
        save_checkpoint(tmp_path, TrainState(1, 1, 1), RUN, [fragment], {}, 0, 1, lambda: None)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: f[:-1], "missing from element 0"),
        (
            lambda f: [*f, dataclasses.replace(f[3], start=0, tensor=f[3].tensor[:1], name="fc1")],
            "cut as|doubled|two fragments",
        ),
        (lambda f: [dataclasses.replace(f[0], tensor=f[0].tensor[:-1]), *f[1:]], "missing from element 499"),
    ],
)
def test_a_save_that_would_not_load_is_not_published(tmp_path, spoil, said):
    save(tmp_path, 5)
    fragments = Model().fragments(Layout(), 0, Model().full())
    with pytest.raises((UserError, ValueError), match=said):
        save_checkpoint(tmp_path, TrainState(6, 1, 1), RUN, spoil(fragments), {}, 0, 1, lambda: None)
    check(find_checkpoint(tmp_path), 5)


def gloo_worker(rank: int, folder: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    def gather(mine):
        everyone: list = [None, None]
        dist.all_gather_object(everyone, mine)
        return everyone[0] + everyone[1]

    model, old, new = Model(), Layout(tp=2), Layout(dp=2)
    fragments = model.fragments(old, rank, model.full(3))
    save_checkpoint(folder / "ckpt", TrainState(3, 3, 3), RUN, fragments, {}, rank, 2, dist.barrier)
    opened = find_checkpoint(folder / "ckpt", rank, 2, gather)
    mine = model.fragments(new, rank, {k: torch.zeros_like(t) for k, t in model.full().items()})
    load_fragments(opened, mine)
    same = all(
        torch.equal(a.tensor, b.tensor)
        for a, b in zip(mine, model.fragments(new, rank, model.full(3)), strict=True)
    )
    (folder / f"rank{rank}").write_text(str(same))
    dist.destroy_process_group()


def test_keys_of_the_shard_metadata_stay(tmp_path):
    """Checkpoints of earlier versions are read by these keys, whatever the names of `ShardSpec`'s fields."""
    save(tmp_path, 1, TWO)
    metadata, _ = safetensors_io.read_header(tmp_path / "step_0000001/shard-00000-of-00002.safetensors")
    assert sorted(metadata) == ["cuts", "rank", "step", "world"]
    specs = json.loads(metadata["cuts"]).values()
    assert {tuple(spec) for spec in specs} == {("shape", "dim", "stride", "parts", "padded_rows")}


def test_two_processes(tmp_path):
    context = multiprocessing.get_context("spawn")  # the parent may be a process group of its own already
    workers = [context.Process(target=gloo_worker, args=(rank, tmp_path)) for rank in range(2)]
    [w.start() for w in workers]
    [w.join(60) for w in workers]
    assert [w.exitcode for w in workers] == [0, 0]
    assert [(tmp_path / f"rank{r}").read_text() for r in range(2)] == ["True", "True"]


# -- damage --------------------------------------------------------------------------------------------------

TWO = Layout(tp=2)
SHARDS = [f"shard-{rank:05}-of-00002.safetensors" for rank in range(2)]
NAMES = [*SHARDS, "run.json", "train_state.json", "manifest.json"]


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    save(folder, 10, TWO)
    save(folder, 20, TWO)
    return folder


@pytest.fixture
def ckpt(two_steps, tmp_path):
    return Path(shutil.copytree(two_steps, tmp_path / "ckpt"))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << (at % 8)
    path.write_bytes(data)


def swap(path: Path) -> None:
    other = path.with_name(NAMES[(NAMES.index(path.name) + 1) % len(NAMES)])
    a, b = path.read_bytes(), other.read_bytes()
    path.write_bytes(b)
    other.write_bytes(a)


DAMAGE = {
    "deleted": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: path.open("ab").write(b"x"),
    "first bit": lambda path: flip(path, 0),
    "middle bit": lambda path: flip(path, path.stat().st_size // 2),
    "last bit": lambda path: flip(path, path.stat().st_size - 1),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "swapped": swap,
    "stale": lambda path: shutil.copy(path.parent.parent / "step_0000010" / path.name, path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def find_with(folder, world: int):
    """All ranks find the checkpoint together, as over a process group; returns it and rank 0's messages."""
    barrier, boxes = threading.Barrier(world), [[] for _ in range(world)]

    def one(rank):
        def gather(mine):
            boxes[rank] = mine
            barrier.wait()
            everyone = [text for box in boxes for text in box]
            barrier.wait()
            return everyone

        return find_checkpoint(folder, rank, world, gather)

    with log_lines() as lines:
        found = every_rank(world, one)
    assert len({getattr(f, "path", None) for f in found}) == 1
    assert all(lines.count(line) == world for line in lines)  # every rank logs the same
    return found[0], list(dict.fromkeys(lines))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_named_and_the_older_one_is_used(ckpt, name, how):
    path = ckpt / "step_0000020" / name
    DAMAGE[how](path)
    opened, said = find_with(ckpt, world=2)
    assert opened.path.name == "step_0000010"
    warnings = [text for text in said if text.startswith("warning")]
    assert len(warnings) == 1
    assert "step_0000020 is damaged" in warnings[0]
    assert name in warnings[0] or (how == "swapped" and "manifest.json" in warnings[0])
    assert "\n" not in warnings[0]
    check(opened, 10, Layout(dp=2))
    with pytest.raises(
        UserError, match="step_0000020 is damaged"
    ) as error:  # asked for by name: no other is taken
        open_checkpoint(ckpt / "step_0000020")
    assert warnings[0].startswith(f"warning: {error.value}")


def test_control_undamaged_is_taken(ckpt):
    for world in (1, 2, 7):
        opened, said = find_with(ckpt, world)
        assert opened.path.name == "step_0000020"
        assert not any("warning" in text for text in said)
    assert open_checkpoint(ckpt).path.name == "step_0000020"
    assert open_checkpoint(ckpt / "step_0000010").path.name == "step_0000010"
    renamed = ckpt.rename(ckpt.with_name("elsewhere")) / "step_0000010"
    check(open_checkpoint(renamed.rename(renamed.with_name("exported"))), 10)


def test_control_without_hashes_a_flipped_bit_would_load(ckpt):
    path = ckpt / "step_0000020" / SHARDS[0]
    flip(path, path.stat().st_size - 100)
    Checkpoint(ckpt / "step_0000020")  # headers are fine


def test_every_bit_of_the_manifest_counts(ckpt):
    path = ckpt / "step_0000020" / "manifest.json"
    whole = path.read_bytes()
    for at in range(len(whole)):
        flip(path, at)
        assert manifest.find_problems(path.parent), at
        path.write_bytes(whole)
    assert not manifest.find_problems(path.parent)


def test_a_step_under_another_steps_name(ckpt):
    shutil.rmtree(ckpt / "step_0000020")
    shutil.copytree(ckpt / "step_0000010", ckpt / "step_0000020")
    opened, said = find_with(ckpt, 1)
    assert opened.path.name == "step_0000010"
    assert "it is of step 10" in said[1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is missing"),
        (b"", "is empty"),
        (b"\xff\xfe\x00garbage", "which is not there"),
        (b"step_0000099", "'step_0000099', which is not there"),
        (b"../../etc", "which is not there"),
    ],
)
def test_a_bad_latest_is_named(ckpt, content, said):
    (ckpt / "latest").unlink()
    if content is not None:
        (ckpt / "latest").write_bytes(content)
    opened, words = find_with(ckpt, world=2)
    assert opened.path.name == "step_0000020"
    assert words[0].startswith("warning: ")
    assert said in words[0]


def test_latest_may_name_an_older_one(ckpt):
    (ckpt / "latest").write_text("step_0000010")
    assert find_with(ckpt, 1)[0].path.name == "step_0000010"
    flip(ckpt / "step_0000010" / SHARDS[0], 900)  # nothing older is left: a newer one is better than none
    assert find_with(ckpt, 1)[0].path.name == "step_0000020"


def test_nothing_good(ckpt):
    for step in ("step_0000010", "step_0000020"):
        flip(ckpt / step / SHARDS[1], 900)
    with pytest.raises(UserError, match="no checkpoint there is whole") as error:
        find_checkpoint(ckpt)
    assert str(error.value).count(SHARDS[1]) == 2


def test_nothing_at_all(tmp_path):
    assert find_checkpoint(tmp_path / "never") is None
    assert find_checkpoint(tmp_path) is None
    (tmp_path / ".step_0000007.tmp").mkdir()  # the very first save was killed
    assert find_checkpoint(tmp_path) is None
    assert not looks_like_checkpoint(tmp_path)
    with pytest.raises(UserError, match="no training checkpoint"):
        open_checkpoint(tmp_path)
    (tmp_path / "latest").write_text("release")  # another format's
    assert find_checkpoint(tmp_path) is None
    for text in ("", "step_0000007"):
        (tmp_path / "latest").write_text(text)
        with pytest.raises(UserError, match="no step_"):
            find_checkpoint(tmp_path)
    assert looks_like_checkpoint(tmp_path)  # lost, but once there: not a fresh start


def test_what_looks_like_a_checkpoint(ckpt, tmp_path):
    assert looks_like_checkpoint(ckpt)
    assert looks_like_checkpoint(ckpt / "step_0000010")
    assert not looks_like_checkpoint(tmp_path / "nothing")


def test_ranks_that_see_different_files(ckpt):
    with pytest.raises(UserError, match="do not see the same files"):
        find_checkpoint(ckpt, 0, 2, lambda mine: [*mine, "None []"])


def test_a_pickle_is_never_opened(ckpt):
    class Bomb:
        def __reduce__(self):
            return (os.system, (f"touch {ckpt}/exploded",))

    path = ckpt / "step_0000020" / SHARDS[0]
    torch.save({"a": Bomb()}, path)
    listed = json.loads((ckpt / "step_0000020" / "manifest.json").read_text())["files"]
    listed[path.name] = {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (path.parent / "manifest.json").write_text(
        saving.manifest.manifest_text(20, listed)
    )  # even with a manifest that agrees
    opened, said = find_with(ckpt, 1)
    assert opened.path.name == "step_0000010"
    assert "not a whole safetensors file" in said[1]
    assert not (ckpt / "exploded").exists()


# -- saves that do not end -----------------------------------------------------------------------------------


def test_too_small_a_disk_is_known_before(tmp_path, monkeypatch):
    save(tmp_path, 1, TWO)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 0, saving.DISK_MARGIN + 1000)
    )
    monkeypatch.setattr(safetensors_io.ShardWriter, "write", lambda *a: pytest.fail("nothing may be written"))
    barrier, errors = threading.Barrier(2), []

    def one(rank):
        fragments = Model().fragments(TWO, rank, Model().full())
        with pytest.raises(UserError) as error:
            save_checkpoint(tmp_path, TrainState(2, 1, 1), RUN, fragments, {}, rank, 2, barrier.wait)
        errors.append(str(error.value))

    every_rank(2, one)
    assert len(set(errors)) == 1  # the same words on every rank
    assert "it takes 0.00 GiB and 0.06 GiB are free" in errors[0]
    monkeypatch.undo()
    check(find_checkpoint(tmp_path), 1)


@pytest.mark.parametrize("bad", [0, 1])
def test_one_rank_runs_out_of_space(tmp_path, monkeypatch, bad):
    save(tmp_path, 1, TWO)
    real = safetensors_io.ShardWriter.write

    def write(shard, path):
        real(shard, path)
        if f"shard-{bad:05}" in path.name:
            os.truncate(path, 100)
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return "0"

    monkeypatch.setattr(safetensors_io.ShardWriter, "write", write)
    with pytest.raises(UserError, match=f"step_0000002 was not saved: rank {bad}: .*No space left on device"):
        save(tmp_path, 2, TWO)
    assert not list(tmp_path.rglob(".step_*/shard-*"))  # the space is free again
    check(find_checkpoint(tmp_path), 1)
    monkeypatch.undo()
    save(tmp_path, 2, TWO)
    check(find_checkpoint(tmp_path), 2)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_0000001", "step_0000002"]


@pytest.mark.parametrize("limit", [0, 100, 3000, 12000])
def test_file_size_limit_leaves_the_last_one(tmp_path, limit):
    save(tmp_path, 1)

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        save(tmp_path, 2)

    assert os.waitstatus_to_exitcode(in_child(limited)) == 2
    check(find_checkpoint(tmp_path), 1)
    save(tmp_path, 2)
    check(find_checkpoint(tmp_path), 2)


@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step"])
def test_killed_at_every_file_operation(tmp_path, monkeypatch, again):
    """Old or new, never something else; and the next save tidies up."""
    small, ends = Model(2, 12, 5), []
    for count in range(100):
        folder = tmp_path / str(count)
        save(folder, 1, model=small)
        if again:
            flip(folder / "step_0000001" / "shard-00000-of-00001.safetensors", 2000)
            save(folder, 0, model=small)
        new = 1 if again else 2

        def killed(folder=folder, count=count, new=new):
            die_at(count, monkeypatch)
            save(folder, new, model=small, keep=1)

        status = in_child(killed)
        opened = find_checkpoint(folder)
        ends.append(opened.state.step)
        assert opened.state.step in (1 - again, new)
        check(opened, opened.state.step, model=small)
        save(folder, 3, model=small, keep=1)
        assert sorted(p for p in os.listdir(folder) if p != "step_0000001" or not again) == [
            "latest",
            "step_0000003",
        ]
        check(find_checkpoint(folder), 3, model=small)
        if status == 0:
            break
    assert status == 0
    assert len(set(ends)) == 2  # both old and new were met


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_a_random_moment(tmp_path, seed):
    big = Model(64, 480, 999)
    save(tmp_path, 1, model=big)
    steps = random.Random(seed)

    def endless():
        for step in itertools.count(2):
            save(tmp_path, step, Layout(dp=2), big, keep=2)

    if (pid := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            endless()
        os._exit(1)
    time.sleep(steps.uniform(0.02, 0.3))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    opened = find_checkpoint(tmp_path)
    check(opened, opened.state.step, model=big)
    save(tmp_path, opened.state.step + 1, model=big, keep=1)
    check(find_checkpoint(tmp_path), opened.state.step + 1, model=big)


def test_a_leftover_of_a_larger_run_is_not_taken_along(tmp_path):
    left = tmp_path / ".step_0000002.tmp"
    left.mkdir(parents=True)
    for name in (
        "shard-00003-of-00004.safetensors",
        "00000.written",
        "00001.size",
        "failed.written",
        "failed.size",
    ):
        (left / name).write_text('{"size": 1, "sha256": "0"}')
    (tmp_path / ".step_0000001.tmp").mkdir()
    path = save(tmp_path, 2, TWO)
    assert sorted(os.listdir(path)) == sorted(NAMES)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_0000002"]


def test_keep(tmp_path):
    for step in (1, 2, 3, 9):
        save(tmp_path, step)
    save(tmp_path, 4, keep=2)  # gone back to 3: the abandoned 9 is not ours to remove
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_0000003", "step_0000004", "step_0000009"]
    assert find_checkpoint(tmp_path).state.step == 4


def test_an_old_one_that_stays_is_a_warning_on_rank_0(tmp_path, monkeypatch):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    real = os.rename

    def rename(old, new):
        if Path(old).name == "step_0000001":
            raise PermissionError(errno.EPERM, "Operation not permitted", str(old))
        if Path(old).name == "step_0000002":
            shutil.rmtree(old)  # the user is faster
        real(old, new)

    monkeypatch.setattr(os, "rename", rename)
    with log_lines() as said:
        assert save(tmp_path, 5, TWO, keep=2) == tmp_path / "step_0000005"
    assert said == [f"warning: {tmp_path}/step_0000001: Operation not permitted; this older checkpoint stays"]
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_0000001", "step_0000004", "step_0000005"]
    check(find_checkpoint(tmp_path), 5)


def fails_on_both(folder, step) -> str:
    """The words of the `UserError` that both ranks raise."""
    barrier, errors = threading.Barrier(2), []

    def one(rank):
        fragments = Model().fragments(TWO, rank, Model().full(step))
        with pytest.raises(UserError) as error:
            save_checkpoint(folder, TrainState(step, 1, 1), RUN, fragments, {}, rank, 2, barrier.wait)
        errors.append(str(error.value))

    every_rank(2, one)
    assert len(set(errors)) == 1
    return errors[0]


def test_an_error_after_the_renaming_is_one_on_every_rank(tmp_path, monkeypatch):
    save(tmp_path, 1, TWO)
    real = os.replace

    def replace(old, new):
        if Path(new).name == "latest":
            raise OSError(errno.EIO, "Input/output error", str(new))
        real(old, new)

    monkeypatch.setattr(os, "replace", replace)
    assert fails_on_both(tmp_path, 2).endswith(
        "step_0000002 was not saved: " + f"{tmp_path}/latest: Input/output error"
    )
    monkeypatch.undo()
    save(tmp_path, 3, TWO, keep=1)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_0000003"]  # nothing of the failure is left


def test_latest_that_is_a_folder_is_known_before_the_renaming(tmp_path):
    (tmp_path / "latest").mkdir()
    assert fails_on_both(tmp_path, 2).endswith("latest is a folder; remove it")
    assert not (tmp_path / "step_0000002").exists()


def test_a_save_folder_that_is_a_file_is_one_error(tmp_path):
    (tmp_path / "ckpt").touch()
    barrier, errors = threading.Barrier(2), []

    def one(rank):
        with pytest.raises(
            UserError, match=r"step_0000002 was not saved: .*(directory|File exists|report)"
        ) as error:
            save_checkpoint(tmp_path / "ckpt", TrainState(2, 1, 1), RUN, [], {}, rank, 2, barrier.wait)
        errors.append(error)

    every_rank(2, one)
    assert len(errors) == 2


@pytest.mark.parametrize("moment", ["before", "while it writes"])
def test_who_is_no_longer_the_owner_publishes_nothing(tmp_path, monkeypatch, moment):
    mine, real = claim_folder(tmp_path), safetensors_io.ShardWriter.write
    save(tmp_path, 1, TWO, token=mine)
    claims = [1]

    def write(shard, path):
        if claims:
            claims.pop()
            claim_folder(tmp_path)
        return real(shard, path)

    if moment == "before":
        claim_folder(tmp_path)
    monkeypatch.setattr(safetensors_io.ShardWriter, "write", write)
    with pytest.raises(UserError, match=f"step_0000002 was not saved: .*another run saves in {tmp_path}"):
        save(tmp_path, 2, TWO, token=mine)
    assert len(claims) == (moment == "before")  # then not a byte is written
    check(find_checkpoint(tmp_path), 1)
    assert not (tmp_path / "step_0000002").exists()
    monkeypatch.undo()
    newest = claim_folder(tmp_path)
    save(tmp_path, 2, TWO, token=newest)
    assert sorted(os.listdir(tmp_path)) == [".owner", "latest", "step_0000001", "step_0000002"]
    (tmp_path / ".owner").write_text("{")  # says nothing
    save(tmp_path, 3, TWO, token=newest)


def test_saving_copies_nothing_whole(tmp_path):
    """Peak memory while saving 128 MiB grows by a chunk or two."""
    fragment = Fragment("w", "master", ShardSpec((1 << 25,)), 0, 0, torch.randn(1 << 25))

    def high_water() -> int:
        return next(
            int(line.split()[1])
            for line in Path("/proc/self/status").read_text().splitlines()
            if "VmHWM" in line
        )

    def measured():
        Path("/proc/self/clear_refs").write_text("5")
        before = high_water()
        save_checkpoint(tmp_path, TrainState(1, 1, 1), RUN, [fragment], {}, 0, 1, lambda: None)
        if high_water() - before > 48 << 10:
            raise UserError("too much")

    assert in_child(measured) == 0


# -- behind the step -----------------------------------------------------------------------------------------


def savers(folder, layout=Layout(), behind=True, **train) -> list[CheckpointSaver]:
    """One per rank; they meet at a barrier of their own."""
    barrier = threading.Barrier(layout.world)
    run = dataclasses.replace(RUN, train=TrainConfig(save=str(folder), async_save=behind, **train))
    return [CheckpointSaver(run, rank, layout.world, barrier.wait) for rank in range(layout.world)]


def begin(saver: CheckpointSaver, step: int, rank=0, layout=Layout(), model=Model()) -> list[Fragment]:
    """Saves, or begins to; returns the live fragments."""
    fragments = model.fragments(layout, rank, model.full(step))
    saver.save(TrainState(step, step, step), fragments, {"torch": torch.full((3,), step, dtype=torch.uint8)})
    return fragments


@pytest.mark.parametrize("layout", [Layout(), Layout(2, 2, padding=3), Layout(dp=3, zero=False)], ids=str)
def test_what_is_saved_behind_is_what_was_there_when_it_began(tmp_path, layout, monkeypatch):
    """Training goes on at once and changes everything; the control is a saver that does not copy."""
    real = safetensors_io.ShardWriter.write

    def work(saver, rank, folder, copies, allowed):
        if not copies:
            monkeypatch.setattr(saver, "_copy_to_host", list)
        for fragment in begin(saver, 4, rank, layout):
            fragment.tensor.fill_(-1.0)
        assert not saver.take_finished()
        allowed.wait(20)
        saver.wait()
        (saved,) = saver.take_finished()
        assert saved.path == saver.last == folder / "step_0000004"
        assert 0 < saved.stall < saved.seconds

    for folder, copies in ((tmp_path / "right", True), (tmp_path / "wrong", False)):
        all_savers, allowed = (
            savers(folder, layout),
            threading.Barrier(2 * layout.world),
        )  # who writes, and who has changed all
        monkeypatch.setattr(
            safetensors_io.ShardWriter,
            "write",
            lambda shard, path, go=allowed: (go.wait(20), real(shard, path))[1],
        )
        every_rank(
            layout.world,
            lambda rank, ours=all_savers, at=folder, c=copies, go=allowed: work(ours[rank], rank, at, c, go),
        )
    check(find_checkpoint(tmp_path / "right"), 4)
    assert all((t == -1).all() for _, t in find_checkpoint(tmp_path / "wrong").tensors())


def test_the_next_save_waits_for_the_one_before_and_uses_its_memory(tmp_path):
    (saver,) = savers(tmp_path, keep=2)
    begin(saver, 1)
    where = {name: t.data_ptr() for name, t in saver._host_buffers.items()}
    for step in (2, 3, 4):
        begin(saver, step)
        assert saver.last == tmp_path / f"step_{step - 1:07}"
    saver.wait()
    assert {name: t.data_ptr() for name, t in saver._host_buffers.items()} == where
    assert [saved.path.name[-1] for saved in saver.take_finished()] == ["1", "2", "3", "4"]
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_0000003", "step_0000004"]
    check(find_checkpoint(tmp_path), 4)


def test_what_goes_wrong_behind_is_raised_in_front(tmp_path, monkeypatch):
    """Raised by the next save, on every rank, in the same words; the last checkpoint is intact."""
    both, real = savers(tmp_path, TWO), safetensors_io.ShardWriter.write
    every_rank(2, lambda rank: (begin(both[rank], 1, rank, TWO), both[rank].wait()))

    def write(shard, path):
        if "shard-00001" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(shard, path)

    monkeypatch.setattr(safetensors_io.ShardWriter, "write", write)
    said = []

    def fails(rank):
        begin(both[rank], 2, rank, TWO)
        both[rank]._thread.join()
        assert both[rank].failed
        with pytest.raises(
            UserError, match=r"step_0000002 was not saved: rank 1: .*No space left on device"
        ) as error:
            begin(both[rank], 3, rank, TWO)
        said.append(str(error.value))
        assert both[rank].last.name == "step_0000001"

    every_rank(2, fails)
    assert len(set(said)) == 1
    check(find_checkpoint(tmp_path), 1)
    monkeypatch.undo()
    every_rank(2, lambda rank: (begin(both[rank], 4, rank, TWO), both[rank].wait()))
    check(find_checkpoint(tmp_path), 4)


def test_killed_behind_at_every_file_operation(tmp_path, monkeypatch):
    small, ends = Model(2, 12, 5), []
    for count in range(100):
        folder = tmp_path / str(count)
        save(folder, 1, model=small)

        def killed(folder=folder, count=count):
            (saver,) = savers(folder, keep=1)
            die_at(count, monkeypatch)
            begin(saver, 2, model=small)
            saver.wait()

        status = in_child(killed)
        opened = find_checkpoint(folder)
        ends.append(opened.state.step)
        check(opened, opened.state.step, model=small)
        if status == 0:
            break
    assert status == 0
    assert set(ends) == {1, 2}


def test_saving_at_once_leaves_nothing_behind(tmp_path):
    (saver,) = savers(tmp_path, behind=False)
    begin(saver, 1)
    (saved,) = saver.take_finished()
    assert saved.stall == saved.seconds
    assert (saver._thread, saver._host_buffers) == (None, {})
    check(find_checkpoint(tmp_path), 1)
