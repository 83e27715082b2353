"""The training checkpoint: every layout reads every other; damaged checkpoints are never accepted."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers import forkserver, launch
from helpers.checkpoints import RUN, TWO, Layout, Model, check, run_at, save
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ascendspeed.checkpoint import manifest, safetensors_io
from ascendspeed.checkpoint.discovery import find_checkpoint
from ascendspeed.checkpoint.fragment import KINDS, Fragment, TrainState
from ascendspeed.checkpoint.load import Checkpoint, load_fragments
from ascendspeed.checkpoint.save import save_checkpoint
from ascendspeed.models.param_mapping import ShardSpec
from ascendspeed.utils.errors import UserError

# --- layouts

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
    workers = [forkserver.start(gloo_worker, (rank, tmp_path), launch.environment()) for rank in range(2)]
    [w.join(60) for w in workers]
    assert [w.exitcode for w in workers] == [0, 0]
    assert [(tmp_path / f"rank{r}").read_text() for r in range(2)] == ["True", "True"]


# --- what a rank reads


def files_read(monkeypatch, rank: int, folder, layout) -> tuple[set[str], set[str]]:
    """Names of the files that a rank of a resumed run hashes, and reads tensors from."""
    hashed, read = set(), set()
    sha256, read_into = safetensors_io.file_sha256, safetensors_io.read_into
    monkeypatch.setattr(safetensors_io, "file_sha256", lambda path: (hashed.add(path.name), sha256(path))[1])
    monkeypatch.setattr(
        safetensors_io, "read_into", lambda out, path, at: (read.add(path.name), read_into(out, path, at))
    )
    opened = find_checkpoint(folder, rank, layout.world)
    fragments = Model().fragments(layout, rank, Model().full(10))
    load_fragments(opened, [f for f in fragments if f.spec.dim is not None])
    monkeypatch.undo()
    return {name for name in hashed if name.startswith("shard")}, read


def test_a_rank_hashes_and_reads_its_own_shard_alone(tmp_path, monkeypatch):
    layout = Layout(tp=2, dp=2)
    save(tmp_path, layout=layout)
    for rank in range(layout.world):
        own = {f"shard-{rank:05}-of-00004.safetensors"}
        assert files_read(monkeypatch, rank, tmp_path, layout) == (own, own)
    hashed, read = files_read(monkeypatch, 0, tmp_path, Layout(tp=4))  # control: another layout reads others
    assert read - hashed


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_every_file_is_hashed_once(world):
    names = ["run.json", *(f"shard-{rank:05}-of-00005.safetensors" for rank in range(5)), "train_state.json"]
    shares = [manifest.share_of_rank(names, rank, world) for rank in range(world)]
    assert sorted(name for share in shares for name in share) == names


def test_a_live_fragment_is_filled_in_place(tmp_path, monkeypatch):
    """Also rows of padding, which are zero; control: another layout is read into a buffer first."""
    save(tmp_path, layout=Layout(tp=2, padding=3))
    opened = find_checkpoint(tmp_path)
    targets, read_into = [], safetensors_io.read_into
    monkeypatch.setattr(
        safetensors_io, "read_into", lambda out, path, at: (targets.append(out), read_into(out, path, at))
    )
    for layout, is_same in ((Layout(tp=2, padding=3), True), (Layout(tp=1), False)):
        fragment = next(f for f in Model().fragments(layout, layout.tp - 1, Model().full(10)))
        live = dataclasses.replace(fragment, tensor=torch.full_like(fragment.tensor, 7.0))
        targets.clear()
        load_fragments(opened, [live])
        begin, end = live.tensor.data_ptr(), live.tensor.data_ptr() + live.tensor.nbytes
        assert all(begin <= target.data_ptr() < end for target in targets) == is_same
        assert torch.equal(live.tensor, fragment.tensor)


def test_a_part_that_does_not_exist_is_not_read(tmp_path):
    save(tmp_path, layout=Layout(tp=2))
    with pytest.raises(ValueError, match="part 2 of fc1, which has 2"):
        find_checkpoint(tmp_path).read("fc1", "master", Model().cuts(Layout(tp=2))["fc1"], 2, 0, 4)
