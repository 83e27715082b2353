"""MindFormers' `.ckpt` as it is written: the bytes of an independent writer, read back bit by bit."""

import pytest
import torch
from helpers.conversion import hugging_face, same, written
from helpers.mindformers import NAMES, renamed, value
from helpers.round_trips import BY_FAMILY

from ascendspeed.conversion import convert
from ascendspeed.conversion.formats.base import WriteOptions
from ascendspeed.conversion.formats.mindformers import reading, writing
from ascendspeed.conversion.formats.registry import format_named


def encoded(tag: str, tensor: torch.Tensor, begin: int = 0, end: int | None = None) -> bytes:
    content = tensor.contiguous().view(torch.uint8).numpy().tobytes()[begin:end]
    return value(tag, tuple(tensor.shape), NAMES[tensor.dtype], content)


@pytest.mark.parametrize("family", ["internlm", "internlm2", "llama"])
def test_the_bytes_are_those_of_mindspore(family, tmp_path):
    stored = hugging_face(tmp_path / "hf", BY_FAMILY[family], "mixed")
    writer = format_named("mindformers").writer(WriteOptions())
    convert.convert(convert.open_reader(tmp_path / "hf"), tmp_path / "mf", writer, allow_nan=True)
    file = (tmp_path / "mf" / "model.ckpt").read_bytes()
    tensors = {renamed(name): tensor for name, tensor in stored.items()}
    order = list(reading.read(tmp_path / "mf" / "model.ckpt"))
    assert sorted(order) == sorted(tensors)
    assert file == b"".join(encoded(name, tensors[name]) for name in order)
    convert.write_hf(convert.open_reader(tmp_path / "mf"), tmp_path / "back", allow_nan=True)
    assert same(written(tmp_path / "back"), stored)


def test_large_tensors_are_several_values(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "CHUNK_BYTES", 1000)
    tensor = torch.randn(30, 20)
    specs = {"w": (torch.float32, (30, 20)), "b": (torch.float16, (3,))}
    file = writing.create_ckpt(tmp_path / "x.ckpt", specs)
    for row in range(0, 30, 7):
        file.write("w", row, tensor[row : row + 7])
    file.done("w")
    file.write("b", 0, torch.ones(3, dtype=torch.float16))
    file.done("b")
    cuts = [encoded("w", tensor, begin, min(begin + 1000, 2400)) for begin in (0, 1000, 2000)]
    last = encoded("b", torch.ones(3, dtype=torch.float16))
    assert (tmp_path / "x.ckpt").read_bytes() == b"".join(cuts) + last
    assert torch.equal(reading.read(tmp_path / "x.ckpt")["w"], tensor)
