"""Reward models: losses and scores against a plain loop over Hugging Face's backbone, in every layout; names,
export and refusals."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.models import ours
from helpers.preference import (
    REWARD_TOKEN,
    STEPS,
    adapted_reward_model,
    curves,
    hf_reward_model,
    reward_curve,
    run_of,
    write_inputs,
)
from helpers.preference_cases import LAYOUTS, LORA, RM, WITH_TOKEN, ZERO, case, with_lora, worst
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from ascendspeed.cli.train_args import resolve
from ascendspeed.conversion import convert, weights_identity
from ascendspeed.conversion.formats import peft
from ascendspeed.conversion.lora_merge import merge
from ascendspeed.data import batch as micro_batch
from ascendspeed.data.document import Document
from ascendspeed.data.packing.rows import assemble_pairs
from ascendspeed.models import param_mapping
from ascendspeed.models.families import FAMILIES, preset
from ascendspeed.models.lora.adapter import LoraAdapter, LoraPair, as_llama
from ascendspeed.training.objectives.reward_modelling import last_tokens
from ascendspeed.training.reward_head import head_of
from ascendspeed.utils.errors import UserError


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    write_inputs(folder)
    return folder


def check(curve, expected, norms=1e-5):
    values, worst_norm = worst(curve, expected)
    assert values < 1e-5, (curve, expected)
    assert worst_norm < norms, worst_norm


@pytest.mark.slow
def test_twenty_steps_of_both_engines(inputs):
    ours = curves(inputs, {"megatron": case(STEPS, **RM), "deepspeed": case(STEPS, ZERO, **WITH_TOKEN)})
    plain = reward_curve(inputs, STEPS)
    check(ours["megatron"], plain, norms=1e-4)
    check(ours["deepspeed"], reward_curve(inputs, STEPS, REWARD_TOKEN), norms=1e-4)
    assert worst(ours["deepspeed"], plain)[0] > 1e-3  # control: another position


@pytest.mark.slow
def test_adapters_and_head_as_peft(inputs):
    """Adapters of `TaskType.SEQ_CLS`: the head is trained whole beside them."""
    ours = curves(
        inputs, {"megatron": case(STEPS, **RM, lora=LORA), "deepspeed": case(STEPS, ZERO, **RM, lora=LORA)}
    )
    run = with_lora(run_of(inputs))
    expected = reward_curve(inputs, STEPS, model=adapted_reward_model(inputs, run))
    frozen = adapted_reward_model(inputs, run)
    frozen.base_model.model.score.requires_grad_(False)
    control = reward_curve(inputs, STEPS, model=frozen)
    for name, curve in ours.items():
        print(name, worst(curve, expected))
        check(curve, expected, norms=1e-4)
        assert worst(curve, control)[0] > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("groups", [{}, {"lora": LORA}], ids=["full", "lora"])
def test_every_layout_gives_the_same_curve(inputs, groups):
    changes = {**RM, **groups}
    layouts = {
        name: {**layout, "changes": {**layout["changes"], **changes}} for name, layout in LAYOUTS.items()
    }
    model = adapted_reward_model(inputs, with_lora(run_of(inputs))) if groups else None
    alone = reward_curve(inputs, 3, model=model)
    for name, curve in curves(inputs, layouts, 2).items():
        print(name)
        check(curve, alone, norms=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{}, ZERO], ids=["megatron", "deepspeed"])
@pytest.mark.parametrize("groups", [{}, {"lora": LORA}], ids=["full", "lora"])
def test_resumed_bit_by_bit(inputs, tmp_path, parallel, groups):
    changes = {**RM, **groups}
    first = {**case(2, parallel, **changes), "save": str(tmp_path / "ckpt")}
    second = case(2, parallel, **changes, train={"load": str(tmp_path / "ckpt"), "save": None})
    ours = curves(inputs, {"whole": case(4, parallel, **changes), "first": first, "second": second})
    assert ours["first"] + ours["second"] == ours["whole"]


@pytest.mark.slow
def test_trained_adapters_are_exported_and_merged_as_by_peft(inputs, tmp_path):
    """The directory is loaded by peft; the merged model equals `merge_and_unload` bit for bit; --lora-load
    continues with the head."""
    changes = {**WITH_TOKEN, "model": {"reward_head": True, "scored_token_id": REWARD_TOKEN}, "lora": LORA}
    curves(inputs, {"a": {**case(2, **changes), "save": str(tmp_path / "ckpt")}})
    adapter = peft.open_adapter(tmp_path / "ckpt")
    peft.write(adapter, tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["task_type"], settings["modules_to_save"]) == ("SEQ_CLS", ["score"])
    by_peft = PeftModel.from_pretrained(hf_reward_model(inputs, run_of(inputs)), tmp_path / "adapter")
    expected = by_peft.merge_and_unload().state_dict()
    for source in ("adapter", "ckpt"):
        merged = merge(convert.open_reader(inputs / "hf"), peft.open_adapter(tmp_path / source))
        convert.write_hf(merged, tmp_path / f"merged {source}")
        stored = load_file(tmp_path / f"merged {source}" / "model.safetensors")
        assert stored.keys() == expected.keys()
        assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())
        written = json.loads((tmp_path / f"merged {source}" / "config.json").read_text())
        assert written["architectures"] == ["LlamaForSequenceClassification"]
        assert written["reward_token_id"] == REWARD_TOKEN
    first, other = ({"lora": {**LORA, "lora_load": folder}} for folder in (str(tmp_path / "adapter"), None))
    ours = curves(inputs, {"on": case(1, **{**changes, **first}), "new": case(1, **{**changes, **other})})
    model = PeftModel.from_pretrained(
        hf_reward_model(inputs, run_of(inputs)), tmp_path / "adapter", is_trainable=True
    )
    continued = reward_curve(inputs, 1, REWARD_TOKEN, model=model)
    check(ours["on"], continued)
    assert worst(ours["new"], continued)[0] > 1e-3  # control


def test_adapters_of_a_reward_model_are_renamed_and_read_back(tmp_path):
    """InternLM2's `v_head` becomes transformers' `score`; the token and the head survive the directory."""
    model = preset("internlm2-tiny")
    write_source(model, dict(param_mapping.random_tensors(model, 3)), tmp_path / "base")
    head = torch.randn(1, model.hidden_size, generator=torch.Generator().manual_seed(1))
    pair = LoraPair(torch.zeros(2, model.hidden_size), torch.zeros(model.hidden_size, 2), 1.0)
    settings = {"r": 2, "lora_alpha": 2, "target_modules": ["wo"]}
    pairs = {f"model.layers.{layer}.attention.wo": pair for layer in range(model.num_layers)}
    base = convert.open_reader(tmp_path / "base")
    own = LoraAdapter(
        tmp_path,
        pairs,
        settings,
        fingerprint=weights_identity.sampled(base),
        replaced={"v_head.weight": head},
        scored_token_id=92,
    )
    for name, adapter in (("own", own), ("llama", as_llama(own, replace(model, reward_head=True)))):
        peft.write(adapter, tmp_path / name)
        merged = merge(base, peft.open_adapter(tmp_path / name))
        assert merged.config == replace(model, reward_head=True, scored_token_id=92)
        assert torch.equal(dict(merged.tensors())["output_layer.weight"], head)
    written = json.loads((tmp_path / "llama" / "adapter_config.json").read_text())
    assert written["modules_to_save"] == ["score"]
    written["modules_to_save"] = ["classifier", "score"]  # as peft states for every sequence classifier
    (tmp_path / "llama" / "adapter_config.json").write_text(json.dumps(written))
    assert peft.open_adapter(tmp_path / "llama").has_reward_head
    written["modules_to_save"] = ["embed_tokens", "score"]  # control
    (tmp_path / "llama" / "adapter_config.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match="lacks 'embed_tokens'"):
        peft.open_adapter(tmp_path / "llama")
    with pytest.raises(UserError, match="add --stage rm"):
        list(head_of(own, model))


def test_marks_of_last_tokens():
    def pair(*sizes):
        parts = (Document(np.zeros(size, np.int32), np.ones(size, bool)) for size in sizes)
        return Document.of_pair(*parts)

    rows = [assemble_pairs([pair(3, 1)], 6), assemble_pairs([pair(1, 2), pair(2, 1)], 6)]
    batch = micro_batch.stack(rows)
    assert last_tokens(batch).tolist() == [[0, 0, 1, 1, 0, 0], [1, 0, 1, 0, 1, 1]]
    assert batch.conversations[last_tokens(batch) == 1].tolist() == [0, 1, 2, 3, 4, 5]


def test_the_reward_token_is_after_both_conversations():
    pair = Document(torch.arange(5).int().numpy(), torch.ones(5).bool().numpy(), 2).ended_by(REWARD_TOKEN)
    assert [part.tokens.tolist() for part in pair.parts()] == [[0, 1, REWARD_TOKEN], [2, 3, 4, REWARD_TOKEN]]
    assert not any(part.loss_mask[-1] for part in pair.parts())


def test_export_has_the_names_of_the_published_models(tmp_path):
    """InternLM2ForRewardModel: `v_head.weight` [1, h], no output layer, `reward_token_id`."""
    model = replace(preset("internlm2-tiny"), reward_head=True, scored_token_id=92)
    tensors = dict(param_mapping.random_tensors(model, 3))
    write_source(model, tensors, tmp_path / "a")
    convert.write_hf(convert.open_reader(tmp_path / "a"), tmp_path / "b", verify=True)
    config_json = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config_json["architectures"] == ["InternLM2ForRewardModel"]
    assert config_json["reward_token_id"] == 92
    stored = load_file(tmp_path / "b" / "model.safetensors")
    assert torch.equal(stored["v_head.weight"], tensors["output_layer.weight"])
    assert stored["v_head.weight"].shape == (1, model.hidden_size)
    assert "output.weight" not in stored
    assert convert.open_reader(tmp_path / "b").config == model
    other = FAMILIES["internlm2"].read_config({**config_json, "architectures": ["InternLM2ForCausalLM"]})
    assert not other.reward_head  # control
    with pytest.raises(UserError, match="only --format hf and hf-llama"):
        convert.write_megatron(convert.open_reader(tmp_path / "b"), tmp_path / "c", 1)


def test_a_llama_export_is_scored_by_transformers(cpu, tmp_path):
    """Scores of this project's model and of LlamaForSequenceClassification on the exported directory."""
    model = replace(preset("llama-tiny"), family="internlm2", reward_head=True)
    tensors = dict(param_mapping.random_tensors(model, 3))
    generator = torch.Generator().manual_seed(1)
    tensors["output_layer.weight"] = torch.randn(1, model.hidden_size, generator=generator)
    write_source(model, tensors, tmp_path / "a")
    convert.write_hf(convert.open_reader(tmp_path / "a"), tmp_path / "b", family="llama")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "b").eval()
    ids = torch.randint(3, 2048, (1, 19), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        built = ours(cpu, model, tensors)
        scores = built(ids, None, None, labels=ids)
        expected = theirs(ids).logits
    assert (scores[0, -1] - expected[0, 0]).abs() < 1e-5
    assert (scores[0, -2] - expected[0, 0]).abs() > 1e-2  # control: another position


def write_source(model, tensors, folder):
    """A directory of this model's own names, written without the converter."""
    folder.mkdir()
    named = {}
    for parameter in param_mapping.parameters(model):
        named |= param_mapping.megatron_to_hf(model, parameter, tensors[parameter.name])
    save_file({name: tensor.contiguous() for name, tensor in named.items()}, folder / "model.safetensors")
    config_json = FAMILIES[model.family].write_config(model)
    (folder / "config.json").write_text(json.dumps(config_json))


REFUSED = {
    "--reward-token-id 5": "belongs to --stage rm",
    "--stage rm --loss dpo": "belongs to --stage dpo",
    "--stage rm": "models of family internlm have no class for reward models; choose internlm2, llama",
    "--stage rm --model internlm2-7b --reward-token-id 92544": "not in the vocabulary of 92544",
    "--stage rm --model internlm2-7b --label-smoothing 0.1": "trains on pairs",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_flags_without_a_meaning_are_refused(flags):
    with pytest.raises(UserError, match=REFUSED[flags]):
        resolve(["--data-path", "x", *flags.split()], 1)


def test_a_reward_model_is_loaded_and_continued(tmp_path):
    model = replace(preset("internlm2-tiny"), reward_head=True, scored_token_id=92)
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES["internlm2"].write_config(model)))
    words = ["--data-path", "x", "--load", str(tmp_path)]
    run, _ = resolve([*words, "--stage", "rm"], 1)
    assert run.model == model
    assert run.data.reward_token_id == 92
    with pytest.raises(UserError, match="holds a reward model: add --stage rm"):
        resolve(words, 1)
    with pytest.raises(UserError, match="reads its score at token 92"):
        resolve([*words, "--stage", "rm", "--reward-token-id", "5"], 1)
