"""LoRA adapters as matrices under Hugging Face module names: initial values, checks against a model, Llama's
names.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from ascendspeed.config.schema import LoraConfig, ModelConfig
from ascendspeed.models import param_mapping
from ascendspeed.models.families import FAMILIES, REFERENCE
from ascendspeed.models.families.base import ParamMapping
from ascendspeed.models.lora.targets import LoraTarget, selected_targets, targets_of
from ascendspeed.models.param_mapping import Parameter
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.name_check import check_names
from ascendspeed.utils.text import shorten_list


class LoraPair(NamedTuple):
    """The two matrices of one adapter; scale x B A is added to the weight."""

    a: Tensor
    """[rank, inputs]."""
    b: Tensor
    """[outputs, rank]."""
    scale: float

    def delta(self) -> Tensor:
        """Product in fp32 [outputs, inputs], by the same operations as peft's, bit for bit."""
        return self.b.float() @ self.a.float() * self.scale


@dataclass(frozen=True)
class LoraAdapter:
    """All adapters of a model."""

    path: Path
    pairs: Mapping[str, LoraPair]
    """Module of the Hugging Face model, such as model.layers.0.self_attn.q_proj -> its matrices."""
    settings: Mapping[str, Any]
    """Entries of an adapter_config.json."""
    base: str | None = None
    """Folder of the base weights."""
    fingerprint: str | None = None
    """Hash of the base weights (`conversion.weights_identity.sampled`), if it is known."""
    chat_template: str | None = None
    """Name of the chat template that the adapters were trained with, if it is known."""
    tokenizer: str | None = None
    """Folder of the tokenizer that they were trained with."""
    training_notes: str | None = None
    """Markdown on their training for the model card."""


def initial_tensors(model: ModelConfig, lora: LoraConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yields new adapters, equal for every layout, under Megatron names: A uniform to 1 / sqrt(inputs), as
    peft's, B zero.
    """
    for layer, target in _in_all_layers(model, selected_targets(model, lora)):
        name = target.megatron_name("A", layer)
        generator = torch.Generator().manual_seed(crc32(f"{seed} {name}".encode()))
        bound = 1 / math.sqrt(target.in_features)
        a = torch.empty(target.shape("A", lora.lora_rank))
        yield name, a.uniform_(-bound, bound, generator=generator)
        yield target.megatron_name("B", layer), torch.zeros(target.shape("B", lora.lora_rank))


def training_tensors(
    adapter: LoraAdapter, model: ModelConfig, lora: LoraConfig
) -> Iterator[tuple[str, Tensor]]:
    """Yields the matrices under Megatron names. Raises `UserError` unless they match the run's flags."""
    targets = {
        target.hf_module.format(l=layer): (layer, target)
        for layer, target in _in_all_layers(model, selected_targets(model, lora))
    }
    modules = " ".join(lora.lora_target_modules)
    check_names(adapter.path, targets, adapter.pairs, of=f"the adapters of {modules} in every layer")
    scale = lora.lora_alpha / lora.lora_rank
    for name, (layer, target) in targets.items():
        pair = adapter.pairs[name]
        if len(pair.a) != lora.lora_rank:
            raise UserError(
                f"{adapter.path}: {name} has rank {len(pair.a)}, but --lora-rank is {lora.lora_rank}; give "
                f"that one"
            )
        if not math.isclose(pair.scale, scale):
            alpha = f"{pair.scale * lora.lora_rank:g}"
            raise UserError(
                f"{adapter.path}: {name} has an alpha of {alpha}, but --lora-alpha is {lora.lora_alpha:g}; "
                f"give that one"
            )
        _check_shapes(adapter, name, target)
        yield target.megatron_name("A", layer), pair.a.float()
        yield target.megatron_name("B", layer), pair.b.float()


def check_base(adapter: LoraAdapter, path: str | Path, fingerprint: str | None) -> None:
    """Raises `UserError` if weights with this `fingerprint` are not the recorded base of the adapters."""
    if adapter.fingerprint not in (None, fingerprint):
        recorded = f" ({adapter.base})" if adapter.base else ""
        raise UserError(
            f"{path} does not hold the weights that {adapter.path} was trained on{recorded}: "
            "it is another model, or was changed since, as by merging; name those"
        )


def changed_parameters(adapter: LoraAdapter, model: ModelConfig) -> dict[str, Parameter]:
    """Megatron name -> parameter, under the adapters' naming, of every parameter that the adapters change.

    Raises `UserError` for adapters of another model.
    """
    exported = (family.param_mappings for family in FAMILIES.values() if "hf-llama" in family.extra_formats)
    schemes: list[Sequence[ParamMapping] | None] = [
        None,
        *dict.fromkeys((REFERENCE.param_mappings, *exported)),
    ]
    targets_by_scheme = []
    for mappings in schemes:
        targets = _in_all_layers(model, targets_of(model, mappings))
        targets_by_scheme.append({target.hf_module.format(l=layer): target for layer, target in targets})
    best = max(range(len(schemes)), key=lambda i: len(adapter.pairs.keys() & targets_by_scheme[i].keys()))
    targets = targets_by_scheme[best]
    unknown = sorted(adapter.pairs.keys() - targets.keys())
    if unknown:
        raise UserError(
            f"{adapter.path} has left over {shorten_list(unknown)}, which the model ({model.family}) has no "
            f"matrix for"
        )
    if not adapter.pairs:
        raise UserError(f"{adapter.path} holds no adapters")
    for name in adapter.pairs:
        _check_shapes(adapter, name, targets[name])
    weights = {f"{name}.weight" for name in adapter.pairs}
    return {p.name: p for p in param_mapping.parameters(model, schemes[best]) if weights & set(p.hf_names)}


def as_llama(adapter: LoraAdapter, model: ModelConfig) -> LoraAdapter:
    """Renames the adapters to Llama's names: if one matrix becomes several (wqkv), each gets all of A and its
    rows of B.

    `base` becomes None if the modules of the base weights have other names than Llama's.
    """
    own_parameters = {p.name: p for p in param_mapping.parameters(model)}
    pairs: dict[str, LoraPair] = {}
    same_names = True
    for llama in param_mapping.parameters(model, REFERENCE.param_mappings):
        own = own_parameters[llama.name]
        by_name = _llama_pairs(adapter, model, own, llama)
        pairs |= by_name
        if by_name and own.hf_names != llama.hf_names:
            same_names = False
    leaves = dict.fromkeys(name.rpartition(".")[2] for name in pairs)
    settings = {**adapter.settings, "target_modules": list(leaves)}
    return replace(adapter, pairs=pairs, settings=settings, base=adapter.base if same_names else None)


def _llama_pairs(
    adapter: LoraAdapter, model: ModelConfig, own: Parameter, llama: Parameter
) -> dict[str, LoraPair]:
    """Adapters of one parameter under Llama's module names."""
    modules = [name.removesuffix(".weight") for name in llama.hf_names]
    own_pairs = [adapter.pairs.get(name.removesuffix(".weight")) for name in own.hf_names]
    if not any(own_pairs):  # no adapters here, or they have Llama's names already
        return {module: adapter.pairs[module] for module in modules if module in adapter.pairs}
    if len(own_pairs) == len(modules):
        return {module: pair for module, pair in zip(modules, own_pairs, strict=True) if pair}
    a, b, scale = next(pair for pair in own_pairs if pair)
    shape = (llama.shape[0], b.shape[1])
    full = param_mapping.hf_to_megatron(model, replace(own, shape=shape), {own.hf_names[0]: b})
    rows = param_mapping.megatron_to_hf(model, replace(llama, shape=shape), full)
    return {
        name.removesuffix(".weight"): LoraPair(a.clone(), rows[name].contiguous(), scale)
        for name in llama.hf_names
    }


def _in_all_layers(model: ModelConfig, targets: Sequence[LoraTarget]) -> Iterator[tuple[int, LoraTarget]]:
    for layer in range(model.num_layers):
        for target in targets:
            yield layer, target


def _check_shapes(adapter: LoraAdapter, name: str, target: LoraTarget) -> None:
    a, b, _ = adapter.pairs[name]
    if (a.shape[1], b.shape[0]) != (target.in_features, target.out_features) or a.shape[0] != b.shape[1]:
        raise UserError(
            f"{adapter.path}: A {list(a.shape)} and B {list(b.shape)} of {name} do not fit a matrix of "
            f"{[target.out_features, target.in_features]}: it is another model's"
        )
