"""Inference model with KV cache under tensor and pipeline parallelism: prefill and decode."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from ascendspeed.checkpoint.discovery import Readers
from ascendspeed.config import schema
from ascendspeed.config.pipeline_stages import pipeline_stage_layers
from ascendspeed.config.schema import (
    KVCacheChoice,
    ModelConfig,
    ParallelConfig,
    QuantizationChoice,
    TrainConfig,
)
from ascendspeed.conversion.checkpoint_reader import CheckpointReader
from ascendspeed.conversion.formats.registry import open_reader
from ascendspeed.distributed import process_groups
from ascendspeed.distributed.device import Device
from ascendspeed.distributed.fused_kernels import Kernels
from ascendspeed.distributed.inference_kernels import PagedAttention
from ascendspeed.distributed.process_groups import ProcessGrid
from ascendspeed.models import families
from ascendspeed.models.gpt import attention, gpt_model
from ascendspeed.models.gpt.int8_cache import bytes_per_head
from ascendspeed.models.gpt.kv_cache import KVCache
from ascendspeed.models.gpt.layer_spec import NormHead, transformer_config
from ascendspeed.models.gpt.linear import ColumnLinear, RowLinear
from ascendspeed.models.gpt.paged_kv_cache import PagedKVCache
from ascendspeed.models.gpt.tree_kv_cache import Segment, TreeKVCache
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import first_line

BLOCK_SIZE = 32
"""Tokens of a block of the paged cache where the device has no kernel with a size of its own."""
PREFILL_CHUNK = 2048
"""Tokens of a row per forward pass of prefill: activations take the memory of one chunk for any prompt
length."""

NAN_MESSAGE = (
    "the model's output is NaN: its weights are damaged, "
    "or the precision (--fp16, --bf16) is too low for them"
)


class CacheOutOfMemory(UserError):
    """Raised when the KV cache does not fit into memory."""


class LanguageModel:
    """This rank's part of a model, its KV cache, and the communication between ranks.

    Every rank calls the same methods in the same order. The weights must not change afterwards.
    """

    def __init__(
        self,
        gpt: gpt_model.GPTLanguageModel,
        model: ModelConfig,
        grid: ProcessGrid,
        device: Device,
        kv_cache_dtype: KVCacheChoice = "auto",
    ) -> None:
        self.has_int8_cache = kv_cache_dtype == "int8"
        self.gpt, self.config, self.grid, self.device = gpt.eval(), model, grid, device
        self.is_first_stage, self.is_last_stage = gpt.pre_process, gpt.post_process
        self.cache: KVCache | PagedKVCache | TreeKVCache | None = None
        self._is_packed = False
        tied = gpt.share_embeddings_and_output_weights
        if self.is_last_stage and isinstance(gpt.output_layer, NormHead) and not tied:
            gpt.output_layer.fold_normalization()

    def allocate_cache(self, rows: int, capacity: int, lengths: Sequence[int]) -> KVCache:
        """Allocates an empty cache for `rows` sequences of `capacity` tokens.

        `lengths`: prompt lengths, which set the RoPE base of every row (one length: of all rows). Raises
        `CacheOutOfMemory`.
        """
        self.free_cache()  # before the allocation, which needs its memory
        self._arrange_weights(packed=rows > 1)
        try:
            self.cache = KVCache(self.gpt, rows, capacity, self.has_int8_cache)
        except (RuntimeError, MemoryError) as error:
            size = rows * capacity * self.cache_bytes_per_token / 2**30
            raise CacheOutOfMemory(
                f"no memory for the keys and values of {rows} sequences of {capacity} tokens, "
                f"{size:.1f} GiB on this rank: choose a smaller --batch-size or --max-new-tokens, "
                f"or use more ranks ({first_line(error)})"
            ) from error
        self.cache.set_rope_lengths(lengths)
        return self.cache

    @property
    def paged_block_size(self) -> int:
        """Tokens of a block of the paged cache: the size of the device's kernel, if it has one."""
        kernel = self.paged_kernel
        return max(BLOCK_SIZE, kernel.block_multiple) if kernel else BLOCK_SIZE

    @property
    def paged_kernel(self) -> PagedAttention | None:
        """The device's kernel over the paged cache; None for a cache in int8, which it cannot read."""
        return None if self.has_int8_cache else self.gpt.config.kernels.paged

    def allocate_paged_cache(self, num_blocks: int, block_size: int) -> PagedKVCache:
        """Allocates a paged cache for the passes of `forward_paged`. Raises `CacheOutOfMemory`."""
        self.free_cache()
        self._arrange_weights(packed=True)
        try:
            self.cache = PagedKVCache(self.gpt, num_blocks, block_size, self.has_int8_cache)
        except (RuntimeError, MemoryError) as error:
            size = num_blocks * block_size * self.cache_bytes_per_token / 2**30
            raise CacheOutOfMemory(
                f"no memory for {size:.1f} GiB of keys and values on this rank: choose a smaller "
                f"--cache-memory, or use more ranks ({first_line(error)})"
            ) from error
        return self.cache

    def begin_tree(self, rope_length: int) -> None:
        """Prepares the passes of `forward_tree` over a tree whose RoPE base is that of `rope_length` (0: the
        model's own)."""
        self.free_cache()
        self._arrange_weights(packed=True)
        self.cache = TreeKVCache(self.gpt, rope_length, self.has_int8_cache)

    def _arrange_weights(self, packed: bool) -> None:
        """Packs the weights of the linears, one after the other, or restores them; a weight exists once.

        The products of one row read plain weights faster. An output layer that is the embedding stays plain.
        """
        if self.gpt.config.kernels.pack_weight is None or packed == self._is_packed:
            return
        self._is_packed = packed
        head = self.gpt.output_layer if self.is_last_stage else None
        for module in self.gpt.modules():
            is_tied = module is head and self.gpt.share_embeddings_and_output_weights
            if isinstance(module, ColumnLinear | RowLinear) and not is_tied:
                module.pack() if packed else module.unpack()

    def free_cache(self) -> None:
        """Frees the KV cache and the attention masks of its length."""
        self.cache = None
        attention.clear_mask_cache()

    def prefill(
        self,
        tokens: Sequence[Sequence[int]],
        first_slot: int = 0,
        positions: Sequence[Sequence[int]] | None = None,
    ) -> list[Tensor]:
        """Runs rows of tokens, sorted by length in descending order, and fills the cache from `first_slot`
        on, in chunks.

        Returns for each row the final hidden states [n, h] at `positions` (ascending indices into the row;
        None: the last one) on the last stage, and [] on the others.
        """
        lengths = [len(row) for row in tokens]
        assert lengths == sorted(lengths, reverse=True)
        positions = [[length - 1] for length in lengths] if positions is None else positions
        hidden_states: list[list[Tensor]] = [[] for _ in tokens]
        for start in range(0, lengths[0], PREFILL_CHUNK):
            end = min(start + PREFILL_CHUNK, lengths[0])
            rows = sum(length > start for length in lengths)
            self.cache.begin_prefill(first_slot + start, end - start, rows)
            hidden = self._forward(_pad(tokens[:rows], start, end).to(self.device.torch))
            if self.is_last_stage:
                for i in range(rows):
                    in_chunk = [position - start for position in positions[i] if start <= position < end]
                    hidden_states[i].append(hidden[in_chunk, i])
        return [torch.cat(chunks) for chunks in hidden_states] if self.is_last_stage else []

    def decode_step(self, tokens: Tensor, slots: Sequence[int]) -> Tensor | None:
        """Runs one token of every row, [n], each at its slot of the cache.

        Returns the final hidden states [n, h] on the last stage, None on the others.
        """
        self.cache.begin_decode(slots)
        hidden = self._forward(tokens[:, None])
        return hidden[0] if self.is_last_stage else None

    def _forward(self, tokens: Tensor) -> Tensor | None:
        """Runs tokens [b, s] through all stages; returns [s, b, h] on the last one."""
        gpt, rank = self.gpt, self.grid.rank
        if self.is_first_stage:
            hidden = gpt.embedding(tokens, None)
        else:
            shape = (tokens.size(1), tokens.size(0), self.config.hidden_size)
            hidden = torch.empty(shape, dtype=gpt.config.params_dtype, device=tokens.device)
            dist.recv(hidden, rank - self.grid.tp)
        for layer in gpt.decoder.layers:
            hidden = self._layer_forward(layer, hidden)
        if not self.is_last_stage:
            dist.send(hidden.contiguous(), rank + self.grid.tp)
            return None
        return gpt.decoder.final_layernorm(hidden)

    def _layer_forward(self, layer: TransformerLayer, hidden: Tensor) -> Tensor:
        """Runs hidden [s, b, h] through a layer with attention over the cache.

        Calls the layer's modules directly: the option checks of Megatron-core's `forward` take a tenth of the
        time of a token.
        """
        attn = layer.self_attention
        query, key, value = attn.get_query_key_value_tensors(layer.input_layernorm(hidden))
        context = self.cache.attend(layer.layer_number, query, key, value, attn.core_attention.scale)
        if len(context) < len(hidden):  # the last layer of `forward_tree`
            hidden = hidden[self.cache.scored]
            if not len(hidden):
                return hidden
        hidden = _add_residual(hidden, attn.linear_proj(context))
        return _add_residual(hidden, layer.mlp(layer.pre_mlp_layernorm(hidden)))

    def forward_paged(self, tokens: Tensor) -> Tensor | None:
        """Runs the tokens [n] of the pass that the paged cache has begun.

        Returns the final hidden states [n, h] on the last stage, None on the others.
        """
        hidden = self._forward(tokens[None])
        return hidden[:, 0] if self.is_last_stage else None

    def forward_tree(self, segments: Sequence[Segment]) -> Tensor | None:
        """Runs segments of a tree, consecutive in depth-first order.

        Returns the final hidden states [n, h] of their scored tokens on the last stage, None on the others.
        """
        self.cache.begin_pass(segments)
        tokens = torch.tensor([[token for segment in segments for token in segment.tokens]])
        hidden = self._forward(tokens.to(self.device.torch))
        return hidden[:, 0] if self.is_last_stage else None

    def logits(self, hidden: Tensor) -> Tensor:
        """Computes logits [n, V] in fp32 over the whole vocabulary from final hidden states [n, h].

        Collective over the tensor-parallel ranks of the last stage.
        """
        weight = None
        if self.gpt.share_embeddings_and_output_weights:
            weight = self.gpt.shared_embedding_or_output_weight()
        logits, _ = self.gpt.output_layer(hidden[:, None], weight=weight, runtime_gather_output=True)
        return logits[:, 0, : self.config.vocab_size].float()

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes per token in this rank's cache."""
        size = bytes_per_head(self.config.head_dim, self.gpt.config.params_dtype, self.has_int8_cache)
        return sum(
            2 * size * layer.self_attention.num_query_groups_per_partition
            for layer in self.gpt.decoder.layers
        )

    @property
    def is_sampling_rank(self) -> bool:
        """True on the rank that chooses tokens and broadcasts them: the first one of the last stage."""
        return self.grid.rank == self.grid.world - self.grid.tp

    def broadcast(self, value: Tensor | None, shape: Sequence[int]) -> Tensor:
        """Returns the sampling rank's tensor (fp64, of `shape`) on every rank.

        Raises `UserError` if it contains NaN.
        """
        result = value
        if self.grid.world > 1:
            if self.is_sampling_rank:
                result = value.contiguous()
            else:
                result = torch.empty(tuple(shape), dtype=torch.float64, device=self.device.torch)
            dist.broadcast(result, self.grid.world - self.grid.tp)
        if result.isnan().any():
            raise UserError(NAN_MESSAGE)
        return result


def _pad(tokens: Sequence[Sequence[int]], start: int, end: int) -> Tensor:
    """Returns columns `start` to `end` of rows as [rows, end - start]; zeros after a short row are masked by
    causality."""
    padded = torch.zeros(len(tokens), end - start, dtype=torch.long)
    for i, row in enumerate(tokens):
        part = row[start:end]
        padded[i, : len(part)] = torch.as_tensor(part)
    return padded


def _add_residual(hidden: Tensor, output: tuple[Tensor, Tensor | None]) -> Tensor:
    """`output`: result of a submodule and the bias that is still to be added to it."""
    out, bias = output
    return hidden + (out if bias is None else out + bias)


def load(
    path: str | Path | CheckpointReader,
    *,
    parallel: ParallelConfig | None = None,
    dtype: str = "bf16",
    device: Device,
    kernels: Kernels | None = None,
    model: str | None = None,
    quantize: QuantizationChoice | None = None,
    kv_cache_dtype: KVCacheChoice = "auto",
) -> LanguageModel:
    """Loads a checkpoint of any format over the TP x PP processes that the launcher started.

    `path`: folder, or the result of `open_reader`; `dtype`: fp32, bf16 or fp16; `model`: preset that the
    weights must have; `quantize`: w8a16 for int8 weights of the layers, quantised as they are read. Raises
    `UserError` for a mismatch before any weight is read.
    """
    layout = parallel or ParallelConfig()
    was_initialized = dist.is_initialized()
    _check_layout(layout, int(os.environ.get("WORLD_SIZE", "1")))
    grid = process_groups.initialize(device, layout, seed=1)
    try:
        reader = path if isinstance(path, CheckpointReader) else open_reader(path, readers=Readers.of(grid))
        _check_model(reader, layout, model)
    except UserError:
        if not was_initialized:
            process_groups.destroy()
        raise
    settings = transformer_config(reader.config, layout, TrainConfig(), dtype, kernels)
    gpt = gpt_model.build_model(reader.config, layout, settings)
    writer = {"write": gpt_model.quantizing_writer(8, gpt)} if quantize else {}
    gpt_model.load_weights(gpt, reader.config, layout, reader.tensors(), **writer)
    return LanguageModel(gpt, reader.config, grid, device, kv_cache_dtype)


def _check_model(reader: CheckpointReader, layout: ParallelConfig, model: str | None) -> None:
    config = reader.config
    if model:
        preset = families.preset(model)
        if not preset.same_function(config):
            raise UserError(f"--model {model} is {preset}, but {reader.path} holds {config}")
    schema.check_tensor_parallel(config, layout.tensor_model_parallel_size)
    pipeline_stage_layers(config.num_layers, layout)


def _check_layout(layout: ParallelConfig, world: int) -> None:
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    supported = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    if layout.layout_key != supported.layout_key:
        raise UserError(
            "generation supports tensor and pipeline parallelism only: do not use sequence_parallel, "
            "virtual stages, context or expert parallelism"
        )
    if world != tp * pp:
        raise UserError(
            f"{world} processes were started for TP {tp} x PP {pp} = {tp * pp}; "
            "start as many, or change --tp or --pp"
        )
