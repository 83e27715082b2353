"""More than plain LoRA in a directory of peft: merged as peft does, bit for bit; wrong values are refused."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from helpers import oracle
from helpers.peft_folders import MODELS, base_folder, model_of, save_adapter
from safetensors.torch import load_file, save_file

from ascendspeed.conversion import lora_merge
from ascendspeed.conversion.formats import peft as directory
from ascendspeed.conversion.formats.registry import open_reader
from ascendspeed.models.lora import adapter as adapters
from ascendspeed.utils.errors import UserError

LINEARS = ["q_proj", "down_proj"]
CASES = {  # family, settings of peft, tensors that change beside the linears
    "modules_to_save": ("llama", {"modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "lm_head target": ("llama", {"target_modules": [*LINEARS, "lm_head"]}),
    "embedding target": ("llama", {"target_modules": [*LINEARS, "embed_tokens"]}),
    "trained rows": ("llama", {"trainable_token_indices": [3, 1, 124]}),
    "rows by module": ("llama", {"trainable_token_indices": {"embed_tokens": [0, 7]}}),
    "all biases": ("internlm", {"bias": "all"}),
    "biases of the adapters": ("internlm", {"bias": "lora_only"}),
    "dora": ("llama", {"use_dora": True}),
    "dora of the embedding": ("llama", {"use_dora": True, "target_modules": [*LINEARS, "embed_tokens"]}),
    "saved embeddings": ("llama", {}),
    "adapter name in the keys": ("llama", {}),
}


def with_default_keys(folder: Path) -> None:
    """Keys as they stand in the state of the model, with the name of the adapter."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({key.replace(".weight", ".default.weight"): tensor for key, tensor in tensors.items()}, path)


@pytest.mark.breadth
@pytest.mark.parametrize("case", CASES)
def test_every_bit_is_that_of_peft(case, tmp_path):
    family, settings = CASES[case]
    base = base_folder(family, tmp_path / "base")
    folder = save_adapter(
        model_of(family)[0],
        tmp_path / "adapter",
        save_embedding_layers=True if case == "saved embeddings" else "auto",
        **{"target_modules": LINEARS} | settings,
    )
    merged = peft.PeftModel.from_pretrained(model_of(family)[0], folder).merge_and_unload()
    expected = oracle.RENAMED.get(family, lambda named, *_: named)(
        merged.state_dict(), MODELS[family], merged
    )
    if case == "adapter name in the keys":
        with_default_keys(folder)
    reader = open_reader(base)
    adapter = directory.open_adapter(folder)
    directory.check_complete(adapter, reader.config)
    ours = dict(lora_merge.merge(reader, adapter).tensors())
    before = dict(reader.tensors())
    target = tmp_path / "expected"
    shutil.copytree(base, target)
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, target / "model.safetensors")
    for name, tensor in open_reader(target).tensors():
        assert torch.equal(ours[name], tensor), name
    changed = {name for name in ours if not torch.equal(ours[name], before[name])}
    plain = {name for name in changed if "linear_qkv.weight" in name or "linear_fc2.weight" in name}
    assert len(plain) == 4
    more = case not in ("dora", "saved embeddings", "adapter name in the keys")
    assert bool(changed - plain) == more  # control: the case does change what it is about


def test_only_merging_takes_more_than_plain_lora(tmp_path):
    folder = save_adapter(
        model_of("llama")[0], tmp_path / "adapter", target_modules=LINEARS, modules_to_save=["lm_head"]
    )
    adapter = directory.open_adapter(folder)
    for action in (
        lambda: directory.write(adapter, tmp_path / "again"),
        lambda: adapters.as_llama(adapter, MODELS["llama"]),
        lambda: list(adapters.training_tensors(adapter, MODELS["llama"], None)),
    ):
        with pytest.raises(
            UserError, match=r"more than plain LoRA \(lm_head\.weight\).*tools/lora/merge_lora"
        ):
            action()
    assert not (tmp_path / "again").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "adapter"
    return save_adapter(model_of("llama")[0], folder, target_modules=LINEARS, modules_to_save=["lm_head"])


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("alpha_pattern", {"q_proj": None}, "a table of numbers"),
        ("alpha_pattern", {"q_proj": "4"}, "a table of numbers"),
        ("rank_pattern", {"q_proj": 0}, "a table of positive integers"),
        ("rank_pattern", [], "a table of positive integers"),
        ("target_modules", 5, "a regular expression or a list of names"),
        ("target_modules", [5], "a regular expression or a list of names"),
        ("exclude_modules", {"a": 1}, "a regular expression or a list of names"),
        ("layers_to_transform", "0", "a layer or a list of layers"),
        ("layers_to_transform", [None], "a layer or a list of layers"),
        ("layers_to_transform", True, "a layer or a list of layers"),
        ("r", 0, "a positive integer"),
        ("r", True, "a positive integer"),
        ("lora_alpha", "16", "a number"),
        ("modules_to_save", "lm_head", "a list of names"),
        ("trainable_token_indices", ["a"], "a list of token ids"),
        ("use_dora", "yes", "true or false"),
        ("base_model_name_or_path", 3, "a path"),
    ],
)
def test_values_of_a_wrong_type(name, value, message, folder):
    path = folder / directory.CONFIG
    assert directory.open_adapter(folder).pairs  # control
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(UserError) as error:
        directory.open_adapter(folder)
    assert str(error.value).startswith(f"{path}: {name} must be {message}")
    assert str(error.value).endswith(f"got {value!r}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(120, 64)}),
            "vocabulary was resized",
        ),
        (lambda t: t.update({"base_model.model.head.weight": torch.ones(3)}), "has left over head"),
        (lambda t: t.update({"base_model.model.lm_head.modules_to_save.weight": torch.ones(3)}), "no matrix"),
        (
            lambda t: t.update(
                {"base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias": torch.ones(64)}
            ),
            "is no matrix of a LoRA adapter",
        ),
    ],
)
def test_tensors_that_do_not_fit(change, message, folder, tmp_path):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    reader = open_reader(base_folder("llama", tmp_path / "base"))
    with pytest.raises(UserError, match=message):
        lora_merge.merge(reader, directory.open_adapter(folder))


def test_a_missing_adapter_of_the_head(folder):
    path = folder / directory.CONFIG
    settings = json.loads(path.read_text()) | {"target_modules": [*LINEARS, "lm_head"]}
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="lacks the adapters of lm_head"):
        directory.check_complete(directory.open_adapter(folder), MODELS["llama"])
