"""Builds the GPT model of this rank and loads weights into it from a stream of full tensors."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from ascendspeed.config.schema import LoraConfig, ModelConfig, ParallelConfig, padded_vocab_size
from ascendspeed.models import param_mapping
from ascendspeed.models.gpt import compiled_layers
from ascendspeed.models.gpt.cross_entropy import cross_entropy
from ascendspeed.models.gpt.layer_spec import GPTConfig, NormHead, block_spec
from ascendspeed.models.gpt.linear import ColumnLinear, InferenceLinear
from ascendspeed.models.gpt.reward_head import RewardHead
from ascendspeed.models.lora import layers as adapters
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import shorten_list

GatherParameter = Callable[[torch.nn.Parameter], AbstractContextManager]
"""Context in which a partitioned parameter is complete."""
WriteShard = Callable[[torch.nn.Parameter, Tensor], object]
"""Writes this rank's shard of a tensor into a parameter."""

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


class GPTLanguageModel(GPTModel):
    """Megatron-core's GPTModel with the loss of `cross_entropy`, scaled embeddings and normalized output
    layers."""

    def __init__(self, config: GPTConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if self.pre_process and config.scale_embeddings:
            self.embedding.register_forward_hook(_Scale(config.hidden_size**0.5, config.params_dtype))
        if self.post_process and config.reward_head:
            self.output_layer = RewardHead(config)
        elif self.post_process:  # megatron-core has no setting for the class of this layer
            self.output_layer.__class__ = NormHead if config.normalize_head else ColumnLinear

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [b, s], logits [s, b, V / TP] -> [b, s]. A reward model's scores take the place of
        losses."""
        if self.config.reward_head:
            return logits.squeeze(-1).t()
        config, group = self.config, self.pg_collection.tp
        loss = cross_entropy(logits, labels.t(), group, config.loss_terms, config.kernels.cross_entropy)
        return loss.t()


def build_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    config: GPTConfig,
    virtual_stage: int | None = None,
    lora: LoraConfig | None = None,
) -> GPTLanguageModel:
    """Builds this rank's part of the model, or one of its virtual stages; `load_weights` writes the weights.

    With `lora` only the adapters require gradients.

    `forward(tokens [b, s], position_ids, None)` gives logits [b, s, padded vocabulary / TP], `forward(...,
    labels=[b, s])` the loss of every token [b, s], computed on vocabulary shards.
    """
    padded = padded_vocab_size(model, parallel)
    stage = {"ignore_virtual": virtual_stage is None, "vp_stage": virtual_stage}
    gpt = GPTLanguageModel(
        config,
        block_spec(config, virtual_stage),
        padded,
        model.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(**stage),
        post_process=parallel_state.is_pipeline_last_stage(**stage),
        position_embedding_type="none",  # RotaryAttention applies the rotary embedding
        share_embeddings_and_output_weights=model.tie_embeddings,
        vp_stage=virtual_stage,
    )
    if gpt.post_process and padded > model.vocab_size and not model.reward_head:
        first = parallel_state.get_tensor_model_parallel_rank() * (
            padded // parallel.tensor_model_parallel_size
        )
        gpt.output_layer.register_forward_hook(_MaskPadding(model.vocab_size, first))
    if lora and lora.lora_rank:
        adapters.attach(gpt, model, lora)
    if config.kernels.layer_compiler:
        compiled_layers.compile_layers(gpt, config.kernels.layer_compiler)
    return gpt


class _Scale:
    """Forward hook: multiplies the output by a factor rounded to the model's dtype, as Hugging Face does."""

    def __init__(self, factor: float, dtype: torch.dtype) -> None:
        self.factor = float(torch.tensor(factor, dtype=dtype))

    def __call__(self, module: torch.nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return output * self.factor


class _MaskPadding:
    """Forward hook: sets the logits of vocabulary padding to -1e9, out of the softmax and of sampling."""

    def __init__(self, vocab_size: int, first: int) -> None:
        self.vocab_size = vocab_size
        self.first = first  # first vocabulary row of this rank

    def __call__(self, module: torch.nn.Module, inputs: tuple, output: tuple[Tensor, Tensor | None]) -> None:
        logits = output[0]
        gathered = logits.size(-1) == module.output_size
        rows = max(0, self.vocab_size - (0 if gathered else self.first))
        if rows < logits.size(-1):
            # In place and hidden from autograd: a copy of the logits or of their gradient would be the
            # largest tensor of the step. The gradient of these rows is zero anyway, as their probability is.
            logits.detach()[..., rows:].fill_(max(-1e9, torch.finfo(logits.dtype).min))


def quantizing_writer(bits: int, *chunks: GPTModel) -> WriteShard:
    """Returns a `WriteShard` that quantises the weights of all linears of the layers as they arrive.

    `bits`: 8 (int8) or 4 (NF4). Embedding, output layer and routers keep their type. Collective under tensor
    parallel.
    """
    modules = [module for gpt in chunks for module in gpt.decoder.layers.modules()]
    linears = {id(module.weight): module for module in modules if isinstance(module, InferenceLinear)}

    def write(parameter: torch.nn.Parameter, shard: Tensor) -> None:
        linear = linears.get(id(parameter))
        if linear is None:
            parameter.copy_(shard)
        elif bits == 4:
            linear.set_nf4_weight(shard)
        else:
            linear.set_int8_weight(shard)

    return write


def named_parameters(gpt: GPTModel) -> dict[str, torch.nn.Parameter]:
    """The parameters by their names in the whole model: layers and experts count from 0 over all ranks."""
    named = {}
    for name, parameter in gpt.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            layer = gpt.decoder.layers[int(parts[2])]
            parts[2] = str(layer.layer_number - 1)
            if "local_experts" in parts:
                at = parts.index("local_experts") + 1
                parts[at] = str(layer.mlp.local_expert_indices[int(parts[at])])
        named[".".join(parts)] = parameter
    return named


def shard_specs(
    model: ModelConfig, parallel: ParallelConfig, lora: LoraConfig | None = None
) -> dict[str, param_mapping.ShardSpec]:
    """Partition of every parameter of the model and of its adapters in this layout."""
    tp, padded = parallel.tensor_model_parallel_size, padded_vocab_size(model, parallel)
    specs = {p.name: p.shard_spec(tp, padded) for p in param_mapping.parameters(model)}
    return specs | adapters.shard_specs(model, parallel, lora or LoraConfig())


@torch.no_grad()
def load_weights(
    chunks: GPTModel | Sequence[GPTModel],
    model: ModelConfig,
    parallel: ParallelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    gather: GatherParameter = lambda parameter: nullcontext(),
    lora: LoraConfig | None = None,
    write: WriteShard = torch.Tensor.copy_,
) -> None:
    """Writes this rank's shard of every (name, full tensor) into the model, or into its virtual stages
    `chunks`.

    `gather` completes a parameter while it is written (ZeRO-3). Raises `UserError` if a parameter gets no
    tensor.
    """
    chunks = chunks if isinstance(chunks, Sequence) else [chunks]
    pending: dict[str, torch.nn.Parameter] = {}
    for chunk in chunks:
        pending |= named_parameters(chunk)
    specs = shard_specs(model, parallel, lora)
    rank = parallel_state.get_tensor_model_parallel_rank()
    for name, full in tensors:
        # A tied output layer on another stage than the embedding holds a copy of it. Other tensors may belong
        # to other stages.
        copies = (EMBEDDING, OUTPUT) if name == EMBEDDING and model.tie_embeddings else (name,)
        for parameter in [pending.pop(copy) for copy in copies if copy in pending]:
            with gather(parameter):
                if parameter.numel():
                    write(parameter, specs[name].shard(full, rank))
    if pending:
        raise UserError(f"the weights lack {shorten_list(sorted(pending), 5)}")
