"""LoRA adapters by the names of Hugging Face's modules: to start from, to merge into weights, to write in other names."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from ascendspeed.checkpoint.load import Checkpoint
from ascendspeed.config.schema import LoraConfig, ModelConfig
from ascendspeed.conversion import weights_identity
from ascendspeed.conversion.checkpoint_reader import CheckpointReader, check_names, from_factory
from ascendspeed.models import param_mapping
from ascendspeed.models.families import FAMILIES, REFERENCE
from ascendspeed.models.families.base import ParamMapping
from ascendspeed.models.lora import targets as adapters
from ascendspeed.models.lora.targets import LoraTarget
from ascendspeed.models.param_mapping import Parameter, Slice2D
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import shorten_list


class Pair(NamedTuple):
    """What is added to one matrix: scale x B A."""

    a: Tensor
    """[rank, inputs]."""
    b: Tensor
    """[outputs, rank]."""
    scale: float

    def delta(self) -> Tensor:
        """[outputs, inputs], fp32: the same operations as peft's, bit for bit."""
        return self.b.float() @ self.a.float() * self.scale


@dataclass(frozen=True)
class Adapter:
    """The adapters of a model."""

    where: Path
    pairs: Mapping[str, Pair]
    """Module of the Hugging Face model, such as model.layers.0.self_attn.q_proj -> its adapter."""
    settings: Mapping[str, Any]
    """What an adapter_config.json says of them."""
    base: str | None = None
    """Where the weights lie that they belong to."""
    fingerprint: str | None = None
    """Of these weights, where it is known."""


def initial(model: ModelConfig, lora: LoraConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Fresh adapters, the same for every layout, by our names: A as peft draws it (uniform to 1 / sqrt(inputs)), B zero."""
    for layer in range(model.num_layers):
        for target in adapters.selected_targets(model, lora):
            name, shape = target.megatron_name("A", layer), target.shape("A", lora.lora_rank)
            generator = torch.Generator().manual_seed(crc32(f"{seed} {name}".encode()))
            bound = 1 / math.sqrt(target.in_features)
            yield name, torch.empty(shape).uniform_(-bound, bound, generator=generator)
            yield target.megatron_name("B", layer), torch.zeros(target.shape("B", lora.lora_rank))


def of_checkpoint(opened: Checkpoint) -> Adapter:
    """The adapters in a training checkpoint, fp32. Raises `UserError` when it has none."""
    model, lora = opened.config, opened.run.lora
    if not lora.lora_rank:
        raise UserError(
            f"{opened.path} holds all weights of a model, no adapters (it was trained without --lora-rank)"
        )
    tensors, pairs = dict(opened.tensors()), {}
    for layer, target in _places(model, adapters.selected_targets(model, lora)):
        a, b = (tensors[target.megatron_name(which, layer)] for which in "AB")
        pairs[target.hf_module.format(l=layer)] = Pair(a, b, lora.lora_alpha / lora.lora_rank)
    settings = {
        "r": lora.lora_rank,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": list(lora.lora_target_modules),
    }
    return Adapter(opened.path, pairs, settings, lora.lora_base, lora.lora_base_fingerprint)


def tensors_of(adapter: Adapter, model: ModelConfig, lora: LoraConfig) -> Iterator[tuple[str, Tensor]]:
    """Its matrices by our names, to train on. Raises `UserError` unless they are those that the run's flags ask for."""
    places = {
        target.hf_module.format(l=layer): (layer, target)
        for layer, target in _places(model, adapters.selected_targets(model, lora))
    }
    check_names(
        adapter.where,
        places,
        adapter.pairs,
        of=f"the adapters of {' '.join(lora.lora_target_modules)} in every layer",
    )
    for name, (layer, target) in places.items():
        pair, scale = adapter.pairs[name], lora.lora_alpha / lora.lora_rank
        if len(pair.a) != lora.lora_rank:
            raise UserError(
                f"{adapter.where}: {name} has rank {len(pair.a)}, but --lora-rank is {lora.lora_rank}; give that one"
            )
        if not math.isclose(pair.scale, scale):
            alpha = f"{pair.scale * lora.lora_rank:g}"
            raise UserError(
                f"{adapter.where}: {name} has an alpha of {alpha}, but --lora-alpha is {lora.lora_alpha:g}; give that one"
            )
        _check_shapes(adapter, name, target)
        yield target.megatron_name("A", layer), pair.a.float()
        yield target.megatron_name("B", layer), pair.b.float()


def merged(source: CheckpointReader, adapter: Adapter) -> CheckpointReader:
    """The weights with the adapters in them, as a source; every tensor is made when it is asked for.

    Each matrix is that of peft's `merge_and_unload`, bit for bit. Raises `UserError` for adapters of another model.
    """
    check_base(adapter, source.path, adapter.fingerprint and weights_identity.sampled(source))
    parameters = _parameters_of(adapter, source.config)

    def make(name: str) -> Tensor:
        parameter = parameters[name]
        full = source.read_block(name, Slice2D(0, 0, 0, 0, *parameter.shape))
        parts = param_mapping.megatron_to_hf(source.config, parameter, full)
        for theirs, part in parts.items():
            if pair := adapter.pairs.get(theirs.removesuffix(".weight")):
                parts[theirs] = (part + pair.delta()).to(part.dtype)
        return param_mapping.hf_to_megatron(source.config, parameter, parts)

    made = from_factory(make)

    def block(name: str, wanted: Slice2D) -> Tensor:
        return (made if name in parameters else source.read_block)(name, wanted)

    return replace(source, description=f"{source.description} with adapters", read_block=block)


def check_base(adapter: Adapter, where: str | Path, fingerprint: str | None) -> None:
    """Raises `UserError` for weights, whose `fingerprint` is given, that are not those which the adapters say they belong to."""
    if adapter.fingerprint not in (None, fingerprint):
        raise UserError(
            f"{where} does not hold the weights that {adapter.where} was trained on"
            f"{f' ({adapter.base})' if adapter.base else ''}: it is another model, or was changed since, as by merging; name those"
        )


def check_targets(adapter: Adapter, model: ModelConfig) -> None:
    """Raises `UserError` for adapters of another model than this."""
    _parameters_of(adapter, model)


def as_llama(adapter: Adapter, model: ModelConfig) -> Adapter:
    """The same function by Llama's names: where one matrix becomes several (wqkv), each gets all of A and its rows of B.

    `base` is None where the modules of these weights have other names than Llama's.
    """
    own = {p.name: p for p in param_mapping.parameters(model)}
    pairs, same = {}, True
    for llama in param_mapping.parameters(model, REFERENCE.param_mappings):
        mine, theirs = own[llama.name].hf_names, llama.hf_names
        found = [adapter.pairs.get(name.removesuffix(".weight")) for name in mine]
        if not any(found):  # no adapters here, or adapters that have these names already
            mine, found = theirs, [adapter.pairs.get(name.removesuffix(".weight")) for name in theirs]
        if len(mine) == 1 < len(theirs):
            a, b, scale = found[0]
            shape = (llama.shape[0], b.shape[1])
            full = param_mapping.hf_to_megatron(model, replace(own[llama.name], shape=shape), {mine[0]: b})
            rows = param_mapping.megatron_to_hf(model, replace(llama, shape=shape), full)
            found = [Pair(a.clone(), rows[name].contiguous(), scale) for name in theirs]
        pairs |= {
            name.removesuffix(".weight"): pair for name, pair in zip(theirs, found, strict=True) if pair
        }
        same &= not any(found) or own[llama.name].hf_names == theirs
    leaves = {name.rpartition(".")[2]: None for name in pairs}
    settings = {**adapter.settings, "target_modules": list(leaves)}
    return replace(adapter, pairs=pairs, settings=settings, base=adapter.base if same else None)


def _places(model: ModelConfig, targets: Sequence[LoraTarget]) -> Iterator[tuple[int, LoraTarget]]:
    for layer in range(model.num_layers):
        for target in targets:
            yield layer, target


def _parameters_of(adapter: Adapter, model: ModelConfig) -> dict[str, Parameter]:
    """Our name -> the parameter, named as the adapters are, of everything that they change."""
    exported = (family.param_mappings for family in FAMILIES.values() if "hf-llama" in family.extra_formats)
    ways: list[Sequence[ParamMapping] | None] = [
        None,
        *dict.fromkeys((REFERENCE.param_mappings, *exported)),
    ]
    found = [
        {t.hf_module.format(l=i): t for i, t in _places(model, adapters.targets_of(model, rows))}
        for rows in ways
    ]
    best = max(range(len(ways)), key=lambda i: len(adapter.pairs.keys() & found[i].keys()))
    if left := sorted(adapter.pairs.keys() - found[best].keys()):
        raise UserError(
            f"{adapter.where} has left over {shorten_list(left)}, which the model ({model.family}) has no matrix for"
        )
    if not adapter.pairs:
        raise UserError(f"{adapter.where} holds no adapters")
    for name in adapter.pairs:
        _check_shapes(adapter, name, found[best][name])
    touched = {name + ".weight" for name in adapter.pairs}
    return {p.name: p for p in param_mapping.parameters(model, ways[best]) if touched & set(p.hf_names)}


def _check_shapes(adapter: Adapter, name: str, target: LoraTarget) -> None:
    a, b, _ = adapter.pairs[name]
    if (a.shape[1], b.shape[0]) != (target.in_features, target.out_features) or a.shape[0] != b.shape[1]:
        raise UserError(
            f"{adapter.where}: A {list(a.shape)} and B {list(b.shape)} of {name} do not fit a matrix of "
            f"{[target.out_features, target.in_features]}: it is another model's"
        )
