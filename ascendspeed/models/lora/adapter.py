"""LoRA adapters as matrices under Hugging Face module names: initial values, checks against a model, Llama's
names.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from ascendspeed.config.schema import LoraConfig, ModelConfig
from ascendspeed.models import param_mapping
from ascendspeed.models.families import FAMILIES, REFERENCE
from ascendspeed.models.families.base import ParamMapping
from ascendspeed.models.lora.targets import LINEARS, REWARD_PARAMS, LoraTarget, selected_targets
from ascendspeed.models.param_mapping import Parameter, StoredTensor
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.name_check import check_names
from ascendspeed.utils.text import shorten_list


class LoraPair(NamedTuple):
    """The two matrices of one adapter; scale x B A is added to the weight."""

    a: Tensor
    """[rank, inputs]; of an embedding [rank, vocabulary]."""
    b: Tensor
    """[outputs, rank]."""
    scale: float
    magnitude: Tensor | None = None
    """DoRA: norm [outputs] that every output of the merged weight has."""
    of_embedding: bool = False
    """True if the weight is [vocabulary, outputs]: the product is transposed."""

    def delta(self) -> Tensor:
        """Product in fp32 in the shape of the weight, by the same operations as peft's, bit for bit."""
        product = self.b.float() @ self.a.float()
        return (product.T if self.of_embedding else product) * self.scale

    def merged(self, weight: Tensor) -> Tensor:
        """Weight with the adapter in it, in the weight's type, by the same operations as peft's."""
        total = weight + self.delta()
        if self.magnitude is not None:
            norm = torch.linalg.norm(total.T if self.of_embedding else total, dim=1)
            factor = self.magnitude / norm
            total = factor.view((1, -1) if self.of_embedding else (-1, 1)) * total
        return total.to(weight.dtype)


class TokenRows(NamedTuple):
    """Rows of an embedding that were trained by themselves (peft's trainable tokens)."""

    tokens: Tensor
    """Ids [n]."""
    rows: Tensor
    """[n, hidden]."""


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
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    """Name of a Hugging Face tensor -> the whole tensor that replaces it (`modules_to_save`, biases)."""
    scored_token_id: int | None = None
    """Token at which a reward model's score is read, if it is known."""
    token_rows: Mapping[str, TokenRows] = field(default_factory=dict)
    """Embedding module -> its rows that were trained by themselves."""

    def summary(self) -> str:
        """Numbers of adapters and of what was trained beside them, for messages."""
        parts = [f"{len(self.pairs)} adapters"]
        if self.replaced:
            parts.append(f"{len(self.replaced)} whole tensors")
        if self.token_rows:
            parts.append(f"{sum(len(rows.tokens) for rows in self.token_rows.values())} trained rows")
        return ", ".join(parts)

    @property
    def has_reward_head(self) -> bool:
        """True if the adapters belong to a reward model, whose head is a whole tensor."""
        return bool(REWARD_PARAMS & self.replaced.keys())

    def names(self) -> set[str]:
        """Names of the Hugging Face tensors that the adapters change."""
        return {*self.replaced, *(f"{module}.weight" for module in (*self.pairs, *self.token_rows))}

    def applied(self, name: str, tensor: Tensor) -> Tensor:
        """Tensor of this Hugging Face name with the adapters in it, in its own type."""
        module = name.removesuffix(".weight")
        if name in self.replaced:
            tensor = self.replaced[name].to(tensor.dtype)
        if module in self.token_rows:
            tokens, rows = self.token_rows[module]
            tensor = tensor.index_copy(0, tokens, rows.to(tensor.dtype))
        return self.pairs[module].merged(tensor) if module in self.pairs else tensor

    def require_plain(self, action: str) -> None:
        """Raises `UserError` for more than plain LoRA of the linears of the layers and the head of a reward
        model, such as DoRA."""
        more = [
            *sorted(self.replaced.keys() - REWARD_PARAMS),
            *(f"trained rows of {module}" for module in self.token_rows),
        ]
        for module, pair in self.pairs.items():
            if pair.magnitude is not None:
                more.append(f"DoRA of {module}")
            elif pair.of_embedding:
                more.append(f"adapters of {module}")
        if more:
            raise UserError(
                f"{self.path} holds more than plain LoRA ({shorten_list(more, 3)}), which cannot be "
                f"{action}: merge it into its base weights (tools/lora/merge_lora.py)"
            )


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
    adapter.require_plain("trained here")
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
        _check_shapes(adapter, f"{name}.weight", (target.out_features, target.in_features))
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
    names = adapter.names()
    if not names:
        raise UserError(f"{adapter.path} holds no adapters")
    tensors_by_scheme = [_tensors(model, mappings) for mappings in schemes]
    tensors = max(tensors_by_scheme, key=lambda by_name: len(names & by_name.keys()))
    adaptable = {name for name, entry in tensors.items() if _can_have_adapter(entry.parameter)}
    unknown = sorted(names - tensors.keys() | {f"{name}.weight" for name in adapter.pairs} - adaptable)
    if unknown:
        modules = [name.removesuffix(".weight") for name in unknown]
        raise UserError(
            f"{adapter.path} has left over {shorten_list(modules)}, which the model ({model.family}) has no "
            f"matrix for"
        )
    for name in names:
        _check_shapes(adapter, name, tensors[name].shape)
    return {tensors[name].parameter.name: tensors[name].parameter for name in sorted(names)}


def _tensors(model: ModelConfig, mappings: Sequence[ParamMapping] | None) -> dict[str, StoredTensor]:
    """Hugging Face tensors of a model by name."""
    tensors = {}
    for parameter in param_mapping.parameters(model, mappings):
        for entry in param_mapping.stored_tensors(model, parameter):
            tensors[entry.name] = entry
    return tensors


def _can_have_adapter(parameter: Parameter) -> bool:
    """True for the linears of the layers but experts, the embedding and the output layer."""
    *_, module, kind = parameter.mapping.megatron_param.split(".")
    is_linear = module in LINEARS and parameter.expert is None
    return kind == "weight" and (is_linear or parameter.mapping.partition == "vocab")


def as_llama(adapter: LoraAdapter, model: ModelConfig) -> LoraAdapter:
    """Renames the adapters to Llama's names: if one matrix becomes several (wqkv), each gets all of A and its
    rows of B.

    `base` becomes None if the modules of the base weights have other names than Llama's.
    """
    adapter.require_plain("renamed")
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
    base = adapter.base if same_names else None
    heads = dict(zip((REFERENCE.reward_param,), adapter.replaced.values(), strict=False))
    return replace(adapter, pairs=pairs, settings=settings, base=base, replaced=heads)


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
    a, b, scale, *_ = next(pair for pair in own_pairs if pair)
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


def _check_shapes(adapter: LoraAdapter, name: str, shape: tuple[int, ...]) -> None:
    """Raises `UserError` unless the adapters fit a tensor of this name and shape."""
    module = name.removesuffix(".weight")
    if name in adapter.replaced and tuple(adapter.replaced[name].shape) != shape:
        raise UserError(
            f"{adapter.path}: {name} is {list(adapter.replaced[name].shape)}, but that of the model is "
            f"{list(shape)}: it is another model's, or its vocabulary was resized"
        )
    if module in adapter.token_rows:
        tokens, rows = adapter.token_rows[module]
        if tuple(rows.shape) != (len(tokens), shape[1]) or not all(0 <= token < shape[0] for token in tokens):
            raise UserError(
                f"{adapter.path}: {list(rows.shape)} trained rows of {len(tokens)} tokens of {module} do not "
                f"fit a matrix of {list(shape)}: it is another model's"
            )
    if module not in adapter.pairs:
        return
    a, b, _, magnitude, of_embedding = adapter.pairs[module]
    product = (a.shape[1], b.shape[0]) if of_embedding else (b.shape[0], a.shape[1])
    fits = product == tuple(shape) and a.shape[0] == b.shape[1]
    if not fits or (magnitude is not None and tuple(magnitude.shape) != (b.shape[0],)):
        raise UserError(
            f"{adapter.path}: A {list(a.shape)} and B {list(b.shape)} of {module} do not fit a matrix of "
            f"{list(shape)}: it is another model's"
        )
