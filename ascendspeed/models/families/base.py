"""What a family entry is made of: data only. The fusions and cuts that rows name live in `weights.py`, with torch."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from ascendspeed.config.schema import ModelConfig
from ascendspeed.models.families.rope_config import read_rope, write_rope
from ascendspeed.utils.errors import UserError

Fusion = Literal["one", "qkv", "glu"]
Partition = Literal["replicated", "rows", "columns", "vocab"]
InternEvoModelType = Literal["INTERNLM", "INTERNLM2", "LLAMA2"]
"""Model type of an InternEvo configuration. INTERNLM3, and INTERNLM2 with `enable_qkv_fusion=False`, have the names of LLAMA2."""
REQUIRED = object()
FIELD_TYPES = {f.name: type(f.default) if f.default is not None else int for f in fields(ModelConfig)}
"""Type of every field of `ModelConfig`; those that may be None count something."""


@dataclass(frozen=True)
class ParamMapping:
    """One parameter of the Megatron-core model and the tensors of a checkpoint it is made of.

    `{l}` stands for the layer, `{e}` for the expert.
    """

    megatron_param: str
    """Name in `GPTModel.named_parameters()`."""
    hf_params: tuple[str, ...]
    """Names in the checkpoint: one for each block that `fuse` knows, or one that holds the blocks one after the other."""
    fusion: Fusion = "one"
    """The blocks of `ours`: itself; q, k and v; gate and up (`weights.blocks`)."""
    partition: Partition = "replicated"
    """How tensor parallel cuts `ours`: not at all, along dimension 0, along dimension 1, or 0 with a padded vocabulary."""
    condition: str = ""
    """A boolean of `ModelConfig` without which the model has no such parameter; `!name`: with which it has none."""


@dataclass(frozen=True)
class ConfigMapping:
    """One entry of config.json and the fields of `ModelConfig` that hold its value; null is the same as not there."""

    hf_key: str
    fields: tuple[str, ...]
    """`!name`: a boolean that is true where theirs is false."""
    default: Any = REQUIRED
    written_attribute: str = ""
    """Attribute of `ModelConfig` to write where the field itself may be None."""
    aliases: tuple[str, ...] = ()
    """Other spellings that are read."""


@dataclass(frozen=True)
class LlamaNames:
    """Tensor names in transformers' Llama, for a family that has no class in transformers.

    They are written down apart from `param_mappings`, so that `conversion.verify` has an independent check of the mappings.
    """

    renames: tuple[tuple[str, str], ...] = ()
    """(part of the family's name, part of Llama's name)."""
    fused_qkv: str = ""
    """Module that holds q, k and v in one matrix, such as `attention.wqkv`; empty: three matrices."""
    qkv_order: Literal["consecutive", "grouped"] = "consecutive"
    """Order of its rows: q, k, v one after the other, or [q ..., k, v] for every key/value group."""


@dataclass(frozen=True)
class Family:
    """One model family: presets, `config.json` <-> `ModelConfig`, and tensor names, each read both ways."""

    name: str
    """`model_type` of config.json."""
    architecture: str
    """`architectures[0]` of config.json."""
    config_mappings: tuple[ConfigMapping, ...]
    param_mappings: tuple[ParamMapping, ...]
    presets: Mapping[str, ModelConfig] = field(default_factory=dict)
    """Name of `--model` -> architecture."""
    required_values: Mapping[str, Any] = field(default_factory=dict)
    """What the family always is; another value in a config.json is refused. Of a tuple each is read, the first is written."""
    unsupported: tuple[tuple[Mapping[str, Any], str], ...] = ()
    """Other models of the same `model_type`: what their config.json holds, and why they are refused."""
    implicit_config: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `ModelConfig` that the family always has and no entry of config.json says."""
    rope_spelling: Literal["rotary", "rope_scaling"] = "rope_scaling"
    """How config.json spells the rotary embedding when it is written; every spelling is read."""
    rope_default: Mapping[str, Any] = field(default_factory=dict)
    """The family's rope where config.json says nothing."""
    refused_keys: tuple[str, ...] = ("quantization_config",)
    """Entries of config.json that change what the tensors mean; one that holds something is refused."""
    chat_template: str | None = None
    """Name in `tokenization.chat.templates`; None: the tokenizer decides."""
    tokenizer_class: str | None = None
    """Class of the tokenizer in transformers."""
    requires_tokenizer_class: bool = False
    """True: transformers load `tokenizer_class` whatever tokenizer_config.json names."""
    llama_names: LlamaNames | None = None
    """For a family without a class in transformers."""
    internevo_types: tuple[InternEvoModelType, ...] = ()
    """Model types that InternEvo trains the family as; the first one that can express a model is written. Empty: none."""
    internevo_aliases: tuple[str, ...] = ()
    """`model_type` values of InternEvo configurations that mean this family, where the tensor names are ambiguous."""
    extra_formats: tuple[str, ...] = ()
    """Checkpoint formats that support this family, beyond those that support every family (`hf-llama`, `mindformers`)."""
    ignored_tensors: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)
    """Regular expressions of Hugging Face tensors that carry nothing."""

    @property
    def has_experts(self) -> bool:
        """True for a mixture of experts."""
        return any("{e}" in mapping.megatron_param for mapping in self.param_mappings)

    def mappings_of(
        self, config: ModelConfig, rows: Iterable[ParamMapping] | None = None
    ) -> Iterator[ParamMapping]:
        """Those of the family's rows (or of others) that a model of this configuration has."""
        for row in self.param_mappings if rows is None else rows:
            if not row.condition or bool(
                getattr(config, row.condition.lstrip("!"))
            ) != row.condition.startswith("!"):
                yield row

    def read_config(self, theirs: Mapping[str, Any]) -> ModelConfig:
        """config.json -> ModelConfig. Raises `UserError` for what is missing, of the wrong kind or cannot be expressed."""
        for name, value in (self.required_values | dict.fromkeys(self.refused_keys)).items():
            if theirs.get(name) not in (*_choices(value), None):
                raise UserError(
                    f"config.json: {name} = {theirs[name]!r} is not supported for {self.name}, only {_choices(value)[0]!r}"
                )
        for marks, why in self.unsupported:
            if all(theirs.get(name) == value for name, value in marks.items()):
                raise UserError(f"config.json: {', '.join(f'{n} = {v!r}' for n, v in marks.items())}: {why}")
        values: dict[str, Any] = {}
        for key in self.config_mappings:
            value = self._read_key(key, theirs)
            values |= {name.lstrip("!"): not value if name.startswith("!") else value for name in key.fields}
        check_layer_types(theirs)
        config = ModelConfig(
            family=self.name, **self.implicit_config | values | read_rope(theirs, self.rope_default)
        )
        check_heads(config)
        check_experts(config)
        return config

    def _read_key(self, key: ConfigMapping, theirs: Mapping[str, Any]) -> Any:
        said = {name: theirs[name] for name in (key.hf_key, *key.aliases) if theirs.get(name) is not None}
        value = next(iter(said.values()), None)
        if any(other != value for other in said.values()):
            raise UserError(
                f"config.json: {' and '.join(f'{n} = {v!r}' for n, v in said.items())} contradict each other"
            )
        if value is None:
            if key.default is REQUIRED:
                raise UserError(f"config.json of a model of family {self.name} lacks {key.hf_key!r}")
            return key.default
        kind = FIELD_TYPES[key.fields[0].lstrip("!")]
        if kind is float and type(value) is int and value <= sys.float_info.max:
            value = float(value)
        if type(value) is not kind or (kind is not bool and value <= 0):
            raise UserError(
                f"config.json: {key.hf_key} = {value!r} is not a {'positive ' * (kind is not bool)}{kind.__name__}"
            )
        return value

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """ModelConfig -> config.json, without what only the source knows (token ids, dtype); `read_config` reads it back.

        Raises `UserError` for a configuration that this family's config.json has no words for.
        """
        theirs: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.name}
        theirs |= {name: _choices(value)[0] for name, value in self.required_values.items()}
        for key in self.config_mappings:
            name = key.written_attribute or key.fields[0]
            theirs[key.hf_key] = (
                not getattr(config, name[1:]) if name.startswith("!") else getattr(config, name)
            )
        theirs |= write_rope(config, self.rope_spelling)
        back = self.read_config(theirs)
        lost = [f for f in FIELD_TYPES if f != "family" and getattr(back, f) != getattr(config, f)]
        if lost:
            said = ", ".join(f"{name} = {getattr(config, name)!r}" for name in lost)
            raise UserError(
                f"the config.json of a model of family {self.name} cannot say {said} (it would be read as {_values(back, lost)})"
            )
        return theirs


def override_keys(
    keys: Iterable[ConfigMapping], without: Sequence[str] = (), **defaults: Any
) -> tuple[ConfigMapping, ...]:
    """Another family's keys: without some, and with other defaults (by the words of config.json)."""
    return tuple(
        replace(key, default=defaults[key.hf_key]) if key.hf_key in defaults else key
        for key in keys
        if key.hf_key not in without
    )


def replace_mappings(
    rows: Iterable[ParamMapping], *new: ParamMapping, without: Sequence[str] = ()
) -> tuple[ParamMapping, ...]:
    """Another family's rows: `new` take the place of those of the same parameter; `without` names parameters that are not there."""
    by_name = {row.megatron_param: row for row in new}
    return tuple(by_name.get(row.megatron_param, row) for row in rows if row.megatron_param not in without)


def _choices(fixed: Any) -> tuple[Any, ...]:
    return fixed if isinstance(fixed, tuple) else (fixed,)


def _values(config: ModelConfig, names: Sequence[str]) -> str:
    return ", ".join(repr(getattr(config, name)) for name in names)


def check_heads(config: ModelConfig) -> None:
    """Raises `UserError` for an architecture whose heads do not come out even."""
    heads, groups = config.num_attention_heads, config.kv_heads
    if config.kv_channels is None and config.hidden_size % heads:
        raise UserError(f"hidden size {config.hidden_size} does not split over {heads} attention heads")
    if heads % groups:
        raise UserError(f"{heads} attention heads do not split over {groups} key/value heads")
    if config.head_dim % 2:
        raise UserError(f"heads of width {config.head_dim} cannot be rotated: rope needs an even width")


def check_experts(config: ModelConfig) -> None:
    """Raises `UserError` for experts that cannot be routed to."""
    experts, topk = config.num_experts, config.moe_router_topk
    if experts is None:
        return
    if topk > experts:
        raise UserError(f"a token cannot be sent to {topk} of {experts} experts")
    if topk == 1 and not config.moe_router_pre_softmax:
        raise UserError(
            "one expert per token, whose weight is then always 1, is not supported: its router would learn nothing"
        )


def check_layer_types(theirs: Mapping[str, Any]) -> None:
    """Raises `UserError` where a config.json says that layers do not attend to all that came before."""
    layers = theirs.get("layer_types") or []
    strange = [kind for kind in layers if kind != "full_attention"] if isinstance(layers, list) else [layers]
    if strange:
        raise UserError(f"config.json: layer_types {strange[0]!r} is not supported, only 'full_attention'")


def param_shape(config: ModelConfig, row: ParamMapping) -> tuple[int, ...]:
    """Shape of the full, unpadded parameter that a row describes."""
    h, d, ffn = config.hidden_size, config.head_dim, config.ffn_hidden_size
    if ".experts." in row.megatron_param:
        ffn = config.expert_ffn
    elif ".shared_experts." in row.megatron_param:
        ffn = config.moe_shared_expert_intermediate_size or 0
    module, kind = row.megatron_param.split(".")[-2:]
    q, qkv = config.num_attention_heads * d, (config.num_attention_heads + 2 * config.kv_heads) * d
    shapes = {
        "word_embeddings.weight": (config.vocab_size, h),
        "output_layer.weight": (config.vocab_size, h),
        "linear_qkv.weight": (qkv, h),
        "linear_qkv.bias": (qkv,),
        "linear_proj.weight": (h, q),
        "linear_fc1.weight": (2 * ffn, h),
        "linear_fc1.bias": (2 * ffn,),
        "linear_fc2.weight": (h, ffn),
        "router.weight": (config.num_experts or 0, h),
        "shared_experts.gate_weight": (1, h),
    }
    return shapes.get(f"{module}.{kind}", (h,))  # norms, and biases that are added to the residual stream
