"""Checkpoints of MindFormers, written by hand."""

from pathlib import Path

import torch
from torch import Tensor

NAMES = {torch.float32: "Float32", torch.float16: "Float16", torch.bfloat16: "BFloat16"}


def varint(number: int) -> bytes:
    return bytes([number % 128 + 128]) + varint(number // 128) if number > 127 else bytes([number])


def field(number: int, data: bytes) -> bytes:
    return varint(number * 8 + 2) + varint(len(data)) + data


def value(tag: str, shape: tuple[int, ...], kind: str, content: bytes) -> bytes:
    tensor = b"".join(b"\x08" + varint(n) for n in shape) + field(2, kind.encode()) + field(3, content)
    return field(1, field(1, tag.encode()) + field(2, tensor))


def write_ckpt(path: Path, tensors: dict[str, Tensor], pieces: int = 1) -> None:
    """Writes a file like `save_checkpoint`; large tensors in `pieces` of any length."""
    with open(path, "wb") as file:
        for tag, tensor in tensors.items():
            raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            step = -(-len(raw) // pieces) | 1
            for at in range(0, len(raw), step):
                file.write(value(tag, tuple(tensor.shape), NAMES[tensor.dtype], raw[at : at + step]))
        file.write(value("epoch_num", (), "Int32", b"\x03\0\0\0"))


def renamed(name: str) -> str:
    """Renames like the converters of internlm, internlm2 and llama."""
    for hf_name, ours in (
        ("embed_tokens.weight", "tok_embeddings.embedding_weight"),
        ("tok_embeddings.weight", "tok_embeddings.embedding_weight"),
        (".self_attn.q_proj.", ".attention.wq."),
        (".self_attn.k_proj.", ".attention.wk."),
        (".self_attn.v_proj.", ".attention.wv."),
        (".self_attn.o_proj.", ".attention.wo."),
        (".mlp.gate_proj.", ".feed_forward.w1."),
        (".mlp.down_proj.", ".feed_forward.w2."),
        (".mlp.up_proj.", ".feed_forward.w3."),
        (".input_layernorm.", ".attention_norm."),
        (".post_attention_layernorm.", ".ffn_norm."),
        ("wqkv", "w"),
        (".norm.", ".norm_out."),
        ("output", "lm_head"),
    ):
        name = name.replace(hf_name, ours)
    return name
