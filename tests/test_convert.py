"""Conversion: bit-exact in all directions, equal to transformers; damaged input is refused."""

import itertools
import json
import shutil
from dataclasses import replace
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
    hugging_face,
    same,
    training_checkpoint,
    written,
)
from helpers.conversion_folders import MIXED, sources, to_hf, to_ranks
from safetensors.torch import load_file, save_file

from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion import convert
from ascendspeed.models import param_mapping
from ascendspeed.utils.errors import UserError

FIXTURE = ROOT.parent / "shared" / "fixtures" / "internlm"


def round_trip(folder: Path, tensors: dict[str, torch.Tensor], tp: int, pp: int, tmp: Path) -> None:
    to_ranks(convert.open_reader(folder), tmp / "ranks", tp, pp)
    to_hf(convert.open_reader(tmp / "ranks"), tmp / "back")
    assert same(written(tmp / "back"), tensors)


SOME = [
    (model, kind, *layout)
    for number, (model, kind) in enumerate(zip(MODELS, itertools.cycle(("fp32", "bf16", MIXED))))
    for layout in LAYOUTS[number % 4 :: 4]
]
"""Every model in one type and three layouts, every layout with several models; the next test has them all."""


@pytest.mark.breadth
@pytest.mark.parametrize(("model", "kind", "tp", "pp"), SOME)
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
