"""Seeded mutations of training checkpoints: damage is named, and a lying one is refused with one line."""

import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from helpers import checkpoints
from helpers.fuzz import Findings, dump, mutate_bytes, mutate_json

from ascendspeed.checkpoint import manifest
from ascendspeed.checkpoint.discovery import open_checkpoint
from ascendspeed.checkpoint.fragment import KINDS

SHARD = "shard-00000-of-00001.safetensors"
STEP = "step_0000010"
RUNS = [pytest.param(150, id="short"), pytest.param(4000, id="long", marks=pytest.mark.slow)]
EDGES = ([], [0], [-1], [10**18], [10**10], ["a"], None, [1.5], [2, 2], [1])
OFFSETS = ([0, 0], [-1, 5], [2**63, 2**63 + 8], [5, 1], [], [0], ["0", "4"], None, [0, 4])
TRACKERS = (b"", b"\0", b"step_0000009", b"../x", b"step_0000010" + b"x" * 9999, b"\xff\xfe", b"/etc/passwd")


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> dict[str, bytes]:
    """The files of a small checkpoint."""
    folder = checkpoints.save(tmp_path_factory.mktemp("intact"))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write(folder: Path, files: dict[str, bytes], latest: bytes = STEP.encode()) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / STEP).mkdir(parents=True)
    (folder / "latest").write_bytes(latest)
    for name, content in files.items():
        (folder / STEP / name).write_bytes(content)


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that loading reads of a checkpoint."""
    opened = open_checkpoint(folder)
    tensors = {f"{kind} {name}": tensor for kind in KINDS for name, tensor in opened.tensors(kind)}
    return tensors | {f"rng {name}": tensor for name, tensor in opened.rng(0).items()}


def signed(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files with a manifest that agrees with them."""
    files = {name: content for name, content in files.items() if name != "manifest.json"}
    listed = {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    }
    return files | {"manifest.json": manifest.manifest_text(10, listed).encode()}


@pytest.mark.parametrize("count", RUNS)
def test_damage_is_always_found(count, intact, tmp_path):
    """Accepted bytes are the saved ones, or a folder whose `latest` alone is damaged."""
    generator, findings = random.Random(4), Findings()
    write(tmp_path / "ckpt", intact)
    expected = read(tmp_path / "ckpt")
    for number in range(count):
        files, name, kind = dict(intact), generator.choice(sorted(intact)), generator.random()
        if kind < 0.7:
            files[name] = mutate_bytes(files[name], generator)
        elif kind < 0.8:
            del files[name]
        elif kind < 0.9:
            files[name] = b""
        else:
            other = generator.choice(sorted(intact))
            files[name], files[other] = files[other], files[name]
        latest = generator.choice(TRACKERS) if generator.random() < 0.1 else STEP.encode()
        write(tmp_path / "ckpt", files, latest)

        def action(damaged=files != intact):
            tensors = read(tmp_path / "ckpt")
            if damaged:
                return "damage"
            same = tensors.keys() == expected.keys()
            return None if same and all(torch.equal(tensors[k], expected[k]) for k in expected) else "values"

        findings.case(f"{number} {name}", action)
    findings.check(accepted=0, refused=count // 2)


def lying_shard(content: bytes, generator: random.Random) -> bytes:
    """A shard whose header contradicts itself, the metadata or the data."""
    length = int.from_bytes(content[:8], "little")
    if generator.random() < 0.3:
        return mutate_bytes(content[: 8 + length], generator) + content[8 + length :]
    header = json.loads(content[8 : 8 + length])
    name, other = generator.sample(sorted(set(header) - {"__metadata__"}), 2)
    kind = generator.random()
    if kind < 0.2:
        header[name]["shape"] = generator.choice(EDGES)
    elif kind < 0.4:
        header[name]["data_offsets"] = generator.choice(OFFSETS)
    elif kind < 0.5:
        header[name]["dtype"] = generator.choice(["F64", "I64", "U8", "BOOL", "I32", "XX", None, []])
    elif kind < 0.6:
        address = name.rpartition("|")[0].rpartition("|")[0]
        header[address + generator.choice(["|-1|0", "|0|-5", "|1|0", "|a|b", "|0|5"])] = header.pop(name)
    elif kind < 0.7:
        header[name], header[other] = header[other], header[name]
    elif kind < 0.9:
        cuts = mutate_json(json.loads(header["__metadata__"]["cuts"]), generator)
        header["__metadata__"]["cuts"] = json.dumps(cuts)
    else:
        header = mutate_json(header, generator)
    text = dump(header)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


@pytest.mark.parametrize("count", RUNS)
def test_a_lying_checkpoint_is_refused_with_one_line(count, intact, tmp_path):
    """Its manifest agrees with its files, as only the writer of the lie could make it."""
    generator, findings = random.Random(5), Findings()
    for number in range(count):
        files, name = dict(intact), generator.choice(["run.json", "train_state.json", SHARD, SHARD])
        if name == SHARD:
            files[name] = lying_shard(files[name], generator)
        elif generator.random() < 0.9:
            files[name] = dump(mutate_json(json.loads(files[name]), generator))
        else:
            files[name] = mutate_bytes(files[name], generator)
        files = signed(files)
        if generator.random() < 0.1:
            name = "manifest.json"
            table = mutate_json(json.loads(files[name]), generator)
            if isinstance(table, dict) and isinstance(table.get("files"), dict):
                body = {"step": table.get("step"), "files": table["files"]}
                digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
                files[name] = json.dumps(body | {"sha256": digest}, indent=1).encode() + b"\n"
        write(tmp_path / "ckpt", files)
        findings.case(f"{number} {name}", lambda: (read(tmp_path / "ckpt"), None)[1])
    findings.check(accepted=count // 50, refused=count // 2)


@pytest.mark.parametrize("name", ["manifest.json", "run.json", "train_state.json"])
@pytest.mark.parametrize("content", [b"[" * 300_000, b'{"a":' * 300_000])
def test_deep_nesting(name, content, intact, tmp_path):
    files = intact | {name: content}
    write(tmp_path / "ckpt", files if name == "manifest.json" else signed(files))
    findings = Findings()
    findings.case(name, lambda: (read(tmp_path / "ckpt"), None)[1])
    findings.check(accepted=0)


@pytest.mark.parametrize("name", ["/dev/zero", "../secret", "link"])
def test_a_manifest_lists_files_of_its_folder(name, intact, tmp_path):
    """A device has size 0 and no end."""
    write(tmp_path / "ckpt", intact)
    (tmp_path / "ckpt" / STEP / "link").symlink_to("/dev/zero")
    listed = json.loads(intact["manifest.json"])["files"]
    listed[name] = {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    (tmp_path / "ckpt" / STEP / "manifest.json").write_text(manifest.manifest_text(10, listed))
    (problem,) = manifest.find_problems(tmp_path / "ckpt" / STEP)
    assert problem.startswith(("manifest.json: not a manifest", "link: not a file, but a device"))
