"""Declarative entry of a model family: config.json and tensor names, each read in both directions. No
torch."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from ascendspeed.config.schema import ModelConfig
from ascendspeed.models.families import quantization_config, reward_head
from ascendspeed.models.families.gguf_names import GgufArchitecture
from ascendspeed.models.families.rope_config import check_rope, read_rope, write_rope
from ascendspeed.utils.errors import UserError

Fusion = Literal["one", "qkv", "glu"]
Partition = Literal["replicated", "rows", "columns", "vocab"]
Span = tuple[int, int]
"""(first row of the full tensor, number of rows)."""
InternEvoModelType = Literal["INTERNLM", "INTERNLM2", "LLAMA2"]
"""Model type of an InternEvo configuration. INTERNLM3, and INTERNLM2 with `enable_qkv_fusion=False`, have the
names of LLAMA2."""
REQUIRED = object()
FIELD_TYPES: dict[str, Any] = {
    f.name: type(f.default) if f.default is not None else int for f in fields(ModelConfig)
}
"""Type of every field of `ModelConfig`; fields that may be None are counts."""

OUTPUT = "output_layer.weight"
UNWRITTEN = ("moe_z_loss_coeff",)
"""Fields of `ModelConfig` for training that no config.json has; they are not written."""


@dataclass(frozen=True)
class ParamMapping:
    """One parameter of the Megatron-core model and the Hugging Face tensors that hold it.

    `{l}` stands for the layer, `{e}` for the expert.
    """

    megatron_param: str
    """Name in `GPTModel.named_parameters()`."""
    hf_params: tuple[str, ...]
    """Names in the checkpoint: one for each block of `fusion`, or a single one that holds the blocks
    consecutively."""
    fusion: Fusion = "one"
    """Blocks of the Megatron-core parameter: itself; q, k and v; gate and up. See `block_spans`."""
    partition: Partition = "replicated"
    """Tensor-parallel cut: none, along dimension 0, along dimension 1, or along a padded vocabulary
    (dimension 0)."""
    condition: str = ""
    """Boolean of `ModelConfig` that the parameter depends on; `!name`: the parameter exists if it is
    false."""


@dataclass(frozen=True)
class ConfigMapping:
    """One entry of config.json and the fields of `ModelConfig` that hold its value; null means absent."""

    hf_key: str
    fields: tuple[str, ...]
    """`!name`: a boolean with the opposite value."""
    default: Any = REQUIRED
    written_attribute: str = ""
    """Attribute of `ModelConfig` to write if the field itself may be None."""
    aliases: tuple[str, ...] = ()
    """Other spellings that are read."""


@dataclass(frozen=True)
class LlamaNames:
    """Tensor names in transformers' Llama, for a family that has no class in transformers.

    They are written down apart from `param_mappings`, so that `conversion.verify` has an independent check of
    the mappings.
    """

    renames: tuple[tuple[str, str], ...] = ()
    """(part of the family's name, part of Llama's name)."""
    fused_qkv: str = ""
    """Module that holds q, k and v in one matrix, such as `attention.wqkv`; empty: three matrices."""
    qkv_order: Literal["consecutive", "grouped"] = "consecutive"
    """Order of its rows: q, k, v one after the other, or [q ..., k, v] for every key/value group."""


@dataclass(frozen=True)
class Family:
    """One model family: presets, `config.json` <-> `ModelConfig`, tensor names, tokenizer, and supported
    formats."""

    name: str
    """`model_type` of config.json."""
    architecture: str
    """`architectures[0]` of config.json."""
    config_mappings: tuple[ConfigMapping, ...]
    param_mappings: tuple[ParamMapping, ...]
    reward_architecture: str | None = None
    """`architectures[0]` of a reward model's config.json; None: the family has no reward models."""
    reward_param: str = "score.weight"
    """Name of a reward model's head in the checkpoint."""
    presets: Mapping[str, ModelConfig] = field(default_factory=dict)
    """Name of `--model` -> architecture."""
    required_values: Mapping[str, Any] = field(default_factory=dict)
    """Values that config.json must have, if present. Every value of a tuple is accepted, the first one is
    written."""
    unsupported: tuple[tuple[Mapping[str, Any], str], ...] = ()
    """Other models of the same `model_type`: values in their config.json, and the reason for refusing
    them."""
    implicit_config: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `ModelConfig` that are constant for the family and have no entry in config.json."""
    rope_spelling: Literal["rotary", "rope_scaling"] = "rope_scaling"
    """Spelling of the rotary embedding in a written config.json; every spelling is read."""
    rope_default: Mapping[str, Any] = field(default_factory=dict)
    """Rotary embedding of a config.json without such entries."""
    refused_keys: tuple[str, ...] = ("quantization_config",)
    """Entries of config.json that change the meaning of the tensors; a value other than null is refused."""
    chat_template: str | None = None
    """Name in `tokenization.chat.templates`; None: the tokenizer decides."""
    tokenizer_class: str | None = None
    """Class of the tokenizer in transformers."""
    requires_tokenizer_class: bool = False
    """True: transformers load `tokenizer_class` whatever tokenizer_config.json names."""
    llama_names: LlamaNames | None = None
    """For a family without a class in transformers."""
    internevo_types: tuple[InternEvoModelType, ...] = ()
    """Model types that InternEvo trains the family as; the first one that can express a model is written.
    Empty: none."""
    internevo_aliases: tuple[str, ...] = ()
    """`model_type` values of InternEvo configurations that mean this family, where the tensor names are
    ambiguous."""
    extra_formats: tuple[str, ...] = ()
    """Checkpoint formats that support this family, beyond those that support every family (`hf-llama`,
    `mindformers`)."""
    gguf_architecture: GgufArchitecture | None = None
    """Architecture of llama.cpp that computes the family; None: it is not written as GGUF."""
    ignored_tensors: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)
    """Regular expressions of Hugging Face tensors that hold no weights."""

    @property
    def has_experts(self) -> bool:
        """True for a mixture of experts."""
        return any("{e}" in mapping.megatron_param for mapping in self.param_mappings)

    def mappings_of(
        self, config: ModelConfig, mappings: Iterable[ParamMapping] | None = None
    ) -> Iterator[ParamMapping]:
        """Yields the family's mappings (or those given) whose parameters a model of this configuration
        has."""
        for mapping in self.param_mappings if mappings is None else mappings:
            negated = mapping.condition.startswith("!")
            if config.reward_head and mapping.megatron_param == OUTPUT:
                name = self.reward_param if mappings is None else Family.reward_param  # transformers' name
                yield ParamMapping(OUTPUT, (name,))
            elif not mapping.condition or bool(getattr(config, mapping.condition.lstrip("!"))) != negated:
                yield mapping

    def read_config(self, config_json: Mapping[str, Any]) -> ModelConfig:
        """config.json -> ModelConfig. Raises `UserError` for missing, ill-typed, contradictory or unsupported
        entries."""
        for name, value in {**self.required_values, **dict.fromkeys(self.refused_keys)}.items():
            if name == quantization_config.KEY and quantization_config.is_w8a16(config_json.get(name)):
                continue
            if config_json.get(name) not in (*_choices(value), None):
                raise UserError(
                    f"config.json: {name} = {config_json[name]!r} is not supported for {self.name}, "
                    f"only {_choices(value)[0]!r}"
                )
        for entries, reason in self.unsupported:
            if all(config_json.get(name) == value for name, value in entries.items()):
                raise UserError(
                    f"config.json: {', '.join(f'{n} = {v!r}' for n, v in entries.items())}: {reason}"
                )
        values: dict[str, Any] = {}
        for mapping in self.config_mappings:
            value = self._read_entry(mapping, config_json)
            for name in mapping.fields:
                values[name.lstrip("!")] = not value if name.startswith("!") else value
        check_layer_types(config_json)
        rope = read_rope(config_json, self.rope_default)
        head = reward_head.read(config_json, self.reward_architecture)
        config = ModelConfig(family=self.name, **{**self.implicit_config, **values, **rope, **head})
        check_heads(config)
        check_experts(config)
        check_rope(config)
        return config

    def _read_entry(self, mapping: ConfigMapping, config_json: Mapping[str, Any]) -> Any:
        spellings = (mapping.hf_key, *mapping.aliases)
        present = {name: config_json[name] for name in spellings if config_json.get(name) is not None}
        value = next(iter(present.values()), None)
        if any(other != value for other in present.values()):
            entries = " and ".join(f"{n} = {v!r}" for n, v in present.items())
            raise UserError(f"config.json: {entries} contradict each other")
        if value is None:
            if mapping.default is REQUIRED:
                raise UserError(f"config.json of a model of family {self.name} lacks {mapping.hf_key!r}")
            return mapping.default
        kind = FIELD_TYPES[mapping.fields[0].lstrip("!")]
        if kind is float and type(value) is int and value <= sys.float_info.max:
            value = float(value)
        may_be_zero = mapping.default == 0.0 and kind is float
        if type(value) is not kind or (kind is not bool and value <= 0 and not (may_be_zero and value == 0)):
            expected = kind.__name__ if kind is bool else f"positive {kind.__name__}"
            raise UserError(f"config.json: {mapping.hf_key} = {value!r} is not a {expected}")
        return value

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """ModelConfig -> config.json, without entries that only the source knows (token ids, dtype).

        `read_config` gives the same configuration again. Raises `UserError` for a configuration that this
        family's config.json cannot express.
        """
        config_json: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.name}
        config_json |= {name: _choices(value)[0] for name, value in self.required_values.items()}
        for mapping in self.config_mappings:
            name = mapping.written_attribute or mapping.fields[0]
            value = getattr(config, name.lstrip("!"))
            config_json[mapping.hf_key] = not value if name.startswith("!") else value
        config_json |= write_rope(config, self.rope_spelling)
        config_json |= reward_head.write(config, self.reward_architecture)
        read_back = self.read_config(config_json)
        written = (f for f in FIELD_TYPES if f not in ("family", *UNWRITTEN))
        lost = [f for f in written if getattr(read_back, f) != getattr(config, f)]
        if lost:
            entries = ", ".join(f"{name} = {getattr(config, name)!r}" for name in lost)
            instead = ", ".join(repr(getattr(read_back, name)) for name in lost)
            raise UserError(
                f"the config.json of a model of family {self.name} cannot express {entries} "
                f"(it would be read as {instead})"
            )
        return config_json


def override_keys(
    mappings: Iterable[ConfigMapping], without: Sequence[str] = (), **defaults: Any
) -> tuple[ConfigMapping, ...]:
    """Another family's config mappings, without some and with other defaults, both given by their key in
    config.json."""
    return tuple(
        replace(mapping, default=defaults.get(mapping.hf_key, mapping.default))
        for mapping in mappings
        if mapping.hf_key not in without
    )


def replace_mappings(
    mappings: Iterable[ParamMapping], *new: ParamMapping, without: Sequence[str] = ()
) -> tuple[ParamMapping, ...]:
    """Another family's mappings; `new` replace those of the same parameter, `without` names parameters to
    leave out."""
    by_name = {mapping.megatron_param: mapping for mapping in new}
    return tuple(
        by_name.get(mapping.megatron_param, mapping)
        for mapping in mappings
        if mapping.megatron_param not in without
    )


def _choices(required: Any) -> tuple[Any, ...]:
    return required if isinstance(required, tuple) else (required,)


def check_heads(config: ModelConfig) -> None:
    """Raises `UserError` for numbers of heads and widths that do not divide each other."""
    heads, groups = config.num_attention_heads, config.kv_heads
    if config.kv_channels is None and config.hidden_size % heads:
        raise UserError(f"hidden size {config.hidden_size} does not split over {heads} attention heads")
    if heads % groups:
        raise UserError(f"{heads} attention heads do not split over {groups} key/value heads")
    if config.head_dim % 2:
        raise UserError(f"heads of width {config.head_dim} cannot be rotated: rope needs an even width")


def check_experts(config: ModelConfig) -> None:
    """Raises `UserError` for a number of experts per token that the router does not support."""
    experts, topk = config.num_experts, config.moe_router_topk
    if experts is None:
        return
    if topk > experts:
        raise UserError(f"a token cannot be sent to {topk} of {experts} experts")
    if topk == 1 and not config.moe_router_pre_softmax:
        raise UserError(
            "one expert per token, whose weight is then always 1, is not supported: "
            "its router would learn nothing"
        )


def check_layer_types(config_json: Mapping[str, Any]) -> None:
    """Raises `UserError` for a config.json with layers that do not attend to all earlier tokens."""
    layers = config_json.get("layer_types") or []
    other = [kind for kind in layers if kind != "full_attention"] if isinstance(layers, list) else [layers]
    if other:
        raise UserError(f"config.json: layer_types {other[0]!r} is not supported, only 'full_attention'")


def param_shape(config: ModelConfig, mapping: ParamMapping) -> tuple[int, ...]:
    """Shape of the full, unpadded Megatron-core parameter."""
    h, d, ffn = config.hidden_size, config.head_dim, config.ffn_hidden_size
    if ".experts." in mapping.megatron_param:
        ffn = config.expert_ffn
    elif ".shared_experts." in mapping.megatron_param:
        ffn = config.moe_shared_expert_intermediate_size or 0
    module, kind = mapping.megatron_param.split(".")[-2:]
    q, qkv = config.num_attention_heads * d, (config.num_attention_heads + 2 * config.kv_heads) * d
    shapes = {
        "word_embeddings.weight": (config.vocab_size, h),
        OUTPUT: (1 if config.reward_head else config.vocab_size, h),
        "linear_qkv.weight": (qkv, h),
        "linear_qkv.bias": (qkv,),
        "linear_proj.weight": (h, q),
        "q_layernorm.weight": (d,),
        "k_layernorm.weight": (d,),
        "linear_fc1.weight": (2 * ffn, h),
        "linear_fc1.bias": (2 * ffn,),
        "linear_fc2.weight": (h, ffn),
        "router.weight": (config.num_experts or 0, h),
        "shared_experts.gate_weight": (1, h),
    }
    return shapes.get(f"{module}.{kind}", (h,))  # norms, and biases that are added to the residual stream


def block_spans(config: ModelConfig, mapping: ParamMapping) -> list[list[Span]]:
    """Blocks of a full parameter, each as spans of its rows: itself; q, k and v; gate and up."""
    rows = param_shape(config, mapping)[0]
    if mapping.fusion == "glu":
        return [[(0, rows // 2)], [(rows // 2, rows // 2)]]
    if mapping.fusion == "qkv":
        groups, d = config.kv_heads, config.head_dim
        q_rows, group_rows = config.num_attention_heads // groups * d, rows // groups
        in_group = ((0, q_rows), (q_rows, d), (q_rows + d, d))
        return [[(i * group_rows + first, count) for i in range(groups)] for first, count in in_group]
    return [[(0, rows)]]


def span_rows(block: Iterable[Span]) -> int:
    """Number of rows of a block."""
    return sum(count for _, count in block)
