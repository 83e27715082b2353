"""Mutated directories of peft: merged, or refused with one line."""

import contextlib
import random
import shutil
from pathlib import Path

import pytest
import torch
from helpers.fuzz import HOSTILE_VALUES, Findings, dump, mutate_json
from helpers.peft_folders import MODELS, base_folder
from safetensors.torch import save, save_file

from ascendspeed.conversion import lora_merge
from ascendspeed.conversion.formats import peft as directory
from ascendspeed.conversion.formats.registry import open_reader
from ascendspeed.models.lora import adapter as adapters
from ascendspeed.utils.errors import UserError

WIDTH = 64
SETTINGS = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "target_modules": ["o_proj"],
    "exclude_modules": None,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "init_lora_weights": True,
    "bias": "none",
    "base_model_name_or_path": "x",
    "fan_in_fan_out": False,
    "inference_mode": True,
}
PATTERNS = ("o_proj", ".*o_proj", "(", "", "layers.0.self_attn.o_proj", "[", "a" * 1000, "(a+)+$")
VALUES = (4, 16, "4", None, True, 0, -1, 4.0, 1e308, [], {})
TARGETS = ("all-linear", ".*_proj", "(", "((a|aa)+)+$", 5, [5], [None], {"o_proj": 1}, "o_proj", "")
LAYERS = (0, [0], "0", [], [None], ["0"], {}, True, 1.5)


def matrices() -> dict[str, torch.Tensor]:
    tensors = {}
    for layer in range(2):
        for which, shape in (("A", (4, WIDTH)), ("B", (WIDTH, 4))):
            name = f"base_model.model.model.layers.{layer}.self_attn.o_proj.lora_{which}.weight"
            tensors[name] = torch.full(shape, 0.5)
    return tensors


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return base_folder("llama", tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def use(base, tmp_path):
    """Opens the adapters in a folder and merges every tensor that they change."""
    reader = open_reader(base)

    def merge(folder: Path) -> str | None:
        adapter = directory.open_adapter(folder)
        directory.check_complete(adapter, reader.config)
        merged = lora_merge.merge(reader, adapter)
        changed = adapters.changed_parameters(adapter, reader.config)
        for name, tensor in merged.tensors():
            if name in changed and tensor.isnan().any():
                return "NaN in the merged weights"
        with contextlib.suppress(UserError):
            adapters.as_llama(adapter, MODELS["llama"])
        return None

    return merge


def fresh(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


@pytest.mark.parametrize("cases", [200, pytest.param(6000, marks=pytest.mark.slow)])
def test_settings(cases, use, tmp_path):
    generator = random.Random(6)
    findings = Findings()
    content = save(matrices(), {"format": "pt"})
    for number in range(cases):
        folder = fresh(tmp_path)
        settings = dict(SETTINGS)
        if generator.random() < 0.3:
            pattern = {generator.choice(PATTERNS): generator.choice(VALUES)}
            settings[generator.choice(["rank_pattern", "alpha_pattern"])] = pattern
        if generator.random() < 0.3:
            settings[generator.choice(list(settings))] = generator.choice(HOSTILE_VALUES)
        if generator.random() < 0.1:
            settings["target_modules"] = generator.choice(TARGETS)
        if generator.random() < 0.1:
            settings["layers_to_transform"] = generator.choice(LAYERS)
        if generator.random() < 0.5:
            settings = mutate_json(settings, generator)
        (folder / directory.CONFIG).write_bytes(dump(settings))
        (folder / "adapter_model.safetensors").write_bytes(content)
        if generator.random() < 0.1:
            (folder / directory.BASE).write_bytes(dump({"fingerprint": generator.choice(HOSTILE_VALUES)}))
        findings.case(f"case {number}: {str(settings)[:300]}", lambda folder=folder: use(folder))
    findings.check(accepted=10, refused=10)


SHAPES = ((0, WIDTH), (WIDTH, 0), (4,), (4, 17), (8, WIDTH), ())


def spoil(tensors: dict[str, torch.Tensor], generator: random.Random) -> None:
    """Replaces, renames or drops one tensor."""
    key = generator.choice(list(tensors))
    kind = generator.random()
    if kind < 0.3:
        tensors[key] = torch.zeros(generator.choice(SHAPES))
    elif kind < 0.5:
        tensors[key] = generator.choice(
            [torch.zeros(4, WIDTH, dtype=torch.int32), torch.zeros(4, WIDTH).half(), torch.ones(WIDTH, 4)]
        )
    elif kind < 0.7:
        ends = (".weight", ".default.weight", ".bias", "x", ".base_layer.weight", ".modules_to_save.weight")
        tensors[key.replace(".weight", "") + generator.choice(ends)] = tensors.pop(key)
    elif kind < 0.85:
        tensors[key.replace("layers.0", "layers.7").replace("layers.1", "layers.00")] = tensors.pop(key)
    else:
        del tensors[key]


@pytest.mark.parametrize("cases", [100, pytest.param(3000, marks=pytest.mark.slow)])
def test_weights(cases, use, tmp_path):
    generator = random.Random(7)
    findings = Findings()
    for number in range(cases):
        folder = fresh(tmp_path)
        settings, tensors = dict(SETTINGS), matrices()
        for _ in range(generator.choice([0, 1, 1, 2])):
            spoil(tensors, generator)
        if generator.random() < 0.1:
            settings["r"] = 0
            tensors = {
                key: tensor[:0] if ".lora_A" in key else tensor[:, :0] for key, tensor in tensors.items()
            }
        (folder / directory.CONFIG).write_bytes(dump(settings))
        if generator.random() < 0.7:
            contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
            save_file(contiguous, folder / "adapter_model.safetensors")
        else:
            content = generator.choice([tensors, tensors, [tensors], {"a": tensors}, None])
            torch.save(content, folder / "adapter_model.bin")
        findings.case(f"case {number}: {sorted(tensors)}", lambda folder=folder: use(folder))
    findings.check(accepted=5, refused=10)
