"""Exports with int8 weights and with a static rotary base: other programs load them, and so does this one."""

import json
from dataclasses import replace

import pytest
import torch
from helpers.generation import hf_logprobs
from helpers.quantization import fake_int8
from safetensors.torch import load_file, save_file

from ascendspeed.conversion import convert
from ascendspeed.conversion.formats.base import WriteOptions
from ascendspeed.conversion.formats.registry import format_named, open_reader
from ascendspeed.models import families, param_mapping
from ascendspeed.models.families import FAMILIES
from ascendspeed.utils.errors import UserError

MODEL = replace(
    families.preset("internlm2-tiny"),
    num_layers=2,
    hidden_size=40,
    ffn_hidden_size=54,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=125,
    max_position_embeddings=32,
    rope_scaling_type="dynamic",
    rope_scaling_factor=2.0,
    init_method_std=0.2,
)
"""54 columns: the last int32 of a packed row is not full."""
TEXT = [1, *range(3, 50), 7, 9, 11, 5]


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face directory of `MODEL` in fp32."""
    return written(tmp_path / "source", MODEL)


def written(path, model, dtype=torch.float32):
    path.mkdir()
    tensors = {}
    for parameter in param_mapping.parameters(model):
        full = param_mapping.random_tensor(model, parameter, 1).to(dtype)
        tensors |= param_mapping.megatron_to_hf(model, parameter, full)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(FAMILIES[model.family].write_config(model)))
    return path


def export(folder, target, dtype=None, **options):
    writer = format_named("hf-llama").writer(WriteOptions(**options))
    convert.convert(convert.open_reader(folder), target, writer, dtype)
    return target


def transformers_model(folder, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


def full_tensors(folder):
    return dict(open_reader(folder).tensors())


def rounded(tensors, shift=0):
    return {
        name: fake_int8(tensor, shift) if name.startswith("model.layers.") and tensor.dim() == 2 else tensor
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_transformers_load_compressed_tensors(folder, tmp_path, shard):
    """Logits equal those of rounded weights; control: scales of the neighbouring channels."""
    target = export(folder, tmp_path / "int8", quantize="w8a16", max_shard_size=shard)
    plain = export(folder, tmp_path / "plain")
    packed = transformers_model(target)
    tensors = load_file(plain / "model.safetensors")
    logprobs = hf_logprobs(packed, TEXT)

    def distance(shift) -> float:
        reference = transformers_model(plain)
        reference.load_state_dict(rounded(tensors, shift))
        return float((hf_logprobs(reference, TEXT) - logprobs).abs().max())

    assert distance(0) == 0
    assert distance(1) > 0.1
    assert len(list(target.glob("*.safetensors"))) == (1 if shard == "10GB" else 7)


@pytest.mark.parametrize("layout", ["w8a16", "modelslim-w8a16"])
def test_int8_weights_are_read_back(folder, tmp_path, layout):
    target = export(folder, tmp_path / "int8", quantize=layout)
    plain = full_tensors(export(folder, tmp_path / "plain"))
    tensors = full_tensors(target)
    assert tensors.keys() == plain.keys()
    for name, tensor in tensors.items():
        is_matrix = name.startswith("decoder.layers.") and tensor.dim() == 2
        assert torch.equal(tensor, fake_int8(plain[name]) if is_matrix else plain[name]), name
    again = export(target, tmp_path / "again", quantize=layout)
    for name, tensor in full_tensors(again).items():  # int8 numbers are kept
        assert torch.allclose(tensor, tensors[name], rtol=1e-6), name
    assert "quantization_config" not in json.loads(
        (export(target, tmp_path / "float") / "config.json").read_text()
    )


def test_bf16_is_quantised_by_its_scales(tmp_path):
    """The error of a weight is half a step, with scales in bf16 too; and one in 127 at the ends."""
    source = written(tmp_path / "source", MODEL, torch.bfloat16)
    target = export(source, tmp_path / "int8", quantize="w8a16")
    scales = load_file(target / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert scales[f"{name}_scale"].dtype == torch.bfloat16
    key = "decoder.layers.0.mlp.linear_fc2.weight"
    difference = (full_tensors(target)[key] - full_tensors(source)[key].float()).abs()
    assert float((difference / scales[f"{name}_scale"].float()).max()) < 0.76
    assert float((difference / scales[f"{name}_scale"].float()).mean()) < 0.26


def test_the_layout_of_modelslim(tmp_path):
    """Names, types and shapes of MindIE's document on W8A16; a bias of bf16 is in fp32."""
    model = replace(MODEL, family="internlm", num_query_groups=None, add_qkv_bias=True, add_dense_bias=True)
    source = written(tmp_path / "source", model, torch.bfloat16)
    target = export(source, tmp_path / "int8", quantize="modelslim-w8a16", max_shard_size="20KB")
    tensors = load_file(target / "quant_model_weight_w8a16.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    found = {
        part: (tensors[f"{name}.{part}"].dtype, tuple(tensors[f"{name}.{part}"].shape))
        for part in ("weight", "weight_scale", "weight_offset", "bias")
    }
    assert found == {
        "weight": (torch.int8, (40, 40)),
        "weight_scale": (torch.float32, (40, 1)),
        "weight_offset": (torch.float32, (40, 1)),
        "bias": (torch.float32, (40,)),
    }
    table = json.loads((target / "quant_model_description.json").read_text())
    assert table.pop("model_quant_type") == "W8A16"
    assert table.keys() == tensors.keys()
    assert {kind for key, kind in table.items() if key.startswith(name)} == {"W8A16"}
    assert {table[key] for key in ("lm_head.weight", "model.norm.weight")} == {"FLOAT"}
    assert json.loads((target / "config.json").read_text())["quantize"] == "w8a16"


def test_damaged_int8_weights_are_refused(folder, tmp_path):
    target = export(folder, tmp_path / "int8", quantize="w8a16")
    path = target / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.down_proj.weight"
    for change, message in [
        ({f"{name}_scale": tensors[f"{name}_scale"][1:].clone()}, "_scale is"),
        ({f"{name}_packed": tensors[f"{name}_packed"].long()}, "_packed is"),
        ({f"{name}_zero_point": torch.zeros(1)}, "zero_point"),
    ]:
        save_file(tensors | change, path)
        with pytest.raises(UserError, match=message):
            open_reader(target)
    save_file({key: tensor for key, tensor in tensors.items() if key != f"{name}_scale"}, path)
    with pytest.raises(UserError, match=r"lacks model\.layers\.0\.mlp\.down_proj\.weight_scale"):
        open_reader(target)
    config_json = json.loads((target / "config.json").read_text())
    config_json["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 4
    (target / "config.json").write_text(json.dumps(config_json))
    with pytest.raises(UserError, match="quantization_config"):
        open_reader(target)
    slim = export(folder, tmp_path / "slim", quantize="modelslim-w8a16")
    (slim / "quant_model_description.json").write_text('{"model_quant_type": "W8A8"}')
    with pytest.raises(UserError, match="model_quant_type W8A8 is not supported"):
        open_reader(slim)


# ---------------------------------------------------------------- static rotary base


def test_a_static_base_is_that_of_dynamic_ntk(folder, tmp_path, cpu, capfd):
    """transformers over the export give the logits of this project's dynamic model at that length.

    Control: without --static-rope, one forward pass with a cache is another model.
    """
    from ascendspeed.inference import engine

    length = len(TEXT)
    target = export(folder, tmp_path / "static", static_rope=length)
    assert "dynamic rope scaling" not in capfd.readouterr().err
    config = open_reader(target).config
    assert (config.rope_scaling_type, config.max_position_embeddings) == ("none", length)
    model = engine.load(folder, dtype="fp32", device=cpu)
    expected = engine.token_logprobs(model, [[*TEXT, 9]])[0]  # reads TEXT, whose length sets the base

    def distance(path) -> float:
        reference = transformers_model(path)
        reference.model.rotary_emb.rope_type = "default"  # as programs that ignore dynamic NTK
        logprobs = hf_logprobs(reference, TEXT).gather(1, torch.tensor([*TEXT[1:], 9])[:, None])[:, 0]
        return float((logprobs - expected).abs().max())

    assert distance(target) < 1e-5
    assert distance(export(folder, tmp_path / "dynamic")) > 1e-2


def test_wrong_static_bases_are_refused(folder, tmp_path, caplog):
    caplog.set_level("INFO")
    plain = written(tmp_path / "plain", replace(MODEL, rope_scaling_type="none", rope_scaling_factor=1.0))
    for source, length, message in [
        (folder, 32, "not beyond the trained length of 32"),
        (plain, 64, "this model has none"),
    ]:
        with pytest.raises(UserError, match=message):
            export(source, tmp_path / "out", static_rope=length)
    export(folder, tmp_path / "out")
    assert "right up to the trained 32 tokens only" in caplog.text
