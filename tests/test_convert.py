"""Conversion: bit-exact in all directions, equal to transformers; damaged input is refused."""

import itertools
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import corpus
from helpers.conversion import (
    BASE,
    LAYOUTS,
    MODELS,
    NO_BIAS,
    ROOT,
    bits,
    command,
    hugging_face,
    same,
    training_checkpoint,
    written,
)
from safetensors.torch import load_file, save_file

from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion import convert
from ascendspeed.conversion.output_files import PreallocatedFile
from ascendspeed.models import param_mapping
from ascendspeed.utils.atomic import staged_folder
from ascendspeed.utils.errors import UserError

FIXTURE = ROOT.parent / "shared" / "fixtures" / "internlm"


MIXED = "bf16, norms in fp32"
to_hf = partial(convert.write_hf, allow_nan=True)  # the tensors here are any bits
to_ranks = partial(convert.write_megatron, allow_nan=True)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """(model, kind) -> a directory and its tensors; made once."""
    made = {}

    def source(model: str, kind: str) -> tuple[Path, dict[str, torch.Tensor]]:
        if (model, kind) not in made:
            folder = tmp_path_factory.mktemp("hf") / "model"
            made[model, kind] = folder, hugging_face(folder, MODELS[model], kind)
        return made[model, kind]

    return source


def round_trip(folder: Path, tensors: dict[str, torch.Tensor], tp: int, pp: int, tmp: Path) -> None:
    to_ranks(convert.open_reader(folder), tmp / "ranks", tp, pp)
    to_hf(convert.open_reader(tmp / "ranks"), tmp / "back")
    assert same(written(tmp / "back"), tensors)


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize(("model", "kind"), zip(MODELS, itertools.cycle(("fp32", "bf16", MIXED))))
def test_round_trip_is_bit_exact(sources, tmp_path, model, kind, tp, pp):
    round_trip(*sources(model, kind), tp, pp, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("kind", ["fp32", "bf16", MIXED])
@pytest.mark.parametrize("model", MODELS)
def test_round_trip_of_every_type(sources, tmp_path, model, kind, tp, pp):
    round_trip(*sources(model, kind), tp, pp, tmp_path)


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_deepspeed_layout(sources, tmp_path, tp):
    folder, tensors = sources("internlm", "fp32")
    to_ranks(convert.open_reader(folder), tmp_path / "ranks", tp, deepspeed=True, verify=True)
    assert (tmp_path / "ranks/latest").read_text() == "release"
    files = sorted(path.name for path in (tmp_path / "ranks/release").iterdir())
    assert files == [f"mp_rank_{t:02d}_model_states.pt" for t in range(tp)]
    content = torch.load(tmp_path / "ranks/release" / files[-1], weights_only=True)
    assert (content["checkpoint_version"], content["dp_world_size"]) == (3.0, 0)
    rows = {1: 256, 2: 128, 8: 128}[tp]  # 131 pieces are padded to a multiple of 128 x TP
    assert content["module"]["embedding.word_embeddings.weight"].shape == (rows, 64)
    assert not content["module"]["embedding.word_embeddings.weight"][-1].any()
    bias = "decoder.layers.3.self_attention.linear_proj.bias"
    assert same({bias: content["module"][bias]}, {bias: tensors["model.layers.3.self_attn.o_proj.bias"]})


def test_stages_count_their_layers_from_0(sources, tmp_path):
    folder, tensors = sources("internlm", "fp32")
    to_ranks(convert.open_reader(folder), tmp_path / "ranks", 2, 2)
    assert (tmp_path / "ranks/latest_checkpointed_iteration.txt").read_text() == "release"
    path = tmp_path / "ranks/release/mp_rank_01_001/model_optim_rng.pt"
    content = torch.load(path, weights_only=True)["model"]
    name = "decoder.layers.0.input_layernorm.weight"
    assert same({name: content[name]}, {name: tensors["model.layers.2.input_layernorm.weight"]})
    assert "output_layer.weight" in content
    assert not any(n.startswith(("embedding", "decoder.layers.2")) for n in content)


# --- Hugging Face directories
# -----------------------------------------------------------------------------------------------


def test_shards_index_and_config_files(sources, tmp_path):
    folder, tensors = sources("internlm", "bf16")
    to_hf(convert.open_reader(folder), tmp_path / "hf", max_shard_size="60KB", verify=True)
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    for file in files:
        content = load_file(tmp_path / "hf" / file)
        assert set(content) == {name for name, where in index["weight_map"].items() if where == file}
        assert sum(t.nbytes for t in content.values()) <= 60_000
    assert same(written(tmp_path / "hf"), tensors)
    config_json = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config_json["torch_dtype"], config_json["bos_token_id"], config_json["bias"]) == (
        "bfloat16",
        1,
        True,
    )
    assert "auto_map" not in config_json
    assert json.loads((tmp_path / "hf/generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert not list((tmp_path / "hf").glob("*.py"))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("is_zip", [True, False])
def test_bin_files(tmp_path, shards, is_zip):
    tensors = hugging_face(tmp_path / "hf", BASE, MIXED)
    (tmp_path / "hf/model.safetensors").unlink()
    names, where = list(tensors), {}
    for i in range(shards):
        file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        content = {name: tensors[name] for name in names[i::shards]}
        torch.save(content, tmp_path / "hf" / file, _use_new_zipfile_serialization=is_zip)
        where |= dict.fromkeys(content, file)
    if shards > 1:
        (tmp_path / "hf/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    round_trip(tmp_path / "hf", tensors, 2, 2, tmp_path)


def test_another_type_on_request(tmp_path):
    tensors = hugging_face(tmp_path / "source", BASE)
    for tensor in tensors.values():
        tensor[tensor.isfinite() & ~tensor.bfloat16().isfinite()] = 1.0  # see the next test
    save_file(tensors, tmp_path / "source/model.safetensors")
    to_ranks(
        convert.open_reader(tmp_path / "source"), tmp_path / "ranks", 2, dtype=torch.bfloat16, verify=True
    )
    to_hf(convert.open_reader(tmp_path / "ranks"), tmp_path / "hf")
    assert same(written(tmp_path / "hf"), {name: tensor.bfloat16() for name, tensor in tensors.items()})
    assert json.loads((tmp_path / "hf/config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(("stored", "wanted_type"), [("fp32", "fp16"), ("bf16", "fp16"), ("fp32", "bf16")])
@pytest.mark.parametrize("out", ["hf", "ranks"])
def test_a_type_that_is_too_small_is_an_error_that_names_the_tensor(
    sources, tmp_path, stored, wanted_type, out
):
    tensors = {name: torch.zeros_like(tensor) for name, tensor in sources("internlm", stored)[1].items()}
    name, target = "model.layers.2.mlp.down_proj.weight", convert.DTYPES[wanted_type]
    limit = torch.finfo(target).max
    source = tmp_path / "hf"
    hugging_face(source, BASE, stored)

    def write(*values: float) -> dict[str, torch.Tensor]:
        tensors[name][0, : len(values)] = torch.tensor(values, dtype=torch.float64).to(tensors[name].dtype)
        save_file(tensors, source / "model.safetensors")
        opened = convert.open_reader(source)
        if out == "hf":
            to_hf(opened, tmp_path / "out", dtype=target, verify=True)
        else:
            to_ranks(opened, tmp_path / "out", 2, dtype=target, verify=True)
        return tensors

    beyond = 7e4 if wanted_type == "fp16" else torch.finfo(torch.float32).max  # finite in the source's type
    ours = name if out == "hf" else "decoder.layers.2.mlp.linear_fc2.weight"
    with pytest.raises(
        UserError,
        match=rf"{ours} holds finite values up to .*, too large for {'b' * (wanted_type == 'bf16')}float16",
    ):
        write(beyond, -beyond, 0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    largest = limit if stored == "fp32" else 65280.0  # the largest of both types
    write(
        largest, float("inf"), float("nan")
    )  # control: what fits is written, and what was infinite stays so
    back = dict(convert.open_reader(tmp_path / "out").tensors())["decoder.layers.2.mlp.linear_fc2.weight"]
    assert back[0, 0] == largest
    assert back[0, 1].isinf()
    assert back[0, 2].isnan()


def test_training_checkpoint_becomes_a_model_directory(sources, tmp_path):
    folder, tensors = sources("internlm", "fp32")
    beside = shutil.copytree(folder, corpus.sentencepiece_dir(tmp_path / "beside", 100), dirs_exist_ok=True)
    training_checkpoint(tmp_path / "ckpt", BASE, dict(convert.open_reader(folder).tensors()), beside)
    source = convert.open_reader(tmp_path / "ckpt")
    assert (source.description, source.config) == ("training checkpoint", BASE)
    to_hf(source, tmp_path / "hf", verify=True)
    assert same(written(tmp_path / "hf"), tensors)
    assert json.loads((tmp_path / "hf/config.json").read_text())["eos_token_id"] == 2
    assert (tmp_path / "hf/tokenizer.model").read_bytes() == (beside / "tokenizer.model").read_bytes()


# --- against transformers
# ---------------------------------------------------------------------------------------------------


def plain_llama(config: ModelConfig):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    scaling = (
        {"rope_type": "dynamic", "factor": config.rope_scaling_factor}
        if config.rope_scaling_type == "dynamic"
        else None
    )
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.kv_heads,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.norm_epsilon,
            rope_theta=config.rotary_base,
            rope_scaling=scaling,
            attention_bias=config.add_qkv_bias,
            tie_word_embeddings=False,
        )
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)  # biases and norms too
    return model


def logits_of(folder: Path, ids: torch.Tensor, **more) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    assert type(model).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        return model.eval()(ids, **more).logits


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """An InternLM directory whose tensors come from a transformers model, token ids beyond max_position, and
    its logits.
    """
    config = replace(BASE, num_layers=2, rope_scaling_type="dynamic", rope_scaling_factor=2.0)
    model, folder = plain_llama(config), tmp_path_factory.mktemp("oracle") / "hf"
    hugging_face(folder, config)
    save_file(dict(model.state_dict()), folder / "model.safetensors")
    ids = torch.arange(48)[None] * 7 % config.vocab_size
    with torch.no_grad():
        return folder, ids, model(ids).logits


def test_exported_llama_has_the_logits_of_its_source(oracle, tmp_path):
    folder, ids, expected = oracle
    to_ranks(convert.open_reader(folder), tmp_path / "ranks", 4, 2)
    to_hf(convert.open_reader(tmp_path / "ranks"), tmp_path / "hf", family="llama")
    assert torch.equal(logits_of(tmp_path / "hf", ids), expected)


def test_control_plainly_concatenated_qkv_is_seen(oracle, tmp_path, monkeypatch):
    folder, ids, expected = oracle
    right = param_mapping.block_spans

    def plain(config, row):
        heads, groups, d = config.num_attention_heads, config.kv_heads, config.head_dim
        sizes = ((0, heads * d), (heads * d, groups * d), ((heads + groups) * d, groups * d))
        return [[size] for size in sizes] if row.fusion == "qkv" else right(config, row)

    with monkeypatch.context() as patch:
        patch.setattr(param_mapping, "block_spans", plain)
        to_ranks(convert.open_reader(folder), tmp_path / "ranks", 2)
    to_hf(convert.open_reader(tmp_path / "ranks"), tmp_path / "hf", family="llama")
    assert (logits_of(tmp_path / "hf", ids) - expected).abs().max() > 0.1


def test_grouped_queries_as_transformers_saves_them(tmp_path):
    config = replace(
        BASE, family="llama", num_layers=2, num_query_groups=2, rope_scaling_type="none", **NO_BIAS
    )
    model, ids = plain_llama(config), torch.arange(24)[None]
    model.save_pretrained(tmp_path / "hf", max_shard_size="50KB")
    assert convert.open_reader(tmp_path / "hf").config == config
    to_ranks(convert.open_reader(tmp_path / "hf"), tmp_path / "ranks", 8)
    to_hf(convert.open_reader(tmp_path / "ranks"), tmp_path / "back")
    with torch.no_grad():
        assert torch.equal(logits_of(tmp_path / "back", ids), model(ids).logits)


@pytest.mark.skipif(
    not FIXTURE.is_dir(),
    reason="beside the equal oracle above: reference logits of the original modeling code",
)
def test_reference_logits(tmp_path):
    reference = load_file(FIXTURE / "reference.safetensors")
    to_ranks(convert.open_reader(FIXTURE), tmp_path / "ranks", 2, deepspeed=True)
    to_hf(convert.open_reader(tmp_path / "ranks"), tmp_path / "hf", family="llama")
    for kind in ("short", "full", "long"):  # long: 1.5 x max_position
        difference = (
            (logits_of(tmp_path / "hf", reference[f"ids_{kind}"]) - reference[f"logits_{kind}"]).abs().max()
        )
        assert difference < 1e-4, kind


# --- what is damaged
# --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hf(tmp_path) -> Path:
    """A good directory in three shards, to spoil."""
    hugging_face(tmp_path / "one", BASE)
    to_hf(convert.open_reader(tmp_path / "one"), tmp_path / "hf", max_shard_size="200KB")
    return tmp_path / "hf"


@pytest.fixture
def ranks(tmp_path, hf) -> Path:
    """Good rank files for TP 2 x PP 2, to spoil."""
    to_ranks(convert.open_reader(hf), tmp_path / "ranks", 2, 2)
    return tmp_path / "ranks"


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def edit(path: Path, change) -> None:
    """Changes the tensors of a shard."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_json(path: Path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def refused(folder: Path, *message: str) -> None:
    """Opening it is a `UserError` of one line that says all of this, and a conversion writes nothing."""
    with pytest.raises(UserError) as caught:
        to_ranks(convert.open_reader(folder), folder.parent / "out", 1)
    assert all(text in str(caught.value) for text in message), str(caught.value)
    assert "\n" not in str(caught.value)
    assert not [path for path in folder.parent.iterdir() if "out" in path.name]


def test_truncated_shard(hf):
    path = first_shard(hf)
    os.truncate(path, path.stat().st_size - 100)
    refused(hf, path.name, "cut off")


def test_missing_shard(hf):
    path = first_shard(hf)
    path.unlink()
    refused(hf, path.name, "lacks")


def test_index_names_a_missing_tensor(hf):
    index = hf / "model.safetensors.index.json"
    edit_json(index, lambda i: i["weight_map"].update({"model.layers.9.x.weight": first_shard(hf).name}))
    refused(hf, "model.layers.9.x.weight", "lacks")


def test_index_without_a_tensor_that_the_model_needs(hf):
    edit(first_shard(hf), lambda t: t.pop("model.embed_tokens.weight"))
    edit_json(hf / "model.safetensors.index.json", lambda i: i["weight_map"].pop("model.embed_tokens.weight"))
    refused(hf, "lacks model.embed_tokens.weight")


def test_left_over_tensor(hf):
    def add(tensors):
        tensors["model.extra"] = torch.zeros(1)

    edit(first_shard(hf), add)
    refused(hf, "left over model.extra")
    edit_json(
        hf / "model.safetensors.index.json",
        lambda i: i["weight_map"].update({"model.extra": first_shard(hf).name}),
    )
    refused(hf, "left over model.extra")


def test_tensor_in_two_shards(hf):
    one, two = sorted(hf.glob("*.safetensors"))[:2]
    edit(two, lambda t: t.update({"model.embed_tokens.weight": load_file(one)["model.embed_tokens.weight"]}))
    refused(hf, two.name, "left over model.embed_tokens.weight")


def test_wrong_shape_and_type(hf):
    def cut(tensors):
        name = next(name for name in tensors if name.startswith("model.layers.1."))
        tensors[name] = tensors[name][:-1].contiguous()

    def whole(tensors):
        tensors["model.embed_tokens.weight"] = torch.zeros(131, 64, dtype=torch.int64)

    edit(first_shard(hf), cut)
    refused(hf, "model.layers.1.", "but config.json says [")
    edit(first_shard(hf), whole)
    refused(hf, "model.embed_tokens.weight", "int64")


def test_pieces_of_several_types_are_not_fused(hf):
    name = "model.layers.0.self_attn.k_proj.weight"
    edit(first_shard(hf), lambda t: t.update({name: t[name].bfloat16()}))
    refused(hf, name, "several types")


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", ".."])
def test_index_that_leaves_the_folder(hf, file):
    edit_json(
        hf / "model.safetensors.index.json", lambda i: i["weight_map"].update({"model.norm.weight": file})
    )
    refused(hf, file)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_index_that_is_none(hf, text):
    (hf / "model.safetensors.index.json").write_text(text)
    refused(hf, "model.safetensors.index.json")


def test_config_that_contradicts_the_tensors(hf):
    edit_json(hf / "config.json", lambda c: c.update(bias=False))
    refused(hf, "config.json says bias = false, but the tensors have a model.layers.0.self_attn.q_proj.bias")
    edit_json(hf / "config.json", lambda c: c.update(bias=True, num_hidden_layers=5))
    refused(hf, "config.json says num_hidden_layers = 5, but the tensors have 4 layers")


def test_missing_config_and_two_sets_of_weights(hf):
    shutil.copyfile(first_shard(hf), hf / "model.safetensors")
    refused(hf, "model.safetensors and model.safetensors.index.json")
    (hf / "config.json").unlink()
    refused(hf, "no config.json")


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_hostile_pickle_does_not_run(hf, ranks, tmp_path):
    evil, mark = Evil(tmp_path / "it-ran"), tmp_path / "it-ran"
    for path in hf.glob("model*"):
        path.unlink()
    torch.save({"a": evil}, hf / "pytorch_model.bin")
    refused(hf, "pytorch_model.bin", "not loaded")
    (hf / "pytorch_model.bin").write_bytes(pickle.dumps({"a": evil}))
    refused(hf, "pytorch_model.bin", "not loaded")
    path = ranks / "release/mp_rank_00_000/model_optim_rng.pt"
    torch.save({"model": {}, "x": evil}, path)
    refused(ranks, "model_optim_rng.pt", "not loaded")
    assert not mark.exists()
    torch.load(path, weights_only=False)  # control
    assert mark.exists()


def test_truncated_and_missing_rank_files(ranks):
    path = ranks / "release/mp_rank_01_001/model_optim_rng.pt"
    os.truncate(path, path.stat().st_size - 1000)
    refused(ranks, "mp_rank_01_001", "cut off")
    path.unlink()
    refused(ranks, "lacks mp_rank_01_001/model_optim_rng.pt", "TP 2 x PP 2")
    (ranks / "release/mp_rank_01_000/model_optim_rng.pt").unlink()
    refused(ranks, "128 rows", "131")
    shutil.rmtree(ranks / "release")
    refused(ranks, "no rank files")


def test_rank_file_with_other_tensors(ranks):
    path = ranks / "release/mp_rank_01_001/model_optim_rng.pt"
    content = torch.load(path, weights_only=True)
    final = content["model"].pop("decoder.final_layernorm.weight")
    torch.save(content, path)
    refused(ranks, "lacks decoder.final_layernorm.weight")
    content["model"] |= {
        "decoder.final_layernorm.weight": final,
        "decoder.final_layernorm._extra_state": torch.zeros(1),
    }
    torch.save(content, path)
    assert len(convert.open_reader(ranks).names()) == 35
    content["model"]["decoder.final_layernorm.weight"] = final[:-1]
    torch.save(content, path)
    refused(ranks, "final_layernorm.weight is [63]")
    torch.save([1], path)
    refused(ranks, "no table of tensors")
    (ranks / "latest_checkpointed_iteration.txt").write_text("../elsewhere")
    refused(ranks, "../elsewhere")


def test_nothing_that_is_known(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(
        UserError, match=r"looked for .*safetensors.*rank files.*training checkpoint \(.*\); found a.txt"
    ):
        convert.open_reader(tmp_path)
    with pytest.raises(UserError, match="is not a directory"):
        convert.open_reader(tmp_path / "b")


def test_a_tied_model_may_hold_its_embedding_twice(tmp_path):
    tied = replace(MODELS["llama, 2 groups"], tie_embeddings=True)
    tensors = hugging_face(tmp_path / "hf", tied)
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, tmp_path / "hf/model.safetensors")
    to_hf(convert.open_reader(tmp_path / "hf"), tmp_path / "back")
    assert same(written(tmp_path / "back"), tensors)
    other = embedding.clone()
    bits(other)[70, 3] ^= 1  # control
    save_file(tensors | {"lm_head.weight": other}, tmp_path / "hf/model.safetensors")
    refused(tmp_path / "hf", "tie_word_embeddings = true", "lm_head.weight")


def test_a_rank_that_holds_another_ones_weights(ranks):
    files = ranks / "release"
    shutil.copyfile(files / "mp_rank_00_000/model_optim_rng.pt", files / "mp_rank_01_000/model_optim_rng.pt")
    refused(
        ranks, "rank 1, stage 0 holds the weights of rank 0, stage 0: was one file copied over the other?"
    )


def test_a_rank_whose_copy_differs(ranks):
    path = ranks / "release/mp_rank_01_001/model_optim_rng.pt"
    content = torch.load(path, weights_only=True)
    content["model"]["decoder.final_layernorm.weight"][0] += 1
    torch.save(content, path)
    refused(ranks, "decoder.final_layernorm.weight of rank 1, stage 1 is not the copy of another's")


def test_rows_beyond_the_vocabulary(tmp_path, capsys):
    """Padding that holds something is said; more of it than padding can be (128 rows) is refused: config.json
    is a stale one.
    """
    config = replace(BASE, vocab_size=250)
    tensors = hugging_face(tmp_path / "hf", config)
    to_ranks(convert.open_reader(tmp_path / "hf"), tmp_path / "ranks", 1)

    def set_vocabulary(size: int) -> None:
        edit_json(tmp_path / "ranks/config.json", lambda values: values.update(vocab_size=size))

    for size, has_note in ((250, False), (200, True)):
        set_vocabulary(size)
        capsys.readouterr()
        convert.open_reader(tmp_path / "ranks")
        note = f"{256 - size} rows of padding in embedding.word_embeddings.weight hold values"
        assert (note in capsys.readouterr().out) == has_note
    set_vocabulary(120)
    refused(tmp_path / "ranks", "136 rows beyond the vocab_size = 120 of config.json", "correct vocab_size")
    path = tmp_path / "ranks/release/mp_rank_00/model_optim_rng.pt"
    content = torch.load(path, weights_only=True)
    for name, hf_name in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ):
        content["model"][name] = torch.cat(
            [tensors[hf_name], tensors[hf_name][-6:]]
        )  # as AscendSpeed's converter padded
    torch.save(content, path)
    set_vocabulary(250)
    capsys.readouterr()
    convert.open_reader(tmp_path / "ranks")
    assert "padding" not in capsys.readouterr().out


def test_layers_of_another_number(ranks):
    edit_json(ranks / "config.json", lambda values: values.update(num_hidden_layers=2_000_000))
    refused(ranks, "holds 4 layers on 2 pipeline stages, config.json says 2000000")


def test_two_checkpoints_in_one_folder(ranks, hf):
    for path in hf.glob("model*"):
        shutil.copy(path, ranks)
    refused(
        ranks, "holds Hugging Face weights and Megatron rank files: move one of them to a folder of its own"
    )
    (ranks / "trainer_state.json").write_text("{}")
    assert convert.open_reader(ranks).description == "Hugging Face directory"


@pytest.mark.parametrize("name", ["..", "\u00b2", "a/b", ""])
def test_a_tracker_that_leads_elsewhere(ranks, name):
    (ranks / "latest_checkpointed_iteration.txt").write_text(name)
    with pytest.raises(UserError, match=r"latest_checkpointed_iteration.txt|has no rank files"):
        convert.open_reader(ranks)


def test_infinity_is_said(sources, tmp_path, capsys):
    tensors = hugging_face(tmp_path / "hf", BASE, "finite")
    tensors["model.norm.weight"][3] = float("-inf")
    save_file(tensors, tmp_path / "hf/model.safetensors")
    convert.write_megatron(convert.open_reader(tmp_path / "hf"), tmp_path / "out", 2)
    assert "holds infinity in decoder.final_layernorm.weight\n" in capsys.readouterr().out
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, tmp_path / "hf/model.safetensors")
    with pytest.raises(UserError, match=r"holds NaN in decoder.final_layernorm.weight; nothing was written"):
        convert.write_megatron(convert.open_reader(tmp_path / "hf"), tmp_path / "again", 2)


# --- the target ---------------------------------------------------------------------------------------------
# ----------------


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


# --- the commands
# -----------------------------------------------------------------------------------------------------------


def split(folder: Path, out: Path, *args: str) -> None:
    command(
        "llama/convert_weights_from_huggingface.py",
        "--input-model-dir",
        folder,
        "--output-model-dir",
        out,
        *args,
    )


def test_split_command_of_the_recipe(sources, tmp_path, capsys):
    folder, _ = sources("internlm", "finite")
    flags = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 1 --bias --deepspeed"
    flags += " --make-vocab-size-divisible-by 16"
    more = "--num_layers 4 --num_heads 8 --num_kv_heads 8 --hidden_size 64 --merge-mlp --added-token-num 0"
    split(folder, tmp_path / "out", *flags.split(), *more.split())
    assert "--merge-mlp is accepted and ignored" in capsys.readouterr().out
    source = convert.open_reader(tmp_path / "out")
    assert source.description == "DeepSpeed rank files for TP 2 x PP 1"
    convert.compare(source, convert.open_reader(folder))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--type 7B", "num_layers 32, config.json 4"),
        ("--type 9B", "--type 9B: the family internlm has no such size; there are internlm-7b, internlm-20b"),
        ("--num_layers 5", "--num-layers 5, config.json 4"),
        ("--num_kv_heads 2", "--num-kv-heads 2, config.json 8"),
        ("--added-token-num 3", "resize_token_embeddings"),
        ("--pipeline-model-parallel-size 2 --deepspeed", "no pipeline stages"),
    ],
)
def test_split_command_checks_what_it_is_told(sources, tmp_path, args, message):
    with pytest.raises(UserError, match=message):
        split(sources("internlm", "finite")[0], tmp_path / "out", *args.split())
    assert not list(tmp_path.iterdir())


def test_bias_is_checked(sources, tmp_path):
    with pytest.raises(UserError, match=r"--bias True, config.json False"):
        split(sources("internlm without bias", "bf16")[0], tmp_path / "out", "--bias")


def test_convert_command(sources, tmp_path, capsys):
    folder, tensors = sources("llama, 2 groups", MIXED)
    corpus.sentencepiece_dir(tmp_path / "tokenizer", 100)
    command(
        "convert.py",
        "--from",
        folder,
        "--to",
        tmp_path / "w",
        "--format=megatron",
        "--tp=4",
        "--pp=2",
        "--verify",
        "--allow-nan",
    )
    command(
        "convert.py",
        *f"--from {tmp_path}/w --to {tmp_path}/hf --format hf --allow-nan".split(),
        *f"--tokenizer {tmp_path}/tokenizer".split(),
    )
    verdict = (
        r"verified, every byte of \d+ parameters; logits not compared: the weights hold NaN or infinity: "
    )
    assert re.search(f"{verdict}{tmp_path}/w\n", capsys.readouterr().out)
    assert same(written(tmp_path / "hf"), tensors)
    assert (tmp_path / "hf/tokenizer.model").read_bytes() == (
        tmp_path / "tokenizer/tokenizer.model"
    ).read_bytes()
    with pytest.raises(
        UserError, match="--tp is for --format megatron or deepspeed or internevo, not for hf"
    ):
        command("convert.py", *f"--from {folder} --to {tmp_path}/x --format hf --tp 2".split())


def test_a_plain_llama_becomes_what_it_was(sources, tmp_path):
    folder, tensors = sources("internlm2", "finite")
    command("convert.py", *f"--from {folder} --to {tmp_path}/llama --format hf-llama".split())
    assert "model.layers.0.self_attn.q_proj.weight" in written(tmp_path / "llama")
    command(
        "convert.py",
        *f"--from {tmp_path}/llama --to {tmp_path}/back --format hf --to-family internlm2 --verify".split(),
    )
    assert same(written(tmp_path / "back"), tensors)
    for more, message in {
        "hf --to-family internlm9": "--to-family internlm9 does not exist; there are internlm, internlm2",
        "megatron --to-family internlm2": "--to-family is for --format hf, not for megatron",
    }.items():
        with pytest.raises(UserError, match=message):
            command("convert.py", *f"--from {folder} --to {tmp_path}/x --format {more}".split())


def test_a_tokenizer_that_is_not_found_is_said(sources, tmp_path, monkeypatch, capsys):
    """The run of a training checkpoint names its tokenizer as it was typed: relative to where the run was
    started.
    """
    corpus.sentencepiece_dir(tmp_path / "home/words", 100)
    (tmp_path / "elsewhere").mkdir()
    full = dict(convert.open_reader(sources("internlm", "finite")[0]).tensors())
    training_checkpoint(
        tmp_path / "ckpt", BASE, {name: tensor.float() for name, tensor in full.items()}, Path("words")
    )

    def export(cwd: str, name: str, *more: str) -> tuple[str, dict]:
        monkeypatch.chdir(tmp_path / cwd)
        capsys.readouterr()
        command(
            "convert.py", "--from", tmp_path / "ckpt", "--to", tmp_path / name, "--format", "hf-llama", *more
        )
        return capsys.readouterr().out, json.loads((tmp_path / name / "config.json").read_text())

    note = "note: no tokenizer was found at words; none is exported (give --tokenizer DIR)"
    message, config_json = export("elsewhere", "a")
    assert message.count(note) == 1
    assert "bos_token_id" not in config_json
    message, config_json = export("home", "b")
    assert "no tokenizer was found" not in message
    assert (config_json["bos_token_id"], config_json["eos_token_id"]) == (1, 2)
    assert (tmp_path / "b/tokenizer.model").exists()
    message, config_json = export(
        "elsewhere", "c", "--tokenizer", str(corpus.big_vocabulary_dir(tmp_path / "other", 100))
    )
    assert "no tokenizer was found" not in message
    assert (config_json["eos_token_id"], config_json["pad_token_id"], "bos_token_id" in config_json) == (
        1,
        1,
        False,
    )
    assert json.loads((tmp_path / "c/generation_config.json").read_text()) == {
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    with pytest.raises(UserError, match="nosuch: no tokenizer here"):
        export("home", "d", "--tokenizer", "nosuch")
    assert not [path for path in tmp_path.iterdir() if path.name.endswith("d")]


def test_token_ids_that_the_source_says_are_kept(sources, tmp_path):
    folder, other = sources("internlm", "finite")[0], corpus.big_vocabulary_dir(tmp_path / "other", 100)
    command("convert.py", *f"--from {folder} --to {tmp_path}/hf --format hf --tokenizer {other}".split())
    config_json = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config_json["bos_token_id"], config_json["eos_token_id"], "pad_token_id" in config_json) == (
        1,
        2,
        False,
    )


def test_random_model_takes_its_token_ids_from_its_tokenizer(tmp_path, capsys):
    def ids(*flags: str) -> list[int | None]:
        command("../random_model.py", "--output-dir", tmp_path / "out", *flags)
        config_json = json.loads((tmp_path / "out/config.json").read_text())
        shutil.rmtree(tmp_path / "out")
        return [config_json.get(f"{name}_token_id") for name in ("bos", "eos", "pad")]

    assert ids() == [1, 2, 2]
    assert "note: no tokenizer was found; none is exported (give --tokenizer DIR)" in capsys.readouterr().out
    assert ids("--tokenizer", str(corpus.big_vocabulary_dir(tmp_path / "words", 100))) == [None, 1, 1]
    with pytest.raises(UserError, match="nosuch: no tokenizer here"):
        ids("--tokenizer", "nosuch")
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    script = ROOT / "tools/ckpt_convert/convert.py"
    args = ["--from", str(tmp_path), "--to", str(tmp_path / "x"), "--format", "hf"]
    result = subprocess.run([sys.executable, script, *args], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
