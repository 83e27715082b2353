"""Checks that tensor names and shapes match config.json; mismatches are reported with the keys of
config.json. No torch.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from ascendspeed.config.schema import ModelConfig
from ascendspeed.models.families import FAMILIES, Family

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
FUSED_EXPERTS = (".experts.gate_up_proj", ".experts.down_proj")
"""Tensors that hold all experts of a layer, as transformers 5 keep them in memory; `save_pretrained` splits
them.
"""
SIZES = (
    ("hidden_size", "final_layernorm.weight", 0),
    ("hidden_size", "input_layernorm.weight", 0),
    ("vocab_size", "word_embeddings.weight", 0),
    ("ffn_hidden_size", "linear_fc2.weight", 1),
    ("moe_ffn_hidden_size", "linear_fc2.weight", 1),
    ("moe_shared_expert_intermediate_size", "linear_fc2.weight", 1),
)
"""Field of `ModelConfig`, suffix of a Megatron-core name, and the dimension of the stored tensor that equals
the field.
"""
EXPERT_MODULES = {
    "moe_ffn_hidden_size": ".experts.",
    "moe_shared_expert_intermediate_size": ".shared_experts.",
}
IMPLICIT_KEYS = {
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "moe_ffn_hidden_size": "intermediate_size",
}
"""Keys for fields that some families leave out: as many key/value heads as heads, heads of hidden size /
heads.
"""


class ConfigSource(NamedTuple):
    """Origin of the values of a configuration."""

    family: Family
    config_json: Mapping[str, Any] | None
    """The file, to tell its values from defaults; None: unknown."""


class TensorInventory(NamedTuple):
    """Layers, experts and shapes of the stored tensors."""

    layers: int
    experts: int
    shapes: Mapping[str, Shapes]
    """Megatron-core name with {l} and {e} -> stored names and shapes of the first layer and expert that has
    it.
    """


def config_mismatches(
    config: ModelConfig, shapes: Shapes, config_json: Mapping[str, Any] | None = None
) -> list[str]:
    """Returns a line for each mismatch between `config`, as read from `config_json`, and tensors of these
    names and shapes.

    Empty if shapes cannot tell (the number of heads, if each is hidden size / heads wide), and if no tensor
    is known at all.
    """
    fused = next((name for name in shapes if name.endswith(FUSED_EXPERTS)), None)
    if fused:
        return [
            f"{fused} holds all experts of a layer, as transformers 5 keep them in memory: write the model "
            f"by save_pretrained"
        ]
    family = FAMILIES[config.family]
    inventory = _inventory(family, shapes)
    if not inventory.shapes:
        return []
    source = ConfigSource(family, config_json)
    return [
        *_count_mismatches(source, config, inventory),
        *_switch_mismatches(source, config, inventory),
        *_size_mismatches(source, config, inventory),
    ]


def _inventory(family: Family, shapes: Shapes) -> TensorInventory:
    """Sorts the tensors by all mappings of the family, including those that `config` switches off."""
    patterns = [
        (mapping.megatron_param, _pattern(name))
        for mapping in family.param_mappings
        for name in mapping.hf_params
    ]
    layers: set[int] = set()
    experts: set[int] = set()
    by_position: dict[str, dict[tuple[int, int], dict[str, Shape]]] = defaultdict(lambda: defaultdict(dict))
    for name, shape in shapes.items():
        for megatron_param, pattern in patterns:
            match = pattern.fullmatch(name)
            if not match:
                continue
            numbers = {letter: int(number) for letter, number in match.groupdict().items()}
            if "l" in numbers:
                layers.add(numbers["l"])
            if "e" in numbers:
                experts.add(numbers["e"])
            position = numbers.get("l", 0), numbers.get("e", 0)
            by_position[megatron_param][position][name] = tuple(shape)
    first = {name: positions[min(positions)] for name, positions in by_position.items()}
    return TensorInventory(max(layers, default=-1) + 1, max(experts, default=-1) + 1, first)


def _pattern(name: str) -> re.Pattern[str]:
    escaped = re.escape(name).replace(r"\{l\}", r"(?P<l>\d{1,6})").replace(r"\{e\}", r"(?P<e>\d{1,6})")
    return re.compile(escaped)


def _count_mismatches(source: ConfigSource, config: ModelConfig, inventory: TensorInventory) -> Iterator[str]:
    for field, count, noun in (
        ("num_layers", inventory.layers, "layers"),
        ("num_experts", inventory.experts, "experts"),
    ):
        if count and count != getattr(config, field):
            yield f"{_states(source, field, getattr(config, field))}, but the tensors have {count} {noun}"


def _switch_mismatches(
    source: ConfigSource, config: ModelConfig, inventory: TensorInventory
) -> Iterator[str]:
    """Tensors whose presence contradicts a boolean; each key of config.json is reported once."""
    reported = set()
    expected_mappings = tuple(source.family.mappings_of(config))
    for mapping in source.family.param_mappings:
        field = mapping.condition.lstrip("!")
        key = _config_key(source.family, field)
        is_expected = mapping in expected_mappings
        is_present = mapping.megatron_param in inventory.shapes
        if field and is_expected != is_present and key not in reported:
            reported.add(key)
            name = mapping.hf_params[0].format(l=0, e=0)
            article = "no" if is_expected else "a"
            yield f"{_states(source, field, getattr(config, field))}, but the tensors have {article} {name}"


def _size_mismatches(source: ConfigSource, config: ModelConfig, inventory: TensorInventory) -> Iterator[str]:
    """Wrong widths; each check assumes the widths that the tensors showed before, so that one error is
    reported once.
    """
    stated_head_dim = config.head_dim
    for field, suffix, dimension in SIZES:
        names = (name for name in inventory.shapes if name.endswith(suffix) and _is_module_of(field, name))
        megatron_param = next(names, None)
        if megatron_param is None:
            continue
        name, shape = next(iter(inventory.shapes[megatron_param].items()))
        stated = getattr(config, field) or config.expert_ffn
        if len(shape) > dimension and shape[dimension] != stated:
            yield f"{_states(source, field, stated)}, but {name} is {list(shape)}"
            config = replace(config, **{field: shape[dimension]})
    yield from _head_mismatches(source, config, inventory, {stated_head_dim, config.head_dim})


def _is_module_of(field: str, megatron_param: str) -> bool:
    """True if a field is the width of the parameter's module: the MLP, an expert or the shared expert."""
    module = EXPERT_MODULES.get(field)
    if module:
        return module in megatron_param
    return not any(module in megatron_param for module in EXPERT_MODULES.values())


def _head_mismatches(
    source: ConfigSource, config: ModelConfig, inventory: TensorInventory, head_dims: set[int]
) -> Iterator[str]:
    """Compares heads: the output projection is as wide as all query heads; the other rows of q, k and v are
    two sets of k/v heads.

    `head_dims`: by config.json, and by the hidden size of the tensors if that is another one.
    """
    output = _shapes_of(inventory, "self_attention.linear_proj.weight")
    fused = _shapes_of(inventory, "self_attention.linear_qkv.weight")
    if not output or not fused or any(len(shape) != 2 for shape in (*output.values(), *fused.values())):
        return
    heads, kv_heads, d = config.num_attention_heads, config.kv_heads, config.head_dim
    q_rows = next(iter(output.values()))[1]
    kv_rows = (sum(shape[0] for shape in fused.values()) - q_rows) // 2
    if kv_rows <= 0:
        return  # tensors of q, k or v are missing, which reading them reports by name
    if any((q_rows, kv_rows) == (heads * width, kv_heads * width) for width in head_dims):
        return
    if q_rows * kv_heads == kv_rows * heads and q_rows % heads == 0:
        yield (
            f"{_states(source, 'kv_channels', d)}, but the {heads} heads of the tensors are "
            f"{q_rows // heads} wide"
        )
        return
    for field, number, rows, tensors in (
        ("num_attention_heads", heads, q_rows, "q"),
        ("num_query_groups", kv_heads, kv_rows, "k and v"),
    ):
        if rows != number * d:
            actual = f", {rows // d} heads" if rows % d == 0 else ""
            yield (
                f"{_states(source, field, number)} of width {d}, "
                f"but {tensors} of the tensors has {rows} rows{actual}"
            )


def _shapes_of(inventory: TensorInventory, suffix: str) -> Shapes:
    return next((shapes for name, shapes in inventory.shapes.items() if name.endswith(suffix)), {})


def _states(source: ConfigSource, field: str, value: Any) -> str:
    """The value of a field in words: what config.json says, or what its silence means."""
    key = _config_key(source.family, field)
    mapping = next((m for m in source.family.config_mappings if m.hf_key == key), None)
    if mapping is None:
        return f"a model of family {source.family.name} has {key} = {json.dumps(value)}"
    spellings = (mapping.hf_key, *mapping.aliases)
    if source.config_json is None or any(source.config_json.get(name) is not None for name in spellings):
        return f"config.json says {key} = {json.dumps(value)}"
    return f"config.json does not say {key}, which means {json.dumps(value)}"


def _config_key(family: Family, field: str) -> str:
    """The key of a field in config.json."""
    keys = (mapping.hf_key for mapping in family.config_mappings if field in mapping.fields)
    return next(keys, IMPLICIT_KEYS.get(field, field))
