"""Adapters in and out: merged as peft merges, bit for bit; read and written as peft does; what is more than
LoRA is refused.
"""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import oracle
from helpers.conversion import command
from helpers.peft_folders import MODELS, model_of
from safetensors.torch import load_file, save_file

from ascendspeed.config.schema import LoraConfig
from ascendspeed.conversion import lora_merge, weights_identity
from ascendspeed.conversion.formats import peft as directory
from ascendspeed.conversion.formats.registry import open_reader
from ascendspeed.models.families import FAMILIES
from ascendspeed.models.lora import adapter as adapters
from ascendspeed.utils.errors import UserError

SOME = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
SETTINGS: dict[str, dict[str, Any]] = {
    "some": {"target_modules": SOME},
    "all": {"target_modules": "all-linear", "lora_alpha": 5},
    "rslora": {"target_modules": SOME, "use_rslora": True},
    "patterns": {
        "target_modules": SOME,
        "rank_pattern": {"o_proj": 8, r"layers\.1\..*\.up_proj": 2},
        "alpha_pattern": {"^.*v_proj": 3},
    },
    "one layer": {"target_modules": SOME, "layers_to_transform": [1]},
}


def base(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A Hugging Face directory in `folder`; the same model as transformers has it."""
    reference, named = model_of(family, dtype)
    folder.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in named.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(FAMILIES[family].write_config(MODELS[family])))
    return reference


def made(reference: Any, folder: Path, **settings: Any) -> Path:
    """A directory that peft saves, whose B is not zero."""
    torch.manual_seed(1)
    config = peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", "init_lora_weights": False} | settings)
    adapted = peft.get_peft_model(reference, config)
    adapted.save_pretrained(folder)
    adapted.unload()
    return folder


def merge(work: Path) -> dict[str, torch.Tensor]:
    command(
        "../lora/merge_lora.py",
        "--base",
        work / "base",
        "--adapter",
        work / "adapter",
        "--save",
        work / "merged",
    )
    return load_file(work / "merged" / "model.safetensors")


@pytest.mark.breadth
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "settings"), [(f, "some") for f in MODELS] + [("llama", s) for s in SETTINGS if s != "some"]
)
def test_every_bit_is_that_of_peft(family, settings, dtype, tmp_path):
    """InternLM2's own names too: there the adapters of q and v go into wqkv."""
    reference = base(family, tmp_path / "base", dtype)
    made(reference, tmp_path / "adapter", **SETTINGS[settings])
    ours = merge(tmp_path)
    before = load_file(tmp_path / "base" / "model.safetensors")
    merged = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter").merge_and_unload()
    expected = oracle.RENAMED.get(family, lambda named, *_: named)(
        merged.state_dict(), MODELS[family], merged
    )
    assert ours.keys() == before.keys() == expected.keys()
    for name, tensor in expected.items():
        assert ours[name].dtype == dtype
        assert torch.equal(ours[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
    changed = {name for name in ours if not torch.equal(ours[name], before[name])}
    assert len(changed) == {"some": 10, "all": 14, "rslora": 10, "patterns": 10, "one layer": 5}[
        settings
    ] - 2 * (family == "internlm2")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["model_type"] == family


def test_control_a_sum_in_bf16_is_not_pefts(tmp_path):
    reference = base("llama", tmp_path / "base", torch.bfloat16)
    made(reference, tmp_path / "adapter", **SETTINGS["some"])
    pair = directory.open_adapter(tmp_path / "adapter").pairs["model.layers.0.mlp.down_proj"]
    weight = load_file(tmp_path / "base" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    merged = merge(tmp_path)["model.layers.0.mlp.down_proj.weight"]
    assert not torch.equal(merged, weight + (pair.b.bfloat16() @ pair.a.bfloat16()) * pair.scale)


def test_what_is_written_peft_reads(tmp_path):
    """peft computes the same logits with the same settings."""
    reference = base("llama", tmp_path / "base")
    adapter = directory.open_adapter(made(reference, tmp_path / "adapter", target_modules=SOME))
    tokens = torch.arange(30).view(2, 15)
    logits = [peft.PeftModel.from_pretrained(reference, tmp_path / "adapter")(tokens).logits]
    reference = model_of("llama")[0]
    directory.write(replace(adapter, fingerprint="0" * 64), tmp_path / "again", base="somewhere")
    assert (tmp_path / "again" / directory.BASE).exists()
    again = peft.PeftModel.from_pretrained(reference, tmp_path / "again")
    assert torch.equal(again(tokens).logits, logits[0])
    config = peft.LoraConfig.from_pretrained(tmp_path / "again")
    assert (config.base_model_name_or_path, config.task_type, config.r) == ("somewhere", "CAUSAL_LM", 4)
    with again.disable_adapter():  # control
        assert not torch.allclose(again(tokens).logits, logits[0], atol=1e-3)


def test_wqkv_by_llamas_names(tmp_path):
    """One A, and B's rows dealt out: the weights with the adapters in them are the same."""
    base("internlm2", tmp_path / "base")
    source, model = open_reader(tmp_path / "base"), MODELS["internlm2"]
    lora = LoraConfig(4, 8.0, lora_target_modules=("wqkv", "wo", "w1", "w2"))
    generator = torch.Generator().manual_seed(2)
    pairs = {}
    for name, tensor in adapters.initial_tensors(model, lora, 1):
        layer, leaf = name.split(".")[2], name.rpartition(".")[2]
        pairs.setdefault((layer, leaf[:-2]), {})[leaf[-1]] = (
            torch.randn(tensor.shape, generator=generator) * 0.1
        )
    where = {"wqkv": "attention.wqkv", "wo": "attention.wo", "w1": "feed_forward.w1", "w2": "feed_forward.w2"}
    named = {
        f"model.layers.{n}.{where[leaf]}": adapters.LoraPair(ab["A"], ab["B"], 2.0)
        for (n, leaf), ab in pairs.items()
    }
    own = adapters.LoraAdapter(
        tmp_path, named, {"r": 4, "lora_alpha": 8, "target_modules": list(where)}, "trained/on"
    )
    llama = adapters.as_llama(own, model)
    assert llama.base is None
    assert adapters.as_llama(replace(llama, base="a/llama"), MODELS["llama"]).base == "a/llama"
    assert llama.settings["target_modules"] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "down_proj",
    ]
    by_own, by_llama = (dict(lora_merge.merge(source, adapter).tensors()) for adapter in (own, llama))
    for name, tensor in by_own.items():
        assert torch.allclose(by_llama[name], tensor, atol=1e-6), name
        assert torch.equal(tensor, dict(source.tensors())[name]) == ("linear" not in name)
    reference = oracle.native(model)[0]  # a Llama
    directory.write(llama, tmp_path / "adapter", base="x")
    merged = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter").merge_and_unload()
    expected = oracle.internlm2(merged.state_dict(), model, merged)
    for parameter in ("attention.wqkv", "feed_forward.w1", "attention.wo"):
        pair = own.pairs[f"model.layers.1.{parameter}"]
        name = f"model.layers.1.{parameter}.weight"
        before = load_file(tmp_path / "base" / "model.safetensors")[name]
        assert torch.allclose(expected[name], before + pair.b @ pair.a * 2.0, atol=1e-6), name


REFUSED = {
    "use_dora": (True, "it lacks model.layers.0.*, but a DoRA|a DoRA magnitude of every adapter"),
    "bias": ("some", "bias 'some' is not one of none, all, lora_only"),
    "lora_bias": (True, "lora_bias = True is not supported"),
    "fan_in_fan_out": (True, "fan_in_fan_out = True is not supported"),
    "modules_to_save": (["lm_head"], "lacks 'lm_head', which modules_to_save of its"),
    "layer_replication": ([[0, 1]], "layer_replication"),
    "peft_type": ("LOHA", "peft_type 'LOHA' is not supported"),
    "init_lora_weights": ("pissa", "init_lora_weights 'pissa' changes the base weights"),
    "trainable_token_indices": ([1], "lacks the rows of trainable_token_indices"),
    "something_new": ({"x": 1}, "something_new"),
    "r": (8, "A of model.layers.0.* has 4 rows, but adapter_config.json says r = 8"),
    "lora_alpha": (None, "lora_alpha must be a number, got None"),
    "alpha_pattern": ({"(": 1}, "is no regular expression"),
    "target_modules": (
        [*SOME, "k_proj"],
        "lacks the adapters of model.layers.0.self_attn.k_proj, model.layers.1.self_attn.k_proj",
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A base and an adapter that fit."""
    work = tmp_path_factory.mktemp("whole")
    made(base("llama", work / "base"), work / "adapter", **SETTINGS["some"])
    return work


@pytest.fixture
def work(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "work")
    return tmp_path / "work"


def refused(work: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as error:
        merge(work)
    assert "\n" not in str(error.value)
    assert not (work / "merged").exists()
    assert {path.name for path in work.iterdir()} <= {"base", "adapter"}


@pytest.mark.parametrize("name", REFUSED)
def test_more_than_lora_is_refused_by_name(name, work):
    path = work / "adapter" / "adapter_config.json"
    value, match = REFUSED[name]
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    refused(work, match)


def spoiled(work: Path, change: Any) -> None:
    path = work / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


PRE, UP = "base_model.model.model.layers.", "1.mlp.up_proj.lora_"


def elsewhere(tensors: dict[str, torch.Tensor]) -> None:
    """Adapters of an eighth layer."""
    for which in "AB":
        tensors[f"{PRE}7.mlp.up_proj.lora_{which}.weight"] = tensors[f"{PRE}{UP}{which}.weight"].clone()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(f"{PRE}{UP}A.weight"), "it has left over model.layers.1.mlp.up_proj"),
        (lambda t: t.pop(f"{PRE}{UP}B.weight"), "it lacks model.layers.1.mlp.up_proj"),
        (
            lambda t: [t.pop(f"{PRE}{UP}{x}.weight") for x in "AB"],
            "lacks the adapters of model.layers.1.mlp.up_proj",
        ),
        (lambda t: t.update(odd=torch.ones(1)), "no matrix of a LoRA adapter: odd"),
        (elsewhere, "has left over model.layers.7.mlp.up_proj, which the model"),
        (lambda t: t.update({f"{PRE}{UP}B.weight": torch.ones(90, 4)}), "do not fit a matrix of"),
        (lambda t: t.update({f"{PRE}{UP}B.weight": torch.full((96, 4), torch.nan)}), "holds NaN in"),
        (lambda t: t.clear(), "holds no adapters"),
    ],
)
def test_tensors_left_over_or_missing(change, match, work):
    spoiled(work, change)
    refused(work, match)


def test_damaged_and_missing_files(work):
    path = work / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    refused(work, "cut off|damaged")
    path.unlink()
    refused(work, "has no weights: none of adapter_model.safetensors")
    (work / "adapter" / "adapter_config.json").unlink()
    refused(work, "holds no adapters: neither adapter_config.json of peft nor a training checkpoint")


def test_the_weights_beneath_are_known(work, capsys):
    """Neither another model of the same architecture nor weights that have the adapters in them already."""
    adapter, beneath = directory.open_adapter(work / "adapter"), open_reader(work / "base")
    shutil.rmtree(work / "adapter")
    directory.write(replace(adapter, fingerprint=weights_identity.sampled(beneath)), work / "adapter")
    assert directory.open_adapter(work / "adapter").fingerprint == weights_identity.sampled(beneath)
    merge(work)
    assert "could not be checked" not in capsys.readouterr().out
    once = (work / "merged").rename(work / "once")
    for other in (once, spoiled_base(work)):
        shutil.rmtree(work / "base")
        other.rename(work / "base")
        refused(
            work,
            "base does not hold the weights that .*adapter was trained on: it is another model, or was "
            "changed since",
        )
    (work / "adapter" / directory.BASE).unlink()  # control
    merge(work)
    assert (
        f"note: {work / 'adapter'} does not record the weights it was trained on" in capsys.readouterr().out
    )


def spoiled_base(work: Path) -> Path:
    shutil.copytree(work / "base", work.parent / "other")
    path = work.parent / "other" / "model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    return path.parent


@pytest.mark.parametrize("text", ["[]", "{}", '{"fingerprint": "0"}', "{"])
def test_a_damaged_fingerprint_is_refused(text, work):
    (work / "adapter" / directory.BASE).write_text(text)
    refused(work, f"{directory.BASE} (cannot be read|is not a table|holds no fingerprint)")


def killed(before: int, *, among: dict[Any, tuple[str, ...]], work: Callable[[], None]) -> bool:
    """Does some work in a process that ends at once before the call of this number to one of these functions:
    whether it did.
    """
    process = os.fork()
    if process:
        return bool(os.waitpid(process, 0)[1])
    calls = itertools.count(1)

    def counted(function: Any) -> Any:
        return lambda *words, **more: os._exit(9) if next(calls) == before else function(*words, **more)

    try:
        for module, names in among.items():
            for name in names:
                setattr(module, name, counted(getattr(module, name)))
        work()
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize(
    ("older", "stride"),
    [(True, 3), *(pytest.param(older, 1, marks=pytest.mark.slow) for older in (True, False))],
    ids=["over an older one, some", "over an older one", "the first one"],
)
def test_a_kill_never_loses_the_adapters(older, stride, work):
    """Killed before a rename or deletion, and again in the next call: a complete folder remains."""
    target = work / "save" / "adapter"
    first = directory.open_adapter(work / "adapter")
    first_note, two = (replace(first, settings={**first.settings, "revision": note}) for note in ("", "two"))
    steps = {os: ("rename", "unlink"), shutil: ("rmtree",)}
    for number in itertools.count(1, stride):
        shutil.rmtree(target.parent, ignore_errors=True)
        if older:
            directory.replace_with(first_note, target)
        if not killed(number, among=steps, work=lambda: directory.replace_with(two, target)):
            break
        there = target.exists() or target.with_name(".adapter.new").exists()
        assert killed(
            1, among={directory: ("create_safetensors",)}, work=lambda: directory.replace_with(two, target)
        )
        assert (
            not (older or there) or directory.open_adapter(target).pairs.keys() == first_note.pairs.keys()
        ), number
        directory.replace_with(two, target)
        assert json.loads((target / "adapter_config.json").read_text())["revision"] == "two"
        assert [path.name for path in target.parent.iterdir()] == ["adapter"]
    assert number > 6  # it was killed, not spared
