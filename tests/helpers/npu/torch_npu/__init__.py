"""Stand-in for torch_npu 2.13 on a CPU: refuses what torch_npu and HCCL refuse, and records calls.

Tensors of the device are CPU tensors: `devices` sends what is meant for "npu" there. Names and limits are
those of the wheel (`torch_npu/npu/__init__.py`, `_op_plugin_docs.py`) and of its HCCL process group.
"""

from collections import Counter

import torch

CALLS: Counter[str] = Counter()
"""Name -> calls: functions of torch.npu, collectives with their type, fused kernels."""
SEQUENCES = 1024
"""Most sequences of the layout TND."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Types of the fused kernels."""

from torch_npu import collectives, devices, npu  # noqa: E402

torch.utils.rename_privateuse1_backend("npu")
torch.npu = npu.module()
devices.install()
collectives.install()


def _check(name: str, *tensors: torch.Tensor) -> None:
    CALLS[f"torch_npu.{name}"] += 1
    if any(tensor.dtype not in DTYPES or tensor.dtype != tensors[0].dtype for tensor in tensors):
        raise RuntimeError(f"{name}: unsupported types {[tensor.dtype for tensor in tensors]}")


def npu_rms_norm(x: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> tuple[torch.Tensor, ...]:
    """(normalised x, reciprocal of its root mean square in fp32)."""
    _check("npu_rms_norm", x, gamma)
    if not 2 <= x.dim() <= 8:
        raise RuntimeError(f"npu_rms_norm: {x.dim()} dimensions are not 2 to 8")
    rstd = x.float().square().mean(-1, keepdim=True).add(epsilon).rsqrt()
    return (x.float() * rstd).to(x.dtype) * gamma, rstd


def npu_rotary_mul(x: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor) -> torch.Tensor:
    """x [s, b, heads, d] rotated by halves; r1 and r2 are cos and sin [s, 1 or b, 1, d]."""
    _check("npu_rotary_mul", x, r1, r2)
    s, b, heads, d = x.shape
    if d >= 896 or d % 2 or b >= 1000 or heads >= 1000:
        raise RuntimeError(f"npu_rotary_mul: the shape {tuple(x.shape)} is not supported")
    if r1.shape not in ((s, 1, 1, d), (s, b, 1, d)) or r1.shape != r2.shape:
        raise RuntimeError(f"npu_rotary_mul: r1 {tuple(r1.shape)} is neither S11D nor SB1D")
    first, second = x.chunk(2, -1)
    return r1 * x + r2 * torch.cat((-second, first), -1)


def npu_swiglu(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """silu(first half) · second half."""
    _check("npu_swiglu", x)
    gate, up = x.chunk(2, dim)
    return torch.nn.functional.silu(gate) * up


def npu_fusion_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_num: int,
    input_layout: str,
    *,
    atten_mask: torch.Tensor,
    scale: float,
    actual_seq_qlen: list[int],
    actual_seq_kvlen: list[int],
    sparse_mode: int,
) -> tuple[torch.Tensor, ...]:
    """Causal attention within each sequence of [tokens, heads, d]: layout TND, sparse mode 3."""
    _check("npu_fusion_attention", query, key, value)
    ends = actual_seq_qlen
    if input_layout != "TND" or sparse_mode != 3:
        raise NotImplementedError("the stand-in has the layout TND with sparse_mode 3 only")
    if atten_mask.shape != (2048, 2048) or atten_mask.dtype not in (torch.bool, torch.uint8):
        raise RuntimeError("npu_fusion_attention: sparse_mode 3 takes a mask of [2048, 2048], bool or uint8")
    if not torch.equal(atten_mask.bool(), torch.ones(2048, 2048, dtype=torch.bool).triu(1)):
        raise RuntimeError("npu_fusion_attention: the mask of sparse_mode 3 is the upper triangle")
    if len(ends) > SEQUENCES:
        raise RuntimeError(f"npu_fusion_attention: {len(ends)} sequences, TND takes at most {SEQUENCES}")
    if ends != actual_seq_kvlen or ends[-1] != len(query) or sorted(ends) != ends:
        raise RuntimeError("npu_fusion_attention: lengths are not the ends of the sequences")
    if query.dtype == torch.float32 or head_num != query.size(1) or query.size(1) % key.size(1):
        raise RuntimeError("npu_fusion_attention: TND takes fp16 and bf16, and heads by groups")
    parts, start = [], 0
    for end in ends:
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
        attend = torch.nn.functional.scaled_dot_product_attention
        parts.append(attend(q, k, v, is_causal=True, scale=scale, enable_gqa=True)[0].transpose(0, 1))
        start = end
    return (torch.cat(parts),)


def npu_fused_infer_attention_score(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    atten_mask: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    input_layout: str,
    actual_seq_lengths: list[int],
    actual_seq_lengths_kv: list[int],
    num_heads: int,
    num_key_value_heads: int,
    scale: float,
    sparse_mode: int,
) -> tuple[torch.Tensor, ...]:
    """Attention [tokens, heads, d] over keys [blocks, block size, groups * d], causal from the last key."""
    _check("npu_fused_infer_attention_score", query, key, value)
    if input_layout != "TND" or sparse_mode != 3 or query.dtype == torch.float32:
        raise NotImplementedError("the stand-in has TND with sparse_mode 3 in half precision only")
    if atten_mask.shape != (2048, 2048) or block_size % 128 or block_size != key.size(1):
        raise RuntimeError("npu_fused_infer_attention_score: mask of [2048, 2048], blocks of 128")
    if block_table.dtype != torch.int32 or actual_seq_lengths[-1] != len(query):
        raise RuntimeError("npu_fused_infer_attention_score: an int32 table, and the ends of the queries")
    parts, start = [], 0
    for row, (end, length) in enumerate(zip(actual_seq_lengths, actual_seq_lengths_kv, strict=True)):
        count = end - start
        pages = block_table[row, : -(-length // block_size)].long()
        k, v = (
            cached[pages].flatten(0, 1)[:length].unflatten(1, (num_key_value_heads, -1)).transpose(0, 1)[None]
            for cached in (key, value)
        )
        q = query[start:end].view(count, num_heads, -1).transpose(0, 1)[None]
        visible = torch.ones(count, length, dtype=torch.bool).tril(length - count)
        attend = torch.nn.functional.scaled_dot_product_attention
        parts.append(attend(q, k, v, visible, scale=scale, enable_gqa=True)[0].transpose(0, 1))
        start = end
    return torch.cat(parts), torch.empty(0)


def npu_weight_quant_batchmatmul(
    x: torch.Tensor, weight: torch.Tensor, antiquant_scale: torch.Tensor
) -> torch.Tensor:
    """x [m, k] · (weight int8 [k, n] · scale [n])."""
    _check("npu_weight_quant_batchmatmul", x, antiquant_scale)
    if weight.dtype != torch.int8 or x.dim() != 2 or weight.dim() != 2 or x.dtype == torch.float32:
        raise RuntimeError("npu_weight_quant_batchmatmul: half precision [m, k] and int8 [k, n]")
    return x @ weight.to(x.dtype) * antiquant_scale
