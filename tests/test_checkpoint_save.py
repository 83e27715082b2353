"""Saves that are killed, run out of space or lose the ownership of the folder."""

import contextlib
import errno
import itertools
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
from helpers.checkpoints import (
    NAMES,
    RUN,
    TWO,
    Layout,
    Model,
    check,
    die_at,
    every_rank,
    flip,
    in_child,
    save,
)
from helpers.log_lines import log_lines

from ascendspeed.checkpoint import safetensors_io
from ascendspeed.checkpoint import save as saving
from ascendspeed.checkpoint.discovery import find_checkpoint
from ascendspeed.checkpoint.fragment import Fragment, TrainState
from ascendspeed.checkpoint.ownership import claim_folder
from ascendspeed.checkpoint.save import save_checkpoint
from ascendspeed.models.param_mapping import ShardSpec
from ascendspeed.utils.errors import UserError


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


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "again", [pytest.param(False, marks=pytest.mark.slow), True], ids=["new step", "same step"]
)
def test_killed_at_file_operations(tmp_path, monkeypatch, again, stride):
    """Old or new, never something else; and the next save tidies up."""
    small, ends = Model(2, 12, 5), []
    for count in range(0, 100, stride):
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


@pytest.mark.parametrize(("free", "reason"), [(10 << 20, "only 10 MiB are free in "), (1 << 40, "is ")])
def test_a_rank_that_could_not_report_names_a_full_disk(tmp_path, monkeypatch, free, reason):
    """An empty report is what a full disk leaves; only otherwise may storage be not shared."""
    usage = saving.shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: usage)
    group = saving._SaveGroup(tmp_path, "step_0000001", 0, 1, lambda: None, "")
    group.temporary.mkdir()
    group.report("size", 0).touch()
    with pytest.raises(UserError, match=rf"rank 0 could not report \({reason}{tmp_path}"):
        group._reports("size")
