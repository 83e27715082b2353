"""MindFormers: a file that MindSpore itself wrote, and folders renamed as MindFormers' `convert_weight.py`
renames, read back.
"""

import base64
import json
from pathlib import Path

import pytest
import torch
from helpers.mindformers import renamed, value, write_ckpt
from helpers.old_formats import COMMON, FFN, HEADS, HIDDEN, LAYERS, MODELS, VOCAB, hugging_face
from safetensors.torch import load_file
from torch import Tensor

from ascendspeed.conversion import convert
from ascendspeed.conversion.formats.mindformers import reading as mindformers
from ascendspeed.utils.errors import UserError

# save_checkpoint of MindSpore 2.10.0: w (fp32), half.w (fp16), brain (bf16), epoch_num (int32), x (a scalar)
BY_MINDSPORE = (
    "CiwKAXcSJwgCCAMSB0Zsb2F0MzIaGAAAAL8AAIC+AAAAAAAAgD4AAAA/AABAPwolCgZoYWxmLncSGwgCCAMSB0Zsb2F0MTYaDAC4ALQAAAA0ADgAOgolCgVi"
    "cmFpbhIcCAIIAxIIQkZsb2F0MTYaDAC/gL4AAIA+AD9APwoaCgllcG9jaF9udW0SDRIFSW50MzIaBAMAAAAKFAoBeBIPEgdGbG9hdDMyGgQAAMA/"
)
GROUPS = 2


def internlm2() -> dict[str, Tensor]:
    """InternLM2's tensors under its own names."""
    generator, d = torch.Generator().manual_seed(5), HIDDEN // HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.tok_embeddings.weight": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "attention.wqkv.weight": (HIDDEN + 2 * GROUPS * d, HIDDEN),
            layer + "attention.wo.weight": (HIDDEN, HIDDEN),
            layer + "feed_forward.w1.weight": (FFN, HIDDEN),
            layer + "feed_forward.w3.weight": (FFN, HIDDEN),
            layer + "feed_forward.w2.weight": (HIDDEN, FFN),
            layer + "attention_norm.weight": (HIDDEN,),
            layer + "ffn_norm.weight": (HIDDEN,),
        }
    shapes |= {"model.norm.weight": (HIDDEN,), "output.weight": (VOCAB, HIDDEN)}
    return {name: torch.randn(shape, generator=generator).to(torch.float16) for name, shape in shapes.items()}


def apart(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """`--qkv_concat False`: wqkv taken apart by groups of [q..., k, v]."""
    if ".w." not in name:
        return {name: tensor}
    d = HIDDEN // HEADS
    groups = tensor.split(d * (HEADS // GROUPS + 2))
    parts = {"wq": slice(None, -2 * d), "wk": slice(-2 * d, -d), "wv": slice(-d, None)}
    return {
        name.replace(".w.", f".{x}."): torch.cat([group[rows] for group in groups])
        for x, rows in parts.items()
    }


def config_json(folder: Path, family: str) -> None:
    own = (
        {"model_type": "internlm2", "bias": False, "num_key_value_heads": GROUPS}
        if family == "internlm2"
        else MODELS[family]
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(COMMON | own))


def same(folder: Path, tensors: dict[str, Tensor], tmp: Path) -> bool:
    convert.write_hf(convert.open_reader(folder), tmp / "hf", allow_nan=True)
    back = load_file(tmp / "hf/model.safetensors")
    return back.keys() == tensors.keys() and all(
        back[n].dtype == t.dtype and torch.equal(back[n].view(torch.uint8), t.view(torch.uint8))
        for n, t in tensors.items()
    )


def test_a_file_of_mindspore_itself(tmp_path):
    (tmp_path / "x.ckpt").write_bytes(base64.b64decode(BY_MINDSPORE))
    stored = mindformers.read(tmp_path / "x.ckpt")
    expected = torch.tensor([[-0.5, -0.25, 0.0], [0.25, 0.5, 0.75]])
    assert list(stored) == ["w", "half.w", "brain", "x"]
    for name, dtype in (("w", torch.float32), ("half.w", torch.float16), ("brain", torch.bfloat16)):
        assert stored[name].dtype == dtype
        assert torch.equal(stored[name], expected.to(dtype))
    assert stored["x"] == 1.5
    value_of_w = value("w", (2, 3), "Float32", expected.numpy().tobytes())
    assert base64.b64decode(BY_MINDSPORE).startswith(
        value_of_w
    )  # so what the other tests write is the same encoding


@pytest.mark.parametrize("family", ["internlm", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_internlm_and_llama(tmp_path, family, dtype):
    tensors = hugging_face(family, dtype)
    config_json(tmp_path / "mf", family)
    stored = {renamed(name): tensor for name, tensor in tensors.items()}
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    write_ckpt(tmp_path / "mf/model.ckpt", stored | {"adam_m.lm_head.weight": torch.ones(2)})
    assert convert.open_reader(tmp_path / "mf").description == "MindFormers .ckpt"
    assert same(tmp_path / "mf", tensors, tmp_path)


@pytest.mark.parametrize("concat", [True, False])
@pytest.mark.parametrize("pieces", [1, 3])
def test_internlm2_with_and_without_qkv_concat(tmp_path, concat, pieces):
    tensors = internlm2()
    config_json(tmp_path / "mf", "internlm2")
    stored = {renamed(name): tensor for name, tensor in tensors.items()}
    if not concat:
        stored = {new: part for name, tensor in stored.items() for new, part in apart(name, tensor).items()}
    write_ckpt(tmp_path / "mf/model.ckpt", stored, pieces)
    assert (
        convert.open_reader(tmp_path / "mf").description
        == f"MindFormers{', --qkv_concat' if concat else ''} .ckpt"
    )
    assert same(tmp_path / "mf", tensors, tmp_path)


def test_control_another_order_is_seen(tmp_path):
    tensors = internlm2()
    config_json(tmp_path / "mf", "internlm2")
    stored = {}
    for name, tensor in tensors.items():
        parts = apart(renamed(name), tensor)
        stored[renamed(name)] = torch.cat(list(parts.values()))  # w as [q; k; v]
    write_ckpt(tmp_path / "mf/model.ckpt", stored)
    assert not same(tmp_path / "mf", tensors, tmp_path)


def test_what_convert_reversed_leaves_is_a_hugging_face_directory(tmp_path):
    """MindFormers' own way back gives a file of torch under InternLM2's names: it is read as one."""
    tensors = internlm2()
    config_json(tmp_path / "mf", "internlm2")
    torch.save(tensors, tmp_path / "mf/pytorch_model.bin")
    assert same(tmp_path / "mf", tensors, tmp_path)


def test_what_is_not_read_is_said(tmp_path):
    tensors = {renamed(name): tensor for name, tensor in hugging_face("internlm", torch.float16).items()}
    config_json(tmp_path / "mf", "internlm")
    path = tmp_path / "mf/model.ckpt"

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            convert.open_reader(tmp_path / "mf")

    write_ckpt(path, tensors | {"model.layers.0.attention.w_qkv.weight": torch.ones(2, 2)})
    refused(r"w_qkv\.weight: MindFormers has stored these in several orders")
    write_ckpt(path, {name: tensor for name, tensor in tensors.items() if "3.feed_forward.w1" not in name})
    refused(r"lacks model\.layers\.3\.feed_forward\.w1\.weight")
    write_ckpt(path, tensors)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    refused(r"model\.ckpt is damaged, encrypted or no \.ckpt of MindSpore: it ends before byte")
    path.write_bytes(b"\xff" * 40)
    refused("damaged, encrypted or no .ckpt")
    path.write_bytes(b"")
    refused("damaged, encrypted or no .ckpt")
    write_ckpt(path, tensors)
    write_ckpt(tmp_path / "mf/rank_1.ckpt", tensors)
    refused(r"holds 2 \.ckpt files: .* merge the ranks' files")
    (tmp_path / "mf/rank_1.ckpt").unlink()
    (tmp_path / "mf/config.json").write_text(
        json.dumps(COMMON | {"model_type": "qwen2", "num_key_value_heads": 8})
    )
    refused("a model of family qwen2 cannot be read from mindformers, only internlm, internlm2, llama")
