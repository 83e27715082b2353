"""Builds the GPTModel and fills it: from a stream of full tensors, cut for this rank, whatever the stream's source."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from ascendspeed.config.schema import LoraConfig, ModelConfig, ParallelConfig, padded_vocab_size
from ascendspeed.models import param_mapping
from ascendspeed.models.gpt.cross_entropy import cross_entropy
from ascendspeed.models.gpt.layer_spec import GPTConfig, NormHead, block_spec
from ascendspeed.models.gpt.linear import ColumnLinear
from ascendspeed.models.lora import layers as adapters
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import shorten_list

Gather = Callable[[torch.nn.Parameter], AbstractContextManager]


EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


class GPTLanguageModel(GPTModel):
    """Megatron-core's GPTModel with our loss, and with what some families do to the embeddings and to the output layer."""

    def __init__(self, config: GPTConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if self.pre_process and config.scale_embeddings:
            self.embedding.register_forward_hook(_Scale(config.hidden_size**0.5, config.params_dtype))
        if self.post_process:  # megatron-core does not ask for the class of this layer
            self.output_layer.__class__ = NormHead if config.normalize_head else ColumnLinear

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [b, s], logits [s, b, V / TP] -> [b, s]."""
        return cross_entropy(logits, labels.t(), self.pg_collection.tp).t()


def build_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    config: GPTConfig,
    virtual_stage: int | None = None,
    lora: LoraConfig | None = None,
) -> GPTLanguageModel:
    """This rank's part of the model, or one of the pieces that it has of an interleaved pipeline; weights not yet written (`fill`).

    With `lora` only its adapters are to be trained.

    `forward(tokens [b, s], position_ids, None)` gives logits [b, s, padded vocabulary / TP], `forward(..., labels=[b, s])` the loss
    of every token [b, s], computed on vocabulary shards.
    """
    padded = padded_vocab_size(model, parallel)
    place = {"ignore_virtual": virtual_stage is None, "vp_stage": virtual_stage}
    gpt = GPTLanguageModel(
        config,
        block_spec(config, virtual_stage),
        padded,
        model.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(**place),
        post_process=parallel_state.is_pipeline_last_stage(**place),
        position_embedding_type="none",  # RotaryAttention rotates
        share_embeddings_and_output_weights=model.tie_embeddings,
        vp_stage=virtual_stage,
    )
    if gpt.post_process and padded > model.vocab_size:
        first = parallel_state.get_tensor_model_parallel_rank() * (
            padded // parallel.tensor_model_parallel_size
        )
        gpt.output_layer.register_forward_hook(_MaskPadding(model.vocab_size, first))
    if lora and lora.lora_rank:
        adapters.attach(gpt, model, lora)
    return gpt


class _Scale:
    """Multiplies what a module gives by a number that is first rounded to the model's type, as Hugging Face does."""

    def __init__(self, factor: float, dtype: torch.dtype) -> None:
        self.factor = float(torch.tensor(factor, dtype=dtype))

    def __call__(self, module: torch.nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return output * self.factor


class _MaskPadding:
    """Takes the rows of padding out of the softmax, and out of reach of a sampler: their logits become -1e9."""

    def __init__(self, vocab_size: int, first: int) -> None:
        self.vocab_size, self.first = vocab_size, first  # first row of this rank

    def __call__(self, module: torch.nn.Module, inputs: tuple, output: tuple[Tensor, Tensor | None]) -> None:
        logits = output[0]
        gathered = logits.size(-1) == module.output_size
        rows = max(0, self.vocab_size - (0 if gathered else self.first))
        if rows < logits.size(-1):
            # In place, and unseen by autograd: a copy of the logits or of their gradient would be the largest tensor of the step.
            # What comes back to these rows is zero without it, as their probability is.
            logits.detach()[..., rows:].fill_(max(-1e9, torch.finfo(logits.dtype).min))


def named_parameters(gpt: GPTModel) -> dict[str, torch.nn.Parameter]:
    """The parameters by the names they have in the whole model: layers and experts count from 0 over all ranks."""
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
    """How every parameter of the model, and of its adapters, is cut in this layout."""
    tp, padded = parallel.tensor_model_parallel_size, padded_vocab_size(model, parallel)
    own = {parameter.name: parameter.shard_spec(tp, padded) for parameter in param_mapping.parameters(model)}
    return own | adapters.shard_specs(model, parallel, lora or LoraConfig())


@torch.no_grad()
def load_weights(
    chunks: GPTModel | Sequence[GPTModel],
    model: ModelConfig,
    parallel: ParallelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    gather: Gather = lambda parameter: nullcontext(),
    lora: LoraConfig | None = None,
) -> None:
    """Writes this rank's part of every (name, full tensor) into the model, or into the pieces of it that the rank has.

    `gather` makes a parameter whole for the time of writing (ZeRO-3). Raises `UserError` when a parameter got no tensor.
    """
    chunks = chunks if isinstance(chunks, Sequence) else [chunks]
    mine = {name: parameter for chunk in chunks for name, parameter in named_parameters(chunk).items()}
    cut, rank = shard_specs(model, parallel, lora), parallel_state.get_tensor_model_parallel_rank()
    for name, full in tensors:
        # A tied output layer on another stage than the embedding has a copy of it. What is neither here is another stage's.
        copies = (EMBEDDING, OUTPUT) if name == EMBEDDING and model.tie_embeddings else (name,)
        for parameter in (mine.pop(own) for own in copies if own in mine):
            with gather(parameter):
                if parameter.numel():
                    parameter.copy_(cut[name].shard(full, rank))
    if mine:
        raise UserError(f"the weights lack {shorten_list(sorted(mine))}")
