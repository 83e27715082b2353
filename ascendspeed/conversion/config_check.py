"""Where a config.json and the tensors beside it are not of one model, said in the words of config.json. No torch."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from ascendspeed.config.schema import ModelConfig
from ascendspeed.models.families import FAMILIES, Family

Shapes = Mapping[str, tuple[int, ...]]
FUSED = (".experts.gate_up_proj", ".experts.down_proj")
"""How transformers 5 hold the experts of a layer in memory; `save_pretrained` takes them apart."""


class TensorInventory(NamedTuple):
    """What the tensors say."""

    layers: int
    experts: int
    rows: Mapping[str, Mapping[str, tuple[int, ...]]]
    """Our name, with {l} and {e} -> the stored names of the first layer and expert that has it, and their shapes."""


def config_mismatches(config: ModelConfig, shapes: Shapes) -> list[str]:
    """What `config`, as read from a config.json, says otherwise than tensors of these names and shapes; a line each.

    Empty where shapes cannot tell (the number of heads, when each is hidden size / heads wide), and when no tensor is known at all.
    """
    fused = next((name for name in shapes if name.endswith(FUSED)), None)
    if fused:
        return [
            f"{fused} holds all experts of a layer, as transformers 5 keep them in memory: write the model by save_pretrained"
        ]
    family = FAMILIES[config.family]
    seen = _look(family, shapes)
    if not seen.rows:
        return []
    return [*_counts(family, config, seen), *_switches(family, config, seen), *_sizes(family, config, seen)]


def _look(family: Family, shapes: Shapes) -> TensorInventory:
    """By the rows of the family, those that `config` does not want included."""
    patterns = [(row, _pattern(name)) for row in family.param_mappings for name in row.hf_params]
    numbers: dict[str, set[int]] = {"l": set(), "e": set()}
    found: dict[str, dict[tuple[int, int], dict[str, tuple[int, ...]]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for name, shape in shapes.items():
        for row, pattern in patterns:
            match = pattern.fullmatch(name)
            if match:
                at = {letter: int(number) for letter, number in match.groupdict().items()}
                for letter, number in at.items():
                    numbers[letter].add(number)
                found[row.megatron_param][at.get("l", 0), at.get("e", 0)][name] = tuple(shape)
    first = {ours: by_place[min(by_place)] for ours, by_place in found.items()}
    return TensorInventory(*(max(numbers[letter], default=-1) + 1 for letter in "le"), first)


def _pattern(name: str) -> re.Pattern[str]:
    escaped = re.escape(name).replace(r"\{l\}", r"(?P<l>\d{1,6})").replace(r"\{e\}", r"(?P<e>\d{1,6})")
    return re.compile(escaped)


def _counts(family: Family, config: ModelConfig, seen: TensorInventory) -> Iterator[str]:
    for field, count, what in (
        ("num_layers", seen.layers, "layers"),
        ("num_experts", seen.experts, "experts"),
    ):
        if count and count != getattr(config, field):
            yield f"{_says(family, field, getattr(config, field))}, but the tensors have {count} {what}"


def _switches(family: Family, config: ModelConfig, seen: TensorInventory) -> Iterator[str]:
    """Tensors that are there, or not, against a boolean; an entry of config.json is named once."""
    said = set()
    for row in family.param_mappings:
        flag, wanted = row.condition.lstrip("!"), row in tuple(family.mappings_of(config))
        entry = _entry(family, flag)
        if flag and wanted != (row.megatron_param in seen.rows) and entry not in said:
            said.add(entry)
            name = row.hf_params[0].format(l=0, e=0)
            yield f"{_says(family, flag, getattr(config, flag))}, but the tensors have {'no' if wanted else 'a'} {name}"


def _sizes(family: Family, config: ModelConfig, seen: TensorInventory) -> Iterator[str]:
    """Widths, each judged with the ones before it as the tensors have them, so that one error is said once."""
    as_said = config.head_dim
    for field, suffix, dimension in SIZES:
        ours = next((name for name in seen.rows if name.endswith(suffix) and _fits(field, name)), None)
        if ours is None:
            continue
        name, shape = next(iter(seen.rows[ours].items()))
        said = getattr(config, field) or config.expert_ffn
        if len(shape) > dimension and shape[dimension] != said:
            yield f"{_says(family, field, said)}, but {name} is {list(shape)}"
            config = replace(config, **{field: shape[dimension]})
    yield from _heads(family, config, seen, {as_said, config.head_dim})


SIZES = (
    ("hidden_size", "final_layernorm.weight", 0),
    ("hidden_size", "input_layernorm.weight", 0),
    ("vocab_size", "word_embeddings.weight", 0),
    ("ffn_hidden_size", "linear_fc2.weight", 1),
    ("moe_ffn_hidden_size", "linear_fc2.weight", 1),
    ("moe_shared_expert_intermediate_size", "linear_fc2.weight", 1),
)
"""Field, end of our name, and the dimension of the stored tensor that it is."""
PLACES = {"moe_ffn_hidden_size": ".experts.", "moe_shared_expert_intermediate_size": ".shared_experts."}


def _fits(field: str, ours: str) -> bool:
    """Whether a parameter lies where the field holds: in the MLP, in an expert or in the shared one."""
    wanted = PLACES.get(field)
    return wanted in ours if wanted else not any(place in ours for place in PLACES.values())


def _heads(family: Family, config: ModelConfig, seen: TensorInventory, widths: set[int]) -> Iterator[str]:
    """The output projection is as wide as all query heads; what is left of q, k and v are the key/value heads, twice.

    `widths` of one head: as config.json says, and as it follows where the hidden size was found to be another.
    """
    output, fused = (_first(seen, f"self_attention.linear_{name}.weight") for name in ("proj", "qkv"))
    if not output or not fused or any(len(shape) != 2 for shape in (*output.values(), *fused.values())):
        return
    heads, groups, d = config.num_attention_heads, config.kv_heads, config.head_dim
    q = next(iter(output.values()))[1]
    kv = (sum(shape[0] for shape in fused.values()) - q) // 2
    names = (_entry(family, "num_attention_heads"), _entry(family, "num_query_groups"))
    if any((q, kv) == (heads * width, groups * width) for width in widths):
        return
    if q * groups == kv * heads and q % heads == 0:
        yield f"{_says(family, 'kv_channels', d)}, but the {heads} heads of the tensors are {q // heads} wide"
        return
    for entry, number, width, what in ((names[0], heads, q, "q"), (names[1], groups, kv, "k and v")):
        if width != number * d:
            many = f", {width // d} heads" if width % d == 0 else ""
            yield f"config.json says {entry} = {number} of width {d}, but {what} of the tensors has {width} rows{many}"


def _first(seen: TensorInventory, suffix: str) -> Mapping[str, tuple[int, ...]]:
    return next((held for ours, held in seen.rows.items() if ours.endswith(suffix)), {})


def _says(family: Family, field: str, value: Any) -> str:
    entry = _entry(family, field)
    if any(entry == key.hf_key for key in family.config_mappings):
        return f"config.json says {entry} = {json.dumps(value)}"
    return f"a model of family {family.name} has {entry} = {json.dumps(value)}"


def _entry(family: Family, field: str) -> str:
    """The field in the words of config.json."""
    keys = (key.hf_key for key in family.config_mappings if field in key.fields)
    return next(keys, IMPLICIT.get(field, field))


IMPLICIT = {
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "moe_ffn_hidden_size": "intermediate_size",
}
"""Words for what some families do not say: key/value heads are as many as heads, a head is hidden size / heads wide."""
