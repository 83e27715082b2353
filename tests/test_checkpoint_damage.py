"""Damaged training checkpoints are named, and an older intact one is used."""

import errno
import hashlib
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import NAMES, SHARDS, Layout, check, ckpt, every_rank, flip, in_child, two_steps
from helpers.log_lines import log_lines
from helpers.permissions import obey_permissions

from ascendspeed.checkpoint import manifest
from ascendspeed.checkpoint import save as saving
from ascendspeed.checkpoint.discovery import find_checkpoint, open_checkpoint
from ascendspeed.checkpoint.load import Checkpoint
from ascendspeed.checkpoint.paths import looks_like_checkpoint
from ascendspeed.utils import errors
from ascendspeed.utils.errors import UserError


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


@pytest.mark.breadth
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


@pytest.mark.parametrize("name", ["manifest.json", SHARDS[1], "", "..", "../latest"])
def test_what_cannot_be_read_is_not_called_damaged_or_replaced(ckpt, name):
    """A file of the newest step, its folder, the folder of all, and `latest`."""
    path = (ckpt / "step_0000020" / name).resolve()
    said = ckpt.with_name("said")

    def find() -> None:
        obey_permissions()
        try:
            find_with(ckpt, world=2)
        except (UserError, PermissionError) as error:
            said.write_text(str(errors.as_user_error(error)))

    path.chmod(0)
    try:
        assert in_child(find) == 0
    finally:
        path.chmod(0o755)
    text = said.read_text()
    assert "no permission" in text
    assert str(path if name.startswith(".") else ckpt / "step_0000020") in text
    assert "damaged" not in text
    if not name.startswith("."):
        assert "so no older step is taken in its place: correct this, or name another step's folder" in text
    assert find_with(ckpt, world=2)[0].path.name == "step_0000020"  # control


def test_too_many_open_files_are_no_damage(ckpt, monkeypatch):
    """A disk error is: an older step is used, with a warning."""

    def fails(path, number=errno.EMFILE):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(manifest.safetensors_io, "file_sha256", fails)
    with pytest.raises(UserError, match="cannot be read: too many open files"):
        find_checkpoint(ckpt)
    monkeypatch.setattr(manifest.safetensors_io, "file_sha256", lambda path: fails(path, errno.EIO))
    with pytest.raises(UserError, match=r"no checkpoint there is whole.*Input/output error"):
        find_checkpoint(ckpt)


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
