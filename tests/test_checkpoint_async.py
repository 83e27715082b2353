"""Asynchronous saves."""

import dataclasses
import errno
import os
import threading

import pytest
import torch
from helpers.checkpoints import RUN, TWO, Layout, Model, check, die_at, every_rank, in_child, save

from ascendspeed.checkpoint import safetensors_io
from ascendspeed.checkpoint.async_saver import CheckpointSaver
from ascendspeed.checkpoint.discovery import find_checkpoint
from ascendspeed.checkpoint.fragment import Fragment, TrainState
from ascendspeed.config.schema import TrainConfig
from ascendspeed.utils.errors import UserError


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


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_behind_at_file_operations(tmp_path, monkeypatch, stride):
    small, ends = Model(2, 12, 5), []
    for count in range(0, 100, stride):
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
