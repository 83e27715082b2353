"""Hostile pickles in every file of torch.save that a reader opens: nothing in them runs.

Payloads call functions of the standard library, of numpy and of torch, in several protocols and containers.
Their effect is a file, and its absence is the judgement; `pickle` itself proves that each payload is armed.
"""

import builtins
import functools
import importlib
import os
import pickle
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.conversion import BASE, hugging_face
from helpers.fuzz import Findings
from helpers.internevo import BIASED, directory

from ascendspeed.conversion import convert

SMALL = replace(BASE, num_layers=1, hidden_size=16, ffn_hidden_size=32, num_attention_heads=4, vocab_size=64)
FILES = {
    "hf": "pytorch_model.bin",
    "megatron": "release/mp_rank_00/model_optim_rng.pt",
    "deepspeed": "release/mp_rank_00_model_states.pt",
    "internevo": "model_tp0_pp0.pt",
    "internevo settings": "model_config.pt",
}


class Call:
    """Unpickled, it is the result of a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call

    def __call__(self) -> None:
        """Lets a call be the function of another one."""


def payloads(marker: Path) -> dict[str, Call]:
    """Calls that make the file or folder `marker`."""
    text = f"open({str(marker)!r}, 'w').close()"
    evil = marker.parent / "evil.pt"
    torch.save(Call(os.mkdir, str(marker)), evil)
    stored = marker.parent / "evil.npy"
    np.save(stored, np.array([Call(os.mkdir, str(marker))], dtype=object), allow_pickle=True)
    load = functools.partial(torch.load, weights_only=False)
    return {
        "os.system": Call(os.system, f"touch {marker}"),
        "os.mkdir": Call(os.mkdir, str(marker)),
        "eval": Call(eval, text.removesuffix(".close()")),
        "exec": Call(exec, text),
        "open": Call(open, str(marker), "w"),
        "Popen": Call(subprocess.check_call, ["touch", str(marker)]),
        "copy": Call(shutil.copy, "/etc/hostname", str(marker)),
        "partial": Call(Call(functools.partial, os.mkdir, str(marker))),
        "import": Call(Call(getattr, Call(importlib.import_module, "os"), "mkdir"), str(marker)),
        "__import__": Call(Call(getattr, Call(builtins.__import__, "os"), "mkdir"), str(marker)),
        "torch.load": Call(load, str(evil)),
        "numpy.load": Call(functools.partial(np.load, allow_pickle=True), str(stored)),
        "loads": Call(pickle.loads, pickle.dumps(Call(os.mkdir, str(marker)))),
    }


def as_zip(path: Path, content: Any, protocol: int) -> None:
    """A file of torch.save whose pickle is this one, beside the tensors of the file that is there."""
    with zipfile.ZipFile(path) as archive:
        names = {info.filename: info.file_size for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, size in names.items():
            is_pickle = name.endswith("data.pkl")
            archive.writestr(name, pickle.dumps(content, protocol) if is_pickle else bytes(size))


def as_tar(path: Path, content: Any, protocol: int) -> None:
    """A file of the oldest torch.save."""
    part = path.with_name("part")
    part.write_bytes(pickle.dumps(content, protocol))
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.add(part, name)
    part.unlink()


CONTAINERS: dict[str, Callable[[Path, Any, int], None]] = {
    "zip": as_zip,
    "pickle": lambda path, content, protocol: path.write_bytes(pickle.dumps(content, protocol)),
    "torch.save": lambda path, content, protocol: torch.save(content, path, pickle_protocol=protocol),
    "torch.save before 1.6": lambda path, content, protocol: torch.save(
        content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False
    ),
    "tar": as_tar,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder of each format that has files of torch.save."""
    folder = tmp_path_factory.mktemp("formats")
    hugging_face(folder / "model", SMALL, "finite")
    reader = convert.open_reader(folder / "model")
    convert.write_megatron(reader, folder / "megatron", 1, 1, False)
    convert.write_megatron(reader, folder / "deepspeed", 1, 1, True)
    (folder / "hf").mkdir()
    shutil.copy(folder / "model" / "config.json", folder / "hf")
    torch.save({"a": torch.zeros(2)}, folder / "hf" / FILES["hf"])
    directory(folder / "biased", "internlm", BIASED)
    convert.convert(convert.open_reader(folder / "biased"), folder / "internevo", convert.InternEvoWriter(1))
    return {name: folder / name.split()[0] for name in FILES}


def gone(marker: Path) -> bool:
    """Removes the effect of a payload; False if there was none."""
    if not marker.exists():
        return True
    shutil.rmtree(marker) if marker.is_dir() else marker.unlink()
    return False


@pytest.mark.breadth
@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(
    "protocols",
    [pytest.param((2,), id="short"), pytest.param((0, 1, 3, 4, 5), id="long", marks=pytest.mark.slow)],
)
def test_nothing_in_a_pickle_runs(kind, protocols, folders, tmp_path):
    findings, marker, folder = Findings(), tmp_path / "ran", tmp_path / "source"
    shutil.copytree(folders[kind], folder)
    path = folder / FILES[kind]
    original = path.read_bytes()

    def action() -> str | None:
        try:
            dict(convert.open_reader(folder).tensors())
        finally:
            assert gone(marker), "the payload ran"
        return "a file with a call in it"

    for name, call in payloads(marker).items():
        for protocol in protocols:
            for container, write in CONTAINERS.items():
                path.write_bytes(original)
                write(
                    path,
                    {"model": call, "module": {"a": torch.zeros(2)} if container[0] == "t" else call},
                    protocol,
                )
                findings.case(f"{name} {container} {protocol}", action)
    findings.check(accepted=0, refused=len(CONTAINERS) * len(protocols) * len(payloads(marker)))


def test_control_every_payload_is_armed(tmp_path):
    marker = tmp_path / "ran"
    for name, call in payloads(marker).items():
        pickle.loads(pickle.dumps({"model": call}))
        assert not gone(marker), name
