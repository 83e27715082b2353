"""Device kernels of inference: attention over a paged KV cache, and the product with an int8 weight."""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

HALF_TYPES = (torch.bfloat16, torch.float16)
"""Number formats of these kernels."""
FLASH_BLOCK, NPU_BLOCK, ANY_BLOCK = 256, 128, 1
"""The block size is a multiple of: flash-attention 2's, the NPU's; FlashAttention 3 takes every size."""
MASK_SIZE = 2048
"""Size of the causal mask of npu_fused_infer_attention_score, whatever the lengths."""


class PagedBatch(NamedTuple):
    """Sequences of a pass, one after the other; each one's queries are the last of its keys."""

    ends: list[int]
    """End of the queries of every sequence; the last one is the number of tokens."""
    key_lengths: list[int]
    """Keys of every sequence."""
    cumulative: Tensor
    """int32 [sequences + 1] on the device: 0, then the ends."""
    lengths: Tensor
    """int32 [sequences] on the device: the key lengths."""
    table: Tensor
    """int32 [sequences, most blocks] on the device: the blocks of every sequence in order, then zeros."""
    longest: int
    """Most queries of a sequence."""

    @classmethod
    def of(
        cls,
        counts: Sequence[int],
        key_lengths: Sequence[int],
        blocks: Sequence[Sequence[int]],
        device: torch.device,
    ) -> "PagedBatch":
        """Batch of sequences with so many queries, keys and blocks."""
        ends = torch.tensor(counts).cumsum(0).tolist()
        table = torch.zeros(len(blocks), max(map(len, blocks)), dtype=torch.int32)
        for row, of_sequence in zip(table, blocks, strict=True):
            row[: len(of_sequence)] = torch.as_tensor(of_sequence)
        integers = functools.partial(torch.tensor, dtype=torch.int32, device=device)
        return cls(
            ends,
            list(key_lengths),
            integers([0, *ends]),
            integers(list(key_lengths)),
            table.to(device),
            max(counts),
        )


@dataclass(frozen=True)
class PagedAttention:
    """Causal attention over a paged cache by a kernel."""

    source: str
    """Package and function, for the log."""
    block_multiple: int
    """The block size of the cache is a multiple of it."""
    kernel: Callable[..., Tensor]

    def __call__(
        self, q: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, scale: float | None
    ) -> Tensor:
        """q [tokens, heads, d], keys and values [blocks, block size, groups, d] -> [tokens, heads, d].

        `scale` None: 1 / sqrt(d).
        """
        return self.kernel(q, keys, values, batch, q.size(-1) ** -0.5 if scale is None else scale)

    def supports(self, dtype: torch.dtype, head_dim: int, block_size: int) -> bool:
        """Returns whether the kernel takes such a cache."""
        fits = head_dim % 8 == 0 and head_dim <= 256
        return dtype in HALF_TYPES and fits and block_size % self.block_multiple == 0


class Int8Linear(NamedTuple):
    """Product with an int8 weight by a kernel."""

    source: str
    kernel: Callable[[Tensor, Tensor, Tensor], Tensor]
    """x [rows, k] in bf16 or fp16, weight int8 [n, k], scale [n] -> x (weight x scale)^T [rows, n]."""


def paged_attention(kind: str, device: torch.device) -> tuple[PagedAttention | None, str]:
    """The kernel of a kind of device if its first result is right on all ranks, and its source; or the reason
    for none. Collective where there is one."""
    kernel = _installed_attention(kind)
    if kernel is None:
        return None, ""
    problem = _from_all_ranks(_attention_problem(kernel, device))
    return (None, f"torch ({kernel.source}: {problem})") if problem else (kernel, kernel.source)


def _installed_attention(kind: str) -> PagedAttention | None:
    if kind == "npu":
        attend = importlib.import_module("torch_npu").npu_fused_infer_attention_score
        return PagedAttention(
            "torch_npu.npu_fused_infer_attention_score", NPU_BLOCK, functools.partial(_npu, attend)
        )
    if kind != "cuda":
        return None
    if importlib.util.find_spec("flash_attn"):
        flash = importlib.import_module("flash_attn").flash_attn_varlen_func
        return PagedAttention(
            "flash_attn.flash_attn_varlen_func", FLASH_BLOCK, functools.partial(_flash, flash)
        )
    # It takes a block table with FlashAttention 3 alone.
    varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    return PagedAttention("torch.nn.attention.varlen", ANY_BLOCK, functools.partial(_torch, varlen))


def int8_linear(kind: str, device: torch.device) -> tuple[Int8Linear | None, str]:
    """The kernel of a kind of device, as `paged_attention`; without one `int8.linear` chooses."""
    kernel = _installed_int8_linear(kind)
    if kernel is None:
        return None, ""
    problem = _from_all_ranks(_int8_problem(kernel, device))
    return (None, f"torch ({kernel.source}: {problem})") if problem else (kernel, kernel.source)


def _installed_int8_linear(kind: str) -> Int8Linear | None:
    if kind != "npu":
        return None
    product = importlib.import_module("torch_npu").npu_weight_quant_batchmatmul

    def multiply(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return product(x, weight.t(), scale)  # the transposed weight is the fast one, by its documents

    return Int8Linear("torch_npu.npu_weight_quant_batchmatmul", multiply)


def _attention_problem(kernel: PagedAttention, device: torch.device) -> str:
    """Compares the kernel with torch's SDPA on two short sequences; returns what is wrong, or ""."""
    generator, size = torch.Generator().manual_seed(1), max(kernel.block_multiple, 16)
    q, keys, values = (
        torch.randn(shape, generator=generator).bfloat16()
        for shape in ((4, 4, 64), (3, size, 2, 64), (3, size, 2, 64))
    )
    batch = PagedBatch.of((3, 1), (size + 5, 7), ((2, 0), (1,)), device)
    expected = attend(q, keys, values, batch)
    return _difference(
        lambda: kernel(q.to(device), keys.to(device), values.to(device), batch, None), expected, 0.03
    )


def _int8_problem(kernel: Int8Linear, device: torch.device) -> str:
    """Compares the kernel with the product of the dequantised weight; returns what is wrong, or ""."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 128, generator=generator).bfloat16()
    weight = torch.randint(-127, 128, (64, 128), generator=generator, dtype=torch.int8)
    scale = (torch.rand(64, generator=generator) / 1000).bfloat16()
    expected = F.linear(x.float(), weight.float() * scale.float()[:, None])
    return _difference(
        lambda: kernel.kernel(x.to(device), weight.to(device), scale.to(device)), expected, 0.03
    )


def _difference(compute: Callable[[], Tensor], expected: Tensor, tolerance: float) -> str:
    """Returns what is wrong with a result: it fails, or differs by more than `tolerance`; or ""."""
    try:
        out = compute().cpu()
    except Exception as error:  # of whatever the kernel, its compiler or the driver refuses
        return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:120]}"
    is_right = torch.allclose(out.float(), expected.float(), rtol=0, atol=tolerance)
    return "" if is_right else "its result differs from torch's"


def _from_all_ranks(problem: str) -> str:
    """The first rank's problem that there is: ranks with and without a kernel would cut the cache into blocks
    of different sizes."""
    if not dist.is_initialized():
        return problem
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next(filter(None, problems), "")


def attend(q: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, scale: float | None = None) -> Tensor:
    """`PagedAttention` in plain torch, one sequence after the other."""
    parts = []
    for row, (end, length) in enumerate(zip(batch.ends, batch.key_lengths, strict=True)):
        query = q[batch.ends[row - 1] if row else 0 : end].transpose(0, 1)
        blocks = batch.table[row].long().to(keys.device)
        k, v = (cached[blocks].flatten(0, 1)[:length].transpose(0, 1) for cached in (keys, values))
        visible = torch.ones(query.size(1), length, dtype=torch.bool, device=q.device)
        visible = visible.tril(length - query.size(1))
        parts.append(F.scaled_dot_product_attention(query, k, v, visible, scale=scale, enable_gqa=True))
    return torch.cat(parts, 1).transpose(0, 1)


def _flash(
    kernel: Callable, q: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, scale: float
) -> Tensor:
    cumulative_keys = F.pad(batch.lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return kernel(
        *(q, keys, values, batch.cumulative, cumulative_keys, batch.longest, max(batch.key_lengths)),
        softmax_scale=scale,
        causal=True,
        block_table=batch.table,
    )


def _torch(
    kernel: Callable, q: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, scale: float
) -> Tensor:
    return kernel(
        *(q, keys, values, batch.cumulative, None, batch.longest, max(batch.key_lengths)),
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=True,
        seqused_k=batch.lengths,
        block_table=batch.table,
        num_splits=1,  # otherwise the other sequences of a pass change the rounding
    )


def _npu(
    kernel: Callable, q: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, scale: float
) -> Tensor:
    attended: tuple[Any, ...] = kernel(
        *(q, keys.flatten(2), values.flatten(2)),
        atten_mask=future_mask(q.device),
        block_table=batch.table,
        block_size=keys.size(1),
        input_layout="TND",
        actual_seq_lengths=batch.ends,
        actual_seq_lengths_kv=batch.key_lengths,
        num_heads=q.size(1),
        num_key_value_heads=keys.size(2),
        scale=scale,
        sparse_mode=3,  # causal, with the last query at the last key
    )
    return attended[0]


@functools.lru_cache(1)
def future_mask(device: torch.device) -> Tensor:
    """bool [MASK_SIZE, MASK_SIZE] for the NPU's causal kernels: True where a key is later than the query."""
    return torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.bool, device=device).triu(1)
