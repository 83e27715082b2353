"""A model to ask: its weights on the ranks of this run, and forward passes through all of them with a cache of keys and values."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from ascendspeed.checkpoint.discovery import Readers
from ascendspeed.config import schema
from ascendspeed.config.schema import ModelConfig, ParallelConfig, TrainConfig
from ascendspeed.conversion.checkpoint_reader import CheckpointReader
from ascendspeed.conversion.formats.registry import open_reader
from ascendspeed.distributed import process_groups as ranks
from ascendspeed.distributed.device import Device
from ascendspeed.distributed.fused_kernels import Kernels
from ascendspeed.distributed.process_groups import ProcessGrid
from ascendspeed.models import families
from ascendspeed.models.gpt import attention
from ascendspeed.models.gpt import gpt_model as gpts
from ascendspeed.models.gpt.kv_cache import KVCache
from ascendspeed.models.gpt.layer_spec import NormHead, transformer_config
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import first_line

PREFILL_CHUNK = 2048
"""Tokens of a row that go through the model at a time: beside the cache, memory is that of one chunk, however long a prompt is."""


class CacheOutOfMemory(UserError):
    """The cache does not fit."""


class LanguageModel:
    """This rank's part of a model, whose weights are its own and stay as they are, and what goes from rank to rank."""

    def __init__(
        self, gpt: gpts.GPTLanguageModel, model: ModelConfig, grid: ProcessGrid, device: Device
    ) -> None:
        self.gpt, self.config, self.grid, self.device = gpt.eval(), model, grid, device
        self.is_first_stage, self.is_last_stage = gpt.pre_process, gpt.post_process
        self.cache: KVCache | None = None
        if (
            self.is_last_stage
            and isinstance(gpt.output_layer, NormHead)
            and not gpt.share_embeddings_and_output_weights
        ):
            gpt.output_layer.fold_normalization()

    def allocate_cache(self, rows: int, capacity: int, lengths: Sequence[int]) -> KVCache:
        """An empty cache for `rows` sequences of `capacity` tokens; `lengths` of the prompts fix the rope (one: of all rows)."""
        self.free_cache()  # first: its memory is needed
        try:
            self.cache = KVCache(self.gpt, rows, capacity)
        except (RuntimeError, MemoryError) as error:
            size = rows * capacity * self._token_bytes / 2**30
            raise CacheOutOfMemory(
                f"no memory for the keys and values of {rows} sequences of {capacity} tokens, {size:.1f} GiB on this rank: take a "
                f"smaller --batch-size or --max-new-tokens, or more ranks ({first_line(error)})"
            ) from error
        self.cache.set_rope_lengths(lengths)
        return self.cache

    def free_cache(self) -> None:
        """Frees the cache, and what else was kept for a text of its length."""
        self.cache = None
        attention.clear_mask_cache()

    def prefill(
        self, tokens: Sequence[Sequence[int]], first: int = 0, wanted: Sequence[Sequence[int]] | None = None
    ) -> list[Tensor]:
        """Reads rows, longest first, into the cache from slot `first` on, chunk by chunk.

        `wanted`: positions in each row, rising; None: the last one. Returns for each row the final hidden states there, [n, h], on
        the last stage (elsewhere []).
        """
        lengths = [len(row) for row in tokens]
        assert lengths == sorted(lengths, reverse=True)
        wanted = [[length - 1] for length in lengths] if wanted is None else wanted
        found: list[list[Tensor]] = [[] for _ in tokens]
        for start in range(0, lengths[0], PREFILL_CHUNK):
            end = min(start + PREFILL_CHUNK, lengths[0])
            rows = sum(length > start for length in lengths)
            piece = torch.zeros(
                rows, end - start, dtype=torch.long
            )  # short rows end in zeros, which nobody sees
            for i, row in enumerate(tokens[:rows]):
                part = row[start:end]
                piece[i, : len(part)] = torch.as_tensor(part)
            self.cache.begin_prefill(first + start, end - start, rows)
            hidden = self._forward(piece.to(self.device.torch))
            if self.is_last_stage:
                for i in range(rows):
                    here = [position - start for position in wanted[i] if start <= position < end]
                    found[i].append(hidden[here, i])
        return [torch.cat(parts) for parts in found] if self.is_last_stage else []

    def decode_step(self, tokens: Tensor, slots: Sequence[int]) -> Tensor | None:
        """One token of every row, [n], each at its slot -> the final hidden states [n, h] on the last stage."""
        self.cache.begin_decode(slots)
        hidden = self._forward(tokens[:, None])
        return hidden[0] if self.is_last_stage else None

    def _forward(self, tokens: Tensor) -> Tensor | None:
        """tokens [b, s] through all stages -> [s, b, h] on the last one."""
        gpt, rank = self.gpt, self.grid.rank
        hidden = None
        if self.is_first_stage:
            hidden = gpt.embedding(tokens, None)
        else:
            hidden = torch.empty(
                tokens.size(1),
                tokens.size(0),
                self.config.hidden_size,
                dtype=gpt.config.params_dtype,
                device=tokens.device,
            )
            dist.recv(hidden, rank - self.grid.tp)
        for layer in gpt.decoder.layers:
            hidden = self._layer_forward(layer, hidden)
        if not self.is_last_stage:
            dist.send(hidden.contiguous(), rank + self.grid.tp)
            return None
        return gpt.decoder.final_layernorm(hidden)

    def _layer_forward(self, layer: TransformerLayer, hidden: Tensor) -> Tensor:
        """hidden [s, b, h] through a layer whose attention is the cache's.

        Megatron-core's own way through the same modules asks at every token what could be otherwise: a tenth of the time.
        """
        own = layer.self_attention
        query, key, value = own.get_query_key_value_tensors(layer.input_layernorm(hidden))
        seen = self.cache.attend(layer.layer_number, query, key, value, own.core_attention.scale)
        hidden = _add(hidden, own.linear_proj(seen))
        return _add(hidden, layer.mlp(layer.pre_mlp_layernorm(hidden)))

    def logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states [n, h] -> logits over the whole vocabulary [n, V], fp32; on every rank of the last stage."""
        weight = (
            self.gpt.shared_embedding_or_output_weight()
            if self.gpt.share_embeddings_and_output_weights
            else None
        )
        return self.gpt.output_layer(hidden[:, None], weight=weight, runtime_gather_output=True)[0][
            :, 0, : self.config.vocab_size
        ].float()

    @property
    def _token_bytes(self) -> int:
        """That a token takes in this rank's cache."""
        size = self.config.head_dim * self.gpt.config.params_dtype.itemsize
        return sum(
            2 * size * layer.self_attention.num_query_groups_per_partition
            for layer in self.gpt.decoder.layers
        )

    @property
    def is_sampling_rank(self) -> bool:
        """Whether this rank is the one that chooses."""
        return self.grid.rank == self.grid.world - self.grid.tp

    def broadcast(self, value: Tensor | None, shape: Sequence[int]) -> Tensor:
        """What the choosing rank has (fp64), on all of them. Raises `UserError` on all of them when there is a NaN in it."""
        told = value
        if self.grid.world > 1:
            told = (
                value.contiguous()
                if self.is_sampling_rank
                else torch.empty(tuple(shape), dtype=torch.float64, device=self.device.torch)
            )
            dist.broadcast(told, self.grid.world - self.grid.tp)
        if told.isnan().any():
            raise UserError(
                "the model gives NaN: its weights are broken, or its precision (--fp16, --bf16) is too low for them"
            )
        return told


def _add(hidden: Tensor, more: tuple[Tensor, Tensor | None]) -> Tensor:
    """`more`: what a part of a layer gives, and a bias still to be added to it."""
    out, bias = more
    return hidden + (out if bias is None else out + bias)


def load(
    path: str | Path | CheckpointReader,
    *,
    parallel: ParallelConfig | None = None,
    dtype: str = "bf16",
    device: Device,
    kernels: Kernels | None = None,
    model: str | None = None,
) -> LanguageModel:
    """The model of a checkpoint of any format, over the TP x PP processes that the launcher started.

    `path`: its folder, or what `formats.open_reader` gave. `dtype` fp32, bf16 or fp16; `model`: the preset that it is said to be.
    Raises `UserError` for what does not fit, before weights are read.
    """
    layout, joined = parallel or ParallelConfig(), dist.is_initialized()
    _check_layout(layout, int(os.environ.get("WORLD_SIZE", "1")))
    grid = ranks.initialize(device, layout, seed=1)
    try:
        source = path if isinstance(path, CheckpointReader) else open_reader(path, readers=Readers.of(grid))
        _check_model(source, layout, model)
    except UserError:
        if not joined:
            ranks.destroy()
        raise
    settings = transformer_config(source.config, layout, TrainConfig(), dtype, kernels)
    gpt = gpts.build_model(source.config, layout, settings)
    gpts.load_weights(gpt, source.config, layout, source.tensors())
    return LanguageModel(gpt, source.config, grid, device)


def _check_model(source: CheckpointReader, layout: ParallelConfig, model: str | None) -> None:
    if model and replace(families.preset(model), init_method_std=0.0) != replace(
        source.config, init_method_std=0.0
    ):
        raise UserError(
            f"--model {model} is {families.preset(model)}, but {source.where} holds {source.config}"
        )
    schema.check_tensor_parallel(source.config, layout.tensor_model_parallel_size)
    schema.check_pipeline_parallel(source.config, layout.pipeline_model_parallel_size)


def _check_layout(layout: ParallelConfig, world: int) -> None:
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    generates = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    if layout.layout_key != generates.layout_key:
        raise UserError(
            "generation shares layers (TP) and the stack of them (PP) only: leave sequence_parallel, virtual stages, context and "
            "expert parallel out"
        )
    if world != tp * pp:
        raise UserError(
            f"{world} processes were started for TP {tp} x PP {pp} = {tp * pp}; start as many, or change --tp or --pp"
        )
