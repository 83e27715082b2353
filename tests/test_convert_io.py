"""Files that a conversion reads and writes: space for tensors, and what the system loads from the disk."""

import os
import zipfile

import pytest
import torch
from helpers.conversion import BASE, hugging_face

from ascendspeed.conversion import checkpoint_reader, convert, weights_identity
from ascendspeed.conversion.output_files import create_pt

SPECS = {
    "a": (torch.bfloat16, (300, 64)),
    "same size": (torch.bfloat16, (300, 64)),
    "other type": (torch.float32, (7,)),
    "empty": (torch.bfloat16, (0, 64)),
    "scalar row": (torch.float16, (1,)),
}


def records(path) -> dict[str, tuple[int, bytes]]:
    """Name of a record -> its size, and its content where it is not a tensor's."""
    with zipfile.ZipFile(path) as archive:
        return {
            info.filename: (info.file_size, b"" if "/data/" in info.filename else archive.read(info))
            for info in archive.infolist()
        }


def test_space_for_tensors_has_the_records_of_torch_save(tmp_path):
    for folder in ("ours", "torch", "shared"):
        (tmp_path / folder).mkdir()
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in SPECS.items()}
    file = create_pt(tmp_path / "ours/x.pt", SPECS, lambda table: {"iteration": 0, "model": table})
    torch.save({"iteration": 0, "model": tensors}, tmp_path / "torch/x.pt")
    expected = records(tmp_path / "torch/x.pt")
    ours = records(tmp_path / "ours/x.pt")
    volatile = {name for name in expected if name.endswith("serialization_id")}
    assert {n: r for n, r in ours.items() if n not in volatile} == {
        n: r for n, r in expected.items() if n not in volatile
    }
    for number, (name, tensor) in enumerate(tensors.items()):
        file.write(name, 0, tensor.fill_(number + 1))
        file.done(name)
    loaded = torch.load(tmp_path / "ours/x.pt", weights_only=True)["model"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    tensors["same size"] = tensors["a"]  # control: one record for two tensors is seen
    torch.save({"iteration": 0, "model": tensors}, tmp_path / "shared/x.pt")
    assert records(tmp_path / "shared/x.pt").keys() != expected.keys()


@pytest.fixture
def loads(tmp_path, monkeypatch):
    """A reader of a folder, and the numbers of bytes that it asks the system to load, in order."""
    hugging_face(tmp_path / "hf", BASE)
    sizes: list[int] = []
    monkeypatch.setattr(checkpoint_reader, "_load", lambda tensor: sizes.append(tensor.nbytes))
    monkeypatch.setattr(checkpoint_reader, "LARGE_BLOCK_BYTES", 8192)
    return convert.open_reader(tmp_path / "hf"), sizes


def test_a_conversion_loads_every_tensor_once_and_ahead(loads, monkeypatch):
    reader, sizes = loads
    monkeypatch.setattr(checkpoint_reader, "READ_AHEAD_BYTES", 100_000)
    tensors = reader.tensors()
    _, first = next(tensors)
    assert sum(sizes) >= first.nbytes + 100_000
    assert sum(sizes) < reader.size()
    for _ in tensors:
        pass
    assert sum(sizes) == reader.size()


def test_a_fingerprint_loads_no_tensor(loads):
    reader, sizes = loads
    weights_identity.sampled(reader)
    assert sum(sizes) < reader.size() // 10


def test_the_disk_begins_with_the_first_block(tmp_path, monkeypatch):
    advised = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: advised.append(arguments[1:]))
    file = create_pt(tmp_path / "x.pt", {"a": SPECS["a"]}, dict)
    file.write("a", 100, torch.ones(50, 64, dtype=torch.bfloat16))
    assert advised == [(file.offsets["a"] + 100 * 128, 50 * 128, os.POSIX_FADV_DONTNEED)]
    file.close()
