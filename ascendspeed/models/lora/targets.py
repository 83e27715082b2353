"""LoRA adapters as data: which matrices of a model may have one, by which names, and of which shapes. No torch.

An adapter belongs to one matrix of the Hugging Face model, so that a directory of peft maps one to one; several of them (q, k, v)
lie in one linear of Megatron-core's. A family with names of its own (InternLM2's wqkv) may be adapted under Llama's names too.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ascendspeed.config.schema import LoraConfig, ModelConfig, ParallelConfig
from ascendspeed.models.families import FAMILIES, REFERENCE
from ascendspeed.models.families.base import ParamMapping, param_shape
from ascendspeed.utils.errors import UserError

LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""Megatron-core's linears of a layer, which may have adapters."""
MEGATRON_NAMES = {  # Megatron's names, new and old, for all matrices in one of its linears
    **{name: name for name in LINEARS},
    "query_key_value": "linear_qkv",
    "dense": "linear_proj",
    "dense_h_to_4h": "linear_fc1",
    "proj": "linear_fc1",
    "dense_4h_to_h": "linear_fc2",
}
ALL = "all-linear"


@dataclass(frozen=True)
class LoraTarget:
    """A matrix of every layer that has an adapter: A [rank, inputs] and B [outputs, rank]."""

    mapping: ParamMapping
    """Whose parameter it is, or is a block of."""
    hf_module: str
    """Its module in the Hugging Face model, such as model.layers.{l}.self_attn.q_proj."""
    inputs: int
    outputs: int

    @property
    def linear(self) -> str:
        """One of LINEARS."""
        return self.mapping.megatron_param.split(".")[-2]

    @property
    def leaf(self) -> str:
        """The last word of its name, which is that of --lora-target-modules."""
        return self.hf_module.rpartition(".")[2]

    def megatron_name(self, which: str, layer: int) -> str:
        """Our name of its A or B in a layer."""
        return f"{self.mapping.megatron_param.removesuffix('weight').format(l=layer)}lora.{self.leaf}_{which}"

    def shape(self, which: str, rank: int) -> tuple[int, int]:
        """Of its A or B."""
        return (rank, self.inputs) if which == "A" else (self.outputs, rank)


def targets_of(model: ModelConfig, rows: Iterable[ParamMapping] | None = None) -> list[LoraTarget]:
    """Every matrix that may have an adapter, in the model's order, by its family's rows or by others for the same parameters."""
    found = []
    for row in FAMILIES[model.family].mappings_of(model, rows):
        *_, linear, kind = row.megatron_param.split(".")
        if kind != "weight" or linear not in LINEARS or "{e}" in row.megatron_param:
            continue
        outputs, inputs = param_shape(model, row)
        sizes = blocks(model, row) if len(row.hf_params) > 1 else [outputs]
        found += [
            LoraTarget(row, name.removesuffix(".weight"), inputs, n)
            for name, n in zip(row.hf_params, sizes, strict=True)
        ]
    return found


def blocks(model: ModelConfig, row: ParamMapping) -> list[int]:
    """Rows of each block of a parameter: all of them; q, k and v; gate and up."""
    rows, kv = param_shape(model, row)[0], model.kv_heads * model.head_dim
    return {"one": [rows], "glu": [rows // 2] * 2, "qkv": [rows - 2 * kv, kv, kv]}[row.fusion]


def naming_schemes(model: ModelConfig) -> Iterator[list[LoraTarget]]:
    """The ways to name the matrices of a model: its family's own, and Llama's."""
    own = targets_of(model)
    yield own
    llama = targets_of(model, REFERENCE.param_mappings)
    if {t.hf_module for t in llama} != {t.hf_module for t in own}:
        yield llama


def selected_targets(model: ModelConfig, lora: LoraConfig) -> list[LoraTarget]:
    """The matrices that have an adapter in a run, in the model's order; none when LoRA is off."""
    if not lora.lora_rank:
        return []
    names = target_names(model, lora.lora_target_modules)
    ways = ([target for target in targets if target.leaf in names] for targets in naming_schemes(model))
    return next(way for way in ways if len(way) == len(names))


def target_names(model: ModelConfig, words: Sequence[str]) -> tuple[str, ...]:
    """--lora-target-modules as the names of single matrices, in the model's order.

    Raises `UserError` for a name that does not exist, or for a mixture of a family's own names and Llama's.
    """
    words = [word for text in words for word in text.split(",") if word]
    own, *others = ({target.leaf: target.linear for target in targets} for targets in naming_schemes(model))
    if not words:
        raise UserError(f"--lora-target-modules names nothing; there are {_known(own, others)}")
    for names in (own, *others):
        if all(word == ALL or word in MEGATRON_NAMES or word in names for word in words):
            linears = {MEGATRON_NAMES.get(word) for word in words}
            return tuple(
                name for name, linear in names.items() if ALL in words or name in words or linear in linears
            )
    unknown = [
        word
        for word in words
        if word not in (ALL, *MEGATRON_NAMES) and not any(word in names for names in (own, *others))
    ]
    if unknown:
        raise UserError(
            f"--lora-target-modules {' '.join(unknown)}: no such matrix; there are {_known(own, others)}"
        )
    raise UserError(
        f"--lora-target-modules {' '.join(words)} mixes two ways to name the matrices; use one of {_known(own, others)}"
    )


def _known(own: Iterable[str], others: Sequence[Iterable[str]]) -> str:
    ways = " or ".join(" ".join(names) for names in (own, *others))
    return f"{ways} (or {ALL}, {' '.join(MEGATRON_NAMES)})"


def parameter_count(model: ModelConfig, lora: LoraConfig, parallel: ParallelConfig | None = None) -> int:
    """Parameters of all adapters; with `parallel` those of one tensor- and pipeline-parallel rank."""
    tp, pp = (
        (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size) if parallel else (1, 1)
    )
    sizes = ((t.mapping.partition == "columns", t.inputs, t.outputs) for t in selected_targets(model, lora))
    widths = sum(
        inputs // tp + outputs if columns else inputs + outputs // tp for columns, inputs, outputs in sizes
    )
    return -(-model.num_layers // pp) * lora.lora_rank * widths


def resolve_config(model: ModelConfig, lora: LoraConfig) -> LoraConfig:
    """The same with its target modules as single names. Raises `UserError` for what means nothing or is not supported."""
    if not lora.lora_rank:
        if lora != LoraConfig():
            raise UserError(
                "--lora-alpha, --lora-target-modules and so on mean nothing without --lora-rank; add it"
            )
        return lora
    if model.num_experts:
        raise UserError(
            f"--lora-rank {lora.lora_rank}: models with experts ({model.family}) cannot have adapters here"
        )
    return replace(lora, lora_target_modules=target_names(model, lora.lora_target_modules))
