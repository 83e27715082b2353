"""Seeded mutations of model folders and rank files: each is read as it was written, or refused."""

import json
import random
import shutil
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.conversion import BASE, hugging_face, written
from helpers.fuzz import HOSTILE_VALUES, Findings, dump, mutate_bytes, mutate_json
from helpers.internevo import BIASED, directory
from safetensors.torch import save

from ascendspeed.config.schema import TRAINING_FIELDS
from ascendspeed.conversion import convert
from ascendspeed.conversion.formats.internevo import config as internevo_config
from ascendspeed.models.families import FAMILIES, PRESETS, read_config
from ascendspeed.utils.errors import UserError

SMALL = replace(BASE, num_layers=2, hidden_size=16, ffn_hidden_size=32, num_attention_heads=4, vocab_size=64)
CONFIGS = [
    FAMILIES[config.family].write_config(config) for name, config in PRESETS.items() if name.endswith("-tiny")
]
ADDITIONS = [
    {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "linear", "factor": 4}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    {"torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": [2, 3]},
    {"layer_types": ["full_attention"] * 4},
    {"quantization_config": {}},
    {"auto_map": {"AutoModel": "x.py"}},
]
TENSORS: tuple[Any, ...] = (
    *(None, 1, -1, "x", [], {}, float("nan"), 2**70, torch.zeros(0), torch.zeros(1), torch.tensor(5)),
    *(torch.zeros(3, 3, dtype=torch.int64), torch.zeros(2, 2).to_sparse(), torch.zeros(2, device="meta")),
    *(torch.tensor([True]), torch.zeros(2, dtype=torch.complex64), torch.nn.Parameter(torch.zeros(2))),
    *(torch.zeros(1).expand(10**12), torch.empty(0, 10**9)),
)


def runs(short: int, long: int) -> pytest.MarkDecorator:
    marked = pytest.param(long, id="long", marks=pytest.mark.slow)
    return pytest.mark.parametrize("count", [pytest.param(short, id="short"), marked])


def read(folder: Path) -> dict[str, torch.Tensor]:
    return dict(convert.open_reader(folder).tensors())


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A Hugging Face directory."""
    folder = tmp_path_factory.mktemp("hf") / "small"
    hugging_face(folder, SMALL, "finite")
    return folder


@runs(200, 5000)
def test_config_json(count, tmp_path):
    """Numbers of an accepted architecture are finite and positive."""
    generator, findings = random.Random(2), Findings()
    path = tmp_path / "config.json"

    def action():
        fields = asdict(read_config(path)).items()
        numbers = {k: v for k, v in fields if type(v) in (int, float) and k not in TRAINING_FIELDS}
        wrong = {k: v for k, v in numbers.items() if not 0 < v < float("inf")}
        return str(wrong) if wrong else None

    for number in range(count):
        config = dict(generator.choice(CONFIGS))
        if generator.random() < 0.6:
            config |= generator.choice(ADDITIONS)
        if generator.random() < 0.3:
            config[generator.choice(sorted(config))] = generator.choice(HOSTILE_VALUES)
        mutated = mutate_json(config, generator, ("dynamic", "linear", "silu", "gelu", "internlm", "llama"))
        content = dump(mutated) if generator.random() < 0.85 else mutate_bytes(dump(config), generator)
        path.write_bytes(content)
        findings.case(f"{number} {content[:80]!r}", action)
    for content in (b"[" * 300_000, b'{"model_type":' * 100_000, b"", b'{"model_type": []}'):
        path.write_bytes(content)
        findings.case(repr(content[:20]), action)
    findings.check(accepted=count // 20, refused=count // 4)


@runs(120, 3000)
def test_config_json_of_a_folder_with_weights(count, small, tmp_path):
    generator, findings = random.Random(3), Findings()
    shutil.copytree(small, tmp_path / "hf")
    config = json.loads((small / "config.json").read_text())
    for number in range(count):
        (tmp_path / "hf" / "config.json").write_bytes(dump(mutate_json(config, generator)))
        findings.case(str(number), lambda: (read(tmp_path / "hf"), None)[1])
    findings.check(refused=count // 5)


def lying_header(content: bytes, generator: random.Random) -> bytes:
    """A safetensors file whose header contradicts itself or the data."""
    length = int.from_bytes(content[:8], "little")
    body = content[8 + length :]
    kind = generator.random()
    if kind < 0.4:
        return mutate_bytes(content[: 8 + length], generator) + body
    if kind < 0.5:
        return content[: generator.randrange(len(content))]
    header = json.loads(content[8 : 8 + length])
    name = generator.choice(sorted(set(header) - {"__metadata__"}))
    if kind < 0.6:
        header[name]["dtype"] = generator.choice(["F16", "I32", "F64", "U8", "F8_E4M3", "XX", 1, None])
    elif kind < 0.75:
        header[name]["shape"] = generator.choice([[], [0], [-1], [10**18] * 2, ["a"], None, [1.5]])
    elif kind < 0.9:
        header[name]["data_offsets"] = generator.choice(
            [[0, 0], [-1, 5], [2**63, 2**63 + 8], [5, 1], [], None]
        )
    else:
        header = mutate_json(header, generator)
    text = dump(header)
    return len(text).to_bytes(8, "little") + text + body


@runs(120, 3000)
def test_safetensors(count, small, tmp_path):
    generator, findings = random.Random(4), Findings()
    shutil.copytree(small, tmp_path / "hf")
    content = (small / "model.safetensors").read_bytes()
    for number in range(count):
        (tmp_path / "hf" / "model.safetensors").write_bytes(lying_header(content, generator))
        findings.case(str(number), lambda: (read(tmp_path / "hf"), None)[1])
    findings.check(accepted=0, refused=count // 2)


@runs(120, 3000)
def test_an_index_of_shards(count, small, tmp_path):
    """An accepted folder has every tensor of the model, bit by bit."""
    generator, findings = random.Random(5), Findings()
    expected = read(small)
    stored = written(small)
    folder = tmp_path / "hf"
    parts = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    shares = {name: parts[number % 2] for number, name in enumerate(sorted(stored))}
    contents = {
        part: save({name: stored[name] for name in shares if shares[name] == part}, {"format": "pt"})
        for part in parts
    }
    extra = (*parts, "model.safetensors", "../x.safetensors", "config.json", f"./{parts[0]}", f"{parts[0]}\0")
    index = {"metadata": {"total_size": 1}, "weight_map": shares}

    def action():
        tensors = read(folder)
        same = tensors.keys() == expected.keys()
        return (
            None if same and all(torch.equal(tensors[n], expected[n]) for n in expected) else "other tensors"
        )

    for number in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copy(small / "config.json", folder)
        for part, content in contents.items():
            (folder / part).write_bytes(content)
        text = dump(mutate_json(index, generator, extra) if number % 10 else index)
        text = mutate_bytes(text, generator) if generator.random() < 0.1 else text
        (folder / "model.safetensors.index.json").write_bytes(text)
        if generator.random() < 0.1:
            (folder / parts[0]).unlink()
            (folder / parts[0]).symlink_to(
                generator.choice(["/etc/passwd", parts[0], "/dev/zero", str(folder)])
            )
        findings.case(str(number), action)
    findings.check(refused=count // 3)


@pytest.fixture(scope="module")
def rank_files(small, tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """Format -> (folder, the file to mutate)."""
    folder = tmp_path_factory.mktemp("ranks")
    convert.write_megatron(convert.open_reader(small), folder / "megatron", 1, 1, False)
    convert.write_megatron(convert.open_reader(small), folder / "deepspeed", 1, 1, True)
    directory(folder / "hf", "internlm", BIASED)
    convert.convert(convert.open_reader(folder / "hf"), folder / "internevo", convert.InternEvoWriter(1))
    return {
        "megatron": (folder / "megatron", "release/mp_rank_00/model_optim_rng.pt"),
        "deepspeed": (folder / "deepspeed", "release/mp_rank_00_model_states.pt"),
        "internevo": (folder / "internevo", "model_tp0_pp0.pt"),
        "internevo settings": (folder / "internevo", "model_config.pt"),
    }


def _record(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Content of a record; files of torch.save may lack its checksum."""
    with archive.open(info) as record:
        record._expected_crc = None
        return record.read()


def rezip(content: Path, generator: random.Random) -> None:
    """Writes a file of torch.save again, with a damaged pickle, or records that are cut or left out."""
    kind = generator.random()
    with zipfile.ZipFile(content) as archive:
        records = {info.filename: _record(archive, info) for info in archive.infolist()}
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        for name, record in records.items():
            if kind < 0.7:
                record = mutate_bytes(record, generator) if name.endswith("data.pkl") else record
            elif generator.random() < 0.15:
                continue
            elif generator.random() < 0.15:
                record = record[: generator.randrange(len(record) + 1)]
            archive.writestr(name, record)


def mutate_table(table: dict[Any, Any], generator: random.Random) -> None:
    """Changes one entry of nested tables."""
    name = generator.choice(list(table))
    if isinstance(table[name], dict) and table[name] and generator.random() < 0.8:
        return mutate_table(table[name], generator)
    kind = generator.random()
    if kind < 0.5:
        table[name] = generator.choice(TENSORS)
    elif kind < 0.65:
        del table[name]
    elif kind < 0.85 or not isinstance(table[name], torch.Tensor):
        table[generator.choice([f"{name}x", "", 5, None, ("a", 1), "../x"])] = table[name]
    else:
        tensor = table[name]
        table[name] = generator.choice(
            [tensor.double(), tensor[..., :-1], tensor.unsqueeze(0), tensor.to("meta")]
        )
    return None


@pytest.mark.breadth
@runs(40, 1500)
@pytest.mark.parametrize("kind", ["megatron", "deepspeed", "internevo", "internevo settings"])
def test_rank_files(kind, count, rank_files, tmp_path):
    generator, findings = random.Random(6), Findings()
    source, name = rank_files[kind]
    folder = tmp_path / "ranks"
    shutil.copytree(source, folder)
    original = (source / name).read_bytes()
    content = torch.load(source / name, weights_only=False)
    for number in range(count):
        path = folder / name
        path.write_bytes(original)
        choice = generator.random()
        if choice < 0.4:
            path.write_bytes(mutate_bytes(original, generator))
        elif choice < 0.6:
            rezip(path, generator)
        else:
            table = torch.load(path, weights_only=False)
            if isinstance(content, dict) and generator.random() < 0.95:
                mutate_table(table, generator)
            else:
                table = generator.choice([[], None, 1, "x", torch.zeros(3), {}])
            torch.save(table, path, _use_new_zipfile_serialization=generator.random() < 0.9)
        findings.case(f"{number} {choice:.2f}", lambda: (read(folder), None)[1])
    findings.check(accepted=0, refused=count // 4)


@pytest.mark.parametrize("value", [torch.zeros(0), torch.zeros(2), torch.zeros(2).to_sparse()])
@pytest.mark.parametrize("name", ["num_layers", "use_swiglu", "qk_interleaved"])
def test_a_tensor_among_the_settings_of_internevo(name, value, tmp_path):
    torch.save({name: value}, tmp_path / "model_config.pt")
    with pytest.raises(UserError, match=f"{name} is a tensor, not a plain value"):
        internevo_config.read(tmp_path)


@pytest.mark.parametrize("kind", ["megatron", "internevo"])
def test_a_tensor_without_values(kind, rank_files, tmp_path):
    source, name = rank_files[kind]
    folder = Path(shutil.copytree(source, tmp_path / "ranks"))
    content = torch.load(folder / name, weights_only=False)
    table = next(value for value in (content.get("model"), content) if isinstance(value, dict))
    while isinstance(next(iter(table.values())), dict):
        table = next(iter(table.values()))
    key = next(iter(table))
    table[key] = table[key].to("meta")
    torch.save(content, folder / name)
    with pytest.raises(UserError, match="has no values"):
        read(folder)


@pytest.mark.parametrize("kind", ["megatron", "deepspeed"])
def test_trackers(kind, rank_files, tmp_path):
    findings = Findings()
    folder = tmp_path / "ranks"
    shutil.copytree(rank_files[kind][0], folder)
    tracker = {"megatron": "latest_checkpointed_iteration.txt", "deepspeed": "latest"}[kind]
    contents = (
        b"",
        b"\0",
        b"release\n\n",
        b"../other/release",
        b"x" * 5000,
        b"\xff\xfe",
        b"iter_0000001",
        b"-1",
    )
    contents += (b"10", b".", b"..", b"release/", b"a\nb", b" release ", b"9" * 23, b"/etc")
    for content in contents:
        (folder / tracker).write_bytes(content)
        findings.case(repr(content), lambda: (read(folder), None)[1])
    findings.check(refused=len(contents) - 2)
