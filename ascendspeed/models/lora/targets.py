"""LoRA targets: which matrices of a model can have an adapter, their names and shapes. No torch.

An adapter belongs to one matrix of the Hugging Face model, so that adapter directories of peft map one to
one; several of them (q, k, v) share one linear of Megatron-core. A family with its own tensor names
(InternLM2's wqkv) also accepts Llama's names.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

from ascendspeed.config.pipeline_stages import pipeline_stage_layers
from ascendspeed.config.schema import LoraConfig, ModelConfig, ParallelConfig
from ascendspeed.models.families import FAMILIES, REFERENCE
from ascendspeed.models.families.base import ParamMapping, block_spans, param_shape, span_rows
from ascendspeed.utils.errors import UserError

LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""Linears of a Megatron-core layer that can have adapters."""
MEGATRON_NAMES = {  # current and older Megatron names, each for all matrices of one linear
    **{name: name for name in LINEARS},
    "query_key_value": "linear_qkv",
    "dense": "linear_proj",
    "dense_h_to_4h": "linear_fc1",
    "proj": "linear_fc1",
    "dense_4h_to_h": "linear_fc2",
}
ALL = "all-linear"
VOCABULARY_MODULES = {
    name.removesuffix(".weight")
    for family in FAMILIES.values()
    for mapping in family.param_mappings
    if mapping.partition == "vocab"
    for name in mapping.hf_params
}
"""Embeddings and output layers of all families; their adapters can be merged, but not trained."""

REWARD_PARAMS = {family.reward_param for family in FAMILIES.values() if family.reward_architecture}
"""Hugging Face names of the heads of reward models, which are trained whole beside adapters."""


@dataclass(frozen=True)
class LoraTarget:
    """A matrix of every layer with an adapter: A [rank, in_features] and B [out_features, rank]."""

    mapping: ParamMapping
    """The Megatron-core parameter that the matrix is, or is a block of."""
    hf_module: str
    """Module in the Hugging Face model, such as model.layers.{l}.self_attn.q_proj."""
    in_features: int
    out_features: int

    @property
    def linear(self) -> str:
        """One of LINEARS."""
        return self.mapping.megatron_param.split(".")[-2]

    @property
    def leaf(self) -> str:
        """Last part of the module's name, as --lora-target-modules takes it."""
        return self.hf_module.rpartition(".")[2]

    def megatron_name(self, which: str, layer: int) -> str:
        """Megatron-core name of its A or B in a layer."""
        linear = self.mapping.megatron_param.removesuffix("weight").format(l=layer)
        return f"{linear}lora.{self.leaf}_{which}"

    def shape(self, which: str, rank: int) -> tuple[int, int]:
        """Shape of its A or B."""
        return (rank, self.in_features) if which == "A" else (self.out_features, rank)


def targets_of(model: ModelConfig, mappings: Iterable[ParamMapping] | None = None) -> list[LoraTarget]:
    """Every matrix that can have an adapter, in the model's order, by its family's mappings or by others for
    the same parameters."""
    targets = []
    for mapping in FAMILIES[model.family].mappings_of(model, mappings):
        *_, linear, kind = mapping.megatron_param.split(".")
        if kind != "weight" or linear not in LINEARS or "{e}" in mapping.megatron_param:
            continue
        out_features, in_features = param_shape(model, mapping)
        sizes = block_sizes(model, mapping) if len(mapping.hf_params) > 1 else [out_features]
        for name, size in zip(mapping.hf_params, sizes, strict=True):
            targets.append(LoraTarget(mapping, name.removesuffix(".weight"), in_features, size))
    return targets


def block_sizes(model: ModelConfig, mapping: ParamMapping) -> list[int]:
    """Rows of each block of a parameter: all of them; q, k and v; gate and up."""
    return [span_rows(block) for block in block_spans(model, mapping)]


def naming_schemes(model: ModelConfig) -> Iterator[list[LoraTarget]]:
    """Yields the targets of a model by its family's own names, and by Llama's if these are others."""
    own = targets_of(model)
    yield own
    llama = targets_of(model, REFERENCE.param_mappings)
    if {target.hf_module for target in llama} != {target.hf_module for target in own}:
        yield llama


def selected_targets(model: ModelConfig, lora: LoraConfig) -> list[LoraTarget]:
    """The matrices with an adapter in a run, in the model's order; empty if LoRA is off."""
    if not lora.lora_rank:
        return []
    names = target_names(model, lora.lora_target_modules)
    for targets in naming_schemes(model):
        selected = [target for target in targets if target.leaf in names]
        if len(selected) == len(names):
            return selected
    raise AssertionError(f"no naming scheme has all of {names}")


def target_names(model: ModelConfig, words: Sequence[str]) -> tuple[str, ...]:
    """Resolves --lora-target-modules to names of single matrices, in the model's order.

    Raises `UserError` for an unknown name, and for a mixture of a family's own names and Llama's.
    """
    words = [word for text in words for word in text.split(",") if word]
    schemes = [{target.leaf: target.linear for target in targets} for targets in naming_schemes(model)]
    if not words:
        raise UserError(f"--lora-target-modules names nothing; there are {_choices(schemes)}")
    for names in schemes:
        if all(word == ALL or word in MEGATRON_NAMES or word in names for word in words):
            linears = {MEGATRON_NAMES.get(word) for word in words}
            return tuple(
                name for name, linear in names.items() if ALL in words or name in words or linear in linears
            )
    known = {ALL, *MEGATRON_NAMES}.union(*schemes)
    unknown = [word for word in words if word not in known]
    if unknown:
        raise UserError(
            f"--lora-target-modules {' '.join(unknown)}: no such matrix; there are {_choices(schemes)}"
        )
    raise UserError(
        f"--lora-target-modules {' '.join(words)} mixes two ways to name the matrices; "
        f"use one of {_choices(schemes)}"
    )


def _choices(schemes: Iterable[Iterable[str]]) -> str:
    names = " or ".join(" ".join(scheme) for scheme in schemes)
    return f"{names} (or {ALL}, {' '.join(MEGATRON_NAMES)})"


def parameter_count(model: ModelConfig, lora: LoraConfig, parallel: ParallelConfig | None = None) -> int:
    """Number of adapter parameters of the whole model, or with `parallel` of one tensor- and
    pipeline-parallel rank."""
    tp = parallel.tensor_model_parallel_size if parallel else 1
    widths = 0  # in_features of A + out_features of B on one rank, over the targets of a layer
    for target in selected_targets(model, lora):
        if target.mapping.partition == "columns":
            widths += target.in_features // tp + target.out_features
        else:
            widths += target.in_features + target.out_features // tp
    layers = max(pipeline_stage_layers(model.num_layers, parallel)) if parallel else model.num_layers
    return layers * lora.lora_rank * widths


def trained_count(model: ModelConfig, lora: LoraConfig, parallel: ParallelConfig | None = None) -> int:
    """`parameter_count` and the head of a reward model, which is trained too."""
    return parameter_count(model, lora, parallel) + (model.hidden_size if model.reward_head else 0)


def resolve_config(model: ModelConfig, lora: LoraConfig) -> LoraConfig:
    """The LoRA settings with target modules as single names. Raises `UserError` for unsupported or
    contradictory settings."""
    if not lora.lora_rank:
        typed = [f.name for f in fields(LoraConfig) if getattr(lora, f.name) != getattr(LoraConfig(), f.name)]
        if typed:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in typed)
            raise UserError(f"{flags} without --lora-rank has no effect; add --lora-rank, or leave it out")
        return lora
    if model.num_experts:
        raise UserError(
            f"--lora-rank {lora.lora_rank}: models with experts ({model.family}) cannot have adapters here"
        )
    return replace(lora, lora_target_modules=target_names(model, lora.lora_target_modules))
