"""The target folder of a conversion: disk space, kills, leftovers, verification, memory."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers.conversion import (
    BASE,
    bits,
    hugging_face,
)
from helpers.conversion_folders import sources, to_hf, to_ranks

from ascendspeed.conversion import convert
from ascendspeed.conversion.output_files import PreallocatedFile
from ascendspeed.utils.atomic import staged_folder
from ascendspeed.utils.errors import UserError


def test_layouts_that_cannot_be_written(sources, tmp_path):
    source = convert.open_reader(sources("internlm", "fp32")[0])
    for more, message in (
        ({"tp": 3}, "choose 1, 2, 4, 8"),
        ({"tp": 1, "pp": 3}, "choose 1, 2, 4"),
        ({"tp": 1, "pp": 2, "deepspeed": True}, "no pipeline stages"),
        ({"tp": 0}, "choose"),
        ({"tp": 1, "make_vocab_size_divisible_by": 0}, "divisible by 0"),
    ):
        with pytest.raises(UserError, match=message):
            to_ranks(source, tmp_path / "out", **more)
    assert not list(tmp_path.iterdir())


def test_target_that_holds_something(sources, tmp_path):
    source = convert.open_reader(sources("internlm", "fp32")[0])
    (tmp_path / "out").mkdir()
    to_hf(source, tmp_path / "out")  # empty: fine
    before = (tmp_path / "out/model.safetensors").stat().st_mtime_ns
    with pytest.raises(UserError, match="not an empty directory: remove it"):
        to_hf(source, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").stat().st_mtime_ns == before


def test_full_disk_is_said_before_writing(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match=r"needs 0.\d\d GB, and the disk has 0.00 GB"):
        to_hf(convert.open_reader(sources("internlm", "fp32")[0]), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def stop_at(write: int, how) -> None:
    """From now on, the `write`-th block stops the process by `how()`."""
    original, count = PreallocatedFile.write, 0

    def stopping(self, name, row, block):
        nonlocal count
        count += 1
        if count == write:
            how()
        return original(self, name, row, block)

    PreallocatedFile.write = stopping


@pytest.mark.parametrize("layout", ["hf", "ranks"])
@pytest.mark.parametrize("write", [1, 30])
def test_killed_writer_leaves_nothing_that_looks_whole(sources, tmp_path, capfd, layout, write):
    folder = sources("internlm", "fp32")[0]

    def work():
        source = convert.open_reader(folder)
        to_hf(source, tmp_path / "out") if layout == "hf" else to_ranks(source, tmp_path / "out", 2)

    child = os.fork()
    if not child:
        stop_at(write, lambda: os.kill(os.getpid(), signal.SIGKILL))
        work()
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    with pytest.raises(UserError):
        convert.open_reader(tmp_path / ".out.partial")
    work()  # again: from the start, and says so
    assert "starting again" in capfd.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    convert.compare(convert.open_reader(tmp_path / "out"), convert.open_reader(folder))


def test_failing_writer_cleans_up(sources, tmp_path, monkeypatch):
    def full(self, name, row, block):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreallocatedFile, "write", full)
    with pytest.raises(UserError, match="No space left"):
        to_hf(convert.open_reader(sources("internlm", "fp32")[0]), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_no_conversion_left_is_not_cleared(sources, tmp_path):
    source = convert.open_reader(sources("internlm", "fp32")[0])
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").touch()
    (tmp_path / ".a.partial").symlink_to(precious)
    (tmp_path / ".b.partial").mkdir()
    (tmp_path / ".b.partial/thesis.txt").touch()
    (tmp_path / "c").symlink_to(tmp_path / "nowhere")
    for name, message in (("a", "is in the way"), ("b", "is in the way"), ("c", "is not an empty directory")):
        with pytest.raises(UserError, match=message):
            to_hf(source, tmp_path / name)
    assert (precious / "thesis.txt").exists()
    assert (tmp_path / ".b.partial/thesis.txt").exists()


def test_two_writers_of_one_target(tmp_path):
    with staged_folder(tmp_path / "out", 0) as draft:
        (draft / "file").touch()
        with pytest.raises(UserError, match="another process"), staged_folder(tmp_path / "out", 0):
            pass
        assert (draft / "file").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def test_verification_sees_one_flipped_bit(sources, tmp_path, monkeypatch):
    original = PreallocatedFile.write

    def flipping(self, name, row, block):
        if "linear_fc2" in name:
            block = block.clone()
            bits(block).view(torch.uint8).flatten()[0].bitwise_xor_(1)
        return original(self, name, row, block)

    monkeypatch.setattr(PreallocatedFile, "write", flipping)
    with pytest.raises(UserError, match=r"verification failed: decoder.layers.0.mlp.linear_fc2.weight"):
        to_ranks(convert.open_reader(sources("internlm", "fp32")[0]), tmp_path / "out", 2, verify=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("10GB", 10**10),
        ("1.5 MB", 1_500_000),
        ("2GiB", 2**31),
        ("77", 77),
        (5, 5),
        ("0", 0),
        ("ten", 0),
        ("-1GB", 0),
    ],
)
def test_sizes(text, size):
    if size:
        assert convert.parse_size(text) == size
    else:
        with pytest.raises(UserError, match="is not a size"):
            convert.parse_size(text)


MEMORY = """
import sys
from pathlib import Path
from safetensors.torch import load_file
from ascendspeed.conversion import convert
from ascendspeed.conversion.output_files import PreallocatedFile

def anonymous():
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

def watched(self, name, row, block):
    global peak
    peak = max(peak, anonymous())
    return write(self, name, row, block)

write, PreallocatedFile.write, folder, peak = PreallocatedFile.write, watched, Path(sys.argv[1]), 0
convert.write_megatron(convert.open_reader(folder / "hf"), folder / "first", 2, allow_nan=True)  # imports
writers = {("hf", "ranks"): convert.RankFileWriter(2), ("ranks", "back"): convert.HuggingFaceWriter()}
for (source, target), to in writers.items():
    opened = convert.open_reader(folder / source)
    peak = before = anonymous()
    convert.convert(opened, folder / target, to, allow_nan=True)
    print("PEAK", peak - before)
before = anonymous()
held = [tensor.clone() for tensor in load_file(folder / "back/model.safetensors").values()]
print("PEAK", anonymous() - before)
"""


@pytest.mark.slow
def test_memory_is_about_one_tensor(tmp_path):
    """While 151 MB are converted, in both directions; the largest tensor has 8 MB."""
    hugging_face(
        tmp_path / "hf", replace(BASE, num_layers=8, hidden_size=512, ffn_hidden_size=2048, vocab_size=4096)
    )
    at_once = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536"
    }  # freed memory goes back at once: what is measured is in use
    command = [sys.executable, "-c", MEMORY, tmp_path]
    result = subprocess.run(command, env=at_once, capture_output=True, text=True, check=True)
    split, merge, content = (
        int(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("PEAK")
    )
    assert max(split, merge) < 30e6
    assert content > 140e6  # control: the measure sees tensors that are held
